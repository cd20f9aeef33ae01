//! Explanations agree with evaluation, as data and in sentences.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::Engine;
use super::super::arbitrary::{arbitrary_context, arbitrary_definitions, arbitrary_json};
use super::*;

fn compile(features: &Value, segments: &Value) -> (Engine, Document) {
    let text = json!({ "version": 2, "features": features, "segments": segments }).to_string();
    let document = Document::parse(text.as_bytes()).unwrap();
    (Engine::compile(&document).0, document)
}

/// Checks that explanations are consistent and agree with evaluation.
fn check(engine: &Engine, document: &Document, context: &Context<'_>) -> Result<(), TestCaseError> {
    let bound = engine.bind(context);
    for id in engine.ids() {
        let outcome = engine.evaluate(id, &bound);
        let explanation = engine.explain(document, id, context);
        prop_assert_eq!(explanation.enabled, outcome.is_on(), "{:#?}", explanation);
        let name = |variant: &Variant| variant.name.clone();
        let evaluated = engine.flag(id).variant(outcome).map(|it| it.name.to_string());
        prop_assert_eq!(explanation.variant.as_ref().map(name), evaluated, "{:#?}", explanation);

        let deciding: Vec<usize> = (0..)
            .zip(&explanation.strategies)
            .filter(|(_, it)| it.reached && it.matches)
            .map(|(n, _)| n)
            .collect();
        if let Decision::Strategy { index } = explanation.decision {
            prop_assert_eq!(deciding, [index]);
            prop_assert!(
                explanation.strategies[..index].iter().all(|it| it.reached && !it.matches)
            );
            prop_assert!(
                explanation.strategies[index].matches && explanation.strategies[index].reached
            );
            prop_assert!(explanation.strategies[index + 1..].iter().all(|it| !it.reached));
            prop_assert!(explanation.enabled);
        } else {
            prop_assert!(deciding.is_empty());
            prop_assert_eq!(explanation.enabled, explanation.decision == Decision::Everybody);
        }
        if let Decision::NoStrategy = explanation.decision {
            prop_assert!(explanation.strategies.iter().all(|it| it.reached && !it.matches));
        }
        let mut lists: Vec<&Variants> = explanation.variants.iter().collect();
        for strategy in &explanation.strategies {
            lists.extend(&strategy.variants);
            let Some(rule) = &strategy.rule else { continue };
            let pieces = rule.holds
                && strategy.constraints.iter().all(|it| it.holds)
                && strategy.segments.iter().all(|it| it.holds);
            prop_assert!(pieces || !strategy.matches, "{:#?}", strategy);
            if let (Some(placement), Some(percentage)) = (&rule.placement, rule.percentage) {
                prop_assert!(placement.bucket.is_none_or(|it| (1..=100).contains(&it)));
                let within = placement.bucket.is_some_and(|bucket| bucket <= percentage);
                prop_assert_eq!(within, rule.holds, "{:#?}", rule);
            }
        }
        for list in &lists {
            let Some(placement) = &list.placement else { continue };
            let bucket = placement.bucket.unwrap();
            let total: u32 = list.shares.iter().map(|share| share.weight).sum();
            prop_assert_eq!(placement.buckets, total);
            let owner = list.shares.iter().find(|share| {
                (share.first_bucket..share.first_bucket + share.weight).contains(&bucket)
            });
            prop_assert_eq!(owner.map(|share| &share.name), list.chosen.as_ref());
        }
        let deciding: Vec<_> = lists.iter().filter(|list| list.decides).collect();
        prop_assert!(deciding.len() <= 1);
        let of_list = deciding.first().and_then(|list| list.chosen.as_ref());
        prop_assert_eq!(of_list, explanation.variant.as_ref().map(|variant| &variant.name));

        let json = serde_json::to_string(&explanation).unwrap();
        prop_assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), explanation);
    }
    Ok(())
}

proptest! {
    #[test]
    fn explanations_agree_with_evaluation(
        (features, segments) in arbitrary_definitions(),
        contexts in prop::collection::vec(arbitrary_context(), 1..4),
    ) {
        let (engine, document) = compile(&features, &segments);
        for context in &contexts {
            check(&engine, &document, &context.context())?;
        }
    }
}

proptest! {
    #[test]
    fn explanations_of_malformed_definitions_agree_with_evaluation(
        parts in prop::collection::vec((arbitrary_json(), arbitrary_json(), arbitrary_json()), 1..4),
        segments in prop::collection::vec(arbitrary_json(), 0..3),
        context in arbitrary_context(),
    ) {
        let feature = |((strategies, variants, dependencies), name)| json!({
            "name": name, "enabled": true, "strategies": [strategies], "variants": [variants],
            "dependencies": if Value::is_array(&dependencies) { dependencies } else { json!([]) },
        });
        let features = parts.into_iter().zip(["a", "b", "c"]).map(feature).collect();
        let (engine, document) = compile(&features, &segments.into());
        check(&engine, &document, &context.context())?;
    }
}

