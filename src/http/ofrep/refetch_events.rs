//! Event source of an OpenFeature provider's stream: events that tell it to evaluate its flags again.

use bytes::Bytes;
use tokio::time::Instant;

use super::evaluation::hash_outcomes;
use crate::{
    http::{
        frontend_api::{DateTrigger, Subscriber},
        streaming::{ChunkKind, EventSource, SseChunk},
    },
    protocol::{ofrep, sse},
    served::Snapshots,
};

/// Sends an event whenever the evaluated flags of one context change.
#[derive(Debug)]
pub struct RefetchEvents {
    snapshots: Snapshots,
    subscriber: Subscriber,
    /// Identifies the flags that the provider has, or was told to fetch.
    outcome_hash: u128,
    has_started: bool,
    date_trigger: DateTrigger,
    /// The provider must evaluate again, with its full context.
    needs_reconnect: bool,
}

impl RefetchEvents {
    /// Starts with a provider whose flags have the hash `outcome`.
    pub fn new(snapshots: Snapshots, subscriber: Subscriber, outcome_hash: u128) -> Self {
        let (has_started, date_trigger, needs_reconnect) = (false, DateTrigger::default(), false);
        Self { snapshots, subscriber, outcome_hash, has_started, date_trigger, needs_reconnect }
    }
}

impl EventSource for RefetchEvents {
    fn try_next_event(&mut self) -> Option<SseChunk> {
        let Self {
            snapshots,
            subscriber,
            outcome_hash,
            has_started,
            date_trigger,
            needs_reconnect,
        } = self;
        let snapshot = snapshots.load_for_scope(subscriber.scope())?;
        let view = snapshot.frontend_view(&subscriber.scope().projects);
        let since = date_trigger.reschedule(view.inputs(), snapshot.received_at());
        let Some(request) = subscriber.evaluation_request(&snapshot, &view) else {
            *needs_reconnect = true;
            return None;
        };
        let now = request.with_context(&view, |context| hash_outcomes(&snapshot, &view, context));
        let has_changed = std::mem::replace(outcome_hash, now) != now;
        let is_first = !std::mem::replace(has_started, true);
        let id = format_args!("{now:032x}").to_string();
        let (text, kind) = match (has_changed, is_first) {
            // A reconnecting client sends the id of its last event.
            (false, true) => (sse::encode_id(&id), ChunkKind::Replay),
            (true, true) => (
                sse::encode_event(ofrep::EVENT_NAME, Some(&id), ofrep::REFETCH_EVENT_DATA),
                ChunkKind::Replay,
            ),
            (true, false) => (
                sse::encode_event(ofrep::EVENT_NAME, Some(&id), ofrep::REFETCH_EVENT_DATA),
                ChunkKind::Changes(since),
            ),
            (false, false) => return None,
        };
        Some(SseChunk { bytes: Bytes::from(text), kind })
    }

    fn next_reevaluation_at(&self) -> Option<Instant> {
        self.date_trigger.deadline()
    }

    fn is_finished(&self) -> bool {
        self.needs_reconnect
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use serde_json::{Value, json as object};

    use super::{
        super::evaluation::{to_evaluation, to_json},
        *,
    };
    use crate::{
        protocol::{context::FrontendContext, features::Document},
        served::ServedSnapshot,
        token::{Environment, Projects, Scope},
    };

    fn scope() -> Scope {
        Scope { environment: Environment::new("dev"), projects: Projects::All }
    }

    /// A subscriber since this snapshot.
    fn subscriber(snapshot: &ServedSnapshot) -> Subscriber {
        let sent = FrontendContext::from_json(br#"{"userId":"7"}"#).unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Subscriber::new(sent, client, "here".into(), scope(), 7, snapshot)
    }

    /// The evaluation of the only flag, and the outcome hash.
    fn evaluated(snapshots: &Snapshots) -> (Value, u128) {
        let snapshot = snapshots.load_for_scope(&scope()).unwrap();
        let (engine, view) = (snapshot.engine(), snapshot.frontend_view(&Projects::All));
        subscriber(&snapshot).evaluation_request(&snapshot, &view).unwrap().with_context(
            &view,
            |context| {
                let id = engine.find("a").unwrap();
                let outcome = engine.evaluate(id, &engine.bind(context));
                let flag = to_json(&to_evaluation(engine, id, outcome));
                let flag = serde_json::from_slice(&flag).unwrap();
                (flag, hash_outcomes(&snapshot, &view, context))
            },
        )
    }

    fn swap(snapshots: &Snapshots, fields: &Value) {
        let mut flag = object!({ "name": "a", "project": "one", "enabled": true });
        flag.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let document = Document::parse(object!({ "features": [flag] }).to_string().as_bytes());
        snapshots.swap(ServedSnapshot::build(scope(), document.unwrap(), None));
    }

    #[test]
    fn refetch_event_is_sent_exactly_when_the_evaluation_changes() {
        let variant = |payload: bool| {
            let payload = payload.then(|| object!({ "type": "string", "value": "x" }));
            let variant = object!({ "name": "v", "weight": 1000, "stickiness": "default" });
            payload.into_iter().fold(variant, |mut variant, payload| {
                variant["payload"] = payload;
                variant
            })
        };
        let for_user = |id| object!([{ "name": "userWithId", "parameters": { "userIds": id } }]);
        let with_variant = |id, payload| object!([{ "name": "userWithId", "parameters": { "userIds": id }, "variants": [variant(payload)] }]);
        let everybody = object!([{ "name": "default" }]);
        let split = object!([{ "name": "flexibleRollout", "parameters": { "rollout": "0", "stickiness": "userId", "groupId": "g" } }]);
        let states = [
            object!({ "strategies": everybody }),
            object!({ "strategies": for_user("7") }),
            object!({ "strategies": everybody, "project": "two" }),
            object!({ "strategies": everybody, "impressionData": true }),
            object!({ "enabled": false, "strategies": everybody }),
            object!({ "enabled": false, "strategies": everybody, "variants": [variant(false)] }),
            object!({ "enabled": false, "strategies": everybody, "variants": [variant(true)] }),
            object!({ "strategies": everybody, "variants": [variant(true)] }),
            object!({ "strategies": for_user("8") }),
            object!({ "strategies": split }),
            object!({ "strategies": with_variant("8", false) }),
            object!({ "strategies": with_variant("8", true) }),
            object!({ "strategies": for_user("8"), "description": "of no interest" }),
        ];
        let (mut changes, mut others) = (0, 0);
        for before in &states {
            for after in &states {
                let snapshots = Snapshots::default();
                swap(&snapshots, before);
                let (old, outcome) = evaluated(&snapshots);
                let subscriber = subscriber(&snapshots.load_for_scope(&scope()).unwrap());
                let mut events = RefetchEvents::new(snapshots.clone(), subscriber, outcome);
                let kind = events.try_next_event().map(|chunk| chunk.kind);
                assert_eq!(kind, Some(ChunkKind::Replay));
                swap(&snapshots, after);
                let (new, now) = evaluated(&snapshots);
                let is_sent = events.try_next_event().is_some();
                assert_eq!(is_sent, old != new, "{before} became {after}: {old}, {new}");
                assert!(events.try_next_event().is_none());
                assert_eq!(now == outcome, old == new);
                if is_sent { changes += 1 } else { others += 1 }
            }
        }
        assert!(changes > 50 && others > states.len(), "{changes} {others}");
    }
}
