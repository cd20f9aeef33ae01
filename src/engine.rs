//! The evaluation engine: decides for a context which flags are on, and with which variant.
//!
//! [`Engine::compile`] turns a client-features document into data. [`Engine::bind`] reads a context once
//! for all flags. [`Engine::evaluate`] then costs a few comparisons per flag. Compilation never fails as
//! a whole: an invalid part of a definition never matches and is reported as a [`Problem`].
//!
//! Semantics follow Unleash's client specification. Where that is silent, they follow the Node SDK,
//! which the Unleash server itself evaluates with.
//!
//! The engine is pure. It has no clock and no randomness (both are part of [`Context`]), does no input
//! or output, is not async, and does not log or record metrics.

#[cfg(test)]
pub(crate) mod arbitrary;
mod bucket;
mod compile;
mod constraint;
mod context;
mod date;
mod explain;
pub mod explanation;
mod flag;
mod inputs;
mod owned_context;
mod parse;
mod plan;
mod problem;
mod re2;
mod strategy;
mod variant;

use self::compile::{CompiledFlags, Previous};
pub use self::context::{BoundContext, Context, ContextSchema, ContextValues, FieldId};
use self::explanation::Explanation;
pub use self::flag::{Flag, FlagId, Outcome};
pub use self::inputs::{ContextKey, EvaluationInputs, Relevance};
pub use self::owned_context::OwnedContext;
pub use self::problem::{Defect, DefinitionPart, Problem};
pub use self::variant::{Payload, Variant};
use crate::protocol::features::Document;

/// The flags of one environment, compiled.
#[derive(Debug, Clone)]
pub struct Engine {
    compiled: CompiledFlags,
}

impl Engine {
    /// Compiles a document. Returns the problems of single flags, sorted by flag name.
    pub fn compile(document: &Document) -> (Self, Vec<Problem>) {
        let (compiled, problems) = compile::compile(document, None);
        (Self { compiled }, problems)
    }

    /// Compiles a document that replaces `before`, from which this engine was compiled with `problems`.
    /// Reuses flags that did not change without reading them again.
    pub fn recompile(
        &self,
        before: &Document,
        problems: &[Problem],
        document: &Document,
    ) -> (Self, Vec<Problem>) {
        let previous = Previous { compiled: &self.compiled, document: before, problems };
        let (compiled, problems) = compile::compile(document, Some(&previous));
        (Self { compiled }, problems)
    }

    /// The flags, sorted by name.
    pub fn flags(&self) -> &[Flag] {
        &self.compiled.flags
    }

