//! The sentences of an explanation. They are built from its data; nothing is evaluated here.

use std::fmt::Write as _;

use super::super::compile::Dependency;
use super::super::constraint::{Comparison, CompiledConstraint, Operator, TextPosition};
use super::super::explanation::{BucketAssignment, Constraint, Decision, Explanation, Strategy};

/// Maximum number of values that a sentence lists.
const MAX_LISTED_VALUES: usize = 8;

/// A name or a value in backquotes.
pub(super) fn quoted(text: &str) -> String {
    format!("`{text}`")
}

/// The phrase for membership in a list.
pub(super) fn membership(holds: bool) -> &'static str {
    if holds { "in the list" } else { "not in the list" }
}

/// The first of some texts, and the number of the others.
fn quoted_list(texts: &[String]) -> String {
    let first: Vec<String> =
        texts.iter().take(MAX_LISTED_VALUES).map(|text| quoted(text)).collect();
    match texts.len().saturating_sub(MAX_LISTED_VALUES) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// The outcome of a flag and the reason.
pub(super) fn summary(explanation: &Explanation) -> String {
    let reason = match explanation.decision {
        Decision::Unreadable => "its definition cannot be read".to_owned(),
        Decision::Switch => "it is switched off in this environment".to_owned(),
        Decision::Parent { index } => explanation.parents[index].why.clone(),
        Decision::Everybody => "it has no strategies, so it is on for everybody".to_owned(),
        Decision::Strategy { index } => {
            let Strategy { name, title, why, .. } = &explanation.strategies[index];
            let title = title.as_ref().unwrap_or(name);
            format!("strategy {} ({}) {why}", index + 1, quoted(title))
        }
        Decision::NoStrategy if explanation.strategies.is_empty() => {
            "it has no list of strategies that can be read".to_owned()
        }
        Decision::NoStrategy => "no strategy matches".to_owned(),
    };
    let verdict = match &explanation.variant {
        Some(variant) => format!("on with the variant {}", quoted(&variant.name)),
        None if explanation.enabled => "on".to_owned(),
        None => "off".to_owned(),
    };
    format!("{} is {verdict}: {reason}", quoted(&explanation.flag))
}

/// The required and the actual outcome of a parent.
pub(super) fn parent(dependency: &Dependency<'_>, parent: &Explanation, satisfied: bool) -> String {
    let state = match &parent.variant {
        Some(variant) => format!("on with the variant {}", quoted(&variant.name)),
        None if parent.enabled => "on without a variant".to_owned(),
        None => "off".to_owned(),
    };
    let names: Vec<String> = dependency.variants.iter().map(ToString::to_string).collect();
    let required = match (dependency.enabled, &names[..]) {
        (false, _) => "off".to_owned(),
        (true, []) => "on".to_owned(),
        (true, names) => format!("on with one of {}", quoted_list(names)),
    };
    let actual = if satisfied { "and is" } else { "but is" };
    format!("parent {} has to be {required} {actual} {state}", quoted(&parent.flag))
}

/// The words of an operator.
fn phrase(operator: Operator) -> &'static str {
    match operator {
        Operator::In => "is one of",
        Operator::NotIn => "is none of",
        Operator::Text(TextPosition::Start) => "starts with one of",
        Operator::Text(TextPosition::End) => "ends with one of",
        Operator::Text(TextPosition::Anywhere) => "contains one of",
        Operator::Number(Comparison::Equal) => "is the number",
        Operator::Number(Comparison::Greater) => "is a number greater than",
        Operator::Number(Comparison::GreaterOrEqual) => "is a number not less than",
        Operator::Number(Comparison::Less) => "is a number less than",
        Operator::Number(Comparison::LessOrEqual) => "is a number not greater than",
        Operator::Version(Comparison::Equal) => "is the version",
        Operator::Version(Comparison::Greater) => "is a version after",
        Operator::Version(Comparison::GreaterOrEqual) => "is a version not before",
        Operator::Version(Comparison::Less) => "is a version before",
        Operator::Version(Comparison::LessOrEqual) => "is a version not after",
        Operator::After => "is after",
        Operator::Before => "is before",
        Operator::Regex => "matches",
        Operator::InCidr => "is an address in one of",
    }
}

/// A constraint, the value in the context, and the result. An unknown operator is named as written.
pub(super) fn constraint(
    explained: &Constraint,
    operator: Option<Operator>,
    compiled: &CompiledConstraint,
    problem: Option<String>,
    is_generated: bool,
) -> String {
    let phrase = match operator {
        Some(operator) => phrase(operator),
        None => &explained.operator,
    };
    let subject = if operator.is_some_and(Operator::compares_time) {
        "the time".to_owned()
    } else {
        quoted(&explained.field)
    };
    let values = if explained.values.is_empty() {
        "nothing".to_owned()
    } else {
        quoted_list(&explained.values)
    };
    let mut text = format!("{subject} {phrase} {values}");
    if explained.case_insensitive {
        text.push_str(", ignoring case");
    }
    if explained.inverted {
        text = format!("not ({text})");
    }
    match &explained.context_value {
        Some(value) if is_generated => {
            let _ = write!(text, "; it is not given, so it is generated: {}", quoted(value));
        }
        Some(value) => {
            let _ = write!(text, "; it is {}", quoted(value));
        }
        None => text.push_str("; it is not given"),
    }
    let verdict = match (compiled, explained.holds) {
        (CompiledConstraint::Always, _) => "this always holds",
        (CompiledConstraint::Never, _) => "this never holds",
        (CompiledConstraint::Test(_), true) => "this holds",
        (CompiledConstraint::Test(_), false) => "this does not hold",
    };
    match problem {
        Some(problem) if explained.operator.is_empty() => problem,
        Some(problem) => format!("{text}; {verdict}: {problem}"),
        None => format!("{text}; {verdict}"),
    }
}

/// The bucket of the context, and how it is computed.
pub(super) fn bucket_assignment(placement: &BucketAssignment) -> String {
    let BucketAssignment { stickiness, field, value, drawn, group, bucket, buckets } = placement;
    match (bucket, field, value) {
        (None, ..) => {
            format!("the context lacks {}, which determines the bucket", quoted(stickiness))
        }
        (Some(bucket), Some(field), Some(value)) => {
            let group = group.as_deref().unwrap_or_default();
            let generated = if *drawn { ", generated for one request," } else { "" };
            format!(
                "{} {}{generated} of group {} is in bucket {bucket} of {buckets}",
                quoted(field),
                quoted(value),
                quoted(group)
            )
        }
        (Some(bucket), ..) => format!("the random draw is bucket {bucket} of {buckets}"),
    }
}

/// The bucket of the context, and whether it is within the rollout.
pub(super) fn rollout(of: &BucketAssignment, percent: u32, holds: bool) -> String {
    let bucket = bucket_assignment(of);
    let relation = match (of.bucket, holds) {
        (None, _) => return bucket,
        (Some(_), true) => "within",
        (Some(_), false) => "beyond",
    };
    format!("{bucket}, {relation} the rollout's {percent} %")
}
