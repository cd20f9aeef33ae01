//! The requests of a number of instances to upstream, and the time until they serve a change.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::time::sleep;

use super::{
    counted_upstream::CountedUpstream,
    instances::{Instances, Setup},
    numbers::{median, to_f64},
};

/// The configuration of the whole benchmark.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) unleash_edge: &'a Path,
    /// How long requests are counted.
    pub(crate) duration: Duration,
    /// The number of changes.
    pub(crate) changes: usize,
}

/// The results for a number of instances.
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) setup: Setup,
    pub(crate) instances: usize,
    /// Requests to upstream per minute, by purpose.
    pub(crate) requests: BTreeMap<&'static str, f64>,
    /// Seconds from a change until the last instance serves it; the median and the longest.
    pub(crate) propagation: [f64; 2],
    /// Milliseconds from the first request that got a change until the last instance serves it; the median
    /// and the longest.
    pub(crate) spread: [f64; 2],
    /// Requests to upstream about a new token that every instance sees.
    pub(crate) validations: u64,
    /// Evaluations that were reported to the instances, and that upstream received.
    pub(crate) evaluations: [u64; 2],
}

/// How long after the start requests are counted: later than the repeated fetches of the start.
const SETTLING_TIME: Duration = Duration::from_secs(20);

/// How often each instance gets a report of usage meanwhile.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// How long all usage takes to reach upstream: more than an interval.
const USAGE_TIME: Duration = Duration::from_secs(130);

impl Session<'_> {
    /// Measures this number of instances.
    pub(crate) async fn measure(&self, setup: Setup, count: usize) -> Result<Level> {
        eprintln!("{}, {count}", setup.name());
        let upstream = CountedUpstream::start(350).await?;
        let folder = tempfile::tempdir_in(self.folder)?;
        let instances =
            Instances::start(folder.path(), setup, count, &upstream, self.unleash_edge).await?;
        sleep(SETTLING_TIME).await;
        let (requests, rounds) = self.count_requests(&upstream, &instances).await?;
        eprintln!("  {requests:.1?} requests a minute");
        let (propagation, spread) = self.measure_changes(&upstream, &instances).await?;
        eprintln!("  last instance after {propagation:.1?} s, {spread:.0?} ms after the first");
        let validations = count_validations(&upstream, &instances).await?;
        eprintln!("  {validations} requests about a new token");
        let reported = u64::try_from(count)? * rounds;
        let sent = wait_for_usage(&upstream, reported).await;
        eprintln!("  {sent} of {reported} evaluations");
        if sent != reported {
            eprintln!("{}", instances.log());
        }
        Ok(Level {
            setup,
            instances: count,
            requests,
            propagation,
            spread,
            validations,
            evaluations: [reported, sent],
        })
    }

    /// Requests to upstream per minute while usage is reported and nothing changes, and how often each
    /// instance got a report.
    async fn count_requests(
        &self,
        upstream: &CountedUpstream,
        instances: &Instances,
    ) -> Result<(BTreeMap<&'static str, f64>, u64)> {
        let (before, started) = (upstream.requests(), Instant::now());
        let mut rounds = 0;
        while started.elapsed() < self.duration {
            instances.report_usage().await?;
            rounds += 1;
            sleep(REPORT_INTERVAL).await;
        }
        let minutes = started.elapsed().as_secs_f64() / 60.0;
        let since = |(purpose, count): (&'static str, u64)| {
            let earlier = before.get(purpose).copied().unwrap_or_default();
            (purpose, to_f64(count - earlier) / minutes)
        };
        let requests = upstream.requests().into_iter().map(since);
        Ok((requests.filter(|(_, rate)| *rate > 0.0).collect(), rounds))
    }

    async fn measure_changes(
        &self,
        upstream: &CountedUpstream,
        instances: &Instances,
    ) -> Result<([f64; 2], [f64; 2])> {
        let (mut propagation, mut spread) = (Vec::new(), Vec::new());
        for _ in 0..self.changes {
            let changed = Instant::now();
            let revision = upstream.change_flag();
            let served = instances.wait_until_served(Some(revision)).await?;
            let last = served.into_iter().max().context("at least one instance")?;
            let first = upstream.first_seen(revision).context("it is served")?;
            propagation.push((last - changed).as_secs_f64());
            spread.push((last - first).as_secs_f64() * 1e3);
        }
        let summary = |values: &[f64]| {
            let longest = values.iter().copied().fold(f64::NAN, f64::max);
            [median(values.iter().copied()), longest]
        };
        Ok((summary(&propagation), summary(&spread)))
    }
}

/// The number of requests about a new token.
async fn count_validations(upstream: &CountedUpstream, instances: &Instances) -> Result<u64> {
    let count = || upstream.requests().get("validation").copied().unwrap_or_default();
    let before = count();
    instances.present_token(&upstream.create_token("new")).await?;
    Ok(count() - before)
}

/// Waits until upstream has this many evaluations; returns how many it has.
async fn wait_for_usage(upstream: &CountedUpstream, expected: u64) -> u64 {
    let check = async {
        while upstream.evaluations() < expected {
            sleep(Duration::from_millis(200)).await;
        }
        // More would be a fault.
        sleep(Duration::from_secs(2)).await;
    };
    let _ = tokio::time::timeout(USAGE_TIME, check).await;
    upstream.evaluations()
}
