//! What a provider's stream tells: that it should ask again.

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    answers::Answer,
    http::{
        frontend::{Asker, Wake},
        streaming::{Piece, Teller, Told},
    },
    snapshot::{Shown, Snapshots},
    wire::{ofrep, sse},
};

/// Tells when flags come to something else for one context.
#[derive(Debug)]
pub struct Notices {
    snapshots: Snapshots,
    asker: Asker,
    /// What the provider has, or has been told to ask for.
    outcome: u128,
    begun: bool,
    wake: Wake,
}

impl Notices {
    /// Begins where the provider has the answer of this hash.
    pub fn new(snapshots: Snapshots, asker: Asker, outcome: u128) -> Self {
        Self { snapshots, asker, outcome, begun: false, wake: Wake::default() }
    }
}

impl Teller for Notices {
    fn tell(&mut self) -> Option<Piece> {
        let Self { snapshots, asker, outcome, begun, wake } = self;
        let snapshot = snapshots.load_for(&asker.scope)?;
        let view = snapshot.view(&asker.scope.projects);
        let since = wake.set(view.reads(), snapshot.confirmed());
        let question = asker.question(&snapshot);
        let now = question
            .answer(&view, |context| Answer::of(&snapshot, &view, context, Shown::All).hash());
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
}