/// Explains flag `a`, which is enabled and made of `parts`, among `others` for the user `7`.
fn explain(parts: Value, others: &[Value]) -> Explanation {
    let mut flag = json!({ "name": "a", "enabled": true, "strategies": [] });
    if let (Value::Object(flag), Value::Object(parts)) = (&mut flag, parts) {
        flag.extend(parts);
    }
    let features: Vec<Value> = [&[flag][..], others].concat();
    let segment = |id: u32, value: &str| {
        let constraint = json!({ "contextName": "plan", "operator": "IN", "values": [value] });
        json!({ "id": id, "name": format!("{value} plan"), "constraints": [constraint] })
    };
    let (engine, document) =
        compile(&features.into(), &json!([segment(1, "gold"), segment(2, "tin")]));
    let context = Context {
        user_id: Some("7"),
        properties: &[("plan", "gold")],
        now: "2030-01-01T00:00:00Z".parse().unwrap(),
        random_seed: 1,
        ..Context::default()
    };
    let explanation = engine.explain(&document, engine.find("a").unwrap(), &context);
    let outcome = engine.evaluate(engine.find("a").unwrap(), &engine.bind(&context));
    assert_eq!(explanation.enabled, outcome.is_on());
    explanation
}

#[test]
fn summary_has_outcome_and_reason() {
    let check = |parts: Value, expect: &str| assert_eq!(explain(parts, &[]).summary, expect);
    check(json!({}), "`a` is on: it has no strategies, so it is on for everybody");
    check(json!({ "enabled": false }), "`a` is off: it is switched off in this environment");
    check(
        json!({ "strategies": null }),
        "`a` is off: it has no list of strategies that can be read",
    );
    check(json!({ "strategies": [{ "name": "new" }] }), "`a` is off: no strategy matches");
    check(
        json!({ "strategies": [
            { "name": "userWithId", "parameters": { "userIds": "8" } },
            { "name": "default", "title": "The rest", "variants": [{ "name": "x", "weight": 1 }] },
        ] }),
        "`a` is on with the variant `x`: strategy 2 (`The rest`) matches: it is for everybody",
    );
    check(
        json!({ "dependencies": [{ "feature": "?" }] }),
        "`a` is off: depends on `?`, which is missing, so it is off",
    );
}

#[test]
fn constraint_sentences_have_the_value_and_the_result() {
    let check = |constraint: Value, holds: bool, expect: &str| {
        let strategy = json!({ "name": "default", "constraints": [constraint] });
        let explanation = explain(json!({ "strategies": [strategy] }), &[]);
        let constraint = &explanation.strategies[0].constraints[0];
        assert_eq!((constraint.why.as_str(), constraint.holds), (expect, holds));
        assert_eq!(explanation.enabled, holds);
    };
    let with = |field: &str, operator: &str, operand: Value| {
        let mut constraint = json!({ "contextName": field, "operator": operator });
        let name = if operand.is_array() { "values" } else { "value" };
        constraint[name] = operand;
        constraint
    };
    check(
        with("userId", "IN", json!(["7", "8"])),
        true,
        "`userId` is one of `7`, `8`; it is `7`; this holds",
    );
    check(
        with("region", "STR_CONTAINS", json!(["eu"])),
        false,
        "`region` contains one of `eu`; it is not given; this does not hold",
    );
    let mut never = with("userId", "NUM_GT", json!("six"));
    never["inverted"] = true.into();
    check(
        never,
        false,
        "not (`userId` is a number greater than `six`); it is `7`; this never holds: \
         NUM_GT cannot compare with `six`",
    );
    check(
        with("userId", "NOT_IN", json!([])),
        true,
        "`userId` is none of nothing; it is `7`; this always holds",
    );
    check(
        with("userId", "LIKE", json!("7")),
        false,
        "`userId` LIKE `7`; it is `7`; this never holds: unknown operator `LIKE`, so its \
         strategy never matches",
    );
    check(
        with("anything", "DATE_AFTER", json!("2029-01-01")),
        true,
        "the time is after `2029-01-01`; it is `2030-01-01T00:00:00Z`; this holds",
    );
    check(json!(7), false, "malformed constraint: its strategy never matches");
    let many: Vec<String> = (10..20).map(|n| n.to_string()).collect();
    check(
        with("userId", "IN", json!(many)),
        false,
        "`userId` is one of `10`, `11`, `12`, `13`, `14`, `15`, `16`, `17` and 2 more; it is `7`; \
         this does not hold",
    );
}

