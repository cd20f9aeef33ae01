//! Explanations agree with evaluating, always, and say so in words.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::Engine;
use super::super::arbitrary::{anything, asking, definitions};
use super::*;

fn compile(features: &Value, segments: &Value) -> (Engine, Document) {
    let text = json!({ "version": 2, "features": features, "segments": segments }).to_string();
    let document = Document::parse(text.as_bytes()).unwrap();
    (Engine::compile(&document).0, document)
}

/// Checks that what is told of a flag hangs together, and that it is what evaluating says.
fn check(engine: &Engine, document: &Document, context: &Context<'_>) -> Result<(), TestCaseError> {
    let bound = engine.bind(context);
    for id in engine.ids() {
        let outcome = engine.evaluate(id, &bound);
        let told = engine.explain(document, id, context);
        prop_assert_eq!(told.enabled, outcome.is_on(), "{:#?}", told);
        let name = |variant: &Variant| variant.name.clone();
        let evaluated = engine.flag(id).variant(outcome).map(|it| it.name.to_string());
        prop_assert_eq!(told.variant.as_ref().map(name), evaluated, "{:#?}", told);

        let deciding: Vec<usize> = (0..)
            .zip(&told.strategies)
            .filter(|(_, it)| it.reached && it.matches)
            .map(|(n, _)| n)
            .collect();
        if let Decision::Strategy { index } = told.decision {
            prop_assert_eq!(deciding, [index]);
            prop_assert!(told.strategies[..index].iter().all(|it| it.reached && !it.matches));
            prop_assert!(told.strategies[index].matches && told.strategies[index].reached);
            prop_assert!(told.strategies[index + 1..].iter().all(|it| !it.reached));
            prop_assert!(told.enabled);
        } else {
            prop_assert!(deciding.is_empty());
            prop_assert_eq!(told.enabled, told.decision == Decision::Everybody);
        }
        if let Decision::NoStrategy = told.decision {
            prop_assert!(told.strategies.iter().all(|it| it.reached && !it.matches));
        }
        let mut lists: Vec<&Variants> = told.variants.iter().collect();
        for strategy in &told.strategies {
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
        prop_assert_eq!(of_list, told.variant.as_ref().map(|variant| &variant.name));

        let json = serde_json::to_string(&told).unwrap();
        prop_assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), told);
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_is_told_is_what_is_evaluated(
        (features, segments) in definitions(),
        askings in prop::collection::vec(asking(), 1..4),
    ) {
        let (engine, document) = compile(&features, &segments);
        for asking in &askings {
            check(&engine, &document, &asking.context())?;
        }
    }
}

proptest! {
    #[test]
    fn malformed_definitions_are_told_too(
        parts in prop::collection::vec((anything(), anything(), anything()), 1..4),
        segments in prop::collection::vec(anything(), 0..3),
        asking in asking(),
    ) {
        let feature = |((strategies, variants, dependencies), name)| json!({
            "name": name, "enabled": true, "strategies": [strategies], "variants": [variants],
            "dependencies": if Value::is_array(&dependencies) { dependencies } else { json!([]) },
        });
        let features = parts.into_iter().zip(["a", "b", "c"]).map(feature).collect();
        let (engine, document) = compile(&features, &segments.into());
        check(&engine, &document, &asking.context())?;
    }
}

/// What is told of flag `a` among `others`, made of `parts` and enabled, for the user `7`.
fn told_of(parts: Value, others: &[Value]) -> Explanation {
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
        draw: 1,
        ..Context::default()
    };
    let told = engine.explain(&document, engine.find("a").unwrap(), &context);
    let outcome = engine.evaluate(engine.find("a").unwrap(), &engine.bind(&context));
    assert_eq!(told.enabled, outcome.is_on());
    told
}

