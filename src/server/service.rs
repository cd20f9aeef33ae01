//! The interface between the server and request handling.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use hyper::{Request, StatusCode, body::Incoming};

use super::{connection_info::ConnectionInfo, response_body::HttpResponse};

/// Handles the requests of a server.
pub trait HttpService: Send + Sync + 'static {
    /// Handles one request of a connection.
    ///
    /// This runs in the connection's task. Work that waits or takes long belongs in a
    /// [`ServiceResponse::Deferred`].
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> ServiceResponse;

    /// The response to a request whose handler panicked: 500. A service with a format of errors
    /// overrides it.
    fn panic_response() -> HttpResponse {
        let mut response = HttpResponse::default();
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    }
}

/// The response to a request, or a future of it.
pub enum ServiceResponse {
    /// A response that is available now. Most are, and need no boxed future.
    Ready(HttpResponse),
    /// A response that has to be awaited.
    Deferred(Pin<Box<dyn Future<Output = HttpResponse> + Send>>),
}

impl ServiceResponse {
    /// Boxes the future of a response.
    pub fn deferred(reply: impl Future<Output = HttpResponse> + Send + 'static) -> Self {
        Self::Deferred(Box::pin(reply))
    }
}

impl fmt::Debug for ServiceResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(reply) => f.debug_tuple("Ready").field(reply).finish(),
            Self::Deferred(_) => f.write_str("Deferred"),
        }
    }
}
