//! Constraints: conditions on one context field.
//!
//! A constraint with an unknown operator or an invalid operand is never satisfied, inverted or not: a
//! mistake in a definition must not turn a flag on for all users. A field that is missing or invalid in
//! the context makes the comparison false, which `inverted` then negates, as in the Node SDK.

use std::cmp::Ordering;

use ipnet::IpNet;
use jiff::Timestamp;
use regex::Regex;

use super::context::{Bound, FieldId, Fields, Set, Slot};
use super::date;
use super::pattern;
use super::problem::{Defect, Part};
use super::reads::Reads;
use super::scalar::{self, Version};
use crate::wire::features::{self as wire, Loose};

/// A compiled constraint.
#[derive(Debug)]
pub(super) enum Compiled {
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
    In { field: FieldId, set: Set },
    Number { field: FieldId, slot: Slot, order: Order, than: f64 },
    After(Timestamp),
    Before(Timestamp),
    Version { field: FieldId, slot: Slot, order: Order, than: Box<Version<Box<str>>> },
    Address { field: FieldId, slot: Slot, ranges: Box<[IpNet]> },
    Text { field: FieldId, place: Place, case: Case, needles: Box<[Box<str>]> },
    Regex { field: FieldId, regex: Box<Regex> },
}

/// The required order of a value relative to the operand.
#[derive(Debug, Clone, Copy)]
enum Order {
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
}

/// The required position of a text in a value.
#[derive(Debug, Clone, Copy)]
enum Place {
    Start,
    End,
    Anywhere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Sensitive,
    /// The operands are in lower case.
    Ignored,
}

impl Constraint {
    /// Compiles a constraint and adds its defects to `defects`.
    pub(super) fn compile(
        source: &Loose<wire::Constraint<'_>>,
        schema: &mut Fields,
        defects: &mut Vec<Defect>,
    ) -> Compiled {
        let constraint = match source {
            Loose::Is(source) => Parts::read(source),
            Loose::Missing | Loose::Malformed => None,
        };
        let Some(constraint) = constraint else {
            defects.push(Defect::Malformed(Part::Constraint));
            return Compiled::Never;
        };
        match constraint.compile(schema, defects) {
            Ok(Some(test)) => Compiled::Test(Self { test, inverted: constraint.inverted }),
            Ok(None) if constraint.inverted => Compiled::Always,
            Ok(None) => Compiled::Never,
            Err(defect) => {
                defects.push(defect);
                Compiled::Never
            }
        }
    }

    /// Whether the context satisfies the constraint.
    pub(super) fn holds(&self, bound: &Bound<'_>) -> bool {
        self.test.holds(bound) != self.inverted
    }

    /// A rank of the cost of the test. Cheap tests run first.
    pub(super) fn cost(&self) -> u8 {
        match &self.test {
            Test::In { .. } | Test::Number { .. } | Test::After(_) | Test::Before(_) => 0,
            Test::Version { .. } | Test::Address { .. } => 1,
            Test::Text { case: Case::Sensitive, .. } => 2,
            Test::Text { case: Case::Ignored, .. } => 3,
            Test::Regex { .. } => 4,
        }
    }

    /// Adds everything that the constraint depends on to `inputs`.
    pub(super) fn note_reads(&self, inputs: &mut Reads) {
        match self.test {
            Test::In { field, .. } => inputs.symbol(field),
            Test::Number { field, .. }
            | Test::Version { field, .. }
            | Test::Address { field, .. }
            | Test::Text { field, .. }
            | Test::Regex { field, .. } => inputs.text(field),
            Test::After(date) => {
                // The date itself is not after the date, the next nanosecond is.
                let next = Timestamp::from_nanosecond(date.as_nanosecond() + 1);
                inputs.change(next.unwrap_or(Timestamp::MAX));
            }
            Test::Before(date) => inputs.change(date),
        }
    }
}

