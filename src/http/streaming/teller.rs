//! What a stream tells.

use bytes::Bytes;
use tokio::time::Instant;

/// What a stream tells.
///
/// It is asked when the stream begins, when its environment has changed, and at the time that it
/// names itself; each time again and again, until it has no more to tell.
pub trait Teller: Send + 'static {
    /// The next piece that there is to tell now.
    fn tell(&mut self) -> Option<Piece>;

    /// Whether the client has to come back and ask anew, now that there is no more to tell.
    fn is_over(&self) -> bool {
        false
    }

    /// When there may be something to tell although nothing has changed.
    fn wakes_at(&self) -> Option<Instant> {
        None
    }
}

/// A piece of a stream.
#[derive(Clone, Debug)]
pub struct Piece {
    /// An event, or several, as server-sent.
    pub bytes: Bytes,
    /// What it tells.
    pub told: Told,
}

/// What a piece tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Told {
    /// Everything, to a client that begins.
    Whole,
    /// To one that has been here before, what it missed, if anything.
    Missed,
    /// What has changed; the source told of it at this time.
    Changed(Instant),
    /// Everything, to a client that was too slow for the changes.
    Overtaken,
    /// Where to go.
    Directions,
}
