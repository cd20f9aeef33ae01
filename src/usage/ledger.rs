//! Where reports are added up by many threads at once, and taken out a generation at a time.
//!
//! **Why no increment is lost.** A counter lives in the shard that its key's hash names. To add to
//! it a thread holds that shard's lock; to drain, the whole map is taken out and an empty one put
//! in its place under the same lock. An increment is therefore wholly in the map that is taken or
//! wholly in the one left behind, and there is no third place.
//!
//! **Bounds.** Counters take room in two pools, in which each token has a share. Those of flags and
//! variants that the token's snapshot has are never refused: beyond the share they are kept under a
//! common application name and the present hour, so that there are no more of them than the
//! snapshot has flags. Those of other names have a smaller pool: they may be newer than the
//! snapshot, or made up. What there is no room for is counted together, one counter for all flags of
//! an hour and one variant for all of a flag. A report without any known flag costs nothing to report
//! again: it is refused whole rather.

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
    wire::usage::{Application, ImpactMetric},
};

/// The memory for what instances of applications tell of themselves, in bytes: about fifteen
/// thousand of an ordinary size for one token.
const REGISTRATION_BYTES: usize = 24 * 1024 * 1024;
/// The memory for samples of impact metrics, in bytes.
const SAMPLE_BYTES: usize = 16 * 1024 * 1024;
/// Which part of the limit of counters is for flags and variants that no snapshot has.
const UNKNOWN_PART: usize = 32;
/// Enough that threads seldom meet in one.
const SHARDS: usize = 64;

/// Counters, impact metrics and registrations, by environment.
#[derive(Debug)]
pub(super) struct Ledger {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    /// What all counters weigh.
    held: AtomicUsize,
    /// The weight of the counters in all shards, and of those that wait for upstream.
    counters: Pool,
    /// The same of what is counted under names that are not known.
    unknown: Pool,
    /// The memory of the samples in all shards, and of those that wait for upstream.
    samples: Pool,
    /// The memory of the registrations in all shards, and of those that wait for upstream.
    registrations: Pool,
}

#[derive(Debug, Default)]
struct Shard {
    counters: HashMap<(Environment, CounterKey), Counter>,
    impact: HashMap<Environment, ImpactSeries>,
    applications: Applications,
}

/// What a report counts of one flag.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) key: CounterKey,
    pub(super) name: Name,
    pub(super) counter: Counter,
}

impl Counted {
    /// Counts it with all others that have no room, in this hour.
    fn merge(&mut self, now: Hour) {
        self.key = CounterKey { hour: now, app: MERGED.into(), flag: MERGED.into() };
        self.counter = std::mem::take(&mut self.counter).anonymous();
    }
}

/// There is no room for a report, of which no flag is known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct NoRoom;

/// The shares of one token. They are looked up only where something is new.
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

/// What was reported for an environment since the drain before.
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

    /// Adds the counters of a report, reported in the hour `now`; returns what they could not hold.
    ///
    /// All of them are added, or none: a report with a known flag always, the unknown ones together
    /// where there is no room for each.
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

    /// Adds an application's impact metrics; returns how many samples found no room.
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
        let account = self.samples.account(token);
        let add = |metric: ImpactMetric| {
            // One metric always comes to the same shard, so that a gauge's last value is the last.
            let mut shard = self.shard(&(environment, &metric.name));
            let series = shard.impact.entry(environment.clone()).or_default();
            series.record(app, metric, repeat(Some(now)), |bytes| account.try_charge(bytes))
        };
        metrics.into_iter().map(add).sum()
    }

    /// Notes a registration; false when its token has no room.
    pub(super) fn register(
        &self,
        key: InstanceKey,
        app: Application,
        token: &TokenDigest,
        now: Instant,
    ) -> bool {
        let account = self.registrations.account(token);
        self.shard(&key).applications.register(key, app, &account, now)
    }

    /// The account of registrations of earlier runs: whose they were is not known any more.
    pub(super) fn restored_registrations(&self) -> Account {
        self.registrations.anonymous()
    }

    /// Notes that an instance is alive; false when it is unknown.
    pub(super) fn touch(&self, key: &InstanceKey, now: Instant) -> bool {
        self.shard(key).applications.touch(key, now)
    }

    /// Takes out everything, for each environment.
    pub(super) fn drain(&self, now: Instant) -> BTreeMap<Environment, Generation> {
        let mut generations = BTreeMap::<Environment, Generation>::new();
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
                generations.entry(environment).or_default().counters.push((key, counter));
            }
            for (environment, series) in impact {
                generations.entry(environment).or_default().impact.absorb(series);
            }
            for (environment, application) in applications {
                generations.entry(environment).or_default().applications.push(application);
            }
        }
        for pool in [&self.counters, &self.unknown, &self.samples, &self.registrations] {
            pool.sweep();
        }
        generations
    }

    /// How many counters are held, variants counting as such.
    pub(super) fn len(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// A copy of the counters, for an operator's eyes.
    pub(super) fn counters(&self) -> Vec<((Environment, CounterKey), Counter)> {
        let copy = |shard| -> Vec<_> {
            lock(shard)
                .counters
                .iter()
                .map(|(key, counter)| (key.clone(), counter.clone()))
                .collect()
        };
        self.shards.iter().flat_map(copy).collect()
    }

    /// The registrations that the next drain takes out, likewise.
    pub(super) fn applications(&self, now: Instant) -> Vec<Arc<Registration>> {
        let copy = |shard| -> Vec<_> { lock(shard).applications.waiting(now).cloned().collect() };
        self.shards.iter().flat_map(copy).collect()
    }

    /// Charges the unknown names of a counter that are not held yet; false if there is no room for its
    /// flag.
    fn try_charge_unknown(
        &self,
        environment: &Environment,
        Counted { key, name, counter }: &mut Counted,
        shares: Shares<'_>,
    ) -> bool {
        if *name == Name::Known && !counter.has_unknown_variants() {
            return true;
        }
        let account = shares.unknown();
        let place = (environment.clone(), key.clone());
        let shard = self.shard(&place);
        let present = shard.counters.get(&place);
        if *name == Name::Unknown && present.is_none() {
            let Some(charge) = account.try_charge(counter.own_weight(key)) else { return false };
            counter.set_charge(charge);
        }
        counter.charge_unknown_variants(present, &account);
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
            let Some(charge) = shares.counters().try_charge(weight) else {
                drop(shard);
                return self.add_merged(key, counter, shares, now);
            };
            counter.set_charge(charge);
        } else if !counter.is_charged() {
            // It is one for many, or was held when its report was let in and has been taken out since.
            counter.set_charge(shares.unknown().charge(weight));
        }
        self.insert(&mut shard, key, counter, shares);
        Lost(0)
    }

    /// Adds a counter of a known flag where it is one for all applications and hours.
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
        let before = present.variants();
        let lost = present.add(counter);
        let new = present.variants() - before;
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

