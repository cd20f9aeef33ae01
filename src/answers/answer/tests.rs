//! What is remembered is what evaluating afresh would give.

use jiff::{SignedDuration, Timestamp};
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use super::*;
use crate::{
    answers::prepare,
    engine::{
        FieldId, Relevance,
        arbitrary::{Asking, DATES, asking, definitions},
    },
    snapshot::Snapshots,
    token::{Environment, Scope},
    wire::features::Document,
};

fn parse(features: &Value, segments: &Value) -> (Scope, Document) {
    let text = json!({ "version": 2, "features": features, "segments": segments }).to_string();
    let document = Document::parse(text.as_bytes()).unwrap();
    (Scope { environment: Environment::new("development"), projects: Projects::All }, document)
}

fn build(features: &Value, segments: &Value) -> Snapshot {
    let (scope, document) = parse(features, segments);
    Snapshot::build(scope, document, None)
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

/// One request, or a swap before it.
#[derive(Clone, Debug)]
struct Step {
    swap: bool,
    /// Whether that was prepared.
    is_prepared: bool,
    asking: Asking,
    shown: Shown,
    projects: Projects,
    /// Whether it is looked at how long the answer holds, too.
    is_timed: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let projects = select(vec![
        Projects::All,
        Projects::from_list(["red"]),
        Projects::from_list(["blue"]),
        Projects::from_list(["none"]),
    ]);
    let shown = select(vec![Shown::Enabled, Shown::All]);
    let chances = (prop::bool::weighted(0.1), any::<bool>(), prop::bool::weighted(0.3));
    (chances, asking(), shown, projects).prop_map(
        |((swap, is_prepared, is_timed), asking, shown, projects)| Step {
            swap,
            is_prepared,
            asking,
            shown,
            projects,
            is_timed,
        },
    )
}

fn check(snapshot: &Snapshot, step: &Step) -> Result<(), TestCaseError> {
    let context = step.asking.context();
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

/// An answer holds until the next date that the flags read, and for ever where they read none.
fn check_holds(snapshot: &Snapshot, step: &Step) -> Result<(), TestCaseError> {
    let view = snapshot.view(&step.projects);
    let asked = step.asking.context();
    let date: Timestamp = DATES[0].parse().unwrap();
    let second = SignedDuration::from_secs(1);
    let times = [date - second, date, date + second, asked.now];
    for now in times {
        let context = Context { now, ..asked };
        let answer = Answer::of(snapshot, &view, &context, step.shown);
        if !answer.is_settled() {
            continue;
        }
        let until = view.reads().next_change(now);
        let is_timed = view.reads().is_timed();
        let holds = |later| !is_timed || now <= later && until.is_none_or(|until| later < until);
        for later in times.into_iter().filter(|later| holds(*later)) {
            let context = Context { now: later, draw: !asked.draw, ..asked };
            let another = asked.session_is_made_up.then_some("fff0");
            let context = Context { session_id: another.or(asked.session_id), ..context };
            let (_, etag) = afresh(snapshot, &step.projects, &context, step.shown);
            prop_assert_eq!(answer.etag(), etag, "{:?} at {}, as of {}", until, later, now);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    /// What is left out because no flag asks for it changes nothing.
    #[test]
    fn an_address_that_does_not_matter_is_not_missed(
        (flags, segments) in definitions(),
        askings in vec(asking(), 1..20),
    ) {
        let snapshot = build(&flags, &segments);
        for asking in &askings {
            let bare = Context { remote_address: None, ..asking.context() };
            let lacks = |field| match field {
                FieldId::USER_ID => bare.user_id.is_none_or(str::is_empty),
                FieldId::SESSION_ID => bare.session_id.is_none_or(str::is_empty),
                _ => true,
            };
            let view = snapshot.view(&Projects::All);
            if view.reads().relevance(FieldId::REMOTE_ADDRESS, lacks) != Relevance::None {
                continue;
            }
            let with = Context { remote_address: Some("10.1.2.3"), ..bare };
            let [bare, with] = [bare, with].map(|it| afresh(&snapshot, &Projects::All, &it, Shown::All));
            prop_assert_eq!(bare, with);
        }
    }

    /// Contexts come from small sets of values, so that many are equal in what the flags ask, and
    /// more are nearly so.
    #[test]
    fn what_is_remembered_is_what_evaluating_gives(
        documents in vec(definitions(), 2),
        steps in vec(step(), 1..120),
    ) {
        let snapshots = Snapshots::default();
        let mut documents = documents.iter().cycle().map(|(flags, segments)| parse(flags, segments));
        let (scope, document) = documents.next().unwrap();
        let mut current = snapshots.swap(Snapshot::build(scope, document, None));
        for step in &steps {
            if step.swap {
                let before = Arc::clone(&current);
                let (scope, document) = documents.next().unwrap();
                let next = Snapshot::after(&before, scope, document, None);
                if step.is_prepared {
                    prepare(&next, &before, step.asking.context().now);
                }
                current = snapshots.swap(next);
                // A request under way uses the snapshot that it loaded to its end.
                check(&before, step)?;
            }
            check(&current, step)?;
            if step.is_timed {
                check_holds(&current, step)?;
            }
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

/// A snapshot in the place of another, which is prepared for what that was asked.
fn after(previous: &Snapshot, flags: &Value) -> Snapshot {
    let (scope, document) = parse(flags, &json!([]));
    let next = Snapshot::after(previous, scope, document, None);
    prepare(&next, previous, Timestamp::UNIX_EPOCH);
    next
}

#[test]
fn what_is_asked_again_is_answered_before_the_next_snapshot_is_served() {
    let flags = |others: usize| {
        let others = (0..others).map(|n| flag(&format!("other{n}"), &json!({ "name": "off" })));
        let flags = std::iter::once(flag("a", &rollout("userId"))).chain(others);
        Value::Array(flags.collect())
    };
    let ask = |snapshot: &Snapshot, id: &str, shown| {
        let view = snapshot.view(&Projects::All);
        let answer = Answer::of(snapshot, &view, &user(id), shown);
        (is_remembered(&answer), answer.body())
    };
    let first = build(&flags(1), &json!([]));
    ask(&first, "1", Shown::All);
    let [_, _, enabled] = [(); 3].map(|()| ask(&first, "2", Shown::Enabled).1);
    let [_, _, all] = [(); 3].map(|()| ask(&first, "2", Shown::All).1);

    let second = after(&first, &flags(2));
    let (remembered, body) = ask(&second, "2", Shown::Enabled);
    assert!(remembered && Arc::ptr_eq(&body, &enabled), "nothing that it shows has changed");
    let (remembered, body) = ask(&second, "2", Shown::All);
    assert!(remembered && !Arc::ptr_eq(&body, &all), "there is one flag more");
    assert!(!ask(&second, "1", Shown::All).0, "it was asked once");

    let third = after(&second, &flags(2));
    assert!(ask(&third, "1", Shown::All).0, "it was asked of one after the other");
    assert!(ask(&third, "2", Shown::All).0, "once is enough where it is known to be asked again");
    let fifth = after(&after(&third, &flags(2)), &flags(2));
    assert!(!ask(&fifth, "1", Shown::All).0, "nobody asked the fourth");
}

#[test]
fn only_some_of_what_strangers_ask_twice_is_answered_before() {
    let flags = json!([flag("a", &rollout("userId"))]);
    let ask = |snapshot: &Snapshot, n: u32| {
        let (view, id) = (snapshot.view(&Projects::All), n.to_string());
        is_remembered(&Answer::of(snapshot, &view, &user(&id), Shown::All))
    };
    let first = build(&flags, &json!([]));
    for n in 0..1000 {
        assert!(!ask(&first, n));
        assert!(ask(&first, n));
    }
    let second = after(&first, &flags);
    let known = (0..1000).filter(|&n| ask(&second, n)).count();
    assert!((32..=64).contains(&known), "{known}");
}
