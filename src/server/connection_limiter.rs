//! Limits the number of open connections, in total and per client address.
//!
//! When a limit is reached, an idle connection is closed for the new one, the least recently used ones
//! first (CLOCK algorithm). So clients that hold connections without using them cannot keep others out.
//! A connection in use is never closed for another.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};

use super::connection_activity::{ActivityCounters, ConnectionActivity, ConnectionState};

/// The interval of the search for an idle connection while the limit is reached.
const EVICTION_RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The connection limits of a listener, and its open connections.
#[derive(Debug)]
pub(super) struct ConnectionLimiter {
    max: usize,
    max_per_address: usize,
    state: Mutex<State>,
    permit_released: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: Vec<Option<Entry>>,
    free_indices: Vec<usize>,
    /// The position at which the next search for an idle connection continues.
    clock_hand: usize,
    by_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Entry {
    activity: Arc<ConnectionActivity>,
    /// The client's address; `None` until a load balancer has named it.
    address: Option<IpAddr>,
    /// The counters at the last search; `None` before the first.
    counters: Option<ActivityCounters>,
}

/// Permits one open connection until it is dropped.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    index: usize,
    activity: Arc<ConnectionActivity>,
}

impl ConnectionPermit {
    /// The activity of the connection.
    pub(super) fn activity(&self) -> &Arc<ConnectionActivity> {
        &self.activity
    }
}

impl ConnectionPermit {
    /// Counts the connection for a client whose address was not known before.
    pub(super) fn set_address(&self, address: IpAddr) -> Result<(), AddressLimitReached> {
        let mut state = self.limiter.lock();
        self.limiter.ensure_address_capacity(&mut state, address)?;
        if let Some(place) = &mut state.entries[self.index]
            && place.address.is_none()
            && !place.activity.is_evicted()
        {
            place.address = Some(address);
            *state.by_address.entry(address).or_default() += 1;
        }
        Ok(())
    }
}

/// The address has reached its limit, and has no idle connection that could be closed.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct AddressLimitReached;

impl ConnectionLimiter {
    /// Creates a limiter for `max` connections, and `max_per_address` of each address.
    pub(super) fn new(max: usize, max_per_address: Option<usize>) -> Arc<Self> {
        let max_per_address = max_per_address.unwrap_or(usize::MAX);
        Arc::new(Self {
            max,
            max_per_address,
            state: Mutex::default(),
            permit_released: Notify::new(),
        })
    }

