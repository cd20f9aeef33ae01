//! Memory that tokens share: no client can take what another needs.
//!
//! A [`Pool`] has a capacity, in a unit of its user's choice. Each token has an [`Account`] in it.
//! What is kept for a token holds a [`Charge`], which returns its part of the pool when dropped.
//!
//! **Shares.** An account may hold at most [`SHARE`] times what is free in the pool (the "dynamic
//! thresholds" of switches' packet buffers). One token alone gets four fifths. Several that want
//! everything get the same each, and always leave something free for one more.
//!
//! This module does not know what is kept, nor what happens where there is no room.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::token::TokenDigest;

/// How many times the free part of a pool one account may hold.
const SHARE: usize = 4;

/// A bounded amount of memory, and how much of it each token uses.
#[derive(Debug)]
pub(super) struct Pool {
    total: Arc<Total>,
    accounts: Mutex<HashMap<TokenDigest, Account>>,
}

#[derive(Debug)]
struct Total {
    capacity: usize,
    /// At most the capacity, and what was charged without a check.
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

/// An amount that an account uses, until dropped.
///
/// A copy is charged to nobody: it is made for a store, and does not last.
#[derive(Debug, Default)]
pub(super) struct Charge(Option<(Account, usize)>);

impl Pool {
    pub(super) fn new(capacity: usize) -> Self {
        let total = Total { capacity, used: AtomicUsize::new(0) };
        Self { total: Arc::new(total), accounts: Mutex::default() }
    }

    /// The account of a token; kept while it uses anything, until the next [`Pool::sweep`].
    pub(super) fn account(&self, token: &TokenDigest) -> Account {
        self.accounts().entry(*token).or_insert_with(|| self.anonymous()).clone()
    }

    /// An account of no token.
    pub(super) fn anonymous(&self) -> Account {
        let pool = Arc::clone(&self.total);
        Account(Arc::new(Inner { pool, used: AtomicUsize::new(0) }))
    }

    /// Forgets the accounts that nothing is charged to.
    pub(super) fn sweep(&self) {
        // Each charge holds its account, and so does each request that is about to charge.
        self.accounts().retain(|_, account| Arc::strong_count(&account.0) > 1);
    }

    fn accounts(&self) -> MutexGuard<'_, HashMap<TokenDigest, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    /// Charges an amount that is within the token's share; `None` where it is not.
    ///
    /// With many threads a little more may be charged than there is.
    pub(super) fn try_charge(&self, amount: usize) -> Option<Charge> {
        self.has_room(amount).then(|| self.charge(amount))
    }

    /// Charges an amount that is kept whether there is room or not: something else bounds it.
    pub(super) fn charge(&self, amount: usize) -> Charge {
        self.add(amount);
        Charge(Some((self.clone(), amount)))
    }

    fn has_room(&self, amount: usize) -> bool {
        let Inner { pool, used } = &*self.0;
        let free = pool.capacity.checked_sub(pool.used.load(Ordering::Relaxed));
        let used = used.load(Ordering::Relaxed).saturating_add(amount);
        let free_then = free.and_then(|free| free.checked_sub(amount));
        free_then.is_some_and(|free| used <= free.saturating_mul(SHARE))
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
    /// Whether nothing is charged.
    pub(super) fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Charges the same account with `after` where it was charged with `before`; false, and nothing is
    /// changed, where that is more and beyond the token's share.
    pub(super) fn try_replace(&mut self, before: usize, after: usize) -> bool {
        let Some((account, charged)) = &mut self.0 else { return true };
        let Some(more) = after.checked_sub(before) else {
            let less = before - after;
            account.subtract(less);
            *charged -= less;
            return true;
        };
        let has_room = more == 0 || account.has_room(more);
        if has_room {
            account.add(more);
            *charged += more;
        }
        has_room
    }

    /// Charges the same account with another amount, whether there is room or not.
    pub(super) fn resized(&self, amount: usize) -> Self {
        self.0.as_ref().map_or_else(Self::default, |(account, _)| account.charge(amount))
    }
}

impl Clone for Charge {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some((account, amount)) = &self.0 {
            account.subtract(*amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(pool: &Pool, token: &str) -> Account {
        pool.account(&TokenDigest::of(token))
    }

    /// Charges one at a time as long as there is room.
    fn fill(account: &Account) -> Vec<Charge> {
        std::iter::from_fn(|| account.try_charge(1)).collect()
    }

    #[test]
    fn one_token_gets_four_fifths_and_the_others_always_something() {
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
    fn amount_beyond_the_share_is_refused_whole_unless_it_is_not_checked() {
        let pool = Pool::new(100);
        let account = account(&pool, "token");
        assert!(account.try_charge(81).is_none());
        assert!(account.try_charge(usize::MAX).is_none());
        let beyond = account.charge(200);
        assert!(account.try_charge(1).is_none());
        drop(beyond);
        let charge = account.try_charge(80).unwrap();
        let copy = charge.clone();
        drop(charge);
        let mut again = account.try_charge(70).unwrap();
        assert!(!again.try_replace(20, 31) && again.try_replace(20, 30));
        drop(copy);
        assert!(account.try_charge(1).is_none());
        assert!(again.try_replace(20, 10));
        assert!(account.try_charge(11).is_none() && account.try_charge(10).is_some());
        drop(again);
        assert!(account.try_charge(80).is_some());
    }

    #[test]
    fn account_is_forgotten_once_nothing_is_charged_to_it() {
        let pool = Pool::new(100);
        let charge = account(&pool, "token").try_charge(1).unwrap();
        pool.sweep();
        assert_eq!(pool.accounts().len(), 1);
        drop(charge);
        pool.sweep();
        assert!(pool.accounts().is_empty());
    }
}
