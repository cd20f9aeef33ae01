//! Instances that report: applications, which are registered upstream, and downstream edges, which are
//! listed for operators.
//!
//! A registration is sent when the instance is new, when it changes, and once an hour while the instance
//! is active; metrics count as activity. Upstream removes instances that are inactive for days. The size
//! of a registration counts toward its token's quota, in bytes, while it is tracked here or queued for
//! upstream. The size of that pool is set elsewhere.
//!
//! A downstream edge is identified by the name that it chose and its token. No token can replace the
//! report of another token's edge or use its memory quota. An edge that stops reporting is removed. The
//! usage that edges report is not stored here.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use dashmap::{DashMap, Entry};
use serde_json::Value;

use super::{
    counters::MAX_NAME_BYTES,
    quota_pool::{Quota, QuotaPool, Reservation, TEXT_OVERHEAD_BYTES},
    usage_metrics,
};
use crate::{
    protocol::usage::{ClientApplication, EdgeInstance},
    token::{Environment, TokenDigest},
};

/// Interval after which an active instance is registered again.
const REREGISTER_INTERVAL: Duration = Duration::from_hours(1);
/// Time after which an inactive instance is removed.
const IDLE_TTL: Duration = Duration::from_hours(2);

/// Like [`TEXT_OVERHEAD_BYTES`] for a JSON object, whose tree consists of nodes with room for eleven fields.
const OBJECT_OVERHEAD_BYTES: usize = 640;

/// The number of edges to track: each reserves at least this fraction of the pool.
const MAX_EDGES: usize = 1000;
/// Memory for the reports, in bytes.
const EDGE_POOL_BYTES: usize = 8 * 1024 * 1024;
/// The largest report, in bytes of JSON.
const MAX_REPORT_BYTES: usize = 64 * 1024;
/// Time without a report after which an edge is removed; edges report every minute.
const EDGE_TTL: Duration = Duration::from_mins(10);

/// The identity of an application instance.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct InstanceKey {
    pub(super) environment: Environment,
    pub(super) app: Arc<str>,
    pub(super) instance: Arc<str>,
}

/// A registration and its memory reservation.
#[derive(Debug)]
pub(super) struct Registration {
    application: ClientApplication,
    reservation: Reservation,
}

#[derive(Debug)]
struct TrackedInstance {
    registration: Arc<Registration>,
    last_seen: Instant,
    last_sent: Option<Instant>,
}

/// The tracked instances of applications.
#[derive(Debug)]
pub(super) struct Applications {
    instances: DashMap<InstanceKey, TrackedInstance>,
}

/// The application's name and its instance, after whether its strategies are unknown. Sorts
/// applications with strategies first.
type ApplicationKey = (bool, Arc<str>, Option<Arc<str>>);

/// Registrations that wait to be sent, one for each instance.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingRegistrations {
    by_key: BTreeMap<ApplicationKey, Arc<Registration>>,
}

impl Registration {
    /// A registration that was restored from a store. It is kept even if it exceeds the quota.
    pub(super) fn restored(application: ClientApplication, quota: &Quota) -> Self {
        let reservation = quota.reserve_unchecked(memory_size(&application));
        Self { application, reservation }
    }

    pub(super) fn application(&self) -> &ClientApplication {
        &self.application
    }

    /// This registration with the strategies of an earlier one.
    fn with_strategies_of(&self, earlier: &Self) -> Self {
        let strategies = earlier.application.strategies.clone();
        let application = ClientApplication { strategies, ..self.application.clone() };
        let reservation = self.reservation.reserve_same_quota(memory_size(&application));
        Self { application, reservation }
    }
}

impl Applications {
    /// None yet, with this number of locks.
    pub(super) fn new(shards: usize) -> Self {
        Self { instances: DashMap::with_shard_amount(shards) }
    }

