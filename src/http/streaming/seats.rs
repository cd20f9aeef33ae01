//! Who has a stream open: a place among all of them, as long as the token holds.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::tally::Tally;
use crate::{
    auth::Authenticator,
    http::stop::Stop,
    token::{Grant, TokenDigest},
};

/// How often it is looked whether the tokens of open streams still hold.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The longest that streams take to end one by one, so that not all clients come back at once.
const LONGEST_STAGGER: Duration = Duration::from_secs(5);

/// All places. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Seats(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    auth: Authenticator,
    room: Arc<Semaphore>,
    /// Of each token with a stream.
    lives: Mutex<HashMap<TokenDigest, Weak<Life>>>,
    /// Over how long all streams end, once they are to.
    stagger: OnceLock<Duration>,
    tally: Tally,
}

/// How long the streams of one token may last.
#[derive(Debug)]
struct Life {
    grant: Arc<Grant>,
    over: Stop,
}

impl Seats {
    pub(super) fn new(most: usize, auth: Authenticator) -> Self {
        let room = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        let (lives, stagger) = Default::default();
        let (epoch, tally) = (Instant::now(), Tally::new());
        Self(Arc::new(Inner { epoch, auth, room, lives, stagger, tally }))
    }

    /// Takes a place for the bearer of a token; `None` where there is none.
    pub(super) fn take(&self, digest: TokenDigest, grant: Arc<Grant>) -> Option<Seat> {
        let inner = &self.0;
        let Ok(permit) = Arc::clone(&inner.room).try_acquire_owned() else {
            inner.tally.refused.increment(1);
            return None;
        };
        let mut lives = inner.lives();
        let life = match lives.get(&digest).and_then(Weak::upgrade) {
            Some(life) if life.grant == grant => life,
            other => {
                if let Some(outdated) = other {
                    outdated.over.give();
                }
                let life = Arc::new(Life { grant, over: Stop::default() });
                lives.insert(digest, Arc::downgrade(&life));
                // Set under the lock of the lives.
                if inner.stagger.get().is_some() {
                    life.over.give();
                }
                life
            }
        };
        inner.tally.open.increment(1);
        Some(Seat { life, seats: self.clone(), _permit: permit })
    }

    /// Ends what tokens hold that are valid no more, or allow something else now, until dropped.
    pub(super) async fn run(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.0.lives().retain(|digest, life| {
                let Some(life) = life.upgrade() else { return false };
                let stands = self.0.auth.standing(digest).is_some_and(|it| it == life.grant);
                if !stands {
                    life.over.give();
                }
                stands
            });
        }
    }

    /// Ends all, one by one.
    pub(super) fn end(&self, grace: Duration) {
        let lives = self.0.lives();
        self.0.stagger.get_or_init(|| (grace / 2).min(LONGEST_STAGGER));
        for life in lives.values().filter_map(Weak::upgrade) {
            life.over.give();
        }
    }
}

impl Inner {
    /// A panic under this lock leaves a whole map.
    fn lives(&self) -> MutexGuard<'_, HashMap<TokenDigest, Weak<Life>>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    life: Arc<Life>,
    seats: Seats,
    _permit: OwnedSemaphorePermit,
}

impl Seat {
    /// A time that is the same for all places.
    pub(super) fn epoch(&self) -> Instant {
        self.seats.0.epoch
    }

    /// Is given when the place is to be left.
    pub(super) fn over(&self) -> &Stop {
        &self.life.over
    }

    /// Where all places are to be left: over how long.
    pub(super) fn stagger(&self) -> Option<Duration> {
        self.seats.0.stagger.get().copied()
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.seats.0.tally
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.tally().open.decrement(1);
    }
}
