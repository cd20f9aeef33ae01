//! Usage that SDKs report: merged, batched per environment, and sent upstream.
//!
//! The way of a report: [`Usage`] bounds its names and adds it to the *ledger*, which many threads
//! share; at an interval the *sender* moves a whole generation from there to the *outbox*, which
//! says what to send and when; what could not be sent at the end is *spooled*. Upstream stores
//! counts by flag, application, environment and hour of UTC, so these are what is merged. An hour
//! is the client's word only within a week: beyond, the count stays and the hour is the nearest.
//!
//! Whether a token may report is not judged here, and bytes are kept by whoever calls
//! [`Usage::save`].

mod applications;
mod backoff;
mod batch;
mod counter;
mod counters;
mod impact;
mod lane;
mod ledger;
mod meter;
mod outbox;
mod pipeline;
mod sender;
mod sink;
mod spool;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use self::{
    applications::InstanceKey,
    counter::{Counter, CounterKey, Hour, MAX_NAME, shortened, storable},
    meter::{Endpoint, Reason},
    pipeline::Pipeline,
};
pub use self::{
    outbox::{Revision, Totals},
    pipeline::Backlog,
    sender::Ending,
    sink::{Delivery, Sink, Taken},
    spool::Error,
};
pub use crate::wire::usage::SdkKind;
use crate::{
    token::{Environment, Scope},
    wire::usage::{
        Application, Bucket, Bulk, ClientMetrics, ConnectVia, EdgeInstance, Metadata, ToggleStats,
    },
};

/// How many edges behind this one are remembered.
const MAX_EDGES: usize = 1000;
/// How much an edge may tell of itself, in bytes of JSON.
const MAX_EDGE: usize = 64 * 1024;
/// After which time an edge that is silent is forgotten; they report every minute.
const FORGET_EDGE: Duration = Duration::from_mins(10);

/// How usage is kept and sent.
#[derive(Clone, Debug)]
pub struct Config {
    /// How often a generation is drained and sent.
    pub interval: Duration,
    /// How many distinct counters are held before they are merged harder; a flag's variants count
    /// as counters too.
    pub max_counters: usize,
}

/// The usage that was reported and has not been sent: a cheap handle to it.
#[derive(Clone, Debug)]
pub struct Usage {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pipeline: Pipeline,
    interval: Duration,
    /// How this instance names itself in `connectVia`.
    hop: ConnectVia,
    edges: Mutex<BTreeMap<Arc<str>, Edge>>,
}

#[derive(Debug)]
struct Edge {
    seen: Instant,
    told: Value,
}

