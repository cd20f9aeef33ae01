//! Recompiling with reuse gives the same engine as compiling from scratch.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*, sample::subsequence};
use serde_json::{Value, json};

use super::{Document, Flag, Problem, RECOMPILE_SLACK};
use crate::engine::{
    Context, Engine, Outcome,
    arbitrary::{ArbitraryContext, arbitrary_context, arbitrary_definitions},
};

fn parse(flags: &[Value], segments: &Value) -> Document {
    let text = json!({ "version": 2, "features": flags, "segments": segments }).to_string();
    Document::parse(text.as_bytes()).unwrap()
}

/// An engine with its document and problems.
struct Compiled {
    document: Document,
    engine: Engine,
    problems: Vec<Problem>,
}

impl Compiled {
    fn new(document: Document) -> Self {
        let (engine, problems) = Engine::compile(&document);
        Self { document, engine, problems }
    }

    fn recompile(&self, document: Document) -> Self {
        let document = document.reuse_unchanged(&self.document);
        let (engine, problems) = self.engine.recompile(&self.document, &self.problems, &document);
        Self { document, engine, problems }
    }
}

/// A change of a document. Replacements may have a name twice or be malformed.
#[derive(Clone, Debug)]
struct Change {
    replaced: Vec<Value>,
    segments: Option<Value>,
    removed: Vec<String>,
}

fn change() -> impl Strategy<Value = Change> {
    let names: Vec<_> = (0..5).map(|n| format!("f{n}")).collect();
    let malformed = malformed_flags();
    (arbitrary_definitions(), prop::bool::weighted(0.2), subsequence(names, 0..2), malformed)
        .prop_flat_map(|((flags, segments), has_segments, removed, malformed)| {
            let Value::Array(mut flags) = flags else { unreachable!("flags are a list") };
            flags.extend(malformed);
            let count = flags.len();
            (subsequence(flags, 0..=count), Just((has_segments.then_some(segments), removed)))
                .prop_map(|(replaced, (segments, removed))| Change { replaced, segments, removed })
        })
}

fn malformed_flags() -> impl Strategy<Value = Vec<Value>> {
    let strategy = json!({ "name": "what" });
    let flags = vec![
        json!({ "name": "f1", "enabled": true, "strategies": [strategy] }),
        json!({ "name": "f3", "enabled": "perhaps" }),
        json!({ "name": "f2", "enabled": true, "dependencies": [7] }),
        json!({ "name": 5 }),
    ];
    subsequence(flags, 0..3)
}

