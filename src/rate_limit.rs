//! Rate limits: token buckets in memory, single ones and one per key in bounded number.
//!
//! A full bucket of a key carries no information and is removed. At the bound, all new keys share one
//! bucket: a flood of keys limits new clients but does not reset the limits of known ones.
//!
//! Nothing here waits: the caller rejects, or sleeps for the time until it may try again.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Maximum number of buckets.
const MAX_KEYS: usize = 10_000;
/// Shortest interval between removals of full buckets, so that a flood of new keys does not cause one
/// for each request.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The parameters of a token bucket.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// The capacity: this many at once.
    pub burst: u32,
    /// The time after which one more is available.
    pub interval: Duration,
}

/// A token bucket.
#[derive(Debug)]
pub struct RateLimiter {
    rate: Rate,
    /// When the bucket will be full.
    full_at: Instant,
}

impl RateLimiter {
    /// A full bucket of this rate.
    pub fn new(rate: Rate) -> Self {
        Self { rate, full_at: Instant::now() }
    }

    /// Takes one from the bucket. `Err` is the time until one is available.
    pub fn acquire(&mut self) -> Result<(), Duration> {
        let now = Instant::now();
        let full_at = self.full_at.max(now) + self.rate.interval;
        let wait = (full_at - now).saturating_sub(self.rate.interval * self.rate.burst);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.full_at = full_at;
        Ok(())
    }

    /// Returns what [`acquire`](Self::acquire) took.
    fn refund(&mut self) {
        self.full_at = self.full_at.checked_sub(self.rate.interval).unwrap_or(self.full_at);
    }
}

/// Token buckets by key.
#[derive(Debug)]
pub struct KeyedRateLimiter<K> {
    rate: Rate,
    max_keys: usize,
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    /// New keys share the key `None` at the bound.
    buckets: HashMap<Option<K>, RateLimiter>,
    /// When full buckets were last removed.
    last_swept: Option<Instant>,
}

impl<K: Clone + Eq + Hash> KeyedRateLimiter<K> {
    /// A limiter with full buckets of this rate.
    pub fn new(rate: Rate) -> Self {
        let state = State { buckets: HashMap::new(), last_swept: None };
        Self { rate, max_keys: MAX_KEYS, state: Mutex::new(state) }
    }

    /// Takes one from the bucket of `key`. `Err` is the time until one is available.
    pub fn acquire(&self, key: &K) -> Result<(), Duration> {
        let mut state = self.lock();
        let mut key = Some(key.clone());
        if !state.buckets.contains_key(&key) && !state.has_room(self.max_keys) {
            key = None;
        }
        state.buckets.entry(key).or_insert_with(|| RateLimiter::new(self.rate)).acquire()
    }

    /// Returns what [`acquire`](Self::acquire) took. A key without a bucket took it from the shared one.
    pub fn refund(&self, key: &K) {
        let mut state = self.lock();
        let own = Some(key.clone());
        let key = if state.buckets.contains_key(&own) { own } else { None };
        if let Some(bucket) = state.buckets.get_mut(&key) {
            bucket.refund();
        }
    }

    /// Ignores poisoning: a panic under this lock leaves the map intact.
    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> State<K> {
    /// Whether another bucket fits, after removing full ones if that is due.
    fn has_room(&mut self, max: usize) -> bool {
        let now = Instant::now();
        let is_due = self.last_swept.is_none_or(|swept| now >= swept + SWEEP_INTERVAL);
        if self.buckets.len() >= max && is_due {
            self.buckets.retain(|_, bucket| bucket.full_at > now);
            self.last_swept = Some(now);
        }
        self.buckets.len() < max
    }
}

/// The part of an address that a client cannot vary: an IPv4 address, or the /64 network of an IPv6
/// address.
pub fn client_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & (u128::MAX << 64);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { burst: 2, interval: Duration::from_secs(10) };

    #[tokio::test(start_paused = true)]
    async fn bucket_empties_and_refills() {
        let buckets = KeyedRateLimiter::new(RATE);
        assert_eq!(buckets.acquire(&"a"), Ok(()));
        assert_eq!(buckets.acquire(&"a"), Ok(()));
        assert_eq!(buckets.acquire(&"a"), Err(Duration::from_secs(10)));
        assert_eq!(buckets.acquire(&"b"), Ok(()));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(buckets.acquire(&"a"), Ok(()));
        assert_eq!(buckets.acquire(&"a"), Err(Duration::from_secs(10)));
        buckets.refund(&"a");
        assert_eq!(buckets.acquire(&"a"), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn buckets_are_bounded_and_a_flood_of_keys_limits_only_new_ones() {
        let buckets = KeyedRateLimiter { max_keys: 3, ..KeyedRateLimiter::new(RATE) };
        for key in 0..3 {
            assert_eq!(buckets.acquire(&key), Ok(()));
        }
        let admitted = (3..1000).filter(|key| buckets.acquire(key).is_ok()).count();
        assert_eq!(admitted, 2);
        assert_eq!(buckets.acquire(&0), Ok(()), "a known key still has its bucket");
        assert!(buckets.lock().buckets.len() <= 4);
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(buckets.acquire(&5), Ok(()));
        assert_eq!(buckets.lock().buckets.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn refund_of_a_key_without_a_bucket_goes_to_the_shared_bucket() {
        let buckets = KeyedRateLimiter { max_keys: 1, ..KeyedRateLimiter::new(RATE) };
        assert_eq!(buckets.acquire(&0), Ok(()));
        for newcomer in 1..100 {
            assert_eq!(buckets.acquire(&newcomer), Ok(()), "{newcomer}");
            buckets.refund(&newcomer);
        }
        // The bucket of the first key is unchanged.
        assert_eq!(buckets.acquire(&0), Ok(()));
        assert!(buckets.acquire(&0).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn full_buckets_are_removed_at_most_once_a_second_at_the_bound() {
        let buckets = KeyedRateLimiter { max_keys: 2, ..KeyedRateLimiter::new(RATE) };
        for key in 0..2 {
            assert_eq!(buckets.acquire(&key), Ok(()));
        }
        tokio::time::advance(Duration::from_millis(9500)).await;
        assert_eq!(buckets.acquire(&2), Ok(()));
        // The first buckets are full now, but were not at the last removal.
        tokio::time::advance(SWEEP_INTERVAL / 2).await;
        assert_eq!(buckets.acquire(&3), Ok(()));
        assert!(buckets.acquire(&4).is_err());
        tokio::time::advance(SWEEP_INTERVAL / 2).await;
        assert_eq!(buckets.acquire(&5), Ok(()));
        assert_eq!(buckets.acquire(&5), Ok(()));
    }

    #[test]
    fn network_is_the_part_of_an_address_that_a_client_cannot_vary() {
        let check = |one: &str, other: &str| {
            assert_eq!(client_network(one.parse().unwrap()), other.parse::<IpAddr>().unwrap());
        };
        check("192.0.2.7", "192.0.2.7");
        check("::ffff:192.0.2.7", "192.0.2.7");
        check("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::");
    }
}
