//! The cost of a number of streams: memory, delivery of a change to all of them, and keep-alive
//! comments.

use std::{
    net::TcpStream,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Result;
use jiff::Timestamp;

use super::{
    clients::{StreamClients, record_events},
    numbers::{median, to_f64},
    server_process::ServerProcess,
    server_under_test::Server,
};

/// The configuration of the whole benchmark.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) folder: PathBuf,
    /// The number of changes.
    pub(crate) rounds: usize,
    /// How long the cost of keep-alive comments is measured, if at all.
    pub(crate) keepalive_duration: Option<Duration>,
}

/// The results for one number of streams, for as many idle connections, and for the baseline.
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) streams: u64,
    /// Resident memory per stream, in bytes.
    pub(crate) stream_bytes: f64,
    /// The same after all clients have disconnected and reconnected.
    pub(crate) reconnected_bytes: f64,
    pub(crate) idle_bytes: f64,
    pub(crate) bare_bytes: f64,
    pub(crate) delivery: DeliveryTimes,
    pub(crate) bare_delivery: DeliveryTimes,
    pub(crate) keepalive: Option<KeepaliveCost>,
}

/// When clients received a change, in milliseconds since the server began to send it; medians over
/// rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeliveryTimes {
    pub(crate) first: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) last: f64,
    /// Processor time of the server per client, in microseconds.
    pub(crate) cpu_micros: f64,
}

/// The cost of keep-alive comments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepaliveCost {
    /// Comments per second on all streams.
    pub(crate) comments: f64,
    /// Processor time with streams, as a fraction of one core.
    pub(crate) streams: f64,
    /// Processor time with idle connections instead, as a fraction of one core.
    pub(crate) idle: f64,
}

/// The pause between rounds, for servers that would not pause themselves.
const ROUND_PAUSE: Duration = Duration::from_millis(300);

impl Session {
    /// Measures this number of streams.
    pub(crate) fn measure(&self, streams: u64) -> Result<Level> {
        eprintln!("{streams} streams");
        let (idle_bytes, idle_share) = self.measure_idle(streams)?;
        eprintln!("  {idle_bytes:.0} bytes an idle connection");

        let mut server = Server::parapet(&self.folder, streams)?;
        let (request, host) = (server.request(), server.process.address);
        let (first, then) = record_events(host, &request, || server.change_flag())?;
        server.wait_until_no_streams()?;
        let before = server.process.settled_resident()?;
        let mut audience = StreamClients::new()?;
        let each = |server: &Server| -> Result<f64> {
            Ok((to_f64(server.process.settled_resident()?) - to_f64(before)) / to_f64(streams))
        };
        audience.connect(streams, host, &request)?;
        let stream_bytes = each(&server)?;
        audience.disconnect();
        server.wait_until_no_streams()?;
        audience.connect(streams, host, &request)?;
        let reconnected_bytes = each(&server)?;
        eprintln!("  {stream_bytes:.0} bytes a stream, {reconnected_bytes:.0} after reconnecting");
        let delivery = self.measure_delivery(&mut server, &audience, streams)?;
        let kept = self.measure_keepalive(&server, &audience)?;
        let keepalive = kept.zip(idle_share).map(|((comments, streams), idle)| {
            eprintln!("  {comments:.1} comments/s, {:.3} % of a core", streams * 100.0);
            KeepaliveCost { comments, streams, idle }
        });
        drop((audience, server));

        let mut server = Server::bare(&self.folder, &first, &then)?;
        let before = server.process.settled_resident()?;
        let mut audience = StreamClients::new()?;
        audience.connect(streams, server.process.address, &request)?;
        let bare_bytes =
            (to_f64(server.process.settled_resident()?) - to_f64(before)) / to_f64(streams);
        eprintln!("  {bare_bytes:.0} bytes a stream of the baseline");
        let bare_delivery = self.measure_delivery(&mut server, &audience, streams)?;
        Ok(Level {
            streams,
            stream_bytes,
            reconnected_bytes,
            idle_bytes,
            bare_bytes,
            delivery,
            bare_delivery,
            keepalive,
        })
    }

