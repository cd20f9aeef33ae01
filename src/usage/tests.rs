//! Tests of usage reports from their arrival until they are sent upstream.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::FutureExt as _;
use metrics_exporter_prometheus::PrometheusBuilder;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{protocol::features::Document, token::Projects};

fn usage(max_counters: usize) -> Usage {
    let config = Config { interval: Duration::from_mins(1), max_counters };
    let hop = ConnectVia { app_name: "parapet".into(), instance_id: "p1".into() };
    Usage::new(&config, hop)
}

fn scope(environment: &str) -> Scope {
    let projects = Projects::from_list(["default"]);
    Scope { environment: Environment::new(environment), projects }
}

/// Reports to an instance with the token of an environment.
struct Client<'a> {
    usage: &'a Usage,
    token: TokenDigest,
    kind: SdkKind,
    scope: Scope,
    snapshot: Option<Snapshot>,
}

impl<'a> Client<'a> {
    fn new(usage: &'a Usage, kind: SdkKind, environment: &str) -> Self {
        let token = TokenDigest::of(&format!("{kind:?} of {environment}"));
        let scope = scope(environment);
        let flags = ["a", "b", "c", "d", "f", "real"].map(flag);
        let document = json!({ "features": flags }).to_string();
        let document = Document::parse(document.as_bytes()).unwrap();
        let snapshot = Some(Snapshot::build(scope.clone(), document));
        Self { usage, token, kind, scope, snapshot }
    }

    fn reporter(&self) -> ReportingClient<'_> {
        let Self { token, kind, scope, snapshot, .. } = self;
        ReportingClient { token, sdk_kind: *kind, scope, snapshot: snapshot.as_ref() }
    }

    fn report(&self, report: ClientMetrics) {
        self.report_at(report, at(0));
    }

    fn report_at(&self, report: ClientMetrics, now: Timestamp) {
        self.usage.record_metrics(&self.reporter(), report, now).unwrap();
    }

    fn send_bulk(&self, body: &Value) {
        let bulk = BulkReport::parse(body.to_string().as_bytes()).unwrap();
        self.usage.record_bulk(&self.reporter(), bulk, None, at(0)).unwrap();
    }

    fn register(&self, application: ClientApplication) -> Result<(), QuotaExceeded> {
        self.usage.record_registration(&self.reporter(), application)
    }
}

fn backend(usage: &Usage) -> Client<'_> {
    Client::new(usage, SdkKind::Backend, "dev")
}

fn frontend(usage: &Usage) -> Client<'_> {
    Client::new(usage, SdkKind::Frontend, "dev")
}

fn flag(name: &str) -> Value {
    json!({ "name": name, "enabled": true, "project": "default",
            "variants": [{ "name": "v", "weight": 1000 }] })
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_323_045 + second).unwrap()
}

fn report(json: &Value) -> ClientMetrics {
    ClientMetrics::parse(json.to_string().as_bytes()).unwrap()
}

fn counts(app: &str, flag: &str, yes: u64) -> ClientMetrics {
    let (start, stop) = (at(0).to_string(), at(60).to_string());
    let toggles = json!({ flag: { "yes": yes, "no": 1, "variants": { "v": yes } } });
    report(&json!({
        "appName": app, "instanceId": "i",
        "bucket": { "start": start, "stop": stop, "toggles": toggles },
    }))
}

/// Sends all pending usage. Each batch gets the next outcome, and `Sent` after the last. Returns the
/// bodies that were sent.
fn sent(usage: &Usage, outcomes: impl IntoIterator<Item = SendOutcome>) -> Vec<Value> {
    let pending = &usage.shared.pending;
    pending.drain(monotonic_now());
    let mut outcomes = outcomes.into_iter();
    let mut now = monotonic_now();
    let mut bodies = Vec::new();
    loop {
        while let Some(batch) = pending.next_batch(now) {
            let outcome = outcomes.next().unwrap_or(SendOutcome::Sent);
            if outcome == SendOutcome::Sent {
                bodies.push(serde_json::from_slice(&batch.body).unwrap());
            }
            pending.record_outcome(batch.id, outcome, now, 0.5);
        }
        match pending.next_retry_at() {
            Some(at) => now = at,
            None => return bodies,
        }
    }
}

