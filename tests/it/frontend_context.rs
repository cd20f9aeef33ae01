//! Which parts of a request become the context of an evaluation: an edge behaves like Unleash's own
//! frontend API.
//!
//! Each query goes to both, and the enabled flags are compared. Flags with random outcomes are counted
//! over many requests instead. Addresses are part of every query, because each server sees a different
//! peer address.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::in_process_parapet::{FRONTEND, InProcessParapet};
use crate::rig::{Parapet, TokenKind, Unleash, UnleashVersion, http, wait_until};

const ENVIRONMENT: &str = "development";

/// Far above the intervals of 0.5 s.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The prefix of this test's flags; the server is shared.
const FLAG_PREFIX: &str = "context.";

/// Values in constraints and queries.
const VALUES: [&str; 8] = ["A", "B", "A,B", "B,A", "A,B,A", ",A", "development", "7"];
const FIELDS: [&str; 7] =
    ["userId", "sessionId", "environment", "appName", "remoteAddress", "plan", "the region"];

/// Dates that Unleash saves, in common spellings.
const DATES: [&str; 6] =
    ["2024", "2099-05", "2024-5-1", "2099/05/01", "01 May 2024", "Wed, 01 May 2024 10:00:00 +0200"];

/// Client addresses. Unleash matches only IPv4 in lists of addresses.
const ADDRESSES: [&str; 4] = ["203.0.113.7", "10.0.0.7", "192.0.2.1", "2001:db8::1"];

/// The number of requests for random outcomes: the probability that this many fair draws are all equal
/// is 2^-59.
const RANDOM_SAMPLES: usize = 60;

fn constrained(field: &str, operator: &str, values: &[&str]) -> Value {
    let constraint = json!({
        "contextName": field, "operator": operator, "values": values, "value": ".",
        "inverted": false, "caseInsensitive": false,
    });
    json!({ "name": "default", "constraints": [constraint] })
}

fn rollout(percent: u32, stickiness: &str, variants: &[&str]) -> Value {
    let variants = variants.iter().map(|name| {
        let weight = 1000 / variants.len();
        json!({ "name": name, "weight": weight, "weightType": "variable", "stickiness": stickiness })
    });
    json!({
        "name": "flexibleRollout", "variants": variants.collect::<Vec<_>>(),
        "parameters": { "rollout": percent.to_string(), "stickiness": stickiness, "groupId": format!("{stickiness}-{percent}") },
    })
}

/// Flags whose outcomes depend only on the request, and on a `sessionId` only by its presence.
fn deterministic_flags() -> BTreeMap<String, Value> {
    let mut flags = BTreeMap::new();
    for field in FIELDS {
        let name = field.replace(' ', "-");
        for (number, value) in VALUES.into_iter().enumerate() {
            let strategy = constrained(field, "IN", &[value]);
            flags.insert(format!("{FLAG_PREFIX}{name}-is-{number}"), strategy);
        }
        let others = constrained(field, "NOT_IN", &["A"]);
        flags.insert(format!("{FLAG_PREFIX}{name}-is-not-A"), others);
    }
    flags.insert(format!("{FLAG_PREFIX}any-session"), constrained("sessionId", "REGEX", &[]));
    flags.insert(format!("{FLAG_PREFIX}all-sessions"), rollout(100, "sessionId", &[]));
    let addresses =
        json!({ "name": "remoteAddress", "parameters": { "IPs": "10.0.0.7, 203.0.113.0/24" } });
    flags.insert(format!("{FLAG_PREFIX}from-here"), addresses);
    for (number, date) in DATES.into_iter().enumerate() {
        for operator in ["DATE_AFTER", "DATE_BEFORE"] {
            let mut strategy = constrained("currentTime", operator, &[]);
            strategy["constraints"][0]["value"] = date.into();
            flags.insert(format!("{FLAG_PREFIX}{operator}-{number}"), strategy);
        }
    }
    flags.insert(format!("{FLAG_PREFIX}all-users"), rollout(100, "userId", &[]));
    flags.insert(format!("{FLAG_PREFIX}half-of-users"), rollout(50, "userId", &[]));
    flags.insert(format!("{FLAG_PREFIX}half-of-plans"), rollout(50, "plan", &[]));
    flags
}

/// Flags whose outcomes vary between requests without a user or session.
fn random_flags() -> BTreeMap<String, Value> {
    BTreeMap::from([
        (format!("{FLAG_PREFIX}split"), rollout(100, "default", &["blue", "green"])),
        (format!("{FLAG_PREFIX}half"), rollout(50, "default", &[])),
        (format!("{FLAG_PREFIX}half-of-sessions"), rollout(50, "sessionId", &[])),
    ])
}

