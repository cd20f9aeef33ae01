//! Graceful shutdown of connections, in two phases.
//!
//! While draining, every response announces that its connection closes, so that connections close as
//! they are used and no client loses a request. While closing, idle connections are closed as well.
//! Connections react to both signals. The application decides when to send them.

use crate::shutdown_signal::ShutdownSignal;

/// The shutdown signals that connections watch. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    /// Responses announce that their connection closes.
    pub(super) draining: ShutdownSignal,
    /// Connections close as soon as they are idle.
    pub(super) closing: ShutdownSignal,
}

impl Drain {
    /// Starts draining: every response announces that its connection closes. New connections are
    /// accepted.
    pub fn begin_draining(&self) {
        self.draining.trigger();
    }

    /// Starts closing: stops accepting, closes idle connections and lets busy ones finish.
    pub fn begin_closing(&self) {
        self.draining.trigger();
        self.closing.trigger();
    }

    /// Whether responses announce that their connection closes.
    pub fn is_draining(&self) -> bool {
        self.draining.is_triggered()
    }

    /// Whether connections close as soon as they are idle.
    pub fn is_closing(&self) -> bool {
        self.closing.is_triggered()
    }
}