/// The sum of a field over the metrics of all bodies.
fn sum(bodies: &[Value], field: &str) -> u64 {
    let metrics = bodies.iter().flat_map(|body| body["metrics"].as_array().unwrap());
    metrics.map(|metric| metric[field].as_u64().unwrap()).sum()
}

#[test]
fn reports_of_an_hour_are_merged_and_the_application_is_registered_once() {
    let usage = usage(100);
    for _ in 0..3 {
        backend(&usage).report(counts("a", "f", 2));
    }
    insta::assert_snapshot!(json!(sent(&usage, [])).to_string(), @r#"[{"applications":[{"appName":"a","connectVia":[{"appName":"parapet","instanceId":"p1"}],"environment":"dev","instanceId":"i","interval":60,"projects":["default"],"sdkType":"backend","started":"2026-01-02T03:04:05Z"}],"metrics":[]},{"applications":[],"metrics":[{"appName":"a","environment":"dev","featureName":"f","no":3,"timestamp":"2026-01-02T03:00:00Z","variants":{"v":6},"yes":6}]}]"#);
    backend(&usage).report(counts("a", "f", 2));
    let again = sent(&usage, []);
    assert_eq!((&again[0]["applications"], sum(&again, "yes")), (&json!([]), 2));
}

#[tokio::test(start_paused = true)]
async fn instance_is_registered_again_after_an_hour_even_if_the_clock_is_set_back() {
    let usage = usage(100);
    let registered = |second| {
        backend(&usage).report_at(counts("a", "f", 2), at(second));
        sent(&usage, [])[0]["applications"].as_array().unwrap().len()
    };
    assert_eq!(registered(0), 1);
    let two_days = 2 * 24 * 3600;
    tokio::time::advance(Duration::from_mins(30)).await;
    assert_eq!(registered(-two_days), 0);
    tokio::time::advance(Duration::from_mins(30)).await;
    assert_eq!(registered(-two_days), 1);
}

#[test]
fn registration_gets_scope_from_token_and_own_connect_via_entry() {
    let usage = usage(100);
    let body = json!({
        "appName": "a", "started": at(0).to_string(), "interval": 15, "strategies": ["default"],
        "environment": "prod", "projects": ["x"], "connectVia": [{ "appName": "edge", "instanceId": "e" }],
    });
    let application = ClientApplication::parse(body.to_string().as_bytes()).unwrap();
    let register = |kind| {
        Client::new(&usage, kind, "dev").register(application.clone()).unwrap();
        sent(&usage, []).remove(0)["applications"][0].take()
    };
    let (backend, frontend) = (register(SdkKind::Backend), register(SdkKind::Frontend));
    assert_eq!(backend["environment"], "dev");
    assert_eq!(backend["projects"], json!(["default"]));
    assert_eq!(backend["connectVia"][0]["appName"], "edge");
    assert_eq!(backend["connectVia"][1], json!({ "appName": "parapet", "instanceId": "p1" }));
    assert_eq!(
        (&backend["sdkType"], &frontend["sdkType"]),
        (&json!("backend"), &json!("frontend"))
    );
    assert_eq!(frontend["sdkVersion"], "unknown");
    let strategies = |of: &Value| of.get("strategies").cloned();
    assert_eq!((strategies(&backend), strategies(&frontend)), (Some(json!(["default"])), None));
    assert_ne!(backend["instanceId"], frontend["instanceId"]);
    assert!(backend["instanceId"].as_str().unwrap().starts_with("parapet-"));
}

#[test]
fn every_accepted_registration_is_sent() {
    let usage = usage(100);
    // Registers instances until one is rejected; returns how many were accepted.
    let register = |usage: &Usage, instances: std::ops::RangeFrom<u32>| {
        let client = backend(usage);
        let accepted = instances.take_while(|instance| {
            let body = json!({ "appName": "a", "instanceId": instance.to_string(),
                               "started": at(0).to_string(), "interval": 15 });
            let application = ClientApplication::parse(body.to_string().as_bytes()).unwrap();
            client.register(application).is_ok()
        });
        accepted.count()
    };
    let sent = |usage: &Usage| {
        let bodies = sent(usage, []);
        let lists = bodies.iter().map(|body| body["applications"].as_array().unwrap());
        lists.map(Vec::len).sum::<usize>()
    };
    let accepted = register(&usage, 0..);
    assert!(accepted > 17_000, "{accepted}");
    let saved = usage.serialize().unwrap();
    assert_eq!(sent(&usage), accepted);

    // Restored registrations use the quota until they are sent.
    let usage = self::usage(100);
    usage.restore(&saved).unwrap();
    let more = register(&usage, 1_000_000..);
    assert!(0 < more && more < accepted / 4, "{more} beside {accepted}");
    assert_eq!(sent(&usage), accepted + more);
}

#[test]
fn bulk_report_counts_only_the_environment_of_its_token() {
    let usage = usage(100);
    let metric = |environment: &str| {
        json!({ "featureName": "f", "appName": "a", "environment": environment,
                "timestamp": at(0).to_string(), "yes": 3 })
    };
    let app = |environment: &str| {
        json!({ "appName": "a", "instanceId": "i", "environment": environment,
                "started": at(0).to_string(), "interval": 1, "sdkType": "frontend" })
    };
    let body = json!({
        "applications": [app("dev"), app("prod")],
        "metrics": [metric("dev"), metric("prod")],
        "impactMetrics": [{ "name": "n", "help": "h", "type": "counter", "samples": [{ "value": 1 }] }],
    });
    backend(&usage).send_bulk(&body);
    let bodies = sent(&usage, []);
    assert_eq!((bodies.len(), sum(&bodies, "yes")), (3, 3));
    assert_eq!(bodies[0]["applications"].as_array().unwrap().len(), 1);
    assert_eq!(bodies[0]["applications"][0]["sdkType"], "frontend");
    assert_eq!(bodies[2]["impactMetrics"][0]["samples"][0]["labels"], json!({ "origin": "edge" }));
}

#[test]
fn invented_hours_create_few_counters_and_lose_no_count() {
    let usage = usage(100_000);
    let metric = |hour: i64| {
        json!({ "featureName": "f", "appName": "a", "environment": "dev",
                "timestamp": at(3600 * hour).to_string(), "yes": 1 })
    };
    let metrics: Vec<_> = (-4000..4000).map(metric).collect();
    let body = json!({ "applications": [], "metrics": metrics });
    frontend(&usage).send_bulk(&body);
    assert_eq!(usage.shared.pending.aggregator.counter_weight(), 170);
    assert_eq!(sum(&sent(&usage, []), "yes"), 8000);
}

#[test]
fn pending_usage_is_listed_with_its_key() {
    let usage = usage(100);
    backend(&usage).report(counts("a", "f", 2));
    let check = |applications: usize| {
        let pending = usage.pending();
        let key = json!({ "app_name": "a", "feature_name": "f", "environment": "dev",
                          "timestamp": "2026-01-02T03:00:00Z" });
        assert_eq!(pending["metrics"][0]["key"], key);
        assert_eq!(pending["metrics"][0]["bucket"]["yes"], 2);
        assert_eq!(pending["applications"].as_array().unwrap().len(), applications);
    };
    check(1);
    usage.shared.pending.drain(monotonic_now());
    check(1);
    usage.shared.pending.next_batch(monotonic_now()).unwrap();
    check(1);
}

#[test]
fn gauge_of_pending_counters_is_updated_on_request() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let registry = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        let usage = usage(100);
        let check = |pending: u64| {
            usage.update_gauges();
            let (text, line) = (registry.render(), format!("parapet_usage_pending {pending}\n"));
            assert!(text.contains(&line), "{text}");
        };
        check(0);
        // A flag and its variant.
        backend(&usage).report(counts("a", "f", 2));
        check(2);
        usage.shared.pending.drain(monotonic_now());
        check(2);
        sent(&usage, []);
        check(0);
    });
}

