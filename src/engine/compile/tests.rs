//! What is compiled after something else is what is compiled from nothing.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*, sample::subsequence};
use serde_json::{Value, json};

use super::{Document, FEW, Flag, Problem};
use crate::engine::{
    Context, Engine, Outcome,
    arbitrary::{Asking, asking, definitions},
};

fn parse(flags: &[Value], segments: &Value) -> Document {
    let text = json!({ "version": 2, "features": flags, "segments": segments }).to_string();
    Document::parse(text.as_bytes()).unwrap()
}

/// An engine after others, with what it was compiled from.
struct Kept {
    document: Document,
    engine: Engine,
    problems: Vec<Problem>,
}

impl Kept {
    fn of(document: Document) -> Self {
        let (engine, problems) = Engine::compile(&document);
        Self { document, engine, problems }
    }

    fn then(&self, document: Document) -> Self {
        let document = document.sharing(&self.document);
        let (engine, problems) = self.engine.recompile(&self.document, &self.problems, &document);
        Self { document, engine, problems }
    }
}

/// A change of the flags: others come in the place of these names, some of them twice or unreadable,
/// and some go.
#[derive(Clone, Debug)]
struct Change {
    others: Vec<Value>,
    segments: Option<Value>,
    gone: Vec<String>,
}

fn change() -> impl Strategy<Value = Change> {
    let names: Vec<_> = (0..5).map(|n| format!("f{n}")).collect();
    let odd = select_odd();
    (definitions(), prop::bool::weighted(0.2), subsequence(names, 0..2), odd).prop_flat_map(
        |((flags, segments), is_segments, gone, odd)| {
            let Value::Array(mut flags) = flags else { unreachable!("flags are a list") };
            flags.extend(odd);
            let count = flags.len();
            (subsequence(flags, 0..=count), Just((is_segments.then_some(segments), gone)))
                .prop_map(|(others, (segments, gone))| Change { others, segments, gone })
        },
    )
}

/// Flags with something wrong.
fn select_odd() -> impl Strategy<Value = Vec<Value>> {
    let strategy = json!({ "name": "what" });
    let odd = vec![
        json!({ "name": "f1", "enabled": true, "strategies": [strategy] }),
        json!({ "name": "f3", "enabled": "perhaps" }),
        json!({ "name": "f2", "enabled": true, "dependencies": [7] }),
        json!({ "name": 5 }),
    ];
    subsequence(odd, 0..3)
}