    /// The memory of each of `count` connections that were used once and stay open, and the processor
    /// time of all of them as a fraction of one core.
    fn measure_idle(&self, count: u64) -> Result<(f64, Option<f64>)> {
        let server = Server::parapet(&self.folder, count)?;
        let (poll, host) = (server.poll()?, server.process.address);
        let before = server.process.settled_resident()?;
        let open = (0..count).map(|_| {
            let mut stream = TcpStream::connect(host)?;
            poll.send_on(&mut stream, host, 0)?;
            Ok(stream)
        });
        let open = open.collect::<Result<Vec<_>>>()?;
        let each = (to_f64(server.process.settled_resident()?) - to_f64(before)) / to_f64(count);
        let share =
            self.keepalive_duration.map(|time| cpu_share(&server.process, time)).transpose()?;
        drop(open);
        Ok((each, share))
    }

    /// Measures several changes, after one that does not count.
    fn measure_delivery(
        &self,
        server: &mut Server,
        audience: &StreamClients,
        streams: u64,
    ) -> Result<DeliveryTimes> {
        let mut rounds = Vec::new();
        for round in 0..=self.rounds {
            audience.clear_updates();
            let before = cpu_nanos(&server.process)?;
            server.change_flag()?;
            let frames = audience.wait_for_updates(streams)?;
            let nanos = cpu_nanos(&server.process)?.saturating_sub(before);
            let cpu_micros = to_f64(nanos) / 1e3 / to_f64(streams);
            let spread = DeliveryTimes::of(&frames, server.changed_at()?, cpu_micros);
            if round > 0 {
                eprintln!(
                    "  round {round} of {}: the last after {:.1} ms, {cpu_micros:.1} µs each",
                    self.rounds, spread.last
                );
                rounds.push(spread);
            }
            sleep(ROUND_PAUSE);
        }
        Ok(DeliveryTimes::median(&rounds))
    }

    /// Comments per second, and processor time as a fraction of one core, from the first comment on.
    fn measure_keepalive(
        &self,
        server: &Server,
        audience: &StreamClients,
    ) -> Result<Option<(f64, f64)>> {
        let Some(time) = self.keepalive_duration else { return Ok(None) };
        audience.wait_for_comments(1)?;
        let (before, began) = (audience.comments(), Instant::now());
        let share = cpu_share(&server.process, time)?;
        let comments = to_f64(audience.comments() - before) / began.elapsed().as_secs_f64();
        Ok(Some((comments, share)))
    }
}

impl DeliveryTimes {
    /// From these arrival times, earliest first, and the start.
    fn of(arrivals: &[Timestamp], start: Timestamp, cpu_micros: f64) -> Self {
        let after = |share: usize| {
            let arrival = arrivals[(arrivals.len() - 1) * share / 100];
            arrival.duration_since(start).as_secs_f64() * 1e3
        };
        let (first, p50, p99, last) = (after(0), after(50), after(99), after(100));
        Self { first, p50, p99, last, cpu_micros }
    }

    fn median(rounds: &[Self]) -> Self {
        let of = |part: fn(&Self) -> f64| median(rounds.iter().map(part));
        Self {
            first: of(|it| it.first),
            p50: of(|it| it.p50),
            p99: of(|it| it.p99),
            last: of(|it| it.last),
            cpu_micros: of(|it| it.cpu_micros),
        }
    }
}

/// Processor time over a period, as a fraction of one core.
fn cpu_share(process: &ServerProcess, stretch: Duration) -> Result<f64> {
    let (before, began) = (cpu_nanos(process)?, Instant::now());
    sleep(stretch);
    let nanos = cpu_nanos(process)?.saturating_sub(before);
    Ok(to_f64(nanos) / 1e9 / began.elapsed().as_secs_f64())
}

/// The processor time of a process's current threads so far, in nanoseconds. The times of the whole
/// process are too coarse for small loads.
fn cpu_nanos(process: &ServerProcess) -> Result<u64> {
    let mut nanos = 0;
    for thread in std::fs::read_dir(process.proc().join("task"))? {
        // A thread that has just ended has no file.
        let text = std::fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        let first = text.split_whitespace().next().and_then(|it| it.parse::<u64>().ok());
        nanos += first.unwrap_or_default();
    }
    Ok(nanos)
}
