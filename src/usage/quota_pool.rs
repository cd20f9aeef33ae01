//! Memory quotas by token, so that no client can use up what others need.
//!
//! A [`QuotaPool`] has a capacity, in a unit that its user chooses. Each token has a [`Quota`] in it.
//! Data that is kept for a token holds a [`Reservation`], which is returned to the pool when dropped.
//!
//! **Limit.** A quota may use at most [`SHARE_FACTOR`] times the free part of the pool (the "dynamic
//! thresholds" of switches' packet buffers). A single token gets four fifths. Several tokens with
//! unlimited demand get equal parts, and always leave some for another one.
//!
//! This module knows neither the data nor what happens when a reservation fails.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::token::TokenDigest;

/// The number of times the free part of a pool that one quota may use.
const SHARE_FACTOR: usize = 4;

/// Bytes that a text takes besides its contents: the pointer, the reference counts and the allocator's
/// overhead.
pub(super) const TEXT_OVERHEAD_BYTES: usize = 40;

/// A bounded amount of memory, with its use by token.
#[derive(Debug)]
pub(super) struct QuotaPool {
    state: Arc<PoolState>,
    quotas: Mutex<HashMap<TokenDigest, Quota>>,
}

#[derive(Debug)]
struct PoolState {
    capacity: usize,
    /// At most the capacity, plus unchecked reservations.
    used: AtomicUsize,
}

/// The part of a pool that one token uses. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Quota(Arc<QuotaState>);

#[derive(Debug)]
struct QuotaState {
    pool: Arc<PoolState>,
    used: AtomicUsize,
}

/// An amount that a quota uses until this is dropped.
///
/// A clone reserves nothing: it is a short-lived copy for a store.
#[derive(Debug, Default)]
pub(super) struct Reservation(Option<(Quota, usize)>);

impl QuotaPool {
    pub(super) fn new(capacity: usize) -> Self {
        let total = PoolState { capacity, used: AtomicUsize::new(0) };
        Self { state: Arc::new(total), quotas: Mutex::default() }
    }

    /// The quota of a token. It is kept while in use, until the next [`QuotaPool::remove_unused`].
    pub(super) fn quota_of(&self, token: &TokenDigest) -> Quota {
        self.lock_quotas().entry(*token).or_insert_with(|| self.unowned_quota()).clone()
    }

    /// A quota that belongs to no token.
    pub(super) fn unowned_quota(&self) -> Quota {
        let pool = Arc::clone(&self.state);
        Quota(Arc::new(QuotaState { pool, used: AtomicUsize::new(0) }))
    }

    /// Removes quotas without reservations.
    pub(super) fn remove_unused(&self) {
        // Reservations hold their quota, and so do requests that are about to reserve.
        self.lock_quotas().retain(|_, quota| Arc::strong_count(&quota.0) > 1);
    }

    fn lock_quotas(&self) -> MutexGuard<'_, HashMap<TokenDigest, Quota>> {
        self.quotas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Quota {
    /// Reserves an amount if it is within the token's limit; otherwise `None`.
    ///
    /// With concurrent calls slightly more than the capacity may be reserved.
    pub(super) fn try_reserve(&self, amount: usize) -> Option<Reservation> {
        self.has_capacity(amount).then(|| self.reserve_unchecked(amount))
    }

    /// Reserves an amount without a check, for data that is bounded elsewhere.
    pub(super) fn reserve_unchecked(&self, amount: usize) -> Reservation {
        self.add(amount);
        Reservation(Some((self.clone(), amount)))
    }

    fn has_capacity(&self, amount: usize) -> bool {
        let QuotaState { pool, used } = &*self.0;
        let free = pool.capacity.checked_sub(pool.used.load(Ordering::Relaxed));
        let used = used.load(Ordering::Relaxed).saturating_add(amount);
        let free_after = free.and_then(|free| free.checked_sub(amount));
        free_after.is_some_and(|free| used <= free.saturating_mul(SHARE_FACTOR))
    }

    fn add(&self, amount: usize) {
        self.0.used.fetch_add(amount, Ordering::Relaxed);
        self.0.pool.used.fetch_add(amount, Ordering::Relaxed);
    }

    fn subtract(&self, amount: usize) {
        self.0.used.fetch_sub(amount, Ordering::Relaxed);
        self.0.pool.used.fetch_sub(amount, Ordering::Relaxed);
    }
}

impl Reservation {
    /// Whether nothing is reserved.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Changes the reservation by the difference of `after` and `before`. False, without a change, if
    /// that exceeds the token's limit.
    pub(super) fn try_resize(&mut self, before: usize, after: usize) -> bool {
        let Some((quota, reserved)) = &mut self.0 else { return true };
        let Some(more) = after.checked_sub(before) else {
            let less = before - after;
            quota.subtract(less);
            *reserved -= less;
            return true;
        };
        let has_room = more == 0 || quota.has_capacity(more);
        if has_room {
            quota.add(more);
            *reserved += more;
        }
        has_room
    }

    /// Reserves another amount from the same quota without a check.
    pub(super) fn reserve_same_quota(&self, amount: usize) -> Self {
        self.0.as_ref().map_or_else(Self::default, |(quota, _)| quota.reserve_unchecked(amount))
    }
}

impl Clone for Reservation {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some((quota, amount)) = &self.0 {
            quota.subtract(*amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota_of(pool: &QuotaPool, token: &str) -> Quota {
        pool.quota_of(&TokenDigest::of(token))
    }

    /// Reserves one unit at a time until the limit is reached.
    fn fill(quota: &Quota) -> Vec<Reservation> {
        std::iter::from_fn(|| quota.try_reserve(1)).collect()
    }

    #[test]
    fn one_token_gets_four_fifths_and_others_always_get_some() {
        let pool = QuotaPool::new(1000);
        let first = fill(&quota_of(&pool, "first"));
        assert_eq!(first.len(), 800);
        let second = fill(&quota_of(&pool, "second"));
        assert_eq!(second.len(), 160);
        assert_eq!(fill(&quota_of(&pool, "third")).len(), 32);
        drop(first);
        assert_eq!(fill(&quota_of(&pool, "third")).len(), 672);
        assert_eq!(second.len(), 160);
    }

    #[test]
    fn amount_beyond_the_limit_is_rejected_unless_unchecked() {
        let pool = QuotaPool::new(100);
        let quota = quota_of(&pool, "token");
        assert!(quota.try_reserve(81).is_none());
        assert!(quota.try_reserve(usize::MAX).is_none());
        let beyond = quota.reserve_unchecked(200);
        assert!(quota.try_reserve(1).is_none());
        drop(beyond);
        let reservation = quota.try_reserve(80).unwrap();
        let copy = reservation.clone();
        drop(reservation);
        let mut again = quota.try_reserve(70).unwrap();
        assert!(!again.try_resize(20, 31) && again.try_resize(20, 30));
        drop(copy);
        assert!(quota.try_reserve(1).is_none());
        assert!(again.try_resize(20, 10));
        assert!(quota.try_reserve(11).is_none() && quota.try_reserve(10).is_some());
        drop(again);
        assert!(quota.try_reserve(80).is_some());
    }

    #[test]
    fn quota_without_reservations_is_removed() {
        let pool = QuotaPool::new(100);
        let reservation = quota_of(&pool, "token").try_reserve(1).unwrap();
        pool.remove_unused();
        assert_eq!(pool.lock_quotas().len(), 1);
        drop(reservation);
        pool.remove_unused();
        assert!(pool.lock_quotas().is_empty());
    }
}
