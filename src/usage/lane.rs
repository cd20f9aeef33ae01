//! What waits for one environment, and the batches cut from it.
//!
//! When to send is the outbox's affair, and the memory of registrations is bounded by whoever accepts them.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    iter::repeat,
    sync::Arc,
    time::Instant,
};

use jiff::Timestamp;

use super::{
    applications::Registration,
    backoff::Backoff,
    batch::{Batch, Item, MAX_BODY, Packer, Part},
    counter::Lost,
    counters::Counters,
    impact::{ImpactSeries, OfApp},
    ledger::Generation,
    meter,
    pool::Charge,
};
use crate::{
    token::Environment,
    wire::usage::{Application, ImpactMetric, Samples},
};

/// A smaller limit than this is not chosen when upstream calls bodies too large.
const MIN_BODY: usize = 4096;
/// How many pieces may wait behind all others because upstream found each of them too large.
const MAX_LATE: usize = 16;
/// After how many bodies that upstream took in a row a larger one is tried again.
const GROW_AFTER: u32 = 8;
/// How many samples of one impact metric go into a piece.
const SAMPLES_PER_ITEM: usize = 64;
/// The largest piece that is made of several samples, in bytes.
const MAX_IMPACT_ITEM: usize = 16 * 1024;

/// Names a batch, as long as it is the same, among those of all instances and in all runs.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct BatchId(u128);

impl BatchId {
    /// The n-th of an instance that has drawn a number for itself.
    pub(super) fn new(instance: u64, n: u64) -> Self {
        Self(u128::from(instance) << 64 | u128::from(n))
    }

    /// Of a batch that was stored without a name, and so is known to nobody by one.
    pub(super) fn random() -> Self {
        Self(rand::random())
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        u128::from_str_radix(text, 16).ok().map(Self)
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Whether something was reported before or after what waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Age {
    Older,
    Newer,
}

/// Whether the strategies are unknown, the name, and the instance: those with strategies come first.
pub(super) type ApplicationKey = (bool, Arc<str>, Option<Arc<str>>);

/// What waits for one environment.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    pub(super) applications: BTreeMap<ApplicationKey, Arc<Registration>>,
    pub(super) counters: Counters,
    pub(super) impact: ImpactSeries,
    /// Serialised pieces that come before all that.
    pub(super) carry: VecDeque<Item>,
    /// Serialised pieces that come after all that: upstream found each of them too large.
    pub(super) late: VecDeque<Item>,
    /// The batch that is being sent, or will be again.
    pub(super) hand: Option<(BatchId, Batch)>,
    pub(super) flying: bool,
    /// Batches that others had in hand when they ended, to be sent as they were before anything else.
    pub(super) left: VecDeque<(BatchId, Batch)>,
    /// How large a body upstream is taken to accept.
    limit: usize,
    /// How many bodies in a row upstream has taken.
    taken: u32,
    pub(super) backoff: Backoff,
    /// Since when something waits.
    pub(super) since: Option<Instant>,
    /// Whether a store holds some of what waits, or waited when last asked.
    pub(super) stored: bool,
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            applications: BTreeMap::new(),
            counters: Counters::default(),
            impact: ImpactSeries::default(),
            carry: VecDeque::new(),
            late: VecDeque::new(),
            hand: None,
            flying: false,
            left: VecDeque::new(),
            limit: MAX_BODY,
            taken: 0,
            backoff: Backoff::default(),
            since: None,
            stored: false,
        }
    }
}

impl Lane {
    pub(super) fn is_empty(&self) -> bool {
        self.hand.is_none()
            && self.left.is_empty()
            && self.carry.is_empty()
            && self.late.is_empty()
            && self.applications.is_empty()
            && self.counters.is_empty()
            && self.impact.is_empty()
    }

    /// Merges a generation into what waits; returns what no counter could hold.
    pub(super) fn absorb(&mut self, generation: Generation) -> Lost {
        let mut lost = 0_u64;
        for (key, counter) in generation.counters {
            lost = lost.saturating_add(self.counters.add(key, counter).0);
        }
        for application in generation.applications {
            self.register(application, Age::Newer);
        }
        self.impact.absorb(generation.impact);
        Lost(lost)
    }

