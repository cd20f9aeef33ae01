//! What is remembered is what evaluating afresh would give.

use jiff::{SignedDuration, Timestamp};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{select, subsequence},
};
use serde_json::{Value, json};

use super::*;
use crate::{
    snapshot::Snapshots,
    token::{Environment, Scope},
    wire::features::Document,
};

fn build(features: &Value, segments: &Value) -> Snapshot {
    let text = json!({ "version": 2, "features": features, "segments": segments }).to_string();
    let document = Document::parse(text.as_bytes()).unwrap();
    let scope = Scope { environment: Environment::new("development"), projects: Projects::All };
    Snapshot::build(scope, document, Timestamp::UNIX_EPOCH)
}

/// The text of an answer and its entity tag, without anything that is remembered.
fn afresh(
    snapshot: &Snapshot,
    projects: &Projects,
    context: &Context<'_>,
    shown: Shown,
) -> (String, HeaderValue) {
    let (engine, fragments) = (snapshot.engine(), snapshot.fragments());
    let (mut toggles, mut hashes) = (Vec::new(), Vec::new());
    for flag in engine.ids() {
        if !projects.contains(engine.flag(flag).project()) {
            continue;
        }
        let outcome = engine.evaluate(flag, &engine.bind(context));
        if outcome.is_on() || shown == Shown::All {
            let fragment = fragments.get(fragments.id(flag, outcome));
            toggles.push(fragment.json());
            hashes.extend(fragment.hash().to_le_bytes());
        }
    }
    (format!(r#"{{"toggles":[{}]}}"#, toggles.join(",")), etag_of(xxh3_128(&hashes)))
}

fn is_remembered(answer: &Answer<'_>) -> bool {
    matches!(answer.known, Known::Values(_))
}

// Random flags, contexts, clocks and swaps.

const FIELDS: [&str; 8] = [
    "userId",
    "sessionId",
    "environment",
    "appName",
    "remoteAddress",
    "currentTime",
    "plan",
    "region",
];
const TEXTS: [&str; 9] = ["", "a", "A", "ab", "7", "12", "1.2.3", "10.0.0.7", "2024-05-01"];
const DATES: [&str; 3] = ["2024-05-01T00:00:00Z", "2024-05-01T00:00:01Z", "2025-01-01T00:00:00Z"];
const STICKINESS: [&str; 6] = ["default", "random", "userId", "sessionId", "plan", "currentTime"];

fn constraint() -> impl Strategy<Value = Value> {
    let operators = [
        "IN",
        "NOT_IN",
        "STR_CONTAINS",
        "STR_STARTS_WITH",
        "NUM_GT",
        "SEMVER_GTE",
        "REGEX",
        "IN_CIDR",
        "DATE_AFTER",
        "DATE_BEFORE",
    ];
    let values = subsequence(TEXTS.to_vec(), 1..4);
    let all = (select(operators.to_vec()), select(FIELDS.to_vec()), values, select(DATES.to_vec()));
    (all, any::<[bool; 2]>()).prop_map(
        |((operator, field, values, date), [inverted, ignore_case])| {
            let value = match operator {
                "NUM_GT" => "8",
                "SEMVER_GTE" => "1.2.0",
                "REGEX" => "^[a-c]",
                _ => date,
            };
            let values = if operator == "IN_CIDR" { vec!["10.0.0.0/8"] } else { values };
            json!({
                "contextName": field, "operator": operator, "value": value, "values": values,
                "inverted": inverted, "caseInsensitive": ignore_case,
            })
        },
    )
}

fn variants() -> impl Strategy<Value = Value> {
    let overriding = option::of((select(FIELDS.to_vec()), select(TEXTS.to_vec())));
    let variant = (0..3_u32, select(STICKINESS.to_vec()), overriding);
    vec(variant, 0..3).prop_map(|all| {
        let variant = |(n, (weight, stickiness, overriding)): (usize, (u32, _, Option<_>))| {
            let overrides = overriding
                .map(|(field, value)| json!([{ "contextName": field, "values": [value] }]));
            json!({
                "name": format!("v{n}"), "weight": weight, "stickiness": stickiness,
                "overrides": overrides.unwrap_or_else(|| json!([])),
                "payload": { "type": "string", "value": "\"x\"" },
            })
        };
        all.into_iter().enumerate().map(variant).collect()
    })
}

fn strategy() -> impl Strategy<Value = Value> {
    let rollout = (select(vec![0, 30, 50, 100]), select(STICKINESS.to_vec()), variants()).prop_map(
        |(rollout, stickiness, variants)| {
            json!({
                "name": "flexibleRollout", "variants": variants,
                "parameters": { "rollout": rollout, "stickiness": stickiness, "groupId": "g" },
            })
        },
    );
    let others = select(vec![
        json!({ "name": "default" }),
        json!({ "name": "userWithId", "parameters": { "userIds": "7,a" } }),
        json!({ "name": "remoteAddress", "parameters": { "IPs": "10.0.0.0/8,a" } }),
        json!({ "name": "gradualRolloutRandom", "parameters": { "percentage": "50" } }),
        json!({ "name": "gradualRolloutSessionId", "parameters": { "percentage": "50" } }),
        json!({ "name": "applicationHostname", "parameters": { "hostNames": "here" } }),
    ]);
    let kind = prop_oneof![3 => rollout, 1 => others];
    (kind, vec(constraint(), 0..3), prop::bool::weighted(0.2)).prop_map(
        |(mut strategy, constraints, segment)| {
            strategy["constraints"] = constraints.into();
            strategy["segments"] = if segment { json!([1]) } else { json!([]) };
            strategy
        },
    )
}

fn snapshot() -> impl Strategy<Value = (Value, Value)> {
    let parent = option::weighted(0.2, (select(vec!["f0", "f1"]), any::<bool>()));
    let flag = (vec(strategy(), 0..3), variants(), parent, prop::bool::weighted(0.9));
    let segment = vec(constraint(), 1..3);
    (vec(flag, 1..5), segment).prop_map(|(flags, segment)| {
        let flag = |(n, (strategies, variants, parent, enabled)): (usize, (_, _, Option<_>, _))| {
            let dependencies = parent
                .map(|(feature, enabled)| json!([{ "feature": feature, "enabled": enabled }]));
            let project = if n % 2 == 0 { "red" } else { "blue" };
            json!({
                "name": format!("f{n}"), "project": project, "enabled": enabled,
                "strategies": strategies, "variants": variants,
                "dependencies": dependencies.unwrap_or_else(|| json!([])),
            })
        };
        let flags = flags.into_iter().enumerate().map(flag).collect();
        (flags, json!([{ "id": 1, "constraints": segment }]))
    })
}

/// One request, or a swap before it.
#[derive(Clone, Debug)]
struct Step {
    swap: bool,
    /// One value or none for each of the fields.
    values: Vec<Option<&'static str>>,
    date: usize,
    /// How far from that date the clock stands, in nanoseconds.
    off: i64,
    draw: u64,
    shown: Shown,
    projects: Projects,
}

impl Step {
    fn now(&self) -> Timestamp {
        let date: Timestamp = DATES[self.date].parse().unwrap();
        date + SignedDuration::from_nanos(self.off)
    }
}

fn step() -> impl Strategy<Value = Step> {
    let projects = select(vec![
        Projects::All,
        Projects::from_list(["red"]),
        Projects::from_list(["blue"]),
        Projects::from_list(["none"]),
    ]);
    let value = option::weighted(0.4, select(TEXTS.to_vec()));
    let clock = (0..DATES.len(), select(vec![-1_000_000_000, -1, 0, 1, 1_000_000_000_i64]));
    let shown = select(vec![Shown::Enabled, Shown::All]);
    let swap = prop::bool::weighted(0.1);
    (swap, vec(value, FIELDS.len()), clock, any::<u64>(), shown, projects).prop_map(
        |(swap, values, (date, off), draw, shown, projects)| Step {
            swap,
            values,
            date,
            off,
            draw,
            shown,
            projects,
        },
    )
}

fn check(snapshot: &Snapshot, step: &Step) -> Result<(), TestCaseError> {
    let properties: Vec<_> = ["plan", "region"]
        .into_iter()
        .zip(&step.values[6..])
        .filter_map(|(name, value)| Some((name, (*value)?)))
        .collect();
    let context = Context {
        user_id: step.values[0],
        session_id: step.values[1],
        environment: step.values[2],
        app_name: step.values[3],
        remote_address: step.values[4],
        current_time: step.values[5],
        properties: &properties,
        hostname: Some("here"),
        now: step.now(),
        draw: step.draw,
    };
    let view = snapshot.view(&step.projects);
    let (text, etag) = afresh(snapshot, &step.projects, &context, step.shown);
    let random = view.reads().is_random(&snapshot.engine().read(&context));
    for _ in 0..2 {
        let answer = Answer::of(snapshot, &view, &context, step.shown);
        prop_assert!(!(random && is_remembered(&answer)), "lots are drawn each time");
        prop_assert_eq!(answer.etag(), &etag);
        let body = answer.body();
        prop_assert_eq!(&body.make(crate::snapshot::body::Coding::Identity).bytes, &text);
        prop_assert_eq!(body.etag(), &etag);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    /// Contexts come from small sets of values, so that many are equal in what the flags ask, and
    /// more are nearly so.
    #[test]
    fn what_is_remembered_is_what_evaluating_gives(
        documents in vec(snapshot(), 2),
        steps in vec(step(), 1..120),
    ) {
        let snapshots = Snapshots::default();
        let mut builds = documents.iter().cycle().map(|(flags, segments)| build(flags, segments));
        let mut current = snapshots.swap(builds.next().unwrap());
        for step in &steps {
            if step.swap {
                let before = Arc::clone(&current);
                current = snapshots.swap(builds.next().unwrap());
                // A request under way uses the snapshot that it loaded to its end.
                check(&before, step)?;
            }
            check(&current, step)?;
        }
    }
}

// What is shared, and what is not.

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
fn users_whom_no_flag_tells_apart_share_an_answer() {
    let pro = json!({ "contextName": "plan", "operator": "IN", "values": ["pro"] });
    let strategy = json!({ "name": "default", "constraints": [pro] });
    let snapshot = build(&json!([flag("a", &strategy)]), &json!([]));
    let view = snapshot.view(&Projects::All);
    let check = |context: &Context<'_>, remembered: bool| {
        let answer = Answer::of(&snapshot, &view, context, Shown::All);
        assert_eq!(is_remembered(&answer), remembered, "{context:?}");
    };
    check(&user("1"), false);
    check(&user("2"), true);
    check(&Context { properties: &[("plan", "free")], ..user("3") }, true);
    check(&Context { properties: &[("plan", "pro")], ..user("3") }, false);
    check(&Context { properties: &[("plan", "pro")], ..user("4") }, true);
}

#[test]
fn an_answer_holds_until_the_next_date_and_again_when_the_clock_is_set_back() {
    let date = json!({ "contextName": "currentTime", "operator": "DATE_AFTER", "value": DATES[0] });
    let strategy = json!({ "name": "default", "constraints": [date] });
    let snapshot = build(&json!([flag("a", &strategy)]), &json!([]));
    let view = snapshot.view(&Projects::All);
    let date: Timestamp = DATES[0].parse().unwrap();
    let check = |seconds: i64, remembered: bool, on: bool| {
        let now = date + SignedDuration::from_secs(seconds);
        let context = Context { now, ..user("1") };
        let answer = Answer::of(&snapshot, &view, &context, Shown::Enabled);
        assert_eq!(is_remembered(&answer), remembered, "{seconds}");
        let text = answer.body().make(crate::snapshot::body::Coding::Identity).bytes.clone();
        assert_eq!(text != r#"{"toggles":[]}"#, on, "{seconds}");
    };
    check(-3600, false, false);
    check(0, true, false);
    check(1, false, true);
    check(3600, true, true);
    check(-1, true, false);
}

#[test]
fn lots_are_drawn_anew_for_each_request_of_somebody_unknown() {
    let flags = json!([flag("a", &rollout("random")), flag("b", &rollout("default"))]);
    let snapshot = build(&flags, &json!([]));
    let only = build(&json!([flag("b", &rollout("default"))]), &json!([]));
    let tags = |snapshot: &Snapshot, context: Context<'_>| -> usize {
        let view = snapshot.view(&Projects::All);
        let draws = (0..100).map(|draw| Context { draw, ..context });
        let tag = |context| Answer::of(snapshot, &view, &context, Shown::All).etag();
        draws.map(tag).collect::<std::collections::HashSet<_>>().len()
    };
    assert_eq!(tags(&snapshot, Context::default()), 4);
    assert_eq!(tags(&snapshot, user("1")), 2);
    assert_eq!(tags(&only, Context::default()), 2);
    assert_eq!(tags(&only, user("1")), 1);
}

#[test]
fn equal_outcomes_share_a_body_once_it_is_asked_for_again() {
    let snapshot = build(&json!([flag("a", &rollout("userId"))]), &json!([]));
    let view = snapshot.view(&Projects::All);
    let body = |n: u32| {
        let id = n.to_string();
        Answer::of(&snapshot, &view, &user(&id), Shown::All).body()
    };
    let bodies: Vec<Arc<Body>> = (0..100).map(body).collect();
    let mut distinct: Vec<&Arc<Body>> = Vec::new();
    for body in &bodies {
        if !distinct.iter().any(|other| Arc::ptr_eq(other, body)) {
            distinct.push(body);
        }
    }
    assert_eq!(distinct.len(), 4, "two outcomes: each was made once, then once to be kept");
}
