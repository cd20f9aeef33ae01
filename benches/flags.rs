//! The flag set of all benchmarks: plausible flags, the same in every run and on every machine.
//!
//! A flag has zero to two gradual rollouts, half of them with a constraint, and sometimes variants; 350
//! flags are about 175 kB. A smaller set is a prefix of a larger one. It uses no crate's random
//! generator, whose numbers may change between versions.

use std::fmt::Write as _;

/// With this seed 5 flags are 2,032 bytes, 350 are 173,421 and 5,000 are 2.4 MB.
const SEED: u64 = 9;

/// Unleash's response at `/api/client/features` with this number of flags.
pub(crate) fn document(size: usize) -> String {
    let mut random = SplitMix64(SEED);
    let features: Vec<String> = (0..size).map(|index| flag(index, &mut random)).collect();
    format!(
        r#"{{"version":2,"features":[{}],"segments":[],"query":{{"environment":"development"}}}}"#,
        features.join(",")
    )
}

fn flag(index: usize, random: &mut SplitMix64) -> String {
    let strategies: Vec<String> =
        (0..*random.choice(&[0, 1, 1, 2])).map(|_| strategy(index, random)).collect();
    let enabled = random.has_chance(80);
    let variants =
        if random.has_chance(15) { ["a", "b"].map(variant).join(",") } else { String::new() };
    format!(
        concat!(
            r#"{{"name":"team{team}.feature-{index:04}","type":"release","enabled":{enabled},"#,
            r#""project":"{project}","stale":false,"strategies":[{strategies}],"#,
            r#""variants":[{variants}],"description":"Some description of feature {index} "#,
            r#"which is moderately long","impressionData":false,"dependencies":[]}}"#,
        ),
        team = index % 7,
        index = index,
        enabled = enabled,
        variants = variants,
        project = ["default", "web", "mobile"][index % 3],
        strategies = strategies.join(","),
    )
}

fn strategy(index: usize, random: &mut SplitMix64) -> String {
    let mut constraints = Vec::new();
    if random.has_chance(50) {
        let field = random.choice(&["appName", "environment", "userId", "country", "plan"]);
        let values = 1 + random.below(10);
        let mut list = String::new();
        for n in 0..values {
            let comma = if n > 0 { "," } else { "" };
            write!(list, r#"{comma}"v{}""#, random.below(51)).expect("a string takes all");
        }
        constraints.push(format!(
            concat!(
                r#"{{"contextName":"{field}","operator":"IN","values":[{list}],"#,
                r#""inverted":false,"caseInsensitive":false}}"#,
            ),
            field = field,
            list = list,
        ));
    }
    if random.has_chance(10) {
        constraints.push(format!(
            concat!(
                r#"{{"contextName":"version","operator":"SEMVER_GT","value":"1.{}.0","#,
                r#""values":[],"inverted":false,"caseInsensitive":false}}"#,
            ),
            random.below(10),
        ));
    }
    format!(
        concat!(
            r#"{{"name":"flexibleRollout","constraints":[{constraints}],"parameters":"#,
            r#"{{"groupId":"feature-{index}","rollout":"{rollout}","#,
            r#""stickiness":"{stickiness}"}},"variants":[]}}"#,
        ),
        constraints = constraints.join(","),
        index = index,
        rollout = random.choice(&[0, 10, 50, 100, 100]),
        stickiness = random.choice(&["default", "userId", "sessionId"]),
    )
}

fn variant(name: &str) -> String {
    format!(
        concat!(
            r#"{{"name":"{name}","weight":500,"payload":{{"type":"string","value":"val-{name}"}},"#,
            r#""overrides":[],"stickiness":"default","weightType":"variable"}}"#,
        ),
        name = name,
    )
}

/// A well-known pseudo-random generator.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `end`, exclusive; its bias is irrelevant here.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn has_chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn choice<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.below(items.len() as u64);
        &items[usize::try_from(index).expect("an index of a slice")]
    }
}
