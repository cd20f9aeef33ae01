//! Adds up reports from many threads, and hands over the sums when drained.
//!
//! **Why no increment is lost.** A [`DashMap`] divides its entries among shards. To add to a counter, a
//! thread holds the lock of the counter's shard. Draining replaces the shard's table with an empty one
//! under the same lock ([`take_all`]). An increment is therefore either in the drained table or in the
//! new one.
//!
//! **Bounds.** Counters use two pools, and each token has a quota in both. Counters of flags and
//! variants in the token's snapshot are never rejected: beyond the quota they are merged under a common
//! application name and the present hour, so that there are at most as many as the snapshot has flags.
//! Counters of other names, which may be newer than the snapshot or invented, use a smaller pool. Beyond
//! its quota they are merged: into one counter for all flags of an hour, and one variant for all of a
//! flag. A report without any known flag can simply be reported again, so it is rejected as a whole
//! instead.

use std::{
    collections::BTreeMap,
    hash::Hash,
    iter::repeat,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use dashmap::{DashMap, Entry, VacantEntry};
use jiff::Timestamp;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    counters::{Counter, CounterKey, Hour, MERGED_NAME, NameStatus},
    impact_metrics::ImpactSeries,
    instances::{Applications, InstanceKey, Registration},
    quota_pool::{Quota, QuotaPool},
};
use crate::{
    protocol::usage::{ClientApplication, ImpactMetric},
    token::{Environment, TokenDigest},
};

/// Memory for registrations in bytes: about fifteen thousand of ordinary size for one token.
const REGISTRATION_POOL_BYTES: usize = 24 * 1024 * 1024;
/// Memory for samples of impact metrics, in bytes.
const SAMPLE_POOL_BYTES: usize = 16 * 1024 * 1024;
/// The number of locks of each map, as many as rarely make two threads wait for each other. The fewer
/// there are, the longer one is held while its table grows.
const SHARDS: usize = 64;
/// The number of parts that the impact metrics of an environment are divided into.
const IMPACT_PARTS: u64 = 64;
/// The fraction of the counter limit for flags and variants in no snapshot is one in this many.
const UNKNOWN_DIVISOR: usize = 32;

/// Counters, impact metrics and registrations, by environment.
#[derive(Debug)]
pub(super) struct Aggregator {
    counters: DashMap<EnvironmentCounterKey, Counter>,
    /// By environment and a part of the metrics, by a hash of their names. The last value of a gauge is
    /// well defined, and no metric has a tree of its own, which would take five times its memory.
    impact: DashMap<(Environment, u64), ImpactSeries>,
    applications: Applications,
    /// The weight of the counters.
    total_weight: AtomicUsize,
    /// Weight of counters, recorded here and queued for upstream.
    counter_pool: QuotaPool,
    /// The same for counters and variants with unknown names.
    unknown_pool: QuotaPool,
    /// Bytes of samples, recorded here and queued for upstream.
    sample_pool: QuotaPool,
    /// Bytes of registrations, recorded here and queued for upstream.
    registration_pool: QuotaPool,
}

/// The dimensions that are counted separately.
type EnvironmentCounterKey = (Environment, CounterKey);

/// A report's counter for one flag.
#[derive(Debug)]
pub(super) struct ReportedCounter {
    pub(super) key: CounterKey,
    pub(super) name_status: NameStatus,
    pub(super) counter: Counter,
}

impl ReportedCounter {
    /// Moves it to the counter that merges flags without room, in this hour.
    fn use_merged_key(&mut self, now: Hour) {
        self.key = CounterKey { hour: now, app: MERGED_NAME.into(), flag: MERGED_NAME.into() };
        self.counter = std::mem::take(&mut self.counter).counts_only();
    }
}

/// The report exceeds its token's quota and names no known flag.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct OverQuota;

/// The quotas of one token, which are looked up only when something new is added.
#[derive(Clone, Copy, Debug)]
struct TokenQuotas<'a> {
    aggregator: &'a Aggregator,
    token: &'a TokenDigest,
}

