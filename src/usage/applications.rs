//! Which application instances are known, and which of them upstream has yet to hear of.
//!
//! An instance is told when it is new, when it registers differently, and once an hour while it
//! is seen, by its metrics too: upstream forgets instances that it does not hear of for days.
//!
//! What an instance tells of itself is charged to its token, in bytes, for as long as it is kept
//! here or waits for upstream. How many bytes there are is not decided here.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    lane::ApplicationKey,
    pool::{Account, Charge},
};
use crate::{token::Environment, wire::usage::Application};

/// After which time an instance that is still seen is told again.
const TELL_AGAIN: Duration = Duration::from_hours(1);
/// After which time an instance that is not seen any more is forgotten.
const FORGET: Duration = Duration::from_hours(2);

/// What a text takes beside its bytes: the pointer to it, its counts, and what an allocator adds.
const PER_TEXT: usize = 40;
/// The same of an object in JSON, whose tree is made of nodes with room for eleven fields.
const PER_OBJECT: usize = 640;

/// What makes an instance of an application one.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct InstanceKey {
    pub(super) environment: Environment,
    pub(super) app: Arc<str>,
    pub(super) instance: Arc<str>,
}

/// What an instance told of itself, and the memory that this takes.
#[derive(Debug)]
pub(super) struct Registration {
    application: Application,
    charge: Charge,
}

#[derive(Debug)]
struct Known {
    registration: Arc<Registration>,
    seen: Instant,
    told: Option<Instant>,
}

/// The known instances.
#[derive(Debug, Default)]
pub(super) struct Applications {
    known: HashMap<InstanceKey, Known>,
}

impl Registration {
    /// A registration that a store held, which is kept whether its account has room or not.
    pub(super) fn restored(application: Application, account: &Account) -> Self {
        let charge = account.charge(size(&application));
        Self { application, charge }
    }

    pub(super) fn application(&self) -> &Application {
        &self.application
    }

    /// The same with the strategies of an earlier registration.
    pub(super) fn with_strategies_of(&self, earlier: &Self) -> Self {
        let strategies = earlier.application.strategies.clone();
        let application = Application { strategies, ..self.application.clone() };
        let charge = self.charge.resized(size(&application));
        Self { application, charge }
    }
}

impl Applications {
    /// Notes a registration; false when it is new and its account has no room for it.
    pub(super) fn register(
        &mut self,
        key: InstanceKey,
        mut application: Application,
        account: &Account,
        now: Instant,
    ) -> bool {
        if let Some(known) = self.known.get_mut(&key) {
            known.seen = now;
            let before = known.registration.application();
            // Another edge may have restarted, and then knows the instance by its reports only.
            if application.strategies.is_none() {
                application.strategies.clone_from(&before.strategies);
            }
            if *before == application {
                return true;
            }
        }
        let Some(charge) = account.try_charge(size(&application)) else { return false };
        let registration = Arc::new(Registration { application, charge });
        self.known.insert(key, Known { registration, seen: now, told: None });
        true
    }

    /// Notes that an instance is alive; false when it is unknown.
    pub(super) fn touch(&mut self, key: &InstanceKey, now: Instant) -> bool {
        let known = self.known.get_mut(key);
        known.map(|known| known.seen = now).is_some()
    }

    /// Those to be told now, which count as told from here on; forgets those long unseen.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Environment, Arc<Registration>)> {
        let mut due = Vec::new();
        for (key, known) in &mut self.known {
            if known.is_due(now) {
                known.told = Some(now);
                due.push((key.environment.clone(), Arc::clone(&known.registration)));
            }
        }
        self.known.retain(|_, known| now.saturating_duration_since(known.seen) < FORGET);
        due
    }

    /// Those that would be told now, left as they are.
    pub(super) fn waiting(&self, now: Instant) -> impl Iterator<Item = &Arc<Registration>> {
        self.known.values().filter(move |known| known.is_due(now)).map(|known| &known.registration)
    }
}

impl Known {
    fn is_due(&self, now: Instant) -> bool {
        match self.told {
            None => true,
            Some(told) => self.seen > told && now.saturating_duration_since(told) >= TELL_AGAIN,
        }
    }
}

