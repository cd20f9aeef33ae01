//! A flag's JSON, read leniently.
//!
//! Real definitions hold `null` where a list is meant, numbers where strings are meant, and now
//! and then worse. Reading never stops at such a value: each field says whether it was there and
//! whether it was of its kind ([`Loose`]). What that means for evaluation is the engine's business.

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A value that may be missing (absent or `null`) or of the wrong kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Loose<T> {
    /// Absent, or `null`.
    #[default]
    Missing,
    /// Of the expected kind.
    Is(T),
    /// Of another kind.
    Malformed,
}

impl<T> Loose<T> {
    /// The value, if it is there and of its kind.
    pub fn is(self) -> Option<T> {
        match self {
            Self::Is(value) => Some(value),
            Self::Missing | Self::Malformed => None,
        }
    }

    /// The value, or its default where it is missing; `None` if it is of the wrong kind.
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

/// Text that borrows from the document where JSON escapes allow it. Numbers and booleans read as
/// their text, because older servers and hand-written files put them where strings belong.
pub type Text<'a> = Cow<'a, str>;

/// What a flag says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition<'a> {
    /// Whether it is on in this environment; off wins over every strategy.
    #[serde(default)]
    pub enabled: Loose<bool>,
    /// Whether SDKs should report each evaluation to the application.
    #[serde(default)]
    pub impression_data: Loose<bool>,
    /// The ways to be on: the first that matches decides.
    #[serde(borrow, default)]
    pub strategies: Loose<Vec<Loose<Strategy<'a>>>>,
    /// The variants of whoever has the flag on, unless the strategy has its own.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Variant<'a>>>>,
    /// Conditions on other flags, all of which must hold.
    #[serde(borrow, default)]
    pub dependencies: Loose<Vec<Loose<Dependency<'a>>>>,
}

/// One activation strategy.
#[derive(Debug, Deserialize)]
pub struct Strategy<'a> {
    /// Which kind of strategy it is.
    #[serde(borrow, default)]
    pub name: Loose<Text<'a>>,
    /// What its author calls it; means nothing.
    #[serde(borrow, default)]
    pub title: Loose<Text<'a>>,
    /// A mark that SDKs do not read: Unleash does not send them strategies that have it.
    #[serde(default)]
    pub disabled: Loose<bool>,
    /// The settings of its kind.
    #[serde(borrow, default)]
    pub parameters: Loose<Parameters<'a>>,
    /// Conditions on the context, all of which must hold.
    #[serde(borrow, default)]
    pub constraints: Loose<Vec<Loose<Constraint<'a>>>>,
    /// Ids of segments, all of whose constraints must hold.
    #[serde(default)]
    pub segments: Loose<Vec<Loose<i64>>>,
    /// The variants of whoever this strategy admits.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Variant<'a>>>>,
}

/// A condition on one context field.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Constraint<'a> {
    /// The context field it looks at.
    #[serde(borrow, default)]
    pub context_name: Loose<Text<'a>>,
    /// How it compares, for instance `STR_CONTAINS`.
    #[serde(borrow, default)]
    pub operator: Loose<Text<'a>>,
    /// The operands of the operators on lists.
    #[serde(borrow, default)]
    pub values: Loose<Vec<Loose<Text<'a>>>>,
    /// The operand of the others.
    #[serde(borrow, default)]
    pub value: Loose<Text<'a>>,
    /// Whether the result is negated.
    #[serde(default)]
    pub inverted: Loose<bool>,
    /// Whether the string operators ignore case.
    #[serde(default)]
    pub case_insensitive: Loose<bool>,
}

/// One of the values a flag can take.
#[derive(Debug, Deserialize)]
pub struct Variant<'a> {
    /// Its name.
    #[serde(borrow, default)]
    pub name: Loose<Text<'a>>,
    /// Its share, relative to the sum over all variants.
    #[serde(default)]
    pub weight: Loose<u32>,
    /// The context field whose value keeps somebody in the same variant.
    #[serde(borrow, default)]
    pub stickiness: Loose<Text<'a>>,
    /// What it carries to the application.
    #[serde(borrow, default)]
    pub payload: Loose<Payload<'a>>,
    /// Context values that always get this variant.
    #[serde(borrow, default)]
    pub overrides: Loose<Vec<Loose<Override<'a>>>>,
}

