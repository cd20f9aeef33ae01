//! The report: tables and plots.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Result;

use super::{
    contender::Contender,
    growth_curves::CurveResult,
    latency_during_updates::{self, SwapResult},
    measure::Measured,
    memory::MemoryMeasurement,
    numbers::{thousands, to_f64, verdict},
    plot,
    sdk_requests::RowResult,
    table::Table,
};

/// All results; parts that were not measured are empty.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) outcomes: Vec<RowResult>,
    pub(crate) growths: Vec<CurveResult>,
    pub(crate) swaps: Vec<SwapResult>,
    pub(crate) memory: Vec<MemoryMeasurement>,
}

const CONTENDERS: [Contender; 3] = [Contender::Bare, Contender::Parapet, Contender::Edge];

/// Stands for a missing value.
const MISSING_VALUE: &str = "–";

impl Report {
    /// The tables, each under a heading.
    pub(crate) fn tables(&self) -> String {
        let parts = [
            ("Requests per second", "", self.requests()),
            ("Latency, processor time and memory", "", self.costs()),
            ("Growth", "", self.growth()),
            ("Swaps", SWAPS, self.swap_table()),
            ("Memory", "", self.memory_table()),
        ];
        let mut text = String::new();
        for (heading, about, table) in parts.iter().filter(|(.., table)| !table.is_empty()) {
            write!(text, "## {heading}\n\n{about}{}\n", table.text()).expect("a string takes all");
        }
        text
    }

    /// Writes `speed.md` and its plots.
    pub(crate) fn write(&self, folder: &Path, machine: &str, command: &str) -> Result<()> {
        let plots = folder.join("speed");
        fs::create_dir_all(&plots)?;
        fs::write(plots.join("requests.svg"), plot::requests(&self.outcomes))?;
        fs::write(plots.join("p99.svg"), plot::p99(&self.outcomes))?;
        fs::write(plots.join("growth.svg"), plot::growth(&self.growths))?;
        let text = format!(
            "# Speed\n\n{INTRODUCTION}\n```sh\n{command}\n```\n\n{machine}\n\n\
             ![Requests per second](speed/requests.svg)\n\n\
             ![The slowest of a hundred requests](speed/p99.svg)\n\n\
             ![How cost grows](speed/growth.svg)\n\n{}",
            self.tables()
        );
        Ok(fs::write(folder.join("speed.md"), text)?)
    }

    fn requests(&self) -> Table {
        let head = [
            "request",
            "bare hyper",
            "Parapet",
            "Unleash Edge",
            "Parapet ÷ bare",
            "goal",
            "",
            "Parapet ÷ Edge",
        ];
        let rows = self.outcomes.iter().map(|outcome| {
            let rate = |it| {
                value_or_dash(
                    outcome.measured.get(&it).map(|it: &Measured| it.per_second),
                    thousands,
                )
            };
            let ratio = outcome.ratio(Contender::Bare);
            let goal = outcome.row.goal;
            let mut row = vec![outcome.row.title.to_owned()];
            row.extend(CONTENDERS.map(rate));
            row.extend([
                value_or_dash(ratio, |it| format!("{it:.2}")),
                value_or_dash(goal, |goal| format!("≥ {goal:.2}")),
                goal.map_or_else(String::new, |goal| verdict(ratio.is_some_and(|it| it >= goal))),
                value_or_dash(outcome.ratio(Contender::Edge), ratio_text),
            ]);
            row
        });
        Table::new(&head, rows.collect())
    }

    fn costs(&self) -> Table {
        let head = ["request", "", "p50", "p99", "processor time each", "resident"];
        let rows = self.outcomes.iter().flat_map(|outcome| {
            outcome.measured.iter().map(|(contender, measured)| {
                vec![
                    outcome.row.title.to_owned(),
                    contender.name().to_owned(),
                    duration_text(measured.p50_micros),
                    duration_text(measured.p99_micros),
                    format!("{:.1} µs", measured.cpu_micros),
                    mebibytes(to_f64(measured.resident)),
                ]
            })
        });
        Table::new(&head, rows.collect())
    }

