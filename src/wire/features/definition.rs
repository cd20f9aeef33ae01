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
pub enum Loose<T> {
    /// Absent, or `null`.
    #[default]
    Missing,
    /// Of the expected type.
    Is(T),
    /// Of another type.
    Malformed,
}

impl<T> Loose<T> {
    /// The value, if it is valid.
    pub fn is(self) -> Option<T> {
        match self {
            Self::Is(value) => Some(value),
            Self::Missing | Self::Malformed => None,
        }
    }

    /// The value, or the default if it is missing; `None` if it is malformed.
    pub fn or_default(self) -> Option<T>
    where
        T: Default,
    {
        match self {
            Self::Is(value) => Some(value),
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
    pub enabled: Loose<bool>,
    /// Whether SDKs should report each evaluation to the application.
    #[serde(default)]
    pub impression_data: Loose<bool>,
    /// The strategies; the flag is on if one of them matches, and the first such decides.
    #[serde(borrow, default)]
    pub strategies: Loose<Vec<Loose<Strategy<'a>>>>,
    /// The variants if the flag is on, unless the matching strategy has variants itself.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Variant<'a>>>>,
    /// Conditions on other flags, all of which must be met.
    #[serde(borrow, default)]
    pub dependencies: Loose<Vec<Loose<Dependency<'a>>>>,
}

/// One activation strategy.
#[derive(Debug, Deserialize)]
pub struct Strategy<'a> {
    /// The type of the strategy.
    #[serde(borrow, default)]
    pub name: Loose<Text<'a>>,
    /// A title for humans, without effect.
    #[serde(borrow, default)]
    pub title: Loose<Text<'a>>,
    /// Whether it is disabled. SDKs ignore this field, because Unleash does not send them disabled
    /// strategies.
    #[serde(default)]
    pub disabled: Loose<bool>,
    /// The parameters of the strategy type.
    #[serde(borrow, default)]
    pub parameters: Loose<Parameters<'a>>,
    /// Conditions on the context, all of which must match.
    #[serde(borrow, default)]
    pub constraints: Loose<Vec<Loose<Constraint<'a>>>>,
    /// Ids of segments, whose constraints must all match.
    #[serde(default)]
    pub segments: Loose<Vec<Loose<i64>>>,
    /// The variants if this strategy matches.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Variant<'a>>>>,
}

/// A condition on one context field.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Constraint<'a> {
    /// The context field to compare.
    #[serde(borrow, default)]
    pub context_name: Loose<Text<'a>>,
    /// The operator, for instance `STR_CONTAINS`.
    #[serde(borrow, default)]
    pub operator: Loose<Text<'a>>,
    /// The operands of operators on lists.
    #[serde(borrow, default)]
    pub values: Loose<Vec<Loose<Text<'a>>>>,
    /// The operand of other operators.
    #[serde(borrow, default)]
    pub value: Loose<Text<'a>>,
    /// Whether the result is negated.
    #[serde(default)]
    pub inverted: Loose<bool>,
    /// Whether the string operators ignore case.
    #[serde(default)]
    pub case_insensitive: Loose<bool>,
}

/// One of the variants of a flag.
#[derive(Debug, Deserialize)]
pub struct Variant<'a> {
    /// The name of the variant.
    #[serde(borrow, default)]
    pub name: Loose<Text<'a>>,
    /// The weight, relative to the sum over all variants.
    #[serde(default)]
    pub weight: Loose<u32>,
    /// The context field whose value determines the variant, so that the same value always gets the same
    /// one.
    #[serde(borrow, default)]
    pub stickiness: Loose<Text<'a>>,
    /// The payload for the application.
    #[serde(borrow, default)]
    pub payload: Loose<Payload<'a>>,
    /// Context values that always get this variant.
    #[serde(borrow, default)]
    pub overrides: Loose<Vec<Loose<Override<'a>>>>,
}

