//! The context of an evaluation, and its binding to the schema of an engine.
//!
//! Compilation interns every context field that a flag reads and every text that a flag compares for
//! equality. Reading a context looks up its fields once. Binding also parses numbers, versions and
//! addresses once, so that evaluating thousands of flags only indexes and compares integers.

use std::collections::HashMap;
use std::net::IpAddr;

use foldhash::fast::RandomState;
use jiff::Timestamp;
use semver::Version;
use smallvec::SmallVec;

use super::date;
use super::parse;

/// The user and application to evaluate for, with the time and the random seed of the evaluation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// `userId`.
    pub user_id: Option<&'a str>,
    /// `sessionId`.
    pub session_id: Option<&'a str>,
    /// Whether `session_id` was generated for this evaluation because the request has none. Outcomes
    /// that depend on it are valid for this evaluation only.
    pub session_is_generated: bool,
    /// `environment`.
    pub environment: Option<&'a str>,
    /// `appName`.
    pub app_name: Option<&'a str>,
    /// `currentTime`, in any format that JavaScript parses; `now` if it is missing.
    pub current_time: Option<&'a str>,
    /// `remoteAddress`.
    pub remote_address: Option<&'a str>,
    /// All other fields by name. A property with the name of a field above is used if that field is
    /// missing. Of several with the same name the last is used.
    pub properties: &'a [(&'a str, &'a str)],
    /// The name of the host that evaluates, for the strategy `applicationHostname`.
    pub hostname: Option<&'a str>,
    /// The time of the evaluation.
    pub now: Timestamp,
    /// A fresh random number, from which all random draws of the evaluation are derived.
    pub random_seed: u64,
}

/// A context field that some flag of an engine may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FieldId(u32);

impl FieldId {
    /// `userId`.
    pub const USER_ID: Self = Self(0);
    /// `sessionId`.
    pub const SESSION_ID: Self = Self(1);
    /// `environment`.
    pub const ENVIRONMENT: Self = Self(2);
    /// `appName`.
    pub const APP_NAME: Self = Self(3);
    /// `currentTime`.
    pub const CURRENT_TIME: Self = Self(4);
    /// `remoteAddress`.
    pub const REMOTE_ADDRESS: Self = Self(5);

    /// The name of [`FieldId::SESSION_ID`] in flags and contexts.
    pub(super) const SESSION_ID_NAME: &str = Self::BUILT_IN_NAMES[Self::SESSION_ID.0 as usize];