/// The enabled flags of this test, with the names of their variants.
async fn enabled_flags(url: &str, token: &str, query: &str) -> BTreeMap<String, String> {
    let request = http().get(format!("{url}/api/frontend?{query}")).header("authorization", token);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "{url} {query}");
    let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
    let toggles = body["toggles"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let named = toggles.map(|it| (text(&it["name"]), text(&it["variant"]["name"])));
    named.filter(|(name, _)| name.starts_with(FLAG_PREFIX)).collect()
}

fn names_in(flags: &BTreeMap<String, String>, of: &BTreeMap<String, Value>) -> BTreeSet<String> {
    flags.keys().filter(|name| of.contains_key(*name)).cloned().collect()
}

/// A query with a few fields, in any of the spellings for them, some of them twice.
fn random_query(random: &mut StdRng) -> String {
    let mut pairs = vec![("remoteAddress".to_owned(), *ADDRESSES.choose(random).unwrap())];
    for _ in 0..random.random_range(0..5) {
        let field = *FIELDS.choose(random).unwrap();
        // Each field has one spelling in a query; mixing them is undefined.
        let name = match random.random_range(0..3) {
            0 => field.to_owned(),
            1 => format!("{field}[]"),
            // Unleash has its own values for these, which win; in Unleash Edge and Parapet the
            // properties win.
            _ if ["sessionId", "appName", "environment"].contains(&field) => continue,
            _ => format!("properties[{field}]"),
        };
        let stem = |name: &str| name.trim_end_matches("[]").to_owned();
        pairs.retain(|(other, _)| *other == name || stem(other) != stem(&name));
        for _ in 0..random.random_range(1..3) {
            let value = VALUES.choose(random).filter(|_| random.random_bool(0.9));
            pairs.push((name.clone(), value.copied().unwrap_or_default()));
        }
    }
    form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn edge_reads_contexts_as_unleash_does() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let (repeatable, drawing) = (deterministic_flags(), random_flags());
    for (name, strategy) in repeatable.iter().chain(&drawing) {
        unleash.create_enabled_flag(name, ENVIRONMENT, std::slice::from_ref(strategy)).await;
    }
    let token = unleash.create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], "context").await;
    let edge =
        Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let edge = edge.flag("--fleet-name", "context").start().await;
    let (theirs, ours) = (unleash.url(), edge.url());
    let everybody = "userId=7&sessionId=A&environment=A&appName=A&plan=A&the+region=A";
    wait_until("both have all flags", TIMEOUT, async || {
        let all = [&theirs, &ours].map(async |url| enabled_flags(url, &token, everybody).await);
        let [theirs, ours] = all;
        (theirs.await == ours.await).then_some(())
    })
    .await;

    let fixed = [
        "",
        "userId=",
        "sessionId=",
        "userId=&properties[userId]=A",
        "environment=development",
        "plan=A&properties[plan]=B",
        "properties[plan]=B&plan=A",
        "properties[userId]=A&userId=B",
        "properties[plan][0]=A&properties[plan][1]=B",
        "plan[0]=A&plan[1]=B",
        "plan[]=A&plan[]=B",
        "userId=A&userId=B",
        "sessionId=A&sessionId=B",
        "properties[userId]=A&properties[userId]=B",
        "userId=&userId=A",
        "plan=&plan=A",
        "properties[plan]=A&properties[plan]=B",
    ]
    .map(|query| format!("remoteAddress=203.0.113.7&{query}"));
    let mut random = StdRng::seed_from_u64(15);
    let queries = fixed.into_iter().chain((0..300).map(|_| random_query(&mut random)));
    for query in queries {
        // Unleash itself may serve a flag only seconds after it was created.
        wait_until(&format!("both evaluate {query} alike"), TIMEOUT, async || {
            let expect = names_in(&enabled_flags(&theirs, &token, &query).await, &repeatable);
            let found = names_in(&enabled_flags(&ours, &token, &query).await, &repeatable);
            (found == expect).then_some(())
        })
        .await;
    }

    // The one field that only Unleash Edge and Parapet read from a request: the time.
    let long_ago = "remoteAddress=203.0.113.7&currentTime=1999-01-01";
    let [then, now] = [long_ago, "remoteAddress=203.0.113.7"].map(async |query| {
        (enabled_flags(&theirs, &token, query).await, enabled_flags(&ours, &token, query).await)
    });
    let (then, now) = (then.await, now.await);
    assert_eq!(names_in(&then.0, &repeatable), names_in(&now.0, &repeatable));
    assert_ne!(names_in(&then.1, &repeatable), names_in(&now.1, &repeatable));

    for url in [&theirs, &ours] {
        let mut counts = BTreeMap::<_, usize>::new();
        for _ in 0..RANDOM_SAMPLES {
            for flag in enabled_flags(url, &token, "remoteAddress=203.0.113.7").await {
                *counts.entry(flag).or_default() += 1;
            }
        }
        let count = |name: &str, variant: &str| {
            counts.get(&(format!("{FLAG_PREFIX}{name}"), variant.to_owned())).copied().unwrap_or(0)
        };
        assert_eq!(count("all-sessions", "disabled"), RANDOM_SAMPLES, "{url}");
        assert_eq!(count("split", "blue") + count("split", "green"), RANDOM_SAMPLES, "{url}");
        for (name, variant) in [
            ("split", "blue"),
            ("split", "green"),
            ("half", "disabled"),
            ("half-of-sessions", "disabled"),
        ] {
            assert!(
                (1..RANDOM_SAMPLES).contains(&count(name, variant)),
                "{name} {variant}: {counts:?}"
            );
        }
    }
}

