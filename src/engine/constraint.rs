//! Constraints: conditions on one context field.
//!
//! A constraint with an unknown operator or an invalid operand is never satisfied, inverted or not: a
//! mistake in a definition must not turn a flag on for all users. A field that is missing or invalid in
//! the context makes the comparison false, which `inverted` then negates, as in the Node SDK.

use std::cmp::Ordering;

use ipnet::IpNet;
use jiff::Timestamp;
use regex::Regex;
use semver::Version;

use super::context::{BoundContext, ContextSchema, FieldId, ParsedSlot, StringSet};
use super::date;
use super::inputs::EvaluationInputs;
use super::parse;
use super::problem::{Defect, DefinitionPart};
use super::re2;
use crate::protocol::features as wire;
use crate::protocol::lenient::Lenient;

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
    Version { field: FieldId, slot: ParsedSlot, order: Comparison, than: Box<Version> },
    Address { field: FieldId, slot: ParsedSlot, ranges: Box<[IpNet]> },
    Text { field: FieldId, place: TextPosition, case: CaseSensitivity, needles: Box<[Box<str>]> },
    Regex { field: FieldId, regex: Box<Regex> },
}

/// An operator of a constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    In,
    NotIn,
    Text(TextPosition),
    Number(Comparison),
    Version(Comparison),
    /// Compares the time and ignores the constraint's field, as in the Node SDK.
    After,
    /// Like [`After`](Self::After).
    Before,
    Regex,
    InCidr,
}

/// The required order of a value relative to the operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

/// The required position of a text in a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TextPosition {
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
        let compiled = ParsedConstraint::parse(source)
            .and_then(|constraint| Ok((constraint.compile(schema, defects)?, constraint.inverted)));
        match compiled {
            Ok((Some(test), inverted)) => CompiledConstraint::Test(Self { test, inverted }),
            Ok((None, true)) => CompiledConstraint::Always,
            Ok((None, false)) => CompiledConstraint::Never,
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
                order.accepts(bound.version(*slot).map(|version| version.cmp_precedence(than)))
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

impl Operator {
    /// Every operator, with its name in definitions.
    pub(super) const NAMES: [(&'static str, Self); 19] = [
        ("IN", Self::In),
        ("NOT_IN", Self::NotIn),
        ("STR_STARTS_WITH", Self::Text(TextPosition::Start)),
        ("STR_ENDS_WITH", Self::Text(TextPosition::End)),
        ("STR_CONTAINS", Self::Text(TextPosition::Anywhere)),
        ("NUM_EQ", Self::Number(Comparison::Equal)),
        ("NUM_GT", Self::Number(Comparison::Greater)),
        ("NUM_GTE", Self::Number(Comparison::GreaterOrEqual)),
        ("NUM_LT", Self::Number(Comparison::Less)),
        ("NUM_LTE", Self::Number(Comparison::LessOrEqual)),
        ("SEMVER_EQ", Self::Version(Comparison::Equal)),
        ("SEMVER_GT", Self::Version(Comparison::Greater)),
        ("SEMVER_GTE", Self::Version(Comparison::GreaterOrEqual)),
        ("SEMVER_LT", Self::Version(Comparison::Less)),
        ("SEMVER_LTE", Self::Version(Comparison::LessOrEqual)),
        ("DATE_AFTER", Self::After),
        ("DATE_BEFORE", Self::Before),
        ("REGEX", Self::Regex),
        ("IN_CIDR", Self::InCidr),
    ];

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|it| it.0 == name).map(|it| it.1)
    }

    fn name(self) -> &'static str {
        let entry = Self::NAMES.iter().find(|it| it.1 == self);
        entry.expect("every operator has a name").0
    }

    /// Whether it compares with a list of values instead of a single one.
    pub(super) fn compares_with_list(self) -> bool {
        matches!(self, Self::In | Self::NotIn | Self::Text(_) | Self::InCidr)
    }

    /// Whether it compares the time, whichever field the constraint names.
    pub(super) fn compares_time(self) -> bool {
        matches!(self, Self::After | Self::Before)
    }
}

/// A well-formed constraint.
struct ParsedConstraint<'a> {
    field: &'a str,
    operator: Operator,
    value: Option<&'a str>,
    /// Trimmed and without empty ones, as in the Node SDK.
    values: Vec<&'a str>,
    inverted: bool,
    case: CaseSensitivity,
}

