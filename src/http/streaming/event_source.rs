//! The source of a stream's events. It knows nothing of connections, limits or timers.

use bytes::Bytes;
use tokio::time::Instant;

/// Supplies the events of one stream.
///
/// The stream calls [`try_next_event`](Self::try_next_event) when it begins, when the flags of its environment
/// change and at [`next_reevaluation_at`](Self::next_reevaluation_at), each time until it returns `None`.
pub trait EventSource: Send + 'static {
    /// The next chunk to send now, if there is one.
    fn try_next_event(&mut self) -> Option<SseChunk>;

    /// Whether the stream has to close, so that the client reconnects, after all chunks have been sent.
    fn is_finished(&self) -> bool {
        false
    }

    /// When there may be an event although the flags have not changed.
    fn next_reevaluation_at(&self) -> Option<Instant> {
        None
    }
}

/// One or more server-sent events, sent as one chunk.
#[derive(Clone, Debug)]
pub struct SseChunk {
    /// The encoded events.
    pub bytes: Bytes,
    /// The kind, for the metrics.
    pub kind: ChunkKind,
}

/// The kind of a chunk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ChunkKind {
    /// All flags, to a new client.
    Hydration,
    /// The changes that a reconnecting client missed, possibly none.
    Replay,
    /// Changes, received from the source at this time.
    Changes(Instant),
    /// All flags, to a client that was too slow for the history of changes.
    Resync,
    /// The fetch mode to switch to.
    FetchMode,
}
