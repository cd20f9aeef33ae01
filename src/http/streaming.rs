//! Open streams: how many there may be, how long they last, and what ends them.
//!
//! A stream's connection asks for its next piece when it has sent the last, so that a client which
//! reads slowly holds one piece and delays nobody. What there is to tell is the business of a
//! [`Teller`]; each API has its own.

mod follower;
mod seats;
mod tally;
mod teller;

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

pub use self::teller::{Piece, Teller, Told};
use self::{follower::Follower, seats::Seats};
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
    /// About how long one lasts, so that clients spread over instances anew.
    pub max_age: Duration,
    /// Where SDKs are sent; as they are set up themselves when there is none.
    pub fetch_mode: Option<FetchMode>,
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
        let seats = Seats::new(config.most, auth);
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

    /// Opens a stream for the bearer of the token of `digest`, which grants it: `teller` tells, and is
    /// asked whenever `states` has a new number. The stream ends with those.
    ///
    /// # Errors
    /// When there is no room.
    pub fn open(
        &self,
        digest: TokenDigest,
        grant: Arc<Grant>,
        states: watch::Receiver<Number>,
        teller: impl Teller,
    ) -> Result<Reply, Failure> {
        let seat = self.seats.take(digest, grant).ok_or(Failure::Crowded(CROWDED_FOR))?;
        let age = self.config.max_age.mul_f64(rand::random_range(0.9..1.1));
        let follower = Follower::new(seat, states, teller, age);
        Ok(reply::event_stream(Box::pin(follower)))
    }
}
