//! Variants of a flag, and the selection among them for a context.

use super::bucket::{self, DrawId, HashPrefix, VARIANT_SEED};
use super::context::{BoundContext, ContextSchema, FieldId, StringSet};
use super::inputs::EvaluationInputs;
use super::problem::{Defect, DefinitionPart};
use crate::protocol::features as wire;
use crate::protocol::lenient::Lenient;

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
    pub(super) fn identifier<'a>(self, bound: &BoundContext<'a>) -> Option<&'a str> {
        self.field_and_identifier(bound).map(|(_, identifier)| identifier)
    }

    /// The identifier with its field.
    pub(super) fn field_and_identifier<'a>(
        self,
        bound: &BoundContext<'a>,
    ) -> Option<(FieldId, &'a str)> {
        let text = |field| Some((field, bound.text(field).filter(|text| !text.is_empty())?));
        match self {
            Self::FirstOf(fields) => fields.iter().find_map(|&field| text(field)),
            Self::Field(field) => text(field),
        }
    }
}

/// The selection among a list of variants.
#[derive(Debug, Clone)]
pub(super) enum VariantSelection {
    /// No variant is ever selected.
    None,
    /// This variant is always selected.
    Always(u32),
    /// The selection depends on the context.
    Weighted(Box<WeightedVariants>),
}

/// Variants that are selected by overrides, else by weighted buckets.
#[derive(Debug, Clone)]
pub(super) struct WeightedVariants {
    overrides: Box<[(FieldId, StringSet, u32)]>,
    pub(super) stickiness: Stickiness,
    prefix: HashPrefix,
    draw_id: DrawId,
    /// The last bucket of each variant with a weight. The last entry is the number of buckets.
    bucket_ends: Box<[(u32, u32)]>,
}

/// The default stickiness of variants. Unlike that of rollouts it includes `remoteAddress`, as in the
/// Node SDK.
const DEFAULT_STICKINESS: &[FieldId] =
    &[FieldId::USER_ID, FieldId::SESSION_ID, FieldId::REMOTE_ADDRESS];

