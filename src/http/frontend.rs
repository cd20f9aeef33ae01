//! The API of frontend SDKs: flags evaluated for a context.
//!
//! A context field that the client sends is used as sent. What it leaves out is completed here: the
//! address from its connection, and a `sessionId` by one that is made up for the request.

mod changes;
mod question;

use std::sync::Arc;

use hyper::{
    HeaderMap,
    header::{HeaderValue, IF_NONE_MATCH},
};

pub use self::{
    changes::{Changes, Wake},
    question::{Asker, Question},
};
use super::{
    client::decoded,
    conditional,
    reply::{self, Failure, Freshness, Reply},
};
use crate::{
    answers::{self, Answer, followed},
    snapshot::{Shown, View, body::Body},
    wire::context,
};

impl From<context::Error> for Failure {
    fn from(error: context::Error) -> Self {
        Self::Context(error.to_string())
    }
}

/// The hash of the answer that a client which follows says it has.
pub fn answer_of(last_event_id: Option<&HeaderValue>) -> Option<u128> {
    followed::parse_id(last_event_id?.to_str().ok()?.trim())
}

/// What a question came to.
#[derive(Debug)]
pub enum Found {
    /// This body.
    Body(Arc<Body>),
    /// The one of this entity tag, which the client has.
    Unchanged(HeaderValue),
}

/// Answers a question about the flags of `view`.
pub fn evaluated(headers: &HeaderMap, shown: Shown, view: &View, question: Question<'_>) -> Found {
    question.answer(view, |context| {
        let answer = Answer::of(question.snapshot, view, context, shown);
        match revalidated(headers, || answer.etag()) {
            Some(etag) => Found::Unchanged(etag),
            None => Found::Body(answer.body()),
        }
    })
}

/// The answer's entity tag, if the client has that: decided by the outcome alone, an unchanged answer
/// needs no body.
fn revalidated(headers: &HeaderMap, etag: impl FnOnce() -> HeaderValue) -> Option<HeaderValue> {
    if !headers.contains_key(IF_NONE_MATCH) {
        return None;
    }
    Some(etag()).filter(|etag| conditional::none_match_names(headers, etag))
}

/// `/api/frontend` and `/api/frontend/all`.
pub async fn flags(headers: &HeaderMap, found: Found) -> Reply {
    match found {
        Found::Body(body) => reply::body(headers, &body, Freshness::Revalidate).await,
        Found::Unchanged(etag) => reply::not_modified(&etag, Freshness::Revalidate),
    }
}

/// The same, if it need not be waited for.
pub fn flags_at_once(headers: &HeaderMap, found: &Found) -> Option<Reply> {
    match found {
        Found::Body(body) => reply::body_at_once(headers, body, Freshness::Revalidate).ok(),
        Found::Unchanged(etag) => Some(reply::not_modified(etag, Freshness::Revalidate)),
    }
}

/// `/api/frontend/features/{name}`.
pub async fn flag(
    headers: &HeaderMap,
    name: &str,
    question: Question<'_>,
) -> Result<Reply, Failure> {
    let name = decoded(name)?;
    let projects = &question.scope.projects;
    let view = question.snapshot.view(projects);
    let body = question
        .answer(&view, |context| answers::one(question.snapshot, projects, context, &name))
        .ok_or(Failure::NotFound)?;
    Ok(reply::body(headers, &Arc::new(body), Freshness::Revalidate).await)
}
