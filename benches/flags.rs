//! The flag set of all benchmarks: plausible flags, the same in every run and on every machine.
//!
//! A flag has no, one or two gradual rollouts, half of them with a constraint, and now and then
//! variants; 350 flags are about 175 kB. A smaller set is the beginning of a larger one. No crate's
//! generator is used, whose numbers may change with its version.

use std::fmt::Write as _;

/// With this one, 5 flags are 2,032 bytes, 350 are 173,421 and 5,000 are 2.4 MB.
const SEED: u64 = 9;

/// What Unleash answers at `/api/client/features` for so many flags.
pub(crate) fn document(size: usize) -> String {
    let mut chance = Chance(SEED);
    let features: Vec<String> = (0..size).map(|index| flag(index, &mut chance)).collect();
    format!(
        r#"{{"version":2,"features":[{}],"segments":[],"query":{{"environment":"development"}}}}"#,
        features.join(",")
    )
}

fn flag(index: usize, chance: &mut Chance) -> String {
    let strategies: Vec<String> =
        (0..*chance.choice(&[0, 1, 1, 2])).map(|_| strategy(index, chance)).collect();
    let enabled = chance.happens(80);
    let variants =
        if chance.happens(15) { ["a", "b"].map(variant).join(",") } else { String::new() };
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

fn strategy(index: usize, chance: &mut Chance) -> String {
    let mut constraints = Vec::new();
    if chance.happens(50) {
        let field = chance.choice(&["appName", "environment", "userId", "country", "plan"]);
        let values = 1 + chance.below(10);
        let mut list = String::new();
        for n in 0..values {
            let comma = if n > 0 { "," } else { "" };
            write!(list, r#"{comma}"v{}""#, chance.below(51)).expect("a string takes all");
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
    if chance.happens(10) {
        constraints.push(format!(
            concat!(
                r#"{{"contextName":"version","operator":"SEMVER_GT","value":"1.{}.0","#,
                r#""values":[],"inverted":false,"caseInsensitive":false}}"#,
            ),
            chance.below(10),
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
        rollout = chance.choice(&[0, 10, 50, 100, 100]),
        stickiness = chance.choice(&["default", "userId", "sessionId"]),
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

/// `SplitMix64`, a well-known generator.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `end`, exclusive; its bias is below what matters here.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn happens(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn choice<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.below(items.len() as u64);
        &items[usize::try_from(index).expect("an index of a slice")]
    }
}
