//! What was measured, as tables; all that it was measured by is criterion's.

use std::{fs, path::Path, time::SystemTime};

use anyhow::Result;
use serde::Deserialize;

use super::{
    numbers::{median, thousands, to_f64, verdict},
    table::Table,
};

/// Benchmarks of one group, each measured with both engines.
pub(crate) struct Group {
    pub(crate) id: &'static str,
    title: &'static str,
    about: &'static str,
    /// How many times faster than yggdrasil Parapet is to be.
    goal: Option<f64>,
    /// Whether the ids are numbers of flags, by which times are divided.
    pub(crate) by_flag: bool,
}

pub(crate) const GROUPS: [Group; 4] = [
    Group {
        id: "evaluate",
        title: "Evaluating all flags for a context",
        about: "Parapet's time includes reading the context.",
        goal: Some(12.0),
        by_flag: true,
    },
    Group {
        id: "refresh",
        title: "From upstream's text to what serves requests",
        about: "Parapet parses, compiles, and writes the answers to frontends and to servers with their\n\
                entity tags, when nothing of it was known before; yggdrasil parses and compiles.",
        goal: Some(4.0),
        by_flag: true,
    },
    Group {
        id: "compile",
        title: "Parsing and compiling alone",
        about: "Of Parapet, too, only what yggdrasil has.",
        goal: None,
        by_flag: true,
    },
    Group {
        id: "operators",
        title: "One flag with one constraint or strategy",
        about: "Reading the context included; it matches all of them.",
        goal: None,
        by_flag: false,
    },
];

const INTRODUCTION: &str = "\
Parapet's engine beside yggdrasil, which evaluates in Unleash Edge and many SDKs, over the same flags\n\
in one process, each in its turn; medians of criterion's samples. Made by\n";

/// A benchmark, and how many nanoseconds once took with each engine.
struct Pair {
    id: String,
    parapet: f64,
    yggdrasil: f64,
}

impl Group {
    /// Its table, which is empty unless all of it was measured `since` then.
    fn table(&self, folder: &Path, ids: &[String], since: SystemTime) -> Result<Table> {
        let folder = folder.join(self.id);
        let pair = |id: &String| -> Result<Option<Pair>> {
            let of = |engine: &str| time(&folder.join(engine).join(id), since);
            let (parapet, yggdrasil) = (of("parapet")?, of("yggdrasil")?);
            let pair = |(parapet, yggdrasil)| Pair { id: id.clone(), parapet, yggdrasil };
            Ok(parapet.zip(yggdrasil).map(pair))
        };
        let pairs: Option<Vec<Pair>> = ids.iter().map(pair).collect::<Result<_>>()?;
        let (of, unit) = if self.by_flag { ("flags", ", ns a flag") } else { ("", ", ns") };
        let [parapet, yggdrasil] = ["Parapet", "yggdrasil"].map(|it| format!("{it}{unit}"));
        let mut head = vec![of, &parapet, &yggdrasil, "Parapet ÷ yggdrasil"];
        if self.goal.is_some() {
            head.extend(["goal", ""]);
        }
        let row = |pair: &Pair| {
            let flags: u64 = if self.by_flag { pair.id.parse()? } else { 1 };
            let nanos = |time: f64| {
                let each = time / to_f64(flags);
                if each < 100.0 { format!("{each:.1}") } else { thousands(each) }
            };
            let times = pair.yggdrasil / pair.parapet;
            let id = if self.by_flag { thousands(to_f64(flags)) } else { format!("`{}`", pair.id) };
            let mut row = vec![id, nanos(pair.parapet), nanos(pair.yggdrasil), one_of(times)];
            if let Some(goal) = self.goal {
                row.extend([format!("≤ 1/{goal:.0}"), verdict(times >= goal)]);
            }
            Ok(row)
        };
        Ok(Table::new(&head, pairs.iter().flatten().map(row).collect::<Result<_>>()?))
    }
}

/// `1/7.5`: how a small ratio is written that is compared with such a one.
fn one_of(times: f64) -> String {
    if times < 20.0 { format!("1/{times:.1}") } else { format!("1/{times:.0}") }
}

/// The median time in nanoseconds of the samples that criterion wrote into a benchmark's folder `since`
/// then.
fn time(folder: &Path, since: SystemTime) -> Result<Option<f64>> {
    /// Each took so many nanoseconds for so many iterations.
    #[derive(Deserialize)]
    struct Samples {
        iters: Vec<f64>,
        times: Vec<f64>,
    }
    let file = folder.join("new/sample.json");
    let written = fs::metadata(&file).and_then(|it| it.modified());
    if !written.is_ok_and(|it| it >= since) {
        return Ok(None);
    }
    let Samples { iters, times } = serde_json::from_slice(&fs::read(&file)?)?;
    Ok(Some(median(times.iter().zip(&iters).map(|(time, count)| time / count))))
}

/// The tables of what was measured `since` then, whose benchmarks have these ids, and whether that is
/// everything.
pub(crate) fn tables(
    folder: &Path,
    ids: impl Fn(&Group) -> Vec<String>,
    since: SystemTime,
) -> Result<(String, bool)> {
    let mut sections = Vec::new();
    for group in &GROUPS {
        let table = group.table(folder, &ids(group), since)?;
        if !table.is_empty() {
            sections.push(format!("## {}\n\n{}\n\n{}", group.title, group.about, table.text()));
        }
    }
    Ok((sections.join("\n"), sections.len() == GROUPS.len()))
}

/// Writes `engine.md`.
pub(crate) fn write(folder: &Path, machine: &str, tables: &str) -> Result<()> {
    let command = "cargo bench --bench engine";
    let text =
        format!("# Engine\n\n{INTRODUCTION}\n```sh\n{command}\n```\n\n{machine}\n\n{tables}");
    Ok(fs::write(folder.join("engine.md"), text)?)
}
