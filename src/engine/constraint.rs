//! Constraints: conditions on one context field.
//!
//! A constraint with an unknown operator or an invalid operand is never satisfied, inverted or not: a
//! mistake in a definition must not turn a flag on for all users. A field that is missing or invalid in
//! the context makes the comparison false, which `inverted` then negates, as in the Node SDK.

use std::cmp::Ordering;

use ipnet::IpNet;
use jiff::Timestamp;
use regex::Regex;

use super::context::{BoundContext, ContextSchema, FieldId, ParsedSlot, StringSet};
use super::date;
use super::inputs::EvaluationInputs;
use super::parse::{self, Version};
use super::problem::{Defect, DefinitionPart};
use super::re2;
use crate::protocol::features::{self as wire, Lenient};

/// A compiled constraint.
#[derive(Debug)]
pub(super) enum CompiledConstraint {
    /// Satisfied by every context.
    Always,
    /// Satisfied by no context.
    Never,
    /// Depends on the context.
    Test(Constraint),
}

/// A test of one field, negated if `inverted`.
#[derive(Debug, Clone)]
pub(super) struct Constraint {
    test: Test,
    inverted: bool,
}

#[derive(Debug, Clone)]
enum Test {
    In { field: FieldId, set: StringSet },
    Number { field: FieldId, slot: ParsedSlot, order: Comparison, than: f64 },
    After(Timestamp),
    Before(Timestamp),
    Version { field: FieldId, slot: ParsedSlot, order: Comparison, than: Box<Version<Box<str>>> },
    Address { field: FieldId, slot: ParsedSlot, ranges: Box<[IpNet]> },
    Text { field: FieldId, place: TextPosition, case: CaseSensitivity, needles: Box<[Box<str>]> },
    Regex { field: FieldId, regex: Box<Regex> },
}

/// The required order of a value relative to the operand.
#[derive(Debug, Clone, Copy)]
enum Comparison {
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

/// The required position of a text in a value.
#[derive(Debug, Clone, Copy)]
enum TextPosition {
    Start,
    End,
    Anywhere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CaseSensitivity {
    Sensitive,
    /// The operands are in lower case.
    Insensitive,
}

impl Constraint {
    /// Compiles a constraint and adds its defects to `defects`.
    pub(super) fn compile(
        source: &Lenient<wire::Constraint<'_>>,
        schema: &mut ContextSchema,
        defects: &mut Vec<Defect>,
    ) -> CompiledConstraint {
        let constraint = match source {
            Lenient::Valid(source) => ParsedConstraint::parse(source),
            Lenient::Missing | Lenient::Malformed => None,
        };
        let Some(constraint) = constraint else {
            defects.push(Defect::Malformed(DefinitionPart::Constraint));
            return CompiledConstraint::Never;
        };
        match constraint.compile(schema, defects) {
            Ok(Some(test)) => {
                CompiledConstraint::Test(Self { test, inverted: constraint.inverted })
            }
            Ok(None) if constraint.inverted => CompiledConstraint::Always,
            Ok(None) => CompiledConstraint::Never,
            Err(defect) => {
                defects.push(defect);
                CompiledConstraint::Never
            }
        }
    }

    /// Whether the context satisfies the constraint.
    pub(super) fn is_satisfied(&self, bound: &BoundContext<'_>) -> bool {
        self.test.is_satisfied(bound) != self.inverted
    }

    /// A rank of the cost of the test. Cheap tests run first.
    pub(super) fn cost(&self) -> u8 {
        match &self.test {
            Test::In { .. } | Test::Number { .. } | Test::After(_) | Test::Before(_) => 0,
            Test::Version { .. } | Test::Address { .. } => 1,
            Test::Text { case: CaseSensitivity::Sensitive, .. } => 2,
            Test::Text { case: CaseSensitivity::Insensitive, .. } => 3,
            Test::Regex { .. } => 4,
        }
    }

