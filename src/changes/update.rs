//! An update: the changes that bring a subscriber from one state to another.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::time::Instant;

use super::{history::State, subscription_key::SubscriptionKey};
use crate::{
    protocol::{
        delta::{self, Change, DeltaEvent, EventId},
        sse,
    },
    snapshot::{filter_document, prepared_body::ContentCoding, prepared_body::PreparedBody},
};

/// Event names that SDKs expect.
const CONNECTED_EVENT: &str = "unleash-connected";
const UPDATED_EVENT: &str = "unleash-updated";

/// The kind of an update.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UpdateKind {
    /// Nothing in the subscription's scope has changed.
    Unchanged,
    /// Changed flags and segments only.
    Delta,
    /// The whole state.
    Snapshot,
}

/// The changes from one state to another within a subscription's scope: `{"events":[…]}`.
#[derive(Debug)]
pub struct Update {
    event_id: EventId,
    kind: UpdateKind,
    received_at: Instant,
    body: Arc<PreparedBody>,
    connected_event: OnceLock<Bytes>,
    updated_event: OnceLock<Bytes>,
}

impl Update {
    pub(super) fn build(key: &SubscriptionKey, from: Option<&State>, to: &State) -> Self {
        let cut = |state: &State| filter_document(&state.document, &key.projects, &key.filter);
        let (kind, changes) = match from {
            None => (UpdateKind::Snapshot, vec![Change::Hydration(cut(to))]),
            Some(from) if from.id == to.id => (UpdateKind::Unchanged, vec![]),
            Some(from) => {
                let changes = delta::diff(&cut(from), &cut(to));
                (
                    if changes.is_empty() { UpdateKind::Unchanged } else { UpdateKind::Delta },
                    changes,
                )
            }
        };
        let event_id = key.event_id(to.id);
        let events: Vec<_> =
            changes.into_iter().map(|change| DeltaEvent { id: event_id, change }).collect();
        let body = Arc::new(PreparedBody::new(delta::encode(&events).into()));
        let (connected_event, updated_event) = Default::default();
        Self { event_id, kind, received_at: to.received_at, body, connected_event, updated_event }
    }

    /// The event id of the state that it leads to.
    pub fn event_id(&self) -> EventId {
        self.event_id
    }

    /// The kind of the update.
    pub fn kind(&self) -> UpdateKind {
        self.kind
    }

    /// When the source sent the state.
    pub fn received_at(&self) -> Instant {
        self.received_at
    }

    /// The events as a body.
    pub fn body(&self) -> &Arc<PreparedBody> {
        &self.body
    }

    /// The events as uncompressed JSON.
    pub fn json(&self) -> &[u8] {
        &self.body.get_or_encode(ContentCoding::Identity).bytes
    }

    /// The server-sent event with which a stream begins.
    pub fn connected_event(&self) -> Bytes {
        self.connected_event.get_or_init(|| self.write_event(CONNECTED_EVENT)).clone()
    }

    /// The server-sent event for a stream that is connected already.
    pub fn updated_event(&self) -> Bytes {
        self.updated_event.get_or_init(|| self.write_event(UPDATED_EVENT)).clone()
    }

    fn write_event(&self, name: &str) -> Bytes {
        // Never lossy: the text of flags was read from UTF-8.
        let json = String::from_utf8_lossy(self.json());
        sse::encode_event(name, Some(&self.event_id), &json).into()
    }

    /// Its maximum memory in bytes. Counts one of the two events, because both are hardly ever written.
    pub(super) fn memory_size(&self) -> usize {
        size_of::<Self>() + self.body.max_memory_size() + self.json().len()
    }
}
