//! Adds up reports from many threads, and hands over the sums when drained.
//!
//! **Why no increment is lost.** A counter is in the shard that its key's hash selects. To add to it, a
//! thread holds that shard's lock. Draining replaces the shard's map with an empty one under the same
//! lock. An increment is therefore either in the drained map or in the new one.
//!
//! **Bounds.** Counters use two pools, and each token has a quota in both. Counters of flags and
//! variants in the token's snapshot are never rejected: beyond the quota they are merged under a common
//! application name and the present hour, so that there are at most as many as the snapshot has flags.
//! Counters of other names, which may be newer than the snapshot or invented, use a smaller pool. Beyond
//! its quota they are merged: into one counter for all flags of an hour, and one variant for all of a
//! flag. A report without any known flag can simply be reported again, so it is rejected as a whole
//! instead.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, Hash, RandomState},
    iter::repeat,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use jiff::Timestamp;

use super::{
    applications::{Applications, InstanceKey, Registration},
    counter::{Counter, CounterKey, Hour, Lost, MERGED, Name},
    impact::ImpactSeries,
    pool::{Account, Pool},
};
use crate::{
    token::{Environment, TokenDigest},
    wire::usage::{ClientApplication, ImpactMetric},
};

/// Memory for registrations in bytes: about fifteen thousand of ordinary size for one token.
const REGISTRATION_BYTES: usize = 24 * 1024 * 1024;
/// Memory for samples of impact metrics, in bytes.
const SAMPLE_BYTES: usize = 16 * 1024 * 1024;
/// The fraction of the counter limit for flags and variants in no snapshot is one in this many.
const UNKNOWN_PART: usize = 32;
/// Enough that threads rarely contend for one.
const SHARDS: usize = 64;

/// Counters, impact metrics and registrations, by environment.
#[derive(Debug)]
pub(super) struct Ledger {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    /// The weight of the counters in all shards.
    held: AtomicUsize,
    /// Weight of counters, in the shards and queued for upstream.
    counters: Pool,
    /// The same for counters and variants with unknown names.
    unknown: Pool,
    /// Bytes of samples, in the shards and queued for upstream.
    samples: Pool,
    /// Bytes of registrations, in the shards and queued for upstream.
    registrations: Pool,
}

#[derive(Debug, Default)]
struct Shard {
    counters: HashMap<(Environment, CounterKey), Counter>,
    impact: HashMap<Environment, ImpactSeries>,
    applications: Applications,
}

/// A report's counter for one flag.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) key: CounterKey,
    pub(super) name: Name,
    pub(super) counter: Counter,
}

impl Counted {
    /// Moves it to the counter that merges flags without room, in this hour.
    fn merge(&mut self, now: Hour) {
        self.key = CounterKey { hour: now, app: MERGED.into(), flag: MERGED.into() };
        self.counter = std::mem::take(&mut self.counter).anonymous();
    }
}

/// The report exceeds its token's quota and names no known flag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct NoRoom;

/// The quotas of one token, which are looked up only when something new is added.
#[derive(Clone, Copy, Debug)]
struct Shares<'a> {
    ledger: &'a Ledger,
    token: &'a TokenDigest,
}

impl Shares<'_> {
    fn counters(self) -> Account {
        self.ledger.counters.account(self.token)
    }

    fn unknown(self) -> Account {
        self.ledger.unknown.account(self.token)
    }
}

/// Usage reported for an environment since the previous drain.
#[derive(Debug, Default)]
pub(super) struct Generation {
    pub(super) counters: Vec<(CounterKey, Counter)>,
    pub(super) impact: ImpactSeries,
    pub(super) applications: Vec<Arc<Registration>>,
}

