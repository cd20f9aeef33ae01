//! The latency of requests while flags change ten times a second.
//!
//! The whole path is under load: Parapet as an edge fetches, parses, compiles, builds, swaps and stores
//! 5,000 flags at each change, on the processors that serve requests. It is measured with pauses between
//! requests, as clients have them, and at full load, where swaps happen as often as they get a
//! processor. Calm and swapping phases alternate in one process.
//!
//! The effect on other servers on the same processors is measured as well: the baseline, which swaps
//! nothing, serves the same requests while Parapet swaps beside it without requests.

use std::{
    io::Write as _,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    bare_hyper,
    contender::Server,
    exchange::Request,
    load::Transport,
    measure::{Case, Session},
    numbers::median,
    sdk_requests::RequestKind,
    server_process::ServerProcess,
    upstream::COUNT_PATH,
};

/// The number of flags.
pub(crate) const FLAGS: usize = 5_000;

/// The goal: the largest p99 while swapping, as a multiple of the calm one.
pub(crate) const MAX_P99_RATIO: f64 = 2.0;

/// The goal counts as met only with at least this many changes per second.
const MIN_SWAPS_PER_SECOND: f64 = 9.0;

/// These rounds are longer by this factor: with large bodies there are few requests to find a p99 among.
const DURATION_FACTOR: u32 = 2;

/// How long it takes until the upstream's flags change, or stop changing.
const SETTLE_TIME: Duration = Duration::from_millis(500);

/// The requests, with the pause of each connection for the runs below full load.
const REQUESTS: [(&str, RequestKind, Duration); 4] = [
    (
        "`/api/client/features`, 200, identity (2.4 MB)",
        RequestKind::Features(None),
        REQUEST_PAUSE.saturating_mul(5),
    ),
    ("`/api/frontend`, same context again", RequestKind::Frontend, REQUEST_PAUSE),
    ("`/api/frontend`, 304", RequestKind::FrontendNotModified, REQUEST_PAUSE),
    ("`/api/frontend`, a new user each request", RequestKind::FrontendNewUser, REQUEST_PAUSE),
];

const REQUEST_PAUSE: Duration = Duration::from_millis(20);

/// The results of one kind of request.
#[derive(Debug)]
pub(crate) struct SwapResult {
    pub(crate) title: &'static str,
    /// The pause of each connection before each request.
    pub(crate) pause: Duration,
    pub(crate) calm: Performance,
    pub(crate) swapping: Performance,
    /// The baseline's, while Parapet swaps beside it.
    pub(crate) baseline: Performance,
    /// The median over rounds.
    pub(crate) p99_ratio: f64,
    /// The number of changes that arrived per second.
    pub(crate) swaps_per_second: f64,
}

/// Medians over rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Performance {
    pub(crate) per_second: f64,
    pub(crate) p99_micros: f64,
}

impl SwapResult {
    /// Whether the goal was met, with enough changes per second.
    pub(crate) fn is_met(&self) -> bool {
        self.p99_ratio <= MAX_P99_RATIO && self.swaps_per_second >= MIN_SWAPS_PER_SECOND
    }
}

/// Runs all measurements.
pub(crate) fn run(session: &Session) -> Result<Vec<SwapResult>> {
    let mut upstream = session.contenders.upstream(FLAGS)?;
    let parapet = session.contenders.parapet_edge(&upstream)?;
    let paced =
        REQUESTS.iter().map(|&(title, ask, pause)| (title, Case { pause, ..ask.case(FLAGS) }));
    let full = REQUESTS.iter().map(|&(title, ask, _)| (title, ask.case(FLAGS)));
    paced
        .chain(full)
        .map(|(title, case)| measure_request(session, &mut upstream, &parapet, title, &case))
        .collect()
}

fn measure_request(
    session: &Session,
    upstream: &mut ServerProcess,
    parapet: &Server,
    title: &'static str,
    case: &Case,
) -> Result<SwapResult> {
    eprintln!("{title}, pauses of {:?}, calm and while {FLAGS} flags are swapped", case.pause);
    let (request, answer) = case.prepare(parapet)?;
    let file = session.contenders.folder().join("answer");
    bare_hyper::write_response(&answer, &file)?;
    let bare = session.contenders.bare(&file, Transport::Tcp)?;
    let load = |server: &Server, time| {
        session.load(case, session.reserve_numbers(), server, (&request, &answer), time)
    };
    for server in [parapet, &bare] {
        load(server, Duration::from_secs(1))?;
    }
    let time = session.duration * DURATION_FACTOR;
    let (mut calm, mut swapping, mut beside) = (Vec::new(), Vec::new(), Vec::new());
    let mut rates = Vec::new();
    for round in 1..=session.rounds {
        calm.push(load(parapet, time)?.0);
        writeln!(upstream.input()?, "swap")?;
        sleep(SETTLE_TIME);
        let (before, began) = (fetch_count(upstream)?, Instant::now());
        swapping.push(load(parapet, time)?.0);
        rates.push((fetch_count(upstream)? - before) / began.elapsed().as_secs_f64());
        beside.push(load(&bare, time)?.0);
        writeln!(upstream.input()?, "calm")?;
        sleep(SETTLE_TIME);
        let p99 = |samples: &[super::load::Sample]| samples[round - 1].p99_micros;
        eprintln!(
            "  round {round} of {}: p99 {} µs, while swapping {} µs, bare hyper beside it {} µs",
            session.rounds,
            p99(&calm),
            p99(&swapping),
            p99(&beside)
        );
    }
    let pace = |samples: &[super::load::Sample]| Performance {
        per_second: median(samples.iter().map(super::load::Sample::per_second)),
        p99_micros: median(samples.iter().map(|it| it.p99_micros)),
    };
    let ratios = swapping.iter().zip(&calm).map(|(new, old)| new.p99_micros / old.p99_micros);
    Ok(SwapResult {
        title,
        pause: case.pause,
        calm: pace(&calm),
        swapping: pace(&swapping),
        baseline: pace(&beside),
        p99_ratio: median(ratios),
        swaps_per_second: median(rates.into_iter()),
    })
}

/// The number of flag sets that the edge has fetched.
fn fetch_count(upstream: &ServerProcess) -> Result<f64> {
    let answer = Request::get(COUNT_PATH).send(upstream.address, 0)?;
    String::from_utf8_lossy(&answer.body).parse().context("a count")
}
