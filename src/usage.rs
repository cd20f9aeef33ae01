//! Usage that SDKs report: merged, batched per environment, and sent upstream.
//!
//! The way of a report: [`Usage`] bounds its names and adds it to the *ledger*, which many threads
//! share; at an interval the *sender* moves a whole generation from there to the *outbox*, which
//! says what to send and when; what could not be sent at the end is *spooled*. Upstream stores
//! counts by flag, application, environment and hour of UTC, so these are what is merged. An hour
//! is the client's word only within a week: beyond, the count stays and the hour is the nearest.
//!
//! What reports and registrations keep is bounded, in bytes too, and each token has a share of it
//! (`pool`). Flags and variants that the token's snapshot has always count. Other names may be made
//! up, but also newer than the snapshot, or deleted a while ago: they count as any other within a
//! small pool of their own, and go upstream, which judges them. Where that pool is full, those that
//! come with a known flag are counted together under one name: nobody's made-up names cost a known
//! flag its counts. A report of nothing else is refused whole, as [`Full`], and the SDK can report it
//! again. Nothing that is acknowledged is dropped. Impact metrics and the registrations that come with
//! counts do not refuse a report: those without room are left out and counted in the metrics.
//!
//! Whether a token may report is not judged here, and bytes are kept by whoever calls
//! [`Usage::save`].

mod applications;
mod backoff;
mod batch;
mod counter;
mod counters;
mod edges;
mod impact;
mod lane;
mod ledger;
mod meter;
mod outbox;
mod pipeline;
mod pool;
mod sender;
mod sink;
mod spool;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use self::{
    applications::InstanceKey,
    counter::{Counter, CounterKey, Hour, Lost, Name, shortened, storable},
    edges::Edges,
    ledger::{Counted, NoRoom},
    meter::{Endpoint, Reason},
    pipeline::Pipeline,
};
pub use self::{
    lane::BatchId,
    outbox::{Revision, Totals},
    pipeline::Backlog,
    sender::Ending,
    sink::{Delivery, Sink, Taken},
    spool::Error,
};
pub use crate::wire::usage::SdkKind;
use crate::{
    engine::Flag,
    snapshot::Snapshot,
    token::{Environment, Scope, TokenDigest},
    wire::usage::{
        Application, Bucket, Bulk, ClientMetrics, ConnectVia, EdgeInstance, Metadata, ToggleStats,
    },
};

/// A report that is not taken because there is no room for it in its token's share.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("there is no room for more usage of this token")]
pub struct Full {
    /// After which time there may be room: what was reported has been sent then.
    pub retry_after: Duration,
}

/// Whoever reports, by a token that is valid.
#[derive(Clone, Copy, Debug)]
pub struct Reporter<'a> {
    /// The token, whose share of memory it uses.
    pub token: &'a TokenDigest,
    /// The family of SDKs that the token is for.
    pub kind: SdkKind,
    /// What the token sees.
    pub scope: &'a Scope,
    /// The flags of its environment; `None` where they were never fetched.
    pub snapshot: Option<&'a Snapshot>,
}

impl Reporter<'_> {
    /// The flag of a name, if the token sees it.
    fn flag(&self, name: &str) -> Option<&Flag> {
        let flag = self.snapshot?.flag(name)?;
        self.scope.projects.contains(flag.project()).then_some(flag)
    }
}

/// How usage is kept and sent.
#[derive(Clone, Debug)]
pub struct Config {
    /// How often a generation is drained and sent.
    pub interval: Duration,
    /// How many distinct counters are held before they are merged harder; a flag's variants count
    /// as counters too, and long texts several times. A part of as many besides is for unknown names.
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
    edges: Edges,
}

