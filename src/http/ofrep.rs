//! The OpenFeature Remote Evaluation Protocol: Unleash's flags for any OpenFeature SDK.
//!
//! An outcome becomes a typed value so: without a payload, whether the flag is on; with one, what the
//! payload says it is. A flag whose variants have payloads has no value while it is off, so that the
//! application uses its own default instead of a value of another type.

use std::sync::Arc;

use hyper::HeaderMap;

use super::{
    client::decoded,
    frontend::Question,
    reply::{self, Failure, Freshness, Reply},
};
use crate::{
    engine::{Bound, Engine, FlagId, Outcome},
    snapshot::body::Body,
    wire::ofrep::{
        self as wire, ErrorCode, Evaluation, Evaluations, Metadata, Reason, Refusal, Unreadable,
        Value,
    },
};

impl From<Unreadable> for Failure {
    fn from(unreadable: Unreadable) -> Self {
        match unreadable {
            Unreadable::Body(_) => Self::Malformed(unreadable.to_string()),
            Unreadable::NoObject | Unreadable::Context(_) => Self::Context(unreadable.to_string()),
        }
    }
}

/// `/ofrep/v1/evaluate/flags`: every flag that the token sees.
pub async fn flags(headers: &HeaderMap, question: Question<'_>) -> Reply {
    let Question { snapshot, scope, .. } = question;
    let engine = snapshot.engine();
    let view = snapshot.view(&scope.projects);
    let body = question.answer(&view, |context| {
        let bound = engine.bind(context);
        let seen = engine.ids().filter(|&id| scope.projects.contains(engine.flag(id).project()));
        json(&Evaluations { flags: seen.map(|id| evaluation(engine, id, &bound)).collect() })
    });
    reply::body(headers, &Arc::new(body), Freshness::Revalidate).await
}

/// `/ofrep/v1/evaluate/flags/{key}`: one of them.
pub async fn flag(
    headers: &HeaderMap,
    key: &str,
    question: Question<'_>,
) -> Result<Reply, Failure> {
    let Question { snapshot, scope, .. } = question;
    let (engine, key) = (snapshot.engine(), decoded(key)?);
    let found = engine.find(&key).filter(|&id| scope.projects.contains(engine.flag(id).project()));
    let id = found.ok_or(Failure::NotFound)?;
    let view = snapshot.view(&scope.projects);
    let body =
        question.answer(&view, |context| json(&evaluation(engine, id, &engine.bind(context))));
    Ok(reply::body(headers, &Arc::new(body), Freshness::Revalidate).await)
}

/// Why a question about `key`, or about all flags, is not answered.
pub fn refusal(key: Option<&str>, failure: &Failure) -> Reply {
    let error_code = match failure {
        Failure::Context(_) => Some(ErrorCode::InvalidContext),
        Failure::Malformed(_) | Failure::MediaType => Some(ErrorCode::ParseError),
        Failure::NotFound if key.is_some() => Some(ErrorCode::FlagNotFound),
        _ => None,
    };
    let key = key.and_then(|key| decoded(key).ok());
    let error_details = failure.to_string();
    reply::refusal(failure, &Refusal { key: key.as_deref(), error_code, error_details })
}

fn json(document: &impl serde::Serialize) -> Body {
    Body::new(serde_json::to_vec(document).expect("answers are plain data").into())
}

fn evaluation<'a>(engine: &'a Engine, id: FlagId, bound: &Bound<'_>) -> Evaluation<'a> {
    let (flag, outcome) = (engine.flag(id), engine.evaluate(id, bound));
    let variant = flag.variant(outcome);
    let payload = variant.and_then(|variant| variant.payload.as_ref());
    let is_typed = flag.variants().iter().any(|variant| variant.payload.is_some());
    let value = match payload {
        Some(payload) => Some(wire::value(&payload.kind, &payload.value)),
        None if outcome == Outcome::Off && is_typed => None,
        None => Some(Value::Boolean(outcome.is_on())),
    };
    let plain = if outcome.is_on() { "enabled" } else { "disabled" };
    let reason = if !flag.enabled() {
        Reason::Disabled
    } else if engine.fixed(id).is_some_and(Outcome::is_on) {
        Reason::Static
    } else if !outcome.is_on() {
        Reason::Unknown
    } else if engine.splits(id) {
        Reason::Split
    } else {
        Reason::TargetingMatch
    };
    Evaluation {
        key: flag.name(),
        value,
        variant: variant.map_or(plain, |variant| &variant.name),
        reason,
        metadata: Metadata {
            project: flag.project(),
            enabled: outcome.is_on(),
            impression_data: flag.impression_data(),
        },
    }
}