impl Usage {
    /// Starts with nothing counted; `hop` is how this instance names itself to upstream.
    pub fn new(config: &Config, hop: ConnectVia) -> Self {
        meter::describe();
        let shared = Shared {
            pipeline: Pipeline::new(config.max_counters),
            interval: config.interval,
            hop,
            edges: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Counts what an SDK reports, and notes that its instance is alive.
    ///
    /// An instance that never registered is registered by this, as the Unleash server does it:
    /// frontend SDKs never register themselves, and backend SDKs only when they start. Its
    /// strategies are unknown then, which is no empty list. The counts belong to the hour in which
    /// their bucket ended.
    pub fn record_metrics(
        &self,
        scope: &Scope,
        kind: SdkKind,
        report: ClientMetrics,
        now: Timestamp,
    ) {
        meter::reported(Endpoint::Metrics);
        let ClientMetrics {
            app_name,
            instance_id,
            connection_id,
            bucket,
            impact_metrics,
            metadata,
        } = report;
        let app = shortened(&app_name);
        let started = bucket.as_ref().map_or(now, |bucket| bucket.start);
        let counted = bucket.as_ref().map_or(now, Bucket::counted_at);
        let instance = self.instance(&scope.environment, &app, kind, instance_id.as_ref());
        if !self.shared.pipeline.ledger.touch(&instance, clock()) {
            let application = Application {
                app_name: Arc::clone(&app),
                instance_id,
                connection_id,
                environment: None,
                projects: None,
                connect_via: Vec::new(),
                interval: self.shared.interval.as_secs(),
                started,
                strategies: None,
                sdk_kind: None,
                metadata: metadata.clone(),
                extra: serde_json::Map::new(),
            };
            self.register(scope, kind, application);
        }
        let environment = &scope.environment;
        let metadata = Arc::new(metadata);
        let hour = Hour::reported(counted, now);
        for (flag, stats) in bucket.into_iter().flat_map(|bucket| bucket.toggles) {
            self.count(environment, hour, &app, flag, stats, &metadata);
        }
        let lost = self.shared.pipeline.ledger.measure(environment, &app, impact_metrics, now);
        meter::items_dropped("impact_sample", lost);
    }

    /// Counts what another edge reports, as far as it is of the token's environment.
    pub fn record_bulk(&self, scope: &Scope, kind: SdkKind, bulk: Bulk, now: Timestamp) {
        meter::reported(Endpoint::Bulk);
        meter::items_dropped("unreadable", bulk.malformed);
        let environment = &scope.environment;
        let ours = |name: &str| name == environment.as_str();
        for application in bulk.applications {
            // Unleash Edge puts the applications of all environments into the batch of each.
            if application.environment.as_deref().is_none_or(ours) {
                self.register(scope, kind, application);
            }
        }
        for metric in bulk.metrics {
            let app = shortened(&metric.app_name);
            let (flag, stats) = (metric.feature_name, metric.stats);
            if ours(&metric.environment) {
                let metadata = Arc::new(metric.metadata);
                let hour = Hour::reported(metric.timestamp, now);
                self.count(environment, hour, &app, flag, stats, &metadata);
            } else {
                let count = stats.yes.saturating_add(stats.no);
                meter::received(count);
                meter::dropped(Reason::Environment, count);
            }
        }
        let nameless = "".into();
        let lost =
            self.shared.pipeline.ledger.measure(environment, &nameless, bulk.impact_metrics, now);
        meter::items_dropped("impact_sample", lost);
    }

    /// Notes a registration; its environment and projects are its token's.
    pub fn record_registration(&self, scope: &Scope, kind: SdkKind, application: Application) {
        meter::reported(Endpoint::Register);
        self.register(scope, kind, application);
    }

    /// Remembers what an edge behind this one tells of itself.
    pub fn record_edge_instance(&self, edge: &EdgeInstance) {
        meter::reported(Endpoint::Edge);
        let now = clock();
        let fits = edge.identifier().len() <= MAX_NAME
            && serde_json::to_vec(edge.value()).is_ok_and(|json| json.len() <= MAX_EDGE);
        let mut edges = self.edges();
        edges.retain(|_, edge| now.saturating_duration_since(edge.seen) < FORGET_EDGE);
        if fits && (edges.len() < MAX_EDGES || edges.contains_key(edge.identifier())) {
            let told = Edge { seen: now, told: edge.value().clone() };
            edges.insert(Arc::clone(edge.identifier()), told);
        } else {
            meter::items_dropped("edge_instance", 1);
        }
    }

    /// Sends a generation to `sink` at each interval until the ending begins, then what is left within
    /// its grace; only once at a time.
    ///
    /// What could not be sent stays here, to be [saved](Self::save). Dropping the future loses
    /// nothing, and neither does a panic: run again, it goes on, and sends the batches again that
    /// were under way.
    pub async fn run(&self, sink: Sink, ending: Ending) {
        let Shared { pipeline, interval, .. } = &*self.shared;
        match sink {
            Sink::Upstream { upstream, credentials } => {
                let refusals = sink::Refusals::default();
                let send = |batch| sink::deliver(&upstream, &credentials, &refusals, batch);
                sender::run(pipeline, *interval, &ending, send).await;
            }
            Sink::Registry(registry) => {
                let send = |batch| sink::hand_over(&registry, batch);
                sender::run(pipeline, *interval, &ending, send).await;
            }
            Sink::None => sender::discard(pipeline, *interval, &ending.begins).await,
        }
    }

    /// What has not been sent, as Unleash Edge shows it at `/internal-backstage/metricsbatch`:
    /// `{applications: […], metrics: [{key, bucket}]}`.
    pub fn pending(&self) -> Value {
        self.shared.pipeline.pending(clock())
    }

    /// Tells the metrics how much waits, and for how long; to be called when they are read.
    pub fn measure(&self) {
        self.shared.pipeline.measure(clock());
    }

    /// What the edges behind this one last told of themselves.
    pub fn instances(&self) -> Vec<Value> {
        self.edges().values().map(|edge| edge.told.clone()).collect()
    }

    /// How many evaluations have been sent, and let go by the outbox.
    pub fn totals(&self) -> Totals {
        self.shared.pipeline.totals()
    }

    /// What waits although its interval is over, because upstream does not take it; none if that is
    /// what a store holds already, the revision that is `stored`. It stays here too.
    ///
    /// Stored every few seconds, it bounds what a crash during an outage loses to the interval.
    pub fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        self.shared.pipeline.backlog(stored)
    }

    /// Completes when everything of an environment has been settled of which some was restored or
    /// given out as [backlog](Self::backlog): a restart before the next backlog is stored would send
    /// it again.
    ///
    /// For one waiter. What happened while nobody waited counts; dropping the future loses nothing.
    pub async fn settled(&self) {
        self.shared.pipeline.outdated().await;
    }

    /// Everything that was reported and not sent, as bytes for a store; nothing if there is
    /// nothing. It stays here too.
    pub fn save(&self) -> Option<Vec<u8>> {
        self.shared.pipeline.collect(clock());
        self.shared.pipeline.save()
    }

    /// Takes in what [`Usage::save`] gave to a store before a restart.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), Error> {
        self.shared.pipeline.restore(bytes, clock())
    }

