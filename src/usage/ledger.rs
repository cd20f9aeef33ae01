//! Where reports are added up by many threads at once, and taken out a generation at a time.
//!
//! **Why no increment is lost.** A counter lives in the shard that its key's hash names. To add to
//! it a thread holds that shard's lock; to drain, the whole map is taken out and an empty one put
//! in its place under the same lock. An increment is therefore wholly in the map that is taken or
//! wholly in the one left behind, and there is no third place.
//!
//! **Bounds.** Above 7/8 of the limit a new counter is kept under a common application name, so
//! that counts per flag stay exact; at the limit it is dropped and counted.

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
    applications::{Applications, InstanceKey},
    counter::{Counter, CounterKey, Lost, Room},
    impact::ImpactSeries,
};
use crate::{
    token::Environment,
    wire::usage::{Application, ImpactMetric},
};

/// The application under which counters are merged when there are too many.
pub(super) const MERGED_APP: &str = "parapet-merged";
/// How many application instances are known at a time, about.
pub(super) const MAX_APPLICATIONS: usize = 16_384;
/// How many samples of impact metrics are held.
pub(super) const MAX_SAMPLES: usize = 16_384;
/// Enough that threads seldom meet in one.
const SHARDS: usize = 64;

/// Counters, impact metrics and registrations, by environment.
#[derive(Debug)]
pub(super) struct Ledger {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    /// What all counters weigh; with many threads a few more may come in than allowed.
    held: AtomicUsize,
    /// How many samples of impact metrics all shards hold; likewise.
    samples: AtomicUsize,
    max_counters: usize,
}

#[derive(Debug, Default)]
struct Shard {
    counters: HashMap<(Environment, CounterKey), Counter>,
    impact: HashMap<Environment, ImpactSeries>,
    applications: Applications,
}

/// What was reported for an environment since the drain before.
#[derive(Debug, Default)]
pub(super) struct Generation {
    pub(super) counters: Vec<(CounterKey, Counter)>,
    pub(super) impact: ImpactSeries,
    pub(super) applications: Vec<Application>,
}

impl Ledger {
    pub(super) fn new(max_counters: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            held: AtomicUsize::new(0),
            samples: AtomicUsize::new(0),
            max_counters,
        }
    }

    /// Adds a counter; what is returned found no room.
    pub(super) fn count(
        &self,
        environment: &Environment,
        key: CounterKey,
        counter: Counter,
    ) -> Lost {
        let soft = self.max_counters - self.max_counters / 8;
        let counter = match self.add((environment.clone(), key.clone()), counter, soft) {
            Ok(lost) => return lost,
            Err(counter) => counter,
        };
        let merged = CounterKey { app: MERGED_APP.into(), ..key };
        let added = self.add((environment.clone(), merged), counter, self.max_counters);
        added.unwrap_or_else(|counter| Lost(counter.total()))
    }

    /// Adds an application's impact metrics; returns how many samples found no room.
    pub(super) fn measure(
        &self,
        environment: &Environment,
        app: &Arc<str>,
        metrics: Vec<ImpactMetric>,
        now: Timestamp,
    ) -> usize {
        let add = |metric: ImpactMetric| {
            // One metric always comes to the same shard, so that a gauge's last value is the last.
            let mut shard = self.shard(&(environment, &metric.name));
            let series = shard.impact.entry(environment.clone()).or_default();
            let before = series.len();
            let room = MAX_SAMPLES.saturating_sub(self.samples.load(Ordering::Relaxed));
            let lost = series.record(app, metric, repeat(Some(now)), before + room);
            self.samples.fetch_add(series.len() - before, Ordering::Relaxed);
            lost
        };
        metrics.into_iter().map(add).sum()
    }

    /// Notes a registration; false when there is no room.
    pub(super) fn register(&self, key: InstanceKey, app: Application, now: Instant) -> bool {
        let mut shard = self.shard(&key);
        shard.applications.register(key, app, now, MAX_APPLICATIONS / SHARDS)
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
                let weight = counters.values().map(Counter::weight).sum();
                self.held.fetch_sub(weight, Ordering::Relaxed);
                let impact = std::mem::take(&mut shard.impact);
                let samples = impact.values().map(ImpactSeries::len).sum();
                self.samples.fetch_sub(samples, Ordering::Relaxed);
                (counters, impact, shard.applications.due(now))
            };
            for ((environment, key), counter) in counters {
                generations.entry(environment).or_default().counters.push((key, counter));
            }
            for (environment, series) in impact {
                // No metric is in two shards: nothing can be merged here, or be without room.
                generations.entry(environment).or_default().impact.absorb(series, usize::MAX);
            }
            for (environment, application) in applications {
                generations.entry(environment).or_default().applications.push(application);
            }
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

    /// A copy of the registrations that the next drain takes out, likewise.
    pub(super) fn applications(&self, now: Instant) -> Vec<Application> {
        let copy = |shard| -> Vec<_> { lock(shard).applications.waiting(now).cloned().collect() };
        self.shards.iter().flat_map(copy).collect()
    }

    fn add(
        &self,
        key: (Environment, CounterKey),
        counter: Counter,
        limit: usize,
    ) -> Result<Lost, Counter> {
        let mut shard = self.shard(&key);
        if let Some(present) = shard.counters.get_mut(&key) {
            let full = self.held.load(Ordering::Relaxed) >= self.max_counters;
            let before = present.weight();
            let lost = present.add(counter, if full { Room::None } else { Room::Left });
            self.held.fetch_add(present.weight() - before, Ordering::Relaxed);
            return Ok(lost);
        }
        if self.held.load(Ordering::Relaxed) >= limit {
            return Err(counter);
        }
        self.held.fetch_add(counter.weight(), Ordering::Relaxed);
        shard.counters.insert(key, counter);
        Ok(Lost(0))
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
    use crate::{usage::counter::Hour, wire::usage::ToggleStats};

    fn yes(count: u64) -> Counter {
        let stats = ToggleStats { yes: count, ..ToggleStats::default() };
        Counter::of(stats, &Arc::default()).0
    }

    fn key(app: &str, flag: &str) -> CounterKey {
        CounterKey { hour: Hour::of(Timestamp::UNIX_EPOCH), app: app.into(), flag: flag.into() }
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
        let environment = Environment::new("dev");
        let drained = std::thread::scope(|scope| {
            let recorders: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        for report in 0..REPORTS {
                            let flag = (report % 7).to_string();
                            assert_eq!(
                                ledger.count(&environment, key("a", &flag), yes(1)),
                                Lost(0)
                            );
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

    #[test]
    fn too_many_applications_are_merged_before_any_flags_count_suffers() {
        let ledger = Ledger::new(16);
        let environment = Environment::new("dev");
        for app in 0..100 {
            assert_eq!(ledger.count(&environment, key(&app.to_string(), "f"), yes(1)), Lost(0));
        }
        assert_eq!(ledger.len(), 15);
        assert_eq!(total(&ledger.drain(Instant::now())), 100);
    }

    #[test]
    fn at_the_limit_new_counters_are_dropped_and_known_ones_still_count() {
        let ledger = Ledger::new(16);
        let environment = Environment::new("dev");
        let add = |flag: &str| ledger.count(&environment, key("a", flag), yes(3));
        let lost: u64 = (0..100).map(|flag| add(&flag.to_string()).0).sum();
        assert_eq!((ledger.len(), lost), (16, 84 * 3));
        assert_eq!(add("0"), Lost(0));
    }
}
