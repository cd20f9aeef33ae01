//! The context of a frontend request, from a query or a JSON body.
//!
//! Parsing is as lenient as the servers that SDKs were written for: a value of an unusable type is
//! ignored. A body that is not a JSON object is an error. So is an oversized context, because the time
//! of an evaluation grows with it. This module adds no defaults; the caller completes the context.

use std::{borrow::Cow, iter};

use memchr::{memchr, memchr2};
use percent_encoding::percent_decode_str;
use serde::de::{IgnoredAny, MapAccess, SeqAccess};

use super::lenient::{Lenient, LenientValue, Text};

/// The context of a frontend request. Every value is a string, borrowed from the request if it needs no
/// decoding.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FrontendContext<'a> {
    /// `userId`
    pub user_id: Option<Cow<'a, str>>,
    /// `sessionId`
    pub session_id: Option<Cow<'a, str>>,
    /// `environment`, a context field like any other: it does not choose the configuration.
    pub environment: Option<Cow<'a, str>>,
    /// `appName`
    pub app_name: Option<Cow<'a, str>>,
    /// `currentTime`, RFC 3339
    pub current_time: Option<Cow<'a, str>>,
    /// `remoteAddress`
    pub remote_address: Option<Cow<'a, str>>,
    /// All other fields, by name. Names are unique.
    pub properties: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

/// The maximum number of properties of a request; further ones are ignored.
const MAX_PROPERTIES: usize = 256;

/// The maximum number of fields of a request. It is bounded because each field is searched for among the
/// previous ones.
const MAX_FIELDS: usize = 1024;

/// The maximum length of a value, in bytes.
const MAX_VALUE_BYTES: usize = 4 << 10;

/// The memory of a property besides the bytes of its name and value: the list entry, and the overhead of
/// the allocator for two short strings.
const PROPERTY_OVERHEAD: usize = size_of::<(Cow<'_, str>, Cow<'_, str>)>() + 2 * 16;

/// The maximum size of all names and values of a context, in bytes.
pub const MAX_CONTEXT_BYTES: usize = 64 << 10;

/// The error of an invalid context.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The body is not a JSON object.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// There are too many fields.
    #[error("it has more than {MAX_FIELDS} fields")]
    TooManyFields,
    /// A value is too long.
    #[error("a value is longer than {MAX_VALUE_BYTES} bytes")]
    ValueTooLong,
    /// All names and values together are too large.
    #[error("its names and values are more than {MAX_CONTEXT_BYTES} bytes")]
    TooLarge,
}

