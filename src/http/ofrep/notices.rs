//! What a provider's stream tells: that it should ask again.

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

/// Tells when an answer would say something else of the flags to one context.
#[derive(Debug)]
pub struct Notices {
    snapshots: Snapshots,
    asker: Asker,
    /// What the provider has, or has been told to ask for.
    outcome: u128,
    begun: bool,
    wake: Wake,
    /// The provider must ask anew, with all of its context.
    is_over: bool,
}

impl Notices {
    /// Begins where the provider has the answer that `outcome` identifies.
    pub fn new(snapshots: Snapshots, asker: Asker, outcome: u128) -> Self {
        let (begun, wake, is_over) = (false, Wake::default(), false);
        Self { snapshots, asker, outcome, begun, wake, is_over }
    }
}

impl Teller for Notices {
    fn tell(&mut self) -> Option<Piece> {
        let Self { snapshots, asker, outcome, begun, wake, is_over } = self;
        let snapshot = snapshots.load_for(asker.scope())?;
        let view = snapshot.view(&asker.scope().projects);
        let since = wake.set(view.reads(), snapshot.received());
        let Some(question) = asker.question(&snapshot, &view) else {
            *is_over = true;
            return None;
        };
        let now = question.answer(&view, |context| outcome_of(&snapshot, &view, context));
        let is_news = std::mem::replace(outcome, now) != now;
        let is_first = !std::mem::replace(begun, true);
        let id = format_args!("{now:032x}").to_string();
        let (text, told) = match (is_news, is_first) {
            // The id is what a client that comes back names as known.
            (false, true) => (sse::state(&id), Told::Missed),
            (true, true) => (sse::event(ofrep::EVENT, Some(&id), ofrep::REFETCH), Told::Missed),
            (true, false) => {
                (sse::event(ofrep::EVENT, Some(&id), ofrep::REFETCH), Told::Changed(since))
            }
            (false, false) => return None,
        };
        Some(Piece { bytes: Bytes::from(text), told })
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.wake.at()
    }

    fn is_over(&self) -> bool {
        self.is_over
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

    /// Somebody who followed when flags were as in this snapshot.
    fn asker(snapshot: &Snapshot) -> Asker {
        let told = FrontendContext::from_json(br#"{"userId":"7"}"#).unwrap();
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Asker::new(told, client, "here".into(), scope(), 7, snapshot)
    }

    /// What an answer says of the only flag, and what identifies the answer.
    fn answer(snapshots: &Snapshots) -> (Value, u128) {
        let snapshot = snapshots.load_for(&scope()).unwrap();
        let (engine, view) = (snapshot.engine(), snapshot.view(&Projects::All));
        asker(&snapshot).question(&snapshot, &view).unwrap().answer(&view, |context| {
            let id = engine.find("a").unwrap();
            let outcome = engine.evaluate(id, &engine.bind(context));
            let said = json(&evaluation(engine, id, outcome));
            let said = serde_json::from_slice(&said).unwrap();
            (said, outcome_of(&snapshot, &view, context))
        })
    }

    fn swap(snapshots: &Snapshots, fields: &Value) {
        let mut flag = object!({ "name": "a", "project": "one", "enabled": true });
        flag.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let document = Document::parse(object!({ "features": [flag] }).to_string().as_bytes());
        snapshots.swap(Snapshot::build(scope(), document.unwrap(), None));
    }

    #[test]
    fn a_provider_is_sent_to_ask_again_exactly_when_the_answer_says_something_else() {
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
                let (said, outcome) = answer(&snapshots);
                let asker = asker(&snapshots.load_for(&scope()).unwrap());
                let mut notices = Notices::new(snapshots.clone(), asker, outcome);
                let told = notices.tell().map(|piece| piece.told);
                assert_eq!(told, Some(Told::Missed));
                swap(&snapshots, after);
                let (says, now) = answer(&snapshots);
                let is_sent = notices.tell().is_some();
                assert_eq!(is_sent, said != says, "{before} became {after}: {said}, {says}");
                assert!(notices.tell().is_none());
                assert_eq!(now == outcome, said == says);
                if is_sent { changes += 1 } else { others += 1 }
            }
        }
        assert!(changes > 50 && others > states.len(), "{changes} {others}");
    }
}
