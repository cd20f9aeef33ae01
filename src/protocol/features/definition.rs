//! The shapes of a flag's JSON.
//!
//! Every field is [`Lenient`]: the engine decides how to evaluate one that is missing or malformed.

use serde::Deserialize;
use serde::de::MapAccess;
use serde::de::value::MapAccessDeserializer;

use crate::protocol::lenient::{Lenient, LenientValue, Text};

/// The definition of a flag.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition<'a> {
    /// Whether it is on in this environment; if it is off, strategies are ignored.
    #[serde(default)]
    pub enabled: Lenient<bool>,
    /// Whether SDKs should report each evaluation to the application.
    #[serde(default)]
    pub impression_data: Lenient<bool>,
    /// The strategies; the flag is on if one of them matches, and the first such decides.
    #[serde(borrow, default)]
    pub strategies: Lenient<Vec<Lenient<Strategy<'a>>>>,
    /// The variants if the flag is on, unless the matching strategy has variants itself.
    #[serde(borrow, default)]
    pub variants: Lenient<Vec<Lenient<Variant<'a>>>>,
    /// Conditions on other flags, all of which must be met.
    #[serde(borrow, default)]
    pub dependencies: Lenient<Vec<Lenient<Dependency<'a>>>>,
}

/// One activation strategy.
#[derive(Debug, Deserialize)]
pub struct Strategy<'a> {
    /// The type of the strategy.
    #[serde(borrow, default)]
    pub name: Lenient<Text<'a>>,
    /// A title for humans, without effect.
    #[serde(borrow, default)]
    pub title: Lenient<Text<'a>>,
    /// Whether it is disabled. SDKs ignore this field, because Unleash does not send them disabled
    /// strategies.
    #[serde(default)]
    pub disabled: Lenient<bool>,
    /// The parameters of the strategy type.
    #[serde(borrow, default)]
    pub parameters: Lenient<Parameters<'a>>,
    /// Conditions on the context, all of which must match.
    #[serde(borrow, default)]
    pub constraints: Lenient<Vec<Lenient<Constraint<'a>>>>,
    /// Ids of segments, whose constraints must all match.
    #[serde(default)]
    pub segments: Lenient<Vec<Lenient<i64>>>,
    /// The variants if this strategy matches.
    #[serde(borrow, default)]
    pub variants: Lenient<Vec<Lenient<Variant<'a>>>>,
}

/// A condition on one context field.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Constraint<'a> {
    /// The context field to compare.
    #[serde(borrow, default)]
    pub context_name: Lenient<Text<'a>>,
    /// The operator, for instance `STR_CONTAINS`.
    #[serde(borrow, default)]
    pub operator: Lenient<Text<'a>>,
    /// The operands of operators on lists.
    #[serde(borrow, default)]
    pub values: Lenient<Vec<Lenient<Text<'a>>>>,
    /// The operand of other operators.
    #[serde(borrow, default)]
    pub value: Lenient<Text<'a>>,
    /// Whether the result is negated.
    #[serde(default)]
    pub inverted: Lenient<bool>,
    /// Whether the string operators ignore case.
    #[serde(default)]
    pub case_insensitive: Lenient<bool>,
}

/// One of the variants of a flag.
#[derive(Debug, Deserialize)]
pub struct Variant<'a> {
    /// The name of the variant.
    #[serde(borrow, default)]
    pub name: Lenient<Text<'a>>,
    /// The weight, relative to the sum over all variants.
    #[serde(default)]
    pub weight: Lenient<u32>,
    /// The context field whose value determines the variant, so that the same value always gets the same
    /// one.
    #[serde(borrow, default)]
    pub stickiness: Lenient<Text<'a>>,
    /// The payload for the application.
    #[serde(borrow, default)]
    pub payload: Lenient<Payload<'a>>,
    /// Context values that always get this variant.
    #[serde(borrow, default)]
    pub overrides: Lenient<Vec<Lenient<Override<'a>>>>,
}

/// The payload of a variant.
#[derive(Debug, Deserialize)]
pub struct Payload<'a> {
    /// `string`, `json`, `csv` or `number`.
    #[serde(borrow, default, rename = "type")]
    pub kind: Lenient<Text<'a>>,
    /// The payload, always as a string.
    #[serde(borrow, default)]
    pub value: Lenient<Text<'a>>,
}

