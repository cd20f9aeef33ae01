//! The source of a stream's events. It knows nothing of connections, limits or timers.

use bytes::Bytes;
use tokio::time::Instant;

/// Supplies the events of one stream.
///
/// The stream calls [`next_event`](Self::next_event) when it begins, when the flags of its environment
/// change and at [`next_deadline`](Self::next_deadline), each time until it returns `None`.
pub trait Teller: Send + 'static {
    /// The next chunk to send now, if there is one.
    fn tell(&mut self) -> Option<Piece>;

    /// Whether the stream has to close, so that the client reconnects, after all chunks have been sent.
    fn is_over(&self) -> bool {
        false
    }

    /// When there may be an event although the flags have not changed.
    fn wakes_at(&self) -> Option<Instant> {
        None
    }
}

/// One or more server-sent events, sent as one chunk.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The encoded events.
    pub bytes: Bytes,
    /// The kind, for the metrics.
    pub told: Told,
}

/// The kind of a chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Told {
    /// All flags, to a new client.
    Whole,
    /// The changes that a reconnecting client missed, possibly none.
    Missed,
    /// Changes, received from the source at this time.
    Changed(Instant),
    /// All flags, to a client that was too slow for the history of changes.
    Overtaken,
    /// The fetch mode to switch to.
    Directions,
}