    /// The fields that every engine has, in the order of their ids.
    const BUILT_IN_NAMES: [&'static str; 6] =
        ["userId", "sessionId", "environment", "appName", "currentTime", "remoteAddress"];

    /// The field's index into [`ContextSchema::names`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The index of a field's value that is parsed as a number, version or address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ParsedSlot(u32);

/// A text that flags compare for equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct InternedString(u32);

/// Everything that the flags of one engine read from contexts.
#[derive(Debug, Clone)]
pub struct ContextSchema {
    names: Vec<Box<str>>,
    // Not keyed against collisions: clients only look up, all entries come from flags.
    by_name: HashMap<Box<str>, FieldId, RandomState>,
    strings: HashMap<Box<str>, InternedString, RandomState>,
    number_fields: Vec<FieldId>,
    version_fields: Vec<FieldId>,
    address_fields: Vec<FieldId>,
}

impl ContextSchema {
    pub(super) fn new() -> Self {
        let mut schema = Self {
            names: Vec::new(),
            by_name: HashMap::default(),
            strings: HashMap::default(),
            number_fields: Vec::new(),
            version_fields: Vec::new(),
            address_fields: Vec::new(),
        };
        for name in FieldId::BUILT_IN_NAMES {
            schema.intern_field(name);
        }
        schema
    }

    /// The number of fields, interned strings and parsed values.
    pub(super) fn len(&self) -> usize {
        let parsed =
            self.number_fields.len() + self.version_fields.len() + self.address_fields.len();
        self.names.len() + self.strings.len() + parsed
    }

    /// The names of all fields; a field's id is its index.
    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    pub(super) fn intern_field(&mut self, name: &str) -> FieldId {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let id = FieldId(next_index(self.names.len()));
        self.names.push(name.into());
        self.by_name.insert(name.into(), id);
        id
    }

    pub(super) fn intern_string(&mut self, text: &str) -> InternedString {
        if let Some(&symbol) = self.strings.get(text) {
            return symbol;
        }
        let symbol = InternedString(next_index(self.strings.len()));
        self.strings.insert(text.into(), symbol);
        symbol
    }

    pub(super) fn number_slot(&mut self, field: FieldId) -> ParsedSlot {
        slot_for(&mut self.number_fields, field)
    }

    pub(super) fn version_slot(&mut self, field: FieldId) -> ParsedSlot {
        slot_for(&mut self.version_fields, field)
    }

    pub(super) fn address_slot(&mut self, field: FieldId) -> ParsedSlot {
        slot_for(&mut self.address_fields, field)
    }

    /// The index of this text among the interned strings, if a flag uses it.
    pub(super) fn string_index(&self, text: &str) -> Option<usize> {
        self.strings.get(text).map(|symbol| symbol.0 as usize)
    }

    pub(super) fn read<'a>(&self, context: &Context<'a>) -> ContextValues<'a> {
        let mut texts = SmallVec::from_elem(None, self.names.len());
        for &(name, value) in context.properties {
            if let Some(id) = self.by_name.get(name) {
                texts[id.index()] = Some(value);
            }
        }
        let built_in = [
            context.user_id,
            context.session_id,
            context.environment,
            context.app_name,
            context.current_time,
            context.remote_address,
        ];
        for (text, value) in texts.iter_mut().zip(built_in) {
            *text = value.or(*text);
        }
        ContextValues {
            texts,
            session_is_generated: context.session_is_generated,
            now: context.now,
            hostname: context.hostname,
            random_seed: context.random_seed,
        }
    }

    pub(super) fn bind<'a>(&self, values: ContextValues<'a>) -> BoundContext<'a> {
        let text = |field: &FieldId| values.text(*field);
        let symbol = |&text| self.strings.get(text?).copied();
        let number = |field| text(field).and_then(parse::number).unwrap_or(f64::NAN);
        let address = |field| text(field)?.parse().ok();
        BoundContext {
            interned: values.texts.iter().map(symbol).collect(),
            numbers: self.number_fields.iter().map(number).collect(),
            versions: self
                .version_fields
                .iter()
                .map(|field| parse::version(text(field)?))
                .collect(),
            addresses: self.address_fields.iter().map(address).collect(),
            evaluation_time: values.evaluation_time(),
            values,
        }
    }
}

fn next_index(len: usize) -> u32 {
    u32::try_from(len).expect("a document has fewer than 2^32 texts")
}

fn slot_for(slots: &mut Vec<FieldId>, field: FieldId) -> ParsedSlot {
    let index = slots.iter().position(|&slot| slot == field).unwrap_or_else(|| {
        slots.push(field);
        slots.len() - 1
    });
    ParsedSlot(next_index(index))
}

/// The values of the context fields that one engine reads.
#[derive(Debug, Clone)]
pub struct ContextValues<'a> {
    texts: SmallVec<[Option<&'a str>; 16]>,
    session_is_generated: bool,
    now: Timestamp,
    hostname: Option<&'a str>,
    random_seed: u64,
}

impl<'a> ContextValues<'a> {
    /// The value of a field.
    pub fn text(&self, field: FieldId) -> Option<&'a str> {
        self.texts[field.index()]
    }

    /// Whether the value of a field was generated for this evaluation.
    pub(super) fn is_generated(&self, field: FieldId) -> bool {
        self.session_is_generated && field == FieldId::SESSION_ID
    }

    /// Whether the field is missing or empty.
    pub(super) fn is_missing_or_empty(&self, field: FieldId) -> bool {
        self.text(field).is_none_or(str::is_empty)
    }

    /// The `currentTime` of the context, else the time of the evaluation; `None` if `currentTime` is
    /// invalid.
    pub(super) fn evaluation_time(&self) -> Option<Timestamp> {
        match self.text(FieldId::CURRENT_TIME) {
            None | Some("") => Some(self.now),
            Some(time) => date::parse(time),
        }
    }
}