/// What a variant carries.
#[derive(Debug, Deserialize)]
pub struct Payload<'a> {
    /// `string`, `json`, `csv` or `number`.
    #[serde(borrow, default, rename = "type")]
    pub kind: Loose<Text<'a>>,
    /// The payload, always as text.
    #[serde(borrow, default)]
    pub value: Loose<Text<'a>>,
}

/// Context values that always get a certain variant.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Override<'a> {
    /// The context field it looks at.
    #[serde(borrow, default)]
    pub context_name: Loose<Text<'a>>,
    /// The values that get the variant.
    #[serde(borrow, default)]
    pub values: Loose<Vec<Loose<Text<'a>>>>,
}

/// A condition on another flag.
#[derive(Debug, Deserialize)]
pub struct Dependency<'a> {
    /// The other flag's name.
    #[serde(borrow, default)]
    pub feature: Loose<Text<'a>>,
    /// Whether that flag has to be on (the default) or off.
    #[serde(default)]
    pub enabled: Loose<bool>,
    /// If any are named, that flag has to be on with one of these variants.
    #[serde(borrow, default)]
    pub variants: Loose<Vec<Loose<Text<'a>>>>,
}

/// What a document says of itself.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    #[serde(default)]
    pub(super) revision_id: Loose<u64>,
}

/// The parts of a segment that are read; its name means nothing.
#[derive(Deserialize)]
pub(super) struct SegmentBody<'a> {
    #[serde(borrow, default)]
    pub(super) name: Loose<Text<'a>>,
    #[serde(borrow, default)]
    pub(super) constraints: Loose<Vec<Loose<Constraint<'a>>>>,
}

/// A strategy's settings, in their order in the text.
#[derive(Debug, Default)]
pub struct Parameters<'a>(Vec<(Text<'a>, Loose<Text<'a>>)>);

impl Parameters<'static> {
    /// No settings.
    pub const NONE: &'static Self = &Self(Vec::new());
}

impl Parameters<'_> {
    /// All settings in the order of the text; a value that is no text is `None`.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.0.iter().map(|(name, value)| match value {
            Loose::Is(value) => (&**name, Some(&**value)),
            Loose::Missing | Loose::Malformed => (&**name, None),
        })
    }

    /// The setting called `name`; where it is given twice, the last.
    pub fn find(&self, name: &str) -> Loose<&str> {
        match self.0.iter().rfind(|(key, _)| key == name) {
            Some((_, Loose::Is(value))) => Loose::Is(value),
            Some((_, Loose::Malformed)) => Loose::Malformed,
            Some((_, Loose::Missing)) | None => Loose::Missing,
        }
    }
}

/// A kind of value that [`Loose`] can read: each method accepts one JSON form, by default none.
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

/// Objects read by their derived implementation, whose fields are all loose.
macro_rules! objects {
    ($($object:ty),*) => {$(
        impl<'de: 'a, 'a> Form<'de> for $object {
            fn of_object<A: MapAccess<'de>>(object: A) -> Result<Loose<Self>, A::Error> {
                Self::deserialize(MapAccessDeserializer::new(object)).map(Loose::Is)
            }
        }
    )*};
}

objects!(Strategy<'a>, Constraint<'a>, Variant<'a>, Payload<'a>, Override<'a>, Dependency<'a>);

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
    fn each_kind_says_whether_it_was_there_and_of_its_kind() {
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
    fn numbers_and_booleans_read_as_text() {
        let json = r#"{"a":50,"b":50.0,"c":33.5,"d":true,"e":"\u0065","f":null,"g":[],"a":51}"#;
        let Loose::Is(parameters) = serde_json::from_str::<Loose<Parameters<'_>>>(json).unwrap()
        else {
            panic!("an object was given");
        };
        let texts = ["b", "c", "d", "e", "a"].map(|name| parameters.find(name));
        assert_eq!(texts, ["50", "33.5", "true", "e", "51"].map(Loose::Is));
        assert_eq!(parameters.find("f"), Loose::Missing);
        assert_eq!(parameters.find("g"), Loose::Malformed);
        assert_eq!(parameters.find("absent"), Loose::Missing);
    }
}
