//! The frontend API: flags evaluated for a context.
//!
//! Context fields that the client sends are used unchanged. Two missing fields are filled in: the
//! address, from the connection, and the `sessionId`, with a random one for the request.

mod evaluation_request;
mod flag_events;

use std::sync::Arc;

use hyper::{
    HeaderMap,
    header::{HeaderValue, IF_NONE_MATCH},
};

pub use self::{
    evaluation_request::{EvaluationRequest, Subscriber},
    flag_events::{DateTrigger, FlagEvents},
};
use super::{
    client_api::decode_flag_name,
    conditional,
    response::{self, CachePolicy, HttpError, HttpResponse},
};
use crate::{
    evaluation::{self, EvaluatedFlags, subscription},
    protocol::context,
    snapshot::{Include, prepared_body::PreparedBody},
};

impl From<context::Error> for HttpError {
    fn from(error: context::Error) -> Self {
        Self::InvalidContext(error.to_string())
    }
}

/// Parses the outcome hash that a streaming client sends as its last event id.
pub fn parse_last_event_id(last_event_id: Option<&HeaderValue>) -> Option<u128> {
    subscription::parse_event_id(last_event_id?.to_str().ok()?.trim())
}

/// The evaluated flags for one request.
#[derive(Debug)]
pub enum EvaluationResponse {
    /// The response body.
    Body(Arc<PreparedBody>),
    /// The client already has the body with this entity tag.
    NotModified(HeaderValue),
}

/// Evaluates all flags in the token's scope, unless the client already has the result.
pub fn evaluate(
    headers: &HeaderMap,
    include: Include,
    request: EvaluationRequest<'_>,
) -> EvaluationResponse {
    let view = request.snapshot.frontend_view(&request.scope.projects);
    request.with_context(&view, |context| {
        let flags = EvaluatedFlags::evaluate(request.snapshot, &view, context, include);
        match matching_etag(headers, || flags.etag()) {
            Some(etag) => EvaluationResponse::NotModified(etag),
            None => EvaluationResponse::Body(flags.body()),
        }
    })
}

/// The entity tag, if the client already has it. The tag depends only on the outcomes, so an unchanged
/// response needs no body.
fn matching_etag(headers: &HeaderMap, etag: impl FnOnce() -> HeaderValue) -> Option<HeaderValue> {
    if !headers.contains_key(IF_NONE_MATCH) {
        return None;
    }
    Some(etag()).filter(|etag| conditional::if_none_match_matches(headers, etag))
}

/// The response of `/api/frontend` and `/api/frontend/all`.
pub async fn flags_response(headers: &HeaderMap, flags: EvaluationResponse) -> HttpResponse {
    match flags {
        EvaluationResponse::Body(body) => {
            response::negotiate_body(headers, &body, CachePolicy::NoCache).await
        }
        EvaluationResponse::NotModified(etag) => {
            response::not_modified(&etag, CachePolicy::NoCache)
        }
    }
}

/// Like [`flags_response`], if the encoded body is available without waiting.
pub fn flags_response_now(headers: &HeaderMap, flags: &EvaluationResponse) -> Option<HttpResponse> {
    match flags {
        EvaluationResponse::Body(body) => {
            response::negotiate_body_now(headers, body, CachePolicy::NoCache).ok()
        }
        EvaluationResponse::NotModified(etag) => {
            Some(response::not_modified(etag, CachePolicy::NoCache))
        }
    }
}

/// The response of `/api/frontend/features/{name}`.
pub async fn flag_response(
    headers: &HeaderMap,
    name: &str,
    request: EvaluationRequest<'_>,
) -> Result<HttpResponse, HttpError> {
    let name = decode_flag_name(name)?;
    let projects = &request.scope.projects;
    let view = request.snapshot.frontend_view(projects);
    let body = request
        .with_context(&view, |context| {
            evaluation::evaluate_flag(request.snapshot, projects, context, &name)
        })
        .ok_or(HttpError::NotFound)?;
    Ok(response::negotiate_body(headers, &Arc::new(body), CachePolicy::NoCache).await)
}
