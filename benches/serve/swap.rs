//! What a client notices while flags change ten times a second.
//!
//! The whole way is under load: Parapet as an edge fetches, parses, compiles, builds, swaps and
//! keeps 5,000 flags at each change, on the processors that answer requests. Both with pauses between
//! requests, as clients have them, and with as many requests as there is an answer for, where swaps
//! come as often as they get a processor. Calm and swapping take
//! turns in one process.
//!
//! What others notice of all this on the same processors is measured as well: the baseline, which
//! swaps nothing, is asked the same while Parapet swaps beside it and answers nobody.

use std::{
    io::Write as _,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    bare,
    contender::Server,
    exchange::Request,
    load::Over,
    measure::{Case, Session},
    numbers::median,
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

/// How much longer than others these rounds are: the slowest of a hundred is found among few, where
/// bodies are large.
const LONGER: u32 = 2;

/// How long a change of pace may take to arrive.
const SETTLE: Duration = Duration::from_millis(500);

/// What is asked, and how long a connection rests between requests where not all that can be had is
/// asked for.
const ASKS: [(&str, Ask, Duration); 4] = [
    ("`/api/client/features`, 200, identity (2.4 MB)", Ask::Features(None), REST.saturating_mul(5)),
    ("`/api/frontend`, same context again", Ask::Frontend, REST),
    ("`/api/frontend`, 304", Ask::FrontendUnlessKnown, REST),
    ("`/api/frontend`, a new user each request", Ask::FrontendNewUser, REST),
];

const REST: Duration = Duration::from_millis(20);

/// What one kind of request notices.
#[derive(Debug)]
pub(crate) struct Swapped {
    pub(crate) title: &'static str,
    /// How long each connection rests before each request.
    pub(crate) pause: Duration,
    pub(crate) calm: Pace,
    pub(crate) swapping: Pace,
    /// The baseline's, while Parapet swaps beside it.
    pub(crate) beside: Pace,
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
    let paced = ASKS.iter().map(|&(title, ask, pause)| (title, Case { pause, ..ask.case(FLAGS) }));
    let full = ASKS.iter().map(|&(title, ask, _)| (title, ask.case(FLAGS)));
    paced
        .chain(full)
        .map(|(title, case)| one(session, &mut upstream, &parapet, title, &case))
        .collect()
}

fn one(
    session: &Session,
    upstream: &mut Process,
    parapet: &Server,
    title: &'static str,
    case: &Case,
) -> Result<Swapped> {
    eprintln!("{title}, pauses of {:?}, calm and while {FLAGS} flags are swapped", case.pause);
    let (request, answer) = case.prepare(parapet)?;
    let file = session.stable.folder().join("answer");
    bare::record(&answer, &file)?;
    let bare = session.stable.bare(&file, Over::Tcp)?;
    let load = |server: &Server, time| {
        session.load(case, session.draw(), server, (&request, &answer), time)
    };
    for server in [parapet, &bare] {
        load(server, Duration::from_secs(1))?;
    }
    let time = session.time * LONGER;
    let (mut calm, mut swapping, mut beside) = (Vec::new(), Vec::new(), Vec::new());
    let mut rates = Vec::new();
    for round in 1..=session.rounds {
        calm.push(load(parapet, time)?.0);
        writeln!(upstream.input()?, "swap")?;
        sleep(SETTLE);
        let (before, began) = (fetched(upstream)?, Instant::now());
        swapping.push(load(parapet, time)?.0);
        rates.push((fetched(upstream)? - before) / began.elapsed().as_secs_f64());
        beside.push(load(&bare, time)?.0);
        writeln!(upstream.input()?, "calm")?;
        sleep(SETTLE);
        let p99 = |samples: &[super::load::Sample]| samples[round - 1].p99_micros;
        eprintln!(
            "  round {round} of {}: p99 {} µs, while swapping {} µs, bare hyper beside it {} µs",
            session.rounds,
            p99(&calm),
            p99(&swapping),
            p99(&beside)
        );
    }
    let pace = |samples: &[super::load::Sample]| Pace {
        per_second: median(samples.iter().map(super::load::Sample::per_second)),
        p99_micros: median(samples.iter().map(|it| it.p99_micros)),
    };
    let ratios = swapping.iter().zip(&calm).map(|(new, old)| new.p99_micros / old.p99_micros);
    Ok(Swapped {
        title,
        pause: case.pause,
        calm: pace(&calm),
        swapping: pace(&swapping),
        beside: pace(&beside),
        p99_ratio: median(ratios),
        swaps_per_second: median(rates.into_iter()),
    })
}

/// How many sets of flags the edge has fetched.
fn fetched(upstream: &Process) -> Result<f64> {
    let answer = Request::get(COUNT).ask(upstream.address, 0)?;
    String::from_utf8_lossy(&answer.body).parse().context("a count")
}