#[test]
fn the_verdict_is_told_in_a_sentence() {
    let check = |parts: Value, expect: &str| assert_eq!(told_of(parts, &[]).summary, expect);
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
fn constraints_are_told_with_what_they_looked_at() {
    let check = |constraint: Value, holds: bool, expect: &str| {
        let strategy = json!({ "name": "default", "constraints": [constraint] });
        let told = told_of(json!({ "strategies": [strategy] }), &[]);
        let constraint = &told.strategies[0].constraints[0];
        assert_eq!((constraint.why.as_str(), constraint.holds), (expect, holds));
        assert_eq!(told.enabled, holds);
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
fn segments_are_told_by_id_and_what_they_hold() {
    let strategy = json!({ "name": "default", "segments": [1, 2, 404] });
    let told = told_of(json!({ "strategies": [strategy] }), &[]);
    let segments: Vec<_> = told.strategies[0]
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
    assert_eq!(told.problems, ["segment 404 is missing, so its strategy never matches"]);
}

#[test]
fn rollouts_are_told_with_their_bucket() {
    let check = |rollout: u32, stickiness: &str, holds: bool, expect: &str| {
        let parameters = json!({ "rollout": rollout, "stickiness": stickiness, "groupId": "g" });
        let strategy = json!({ "name": "flexibleRollout", "parameters": parameters });
        let told = told_of(json!({ "strategies": [strategy] }), &[]);
        let rule = told.strategies[0].rule.as_ref().unwrap();
        assert_eq!((rule.why.as_str(), rule.holds), (expect, holds));
        assert_eq!(rule.percentage, Some(rollout));
        assert_eq!(told.enabled, holds);
    };
    let placed = "`userId` `7` of group `g` is in bucket 81 of 100";
    check(81, "default", true, &format!("{placed}, within the rollout's 81 %"));
    check(80, "default", false, &format!("{placed}, beyond the rollout's 80 %"));
    // What compiling drops is told all the same.
    check(0, "userId", false, &format!("{placed}, beyond the rollout's 0 %"));
    check(100, "userId", true, &format!("{placed}, within the rollout's 100 %"));
    check(100, "region", false, "the context lacks `region`, which it takes");
    check(50, "random", false, "the lot drawn is bucket 58 of 100, beyond the rollout's 50 %");
}

#[test]
fn variants_are_told_with_what_chose_them() {
    let variant = |name: &str, weight: u32, values: &[&str]| {
        let overrides = json!([{ "contextName": "userId", "values": values }]);
        json!({ "name": name, "weight": weight, "overrides": overrides })
    };
    let check = |variants: Value, choice: Choice, chosen: Option<&str>, expect: &str| {
        let told = told_of(json!({ "variants": variants }), &[]);
        let list = told.variants.unwrap();
        assert_eq!((list.why.as_str(), list.choice), (expect, choice));
        assert_eq!((list.chosen.as_deref(), list.decides), (chosen, chosen.is_some()));
        assert_eq!(told.variant.map(|variant| variant.name).as_deref(), chosen);
    };
    check(
        json!([variant("x", 0, &["7"])]),
        Choice::Nobody,
        None,
        "no variant has a weight, so nobody gets any",
    );
    check(
        json!([variant("x", 0, &[]), variant("y", 1, &[])]),
        Choice::Everybody,
        Some("y"),
        "`y` is the only one with a weight, so everybody gets it",
    );
    check(
        json!([variant("x", 1, &["7"]), variant("y", 999, &[])]),
        Choice::Override,
        Some("x"),
        "`x` is reserved for `userId` `7`",
    );
    check(
        json!([variant("x", 1, &["8"]), variant("y", 999, &[])]),
        Choice::Bucket,
        Some("y"),
        "`userId` `7` of group `a` is in bucket 229 of 1000, which is `y`'s",
    );
}

#[test]
fn parents_are_told_with_their_own_explanation() {
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
    let told = told_of(json!({ "dependencies": dependencies }), &parents);
    assert_eq!(told.decision, Decision::Parent { index: 2 });
    let parents: Vec<_> = told.parents.iter().map(|it| (it.satisfied, it.why.as_str())).collect();
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
    let inner = told.parents[0].explanation.as_ref().unwrap();
    assert_eq!(inner.variant.as_ref().unwrap().name, "x");
    assert!(told.parents[3].explanation.is_none());
}