/// A context that is bound to one engine. Only that engine can evaluate it.
#[derive(Debug, Clone)]
pub struct BoundContext<'a> {
    values: ContextValues<'a>,
    interned: SmallVec<[Option<InternedString>; 16]>,
    numbers: Vec<f64>,
    versions: Vec<Option<Version>>,
    addresses: Vec<Option<IpAddr>>,
    evaluation_time: Option<Timestamp>,
}

impl<'a> BoundContext<'a> {
    /// The value of a field.
    pub fn text(&self, field: FieldId) -> Option<&'a str> {
        self.values.text(field)
    }

    /// The values before parsing.
    pub fn values(&self) -> &ContextValues<'a> {
        &self.values
    }

    pub(super) fn interned(&self, field: FieldId) -> Option<InternedString> {
        self.interned[field.index()]
    }

    /// NaN if the field is missing or not a number.
    pub(super) fn number(&self, slot: ParsedSlot) -> f64 {
        self.numbers[slot.0 as usize]
    }

    pub(super) fn version(&self, slot: ParsedSlot) -> Option<&Version> {
        self.versions[slot.0 as usize].as_ref()
    }

    pub(super) fn address(&self, slot: ParsedSlot) -> Option<IpAddr> {
        self.addresses[slot.0 as usize]
    }

    pub(super) fn evaluation_time(&self) -> Option<Timestamp> {
        self.evaluation_time
    }

    pub(super) fn hostname(&self) -> Option<&'a str> {
        self.values.hostname
    }

    pub(super) fn random_seed(&self) -> u64 {
        self.values.random_seed
    }
}

/// A set of texts to compare a field with.
#[derive(Debug, Clone)]
pub(super) struct StringSet(Box<[InternedString]>);

impl StringSet {
    /// Up to this length a linear search is faster than a binary one.
    const MAX_LINEAR_SEARCH: usize = 16;

    pub(super) fn new<'t>(
        schema: &mut ContextSchema,
        texts: impl Iterator<Item = &'t str>,
    ) -> Self {
        let mut symbols: Vec<InternedString> =
            texts.map(|text| schema.intern_string(text)).collect();
        symbols.sort_unstable();
        symbols.dedup();
        Self(symbols.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, symbol: Option<InternedString>) -> bool {
        let Some(symbol) = symbol else { return false };
        if self.0.len() <= Self::MAX_LINEAR_SEARCH {
            self.0.contains(&symbol)
        } else {
            self.0.binary_search(&symbol).is_ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_field_takes_precedence_over_a_property_of_the_same_name() {
        let mut schema = ContextSchema::new();
        let plan = schema.intern_field("plan");
        let context = Context {
            user_id: Some("7"),
            properties: &[
                ("userId", "8"),
                ("plan", "old"),
                ("appName", "web"),
                ("plan", "new"),
                ("x", "y"),
            ],
            ..Context::default()
        };
        let bound = schema.bind(schema.read(&context));
        assert_eq!(bound.text(FieldId::USER_ID), Some("7"));
        assert_eq!(bound.text(FieldId::APP_NAME), Some("web"));
        assert_eq!(bound.text(FieldId::SESSION_ID), None);
        assert_eq!(bound.text(plan), Some("new"));
    }

    #[test]
    fn sets_of_any_size_find_their_members() {
        for size in [0, 1, 15, 16, 17, 500] {
            let mut schema = ContextSchema::new();
            let members: Vec<String> = (0..size).map(|n| n.to_string()).collect();
            let set = StringSet::new(&mut schema, members.iter().map(String::as_str));
            for n in [0, 7, 16, 499, 500] {
                let id = n.to_string();
                let bound =
                    schema.bind(schema.read(&Context { user_id: Some(&id), ..Context::default() }));
                assert_eq!(
                    set.contains(bound.interned(FieldId::USER_ID)),
                    n < size,
                    "{n} of {size}"
                );
            }
        }
    }
}
