//! Usage that SDKs report: merged, batched per environment, and sent upstream.
//!
//! The way of a report: [`Usage`] bounds its names and adds it to the *ledger*, which many threads
//! share; at an interval the *sender* moves a whole generation from there to the *outbox*, which
//! says what to send and when; what could not be sent at the end is *spooled*. Upstream stores
//! counts by flag, application, environment and hour of UTC, so these are what is merged.
//!
//! Whether a token may report is not judged here, and bytes are kept by whoever calls
//! [`Usage::save`].

mod applications;
mod backoff;
mod batch;
mod counter;
mod impact;
mod ledger;
mod meter;
mod outbox;
mod pipeline;
mod sender;
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
pub use self::{outbox::Totals, spool::Error};
pub use crate::wire::usage::SdkKind;
use crate::{
    token::{Environment, Scope},
    wire::usage::{
        Application, Bulk, ClientMetrics, ConnectVia, EdgeInstance, Metadata, ToggleStats,
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
    /// How many distinct counters are held before they are merged harder.
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
    seen: Timestamp,
    told: Value,
}

impl Usage {
    /// Starts with nothing counted; `hop` is how this instance names itself to upstream.
    pub fn new(config: &Config, hop: ConnectVia) -> Self {
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
    /// frontend SDKs never register themselves.
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
        let instance = self.instance(&scope.environment, &app, kind, instance_id.as_ref());
        if !self.shared.pipeline.ledger.touch(&instance, now) {
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
            self.register(scope, kind, application, now);
        }
        let environment = &scope.environment;
        let metadata = Arc::new(metadata);
        for (flag, stats) in bucket.into_iter().flat_map(|bucket| bucket.toggles) {
            self.count(environment, started, &app, flag, stats, &metadata);
        }
        let lost = self.shared.pipeline.ledger.measure(environment, &app, impact_metrics);
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
                self.register(scope, kind, application, now);
            }
        }
        for metric in bulk.metrics {
            let app = shortened(&metric.app_name);
            let (flag, stats) = (metric.feature_name, metric.stats);
            if ours(&metric.environment) {
                let metadata = Arc::new(metric.metadata);
                self.count(environment, metric.timestamp, &app, flag, stats, &metadata);
            } else {
                let count = stats.yes.saturating_add(stats.no);
                meter::received(count);
                meter::dropped(Reason::Environment, count);
            }
        }
        let nameless = "".into();
        let lost = self.shared.pipeline.ledger.measure(environment, &nameless, bulk.impact_metrics);
        meter::items_dropped("impact_sample", lost);
    }

    /// Notes a registration; its environment and projects are its token's.
    pub fn record_registration(
        &self,
        scope: &Scope,
        kind: SdkKind,
        application: Application,
        now: Timestamp,
    ) {
        meter::reported(Endpoint::Register);
        self.register(scope, kind, application, now);
    }

    /// Remembers what an edge behind this one tells of itself.
    pub fn record_edge_instance(&self, edge: &EdgeInstance, now: Timestamp) {
        meter::reported(Endpoint::Edge);
        let fits = edge.identifier().len() <= MAX_NAME
            && serde_json::to_vec(edge.value()).is_ok_and(|json| json.len() <= MAX_EDGE);
        let mut edges = self.edges();
        edges.retain(|_, edge| {
            Duration::try_from(now.duration_since(edge.seen)).is_ok_and(|age| age < FORGET_EDGE)
                || now < edge.seen
        });
        if fits && (edges.len() < MAX_EDGES || edges.contains_key(edge.identifier())) {
            let told = Edge { seen: now, told: edge.value().clone() };
            edges.insert(Arc::clone(edge.identifier()), told);
        } else {
            meter::items_dropped("edge_instance", 1);
        }
    }

    /// What has not been sent, as Unleash Edge shows it at `/internal-backstage/metricsbatch`:
    /// `{applications: […], metrics: [{key, bucket}]}`.
    pub fn pending(&self) -> Value {
        self.shared.pipeline.pending()
    }

    /// What the edges behind this one last told of themselves.
    pub fn instances(&self) -> Vec<Value> {
        self.edges().values().map(|edge| edge.told.clone()).collect()
    }

    /// How many evaluations have been sent, and let go by the outbox.
    pub fn totals(&self) -> Totals {
        self.shared.pipeline.totals()
    }

    /// Everything that was reported and not sent, as bytes for a store; nothing if there is
    /// nothing. It stays here too.
    pub fn save(&self) -> Option<Vec<u8>> {
        self.shared.pipeline.collect(Timestamp::now(), clock());
        self.shared.pipeline.save()
    }

    /// Takes in what [`Usage::save`] gave to a store before a restart.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), Error> {
        self.shared.pipeline.restore(bytes, clock())
    }

    fn register(&self, scope: &Scope, kind: SdkKind, mut application: Application, now: Timestamp) {
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
        if !self.shared.pipeline.ledger.register(key, application, now) {
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
        start: Timestamp,
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
        let key = CounterKey { hour: Hour::of(start), app: Arc::clone(app), flag };
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
