//! The frontend API: flags evaluated for a context.
//!
//! Context fields that the client sends are used unchanged. Two missing fields are filled in: the
//! address, from the connection, and the `sessionId`, with a random one for the request.

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
    answers::{self, EvaluatedFlags, followed},
    snapshot::{Include, FrontendView, body::PreparedBody},
    wire::context,
};

impl From<context::Error> for Failure {
    fn from(error: context::Error) -> Self {
        Self::Context(error.to_string())
    }
}

/// Parses the outcome hash that a streaming client sends as its last event id.
pub fn answer_of(last_event_id: Option<&HeaderValue>) -> Option<u128> {
    followed::parse_event_id(last_event_id?.to_str().ok()?.trim())
}

/// The evaluated flags for one request.
#[derive(Debug)]
pub enum Found {
    /// The response body.
    Body(Arc<PreparedBody>),
    /// The client already has the body with this entity tag.
    Unchanged(HeaderValue),
}

/// Evaluates the flags of `view`, unless the client already has the result.
pub fn evaluated(headers: &HeaderMap, shown: Include, view: &FrontendView, question: Question<'_>) -> Found {
    question.answer(view, |context| {
        let answer = EvaluatedFlags::evaluate(question.snapshot, view, context, shown);
        match revalidated(headers, || answer.etag()) {
            Some(etag) => Found::Unchanged(etag),
            None => Found::Body(answer.body()),
        }
    })
}

/// The entity tag, if the client already has it. The tag depends only on the outcomes, so an unchanged
/// response needs no body.
fn revalidated(headers: &HeaderMap, etag: impl FnOnce() -> HeaderValue) -> Option<HeaderValue> {
    if !headers.contains_key(IF_NONE_MATCH) {
        return None;
    }
    Some(etag()).filter(|etag| conditional::none_match_names(headers, etag))
}

/// The response of `/api/frontend` and `/api/frontend/all`.
pub async fn flags(headers: &HeaderMap, found: Found) -> Reply {
    match found {
        Found::Body(body) => reply::body(headers, &body, Freshness::Revalidate).await,
        Found::Unchanged(etag) => reply::not_modified(&etag, Freshness::Revalidate),
    }
}

/// Like [`flags_response`], if the encoded body is available without waiting.
pub fn flags_at_once(headers: &HeaderMap, found: &Found) -> Option<Reply> {
    match found {
        Found::Body(body) => reply::body_at_once(headers, body, Freshness::Revalidate).ok(),
        Found::Unchanged(etag) => Some(reply::not_modified(etag, Freshness::Revalidate)),
    }
}

/// The response of `/api/frontend/features/{name}`.
pub async fn flag(
    headers: &HeaderMap,
    name: &str,
    question: Question<'_>,
) -> Result<Reply, Failure> {
    let name = decoded(name)?;
    let projects = &question.scope.projects;
    let view = question.snapshot.frontend_view(projects);
    let body = question
        .answer(&view, |context| answers::evaluate_flag(question.snapshot, projects, context, &name))
        .ok_or(Failure::NotFound)?;
    Ok(reply::body(headers, &Arc::new(body), Freshness::Revalidate).await)
}
