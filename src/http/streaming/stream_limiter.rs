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

use super::stream_metrics::StreamMetrics;
use crate::{
    auth::Authenticator,
    rate_limit::client_network,
    shutdown_signal::ShutdownSignal,
    token::{Grant, TokenDigest},
};

/// Interval between checks whether the tokens of open streams are still valid.
const TOKEN_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The longest time over which all streams close on shutdown, so that clients do not reconnect at once.
const MAX_STAGGER: Duration = Duration::from_secs(5);

/// The maximum numbers of open streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamLimits {
    pub(super) total: usize,
    pub(super) per_address: usize,
    pub(super) per_token: usize,
}

/// Grants permits for streams within the limits. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct StreamLimiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    auth: Authenticator,
    permits: Arc<Semaphore>,
    /// Streams per client address.
    per_address: KeyedLimit<IpAddr>,
    /// Streams per token.
    per_token: KeyedLimit<TokenDigest>,
    /// One entry for each token with a stream.
    token_lifetimes: Mutex<HashMap<TokenDigest, Weak<TokenLifetime>>>,
    /// On shutdown, the time over which all streams close.
    stagger: OnceLock<Duration>,
    metrics: StreamMetrics,
}

/// Shared by all streams of one token: its grant, and the signal to close them.
#[derive(Debug)]
struct TokenLifetime {
    grant: Arc<Grant>,
    close_signal: ShutdownSignal,
}

impl StreamLimiter {
    pub(super) fn new(room: &StreamLimits, auth: Authenticator) -> Self {
        let per_address = KeyedLimit::new(room.per_address);
        let per_token = KeyedLimit::new(room.per_token);
        let permits = Arc::new(Semaphore::new(room.total.min(Semaphore::MAX_PERMITS)));
        let (token_lifetimes, stagger) = Default::default();
        let (epoch, metrics) = (Instant::now(), StreamMetrics::new());
        let inner = Inner {
            epoch,
            auth,
            permits,
            per_address,
            per_token,
            token_lifetimes,
            stagger,
            metrics,
        };
        Self(Arc::new(inner))
    }

    /// Acquires a permit for a token and a client address; `None` if a limit is reached.
    pub(super) fn acquire(
        &self,
        (digest, client): (TokenDigest, IpAddr),
        grant: Arc<Grant>,
    ) -> Option<StreamPermit> {
        let inner = &self.0;
        let Some(slot) = inner.acquire_slot(digest, client_network(client)) else {
            inner.metrics.refused.increment(1);
            return None;
        };
        let mut lifetimes = inner.lock_lifetimes();
        let lifetime = match lifetimes.get(&digest).and_then(Weak::upgrade) {
            Some(lifetime) if lifetime.grant == grant => lifetime,
            other => {
                if let Some(outdated) = other {
                    outdated.close_signal.trigger();
                }
                let lifetime =
                    Arc::new(TokenLifetime { grant, close_signal: ShutdownSignal::default() });
                lifetimes.insert(digest, Arc::downgrade(&lifetime));
                // `stagger` is set while this lock is held.
                if inner.stagger.get().is_some() {
                    lifetime.close_signal.trigger();
                }
                lifetime
            }
        };
        inner.metrics.open.increment(1);
        Some(StreamPermit { lifetime, limiter: self.clone(), _slot: slot })
    }

    /// Closes the streams of tokens that were revoked or whose grant changed. Runs until dropped.
    pub(super) async fn close_revoked(&self) {
        loop {
            tokio::time::sleep(TOKEN_CHECK_INTERVAL).await;
            self.0.lock_lifetimes().retain(|digest, lifetime| {
                let Some(lifetime) = lifetime.upgrade() else { return false };
                let is_current =
                    self.0.auth.current_grant(digest).is_some_and(|it| it == lifetime.grant);
                if !is_current {
                    lifetime.close_signal.trigger();
                }
                is_current
            });
        }
    }

    /// Closes all streams gradually.
    pub(super) fn close_all(&self, grace: Duration) {
        let lifetimes = self.0.lock_lifetimes();
        self.0.stagger.get_or_init(|| (grace / 2).min(MAX_STAGGER));
        for lifetime in lifetimes.values().filter_map(Weak::upgrade) {
            lifetime.close_signal.trigger();
        }
    }
}

impl Inner {
    fn acquire_slot(&self, digest: TokenDigest, address: IpAddr) -> Option<Slot> {
        Some(Slot {
            _permit: Arc::clone(&self.permits).try_acquire_owned().ok()?,
            _per_address: self.per_address.acquire(address)?,
            _per_token: self.per_token.acquire(digest)?,
        })
    }

    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock_lifetimes(&self) -> MutexGuard<'_, HashMap<TokenDigest, Weak<TokenLifetime>>> {
        self.token_lifetimes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A permit for one stream; dropping it releases its slot.
#[derive(Debug)]
pub(super) struct StreamPermit {
    lifetime: Arc<TokenLifetime>,
    limiter: StreamLimiter,
    _slot: Slot,
}

/// A place within each of the limits, released on drop.
#[derive(Debug)]
struct Slot {
    _permit: OwnedSemaphorePermit,
    _per_address: KeyedSlot<IpAddr>,
    _per_token: KeyedSlot<TokenDigest>,
}

/// Counts per key, with a maximum per key. A cheap handle.
#[derive(Clone, Debug)]
struct KeyedLimit<K: Eq + Hash> {
    max: usize,
    counts: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Copy + Eq + Hash> KeyedLimit<K> {
    fn new(max: usize) -> Self {
        Self { max, counts: Arc::default() }
    }

    fn acquire(&self, key: K) -> Option<KeyedSlot<K>> {
        let mut counts = self.lock_counts();
        let count = counts.get(&key).copied().unwrap_or_default();
        if count >= self.max {
            return None;
        }
        counts.insert(key, count + 1);
        Some(KeyedSlot { key, limit: self.clone() })
    }
}

impl<K: Eq + Hash> KeyedLimit<K> {
    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock_counts(&self) -> MutexGuard<'_, HashMap<K, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One count of a key, released on drop.
#[derive(Debug)]
struct KeyedSlot<K: Copy + Eq + Hash> {
    key: K,
    limit: KeyedLimit<K>,
}

impl<K: Copy + Eq + Hash> Drop for KeyedSlot<K> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.limit.lock_counts().entry(self.key) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

impl StreamPermit {
    /// A reference time that all streams share, to align their timers.
    pub(super) fn epoch(&self) -> Instant {
        self.limiter.0.epoch
    }

    /// Triggered when the stream has to close.
    pub(super) fn close_signal(&self) -> &ShutdownSignal {
        &self.lifetime.close_signal
    }

    /// On shutdown, the time over which all streams close; `None` otherwise.
    pub(super) fn stagger(&self) -> Option<Duration> {
        self.limiter.0.stagger.get().copied()
    }

    pub(super) fn metrics(&self) -> &StreamMetrics {
        &self.limiter.0.metrics
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.metrics().open.decrement(1);
    }
}
