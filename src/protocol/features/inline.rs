//! Inlines segments into the strategies that refer to them.
//!
//! It works on keys and the text of values, so that everything but `segments` and `constraints` of
//! strategies keeps its bytes. It does not parse constraints.

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A constraint that matches no context, in a form that every SDK supports.
const NEVER_MATCHES: &str = r#"{"contextName":"appName","operator":"IN","values":[],"inverted":false,"caseInsensitive":false}"#;

const SEGMENTS_KEY: &str = r#""segments""#;

/// The flag `text` with its segments, looked up by `find`, inlined.
pub(super) fn inline_segments<'s>(
    text: &str,
    find: impl Fn(i64) -> Option<&'s RawValue>,
) -> String {
    // Most flags use no segments and are not parsed.
    if !text.contains(SEGMENTS_KEY) {
        return text.to_owned();
    }
    let Ok(RawObject(entries)) = serde_json::from_str(text) else {
        return text.to_owned();
    };
    let mut out = String::with_capacity(text.len() + 256);
    write_json_object(
        &mut out,
        entries.iter().map(|&(key, value)| (key, value)),
        |out, key, value| {
            if key == r#""strategies""#
                && let Ok(strategies) = serde_json::from_str::<Vec<&RawValue>>(value)
            {
                let strategies = strategies.iter().map(|strategy| strategy.get());
                write_json_array(out, strategies, |out, text| inline_strategy(out, text, &find));
            } else {
                out.push_str(value);
            }
        },
    );
    out
}

fn inline_strategy<'s>(out: &mut String, text: &str, find: &impl Fn(i64) -> Option<&'s RawValue>) {
    const CONSTRAINTS: &str = r#""constraints""#;
    let Ok(RawObject(mut entries)) = serde_json::from_str(text) else {
        return out.push_str(text);
    };
    let Some(at) = entries.iter().position(|(key, _)| *key == SEGMENTS_KEY) else {
        return out.push_str(text);
    };
    let (_, ids) = entries.remove(at);
    let added = match serde_json::from_str::<Option<Vec<&RawValue>>>(ids) {
        Ok(ids) => ids
            .unwrap_or_default()
            .into_iter()
            .flat_map(|id| segment_constraints(id, find))
            .collect(),
        Err(_) => vec![NEVER_MATCHES],
    };
    if added.is_empty() {
        return write_json_object(out, entries.into_iter(), |out, _, value| {
            out.push_str(value);
        });
    }
    if !entries.iter().any(|(key, _)| *key == CONSTRAINTS) {
        entries.push((CONSTRAINTS, "[]"));
    }
    write_json_object(out, entries.into_iter(), |out, key, value| {
        if key != CONSTRAINTS {
            return out.push_str(value);
        }
        let own = match serde_json::from_str::<Option<Vec<&RawValue>>>(value) {
            Ok(own) => own.unwrap_or_default().into_iter().map(RawValue::get).collect(),
            Err(_) => vec![NEVER_MATCHES],
        };
        let all = own.into_iter().chain(added.iter().copied());
        write_json_array(out, all, String::push_str);
    });
}

/// The texts of the constraints of the segment with this id.
fn segment_constraints<'s>(
    id: &RawValue,
    find: &impl Fn(i64) -> Option<&'s RawValue>,
) -> Vec<&'s str> {
    #[derive(serde::Deserialize)]
    struct Body<'a> {
        #[serde(borrow, default)]
        constraints: Option<Vec<&'a RawValue>>,
    }
    let segment = id.get().parse().ok().and_then(find);
    match segment.map(|segment| serde_json::from_str::<Body<'s>>(segment.get())) {
        Some(Ok(body)) => {
            body.constraints.unwrap_or_default().into_iter().map(RawValue::get).collect()
        }
        Some(Err(_)) | None => vec![NEVER_MATCHES],
    }
}

fn write_json_object<'t>(
    out: &mut String,
    entries: impl Iterator<Item = (&'t str, &'t str)>,
    mut write: impl FnMut(&mut String, &'t str, &'t str),
) {
    out.push('{');
    for (position, (key, value)) in entries.enumerate() {
        if position > 0 {
            out.push(',');
        }
        out.push_str(key);
        out.push(':');
        write(out, key, value);
    }
    out.push('}');
}

fn write_json_array<'t>(
    out: &mut String,
    items: impl Iterator<Item = &'t str>,
    mut write: impl FnMut(&mut String, &'t str),
) {
    out.push('[');
    for (position, item) in items.enumerate() {
        if position > 0 {
            out.push(',');
        }
        write(out, item);
    }
    out.push(']');
}

/// A JSON object as the texts of its keys (with quotes) and values, in order.
struct RawObject<'a>(Vec<(&'a str, &'a str)>);

impl<'de> Deserialize<'de> for RawObject<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = RawObject<'de>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
                    entries.push((key.get(), value.get()));
                }
                Ok(RawObject(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Document;
    use super::NEVER_MATCHES;

    fn check(strategy: &str, expect: &str) {
        let body = format!(
            r#"{{"features":[{{"name":"a","strategies":[{strategy}],"z":1.0}}],"segments":[{{"id":1,"constraints":[{{"x":1}},{{"y":2.0}}]}},{{"id":2}}]}}"#
        );
        let document = Document::parse(body.as_bytes()).unwrap();
        let expect = format!(r#"{{"name":"a","strategies":[{expect}],"z":1.0}}"#);
        assert_eq!(document.features()[0].with_inlined_segments(document.segments()), expect);
    }

    #[test]
    fn constraints_of_segments_follow_those_of_the_strategy() {
        check(
            r#"{"name":"s","constraints":[{"own":1e0}],"segments":[1],"\u0061":"\u0062"}"#,
            r#"{"name":"s","constraints":[{"own":1e0},{"x":1},{"y":2.0}],"\u0061":"\u0062"}"#,
        );
        check(
            r#"{"segments":[1],"name":"s"}"#,
            r#"{"name":"s","constraints":[{"x":1},{"y":2.0}]}"#,
        );
        check(r#"{"segments":[1],"constraints":null}"#, r#"{"constraints":[{"x":1},{"y":2.0}]}"#);
    }

    #[test]
    fn unknown_segment_is_inlined_as_constraint_that_never_matches() {
        for ids in ["[404]", "[\"x\"]", "7"] {
            check(
                &format!(r#"{{"segments":{ids}}}"#),
                &format!(r#"{{"constraints":[{NEVER_MATCHES}]}}"#),
            );
        }
    }

    #[test]
    fn text_without_segments_is_unchanged() {
        for strategy in [r#"{"name" : "s"}"#, "7", "null"] {
            check(strategy, strategy);
        }
        check(r#"{"name":"s","segments":[]}"#, r#"{"name":"s"}"#);
        check(r#"{"name":"s","segments":null}"#, r#"{"name":"s"}"#);
        check(r#"{"name":"s","segments":[2]}"#, r#"{"name":"s"}"#);
    }
}
