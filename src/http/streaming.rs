//! Event streams: their limits, their lifetime, and why they close.
//!
//! A stream produces its next chunk when the connection can send it, so a slow client buffers a few
//! chunks and does not delay others. If a client reads nothing, the server's limits close its
//! connection, or over HTTP/2 its stream. The events come from an [`EventSource`], which each API
//! implements.

mod event_source;
mod sse_stream;
mod stream_limiter;
mod stream_metrics;

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::sync::watch;

pub use self::event_source::{ChunkKind, EventSource, SseChunk};
use self::{
    sse_stream::SseStream,
    stream_limiter::{StreamLimiter, StreamLimits},
};
use super::response::{self, HttpError, HttpResponse};
use crate::{
    auth::Authenticator,
    served::StateId,
    token::{Grant, TokenDigest},
};

/// The fetch mode to announce to SDKs that support both.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FetchMode {
    /// Streaming SDKs are told to poll.
    Polling,
    /// Polling SDKs are told to use streaming.
    Streaming,
}

impl FetchMode {
    /// Reads a mode's name.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "polling" => Some(Self::Polling),
            "streaming" => Some(Self::Streaming),
            _ => None,
        }
    }
}

/// Limits and lifetime of streams.
#[derive(Clone, Debug)]
pub struct Config {
    /// Maximum number of open streams.
    pub max_streams: usize,
    /// Maximum number of open streams per client address.
    pub max_per_address: usize,
    /// Maximum number of open streams per token.
    pub max_per_token: usize,
    /// Approximate lifetime of a stream (±10 %), after which clients reconnect and so rebalance over the
    /// instances.
    pub max_age: Duration,
    /// The fetch mode to announce to SDKs; `None` leaves each SDK as it is configured.
    pub fetch_mode: Option<FetchMode>,
}

impl Config {
    /// Reduces the limit of open streams to `most`, and the other limits in proportion.
    pub fn cap_streams(&mut self, most: usize) {
        let (before, most) = (self.max_streams, self.max_streams.min(most));
        let share = |it: usize| it.saturating_mul(most).div_ceil(before);
        self.max_streams = most;
        self.max_per_address = share(self.max_per_address);
        self.max_per_token = share(self.max_per_token);
    }
}

/// `Retry-After` of a rejected stream.
const RETRY_AFTER: Duration = Duration::from_mins(1);

/// All open streams. A cheap handle.
#[derive(Clone, Debug)]
pub struct Streams {
    config: Config,
    limiter: StreamLimiter,
}

impl Streams {
    /// Streams that stay open while `auth` accepts their tokens.
    pub fn new(config: Config, auth: Authenticator) -> Self {
        let room = StreamLimits {
            total: config.max_streams,
            per_address: config.max_per_address,
            per_token: config.max_per_token,
        };
        let limiter = StreamLimiter::new(&room, auth);
        Self { config, limiter }
    }

    /// The fetch mode to announce to SDKs.
    pub fn fetch_mode(&self) -> Option<FetchMode> {
        self.config.fetch_mode
    }

    /// Closes the streams of tokens that were revoked or whose grant changed. Runs until dropped.
    pub async fn close_revoked(&self) {
        self.limiter.close_revoked().await;
    }

    /// Closes all streams gradually, within five seconds and at most half of `grace`, so that clients do
    /// not reconnect at once. Streams opened later close as well.
    pub fn close_all(&self, grace: Duration) {
        self.limiter.close_all(grace);
    }