/// The payload of a variant.
#[derive(Debug, Deserialize)]
pub struct Payload<'a> {
    /// `string`, `json`, `csv` or `number`.
    #[serde(borrow, default, rename = "type")]
    pub kind: Loose<Text<'a>>,
    /// The payload, always as a string.
    #[serde(borrow, default)]
    pub value: Loose<Text<'a>>,
}

/// Context values that always get a certain variant.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Override<'a> {
    /// The context field to compare.
    #[serde(borrow, default)]
    pub context_name: Loose<Text<'a>>,
    /// The values that get the variant.
    #[serde(borrow, default)]
    pub values: Loose<Vec<Loose<Text<'a>>>>,
}

/// A condition on another flag.
#[derive(Debug, Deserialize)]
pub struct Dependency<'a> {
    /// The name of the other flag.
    #[serde(borrow, default)]
    pub feature: Loose<Text<'a>>,
    /// Whether that flag must be on (the default) or off.
    #[serde(default)]
    pub enabled: Loose<bool>,
    /// If there are any, that flag must be on with one of these variants.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Text<'a>>>>,
}

/// The metadata of a document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    #[serde(default)]
    pub(super) revision_id: Loose<u64>,
}

/// The fields of a segment that are parsed; its name is for humans only.
#[derive(Deserialize)]
pub(super) struct SegmentBody<'a> {
    #[serde(borrow, default)]
    pub(super) name: Loose<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) constraints: Loose<Vec<Loose<Constraint<'a>>>>,
}

/// The parameters of a strategy, in the order of the text.
#[derive(Debug, Default)]
pub struct Parameters<'a>(Vec<(Text<'a>, Loose<Text<'a>>)>);

impl Parameters<'static> {
    /// No parameters.
    pub const NONE: &'static Self = &Self(Vec::new());
}

impl Parameters<'_> {
    /// All parameters in the order of the text. A value that is not a string is `None`.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.0.iter().map(|(name, value)| match value {
            Loose::Is(value) => (&**name, Some(&**value)),
            Loose::Missing | Loose::Malformed => (&**name, None),
        })
    }

    /// The parameter `name`; the last one if it occurs several times.
    pub fn find(&self, name: &str) -> Loose<&str> {
        match self.0.iter().rfind(|(key, _)| key == name) {
            Some((_, Loose::Is(value))) => Loose::Is(value),
            Some((_, Loose::Malformed)) => Loose::Malformed,
            Some((_, Loose::Missing)) | None => Loose::Missing,
        }
    }
}

/// A type that [`Lenient`] can parse. Each method converts one JSON type; by default it is malformed.
pub(super) trait Form<'de>: Sized {
    fn of_bool(_: bool) -> Loose<Self> {
        Loose::Malformed
    }

    fn of_integer(_: i128) -> Loose<Self> {
        Loose::Malformed
    }

    fn of_float(_: f64) -> Loose<Self> {
        Loose::Malformed
    }

    fn of_text(_: Text<'de>) -> Loose<Self> {
        Loose::Malformed
    }

    fn of_list<A: SeqAccess<'de>>(mut list: A) -> Result<Loose<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Loose::Malformed)
    }

    fn of_object<A: MapAccess<'de>>(mut object: A) -> Result<Loose<Self>, A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Loose::Malformed)
    }
}

impl Form<'_> for bool {
    fn of_bool(value: bool) -> Loose<Self> {
        Loose::Is(value)
    }
}

impl Form<'_> for i64 {
    fn of_integer(value: i128) -> Loose<Self> {
        value.try_into().map_or(Loose::Malformed, Loose::Is)
    }
}

impl Form<'_> for u32 {
    fn of_integer(value: i128) -> Loose<Self> {
        value.try_into().map_or(Loose::Malformed, Loose::Is)
    }
}

impl Form<'_> for u64 {
    fn of_integer(value: i128) -> Loose<Self> {
        value.try_into().map_or(Loose::Malformed, Loose::Is)
    }
}

