//! An owned context that outlives its request, for a later evaluation.
//!
//! It does not have the time and the random seed, which belong to each evaluation. Contexts with a
//! generated `sessionId` are valid for one request and are not stored.

use std::hash::{Hash, Hasher};

use jiff::Timestamp;
use smallvec::SmallVec;

use super::context::Context;

/// Maximum length of all texts of a stored context, in bytes.
const MAX_BYTES: usize = 4 << 10;

/// The fields of a [`Context`], owned.
#[derive(Debug)]
pub struct OwnedContext {
    texts: [Option<Box<str>>; 7],
    properties: Box<[(Box<str>, Box<str>)]>,
}

impl OwnedContext {
    /// Copies the fields of a context; `None` if they are too long.
    pub fn from_context(context: &Context<'_>) -> Option<Self> {
        let texts = context.text_fields();
        let length = texts.into_iter().flatten().map(str::len).sum::<usize>()
            + context
                .properties
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>();
        if length > MAX_BYTES {
            return None;
        }
        let properties = context.properties.iter();
        Some(Self {
            texts: texts.map(|text| text.map(Box::from)),
            properties: properties.map(|&(name, value)| (name.into(), value.into())).collect(),
        })
    }

    /// Calls `evaluate` with a context of these fields at the time `now`.
    pub fn with_context_at<T>(
        &self,
        now: Timestamp,
        evaluate: impl FnOnce(&Context<'_>) -> T,
    ) -> T {
        let properties: SmallVec<[_; 16]> =
            self.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        let texts = self.texts.each_ref().map(Option::as_deref);
        let [user_id, session_id, environment, app_name, current_time, remote_address, hostname] =
            texts;
        evaluate(&Context {
            user_id,
            session_id,
            session_is_generated: false,
            environment,
            app_name,
            current_time,
            remote_address,
            properties: &properties,
            hostname,
            now,
            random_seed: 0,
        })
    }
}

impl<'a> Context<'a> {
    /// All fields but the properties, in the order of [`OwnedContext`].
    fn text_fields(&self) -> [Option<&'a str>; 7] {
        let Self { user_id, session_id, environment, app_name, .. } = *self;
        let Self { current_time, remote_address, hostname, .. } = *self;
        [user_id, session_id, environment, app_name, current_time, remote_address, hostname]
    }
}

/// Hashes the fields that [`OwnedContext`] has.
impl Hash for Context<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.text_fields(), self.properties).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::arbitrary::arbitrary_context;

    proptest! {
        #[test]
        fn owned_context_has_the_fields_of_the_context(arbitrary in arbitrary_context()) {
            let context = arbitrary.context();
            let owned = OwnedContext::from_context(&context).unwrap();
            let expect = Context { random_seed: 0, session_is_generated: false, ..context };
            let found = owned.with_context_at(context.now, |it| format!("{it:?}"));
            prop_assert_eq!(found, format!("{expect:?}"));
        }
    }

    #[test]
    fn context_longer_than_the_maximum_is_rejected() {
        let is_accepted = |length: usize| {
            let text = "x".repeat(length);
            OwnedContext::from_context(&Context {
                properties: &[("p", &text)],
                ..Context::default()
            })
            .is_some()
        };
        assert!(is_accepted(MAX_BYTES - 1) && !is_accepted(MAX_BYTES));
    }
}
