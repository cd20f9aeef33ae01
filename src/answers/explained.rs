//! Why a flag of a snapshot comes out as it does for a context that somebody tells.
//!
//! For people who ask now and then: nothing is remembered.

use jiff::Timestamp;

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
/// What the context leaves out stays out, but for the environment, which is the snapshot's. The host
/// is left out too: strategies that ask for it are told that it is not known.
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
    let environment = told.environment.as_deref().unwrap_or(snapshot.environment().as_str());
    let context = Context {
        user_id: told.user_id.as_deref(),
        session_id: told.session_id.as_deref(),
        environment: Some(environment),
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
        Snapshot::build(scope, document, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn the_environment_is_the_snapshots_unless_the_context_tells_another() {
        let explained = |context: &FrontendContext<'_>| {
            explain(&snapshot(), "cart", context, Timestamp::UNIX_EPOCH, 0).unwrap()
        };
        assert!(explained(&FrontendContext::default()).enabled);
        let other =
            FrontendContext { environment: Some("prod".into()), ..FrontendContext::default() };
        assert!(!explained(&other).enabled);
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
