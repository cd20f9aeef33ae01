//! Dates in constraints and contexts, compared with Node and with the frontend API of a real Unleash.

use std::time::Duration;

use jiff::Timestamp;
use parapet::engine::{Context, Engine};
use parapet::protocol::features::Document;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::rig::{Driver, Parapet, TokenKind, Unleash, UnleashVersion, http, node, wait_until};

/// Dates that Unleash saves and people write, and similar texts.
const DATE_TEXTS: [&str; 68] = [
    "2024-05",
    "2024",
    "2024-5-1",
    "2024/05/01",
    "05/01/2024",
    "5/1/24",
    "1.5.2024",
    "01 May 2024",
    "1-May-24",
    "May 2024",
    "May 1, 2024",
    "May 1, 2024 10:00",
    "May 1, 2024 10:00 PM",
    "May 1, 2024 12:30am",
    "Wed, 01 May 2024 10:00:00 GMT",
    "Wed, 01 May 2024 10:00:00 +0200",
    "Wed May 01 2024 10:00:00 GMT+0200 (Central European Summer Time)",
    "1 May 2024 EST",
    "2024-05-01 10:00:00 UTC",
    "2024-05-01 10:00:00",
    "2024-05-01 10:00:00Z",
    "2024-05-01 10:00:00+02:00",
    "2024-05-01 10:00 Z",
    "2024-05-01T10:00",
    "2024-05-01T10:00:00.5Z",
    "2024-05-01T10:00:00.1239Z",
    "2024-05-01T10:00:00+0200",
    "2024-05-01T10:00-07:30",
    "2024-05-01t10:00z",
    "2024-05-01T24:00",
    "2024-05-01T24:01",
    "2024-05-01T10Z",
    "2024-05-01T10:00:00UTC",
    "2024-05-01T10:00:60Z",
    "2024-02-30",
    "2024-02-32",
    "2024-13-01",
    "2024-00-01",
    "20240501",
    "20240501T100000Z",
    "1714557600000",
    "1714557600",
    "+002024-05-01",
    "-002024-05-01T00:00:00Z",
    "-000000-05-01",
    "+275760-09-13",
    "+275760-09-13T00:00:00.001Z",
    "99999-01-01",
    "1000:05",
    "10:30",
    "1 May 2024 10:30.5",
    "1 May 2024 10:30:15.5 PM",
    "1 May 2024 10::30",
    "1 May 2024 10:30 +5",
    "1 May 2024 10:30 +530",
    "1 May 2024 10:30 +12345",
    "1 May 2024 10:30 (remark (nested)) +2",
    "1 May 2024 (open",
    "1 May 2024)",
    "May 5",
    "5",
    "0",
    "49 1 1",
    "50 1 1",
    "",
    " ",
    "tomorrow",
    "Mayhem 5 2024",
];

/// Texts that are dates, or nearly so.
fn date_like_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => select(vec!["2024", "05", "5", "1", "01", "31", "30", "24", "99", "1970", "12345", "002024", "0", "00", "123456789012"]),
        3 => select(vec!["10:00", "10:00:00", "23:59:59.999", "9:5", "12:30:15.25", "24:00", "25:61", "T10:00", "T10:00:00Z", "1::"]),
        3 => select(vec!["May", "may", "Sept", "December", "Wed", "Z", "UTC", "GMT", "EST", "pdt", "am", "PM", "T", "of", "é", "\u{a0}"]),
        2 => select(vec!["+02:00", "+0200", "-7", "-07:30", "+", "(CEST)", "(", ")", "+12345", ".5", ".", ":"]),
    ];
    let separator =
        select(vec!["-", "-", "/", " ", " ", " ", ", ", "", ".", "T", ":", "  ", "\t", ";"]);
    let pieces = proptest::collection::vec((piece, separator), 1..7).prop_map(|pieces| {
        let joined: String =
            pieces.iter().flat_map(|&(piece, separator)| [piece, separator]).collect();
        let ends_with_separator = pieces.len() % 3 == 0;
        if ends_with_separator {
            return joined;
        }
        let last = pieces.last().map_or(0, |(_, separator)| separator.len());
        joined[..joined.len() - last].to_owned()
    });
    let date = (1890..2110_i32, 0..14_u8, 0..33_u8, select(vec!["-", "/", ".", " "]))
        .prop_map(|(year, month, day, by)| format!("{year}{by}{month:02}{by}{day:02}"));
    let time = (
        0..26_u8,
        0..62_u8,
        0..62_u8,
        select(vec!["", "Z", " UTC", " GMT", "+02:00", " +0200", " PM", " -3"]),
    )
        .prop_map(|(hour, minute, second, zone)| {
            format!("{hour:02}:{minute:02}:{second:02}{zone}")
        });
    let whole = (date, select(vec!["T", " ", ", ", "  "]), time)
        .prop_map(|(date, by, time)| format!("{date}{by}{time}"));
    prop_oneof![4 => pieces, 2 => whole, 1 => "[0-9A-Za-z:+/., ()-]{0,24}"]
}