impl Test {
    fn holds(&self, bound: &Bound<'_>) -> bool {
        match self {
            Self::In { field, set } => set.contains(bound.symbol(*field)),
            Self::Number { slot, order, than, .. } => {
                order.admits(bound.number(*slot).partial_cmp(than))
            }
            Self::After(date) => bound.clock().is_some_and(|time| time > *date),
            Self::Before(date) => bound.clock().is_some_and(|time| time < *date),
            Self::Version { slot, order, than, .. } => {
                order.admits(bound.version(*slot).map(|version| version.compare(than)))
            }
            Self::Address { slot, ranges, .. } => bound
                .address(*slot)
                .is_some_and(|address| ranges.iter().any(|range| range.contains(&address))),
            Self::Text { field, place, case, needles } => {
                bound.text(*field).is_some_and(|text| place.finds_any(needles, text, *case))
            }
            Self::Regex { field, regex } => {
                bound.text(*field).is_some_and(|text| regex.is_match(text))
            }
        }
    }
}

impl Order {
    fn admits(self, order: Option<Ordering>) -> bool {
        order.is_some_and(|order| match self {
            Self::Equal => order.is_eq(),
            Self::Greater => order.is_gt(),
            Self::GreaterOrEqual => order.is_ge(),
            Self::Less => order.is_lt(),
            Self::LessOrEqual => order.is_le(),
        })
    }
}

impl Place {
    fn finds_any(self, needles: &[Box<str>], text: &str, case: Case) -> bool {
        match case {
            Case::Sensitive => needles.iter().any(|needle| match self {
                Self::Start => text.starts_with(&**needle),
                Self::End => text.ends_with(&**needle),
                Self::Anywhere => text.contains(&**needle),
            }),
            Case::Ignored if text.is_ascii() => {
                needles.iter().any(|needle| self.finds_ascii(needle.as_bytes(), text.as_bytes()))
            }
            // Beyond ASCII lower case can change lengths, so this rare case copies the text.
            Case::Ignored => self.finds_any(needles, &text.to_lowercase(), Case::Sensitive),
        }
    }

    /// Compares without copying. `text` is ASCII, so a `needle` beyond ASCII never matches.
    fn finds_ascii(self, needle: &[u8], text: &[u8]) -> bool {
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
pub(super) fn takes_list(operator: &str) -> bool {
    matches!(operator, "IN" | "NOT_IN" | "IN_CIDR") || operator.starts_with("STR_")
}

/// Whether an operator compares the time. It ignores the constraint's field.
pub(super) fn is_of_time(operator: &str) -> bool {
    matches!(operator, "DATE_AFTER" | "DATE_BEFORE")
}

/// A well-formed constraint.
struct Parts<'a> {
    field: &'a str,
    operator: &'a str,
    value: Option<&'a str>,
    /// Trimmed and without empty ones, as in the Node SDK.
    values: Vec<&'a str>,
    inverted: bool,
    case: Case,
}

impl<'a> Parts<'a> {
    fn read(source: &'a wire::Constraint<'_>) -> Option<Self> {
        let (Loose::Is(field), Loose::Is(operator)) = (&source.context_name, &source.operator)
        else {
            return None;
        };
        let value = match &source.value {
            Loose::Is(value) => Some(&**value),
            Loose::Missing => None,
            Loose::Malformed => return None,
        };
        let mut values = Vec::new();
        match &source.values {
            Loose::Is(list) => {
                for item in list {
                    match item {
                        Loose::Is(text) if !text.is_empty() => values.push(text.trim()),
                        Loose::Is(_) | Loose::Missing => {}
                        Loose::Malformed => return None,
                    }
                }
            }
            Loose::Missing => {}
            Loose::Malformed => return None,
        }
        let ignored = source.case_insensitive.or_default()?;
        let case = if ignored { Case::Ignored } else { Case::Sensitive };
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
        schema: &mut Fields,
        defects: &mut Vec<Defect>,
    ) -> Result<Option<Test>, Defect> {
        match self.operator {
            "IN" => Ok(self.one_of(schema)),
            "STR_STARTS_WITH" => Ok(self.text(schema, Place::Start)),
            "STR_ENDS_WITH" => Ok(self.text(schema, Place::End)),
            "STR_CONTAINS" => Ok(self.text(schema, Place::Anywhere)),
            "NUM_EQ" => self.number(schema, "NUM_EQ", Order::Equal).map(Some),
            "NUM_GT" => self.number(schema, "NUM_GT", Order::Greater).map(Some),
            "NUM_GTE" => self.number(schema, "NUM_GTE", Order::GreaterOrEqual).map(Some),
            "NUM_LT" => self.number(schema, "NUM_LT", Order::Less).map(Some),
            "NUM_LTE" => self.number(schema, "NUM_LTE", Order::LessOrEqual).map(Some),
            "SEMVER_EQ" => self.version(schema, "SEMVER_EQ", Order::Equal).map(Some),
            "SEMVER_GT" => self.version(schema, "SEMVER_GT", Order::Greater).map(Some),
            "SEMVER_GTE" => self.version(schema, "SEMVER_GTE", Order::GreaterOrEqual).map(Some),
            "SEMVER_LT" => self.version(schema, "SEMVER_LT", Order::Less).map(Some),
            "SEMVER_LTE" => self.version(schema, "SEMVER_LTE", Order::LessOrEqual).map(Some),
            "DATE_AFTER" => self.instant("DATE_AFTER").map(|date| Some(Test::After(date))),
            "DATE_BEFORE" => self.instant("DATE_BEFORE").map(|date| Some(Test::Before(date))),
            "REGEX" => self.regex(schema).map(Some),
            "IN_CIDR" => Ok(self.address(schema, defects)),
            unknown => Err(Defect::UnknownOperator(unknown.to_owned())),
        }
    }

