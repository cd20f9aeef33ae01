//! How an instance takes leave of its clients.
//!
//! First with words: every answer says that its connection ends, so that connections leave as they are
//! used and no client loses a request. Then connections that are not in use are closed. Who waits for
//! either is a connection; when it is time for them is the application's business.

use crate::http::stop::Stop;

/// The signs that connections watch. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Answers say that their connection ends.
    pub(super) draining: Stop,
    /// Connections end when nothing is under way on them.
    pub(super) closing: Stop,
}

impl Drain {
    /// From now on every answer tells its client to go elsewhere; new connections are served still.
    pub fn begin(&self) {
        self.draining.give();
    }

    /// From now on nothing is accepted, idle connections are closed and busy ones finish.
    pub fn close(&self) {
        self.draining.give();
        self.closing.give();
    }

    /// Whether answers are to say that their connection ends.
    pub fn has_begun(&self) -> bool {
        self.draining.is_given()
    }

    /// Whether connections are to end.
    pub fn is_closing(&self) -> bool {
        self.closing.is_given()
    }
}
