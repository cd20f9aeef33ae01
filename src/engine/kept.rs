//! A context that outlives its request, to be asked by again.
//!
//! Its time and its lots are those of each evaluation, and not kept. A context whose `sessionId` was made
//! up is good for one request, and nobody keeps it.

use std::hash::{Hash, Hasher};

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::Context;

/// The most that a context may say to be kept, in bytes.
const LONGEST: usize = 4 << 10;

/// What a [`Context`] says.
#[derive(Debug)]
pub struct KeptContext {
    texts: [Option<Box<str>>; 7],
    properties: Box<[(Box<str>, Box<str>)]>,
}

impl KeptContext {
    /// Keeps what a context says; `None` if that is too much.
    pub fn of(context: &Context<'_>) -> Option<Self> {
        let texts = context.texts();
        let length = texts.into_iter().flatten().map(str::len).sum::<usize>()
            + context
                .properties
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>();
        if length > LONGEST {
            return None;
        }
        let properties = context.properties.iter();
        Some(Self {
            texts: texts.map(|text| text.map(Box::from)),
            properties: properties.map(|&(name, value)| (name.into(), value.into())).collect(),
        })
    }

    /// Asks by what was kept, at this time.
    pub fn at<T>(&self, now: Timestamp, ask: impl FnOnce(&Context<'_>) -> T) -> T {
        let properties: SmallVec<[_; 16]> =
            self.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        let texts = self.texts.each_ref().map(Option::as_deref);
        let [user_id, session_id, environment, app_name, current_time, remote_address, hostname] =
            texts;
        ask(&Context {
            user_id,
            session_id,
            session_is_made_up: false,
            environment,
            app_name,
            current_time,
            remote_address,
            properties: &properties,
            hostname,
            now,
            draw: 0,
        })
    }
}

impl<'a> Context<'a> {
    /// What it says besides its properties, in the order that [`KeptContext`] has it in.
    fn texts(&self) -> [Option<&'a str>; 7] {
        let Self { user_id, session_id, environment, app_name, .. } = *self;
        let Self { current_time, remote_address, hostname, .. } = *self;
        [user_id, session_id, environment, app_name, current_time, remote_address, hostname]
    }
}

/// Of what is kept.
impl Hash for Context<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.texts(), self.properties).hash(state);
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
            let expect = Context { draw: 0, session_is_made_up: false, ..context };
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