impl Usage {
    /// Starts with nothing counted; `hop` is how this instance names itself to upstream.
    pub fn new(config: &Config, hop: ConnectVia) -> Self {
        meter::describe();
        let shared = Shared {
            pipeline: Pipeline::new(config.max_counters),
            interval: config.interval,
            hop,
            edges: Edges::new(),
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
        reporter: &Reporter<'_>,
        report: ClientMetrics,
        now: Timestamp,
    ) -> Result<(), Full> {
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
        let ended = bucket.as_ref().map_or(now, Bucket::counted_at);
        let hour = Hour::reported(ended, now);
        let metadata = Arc::new(metadata);
        let mut counts = Counts::default();
        for (flag, stats) in bucket.into_iter().flat_map(|bucket| bucket.toggles) {
            counts.add(reporter, (hour, &app, flag), stats, &metadata);
        }
        self.count(reporter, counts, now, Endpoint::Metrics)?;
        let environment = &reporter.scope.environment;
        let instance = self.instance(environment, &app, reporter.kind, instance_id.as_ref());
        let ledger = &self.shared.pipeline.ledger;
        if !ledger.touch(&instance, clock()) {
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
                metadata: Metadata::clone(&metadata),
                extra: serde_json::Map::new(),
            };
            self.register_or_drop(reporter, application);
        }
        let lost = ledger.measure(environment, &app, impact_metrics, reporter.token, now);
        meter::items_dropped("impact_sample", lost);
        Ok(())
    }

    /// Counts what another edge reports, as far as it is of the token's environment.
    pub fn record_bulk(
        &self,
        reporter: &Reporter<'_>,
        bulk: Bulk,
        now: Timestamp,
    ) -> Result<(), Full> {
        meter::reported(Endpoint::Bulk);
        let environment = &reporter.scope.environment;
        let ours = |name: &str| name == environment.as_str();
        let mut counts = Counts::default();
        for metric in bulk.metrics {
            let app = shortened(&metric.app_name);
            if ours(&metric.environment) {
                let hour = Hour::reported(metric.timestamp, now);
                let metadata = Arc::new(metric.metadata);
                counts.add(reporter, (hour, &app, metric.feature_name), metric.stats, &metadata);
            } else {
                counts.add_foreign(&metric.stats);
            }
        }
        self.count(reporter, counts, now, Endpoint::Bulk)?;
        meter::items_dropped("unreadable", bulk.malformed);
        for application in bulk.applications {
            // Unleash Edge puts the applications of all environments into the batch of each.
            if application.environment.as_deref().is_none_or(ours) {
                self.register_or_drop(reporter, application);
            }
        }
        let (ledger, nameless) = (&self.shared.pipeline.ledger, "".into());
        let lost = ledger.measure(environment, &nameless, bulk.impact_metrics, reporter.token, now);
        meter::items_dropped("impact_sample", lost);
        Ok(())
    }

    /// Notes a registration; its environment and projects are its token's.
    pub fn record_registration(
        &self,
        reporter: &Reporter<'_>,
        application: Application,
    ) -> Result<(), Full> {
        meter::reported(Endpoint::Register);
        let is_noted = self.register(reporter, application);
        is_noted.then_some(()).ok_or_else(|| self.full(Endpoint::Register))
    }

    /// Remembers what an edge behind this one tells of itself. A report that is too large by itself
    /// is dropped and counted.
    pub fn record_edge_instance(
        &self,
        reporter: &Reporter<'_>,
        edge: &EdgeInstance,
    ) -> Result<(), Full> {
        meter::reported(Endpoint::Edge);
        let is_noted = self.shared.edges.record(edge, reporter.token, clock());
        is_noted.then_some(()).ok_or_else(|| self.full(Endpoint::Edge))
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
        self.shared.edges.told()
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

    /// Notes a registration; false where its token has no room for it.
    fn register(&self, reporter: &Reporter<'_>, mut application: Application) -> bool {
        let Reporter { token, kind, scope, .. } = *reporter;
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
            // Frontend SDKs implement no strategies.
            application.strategies = None;
            // Upstream takes a frontend SDK without a version for a backend one.
            application.metadata.sdk_version.get_or_insert_with(|| "unknown".into());
        }
        self.shared.pipeline.ledger.register(key, application, token, clock())
    }

