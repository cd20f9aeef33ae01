//! Lenient parsing of JSON documents.
//!
//! Real documents contain `null` in place of lists, numbers in place of strings, and sometimes worse.
//! Parsing never stops at such a value: each field records whether it was present and of the right type
//! ([`Lenient`]). The owner of a shape decides about the consequence. Requests whose errors are reported
//! to the client are parsed by [`admin::Field`](super::admin::Field) instead.

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

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

    /// Converts a valid value.
    pub(super) fn map<U>(self, convert: impl FnOnce(T) -> U) -> Lenient<U> {
        match self {
            Self::Missing => Lenient::Missing,
            Self::Valid(value) => Lenient::Valid(convert(value)),
            Self::Malformed => Lenient::Malformed,
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

    fn deserialize_list<A: SeqAccess<'de>>(mut list: A) -> Result<Lenient<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Lenient::Malformed)
    }

    fn deserialize_object<A: MapAccess<'de>>(mut object: A) -> Result<Lenient<Self>, A::Error> {
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
    fn deserialize_list<A: SeqAccess<'de>>(mut list: A) -> Result<Lenient<Self>, A::Error> {
        let mut items = Self::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Lenient::Valid(items))
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
        T::deserialize_list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Self::Value, A::Error> {
        T::deserialize_object(object)
    }
}

/// Deserializes a list and skips items that cannot be read. For types that are not [`Lenient`].
pub(crate) fn readable_items<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let items = Vec::<&'de RawValue>::deserialize(deserializer)?;
    Ok(items.into_iter().filter_map(|item| serde_json::from_str(item.get()).ok()).collect())
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
}