    fn one_of(&self, schema: &mut Fields) -> Option<Test> {
        let set = Set::new(schema, self.values.iter().copied());
        (!set.is_empty()).then(|| Test::In { field: schema.intern(self.field), set })
    }

    fn text(&self, schema: &mut Fields, place: Place) -> Option<Test> {
        let needle = |value: &&str| match self.case {
            Case::Sensitive => Box::from(*value),
            Case::Ignored => value.to_lowercase().into_boxed_str(),
        };
        let needles: Box<[Box<str>]> = self.values.iter().map(needle).collect();
        let field = schema.intern(self.field);
        (!needles.is_empty()).then_some(Test::Text { field, place, case: self.case, needles })
    }

    fn number(
        &self,
        schema: &mut Fields,
        operator: &'static str,
        order: Order,
    ) -> Result<Test, Defect> {
        let than = self.operand(operator, scalar::number)?;
        let field = schema.intern(self.field);
        Ok(Test::Number { field, slot: schema.number(field), order, than })
    }

    fn version(
        &self,
        schema: &mut Fields,
        operator: &'static str,
        order: Order,
    ) -> Result<Test, Defect> {
        let than = self.operand(operator, Version::parse)?.into_owned();
        let field = schema.intern(self.field);
        Ok(Test::Version { field, slot: schema.version(field), order, than: Box::new(than) })
    }

    /// The operand of a date operator, which compares with the current time and ignores the field, as in
    /// the Node SDK.
    fn instant(&self, operator: &'static str) -> Result<Timestamp, Defect> {
        self.operand(operator, date::parse)
    }

    fn regex(&self, schema: &mut Fields) -> Result<Test, Defect> {
        let regex =
            self.operand("REGEX", |value| pattern::compile(value, self.case == Case::Ignored))?;
        Ok(Test::Regex { field: schema.intern(self.field), regex: Box::new(regex) })
    }

    /// Invalid ranges are reported and left out, as the specification requires.
    fn address(&self, schema: &mut Fields, defects: &mut Vec<Defect>) -> Option<Test> {
        let mut ranges = Vec::with_capacity(self.values.len());
        for &value in &self.values {
            match scalar::network(value) {
                Some(range) => ranges.push(range),
                None => {
                    defects
                        .push(Defect::Operand { operator: "IN_CIDR", operand: value.to_owned() });
                }
            }
        }
        let field = schema.intern(self.field);
        let slot = schema.address(field);
        (!ranges.is_empty()).then(|| Test::Address { field, slot, ranges: ranges.into() })
    }

    fn operand<T>(
        &self,
        operator: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<T, Defect> {
        self.value.and_then(parse).ok_or_else(|| Defect::Operand {
            operator,
            operand: self.value.unwrap_or_default().to_owned(),
        })
    }
}
