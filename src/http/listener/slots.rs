//! The places for connections: how many there are, and who makes room for whom.
//!
//! When all are taken, an idle connection ends for the newcomer, one that was not used lately first:
//! clients that hold connections and send nothing cannot keep others out. A place in use is never
//! taken away. The same goes for the places of one address.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};

use super::activity::{Activity, Seen, Waiting};

/// How often an idle connection is looked for while there is no place.
const SEARCH_EVERY: Duration = Duration::from_millis(50);

/// The places of a listener.
#[derive(Debug)]
pub(super) struct Slots {
    max: usize,
    max_per_address: usize,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    places: Vec<Option<Place>>,
    free: Vec<usize>,
    /// Where the search for an idle connection goes on.
    clock_hand: usize,
    by_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Place {
    activity: Arc<Activity>,
    /// Whose it is; `None` until a load balancer has said so.
    address: Option<IpAddr>,
    /// What had happened on it when it was looked at last, if it was.
    seen: Option<Seen>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    place: usize,
    activity: Arc<Activity>,
}

impl Slot {
    /// What happens on the connection.
    pub(super) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }
}

impl Slot {
    /// Says whose the connection is, where that was not known when it took the place.
    pub(super) fn name(&self, address: IpAddr) -> Result<(), AddressFull> {
        let mut state = self.slots.lock();
        self.slots.claim(&mut state, address)?;
        if let Some(place) = &mut state.places[self.place]
            && place.address.is_none()
            && !place.activity.is_evicted()
        {
            place.address = Some(address);
            *state.by_address.entry(address).or_default() += 1;
        }
        Ok(())
    }
}

/// There is no place for an address, nor an idle connection of it that could make room.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct AddressFull;

impl Slots {
    /// So many places, and so many for one address.
    pub(super) fn new(max: usize, max_per_address: Option<usize>) -> Arc<Self> {
        let max_per_address = max_per_address.unwrap_or(usize::MAX);
        Arc::new(Self { max, max_per_address, state: Mutex::default(), freed: Notify::new() })
    }

