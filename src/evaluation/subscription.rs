//! Streams of evaluated flags: all flags first, then the flags that changed.
//!
//! Subscriptions with equal results share the evaluation and the text of events. Each subscription keeps
//! the flag states that it sent last and computes its deltas from them. Connections and permissions are
//! not handled here.

use std::sync::Arc;

use bytes::Bytes;

use super::cached_evaluation::{EvaluatedFlags, for_each_flag};
use crate::{
    engine::Context,
    protocol::sse,
    served::ServedSnapshot,
    snapshot::{
        FlagState, FlagStates, FrontendView, Include, Snapshot, prepared_body::ContentCoding,
    },
};

/// Event names, the same as for server SDKs.
const CONNECTED_EVENT: &str = "unleash-connected";
const UPDATED_EVENT: &str = "unleash-updated";

/// The stream of one client's evaluated flags, with what was sent last.
#[derive(Debug)]
pub enum Subscription {
    /// Nothing was sent yet. The hash is that of the flags that the client claims to have, if any.
    New(Option<u128>),
    /// These states were sent.
    Sent(Arc<FlagStates>),
}

/// The next server-sent event of a subscription.
#[derive(Debug)]
pub enum FrontendUpdate {
    /// All flags that are on.
    Snapshot(Bytes),
    /// The flags that the client has are current.
    Unchanged(Bytes),
    /// The flags that changed, and the names of flags that are off now or were removed.
    Delta(Bytes),
}

impl Subscription {
    /// Evaluates the flags of `view`, which belongs to `snapshot`, and returns the event that the client
    /// needs; `None` if nothing changed.
    pub fn next_update(
        &mut self,
        snapshot: &ServedSnapshot,
        view: &FrontendView,
        context: &Context<'_>,
    ) -> Option<FrontendUpdate> {
        let flags = EvaluatedFlags::evaluate(snapshot, view, context, Include::Enabled);
        let hash = flags.hash();
        if let Self::Sent(before) = self
            && before.hash() == hash
        {
            return None;
        }
        let states = snapshot
            .evaluation_cache()
            .flag_states(hash, || flag_states(snapshot, view, context, hash));
        let event = |name: &str, data: &str| -> Bytes {
            sse::encode_event(name, Some(&format_args!("{hash:032x}")), data).into()
        };
        let cache = snapshot.evaluation_cache();
        let update = match self {
            Self::New(Some(claimed)) if *claimed == hash => {
                FrontendUpdate::Unchanged(event(UPDATED_EVENT, r#"{"toggles":[],"removed":[]}"#))
            }
            Self::New(_) => FrontendUpdate::Snapshot(cache.event((None, hash), || {
                let body = flags.body();
                let body = &body.get_or_encode(ContentCoding::Identity).bytes;
                event(CONNECTED_EVENT, &String::from_utf8_lossy(body))
            })),
            Self::Sent(before) => {
                FrontendUpdate::Delta(cache.event((Some(before.hash()), hash), || {
                    event(UPDATED_EVENT, &states.delta_since(before, snapshot.fragments()))
                }))
            }
        };
        *self = Self::Sent(states);
        Some(update)
    }
}

fn flag_states(
    snapshot: &Snapshot,
    view: &FrontendView,
    context: &Context<'_>,
    hash: u128,
) -> FlagStates {
    let (engine, fragments) = (snapshot.engine(), snapshot.fragments());
    let mut flags = Vec::new();
    let values = engine.read_context(context);
    for_each_flag(snapshot, view, values, Include::Enabled, |fragment| {
        let name = Arc::clone(engine.flags()[fragments.flag_index(fragment)].name());
        flags.push(FlagState { name, hash: fragments.get(fragment).hash(), fragment });
    });
    FlagStates::new(hash, flags)
}

/// Parses the id of an earlier event, which is the hash of its flags.
pub fn parse_event_id(text: &str) -> Option<u128> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        engine::arbitrary::{arbitrary_context, arbitrary_definitions},
        protocol::{features::Document, sse::Decoder},
        token::{Environment, Projects, Scope},
    };

