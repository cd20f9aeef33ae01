//! Lenient parsing of a flag's JSON.
//!
//! Real definitions contain `null` in place of lists, numbers in place of strings, and sometimes worse.
//! Parsing never stops at such a value: each field records whether it was present and of the right type
//! ([`Lenient`]). The engine decides how to evaluate it.

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A value that may be missing (absent or `null`) or of the wrong type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lenient<T> {
    /// Absent, or `null`.
    #[default]
    Missing,
    /// Of the expected type.
    Valid(T),
    /// Of another type.
    Malformed,
}

impl<T> Lenient<T> {
    /// The value, if it is valid.
    pub fn valid(self) -> Option<T> {
        match self {
            Self::Valid(value) => Some(value),
            Self::Missing | Self::Malformed => None,
        }
    }

    /// The value, or the default if it is missing; `None` if it is malformed.
    pub fn or_default(self) -> Option<T>
    where
        T: Default,
    {
        match self {
            Self::Valid(value) => Some(value),
            Self::Missing => Some(T::default()),
            Self::Malformed => None,
        }
    }
}

/// A string, borrowed from the document unless it has escapes. Numbers and booleans are converted to
/// strings, because older servers and hand-written files contain them in place of strings.
pub type Text<'a> = Cow<'a, str>;

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

/// A type that [`Lenient`] can parse. Each method converts one JSON type; by default it is malformed.
pub(super) trait LenientValue<'de>: Sized {
    fn from_bool(_: bool) -> Lenient<Self> {
        Lenient::Malformed
    }

    fn from_integer(_: i128) -> Lenient<Self> {
        Lenient::Malformed
    }

    fn from_float(_: f64) -> Lenient<Self> {
        Lenient::Malformed
    }

    fn from_text(_: Text<'de>) -> Lenient<Self> {
        Lenient::Malformed
    }

    fn from_list<A: SeqAccess<'de>>(mut list: A) -> Result<Lenient<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Lenient::Malformed)
    }

    fn from_object<A: MapAccess<'de>>(mut object: A) -> Result<Lenient<Self>, A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Lenient::Malformed)
    }
}

impl LenientValue<'_> for bool {
    fn from_bool(value: bool) -> Lenient<Self> {
        Lenient::Valid(value)
    }
}

impl LenientValue<'_> for i64 {
    fn from_integer(value: i128) -> Lenient<Self> {
        value.try_into().map_or(Lenient::Malformed, Lenient::Valid)
    }
}

impl LenientValue<'_> for u32 {
    fn from_integer(value: i128) -> Lenient<Self> {
        value.try_into().map_or(Lenient::Malformed, Lenient::Valid)
    }
}

impl LenientValue<'_> for u64 {
    fn from_integer(value: i128) -> Lenient<Self> {
        value.try_into().map_or(Lenient::Malformed, Lenient::Valid)
    }
}

impl<'de: 'a, 'a> LenientValue<'de> for Text<'a> {
    fn from_bool(value: bool) -> Lenient<Self> {
        Lenient::Valid(Cow::Borrowed(if value { "true" } else { "false" }))
    }

    fn from_integer(value: i128) -> Lenient<Self> {
        Lenient::Valid(Cow::Owned(value.to_string()))
    }

    fn from_float(value: f64) -> Lenient<Self> {
        Lenient::Valid(Cow::Owned(value.to_string()))
    }

    fn from_text(value: Text<'de>) -> Lenient<Self> {
        Lenient::Valid(value)
    }
}

impl<'de, T: Deserialize<'de>> LenientValue<'de> for Vec<T> {
    fn from_list<A: SeqAccess<'de>>(mut list: A) -> Result<Lenient<Self>, A::Error> {
        let mut items = Self::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Lenient::Valid(items))
    }
}

impl<'de: 'a, 'a> LenientValue<'de> for Parameters<'a> {
    fn from_object<A: MapAccess<'de>>(mut object: A) -> Result<Lenient<Self>, A::Error> {
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
            fn from_object<A: MapAccess<'de>>(object: A) -> Result<Lenient<Self>, A::Error> {
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
    fn from_object<A: MapAccess<'de>>(object: A) -> Result<Lenient<Self>, A::Error> {
        Self::deserialize(MapAccessDeserializer::new(object)).map(Lenient::Valid)
    }
}

impl<'de, T: LenientValue<'de>> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LenientVisitor(PhantomData))
    }
}

struct LenientVisitor<T>(PhantomData<T>);

impl<'de, T: LenientValue<'de>> Visitor<'de> for LenientVisitor<T> {
    type Value = Lenient<T>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Lenient::Missing)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(T::from_bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(T::from_integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(T::from_integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(T::from_float(value))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(T::from_text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(T::from_text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        T::from_list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        T::from_object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: for<'a> LenientValue<'a> + PartialEq + std::fmt::Debug>(
        json: &str,
        expect: &Lenient<T>,
    ) {
        assert_eq!(&serde_json::from_str::<Lenient<T>>(json).unwrap(), expect, "{json}");
    }

    #[test]
    fn missing_and_malformed_values_are_distinguished() {
        check("true", &Lenient::Valid(true));
        check("null", &Lenient::<bool>::Missing);
        check("\"true\"", &Lenient::<bool>::Malformed);
        check("3", &Lenient::Valid(3_u32));
        check("-3", &Lenient::<u32>::Malformed);
        check("3.5", &Lenient::<u32>::Malformed);
        check("[{\"a\":[1]}]", &Lenient::<u32>::Malformed);
        check("{\"a\":[1]}", &Lenient::<u32>::Malformed);
        check(
            "[1, null, []]",
            &Lenient::Valid(vec![Lenient::Valid(1_i64), Lenient::Missing, Lenient::Malformed]),
        );
    }

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
