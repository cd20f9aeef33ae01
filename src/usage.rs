//! Usage reported by SDKs: merged, batched per environment and sent upstream.
//!
//! [`Usage`] bounds the names in a report and adds it to the *aggregator*, which many threads share. At
//! each interval the *sender* drains the aggregator into the *delivery queue*, which decides which batch
//! to send and when. Usage that is still unsent at shutdown is *spooled*. Upstream stores counts by
//! flag, application, environment and hour of UTC, so reports are merged by these. The client's hour is
//! used if it is within a week; otherwise the evaluations are counted in the nearest hour within that
//! week.
//!
//! Memory for reports and registrations is bounded, in bytes too, and each token has a quota of it
//! (`memory_pool`). Flags and variants in the token's snapshot are always counted. Other names may be
//! invented by a client, newer than the snapshot, or recently deleted. They are counted like the others
//! within a small separate pool and sent upstream, which validates them. When that pool is full, unknown
//! names reported together with a known flag are counted under one common name, so that invented names
//! never cost a known flag its counts. A report that names no known flag is rejected as a whole with
//! [`QuotaExceeded`], and the SDK can report it again. Acknowledged usage is never dropped. Impact
//! metrics, and registrations that accompany counts, never cause a report to be rejected: those that
//! exceed the quota are dropped and counted in the metrics.
//!
//! This module does not authorize reports and does no disk IO: the caller stores the bytes from
//! [`Usage::serialize`].

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
        ClientApplication, Bucket, BulkReport, ClientMetrics, ConnectVia, EdgeInstance, SdkMetadata, ToggleStats,
    },
};

/// Rejection of a report that would exceed its token's quota.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the token's quota of pending usage is exceeded")]
pub struct Full {
    /// When to retry: pending usage has been sent by then and its memory freed.
    pub retry_after: Duration,
}

/// The authenticated sender of a report.
#[derive(Clone, Copy, Debug)]
pub struct Reporter<'a> {
    /// The token whose memory quota the report uses.
    pub token: &'a TokenDigest,
    /// The family of SDKs that the token is for.
    pub kind: SdkKind,
    /// The environment and projects that the token grants.
    pub scope: &'a Scope,
    /// The flags of its environment; `None` if they were never fetched.
    pub snapshot: Option<&'a Snapshot>,
}

impl Reporter<'_> {
    /// The flag with this name, if the token grants its project.
    fn flag(&self, name: &str) -> Option<&Flag> {
        let flag = self.snapshot?.flag(name)?;
        self.scope.projects.contains(flag.project()).then_some(flag)
    }
}

/// Limits and timing of usage reporting.
#[derive(Clone, Debug)]
pub struct Config {
    /// Interval at which the aggregator is drained and its contents are sent.
    pub interval: Duration,
    /// Number of distinct counters above which counters are merged more coarsely. Each variant of a flag
    /// counts as one too, and long texts count several times. A further 1/32 of this number is for
    /// unknown names.
    pub max_counters: usize,
}

/// Usage that was reported and not yet sent. A cheap handle.
#[derive(Clone, Debug)]
pub struct Usage {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pipeline: Pipeline,
    interval: Duration,
    /// The entry for this instance in `connectVia`.
    hop: ConnectVia,
    edges: Edges,
}

impl Usage {
    /// Starts empty; `hop` is the entry for this instance in `connectVia`.
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