    /// Records a registration; false if it is new or changed and exceeds the quota.
    pub(super) fn register(
        &self,
        key: InstanceKey,
        mut application: ClientApplication,
        quota: &Quota,
        now: Instant,
    ) -> bool {
        let mut entry = self.instances.entry(key);
        if let Entry::Occupied(present) = &mut entry {
            let instance = present.get_mut();
            instance.last_seen = now;
            let before = instance.registration.application();
            // A downstream edge may have restarted and now know the instance only from its metrics.
            if application.strategies.is_none() {
                application.strategies.clone_from(&before.strategies);
            }
            if *before == application {
                return true;
            }
        }
        let Some(reservation) = quota.try_reserve(memory_size(&application)) else { return false };
        let registration = Arc::new(Registration { application, reservation });
        entry.insert(TrackedInstance { registration, last_seen: now, last_sent: None });
        true
    }

    /// Marks an instance as active; false if it is not tracked.
    pub(super) fn touch(&self, key: &InstanceKey, now: Instant) -> bool {
        let instance = self.instances.get_mut(key);
        instance.map(|mut instance| instance.last_seen = now).is_some()
    }

    /// Registrations that are due, which are marked as sent. Removes inactive instances.
    pub(super) fn take_due(&self, now: Instant) -> Vec<(Environment, Arc<Registration>)> {
        let mut due = Vec::new();
        self.instances.retain(|key, instance| {
            if instance.is_due(now) {
                instance.last_sent = Some(now);
                due.push((key.environment.clone(), Arc::clone(&instance.registration)));
            }
            now.saturating_duration_since(instance.last_seen) < IDLE_TTL
        });
        due
    }

    /// Registrations that are due, without marking them as sent.
    pub(super) fn due(&self, now: Instant) -> Vec<Arc<Registration>> {
        let due = self.instances.iter().filter(|instance| instance.is_due(now));
        due.map(|instance| Arc::clone(&instance.registration)).collect()
    }
}

impl TrackedInstance {
    fn is_due(&self, now: Instant) -> bool {
        match self.last_sent {
            None => true,
            Some(sent) => {
                self.last_seen > sent && now.saturating_duration_since(sent) >= REREGISTER_INTERVAL
            }
        }
    }
}

impl PendingRegistrations {
    /// Adds a registration that replaces an earlier one of its instance. Unknown strategies do not
    /// replace a list.
    pub(super) fn add(&mut self, registration: Arc<Registration>) {
        let earlier = self.remove_instance(registration.application());
        self.insert(registration, earlier);
    }

    /// Adds a registration that was made before those present.
    pub(super) fn add_earlier(&mut self, registration: Arc<Registration>) {
        match self.remove_instance(registration.application()) {
            Some(present) => self.insert(present, Some(registration)),
            None => self.insert(registration, None),
        }
    }

    /// Removes the next registration to send.
    pub(super) fn pop_first(&mut self) -> Option<Arc<Registration>> {
        Some(self.by_key.pop_first()?.1)
    }

