//! Event source of an OpenFeature provider's stream: events that tell it to evaluate its flags again.

use bytes::Bytes;
use tokio::time::Instant;

use super::evaluation::outcome_of;
use crate::{
    http::{
        frontend::{Asker, Wake},
        streaming::{Piece, Teller, Told},
    },
    snapshot::Snapshots,
    wire::{ofrep, sse},
};

/// Sends an event whenever the evaluated flags of one context change.
#[derive(Debug)]
pub struct Notices {
    snapshots: Snapshots,
    asker: Asker,
    /// Identifies the flags that the provider has, or was told to fetch.
    outcome: u128,
    begun: bool,
    wake: Wake,
    /// The provider must evaluate again, with its full context.
    needs_reconnect: bool,
}

impl Notices {
    /// Starts with a provider whose flags have the hash `outcome`.
    pub fn new(snapshots: Snapshots, asker: Asker, outcome: u128) -> Self {
        let (begun, wake, needs_reconnect) = (false, Wake::default(), false);
        Self { snapshots, asker, outcome, begun, wake, needs_reconnect }
    }
}

impl Teller for Notices {
    fn tell(&mut self) -> Option<Piece> {
        let Self { snapshots, asker, outcome, begun, wake, needs_reconnect } = self;
        let snapshot = snapshots.load_for(asker.scope())?;
        let view = snapshot.frontend_view(&asker.scope().projects);
        let since = wake.set(view.inputs(), snapshot.received_at());
        let Some(question) = asker.question(&snapshot, &view) else {
            *needs_reconnect = true;
            return None;
        };
        let now = question.answer(&view, |context| outcome_of(&snapshot, &view, context));
        let has_changed = std::mem::replace(outcome, now) != now;
        let is_first = !std::mem::replace(begun, true);
        let id = format_args!("{now:032x}").to_string();
        let (text, kind) = match (has_changed, is_first) {
            // A reconnecting client sends the id of its last event.
            (false, true) => (sse::state(&id), Told::Missed),
            (true, true) => (sse::event(ofrep::EVENT, Some(&id), ofrep::REFETCH), Told::Missed),
            (true, false) => {
                (sse::event(ofrep::EVENT, Some(&id), ofrep::REFETCH), Told::Changed(since))
            }
            (false, false) => return None,
        };
        Some(Piece { bytes: Bytes::from(text), told: kind })
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.wake.at()
    }

    fn is_over(&self) -> bool {
        self.needs_reconnect
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use serde_json::{Value, json as object};

    use super::{
        super::evaluation::{evaluation, json},
        *,
    };
    use crate::{
        snapshot::Snapshot,
        token::{Environment, Projects, Scope},
        wire::{context::FrontendContext, features::Document},
    };

    fn scope() -> Scope {
        Scope { environment: Environment::new("dev"), projects: Projects::All }
    }

    /// A subscriber since this snapshot.
    fn subscriber(snapshot: &Snapshot) -> Asker {
        let sent = FrontendContext::from_json(br#"{"userId":"7"}"#).unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Asker::new(sent, client, "here".into(), scope(), 7, snapshot)
    }

    /// The evaluation of the only flag, and the outcome hash.
    fn evaluated(snapshots: &Snapshots) -> (Value, u128) {
        let snapshot = snapshots.load_for(&scope()).unwrap();
        let (engine, view) = (snapshot.engine(), snapshot.frontend_view(&Projects::All));
        subscriber(&snapshot).question(&snapshot, &view).unwrap().answer(&view, |context| {
            let id = engine.find("a").unwrap();
            let outcome = engine.evaluate(id, &engine.bind(context));
            let flag = json(&evaluation(engine, id, outcome));
            let flag = serde_json::from_slice(&flag).unwrap();
            (flag, outcome_of(&snapshot, &view, context))
        })
    }

    fn swap(snapshots: &Snapshots, fields: &Value) {
        let mut flag = object!({ "name": "a", "project": "one", "enabled": true });
        flag.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let document = Document::parse(object!({ "features": [flag] }).to_string().as_bytes());
        snapshots.swap(Snapshot::build(scope(), document.unwrap(), None));
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
                let subscriber = subscriber(&snapshots.load_for(&scope()).unwrap());
                let mut events = Notices::new(snapshots.clone(), subscriber, outcome);
                let kind = events.tell().map(|chunk| chunk.told);
                assert_eq!(kind, Some(Told::Missed));
                swap(&snapshots, after);
                let (new, now) = evaluated(&snapshots);
                let is_sent = events.tell().is_some();
                assert_eq!(is_sent, old != new, "{before} became {after}: {old}, {new}");
                assert!(events.tell().is_none());
                assert_eq!(now == outcome, old == new);
                if is_sent { changes += 1 } else { others += 1 }
            }
        }
        assert!(changes > 50 && others > states.len(), "{changes} {others}");
    }
}
