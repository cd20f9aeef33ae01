//! One case, measured for all contenders in turn, in several rounds, and the statistics.

use std::{cell::Cell, collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    bare_hyper,
    contender::{Contender, Contenders, Server},
    exchange::{NUMBER, RawResponse, Request},
    load::{self, NumberSource, Sample, Transport},
    numbers::{median, to_f64},
    server_process::ServerProcess,
};

/// The configuration of the whole benchmark.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) contenders: Contenders,
    pub(crate) rounds: usize,
    /// The duration of the load for each contender in each round.
    pub(crate) duration: Duration,
    /// The last number used in a request, so that none is used twice.
    pub(crate) last_number: Cell<u64>,
}

/// A request, and the expected response.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) flags: usize,
    /// The number of numbered client tokens.
    pub(crate) tokens: u64,
    pub(crate) connections: usize,
    /// The pause of each connection before each request.
    pub(crate) pause: Duration,
    pub(crate) request: Request,
    pub(crate) numbers: NumberSource,
    pub(crate) transport: Transport,
    pub(crate) expected: Expected,
}

/// The expected response.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Expected {
    /// 200 with a body in this content encoding.
    Body(Option<&'static str>),
    /// 304: the request contains the entity tag of an earlier response.
    NotModified,
}

/// The results of a contender: medians over rounds.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) per_second: f64,
    pub(crate) p50_micros: f64,
    pub(crate) p99_micros: f64,
    /// Processor time per request.
    pub(crate) cpu_micros: f64,
    /// At the end.
    pub(crate) resident: u64,
    /// Requests per second in each round.
    rounds: Vec<f64>,
}

impl Measured {
    /// The median of the rounds' ratios: load on the machine that slows down both in one round cancels
    /// out.
    pub(crate) fn ratio(&self, to: &Self) -> f64 {
        median(self.rounds.iter().zip(&to.rounds).map(|(this, other)| this / other))
    }
}

/// The number of responses that are sampled if they differ.
const SAMPLED_RESPONSES: u64 = 31;

/// More than the requests of one run.
const NUMBERS_PER_RUN: u64 = 10_000_000;

/// The duration of the load before the first round.
const WARM_UP: Duration = Duration::from_secs(1);

/// The unit of times in `/proc/PID/stat`, in microseconds: a hundredth of a second on all relevant
/// architectures.
const TICK_MICROS: u64 = 10_000;

/// A contender that is ready for load.
struct Runner {
    contender: Contender,
    server: Server,
    request: Request,
    answer: RawResponse,
    samples: Vec<(Sample, f64)>,
}

impl Session {
    /// Measures `case` for these contenders. Unleash Edge is skipped if it is missing or responds
    /// otherwise than expected; for Parapet and the baseline that is an error.
    pub(crate) fn measure(
        &self,
        case: &Case,
        contenders: &[Contender],
        rounds: usize,
    ) -> Result<BTreeMap<Contender, Measured>> {
        let mut runners = self.runners(case, contenders)?;
        self.round(case, &mut runners, WARM_UP)?;
        for runner in &mut runners {
            runner.samples.clear();
        }
        for round in 1..=rounds {
            self.round(case, &mut runners, self.duration)?;
            let numbers: Vec<String> = runners.iter().map(Runner::last_rate).collect();
            eprintln!("  round {round} of {rounds}: {}", numbers.join(", "));
        }
        runners.iter().map(|it| Ok((it.contender, it.measured()?))).collect()
    }

    fn runners(&self, case: &Case, contenders: &[Contender]) -> Result<Vec<Runner>> {
        let parapet = self.contenders.parapet(case.flags, case.tokens, case.transport)?;
        let parapet = Runner::new(case, Contender::Parapet, parapet)?;
        let mut runners = Vec::new();
        if contenders.contains(&Contender::Bare) {
            let file = self.contenders.folder().join("answer");
            bare_hyper::write_response(&parapet.answer, &file)?;
            let request = parapet.request.clone();
            let server = self.contenders.bare(&file, case.transport)?;
            let answer = server.send(&request, 0)?;
            let theirs = &parapet.answer;
            let same = (answer.status, answer.length) == (theirs.status, theirs.length);
            ensure!(same, "the baseline responds {answer:?}, Parapet {theirs:?}");
            let contender = Contender::Bare;
            runners.push(Runner { contender, server, request, answer, samples: Vec::new() });
        }
        runners.push(parapet);
        if contenders.contains(&Contender::Edge)
            && let Some(server) = self.contenders.edge(case.flags)?
        {
            match Runner::new(case, Contender::Edge, server) {
                Ok(runner) => runners.push(runner),
                Err(error) => eprintln!("  Unleash Edge is left out: {error:#}"),
            }
        }
        Ok(runners)
    }

    /// Reserves the numbers of a run, and returns the first.
    pub(crate) fn reserve_numbers(&self) -> u64 {
        self.last_number.replace(self.last_number.get() + NUMBERS_PER_RUN)
    }