    fn snapshot((features, segments): &(Value, Value)) -> ServedSnapshot {
        let text = json!({ "features": features, "segments": segments }).to_string();
        let document = Document::parse(text.as_bytes()).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        ServedSnapshot::build(scope, document, None)
    }

    /// Name, id and data of the only event.
    fn read(bytes: &[u8]) -> (String, String, Value) {
        let mut events = Vec::new();
        Decoder::new(1 << 20).decode(bytes, |event| events.push(event)).unwrap();
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
            states in vec(arbitrary_definitions(), 1..5),
            contexts in vec(arbitrary_context(), 1..4),
        ) {
            let projects = Projects::All;
            let mut subscriptions: Vec<_> =
                contexts.iter().map(|_| (Subscription::New(None), BTreeMap::new(), String::new())).collect();
            for state in &states {
                let snapshot = snapshot(state);
                let view = snapshot.frontend_view(&projects);
                for (context, (subscription, has, last)) in contexts.iter().zip(&mut subscriptions) {
                    let context = context.context();
                    let flags = EvaluatedFlags::evaluate(&snapshot, &view, &context, Include::Enabled);
                    let (id, body) = (format!("{:032x}", flags.hash()), flags.body());
                    let body: Value = serde_json::from_slice(&body.get_or_encode(ContentCoding::Identity).bytes).unwrap();
                    match subscription.next_update(&snapshot, &view, &context) {
                        None => {}
                        Some(FrontendUpdate::Snapshot(bytes)) => {
                            let (name, id, data) = read(&bytes);
                            prop_assert_eq!(name, CONNECTED_EVENT);
                            (*has, *last) = (by_name(&data), id);
                        }
                        Some(FrontendUpdate::Delta(bytes)) => {
                            let (name, id, data) = read(&bytes);
                            prop_assert_eq!(name, UPDATED_EVENT);
                            for gone in data["removed"].as_array().unwrap() {
                                prop_assert!(has.remove(gone.as_str().unwrap()).is_some());
                            }
                            let changed = by_name(&data);
                            prop_assert!(changed.iter().all(|(name, it)| has.get(name) != Some(it)));
                            has.extend(changed);
                            *last = id;
                        }
                        Some(FrontendUpdate::Unchanged(_)) => prop_assert!(false, "the client claimed no flags"),
                    }
                    prop_assert_eq!(&*has, &by_name(&body));
                    prop_assert_eq!(&*last, &id);
                    prop_assert!(subscription.next_update(&snapshot, &view, &context).is_none());
                    // A client that reconnects with the current id gets `Unchanged`, else a snapshot.
                    let mut back = Subscription::New(parse_event_id(&id));
                    let update = back.next_update(&snapshot, &view, &context);
                    prop_assert!(matches!(update, Some(FrontendUpdate::Unchanged(_))), "{:?}", update);
                    let mut other = Subscription::New(Some(unknown_id()));
                    let update = other.next_update(&snapshot, &view, &context);
                    prop_assert!(matches!(update, Some(FrontendUpdate::Snapshot(_))), "{:?}", update);
                }
            }
        }
    }

    fn unknown_id() -> u128 {
        parse_event_id("0123456789abcdef0123456789abcdef").unwrap()
    }

    #[test]
    fn subscriptions_with_equal_results_share_event_bytes() {
        let flag = |enabled: bool| {
            let strategies = json!([{ "name": "default" }]);
            json!([{ "name": "a", "enabled": enabled, "strategies": strategies }])
        };
        let states = [true, false].map(|enabled| snapshot(&(flag(enabled), json!([]))));
        let mut subscriptions = [Subscription::New(None), Subscription::New(None)];
        for state in &states {
            let view = state.frontend_view(&Projects::All);
            let updates = subscriptions
                .each_mut()
                .map(|it| it.next_update(state, &view, &Context::default()));
            let bytes = updates.map(|update| match update {
                Some(FrontendUpdate::Snapshot(bytes) | FrontendUpdate::Delta(bytes)) => bytes,
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
            assert_eq!(parse_event_id(text), None, "{text}");
        }
    }
}
