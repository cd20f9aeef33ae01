//! Explains the evaluation of a flag for a given context.
//!
//! For occasional use by operators: nothing is cached.

use jiff::Timestamp;

use super::session_id::GeneratedSessionId;
use crate::{
    engine::{Context, Flag, explanation::Explanation},
    protocol::context::FrontendContext,
    snapshot::Snapshot,
};

/// Maximum number of similar names that are suggested for an unknown flag.
const MAX_SUGGESTIONS: usize = 5;

/// There is no flag with the requested name.
#[derive(Debug, Eq, PartialEq)]
pub struct UnknownFlag {
    /// Up to five names of flags that are similar.
    pub similar_names: Vec<String>,
}

/// Explains a flag of any project.
///
/// Fields that are missing in the context stay missing, except for a `sessionId`, which is generated as
/// for frontend requests. There is no hostname, so `applicationHostname` strategies do not match.
pub fn explain(
    snapshot: &Snapshot,
    flag: &str,
    fields: &FrontendContext<'_>,
    now: Timestamp,
    random_seed: u64,
) -> Result<Explanation, UnknownFlag> {
    let engine = snapshot.engine();
    let id = engine
        .find(flag)
        .ok_or_else(|| UnknownFlag { similar_names: similar_names(snapshot, flag) })?;
    let properties: Vec<_> =
        fields.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
    let session_id = fields.session_id.as_deref().filter(|text| !text.is_empty());
    let generated = GeneratedSessionId::new(random_seed);
    let context = Context {
        user_id: fields.user_id.as_deref(),
        session_id: Some(session_id.unwrap_or(generated.as_str())),
        session_is_generated: session_id.is_none(),
        environment: fields.environment.as_deref(),
        app_name: fields.app_name.as_deref(),
        current_time: fields.current_time.as_deref(),
        remote_address: fields.remote_address.as_deref(),
        properties: &properties,
        hostname: None,
        now,
        random_seed,
    };
    Ok(engine.explain(snapshot.document(), id, &context))
}

/// Names that contain the requested one or are contained in it, ignoring case.
fn similar_names(snapshot: &Snapshot, requested: &str) -> Vec<String> {
    let requested = requested.to_lowercase();
    let names = snapshot.engine().flags().iter().map(Flag::name);
    let similar = names.filter(|name| {
        let name = name.to_lowercase();
        !name.is_empty()
            && !requested.is_empty()
            && (name.contains(&requested) || requested.contains(&name))
    });
    similar.take(MAX_SUGGESTIONS).map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        protocol::features::Document,
        token::{Environment, Projects, Scope},
    };

    fn snapshot() -> Snapshot {
        let here = json!({ "contextName": "environment", "operator": "IN", "values": ["dev"] });
        let strategy = json!({ "name": "default", "constraints": [here] });
        let flag = |name: &str| json!({ "name": name, "enabled": true, "strategies": [strategy] });
        let text = json!({ "features": [flag("Checkout"), flag("cart")] }).to_string();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(text.as_bytes()).unwrap();
        Snapshot::build(scope, document)
    }

    #[test]
    fn environment_field_is_read_from_the_context_and_not_from_the_snapshot() {
        let explained = |environment: Option<&'static str>| {
            let environment = environment.map(Into::into);
            let context = FrontendContext { environment, ..FrontendContext::default() };
            explain(&snapshot(), "cart", &context, Timestamp::UNIX_EPOCH, 0).unwrap()
        };
        assert!(explained(Some("dev")).enabled);
        assert!(!explained(None).enabled);
        assert!(!explained(Some("prod")).enabled);
    }

    #[test]
    fn missing_session_id_is_generated_and_explained_as_such() {
        let of_session = json!({ "name": "flexibleRollout", "parameters": {
            "rollout": "100", "stickiness": "sessionId", "groupId": "g" } });
        let numbered = json!({ "name": "default", "constraints": [
            { "contextName": "sessionId", "operator": "REGEX", "value": "^[0-9a-f]{36}$" }] });
        let flag = |name: &str, strategy| json!({ "name": name, "enabled": true, "strategies": [strategy] });
        let features = [flag("rollout", of_session), flag("regex", numbered)];
        let text = json!({ "features": features }).to_string();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(text.as_bytes()).unwrap();
        let snapshot = Snapshot::build(scope, document);
        let explained = |flag, session: &'static str| {
            let session_id = Some(session.into());
            let context = FrontendContext { session_id, ..FrontendContext::default() };
            explain(&snapshot, flag, &context, Timestamp::UNIX_EPOCH, 7).unwrap()
        };
        let rollout = explained("rollout", "");
        let placement = rollout.strategies[0].rule.clone().unwrap().placement.unwrap();
        assert!(rollout.enabled && placement.drawn);
        assert_eq!(placement.field.as_deref(), Some("sessionId"));
        assert!(rollout.summary.contains("generated"), "{}", rollout.summary);
        let regex = explained("regex", "");
        let why = &regex.strategies[0].constraints[0].why;
        assert!(regex.enabled && why.contains("generated"), "{why}");
        let rollout = explained("rollout", "s1");
        assert!(rollout.enabled && !rollout.summary.contains("generated"), "{}", rollout.summary);
    }

    #[test]
    fn similar_names_are_suggested_for_an_unknown_flag() {
        let check = |name: &str, expect: &[&str]| {
            let empty = FrontendContext::default();
            let explained = explain(&snapshot(), name, &empty, Timestamp::UNIX_EPOCH, 0);
            assert_eq!(explained.unwrap_err().similar_names, expect);
        };
        check("checkout", &["Checkout"]);
        check("cart-v2", &["cart"]);
        check("search", &[]);
        check("", &[]);
    }
}
