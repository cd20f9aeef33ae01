//! Event source of a server SDK's stream: delta events for the flags in the token's scope.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    changes::{ChangeFeed, SubscriptionKey, UpdateKind},
    http::streaming::{ChunkKind, EventSource, FetchMode, SseChunk},
    protocol::{delta::EventId, sse},
    served::StateId,
};

/// Delta events for one subscription key.
#[derive(Debug)]
pub struct DeltaEvents {
    feed: ChangeFeed,
    /// The state ids of the environment.
    state_ids: watch::Receiver<StateId>,
    subscription_key: Arc<SubscriptionKey>,
    /// The id of the state that the client has.
    last_state_id: Option<EventId>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing has been sent. The fetch mode, if there is one, follows the first chunk.
    Connecting(Option<FetchMode>),
    SendingFetchMode(FetchMode),
    Streaming,
}

impl DeltaEvents {
    /// Starts with everything since the state `last`. `states` yields the state ids of the key's
    /// environment.
    pub fn new(
        feed: ChangeFeed,
        state_ids: watch::Receiver<StateId>,
        subscription_key: SubscriptionKey,
        last_state_id: Option<EventId>,
        fetch_mode: Option<FetchMode>,
    ) -> Self {
        Self {
            feed,
            state_ids,
            subscription_key: Arc::new(subscription_key),
            last_state_id,
            stage: Stage::Connecting(fetch_mode),
        }
    }
}

impl EventSource for DeltaEvents {
    fn try_next_event(&mut self) -> Option<SseChunk> {
        if let Stage::SendingFetchMode(mode) = self.stage {
            self.stage = Stage::Streaming;
            if mode == FetchMode::Polling {
                let bytes = sse::encode_event("fetch-mode", None, "polling").into();
                return Some(SseChunk { bytes, kind: ChunkKind::FetchMode });
            }
        }
        // Called again after each chunk: usually there is nothing more to send.
        if self.stage == Stage::Streaming
            && self.last_state_id == Some(self.subscription_key.event_id(*self.state_ids.borrow()))
        {
            return None;
        }
        let frame = self.feed.update_since(&self.subscription_key, self.last_state_id)?;
        self.last_state_id = Some(frame.event_id());
        if let Stage::Connecting(mode) = self.stage {
            self.stage = mode.map_or(Stage::Streaming, Stage::SendingFetchMode);
            let kind = match frame.kind() {
                UpdateKind::Snapshot => ChunkKind::Hydration,
                UpdateKind::Delta | UpdateKind::Unchanged => ChunkKind::Replay,
            };
            return Some(SseChunk { bytes: frame.connected_event(), kind });
        }
        let kind = match frame.kind() {
            UpdateKind::Unchanged => return None,
            UpdateKind::Snapshot => ChunkKind::Resync,
            UpdateKind::Delta => ChunkKind::Changes(frame.received_at()),
        };
        Some(SseChunk { bytes: frame.updated_event(), kind })
    }
}

#[cfg(test)]
mod tests {
    use std::mem::discriminant;

    use tokio::time::Instant;

    use super::*;
    use crate::{
        protocol::{
            delta::{self, apply},
            features::Document,
            sse::Decoder,
        },
        served::Snapshots,
        snapshot::Filter,
        token::{Environment, Projects, Scope},
    };

    fn swap(snapshots: &Snapshots, n: usize) {
        let text = format!(r#"{{"features":[{{"name":"a","n":{n}}},{{"name":"b{n}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        snapshots.replace(scope, document);
    }

    /// Applies all pending chunks to `has`, and returns the kind of the last one.
    fn read(changes: &mut DeltaEvents, has: &mut Document) -> Option<ChunkKind> {
        let mut last = None;
        while let Some(chunk) = changes.try_next_event() {
            let mut decoder = Decoder::new(1 << 20);
            let take = |event: sse::DecodedEvent| {
                let events = delta::parse(event.data.as_bytes()).unwrap();
                *has = apply(has, events.iter().map(|event| &event.change));
            };
            decoder.decode(&chunk.bytes, take).unwrap();
            last = Some(chunk.kind);
        }
        last
    }

    #[test]
    fn slow_client_gets_changes_in_one_chunk_and_all_flags_beyond_the_history() {
        let (environment, projects) = (Environment::new("dev"), Projects::All);
        let snapshots = Snapshots::default();
        swap(&snapshots, 0);
        let feed = ChangeFeed::new(snapshots.clone());
        let states = feed.subscribe(&environment).unwrap();
        let subscription_key = SubscriptionKey::new(environment, projects, Filter::default());
        let mut changes =
            DeltaEvents::new(feed.clone(), states, subscription_key.clone(), None, None);
        let mut has = Document::default();
        assert_eq!(read(&mut changes, &mut has), Some(ChunkKind::Hydration));
        // Changes while the client reads nothing: first fewer than the history holds, then more.
        for (changed, expect) in
            [(1..50, ChunkKind::Changes(Instant::now())), (50..250, ChunkKind::Resync)]
        {
            let last = changed.end - 1;
            for n in changed {
                swap(&snapshots, n);
                // Makes the history record each state, as its own task does.
                feed.update_since(&Arc::new(subscription_key.clone()), None);
            }
            let kind = read(&mut changes, &mut has).expect("a chunk is pending");
            assert_eq!(discriminant(&kind), discriminant(&expect));
            let names: Vec<_> = has.features().iter().map(|it| it.name().to_string()).collect();
            assert_eq!(names, ["a".to_owned(), format!("b{last}")]);
            assert_eq!(read(&mut changes, &mut has), None);
        }
    }
}
