//! Prepared JSON of each flag for frontend responses: one text per outcome, written when a snapshot is
//! built.
//!
//! All texts are in one string, so that writing a response reads contiguous memory. This module does not
//! write OFREP responses; it only stores the hashes of each outcome in that format.

use std::sync::OnceLock;

use itertools::{
    EitherOrBoth::{Both, Left, Right},
    Itertools as _,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::engine::{Engine, Flag, FlagId, Outcome, Variant};

/// A flag's JSON for one outcome, as an item of `toggles`.
#[derive(Clone, Copy, Debug)]
pub struct Fragment<'a> {
    json_with_comma: &'a str,
    hash: u64,
}

impl<'a> Fragment<'a> {
    /// The text.
    pub fn json(self) -> &'a str {
        self.json_with_comma.strip_suffix(',').unwrap_or(self.json_with_comma)
    }

    /// The text, followed by a comma.
    pub fn json_with_comma(self) -> &'a str {
        self.json_with_comma
    }

    /// A hash of the text: equal texts have equal hashes on every instance.
    pub fn hash(self) -> u64 {
        self.hash
    }
}

/// The index of a fragment among those of its engine.
#[derive(Clone, Copy, Debug)]
pub struct FragmentId(usize);

/// The fragments of every flag of an engine.
#[derive(Debug)]
pub struct Fragments {
    text: String,
    /// The end of each fragment in the text, with its hash.
    ends: Vec<(usize, u64)>,
    /// The index of each flag's first fragment; the others follow by the outcome's ordinal.
    first_of_flag: Vec<usize>,
    ofrep_hashes: OnceLock<Box<[u64]>>,
}

/// For each fragment, a hash of its outcome in OFREP's format.
#[derive(Clone, Copy, Debug)]
pub struct OfrepHashes<'a>(&'a [u64]);

impl OfrepHashes<'_> {
    /// The hash of one fragment's outcome.
    pub fn hash(self, id: FragmentId) -> u64 {
        self.0[id.0]
    }
}

impl Fragments {
    /// Writes the fragments of every flag. Copies those of flags that the engine has reused from an
    /// earlier one.
    pub fn build(engine: &Engine, earlier: Option<(&Engine, &Self)>) -> Self {
        let mut fragments = Self {
            text: String::with_capacity(earlier.map_or(0, |(_, it)| it.text.len())),
            ends: Vec::with_capacity(2 * engine.flags().len()),
            first_of_flag: Vec::with_capacity(engine.flags().len()),
            ofrep_hashes: OnceLock::new(),
        };
        let before = earlier.map_or_else(Default::default, |(engine, _)| engine.flags());
        let before = before.iter().enumerate();
        for pair in before.merge_join_by(engine.flags(), |(_, a), b| a.name().cmp(b.name())) {
            match (pair, earlier) {
                (Both((at, old), flag), Some((_, written))) if old.is_same_instance(flag) => {
                    fragments.copy_flag(flag, written, at);
                }
                (Both(_, flag) | Right(flag), _) => fragments.write_flag(flag),
                (Left(_), _) => {}
            }
        }
        fragments.text.shrink_to_fit();
        fragments
    }

    /// Copies the fragments of a flag from `written`, where the flag has the index `at`.
    fn copy_flag(&mut self, flag: &Flag, written: &Self, at: usize) {
        let first = written.first_of_flag[at];
        let start = written.start(first);
        let ends = &written.ends[first..first + flag.outcome_count()];
        let moved = self.text.len();
        self.first_of_flag.push(self.ends.len());
        self.ends.extend(ends.iter().map(|&(end, hash)| (end - start + moved, hash)));
        let end = ends.last().map_or(start, |&(end, _)| end);
        self.text.push_str(&written.text[start..end]);
    }

    /// The start of a fragment in the text.
    fn start(&self, place: usize) -> usize {
        place.checked_sub(1).map_or(0, |before| self.ends[before].0)
    }

    /// The id of a flag's fragment for an outcome. The flag belongs to the same engine.
    pub fn id(&self, flag: FlagId, outcome: Outcome) -> FragmentId {
        FragmentId(self.first_of_flag[flag.index()] + outcome.ordinal())
    }

    /// The index of the flag that a fragment belongs to.
    pub fn flag_index(&self, id: FragmentId) -> usize {
        self.first_of_flag.partition_point(|&first| first <= id.0) - 1
    }

