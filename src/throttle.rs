//! How often may be tried: token buckets in memory, of which there is a bounded number.
//!
//! A bucket that has filled up again says nothing and is forgotten. While there are as many as
//! there may be, whoever is new shares one: a flood throttles newcomers rather than forgetting whom
//! it was throttling.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How many buckets there may be.
const MAX_KEYS: usize = 10_000;
/// How often those that are full are looked for: a flood of newcomers does not pay for it each time.
const SWEEP: Duration = Duration::from_secs(1);

/// How often something may be done.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// So often at once.
    pub burst: u32,
    /// And then once in this time.
    pub every: Duration,
}

impl Rate {
    /// How long it takes to fill a bucket that is `used`.
    fn refill(self, used: u32) -> Duration {
        self.every * used
    }
}

/// Buckets by key.
#[derive(Debug)]
pub struct Buckets<K> {
    rate: Rate,
    max: usize,
    held: Mutex<Held<K>>,
}

#[derive(Debug)]
struct Held<K> {
    /// By key, when its bucket will be full; `None` is shared by newcomers.
    full_at: HashMap<Option<K>, Instant>,
    /// When those that were full were last removed for want of room.
    swept: Option<Instant>,
}

impl<K: Clone + Eq + Hash> Buckets<K> {
    /// Buckets of this rate, all of them full.
    pub fn new(rate: Rate) -> Self {
        let held = Held { full_at: HashMap::new(), swept: None };
        Self { rate, max: MAX_KEYS, held: Mutex::new(held) }
    }

    /// Takes one from the bucket of `key`, or says when there will be one.
    pub fn take(&self, key: &K) -> Result<(), Duration> {
        let now = Instant::now();
        let mut held = self.held();
        let mut key = Some(key.clone());
        if !held.full_at.contains_key(&key) && !held.has_room(self.max, now) {
            key = None;
        }
        let full_at = held.full_at.get(&key).map_or(now, |at| (*at).max(now)) + self.rate.every;
        let wait = (full_at - now).saturating_sub(self.rate.refill(self.rate.burst));
        if wait > Duration::ZERO {
            return Err(wait);
        }
        held.full_at.insert(key, full_at);
        Ok(())
    }

    /// Gives back what [`Buckets::take`] took: whoever has no bucket took it from the shared one.
    pub fn give_back(&self, key: &K) {
        let mut held = self.held();
        let own = Some(key.clone());
        let key = if held.full_at.contains_key(&own) { own } else { None };
        if let Some(full_at) = held.full_at.get_mut(&key) {
            *full_at = full_at.checked_sub(self.rate.every).unwrap_or(*full_at);
        }
    }

    fn held(&self) -> MutexGuard<'_, Held<K>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Held<K> {
    /// Whether there may be one bucket more, once those that are full are removed.
    fn has_room(&mut self, max: usize, now: Instant) -> bool {
        let is_due = self.swept.is_none_or(|swept| now >= swept + SWEEP);
        if self.full_at.len() >= max && is_due {
            self.full_at.retain(|_, full_at| *full_at > now);
            self.swept = Some(now);
        }
        self.full_at.len() < max
    }
}

/// Where somebody comes from, as far as they cannot choose it: of IPv6 the network of 64 bits.
pub fn origin(address: IpAddr) -> IpAddr {
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

    const RATE: Rate = Rate { burst: 2, every: Duration::from_secs(10) };

    #[tokio::test(start_paused = true)]
    async fn a_bucket_empties_and_fills_again() {
        let buckets = Buckets::new(RATE);
        assert_eq!(buckets.take(&"a"), Ok(()));
        assert_eq!(buckets.take(&"a"), Ok(()));
        assert_eq!(buckets.take(&"a"), Err(Duration::from_secs(10)));
        assert_eq!(buckets.take(&"b"), Ok(()));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(buckets.take(&"a"), Ok(()));
        assert_eq!(buckets.take(&"a"), Err(Duration::from_secs(10)));
        buckets.give_back(&"a");
        assert_eq!(buckets.take(&"a"), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn buckets_are_bounded_and_a_flood_of_keys_throttles_newcomers() {
        let buckets = Buckets { max: 3, ..Buckets::new(RATE) };
        for key in 0..3 {
            assert_eq!(buckets.take(&key), Ok(()));
        }
        let admitted = (3..1000).filter(|key| buckets.take(key).is_ok()).count();
        assert_eq!(admitted, 2);
        assert_eq!(buckets.take(&0), Ok(()), "whoever was known has a bucket still");
        assert!(buckets.held().full_at.len() <= 4);
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(buckets.take(&5), Ok(()));
        assert_eq!(buckets.held().full_at.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn shared_bucket_is_given_back_to() {
        let buckets = Buckets { max: 1, ..Buckets::new(RATE) };
        assert_eq!(buckets.take(&0), Ok(()));
        for newcomer in 1..100 {
            assert_eq!(buckets.take(&newcomer), Ok(()), "{newcomer}");
            buckets.give_back(&newcomer);
        }
        // The bucket of the first is as it was.
        assert_eq!(buckets.take(&0), Ok(()));
        assert!(buckets.take(&0).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn newcomers_beyond_the_bound_look_for_room_once_a_second() {
        let buckets = Buckets { max: 2, ..Buckets::new(RATE) };
        for key in 0..2 {
            assert_eq!(buckets.take(&key), Ok(()));
        }
        tokio::time::advance(Duration::from_millis(9500)).await;
        assert_eq!(buckets.take(&2), Ok(()));
        // The first buckets are full now, and were not when they were last looked at.
        tokio::time::advance(SWEEP / 2).await;
        assert_eq!(buckets.take(&3), Ok(()));
        assert!(buckets.take(&4).is_err());
        tokio::time::advance(SWEEP / 2).await;
        assert_eq!(buckets.take(&5), Ok(()));
        assert_eq!(buckets.take(&5), Ok(()));
    }

    #[test]
    fn an_origin_is_what_its_holder_cannot_vary() {
        let check = |one: &str, other: &str| {
            assert_eq!(origin(one.parse().unwrap()), other.parse::<IpAddr>().unwrap());
        };
        check("192.0.2.7", "192.0.2.7");
        check("::ffff:192.0.2.7", "192.0.2.7");
        check("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::");
    }
}