    /// Counts the evaluations in an SDK's report and marks its instance as alive.
    ///
    /// An instance that never registered is registered here, as the Unleash server does: frontend SDKs
    /// never register, and backend SDKs register only when they start. The strategies of such an
    /// instance are unknown, which differs from an empty list. Evaluations are counted in the hour in
    /// which their bucket ended.
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
        let aggregator = &self.shared.pipeline.ledger;
        if !aggregator.touch(&instance, clock()) {
            let application = ClientApplication {
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
                metadata: SdkMetadata::clone(&metadata),
                extra: serde_json::Map::new(),
            };
            self.register_or_drop(reporter, application);
        }
        let lost = aggregator.measure(environment, &app, impact_metrics, reporter.token, now);
        meter::items_dropped("impact_sample", lost);
        Ok(())
    }

    /// Counts the evaluations in another edge's report that belong to the token's environment.
    pub fn record_bulk(
        &self,
        reporter: &Reporter<'_>,
        bulk: BulkReport,
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
            // Unleash Edge puts the applications of all environments into each environment's batch.
            if application.environment.as_deref().is_none_or(ours) {
                self.register_or_drop(reporter, application);
            }
        }
        let (aggregator, no_app) = (&self.shared.pipeline.ledger, "".into());
        let lost =
            aggregator.measure(environment, &no_app, bulk.impact_metrics, reporter.token, now);
        meter::items_dropped("impact_sample", lost);
        Ok(())
    }

    /// Records a registration under the environment and projects of its token.
    pub fn record_registration(
        &self,
        reporter: &Reporter<'_>,
        application: ClientApplication,
    ) -> Result<(), Full> {
        meter::reported(Endpoint::Register);
        let is_recorded = self.register(reporter, application);
        is_recorded.then_some(()).ok_or_else(|| self.full(Endpoint::Register))
    }

    /// Records the state that a downstream edge reports. A report that exceeds the size limit is dropped
    /// and counted.
    pub fn record_edge_instance(
        &self,
        reporter: &Reporter<'_>,
        edge: &EdgeInstance,
    ) -> Result<(), Full> {
        meter::reported(Endpoint::Edge);
        let is_recorded = self.shared.edges.record(edge, reporter.token, clock());
        is_recorded.then_some(()).ok_or_else(|| self.full(Endpoint::Edge))
    }

    /// Sends usage to `sink` at each interval until shutdown is requested, then sends the rest within
    /// the grace period. Must not run twice at the same time.
    ///
    /// Usage that could not be sent remains here, to be [serialized](Self::serialize). Dropping the
    /// future, or a panic, loses nothing: the next call resends the batches that were in flight.
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

    /// Unsent usage in Unleash Edge's format of `/internal-backstage/metricsbatch`: `{applications: […],
    /// metrics: [{key, bucket}]}`.
    pub fn pending(&self) -> Value {
        self.shared.pipeline.pending(clock())
    }

    /// Updates the gauges of pending usage; called when metrics are scraped.
    pub fn measure(&self) {
        self.shared.pipeline.measure(clock());
    }

    /// The latest report of each downstream edge.
    pub fn instances(&self) -> Vec<Value> {
        self.shared.edges.told()
    }

    /// How many evaluations have been sent, and how many the delivery queue has dropped.
    pub fn totals(&self) -> Totals {
        self.shared.pipeline.totals()
    }

    /// A copy of the usage that is still queued after its interval because upstream does not accept it.
    /// `None` if the store already has it, that is, if its revision is `stored`.
    ///
    /// Stored every few seconds, it limits the loss from a crash during an outage to one interval.
    pub fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        self.shared.pipeline.backlog(stored)
    }

    /// Completes when nothing is left to send for an environment whose usage was restored or copied to a
    /// [backlog](Self::backlog). The stored backlog is outdated then: a restart before the next one is
    /// stored would send it again.
    ///
    /// For a single waiter. Changes before the call are remembered, and dropping the future loses none.
    pub async fn settled(&self) {
        self.shared.pipeline.wait_until_store_outdated().await;
    }

    /// All unsent usage as bytes for a store; `None` if there is none. The usage also remains here.
    pub fn save(&self) -> Option<Vec<u8>> {
        self.shared.pipeline.collect(clock());
        self.shared.pipeline.save()
    }

    /// Restores usage that [`Usage::serialize`] returned before a restart.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), Error> {
        self.shared.pipeline.restore(bytes, clock())
    }

    /// Records a registration; false if it would exceed the token's quota.
    fn register(&self, reporter: &Reporter<'_>, mut application: ClientApplication) -> bool {
        let Reporter { token, kind, scope, .. } = *reporter;
        let kind = match (kind, application.sdk_kind) {
            (SdkKind::Frontend, _) => SdkKind::Frontend,
            (SdkKind::Backend, reported) => reported.unwrap_or(SdkKind::Backend),
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
            // Upstream treats a frontend SDK without a version as a backend SDK.
            application.metadata.sdk_version.get_or_insert_with(|| "unknown".into());
        }
        self.shared.pipeline.ledger.register(key, application, token, clock())
    }

    /// Records a registration that accompanies counts. If it exceeds the quota it is dropped and
    /// counted; the counts are still accepted.
    fn register_or_drop(&self, reporter: &Reporter<'_>, application: ClientApplication) {
        if !self.register(reporter, application) {
            meter::items_dropped("application", 1);
        }
    }

    /// Adds all counters of a report, or none of them.
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

    /// The identity of the reporting instance. Instances without an instance ID share a generated one.
    ///
    /// The generated ID differs by environment, because upstream identifies instances regardless of it.
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

/// The counters of a report, and how many of its evaluations can never be counted.
#[derive(Debug, Default)]
struct Counts {
    counters: Vec<Counted>,
    /// Number of evaluations in the report, including those below.
    received: u64,
    overflow: u64,
    /// Evaluations of flags whose names upstream cannot store.
    unnamed: u64,
    /// Evaluations in an environment other than the token's.
    foreign: u64,
}

impl Counts {
    fn add(
        &mut self,
        reporter: &Reporter<'_>,
        (hour, app, flag): (Hour, &Arc<str>, Arc<str>),
        stats: ToggleStats,
        metadata: &Arc<SdkMetadata>,
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

/// The runtime's clock, if there is one, so that waiting times agree with the sender's.
fn clock() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