    /// The fragment with this id.
    pub fn get(&self, id: FragmentId) -> Fragment<'_> {
        let start = self.start(id.0);
        let (end, hash) = self.ends[id.0];
        Fragment { json_with_comma: &self.text[start..end], hash }
    }

    /// The hashes of every outcome of every flag in OFREP's format, computed by `hash` on first use.
    /// `engine` is the one that these fragments were built from.
    pub fn ofrep_hashes(
        &self,
        engine: &Engine,
        hash: impl Fn(FlagId, Outcome) -> u64,
    ) -> OfrepHashes<'_> {
        let hashes = || {
            let mut hashes = Vec::with_capacity(self.ends.len());
            for id in engine.ids() {
                hashes.extend(engine.flag(id).possible_outcomes().map(|outcome| hash(id, outcome)));
            }
            hashes.into_boxed_slice()
        };
        OfrepHashes(self.ofrep_hashes.get_or_init(hashes))
    }

    /// One fragment per outcome, in the order of [`Outcome::ordinal`].
    fn write_flag(&mut self, flag: &Flag) {
        self.first_of_flag.push(self.ends.len());
        let name = json_string(flag.name());
        let impressions = bool_json(flag.impression_data());
        self.write_fragment(&name, impressions, false, r#"{"name":"disabled","enabled":false"#);
        self.write_fragment(&name, impressions, true, r#"{"name":"disabled","enabled":false"#);
        for variant in flag.variants() {
            self.write_fragment(&name, impressions, true, &variant_prefix(variant));
        }
    }

    /// Appends the fragment of one outcome; `variant` is the result of [`variant_prefix`].
    ///
    /// Writes fields in snake case and in camel case where they differ. Unleash sends both for a variant
    /// and camel case for the flag; older edges sent snake case as well.
    fn write_fragment(&mut self, name: &str, impressions: &str, on: bool, variant: &str) {
        let start = self.text.len();
        let on = bool_json(on);
        self.text.extend([
            r#"{"name":"#,
            name,
            r#","enabled":"#,
            on,
            r#","variant":"#,
            variant,
            r#","feature_enabled":"#,
            on,
            r#","featureEnabled":"#,
            on,
            r#"},"impression_data":"#,
            impressions,
            r#","impressionData":"#,
            impressions,
            "}",
        ]);
        let hash = xxh3_64(&self.text.as_bytes()[start..]);
        self.text.push(',');
        self.ends.push((self.text.len(), hash));
    }
}

/// The JSON of a variant up to the fields that depend on its flag.
fn variant_prefix(variant: &Variant) -> String {
    let mut text = format!(r#"{{"name":{}"#, json_string(&variant.name));
    if let Some(payload) = &variant.payload {
        let (kind, value) = (json_string(&payload.kind), json_string(&payload.value));
        text.extend([r#","payload":{"type":"#, &kind, r#","value":"#, &value, "}"]);
    }
    text.push_str(r#","enabled":true"#);
    text
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("writing text to memory cannot fail")
}

fn bool_json(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::protocol::features::Document;

    #[test]
    fn each_outcome_has_its_json() {
        let payload = json!({ "type": "json", "value": "{\"a\":\"\u{1}é\"}" });
        let variants = json!([
            { "name": "x \"y\"", "weight": 1, "payload": payload },
            { "name": "z", "weight": 1 },
        ]);
        let strategies = json!([{ "name": "default" }]);
        let features = json!([
            { "name": "a\\b", "enabled": true, "impressionData": true, "strategies": strategies,
              "variants": variants },
            { "name": "c", "enabled": false, "strategies": strategies },
        ]);
        let text = json!({ "features": features }).to_string();
        let (engine, _) = Engine::compile(&Document::parse(text.as_bytes()).unwrap());
        let fragments = Fragments::build(&engine, None);
        let check = |flag: &str, outcome: Outcome, expect: &Value| {
            let id = fragments.id(engine.find(flag).unwrap(), outcome);
            let fragment = fragments.get(id);
            assert_eq!(serde_json::from_str::<Value>(fragment.json()).unwrap(), *expect);
            assert_eq!(fragment.hash(), xxh3_64(fragment.json().as_bytes()));
            assert_eq!(fragment.json_with_comma(), format!("{},", fragment.json()));
        };
        let toggle = |name: &str, on: bool, impressions: bool, mut variant: Value| {
            variant["feature_enabled"] = on.into();
            variant["featureEnabled"] = on.into();
            json!({
                "name": name, "enabled": on, "variant": variant,
                "impression_data": impressions, "impressionData": impressions,
            })
        };
        let none = json!({ "name": "disabled", "enabled": false });
        let x = json!({ "name": "x \"y\"", "enabled": true, "payload": payload });
        let z = json!({ "name": "z", "enabled": true });
        check("a\\b", Outcome::Off, &toggle("a\\b", false, true, none.clone()));
        check("a\\b", Outcome::On, &toggle("a\\b", true, true, none.clone()));
        check("a\\b", Outcome::Variant(0), &toggle("a\\b", true, true, x));
        check("a\\b", Outcome::Variant(1), &toggle("a\\b", true, true, z));
        check("c", Outcome::Off, &toggle("c", false, false, none.clone()));
        check("c", Outcome::On, &toggle("c", true, false, none));
    }

    #[test]
    fn fragments_of_reused_flags_are_copied() {
        let flag = |name: &str, variant: &str| {
            json!({ "name": name, "enabled": true, "strategies": [{ "name": "default" }],
                "variants": [{ "name": variant, "weight": 1 }] })
        };
        let document = |flags: &[Value], before: &Document| {
            let text = json!({ "features": flags }).to_string();
            Document::parse(text.as_bytes()).unwrap().reuse_unchanged(before)
        };
        let before = document(
            &[flag("a", "1"), flag("b", "1"), flag("c", "1"), flag("e", "1")],
            &Document::default(),
        );
        let (old, problems) = Engine::compile(&before);
        let written = Fragments::build(&old, None);
        let mut marked = Fragments::build(&old, None);
        marked.text = marked.text.replace("impression_data", "imprEssion_data");
        let after =
            document(&[flag("b", "1"), flag("c", "2"), flag("d", "1"), flag("e", "1")], &before);
        let (new, _) = old.recompile(&before, &problems, &after);
        let expect = Fragments::build(&new, None);
        let copied = Fragments::build(&new, Some((&old, &written)));
        assert_eq!(copied.text, expect.text);
        assert_eq!((copied.ends, copied.first_of_flag), (expect.ends, expect.first_of_flag));
        let marked = Fragments::build(&new, Some((&old, &marked)));
        assert_eq!(marked.text.matches("imprEssion_data").count(), 2 * 3, "b and e");
    }
}
