//! Has the requests of one connection answered, as its protocol wants it.

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
    activity::Activity,
    answer_body::AnswerBody,
    drain::Drain,
    info::ConnectionInfo,
    limits,
    service::{Answer, Service},
};
use crate::http::reply::{Failure, Outgoing, Reply};

/// Has the requests of one connection answered.
pub(super) struct RequestHandler<S> {
    pub(super) service: Arc<S>,
    pub(super) info: Arc<ConnectionInfo>,
    pub(super) activity: Arc<Activity>,
    pub(super) drain: Drain,
}

/// What hyper sends.
pub(super) type Sent = Result<hyper::Response<AnswerBody>, Infallible>;

impl<S: Service> RequestHandler<S> {
    pub(super) fn handle_http1(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Sent> + Send + use<S> {
        self.activity.note_request(!request.body().is_end_stream());
        match self.answer(request) {
            Answer::Ready(reply) => {
                let is_last = self.drain.has_begun() || self.activity.is_last();
                let open = matches!(reply.body(), Outgoing::Live(_)).then(|| self.activity.open());
                Either::Left(ready(Ok(AnswerBody::whole(with_close(reply, is_last), open))))
            }
            Answer::Later(reply) => {
                let open = self.activity.open();
                let (activity, drain) = (Arc::clone(&self.activity), self.drain.clone());
                let reply = AssertUnwindSafe(reply).catch_unwind();
                Either::Right(Box::pin(async move {
                    let reply = reply.await.unwrap_or_else(|_| panicked());
                    let is_last = drain.has_begun() || activity.is_last();
                    let open = matches!(reply.body(), Outgoing::Live(_)).then_some(open);
                    Ok(AnswerBody::whole(with_close(reply, is_last), open))
                }))
            }
        }
    }

    /// Runs as a task of its own.
    pub(super) async fn handle_http2(self: Arc<Self>, request: Request<Incoming>) -> Sent {
        let mut open = self.activity.open();
        self.activity.note_request(false);
        open.reserve(limits::ANSWER_BYTES, limits::WAITING_BYTES).await;
        let reply = match self.answer(request) {
            Answer::Ready(reply) => reply,
            Answer::Later(reply) => {
                AssertUnwindSafe(reply).catch_unwind().await.unwrap_or_else(|_| panicked())
            }
        };
        Ok(AnswerBody::in_pieces(reply, open))
    }

    /// Answers, with a 500 where answering panics: one request's fault must not take its connection's
    /// other requests along.
    fn answer(&self, request: Request<Incoming>) -> Answer {
        catch_unwind(AssertUnwindSafe(|| self.service.call(request, &self.info)))
            .unwrap_or_else(|_| Answer::Ready(panicked()))
    }
}

fn panicked() -> Reply {
    error!("Answering a request panicked");
    Reply::from(Failure::Internal)
}

/// The answer, which tells its client where it is the last on its connection (RFC 9112, section 9.6).
fn with_close(mut reply: Reply, is_last: bool) -> Reply {
    if is_last {
        reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    reply
}