    fn register(&self, scope: &Scope, kind: SdkKind, mut application: Application) {
        let kind = match (kind, application.sdk_kind) {
            (SdkKind::Frontend, _) => SdkKind::Frontend,
            (SdkKind::Backend, told) => told.unwrap_or(SdkKind::Backend),
        };
        let app = shortened(&application.app_name);
        let key = self.instance(&scope.environment, &app, kind, application.instance_id.as_ref());
        let projects = scope.projects.to_list().into_iter().map(Into::into).collect();
        application.app_name = app;
        application.instance_id = Some(Arc::clone(&key.instance));
        application.environment = Some(scope.environment.as_str().into());
        application.projects = Some(projects);
        application.sdk_kind = Some(kind);
        application.connect_via.push(self.shared.hop.clone());
        if kind == SdkKind::Frontend {
            // Upstream takes a frontend SDK without a version for a backend one.
            application.metadata.sdk_version.get_or_insert_with(|| "unknown".into());
        }
        if !self.shared.pipeline.ledger.register(key, application, clock()) {
            meter::items_dropped("application", 1);
        }
    }

    /// Which instance reports; one that does not name itself always gets the same name.
    ///
    /// The name differs by environment: upstream tells instances apart without regard to it.
    fn instance(
        &self,
        environment: &Environment,
        app: &Arc<str>,
        kind: SdkKind,
        instance: Option<&Arc<str>>,
    ) -> InstanceKey {
        let instance = instance.map_or_else(
            || {
                let (hop, kind) = (&self.shared.hop.app_name, kind.as_str());
                let text = format!("{environment}\0{app}\0{kind}");
                format!("{hop}-{:016x}", xxh3_64(text.as_bytes())).into()
            },
            Arc::clone,
        );
        InstanceKey { environment: environment.clone(), app: Arc::clone(app), instance }
    }

    fn count(
        &self,
        environment: &Environment,
        hour: Hour,
        app: &Arc<str>,
        flag: Arc<str>,
        stats: ToggleStats,
        metadata: &Arc<Metadata>,
    ) {
        let (counter, lost) = Counter::of(stats, metadata);
        let total = counter.total();
        meter::received(total.saturating_add(lost.0));
        meter::dropped(Reason::Overflow, lost.0);
        let Some(flag) = storable(flag) else { return meter::dropped(Reason::Name, total) };
        if counter.is_zero() {
            return;
        }
        let key = CounterKey { hour, app: Arc::clone(app), flag };
        let lost = self.shared.pipeline.ledger.count(environment, key, counter);
        meter::dropped(Reason::Full, lost.0);
    }