impl<'a> ParsedConstraint<'a> {
    fn parse(source: &'a Lenient<wire::Constraint<'_>>) -> Result<Self, Defect> {
        let malformed = || Defect::Malformed(DefinitionPart::Constraint);
        let Lenient::Valid(source) = source else { return Err(malformed()) };
        let (Lenient::Valid(field), Lenient::Valid(name)) =
            (&source.context_name, &source.operator)
        else {
            return Err(malformed());
        };
        let value = match &source.value {
            Lenient::Valid(value) => Some(&**value),
            Lenient::Missing => None,
            Lenient::Malformed => return Err(malformed()),
        };
        let mut values = Vec::new();
        match &source.values {
            Lenient::Valid(list) => {
                for item in list {
                    match item {
                        Lenient::Valid(text) if !text.is_empty() => values.push(text.trim()),
                        Lenient::Valid(_) | Lenient::Missing => {}
                        Lenient::Malformed => return Err(malformed()),
                    }
                }
            }
            Lenient::Missing => {}
            Lenient::Malformed => return Err(malformed()),
        }
        let ignored = source.case_insensitive.or_default().ok_or_else(malformed)?;
        let case = if ignored { CaseSensitivity::Insensitive } else { CaseSensitivity::Sensitive };
        let inverted = source.inverted.or_default().ok_or_else(malformed)?;
        let operator =
            Operator::parse(name).ok_or_else(|| Defect::UnknownOperator(name.to_string()))?;
        // An inverted `IN`: it holds as well if the field is missing or the list is empty.
        let inverted = inverted != (operator == Operator::NotIn);
        Ok(Self { field, operator, value, values, inverted, case })
    }

    /// The test before inversion; `None` if it fails for every context.
    fn compile(
        &self,
        schema: &mut ContextSchema,
        defects: &mut Vec<Defect>,
    ) -> Result<Option<Test>, Defect> {
        Ok(match self.operator {
            Operator::In | Operator::NotIn => self.compile_membership_test(schema),
            Operator::Text(position) => self.compile_text_test(schema, position),
            Operator::Number(order) => Some(self.compile_number_test(schema, order)?),
            Operator::Version(order) => Some(self.compile_version_test(schema, order)?),
            Operator::After => Some(Test::After(self.parse_operand(date::parse)?)),
            Operator::Before => Some(Test::Before(self.parse_operand(date::parse)?)),
            Operator::Regex => Some(self.compile_regex_test(schema)?),
            Operator::InCidr => self.compile_address_test(schema, defects),
        })
    }

    fn compile_membership_test(&self, schema: &mut ContextSchema) -> Option<Test> {
        let set = StringSet::new(schema, self.values.iter().copied());
        (!set.is_empty()).then(|| Test::In { field: schema.intern_field(self.field), set })
    }

    fn compile_text_test(&self, schema: &mut ContextSchema, place: TextPosition) -> Option<Test> {
        let needle = |value: &&str| match self.case {
            CaseSensitivity::Sensitive => Box::from(*value),
            CaseSensitivity::Insensitive => value.to_lowercase().into_boxed_str(),
        };
        let needles: Box<[Box<str>]> = self.values.iter().map(needle).collect();
        let field = schema.intern_field(self.field);
        (!needles.is_empty()).then_some(Test::Text { field, place, case: self.case, needles })
    }

    fn compile_number_test(
        &self,
        schema: &mut ContextSchema,
        order: Comparison,
    ) -> Result<Test, Defect> {
        let than = self.parse_operand(parse::number)?;
        let field = schema.intern_field(self.field);
        Ok(Test::Number { field, slot: schema.number_slot(field), order, than })
    }

    fn compile_version_test(
        &self,
        schema: &mut ContextSchema,
        order: Comparison,
    ) -> Result<Test, Defect> {
        let than = self.parse_operand(parse::version)?;
        let field = schema.intern_field(self.field);
        Ok(Test::Version { field, slot: schema.version_slot(field), order, than: Box::new(than) })
    }

    fn compile_regex_test(&self, schema: &mut ContextSchema) -> Result<Test, Defect> {
        let ignores_case = self.case == CaseSensitivity::Insensitive;
        let regex = self.parse_operand(|value| re2::compile(value, ignores_case))?;
        Ok(Test::Regex { field: schema.intern_field(self.field), regex: Box::new(regex) })
    }

    /// Invalid ranges are reported and left out, as the specification requires.
    fn compile_address_test(
        &self,
        schema: &mut ContextSchema,
        defects: &mut Vec<Defect>,
    ) -> Option<Test> {
        let mut ranges = Vec::with_capacity(self.values.len());
        for &value in &self.values {
            match parse::network(value) {
                Some(range) => ranges.push(range),
                None => defects.push(self.invalid_operand(value)),
            }
        }
        let field = schema.intern_field(self.field);
        let slot = schema.address_slot(field);
        (!ranges.is_empty()).then(|| Test::Address { field, slot, ranges: ranges.into() })
    }

    fn parse_operand<T>(&self, parse: impl FnOnce(&'a str) -> Option<T>) -> Result<T, Defect> {
        let parsed = self.value.and_then(parse);
        parsed.ok_or_else(|| self.invalid_operand(self.value.unwrap_or_default()))
    }

    fn invalid_operand(&self, operand: &str) -> Defect {
        Defect::InvalidOperand { operator: self.operator.name(), operand: operand.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_describes_exactly_the_operators_of_the_engine() {
        let console = include_str!("../http/console/descriptions.js");
        let (_, table) = console.split_once("const OPERATORS = {").unwrap();
        let (table, _) = table.split_once("};").unwrap();
        let rows = table.lines().filter_map(|line| line.trim().split_once(": ["));
        let mut described: Vec<_> = rows.map(|(name, _)| name).collect();
        let mut known = Operator::NAMES.map(|(name, _)| name);
        described.sort_unstable();
        known.sort_unstable();
        assert_eq!(described, known);
    }
}