/// Sums stay sums even if a thread died while adding: nothing in here panics half-way.
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
        fn new(ledger: &'a Ledger, token: &str) -> Self {
            let environment = Environment::new("dev");
            Self { ledger, environment, token: TokenDigest::of(token) }
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

    fn total(generations: &BTreeMap<Environment, Generation>) -> u64 {
        let counters = generations.values().flat_map(|generation| &generation.counters);
        counters.map(|(_, counter)| counter.total()).sum()
    }

    #[test]
    fn no_increment_falls_between_two_generations() {
        const THREADS: u64 = 4;
        const REPORTS: u64 = 20_000;
        let ledger = Ledger::new(1000);
        let client = Client::new(&ledger, "token");
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
                drained += total(&ledger.drain(Instant::now()));
            }
            drained
        });
        let rest = total(&ledger.drain(Instant::now()));
        assert_eq!(drained + rest, THREADS * REPORTS);
        assert_eq!(ledger.len(), 0);
    }

    /// What is held by hour, application and flag, with what it counts.
    fn held(ledger: &Ledger) -> BTreeMap<(Hour, Arc<str>, Arc<str>), u64> {
        let held = ledger.counters().into_iter();
        held.map(|((_, key), counter)| ((key.hour, key.app, key.flag), counter.total())).collect()
    }

    #[test]
    fn known_flags_always_count_if_need_be_under_one_application_and_this_hour() {
        let ledger = Ledger::new(100);
        let client = Client::new(&ledger, "token");
        for report in 0..1000 {
            let app = report.to_string();
            for flag in ["f", "g"] {
                let counted = counted(report % 7, &app, flag, &["v"], 1);
                assert_eq!(client.report([counted]), Ok(Lost(0)));
            }
        }
        let held = held(&ledger);
        // Four fifths, and in them those under the common name.
        assert!((60..90).contains(&ledger.len()), "{}", ledger.len());
        let merged = |flag: &str| held[&(hour(10), MERGED.into(), flag.into())];
        assert!(merged("f") > 900 && merged("g") > 900, "{held:?}");
        assert_eq!(total(&ledger.drain(Instant::now())), 2000);
    }

    #[test]
    fn unknown_flags_have_a_small_pool_and_cost_no_known_flag_its_counts() {
        let ledger = Ledger::new(100 * UNKNOWN_PART);
        let [client, other] = ["token", "other"].map(|token| Client::new(&ledger, token));
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
        // Those that are held need no room, and other tokens have some.
        assert_eq!(client.report(names(0..80).chain(yes("a", "f", 1))), Ok(Lost(0)));
        assert_eq!(other.report(names(80..90)), Ok(Lost(0)));
        let held = held(&ledger);
        assert_eq!(held[&(hour(10), "a".into(), "f".into())], 102);
        assert_eq!(held[&(hour(10), MERGED.into(), MERGED.into())], 500);
        assert_eq!(held.len(), 90 + 2);

        let waiting = ledger.drain(Instant::now());
        assert_eq!(total(&waiting), 80 + 80 + 10 + 2 + 7 * 100);
        // What waits for upstream takes room as long as it does.
        assert_eq!(client.report(names(100..101)), Err(NoRoom));
        drop(waiting);
        assert_eq!(client.report(names(100..180)), Ok(Lost(0)));
    }

    #[test]
    fn unknown_variants_share_the_pool_of_unknown_flags_and_known_ones_have_room() {
        let ledger = Ledger::new(10 * UNKNOWN_PART);
        let client = Client::new(&ledger, "token");
        let variants = |names: &[&str]| client.report([counted(10, "a", "f", names, 1)]);
        assert_eq!(variants(&["?1", "?2", "?3", "?4"]), Ok(Lost(0)));
        assert_eq!(variants(&["?1", "?5", "?6", "?7", "?8", "v"]), Ok(Lost(0)));
        assert_eq!(variants(&["?9", "w"]), Ok(Lost(0)));
        assert_eq!(variants(&["?1", "?10", "?11", "w"]), Ok(Lost(0)));
        let (place, counter) = ledger.counters().pop().unwrap();
        let told = counter.to_wire("dev", &place.1).stats;
        assert_eq!((told.yes, told.variants["?1"], told.variants[MERGED]), (4, 3, 3));
        // The flag, eight unknown variants, two known ones, and one for the others.
        assert_eq!(ledger.len(), 12);
    }
}
