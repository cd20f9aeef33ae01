//! The state that all topics of an instance share: who coordinates which topic, whether Redis responds,
//! and how many instances there are.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use metrics::gauge;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{
    member::Exchange,
    notice::Notice,
    redis_health::{RECOVERY_TIME, RedisHealth},
    scripts::TopicRedis,
    status::{FleetStatus, TopicStatus},
    topic::Topic,
};
use crate::{redis_client::Error, telemetry::error_chain};

const REDIS_FAILING: &str = "parapet_fleet_redis_failing";

/// The shared state of the topics. Its locks are held only to copy values.
#[derive(Debug)]
pub(super) struct Hub {
    fleet: String,
    /// The URL of Redis without credentials.
    location: String,
    topics: Mutex<BTreeMap<String, Entry>>,
    /// Whether this instance requests any topic from upstream.
    uses_upstream: watch::Sender<bool>,
    /// Topics that are not coordinated any more, whose leases may not have ended.
    unreleased: Mutex<BTreeMap<String, Entry>>,
    request_timeout: Duration,
    health: Mutex<RedisHealth>,
    instances: Mutex<Instances>,
    last_notice: Mutex<Option<Instant>>,
}

#[derive(Clone, Debug)]
struct Entry {
    exchange: Arc<Exchange>,
    redis: Arc<TopicRedis>,
}

/// The leader of the primary topic.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum PrimaryLeader {
    /// This instance.
    Own,
    /// Another instance, with its name and since when it leads; or none.
    Other(Option<(String, Instant)>),
}

/// The instances of the fleet, as of the last reply of Redis.
#[derive(Clone, Debug, Default)]
pub(super) struct Instances {
    pub(super) count: u32,
    /// The names of some.
    pub(super) names: Vec<String>,
}

impl Hub {
    pub(super) fn new(fleet: String, location: String, request_timeout: Duration) -> Self {
        gauge!(REDIS_FAILING).set(0.0);
        Self {
            fleet,
            location,
            topics: Mutex::default(),
            uses_upstream: watch::Sender::new(false),
            unreleased: Mutex::default(),
            request_timeout,
            health: Mutex::default(),
            instances: Mutex::default(),
            last_notice: Mutex::default(),
        }
    }

    /// Adds the coordination of a topic; replaces an earlier one of the same topic.
    pub(super) fn add(&self, topic: String, exchange: Arc<Exchange>, redis: Arc<TopicRedis>) {
        lock(&self.topics).insert(topic, Entry { exchange, redis });
    }

    /// Removes the coordination of a topic, unless another has replaced it.
    pub(super) fn remove(&self, topic: &str, exchange: &Arc<Exchange>) {
        let mut topics = lock(&self.topics);
        if topics.get(topic).is_some_and(|entry| Arc::ptr_eq(&entry.exchange, exchange))
            && let Some((topic, entry)) = topics.remove_entry(topic)
        {
            lock(&self.unreleased).insert(topic, entry);
        }
        drop(topics);
        self.on_role_changed();
    }

    /// The role of this instance in a topic has changed.
    pub(super) fn on_role_changed(&self) {
        let topics = lock(&self.topics);
        let uses_upstream = topics.values().any(|it| it.exchange.lock().role.uses_upstream());
        self.uses_upstream
            .send_if_modified(|uses| mem::replace(uses, uses_upstream) != uses_upstream);
    }

    pub(super) fn upstream_use(&self) -> watch::Receiver<bool> {
        self.uses_upstream.subscribe()
    }

    /// Gives back the leases that this instance holds, so that others lead at once.
    pub(super) async fn release_leases(&self) {
        let mut entries: Vec<_> = lock(&self.topics).values().cloned().collect();
        entries.extend(mem::take(&mut *lock(&self.unreleased)).into_values());
        let releases = entries.iter().filter_map(|Entry { exchange, redis }| {
            let fence = exchange.lock().fence.take()?;
            Some(async move { self.request(redis.release(fence)).await })
        });
        join_all(releases).await;
    }

    /// The leader of the primary topic, as last seen; `None` if this instance does not take part in it.
    pub(super) fn primary_leader(&self) -> Option<PrimaryLeader> {
        let topics = lock(&self.topics);
        let state = topics.get(&Topic::PRIMARY.name())?.exchange.lock();
        Some(match state.fence {
            Some(_) => PrimaryLeader::Own,
            None => PrimaryLeader::Other(state.leader.clone().zip(state.leader_since)),
        })
    }

    /// Passes a notice on to its topic.
    pub(super) fn on_notice(&self, payload: &[u8]) {
        let Some(notice) = Notice::decode(payload) else { return };
        *lock(&self.last_notice) = Some(Instant::now());
        if let Some(entry) = lock(&self.topics).get(notice.topic) {
            entry.exchange.notice();
        }
    }

    /// Lets all topics look at Redis: notices may have been lost, or this instance is to lead them.
    pub(super) fn notice_all(&self) {
        for entry in lock(&self.topics).values() {
            entry.exchange.notice();
        }
    }

    /// The value of a successful request to Redis. Logs the beginning and the end of an outage.
    pub(super) async fn request<T>(
        &self,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Option<T> {
        self.request_within(self.request_timeout, request).await
    }

    /// Like [`request`](Self::request), with another timeout.
    pub(super) async fn request_within<T>(
        &self,
        limit: Duration,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Option<T> {
        let result = timeout(limit, request).await.unwrap_or_else(|_| {
            let location = self.location.as_str().into();
            Err(Error::Timeout { location, timeout: limit })
        });
        let now = Instant::now();
        match result {
            Ok(value) => {
                if lock(&self.health).on_success(now) {
                    gauge!(REDIS_FAILING).set(0.0);
                    info!(
                        redis = self.location,
                        "The fleet can use Redis again: no request has failed for {RECOVERY_TIME:?}"
                    );
                }
                Some(value)
            }
            Err(error) => {
                let error = error_chain(&error);
                if lock(&self.health).on_failure(error.clone(), now) {
                    gauge!(REDIS_FAILING).set(1.0);
                    warn!(
                        redis = self.location,
                        error,
                        "The fleet cannot use Redis; this instance serves on, and fetches from upstream \
                         itself unless Redis responds soon"
                    );
                }
                None
            }
        }
    }

    /// Whether no request to Redis has failed lately.
    pub(super) fn is_redis_available(&self) -> bool {
        lock(&self.health).error().is_none()
    }

    /// The number of instances of the fleet, with this one, as last seen.
    pub(super) fn instances(&self) -> u32 {
        lock(&self.instances).count.max(1)
    }

    pub(super) fn set_instances(&self, instances: Instances) {
        *lock(&self.instances) = instances;
    }

    pub(super) fn status(&self) -> FleetStatus {
        let Instances { count, names } = lock(&self.instances).clone();
        let topics = lock(&self.topics);
        let topics = topics.iter().map(|(topic, Entry { exchange, .. })| {
            let state = exchange.lock();
            TopicStatus {
                topic: topic.clone(),
                role: state.role,
                leader: state.leader.clone(),
                leader_since: state.leader_since,
                fence: state.fence,
                version: state.served.version(),
            }
        });
        FleetStatus {
            name: self.fleet.clone(),
            redis: self.location.clone(),
            redis_error: lock(&self.health).error().map(str::to_owned),
            instance_count: count.max(1),
            instances: names,
            last_notice_age: lock(&self.last_notice).map(|at| at.elapsed()),
            topics: topics.collect(),
        }
    }
}

/// Ignores poisoning: each change under these locks is complete.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
