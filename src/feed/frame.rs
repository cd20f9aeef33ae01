//! An update: the changes that bring a subscriber from one state to another.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::time::Instant;

use super::{log::State, topic::Topic};
use crate::{
    snapshot::{body::Body, body::Coding, cut},
    wire::{
        delta::{self, Change, Event, EventId},
        sse,
    },
};

/// Event names that SDKs expect.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// The kind of an update.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum News {
    /// Nothing in the subscription's scope has changed.
    Nothing,
    /// Changed flags and segments only.
    Changes,
    /// The whole state.
    Everything,
}

/// The changes from one state to another within a subscription's scope: `{"events":[…]}`.
#[derive(Debug)]
pub struct Frame {
    id: EventId,
    news: News,
    told: Instant,
    body: Arc<Body>,
    connected: OnceLock<Bytes>,
    updated: OnceLock<Bytes>,
}

impl Frame {
    pub(super) fn of(key: &Topic, from: Option<&State>, to: &State) -> Self {
        let cut = |state: &State| cut(&state.document, &key.projects, &key.filter);
        let (kind, changes) = match from {
            None => (News::Everything, vec![Change::Hydration(cut(to))]),
            Some(from) if from.number == to.number => (News::Nothing, vec![]),
            Some(from) => {
                let changes = delta::diff(&cut(from), &cut(to));
                (if changes.is_empty() { News::Nothing } else { News::Changes }, changes)
            }
        };
        let event_id = key.id(to.number);
        let events: Vec<_> =
            changes.into_iter().map(|change| Event { id: event_id, change }).collect();
        let body = Arc::new(Body::new(delta::encode(&events).into()));
        let (connected_event, updated_event) = Default::default();
        Self {
            id: event_id,
            news: kind,
            told: to.told,
            body,
            connected: connected_event,
            updated: updated_event,
        }
    }

    /// The event id of the state that it leads to.
    pub fn id(&self) -> EventId {
        self.id
    }

    /// The kind of the update.
    pub fn news(&self) -> News {
        self.news
    }

    /// When the source sent the state.
    pub fn told(&self) -> Instant {
        self.told
    }

    /// The events as a body.
    pub fn body(&self) -> &Arc<Body> {
        &self.body
    }

    /// The events as uncompressed JSON.
    pub fn json(&self) -> &[u8] {
        &self.body.make(Coding::Identity).bytes
    }

    /// The server-sent event with which a stream begins.
    pub fn connected(&self) -> Bytes {
        self.connected.get_or_init(|| self.event(CONNECTED)).clone()
    }

    /// The server-sent event for a stream that is connected already.
    pub fn updated(&self) -> Bytes {
        self.updated.get_or_init(|| self.event(UPDATED)).clone()
    }

    fn event(&self, name: &str) -> Bytes {
        // Never lossy: the text of flags was read from UTF-8.
        let json = String::from_utf8_lossy(self.json());
        sse::event(name, Some(&self.id), &json).into()
    }

    /// Its maximum memory in bytes. Counts one of the two events, because both are hardly ever written.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + self.body.weight() + self.json().len()
    }
}
