//! What a server SDK's stream tells: delta events of what the token sees.

use std::sync::Arc;

use crate::{
    feed::{Feed, News, Topic},
    http::streaming::{FetchMode, Piece, Teller, Told},
    wire::{delta::EventId, sse},
};

/// Tells the changes of a topic.
#[derive(Debug)]
pub struct Changes {
    feed: Feed,
    topic: Arc<Topic>,
    /// The state that the client has.
    last: Option<EventId>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Nothing has been told; then the client is told where to go, if it is to go somewhere.
    Connecting(Option<FetchMode>),
    Directing(FetchMode),
    Following,
}

impl Changes {
    /// Begins with all that was missed since the state `last`.
    pub fn new(
        feed: Feed,
        topic: Topic,
        last: Option<EventId>,
        fetch_mode: Option<FetchMode>,
    ) -> Self {
        Self { feed, topic: Arc::new(topic), last, stage: Stage::Connecting(fetch_mode) }
    }
}

impl Teller for Changes {
    fn tell(&mut self) -> Option<Piece> {
        if let Stage::Directing(mode) = self.stage {
            self.stage = Stage::Following;
            if mode == FetchMode::Polling {
                let bytes = sse::event("fetch-mode", None, "polling").into();
                return Some(Piece { bytes, told: Told::Directions });
            }
        }
        let frame = self.feed.since(&self.topic, self.last)?;
        self.last = Some(frame.id());
        if let Stage::Connecting(mode) = self.stage {
            self.stage = mode.map_or(Stage::Following, Stage::Directing);
            let told = match frame.news() {
                News::Everything => Told::Whole,
                News::Changes | News::Nothing => Told::Missed,
            };
            return Some(Piece { bytes: frame.connected(), told });
        }
        let told = match frame.news() {
            News::Nothing => return None,
            News::Everything => Told::Overtaken,
            News::Changes => Told::Changed(frame.told()),
        };
        Some(Piece { bytes: frame.updated(), told })
    }
}
