//! Ready-made JSON of each flag for frontends: one text per outcome, written when a snapshot is
//! built.

use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use crate::engine::{Engine, Flag, FlagId, Outcome, Variant};

/// A flag's JSON for one outcome, as an item of `toggles`.
#[derive(Debug)]
pub struct Fragment {
    json: Box<str>,
    hash: u64,
}

impl Fragment {
    /// The text.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// A hash of the text: equal texts have equal hashes on every instance.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    fn new(flag: &Flag, enabled: bool, variant: &serde_json::Value) -> Self {
        // Both spellings: Unleash sends the second, older edges sent the first as well.
        let json = json!({
            "name": &**flag.name(),
            "enabled": enabled,
            "variant": variant,
            "impression_data": flag.impression_data(),
            "impressionData": flag.impression_data(),
        });
        let json = json.to_string().into_boxed_str();
        Self { hash: xxh3_64(json.as_bytes()), json }
    }
}

/// The fragments of every flag of an engine, by the flag's index and the outcome's ordinal.
#[derive(Debug)]
pub struct Fragments(Box<[Box<[Fragment]>]>);

impl Fragments {
    /// Writes the fragments of every flag.
    pub fn of(engine: &Engine) -> Self {
        Self(engine.flags().iter().map(fragments).collect())
    }

    /// The fragment of a flag of the same engine for an outcome of that flag.
    pub fn get(&self, flag: FlagId, outcome: Outcome) -> &Fragment {
        &self.0[flag.index()][outcome.ordinal()]
    }
}

/// One fragment per outcome, in the order of [`Outcome::ordinal`].
fn fragments(flag: &Flag) -> Box<[Fragment]> {
    let none = |enabled| json_of("disabled", false, enabled);
    let off = Fragment::new(flag, false, &none(false));
    let on = Fragment::new(flag, true, &none(true));
    let variants = flag.variants().iter().map(|it| Fragment::new(flag, true, &variant(it)));
    [off, on].into_iter().chain(variants).collect()
}

fn variant(variant: &Variant) -> serde_json::Value {
    let mut json = json_of(&variant.name, true, true);
    if let Some(payload) = &variant.payload {
        json["payload"] = json!({"type": &*payload.kind, "value": &*payload.value});
    }
    json
}

/// A variant without payload. Both spellings of the flag's own state: Unleash sends both.
fn json_of(name: &str, enabled: bool, flag_enabled: bool) -> serde_json::Value {
    json!({
        "name": name,
        "enabled": enabled,
        "feature_enabled": flag_enabled,
        "featureEnabled": flag_enabled,
    })
}