#[test]
fn stored_backlog_is_outdated_once_sent_and_replaced_only_then() {
    let is_outdated =
        |usage: &Usage| usage.wait_until_stored_usage_delivered().now_or_never().is_some();
    let before = usage(100);
    backend(&before).report(counts("a", "f", 2));
    let saved = before.serialize().unwrap();

    let restarted = usage(100);
    restarted.restore(&saved).unwrap();
    assert_eq!((sum(&sent(&restarted, []), "yes"), is_outdated(&restarted)), (2, true));
    let empty = restarted.backlog(None).unwrap();
    assert!(empty.bytes.is_empty());

    let restarted = usage(100);
    restarted.restore(&saved).unwrap();
    let backlog = restarted.backlog(None).unwrap();
    assert_eq!(backlog.bytes, saved);
    assert_eq!(restarted.backlog(Some(backlog.revision)), None);
    assert!(!is_outdated(&restarted));
    sent(&restarted, [SendOutcome::Retry(None)]);
    assert!(is_outdated(&restarted));
    assert_eq!(restarted.backlog(Some(backlog.revision)), Some(empty.clone()));
    assert!(!is_outdated(&restarted));

    backend(&restarted).report(counts("a", "f", 2));
    sent(&restarted, []);
    assert!(!is_outdated(&restarted));
    assert_eq!(restarted.backlog(Some(empty.revision)), None);
}

