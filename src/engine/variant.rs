//! Variants: the values that a flag can take, and who gets which.

use super::bucket::{self, Prefix, Site, VARIANT_SEED};
use super::context::{Bound, FieldId, Fields, Set};
use super::problem::{Defect, Part};
use super::reads::Reads;
use crate::wire::features::{self as wire, Loose};

/// One of the values a flag can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Its name.
    pub name: Box<str>,
    /// What it carries to the application.
    pub payload: Option<Payload>,
}

/// What a variant carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// `string`, `json`, `csv` or `number`.
    pub kind: Box<str>,
    /// The payload, always as text.
    pub value: Box<str>,
}

/// Where the identifier comes from that keeps somebody in one bucket.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stickiness {
    /// The first of these that is there; else chance decides.
    FirstOf(&'static [FieldId]),
    /// One field.
    Field(FieldId),
}

impl Stickiness {
    /// The identifier, if it is there and not empty.
    pub(super) fn identifier<'a>(self, bound: &Bound<'a>) -> Option<&'a str> {
        self.source(bound).map(|(_, identifier)| identifier)
    }

    /// The identifier and the field that it stands in.
    pub(super) fn source<'a>(self, bound: &Bound<'a>) -> Option<(FieldId, &'a str)> {
        let text = |field| Some((field, bound.text(field).filter(|text| !text.is_empty())?));
        match self {
            Self::FirstOf(fields) => fields.iter().find_map(|&field| text(field)),
            Self::Field(field) => text(field),
        }
    }
}

/// Who gets which of a list of variants.
#[derive(Debug, Clone)]
pub(super) enum Choice {
    /// Nobody gets any.
    Nobody,
    /// Everybody gets this one.
    Everybody(u32),
    /// It depends.
    Lots(Box<Lots>),
}

#[derive(Debug, Clone)]
pub(super) struct Lots {
    overrides: Box<[(FieldId, Set, u32)]>,
    pub(super) stickiness: Stickiness,
    prefix: Prefix,
    site: Site,
    /// The last bucket of each variant that has any; the last one's is the number of buckets.
    ends: Box<[(u32, u32)]>,
}

/// The default for variants, which unlike a rollout's knows `remoteAddress`, as the Node SDK has it.
const DEFAULT: &[FieldId] = &[FieldId::USER_ID, FieldId::SESSION_ID, FieldId::REMOTE_ADDRESS];

