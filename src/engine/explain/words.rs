//! An explanation in words, for people. What it is and how it came about is not known here.

use std::fmt::Write as _;

use super::super::compile::Dependency;
use super::super::constraint::{self, Compiled};
use super::super::explanation::{Constraint, Decision, Explanation, Placement, Strategy};

/// How many of a list of values a sentence names.
const NAMED: usize = 8;

/// A name or a value, told apart from the sentence.
pub(super) fn quoted(text: &str) -> String {
    format!("`{text}`")
}

/// Whether a value is among those that are listed.
pub(super) fn in_list(holds: bool) -> &'static str {
    if holds { "in the list" } else { "not in the list" }
}

/// The first of some texts, and how many more there are.
fn listed(texts: &[String]) -> String {
    let named: Vec<String> = texts.iter().take(NAMED).map(|text| quoted(text)).collect();
    match texts.len().saturating_sub(NAMED) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// What a flag comes to, and what decided it.
pub(super) fn summary(told: &Explanation) -> String {
    let because = match told.decision {
        Decision::Unreadable => "its definition cannot be read".to_owned(),
        Decision::Switch => "it is switched off in this environment".to_owned(),
        Decision::Parent { index } => told.parents[index].why.clone(),
        Decision::Everybody => "it has no strategies, so it is on for everybody".to_owned(),
        Decision::Strategy { index } => {
            let Strategy { name, title, why, .. } = &told.strategies[index];
            let called = title.as_ref().unwrap_or(name);
            format!("strategy {} ({}) {why}", index + 1, quoted(called))
        }
        Decision::NoStrategy if told.strategies.is_empty() => {
            "it has no list of strategies that can be read".to_owned()
        }
        Decision::NoStrategy => "no strategy matches".to_owned(),
    };
    let verdict = match &told.variant {
        Some(variant) => format!("on with the variant {}", quoted(&variant.name)),
        None if told.enabled => "on".to_owned(),
        None => "off".to_owned(),
    };
    format!("{} is {verdict}: {because}", quoted(&told.flag))
}

/// What is asked of a parent, and what it is.
pub(super) fn parent(dependency: &Dependency<'_>, parent: &Explanation, satisfied: bool) -> String {
    let state = match &parent.variant {
        Some(variant) => format!("on with the variant {}", quoted(&variant.name)),
        None if parent.enabled => "on without a variant".to_owned(),
        None => "off".to_owned(),
    };
    let names: Vec<String> = dependency.variants.iter().map(ToString::to_string).collect();
    let wanted = match (dependency.enabled, &names[..]) {
        (false, _) => "off".to_owned(),
        (true, []) => "on".to_owned(),
        (true, names) => format!("on with one of {}", listed(names)),
    };
    let so = if satisfied { "and is" } else { "but is" };
    format!("parent {} has to be {wanted} {so} {state}", quoted(&parent.flag))
}

/// What a constraint asks, of what, and whether it holds.
pub(super) fn constraint(
    told: &Constraint,
    compiled: &Compiled,
    problem: Option<String>,
    is_made_up: bool,
) -> String {
    let phrase = match told.operator.as_str() {
        "IN" => "is one of",
        "NOT_IN" => "is none of",
        "STR_STARTS_WITH" => "starts with one of",
        "STR_ENDS_WITH" => "ends with one of",
        "STR_CONTAINS" => "contains one of",
        "NUM_EQ" => "is the number",
        "NUM_GT" => "is a number greater than",
        "NUM_GTE" => "is a number not less than",
        "NUM_LT" => "is a number less than",
        "NUM_LTE" => "is a number not greater than",
        "SEMVER_EQ" => "is the version",
        "SEMVER_GT" => "is a version after",
        "SEMVER_GTE" => "is a version not before",
        "SEMVER_LT" => "is a version before",
        "SEMVER_LTE" => "is a version not after",
        "DATE_AFTER" => "is after",
        "DATE_BEFORE" => "is before",
        "REGEX" => "matches",
        "IN_CIDR" => "is an address in one of",
        other => other,
    };
    let subject = if constraint::is_of_time(&told.operator) {
        "the time".to_owned()
    } else {
        quoted(&told.field)
    };
    let values = if told.values.is_empty() { "nothing".to_owned() } else { listed(&told.values) };
    let mut words = format!("{subject} {phrase} {values}");
    if told.case_insensitive {
        words.push_str(", ignoring case");
    }
    if told.inverted {
        words = format!("not ({words})");
    }
    match &told.context_value {
        Some(value) if is_made_up => {
            let _ = write!(words, "; it is not given, and made up here: {}", quoted(value));
        }
        Some(value) => {
            let _ = write!(words, "; it is {}", quoted(value));
        }
        None => words.push_str("; it is not given"),
    }
    let verdict = match (compiled, told.holds) {
        (Compiled::Always, _) => "this always holds",
        (Compiled::Never, _) => "this never holds",
        (Compiled::Test(_), true) => "this holds",
        (Compiled::Test(_), false) => "this does not hold",
    };
    match problem {
        Some(problem) if told.operator.is_empty() => problem,
        Some(problem) => format!("{words}; {verdict}: {problem}"),
        None => format!("{words}; {verdict}"),
    }
}

/// Where the context falls among buckets, and by what.
pub(super) fn placement(placement: &Placement) -> String {
    let Placement { stickiness, field, value, drawn, group, bucket, buckets } = placement;
    match (bucket, field, value) {
        (None, ..) => format!("the context lacks {}, which it takes", quoted(stickiness)),
        (Some(bucket), Some(field), Some(value)) => {
            let group = group.as_deref().unwrap_or_default();
            let made_up = if *drawn { ", made up for one request," } else { "" };
            format!(
                "{} {}{made_up} of group {} is in bucket {bucket} of {buckets}",
                quoted(field),
                quoted(value),
                quoted(group)
            )
        }
        (Some(bucket), ..) => format!("the lot drawn is bucket {bucket} of {buckets}"),
    }
}

/// The same, and whether that is within a rollout.
pub(super) fn share(of: &Placement, percent: u32, holds: bool) -> String {
    let place = placement(of);
    let share = match (of.bucket, holds) {
        (None, _) => return place,
        (Some(_), true) => "within",
        (Some(_), false) => "beyond",
    };
    format!("{place}, {share} the rollout's {percent} %")
}
