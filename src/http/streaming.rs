//! Open streams: how many there may be, how long they last, and what ends them.
//!
//! A stream's connection asks for its next piece when it has room for it, so that a client which reads
//! slowly holds a few pieces and delays nobody; one that takes nothing loses its connection, or over HTTP/2
//! its stream, by the listener's limits. What there is to tell is the business of a [`Teller`]; each API has its
//! own.

mod follower;
mod seats;
mod tally;
mod teller;

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::sync::watch;

pub use self::teller::{Piece, Teller, Told};
use self::{
    follower::Follower,
    seats::{Room, Seats},
};
use super::reply::{self, Failure, Reply};
use crate::{
    auth::Authenticator,
    feed::Number,
    token::{Grant, TokenDigest},
};

/// Where SDKs that can do both are to go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FetchMode {
    /// Those that follow a stream are told to poll.
    Polling,
    /// Those that poll are told to follow a stream.
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

/// How streams are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many may be open at once.
    pub most: usize,
    /// How many of them clients of one address may have.
    pub most_of_address: usize,
    /// How many of them the bearers of one token may have.
    pub most_of_token: usize,
    /// About how long one lasts, so that clients spread over instances anew.
    pub max_age: Duration,
    /// Where SDKs are sent; as they are set up themselves when there is none.
    pub fetch_mode: Option<FetchMode>,
}

impl Config {
    /// Keeps no more than so many open at once, and the shares in proportion.
    pub fn limit(&mut self, most: usize) {
        let (before, most) = (self.most, self.most.min(most));
        let share = |it: usize| it.saturating_mul(most).div_ceil(before);
        self.most = most;
        self.most_of_address = share(self.most_of_address);
        self.most_of_token = share(self.most_of_token);
    }
}

/// When a client that found no room is told to try again.
const CROWDED_FOR: Duration = Duration::from_mins(1);

/// Every open stream. A cheap handle.
#[derive(Clone, Debug)]
pub struct Streams {
    config: Config,
    seats: Seats,
}

impl Streams {
    /// Keeps streams as long as `auth` admits their tokens.
    pub fn new(config: Config, auth: Authenticator) -> Self {
        let room = Room {
            most: config.most,
            of_address: config.most_of_address,
            of_token: config.most_of_token,
        };
        let seats = Seats::new(&room, auth);
        Self { config, seats }
    }

    /// Where SDKs that can do both are to go.
    pub fn fetch_mode(&self) -> Option<FetchMode> {
        self.config.fetch_mode
    }

    /// Ends the streams of tokens that hold no more, or allow something else now, until dropped.
    pub async fn run(&self) {
        self.seats.run().await;
    }

    /// Ends all streams, one by one within a few seconds, and at most within half of `grace`. There
    /// will be no others.
    pub fn end(&self, grace: Duration) {
        self.seats.end(grace);
    }

    /// Opens a stream for the bearer of a token at an address: the token grants it, `teller` tells, and is
    /// asked whenever `states` has a new number. The stream ends with those.
    ///
    /// # Errors
    /// When there is no room, for anybody or for this bearer.
    pub fn open(
        &self,
        (digest, client): (TokenDigest, IpAddr),
        grant: Arc<Grant>,
        states: watch::Receiver<Number>,
        teller: impl Teller,
    ) -> Result<Reply, Failure> {
        let seat = self.seats.take((digest, client), grant);
        let seat = seat.ok_or(Failure::Crowded(CROWDED_FOR))?;
        let age = self.config.max_age.mul_f64(rand::random_range(0.9..1.1));
        let follower = Follower::new(seat, states, teller, age);
        Ok(reply::event_stream(Box::pin(follower)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::StreamExt as _;
    use tokio::time::Instant;

    use super::*;
    use crate::{
        auth::{self, Authority},
        feed::Feed,
        http::reply::{Live, Outgoing},
        snapshot::{Snapshot, Snapshots},
        token::{Environment, Projects, Scope, TokenKind},
        wire::features::Document,
    };

    #[test]
    fn fewer_streams_are_shared_as_more_were() {
        let config = Config {
            most: 1000,
            most_of_address: 500,
            most_of_token: 1000,
            max_age: LONG,
            fetch_mode: None,
        };
        let limited = |most| {
            let mut config = config.clone();
            config.limit(most);
            (config.most, config.most_of_address, config.most_of_token)
        };
        assert_eq!(limited(2000), (1000, 500, 1000));
        assert_eq!(limited(600), (600, 300, 600));
        assert_eq!(limited(1), (1, 1, 1));
    }

    const LONG: Duration = Duration::from_hours(1);
    const AGE: Duration = Duration::from_mins(10);

    /// Has one thing to tell.
    struct Once(bool);

    impl Teller for Once {
        fn tell(&mut self) -> Option<Piece> {
            let first = !std::mem::replace(&mut self.0, true);
            first.then(|| Piece { bytes: Bytes::from_static(b"x"), told: Told::Whole })
        }
    }

    /// A stream that has told a piece, among what keeps it.
    async fn told() -> (Live, Streams, Authenticator, Feed) {
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
        let auth = Authenticator::new(config, Authority::Nobody, [(digest, grant)]);
        let config = Config {
            most: 1,
            most_of_address: 1,
            most_of_token: 1,
            max_age: AGE,
            fetch_mode: None,
        };
        let streams = Streams::new(config, auth.clone());
        let snapshots = Snapshots::default();
        let environment = scope.environment.clone();
        snapshots.swap(Snapshot::build(scope, Document::default(), None));
        let feed = Feed::new(snapshots);
        let states = feed.follow(&environment).unwrap();
        let grant = auth.standing(&digest).unwrap();
        let bearer = (digest, IpAddr::from([192, 0, 2, 7]));
        let reply = streams.open(bearer, grant, states, Once(false)).unwrap();
        let Outgoing::Live(mut live) = reply.into_body() else { panic!("it is no stream") };
        assert!(live.next().await.is_some());
        (live, streams, auth, feed)
    }

    /// Takes what a stream still tells, and returns when it is over.
    async fn over(live: &mut Live) -> Instant {
        while live.next().await.is_some() {}
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_at_its_age() {
        let (mut live, _streams, _auth, _feed) = told().await;
        let begun = Instant::now();
        let age = over(&mut live).await - begun;
        assert!(age >= AGE.mul_f64(0.9) && age < AGE.mul_f64(1.2), "{age:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_with_its_token_and_with_the_process() {
        let (mut live, streams, auth, _feed) = told().await;
        let begun = Instant::now();
        auth.set_given([]);
        tokio::select! {
            at = over(&mut live) => assert!(at - begun < Duration::from_mins(1)),
            () = streams.run() => unreachable!("it runs until it is dropped"),
        }
        let (mut live, streams, _auth, _feed) = told().await;
        let begun = Instant::now();
        streams.end(Duration::from_mins(1));
        assert!(over(&mut live).await - begun < Duration::from_mins(1));
    }
}
