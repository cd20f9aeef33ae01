//! The engine beside yggdrasil, Unleash's own, over the same flags in the same run.
//!
//! `evaluate` is every flag for one context. `operators` is one flag of one strategy or constraint
//! for one context, the context's reading included. `refresh` is from the text that upstream sent
//! to what serves requests: Parapet's flags, frontend answers and the listing with its entity tag,
//! beside what of this yggdrasil has, a state that evaluates; `compile` is Parapet without what
//! yggdrasil does not have. Counted per flag where there are many.
//!
//! A run of everything writes `docs/engine.md`.

#![expect(clippy::print_stdout, reason = "a program for the terminal")]

#[path = "../flags.rs"]
mod flags;
#[path = "../machine.rs"]
mod machine;
#[path = "../numbers.rs"]
mod numbers;
mod report;
#[path = "../table.rs"]
mod table;

use std::collections::HashMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use jiff::Timestamp;
use parapet::engine::{Context, Engine};
use parapet::snapshot::{Filter, Segments, Snapshot};
use parapet::token::{Environment, Projects, Scope};
use parapet::wire::features::Document;
use serde_json::{Value, json};
use unleash_types::client_features::ClientFeatures;
use unleash_yggdrasil::{EngineState, UpdateMessage};

use flags::document;
use report::Group;

const SIZES: [usize; 3] = [350, 1000, 5000];

const PROPERTIES: [(&str, &str); 3] = [("country", "v7"), ("plan", "v12"), ("version", "1.5.2")];

fn parapet(body: &str) -> (Document, Engine) {
    let document = Document::parse(body.as_bytes()).expect("the document is sound");
    let (engine, problems) = Engine::compile(&document);
    assert_eq!(problems, [], "both have to understand everything");
    (document, engine)
}

fn yggdrasil(body: &str) -> EngineState {
    let features: ClientFeatures = serde_json::from_str(body).expect("the document is sound");
    let engine = EngineState::default();
    assert!(engine.take_state(UpdateMessage::FullResponse(features)).is_none());
    engine
}

/// Who asks, as Parapet is told.
fn context() -> Context<'static> {
    Context {
        user_id: Some("user-4711"),
        session_id: Some("5f2b6a"),
        environment: Some("v3"),
        app_name: Some("v5"),
        remote_address: Some("192.168.7.9"),
        properties: &PROPERTIES,
        ..Context::default()
    }
}

/// The same, as yggdrasil is told.
fn peers_context() -> unleash_yggdrasil::Context {
    let Context { user_id, session_id, environment, app_name, remote_address, .. } = context();
    unleash_yggdrasil::Context {
        user_id: user_id.map(Into::into),
        session_id: session_id.map(Into::into),
        environment: environment.map(Into::into),
        app_name: app_name.map(Into::into),
        remote_address: remote_address.map(Into::into),
        properties: Some(PROPERTIES.map(|(name, value)| (name.into(), value.into())).into()),
        ..Default::default()
    }
}

fn evaluate(c: &mut Criterion) {
    let mut group = c.benchmark_group("evaluate");
    for size in SIZES {
        let body = document(size);
        group.throughput(Throughput::Elements(size as u64));

        let (_, engine) = parapet(&body);
        let asking = context();
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter(|| {
                let bound = engine.bind(black_box(&asking));
                engine.ids().map(|id| engine.evaluate(id, &bound).ordinal()).sum::<usize>()
            });
        });

        let peer = yggdrasil(&body);
        let asking = peers_context();
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter(|| peer.resolve_all(black_box(&asking), &None));
        });
    }
}

fn compile(c: &mut Criterion) {
    let mut group = c.benchmark_group("compile");
    for size in SIZES {
        let body = document(size);
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter_with_large_drop(|| parapet(black_box(&body)));
        });
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter_with_large_drop(|| yggdrasil(black_box(&body)));
        });
    }
}

fn refresh(c: &mut Criterion) {
    let mut group = c.benchmark_group("refresh");
    for size in SIZES {
        let body = document(size);
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter_with_large_drop(|| {
                let document = Document::parse(black_box(body.as_bytes())).expect("sound");
                let scope =
                    Scope { environment: Environment::new("bench"), projects: Projects::All };
                let snapshot = Snapshot::build(scope, document, None);
                snapshot.listing(&Projects::All, Filter::default(), Segments::Separate);
                snapshot
            });
        });
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter_with_large_drop(|| yggdrasil(black_box(&body)));
        });
    }
}