impl<'a> FrontendContext<'a> {
    /// The names of the standard fields; all others are properties.
    const STANDARD_FIELDS: [&'static str; 6] =
        ["userId", "sessionId", "environment", "appName", "currentTime", "remoteAddress"];

    /// Parses `userId=…&properties[plan]=…`. Other names are properties too.
    ///
    /// A repeated name, as in `k=a&k=b`, `k[]=a&k[]=b` or `k[0]=a&k[1]=b`, has one value, `a,b`, in the
    /// order of the query. Unleash's frontend API treats such arrays the same way (measured on 8.2.0).
    pub fn from_query(query: &'a str) -> Result<Self, Error> {
        let (mut context, mut misplaced) = (Self::default(), Misplaced::default());
        for (count, (name, value)) in query_pairs(query).enumerate() {
            if count == MAX_FIELDS {
                return Err(Error::TooManyFields);
            }
            let value = decode(value);
            if let Some(property) = plain_property_name(name) {
                context.add_property(&mut misplaced, Cow::Borrowed(property), value);
                continue;
            }
            let name = decode(name);
            if !has_bracket(&name) {
                context.add_top_level(&mut misplaced, name, value);
            } else if let Some((origin, key)) = parse_bracketed_name(&name) {
                let key = match &name {
                    Cow::Borrowed(name) => {
                        parse_bracketed_name(name).map_or_else(Cow::default, |it| it.1.into())
                    }
                    Cow::Owned(_) => Cow::Owned(key.to_owned()),
                };
                match origin {
                    Placement::TopLevel => context.add_top_level(&mut misplaced, key, value),
                    Placement::Properties => context.add_property(&mut misplaced, key, value),
                }
            }
        }
        if !misplaced.is_empty() {
            context.add_misplaced(misplaced);
        }
        context.check_size()
    }

    /// Parses an object of fields, or `{"context": fields}`. An empty body is an empty context.
    pub fn from_json(body: &'a [u8]) -> Result<Self, Error> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self::default());
        }
        let Lenient::Valid(Value::Object(mut fields)) = serde_json::from_slice(body)? else {
            let no_object = serde::de::Error::custom("the context must be a JSON object");
            return Err(Error::Json(no_object));
        };
        let is_inner = |(name, value): &(Text<'_>, _)| {
            name == "context" && matches!(value, Lenient::Valid(Value::Object(_)))
        };
        if let Some(at) = fields.iter().position(is_inner)
            && let Lenient::Valid(Value::Object(inner)) = fields.swap_remove(at).1
        {
            fields = inner;
        }
        // `properties` is processed last, so that the top level takes precedence in any order.
        fields.sort_by_key(|(name, _)| name == "properties");
        let mut context = Self::default();
        for (name, value) in fields {
            if let Lenient::Valid(value) = value {
                context.set_json(name, value);
            }
        }
        context.check_size()
    }

    /// Converts the context to one that borrows nothing and has no spare capacity.
    pub fn into_owned(self) -> FrontendContext<'static> {
        let owned = |text: Cow<'a, str>| {
            let mut text = text.into_owned();
            text.shrink_to_fit();
            Cow::Owned(text)
        };
        let properties = self.properties.into_iter();
        let mut properties: Vec<_> =
            properties.map(|(name, value)| (owned(name), owned(value))).collect();
        properties.shrink_to_fit();
        FrontendContext {
            user_id: self.user_id.map(owned),
            session_id: self.session_id.map(owned),
            environment: self.environment.map(owned),
            app_name: self.app_name.map(owned),
            current_time: self.current_time.map(owned),
            remote_address: self.remote_address.map(owned),
            properties,
        }
    }

    /// The size of all values and of the names of properties, in bytes.
    pub fn size(&self) -> usize {
        let values = self.values().map(|value| value.len());
        values.chain(self.properties.iter().map(|(name, _)| name.len())).sum()
    }

    /// The approximate heap memory of the context once it borrows nothing, in bytes.
    pub fn estimated_memory(&self) -> usize {
        self.size() + self.properties.len() * PROPERTY_OVERHEAD
    }

    /// Keeps only the fields for whose names `is_kept` is true.
    pub fn retain(&mut self, mut is_kept: impl FnMut(&str) -> bool) {
        for name in Self::STANDARD_FIELDS {
            let field = self.standard_field_mut(name);
            if let Some(field) = field.filter(|it| it.is_some())
                && !is_kept(name)
            {
                *field = None;
            }
        }
        self.properties.retain(|(name, _)| is_kept(name));
    }

    /// Encodes the context as JSON that [`FrontendContext::from_json`] parses.
    pub fn to_json(&self) -> String {
        let fields = [
            ("userId", &self.user_id),
            ("sessionId", &self.session_id),
            ("environment", &self.environment),
            ("appName", &self.app_name),
            ("currentTime", &self.current_time),
            ("remoteAddress", &self.remote_address),
        ];
        let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        let mut object: serde_json::Map<_, _> =
            fields.map(|(name, value)| (name.to_owned(), value.into())).collect();
        if !self.properties.is_empty() {
            let properties = self.properties.iter();
            let properties: serde_json::Map<_, _> =
                properties.map(|(name, value)| (name.to_string(), (&**value).into())).collect();
            object.insert("properties".to_owned(), properties.into());
        }
        serde_json::Value::Object(object).to_string()
    }

    fn check_size(self) -> Result<Self, Error> {
        if self.values().any(|value| value.len() > MAX_VALUE_BYTES) {
            return Err(Error::ValueTooLong);
        }
        if self.size() > MAX_CONTEXT_BYTES { Err(Error::TooLarge) } else { Ok(self) }
    }

    fn values(&self) -> impl Iterator<Item = &Cow<'a, str>> {
        let Self {
            user_id, session_id, environment, app_name, current_time, remote_address, ..
        } = self;
        let fields = [user_id, session_id, environment, app_name, current_time, remote_address];
        fields.into_iter().flatten().chain(self.properties.iter().map(|(_, value)| value))
    }

    fn standard_field_mut(&mut self, name: &str) -> Option<&mut Option<Cow<'a, str>>> {
        Some(match name {
            "userId" => &mut self.user_id,
            "sessionId" => &mut self.session_id,
            "environment" => &mut self.environment,
            "appName" => &mut self.app_name,
            "currentTime" => &mut self.current_time,
            "remoteAddress" => &mut self.remote_address,
            _ => return None,
        })
    }

    fn set(&mut self, name: Cow<'a, str>, value: Cow<'a, str>) {
        match self.standard_field_mut(&name) {
            Some(field) => *field = Some(value),
            None => self.set_property(name, value),
        }
    }

    /// Sets a property. A standard field among the properties is used only if the field is missing or
    /// empty at the top level.
    fn set_property(&mut self, name: Cow<'a, str>, value: Cow<'a, str>) {
        if let Some(field) = self.standard_field_mut(&name) {
            if field.as_deref().is_none_or(str::is_empty) {
                *field = Some(value);
            }
        } else if let Some((_, old)) = self.properties.iter_mut().find(|(known, _)| *known == name)
        {
            *old = value;
        } else if self.properties.len() < MAX_PROPERTIES {
            self.properties.push((name, value));
        }
    }

    fn set_json(&mut self, name: Cow<'a, str>, value: Value<'a>) {
        match value {
            Value::Scalar(value) => self.set(name, value),
            Value::Object(fields) if name == "properties" => {
                for (name, value) in fields {
                    if let Lenient::Valid(Value::Scalar(value)) = value {
                        self.set_property(name, value);
                    }
                }
            }
            Value::Object(_) => {}
        }
    }
}

