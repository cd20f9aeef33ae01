//! Limits open streams, in total, per client address and per token, and closes those of revoked tokens.
//!
//! The limits per address and token keep one client from using up the total.

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

/// Interval between checks whether the tokens of open streams are still valid.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The longest time over which all streams close on shutdown, so that clients do not reconnect at once.
const LONGEST_STAGGER: Duration = Duration::from_secs(5);

/// The maximum numbers of open streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) most: usize,
    pub(super) of_address: usize,
    pub(super) of_token: usize,
}

/// Grants permits for streams within the limits. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Seats(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    auth: Authenticator,
    room: Arc<Semaphore>,
    /// Streams per client address.
    of_address: Shares<IpAddr>,
    /// Streams per token.
    of_token: Shares<TokenDigest>,
    /// One entry for each token with a stream.
    lives: Mutex<HashMap<TokenDigest, Weak<Life>>>,
    /// On shutdown, the time over which all streams close.
    stagger: OnceLock<Duration>,
    tally: Tally,
}

/// Shared by all streams of one token: its grant, and the signal to close them.
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

    /// Acquires a permit for a token and a client address; `None` if a limit is reached.
    pub(super) fn take(
        &self,
        (digest, client): (TokenDigest, IpAddr),
        grant: Arc<Grant>,
    ) -> Option<Seat> {
        let inner = &self.0;
        let Some(slot) = inner.place(digest, origin(client)) else {
            inner.tally.refused.increment(1);
            return None;
        };
        let mut lives = inner.lock_lifetimes();
        let life = match lives.get(&digest).and_then(Weak::upgrade) {
            Some(life) if life.grant == grant => life,
            other => {
                if let Some(outdated) = other {
                    outdated.over.give();
                }
                let life = Arc::new(Life { grant, over: Stop::default() });
                lives.insert(digest, Arc::downgrade(&life));
                // `stagger` is set while this lock is held.
                if inner.stagger.get().is_some() {
                    life.over.give();
                }
                life
            }
        };
        inner.tally.open.increment(1);
        Some(Seat { life, seats: self.clone(), _place: slot })
    }

    /// Closes the streams of tokens that were revoked or whose grant changed. Runs until dropped.
    pub(super) async fn run(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.0.lock_lifetimes().retain(|digest, life| {
                let Some(life) = life.upgrade() else { return false };
                let is_current = self.0.auth.standing(digest).is_some_and(|it| it == life.grant);
                if !is_current {
                    life.over.give();
                }
                is_current
            });
        }
    }

    /// Closes all streams gradually.
    pub(super) fn end(&self, grace: Duration) {
        let lives = self.0.lock_lifetimes();
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

    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock_lifetimes(&self) -> MutexGuard<'_, HashMap<TokenDigest, Weak<Life>>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A permit for one stream; dropping it releases its slot.
#[derive(Debug)]
pub(super) struct Seat {
    life: Arc<Life>,
    seats: Seats,
    _place: Place,
}

/// A place within each of the limits, released on drop.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    _of_address: Share<IpAddr>,
    _of_token: Share<TokenDigest>,
}

/// Counts per key, with a maximum per key. A cheap handle.
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
        let mut counts = self.lock_counts();
        let count = counts.get(&key).copied().unwrap_or_default();
        if count >= self.most {
            return None;
        }
        counts.insert(key, count + 1);
        Some(Share { key, shares: self.clone() })
    }
}

impl<K: Eq + Hash> Shares<K> {
    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock_counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One count of a key, released on drop.
#[derive(Debug)]
struct Share<K: Copy + Eq + Hash> {
    key: K,
    shares: Shares<K>,
}

impl<K: Copy + Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.shares.lock_counts().entry(self.key) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

impl Seat {
    /// A reference time that all streams share, to align their timers.
    pub(super) fn epoch(&self) -> Instant {
        self.seats.0.epoch
    }

    /// Triggered when the stream has to close.
    pub(super) fn over(&self) -> &Stop {
        &self.life.over
    }

    /// On shutdown, the time over which all streams close; `None` otherwise.
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
