//! Evaluated flags for those who follow them: everything first, then what has changed for them.
//!
//! Those who see the same share the evaluation and the text; what is told to somebody depends on what
//! they were told before, which each keeps for themselves.

use std::sync::Arc;

use bytes::Bytes;

use super::answer::{Answer, listed};
use crate::{
    engine::Context,
    snapshot::{Listed, Outcomes, Shown, Snapshot, View, body::Coding},
    wire::sse,
};

/// The names of events, those that server SDKs know.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// What somebody was told last.
#[derive(Debug)]
pub enum Follower {
    /// Nothing by us; perhaps what the client says that it has.
    New(Option<u128>),
    /// These.
    Told(Arc<Outcomes>),
}

/// What somebody is told now, as a server-sent event.
#[derive(Debug)]
pub enum News {
    /// All flags that are on.
    Whole(Bytes),
    /// That what the client has is current.
    Current(Bytes),
    /// The flags that came to something else, and the names of those that are on no more.
    Changed(Bytes),
}

impl Follower {
    /// Tells what there is to tell of the flags of `view`, which is one of the snapshot's, for a
    /// context.
    pub fn catch_up(
        &mut self,
        snapshot: &Snapshot,
        view: &View,
        context: &Context<'_>,
    ) -> Option<News> {
        let answer = Answer::of(snapshot, view, context, Shown::Enabled);
        let hash = answer.hash();
        if let Self::Told(before) = self
            && before.hash() == hash
        {
            return None;
        }
        let outcomes =
            snapshot.answers().outcomes(hash, || outcomes(snapshot, view, context, hash));
        let event = |name: &str, data: &str| -> Bytes {
            sse::event(name, Some(&format_args!("{hash:032x}")), data).into()
        };
        let texts = snapshot.answers();
        let news = match self {
            Self::New(Some(has)) if *has == hash => {
                News::Current(event(UPDATED, r#"{"toggles":[],"removed":[]}"#))
            }
            Self::New(_) => News::Whole(texts.event((None, hash), || {
                let body = answer.body();
                let body = &body.make(Coding::Identity).bytes;
                event(CONNECTED, &String::from_utf8_lossy(body))
            })),
            Self::Told(before) => News::Changed(texts.event((Some(before.hash()), hash), || {
                event(UPDATED, &outcomes.since(before, snapshot.fragments()))
            })),
        };
        *self = Self::Told(outcomes);
        Some(news)
    }
}

fn outcomes(snapshot: &Snapshot, view: &View, context: &Context<'_>, hash: u128) -> Outcomes {
    let (engine, fragments) = (snapshot.engine(), snapshot.fragments());
    let mut flags = Vec::new();
    let values = engine.read(context);
    listed(snapshot, view, values, Shown::Enabled, |fragment| {
        let name = Arc::clone(engine.flags()[fragments.flag(fragment)].name());
        flags.push(Listed { name, hash: fragments.get(fragment).hash(), fragment });
    });
    Outcomes::new(hash, flags)
}

/// Reads what an earlier event was identified by.
pub fn parse_id(text: &str) -> Option<u128> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        engine::arbitrary::{asking, definitions},
        token::{Environment, Projects, Scope},
        wire::{features::Document, sse::Decoder},
    };

    fn snapshot((features, segments): &(Value, Value)) -> Snapshot {
        let text = json!({ "features": features, "segments": segments }).to_string();
        let document = Document::parse(text.as_bytes()).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        Snapshot::build(scope, document, None)
    }

    /// What the events of a stream are, with the id that the last has.
    fn read(bytes: &[u8]) -> (String, String, Value) {
        let mut events = Vec::new();
        Decoder::new(1 << 20).read(bytes, |event| events.push(event)).unwrap();
        let [event] = &events[..] else { panic!("{events:?}") };
        (event.name.clone(), event.id.clone(), serde_json::from_str(&event.data).unwrap())
    }