/// One strategy for each operator, then one for each kind of strategy; the context matches all.
fn strategies() -> Vec<(&'static str, Value)> {
    let constraint = |operator: &'static str, field: &str, mut operand: Value| {
        operand["contextName"] = field.into();
        operand["operator"] = operator.into();
        (operator, json!({ "name": "default", "constraints": [operand] }))
    };
    let list = |values: &[&str]| json!({ "values": values });
    let value = |value: &str| json!({ "value": value });
    let strategy = |name: &'static str, parameters: Value| {
        (name, json!({ "name": name, "parameters": parameters }))
    };
    vec![
        constraint("IN", "country", list(&["v1", "v2", "v3", "v7"])),
        constraint("NOT_IN", "country", list(&["v1", "v2", "v3", "v4"])),
        constraint("STR_STARTS_WITH", "userId", list(&["admin-", "guest-", "user-"])),
        constraint("STR_ENDS_WITH", "userId", list(&["1", "2", "11"])),
        constraint("STR_CONTAINS", "userId", list(&["er-3", "er-5", "er-4"])),
        constraint("NUM_EQ", "number", value("7")),
        constraint("NUM_GT", "number", value("6")),
        constraint("NUM_GTE", "number", value("7")),
        constraint("NUM_LT", "number", value("8")),
        constraint("NUM_LTE", "number", value("7")),
        constraint("SEMVER_EQ", "version", value("1.5.2")),
        constraint("SEMVER_GT", "version", value("1.4.0")),
        constraint("SEMVER_LT", "version", value("1.6.0")),
        constraint("DATE_AFTER", "currentTime", value("2020-01-01T00:00:00Z")),
        constraint("DATE_BEFORE", "currentTime", value("2100-01-01T00:00:00Z")),
        constraint("REGEX", "userId", value("^user-[0-9]+$")),
        strategy("default", json!({})),
        strategy(
            "flexibleRollout",
            json!({ "rollout": "99", "stickiness": "default", "groupId": "g" }),
        ),
        strategy("gradualRolloutUserId", json!({ "percentage": "99", "groupId": "g" })),
        strategy("gradualRolloutSessionId", json!({ "percentage": "99", "groupId": "g" })),
        strategy("gradualRolloutRandom", json!({ "percentage": "99" })),
        strategy("userWithId", json!({ "userIds": "user-1,user-2,user-4711" })),
        strategy("remoteAddress", json!({ "IPs": "10.0.0.0/8,192.168.0.0/16" })),
    ]
}

fn operators(c: &mut Criterion) {
    let mut group = c.benchmark_group("operators");
    let known = [&PROPERTIES[..], &[("number", "7")]].concat();
    let asking = Context { properties: &known, now: Timestamp::now(), ..context() };
    let mut peers = peers_context();
    peers.properties.get_or_insert_with(HashMap::new).insert("number".into(), "7".into());
    peers.current_time = Some(asking.now.to_string());
    for (name, strategy) in strategies() {
        let flag = json!({ "name": "flag", "enabled": true, "strategies": [strategy] });
        let body = json!({ "version": 2, "features": [flag] }).to_string();

        let (_, engine) = parapet(&body);
        let flag = engine.find("flag").expect("it is there");
        group.bench_function(BenchmarkId::new("parapet", name), |b| {
            b.iter(|| engine.evaluate(flag, &engine.bind(black_box(&asking))));
        });

        let peer = yggdrasil(&body);
        group.bench_function(BenchmarkId::new("yggdrasil", name), |b| {
            b.iter(|| peer.resolve("flag", black_box(&peers), &None));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .output_directory(&folder())
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = evaluate, compile, refresh, operators
}
/// Where criterion keeps what it measures.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("criterion")
}

/// The ids of a group's benchmarks.
fn ids(group: &Group) -> Vec<String> {
    if group.by_flag {
        SIZES.iter().map(usize::to_string).collect()
    } else {
        strategies().into_iter().map(|(name, _)| name.to_owned()).collect()
    }
}

fn main() -> Result<()> {
    let began = SystemTime::now();
    benches();
    Criterion::default().configure_from_args().final_summary();
    let (tables, is_whole) = report::tables(&folder(), ids, began)?;
    if tables.is_empty() {
        return Ok(());
    }
    let facts = [("yggdrasil", &*version_of("unleash-yggdrasil")?)];
    let machine = machine::describe("run nothing else", &facts)?;
    println!("{machine}\n\n{tables}");
    if is_whole {
        report::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"), &machine, &tables)?;
    }
    Ok(())
}

/// The version of a crate that this was built with.
fn version_of(name: &str) -> Result<String> {
    let lock = include_str!("../../Cargo.lock");
    let (_, rest) =
        lock.split_once(&format!("name = \"{name}\"\nversion = \"")).context("no such crate")?;
    let (version, _) = rest.split_once('"').context("a version ends")?;
    Ok(version.to_owned())
}