fn check(compiled: &Compiled, contexts: &[ArbitraryContext]) -> Result<(), TestCaseError> {
    let Compiled { document, engine, problems } = compiled;
    let (whole, expect) = Engine::compile(document);
    prop_assert_eq!(problems, &expect);
    prop_assert_eq!(engine.flags().len(), whole.flags().len());
    for context in contexts {
        let context = context.context();
        let (bound, expect_bound) = (engine.bind(&context), whole.bind(&context));
        for id in engine.ids() {
            let outcome = engine.evaluate(id, &bound);
            let explanation = engine.explain(document, id, &context);
            let variant = engine.flag(id).variant(outcome).map(|it| it.name.to_string());
            prop_assert_eq!(explanation.enabled, outcome.is_on());
            prop_assert_eq!(explanation.variant.map(|it| it.name), variant);
            // Random draws included: recompiling must not send changes to streams of unchanged flags.
            prop_assert_eq!(outcome, whole.evaluate(id, &expect_bound));
            let names = |engine: &Engine| {
                let variant = engine.flag(id).variant(outcome);
                (
                    engine.flag(id).name().to_string(),
                    format!("{variant:?}"),
                    engine.constant_outcome(id),
                )
            };
            prop_assert_eq!(names(engine), names(&whole));
            // Compared by name: ids differ.
            let fields = |engine: &Engine| -> Vec<String> {
                let names = engine.schema().names();
                let reads = engine.inputs([id]);
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
    fn recompiled_engine_equals_one_compiled_from_scratch(
        (flags, segments) in arbitrary_definitions(),
        changes in vec(change(), 1..8),
        contexts in vec(arbitrary_context(), 1..6),
    ) {
        let by_name = |flags: &[Value]| -> BTreeMap<String, Value> {
            flags.iter().map(|flag| (flag["name"].to_string(), flag.clone())).collect()
        };
        let mut state = by_name(flags.as_array().unwrap());
        let mut segments = segments;
        let all = |state: &BTreeMap<String, Value>| -> Vec<Value> { state.values().cloned().collect() };
        let mut compiled = Compiled::new(parse(&all(&state), &segments));
        for change in changes {
            let duplicate = change.replaced.first().cloned();
            state.extend(by_name(&change.replaced));
            for name in &change.removed {
                state.remove(&json!(name).to_string());
            }
            segments = change.segments.unwrap_or(segments);
            let mut flags = all(&state);
            flags.extend(duplicate.filter(|_| contexts.len() % 2 == 0));
            if flags.iter().all(|flag| flag["name"].is_number()) {
                continue;
            }
            compiled = compiled.recompile(parse(&flags, &segments));
            check(&compiled, &contexts)?;
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
fn unchanged_flags_are_reused() {
    let nothing = json!([]);
    let child = json!({ "name": "d", "enabled": true, "dependencies": [{ "feature": "a" }] });
    let first = Compiled::new(parse(&[flag("a", "1"), flag("b", "1"), child.clone()], &nothing));
    let reused = |before: &Compiled, after: &Compiled| -> Vec<String> {
        let is_reused = |flag: &&Flag| {
            let before = before.engine.find(flag.name()).map(|id| before.engine.flag(id));
            before.is_some_and(|before| before.is_same_instance(flag))
        };
        after.engine.flags().iter().filter(is_reused).map(|it| it.name().to_string()).collect()
    };
    let flags = [flag("a", "1"), flag("b", "2"), flag("c", "1"), child];
    let second = first.recompile(parse(&flags, &nothing));
    assert_eq!(reused(&first, &second), ["a"], "flags with parents are compiled again");
    let third = second.recompile(parse(&flags, &json!([{ "id": 1, "constraints": [] }])));
    assert!(reused(&second, &third).is_empty(), "any flag might refer to the segment");
}

#[test]
fn unused_schema_entries_do_not_accumulate() {
    let nothing = json!([]);
    let document = |n: usize| parse(&[flag("a", "1"), flag("b", &n.to_string())], &nothing);
    let mut compiled = Compiled::new(document(0));
    let mut most = 0;
    for n in 1..2000 {
        compiled = compiled.recompile(document(n));
        most = most.max(compiled.engine.compiled.schema.len());
    }
    let whole = Compiled::new(document(0)).engine.compiled.schema.len();
    assert!(most > RECOMPILE_SLACK && most < 2 * whole + RECOMPILE_SLACK + 10, "{most} of {whole}");
}

#[test]
fn recompiled_flag_draws_independently_of_reused_flags() {
    let nothing = json!([]);
    let random_rollout = |name: &str, title: &str| {
        let parameters = json!({ "rollout": 50, "stickiness": "random", "groupId": "g" });
        let strategy =
            json!({ "name": "flexibleRollout", "title": title, "parameters": parameters });
        json!({ "name": name, "enabled": true, "strategies": [strategy] })
    };
    let first =
        Compiled::new(parse(&[random_rollout("a", "1"), random_rollout("b", "1")], &nothing));
    let second =
        first.recompile(parse(&[random_rollout("a", "1"), random_rollout("b", "2")], &nothing));
    let outcomes = |random_seed| {
        let bound = second.engine.bind(&Context { random_seed, ..Context::default() });
        ["a", "b"].map(|name| second.engine.evaluate(second.engine.find(name).unwrap(), &bound))
    };
    let different: BTreeSet<_> = (0..200).map(|draw| outcomes(draw).map(Outcome::is_on)).collect();
    assert_eq!(different.len(), 4);
}
