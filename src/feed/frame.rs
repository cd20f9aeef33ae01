//! What somebody is told who comes from one state and is to reach another.

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

/// The names under which SDKs expect events.
const CONNECTED: &str = "unleash-connected";
const UPDATED: &str = "unleash-updated";

/// How much a frame tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum News {
    /// What the topic shows has not changed.
    Nothing,
    /// What has changed.
    Changes,
    /// The whole state.
    Everything,
}

/// What leads from one state of a topic to another: `{"events":[…]}`.
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
    pub(super) fn of(topic: &Topic, from: Option<&State>, to: &State) -> Self {
        let cut = |state: &State| cut(&state.document, &topic.projects, &topic.filter);
        let (news, changes) = match from {
            None => (News::Everything, vec![Change::Hydration(cut(to))]),
            Some(from) if from.number == to.number => (News::Nothing, vec![]),
            Some(from) => {
                let changes = delta::diff(&cut(from), &cut(to));
                (if changes.is_empty() { News::Nothing } else { News::Changes }, changes)
            }
        };
        let id = topic.id(to.number);
        let events: Vec<_> = changes.into_iter().map(|change| Event { id, change }).collect();
        let body = Arc::new(Body::new(delta::encode(&events).into()));
        let (connected, updated) = Default::default();
        Self { id, news, told: to.told, body, connected, updated }
    }

    /// The id of the state that it leads to.
    pub fn id(&self) -> EventId {
        self.id
    }

    /// How much it tells.
    pub fn news(&self) -> News {
        self.news
    }

    /// When the state's source told it.
    pub fn told(&self) -> Instant {
        self.told
    }

    /// The events as a body.
    pub fn body(&self) -> &Arc<Body> {
        &self.body
    }

    /// The events as they are.
    pub fn json(&self) -> &[u8] {
        &self.body.make(Coding::Identity).bytes
    }

    /// The events as the first that a stream tells.
    pub fn connected(&self) -> Bytes {
        self.connected.get_or_init(|| self.event(CONNECTED)).clone()
    }

    /// The events as a stream tells them later.
    pub fn updated(&self) -> Bytes {
        self.updated.get_or_init(|| self.event(UPDATED)).clone()
    }

    fn event(&self, name: &str) -> Bytes {
        // Flags' text was read from UTF-8.
        let json = String::from_utf8_lossy(self.json());
        sse::event(name, Some(&self.id), &json).into()
    }

    /// The memory that it may come to hold, in bytes: of each frame either event is made, hardly
    /// ever both.
    pub(super) fn weight(&self) -> usize {
        size_of::<Self>() + self.body.weight() + self.json().len()
    }
}