    /// Notes a registration that comes with counts, which shall not be refused for it.
    fn register_or_drop(&self, reporter: &Reporter<'_>, application: Application) {
        if !self.register(reporter, application) {
            meter::items_dropped("application", 1);
        }
    }

    /// Adds what a report counts: all of it, or nothing.
    fn count(
        &self,
        reporter: &Reporter<'_>,
        counts: Counts,
        now: Timestamp,
        endpoint: Endpoint,
    ) -> Result<(), Full> {
        let Counts { counters, received, overflow, unnamed, foreign } = counts;
        let (environment, token) = (&reporter.scope.environment, reporter.token);
        let counted =
            self.shared.pipeline.ledger.count(environment, counters, token, Hour::of(now));
        let Lost(lost) = counted.map_err(|NoRoom| self.full(endpoint))?;
        meter::received(received);
        meter::dropped(Reason::Overflow, overflow.saturating_add(lost));
        meter::dropped(Reason::Name, unnamed);
        meter::dropped(Reason::Environment, foreign);
        Ok(())
    }

    fn full(&self, endpoint: Endpoint) -> Full {
        meter::refused(endpoint);
        Full { retry_after: self.shared.interval }
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
}

/// What a report counts, and what of it cannot be counted whatever room there is.
#[derive(Debug, Default)]
struct Counts {
    counters: Vec<Counted>,
    /// How many evaluations the report has, those below included.
    received: u64,
    overflow: u64,
    /// Of flags whose names upstream cannot store.
    unnamed: u64,
    /// Of another environment than the token's.
    foreign: u64,
}

impl Counts {
    fn add(
        &mut self,
        reporter: &Reporter<'_>,
        (hour, app, flag): (Hour, &Arc<str>, Arc<str>),
        stats: ToggleStats,
        metadata: &Arc<Metadata>,
    ) {
        let known = reporter.flag(&flag);
        let name = Name::of(known.is_some());
        let variant = |variant: &str| Name::of(known.is_some_and(|flag| flag.has_variant(variant)));
        let (counter, Lost(lost)) = Counter::of(stats, metadata, variant);
        let total = counter.total();
        self.received = self.received.saturating_add(total).saturating_add(lost);
        self.overflow = self.overflow.saturating_add(lost);
        let Some(flag) = storable(flag) else {
            self.unnamed = self.unnamed.saturating_add(total);
            return;
        };
        if !counter.is_zero() {
            let key = CounterKey { hour, app: Arc::clone(app), flag };
            self.counters.push(Counted { key, name, counter });
        }
    }

    fn add_foreign(&mut self, stats: &ToggleStats) {
        let count = stats.yes.saturating_add(stats.no);
        self.received = self.received.saturating_add(count);
        self.foreign = self.foreign.saturating_add(count);
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
    use crate::{token::Projects, wire::features::Document};

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
            let snapshot = Some(Snapshot::build(scope.clone(), document, None));
            Self { usage, token, kind, scope, snapshot }
        }

        fn reporter(&self) -> Reporter<'_> {
            let Self { token, kind, scope, snapshot, .. } = self;
            Reporter { token, kind: *kind, scope, snapshot: snapshot.as_ref() }
        }

        fn report(&self, report: ClientMetrics) {
            self.report_at(report, at(0));
        }

        fn report_at(&self, report: ClientMetrics, now: Timestamp) {
            self.usage.record_metrics(&self.reporter(), report, now).unwrap();
        }

        fn send_bulk(&self, body: &Value) {
            let bulk = Bulk::parse(body.to_string().as_bytes()).unwrap();
            self.usage.record_bulk(&self.reporter(), bulk, at(0)).unwrap();
        }