    fn by_name(toggles: &Value) -> BTreeMap<String, Value> {
        let toggles = toggles["toggles"].as_array().unwrap().iter();
        toggles.map(|it| (it["name"].as_str().unwrap().to_owned(), it.clone())).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

        /// Several follow through several states; each has what a question of theirs would bring.
        #[test]
        fn whoever_follows_has_what_they_would_be_answered(
            states in vec(definitions(), 1..5),
            askings in vec(asking(), 1..4),
        ) {
            let projects = Projects::All;
            let mut followers: Vec<_> =
                askings.iter().map(|_| (Follower::New(None), BTreeMap::new(), String::new())).collect();
            for state in &states {
                let snapshot = snapshot(state);
                let view = snapshot.view(&projects);
                for (asking, (follower, has, last)) in askings.iter().zip(&mut followers) {
                    let context = asking.context();
                    let answer = Answer::of(&snapshot, &view, &context, Shown::Enabled);
                    let (id, body) = (format!("{:032x}", answer.hash()), answer.body());
                    let body: Value = serde_json::from_slice(&body.make(Coding::Identity).bytes).unwrap();
                    match follower.catch_up(&snapshot, &view, &context) {
                        None => {}
                        Some(News::Whole(bytes)) => {
                            let (name, id, told) = read(&bytes);
                            prop_assert_eq!(name, CONNECTED);
                            (*has, *last) = (by_name(&told), id);
                        }
                        Some(News::Changed(bytes)) => {
                            let (name, id, told) = read(&bytes);
                            prop_assert_eq!(name, UPDATED);
                            for gone in told["removed"].as_array().unwrap() {
                                prop_assert!(has.remove(gone.as_str().unwrap()).is_some());
                            }
                            let told = by_name(&told);
                            prop_assert!(told.iter().all(|(name, it)| has.get(name) != Some(it)));
                            has.extend(told);
                            *last = id;
                        }
                        Some(News::Current(_)) => prop_assert!(false, "nothing was named as known"),
                    }
                    prop_assert_eq!(&*has, &by_name(&body));
                    prop_assert_eq!(&*last, &id);
                    prop_assert!(follower.catch_up(&snapshot, &view, &context).is_none());
                    // Who comes back and has it all is told so; who has something else is told all.
                    let mut back = Follower::New(parse_id(&id));
                    let told = back.catch_up(&snapshot, &view, &context);
                    prop_assert!(matches!(told, Some(News::Current(_))), "{:?}", told);
                    let mut stranger = Follower::New(Some(answer_of_nobody()));
                    let told = stranger.catch_up(&snapshot, &view, &context);
                    prop_assert!(matches!(told, Some(News::Whole(_))), "{:?}", told);
                }
            }
        }
    }

    fn answer_of_nobody() -> u128 {
        parse_id("0123456789abcdef0123456789abcdef").unwrap()
    }

    #[test]
    fn those_who_see_the_same_are_told_by_the_same_bytes() {
        let flag = |enabled: bool| {
            let strategies = json!([{ "name": "default" }]);
            json!([{ "name": "a", "enabled": enabled, "strategies": strategies }])
        };
        let states = [true, false].map(|enabled| snapshot(&(flag(enabled), json!([]))));
        let mut followers = [Follower::New(None), Follower::New(None)];
        for state in &states {
            let view = state.view(&Projects::All);
            let told =
                followers.each_mut().map(|it| it.catch_up(state, &view, &Context::default()));
            let bytes = told.map(|news| match news {
                Some(News::Whole(bytes) | News::Changed(bytes)) => bytes,
                other => panic!("{other:?}"),
            });
            assert_eq!(bytes[0].as_ptr(), bytes[1].as_ptr());
        }
    }

    #[test]
    fn only_ids_of_ours_are_read() {
        for text in
            ["", "1", "g123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef0"]
        {
            assert_eq!(parse_id(text), None, "{text}");
        }
    }
}
