//! Cached results equal fresh evaluations.

use jiff::{SignedDuration, Timestamp};
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use super::*;
use crate::{
    engine::{
        FieldId, Relevance,
        arbitrary::{ArbitraryContext, DATES, arbitrary_context, arbitrary_definitions},
    },
    evaluation::prewarm,
    protocol::features::Document,
    served::Snapshots,
    token::{Environment, Scope},
};

fn parse(features: &Value, segments: &Value) -> (Scope, Document) {
    let text = json!({ "version": 2, "features": features, "segments": segments }).to_string();
    let document = Document::parse(text.as_bytes()).unwrap();
    (Scope { environment: Environment::new("development"), projects: Projects::All }, document)
}

fn build(features: &Value, segments: &Value) -> ServedSnapshot {
    let (scope, document) = parse(features, segments);
    ServedSnapshot::build(scope, document, None)
}

/// The body and entity tag of an evaluation without any cache.
fn evaluate_uncached(
    snapshot: &ServedSnapshot,
    projects: &Projects,
    context: &Context<'_>,
    include: Include,
) -> (String, HeaderValue) {
    let (engine, fragments) = (snapshot.engine(), snapshot.fragments());
    let (mut toggles, mut hashes) = (Vec::new(), Vec::new());
    for flag in engine.ids() {
        if !projects.contains(engine.flag(flag).project()) {
            continue;
        }
        let outcome = engine.evaluate(flag, &engine.bind(context));
        if outcome.is_on() || include == Include::All {
            let fragment = fragments.get(fragments.id(flag, outcome));
            toggles.push(fragment.json());
            hashes.extend(fragment.hash().to_le_bytes());
        }
    }
    (format!(r#"{{"toggles":[{}]}}"#, toggles.join(",")), etag_from_hash(xxh3_128(&hashes)))
}

fn is_cached(flags: &EvaluatedFlags<'_>) -> bool {
    matches!(flags.evaluation, Evaluation::Cached(_))
}

// Random flags, contexts, clocks and swaps.

/// One request, or a swap before it.
#[derive(Clone, Debug)]
struct Step {
    swap: bool,
    /// Whether the swapped snapshot was prewarmed.
    is_prewarmed: bool,
    context: ArbitraryContext,
    include: Include,
    projects: Projects,
    /// Whether the validity of the result over time is checked, too.
    is_timed: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let projects = select(vec![
        Projects::All,
        Projects::from_list(["red"]),
        Projects::from_list(["blue"]),
        Projects::from_list(["none"]),
    ]);
    let include = select(vec![Include::Enabled, Include::All]);
    let chances = (prop::bool::weighted(0.1), any::<bool>(), prop::bool::weighted(0.3));
    (chances, arbitrary_context(), include, projects).prop_map(
        |((swap, is_prewarmed, is_timed), context, include, projects)| Step {
            swap,
            is_prewarmed,
            context,
            include,
            projects,
            is_timed,
        },
    )
}

fn check(snapshot: &ServedSnapshot, step: &Step) -> Result<(), TestCaseError> {
    let context = step.context.context();
    let view = snapshot.frontend_view(&step.projects);
    let (text, etag) = evaluate_uncached(snapshot, &step.projects, &context, step.include);
    let random = view.inputs().is_random_for(&snapshot.engine().read_context(&context));
    for _ in 0..2 {
        let flags = EvaluatedFlags::evaluate(snapshot, &view, &context, step.include);
        prop_assert!(!(random && is_cached(&flags)), "random outcomes are evaluated each time");
        prop_assert_eq!(flags.etag(), &etag);
        let body = flags.body();
        prop_assert_eq!(
            &body.get_or_encode(crate::snapshot::prepared_body::ContentCoding::Identity).bytes,
            &text
        );
        prop_assert_eq!(body.etag(), &etag);
    }
    Ok(())
}

/// A result is valid until the next date that the flags read, and indefinitely if they read none.
fn check_validity(snapshot: &ServedSnapshot, step: &Step) -> Result<(), TestCaseError> {
    let view = snapshot.frontend_view(&step.projects);
    let requested = step.context.context();
    let date: Timestamp = DATES[0].parse().unwrap();
    let second = SignedDuration::from_secs(1);
    let times = [date - second, date, date + second, requested.now];
    for now in times {
        let context = Context { now, ..requested };
        let flags = EvaluatedFlags::evaluate(snapshot, &view, &context, step.include);
        if !flags.is_deterministic() {
            continue;
        }
        let until = view.inputs().next_change(now);
        let is_timed = view.inputs().is_time_dependent();
        let is_valid = |later| !is_timed || now <= later && until.is_none_or(|until| later < until);
        for later in times.into_iter().filter(|later| is_valid(*later)) {
            let context = Context { now: later, random_seed: !requested.random_seed, ..requested };
            let another = requested.session_is_generated.then_some("fff0");
            let context = Context { session_id: another.or(requested.session_id), ..context };
            let (_, etag) = evaluate_uncached(snapshot, &step.projects, &context, step.include);
            prop_assert_eq!(flags.etag(), etag, "{:?} at {}, as of {}", until, later, now);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    /// Leaving out an address that no flag reads does not change the result.
    #[test]
    fn irrelevant_address_does_not_change_the_result(
        (flags, segments) in arbitrary_definitions(),
        contexts in vec(arbitrary_context(), 1..20),
    ) {
        let snapshot = build(&flags, &segments);
        for context in &contexts {
            let bare = Context { remote_address: None, ..context.context() };
            let lacks = |field| match field {
                FieldId::USER_ID => bare.user_id.is_none_or(str::is_empty),
                FieldId::SESSION_ID => bare.session_id.is_none_or(str::is_empty),
                _ => true,
            };
            let view = snapshot.frontend_view(&Projects::All);
            if view.inputs().relevance(FieldId::REMOTE_ADDRESS, lacks) != Relevance::None {
                continue;
            }
            let with = Context { remote_address: Some("10.1.2.3"), ..bare };
            let [bare, with] = [bare, with].map(|it| evaluate_uncached(&snapshot, &Projects::All, &it, Include::All));
            prop_assert_eq!(bare, with);
        }
    }

    /// Contexts come from small sets of values, so that many are equal in the fields that flags read,
    /// and more are nearly equal.
    #[test]
    fn cached_results_equal_fresh_evaluations(
        documents in vec(arbitrary_definitions(), 2),
        steps in vec(step(), 1..120),
    ) {
        let snapshots = Snapshots::default();
        let mut documents = documents.iter().cycle().map(|(flags, segments)| parse(flags, segments));
        let (scope, document) = documents.next().unwrap();
        let mut current = snapshots.swap(ServedSnapshot::build(scope, document, None));
        for step in &steps {
            if step.swap {
                let before = Arc::clone(&current);
                let (scope, document) = documents.next().unwrap();
                let next = ServedSnapshot::rebuild_from(&before, scope, document, None);
                if step.is_prewarmed {
                    prewarm(&next, &before, step.context.context().now);
                }
                current = snapshots.swap(next);
                // A running request uses the snapshot that it loaded to the end.
                check(&before, step)?;
            }
            check(&current, step)?;
            if step.is_timed {
                check_validity(&current, step)?;
            }
        }
    }
}

// Sharing of results and bodies.

fn flag(name: &str, strategy: &Value) -> Value {
    json!({ "name": name, "project": "red", "enabled": true, "strategies": [strategy] })
}

fn rollout(stickiness: &str) -> Value {
    let parameters = json!({ "rollout": 50, "stickiness": stickiness, "groupId": "g" });
    json!({ "name": "flexibleRollout", "parameters": parameters })
}

fn user(id: &str) -> Context<'_> {
    Context { user_id: Some(id), ..Context::default() }
}

#[test]
fn contexts_equal_in_all_read_fields_share_a_result() {
    let pro = json!({ "contextName": "plan", "operator": "IN", "values": ["pro"] });
    let strategy = json!({ "name": "default", "constraints": [pro] });
    let snapshot = build(&json!([flag("a", &strategy)]), &json!([]));
    let view = snapshot.frontend_view(&Projects::All);
    let check = |context: &Context<'_>, cached: bool| {
        let flags = EvaluatedFlags::evaluate(&snapshot, &view, context, Include::All);
        assert_eq!(is_cached(&flags), cached, "{context:?}");
    };
    check(&user("1"), false);
    check(&user("2"), true);
    check(&Context { properties: &[("plan", "free")], ..user("3") }, true);
    check(&Context { properties: &[("plan", "pro")], ..user("3") }, false);
    check(&Context { properties: &[("plan", "pro")], ..user("4") }, true);
}

#[test]
fn result_is_valid_until_the_next_date_and_again_when_the_clock_is_set_back() {
    let date = json!({ "contextName": "currentTime", "operator": "DATE_AFTER", "value": DATES[0] });
    let strategy = json!({ "name": "default", "constraints": [date] });
    let snapshot = build(&json!([flag("a", &strategy)]), &json!([]));
    let view = snapshot.frontend_view(&Projects::All);
    let date: Timestamp = DATES[0].parse().unwrap();
    let check = |seconds: i64, cached: bool, on: bool| {
        let now = date + SignedDuration::from_secs(seconds);
        let context = Context { now, ..user("1") };
        let flags = EvaluatedFlags::evaluate(&snapshot, &view, &context, Include::Enabled);
        assert_eq!(is_cached(&flags), cached, "{seconds}");
        let text = flags
            .body()
            .get_or_encode(crate::snapshot::prepared_body::ContentCoding::Identity)
            .bytes
            .clone();
        assert_eq!(text != r#"{"toggles":[]}"#, on, "{seconds}");
    };
    check(-3600, false, false);
    check(0, true, false);
    check(1, false, true);
    check(3600, true, true);
    check(-1, true, false);
}

#[test]
fn random_outcomes_differ_between_requests_without_an_identifier() {
    let flags = json!([flag("a", &rollout("random")), flag("b", &rollout("default"))]);
    let snapshot = build(&flags, &json!([]));
    let only = build(&json!([flag("b", &rollout("default"))]), &json!([]));
    let tags = |snapshot: &ServedSnapshot, context: Context<'_>| -> usize {
        let view = snapshot.frontend_view(&Projects::All);
        let draws = (0..100).map(|random_seed| Context { random_seed, ..context });
        let tag =
            |context| EvaluatedFlags::evaluate(snapshot, &view, &context, Include::All).etag();
        draws.map(tag).collect::<std::collections::HashSet<_>>().len()
    };
    assert_eq!(tags(&snapshot, Context::default()), 4);
    assert_eq!(tags(&snapshot, user("1")), 2);
    assert_eq!(tags(&only, Context::default()), 2);
    assert_eq!(tags(&only, user("1")), 1);
}

#[test]
fn equal_results_share_a_body_from_the_second_request_on() {
    let snapshot = build(&json!([flag("a", &rollout("userId"))]), &json!([]));
    let view = snapshot.frontend_view(&Projects::All);
    let body = |n: u32| {
        let id = n.to_string();
        EvaluatedFlags::evaluate(&snapshot, &view, &user(&id), Include::All).body()
    };
    let bodies: Vec<Arc<PreparedBody>> = (0..100).map(body).collect();
    let mut distinct: Vec<&Arc<PreparedBody>> = Vec::new();
    for body in &bodies {
        if !distinct.iter().any(|other| Arc::ptr_eq(other, body)) {
            distinct.push(body);
        }
    }
    assert_eq!(distinct.len(), 4, "each of two bodies is built twice, then cached");
}

/// A snapshot that replaces another and is prewarmed with its requests.
fn after(previous: &ServedSnapshot, flags: &Value) -> ServedSnapshot {
    let (scope, document) = parse(flags, &json!([]));
    let next = ServedSnapshot::rebuild_from(previous, scope, document, None);
    prewarm(&next, previous, Timestamp::UNIX_EPOCH);
    next
}

#[test]
fn repeated_requests_are_evaluated_before_the_next_snapshot_is_served() {
    let flags = |others: usize| {
        let others = (0..others).map(|n| flag(&format!("other{n}"), &json!({ "name": "off" })));
        let flags = std::iter::once(flag("a", &rollout("userId"))).chain(others);
        Value::Array(flags.collect())
    };
    let request = |snapshot: &ServedSnapshot, id: &str, include| {
        let view = snapshot.frontend_view(&Projects::All);
        let flags = EvaluatedFlags::evaluate(snapshot, &view, &user(id), include);
        (is_cached(&flags), flags.body())
    };
    let first = build(&flags(1), &json!([]));
    request(&first, "1", Include::All);
    let [_, _, enabled] = [(); 3].map(|()| request(&first, "2", Include::Enabled).1);
    let [_, _, all] = [(); 3].map(|()| request(&first, "2", Include::All).1);

    let second = after(&first, &flags(2));
    let (cached, body) = request(&second, "2", Include::Enabled);
    assert!(cached && Arc::ptr_eq(&body, &enabled), "no included flag has changed");
    let (cached, body) = request(&second, "2", Include::All);
    assert!(cached && !Arc::ptr_eq(&body, &all), "there is one flag more");
    assert!(!request(&second, "1", Include::All).0, "requested once");

    let third = after(&second, &flags(2));
    assert!(request(&third, "1", Include::All).0, "requested from two snapshots");
    assert!(request(&third, "2", Include::All).0, "one hit of a prewarmed result is enough");
    let fifth = after(&after(&third, &flags(2)), &flags(2));
    assert!(!request(&fifth, "1", Include::All).0, "not requested from the fourth");
}

#[test]
fn number_of_prewarmed_contexts_is_limited() {
    let flags = json!([flag("a", &rollout("userId"))]);
    let request = |snapshot: &ServedSnapshot, n: u32| {
        let (view, id) = (snapshot.frontend_view(&Projects::All), n.to_string());
        is_cached(&EvaluatedFlags::evaluate(snapshot, &view, &user(&id), Include::All))
    };
    let first = build(&flags, &json!([]));
    for n in 0..1000 {
        assert!(!request(&first, n));
        assert!(request(&first, n));
    }
    let second = after(&first, &flags);
    let prewarmed = (0..1000).filter(|&n| request(&second, n)).count();
    assert!((32..=64).contains(&prewarmed), "{prewarmed}");
}
