//! Passes the requests of one connection to the service, over HTTP/1 or HTTP/2.

use std::{
    convert::Infallible,
    future::{Future, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use futures_util::{FutureExt as _, future::Either};
use hyper::{
    Request,
    body::{Body as _, Incoming},
    header::{CONNECTION, HeaderValue},
};
use tracing::error;

use super::{
    connection_activity::ConnectionActivity,
    connection_info::ConnectionInfo,
    connection_limits,
    drain::Drain,
    response_body::{HttpResponse, ResponseBody},
    service::{HttpService, ServiceResponse},
    tracked_body::TrackedBody,
};

/// Passes the requests of one connection to the service.
pub(super) struct RequestHandler<S> {
    pub(super) service: Arc<S>,
    pub(super) info: Arc<ConnectionInfo>,
    pub(super) activity: Arc<ConnectionActivity>,
    pub(super) drain: Drain,
}

/// A response for hyper to send.
pub(super) type HandlerResult = Result<hyper::Response<TrackedBody>, Infallible>;

impl<S: HttpService> RequestHandler<S> {
    pub(super) fn handle_http1(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = HandlerResult> + Send + use<S> {
        self.activity.record_request(!request.body().is_end_stream());
        match self.call_service(request) {
            ServiceResponse::Ready(reply) => {
                let is_last = self.drain.is_draining() || self.activity.is_closing_after_response();
                let in_flight = matches!(reply.body(), ResponseBody::Stream(_))
                    .then(|| self.activity.begin_response());
                Either::Left(ready(Ok(TrackedBody::for_http1(
                    with_close_header(reply, is_last),
                    in_flight,
                ))))
            }
            ServiceResponse::Deferred(reply) => {
                let in_flight = self.activity.begin_response();
                let (activity, drain) = (Arc::clone(&self.activity), self.drain.clone());
                let reply = AssertUnwindSafe(reply).catch_unwind();
                Either::Right(Box::pin(async move {
                    let reply = reply.await.unwrap_or_else(|_| panic_response::<S>());
                    let is_last = drain.is_draining() || activity.is_closing_after_response();
                    let in_flight =
                        matches!(reply.body(), ResponseBody::Stream(_)).then_some(in_flight);
                    Ok(TrackedBody::for_http1(with_close_header(reply, is_last), in_flight))
                }))
            }
        }
    }

    /// Runs in a task per request.
    pub(super) async fn handle_http2(self: Arc<Self>, request: Request<Incoming>) -> HandlerResult {
        let mut in_flight = self.activity.begin_response();
        self.activity.record_request(false);
        in_flight
            .reserve(
                connection_limits::RESPONSE_RESERVATION_BYTES,
                connection_limits::MAX_PENDING_RESPONSE_BYTES,
            )
            .await;
        let reply = match self.call_service(request) {
            ServiceResponse::Ready(reply) => reply,
            ServiceResponse::Deferred(reply) => AssertUnwindSafe(reply)
                .catch_unwind()
                .await
                .unwrap_or_else(|_| panic_response::<S>()),
        };
        Ok(TrackedBody::for_http2(reply, in_flight))
    }

    /// Calls the service. A panic results in a 500, so that it does not end the other requests of the
    /// connection.
    fn call_service(&self, request: Request<Incoming>) -> ServiceResponse {
        catch_unwind(AssertUnwindSafe(|| self.service.call(request, &self.info)))
            .unwrap_or_else(|_| ServiceResponse::Ready(panic_response::<S>()))
    }
}

fn panic_response<S: HttpService>() -> HttpResponse {
    error!("A request handler panicked; the client gets a 500");
    S::panic_response()
}

/// Adds `Connection: close` to the last response on a connection (RFC 9112, section 9.6).
fn with_close_header(mut reply: HttpResponse, is_last: bool) -> HttpResponse {
    if is_last {
        reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    reply
}