/// The pairs of a query, as in a form (URL standard, 5.1). Names and values still need [`decode`].
fn query_pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = query;
    let pairs = iter::from_fn(move || {
        let (pair, next) = split_first(rest, b'&')?;
        rest = next;
        Some(pair)
    });
    pairs.filter(|pair| !pair.is_empty()).map(|pair| split_first(pair, b'=').unwrap_or_default())
}

/// Splits `text` at the first `separator`, which is ASCII. `None` if `text` is empty.
fn split_first(text: &str, separator: u8) -> Option<(&str, &str)> {
    let first = || match memchr(separator, text.as_bytes()) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, ""),
    };
    (!text.is_empty()).then(first)
}

/// The length in bytes up to which a simple loop is faster than `memchr`.
const MEMCHR_THRESHOLD: usize = 24;

/// Whether a name contains `[`. Most names are short and do not.
fn has_bracket(name: &str) -> bool {
    if name.len() <= MEMCHR_THRESHOLD {
        name.bytes().any(|byte| byte == b'[')
    } else {
        memchr(b'[', name.as_bytes()).is_some()
    }
}

/// Decodes a name or value of a form. Most need no decoding and are borrowed after one scan.
fn decode(text: &str) -> Cow<'_, str> {
    let is_plain = if text.len() <= MEMCHR_THRESHOLD {
        text.bytes().all(|byte| byte != b'%' && byte != b'+')
    } else {
        memchr2(b'%', b'+', text.as_bytes()).is_none()
    };
    if is_plain {
        return Cow::Borrowed(text);
    }
    if memchr(b'+', text.as_bytes()).is_none() {
        return percent_decode_str(text).decode_utf8_lossy();
    }
    let spaced = text.replace('+', " ");
    Cow::Owned(percent_decode_str(&spaced).decode_utf8_lossy().into_owned())
}