    /// Takes a place for a client at an address, if that is known, and waits for one as long as all are in
    /// use.
    pub(super) async fn take(
        self: &Arc<Self>,
        address: Option<IpAddr>,
    ) -> Result<Slot, AddressFull> {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(slot) = self.try_take(address)? {
                return Ok(slot);
            }
            // A connection that is in use now may be idle soon, and can make room then.
            let _ = timeout(SEARCH_EVERY, freed).await;
        }
    }

    fn try_take(self: &Arc<Self>, address: Option<IpAddr>) -> Result<Option<Slot>, AddressFull> {
        let mut state = self.lock();
        if let Some(address) = address {
            self.claim(&mut state, address)?;
        }
        if state.taken() >= self.max {
            state.evict(|_| true);
            return Ok(None);
        }
        let activity = Arc::<Activity>::default();
        let place = Place { activity: Arc::clone(&activity), address, seen: None };
        if let Some(address) = address {
            *state.by_address.entry(address).or_default() += 1;
        }
        let index = state.free.pop().unwrap_or_else(|| {
            state.places.push(None);
            state.places.len() - 1
        });
        state.places[index] = Some(place);
        Ok(Some(Slot { slots: Arc::clone(self), place: index, activity }))
    }

    /// Sees to it that an address may have one more.
    fn claim(&self, state: &mut State, address: IpAddr) -> Result<(), AddressFull> {
        let count = state.by_address.get(&address).copied().unwrap_or(0);
        if count >= self.max_per_address && !state.evict(|place| place.address == Some(address)) {
            return Err(AddressFull);
        }
        Ok(())
    }

    /// A panic under this lock leaves places that are usable as they are.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn taken(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Ends an idle connection among those that match, if there is one. One that is new, or was used
    /// since the last search, is passed over the first time.
    fn evict(&mut self, matches: impl Fn(&Place) -> bool) -> bool {
        for _ in 0..2 * self.places.len() {
            self.clock_hand = (self.clock_hand + 1) % self.places.len();
            let Some(place) = &mut self.places[self.clock_hand] else { continue };
            let is_idle = place.activity.waiting() == Waiting::Request;
            if !is_idle || place.activity.is_evicted() || !matches(place) {
                continue;
            }
            let seen = Some(place.activity.seen());
            if std::mem::replace(&mut place.seen, seen) == seen {
                place.activity.evict();
                if let Some(address) = place.address {
                    self.leave(address);
                }
                return true;
            }
        }
        false
    }

    /// Counts one connection less of an address.
    fn leave(&mut self, address: IpAddr) {
        if let Some(count) = self.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        if let Some(place) = state.places[self.place].take() {
            if let Some(address) = place.address.filter(|_| !place.activity.is_evicted()) {
                state.leave(address);
            }
            state.free.push(self.place);
        }
        drop(state);
        self.slots.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn take(slots: &Arc<Slots>, last: u8) -> Option<Result<Slot, AddressFull>> {
        slots.try_take(Some(address(last))).transpose()
    }

    fn taken(slots: &Arc<Slots>, last: u8) -> Slot {
        take(slots, last).expect("there is room").expect("it has its share")
    }

    #[test]
    fn an_idle_connection_makes_room_and_one_used_lately_only_where_there_is_no_other() {
        let slots = Slots::new(3, None);
        let held = [1, 2, 3].map(|last| taken(&slots, last));
        held[0].activity().note_request(false);
        held[2].activity().note_request(false);
        assert!(take(&slots, 4).is_none(), "there is room when one has ended");
        let evicted = held.each_ref().map(|slot| slot.activity().is_evicted());
        assert_eq!(evicted, [false, true, false]);
        let [first, second, third] = held;
        drop(second);
        let fourth = taken(&slots, 4);
        fourth.activity().note_request(false);
        first.activity().note_request(false);
        assert!(take(&slots, 5).is_none());
        assert!(third.activity().is_evicted(), "it was not used since the last search");
    }

    #[test]
    fn a_connection_in_use_keeps_its_place() {
        let slots = Slots::new(2, None);
        let (first, second) = (taken(&slots, 1), taken(&slots, 2));
        let answer = first.activity().open();
        second.activity().note_bytes();
        assert!(take(&slots, 3).is_none());
        assert!(!first.activity().is_evicted() && !second.activity().is_evicted());
        drop(answer);
        assert!(take(&slots, 3).is_none());
        assert!(first.activity().is_evicted() && !second.activity().is_evicted());
    }

    #[test]
    fn an_address_takes_from_itself_and_from_nobody_else() {
        let slots = Slots::new(10, Some(2));
        let others = taken(&slots, 1);
        let (first, second) = (taken(&slots, 2), taken(&slots, 2));
        let busy = first.activity().open();
        let third = taken(&slots, 2);
        assert!(second.activity().is_evicted() && !others.activity().is_evicted());
        let _third_is_busy = third.activity().open();
        assert_eq!(take(&slots, 2).unwrap().unwrap_err(), AddressFull);
        drop(busy);
        assert!(take(&slots, 2).unwrap().is_ok());
        assert!(!others.activity().is_evicted());
    }

    #[tokio::test]
    async fn whoever_waits_is_served_when_somebody_leaves() {
        let slots = Slots::new(1, None);
        let first = taken(&slots, 1);
        let _busy = first.activity().open();
        let waiting = Arc::clone(&slots);
        let waiting = tokio::spawn(async move { waiting.take(Some(address(2))).await.is_ok() });
        tokio::task::yield_now().await;
        drop(first);
        assert!(waiting.await.unwrap());
        let state = slots.lock();
        assert_eq!((state.taken(), state.by_address.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_becomes_idle_makes_room_for_who_waits() {
        let slots = Slots::new(1, None);
        let first = taken(&slots, 1);
        let busy = first.activity().open();
        let waiting = Arc::clone(&slots);
        let waiting = tokio::spawn(async move { waiting.take(Some(address(2))).await.is_ok() });
        tokio::time::sleep(SEARCH_EVERY * 4).await;
        assert!(!first.activity().is_evicted());
        drop(busy);
        tokio::time::sleep(SEARCH_EVERY * 4).await;
        assert!(first.activity().is_evicted());
        drop(first);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn a_connection_counts_for_its_client_once_a_load_balancer_has_named_it() {
        let slots = Slots::new(10, Some(1));
        let [first, second] = [(); 2].map(|()| slots.try_take(None).unwrap().unwrap());
        first.name(address(1)).unwrap();
        let busy = first.activity().open();
        assert_eq!(second.name(address(1)), Err(AddressFull));
        second.name(address(2)).unwrap();
        drop((busy, first));
        assert!(take(&slots, 1).unwrap().is_ok());
        assert_eq!(slots.lock().by_address.len(), 1, "that of the second is left");
    }
}