    pub(super) fn into_values(self) -> impl Iterator<Item = Arc<Registration>> {
        self.by_key.into_values()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Registration>> {
        self.by_key.values()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    fn remove_instance(&mut self, application: &ClientApplication) -> Option<Arc<Registration>> {
        [false, true]
            .iter()
            .find_map(|is_unlisted| self.by_key.remove(&application_key(*is_unlisted, application)))
    }

    fn insert(&mut self, registration: Arc<Registration>, earlier: Option<Arc<Registration>>) {
        let merged = match earlier {
            Some(earlier) if registration.application.strategies.is_none() => {
                Arc::new(registration.with_strategies_of(&earlier))
            }
            _ => registration,
        };
        let is_unlisted = merged.application.strategies.is_none();
        self.by_key.insert(application_key(is_unlisted, &merged.application), merged);
    }
}

fn application_key(is_unlisted: bool, application: &ClientApplication) -> ApplicationKey {
    (is_unlisted, Arc::clone(&application.app_name), application.instance_id.clone())
}

/// Approximate bytes that an instance takes while it is tracked and queued for upstream.
fn memory_size(application: &ClientApplication) -> usize {
    let ClientApplication {
        app_name,
        instance_id,
        connection_id,
        environment,
        projects,
        connect_via,
        strategies,
        metadata,
        extra,
        ..
    } = application;
    let optional = [instance_id, connection_id, environment].into_iter().flatten();
    let lists = projects.iter().chain(strategies).flatten();
    let hops = connect_via.iter().flat_map(|hop| [&hop.app_name, &hop.instance_id]);
    let texts = [app_name].into_iter().chain(optional).chain(lists).chain(hops);
    let texts =
        texts.chain(metadata.values()).map(|text| TEXT_OVERHEAD_BYTES + text.len()).sum::<usize>();
    let extra = extra
        .iter()
        .map(|(name, value)| TEXT_OVERHEAD_BYTES + name.len() + json_memory_size(value));
    let tracked =
        size_of::<InstanceKey>() + size_of::<TrackedInstance>() + size_of::<Registration>();
    let queued = size_of::<(ApplicationKey, Arc<Registration>)>();
    tracked + queued + texts + extra.sum::<usize>()
}

fn json_memory_size(value: &Value) -> usize {
    let content = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(json_memory_size).sum(),
        Value::Object(fields) => {
            let field = |(name, value): (&String, _)| {
                TEXT_OVERHEAD_BYTES + name.len() + json_memory_size(value)
            };
            OBJECT_OVERHEAD_BYTES + fields.iter().map(field).sum::<usize>()
        }
    };
    size_of::<Value>() + content
}

/// The edges that reported recently.
#[derive(Debug)]
pub(super) struct DownstreamEdges {
    by_key: Mutex<BTreeMap<EdgeKey, TrackedEdge>>,
    pool: QuotaPool,
}

/// The name that an edge chose, and its token.
type EdgeKey = (Arc<str>, TokenDigest);

#[derive(Debug)]
struct TrackedEdge {
    last_seen: Instant,
    /// The latest report as JSON.
    report: Box<str>,
    reservation: Reservation,
}

impl DownstreamEdges {
    pub(super) fn new() -> Self {
        Self { by_key: Mutex::default(), pool: QuotaPool::new(EDGE_POOL_BYTES) }
    }

    /// Stores the report of an edge. False, and the previous report is kept, if it would exceed the
    /// token's quota.
    ///
    /// A report larger than [`MAX_REPORT_BYTES`] is dropped and counted.
    pub(super) fn record(&self, edge: &EdgeInstance, token: &TokenDigest, now: Instant) -> bool {
        let report: Box<str> = edge.value().to_string().into();
        if edge.identifier().len() > MAX_NAME_BYTES || report.len() > MAX_REPORT_BYTES {
            usage_metrics::count_dropped_items("edge_instance", 1);
            return true;
        }
        let key = (Arc::clone(edge.identifier()), *token);
        let size_of_edge = edge_memory_size(&key, &report);
        let mut edges = self.lock();
        edges.retain(|_, edge| now.saturating_duration_since(edge.last_seen) < EDGE_TTL);
        if let Some(edge) = edges.get_mut(&key) {
            if !edge.reservation.try_resize(edge_memory_size(&key, &edge.report), size_of_edge) {
                return false;
            }
            (edge.last_seen, edge.report) = (now, report);
            return true;
        }
        self.pool.remove_unused();
        let Some(reservation) = self.pool.quota_of(token).try_reserve(size_of_edge) else {
            return false;
        };
        edges.insert(key, TrackedEdge { last_seen: now, report, reservation });
        true
    }

    /// The latest reports, in order of the edges' names.
    pub(super) fn reports(&self) -> Vec<Value> {
        let report = |edge: &TrackedEdge| serde_json::from_str(&edge.report).unwrap_or_default();
        self.lock().values().map(report).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<EdgeKey, TrackedEdge>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes to reserve for an edge.
fn edge_memory_size((identifier, _): &EdgeKey, report: &str) -> usize {
    let size = size_of::<(EdgeKey, TrackedEdge)>() + identifier.len() + report.len();
    size.max(EDGE_POOL_BYTES / MAX_EDGES)
}

#[cfg(test)]
mod tests;
