//! Tracks application instances and decides which registrations to send upstream.
//!
//! A registration is sent when the instance is new, when it changes, and once an hour while the instance
//! is active; metrics count as activity. Upstream removes instances that are inactive for days.
//!
//! The size of a registration counts toward its token's quota, in bytes, while it is tracked here or
//! queued for upstream. The size of the pool is set elsewhere.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    environment_queue::ApplicationKey,
    memory_pool::{Quota, Reservation, TEXT_OVERHEAD_BYTES},
};
use crate::{protocol::usage::ClientApplication, token::Environment};

/// Interval after which an active instance is registered again.
const REREGISTER_INTERVAL: Duration = Duration::from_hours(1);
/// Time after which an inactive instance is removed.
const IDLE_TTL: Duration = Duration::from_hours(2);

/// Like [`TEXT_OVERHEAD_BYTES`] for a JSON object, whose tree consists of nodes with room for eleven fields.
const OBJECT_OVERHEAD_BYTES: usize = 640;

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

/// The tracked instances.
#[derive(Debug, Default)]
pub(super) struct Applications {
    instances: HashMap<InstanceKey, TrackedInstance>,
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
    pub(super) fn with_strategies_of(&self, earlier: &Self) -> Self {
        let strategies = earlier.application.strategies.clone();
        let application = ClientApplication { strategies, ..self.application.clone() };
        let reservation = self.reservation.reserve_same_quota(memory_size(&application));
        Self { application, reservation }
    }
}

impl Applications {
    /// Records a registration; false if it is new or changed and exceeds the quota.
    pub(super) fn register(
        &mut self,
        key: InstanceKey,
        mut application: ClientApplication,
        quota: &Quota,
        now: Instant,
    ) -> bool {
        if let Some(instance) = self.instances.get_mut(&key) {
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
        self.instances
            .insert(key, TrackedInstance { registration, last_seen: now, last_sent: None });
        true
    }

    /// Marks an instance as active; false if it is not tracked.
    pub(super) fn touch(&mut self, key: &InstanceKey, now: Instant) -> bool {
        let instance = self.instances.get_mut(key);
        instance.map(|instance| instance.last_seen = now).is_some()
    }

    /// Registrations that are due, which are marked as sent. Removes inactive instances.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<(Environment, Arc<Registration>)> {
        let mut due = Vec::new();
        for (key, instance) in &mut self.instances {
            if instance.is_due(now) {
                instance.last_sent = Some(now);
                due.push((key.environment.clone(), Arc::clone(&instance.registration)));
            }
        }
        self.instances
            .retain(|_, instance| now.saturating_duration_since(instance.last_seen) < IDLE_TTL);
        due
    }

    /// Registrations that are due, without marking them as sent.
    pub(super) fn iter_due(&self, now: Instant) -> impl Iterator<Item = &Arc<Registration>> {
        self.instances.values().filter(move |it| it.is_due(now)).map(|it| &it.registration)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{token::TokenDigest, usage::memory_pool::MemoryPool};

    fn quota(capacity: usize) -> Quota {
        MemoryPool::new(capacity).quota_of(&TokenDigest::of("token"))
    }

    fn take_due_applications(
        applications: &mut Applications,
        now: Instant,
    ) -> Vec<ClientApplication> {
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
        InstanceKey {
            environment: Environment::new("dev"),
            app: "a".into(),
            instance: instance.into(),
        }
    }

    fn minute(start: Instant) -> impl Fn(u64) -> Instant {
        move |minute| start + Duration::from_mins(minute)
    }

    #[test]
    fn instance_is_registered_when_new_when_changed_and_hourly_while_active() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let quota = quota(10_000);
        assert!(!applications.touch(&key("i"), at(0)));
        assert!(applications.register(key("i"), application(1), &quota, at(0)));
        assert_eq!(applications.take_due(at(1)).len(), 1);
        assert!(applications.register(key("i"), application(1), &quota, at(2)));
        assert_eq!(take_due_applications(&mut applications, at(2)), []);
        assert!(applications.register(key("i"), application(2), &quota, at(3)));
        assert_eq!(applications.take_due(at(3)).len(), 1);
        assert!(applications.touch(&key("i"), at(50)));
        assert_eq!(take_due_applications(&mut applications, at(62)), []);
        assert_eq!(applications.take_due(at(63)).len(), 1);
        assert_eq!(take_due_applications(&mut applications, at(64)), []);
        assert_eq!(take_due_applications(&mut applications, at(50 + 120)), []);
        assert!(applications.instances.is_empty());
    }

    #[test]
    fn registration_without_strategies_inherits_earlier_ones() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let quota = quota(10_000);
        let listed = ClientApplication { strategies: Some(vec!["x".into()]), ..application(1) };
        assert!(applications.register(key("i"), listed.clone(), &quota, at(0)));
        assert_eq!(applications.take_due(at(0)).len(), 1);
        assert!(applications.register(key("i"), application(1), &quota, at(1)));
        assert_eq!(take_due_applications(&mut applications, at(1)), []);
        assert!(applications.register(key("i"), application(2), &quota, at(2)));
        let updated = ClientApplication { interval: 2, ..listed };
        assert_eq!(take_due_applications(&mut applications, at(2)), [updated]);
    }

    #[test]
    fn instances_are_bounded_by_their_size_in_bytes() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let strategies = |count: usize| Some(vec!["x".repeat(255).into(); count]);
        let large = ClientApplication { strategies: strategies(200), ..application(1) };
        assert!((50_000..80_000).contains(&memory_size(&large)));
        let quota = quota(4 * memory_size(&large));
        let mut register = |instance: usize, application: &ClientApplication| {
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
}