/// Whether a constraint for exactly `value` holds at this current time.
fn is_equal_date(value: &str, current_time: &str) -> bool {
    let bound = |operator: &str| json!({ "contextName": "currentTime", "operator": operator, "value": value, "inverted": true });
    let document = json!({ "features": [{ "name": "f", "enabled": true, "strategies": [
        { "name": "default", "constraints": [bound("DATE_AFTER"), bound("DATE_BEFORE")] },
    ]}]});
    let (engine, _) = Engine::compile(&Document::parse(document.to_string().as_bytes()).unwrap());
    let context = Context {
        current_time: Some(current_time),
        now: Timestamp::from_second(1).unwrap(),
        ..Context::default()
    };
    let id = engine.ids().next().unwrap();
    engine.evaluate(id, &engine.bind(&context)).is_on()
}

/// Whether a constraint with this value compiles.
fn is_date(value: &str) -> bool {
    let constraint =
        json!({ "contextName": "currentTime", "operator": "DATE_AFTER", "value": value });
    let document = json!({ "features": [{ "name": "f", "enabled": true, "strategies": [
        { "name": "default", "constraints": [constraint] },
    ]}]});
    Engine::compile(&Document::parse(document.to_string().as_bytes()).unwrap()).1.is_empty()
}

#[tokio::test]
#[ignore = "needs the npm packages, see tests/run"]
async fn dates_parse_as_in_node() {
    let mut command = node("dates.mjs");
    command.env("TZ", "UTC");
    let mut node = Driver::start("Node", command.into(), &Value::Null).await;
    let mut random = TestRunner::deterministic();
    let mut texts: Vec<String> = DATE_TEXTS.map(str::to_owned).into();
    texts.extend((0..20_000).map(|_| date_like_text().new_tree(&mut random).unwrap().current()));
    let response = node.call("read", json!(texts)).await;
    let read = response["milliseconds"].as_array().unwrap();
    let mut dates = 0;
    for (text, read) in texts.iter().zip(read) {
        assert_eq!(is_date(text), !read.is_null(), "{text:?} is {read}");
        let Some(milliseconds) = read.as_i64() else { continue };
        dates += 1;
        // Only years of four digits.
        if !(-62_167_219_200_000..253_370_764_800_000).contains(&milliseconds) {
            continue;
        }
        let iso = Timestamp::from_millisecond(milliseconds).unwrap().to_string();
        assert!(is_equal_date(text, &iso), "{text:?} is {iso} in a constraint");
        assert!(text.is_empty() || is_equal_date(&iso, text), "{text:?} is {iso} in a context");
    }
    assert!(dates > 2_000, "{dates} of {} are dates", texts.len());
    node.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn dates_saved_by_unleash_evaluate_as_in_its_frontend_api() {
    const HERE: &str = "development";
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let texts = [
        "2024-05",
        "2024",
        "2024-5-1",
        "2024/05/01",
        "01 May 2024",
        "Wed, 01 May 2024 10:00:00 GMT",
        "2024-05-01 10:00:00 UTC",
        "May 1, 2024 10:00",
        "Wed May 01 2024 10:00:00 GMT+0200 (CEST)",
        "2124-05",
        "1 May 2124",
    ];
    for (index, text) in texts.iter().enumerate() {
        let name = format!("dates.{index}");
        unleash.create_flag(&name).await;
        let constraint =
            json!({ "contextName": "currentTime", "operator": "DATE_AFTER", "value": text });
        let strategy = json!({ "name": "default", "constraints": [constraint], "parameters": {} });
        unleash.add_strategy(&name, HERE, &strategy).await;
        unleash.enable(&name, HERE).await;
    }
    let token = unleash.create_token(TokenKind::Frontend, HERE, &["*"], "dates").await;
    let edge =
        Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
    let parapet = edge.flag("--fleet-name", "dates").start().await;
    let enabled = async |server: &str| -> Vec<String> {
        let request = http().get(format!("{server}/api/frontend"));
        let response = request.header("authorization", &token).send().await.unwrap();
        if response.status() != StatusCode::OK {
            return Vec::new();
        }
        let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        let names = body["toggles"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["name"].as_str().unwrap().to_owned());
        let mut names: Vec<_> = names.filter(|name| name.starts_with("dates.")).collect();
        names.sort();
        names
    };
    wait_until("both see what is on now", Duration::from_secs(30), async || {
        let (theirs, ours) = (enabled(&unleash.url()).await, enabled(&parapet.url()).await);
        (theirs.len() == 9 && ours == theirs).then_some(())
    })
    .await;
}