impl<'de: 'a, 'a> Form<'de> for Text<'a> {
    fn of_bool(value: bool) -> Loose<Self> {
        Loose::Is(Cow::Borrowed(if value { "true" } else { "false" }))
    }

    fn of_integer(value: i128) -> Loose<Self> {
        Loose::Is(Cow::Owned(value.to_string()))
    }

    fn of_float(value: f64) -> Loose<Self> {
        Loose::Is(Cow::Owned(value.to_string()))
    }

    fn of_text(value: Text<'de>) -> Loose<Self> {
        Loose::Is(value)
    }
}

impl<'de, T: Deserialize<'de>> Form<'de> for Vec<T> {
    fn of_list<A: SeqAccess<'de>>(mut list: A) -> Result<Loose<Self>, A::Error> {
        let mut items = Self::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Loose::Is(items))
    }
}

impl<'de: 'a, 'a> Form<'de> for Parameters<'a> {
    fn of_object<A: MapAccess<'de>>(mut object: A) -> Result<Loose<Self>, A::Error> {
        let mut parameters = Vec::with_capacity(4);
        while let Some((key, value)) = object.next_entry::<Loose<Text<'a>>, _>()? {
            parameters.push((key.is().unwrap_or_default(), value));
        }
        Ok(Loose::Is(Self(parameters)))
    }
}

/// Implements the trait for objects by their derived `Deserialize`, whose fields are all lenient.
macro_rules! impl_lenient_objects {
    ($($object:ty),*) => {$(
        impl<'de: 'a, 'a> Form<'de> for $object {
            fn of_object<A: MapAccess<'de>>(object: A) -> Result<Loose<Self>, A::Error> {
                Self::deserialize(MapAccessDeserializer::new(object)).map(Loose::Is)
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

impl<'de> Form<'de> for Meta {
    fn of_object<A: MapAccess<'de>>(object: A) -> Result<Loose<Self>, A::Error> {
        Self::deserialize(MapAccessDeserializer::new(object)).map(Loose::Is)
    }
}

impl<'de, T: Form<'de>> Deserialize<'de> for Loose<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LooseVisitor(PhantomData))
    }
}

struct LooseVisitor<T>(PhantomData<T>);

impl<'de, T: Form<'de>> Visitor<'de> for LooseVisitor<T> {
    type Value = Loose<T>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Loose::Missing)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(T::of_bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(T::of_integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(T::of_integer(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(T::of_float(value))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(T::of_text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(T::of_text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        T::of_list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        T::of_object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: for<'a> Form<'a> + PartialEq + std::fmt::Debug>(json: &str, expect: &Loose<T>) {
        assert_eq!(&serde_json::from_str::<Loose<T>>(json).unwrap(), expect, "{json}");
    }

    #[test]
    fn missing_and_malformed_values_are_distinguished() {
        check("true", &Loose::Is(true));
        check("null", &Loose::<bool>::Missing);
        check("\"true\"", &Loose::<bool>::Malformed);
        check("3", &Loose::Is(3_u32));
        check("-3", &Loose::<u32>::Malformed);
        check("3.5", &Loose::<u32>::Malformed);
        check("[{\"a\":[1]}]", &Loose::<u32>::Malformed);
        check("{\"a\":[1]}", &Loose::<u32>::Malformed);
        check(
            "[1, null, []]",
            &Loose::Is(vec![Loose::Is(1_i64), Loose::Missing, Loose::Malformed]),
        );
    }

    #[test]
    fn numbers_and_booleans_are_parsed_as_strings() {
        let json = r#"{"a":50,"b":50.0,"c":33.5,"d":true,"e":"\u0065","f":null,"g":[],"a":51}"#;
        let Loose::Is(parameters) = serde_json::from_str::<Loose<Parameters<'_>>>(json).unwrap()
        else {
            panic!("not an object");
        };
        let texts = ["b", "c", "d", "e", "a"].map(|name| parameters.find(name));
        assert_eq!(texts, ["50", "33.5", "true", "e", "51"].map(Loose::Is));
        assert_eq!(parameters.find("f"), Loose::Missing);
        assert_eq!(parameters.find("g"), Loose::Malformed);
        assert_eq!(parameters.find("absent"), Loose::Missing);
    }
}