#[test]
fn flood_of_names_is_rejected_and_costs_no_real_flag_its_counts() {
    let usage = usage(1000);
    let (public, server) = (frontend(&usage), backend(&usage));
    public.report(counts("a", "real", 1));
    let mut accepted = 0;
    for flood in 0..5000 {
        let report = counts(&format!("app-{flood}"), &format!("flag-{flood}"), 1);
        match usage.record_metrics(&public.reporter(), report, at(0)) {
            Ok(()) => accepted += 1,
            Err(full) => assert_eq!(full.retry_after, Duration::from_mins(1)),
        }
    }
    public.report(counts("a", "real", 1));
    server.report(counts("b", "real", 1));
    server.report(counts("b", "newer", 1));
    let bodies = sent(&usage, []);
    // Each invented flag has a variant, and one token gets four fifths of the pool for both.
    assert_eq!(accepted, 1000 / 32 * 4 / 5 / 2);
    assert_eq!(sum(&bodies, "yes"), accepted + 4);
    public.report(counts("a", "flag-after", 1));
}

#[test]
fn flags_outside_the_token_scope_count_as_unknown() {
    let usage = usage(1000);
    let mut client = backend(&usage);
    assert!(client.reporter().flag("f").is_some());
    assert!(client.reporter().flag("g").is_none());
    client.scope.projects = Projects::from_list(["other"]);
    assert!(client.reporter().flag("f").is_none());
    client.snapshot = None;
    assert!(client.reporter().flag("f").is_none());
    // Unknown flags are counted too.
    client.report(counts("a", "f", 2));
    assert_eq!(sum(&sent(&usage, []), "yes"), 2);
}

fn outcome() -> impl Strategy<Value = SendOutcome> {
    prop_oneof![
        3 => Just(SendOutcome::Sent),
        1 => Just(SendOutcome::Unauthorized),
        2 => Just(SendOutcome::Retry(None)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn threads_drains_failures_and_restarts_leave_every_count_exact(
        reports in prop::collection::vec(
            prop::collection::vec((0..3_u8, "[ab]", "[a-d]", 1..100_u64), 0..60), 1..4),
        outcomes in prop::collection::vec(outcome(), 0..30),
    ) {
        let recorded = &AtomicU64::new(0);
        let before = &usage(1000);
        let mut outcomes = outcomes.into_iter();
        let mut bodies = Vec::new();
        std::thread::scope(|threads| {
            for reports in &reports {
                threads.spawn(move || {
                    for (environment, app, flag, yes) in reports {
                        let environment = environment.to_string();
                        let client = Client::new(before, SdkKind::Backend, &environment);
                        client.report(counts(app, flag, *yes));
                        recorded.fetch_add(*yes, Ordering::Relaxed);
                    }
                });
            }
            let pending = &before.shared.pending;
            for outcome in outcomes.by_ref().take(15) {
                pending.drain(monotonic_now());
                if let Some(batch) = pending.next_batch(monotonic_now()) {
                    if outcome == SendOutcome::Sent {
                        bodies.push(serde_json::from_slice(&batch.body).unwrap());
                    }
                    pending.record_outcome(batch.id, outcome, monotonic_now(), 0.5);
                }
            }
        });
        let after = usage(1000);
        if let Some(saved) = before.serialize() {
            after.restore(&saved).unwrap();
        }
        bodies.extend(sent(&after, outcomes));
        let expected = recorded.load(Ordering::Relaxed);
        prop_assert_eq!(sum(&bodies, "yes"), expected);
        let variants = bodies.iter().flat_map(|body| body["metrics"].as_array().unwrap());
        let variants: u64 = variants.map(|metric| metric["variants"]["v"].as_u64().unwrap()).sum();
        prop_assert_eq!(variants, expected);
        prop_assert_eq!(before.totals().dropped + after.totals().dropped, 0);
    }
}
