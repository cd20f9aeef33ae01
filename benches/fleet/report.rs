//! The report: tables and a plot.

use std::{fs, path::Path};

use anyhow::Result;

use super::{
    instances::Setup,
    measure::Level,
    numbers::{thousands, to_f64, verdict},
    picture::{Panel, Picture},
    table::Table,
};

/// The goal for the requests of one instance per minute, usage included.
const SINGLE_GOAL: f64 = 6.0;

/// The goal for the requests of a fleet, compared with those of one instance.
const FLEET_GOAL: f64 = 1.2;

/// The goal for the time from the first instance with a change to the last, in milliseconds.
const SPREAD_GOAL_MILLIS: f64 = 1_000.0;

/// All results.
pub(crate) struct Report {
    pub(crate) levels: Vec<Level>,
}

impl Report {
    /// The tables, each under a heading.
    pub(crate) fn tables(&self) -> String {
        let parts = [
            ("Requests to upstream", REQUESTS, self.requests()),
            ("Changes, tokens and usage", CHANGES, self.changes()),
        ];
        let parts =
            parts.map(|(title, about, table)| format!("## {title}\n\n{about}\n\n{}", table.text()));
        parts.join("\n")
    }

    /// Writes `fleet.md` and its plot.
    pub(crate) fn write(&self, folder: &Path, machine: &str, command: &str) -> Result<()> {
        let plots = folder.join("fleet");
        fs::create_dir_all(&plots)?;
        fs::write(plots.join("requests.svg"), self.plot())?;
        let text = format!(
            "# The cost of a fleet for upstream\n\n{INTRODUCTION}\n```sh\n{command}\n```\n\n{machine}\n\n\
             ![Requests to upstream by the number of instances](fleet/requests.svg)\n\n{}\n{}",
            self.tables(),
            self.beyond()
        );
        Ok(fs::write(folder.join("fleet.md"), text)?)
    }

    fn requests(&self) -> Table {
        let head = ["", "instances", "a minute", "goal", "", "of which"];
        let rows = self.levels.iter().map(|it| {
            let (goal, is_met) = self.goal(it).map_or_else(Default::default, |goal| {
                (format!("≤ {goal:.1}"), verdict(total(it) <= goal))
            });
            let parts = it.requests.iter().map(|(purpose, rate)| format!("{purpose} {rate:.1}"));
            let parts = parts.collect::<Vec<_>>().join(", ");
            let (name, instances) = (it.setup.name().to_owned(), it.instances.to_string());
            vec![name, instances, format!("{:.1}", total(it)), goal, is_met, parts]
        });
        Table::new(&head, rows.collect())
    }

    /// The goal for the requests per minute at a level, if it has one.
    fn goal(&self, level: &Level) -> Option<f64> {
        match level.setup {
            Setup::Alone => (level.instances == 1).then_some(SINGLE_GOAL),
            Setup::Fleet { .. } => {
                let single = self.levels.iter().find(|it| {
                    matches!(it.setup, Setup::Fleet { .. } | Setup::Alone) && it.instances == 1
                });
                Some(single.map(total)? * FLEET_GOAL)
            }
            Setup::UnleashEdge => None,
        }
    }

    fn changes(&self) -> Table {
        let head = [
            "",
            "instances",
            "change → last instance, s",
            "longest",
            "first → last, ms",
            "longest",
            "goal",
            "",
            "requests about a token",
            "evaluations received",
        ];
        let rows = self.levels.iter().map(|it| {
            let is_fleet = matches!(it.setup, Setup::Fleet { .. });
            let goal = |text: String| if is_fleet { text } else { String::new() };
            let [reported, received] = it.evaluations;
            vec![
                it.setup.name().to_owned(),
                it.instances.to_string(),
                format!("{:.1}", it.propagation[0]),
                format!("{:.1}", it.propagation[1]),
                thousands(it.spread[0]),
                thousands(it.spread[1]),
                goal(format!("≤ {}", thousands(SPREAD_GOAL_MILLIS))),
                goal(verdict(it.spread[1] <= SPREAD_GOAL_MILLIS)),
                it.validations.to_string(),
                format!("{received} of {reported}"),
            ]
        });
        Table::new(&head, rows.collect())
    }