impl TokenQuotas<'_> {
    fn counter_quota(self) -> Quota {
        self.aggregator.counter_pool.quota_of(self.token)
    }

    fn unknown_names_quota(self) -> Quota {
        self.aggregator.unknown_pool.quota_of(self.token)
    }
}

/// Usage reported for an environment since the previous drain.
#[derive(Debug, Default)]
pub(super) struct Drained {
    pub(super) counters: Vec<(CounterKey, Counter)>,
    pub(super) impact: ImpactSeries,
    pub(super) applications: Vec<Arc<Registration>>,
}

impl Aggregator {
    pub(super) fn new(max_counters: usize) -> Self {
        Self {
            counters: DashMap::with_shard_amount(SHARDS),
            impact: DashMap::with_shard_amount(SHARDS),
            applications: Applications::new(SHARDS),
            total_weight: AtomicUsize::new(0),
            counter_pool: QuotaPool::new(max_counters),
            unknown_pool: QuotaPool::new(max_counters / UNKNOWN_DIVISOR),
            sample_pool: QuotaPool::new(SAMPLE_POOL_BYTES),
            registration_pool: QuotaPool::new(REGISTRATION_POOL_BYTES),
        }
    }

    /// Adds the counters of a report that arrives in the hour `now`; returns what exceeds the counters'
    /// limits.
    ///
    /// Adds either all counters or none. A report with a known flag is always added, with unknown flags
    /// merged if they exceed the quota.
    pub(super) fn record_counters(
        &self,
        environment: &Environment,
        mut counters: Vec<ReportedCounter>,
        token: &TokenDigest,
        now: Hour,
    ) -> Result<u64, OverQuota> {
        let quotas = TokenQuotas { aggregator: self, token };
        let has_known = counters.iter().any(|it| it.name_status == NameStatus::Known);
        for counted in &mut counters {
            if self.try_reserve_unknown(environment, counted, quotas) {
                continue;
            }
            if !has_known {
                return Err(OverQuota);
            }
            counted.use_merged_key(now);
        }
        let mut lost = 0_u64;
        for counted in counters {
            lost = lost.saturating_add(self.add_counter(environment, counted, quotas, now));
        }
        Ok(lost)
    }

