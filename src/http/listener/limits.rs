//! What one connection, and all of them together, may take.

use std::time::Duration;

/// What one connection, and all of them together, may take.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// How many connections may be open at once.
    pub connections: usize,
    /// How many of them clients of one address may have; as many as there are where it is `None`.
    pub connections_per_address: Option<usize>,
    /// The longest that a client may take to send a request's head, from its first byte.
    pub header_read_timeout: Duration,
    /// How long clients may rely on a connection on which nothing is under way.
    pub idle_timeout: Duration,
    /// About how long a connection is used, so that clients spread over instances anew; for ever where
    /// it is `None`.
    pub max_age: Option<Duration>,
}

impl Limits {
    /// How long an idle connection is kept at the least: longer than is promised, by the time for which
    /// a request may be on its way that was sent at the end of it.
    pub(super) fn idle_for(&self) -> Duration {
        self.idle_timeout + self.idle_timeout / 8
    }
}

/// How long a client may take nothing of an answer.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may take to end that was told to.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may take to begin that was made when its listener closed.
pub(super) const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// How many requests an HTTP/2 connection may have under way.
pub(super) const MAX_CONCURRENT_STREAMS: u32 = 100;

/// How many bytes of answers may wait for an HTTP/2 client to take them before its further requests
/// wait too.
pub(super) const WAITING_BYTES: usize = 4 << 20;

/// How many bytes are set aside for an answer that is not there yet.
pub(super) const ANSWER_BYTES: usize = 128 << 10;

/// The longest head of an HTTP/1 request, in bytes: twice what Node.js takes, before which such clients
/// stand elsewhere.
pub(super) const HEAD_BYTES: usize = 32 << 10;

/// How often HTTP/2 connections are asked whether they are alive, and how long they may take to say so.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(20);

/// How many bytes of an HTTP/2 answer are handed to the connection before its client has taken them.
pub(super) const SEND_BUFFER: usize = 64 << 10;