    /// The ids of all flags, in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = FlagId> + use<> {
        (0..self.compiled.flags.len()).map(FlagId::new)
    }

    /// The flag with this id, which belongs to this engine.
    pub fn flag(&self, id: FlagId) -> &Flag {
        &self.compiled.flags[id.index()]
    }

    /// The id of the flag with this name.
    pub fn find(&self, name: &str) -> Option<FlagId> {
        flag::find_flag(&self.compiled.flags, name)
    }

    /// The context fields that flags read.
    pub fn schema(&self) -> &ContextSchema {
        &self.compiled.schema
    }

    /// Everything that the outcomes of these flags depend on.
    pub fn inputs(&self, flags: impl IntoIterator<Item = FlagId>) -> EvaluationInputs {
        let mut inputs = EvaluationInputs::default();
        for id in flags {
            self.compiled.plans[id.index()].collect_inputs(&self.compiled.plans, &mut inputs);
        }
        inputs.normalize()
    }

    /// The outcome of a flag that has the same one for every context at any time.
    pub fn constant_outcome(&self, id: FlagId) -> Option<Outcome> {
        self.compiled.plans[id.index()].constant_outcome()
    }

    /// Whether the outcome may depend on a bucket: of a rollout, a random rollout, or variants.
    pub fn is_bucketed(&self, id: FlagId) -> bool {
        self.compiled.plans[id.index()].is_bucketed()
    }

    /// Reads the context fields that flags use, as [`Engine::write_context_key`] needs them.
    pub fn read_context<'a>(&self, context: &Context<'a>) -> ContextValues<'a> {
        self.compiled.schema.read(context)
    }

    /// Appends to `key` everything that `inputs`, which belong to flags of this engine, read from a
    /// context. Those flags have equal outcomes for contexts with equal keys, unless they are random.
    pub fn write_context_key(
        &self,
        inputs: &EvaluationInputs,
        values: &ContextValues<'_>,
        key: &mut ContextKey,
    ) {
        inputs.write_context_key(&self.compiled.schema, values, key);
    }

    /// Prepares a context for evaluating any number of flags of this engine.
    pub fn bind<'a>(&self, context: &Context<'a>) -> BoundContext<'a> {
        self.bind_values(self.read_context(context))
    }

    /// Like [`Engine::bind`], for a context that was read already.
    pub fn bind_values<'a>(&self, values: ContextValues<'a>) -> BoundContext<'a> {
        self.compiled.schema.bind(values)
    }

    /// Evaluates one flag for a context.
    ///
    /// The id and the bound context must come from this engine. Those of another engine refer to other
    /// flags and fields, or panic.
    pub fn evaluate(&self, id: FlagId, bound: &BoundContext<'_>) -> Outcome {
        self.compiled.plans[id.index()].evaluate(&self.compiled.plans, bound)
    }

    /// Explains the outcome of a flag for a context: every part of its definition with its result. The
    /// outcome is the same as from [`Engine::evaluate`], random draws included.
    ///
    /// `document` must be the one that this engine was compiled from; with another it may panic. Takes
    /// about a millisecond, far more than evaluation.
    pub fn explain(&self, document: &Document, id: FlagId, context: &Context<'_>) -> Explanation {
        let CompiledFlags { schema, flags, .. } = &self.compiled;
        explain::Explainer { schema, flags, document, context }.explain(id).1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::arbitrary::arbitrary_json;
    use super::*;

    fn compile(features: &Value, segments: &Value) -> (Engine, Vec<Problem>) {
        let body = json!({ "features": features, "segments": segments }).to_string();
        Engine::compile(&Document::parse(body.as_bytes()).unwrap())
    }

    /// The outcome of flag `a`: `off`, `on` or a variant's name.
    fn outcome_of(engine: &Engine, context: &Context<'_>) -> String {
        let id = engine.find("a").unwrap();
        let outcome = engine.evaluate(id, &engine.bind(context));
        match engine.flag(id).variant(outcome) {
            Some(variant) => variant.name.to_string(),
            None if outcome.is_on() => "on".to_owned(),
            None => "off".to_owned(),
        }
    }

    fn user(id: &str) -> Context<'_> {
        Context { user_id: Some(id), ..Context::default() }
    }

    /// Checks flag `a`, made of `parts` and enabled, for the user `7`, and its problems.
    fn check(parts: Value, others: &[Value], expect: &str, problems: &[&str]) {
        let mut flag = json!({ "name": "a", "enabled": true, "strategies": [] });
        if let (Value::Object(flag), Value::Object(parts)) = (&mut flag, parts) {
            flag.extend(parts);
        }
        let features: Vec<Value> = [&[flag][..], others].concat();
        let (engine, found) = compile(&features.into(), &json!([{ "id": 1 }]));
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(outcome_of(&engine, &user("7")), expect);
        assert_eq!(found, problems);
    }

    fn check_constraint(constraint: &Value, expect: &str, problems: &[&str]) {
        let strategy = json!({ "name": "default", "constraints": [constraint] });
        check(json!({ "strategies": [strategy] }), &[], expect, problems);
    }

    #[test]
    fn flag_without_constraints_is_on_if_enabled() {
        check(json!({}), &[], "on", &[]);
        check(json!({ "enabled": false }), &[], "off", &[]);
        check(json!({ "enabled": null }), &[], "off", &[]);
        check(json!({ "strategies": [{ "name": "default" }] }), &[], "on", &[]);
        check(json!({ "strategies": [{ "name": "default", "segments": [1] }] }), &[], "on", &[]);
    }

    #[test]
    fn malformed_parts_never_match_and_are_reported() {
        let report = "flag `a`: malformed ";
        let missing = "flag `a`: no list of strategies, so it is off; an empty list turns it on for everybody";
        check(json!({ "strategies": null }), &[], "off", &[missing]);
        let strategies = format!("{report}list of strategies: the flag is off");
        check(json!({ "strategies": 7 }), &[], "off", &[&strategies]);
        check(
            json!({ "enabled": "yes" }),
            &[],
            "off",
            &[&format!("{report}`enabled`: the flag is off")],
        );
        let strategy = format!("{report}strategy never matches");
        check(json!({ "strategies": [7, { "name": "default" }] }), &[], "on", &[&strategy]);
        check(
            json!({ "strategies": [{ "name": "default", "constraints": 7 }] }),
            &[],
            "off",
            &[&strategy],
        );
        check(
            json!({ "strategies": [{ "name": "new" }] }),
            &[],
            "off",
            &["flag `a`: unknown strategy `new` never matches"],
        );
        check(
            json!({ "strategies": [{ "name": "default", "segments": [404] }, { "name": "default" }] }),
            &[],
            "on",
            &["flag `a`: segment 404 is missing, so its strategy never matches"],
        );
        let rollout = json!({ "name": "flexibleRollout", "parameters": { "rollout": "all" } });
        check(
            json!({ "strategies": [rollout] }),
            &[],
            "off",
            &["flag `a`: `all` is not a percentage, so its strategy never matches"],
        );
        let (engine, problems) = compile(&json!([{ "name": "b" }]), &json!("none"));
        assert_eq!((engine.flags().len(), problems.len()), (1, 1));
        let on = json!({ "name": "a", "enabled": true, "strategies": [] });
        let (engine, problems) = compile(&json!([{ "name": null }, on]), &json!([]));
        assert_eq!(outcome_of(&engine, &user("7")), "on");
        let problem = problems[0].to_string();
        assert!(problem.starts_with("flag `#1`: unreadable, so it is left out"), "{problem}");
    }

    #[test]
    fn invalid_constraint_never_matches_even_inverted() {
        for inverted in [false, true] {
            let with = |operator: &str, value: &str| json!({ "contextName": "userId", "operator": operator, "value": value, "inverted": inverted });
            let cannot = |operator: &str, value: &str| {
                format!("flag `a`: {operator} cannot compare with `{value}`")
            };
            for (operator, value) in [
                ("NUM_EQ", "seven"),
                ("SEMVER_GT", "v1.2.3"),
                ("DATE_AFTER", "tomorrow"),
                ("REGEX", "(a"),
            ] {
                check_constraint(&with(operator, value), "off", &[&cannot(operator, value)]);
            }
            check_constraint(
                &with("LIKE", "7"),
                "off",
                &["flag `a`: unknown operator `LIKE`, so its strategy never matches"],
            );
        }
    }

    #[test]
    fn a_missing_field_makes_the_bare_comparison_false() {
        for (operator, operand) in [
            ("IN", json!({ "values": ["7"] })),
            ("STR_CONTAINS", json!({ "values": ["7"] })),
            ("IN_CIDR", json!({ "values": ["0.0.0.0/0"] })),
            ("NUM_LT", json!({ "value": "8" })),
            ("SEMVER_LT", json!({ "value": "8.0.0" })),
            ("REGEX", json!({ "value": "" })),
        ] {
            let mut constraint = operand;
            constraint["operator"] = operator.into();
            constraint["contextName"] = "absent".into();
            check_constraint(&constraint, "off", &[]);
            constraint["inverted"] = true.into();
            check_constraint(&constraint, "on", &[]);
        }
    }

    #[test]
    fn operators_compare_as_the_node_sdk_does() {
        let list = |operator: &str, values: Value, extra: Value| {
            let mut all =
                json!({ "contextName": "userId", "operator": operator, "values": values });
            if let (Value::Object(all), Value::Object(extra)) = (&mut all, extra) {
                all.extend(extra);
            }
            all
        };
        check_constraint(&list("IN", json!([" 7 ", ""]), json!({})), "on", &[]);
        check_constraint(&list("IN", json!([7]), json!({})), "on", &[]);
        check_constraint(&list("IN", json!(null), json!({})), "off", &[]);
        check_constraint(&list("NOT_IN", json!([]), json!({})), "on", &[]);
        check_constraint(&list("NOT_IN", json!(["7"]), json!({ "inverted": true })), "on", &[]);
        check_constraint(&list("STR_CONTAINS", json!([]), json!({ "inverted": true })), "on", &[]);
        let number = json!({ "contextName": "userId", "operator": "NUM_GTE", "value": 7 });
        check_constraint(&number, "on", &[]);
        let any = json!({ "contextName": "any", "operator": "DATE_BEFORE", "value": "1970-01-02" });
        check_constraint(&any, "on", &[]);
    }

    #[test]
    fn ignoring_case_works_in_every_script() {
        for (operator, needle, text, expect) in [
            ("STR_STARTS_WITH", "AB", "abc", "on"),
            ("STR_ENDS_WITH", "bC", "aBc", "on"),
            ("STR_CONTAINS", "B", "abc", "on"),
            ("STR_CONTAINS", "Ü", "glück", "on"),
            ("STR_CONTAINS", "ü", "abc", "off"),
            ("STR_ENDS_WITH", "xabc", "abc", "off"),
        ] {
            let constraint = json!({
                "contextName": "userId", "operator": operator, "values": [needle], "caseInsensitive": true,
            });
            let strategy = json!({ "name": "default", "constraints": [constraint] });
            let flag = json!([{ "name": "a", "enabled": true, "strategies": [strategy] }]);
            assert_eq!(
                outcome_of(&compile(&flag, &json!([])).0, &user(text)),
                expect,
                "{operator} {needle}"
            );
        }
    }

    #[test]
    fn buckets_without_a_group_id_equal_those_of_the_node_sdk() {
        let ids: Vec<String> = (0..200).map(|id| id.to_string()).collect();
        let outcomes = |parameters: Value, variants: &Value| -> Vec<String> {
            let mut strategy = json!({ "name": "flexibleRollout", "variants": variants });
            strategy["parameters"] = parameters;
            let flag = json!([{ "name": "a", "enabled": true, "strategies": [strategy] }]);
            let engine = compile(&flag, &json!([])).0;
            ids.iter().map(|id| outcome_of(&engine, &user(id))).collect()
        };
        let none = json!([]);
        let named =
            outcomes(json!({ "rollout": "33.5", "stickiness": "userId", "groupId": "" }), &none);
        let on = named.iter().filter(|outcome| *outcome == "on").count();
        assert!((40..95).contains(&on), "{on}");
        assert_eq!(outcomes(json!({ "rollout": 33, "stickiness": "userId" }), &none), named);
        let halves = json!([{ "name": "x", "weight": 1 }, { "name": "y", "weight": 1 }]);
        let named = outcomes(json!({ "rollout": 100, "groupId": "undefined" }), &halves);
        assert_ne!(outcomes(json!({ "rollout": 100, "groupId": "a" }), &halves), named);
        assert_eq!(outcomes(json!({ "rollout": 100 }), &halves), named);
    }

    #[test]
    fn strategy_variants_win_and_weights_of_zero_give_none() {
        let variant = |name: &str, weight: i32| json!({ "name": name, "weight": weight });
        let parts = |own: Value, flag: Value| json!({ "strategies": [{ "name": "default", "variants": own }], "variants": flag });
        check(parts(json!([variant("own", 1)]), json!([variant("flag", 1)])), &[], "own", &[]);
        check(parts(json!([]), json!([variant("flag", 1)])), &[], "flag", &[]);
        check(parts(json!([variant("own", 0)]), json!([variant("flag", 1)])), &[], "flag", &[]);
        let mut zero = variant("flag", 0);
        zero["overrides"] = json!([{ "contextName": "userId", "values": ["7"] }]);
        check(parts(json!(null), json!([zero])), &[], "on", &[]);
        zero["weight"] = 0.into();
        check(parts(json!(null), json!([variant("other", 1), zero])), &[], "flag", &[]);
        check(
            parts(json!(null), json!([variant("negative", -1), variant("flag", 1)])),
            &[],
            "flag",
            &["flag `a`: malformed variant: it is never selected"],
        );
        let huge = json!({ "name": "huge", "weight": u32::MAX });
        let problem = "flag `a`: malformed variant: it is never selected";
        check(parts(json!(null), json!([huge, variant("flag", 1)])), &[], "huge", &[problem]);
    }

    #[test]
    fn a_flag_depends_on_the_outcome_of_its_parents() {
        let variants = json!([{ "name": "x", "weight": 1 }]);
        let parents = [
            json!({ "name": "on", "enabled": true, "strategies": [] }),
            json!({ "name": "off", "enabled": false, "strategies": [] }),
            json!({ "name": "x", "enabled": true, "strategies": [], "variants": variants }),
            json!({ "name": "child", "enabled": true, "strategies": [], "dependencies": [{ "feature": "on" }] }),
        ];
        let cases = [
            (json!({ "feature": "on" }), "on", None),
            (json!({ "feature": "off" }), "off", None),
            (json!({ "feature": "off", "enabled": false }), "on", None),
            (json!({ "feature": "x", "variants": ["x"] }), "on", None),
            (json!({ "feature": "x", "variants": ["y"] }), "off", None),
            (json!({ "feature": "on", "variants": ["x"] }), "off", None),
            (json!({ "feature": "on", "variants": ["disabled"] }), "on", None),
            (
                json!({ "feature": "?" }),
                "off",
                Some("flag `a`: depends on `?`, which is missing, so it is off"),
            ),
            (
                json!({ "feature": "child" }),
                "off",
                Some("flag `a`: depends on `child`, which has dependencies itself, so it is off"),
            ),
            (json!(7), "off", Some("flag `a`: malformed dependency: the flag is off")),
        ];
        for (dependency, expect, problem) in cases {
            let problems: Vec<&str> = problem.into_iter().collect();
            check(json!({ "dependencies": [dependency] }), &parents, expect, &problems);
        }
    }

    #[test]
    fn inputs_include_parents_and_segments_and_exclude_simplified_parts() {
        let date = json!({ "contextName": "currentTime", "operator": "DATE_AFTER", "value": "2030-01-01T00:00:00Z" });
        let plan = json!({ "contextName": "plan", "operator": "IN", "values": ["pro"] });
        let half = json!({ "name": "flexibleRollout", "parameters": { "rollout": 50 } });
        let features = json!([
            { "name": "child", "enabled": true, "dependencies": [{ "feature": "parent" }],
              "strategies": [{ "name": "default", "constraints": [date] }] },
            { "name": "fixed", "enabled": false, "strategies": [half] },
            { "name": "unconditional", "enabled": true, "strategies": [{ "name": "default" }, half] },
            { "name": "parent", "enabled": true, "strategies": [{ "name": "default", "segments": [1] }] },
            { "name": "rollout", "enabled": true, "strategies": [half] },
        ]);
        let (engine, _) = compile(&features, &json!([{ "id": 1, "constraints": [plan] }]));
        let inputs = |name| engine.inputs(engine.find(name));
        let names = |name| -> Vec<&str> {
            let names = engine.schema().names();
            inputs(name).fields().map(|field| &*names[field.index()]).collect()
        };
        assert_eq!(names("child"), ["plan"]);
        assert!(inputs("child").is_time_dependent());
        let new_year = "2030-01-01T00:00:00Z".parse().unwrap();
        let next = inputs("child").next_change(new_year).unwrap();
        assert_eq!(next.as_nanosecond(), new_year.as_nanosecond() + 1);
        assert_eq!(inputs("child").next_change(next), None);
        assert!(inputs("fixed").is_empty() && inputs("unconditional").is_empty());
        assert_eq!(names("rollout"), ["userId", "sessionId"]);
        assert!(inputs("rollout").is_random_for(&engine.read_context(&Context::default())));
        assert!(!inputs("rollout").is_random_for(&engine.read_context(&user("7"))));
    }

    #[test]
    fn context_key_has_exactly_what_flags_read() {
        let constraint = |field: &str, operator: &str, value: &str| json!({ "contextName": field, "operator": operator, "values": [value], "value": value });
        let flag = |name: &str, rollout: u32, stickiness: &str, constraint: &Value| {
            let parameters = json!({ "rollout": rollout, "stickiness": stickiness });
            let strategy = json!({ "name": "flexibleRollout", "parameters": parameters, "constraints": [constraint] });
            json!({ "name": name, "enabled": true, "strategies": [strategy] })
        };
        let (engine, _) = compile(
            &json!([
                flag("a", 50, "default", &constraint("plan", "IN", "pro")),
                flag("b", 100, "appName", &constraint("now", "DATE_AFTER", "2030-01-01")),
                flag("c", 100, "default", &constraint("region", "STR_CONTAINS", "eu")),
            ]),
            &json!([]),
        );
        let inputs = engine.inputs(engine.ids());
        let key = |context: &Context<'_>| {
            let mut key = ContextKey::new();
            engine.write_context_key(&inputs, &engine.read_context(context), &mut key);
            key
        };
        let base = Context { user_id: Some("7"), session_id: Some("s"), ..Context::default() };
        let properties = |properties| key(&Context { properties, ..base });
        let same = [
            Context { session_id: Some("t"), ..base },
            Context { session_id: None, ..base },
            Context { remote_address: Some("::1"), properties: &[("else", "x")], ..base },
            Context { properties: &[("plan", "free")], ..base },
            Context { app_name: Some(""), ..base },
            Context { now: "2029-12-31T23:59:59Z".parse().unwrap(), ..base },
            Context { current_time: Some("2001-01-01"), ..base },
        ];
        for other in same {
            assert_eq!(key(&base), key(&other), "{other:?}");
        }
        let others = [
            key(&base),
            key(&Context { user_id: Some("8"), ..base }),
            key(&Context { user_id: None, ..base }),
            key(&Context { user_id: None, session_id: Some("t"), ..base }),
            key(&Context { app_name: Some("x"), ..base }),
            key(&Context { now: "2030-01-01T00:00:00.000000001Z".parse().unwrap(), ..base }),
            key(&Context { current_time: Some("soon"), ..base }),
            properties(&[("plan", "pro")]),
            properties(&[("region", "")]),
            properties(&[("region", "eu")]),
        ];
        for (n, one) in others.iter().enumerate() {
            assert!(others[..n].iter().all(|other| other != one), "{n}");
        }
    }

    proptest! {
        #[test]
        fn no_definition_panics(
            parts in prop::collection::vec((arbitrary_json(), arbitrary_json(), arbitrary_json()), 1..4),
            segments in prop::collection::vec(arbitrary_json(), 0..3),
            id in ".{0,6}",
        ) {
            let features: Vec<Value> = parts
                .into_iter()
                .zip(["a", "b", "c"])
                .map(|((strategies, variants, dependencies), name)| json!({
                    "name": name, "enabled": true, "strategies": [strategies], "variants": [variants],
                    "dependencies": if dependencies.is_array() { dependencies } else { json!([]) },
                }))
                .collect();
            let (engine, _) = compile(&features.into(), &segments.into());
            for context in [Context::default(), user(&id)] {
                let bound = engine.bind(&context);
                for id in engine.ids() {
                    let outcome = engine.evaluate(id, &bound);
                    prop_assert!(outcome.ordinal() < engine.flag(id).outcome_count());
                }
            }
        }
    }
}
