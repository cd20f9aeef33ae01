//! The engine against yggdrasil, Unleash's own engine in Rust: the same results for random flags and
//! contexts.
//!
//! Inputs on which the two are known to differ are not generated. The specification decides; where it is
//! silent, the Node SDK does, which the Unleash server evaluates with. The differences, and the reasons
//! for Parapet's behaviour:
//!
//! * A malformed operand, an unknown operator and a missing segment disable the whole flag in yggdrasil.
//!   In Parapet and the SDK only their strategy never matches. (In the SDK such a constraint holds if it
//!   is inverted; not in Parapet, so that a mistake never enables a flag for all users.)
//! * Lists of values that are empty, or contain empty or padded texts: yggdrasil cannot compile `STR_…`
//!   and `IN_CIDR` without values, and compares padding; the SDK drops empty values and trims.
//! * Numbers: yggdrasil compares `NUM_EQ` with a tolerance, accepts `inf` and `nan`, and rejects what
//!   JavaScript accepts (an empty text, padding, hexadecimal, a bare leading point).
//! * `DATE_…` on a field other than `currentTime`: the SDK compares the current time anyway.
//! * `IN`, `STR_…` and so on with `currentTime` where the context has none: yggdrasil fills it in.
//! * Dates in any spelling but RFC 3339, for instance `2024-05`: the SDK accepts them, yggdrasil does
//!   not (`tests/it/dates.rs` generates them, and compares with Node).
//! * Versions with a leading `v` or padding: the specification rejects the former, the SDK trims the
//!   latter.
//! * Regular expressions beyond ASCII: the SDK's `\d`, `\w`, `\s` and `\b` are those of RE2, for ASCII
//!   only.
//! * Rollouts that are not integers from 0 to 100: the SDK accepts 33.5, yggdrasil disables the flag.
//! * Rollouts without `groupId`: yggdrasil hashes with the flag's name (for a parent with the child's),
//!   and those of the old kind are never on; the SDK uses the group `""`. Strategy variants without it:
//!   the flag's name in yggdrasil, the text `undefined` in the SDK.
//! * `remoteAddress` (the strategy) with texts that are not addresses: the SDK compares texts. (It
//!   supports only IPv4 ranges; Parapet matches IPv6 as yggdrasil does.)
//! * `userWithId` with space around the list: yggdrasil trims it, the SDK does not.
//! * Identifiers and groups beyond ASCII: yggdrasil hashes their UTF-8, the SDK the low byte of each
//!   UTF-16 unit.
//! * Empty context values: they count as missing for stickiness in the SDK, but not in yggdrasil.
//! * Default stickiness of variants without `userId` and `sessionId`: the SDK uses `remoteAddress`.
//!   Stickiness `currentTime`: yggdrasil looks for a property of that name.
//! * Strategy variants with their own stickiness: yggdrasil ignores it.
//! * Weights that sum to zero: yggdrasil panics; in the SDK there is no variant, with overrides or
//!   without.
//! * Dependencies on variants of a parent without variants, or on `disabled`, or together with `enabled:
//!   false`: in the SDK `getVariant` for the parent decides.
//! * A flag without a list of strategies: on in yggdrasil, off in the SDK.
//! * `applicationHostname`: this build of yggdrasil has no host name.
//! * Anything that is random for the given context.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;

use jiff::Timestamp;
use parapet::engine::{Context, Defect, Engine, FieldId, Relevance};
use parapet::protocol::features::Document;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use unleash_yggdrasil::{EngineState, UpdateMessage};

const TEXTS: [&str; 10] = ["a", "B", "ab", "aB1", "user-7", "7", "12.5", "-3", "1.2.3", "été Ünï"];
const NUMBERS: [&str; 6] = ["7", "12.5", "-3", "0", "100", "1e2"];
const VERSIONS: [&str; 7] =
    ["1.2.3", "1.2.3-rc.1", "1.2.3-rc.11", "1.2.3-rc.x", "1.10.0", "0.9.9+b.1", "2.0.0-alpha"];