/// Compiles a list of variants and appends them to `all_variants` of the flag.
///
/// `group` and `stickiness` (by default [`DEFAULT_STICKINESS`]) determine the bucket of contexts with an
/// identifier, `draw_id` that of contexts without.
pub(super) fn compile(
    source: &[Lenient<wire::Variant<'_>>],
    group: &str,
    stickiness: Option<&str>,
    draw_id: DrawId,
    all_variants: &mut Vec<Variant>,
    schema: &mut ContextSchema,
    defects: &mut Vec<Defect>,
) -> VariantSelection {
    let mut ends = Vec::new();
    let mut overrides = Vec::new();
    let mut total = 0_u32;
    for variant in source {
        let Some((variant, name, weight)) = parse_variant(variant, total) else {
            defects.push(Defect::Malformed(DefinitionPart::Variant));
            continue;
        };
        let index =
            u32::try_from(all_variants.len()).expect("a document has fewer than 2^32 variants");
        all_variants
            .push(Variant { name: name.into(), payload: compile_payload(variant, defects) });
        if weight > 0 {
            total += weight;
            ends.push((total, index));
        }
        compile_overrides(variant, index, &mut overrides, schema, defects);
    }
    match ends[..] {
        [] => VariantSelection::None,
        [(_, only)] if overrides.is_empty() => VariantSelection::Always(only),
        _ => VariantSelection::Weighted(Box::new(WeightedVariants {
            overrides: overrides.into(),
            stickiness: match stickiness {
                None | Some("default") => Stickiness::FirstOf(DEFAULT_STICKINESS),
                Some(field) => Stickiness::Field(schema.intern_field(field)),
            },
            prefix: HashPrefix::new(group, VARIANT_SEED),
            draw_id,
            bucket_ends: ends.into(),
        })),
    }
}

/// A variant with its name and weight, if both are well-formed and the sum of weights fits 32 bits.
pub(super) fn parse_variant<'w, 'a>(
    variant: &'w Lenient<wire::Variant<'a>>,
    total: u32,
) -> Option<(&'w wire::Variant<'a>, &'w str, u32)> {
    let Lenient::Valid(variant) = variant else {
        return None;
    };
    let (Lenient::Valid(name), Lenient::Valid(weight)) = (&variant.name, variant.weight) else {
        return None;
    };
    total.checked_add(weight)?;
    Some((variant, name, weight))
}

fn compile_payload(variant: &wire::Variant<'_>, defects: &mut Vec<Defect>) -> Option<Payload> {
    match &variant.payload {
        Lenient::Missing => None,
        Lenient::Valid(wire::Payload {
            kind: Lenient::Valid(kind),
            value: Lenient::Valid(value),
        }) => Some(Payload { kind: (&**kind).into(), value: (&**value).into() }),
        Lenient::Valid(_) | Lenient::Malformed => {
            defects.push(Defect::Malformed(DefinitionPart::Payload));
            None
        }
    }
}

fn compile_overrides(
    variant: &wire::Variant<'_>,
    index: u32,
    overrides: &mut Vec<(FieldId, StringSet, u32)>,
    schema: &mut ContextSchema,
    defects: &mut Vec<Defect>,
) {
    let list = match &variant.overrides {
        Lenient::Valid(list) => &list[..],
        Lenient::Missing => &[],
        Lenient::Malformed => &[Lenient::Malformed],
    };
    for item in list {
        match item {
            Lenient::Valid(wire::Override {
                context_name: Lenient::Valid(name),
                values: Lenient::Valid(values),
            }) => {
                let values = values.iter().filter_map(|value| match value {
                    Lenient::Valid(value) => Some(&**value),
                    Lenient::Missing | Lenient::Malformed => None,
                });
                let set = StringSet::new(schema, values);
                if !set.is_empty() {
                    overrides.push((schema.intern_field(name), set, index));
                }
            }
            Lenient::Valid(_) | Lenient::Missing | Lenient::Malformed => {
                defects.push(Defect::Malformed(DefinitionPart::Override));
            }
        }
    }
}

impl VariantSelection {
    /// Whether a bucket decides the selection.
    pub(super) fn is_bucketed(&self) -> bool {
        matches!(self, Self::Weighted(_))
    }

    /// The variant for this context, as an index into all variants of the flag.
    pub(super) fn select(&self, bound: &BoundContext<'_>) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Always(index) => Some(*index),
            Self::Weighted(weighted) => weighted.select(bound),
        }
    }

    /// Adds everything that the selection depends on to `inputs`.
    pub(super) fn collect_inputs(&self, inputs: &mut EvaluationInputs) {
        let Self::Weighted(weighted) = self else { return };
        for (field, ..) in &weighted.overrides {
            inputs.add_membership(*field);
        }
        match weighted.stickiness {
            Stickiness::FirstOf(fields) => {
                inputs.add_first_of(fields);
                inputs.add_random_source(fields);
            }
            Stickiness::Field(field) => {
                inputs.add_text(field);
                inputs.add_random_source(&[field]);
            }
        }
    }
}

impl WeightedVariants {
    fn select(&self, bound: &BoundContext<'_>) -> Option<u32> {
        if let Some((_, index)) = self.matching_override(bound) {
            return Some(index);
        }
        self.variant_in_bucket(self.bucket(bound))
    }

    /// The first override that matches this context: its field and its variant.
    pub(super) fn matching_override(&self, bound: &BoundContext<'_>) -> Option<(FieldId, u32)> {
        let matches =
            |(field, set, _): &&(FieldId, StringSet, u32)| set.contains(bound.interned(*field));
        self.overrides.iter().find(matches).map(|&(field, _, index)| (field, index))
    }

    /// The bucket of the context, from 1 to [`WeightedVariants::bucket_count`]: by its identifier, or
    /// random without one.
    pub(super) fn bucket(&self, bound: &BoundContext<'_>) -> u32 {
        match self.stickiness.identifier(bound) {
            Some(identifier) => self.prefix.bucket(identifier, self.bucket_count()),
            None => bucket::random_bucket(bound.random_seed(), self.draw_id, self.bucket_count()),
        }
    }

    /// The sum of all weights.
    pub(super) fn bucket_count(&self) -> u32 {
        self.bucket_ends.last().map_or(0, |&(end, _)| end)
    }

    /// The variant that a bucket belongs to.
    pub(super) fn variant_in_bucket(&self, bucket: u32) -> Option<u32> {
        self.bucket_ends.iter().find(|&&(end, _)| bucket <= end).map(|&(_, index)| index)
    }
}
