//! Streams of evaluated flags: all flags first, then the flags that changed.
//!
//! Subscriptions with equal results share the evaluation and the text of events. Each subscription keeps
//! the flag states that it sent last and computes its deltas from them. Connections and permissions are
//! not handled here.

use std::sync::Arc;

use bytes::Bytes;

use super::answer::{Answer, listed};
use crate::{
    engine::Context,
    snapshot::{Listed, Outcomes, Shown, Snapshot, View, body::Coding},
    wire::sse,
};

/// Event names, the same as for server SDKs.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// The stream of one client's evaluated flags, with what was sent last.
#[derive(Debug)]
pub enum Follower {
    /// Nothing was sent yet. The hash is that of the flags that the client claims to have, if any.
    New(Option<u128>),
    /// These states were sent.
    Told(Arc<Outcomes>),
}

/// The next server-sent event of a subscription.
#[derive(Debug)]
pub enum News {
    /// All flags that are on.
    Whole(Bytes),
    /// The flags that the client has are current.
    Current(Bytes),
    /// The flags that changed, and the names of flags that are off now or gone.
    Changed(Bytes),
}

impl Follower {
    /// Evaluates the flags of `view`, which belongs to `snapshot`, and returns the event that the client
    /// needs; `None` if nothing changed.
    pub fn catch_up(
        &mut self,
        snapshot: &Snapshot,
        view: &View,
        context: &Context<'_>,
    ) -> Option<News> {
        let flags = Answer::of(snapshot, view, context, Shown::Enabled);
        let hash = flags.hash();
        if let Self::Told(before) = self
            && before.hash() == hash
        {
            return None;
        }
        let states = snapshot.answers().outcomes(hash, || outcomes(snapshot, view, context, hash));
        let event = |name: &str, data: &str| -> Bytes {
            sse::event(name, Some(&format_args!("{hash:032x}")), data).into()
        };
        let cache = snapshot.answers();
        let update = match self {
            Self::New(Some(claimed)) if *claimed == hash => {
                News::Current(event(UPDATED, r#"{"toggles":[],"removed":[]}"#))
            }
            Self::New(_) => News::Whole(cache.event((None, hash), || {
                let body = flags.body();
                let body = &body.make(Coding::Identity).bytes;
                event(CONNECTED, &String::from_utf8_lossy(body))
            })),
            Self::Told(before) => News::Changed(cache.event((Some(before.hash()), hash), || {
                event(UPDATED, &states.since(before, snapshot.fragments()))
            })),
        };
        *self = Self::Told(states);
        Some(update)
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

/// Parses the id of an earlier event, which is the hash of its flags.
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

    /// Name, id and data of the only event.
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

        /// Several subscriptions receive several states. Each client has what a request would return.
        #[test]
        fn subscribed_client_has_the_same_flags_as_a_request_returns(
            states in vec(definitions(), 1..5),
            contexts in vec(asking(), 1..4),
        ) {
            let projects = Projects::All;
            let mut subscriptions: Vec<_> =
                contexts.iter().map(|_| (Follower::New(None), BTreeMap::new(), String::new())).collect();
            for state in &states {
                let snapshot = snapshot(state);
                let view = snapshot.view(&projects);
                for (context, (subscription, has, last)) in contexts.iter().zip(&mut subscriptions) {
                    let context = context.context();
                    let flags = Answer::of(&snapshot, &view, &context, Shown::Enabled);
                    let (id, body) = (format!("{:032x}", flags.hash()), flags.body());
                    let body: Value = serde_json::from_slice(&body.make(Coding::Identity).bytes).unwrap();
                    match subscription.catch_up(&snapshot, &view, &context) {
                        None => {}
                        Some(News::Whole(bytes)) => {
                            let (name, id, data) = read(&bytes);
                            prop_assert_eq!(name, CONNECTED);
                            (*has, *last) = (by_name(&data), id);
                        }
                        Some(News::Changed(bytes)) => {
                            let (name, id, data) = read(&bytes);
                            prop_assert_eq!(name, UPDATED);
                            for gone in data["removed"].as_array().unwrap() {
                                prop_assert!(has.remove(gone.as_str().unwrap()).is_some());
                            }
                            let changed = by_name(&data);
                            prop_assert!(changed.iter().all(|(name, it)| has.get(name) != Some(it)));
                            has.extend(changed);
                            *last = id;
                        }
                        Some(News::Current(_)) => prop_assert!(false, "the client claimed no flags"),
                    }
                    prop_assert_eq!(&*has, &by_name(&body));
                    prop_assert_eq!(&*last, &id);
                    prop_assert!(subscription.catch_up(&snapshot, &view, &context).is_none());
                    // A client that reconnects with the current id gets `Unchanged`, else a snapshot.
                    let mut back = Follower::New(parse_id(&id));
                    let update = back.catch_up(&snapshot, &view, &context);
                    prop_assert!(matches!(update, Some(News::Current(_))), "{:?}", update);
                    let mut other = Follower::New(Some(unknown_id()));
                    let update = other.catch_up(&snapshot, &view, &context);
                    prop_assert!(matches!(update, Some(News::Whole(_))), "{:?}", update);
                }
            }
        }
    }

    fn unknown_id() -> u128 {
        parse_id("0123456789abcdef0123456789abcdef").unwrap()
    }

    #[test]
    fn subscriptions_with_equal_results_share_event_bytes() {
        let flag = |enabled: bool| {
            let strategies = json!([{ "name": "default" }]);
            json!([{ "name": "a", "enabled": enabled, "strategies": strategies }])
        };
        let states = [true, false].map(|enabled| snapshot(&(flag(enabled), json!([]))));
        let mut subscriptions = [Follower::New(None), Follower::New(None)];
        for state in &states {
            let view = state.view(&Projects::All);
            let updates =
                subscriptions.each_mut().map(|it| it.catch_up(state, &view, &Context::default()));
            let bytes = updates.map(|update| match update {
                Some(News::Whole(bytes) | News::Changed(bytes)) => bytes,
                other => panic!("{other:?}"),
            });
            assert_eq!(bytes[0].as_ptr(), bytes[1].as_ptr());
        }
    }

    #[test]
    fn malformed_event_ids_are_rejected() {
        for text in
            ["", "1", "g123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef0"]
        {
            assert_eq!(parse_id(text), None, "{text}");
        }
    }
}
