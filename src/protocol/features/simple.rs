//! The simple format of Unleash Edge's offline mode: flags that are on or off for every context, with an
//! optional variant.

use std::collections::BTreeMap;

use serde::{Deserialize, de::Error as _};
use serde_json::{
    json,
    value::{RawValue, to_raw_value},
};

/// A flag. Unknown fields are rejected: a strategy that is ignored would turn a flag on for too many.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with `enabled` and perhaps `variant`")]
struct SimpleFlag {
    enabled: bool,
    variant: Option<String>,
}

/// Parses the format and converts each flag to Unleash's. `error` is the reason why the text is not a
/// client-features body.
pub(super) fn parse_flags(
    text: &[u8],
    error: &serde_json::Error,
) -> Result<Vec<Box<RawValue>>, serde_json::Error> {
    match serde_json::from_slice::<BTreeMap<String, SimpleFlag>>(text) {
        Ok(flags) if !flags.is_empty() => {
            flags.iter().map(|(name, it)| to_unleash_flag(name, it)).collect()
        }
        // Without `features` the text is meant in this format, so this error is the helpful one.
        Err(own) if error.to_string().starts_with("missing field `features`") => {
            Err(neither_format(&own))
        }
        Ok(_) | Err(_) => Err(neither_format(error)),
    }
}

fn neither_format(reason: &serde_json::Error) -> serde_json::Error {
    serde_json::Error::custom(format_args!(
        r#"expected {{"features": [...]}} as Unleash's client API sends it, or {{"<flag>": {{"enabled": true, "variant": "<name>"}}}}: {reason}"#
    ))
}

/// The flag in Unleash's format, with the strategy `default`.
fn to_unleash_flag(name: &str, flag: &SimpleFlag) -> Result<Box<RawValue>, serde_json::Error> {
    let variant = |name| json!({ "name": name, "weight": 1000, "weightType": "variable", "stickiness": "default" });
    to_raw_value(&json!({
        "name": name,
        "type": "release",
        "enabled": flag.enabled,
        "project": "default",
        "strategies": [{ "name": "default", "parameters": {} }],
        "variants": flag.variant.iter().map(variant).collect::<Vec<_>>(),
    }))
}
