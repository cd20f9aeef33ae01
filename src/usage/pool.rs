//! Memory quotas by token, so that no client can use up what others need.
//!
//! A [`MemoryPool`] has a capacity, in a unit that its user chooses. Each token has a [`Quota`] in it.
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
const SHARE: usize = 4;

/// A bounded amount of memory, with its use by token.
#[derive(Debug)]
pub(super) struct Pool {
    total: Arc<Total>,
    accounts: Mutex<HashMap<TokenDigest, Account>>,
}

#[derive(Debug)]
struct Total {
    capacity: usize,
    /// At most the capacity, plus unchecked reservations.
    used: AtomicUsize,
}

/// The part of a pool that one token uses. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Account(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Arc<Total>,
    used: AtomicUsize,
}

/// An amount that a quota uses until this is dropped.
///
/// A clone reserves nothing: it is a short-lived copy for a store.
#[derive(Debug, Default)]
pub(super) struct Charge(Option<(Account, usize)>);

impl Pool {
    pub(super) fn new(capacity: usize) -> Self {
        let total = Total { capacity, used: AtomicUsize::new(0) };
        Self { total: Arc::new(total), accounts: Mutex::default() }
    }

    /// The quota of a token. It is kept while in use, until the next [`MemoryPool::remove_unused`].
    pub(super) fn account(&self, token: &TokenDigest) -> Account {
        self.lock_quotas().entry(*token).or_insert_with(|| self.anonymous()).clone()
    }

    /// A quota that belongs to no token.
    pub(super) fn anonymous(&self) -> Account {
        let pool = Arc::clone(&self.total);
        Account(Arc::new(Inner { pool, used: AtomicUsize::new(0) }))
    }

    /// Removes quotas without reservations.
    pub(super) fn sweep(&self) {
        // Reservations hold their quota, and so do requests that are about to reserve.
        self.lock_quotas().retain(|_, quota| Arc::strong_count(&quota.0) > 1);
    }

    fn lock_quotas(&self) -> MutexGuard<'_, HashMap<TokenDigest, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    /// Reserves an amount if it is within the token's limit; otherwise `None`.
    ///
    /// With concurrent calls slightly more than the capacity may be reserved.
    pub(super) fn try_charge(&self, amount: usize) -> Option<Charge> {
        self.has_room(amount).then(|| self.charge(amount))
    }

    /// Reserves an amount without a check, for data that is bounded elsewhere.
    pub(super) fn charge(&self, amount: usize) -> Charge {
        self.add(amount);
        Charge(Some((self.clone(), amount)))
    }

    fn has_room(&self, amount: usize) -> bool {
        let Inner { pool, used } = &*self.0;
        let free = pool.capacity.checked_sub(pool.used.load(Ordering::Relaxed));
        let used = used.load(Ordering::Relaxed).saturating_add(amount);
        let free_after = free.and_then(|free| free.checked_sub(amount));
        free_after.is_some_and(|free| used <= free.saturating_mul(SHARE))
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

impl Charge {
    /// Whether nothing is reserved.
    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Changes the reservation by the difference of `after` and `before`. False, without a change, if
    /// that exceeds the token's limit.
    pub(super) fn try_replace(&mut self, before: usize, after: usize) -> bool {
        let Some((quota, reserved)) = &mut self.0 else { return true };
        let Some(more) = after.checked_sub(before) else {
            let less = before - after;
            quota.subtract(less);
            *reserved -= less;
            return true;
        };
        let has_room = more == 0 || quota.has_room(more);
        if has_room {
            quota.add(more);
            *reserved += more;
        }
        has_room
    }

    /// Reserves another amount from the same quota without a check.
    pub(super) fn resized(&self, amount: usize) -> Self {
        self.0.as_ref().map_or_else(Self::default, |(quota, _)| quota.charge(amount))
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some((quota, amount)) = &self.0 {
            quota.subtract(*amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(pool: &Pool, token: &str) -> Account {
        pool.account(&TokenDigest::of(token))
    }

    /// Reserves one unit at a time until the limit is reached.
    fn fill(quota: &Account) -> Vec<Charge> {
        std::iter::from_fn(|| quota.try_charge(1)).collect()
    }

    #[test]
    fn one_token_gets_four_fifths_and_others_always_get_some() {
        let pool = Pool::new(1000);
        let first = fill(&account(&pool, "first"));
        assert_eq!(first.len(), 800);
        let second = fill(&account(&pool, "second"));
        assert_eq!(second.len(), 160);
        assert_eq!(fill(&account(&pool, "third")).len(), 32);
        drop(first);
        assert_eq!(fill(&account(&pool, "third")).len(), 672);
        assert_eq!(second.len(), 160);
    }

    #[test]
    fn amount_beyond_the_limit_is_rejected_unless_unchecked() {
        let pool = Pool::new(100);
        let quota = account(&pool, "token");
        assert!(quota.try_charge(81).is_none());
        assert!(quota.try_charge(usize::MAX).is_none());
        let beyond = quota.charge(200);
        assert!(quota.try_charge(1).is_none());
        drop(beyond);
        let reservation = quota.try_charge(80).unwrap();
        let copy = reservation.clone();
        drop(reservation);
        let mut again = quota.try_charge(70).unwrap();
        assert!(!again.try_replace(20, 31) && again.try_replace(20, 30));
        drop(copy);
        assert!(quota.try_charge(1).is_none());
        assert!(again.try_replace(20, 10));
        assert!(quota.try_charge(11).is_none() && quota.try_charge(10).is_some());
        drop(again);
        assert!(quota.try_charge(80).is_some());
    }

    #[test]
    fn quota_without_reservations_is_removed() {
        let pool = Pool::new(100);
        let reservation = account(&pool, "token").try_charge(1).unwrap();
        pool.sweep();
        assert_eq!(pool.lock_quotas().len(), 1);
        drop(reservation);
        pool.sweep();
        assert!(pool.lock_quotas().is_empty());
    }
}