    fn growth(&self) -> Table {
        let head = [
            "request",
            "with",
            "bare hyper",
            "Parapet",
            "Unleash Edge",
            "Parapet ÷ bare",
            "p99",
            "processor time each",
            "resident",
        ];
        let rows = self.growths.iter().flat_map(|growth| {
            growth.points.iter().map(|(point, measured)| {
                let rate = |it| {
                    value_or_dash(measured.get(&it).map(|it: &Measured| it.per_second), thousands)
                };
                let parapet = &measured[&Contender::Parapet];
                let bare = measured.get(&Contender::Bare);
                let point = thousands(to_f64(*point));
                let with = format!("{point} {}", growth.curve.axis);
                let mut row = vec![growth.curve.request.to_owned(), with];
                row.extend(CONTENDERS.map(rate));
                row.extend([
                    value_or_dash(bare.map(|bare| parapet.ratio(bare)), |it| format!("{it:.2}")),
                    duration_text(parapet.p99_micros),
                    format!("{:.1} µs", parapet.cpu_micros),
                    mebibytes(to_f64(parapet.resident)),
                ]);
                row
            })
        });
        Table::new(&head, rows.collect())
    }

    fn swap_table(&self) -> Table {
        let head = [
            "request, 5,000 flags",
            "pauses",
            "swaps per second",
            "calm",
            "swapping",
            "calm p99",
            "swapping p99",
            "ratio of p99",
            "goal",
            "",
            "bare hyper beside it, p99",
        ];
        let rows = self.swaps.iter().map(|it| {
            vec![
                it.title.to_owned(),
                if it.pause.is_zero() { "none".to_owned() } else { format!("{:?}", it.pause) },
                format!("{:.1}", it.swaps_per_second),
                thousands(it.calm.per_second),
                thousands(it.swapping.per_second),
                duration_text(it.calm.p99_micros),
                duration_text(it.swapping.p99_micros),
                format!("{:.2}", it.p99_ratio),
                format!("≤ {:.2}", latency_during_updates::MAX_P99_RATIO),
                verdict(it.is_met()),
                duration_text(it.baseline.p99_micros),
            ]
        });
        Table::new(&head, rows.collect())
    }

    fn memory_table(&self) -> Table {
        let rows = self.memory.iter().map(|it| {
            vec![
                it.subject.clone(),
                size_text(it.bytes),
                it.bare.map_or_else(String::new, size_text),
                it.goal.map_or_else(String::new, |goal| format!("≤ {}", size_text(goal))),
                it.goal.map_or_else(String::new, |goal| verdict(it.bytes <= goal)),
            ]
        });
        Table::new(&["resident memory, for", "Parapet", "bare hyper", "goal", ""], rows.collect())
    }
}

const INTRODUCTION: &str = "\
Parapet compared with a bare hyper server that sends the same bytes and does nothing else, which is
the limit of this machine, and with Unleash Edge. Each server runs in its own process on the same
machine as the load generator, and they take turns within each round. Numbers are medians over rounds;
ratios are medians of the rounds' ratios. Unless a row says otherwise there are 350 flags (175 kB) and
32 reused connections. Each request has its own `X-Request-Id`, `traceparent` and `X-Forwarded-For`,
as behind an ingress; all servers get the same requests. Over TLS (1.3, ECDSA with P-256) bare hyper
uses tokio-rustls with the same settings. Generated by
";

const SWAPS: &str = "\
An edge in front of a server whose flags change ten times a second: it fetches, parses, compiles,
swaps and stores all of them at each change, on the processors that also serve requests. The goal
counts as met if at least nine changes per second arrived. Each of 32 connections pauses before each
request, as clients do, or sends the next one at once, so that all processors are busy. The last
column is bare hyper, which swaps nothing, while Parapet swaps beside it without serving requests:
the effect of a change of flags on any server on these processors.

";

fn value_or_dash(value: Option<f64>, write: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| MISSING_VALUE.to_owned(), write)
}

fn ratio_text(ratio: f64) -> String {
    if ratio < 10.0 { format!("{ratio:.1} ×") } else { format!("{ratio:.0} ×") }
}

fn duration_text(value: f64) -> String {
    if value < 1e4 { format!("{} µs", thousands(value)) } else { format!("{:.1} ms", value / 1e3) }
}

/// Bytes in KiB or MiB.
fn size_text(bytes: f64) -> String {
    if bytes.abs() < 1024.0 * 1024.0 {
        format!("{:.1} KiB", bytes / 1024.0)
    } else {
        mebibytes(bytes)
    }
}

fn mebibytes(value: f64) -> String {
    format!("{:.1} MiB", value / 1024.0 / 1024.0)
}
