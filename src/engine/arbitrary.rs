//! Random flags and contexts for tests, made of few fields and texts so that they often match.

use jiff::{SignedDuration, Timestamp};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{select, subsequence},
};
use serde_json::{Value, json};

use super::{constraint::Operator, context::Context};

const FIELDS: [&str; 8] = [
    "userId",
    "sessionId",
    "environment",
    "appName",
    "remoteAddress",
    "currentTime",
    "plan",
    "region",
];
const TEXTS: [&str; 9] = ["", "a", "A", "ab", "7", "12", "1.2.3", "10.0.0.7", "2024-05-01"];
pub(crate) const DATES: [&str; 3] =
    ["2024-05-01T00:00:00Z", "2024-05-01T00:00:01Z", "2025-01-01T00:00:00Z"];
const STICKINESS: [&str; 6] = ["default", "random", "userId", "sessionId", "plan", "currentTime"];

fn constraint() -> impl Strategy<Value = Value> {
    let operators = Operator::NAMES.map(|(name, _)| name);
    let values = subsequence(TEXTS.to_vec(), 1..4);
    let all = (select(operators.to_vec()), select(FIELDS.to_vec()), values, select(DATES.to_vec()));
    (all, any::<[bool; 2]>()).prop_map(
        |((operator, field, values, date), [inverted, ignore_case])| {
            let (value, values) = match Operator::parse(operator).unwrap() {
                Operator::In | Operator::NotIn | Operator::Text(_) => ("", values),
                Operator::Number(_) => ("8", values),
                Operator::Version(_) => ("1.2.0", values),
                Operator::After | Operator::Before => (date, values),
                Operator::Regex => ("^[a-c]", values),
                Operator::InCidr => ("", vec!["10.0.0.0/8"]),
            };
            json!({
                "contextName": field, "operator": operator, "value": value, "values": values,
                "inverted": inverted, "caseInsensitive": ignore_case,
            })
        },
    )
}

fn variants() -> impl Strategy<Value = Value> {
    let overriding = option::of((select(FIELDS.to_vec()), select(TEXTS.to_vec())));
    let variant = (0..3_u32, select(STICKINESS.to_vec()), overriding);
    vec(variant, 0..3).prop_map(|all| {
        let variant = |(n, (weight, stickiness, overriding)): (usize, (u32, _, Option<_>))| {
            let overrides = overriding
                .map(|(field, value)| json!([{ "contextName": field, "values": [value] }]));
            json!({
                "name": format!("v{n}"), "weight": weight, "stickiness": stickiness,
                "overrides": overrides.unwrap_or_else(|| json!([])),
                "payload": { "type": "string", "value": "\"x\"" },
            })
        };
        all.into_iter().enumerate().map(variant).collect()
    })
}

fn strategy() -> impl Strategy<Value = Value> {
    let rollout = (select(vec![0, 30, 50, 100]), select(STICKINESS.to_vec()), variants()).prop_map(
        |(rollout, stickiness, variants)| {
            json!({
                "name": "flexibleRollout", "variants": variants,
                "parameters": { "rollout": rollout, "stickiness": stickiness, "groupId": "g" },
            })
        },
    );
    let others = select(vec![
        json!({ "name": "default" }),
        json!({ "name": "userWithId", "parameters": { "userIds": "7,a" } }),
        json!({ "name": "remoteAddress", "parameters": { "IPs": "10.0.0.0/8,a" } }),
        json!({ "name": "gradualRolloutRandom", "parameters": { "percentage": "50" } }),
        json!({ "name": "gradualRolloutSessionId", "parameters": { "percentage": "50" } }),
        json!({ "name": "applicationHostname", "parameters": { "hostNames": "host" } }),
    ]);
    let kind = prop_oneof![3 => rollout, 1 => others];
    (kind, vec(constraint(), 0..3), prop::bool::weighted(0.2)).prop_map(
        |(mut strategy, constraints, segment)| {
            strategy["constraints"] = constraints.into();
            strategy["segments"] = if segment { json!([1]) } else { json!([]) };
            strategy
        },
    )
}

