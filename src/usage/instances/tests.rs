//! Tests of which registrations are due, of the limits by size, and of downstream edges.

use super::*;

fn quota(capacity: usize) -> Quota {
    QuotaPool::new(capacity).quota_of(&TokenDigest::of("token"))
}

fn take_due_applications(applications: &Applications, now: Instant) -> Vec<ClientApplication> {
    let due = applications.take_due(now).into_iter();
    due.map(|(_, registration)| registration.application().clone()).collect()
}

fn application(interval: u64) -> ClientApplication {
    let body = format!(
        r#"{{"appName":"a","instanceId":"i","started":"2026-01-02T03:04:05Z","interval":{interval}}}"#
    );
    ClientApplication::parse(body.as_bytes()).unwrap()
}

fn key(instance: &str) -> InstanceKey {
    InstanceKey { environment: Environment::new("dev"), app: "a".into(), instance: instance.into() }
}

fn minute(start: Instant) -> impl Fn(u64) -> Instant {
    move |minute| start + Duration::from_mins(minute)
}

#[test]
fn instance_is_registered_when_new_when_changed_and_hourly_while_active() {
    let at = minute(Instant::now());
    let applications = Applications::new(4);
    let quota = quota(10_000);
    assert!(!applications.touch(&key("i"), at(0)));
    assert!(applications.register(key("i"), application(1), &quota, at(0)));
    assert_eq!(applications.take_due(at(1)).len(), 1);
    assert!(applications.register(key("i"), application(1), &quota, at(2)));
    assert_eq!(take_due_applications(&applications, at(2)), []);
    assert!(applications.register(key("i"), application(2), &quota, at(3)));
    assert_eq!(applications.take_due(at(3)).len(), 1);
    assert!(applications.touch(&key("i"), at(50)));
    assert_eq!(take_due_applications(&applications, at(62)), []);
    assert_eq!(applications.take_due(at(63)).len(), 1);
    assert_eq!(take_due_applications(&applications, at(64)), []);
    assert_eq!(take_due_applications(&applications, at(50 + 120)), []);
    assert!(applications.instances.is_empty());
}

#[test]
fn registration_without_strategies_inherits_earlier_ones() {
    let at = minute(Instant::now());
    let applications = Applications::new(4);
    let quota = quota(10_000);
    let listed = ClientApplication { strategies: Some(vec!["x".into()]), ..application(1) };
    assert!(applications.register(key("i"), listed.clone(), &quota, at(0)));
    assert_eq!(applications.take_due(at(0)).len(), 1);
    assert!(applications.register(key("i"), application(1), &quota, at(1)));
    assert_eq!(take_due_applications(&applications, at(1)), []);
    assert!(applications.register(key("i"), application(2), &quota, at(2)));
    let updated = ClientApplication { interval: 2, ..listed };
    assert_eq!(take_due_applications(&applications, at(2)), [updated]);
}

#[test]
fn instances_are_bounded_by_their_size_in_bytes() {
    let at = minute(Instant::now());
    let applications = Applications::new(4);
    let strategies = |count: usize| Some(vec!["x".repeat(255).into(); count]);
    let large = ClientApplication { strategies: strategies(200), ..application(1) };
    assert!((50_000..80_000).contains(&memory_size(&large)));
    let quota = quota(4 * memory_size(&large));
    let register = |instance: usize, application: &ClientApplication| {
        let key = key(&instance.to_string());
        applications.register(key, application.clone(), &quota, at(0))
    };
    let accepted: Vec<_> = (0..5).map(|instance| register(instance, &large)).collect();
    assert_eq!(accepted, [true, true, true, false, false]);
    // An unchanged registration needs no additional memory; a larger one does.
    assert!(register(0, &large));
    let larger = ClientApplication { strategies: strategies(400), ..application(1) };
    assert!(!register(0, &larger));
    // A queued registration uses the quota until it is sent.
    let queued = applications.take_due(at(0));
    assert_eq!(queued.len(), 3);
    assert!(applications.take_due(at(121)).is_empty() && applications.instances.is_empty());
    assert!(!applications.register(key("late"), larger.clone(), &quota, at(121)));
    drop(queued);
    assert!(applications.register(key("late"), larger, &quota, at(121)));
}

#[test]
fn size_of_unknown_fields_includes_json_tree_overhead() {
    let objects = vec![serde_json::json!({ "a": 0 }); 500];
    let mut application = application(1);
    let before = memory_size(&application);
    application.extra.insert("objects".to_owned(), Value::from(objects));
    assert!(memory_size(&application) - before > 500 * OBJECT_OVERHEAD_BYTES);
}

/// Reports as an edge of this token, with `bytes` of content; whether it was accepted.
fn record_edge(
    edges: &DownstreamEdges,
    token: &str,
    identifier: &str,
    bytes: usize,
    now: Instant,
) -> bool {
    let body = serde_json::json!({ "identifier": identifier, "told": "x".repeat(bytes) });
    let edge = EdgeInstance::parse(body.to_string().as_bytes()).unwrap();
    edges.record(&edge, &TokenDigest::of(token), now)
}

#[test]
fn edge_is_removed_when_it_stops_reporting() {
    let (edges, now) = (DownstreamEdges::new(), Instant::now());
    assert!(record_edge(&edges, "token", "one", 1, now));
    assert!(record_edge(&edges, "token", "two", 1, now + EDGE_TTL / 2));
    assert_eq!(edges.reports().len(), 2);
    assert!(record_edge(&edges, "token", "two", 2, now + EDGE_TTL));
    assert_eq!(edges.reports(), [serde_json::json!({ "identifier": "two", "told": "xx" })]);
}

#[test]
fn edges_of_one_token_leave_room_for_other_tokens() {
    let (edges, now) = (DownstreamEdges::new(), Instant::now());
    let flood = |token: &str| {
        let names = (0..2 * MAX_EDGES).map(|name| name.to_string());
        names.take_while(|name| record_edge(&edges, token, name, 1, now)).count()
    };
    assert_eq!([flood("flood"), flood("second"), flood("third")], [800, 160, 32]);
    assert_eq!(edges.reports().len(), 800 + 160 + 32);
    let later = now + EDGE_TTL;
    assert!(record_edge(&edges, "flood", "later", 1, later));
    assert_eq!(edges.reports().len(), 1);
}

#[test]
fn tracked_edge_reserves_only_the_growth_of_its_report() {
    let (edges, now) = (DownstreamEdges::new(), Instant::now());
    let large = MAX_REPORT_BYTES - 100;
    let names = (0..MAX_EDGES).map(|name| name.to_string());
    let accepted = names.take_while(|name| record_edge(&edges, "token", name, large, now)).count();
    assert!((100..110).contains(&accepted), "{accepted}");
    assert!(record_edge(&edges, "token", "0", large, now));
    assert!(record_edge(&edges, "token", "0", 1, now));
    assert!(record_edge(&edges, "token", "0", large, now));
    assert_eq!(edges.reports().len(), accepted);
}

#[test]
fn edge_does_not_replace_same_named_edge_of_another_token() {
    let (edges, now) = (DownstreamEdges::new(), Instant::now());
    assert!(
        record_edge(&edges, "token", "one", 1, now) && record_edge(&edges, "other", "one", 2, now)
    );
    assert_eq!(edges.reports().len(), 2);
}
