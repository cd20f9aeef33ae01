//! Usage reported by SDKs: merged, batched per environment and sent to a [`UsageSink`].
//!
//! [`Usage`] bounds the names in a report and adds it to the *aggregator*, which many threads share. At
//! each interval `pending_usage` drains the aggregator into the *delivery queue*, which decides which
//! batch to send and when. Usage that is still unsent at shutdown is *spooled*. Upstream stores counts
//! by flag, application, environment and hour of UTC, so reports are merged by these. The client's hour
//! is used if it is within a week; otherwise the evaluations are counted in the nearest hour within that
//! week.
//!
//! Memory for reports and registrations is bounded, in bytes too, and each token has a quota of it
//! (`quota_pool`). Flags and variants in the token's snapshot are always counted. Other names may be
//! invented by a client, newer than the snapshot, or recently deleted. They are counted like the others
//! within a small separate pool and sent upstream, which validates them. When that pool is full, unknown
//! names reported together with a known flag are counted under one common name, so that invented names
//! never cost a known flag its counts. A report that names no known flag is rejected as a whole with
//! [`QuotaExceeded`], and the SDK can report it again. Acknowledged usage is never dropped. Impact
//! metrics, and registrations that accompany counts, never cause a report to be rejected: those that
//! exceed the quota are dropped and counted in the metrics.
//!
//! This module does not authorize reports and does no IO: a [`UsageSink`] sends the batches, and the
//! caller stores the bytes from [`Usage::serialize`]. Upstream, or the control plane in its place, is
//! known here only by its limits.

mod aggregator;
mod batch;
mod bulk_merge;
mod counters;
mod delivery_queue;
mod impact_metrics;
mod instances;
mod pending_usage;
mod quota_pool;
mod received_batches;
mod spool;
mod usage_metrics;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use self::{
    aggregator::{OverQuota, ReportedCounter},
    counters::{Counter, CounterKey, Hour, NameStatus, storable_name, truncate_app_name},
    instances::{DownstreamEdges, InstanceKey},
    pending_usage::{PendingUsage, monotonic_now},
    received_batches::ReceivedBatches,
    usage_metrics::{DropReason, ReportEndpoint},
};
pub use self::{
    batch::{BatchId, OutgoingBatch, SendOutcome, UsageSink},
    bulk_merge::{MergedBatch, QueuedBatch, merge_batches},
    delivery_queue::{DeliveryTotals, Revision},
    pending_usage::{Backlog, Shutdown},
    spool::RestoreError,
    usage_metrics::count_unstored_impact_metrics,
};
pub use crate::protocol::usage::SdkKind;
use crate::{
    engine::Flag,
    protocol::usage::{
        Bucket, BulkReport, ClientApplication, ClientMetrics, ConnectVia, EdgeInstance,
        SdkMetadata, ToggleStats,
    },
    snapshot::Snapshot,
    token::{Environment, Scope, TokenDigest},
};

/// Rejection of a report that would exceed its token's quota.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the token's quota of pending usage is exceeded")]
pub struct QuotaExceeded {
    /// When to retry: pending usage has been sent by then and its memory freed.
    pub retry_after: Duration,
}

/// The authenticated sender of a report.
#[derive(Clone, Copy, Debug)]
pub struct ReportingClient<'a> {
    /// The token whose memory quota the report uses.
    pub token: &'a TokenDigest,
    /// The family of SDKs that the token is for.
    pub sdk_kind: SdkKind,
    /// The environment and projects that the token grants.
    pub scope: &'a Scope,
    /// The flags of its environment; `None` if they were never fetched.
    pub snapshot: Option<&'a Snapshot>,
}

impl ReportingClient<'_> {
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
    pending: PendingUsage,
    interval: Duration,
    /// The entry for this instance in `connectVia`.
    connect_via: ConnectVia,
    downstream_edges: DownstreamEdges,
    received_batches: ReceivedBatches,
}

