//! What a client notices while flags change ten times a second.
//!
//! The whole way is under load: Parapet as an edge fetches, parses, compiles, builds, swaps and
//! keeps 5,000 flags at each change, on the processors that answer requests. Calm and swapping take
//! turns in one process.

use std::{
    io::Write as _,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    exchange::Request,
    measure::{Session, median},
    process::Process,
    rows::Ask,
    upstream::COUNT,
};

/// How many flags change hands.
pub(crate) const FLAGS: usize = 5_000;

/// What p99 may grow to, as a multiple of the calm one.
pub(crate) const GOAL: f64 = 2.0;

/// How many changes must have arrived each second for the goal to count as met.
const ENOUGH: f64 = 9.0;

/// How long a change of pace may take to arrive.
const SETTLE: Duration = Duration::from_millis(500);

const ASKS: [(&str, Ask); 4] = [
    ("`/api/client/features`, 200, identity (2.4 MB)", Ask::Features(None)),
    ("`/api/frontend`, same context again", Ask::Frontend),
    ("`/api/frontend`, 304", Ask::FrontendUnlessKnown),
    ("`/api/frontend`, a new user each request", Ask::FrontendNewUser),
];

/// What one kind of request notices.
#[derive(Debug)]
pub(crate) struct Swapped {
    pub(crate) title: &'static str,
    pub(crate) calm: Pace,
    pub(crate) swapping: Pace,
    /// By the median over rounds.
    pub(crate) p99_ratio: f64,
    /// How many changes arrived, each second.
    pub(crate) swaps_per_second: f64,
}

/// By the median over rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) per_second: f64,
    pub(crate) p99_micros: f64,
}

impl Swapped {
    /// Whether the goal was met, by changes that came as often as they should.
    pub(crate) fn is_met(&self) -> bool {
        self.p99_ratio <= GOAL && self.swaps_per_second >= ENOUGH
    }
}

/// Measures all of them.
pub(crate) fn run(session: &Session) -> Result<Vec<Swapped>> {
    let mut upstream = session.stable.upstream(FLAGS)?;
    let parapet = session.stable.parapet_edge(&upstream)?;
    ASKS.iter().map(|&(title, ask)| one(session, &mut upstream, &parapet, title, ask)).collect()
}

fn one(
    session: &Session,
    upstream: &mut Process,
    parapet: &Process,
    title: &'static str,
    ask: Ask,
) -> Result<Swapped> {
    eprintln!("{title}, calm and while {FLAGS} flags are swapped");
    let case = ask.case(FLAGS);
    let (request, answer) = case.prepare(parapet)?;
    session.load(&case, parapet, &request, &answer, Duration::from_secs(1))?;
    let (mut calm, mut swapping, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=session.rounds {
        calm.push(session.load(&case, parapet, &request, &answer, session.time)?.0);
        writeln!(upstream.input()?, "swap")?;
        sleep(SETTLE);
        let (before, began) = (fetched(upstream)?, Instant::now());
        swapping.push(session.load(&case, parapet, &request, &answer, session.time)?.0);
        rates.push((fetched(upstream)? - before) / began.elapsed().as_secs_f64());
        writeln!(upstream.input()?, "calm")?;
        sleep(SETTLE);
        let p99 = |samples: &[super::load::Sample]| samples[round - 1].p99_micros;
        eprintln!(
            "  round {round} of {}: p99 {} µs, while swapping {} µs",
            session.rounds,
            p99(&calm),
            p99(&swapping)
        );
    }
    let pace = |samples: &[super::load::Sample]| Pace {
        per_second: median(samples.iter().map(super::load::Sample::per_second)),
        p99_micros: median(samples.iter().map(|it| it.p99_micros)),
    };
    let ratios = swapping.iter().zip(&calm).map(|(new, old)| new.p99_micros / old.p99_micros);
    Ok(Swapped {
        title,
        calm: pace(&calm),
        swapping: pace(&swapping),
        p99_ratio: median(ratios),
        swaps_per_second: median(rates.into_iter()),
    })
}

/// How many sets of flags the edge has fetched.
fn fetched(upstream: &Process) -> Result<f64> {
    let answer = Request::get(COUNT).ask(upstream.address, 0)?;
    String::from_utf8_lossy(&answer.body).parse().context("a count")
}