    /// Loads a server with requests whose numbers start after `first`; every response must have the
    /// expected length. Returns the sample and the processor time per request.
    pub(crate) fn load(
        &self,
        case: &Case,
        first: u64,
        server: &Server,
        (request, answer): (&Request, &RawResponse),
        time: Duration,
    ) -> Result<(Sample, f64)> {
        let process = &server.process;
        let before = cpu_micros(process)?;
        let draw = (case.numbers, first);
        let pressure = (case.connections, case.pause);
        let (folder, host) = (self.contenders.folder(), process.address);
        let sample = load::run(folder, (host, case.transport), request, draw, pressure, time)
            .with_context(|| process.log())?;
        let cpu = to_f64(cpu_micros(process)? - before) / sample.requests;
        let length = to_f64(answer.length as u64);
        let mean = sample.bytes / sample.requests;
        // Responses that were incomplete at the end count as bytes only.
        let under_way = length * to_f64(case.connections as u64) / sample.requests;
        let tolerance = if request.path.contains(NUMBER) { 0.25 } else { 0.01 };
        if (mean - length).abs() > length * tolerance + under_way {
            bail!("responses have {mean} bytes on average, expected {length}");
        }
        Ok((sample, cpu))
    }

    /// Loads each contender in turn with the same requests. If Unleash Edge fails, it is dropped, and
    /// its earlier results are discarded.
    fn round(&self, case: &Case, runners: &mut Vec<Runner>, time: Duration) -> Result<()> {
        let (mut out, first) = (None, self.reserve_numbers());
        for runner in &mut *runners {
            let Runner { contender, server, request, answer, samples } = runner;
            let sample = self.load(case, first, server, (&*request, &*answer), time);
            match sample.with_context(|| format!("while {} served", contender.name())) {
                Ok(sample) => samples.push(sample),
                Err(error) if *contender == Contender::Edge => out = Some(error),
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = out {
            eprintln!("  Unleash Edge is left out: {error:#}");
            runners.retain(|runner| runner.contender != Contender::Edge);
        }
        Ok(())
    }
}

impl Case {
    /// The request for this server, and a typical response to it.
    pub(crate) fn prepare(&self, server: &Server) -> Result<(Request, RawResponse)> {
        let mut request = self.request.clone();
        if self.expected == Expected::NotModified {
            let full = server.send(&request, 0)?;
            let tag = full.header("etag");
            let tag = tag.with_context(|| format!("{} has no entity tag", request.path))?;
            request = request.header("If-None-Match", tag);
        }
        let looks = match self.numbers {
            _ if !request.path.contains(NUMBER) => 1,
            NumberSource::Sequential => SAMPLED_RESPONSES,
            NumberSource::RandomBelow(end) => end.min(SAMPLED_RESPONSES),
        };
        let mut answers = Vec::new();
        for n in 0..looks {
            let answer = server.send(&request, n)?;
            self.expected.check(&answer)?;
            answers.push(answer);
        }
        answers.sort_by_key(|answer| answer.length);
        let typical = answers.swap_remove(answers.len() / 2);
        Ok((request, typical))
    }
}

impl Expected {
    fn check(self, answer: &RawResponse) -> Result<()> {
        let (status, coding) = match self {
            Self::Body(coding) => (200, coding),
            Self::NotModified => (304, None),
        };
        ensure!(answer.status == status, "the status is {}, not {status}", answer.status);
        let found = answer.header("content-encoding");
        ensure!(found == coding, "the content encoding is {found:?}, not {coding:?}");
        ensure!(status == 304 || answer.body.len() > 10, "the response is empty");
        Ok(())
    }
}

impl Runner {
    /// A contender whose responses are as expected.
    fn new(case: &Case, contender: Contender, server: Server) -> Result<Self> {
        let (request, answer) = case.prepare(&server)?;
        Ok(Self { contender, server, request, answer, samples: Vec::new() })
    }

    fn measured(&self) -> Result<Measured> {
        let median = |of: fn(&Sample) -> f64| median(self.samples.iter().map(|(it, _)| of(it)));
        Ok(Measured {
            per_second: median(Sample::per_second),
            p50_micros: median(|it| it.p50_micros),
            p99_micros: median(|it| it.p99_micros),
            cpu_micros: super::numbers::median(self.samples.iter().map(|(_, cpu)| *cpu)),
            resident: self.server.process.resident()?,
            rounds: self.samples.iter().map(|(it, _)| it.per_second()).collect(),
        })
    }

    fn last_rate(&self) -> String {
        let rate = self.samples.last().map_or(0.0, |(it, _)| it.per_second());
        format!("{} {rate:.0}/s", self.contender.name())
    }
}

/// The processor time of a process so far, in microseconds.
fn cpu_micros(process: &ServerProcess) -> Result<u64> {
    let stat = std::fs::read_to_string(process.proc().join("stat"))?;
    // The second field is a name in parentheses, which may contain anything.
    let rest = stat.rsplit_once(')').context("/proc/PID/stat has a name")?.1;
    let field = |n: usize| rest.split_whitespace().nth(n).and_then(|it| it.parse::<u64>().ok());
    let (user, system) = field(11).zip(field(12)).context("/proc/PID/stat has times")?;
    Ok((user + system) * TICK_MICROS)
}