    fn edges(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Edge>> {
        self.shared.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The runtime's clock where there is one, so that waiting times agree with the sender's.
fn clock() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::FutureExt as _;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use proptest::prelude::*;
    use serde_json::json;

    use super::{outbox::Outcome, *};
    use crate::token::Projects;

    fn usage(max_counters: usize) -> Usage {
        let config = Config { interval: Duration::from_mins(1), max_counters };
        let hop = ConnectVia { app_name: "parapet".into(), instance_id: "p1".into() };
        Usage::new(&config, hop)
    }

    fn scope(environment: &str) -> Scope {
        let projects = Projects::from_list(["default"]);
        Scope { environment: Environment::new(environment), projects }
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

    /// Sends all that waits, each batch with the next outcome and at last `Sent`; returns the
    /// bodies that were sent.
    fn sent(usage: &Usage, outcomes: impl IntoIterator<Item = Outcome>) -> Vec<Value> {
        let pipeline = &usage.shared.pipeline;
        pipeline.collect(clock());
        let mut outcomes = outcomes.into_iter();
        let mut now = clock();
        let mut bodies = Vec::new();
        loop {
            while let Some(batch) = pipeline.next(now) {
                let outcome = outcomes.next().unwrap_or(Outcome::Sent);
                if outcome == Outcome::Sent {
                    bodies.push(serde_json::from_slice(&batch.body).unwrap());
                }
                pipeline.settle(batch.id, outcome, now, 0.5);
            }
            match pipeline.wake() {
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
    fn reports_of_an_hour_are_one_counter_and_the_application_is_told_beside_it() {
        let usage = usage(100);
        for _ in 0..3 {
            usage.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
        }
        insta::assert_snapshot!(json!(sent(&usage, [])).to_string(), @r#"[{"applications":[{"appName":"a","connectVia":[{"appName":"parapet","instanceId":"p1"}],"environment":"dev","instanceId":"i","interval":60,"projects":["default"],"sdkType":"backend","started":"2026-01-02T03:04:05Z"}],"metrics":[]},{"applications":[],"metrics":[{"appName":"a","environment":"dev","featureName":"f","no":3,"timestamp":"2026-01-02T03:00:00Z","variants":{"v":6},"yes":6}]}]"#);
        usage.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
        let again = sent(&usage, []);
        assert_eq!((&again[0]["applications"], sum(&again, "yes")), (&json!([]), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn instance_is_registered_again_after_an_hour_although_the_clock_is_set_back() {
        let usage = usage(100);
        let registered = |second| {
            let report = counts("a", "f", 2);
            usage.record_metrics(&scope("dev"), SdkKind::Backend, report, at(second));
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
    fn a_registration_gets_its_scope_from_its_token_and_our_hop() {
        let usage = usage(100);
        let body = json!({
            "appName": "a", "started": at(0).to_string(), "interval": 15, "strategies": ["default"],
            "environment": "prod", "projects": ["x"], "connectVia": [{ "appName": "edge", "instanceId": "e" }],
        });
        let application = Application::parse(body.to_string().as_bytes()).unwrap();
        let register = |kind| {
            usage.record_registration(&scope("dev"), kind, application.clone());
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
        assert_ne!(backend["instanceId"], frontend["instanceId"]);
        assert!(backend["instanceId"].as_str().unwrap().starts_with("parapet-"));
    }

    #[test]
    fn of_a_bulk_report_only_the_tokens_environment_is_kept() {
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
        let bulk = Bulk::parse(body.to_string().as_bytes()).unwrap();
        usage.record_bulk(&scope("dev"), SdkKind::Backend, bulk, at(0));
        let bodies = sent(&usage, []);
        assert_eq!((bodies.len(), sum(&bodies, "yes")), (3, 3));
        assert_eq!(bodies[0]["applications"].as_array().unwrap().len(), 1);
        assert_eq!(bodies[0]["applications"][0]["sdkType"], "frontend");
        assert_eq!(
            bodies[2]["impactMetrics"][0]["samples"][0]["labels"],
            json!({ "origin": "edge" })
        );
    }

    #[test]
    fn made_up_hours_make_few_counters_and_lose_no_count() {
        let usage = usage(100_000);
        let metric = |hour: i64| {
            json!({ "featureName": "f", "appName": "a", "environment": "dev",
                    "timestamp": at(3600 * hour).to_string(), "yes": 1 })
        };
        let metrics: Vec<_> = (-4000..4000).map(metric).collect();
        let body = json!({ "applications": [], "metrics": metrics });
        let bulk = Bulk::parse(body.to_string().as_bytes()).unwrap();
        usage.record_bulk(&scope("dev"), SdkKind::Frontend, bulk, at(0));
        assert_eq!(usage.shared.pipeline.ledger.len(), 170);
        assert_eq!(sum(&sent(&usage, []), "yes"), 8000);
    }

    #[test]
    fn what_waits_is_shown_with_its_key() {
        let usage = usage(100);
        usage.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
        let check = |applications: usize| {
            let pending = usage.pending();
            let key = json!({ "app_name": "a", "feature_name": "f", "environment": "dev",
                              "timestamp": "2026-01-02T03:00:00Z" });
            assert_eq!(pending["metrics"][0]["key"], key);
            assert_eq!(pending["metrics"][0]["bucket"]["yes"], 2);
            assert_eq!(pending["applications"].as_array().unwrap().len(), applications);
        };
        check(1);
        usage.shared.pipeline.collect(clock());
        check(1);
        usage.shared.pipeline.next(clock()).unwrap();
        check(1);
    }

    #[test]
    fn what_waits_is_measured_when_it_is_asked_for() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let registry = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let usage = usage(100);
            let check = |pending: u64| {
                usage.measure();
                let (text, line) =
                    (registry.render(), format!("parapet_usage_pending {pending}\n"));
                assert!(text.contains(&line), "{text}");
            };
            check(0);
            // A flag and its variant.
            usage.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
            check(2);
            usage.shared.pipeline.collect(clock());
            check(2);
            sent(&usage, []);
            check(0);
        });
    }

    #[test]
    fn what_is_stored_is_outdated_as_soon_as_it_is_sent_and_replaced_only_then() {
        let settled = |usage: &Usage| usage.settled().now_or_never().is_some();
        let before = usage(100);
        before.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
        let saved = before.save().unwrap();

        let restarted = usage(100);
        restarted.restore(&saved).unwrap();
        assert_eq!((sum(&sent(&restarted, []), "yes"), settled(&restarted)), (2, true));
        let empty = restarted.backlog(None).unwrap();
        assert!(empty.bytes.is_empty());

        let restarted = usage(100);
        restarted.restore(&saved).unwrap();
        let backlog = restarted.backlog(None).unwrap();
        assert_eq!(backlog.bytes, saved);
        assert_eq!(restarted.backlog(Some(backlog.revision)), None);
        assert!(!settled(&restarted));
        sent(&restarted, [Outcome::Later(None)]);
        assert!(settled(&restarted));
        assert_eq!(restarted.backlog(Some(backlog.revision)), Some(empty.clone()));
        assert!(!settled(&restarted));

        restarted.record_metrics(&scope("dev"), SdkKind::Backend, counts("a", "f", 2), at(0));
        sent(&restarted, []);
        assert!(!settled(&restarted));
        assert_eq!(restarted.backlog(Some(empty.revision)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn edges_behind_this_one_are_remembered_while_they_report() {
        let usage = usage(100);
        let tell = |identifier: &str| {
            let body = json!({ "identifier": identifier, "traffic": {} }).to_string();
            let edge = EdgeInstance::parse(body.as_bytes()).unwrap();
            usage.record_edge_instance(&edge);
        };
        tell("one");
        tokio::time::advance(FORGET_EDGE / 2).await;
        tell("two");
        assert_eq!(usage.instances().len(), 2);
        tokio::time::advance(FORGET_EDGE / 2).await;
        tell("two");
        assert_eq!(usage.instances(), [json!({ "identifier": "two", "traffic": {} })]);
        for edge in 0..MAX_EDGES + 10 {
            tell(&edge.to_string());
        }
        assert_eq!(usage.instances().len(), MAX_EDGES);
    }

    #[test]
    fn a_flood_of_names_is_bounded_and_real_flags_keep_counting() {
        let usage = usage(1000);
        usage.record_metrics(&scope("dev"), SdkKind::Frontend, counts("a", "real", 1), at(0));
        for flood in 0..5000 {
            let report = counts(&format!("app-{flood}"), &format!("flag-{flood}"), 1);
            usage.record_metrics(&scope("dev"), SdkKind::Frontend, report, at(0));
        }
        usage.record_metrics(&scope("dev"), SdkKind::Frontend, counts("a", "real", 1), at(0));
        let held = usage.shared.pipeline.ledger.len();
        assert!((1000..1002).contains(&held), "{held}");
        let bodies = sent(&usage, []);
        let metrics: Vec<_> =
            bodies.iter().flat_map(|body| body["metrics"].as_array().unwrap()).collect();
        let real = metrics.iter().find(|metric| metric["featureName"] == "real").unwrap();
        assert_eq!(real["yes"], 2);
        // Each counter has one variant, and the known flag was counted twice.
        assert_eq!((metrics.len(), sum(&bodies, "yes")), (held / 2, held as u64 / 2 + 1));
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            3 => Just(Outcome::Sent),
            1 => Just(Outcome::Unauthorized),
            2 => Just(Outcome::Later(None)),
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
                            let scope = scope(&environment.to_string());
                            before.record_metrics(&scope, SdkKind::Backend, counts(app, flag, *yes), at(0));
                            recorded.fetch_add(*yes, Ordering::Relaxed);
                        }
                    });
                }
                let pipeline = &before.shared.pipeline;
                for outcome in outcomes.by_ref().take(15) {
                    pipeline.collect(clock());
                    if let Some(batch) = pipeline.next(clock()) {
                        if outcome == Outcome::Sent {
                            bodies.push(serde_json::from_slice(&batch.body).unwrap());
                        }
                        pipeline.settle(batch.id, outcome, clock(), 0.5);
                    }
                }
            });
            let after = usage(1000);
            if let Some(saved) = before.save() {
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
}