impl Ledger {
    pub(super) fn new(max_counters: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            held: AtomicUsize::new(0),
            counters: Pool::new(max_counters),
            unknown: Pool::new(max_counters / UNKNOWN_PART),
            samples: Pool::new(SAMPLE_BYTES),
            registrations: Pool::new(REGISTRATION_BYTES),
        }
    }

    /// Adds the counters of a report that arrives in the hour `now`; returns what exceeds the counters'
    /// limits.
    ///
    /// Adds either all counters or none. A report with a known flag is always added, with unknown flags
    /// merged if they exceed the quota.
    pub(super) fn count(
        &self,
        environment: &Environment,
        mut counters: Vec<Counted>,
        token: &TokenDigest,
        now: Hour,
    ) -> Result<Lost, NoRoom> {
        let shares = Shares { ledger: self, token };
        let has_known = counters.iter().any(|it| it.name == Name::Known);
        for counted in &mut counters {
            if self.try_charge_unknown(environment, counted, shares) {
                continue;
            }
            if !has_known {
                return Err(NoRoom);
            }
            counted.merge(now);
        }
        let mut lost = 0_u64;
        for counted in counters {
            lost = lost.saturating_add(self.add(environment, counted, shares, now).0);
        }
        Ok(Lost(lost))
    }

    /// Adds an application's impact metrics; returns how many samples exceed the quota.
    pub(super) fn measure(
        &self,
        environment: &Environment,
        app: &Arc<str>,
        metrics: Vec<ImpactMetric>,
        token: &TokenDigest,
        now: Timestamp,
    ) -> usize {
        if metrics.is_empty() {
            return 0;
        }
        let quota = self.samples.account(token);
        let add = |metric: ImpactMetric| {
            // A metric always uses the same shard, so that the last value of a gauge is well defined.
            let mut shard = self.shard(&(environment, &metric.name));
            let series = shard.impact.entry(environment.clone()).or_default();
            series.record(app, metric, repeat(Some(now)), |bytes| quota.try_charge(bytes))
        };
        metrics.into_iter().map(add).sum()
    }

    /// Records a registration; false if it exceeds the token's quota.
    pub(super) fn register(
        &self,
        key: InstanceKey,
        app: ClientApplication,
        token: &TokenDigest,
        now: Instant,
    ) -> bool {
        let quota = self.registrations.account(token);
        self.shard(&key).applications.register(key, app, &quota, now)
    }

    /// The quota for registrations of earlier runs, which are not attributed to tokens.
    pub(super) fn restored_registrations(&self) -> Account {
        self.registrations.anonymous()
    }

    /// Marks an instance as active; false if it is not tracked.
    pub(super) fn touch(&self, key: &InstanceKey, now: Instant) -> bool {
        self.shard(key).applications.touch(key, now)
    }

    /// Removes all usage, by environment.
    pub(super) fn drain(&self, now: Instant) -> BTreeMap<Environment, Generation> {
        let mut drained = BTreeMap::<Environment, Generation>::new();
        for shard in &self.shards {
            let (counters, impact, applications) = {
                let mut shard = lock(shard);
                let counters = std::mem::take(&mut shard.counters);
                let weight = counters.iter().map(|((_, key), it)| it.weight(key)).sum();
                self.held.fetch_sub(weight, Ordering::Relaxed);
                let impact = std::mem::take(&mut shard.impact);
                (counters, impact, shard.applications.due(now))
            };
            for ((environment, key), counter) in counters {
                drained.entry(environment).or_default().counters.push((key, counter));
            }
            for (environment, series) in impact {
                drained.entry(environment).or_default().impact.absorb(series);
            }
            for (environment, application) in applications {
                drained.entry(environment).or_default().applications.push(application);
            }
        }
        for pool in [&self.counters, &self.unknown, &self.samples, &self.registrations] {
            pool.sweep();
        }
        drained
    }

    /// The weight of the counters in all shards; variants count too.
    pub(super) fn len(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// A copy of the counters, for operators.
    pub(super) fn copy_counters(&self) -> Vec<((Environment, CounterKey), Counter)> {
        let copy = |shard| -> Vec<_> {
            lock(shard)
                .counters
                .iter()
                .map(|(key, counter)| (key.clone(), counter.clone()))
                .collect()
        };
        self.shards.iter().flat_map(copy).collect()
    }

    /// The registrations that the next drain will remove, for operators.
    pub(super) fn applications(&self, now: Instant) -> Vec<Arc<Registration>> {
        let copy = |shard| -> Vec<_> { lock(shard).applications.waiting(now).cloned().collect() };
        self.shards.iter().flat_map(copy).collect()
    }

    /// Reserves memory for the unknown names of a counter that are new; false if its flag exceeds the
    /// quota.
    fn try_charge_unknown(
        &self,
        environment: &Environment,
        Counted { key, name, counter }: &mut Counted,
        shares: Shares<'_>,
    ) -> bool {
        if *name == Name::Known && !counter.has_unknown_variants() {
            return true;
        }
        let quota = shares.unknown();
        let place = (environment.clone(), key.clone());
        let shard = self.shard(&place);
        let present = shard.counters.get(&place);
        if *name == Name::Unknown && present.is_none() {
            let Some(reservation) = quota.try_charge(counter.own_weight(key)) else { return false };
            counter.set_charge(reservation);
        }
        counter.charge_unknown_variants(present, &quota);
        true
    }

    fn add(
        &self,
        environment: &Environment,
        Counted { key, name, mut counter }: Counted,
        shares: Shares<'_>,
        now: Hour,
    ) -> Lost {
        let key = (environment.clone(), key);
        let mut shard = self.shard(&key);
        if let Some(present) = shard.counters.get_mut(&key) {
            return self.merge(present, counter, shares);
        }
        let weight = counter.own_weight(&key.1);
        if name == Name::Known {
            let Some(reservation) = shares.counters().try_charge(weight) else {
                drop(shard);
                return self.add_merged(key, counter, shares, now);
            };
            counter.set_charge(reservation);
        } else if !counter.is_charged() {
            // A merged counter, or one that existed when its report was checked and was drained since.
            counter.set_charge(shares.unknown().charge(weight));
        }
        self.insert(&mut shard, key, counter, shares);
        Lost(0)
    }

    /// Adds a counter of a known flag to the one that merges all applications and hours.
    fn add_merged(
        &self,
        (environment, key): (Environment, CounterKey),
        mut counter: Counter,
        shares: Shares<'_>,
        now: Hour,
    ) -> Lost {
        let key = (environment, CounterKey { hour: now, app: MERGED.into(), ..key });
        let mut shard = self.shard(&key);
        if let Some(present) = shard.counters.get_mut(&key) {
            return self.merge(present, counter, shares);
        }
        counter.set_charge(shares.counters().charge(counter.own_weight(&key.1)));
        self.insert(&mut shard, key, counter, shares);
        Lost(0)
    }

    fn merge(&self, present: &mut Counter, counter: Counter, shares: Shares<'_>) -> Lost {
        let before = present.variant_count();
        let lost = present.add(counter);
        let new = present.variant_count() - before;
        if new > 0 {
            present.charge_variants(&shares.counters(), &shares.unknown());
            self.held.fetch_add(new, Ordering::Relaxed);
        }
        lost
    }

    fn insert(
        &self,
        shard: &mut Shard,
        key: (Environment, CounterKey),
        mut counter: Counter,
        shares: Shares<'_>,
    ) {
        counter.charge_variants(&shares.counters(), &shares.unknown());
        self.held.fetch_add(counter.weight(&key.1), Ordering::Relaxed);
        shard.counters.insert(key, counter);
    }

    fn shard(&self, key: &impl Hash) -> MutexGuard<'_, Shard> {
        #[expect(clippy::cast_possible_truncation, reason = "only a few bits are wanted")]
        let hash = self.hasher.hash_one(key) as usize;
        lock(&self.shards[hash % SHARDS])
    }
}