    /// Adds everything that the constraint depends on to `inputs`.
    pub(super) fn collect_inputs(&self, inputs: &mut EvaluationInputs) {
        match self.test {
            Test::In { field, .. } => inputs.add_membership(field),
            Test::Number { field, .. }
            | Test::Version { field, .. }
            | Test::Address { field, .. }
            | Test::Text { field, .. }
            | Test::Regex { field, .. } => inputs.add_text(field),
            Test::After(date) => {
                // The date itself is not after the date, the next nanosecond is.
                let next = Timestamp::from_nanosecond(date.as_nanosecond() + 1);
                inputs.add_time_boundary(next.unwrap_or(Timestamp::MAX));
            }
            Test::Before(date) => inputs.add_time_boundary(date),
        }
    }
}

impl Test {
    fn is_satisfied(&self, bound: &BoundContext<'_>) -> bool {
        match self {
            Self::In { field, set } => set.contains(bound.interned(*field)),
            Self::Number { slot, order, than, .. } => {
                order.accepts(bound.number(*slot).partial_cmp(than))
            }
            Self::After(date) => bound.evaluation_time().is_some_and(|time| time > *date),
            Self::Before(date) => bound.evaluation_time().is_some_and(|time| time < *date),
            Self::Version { slot, order, than, .. } => {
                order.accepts(bound.version(*slot).map(|version| version.compare(than)))
            }
            Self::Address { slot, ranges, .. } => bound
                .address(*slot)
                .is_some_and(|address| ranges.iter().any(|range| range.contains(&address))),
            Self::Text { field, place, case, needles } => {
                bound.text(*field).is_some_and(|text| place.matches_any(needles, text, *case))
            }
            Self::Regex { field, regex } => {
                bound.text(*field).is_some_and(|text| regex.is_match(text))
            }
        }
    }
}

impl Comparison {
    fn accepts(self, order: Option<Ordering>) -> bool {
        order.is_some_and(|order| match self {
            Self::Equal => order.is_eq(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
        })
    }
}

impl TextPosition {
    fn matches_any(self, needles: &[Box<str>], text: &str, case: CaseSensitivity) -> bool {
        match case {
            CaseSensitivity::Sensitive => needles.iter().any(|needle| match self {
                Self::Start => text.starts_with(&**needle),
                Self::End => text.ends_with(&**needle),
                Self::Anywhere => text.contains(&**needle),
            }),
            CaseSensitivity::Insensitive if text.is_ascii() => {
                needles.iter().any(|needle| self.matches_ascii(needle.as_bytes(), text.as_bytes()))
            }
            // Beyond ASCII lower case can change lengths, so this rare case copies the text.
            CaseSensitivity::Insensitive => {
                self.matches_any(needles, &text.to_lowercase(), CaseSensitivity::Sensitive)
            }
        }
    }

    /// Compares without copying. `text` is ASCII, so a `needle` beyond ASCII never matches.
    fn matches_ascii(self, needle: &[u8], text: &[u8]) -> bool {
        let Some(last_start) = text.len().checked_sub(needle.len()) else {
            return false;
        };
        let at = |start: usize| text[start..start + needle.len()].eq_ignore_ascii_case(needle);
        match self {
            Self::Start => at(0),
            Self::End => at(last_start),
            Self::Anywhere => (0..=last_start).any(at),
        }
    }
}

/// Whether an operator compares with a list of values instead of a single one.
pub(super) fn is_list_operator(operator: &str) -> bool {
    matches!(operator, "IN" | "NOT_IN" | "IN_CIDR") || operator.starts_with("STR_")
}

/// Whether an operator compares the time. It ignores the constraint's field.
pub(super) fn is_time_operator(operator: &str) -> bool {
    matches!(operator, "DATE_AFTER" | "DATE_BEFORE")
}

/// A well-formed constraint.
struct ParsedConstraint<'a> {
    field: &'a str,
    operator: &'a str,
    value: Option<&'a str>,
    /// Trimmed and without empty ones, as in the Node SDK.
    values: Vec<&'a str>,
    inverted: bool,
    case: CaseSensitivity,
}

impl<'a> ParsedConstraint<'a> {
    fn parse(source: &'a wire::Constraint<'_>) -> Option<Self> {
        let (Lenient::Valid(field), Lenient::Valid(operator)) =
            (&source.context_name, &source.operator)
        else {
            return None;
        };
        let value = match &source.value {
            Lenient::Valid(value) => Some(&**value),
            Lenient::Missing => None,
            Lenient::Malformed => return None,
        };
        let mut values = Vec::new();
        match &source.values {
            Lenient::Valid(list) => {
                for item in list {
                    match item {
                        Lenient::Valid(text) if !text.is_empty() => values.push(text.trim()),
                        Lenient::Valid(_) | Lenient::Missing => {}
                        Lenient::Malformed => return None,
                    }
                }
            }
            Lenient::Missing => {}
            Lenient::Malformed => return None,
        }
        let ignored = source.case_insensitive.or_default()?;
        let case = if ignored { CaseSensitivity::Insensitive } else { CaseSensitivity::Sensitive };
        let inverted = source.inverted.or_default()?;
        let (operator, inverted) = match &**operator {
            // Holds as well if the field is missing or the list is empty.
            "NOT_IN" => ("IN", !inverted),
            operator => (operator, inverted),
        };
        Some(Self { field, operator, value, values, inverted, case })
    }