    /// Opens a stream for a token and a client address. `source` supplies the events and is polled
    /// whenever `states` has a new id. The stream closes when the sender of `states` is dropped.
    ///
    /// # Errors
    /// [`HttpError::TooManyStreams`] if a limit is reached: the total, that of the address or that of
    /// the token.
    pub fn open(
        &self,
        (digest, client): (TokenDigest, IpAddr),
        grant: Arc<Grant>,
        states: watch::Receiver<StateId>,
        source: impl EventSource,
    ) -> Result<HttpResponse, HttpError> {
        let permit = self.limiter.acquire((digest, client), grant);
        let permit = permit.ok_or(HttpError::TooManyStreams(RETRY_AFTER))?;
        let age = self.config.max_age.mul_f64(rand::random_range(0.9..1.1));
        let stream = SseStream::new(permit, states, source, age);
        Ok(response::event_stream(Box::pin(stream)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::StreamExt as _;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        auth::{self, Validator},
        changes::ChangeFeed,
        http::response::{ByteStream, ResponseBody},
        protocol::features::Document,
        served::{ServedSnapshot, Snapshots},
        token::{Environment, Projects, Scope, TokenKind},
    };

    #[test]
    fn limits_per_address_and_token_shrink_in_proportion() {
        let config = Config {
            max_streams: 1000,
            max_per_address: 500,
            max_per_token: 1000,
            max_age: LONG,
            fetch_mode: None,
        };
        let limited = |most| {
            let mut config = config.clone();
            config.cap_streams(most);
            (config.max_streams, config.max_per_address, config.max_per_token)
        };
        assert_eq!(limited(2000), (1000, 500, 1000));
        assert_eq!(limited(600), (600, 300, 600));
        assert_eq!(limited(1), (1, 1, 1));
    }

    const LONG: Duration = Duration::from_hours(1);
    const AGE: Duration = Duration::from_mins(10);

    /// Has one event.
    struct SingleEvent(bool);

    impl EventSource for SingleEvent {
        fn try_next_event(&mut self) -> Option<SseChunk> {
            let first = !std::mem::replace(&mut self.0, true);
            first.then(|| SseChunk { bytes: Bytes::from_static(b"x"), kind: ChunkKind::Hydration })
        }
    }

    /// A stream that has sent a chunk, with the services it depends on.
    async fn open_stream() -> (ByteStream, Streams, Authenticator, ChangeFeed) {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let config = auth::Config {
            revalidate_after: LONG,
            forget_invalid_after: LONG,
            list_interval: LONG,
            deadline: LONG,
            capacity: 10,
        };
        let grant = Grant { kind: TokenKind::Client, scope: scope.clone() };
        let digest = TokenDigest::of("a token");
        let auth = Authenticator::new(config, Validator::StaticOnly, [(digest, grant)]);
        let config = Config {
            max_streams: 1,
            max_per_address: 1,
            max_per_token: 1,
            max_age: AGE,
            fetch_mode: None,
        };
        let streams = Streams::new(config, auth.clone());
        let snapshots = Snapshots::default();
        let environment = scope.environment.clone();
        snapshots.swap(ServedSnapshot::build(scope, Document::default(), None));
        let feed = ChangeFeed::new(snapshots);
        let states = feed.subscribe(&environment).unwrap();
        let grant = auth.current_grant(&digest).unwrap();
        let bearer = (digest, IpAddr::from([192, 0, 2, 7]));
        let reply = streams.open(bearer, grant, states, SingleEvent(false)).unwrap();
        let ResponseBody::Stream(mut live) = reply.into_body() else { panic!("not a stream") };
        assert!(live.next().await.is_some());
        (live, streams, auth, feed)
    }

    /// Reads a stream to its end, and returns the time of the end.
    async fn closed_at(live: &mut ByteStream) -> Instant {
        while live.next().await.is_some() {}
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn stream_closes_at_its_maximum_age() {
        let (mut live, _streams, _auth, _feed) = open_stream().await;
        let begun = Instant::now();
        let age = closed_at(&mut live).await - begun;
        assert!(age >= AGE.mul_f64(0.9) && age < AGE.mul_f64(1.2), "{age:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn stream_closes_on_token_revocation_and_on_shutdown() {
        let (mut live, streams, auth, _feed) = open_stream().await;
        let begun = Instant::now();
        auth.set_local_tokens([]);
        tokio::select! {
            at = closed_at(&mut live) => assert!(at - begun < Duration::from_mins(1)),
            () = streams.close_revoked() => unreachable!("runs until dropped"),
        }
        let (mut live, streams, _auth, _feed) = open_stream().await;
        let begun = Instant::now();
        streams.close_all(Duration::from_mins(1));
        assert!(closed_at(&mut live).await - begun < Duration::from_mins(1));
    }
}