/// A poisoned lock is still consistent: nothing in here panics halfway through an update.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::usage::ToggleStats;

    fn hour(nth: i64) -> Hour {
        Hour::of(Timestamp::from_second(3600 * nth).unwrap())
    }

    /// Reports with one token, in the tenth hour.
    struct Client<'a> {
        ledger: &'a Ledger,
        environment: Environment,
        token: TokenDigest,
    }

    impl<'a> Client<'a> {
        fn new(aggregator: &'a Ledger, token: &str) -> Self {
            let environment = Environment::new("dev");
            Self { ledger: aggregator, environment, token: TokenDigest::of(token) }
        }

        fn report(&self, counted: impl IntoIterator<Item = Counted>) -> Result<Lost, NoRoom> {
            let counted = counted.into_iter().collect();
            self.ledger.count(&self.environment, counted, &self.token, hour(10))
        }
    }

    fn counted(of_hour: i64, app: &str, flag: &str, variants: &[&str], yes: u64) -> Counted {
        let name = |text: &str| if text.starts_with('?') { Name::Unknown } else { Name::Known };
        let variants = variants.iter().map(|variant| (Arc::from(*variant), yes)).collect();
        let stats = ToggleStats { yes, no: 0, variants };
        let counter = Counter::of(stats, &Arc::default(), name).0;
        let key = CounterKey { hour: hour(of_hour), app: app.into(), flag: flag.into() };
        Counted { key, name: name(flag), counter }
    }

    fn yes(app: &str, flag: &str, yes: u64) -> [Counted; 1] {
        [counted(10, app, flag, &[], yes)]
    }

    fn total(drained: &BTreeMap<Environment, Generation>) -> u64 {
        let counters = drained.values().flat_map(|drained| &drained.counters);
        counters.map(|(_, counter)| counter.total()).sum()
    }

    #[test]
    fn no_increment_is_lost_between_two_drains() {
        const THREADS: u64 = 4;
        const REPORTS: u64 = 20_000;
        let aggregator = Ledger::new(1000);
        let client = Client::new(&aggregator, "token");
        let drained = std::thread::scope(|scope| {
            let recorders: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        for report in 0..REPORTS {
                            let flag = (report % 7).to_string();
                            assert_eq!(client.report(yes("a", &flag, 1)), Ok(Lost(0)));
                        }
                    })
                })
                .collect();
            let mut drained = 0;
            while !recorders.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                drained += total(&aggregator.drain(Instant::now()));
            }
            drained
        });
        let rest = total(&aggregator.drain(Instant::now()));
        assert_eq!(drained + rest, THREADS * REPORTS);
        assert_eq!(aggregator.len(), 0);
    }

    /// Evaluations by hour, application and flag.
    fn held(aggregator: &Ledger) -> BTreeMap<(Hour, Arc<str>, Arc<str>), u64> {
        let counters = aggregator.copy_counters().into_iter();
        counters
            .map(|((_, key), counter)| ((key.hour, key.app, key.flag), counter.total()))
            .collect()
    }

    #[test]
    fn snapshot_flags_beyond_the_quota_are_merged_under_one_application_and_hour() {
        let aggregator = Ledger::new(100);
        let client = Client::new(&aggregator, "token");
        for report in 0..1000 {
            let app = report.to_string();
            for flag in ["f", "g"] {
                let counted = counted(report % 7, &app, flag, &["v"], 1);
                assert_eq!(client.report([counted]), Ok(Lost(0)));
            }
        }
        let counts = held(&aggregator);
        // Four fifths of the limit, including the merged counters.
        assert!((60..90).contains(&aggregator.len()), "{}", aggregator.len());
        let merged = |flag: &str| counts[&(hour(10), MERGED.into(), flag.into())];
        assert!(merged("f") > 900 && merged("g") > 900, "{counts:?}");
        assert_eq!(total(&aggregator.drain(Instant::now())), 2000);
    }

    #[test]
    fn unknown_flags_use_a_small_pool_and_cost_snapshot_flags_no_counts() {
        let aggregator = Ledger::new(100 * UNKNOWN_PART);
        let [client, other] = ["token", "other"].map(|token| Client::new(&aggregator, token));
        let names = |range: std::ops::Range<u32>| {
            range.map(|nth| counted(10, "a", &format!("?{nth}"), &[], 1))
        };
        assert_eq!(client.report(names(0..50)), Ok(Lost(0)));
        assert_eq!(client.report(names(50..90)), Err(NoRoom));
        assert_eq!(client.report(names(50..80).chain(yes("a", "f", 1))), Ok(Lost(0)));
        assert_eq!(client.report(names(80..81)), Err(NoRoom));
        for _ in 0..100 {
            assert_eq!(client.report(names(79..85).chain(yes("a", "f", 1))), Ok(Lost(0)));
        }
        // Existing counters need no additional memory, and other tokens have a quota left.
        assert_eq!(client.report(names(0..80).chain(yes("a", "f", 1))), Ok(Lost(0)));
        assert_eq!(other.report(names(80..90)), Ok(Lost(0)));
        let counts = held(&aggregator);
        assert_eq!(counts[&(hour(10), "a".into(), "f".into())], 102);
        assert_eq!(counts[&(hour(10), MERGED.into(), MERGED.into())], 500);
        assert_eq!(counts.len(), 90 + 2);

        let drained = aggregator.drain(Instant::now());
        assert_eq!(total(&drained), 80 + 80 + 10 + 2 + 7 * 100);
        // Drained counters use the quota until they are sent.
        assert_eq!(client.report(names(100..101)), Err(NoRoom));
        drop(drained);
        assert_eq!(client.report(names(100..180)), Ok(Lost(0)));
    }

    #[test]
    fn only_unknown_variants_share_the_pool_of_unknown_flags() {
        let aggregator = Ledger::new(10 * UNKNOWN_PART);
        let client = Client::new(&aggregator, "token");
        let variants = |names: &[&str]| client.report([counted(10, "a", "f", names, 1)]);
        assert_eq!(variants(&["?1", "?2", "?3", "?4"]), Ok(Lost(0)));
        assert_eq!(variants(&["?1", "?5", "?6", "?7", "?8", "v"]), Ok(Lost(0)));
        assert_eq!(variants(&["?9", "w"]), Ok(Lost(0)));
        assert_eq!(variants(&["?1", "?10", "?11", "w"]), Ok(Lost(0)));
        let (place, counter) = aggregator.copy_counters().pop().unwrap();
        let stats = counter.to_wire("dev", &place.1).stats;
        assert_eq!((stats.yes, stats.variants["?1"], stats.variants[MERGED]), (4, 3, 3));
        // The flag, eight unknown variants, two known ones, and one for the others.
        assert_eq!(aggregator.len(), 12);
    }
}