    /// Acquires a permit for a client, whose address counts if it is known. Waits while the total limit
    /// is reached.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        address: Option<IpAddr>,
    ) -> Result<ConnectionPermit, AddressLimitReached> {
        loop {
            let mut freed = std::pin::pin!(self.permit_released.notified());
            freed.as_mut().enable();
            if let Some(slot) = self.try_acquire(address)? {
                return Ok(slot);
            }
            // A connection that is in use now may be idle at the next search.
            let _ = timeout(EVICTION_RETRY_INTERVAL, freed).await;
        }
    }

    fn try_acquire(
        self: &Arc<Self>,
        address: Option<IpAddr>,
    ) -> Result<Option<ConnectionPermit>, AddressLimitReached> {
        let mut state = self.lock();
        if let Some(address) = address {
            self.ensure_address_capacity(&mut state, address)?;
        }
        if state.in_use() >= self.max {
            state.evict(|_| true);
            return Ok(None);
        }
        let activity = Arc::<ConnectionActivity>::default();
        let place = Entry { activity: Arc::clone(&activity), address, counters: None };
        if let Some(address) = address {
            *state.by_address.entry(address).or_default() += 1;
        }
        let index = state.free_indices.pop().unwrap_or_else(|| {
            state.entries.push(None);
            state.entries.len() - 1
        });
        state.entries[index] = Some(place);
        Ok(Some(ConnectionPermit { limiter: Arc::clone(self), index, activity }))
    }

    /// Ensures that an address may open one more connection; closes an idle one of it if needed.
    fn ensure_address_capacity(
        &self,
        state: &mut State,
        address: IpAddr,
    ) -> Result<(), AddressLimitReached> {
        let count = state.by_address.get(&address).copied().unwrap_or(0);
        if count >= self.max_per_address && !state.evict(|place| place.address == Some(address)) {
            return Err(AddressLimitReached);
        }
        Ok(())
    }

    /// A panic under this lock leaves a usable state.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn in_use(&self) -> usize {
        self.entries.len() - self.free_indices.len()
    }

    /// Closes an idle connection that matches, and returns whether there was one. A connection that is
    /// new, or was used since the last search, is skipped in the first round.
    fn evict(&mut self, matches: impl Fn(&Entry) -> bool) -> bool {
        for _ in 0..2 * self.entries.len() {
            self.clock_hand = (self.clock_hand + 1) % self.entries.len();
            let Some(place) = &mut self.entries[self.clock_hand] else { continue };
            let is_idle = place.activity.state() == ConnectionState::Idle;
            if !is_idle || place.activity.is_evicted() || !matches(place) {
                continue;
            }
            let seen = Some(place.activity.counters());
            if std::mem::replace(&mut place.counters, seen) == seen {
                place.activity.evict();
                if let Some(address) = place.address {
                    self.release_address(address);
                }
                return true;
            }
        }
        false
    }

    /// Removes one connection from the count of an address.
    fn release_address(&mut self, address: IpAddr) {
        if let Some(count) = self.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut state = self.limiter.lock();
        if let Some(place) = state.entries[self.index].take() {
            if let Some(address) = place.address.filter(|_| !place.activity.is_evicted()) {
                state.release_address(address);
            }
            state.free_indices.push(self.index);
        }
        drop(state);
        self.limiter.permit_released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn try_acquire(
        limiter: &Arc<ConnectionLimiter>,
        last: u8,
    ) -> Option<Result<ConnectionPermit, AddressLimitReached>> {
        limiter.try_acquire(Some(address(last))).transpose()
    }

    fn acquired(limiter: &Arc<ConnectionLimiter>, last: u8) -> ConnectionPermit {
        try_acquire(limiter, last).expect("there is room").expect("the address is below its limit")
    }

    #[test]
    fn idle_connection_is_evicted_before_a_recently_used_one() {
        let limiter = ConnectionLimiter::new(3, None);
        let permits = [1, 2, 3].map(|last| acquired(&limiter, last));
        permits[0].activity().record_request(false);
        permits[2].activity().record_request(false);
        assert!(
            try_acquire(&limiter, 4).is_none(),
            "there is room once the evicted one has closed"
        );
        let evicted = permits.each_ref().map(|slot| slot.activity().is_evicted());
        assert_eq!(evicted, [false, true, false]);
        let [first, second, third] = permits;
        drop(second);
        let fourth = acquired(&limiter, 4);
        fourth.activity().record_request(false);
        first.activity().record_request(false);
        assert!(try_acquire(&limiter, 5).is_none());
        assert!(third.activity().is_evicted(), "it was not used since the last search");
    }

    #[test]
    fn connection_in_use_is_not_evicted() {
        let limiter = ConnectionLimiter::new(2, None);
        let (first, second) = (acquired(&limiter, 1), acquired(&limiter, 2));
        let answer = first.activity().begin_response();
        second.activity().record_read();
        assert!(try_acquire(&limiter, 3).is_none());
        assert!(!first.activity().is_evicted() && !second.activity().is_evicted());
        drop(answer);
        assert!(try_acquire(&limiter, 3).is_none());
        assert!(first.activity().is_evicted() && !second.activity().is_evicted());
    }

    #[test]
    fn address_at_its_limit_evicts_only_its_own_idle_connections() {
        let limiter = ConnectionLimiter::new(10, Some(2));
        let others = acquired(&limiter, 1);
        let (first, second) = (acquired(&limiter, 2), acquired(&limiter, 2));
        let busy = first.activity().begin_response();
        let third = acquired(&limiter, 2);
        assert!(second.activity().is_evicted() && !others.activity().is_evicted());
        let _third_is_busy = third.activity().begin_response();
        assert_eq!(try_acquire(&limiter, 2).unwrap().unwrap_err(), AddressLimitReached);
        drop(busy);
        assert!(try_acquire(&limiter, 2).unwrap().is_ok());
        assert!(!others.activity().is_evicted());
    }

    #[tokio::test]
    async fn waiting_client_gets_the_permit_of_a_closed_connection() {
        let limiter = ConnectionLimiter::new(1, None);
        let first = acquired(&limiter, 1);
        let _busy = first.activity().begin_response();
        let waiting = Arc::clone(&limiter);
        let waiting = tokio::spawn(async move { waiting.acquire(Some(address(2))).await.is_ok() });
        tokio::task::yield_now().await;
        drop(first);
        assert!(waiting.await.unwrap());
        let state = limiter.lock();
        assert_eq!((state.in_use(), state.by_address.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn newly_idle_connection_is_evicted_for_a_waiting_client() {
        let limiter = ConnectionLimiter::new(1, None);
        let first = acquired(&limiter, 1);
        let busy = first.activity().begin_response();
        let waiting = Arc::clone(&limiter);
        let waiting = tokio::spawn(async move { waiting.acquire(Some(address(2))).await.is_ok() });
        tokio::time::sleep(EVICTION_RETRY_INTERVAL * 4).await;
        assert!(!first.activity().is_evicted());
        drop(busy);
        tokio::time::sleep(EVICTION_RETRY_INTERVAL * 4).await;
        assert!(first.activity().is_evicted());
        drop(first);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn connection_counts_for_its_client_once_the_load_balancer_has_named_it() {
        let limiter = ConnectionLimiter::new(10, Some(1));
        let [first, second] = [(); 2].map(|()| limiter.try_acquire(None).unwrap().unwrap());
        first.set_address(address(1)).unwrap();
        let busy = first.activity().begin_response();
        assert_eq!(second.set_address(address(1)), Err(AddressLimitReached));
        second.set_address(address(2)).unwrap();
        drop((busy, first));
        assert!(try_acquire(&limiter, 1).unwrap().is_ok());
        assert_eq!(limiter.lock().by_address.len(), 1, "the address of the second is left");
    }
}
