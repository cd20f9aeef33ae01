//! Limits of one connection, and of all connections of a server.

use std::time::Duration;

/// The configurable limits of connections.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConnectionLimits {
    /// The maximum number of open connections.
    pub max_connections: usize,
    /// The maximum number of connections per client address; `None` for no such limit.
    pub max_connections_per_address: Option<usize>,
    /// The maximum duration of receiving a request's head, from its first byte.
    pub header_read_timeout: Duration,
    /// The time for which an idle connection is guaranteed to stay open.
    pub idle_timeout: Duration,
    /// The approximate maximum age of a connection, so that clients rebalance across instances; `None`
    /// for no limit.
    pub max_age: Option<Duration>,
}

impl ConnectionLimits {
    /// The minimum time that an idle connection stays open: the timeout and an eighth of it, for
    /// requests that are sent at its end and still in transit.
    pub(super) fn idle_timeout_with_margin(&self) -> Duration {
        self.idle_timeout + self.idle_timeout / 8
    }
}

/// The maximum time for which a client may read nothing of a response.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The maximum duration of a graceful shutdown of one connection.
pub(super) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum time until the first request of a connection whose listener has closed.
pub(super) const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The maximum number of concurrent requests on an HTTP/2 connection.
pub(super) const MAX_CONCURRENT_STREAMS: u32 = 100;

/// The maximum number of response bytes that an HTTP/2 client has not read. Its further requests wait
/// while the limit is reached.
pub(super) const MAX_PENDING_RESPONSE_BYTES: usize = 4 << 20;

/// The bytes reserved for a response whose size is not known yet.
pub(super) const RESPONSE_RESERVATION_BYTES: usize = 128 << 10;

/// The maximum size of an HTTP/1 request head, in bytes: twice the limit of Node.js, which serves the
/// same clients elsewhere.
pub(super) const MAX_HEAD_BYTES: usize = 32 << 10;

/// The interval of keep-alive pings on HTTP/2 connections, and the timeout of their responses.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(20);

/// The maximum number of bytes that one HTTP/2 response buffers in the connection.
pub(super) const SEND_BUFFER_BYTES: usize = 64 << 10;
