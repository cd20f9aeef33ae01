//! Compares the engine with yggdrasil, Unleash's own engine, on the same flags in the same run.
//!
//! `evaluate` evaluates every flag for one context. `operators` evaluates one flag with one strategy or
//! constraint, including reading the context. `refresh` goes from the text that upstream sent to a state
//! that serves requests: for Parapet the compiled flags, the JSON for frontends, and the client-features
//! body with its entity tag; for yggdrasil a state that evaluates. `compile` leaves out the parts that
//! yggdrasil does not have. Benchmarks with many flags report times per flag.
//!
//! A complete run writes `docs/engine.md`.

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
use parapet::protocol::features::Document;
use parapet::served::ServedSnapshot;
use parapet::snapshot::{Filter, SegmentFormat};
use parapet::token::{Environment, Projects, Scope};
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
    assert_eq!(problems, [], "both engines have to accept all flags");
    (document, engine)
}

fn yggdrasil(body: &str) -> EngineState {
    let features: ClientFeatures = serde_json::from_str(body).expect("the document is sound");
    let engine = EngineState::default();
    assert!(engine.take_state(UpdateMessage::FullResponse(features)).is_none());
    engine
}

/// The context for Parapet.
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

/// The same context for yggdrasil.
fn yggdrasil_context() -> unleash_yggdrasil::Context {
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
        let context = context();
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter(|| {
                let bound = engine.bind(black_box(&context));
                engine.ids().map(|id| engine.evaluate(id, &bound).ordinal()).sum::<usize>()
            });
        });

        let yggdrasil = yggdrasil(&body);
        let context = yggdrasil_context();
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter(|| yggdrasil.resolve_all(black_box(&context), &None));
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
                let snapshot = ServedSnapshot::build(scope, document, None);
                snapshot.client_features(
                    &Projects::All,
                    Filter::default(),
                    SegmentFormat::Separate,
                );
                snapshot
            });
        });
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter_with_large_drop(|| yggdrasil(black_box(&body)));
        });
    }
}

/// One strategy for each operator, then one for each kind of strategy. The context matches all.
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
    let properties = [&PROPERTIES[..], &[("number", "7")]].concat();
    let parapet_context = Context { properties: &properties, now: Timestamp::now(), ..context() };
    let mut yggdrasil_context = yggdrasil_context();
    yggdrasil_context
        .properties
        .get_or_insert_with(HashMap::new)
        .insert("number".into(), "7".into());
    yggdrasil_context.current_time = Some(parapet_context.now.to_string());
    for (name, strategy) in strategies() {
        let flag = json!({ "name": "flag", "enabled": true, "strategies": [strategy] });
        let body = json!({ "version": 2, "features": [flag] }).to_string();

        let (_, engine) = parapet(&body);
        let flag = engine.find("flag").expect("it is there");
        group.bench_function(BenchmarkId::new("parapet", name), |b| {
            b.iter(|| engine.evaluate(flag, &engine.bind(black_box(&parapet_context))));
        });

        let yggdrasil = yggdrasil(&body);
        group.bench_function(BenchmarkId::new("yggdrasil", name), |b| {
            b.iter(|| yggdrasil.resolve("flag", black_box(&yggdrasil_context), &None));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .output_directory(&criterion_folder())
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = evaluate, compile, refresh, operators
}

/// The folder of criterion's measurements.
fn criterion_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("criterion")
}

/// The ids of a group's benchmarks.
fn benchmark_ids(group: &Group) -> Vec<String> {
    if group.by_flag {
        SIZES.iter().map(usize::to_string).collect()
    } else {
        strategies().into_iter().map(|(name, _)| name.to_owned()).collect()
    }
}

fn main() -> Result<()> {
    let start = SystemTime::now();
    benches();
    Criterion::default().configure_from_args().final_summary();
    let (tables, is_complete) = report::tables(&criterion_folder(), benchmark_ids, start)?;
    if tables.is_empty() {
        return Ok(());
    }
    let facts = [("yggdrasil", &*version_of("unleash-yggdrasil")?)];
    let machine = machine::describe("run nothing else", &facts)?;
    println!("{machine}\n\n{tables}");
    if is_complete {
        report::write(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"), &machine, &tables)?;
    }
    Ok(())
}

/// The version of a dependency in `Cargo.lock`.
fn version_of(name: &str) -> Result<String> {
    let lock = include_str!("../../Cargo.lock");
    let (_, rest) =
        lock.split_once(&format!("name = \"{name}\"\nversion = \"")).context("no such crate")?;
    let (version, _) = rest.split_once('"').context("the version has no end")?;
    Ok(version.to_owned())
}
