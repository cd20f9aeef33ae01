//! What answers requests.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use hyper::{Request, body::Incoming};

use super::info::ConnectionInfo;
use crate::http::reply::Reply;

/// What answers requests.
pub trait Service: Send + Sync + 'static {
    /// Answers one request of a connection, or says how.
    ///
    /// This runs on the connection's task: what takes long, or waits, is left to the answer's future.
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> Answer;
}

/// An answer to a request.
pub enum Answer {
    /// It is there. Most requests are answered so: a future would be moved about and boxed for nothing.
    Ready(Reply),
    /// It has to be waited for.
    Later(Pin<Box<dyn Future<Output = Reply> + Send>>),
}

impl Answer {
    /// One that has to be waited for.
    pub fn later(reply: impl Future<Output = Reply> + Send + 'static) -> Self {
        Self::Later(Box::pin(reply))
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(reply) => f.debug_tuple("Ready").field(reply).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}
