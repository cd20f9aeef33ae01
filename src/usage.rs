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
mod tests;
