//! The report: tables and plots.

use std::{fs, path::Path};

use anyhow::Result;

use super::{
    measure::{KeepaliveCost, Level},
    numbers::{thousands, to_f64, verdict},
    picture::{Panel, Picture},
    table::Table,
};

/// The goal for a stream, in bytes.
const MEMORY_GOAL_BYTES: f64 = 16.0 * 1024.0;

/// The goal for the last client to receive a change, in milliseconds.
const DELIVERY_GOAL_MILLIS: f64 = 150.0;

/// All results.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) levels: Vec<Level>,
}

impl Report {
    /// The tables, each under a heading.
    pub(crate) fn tables(&self) -> String {
        let parts = [
            ("Memory", MEMORY, self.memory()),
            ("Delivery of a change", DELIVERY, self.delivery()),
            ("Keeping alive", KEEPALIVE, self.keepalive()),
        ];
        let parts = parts.iter().filter(|(.., table)| !table.is_empty());
        let parts =
            parts.map(|(title, about, table)| format!("## {title}\n\n{about}\n\n{}", table.text()));
        parts.collect::<Vec<_>>().join("\n")
    }

    /// Writes `streams.md` and its plots.
    pub(crate) fn write(&self, folder: &Path, machine: &str, command: &str) -> Result<()> {
        let plots = folder.join("streams");
        fs::create_dir_all(&plots)?;
        fs::write(plots.join("growth.svg"), self.growth())?;
        let text = format!(
            "# Streams\n\n{INTRODUCTION}\n```sh\n{command}\n```\n\n{machine}\n\n\
             ![The cost of streams by their number](streams/growth.svg)\n\n{}",
            self.tables()
        );
        Ok(fs::write(folder.join("streams.md"), text)?)
    }

    fn memory(&self) -> Table {
        let head = [
            "streams",
            "Parapet, each",
            "all come back, each",
            "goal",
            "",
            "idle connection without a stream",
            "bare tokio, each",
        ];
        let rows = self.levels.iter().map(|it| {
            vec![
                thousands(to_f64(it.streams)),
                kibibytes(it.stream_bytes),
                kibibytes(it.reconnected_bytes),
                format!("≤ {}", kibibytes(MEMORY_GOAL_BYTES)),
                verdict(it.stream_bytes.max(it.reconnected_bytes) <= MEMORY_GOAL_BYTES),
                kibibytes(it.idle_bytes),
                kibibytes(it.bare_bytes),
            ]
        });
        Table::new(&head, rows.collect())
    }

    fn delivery(&self) -> Table {
        let head = [
            "streams",
            "",
            "first",
            "half",
            "99 of 100",
            "last",
            "goal",
            "",
            "last ÷ bare tokio",
            "processor, each",
        ];
        let rows = self.levels.iter().flat_map(|it| {
            let row = |name: &str, told: &super::measure::DeliveryTimes, rest: [String; 3]| {
                let times = [told.first, told.p50, told.p99, told.last].map(millis);
                let mut row = vec![thousands(to_f64(it.streams)), name.to_owned()];
                row.extend(times.into_iter().chain(rest));
                row.push(format!("{:.1} µs", told.cpu_micros));
                row
            };
            let rest = [
                format!("≤ {}", millis(DELIVERY_GOAL_MILLIS)),
                verdict(it.delivery.last <= DELIVERY_GOAL_MILLIS),
                format!("{:.2}", it.delivery.last / it.bare_delivery.last),
            ];
            [
                row("Parapet", &it.delivery, rest),
                row("bare tokio", &it.bare_delivery, [const { String::new() }; 3]),
            ]
        });
        Table::new(&head, rows.collect())
    }

    fn keepalive(&self) -> Table {
        let head = [
            "streams",
            "comments per second",
            "processor, of one core",
            "as many idle connections",
            "each comment",
        ];
        let rows = self.levels.iter().filter_map(|it| {
            let KeepaliveCost { comments, streams, idle } = it.keepalive?;
            Some(vec![
                thousands(to_f64(it.streams)),
                format!("{comments:.1}"),
                percent(streams),
                percent(idle),
                format!("{:.0} µs", (streams - idle) / comments * 1e6),
            ])
        });
        Table::new(&head, rows.collect())
    }

    /// All results over the number of streams.
    fn growth(&self) -> String {
        const WIDTH: f64 = 300.0;
        const HEIGHT: f64 = 270.0;
        let line = |of: &dyn Fn(&Level) -> Option<f64>| {
            let points = self.levels.iter().filter_map(|it| Some((to_f64(it.streams), of(it)?)));
            points.collect::<Vec<_>>()
        };
        let panels = [
            Panel {
                title: "resident memory of each, KiB",
                axis: "streams",
                lines: vec![
                    ("bare", line(&|it| Some(it.bare_bytes / 1024.0))),
                    ("edge", line(&|it| Some(it.idle_bytes / 1024.0))),
                    (
                        "parapet",
                        line(&|it| Some(it.stream_bytes.max(it.reconnected_bytes) / 1024.0)),
                    ),
                ],
                goal: Some(MEMORY_GOAL_BYTES / 1024.0),
            },
            Panel {
                title: "from a change to its last reader, ms",
                axis: "streams",
                lines: vec![
                    ("bare", line(&|it| Some(it.bare_delivery.last))),
                    ("parapet", line(&|it| Some(it.delivery.last))),
                ],
                goal: Some(DELIVERY_GOAL_MILLIS),
            },
            Panel {
                title: "keeping alive, % of one core",
                axis: "streams",
                lines: vec![
                    ("edge", line(&|it| Some(it.keepalive?.idle * 100.0))),
                    ("parapet", line(&|it| Some(it.keepalive?.streams * 100.0))),
                ],
                goal: None,
            },
        ];
        let mut picture = Picture::new("What streams cost, less is better");
        let names = [
            ("bare", "bare tokio"),
            ("parapet", "Parapet, streams"),
            ("edge", "Parapet, idle connections"),
        ];
        picture.legend((WIDTH * 3.0 - 480.0, 28.0), &names);
        for (at, panel) in panels.iter().enumerate() {
            let place = (to_f64(at as u64) * WIDTH, 44.0);
            panel.draw(&mut picture, place, (WIDTH, HEIGHT));
        }
        picture.finish(WIDTH * 3.0, 52.0 + HEIGHT)
    }
}

const INTRODUCTION: &str = "\
Clients of `/api/client/streaming` of an offline Parapet with 350 flags (175 kB), compared with a bare
tokio server that writes the same bytes to as many connections when triggered, which is the limit of
this machine. Each server runs in its own process, and the clients in one thread of another one, all
on the same machine. Numbers are medians over rounds. Generated by
";

const MEMORY: &str = "\
The increase of resident memory once each stream has received its 175 kB and memory has settled,
divided by the number of streams, and the same after all clients have disconnected and reconnected.
For comparison: idle connections that were used for one request.";

const DELIVERY: &str = "\
One flag changes. The time from the swap in the server's log until a client has read the last byte
of the event; the clients share the same cores. The server's processor time per client includes
reading and compiling the flags.";

const KEEPALIVE: &str = "\
Processor time of the server while it sends only the comments that prevent proxies from closing idle
streams, one every 15 to 25 seconds on each stream.";

fn kibibytes(bytes: f64) -> String {
    format!("{:.1} KiB", bytes / 1024.0)
}

fn millis(value: f64) -> String {
    if value < 10.0 { format!("{value:.2} ms") } else { format!("{value:.0} ms") }
}

fn percent(share: f64) -> String {
    format!("{:.3} %", share * 100.0)
}