    /// Puts back what a store held, beside what waits already; returns what no counter could hold.
    pub(super) fn restore(&mut self, restored: Self) -> Lost {
        let Self { applications, counters, impact, carry, hand, left, .. } = restored;
        let mut lost = 0_u64;
        for (key, counter) in counters {
            lost = lost.saturating_add(self.counters.add(key, counter).0);
        }
        for application in applications.into_values() {
            self.register(application, Age::Older);
        }
        self.impact.restore(impact);
        // A gauge that was ready to be sent is older than what else its record has of it.
        let mut ready = |items: Vec<Item>| -> Vec<Item> {
            let not_gauge = |item: Item| match gauge(&item) {
                Some(series) => {
                    self.impact.restore(series);
                    None
                }
                None => Some(item),
            };
            items.into_iter().filter_map(not_gauge).collect()
        };
        let carry = ready(carry.into());
        let batches = hand.into_iter().chain(left);
        let batches = batches.map(|(id, batch)| (id, Batch::of(ready(batch.into_items()))));
        self.left.extend(batches.filter(|(_, batch)| !batch.items().is_empty()));
        self.carry.extend(carry);
        Lost(lost)
    }

    /// Lets go of the batch in hand, which upstream refused; returns what it counted.
    pub(super) fn put_down(&mut self) -> u64 {
        self.backoff.succeed();
        self.hand.take().map_or(0, |(_, batch)| batch.count())
    }

    /// Lets go of the batch in hand, which upstream took; returns what it counted. After some in a
    /// row larger ones are tried.
    pub(super) fn complete(&mut self) -> u64 {
        self.taken = self.taken.saturating_add(1);
        if self.taken.is_multiple_of(GROW_AFTER) {
            self.limit = self.limit.saturating_mul(2).min(MAX_BODY);
        }
        self.put_down()
    }

    /// Splits the batch in hand, which upstream found too large, and cuts smaller ones from now on.
    /// Returns a single piece that is dropped.
    ///
    /// Where upstream, or a proxy before it, calls everything too large, everything waits. A single
    /// piece is dropped only if it is larger than the smallest limit, and refused again after
    /// upstream has taken others.
    pub(super) fn split(&mut self, next: BatchId, now: Instant, draw: f64) -> Option<Batch> {
        let (_, mut batch) = self.hand.take()?;
        let size = batch.body().len();
        let has_taken = std::mem::take(&mut self.taken) > 0;
        if batch.items().len() > 1 {
            if size <= MIN_BODY || self.backoff.is_failing() {
                self.backoff.fail(now, None, draw);
            }
            self.limit = (size / 2).clamp(MIN_BODY, self.limit.max(MIN_BODY));
            let (front, back) = batch.halves();
            self.hand = Some((next, front));
            back.into_iter().rev().for_each(|item| self.carry.push_front(item));
            return None;
        }
        let was_refused = batch.refuse();
        if size > MIN_BODY && has_taken && was_refused {
            self.backoff.succeed();
            return Some(batch);
        }
        self.backoff.fail(now, None, draw);
        if size > MIN_BODY && self.late.len() < MAX_LATE {
            self.late.extend(batch.into_items());
        } else {
            self.hand = Some((next, batch));
        }
        None
    }

    /// Prepares the batch in hand to be sent to an upstream that insists on lists of strategies;
    /// false where it has refused the batch for something else.
    pub(super) fn list_no_strategies(&mut self) -> bool {
        let hand = self.hand.as_mut();
        let prepared = hand.is_some_and(|(_, batch)| batch.list_no_strategies());
        if prepared {
            self.backoff.succeed();
        }
        prepared
    }

    /// Notes a registration. Strategies that are unknown replace no list.
    pub(super) fn register(&mut self, registration: Arc<Registration>, age: Age) {
        let key = |is_unlisted, it: &Application| -> ApplicationKey {
            (is_unlisted, Arc::clone(&it.app_name), it.instance_id.clone())
        };
        let application = registration.application();
        let present = self.applications.remove(&key(false, application));
        let present = present.or_else(|| self.applications.remove(&key(true, application)));
        let (newer, older) = match (present, age) {
            (None, _) => (registration, None),
            (Some(present), Age::Newer) => (registration, Some(present)),
            (Some(present), Age::Older) => (present, Some(registration)),
        };
        let merged = match older {
            Some(older) if newer.application().strategies.is_none() => {
                Arc::new(newer.with_strategies_of(&older))
            }
            _ => newer,
        };
        let is_unlisted = merged.application().strategies.is_none();
        self.applications.insert(key(is_unlisted, merged.application()), merged);
    }

    /// Cuts a batch of one kind of pieces off what waits; also says how many evaluations were too
    /// large to be sent.
    pub(super) fn cut(&mut self, environment: &Environment) -> (Option<Batch>, u64) {
        let mut packer = Packer::new(self.limit);
        let mut oversized = 0_u64;
        while let Some(item) = self.pop(environment) {
            let alone = packer.is_empty();
            match packer.push(item) {
                Ok(()) => {}
                Err(item) if alone => {
                    oversized = oversized.saturating_add(item.count);
                    meter::items_dropped("oversized", 1);
                }
                Err(item) => {
                    self.carry.push_front(item);
                    break;
                }
            }
        }
        (packer.finish(), oversized)
    }