    /// The test before inversion; `None` if it fails for every context.
    fn compile(
        &self,
        schema: &mut ContextSchema,
        defects: &mut Vec<Defect>,
    ) -> Result<Option<Test>, Defect> {
        match self.operator {
            "IN" => Ok(self.membership_test(schema)),
            "STR_STARTS_WITH" => Ok(self.text_test(schema, TextPosition::Start)),
            "STR_ENDS_WITH" => Ok(self.text_test(schema, TextPosition::End)),
            "STR_CONTAINS" => Ok(self.text_test(schema, TextPosition::Anywhere)),
            "NUM_EQ" => self.number_test(schema, "NUM_EQ", Comparison::Equal).map(Some),
            "NUM_GT" => self.number_test(schema, "NUM_GT", Comparison::Greater).map(Some),
            "NUM_GTE" => self.number_test(schema, "NUM_GTE", Comparison::GreaterOrEqual).map(Some),
            "NUM_LT" => self.number_test(schema, "NUM_LT", Comparison::Less).map(Some),
            "NUM_LTE" => self.number_test(schema, "NUM_LTE", Comparison::LessOrEqual).map(Some),
            "SEMVER_EQ" => self.version_test(schema, "SEMVER_EQ", Comparison::Equal).map(Some),
            "SEMVER_GT" => self.version_test(schema, "SEMVER_GT", Comparison::Greater).map(Some),
            "SEMVER_GTE" => {
                self.version_test(schema, "SEMVER_GTE", Comparison::GreaterOrEqual).map(Some)
            }
            "SEMVER_LT" => self.version_test(schema, "SEMVER_LT", Comparison::Less).map(Some),
            "SEMVER_LTE" => {
                self.version_test(schema, "SEMVER_LTE", Comparison::LessOrEqual).map(Some)
            }
            "DATE_AFTER" => self.date_operand("DATE_AFTER").map(|date| Some(Test::After(date))),
            "DATE_BEFORE" => self.date_operand("DATE_BEFORE").map(|date| Some(Test::Before(date))),
            "REGEX" => self.regex_test(schema).map(Some),
            "IN_CIDR" => Ok(self.address_test(schema, defects)),
            unknown => Err(Defect::UnknownOperator(unknown.to_owned())),
        }
    }

    fn membership_test(&self, schema: &mut ContextSchema) -> Option<Test> {
        let set = StringSet::new(schema, self.values.iter().copied());
        (!set.is_empty()).then(|| Test::In { field: schema.intern_field(self.field), set })
    }

    fn text_test(&self, schema: &mut ContextSchema, place: TextPosition) -> Option<Test> {
        let needle = |value: &&str| match self.case {
            CaseSensitivity::Sensitive => Box::from(*value),
            CaseSensitivity::Insensitive => value.to_lowercase().into_boxed_str(),
        };
        let needles: Box<[Box<str>]> = self.values.iter().map(needle).collect();
        let field = schema.intern_field(self.field);
        (!needles.is_empty()).then_some(Test::Text { field, place, case: self.case, needles })
    }

    fn number_test(
        &self,
        schema: &mut ContextSchema,
        operator: &'static str,
        order: Comparison,
    ) -> Result<Test, Defect> {
        let than = self.parse_operand(operator, parse::number)?;
        let field = schema.intern_field(self.field);
        Ok(Test::Number { field, slot: schema.number_slot(field), order, than })
    }

    fn version_test(
        &self,
        schema: &mut ContextSchema,
        operator: &'static str,
        order: Comparison,
    ) -> Result<Test, Defect> {
        let than = self.parse_operand(operator, Version::parse)?.into_owned();
        let field = schema.intern_field(self.field);
        Ok(Test::Version { field, slot: schema.version_slot(field), order, than: Box::new(than) })
    }

    /// The operand of a date operator, which compares with the current time and ignores the field, as in
    /// the Node SDK.
    fn date_operand(&self, operator: &'static str) -> Result<Timestamp, Defect> {
        self.parse_operand(operator, date::parse)
    }

    fn regex_test(&self, schema: &mut ContextSchema) -> Result<Test, Defect> {
        let regex = self.parse_operand("REGEX", |value| {
            re2::compile(value, self.case == CaseSensitivity::Insensitive)
        })?;
        Ok(Test::Regex { field: schema.intern_field(self.field), regex: Box::new(regex) })
    }

    /// Invalid ranges are reported and left out, as the specification requires.
    fn address_test(&self, schema: &mut ContextSchema, defects: &mut Vec<Defect>) -> Option<Test> {
        let mut ranges = Vec::with_capacity(self.values.len());
        for &value in &self.values {
            match parse::network(value) {
                Some(range) => ranges.push(range),
                None => {
                    defects.push(Defect::InvalidOperand {
                        operator: "IN_CIDR",
                        operand: value.to_owned(),
                    });
                }
            }
        }
        let field = schema.intern_field(self.field);
        let slot = schema.address_slot(field);
        (!ranges.is_empty()).then(|| Test::Address { field, slot, ranges: ranges.into() })
    }

    fn parse_operand<T>(
        &self,
        operator: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<T, Defect> {
        self.value.and_then(parse).ok_or_else(|| Defect::InvalidOperand {
            operator,
            operand: self.value.unwrap_or_default().to_owned(),
        })
    }
}