const DATES: [&str; 4] = [
    "2024-02-29T12:00:00.000Z",
    "2024-02-29T12:00:00Z",
    "2024-02-29T14:30:00+02:00",
    "2099-01-01T00:00:00.000Z",
];
const ADDRESSES: [&str; 7] = [
    "10.0.0.7",
    "10.1.2.3",
    "192.168.1.1",
    "2001:db8::1",
    "2001:DB8:0:0:0:0:0:1",
    "2001:db9::1",
    "::1",
];
const RANGES: [&str; 8] = [
    "10.0.0.0/8",
    "10.0.0.7",
    "192.168.0.0/16",
    "2001:db8::/32",
    "2001:DB8::0:1",
    "::1/128",
    "::1",
    "bad/range",
];
const FIELDS: [&str; 7] =
    ["userId", "sessionId", "environment", "appName", "remoteAddress", "plan", "the region"];
const PATTERNS: [&str; 6] = ["^[a-c]+$", "b", r"\d{2}", "^(?i)AB$", r"\ba", "user-[0-9]"];
/// The flags that others depend on.
const PARENTS: [&str; 4] = ["f0", "f1", "f2", "missing"];

fn constraint() -> impl Strategy<Value = Value> {
    let texts = || subsequence(TEXTS.to_vec(), 1..6);
    let many = prop_oneof![
        (select(vec!["IN", "NOT_IN", "STR_STARTS_WITH", "STR_ENDS_WITH", "STR_CONTAINS"]), texts())
            .prop_map(|(operator, values)| json!({ "operator": operator, "values": values })),
        (select(vec!["IN", "NOT_IN"]), subsequence(TEXTS.to_vec(), 0..1))
            .prop_map(|(operator, values)| json!({ "operator": operator, "values": values })),
        subsequence(RANGES.to_vec(), 1..4)
            .prop_map(|values| json!({ "operator": "IN_CIDR", "values": values })),
    ];
    let orders = select(vec!["EQ", "GT", "GTE", "LT", "LTE"]);
    let one = prop_oneof![
        (orders.clone(), select(NUMBERS.to_vec())).prop_map(
            |(order, value)| json!({ "operator": format!("NUM_{order}"), "value": value })
        ),
        (orders, select(VERSIONS.to_vec())).prop_map(
            |(order, value)| json!({ "operator": format!("SEMVER_{order}"), "value": value })
        ),
        select(PATTERNS.to_vec()).prop_map(|value| json!({ "operator": "REGEX", "value": value })),
    ];
    let date = (select(vec!["DATE_AFTER", "DATE_BEFORE"]), select(DATES.to_vec())).prop_map(
        |(operator, value)| json!({ "contextName": "currentTime", "operator": operator, "value": value }),
    );
    let named = (select(FIELDS.to_vec()), prop_oneof![many, one]).prop_map(|(field, mut json)| {
        json["contextName"] = field.into();
        json
    });
    (prop_oneof![6 => named, 1 => date], any::<bool>(), any::<bool>()).prop_map(
        |(mut json, inverted, ignore_case)| {
            json["inverted"] = inverted.into();
            json["caseInsensitive"] = ignore_case.into();
            json
        },
    )
}

fn constraints() -> impl Strategy<Value = Vec<Value>> {
    proptest::collection::vec(constraint(), 0..3)
}

/// Variants whose weights do not sum to zero.
fn variants(prefix: &'static str) -> impl Strategy<Value = Vec<Value>> {
    proptest::collection::vec((0..3_u32, any::<bool>()), 0..4).prop_map(move |weights| {
        let variant = |(index, (weight, payload)): (usize, (u32, bool))| {
            let weight = if index == 0 { weight + 1 } else { weight };
            let mut json = json!({ "name": format!("{prefix}{index}"), "weight": weight * 250 });
            if payload {
                json["payload"] = json!({ "type": "string", "value": format!("of {index}") });
            }
            json
        };
        weights.into_iter().enumerate().map(variant).collect()
    })
}

fn flag_variants() -> impl Strategy<Value = Vec<Value>> {
    let overrides = (select(FIELDS.to_vec()), subsequence(TEXTS.to_vec(), 1..3))
        .prop_map(|(field, values)| json!([{ "contextName": field, "values": values }]));
    let stickiness = select(vec!["default", "userId", "plan", "appName"]);
    (variants("v"), proptest::option::of(overrides), stickiness).prop_map(
        |(mut variants, overrides, stickiness)| {
            for variant in &mut variants {
                variant["stickiness"] = stickiness.into();
            }
            if let (Some(last), Some(overrides)) = (variants.last_mut(), overrides) {
                last["overrides"] = overrides;
            }
            variants
        },
    )
}

