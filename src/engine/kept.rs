//! A context that outlives its request, to be asked by again.
//!
//! Its time and its lots are those of each evaluation, and not kept.

use std::hash::{Hash, Hasher};

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::Context;

/// The most that a context may say to be kept, in bytes.
const LONGEST: usize = 4 << 10;

/// What a [`Context`] says.
#[derive(Debug)]
pub struct KeptContext {
    user_id: Option<Box<str>>,
    session_id: Option<Box<str>>,
    environment: Option<Box<str>>,
    app_name: Option<Box<str>>,
    current_time: Option<Box<str>>,
    remote_address: Option<Box<str>>,
    properties: Box<[(Box<str>, Box<str>)]>,
    hostname: Option<Box<str>>,
}

impl KeptContext {
    /// Keeps what a context says; `None` if that is too much.
    pub fn of(context: &Context<'_>) -> Option<Self> {
        let Context {
            user_id,
            session_id,
            environment,
            app_name,
            current_time,
            remote_address,
            properties,
            hostname,
            now: _,
            draw: _,
        } = *context;
        let texts =
            [user_id, session_id, environment, app_name, current_time, remote_address, hostname];
        let length = texts.into_iter().flatten().map(str::len).sum::<usize>()
            + properties.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        if length > LONGEST {
            return None;
        }
        let kept = |text: Option<&str>| text.map(Box::from);
        Some(Self {
            user_id: kept(user_id),
            session_id: kept(session_id),
            environment: kept(environment),
            app_name: kept(app_name),
            current_time: kept(current_time),
            remote_address: kept(remote_address),
            properties: properties
                .iter()
                .map(|&(name, value)| (name.into(), value.into()))
                .collect(),
            hostname: kept(hostname),
        })
    }

    /// Asks by what was kept, at this time.
    pub fn at<T>(&self, now: Timestamp, ask: impl FnOnce(&Context<'_>) -> T) -> T {
        let properties: SmallVec<[_; 16]> =
            self.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        ask(&Context {
            user_id: self.user_id.as_deref(),
            session_id: self.session_id.as_deref(),
            environment: self.environment.as_deref(),
            app_name: self.app_name.as_deref(),
            current_time: self.current_time.as_deref(),
            remote_address: self.remote_address.as_deref(),
            properties: &properties,
            hostname: self.hostname.as_deref(),
            now,
            draw: 0,
        })
    }
}

/// Of what is kept.
impl Hash for Context<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Context {
            user_id,
            session_id,
            environment,
            app_name,
            current_time,
            remote_address,
            properties,
            hostname,
            now: _,
            draw: _,
        } = self;
        (user_id, session_id, environment, app_name).hash(state);
        (current_time, remote_address, properties, hostname).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::arbitrary::asking;

    proptest! {
        #[test]
        fn what_is_kept_is_what_the_context_says(asking in asking()) {
            let context = asking.context();
            let kept = KeptContext::of(&context).unwrap();
            let expect = Context { draw: 0, ..context };
            let says = kept.at(context.now, |kept| format!("{kept:?}"));
            prop_assert_eq!(says, format!("{expect:?}"));
        }
    }

    #[test]
    fn a_context_that_says_too_much_is_not_kept() {
        let keeps = |length: usize| {
            let text = "x".repeat(length);
            KeptContext::of(&Context { properties: &[("p", &text)], ..Context::default() })
                .is_some()
        };
        assert!(keeps(LONGEST - 1) && !keeps(LONGEST));
    }
}