        fn register(&self, application: Application) -> Result<(), Full> {
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
            backend(&usage).report(counts("a", "f", 2));
        }
        insta::assert_snapshot!(json!(sent(&usage, [])).to_string(), @r#"[{"applications":[{"appName":"a","connectVia":[{"appName":"parapet","instanceId":"p1"}],"environment":"dev","instanceId":"i","interval":60,"projects":["default"],"sdkType":"backend","started":"2026-01-02T03:04:05Z"}],"metrics":[]},{"applications":[],"metrics":[{"appName":"a","environment":"dev","featureName":"f","no":3,"timestamp":"2026-01-02T03:00:00Z","variants":{"v":6},"yes":6}]}]"#);
        backend(&usage).report(counts("a", "f", 2));
        let again = sent(&usage, []);
        assert_eq!((&again[0]["applications"], sum(&again, "yes")), (&json!([]), 2));
    }

    #[tokio::test(start_paused = true)]
    async fn instance_is_registered_again_after_an_hour_although_the_clock_is_set_back() {
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
    fn a_registration_gets_its_scope_from_its_token_and_our_hop() {
        let usage = usage(100);
        let body = json!({
            "appName": "a", "started": at(0).to_string(), "interval": 15, "strategies": ["default"],
            "environment": "prod", "projects": ["x"], "connectVia": [{ "appName": "edge", "instanceId": "e" }],
        });
        let application = Application::parse(body.to_string().as_bytes()).unwrap();
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
    fn every_registration_that_is_accepted_is_sent() {
        let usage = usage(100);
        // As many of these instances as are accepted.
        let register = |usage: &Usage, instances: std::ops::RangeFrom<u32>| {
            let client = backend(usage);
            let accepted = instances.take_while(|instance| {
                let body = json!({ "appName": "a", "instanceId": instance.to_string(),
                                   "started": at(0).to_string(), "interval": 15 });
                let application = Application::parse(body.to_string().as_bytes()).unwrap();
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
        let saved = usage.save().unwrap();
        assert_eq!(sent(&usage), accepted);

        // What was stored takes room after a restart too, until it is sent.
        let usage = self::usage(100);
        usage.restore(&saved).unwrap();
        let more = register(&usage, 1_000_000..);
        assert!(0 < more && more < accepted / 4, "{more} beside {accepted}");
        assert_eq!(sent(&usage), accepted + more);
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
        backend(&usage).send_bulk(&body);
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
        frontend(&usage).send_bulk(&body);
        assert_eq!(usage.shared.pipeline.ledger.len(), 170);
        assert_eq!(sum(&sent(&usage, []), "yes"), 8000);
    }

    #[test]
    fn what_waits_is_shown_with_its_key() {
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
            backend(&usage).report(counts("a", "f", 2));
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
        backend(&before).report(counts("a", "f", 2));
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

        backend(&restarted).report(counts("a", "f", 2));
        sent(&restarted, []);
        assert!(!settled(&restarted));
        assert_eq!(restarted.backlog(Some(empty.revision)), None);
    }

    #[test]
    fn flood_of_names_is_refused_and_takes_no_room_from_real_flags() {
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
        // Each made-up flag has a variant, and one token has four fifths of what there is for both.
        assert_eq!(accepted, 1000 / 32 * 4 / 5 / 2);
        assert_eq!(sum(&bodies, "yes"), accepted + 4);
        public.report(counts("a", "flag-after", 1));
    }

    #[test]
    fn flags_are_known_as_far_as_the_token_sees_them() {
        let usage = usage(1000);
        let mut client = backend(&usage);
        assert!(client.reporter().flag("f").is_some());
        assert!(client.reporter().flag("g").is_none());
        client.scope.projects = Projects::from_list(["other"]);
        assert!(client.reporter().flag("f").is_none());
        client.snapshot = None;
        assert!(client.reporter().flag("f").is_none());
        // What is not known counts as well.
        client.report(counts("a", "f", 2));
        assert_eq!(sum(&sent(&usage, []), "yes"), 2);
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
                            let environment = environment.to_string();
                            let client = Client::new(before, SdkKind::Backend, &environment);
                            client.report(counts(app, flag, *yes));
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