fn strategy() -> impl Strategy<Value = Value> {
    let percent = || select(vec!["0", "1", "10", "50", "75", "99", "100"]);
    let group = || select(vec!["g", "another group", "uni"]);
    let stickiness = select(vec!["default", "random", "userId", "sessionId", "plan", "appName"]);
    let kind = prop_oneof![
        2 => Just(json!({ "name": "default" })),
        6 => (percent(), stickiness, group()).prop_map(|(rollout, stickiness, group)| {
            let parameters = json!({ "rollout": rollout, "stickiness": stickiness, "groupId": group });
            json!({ "name": "flexibleRollout", "parameters": parameters })
        }),
        2 => (select(vec!["gradualRolloutUserId", "gradualRolloutSessionId"]), percent(), group())
            .prop_map(|(name, percentage, group)| {
                json!({ "name": name, "parameters": { "percentage": percentage, "groupId": group } })
            }),
        1 => percent().prop_map(|percentage| {
            json!({ "name": "gradualRolloutRandom", "parameters": { "percentage": percentage } })
        }),
        2 => subsequence(TEXTS.to_vec(), 0..4)
            .prop_map(|ids| json!({ "name": "userWithId", "parameters": { "userIds": ids.join(", ") } })),
        2 => subsequence(RANGES.to_vec(), 0..4)
            .prop_map(|ips| json!({ "name": "remoteAddress", "parameters": { "IPs": ips.join(",") } })),
        1 => Just(json!({ "name": "custom" })),
    ];
    let segments = subsequence(vec![1, 2], 0..=2);
    (kind, constraints(), segments, variants("s")).prop_map(
        |(mut json, constraints, segments, variants)| {
            json["constraints"] = constraints.into();
            json["segments"] = segments.into();
            json["variants"] = variants.into();
            json
        },
    )
}

/// A condition on `f0` (which always has variants, including `v0`), `f1` or a missing flag.
fn dependency() -> impl Strategy<Value = Value> {
    prop_oneof![
        subsequence(vec!["v0", "v1", "s0", "other"], 0..3)
            .prop_map(|variants| json!({ "feature": "f0", "variants": variants })),
        (select(PARENTS.to_vec()), any::<bool>())
            .prop_map(|(feature, enabled)| json!({ "feature": feature, "enabled": enabled })),
    ]
}

/// Whether a flag is enabled, its strategies, variants and dependencies.
type FlagParts = (bool, Vec<Value>, Vec<Value>, Vec<Value>);

fn document() -> impl Strategy<Value = Value> {
    let strategies = proptest::collection::vec(strategy(), 0..4);
    let dependencies = proptest::collection::vec(dependency(), 0..2);
    let flag = (prop::bool::weighted(0.9), strategies, flag_variants(), dependencies);
    let flags = proptest::collection::vec(flag, 2..6);
    (flags, constraints(), constraints()).prop_map(|(flags, first, second)| {
        let feature = |(index, parts): (usize, FlagParts)| {
            let (enabled, mut strategies, mut variants, mut dependencies) = parts;
            if index == 0 {
                dependencies.clear();
                if variants.is_empty() {
                    variants = vec![json!({ "name": "v0", "weight": 1 })];
                }
            }
            for strategy in &mut strategies {
                if strategy["parameters"]["groupId"].is_null() {
                    strategy["parameters"]["groupId"] = strategy["name"].clone();
                }
            }
            json!({
                "name": format!("f{index}"), "enabled": enabled, "project": "web",
                "strategies": strategies, "variants": variants, "dependencies": dependencies,
            })
        };
        let features: Vec<Value> = flags.into_iter().enumerate().map(feature).collect();
        json!({
            "version": 2,
            "features": features,
            "segments": [{ "id": 1, "constraints": first }, { "id": 2, "constraints": second }],
        })
    })
}