impl Usage {
    /// Starts empty; `connect_via` is the entry for this instance.
    pub fn new(config: &Config, connect_via: ConnectVia) -> Self {
        usage_metrics::describe_metrics();
        let shared = Shared {
            pending: PendingUsage::new(config.max_counters),
            interval: config.interval,
            connect_via,
            downstream_edges: DownstreamEdges::new(),
            received_batches: ReceivedBatches::new(),
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
        reporter: &ReportingClient<'_>,
        report: ClientMetrics,
        now: Timestamp,
    ) -> Result<(), QuotaExceeded> {
        usage_metrics::count_report(ReportEndpoint::Metrics);
        let ClientMetrics {
            app_name,
            instance_id,
            connection_id,
            bucket,
            impact_metrics,
            metadata,
        } = report;
        let app = truncate_app_name(&app_name);
        let started = bucket.as_ref().map_or(now, |bucket| bucket.start);
        let ended = bucket.as_ref().map_or(now, Bucket::counted_at);
        let hour = Hour::clamped(ended, now);
        let metadata = Arc::new(metadata);
        let mut counts = ReportCounts::default();
        for (flag, stats) in bucket.into_iter().flat_map(|bucket| bucket.toggles) {
            counts.add(reporter, (hour, &app, flag), stats, &metadata);
        }
        self.record_counts(reporter, counts, now, ReportEndpoint::Metrics)?;
        let environment = &reporter.scope.environment;
        let instance =
            self.instance_key(environment, &app, reporter.sdk_kind, instance_id.as_ref());
        let aggregator = &self.shared.pending.aggregator;
        if !aggregator.touch(&instance, monotonic_now()) {
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
        let lost = aggregator.record_impact_metrics(
            environment,
            &app,
            impact_metrics,
            reporter.token,
            now,
        );
        usage_metrics::count_dropped_items("impact_sample", lost);
        Ok(())
    }

    /// Counts the evaluations in another edge's report that belong to the token's environment. A report
    /// with the id of a batch that was counted already is accepted and not counted again.
    pub fn record_bulk(
        &self,
        reporter: &ReportingClient<'_>,
        bulk: BulkReport,
        id: Option<BatchId>,
        now: Timestamp,
    ) -> Result<(), QuotaExceeded> {
        usage_metrics::count_report(ReportEndpoint::Bulk);
        let Some(id) = id else { return self.count_bulk(reporter, bulk, now) };
        let environment = &reporter.scope.environment;
        let count = || self.count_bulk(reporter, bulk, now);
        if !self.shared.received_batches.record_once(environment, id, count)? {
            usage_metrics::count_repeated_batch();
        }
        Ok(())
    }

    fn count_bulk(
        &self,
        reporter: &ReportingClient<'_>,
        bulk: BulkReport,
        now: Timestamp,
    ) -> Result<(), QuotaExceeded> {
        let environment = &reporter.scope.environment;
        let ours = |name: &str| name == environment.as_str();
        let mut counts = ReportCounts::default();
        for metric in bulk.metrics {
            let app = truncate_app_name(&metric.app_name);
            if ours(&metric.environment) {
                let hour = Hour::clamped(metric.timestamp, now);
                let metadata = Arc::new(metric.metadata);
                counts.add(reporter, (hour, &app, metric.feature_name), metric.stats, &metadata);
            } else {
                counts.add_other_environment(&metric.stats);
            }
        }
        self.record_counts(reporter, counts, now, ReportEndpoint::Bulk)?;
        usage_metrics::count_dropped_items("unreadable", bulk.malformed);
        for application in bulk.applications {
            // Unleash Edge puts the applications of all environments into each environment's batch.
            if application.environment.as_deref().is_none_or(ours) {
                self.register_or_drop(reporter, application);
            }
        }
        let (aggregator, no_app) = (&self.shared.pending.aggregator, "".into());
        let lost = aggregator.record_impact_metrics(
            environment,
            &no_app,
            bulk.impact_metrics,
            reporter.token,
            now,
        );
        usage_metrics::count_dropped_items("impact_sample", lost);
        Ok(())
    }

    /// Records a registration under the environment and projects of its token.
    pub fn record_registration(
        &self,
        reporter: &ReportingClient<'_>,
        application: ClientApplication,
    ) -> Result<(), QuotaExceeded> {
        usage_metrics::count_report(ReportEndpoint::Register);
        let is_recorded = self.try_register(reporter, application);
        is_recorded.then_some(()).ok_or_else(|| self.quota_exceeded(ReportEndpoint::Register))
    }

    /// Records the state that a downstream edge reports. A report that exceeds the size limit is dropped
    /// and counted.
    pub fn track_downstream_edge(
        &self,
        reporter: &ReportingClient<'_>,
        edge: &EdgeInstance,
    ) -> Result<(), QuotaExceeded> {
        usage_metrics::count_report(ReportEndpoint::Edge);
        let is_recorded =
            self.shared.downstream_edges.record(edge, reporter.token, monotonic_now());
        is_recorded.then_some(()).ok_or_else(|| self.quota_exceeded(ReportEndpoint::Edge))
    }

    /// Sends usage to `sink` at each interval until shutdown is requested, then sends the rest within
    /// the grace period. Without a sink, usage is counted and dropped at each interval. Must not run
    /// twice at the same time.
    ///
    /// Usage that could not be sent remains here, to be [serialized](Self::serialize). Dropping the
    /// future, or a panic, loses nothing: the next call resends the batches that were in flight.
    pub async fn run(&self, sink: Option<&dyn UsageSink>, ending: &Shutdown) {
        let Shared { pending, interval, .. } = &*self.shared;
        match sink {
            Some(sink) => pending.run(*interval, ending, sink).await,
            None => pending.discard_at_interval(*interval, &ending.requested).await,
        }
    }

    /// Unsent usage in Unleash Edge's format of `/internal-backstage/metricsbatch`: `{applications: […],
    /// metrics: [{key, bucket}]}`.
    pub fn pending(&self) -> Value {
        self.shared.pending.pending(monotonic_now())
    }

    /// Updates the gauges of pending usage; called when metrics are scraped.
    pub fn update_gauges(&self) {
        self.shared.pending.update_gauges(monotonic_now());
    }

    /// The latest report of each downstream edge.
    pub fn downstream_edge_reports(&self) -> Vec<Value> {
        self.shared.downstream_edges.reports()
    }

    /// How many evaluations have been sent, and how many the delivery queue has dropped.
    pub fn totals(&self) -> DeliveryTotals {
        *self.shared.pending.queue().totals()
    }

    /// A copy of the usage that is still queued after its interval because upstream does not accept it.
    /// `None` if the store already has it, that is, if its revision is `stored`.
    ///
    /// Stored every few seconds, it limits the loss from a crash during an outage to one interval.
    pub fn backlog(&self, stored: Option<Revision>) -> Option<Backlog> {
        self.shared.pending.backlog(stored)
    }

    /// Completes when nothing is left to send for an environment whose usage was restored or copied to a
    /// [backlog](Self::backlog). The stored backlog is outdated then: a restart before the next one is
    /// stored would send it again.
    ///
    /// For a single waiter. Changes before the call are remembered, and dropping the future loses none.
    pub async fn wait_until_stored_usage_delivered(&self) {
        self.shared.pending.stored_usage_delivered.notified().await;
    }

    /// All unsent usage as bytes for a store; `None` if there is none. The usage also remains here.
    pub fn serialize(&self) -> Option<Vec<u8>> {
        self.shared.pending.drain(monotonic_now());
        self.shared.pending.serialize()
    }

    /// Restores usage that [`Usage::serialize`] returned before a restart.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        self.shared.pending.restore(bytes, monotonic_now())
    }

    /// Records a registration; false if it would exceed the token's quota.
    fn try_register(
        &self,
        reporter: &ReportingClient<'_>,
        mut application: ClientApplication,
    ) -> bool {
        let ReportingClient { token, sdk_kind, scope, .. } = *reporter;
        let kind = match (sdk_kind, application.sdk_kind) {
            (SdkKind::Frontend, _) => SdkKind::Frontend,
            (SdkKind::Backend, reported) => reported.unwrap_or(SdkKind::Backend),
        };
        let app = truncate_app_name(&application.app_name);
        let key =
            self.instance_key(&scope.environment, &app, kind, application.instance_id.as_ref());
        let projects = scope.projects.to_list().into_iter().map(Into::into).collect();
        application.app_name = app;
        application.instance_id = Some(Arc::clone(&key.instance));
        application.environment = Some(scope.environment.as_str().into());
        application.projects = Some(projects);
        application.sdk_kind = Some(kind);
        application.connect_via.push(self.shared.connect_via.clone());
        if kind == SdkKind::Frontend {
            // Frontend SDKs implement no strategies.
            application.strategies = None;
            // Upstream treats a frontend SDK without a version as a backend SDK.
            application.metadata.sdk_version.get_or_insert_with(|| "unknown".into());
        }
        self.shared.pending.aggregator.register(key, application, token, monotonic_now())
    }

    /// Records a registration that accompanies counts. If it exceeds the quota it is dropped and
    /// counted; the counts are still accepted.
    fn register_or_drop(&self, reporter: &ReportingClient<'_>, application: ClientApplication) {
        if !self.try_register(reporter, application) {
            usage_metrics::count_dropped_items("application", 1);
        }
    }

    /// Adds all counters of a report, or none of them.
    fn record_counts(
        &self,
        reporter: &ReportingClient<'_>,
        counts: ReportCounts,
        now: Timestamp,
        endpoint: ReportEndpoint,
    ) -> Result<(), QuotaExceeded> {
        let ReportCounts { counters, received, overflow, unstorable_name, other_environment } =
            counts;
        let (environment, token) = (&reporter.scope.environment, reporter.token);
        let counted = self.shared.pending.aggregator.record_counters(
            environment,
            counters,
            token,
            Hour::of(now),
        );
        let lost = counted.map_err(|OverQuota| self.quota_exceeded(endpoint))?;
        usage_metrics::count_received(received);
        usage_metrics::count_dropped(DropReason::Overflow, overflow.saturating_add(lost));
        usage_metrics::count_dropped(DropReason::Name, unstorable_name);
        usage_metrics::count_dropped(DropReason::Environment, other_environment);
        Ok(())
    }

    fn quota_exceeded(&self, endpoint: ReportEndpoint) -> QuotaExceeded {
        usage_metrics::count_refused_report(endpoint);
        QuotaExceeded { retry_after: self.shared.interval }
    }

    /// The identity of the reporting instance. Instances without an instance ID share a generated one.
    ///
    /// The generated ID differs by environment, because upstream identifies instances regardless of it.
    fn instance_key(
        &self,
        environment: &Environment,
        app: &Arc<str>,
        kind: SdkKind,
        instance: Option<&Arc<str>>,
    ) -> InstanceKey {
        let instance = instance.map_or_else(
            || {
                let (hop, kind) = (&self.shared.connect_via.app_name, kind.as_str());
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
struct ReportCounts {
    counters: Vec<ReportedCounter>,
    /// Number of evaluations in the report, including those below.
    received: u64,
    overflow: u64,
    /// Evaluations of flags whose names upstream cannot store.
    unstorable_name: u64,
    /// Evaluations in an environment other than the token's.
    other_environment: u64,
}

impl ReportCounts {
    fn add(
        &mut self,
        reporter: &ReportingClient<'_>,
        (hour, app, flag): (Hour, &Arc<str>, Arc<str>),
        stats: ToggleStats,
        metadata: &Arc<SdkMetadata>,
    ) {
        let known = reporter.flag(&flag);
        let name_status = NameStatus::from_known(known.is_some());
        let variant = |variant: &str| {
            NameStatus::from_known(known.is_some_and(|flag| flag.has_variant(variant)))
        };
        let (counter, lost) = Counter::from_stats(stats, metadata, variant);
        let total = counter.total();
        self.received = self.received.saturating_add(total).saturating_add(lost);
        self.overflow = self.overflow.saturating_add(lost);
        let Some(flag) = storable_name(flag) else {
            self.unstorable_name = self.unstorable_name.saturating_add(total);
            return;
        };
        if !counter.is_zero() {
            let key = CounterKey { hour, app: Arc::clone(app), flag };
            self.counters.push(ReportedCounter { key, name_status, counter });
        }
    }

    fn add_other_environment(&mut self, stats: &ToggleStats) {
        let count = stats.yes.saturating_add(stats.no);
        self.received = self.received.saturating_add(count);
        self.other_environment = self.other_environment.saturating_add(count);
    }
}

#[cfg(test)]
mod tests;
