//! Converts an Unleash outcome to an OFREP evaluation.
//!
//! The value is boolean for a flag without payloads, and otherwise the variant's payload in its declared
//! type. A flag with payloads has no value while it is off, so that the application uses its own default
//! instead of a value of another type.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    engine::{Context, Engine, FlagId, Outcome},
    evaluation::ofrep_hash,
    protocol::ofrep::{EvaluationSuccess, Metadata, Reason, Value, payload_value},
    served::ServedSnapshot,
    snapshot::FrontendView,
};

/// The JSON of an OFREP document.
pub(super) fn to_json(document: &impl serde::Serialize) -> Bytes {
    serde_json::to_vec(document).expect("OFREP documents are plain data").into()
}

/// A hash of the OFREP evaluations of all flags in `view` for one context.
pub(super) fn hash_outcomes(
    snapshot: &ServedSnapshot,
    view: &FrontendView,
    context: &Context<'_>,
) -> u128 {
    let engine = snapshot.engine();
    ofrep_hash(snapshot, view, context, |id, outcome| {
        xxh3_64(&to_json(&to_evaluation(engine, id, outcome)))
    })
}

/// The OFREP evaluation of a flag with this outcome.
pub(super) fn to_evaluation(
    engine: &Engine,
    id: FlagId,
    outcome: Outcome,
) -> EvaluationSuccess<'_> {
    let flag = engine.flag(id);
    let variant = flag.variant(outcome);
    let payload = variant.and_then(|variant| variant.payload.as_ref());
    let is_typed = flag.variants().iter().any(|variant| variant.payload.is_some());
    let value = match payload {
        Some(payload) => Some(payload_value(&payload.kind, &payload.value)),
        None if outcome == Outcome::Off && is_typed => None,
        None => Some(Value::Boolean(outcome.is_on())),
    };
    let plain = if outcome.is_on() { "enabled" } else { "disabled" };
    let reason = if !flag.enabled() {
        Reason::Disabled
    } else if engine.constant_outcome(id).is_some_and(Outcome::is_on) {
        Reason::Static
    } else if !outcome.is_on() {
        Reason::Unknown
    } else if engine.is_bucketed(id) {
        Reason::Split
    } else {
        Reason::TargetingMatch
    };
    EvaluationSuccess {
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