/// The flags of a document and its segments. Flags may depend on `f0` and `f1`.
pub(crate) fn arbitrary_definitions() -> impl Strategy<Value = (Value, Value)> {
    let parent = option::weighted(0.2, (select(vec!["f0", "f1"]), any::<bool>()));
    let flag = (vec(strategy(), 0..3), variants(), parent, prop::bool::weighted(0.9));
    let segment = vec(constraint(), 1..3);
    (vec(flag, 1..5), segment).prop_map(|(flags, segment)| {
        let flag = |(n, (strategies, variants, parent, enabled)): (usize, (_, _, Option<_>, _))| {
            let dependencies = parent
                .map(|(feature, enabled)| json!([{ "feature": feature, "enabled": enabled }]));
            let project = if n % 2 == 0 { "red" } else { "blue" };
            json!({
                "name": format!("f{n}"), "project": project, "enabled": enabled,
                "strategies": strategies, "variants": variants,
                "dependencies": dependencies.unwrap_or_else(|| json!([])),
            })
        };
        let flags = flags.into_iter().enumerate().map(flag).collect();
        (flags, json!([{ "id": 1, "constraints": segment }]))
    })
}

/// A random context with time and seed.
#[derive(Clone, Debug)]
pub(crate) struct ArbitraryContext {
    /// One value or none for each of the fields.
    values: Vec<Option<&'static str>>,
    /// A generated `sessionId`.
    generated_session_id: Option<String>,
    properties: Vec<(&'static str, &'static str)>,
    now: Timestamp,
    draw: u64,
}

impl ArbitraryContext {
    pub(crate) fn context(&self) -> Context<'_> {
        Context {
            user_id: self.values[0],
            session_id: self.generated_session_id.as_deref().or(self.values[1]),
            session_is_generated: self.generated_session_id.is_some(),
            environment: self.values[2],
            app_name: self.values[3],
            remote_address: self.values[4],
            current_time: self.values[5],
            properties: &self.properties,
            hostname: Some("host"),
            now: self.now,
            random_seed: self.draw,
        }
    }
}

/// The time is one of the dates in flags, or next to one.
pub(crate) fn arbitrary_context() -> impl Strategy<Value = ArbitraryContext> {
    let value = option::weighted(0.4, select(TEXTS.to_vec()));
    let off = select(vec![-1_000_000_000, -1, 0, 1, 1_000_000_000_i64]);
    let made_up = option::weighted(0.3, "[0-9a-f]{3}");
    (vec(value, FIELDS.len()), select(DATES.to_vec()), off, any::<u64>(), made_up).prop_map(
        |(values, date, off, draw, generated_session_id)| {
            let properties = FIELDS[6..].iter().zip(&values[6..]);
            let date: Timestamp = date.parse().unwrap();
            ArbitraryContext {
                properties: properties
                    .filter_map(|(&name, value)| Some((name, (*value)?)))
                    .collect(),
                now: date + SignedDuration::from_nanos(off),
                values,
                generated_session_id,
                draw,
            }
        },
    )
}

/// Any JSON. Texts that the engine looks for are more likely than others.
pub(crate) fn arbitrary_json() -> impl Strategy<Value = Value> {
    let words = select(vec![
        "default",
        "flexibleRollout",
        "userWithId",
        "remoteAddress",
        "50",
        "userId",
        "a",
        "b",
        "IN",
        "STR_CONTAINS",
        "NUM_GT",
        "SEMVER_EQ",
        "DATE_BEFORE",
        "REGEX",
        "IN_CIDR",
        "1.2.3",
        "10.0.0.0/8",
    ]);
    let keys = || {
        select(vec![
            "name",
            "enabled",
            "strategies",
            "variants",
            "dependencies",
            "parameters",
            "constraints",
            "segments",
            "rollout",
            "stickiness",
            "contextName",
            "operator",
            "values",
            "value",
            "inverted",
            "weight",
            "payload",
            "overrides",
            "feature",
            "type",
            "userIds",
            "IPs",
        ])
    };
    let leaf = prop_oneof![
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<f64>().prop_map(Value::from),
        4 => words.prop_map(Value::from),
        1 => ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(keys(), inner, 0..6).prop_map(|all| all
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect()),
        ]
    })
}