    fn plot(&self) -> String {
        const WIDTH: f64 = 400.0;
        const HEIGHT: f64 = 280.0;
        let line = |is_meant: fn(Setup) -> bool, of: fn(&Level) -> f64| {
            let levels = self.levels.iter().filter(|it| is_meant(it.setup));
            levels.map(|it| (to_f64(it.instances as u64), of(it))).collect::<Vec<_>>()
        };
        let lines = |of: fn(&Level) -> f64| {
            vec![
                ("edge", line(|it| it == Setup::UnleashEdge, of)),
                ("bare", line(|it| it == Setup::Alone, of)),
                ("parapet", line(|it| matches!(it, Setup::Fleet { .. }), of)),
            ]
        };
        let panels = [
            Panel {
                title: "requests to upstream a minute",
                axis: "instances",
                lines: lines(total),
                goal: None,
            },
            Panel {
                title: "first instance with a change → last, ms",
                axis: "instances",
                lines: lines(|it| it.spread[1].max(1.0)),
                goal: Some(SPREAD_GOAL_MILLIS),
            },
        ];
        let mut picture = Picture::new("What instances cost upstream, less is better");
        let names =
            [Setup::UnleashEdge.name(), Setup::Alone.name(), Setup::Fleet { redis: 0 }.name()];
        let names: Vec<_> = ["edge", "bare", "parapet"].into_iter().zip(names).collect();
        picture.legend((16.0, 48.0), &names);
        for (at, panel) in panels.iter().enumerate() {
            panel.draw(&mut picture, (to_f64(at as u64) * WIDTH, 60.0), (WIDTH, HEIGHT));
        }
        picture.finish(WIDTH * 2.0, 68.0 + HEIGHT)
    }

    /// The estimate for more instances than one machine can run.
    fn beyond(&self) -> String {
        let largest = self
            .levels
            .iter()
            .filter(|it| matches!(it.setup, Setup::Fleet { .. }))
            .max_by_key(|it| it.instances);
        let measured = largest.map_or_else(String::new, |it| {
            format!("With {} instances it is {:.1} a minute.", it.instances, total(it))
        });
        format!(
            "## 10,000 instances, on paper\n\nUpstream gets the requests of one instance, whatever the number. {measured} {BEYOND}\n"
        )
    }
}

fn total(level: &Level) -> f64 {
    level.requests.values().sum()
}

const INTRODUCTION: &str = "\
Instances at their default settings, in front of a stand-in for Unleash that counts requests: one
environment, 350 flags, an admin token (Unleash Edge, of which at most ten are measured: a backend token).
Every instance gets a report of usage each ten seconds. All processes share one machine. Generated by
";

const REQUESTS: &str = "\
Counted while nothing changes, from 20 seconds after the start.";

const CHANGES: &str = "\
A flag changes upstream: the time until the last instance serves the change, and the time from the first
request of an instance that got the change until then. A new token is presented to all instances at once.
Evaluations are those that the instances were told of, and those that upstream received.";

const BEYOND: &str = "\
The work of Redis grows: each instance keeps two connections, reads the version of each environment
every two seconds, and fetches each changed snapshot once. 10,000 instances with four environments run 35,000
small scripts a second. Redis runs scripts on one core, and tens of thousands a second are what that core can do,
so it breaks first. A change of a snapshot of 200 kB, which is 20 kB compressed, is 200 MB at once: 0.2 seconds at
10 Gbit/s. Before that point, several fleets with a Redis each, or a chain of edges in each region, are the way.
The connections of 10,000 instances are 20,000; the limit of Redis is 10,000 by default (`maxclients`).";