/// The name `k` in `properties%5Bk%5D`, which is how browsers and SDKs write `properties[k]`. `None` if
/// anything else needs decoding.
fn plain_property_name(name: &str) -> Option<&str> {
    let property = name.strip_prefix("properties%5B")?.strip_suffix("%5D")?;
    let is_plain = |byte: u8| !matches!(byte, b'%' | b'+' | b'[' | b']');
    (!property.is_empty() && property.bytes().all(is_plain)).then_some(property)
}

/// The part of a query that contains a field.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Placement {
    /// `k=`
    TopLevel,
    /// `properties[k]=`
    Properties,
}

/// Parses a name with a bracket: `properties[k]` or `k`, with an optional `[]` or index at the end.
/// `None` for a name that no flag could use, such as `properties[a][b]`.
fn parse_bracketed_name(name: &str) -> Option<(Placement, &str)> {
    let of_properties = name.strip_prefix("properties[").and_then(|rest| rest.split_once(']'));
    let (origin, key, rest) = if let Some((key, rest)) = of_properties {
        (Placement::Properties, key, rest)
    } else {
        let (key, rest) = name.split_at(name.find('[')?);
        (Placement::TopLevel, key, rest)
    };
    let is_index = |rest: &str| {
        let index = rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        index.is_some_and(|index| index.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_key =
        !key.is_empty() && !key.contains(['[', ']']) && (rest.is_empty() || is_index(rest));
    is_key.then_some((origin, key))
}

/// Fields at an unexpected place of a query. They are collected separately, because they are rare.
#[derive(Debug, Default)]
struct Misplaced<'a> {
    /// Properties at the top level.
    properties: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    /// Standard fields among the properties.
    fields: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl Misplaced<'_> {
    fn is_empty(&self) -> bool {
        self.properties.is_empty() && self.fields.is_empty()
    }
}

impl<'a> FrontendContext<'a> {
    /// Adds a field from the top level of a query.
    fn add_top_level(
        &mut self,
        misplaced: &mut Misplaced<'a>,
        name: Cow<'a, str>,
        value: Cow<'a, str>,
    ) {
        match self.standard_field_mut(&name) {
            Some(field @ None) => *field = Some(value),
            Some(Some(values)) => append_value(values, &value),
            None => insert_or_append(&mut misplaced.properties, name, value),
        }
    }

    /// Adds a field from the properties of a query.
    fn add_property(
        &mut self,
        misplaced: &mut Misplaced<'a>,
        name: Cow<'a, str>,
        value: Cow<'a, str>,
    ) {
        if self.standard_field_mut(&name).is_some() {
            insert_or_append(&mut misplaced.fields, name, value);
        } else {
            insert_or_append(&mut self.properties, name, value);
        }
    }

    /// Adds misplaced fields. If a property is in both places, the value among the properties is used. A
    /// standard field among the properties is used only if it is missing or empty at the top level.
    #[cold]
    fn add_misplaced(&mut self, Misplaced { properties, fields }: Misplaced<'a>) {
        for (name, value) in properties {
            let is_new = self.properties.iter().all(|(known, _)| *known != name);
            if is_new && self.properties.len() < MAX_PROPERTIES {
                self.properties.push((name, value));
            }
        }
        for (name, value) in fields {
            self.set_property(name, value);
        }
    }
}

/// Adds a field, or appends the value to that of an existing one.
fn insert_or_append<'a>(
    list: &mut Vec<(Cow<'a, str>, Cow<'a, str>)>,
    name: Cow<'a, str>,
    value: Cow<'a, str>,
) {
    if let Some((_, values)) = list.iter_mut().find(|(known, _)| *known == name) {
        append_value(values, &value);
    } else if list.len() < MAX_PROPERTIES {
        list.push((name, value));
    }
}

