//! The OpenFeature Remote Evaluation Protocol (OFREP): evaluates Unleash flags for any OpenFeature SDK.

mod evaluation;
mod refetch_events;
mod stream_ticket;

use std::sync::Arc;

use hyper::{HeaderMap, header::IF_NONE_MATCH};
use jiff::Timestamp;
use xxhash_rust::xxh3::xxh3_128;

use self::evaluation::{hash_outcomes, to_evaluation, to_json};
pub use self::{
    refetch_events::RefetchEvents,
    stream_ticket::{StreamTicket, StreamTicketKey, StreamTickets},
};
use super::{
    client_api::decode_flag_name,
    conditional,
    frontend_api::EvaluationRequest,
    response::{self, CachePolicy, HttpError, HttpResponse},
};
use crate::{
    evaluation::EvaluatedFlags,
    protocol::ofrep::{
        BulkEvaluationSuccess, ErrorCode, EvaluationFailure, EventStream, RequestError,
    },
    snapshot::{
        Filter, Include, SegmentFormat,
        prepared_body::{PreparedBody, Reuse, etag_from_hash},
    },
    token::TokenDigest,
};

impl From<RequestError> for HttpError {
    fn from(unreadable: RequestError) -> Self {
        match unreadable {
            RequestError::Body(_) => Self::Malformed(unreadable.to_string()),
            RequestError::ContextNotObject | RequestError::Context(_) => {
                Self::InvalidContext(unreadable.to_string())
            }
        }
    }
}

/// `/ofrep/v1/evaluate/flags`: evaluates every flag in the token's scope, and returns the URL of the
/// event stream. `events` is the path of that stream as the provider reaches it.
pub async fn evaluate_flags(
    headers: &HeaderMap,
    evaluation: EvaluationRequest<'_>,
    digest: &TokenDigest,
    tickets: &StreamTickets,
    events: &str,
) -> HttpResponse {
    let EvaluationRequest { context: request_context, snapshot, scope, .. } = evaluation;
    let engine = snapshot.engine();
    let view = snapshot.frontend_view(&scope.projects);
    let now = Timestamp::now();
    let context_json = request_context.to_json();
    let draw = if view.inputs().can_be_random() { rand::random() } else { 0 };
    let evaluation = EvaluationRequest { random_seed: Some(draw), ..evaluation };
    let body = evaluation.with_context(&view, |context| {
        let answer = EvaluatedFlags::evaluate(snapshot, &view, context, Include::All);
        // Without randomness the ticket stays the same, so a provider that evaluates again keeps its
        // stream.
        let draw = if answer.is_deterministic() { 0 } else { draw };
        let outcomes = answer.hash();
        // The entity tag covers the flags, the token, the context, the outcomes and the ticket's period:
        // a client with this tag also has a valid ticket for this context. The tag of a cached
        // evaluation is known without evaluating anything.
        let flags =
            snapshot.client_features(&scope.projects, Filter::default(), SegmentFormat::Separate);
        let period = StreamTickets::period(digest, &context_json, now);
        let (outcomes, period) = (outcomes.to_le_bytes(), period.to_le_bytes());
        let parts = [flags.etag().as_bytes(), digest.as_bytes(), &outcomes, &period];
        let hash = xxh3_128(&[&parts.concat(), context_json.as_bytes()].concat());
        if headers.contains_key(IF_NONE_MATCH) {
            let etag = etag_from_hash(hash);
            if conditional::if_none_match_matches(headers, &etag) {
                return Err(etag);
            }
        }
        let stream_hash = hash_outcomes(snapshot, &view, context);
        let ticket = tickets.issue(digest, (stream_hash, draw), &context_json, now);
        let stream = |ticket| [EventStream::sse(format!("{events}?ticket={ticket}"))];
        let bound = engine.bind(context);
        let in_scope =
            engine.ids().filter(|&id| scope.projects.contains(engine.flag(id).project()));
        let flags =
            in_scope.map(|id| to_evaluation(engine, id, engine.evaluate(id, &bound))).collect();
        let all = BulkEvaluationSuccess { flags, event_streams: ticket.map(stream) };
        Ok(PreparedBody::with_hash(to_json(&all), hash).with_reuse(Reuse::Once))
    });
    match body {
        Ok(body) => {
            response::negotiate_body(headers, &Arc::new(body), CachePolicy::PrivateNoCache).await
        }
        Err(etag) => response::not_modified(&etag, CachePolicy::PrivateNoCache),
    }
}

/// `/ofrep/v1/evaluate/flags/{key}`: evaluates one flag.
pub async fn evaluate_flag(
    headers: &HeaderMap,
    key: &str,
    evaluation: EvaluationRequest<'_>,
) -> Result<HttpResponse, HttpError> {
    let EvaluationRequest { snapshot, scope, .. } = evaluation;
    let (engine, key) = (snapshot.engine(), decode_flag_name(key)?);
    let found = engine.find(&key).filter(|&id| scope.projects.contains(engine.flag(id).project()));
    let id = found.ok_or(HttpError::NotFound)?;
    let view = snapshot.frontend_view(&scope.projects);
    let body = evaluation.with_context(&view, |context| {
        let outcome = engine.evaluate(id, &engine.bind(context));
        to_json(&to_evaluation(engine, id, outcome))
    });
    Ok(response::negotiate_body(
        headers,
        &Arc::new(PreparedBody::new(body)),
        CachePolicy::PrivateNoCache,
    )
    .await)
}

/// An error in OFREP's format. `key` is the requested flag; `None` means all flags.
pub fn error_response(key: Option<&str>, error: &HttpError) -> HttpResponse {
    let error_code = match error {
        HttpError::InvalidContext(_) => Some(ErrorCode::InvalidContext),
        HttpError::Malformed(_) | HttpError::UnsupportedMediaType => Some(ErrorCode::ParseError),
        HttpError::NotFound if key.is_some() => Some(ErrorCode::FlagNotFound),
        _ => None,
    };
    let key = key.and_then(|key| decode_flag_name(key).ok());
    let error_details = error.to_string();
    response::error_with_body(
        error,
        &EvaluationFailure { key: key.as_deref(), error_code, error_details },
    )
}