fn check(kept: &Kept, askings: &[Asking]) -> Result<(), TestCaseError> {
    let Kept { document, engine, problems } = kept;
    let (whole, expect) = Engine::compile(document);
    prop_assert_eq!(problems, &expect);
    prop_assert_eq!(engine.flags().len(), whole.flags().len());
    for asking in askings {
        let context = asking.context();
        let (bound, afresh) = (engine.bind(&context), whole.bind(&context));
        for id in engine.ids() {
            let outcome = engine.evaluate(id, &bound);
            let told = engine.explain(document, id, &context);
            let variant = engine.flag(id).variant(outcome).map(|it| it.name.to_string());
            prop_assert_eq!(told.enabled, outcome.is_on());
            prop_assert_eq!(told.variant.map(|it| it.name), variant);
            // Lots included: who follows a stream is told of no change that nobody made.
            prop_assert_eq!(outcome, whole.evaluate(id, &afresh));
            let names = |engine: &Engine| {
                let variant = engine.flag(id).variant(outcome);
                (engine.flag(id).name().to_string(), format!("{variant:?}"), engine.fixed(id))
            };
            prop_assert_eq!(names(engine), names(&whole));
            // By the names: numbers differ.
            let fields = |engine: &Engine| -> Vec<String> {
                let names = engine.fields().names();
                let reads = engine.reads([id]);
                let mut fields: Vec<_> =
                    reads.fields().map(|field| names[field.index()].to_string()).collect();
                fields.sort();
                fields
            };
            prop_assert_eq!(fields(engine), fields(&whole));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn what_is_compiled_after_something_else_is_the_same(
        (flags, segments) in definitions(),
        changes in vec(change(), 1..8),
        askings in vec(asking(), 1..6),
    ) {
        let by_name = |flags: &[Value]| -> BTreeMap<String, Value> {
            flags.iter().map(|flag| (flag["name"].to_string(), flag.clone())).collect()
        };
        let mut state = by_name(flags.as_array().unwrap());
        let mut segments = segments;
        let all = |state: &BTreeMap<String, Value>| -> Vec<Value> { state.values().cloned().collect() };
        let mut kept = Kept::of(parse(&all(&state), &segments));
        for change in changes {
            let twice = change.others.first().cloned();
            state.extend(by_name(&change.others));
            for name in &change.gone {
                state.remove(&json!(name).to_string());
            }
            segments = change.segments.unwrap_or(segments);
            let mut flags = all(&state);
            flags.extend(twice.filter(|_| askings.len() % 2 == 0));
            if flags.iter().all(|flag| flag["name"].is_number()) {
                continue;
            }
            kept = kept.then(parse(&flags, &segments));
            check(&kept, &askings)?;
        }
    }
}

fn flag(name: &str, value: &str) -> Value {
    let constraint = json!({ "contextName": value, "operator": "IN", "values": [value] });
    let strategy = json!({
        "name": "flexibleRollout", "constraints": [constraint],
        "parameters": { "rollout": 50, "stickiness": "random", "groupId": "g" },
    });
    json!({ "name": name, "enabled": true, "strategies": [strategy] })
}

#[test]
fn what_did_not_change_is_taken_over() {
    let nothing = json!([]);
    let child = json!({ "name": "d", "enabled": true, "dependencies": [{ "feature": "a" }] });
    let first = Kept::of(parse(&[flag("a", "1"), flag("b", "1"), child.clone()], &nothing));
    let taken = |before: &Kept, after: &Kept| -> Vec<String> {
        let is_taken = |flag: &&Flag| {
            let before = before.engine.find(flag.name()).map(|id| before.engine.flag(id));
            before.is_some_and(|before| before.is(flag))
        };
        after.engine.flags().iter().filter(is_taken).map(|it| it.name().to_string()).collect()
    };
    let flags = [flag("a", "1"), flag("b", "2"), flag("c", "1"), child];
    let second = first.then(parse(&flags, &nothing));
    assert_eq!(taken(&first, &second), ["a"], "who depends on others is tied to them anew");
    let third = second.then(parse(&flags, &json!([{ "id": 1, "constraints": [] }])));
    assert!(taken(&second, &third).is_empty(), "any flag might refer to the segment");
}

#[test]
fn numbers_that_nobody_refers_to_do_not_pile_up() {
    let nothing = json!([]);
    let document = |n: usize| parse(&[flag("a", "1"), flag("b", &n.to_string())], &nothing);
    let mut kept = Kept::of(document(0));
    let mut most = 0;
    for n in 1..2000 {
        kept = kept.then(document(n));
        most = most.max(kept.engine.compiled.fields.len());
    }
    let whole = Kept::of(document(0)).engine.compiled.fields.len();
    assert!(most > FEW && most < 2 * whole + FEW + 10, "{most} of {whole}");
}

#[test]
fn what_is_compiled_later_draws_lots_of_its_own() {
    let nothing = json!([]);
    let lottery = |name: &str, title: &str| {
        let parameters = json!({ "rollout": 50, "stickiness": "random", "groupId": "g" });
        let strategy =
            json!({ "name": "flexibleRollout", "title": title, "parameters": parameters });
        json!({ "name": name, "enabled": true, "strategies": [strategy] })
    };
    let first = Kept::of(parse(&[lottery("a", "1"), lottery("b", "1")], &nothing));
    let second = first.then(parse(&[lottery("a", "1"), lottery("b", "2")], &nothing));
    let outcomes = |draw| {
        let bound = second.engine.bind(&Context { draw, ..Context::default() });
        ["a", "b"].map(|name| second.engine.evaluate(second.engine.find(name).unwrap(), &bound))
    };
    let different: BTreeSet<_> = (0..200).map(|draw| outcomes(draw).map(Outcome::is_on)).collect();
    assert_eq!(different.len(), 4);
}