/// The memory that an instance takes while it is known and waits for upstream, about, in bytes.
fn size(application: &Application) -> usize {
    let Application {
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
    let texts = texts.chain(metadata.texts()).map(|text| PER_TEXT + text.len()).sum::<usize>();
    let extra = extra.iter().map(|(name, value)| PER_TEXT + name.len() + size_of_json(value));
    let known = size_of::<InstanceKey>() + size_of::<Known>() + size_of::<Registration>();
    let waiting = size_of::<(ApplicationKey, Arc<Registration>)>();
    known + waiting + texts + extra.sum::<usize>()
}

fn size_of_json(value: &Value) -> usize {
    let content = match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(size_of_json).sum(),
        Value::Object(fields) => {
            let field = |(name, value): (&String, _)| PER_TEXT + name.len() + size_of_json(value);
            PER_OBJECT + fields.iter().map(field).sum::<usize>()
        }
    };
    size_of::<Value>() + content
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{token::TokenDigest, usage::pool::Pool};

    fn account(capacity: usize) -> Account {
        Pool::new(capacity).account(&TokenDigest::of("token"))
    }

    fn told(applications: &mut Applications, now: Instant) -> Vec<Application> {
        let due = applications.due(now).into_iter();
        due.map(|(_, registration)| registration.application().clone()).collect()
    }

    fn application(interval: u64) -> Application {
        let body = format!(
            r#"{{"appName":"a","instanceId":"i","started":"2026-01-02T03:04:05Z","interval":{interval}}}"#
        );
        Application::parse(body.as_bytes()).unwrap()
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
    fn an_instance_is_told_when_new_when_changed_and_hourly_while_it_is_seen() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let account = account(10_000);
        assert!(!applications.touch(&key("i"), at(0)));
        assert!(applications.register(key("i"), application(1), &account, at(0)));
        assert_eq!(applications.due(at(1)).len(), 1);
        assert!(applications.register(key("i"), application(1), &account, at(2)));
        assert_eq!(told(&mut applications, at(2)), []);
        assert!(applications.register(key("i"), application(2), &account, at(3)));
        assert_eq!(applications.due(at(3)).len(), 1);
        assert!(applications.touch(&key("i"), at(50)));
        assert_eq!(told(&mut applications, at(62)), []);
        assert_eq!(applications.due(at(63)).len(), 1);
        assert_eq!(told(&mut applications, at(64)), []);
        assert_eq!(told(&mut applications, at(50 + 120)), []);
        assert!(applications.known.is_empty());
    }

    #[test]
    fn registration_without_strategies_keeps_those_known() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let account = account(10_000);
        let listed = Application { strategies: Some(vec!["x".into()]), ..application(1) };
        assert!(applications.register(key("i"), listed.clone(), &account, at(0)));
        assert_eq!(applications.due(at(0)).len(), 1);
        assert!(applications.register(key("i"), application(1), &account, at(1)));
        assert_eq!(told(&mut applications, at(1)), []);
        assert!(applications.register(key("i"), application(2), &account, at(2)));
        let updated = Application { interval: 2, ..listed };
        assert_eq!(told(&mut applications, at(2)), [updated]);
    }

    #[test]
    fn instances_are_bounded_by_the_bytes_that_they_take() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let strategies = |count: usize| Some(vec!["x".repeat(255).into(); count]);
        let large = Application { strategies: strategies(200), ..application(1) };
        assert!((50_000..80_000).contains(&size(&large)));
        let account = account(4 * size(&large));
        let mut register = |instance: usize, application: &Application| {
            let key = key(&instance.to_string());
            applications.register(key, application.clone(), &account, at(0))
        };
        let taken: Vec<_> = (0..5).map(|instance| register(instance, &large)).collect();
        assert_eq!(taken, [true, true, true, false, false]);
        // What changes nothing needs no room; a larger one does.
        assert!(register(0, &large));
        let larger = Application { strategies: strategies(400), ..application(1) };
        assert!(!register(0, &larger));
        // What waits for upstream takes room as long as it does.
        let waiting = applications.due(at(0));
        assert_eq!(waiting.len(), 3);
        assert!(applications.due(at(121)).is_empty() && applications.known.is_empty());
        assert!(!applications.register(key("late"), larger.clone(), &account, at(121)));
        drop(waiting);
        assert!(applications.register(key("late"), larger, &account, at(121)));
    }

    #[test]
    fn fields_that_are_not_known_weigh_what_their_tree_takes() {
        let objects = vec![serde_json::json!({ "a": 0 }); 500];
        let mut application = application(1);
        let before = size(&application);
        application.extra.insert("objects".to_owned(), Value::from(objects));
        assert!(size(&application) - before > 500 * PER_OBJECT);
    }
}
