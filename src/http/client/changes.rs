//! What a server SDK's stream tells: delta events of what the token sees.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    feed::{Feed, News, Number, Topic},
    http::streaming::{FetchMode, Piece, Teller, Told},
    wire::{delta::EventId, sse},
};

/// Tells the changes of a topic.
#[derive(Debug)]
pub struct Changes {
    feed: Feed,
    /// The numbers of its states.
    states: watch::Receiver<Number>,
    topic: Arc<Topic>,
    /// The id of the state that the client has.
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
    /// Begins with all that was missed since the state `last`; `states` are the numbers of those of the
    /// topic's environment.
    pub fn new(
        feed: Feed,
        states: watch::Receiver<Number>,
        topic: Topic,
        last: Option<EventId>,
        fetch_mode: Option<FetchMode>,
    ) -> Self {
        Self { feed, states, topic: Arc::new(topic), last, stage: Stage::Connecting(fetch_mode) }
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
        // Asked again after each piece, it mostly has told everything.
        if self.stage == Stage::Following && self.last == Some(self.topic.id(*self.states.borrow()))
        {
            return None;
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

#[cfg(test)]
mod tests {
    use std::mem::discriminant;

    use tokio::time::Instant;

    use super::*;
    use crate::{
        snapshot::{Filter, Snapshot, Snapshots},
        token::{Environment, Projects, Scope},
        wire::{
            delta::{self, apply},
            features::Document,
            sse::Decoder,
        },
    };

    fn swap(snapshots: &Snapshots, n: usize) {
        let text = format!(r#"{{"features":[{{"name":"a","n":{n}}},{{"name":"b{n}"}}]}}"#);
        let document = Document::parse(text.as_bytes()).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        snapshots.swap(Snapshot::build(scope, document, None));
    }

    /// Takes what there is to take, and tells what the last piece was of.
    fn read(changes: &mut Changes, has: &mut Document) -> Option<Told> {
        let mut last = None;
        while let Some(piece) = changes.tell() {
            let mut decoder = Decoder::new(1 << 20);
            let take = |event: sse::Event| {
                let events = delta::parse(event.data.as_bytes()).unwrap();
                *has = apply(has, events.iter().map(|event| &event.change));
            };
            decoder.read(&piece.bytes, take).unwrap();
            last = Some(piece.told);
        }
        last
    }

    #[test]
    fn a_client_that_is_slow_is_told_the_changes_in_one_and_one_that_is_slower_everything() {
        let (environment, projects) = (Environment::new("dev"), Projects::All);
        let snapshots = Snapshots::default();
        swap(&snapshots, 0);
        let feed = Feed::new(snapshots.clone());
        let states = feed.follow(&environment).unwrap();
        let topic = Topic::new(environment, projects, Filter::default());
        let mut changes = Changes::new(feed.clone(), states, topic.clone(), None, None);
        let mut has = Document::default();
        assert_eq!(read(&mut changes, &mut has), Some(Told::Whole));
        // Changes come while it reads nothing: fewer than are kept, then more.
        for (changed, expect) in
            [(1..50, Told::Changed(Instant::now())), (50..250, Told::Overtaken)]
        {
            let last = changed.end - 1;
            for n in changed {
                swap(&snapshots, n);
                // The feed hears of each, as its own task sees to.
                feed.since(&Arc::new(topic.clone()), None);
            }
            let told = read(&mut changes, &mut has).expect("there is news");
            assert_eq!(discriminant(&told), discriminant(&expect));
            let names: Vec<_> = has.features().iter().map(|it| it.name().to_string()).collect();
            assert_eq!(names, ["a".to_owned(), format!("b{last}")]);
            assert_eq!(read(&mut changes, &mut has), None);
        }
    }
}