    /// Takes out the next piece: applications first, then the oldest counters.
    fn pop(&mut self, environment: &Environment) -> Option<Item> {
        if let Some(item) = self.carry.pop_front() {
            return Some(item);
        }
        if let Some(((is_unlisted, ..), registration)) = self.applications.pop_first() {
            let part = if is_unlisted { Part::Instance } else { Part::Application };
            return Some(Item::new(part, json(registration.application()), 0));
        }
        if let Some((key, counter)) = self.counters.pop() {
            let json = json(&counter.to_wire(environment.as_str(), &key));
            return Some(Item::new(Part::Metric, json, counter.total()));
        }
        if let Some(OfApp { metric, times, .. }) = self.impact.pop(SAMPLES_PER_ITEM) {
            impact_items(metric, times, &mut self.carry);
            return self.carry.pop_front();
        }
        while let Some(item) = self.late.pop_front() {
            if let Some(item) = self.without_outdated_gauges(item) {
                return Some(item);
            }
        }
        None
    }

    /// Leaves out the gauges of a piece that were reported again since: what is late is sent after
    /// them. `None` where that is all of them.
    fn without_outdated_gauges(&self, mut item: Item) -> Option<Item> {
        let Some(mut metric) = impact_metric(&item) else { return Some(item) };
        let Samples::Gauge(samples) = &mut metric.samples else { return Some(item) };
        let before = samples.len();
        let times = item.times.iter().copied().chain(repeat(None));
        (*samples, item.times) = std::mem::take(samples)
            .into_iter()
            .zip(times)
            .filter(|(sample, at)| self.impact.is_latest(&metric.name, &sample.labels, *at))
            .unzip();
        match samples.len() {
            0 => return None,
            left if left < before => item.json = json(&metric),
            _ => {}
        }
        Some(item)
    }

    /// How many evaluations wait, those in hand among them.
    pub(super) fn total(&self) -> u64 {
        let ready = self.carry.iter().chain(&self.late).map(|item| item.count);
        let batches = self.hand.iter().chain(&self.left).map(|(_, batch)| batch.count());
        ready.chain(batches).fold(self.counters.total(), u64::saturating_add)
    }
}

/// The impact metric that a piece is.
fn impact_metric(item: &Item) -> Option<ImpactMetric> {
    if item.part != Part::Impact {
        return None;
    }
    ImpactMetric::from_value(serde_json::from_str(&item.json).ok()?).ok()
}

/// The gauge that a piece is, which then has lost its application.
fn gauge(item: &Item) -> Option<ImpactSeries> {
    let metric = impact_metric(item)?;
    let Samples::Gauge(_) = &metric.samples else { return None };
    let mut series = ImpactSeries::default();
    let times = item.times.iter().copied();
    series.record(&"".into(), metric, times, |_| Some(Charge::default()));
    Some(series)
}

/// Serialises a metric in pieces that are not too large, as far as its samples can be parted.
fn impact_items(metric: ImpactMetric, times: Vec<Option<Timestamp>>, into: &mut VecDeque<Item>) {
    fn halve<T>(samples: &mut Vec<T>) -> Option<Vec<T>> {
        (samples.len() > 1).then(|| samples.split_off(samples.len() / 2))
    }
    let mut rest = vec![(metric, times)];
    while let Some((mut metric, mut times)) = rest.pop() {
        let json = json(&metric);
        let other = match &mut metric.samples {
            _ if json.len() <= MAX_IMPACT_ITEM => None,
            Samples::Counter(samples) => halve(samples).map(Samples::Counter),
            Samples::Gauge(samples) => halve(samples).map(Samples::Gauge),
            Samples::Histogram(samples) => halve(samples).map(Samples::Histogram),
        };
        match other {
            None => into.push_back(Item { times, ..Item::new(Part::Impact, json, 0) }),
            Some(samples) => {
                let (name, help) = (Arc::clone(&metric.name), Arc::clone(&metric.help));
                let later = times.split_off(times.len() / 2);
                rest.push((ImpactMetric { name, help, samples }, later));
                rest.push((metric, times));
            }
        }
    }
}

fn json(value: &impl serde::Serialize) -> Box<str> {
    serde_json::to_string(value).expect("wire types with text keys are JSON").into()
}
