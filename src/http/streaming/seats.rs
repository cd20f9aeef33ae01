//! Who has a stream open: a place among all of them, as long as the token holds.
//!
//! One address, or one token, has a share of the places only, so that whoever opens streams without end
//! leaves room for others.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    net::IpAddr,
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
    throttle::origin,
    token::{Grant, TokenDigest},
};

/// How often it is looked whether the tokens of open streams still hold.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The longest that streams take to end one by one, so that not all clients come back at once.
const LONGEST_STAGGER: Duration = Duration::from_secs(5);

/// How many places there are, and how many of them one may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) most: usize,
    pub(super) of_address: usize,
    pub(super) of_token: usize,
}

/// All places. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Seats(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    auth: Authenticator,
    room: Arc<Semaphore>,
    /// How many places clients of each address have.
    of_address: Shares<IpAddr>,
    /// How many places the bearers of each token have.
    of_token: Shares<TokenDigest>,
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
    pub(super) fn new(room: &Room, auth: Authenticator) -> Self {
        let of_address = Shares::new(room.of_address);
        let of_token = Shares::new(room.of_token);
        let room = Arc::new(Semaphore::new(room.most.min(Semaphore::MAX_PERMITS)));
        let (lives, stagger) = Default::default();
        let (epoch, tally) = (Instant::now(), Tally::new());
        let inner = Inner { epoch, auth, room, of_address, of_token, lives, stagger, tally };
        Self(Arc::new(inner))
    }

    /// Takes a place for the bearer of a token at an address; `None` where there is none for it.
    pub(super) fn take(
        &self,
        (digest, client): (TokenDigest, IpAddr),
        grant: Arc<Grant>,
    ) -> Option<Seat> {
        let inner = &self.0;
        let Some(place) = inner.place(digest, origin(client)) else {
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
        Some(Seat { life, seats: self.clone(), _place: place })
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
    fn place(&self, digest: TokenDigest, address: IpAddr) -> Option<Place> {
        Some(Place {
            _permit: Arc::clone(&self.room).try_acquire_owned().ok()?,
            _of_address: self.of_address.take(address)?,
            _of_token: self.of_token.take(digest)?,
        })
    }

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
    _place: Place,
}

/// What is free again when a place is left.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    _of_address: Share<IpAddr>,
    _of_token: Share<TokenDigest>,
}

/// How many places each of some has, of which one may have so many. A cheap handle.
#[derive(Clone, Debug)]
struct Shares<K: Eq + Hash> {
    most: usize,
    taken: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Copy + Eq + Hash> Shares<K> {
    fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    fn take(&self, key: K) -> Option<Share<K>> {
        let mut taken = self.taken();
        let count = taken.get(&key).copied().unwrap_or_default();
        if count >= self.most {
            return None;
        }
        taken.insert(key, count + 1);
        Some(Share { key, shares: self.clone() })
    }
}

impl<K: Eq + Hash> Shares<K> {
    /// A panic under this lock leaves a whole map.
    fn taken(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, given back when it is dropped.
#[derive(Debug)]
struct Share<K: Copy + Eq + Hash> {
    key: K,
    shares: Shares<K>,
}

impl<K: Copy + Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.shares.taken().entry(self.key) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
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
