//! Variants of a flag, and the selection among them for a context.

use super::bucket::{self, Prefix, Site, VARIANT_SEED};
use super::context::{Bound, FieldId, Fields, Set};
use super::problem::{Defect, Part};
use super::reads::Reads;
use crate::wire::features::{self as wire, Loose};

/// A variant of a flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Its name.
    pub name: Box<str>,
    /// Its payload for the application.
    pub payload: Option<Payload>,
}

/// The payload of a variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// `string`, `json`, `csv` or `number`.
    pub kind: Box<str>,
    /// The payload, always as text.
    pub value: Box<str>,
}

/// The source of the identifier from which the bucket is computed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stickiness {
    /// The first of these fields that is present; without any the bucket is random.
    FirstOf(&'static [FieldId]),
    /// One field.
    Field(FieldId),
}

impl Stickiness {
    /// The identifier, if it is present and not empty.
    pub(super) fn identifier<'a>(self, bound: &Bound<'a>) -> Option<&'a str> {
        self.source(bound).map(|(_, identifier)| identifier)
    }

    /// The identifier with its field.
    pub(super) fn source<'a>(self, bound: &Bound<'a>) -> Option<(FieldId, &'a str)> {
        let text = |field| Some((field, bound.text(field).filter(|text| !text.is_empty())?));
        match self {
            Self::FirstOf(fields) => fields.iter().find_map(|&field| text(field)),
            Self::Field(field) => text(field),
        }
    }
}

/// The selection among a list of variants.
#[derive(Debug, Clone)]
pub(super) enum Choice {
    /// No variant is ever selected.
    Nobody,
    /// This variant is always selected.
    Everybody(u32),
    /// The selection depends on the context.
    Lots(Box<Lots>),
}

/// Variants that are selected by overrides, else by weighted buckets.
#[derive(Debug, Clone)]
pub(super) struct Lots {
    overrides: Box<[(FieldId, Set, u32)]>,
    pub(super) stickiness: Stickiness,
    prefix: Prefix,
    site: Site,
    /// The last bucket of each variant with a weight. The last entry is the number of buckets.
    ends: Box<[(u32, u32)]>,
}

/// The default stickiness of variants. Unlike that of rollouts it includes `remoteAddress`, as in the
/// Node SDK.
const DEFAULT: &[FieldId] = &[FieldId::USER_ID, FieldId::SESSION_ID, FieldId::REMOTE_ADDRESS];

/// Compiles a list of variants and appends them to `all_variants` of the flag.
///
/// `group` and `stickiness` (by default [`DEFAULT_STICKINESS`]) determine the bucket of contexts with an
/// identifier, `draw_id` that of contexts without.
pub(super) fn compile(
    source: &[Loose<wire::Variant<'_>>],
    group: &str,
    stickiness: Option<&str>,
    draw_id: Site,
    all_variants: &mut Vec<Variant>,
    schema: &mut Fields,
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
        let index =
            u32::try_from(all_variants.len()).expect("a document has fewer than 2^32 variants");
        all_variants.push(Variant { name: name.into(), payload: payload(variant, defects) });
        if weight > 0 {
            total += weight;
            ends.push((total, index));
        }
        compile_overrides(variant, index, &mut overrides, schema, defects);
    }
    match ends[..] {
        [] => Choice::Nobody,
        [(_, only)] if overrides.is_empty() => Choice::Everybody(only),
        _ => Choice::Lots(Box::new(Lots {
            overrides: overrides.into(),
            stickiness: match stickiness {
                None | Some("default") => Stickiness::FirstOf(DEFAULT),
                Some(field) => Stickiness::Field(schema.intern(field)),
            },
            prefix: Prefix::new(group, VARIANT_SEED),
            site: draw_id,
            ends: ends.into(),
        })),
    }
}

/// A variant with its name and weight, if both are well-formed and the sum of weights fits 32 bits.
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
    schema: &mut Fields,
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
                let set = Set::new(schema, values);
                if !set.is_empty() {
                    overrides.push((schema.intern(name), set, index));
                }
            }
            Loose::Is(_) | Loose::Missing | Loose::Malformed => {
                defects.push(Defect::Malformed(Part::Override));
            }
        }
    }
}

impl Choice {
    /// Whether a bucket decides the selection.
    pub(super) fn splits(&self) -> bool {
        matches!(self, Self::Lots(_))
    }

    /// The variant for this context, as an index into all variants of the flag.
    pub(super) fn choose(&self, bound: &Bound<'_>) -> Option<u32> {
        match self {
            Self::Nobody => None,
            Self::Everybody(index) => Some(*index),
            Self::Lots(weighted) => weighted.choose(bound),
        }
    }

    /// Adds everything that the selection depends on to `inputs`.
    pub(super) fn note_reads(&self, inputs: &mut Reads) {
        let Self::Lots(weighted) = self else { return };
        for (field, ..) in &weighted.overrides {
            inputs.symbol(*field);
        }
        match weighted.stickiness {
            Stickiness::FirstOf(fields) => {
                inputs.first_of(fields);
                inputs.chance(fields);
            }
            Stickiness::Field(field) => {
                inputs.text(field);
                inputs.chance(&[field]);
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

    /// The first override that matches this context: its field and its variant.
    pub(super) fn overriding(&self, bound: &Bound<'_>) -> Option<(FieldId, u32)> {
        let matches = |(field, set, _): &&(FieldId, Set, u32)| set.contains(bound.symbol(*field));
        self.overrides.iter().find(matches).map(|&(field, _, index)| (field, index))
    }

    /// The bucket of the context, from 1 to [`WeightedVariants::bucket_count`]: by its identifier, or
    /// random without one.
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