/// Context values that always get a certain variant.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Override<'a> {
    /// The context field to compare.
    #[serde(borrow, default)]
    pub context_name: Lenient<Text<'a>>,
    /// The values that get the variant.
    #[serde(borrow, default)]
    pub values: Lenient<Vec<Lenient<Text<'a>>>>,
}

/// A condition on another flag.
#[derive(Debug, Deserialize)]
pub struct Dependency<'a> {
    /// The name of the other flag.
    #[serde(borrow, default)]
    pub feature: Lenient<Text<'a>>,
    /// Whether that flag must be on (the default) or off.
    #[serde(default)]
    pub enabled: Lenient<bool>,
    /// If there are any, that flag must be on with one of these variants.
    #[serde(borrow, default)]
    pub variants: Lenient<Vec<Lenient<Text<'a>>>>,
}

/// The metadata of a document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    #[serde(default)]
    pub(super) revision_id: Lenient<u64>,
}

/// The fields of a segment that are parsed; its name is for humans only.
#[derive(Deserialize)]
pub(super) struct SegmentBody<'a> {
    #[serde(borrow, default)]
    pub(super) name: Lenient<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) constraints: Lenient<Vec<Lenient<Constraint<'a>>>>,
}

/// The parameters of a strategy, in the order of the text.
#[derive(Debug, Default)]
pub struct Parameters<'a>(Vec<(Text<'a>, Lenient<Text<'a>>)>);

impl Parameters<'static> {
    /// No parameters.
    pub const EMPTY: &'static Self = &Self(Vec::new());
}

impl Parameters<'_> {
    /// All parameters in the order of the text. A value that is not a string is `None`.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.0.iter().map(|(name, value)| match value {
            Lenient::Valid(value) => (&**name, Some(&**value)),
            Lenient::Missing | Lenient::Malformed => (&**name, None),
        })
    }

    /// The parameter `name`; the last one if it occurs several times.
    pub fn get(&self, name: &str) -> Lenient<&str> {
        match self.0.iter().rfind(|(key, _)| key == name) {
            Some((_, Lenient::Valid(value))) => Lenient::Valid(value),
            Some((_, Lenient::Malformed)) => Lenient::Malformed,
            Some((_, Lenient::Missing)) | None => Lenient::Missing,
        }
    }
}

impl<'de: 'a, 'a> LenientValue<'de> for Parameters<'a> {
    fn deserialize_object<A: MapAccess<'de>>(mut object: A) -> Result<Lenient<Self>, A::Error> {
        let mut parameters = Vec::with_capacity(4);
        while let Some((key, value)) = object.next_entry::<Lenient<Text<'a>>, _>()? {
            parameters.push((key.valid().unwrap_or_default(), value));
        }
        Ok(Lenient::Valid(Self(parameters)))
    }
}

/// Implements the trait for objects by their derived `Deserialize`, whose fields are all lenient.
macro_rules! impl_lenient_objects {
    ($($object:ty),*) => {$(
        impl<'de: 'a, 'a> LenientValue<'de> for $object {
            fn deserialize_object<A: MapAccess<'de>>(object: A) -> Result<Lenient<Self>, A::Error> {
                Self::deserialize(MapAccessDeserializer::new(object)).map(Lenient::Valid)
            }
        }
    )*};
}

impl_lenient_objects!(
    Strategy<'a>,
    Constraint<'a>,
    Variant<'a>,
    Payload<'a>,
    Override<'a>,
    Dependency<'a>
);

impl<'de> LenientValue<'de> for Meta {
    fn deserialize_object<A: MapAccess<'de>>(object: A) -> Result<Lenient<Self>, A::Error> {
        Self::deserialize(MapAccessDeserializer::new(object)).map(Lenient::Valid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_booleans_are_parsed_as_strings() {
        let json = r#"{"a":50,"b":50.0,"c":33.5,"d":true,"e":"\u0065","f":null,"g":[],"a":51}"#;
        let Lenient::Valid(parameters) =
            serde_json::from_str::<Lenient<Parameters<'_>>>(json).unwrap()
        else {
            panic!("not an object");
        };
        let texts = ["b", "c", "d", "e", "a"].map(|name| parameters.get(name));
        assert_eq!(texts, ["50", "33.5", "true", "e", "51"].map(Lenient::Valid));
        assert_eq!(parameters.get("f"), Lenient::Missing);
        assert_eq!(parameters.get("g"), Lenient::Malformed);
        assert_eq!(parameters.get("absent"), Lenient::Missing);
    }
}