/// Behind a load balancer all connections come from one address, which must not merge all users into
/// one.
#[tokio::test]
async fn requests_without_session_are_distributed_and_etags_match_bodies() {
    let flag = |name: &str, strategy: Value| json!({ "name": name, "project": "default", "enabled": true, "strategies": [strategy] });
    let features = [
        flag("always", json!({ "name": "default" })),
        flag("for-7", json!({ "name": "userWithId", "parameters": { "userIds": "7" } })),
        flag("split", rollout(100, "default", &["blue", "green"])),
    ];
    let parapet = InProcessParapet::offline(&json!({ "features": features }).to_string()).await;
    let mut seen = BTreeMap::new();
    for _ in 0..RANDOM_SAMPLES {
        let response = parapet.get("/api/frontend", FRONTEND).await;
        let tag = response.header("etag").to_owned();
        let before = seen.insert(tag, response.text().to_owned());
        assert!(before.is_none_or(|body| body == response.text()), "one tag, two bodies");
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
    let (tag, other) = (seen.keys().next().unwrap(), seen.values().nth(1).unwrap());
    let mut statuses = BTreeSet::new();
    for _ in 0..RANDOM_SAMPLES {
        let request = parapet.request(reqwest::Method::GET, "/api/frontend");
        let request = request.header("authorization", FRONTEND).header("if-none-match", tag);
        let response = crate::in_process_parapet::send(request).await;
        if response.status == StatusCode::OK {
            assert_eq!(response.text(), other, "what the client has is not sent again");
        }
        statuses.insert(response.status);
    }
    assert_eq!(statuses, BTreeSet::from([StatusCode::OK, StatusCode::NOT_MODIFIED]));
    for known in ["userId=7", "sessionId=s1"] {
        let path = format!("/api/frontend?{known}");
        let first = parapet.get(&path, FRONTEND).await;
        for _ in 0..10 {
            assert_eq!(parapet.get(&path, FRONTEND).await.text(), first.text(), "{known}");
        }
    }
}

/// Each request without a user may have its own body, which is compressed for it alone.
#[tokio::test]
async fn compressing_bodies_without_user_uses_few_threads() {
    let flag = |number: usize| {
        let name = format!("a flag with quite a long name, as is common: {number}");
        let mut strategy = rollout(if number < 30 { 50 } else { 100 }, "default", &[]);
        // Each has its own buckets, so that hardly any two requests see the same flags.
        strategy["parameters"]["groupId"] = number.to_string().into();
        json!({ "name": name, "project": "default", "enabled": true, "strategies": [strategy] })
    };
    let features: Vec<_> = (0..1000).map(flag).collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, json!({ "features": features }).to_string()).unwrap();
    let parapet = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = parapet.env("FRONTEND_TOKENS", FRONTEND).start().await;
    let before = parapet.proc_status("Threads");
    for encodings in ["gzip, deflate, br, zstd", "gzip"] {
        let fetch = async || {
            let request = http().get(parapet.url() + "/api/frontend");
            let request =
                request.header("authorization", FRONTEND).header("accept-encoding", encodings);
            let response = request.send().await.unwrap();
            let coding = response.headers()["content-encoding"].to_str().unwrap().to_owned();
            let tag = response.headers()["etag"].to_str().unwrap().to_owned();
            assert_eq!(tag.matches(&coding).count(), 1, "{tag}");
            (response.bytes().await.unwrap().len(), coding)
        };
        let responses = futures_util::future::join_all((0..300).map(|_| fetch())).await;
        let coding = if encodings == "gzip" { "gzip" } else { "zstd" };
        assert!(responses.iter().all(|(length, used)| *length < 100_000 && used == coding));
    }
    let grown = parapet.proc_status("Threads").saturating_sub(before);
    assert!(grown <= 32, "{grown} threads more than the {before} of before");
}