#[cold]
fn append_value(values: &mut Cow<'_, str>, value: &str) {
    let values = values.to_mut();
    values.push(',');
    values.push_str(value);
}

/// A JSON value, reduced to the forms that a context can use.
enum Value<'a> {
    Scalar(Text<'a>),
    Object(Vec<(Text<'a>, Lenient<Self>)>),
}

impl<'de: 'a, 'a> LenientValue<'de> for Value<'a> {
    fn from_bool(value: bool) -> Lenient<Self> {
        Text::from_bool(value).map(Self::Scalar)
    }

    fn from_integer(value: i128) -> Lenient<Self> {
        Text::from_integer(value).map(Self::Scalar)
    }

    fn from_float(value: f64) -> Lenient<Self> {
        Text::from_float(value).map(Self::Scalar)
    }

    fn from_text(value: Text<'de>) -> Lenient<Self> {
        Lenient::Valid(Self::Scalar(value))
    }

    /// As in a query: JavaScript's conversion of an array to a string.
    fn deserialize_list<A: SeqAccess<'de>>(mut list: A) -> Result<Lenient<Self>, A::Error> {
        let mut joined = String::new();
        let mut is_first = true;
        while let Some(item) = list.next_element()? {
            let Lenient::Valid(Self::Scalar(item)) = item else {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(Lenient::Malformed);
            };
            if !std::mem::take(&mut is_first) {
                joined.push(',');
            }
            joined.push_str(&item);
        }
        Ok(Lenient::Valid(Self::Scalar(joined.into())))
    }

    fn deserialize_object<A: MapAccess<'de>>(mut object: A) -> Result<Lenient<Self>, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = object.next_key::<Lenient<Text<'_>>>()? {
            if fields.len() == MAX_FIELDS {
                return Err(serde::de::Error::custom(Error::TooManyFields));
            }
            fields.push((name.valid().unwrap_or_default(), object.next_value()?));
        }
        Ok(Lenient::Valid(Self::Object(fields)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn encoded_context_is_parsed_unchanged(
            user in proptest::option::of(".{0,9}"),
            address in proptest::option::of("[0-9.]{0,9}"),
            properties in proptest::collection::btree_map("[a-z\"é]{1,3}|context|properties", ".{0,5}", 0..5),
        ) {
            let context = FrontendContext {
                user_id: user.map(Cow::Owned),
                remote_address: address.map(Cow::Owned),
                properties: properties.into_iter().map(|(a, b)| (a.into(), b.into())).collect(),
                ..FrontendContext::default()
            };
            let text = context.to_json();
            let mut read = FrontendContext::from_json(text.as_bytes()).unwrap();
            read.properties.sort();
            prop_assert_eq!(read, context);
        }

        #[test]
        fn query_is_decoded_like_a_form(query in "[ab%+&=0-9A-Fé]{0,40}") {
            let pairs = query_pairs(&query).map(|(name, value)| (decode(name), decode(value)));
            let ours: Vec<_> = pairs.collect();
            let standard: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
            prop_assert_eq!(ours, standard);
        }
    }

    #[test]
    fn plain_property_name_is_parsed_like_any_other() {
        for (plain, other) in [
            ("properties%5Bplan%5D=x", "properties[plan]=x"),
            ("properties%5Bé%5D=x+y", "properties%5b%C3%A9%5D=x%20y"),
            ("properties%5B%5D=x", "properties[]=x"),
            ("properties%5Ba%5D%5Bb%5D=x", "properties[a][b]=x"),
            ("properties%5BuserId%5D=7", "properties[userId]=7"),
        ] {
            let read = |query| FrontendContext::from_query(query).unwrap();
            assert_eq!(read(plain), read(other), "{plain}");
        }
    }

    fn expected_context() -> FrontendContext<'static> {
        FrontendContext {
            user_id: Some("7".into()),
            app_name: Some("shop".into()),
            properties: vec![("plan".into(), "gold & co".into())],
            ..FrontendContext::default()
        }
    }

    #[test]
    fn query_and_both_forms_of_body_are_equivalent() {
        let query = "userId=7&appName=shop&properties[plan]=gold+%26%20co";
        assert_eq!(FrontendContext::from_query(query).unwrap(), expected_context());
        let escaped = "userId=7&appName=shop&properties%5Bplan%5D=gold%20%26%20co";
        assert_eq!(FrontendContext::from_query(escaped).unwrap(), expected_context());
        let fields = r#"{"userId": 7, "appName": "shop", "properties": {"plan": "gold & co"}}"#;
        for body in [fields.to_owned(), format!(r#"{{"context": {fields}, "toggles": []}}"#)] {
            assert_eq!(
                FrontendContext::from_json(body.as_bytes()).unwrap(),
                expected_context(),
                "{body}"
            );
        }
    }

    #[track_caller]
    fn check(body: &str, expect: &FrontendContext<'_>) {
        assert_eq!(&FrontendContext::from_json(body.as_bytes()).unwrap(), expect, "{body}");
    }

    #[test]
    fn unknown_names_are_properties_and_unusable_values_are_ignored() {
        check(r#"{"userId":"7","appName":"shop","plan":"gold & co"}"#, &expected_context());
        check(
            r#"{"userId":"7","appName":"shop","plan":"gold \u0026 co","x":null,"y":[{}],"z":{"a":1}}"#,
            &expected_context(),
        );
        check("", &FrontendContext::default());
        check("{}", &FrontendContext::default());
        check(r#"{"context":{}}"#, &FrontendContext::default());
    }

    #[test]
    fn standard_field_among_properties_only_replaces_missing_one() {
        let check = |body: &str, user: &str| {
            let context = FrontendContext::from_json(body.as_bytes()).unwrap();
            assert_eq!(context.user_id.as_deref(), Some(user), "{body}");
            assert_eq!(context.properties, []);
        };
        check(r#"{"properties":{"userId":"inner"}}"#, "inner");
        check(r#"{"properties":{"userId":"inner"},"userId":"outer"}"#, "outer");
        check(r#"{"userId":"","properties":{"userId":"inner"}}"#, "inner");
    }

    /// The frontend API of Unleash 8.2.0 treats these queries the same way, measured by flags with
    /// constraints on each field (`tests/it/frontend_context.rs`).
    #[test]
    fn repeated_and_array_like_names_in_query_have_one_value() {
        #[track_caller]
        fn check(query: &str, expect: &[(&str, &str)]) {
            let mut context = FrontendContext::from_query(query).unwrap();
            let mut fields = std::mem::take(&mut context.properties);
            for name in ["userId", "sessionId", "appName"] {
                let field = context.standard_field_mut(name).unwrap();
                fields.extend(field.take().map(|value| (name.into(), value)));
            }
            assert_eq!(context, FrontendContext::default(), "{query}");
            let fields: Vec<_> = fields.iter().map(|(name, value)| (&**name, &**value)).collect();
            assert_eq!(fields, expect, "{query}");
        }
        check("properties[k]=A&properties[k]=B&properties%5Bk%5D=C", &[("k", "A,B,C")]);
        check("properties[k][]=A&properties[k][]=B", &[("k", "A,B")]);
        check("properties[k][0]=A&properties[k][1]=B", &[("k", "A,B")]);
        check("properties[k][]=A", &[("k", "A")]);
        check("k=A&k=A&other[]=B", &[("k", "A,A"), ("other", "B")]);
        check("userId=1&userId=2&sessionId[]=A", &[("userId", "1,2"), ("sessionId", "A")]);
        check("userId=&userId=A&appName=a&appName=b", &[("userId", ",A"), ("appName", "a,b")]);
        check("properties[userId]=A&properties[userId]=B", &[("userId", "A,B")]);
        check("properties[userId]=A&userId=B&userId=C", &[("userId", "B,C")]);
        check("userId=B&properties[userId]=A&userId=C", &[("userId", "B,C")]);
        check("userId=&properties[userId]=A", &[("userId", "A")]);
        check("k=A&properties[k]=B&k=C", &[("k", "B")]);
        check("properties[k]=B&k=A&properties[k]=D", &[("k", "B,D")]);
        check("properties[k][x]=A&userId[x]=A&k[=A&[]=A&k]=A", &[("k]", "A")]);
    }

    #[test]
    fn arrays_of_scalars_in_body_are_joined_as_in_query() {
        fn read(body: &str) -> FrontendContext<'_> {
            FrontendContext::from_json(body.as_bytes()).unwrap()
        }
        let context = read(r#"{"userId":["A","B"],"k":[1,true,"x"],"properties":{"p":["A"]}}"#);
        assert_eq!(context.user_id.as_deref(), Some("A,B"));
        let properties: Vec<_> = context.properties.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(properties, [("k", "1,true,x"), ("p", "A")]);
        for body in [r#"{"k":[{"a":1},"A"]}"#, r#"{"k":["A",null]}"#] {
            assert_eq!(read(body), FrontendContext::default(), "{body}");
        }
    }

    #[test]
    fn body_that_is_not_an_object_is_rejected() {
        for body in ["[]", "3", "{", "\"text\"", "nul"] {
            assert!(FrontendContext::from_json(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn number_of_properties_is_bounded() {
        let query: Vec<_> = (0..1000).map(|i| format!("p{i}=x")).collect();
        let query = query.join("&");
        let context = FrontendContext::from_query(&query).unwrap();
        assert_eq!(context.properties.len(), MAX_PROPERTIES);
    }

    #[test]
    fn number_of_fields_is_bounded() {
        let check = |count: usize, is_read: bool| {
            let query = vec!["plan=g"; count].join("&");
            let fields = format!("{{{}}}", vec![r#""plan":"g""#; count].join(","));
            let inner = format!(r#"{{"properties":{fields}}}"#);
            let [fields, inner] =
                [&fields, &inner].map(|it| FrontendContext::from_json(it.as_bytes()));
            for read in [FrontendContext::from_query(&query), fields, inner] {
                let result = read.map_err(|error| error.to_string());
                match result {
                    Ok(context) => assert!(is_read, "{context:?}"),
                    Err(error) => {
                        assert!(!is_read && error.starts_with("it has more than 1024 fields"));
                    }
                }
            }
        };
        check(MAX_FIELDS, true);
        check(MAX_FIELDS + 1, false);
    }

    #[test]
    fn size_of_values_and_of_context_is_bounded() {
        let check = |properties: &[usize], user: usize, expect: Option<&str>| {
            let properties: serde_json::Map<_, _> = (0..)
                .zip(properties)
                .map(|(n, len)| (format!("p{n:03}"), "x".repeat(*len).into()))
                .collect();
            let body = serde_json::json!({"userId": "x".repeat(user), "properties": properties});
            let body = body.to_string();
            let error = FrontendContext::from_json(body.as_bytes()).err();
            assert_eq!(error.map(|it| it.to_string()).as_deref(), expect);
        };
        check(&[MAX_VALUE_BYTES], MAX_VALUE_BYTES, None);
        check(&[], MAX_VALUE_BYTES + 1, Some("a value is longer than 4096 bytes"));
        check(&[MAX_VALUE_BYTES + 1], 0, Some("a value is longer than 4096 bytes"));
        let many = [MAX_VALUE_BYTES - 4; 16];
        check(&many, 0, None);
        check(&many, 1, Some("its names and values are more than 65536 bytes"));
        let long = format!("plan={}", "x".repeat(MAX_VALUE_BYTES + 1));
        assert!(FrontendContext::from_query(&long).is_err());
    }
}
