//! Why a flag of a snapshot comes out as it does for a context that somebody tells.
//!
//! For people who ask now and then: nothing is remembered.

use jiff::Timestamp;

use super::session::MadeUpSession;
use crate::{
    engine::{Context, Flag, explanation::Explanation},
    snapshot::Snapshot,
    wire::context::FrontendContext,
};

/// How many names are offered where there is no flag of the one that was asked for.
const OFFERED: usize = 5;

/// There is no such flag.
#[derive(Debug, Eq, PartialEq)]
pub struct Missing {
    /// The names of flags that are spelt alike, a few at most.
    pub alike: Vec<String>,
}

/// Explains a flag, whatever project it is of.
///
/// What the context leaves out stays out, but for a `sessionId`, which is made up as it is for frontends.
/// The host is left out too: strategies that ask for it are told that it is not known.
pub fn explain(
    snapshot: &Snapshot,
    flag: &str,
    told: &FrontendContext<'_>,
    now: Timestamp,
    draw: u64,
) -> Result<Explanation, Missing> {
    let engine = snapshot.engine();
    let id = engine.find(flag).ok_or_else(|| Missing { alike: alike(snapshot, flag) })?;
    let properties: Vec<_> =
        told.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
    let session_id = told.session_id.as_deref().filter(|text| !text.is_empty());
    let made_up = MadeUpSession::new(draw);
    let context = Context {
        user_id: told.user_id.as_deref(),
        session_id: Some(session_id.unwrap_or(made_up.as_str())),
        session_is_made_up: session_id.is_none(),
        environment: told.environment.as_deref(),
        app_name: told.app_name.as_deref(),
        current_time: told.current_time.as_deref(),
        remote_address: told.remote_address.as_deref(),
        properties: &properties,
        hostname: None,
        now,
        draw,
    };
    Ok(engine.explain(snapshot.document(), id, &context))
}

/// Names that hold the one asked for or are held by it, whatever the case.
fn alike(snapshot: &Snapshot, asked: &str) -> Vec<String> {
    let asked = asked.to_lowercase();
    let names = snapshot.engine().flags().iter().map(Flag::name);
    let alike = names.filter(|name| {
        let name = name.to_lowercase();
        !name.is_empty() && !asked.is_empty() && (name.contains(&asked) || asked.contains(&name))
    });
    alike.take(OFFERED).map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        token::{Environment, Projects, Scope},
        wire::features::Document,
    };

    fn snapshot() -> Snapshot {
        let here = json!({ "contextName": "environment", "operator": "IN", "values": ["dev"] });
        let strategy = json!({ "name": "default", "constraints": [here] });
        let flag = |name: &str| json!({ "name": name, "enabled": true, "strategies": [strategy] });
        let text = json!({ "features": [flag("Checkout"), flag("cart")] }).to_string();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(text.as_bytes()).unwrap();
        Snapshot::build(scope, document, None)
    }

    #[test]
    fn environment_is_the_contexts_and_not_the_snapshots() {
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
    fn missing_session_id_is_made_up_and_explained_as_such() {
        let of_session = json!({ "name": "flexibleRollout", "parameters": {
            "rollout": "100", "stickiness": "sessionId", "groupId": "g" } });
        let numbered = json!({ "name": "default", "constraints": [
            { "contextName": "sessionId", "operator": "REGEX", "value": "^[0-9a-f]{36}$" }] });
        let flag = |name: &str, strategy| json!({ "name": name, "enabled": true, "strategies": [strategy] });
        let features = [flag("rollout", of_session), flag("regex", numbered)];
        let text = json!({ "features": features }).to_string();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(text.as_bytes()).unwrap();
        let snapshot = Snapshot::build(scope, document, None);
        let explained = |flag, session: &'static str| {
            let session_id = Some(session.into());
            let context = FrontendContext { session_id, ..FrontendContext::default() };
            explain(&snapshot, flag, &context, Timestamp::UNIX_EPOCH, 7).unwrap()
        };
        let rollout = explained("rollout", "");
        let placement = rollout.strategies[0].rule.clone().unwrap().placement.unwrap();
        assert!(rollout.enabled && placement.drawn);
        assert_eq!(placement.field.as_deref(), Some("sessionId"));
        assert!(rollout.summary.contains("made up"), "{}", rollout.summary);
        let regex = explained("regex", "");
        let why = &regex.strategies[0].constraints[0].why;
        assert!(regex.enabled && why.contains("made up"), "{why}");
        let rollout = explained("rollout", "s1");
        assert!(rollout.enabled && !rollout.summary.contains("made up"), "{}", rollout.summary);
    }

    #[test]
    fn names_that_are_alike_are_offered() {
        let check = |asked: &str, expect: &[&str]| {
            let nobody = FrontendContext::default();
            let told = explain(&snapshot(), asked, &nobody, Timestamp::UNIX_EPOCH, 0);
            assert_eq!(told.unwrap_err().alike, expect);
        };
        check("checkout", &["Checkout"]);
        check("cart-v2", &["cart"]);
        check("search", &[]);
        check("", &[]);
    }
}