    /// Adds an application's impact metrics; returns how many samples exceed the quota.
    pub(super) fn record_impact_metrics(
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
        let quota = self.sample_pool.quota_of(token);
        let add = |metric: ImpactMetric| {
            let record = |series: &mut ImpactSeries, metric| {
                series.record(app, metric, repeat(Some(now)), |bytes| quota.try_reserve(bytes))
            };
            let part = xxh3_64(metric.name.as_bytes()) % IMPACT_PARTS;
            match self.impact.entry((environment.clone(), part)) {
                Entry::Occupied(mut present) => record(present.get_mut(), metric),
                Entry::Vacant(place) => {
                    let mut series = ImpactSeries::default();
                    let lost = record(&mut series, metric);
                    // Beyond the quota, nothing remains of a metric.
                    if !series.is_empty() {
                        place.insert(series);
                    }
                    lost
                }
            }
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
        let quota = self.registration_pool.quota_of(token);
        self.applications.register(key, app, &quota, now)
    }

    /// The quota for registrations of earlier runs, which are not attributed to tokens.
    pub(super) fn unowned_registrations_quota(&self) -> Quota {
        self.registration_pool.unowned_quota()
    }

    /// Marks an instance as active; false if it is not tracked.
    pub(super) fn touch(&self, key: &InstanceKey, now: Instant) -> bool {
        self.applications.touch(key, now)
    }

    /// Removes all usage, by environment.
    pub(super) fn drain(&self, now: Instant) -> BTreeMap<Environment, Drained> {
        let mut drained = BTreeMap::<Environment, Drained>::new();
        let mut weight = 0;
        for ((environment, key), counter) in take_all(&self.counters) {
            weight += counter.weight(&key);
            drained.entry(environment).or_default().counters.push((key, counter));
        }
        self.total_weight.fetch_sub(weight, Ordering::Relaxed);
        for ((environment, _), series) in take_all(&self.impact) {
            drained.entry(environment).or_default().impact.merge(series);
        }
        for (environment, application) in self.applications.take_due(now) {
            drained.entry(environment).or_default().applications.push(application);
        }
        for pool in
            [&self.counter_pool, &self.unknown_pool, &self.sample_pool, &self.registration_pool]
        {
            pool.remove_unused();
        }
        drained
    }

    /// The weight of the counters; variants count too.
    pub(super) fn counter_weight(&self) -> usize {
        self.total_weight.load(Ordering::Relaxed)
    }

    /// A copy of the counters, for operators.
    pub(super) fn copy_counters(&self) -> Vec<(EnvironmentCounterKey, Counter)> {
        self.counters.iter().map(|it| (it.key().clone(), it.value().clone())).collect()
    }

    /// The registrations that the next drain will remove, for operators.
    pub(super) fn due_registrations(&self, now: Instant) -> Vec<Arc<Registration>> {
        self.applications.due(now)
    }

    /// Reserves memory for the unknown names of a counter that are new; false if its flag exceeds the
    /// quota.
    fn try_reserve_unknown(
        &self,
        environment: &Environment,
        ReportedCounter { key, name_status, counter }: &mut ReportedCounter,
        quotas: TokenQuotas<'_>,
    ) -> bool {
        if *name_status == NameStatus::Known && !counter.has_unknown_variants() {
            return true;
        }
        let quota = quotas.unknown_names_quota();
        let present = self.counters.get(&(environment.clone(), key.clone()));
        if *name_status == NameStatus::Unknown && present.is_none() {
            let Some(reservation) = quota.try_reserve(counter.base_weight(key)) else {
                return false;
            };
            counter.set_reservation(reservation);
        }
        counter.reserve_unknown_variants(present.as_deref(), &quota);
        true
    }

    fn add_counter(
        &self,
        environment: &Environment,
        ReportedCounter { key, name_status, mut counter }: ReportedCounter,
        quotas: TokenQuotas<'_>,
        now: Hour,
    ) -> u64 {
        let place = match self.counters.entry((environment.clone(), key)) {
            Entry::Occupied(mut present) => {
                return self.merge_counter(present.get_mut(), counter, quotas);
            }
            Entry::Vacant(place) => place,
        };
        let weight = counter.base_weight(&place.key().1);
        if name_status == NameStatus::Known {
            let Some(reservation) = quotas.counter_quota().try_reserve(weight) else {
                // The lock ends here: the other counter may be in the same shard.
                let key = place.into_key();
                return self.add_merged_counter(key, counter, quotas, now);
            };
            counter.set_reservation(reservation);
        } else if !counter.has_reservation() {
            // A merged counter, or one that existed when its report was checked and was drained since.
            counter.set_reservation(quotas.unknown_names_quota().reserve_unchecked(weight));
        }
        self.insert_counter(place, counter, quotas);
        0
    }

    /// Adds a counter of a known flag to the one that merges all applications and hours.
    fn add_merged_counter(
        &self,
        (environment, key): EnvironmentCounterKey,
        mut counter: Counter,
        quotas: TokenQuotas<'_>,
        now: Hour,
    ) -> u64 {
        let key = CounterKey { hour: now, app: MERGED_NAME.into(), ..key };
        let weight = counter.base_weight(&key);
        match self.counters.entry((environment, key)) {
            Entry::Occupied(mut present) => self.merge_counter(present.get_mut(), counter, quotas),
            Entry::Vacant(place) => {
                counter.set_reservation(quotas.counter_quota().reserve_unchecked(weight));
                self.insert_counter(place, counter, quotas);
                0
            }
        }
    }

    fn merge_counter(
        &self,
        present: &mut Counter,
        counter: Counter,
        quotas: TokenQuotas<'_>,
    ) -> u64 {
        let before = present.distinct_variant_count();
        let lost = present.add(counter);
        let new = present.distinct_variant_count() - before;
        if new > 0 {
            present.reserve_variants(&quotas.counter_quota(), &quotas.unknown_names_quota());
            self.total_weight.fetch_add(new, Ordering::Relaxed);
        }
        lost
    }

    fn insert_counter(
        &self,
        place: VacantEntry<'_, EnvironmentCounterKey, Counter>,
        mut counter: Counter,
        quotas: TokenQuotas<'_>,
    ) {
        counter.reserve_variants(&quotas.counter_quota(), &quotas.unknown_names_quota());
        self.total_weight.fetch_add(counter.weight(&place.key().1), Ordering::Relaxed);
        place.insert(counter);
    }
}

/// Removes all entries of a map, one shard after the other.
///
/// A shard is locked only while its table is replaced. [`DashMap::retain`] would lock it while its
/// entries are moved: with 100,000 counters on two cores for tens of milliseconds rather than for a
/// microsecond, and reports would wait.
fn take_all<K: Eq + Hash, V>(map: &DashMap<K, V>) -> impl Iterator<Item = (K, V)> {
    let tables = map.shards().iter().map(|shard| std::mem::take(&mut *shard.write()));
    tables.flatten().map(|(key, value)| (key, value.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::usage::ToggleStats;

    fn hour(nth: i64) -> Hour {
        Hour::of(Timestamp::from_second(3600 * nth).unwrap())
    }

    /// Reports with one token, in the tenth hour.
    struct Client<'a> {
        aggregator: &'a Aggregator,
        environment: Environment,
        token: TokenDigest,
    }

    impl<'a> Client<'a> {
        fn new(aggregator: &'a Aggregator, token: &str) -> Self {
            let environment = Environment::new("dev");
            Self { aggregator, environment, token: TokenDigest::of(token) }
        }

        fn report(
            &self,
            counted: impl IntoIterator<Item = ReportedCounter>,
        ) -> Result<u64, OverQuota> {
            let counted = counted.into_iter().collect();
            self.aggregator.record_counters(&self.environment, counted, &self.token, hour(10))
        }
    }

    fn reported_counter(
        of_hour: i64,
        app: &str,
        flag: &str,
        variants: &[&str],
        yes: u64,
    ) -> ReportedCounter {
        let name = |text: &str| {
            if text.starts_with('?') { NameStatus::Unknown } else { NameStatus::Known }
        };
        let variants = variants.iter().map(|variant| (Arc::from(*variant), yes)).collect();
        let stats = ToggleStats { yes, no: 0, variants };
        let counter = Counter::from_stats(stats, &Arc::default(), name).0;
        let key = CounterKey { hour: hour(of_hour), app: app.into(), flag: flag.into() };
        ReportedCounter { key, name_status: name(flag), counter }
    }

    fn yes(app: &str, flag: &str, yes: u64) -> [ReportedCounter; 1] {
        [reported_counter(10, app, flag, &[], yes)]
    }

    fn total(drained: &BTreeMap<Environment, Drained>) -> u64 {
        let counters = drained.values().flat_map(|drained| &drained.counters);
        counters.map(|(_, counter)| counter.total()).sum()
    }

    #[test]
    fn no_increment_is_lost_between_two_drains() {
        const THREADS: u64 = 4;
        const REPORTS: u64 = 20_000;
        let aggregator = Aggregator::new(1000);
        let client = Client::new(&aggregator, "token");
        let drained = std::thread::scope(|scope| {
            let recorders: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        for report in 0..REPORTS {
                            let flag = (report % 7).to_string();
                            assert_eq!(client.report(yes("a", &flag, 1)), Ok(0));
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
        assert_eq!(aggregator.counter_weight(), 0);
    }

    /// Evaluations by hour, application and flag.
    fn counts_by_key(aggregator: &Aggregator) -> BTreeMap<(Hour, Arc<str>, Arc<str>), u64> {
        let counters = aggregator.copy_counters().into_iter();
        counters
            .map(|((_, key), counter)| ((key.hour, key.app, key.flag), counter.total()))
            .collect()
    }

    #[test]
    fn invented_impact_metrics_share_few_trees() {
        let aggregator = Aggregator::new(100);
        let (environment, token) = (Environment::new("dev"), TokenDigest::of("token"));
        for name in 0..1000 {
            let text = format!(
                r#"{{"name":"m{name}","help":"","type":"gauge","samples":[{{"value":1}}]}}"#
            );
            let metric = ImpactMetric::from_value(serde_json::from_str(&text).unwrap()).unwrap();
            let now = Timestamp::UNIX_EPOCH;
            let lost = aggregator.record_impact_metrics(
                &environment,
                &"app".into(),
                vec![metric],
                &token,
                now,
            );
            assert_eq!(lost, 0);
        }
        assert!(aggregator.impact.len() as u64 <= IMPACT_PARTS);
    }

    #[test]
    fn snapshot_flags_beyond_the_quota_are_merged_under_one_application_and_hour() {
        let aggregator = Aggregator::new(100);
        let client = Client::new(&aggregator, "token");
        for report in 0..1000 {
            let app = report.to_string();
            for flag in ["f", "g"] {
                let counted = reported_counter(report % 7, &app, flag, &["v"], 1);
                assert_eq!(client.report([counted]), Ok(0));
            }
        }
        let counts = counts_by_key(&aggregator);
        // Four fifths of the limit, including the merged counters.
        assert!((60..90).contains(&aggregator.counter_weight()), "{}", aggregator.counter_weight());
        let merged = |flag: &str| counts[&(hour(10), MERGED_NAME.into(), flag.into())];
        assert!(merged("f") > 900 && merged("g") > 900, "{counts:?}");
        assert_eq!(total(&aggregator.drain(Instant::now())), 2000);
    }

    #[test]
    fn unknown_flags_use_a_small_pool_and_cost_snapshot_flags_no_counts() {
        let aggregator = Aggregator::new(100 * UNKNOWN_DIVISOR);
        let [client, other] = ["token", "other"].map(|token| Client::new(&aggregator, token));
        let names = |range: std::ops::Range<u32>| {
            range.map(|nth| reported_counter(10, "a", &format!("?{nth}"), &[], 1))
        };
        assert_eq!(client.report(names(0..50)), Ok(0));
        assert_eq!(client.report(names(50..90)), Err(OverQuota));
        assert_eq!(client.report(names(50..80).chain(yes("a", "f", 1))), Ok(0));
        assert_eq!(client.report(names(80..81)), Err(OverQuota));
        for _ in 0..100 {
            assert_eq!(client.report(names(79..85).chain(yes("a", "f", 1))), Ok(0));
        }
        // Existing counters need no additional memory, and other tokens have a quota left.
        assert_eq!(client.report(names(0..80).chain(yes("a", "f", 1))), Ok(0));
        assert_eq!(other.report(names(80..90)), Ok(0));
        let counts = counts_by_key(&aggregator);
        assert_eq!(counts[&(hour(10), "a".into(), "f".into())], 102);
        assert_eq!(counts[&(hour(10), MERGED_NAME.into(), MERGED_NAME.into())], 500);
        assert_eq!(counts.len(), 90 + 2);

        let drained = aggregator.drain(Instant::now());
        assert_eq!(total(&drained), 80 + 80 + 10 + 2 + 7 * 100);
        // Drained counters use the quota until they are sent.
        assert_eq!(client.report(names(100..101)), Err(OverQuota));
        drop(drained);
        assert_eq!(client.report(names(100..180)), Ok(0));
    }

    #[test]
    fn only_unknown_variants_share_the_pool_of_unknown_flags() {
        let aggregator = Aggregator::new(10 * UNKNOWN_DIVISOR);
        let client = Client::new(&aggregator, "token");
        let variants = |names: &[&str]| client.report([reported_counter(10, "a", "f", names, 1)]);
        assert_eq!(variants(&["?1", "?2", "?3", "?4"]), Ok(0));
        assert_eq!(variants(&["?1", "?5", "?6", "?7", "?8", "v"]), Ok(0));
        assert_eq!(variants(&["?9", "w"]), Ok(0));
        assert_eq!(variants(&["?1", "?10", "?11", "w"]), Ok(0));
        let (place, counter) = aggregator.copy_counters().pop().unwrap();
        let stats = counter.to_bulk_metric("dev", &place.1).stats;
        assert_eq!((stats.yes, stats.variants["?1"], stats.variants[MERGED_NAME]), (4, 3, 3));
        // The flag, eight unknown variants, two known ones, and one for the others.
        assert_eq!(aggregator.counter_weight(), 12);
    }
}