/// Compiles a list of variants, whose values are appended to the flag's `table`.
///
/// `group` and `stickiness` (by default [`DEFAULT`]) place whoever is known; `site` is where the
/// draws for everybody else come from.
pub(super) fn compile(
    source: &[Loose<wire::Variant<'_>>],
    group: &str,
    stickiness: Option<&str>,
    site: Site,
    table: &mut Vec<Variant>,
    fields: &mut Fields,
    defects: &mut Vec<Defect>,
) -> Choice {
    let mut ends = Vec::new();
    let mut overrides = Vec::new();
    let mut total = 0_u32;
    for variant in source {
        let Some((variant, name, weight)) = read(variant, total) else {
            defects.push(Defect::Malformed(Part::Variant));
            continue;
        };
        let index = u32::try_from(table.len()).expect("a document has fewer than 2^32 variants");
        table.push(Variant { name: name.into(), payload: payload(variant, defects) });
        if weight > 0 {
            total += weight;
            ends.push((total, index));
        }
        compile_overrides(variant, index, &mut overrides, fields, defects);
    }
    match ends[..] {
        [] => Choice::Nobody,
        [(_, only)] if overrides.is_empty() => Choice::Everybody(only),
        _ => Choice::Lots(Box::new(Lots {
            overrides: overrides.into(),
            stickiness: match stickiness {
                None | Some("default") => Stickiness::FirstOf(DEFAULT),
                Some(field) => Stickiness::Field(fields.intern(field)),
            },
            prefix: Prefix::new(group, VARIANT_SEED),
            site,
            ends: ends.into(),
        })),
    }
}

/// A variant with its name and weight, if both are sound and the sum of weights stays in range.
pub(super) fn read<'w, 'a>(
    variant: &'w Loose<wire::Variant<'a>>,
    total: u32,
) -> Option<(&'w wire::Variant<'a>, &'w str, u32)> {
    let Loose::Is(variant) = variant else {
        return None;
    };
    let (Loose::Is(name), Loose::Is(weight)) = (&variant.name, variant.weight) else {
        return None;
    };
    total.checked_add(weight)?;
    Some((variant, name, weight))
}

fn payload(variant: &wire::Variant<'_>, defects: &mut Vec<Defect>) -> Option<Payload> {
    match &variant.payload {
        Loose::Missing => None,
        Loose::Is(wire::Payload { kind: Loose::Is(kind), value: Loose::Is(value) }) => {
            Some(Payload { kind: (&**kind).into(), value: (&**value).into() })
        }
        Loose::Is(_) | Loose::Malformed => {
            defects.push(Defect::Malformed(Part::Payload));
            None
        }
    }
}

fn compile_overrides(
    variant: &wire::Variant<'_>,
    index: u32,
    overrides: &mut Vec<(FieldId, Set, u32)>,
    fields: &mut Fields,
    defects: &mut Vec<Defect>,
) {
    let list = match &variant.overrides {
        Loose::Is(list) => &list[..],
        Loose::Missing => &[],
        Loose::Malformed => &[Loose::Malformed],
    };
    for item in list {
        match item {
            Loose::Is(wire::Override {
                context_name: Loose::Is(name),
                values: Loose::Is(values),
            }) => {
                let values = values.iter().filter_map(|value| match value {
                    Loose::Is(value) => Some(&**value),
                    Loose::Missing | Loose::Malformed => None,
                });
                let set = Set::new(fields, values);
                if !set.is_empty() {
                    overrides.push((fields.intern(name), set, index));
                }
            }
            Loose::Is(_) | Loose::Missing | Loose::Malformed => {
                defects.push(Defect::Malformed(Part::Override));
            }
        }
    }
}

impl Choice {
    /// Whether a bucket decides who gets which.
    pub(super) fn splits(&self) -> bool {
        matches!(self, Self::Lots(_))
    }

    /// The variant for this context, as an index into the flag's table.
    pub(super) fn choose(&self, bound: &Bound<'_>) -> Option<u32> {
        match self {
            Self::Nobody => None,
            Self::Everybody(index) => Some(*index),
            Self::Lots(lots) => lots.choose(bound),
        }
    }

    /// Adds what the choice depends on to `reads`.
    pub(super) fn note_reads(&self, reads: &mut Reads) {
        let Self::Lots(lots) = self else { return };
        for (field, ..) in &lots.overrides {
            reads.symbol(*field);
        }
        match lots.stickiness {
            Stickiness::FirstOf(fields) => {
                reads.first_of(fields);
                reads.chance(fields);
            }
            Stickiness::Field(field) => {
                reads.text(field);
                reads.chance(&[field]);
            }
        }
    }
}

impl Lots {
    fn choose(&self, bound: &Bound<'_>) -> Option<u32> {
        if let Some((_, index)) = self.overriding(bound) {
            return Some(index);
        }
        self.at(self.bucket(bound))
    }

    /// The first override that is for this context: the field that it looks at, and the variant.
    pub(super) fn overriding(&self, bound: &Bound<'_>) -> Option<(FieldId, u32)> {
        let hit = |(field, set, _): &&(FieldId, Set, u32)| set.contains(bound.symbol(*field));
        self.overrides.iter().find(hit).map(|&(field, _, index)| (field, index))
    }

    /// Where the context falls among 1 to [`Lots::buckets`], by its identifier or else by chance.
    pub(super) fn bucket(&self, bound: &Bound<'_>) -> u32 {
        match self.stickiness.identifier(bound) {
            Some(identifier) => self.prefix.bucket(identifier, self.buckets()),
            None => bucket::draw(bound.draw(), self.site, self.buckets()),
        }
    }

    /// The sum of all weights.
    pub(super) fn buckets(&self) -> u32 {
        self.ends.last().map_or(0, |&(end, _)| end)
    }

    /// The variant that a bucket belongs to.
    pub(super) fn at(&self, bucket: u32) -> Option<u32> {
        self.ends.iter().find(|&&(end, _)| bucket <= end).map(|&(_, index)| index)
    }
}