#[test]
fn segment_sentences_have_id_name_and_failing_constraint() {
    let strategy = json!({ "name": "default", "segments": [1, 2, 404] });
    let explanation = explain(json!({ "strategies": [strategy] }), &[]);
    let segments: Vec<_> = explanation.strategies[0]
        .segments
        .iter()
        .map(|it| (it.id, it.holds, it.missing, it.why.as_str()))
        .collect();
    assert_eq!(
        segments,
        [
            (Some(1), true, false, "segment 1 (`gold plan`) holds"),
            (
                Some(2),
                false,
                false,
                "segment 2 (`tin plan`) fails: `plan` is one of `tin`; it is `gold`; this does \
                 not hold"
            ),
            (Some(404), false, true, "segment 404 is missing, so its strategy never matches"),
        ]
    );
    assert_eq!(explanation.problems, ["segment 404 is missing, so its strategy never matches"]);
}

#[test]
fn rollout_sentences_have_the_bucket() {
    let check = |rollout: u32, stickiness: &str, holds: bool, expect: &str| {
        let parameters = json!({ "rollout": rollout, "stickiness": stickiness, "groupId": "g" });
        let strategy = json!({ "name": "flexibleRollout", "parameters": parameters });
        let explanation = explain(json!({ "strategies": [strategy] }), &[]);
        let rule = explanation.strategies[0].rule.as_ref().unwrap();
        assert_eq!((rule.why.as_str(), rule.holds), (expect, holds));
        assert_eq!(rule.percentage, Some(rollout));
        assert_eq!(explanation.enabled, holds);
    };
    let placed = "`userId` `7` of group `g` is in bucket 81 of 100";
    check(81, "default", true, &format!("{placed}, within the rollout's 81 %"));
    check(80, "default", false, &format!("{placed}, beyond the rollout's 80 %"));
    // Parts that compilation drops are explained as well.
    check(0, "userId", false, &format!("{placed}, beyond the rollout's 0 %"));
    check(100, "userId", true, &format!("{placed}, within the rollout's 100 %"));
    check(100, "region", false, "the context lacks `region`, which determines the bucket");
    check(50, "random", false, "the random draw is bucket 58 of 100, beyond the rollout's 50 %");
}

#[test]
fn variant_sentences_have_the_reason_of_the_selection() {
    let variant = |name: &str, weight: u32, values: &[&str]| {
        let overrides = json!([{ "contextName": "userId", "values": values }]);
        json!({ "name": name, "weight": weight, "overrides": overrides })
    };
    let check = |variants: Value, choice: SelectionReason, chosen: Option<&str>, expect: &str| {
        let explanation = explain(json!({ "variants": variants }), &[]);
        let list = explanation.variants.unwrap();
        assert_eq!((list.why.as_str(), list.choice), (expect, choice));
        assert_eq!((list.chosen.as_deref(), list.decides), (chosen, chosen.is_some()));
        assert_eq!(explanation.variant.map(|variant| variant.name).as_deref(), chosen);
    };
    check(
        json!([variant("x", 0, &["7"])]),
        SelectionReason::Nobody,
        None,
        "no variant has a weight, so none is selected",
    );
    check(
        json!([variant("x", 0, &[]), variant("y", 1, &[])]),
        SelectionReason::Everybody,
        Some("y"),
        "`y` is the only variant with a weight, so it is always selected",
    );
    check(
        json!([variant("x", 1, &["7"]), variant("y", 999, &[])]),
        SelectionReason::Override,
        Some("x"),
        "`x` is reserved for `userId` `7`",
    );
    check(
        json!([variant("x", 1, &["8"]), variant("y", 999, &[])]),
        SelectionReason::Bucket,
        Some("y"),
        "`userId` `7` of group `a` is in bucket 229 of 1000, which is `y`'s",
    );
}

#[test]
fn parent_sentences_have_the_required_and_the_actual_outcome() {
    let parents = [
        json!({ "name": "off", "enabled": false, "strategies": [] }),
        json!({ "name": "x", "enabled": true, "variants": [{ "name": "x", "weight": 1 }], "strategies": [] }),
        json!({ "name": "child", "enabled": true, "strategies": [], "dependencies": [{ "feature": "x" }] }),
    ];
    let dependencies = json!([
        { "feature": "x", "variants": ["x", "y"] },
        { "feature": "off", "enabled": false },
        { "feature": "x", "variants": ["y"] },
        { "feature": "child" },
        { "feature": "off" },
    ]);
    let explanation = explain(json!({ "dependencies": dependencies }), &parents);
    assert_eq!(explanation.decision, Decision::Parent { index: 2 });
    let parents: Vec<_> =
        explanation.parents.iter().map(|it| (it.satisfied, it.why.as_str())).collect();
    assert_eq!(
        parents,
        [
            (true, "parent `x` has to be on with one of `x`, `y` and is on with the variant `x`"),
            (true, "parent `off` has to be off and is off"),
            (false, "parent `x` has to be on with one of `y` but is on with the variant `x`"),
            (false, "depends on `child`, which has dependencies itself, so it is off"),
            (false, "parent `off` has to be on but is off"),
        ]
    );
    let inner = explanation.parents[0].explanation.as_ref().unwrap();
    assert_eq!(inner.variant.as_ref().unwrap().name, "x");
    assert!(explanation.parents[3].explanation.is_none());
}