/// A context, which has no user in one case of five.
fn context() -> impl Strategy<Value = unleash_yggdrasil::Context> {
    let text = || {
        let all: Vec<&str> = [&TEXTS[..], &NUMBERS, &VERSIONS, &ADDRESSES].concat();
        prop_oneof![select(all).prop_map(str::to_owned), "[a-zA-Z0-9]{1,12}"]
    };
    let maybe = || proptest::option::of(text());
    let time = select([&DATES[..], &["garbage"]].concat()).prop_map(str::to_owned);
    let address = select(ADDRESSES.to_vec()).prop_map(str::to_owned);
    let address = proptest::option::of(prop_oneof![3 => address, 1 => Just("nowhere".to_owned())]);
    let user = proptest::option::weighted(0.8, text());
    (user, maybe(), maybe(), maybe(), proptest::option::of(time), address, maybe(), maybe())
        .prop_map(|(user, session, environment, app, time, address, plan, region)| {
            let properties = [("plan", plan), ("the region", region)];
            let properties =
                properties.into_iter().filter_map(|(name, value)| Some((name.into(), value?)));
            unleash_yggdrasil::Context {
                user_id: user,
                session_id: session,
                environment,
                app_name: app,
                current_time: time,
                remote_address: address,
                properties: Some(properties.collect::<HashMap<String, String>>()),
            }
        })
}

fn assert_same_results(
    document: &Value,
    context: &unleash_yggdrasil::Context,
) -> Result<(), TestCaseError> {
    let peer = EngineState::default();
    let warnings = peer
        .take_state(UpdateMessage::FullResponse(serde_json::from_value(document.clone()).unwrap()));
    prop_assert!(warnings.is_none(), "the peer compiles everything: {:?}", warnings);
    let responses = peer.resolve_all(context, &None).unwrap();

    let (engine, problems) =
        Engine::compile(&Document::parse(document.to_string().as_bytes()).unwrap());
    for problem in problems {
        let known = matches!(
            problem.defect,
            Defect::UnknownStrategy(_)
                | Defect::MissingParent(_)
                | Defect::NestedParent(_)
                | Defect::InvalidOperand { operator: "IN_CIDR", .. }
        );
        prop_assert!(known, "{}", problem);
    }
    let properties: Vec<(&str, &str)> =
        context.properties.iter().flatten().map(|(k, v)| (&**k, &**v)).collect();
    let bound = engine.bind(&Context {
        user_id: context.user_id.as_deref(),
        session_id: context.session_id.as_deref(),
        session_is_generated: false,
        environment: context.environment.as_deref(),
        app_name: context.app_name.as_deref(),
        current_time: context.current_time.as_deref(),
        remote_address: context.remote_address.as_deref(),
        properties: &properties,
        hostname: None,
        now: Timestamp::now(),
        random_seed: 1,
    });
    for id in engine.ids() {
        let flag = engine.flag(id);
        let hashes_otherwise =
            |field: FieldId| bound.text(field).is_some_and(|identifier| !identifier.is_ascii());
        let reads = engine.inputs([id]);
        let lacks = |field| bound.text(field).is_none_or(str::is_empty);
        let address = reads.relevance(FieldId::REMOTE_ADDRESS, lacks);
        if lacks(FieldId::USER_ID) && lacks(FieldId::SESSION_ID) && address == Relevance::Text {
            // The default stickiness of variants may use the address.
            continue;
        }
        if reads.is_random_for(bound.values()) || reads.fields().any(hashes_otherwise) {
            continue;
        }
        let outcome = engine.evaluate(id, &bound);
        let theirs = &responses[&**flag.name()];
        prop_assert_eq!(outcome.is_on(), theirs.enabled, "{}", flag.name());
        let ours = flag.variant(outcome);
        prop_assert_eq!(
            ours.map_or("disabled", |variant| &variant.name),
            &theirs.variant.name,
            "{}",
            flag.name()
        );
        let payload = ours.and_then(|variant| variant.payload.as_ref());
        let payload = payload.map(|payload| (&*payload.kind, &*payload.value));
        let expect = theirs.variant.payload.as_ref();
        prop_assert_eq!(payload, expect.map(|payload| (&*payload.payload_type, &*payload.value)));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn engine_evaluates_like_yggdrasil(document in document(), contexts in proptest::collection::vec(context(), 8)) {
        for context in &contexts {
            assert_same_results(&document, context)?;
        }
    }
}
