//! Which application instances are known, and which of them upstream has yet to hear of.
//!
//! An instance is told when it is new, when it registers differently, and once an hour while it
//! is seen, by its metrics too: upstream forgets instances that it does not hear of for days.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{token::Environment, wire::usage::Application};

/// After which time an instance that is still seen is told again.
const TELL_AGAIN: Duration = Duration::from_hours(1);
/// After which time an instance that is not seen any more is forgotten.
const FORGET: Duration = Duration::from_hours(2);

/// What makes an instance of an application one.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct InstanceKey {
    pub(super) environment: Environment,
    pub(super) app: Arc<str>,
    pub(super) instance: Arc<str>,
}

#[derive(Debug)]
struct Known {
    application: Application,
    seen: Instant,
    told: Option<Instant>,
}

/// The known instances.
#[derive(Debug, Default)]
pub(super) struct Applications {
    known: HashMap<InstanceKey, Known>,
}

impl Applications {
    /// Notes a registration; false when there is no room for it.
    pub(super) fn register(
        &mut self,
        key: InstanceKey,
        mut application: Application,
        now: Instant,
        limit: usize,
    ) -> bool {
        if let Some(known) = self.known.get_mut(&key) {
            known.seen = now;
            // Another edge may have restarted, and then knows the instance by its reports only.
            if application.strategies.is_none() {
                application.strategies.clone_from(&known.application.strategies);
            }
            if known.application != application {
                *known = Known { application, seen: now, told: None };
            }
            return true;
        }
        let fits = self.known.len() < limit;
        if fits {
            self.known.insert(key, Known { application, seen: now, told: None });
        }
        fits
    }

    /// Notes that an instance is alive; false when it is unknown.
    pub(super) fn touch(&mut self, key: &InstanceKey, now: Instant) -> bool {
        let known = self.known.get_mut(key);
        known.map(|known| known.seen = now).is_some()
    }

    /// Those to be told now, which count as told from here on; forgets those long unseen.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(Environment, Application)> {
        let mut due = Vec::new();
        for (key, known) in &mut self.known {
            if known.is_due(now) {
                known.told = Some(now);
                due.push((key.environment.clone(), known.application.clone()));
            }
        }
        self.known.retain(|_, known| now.saturating_duration_since(known.seen) < FORGET);
        due
    }

    /// Those that would be told now, left as they are.
    pub(super) fn waiting(&self, now: Instant) -> impl Iterator<Item = &Application> {
        self.known.values().filter(move |known| known.is_due(now)).map(|known| &known.application)
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

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(!applications.touch(&key("i"), at(0)));
        assert!(applications.register(key("i"), application(1), at(0), 10));
        assert_eq!(applications.due(at(1)).len(), 1);
        assert!(applications.register(key("i"), application(1), at(2), 10));
        assert_eq!(applications.due(at(2)), []);
        assert!(applications.register(key("i"), application(2), at(3), 10));
        assert_eq!(applications.due(at(3)).len(), 1);
        assert!(applications.touch(&key("i"), at(50)));
        assert_eq!(applications.due(at(62)), []);
        assert_eq!(applications.due(at(63)).len(), 1);
        assert_eq!(applications.due(at(64)), []);
        assert_eq!(applications.due(at(50 + 120)), []);
        assert!(applications.known.is_empty());
    }

    #[test]
    fn registration_without_strategies_keeps_those_known() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let listed = Application { strategies: Some(vec!["x".into()]), ..application(1) };
        assert!(applications.register(key("i"), listed.clone(), at(0), 10));
        assert_eq!(applications.due(at(0)).len(), 1);
        assert!(applications.register(key("i"), application(1), at(1), 10));
        assert_eq!(applications.due(at(1)), []);
        assert!(applications.register(key("i"), application(2), at(2), 10));
        let updated = Application { interval: 2, ..listed };
        assert_eq!(applications.due(at(2)), [(key("i").environment, updated)]);
    }

    #[test]
    fn the_number_of_instances_is_bounded() {
        let at = minute(Instant::now());
        let mut applications = Applications::default();
        let room = |at_: usize| {
            let instance = at_.to_string();
            applications.register(key(&instance), application(1), at(0), 3)
        };
        assert_eq!((0..5).map(room).collect::<Vec<_>>(), [true, true, true, false, false]);
    }
}
