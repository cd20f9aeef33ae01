//! The engine beside yggdrasil, Unleash's own, over the same flags in the same run.
//!
//! `evaluate` is every flag for one context, `compile` is from the JSON text to something that
//! evaluates. Both are counted per flag.

mod flags;

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use parapet::engine::{Context, Engine};
use parapet::wire::features::Document;
use unleash_types::client_features::ClientFeatures;
use unleash_yggdrasil::{EngineState, UpdateMessage};

use flags::document;

const SIZES: [usize; 3] = [350, 1000, 5000];

fn yggdrasil(body: &str) -> EngineState {
    let features: ClientFeatures = serde_json::from_str(body).expect("the document is sound");
    let engine = EngineState::default();
    engine.take_state(UpdateMessage::FullResponse(features));
    engine
}

fn evaluate(c: &mut Criterion) {
    let mut group = c.benchmark_group("evaluate");
    let properties = [("country", "v7"), ("plan", "v12"), ("version", "1.5.2")];
    for size in SIZES {
        let body = document(size);
        group.throughput(Throughput::Elements(size as u64));

        let (engine, _) = Engine::compile(&Document::parse(body.as_bytes()).expect("sound"));
        let context = Context {
            user_id: Some("user-4711"),
            session_id: Some("5f2b6a"),
            environment: Some("v3"),
            app_name: Some("v5"),
            properties: &properties,
            ..Context::default()
        };
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter(|| {
                let bound = engine.bind(black_box(&context));
                engine.ids().map(|id| engine.evaluate(id, &bound).ordinal()).sum::<usize>()
            });
        });

        let peer = yggdrasil(&body);
        let context = unleash_yggdrasil::Context {
            user_id: Some("user-4711".into()),
            session_id: Some("5f2b6a".into()),
            environment: Some("v3".into()),
            app_name: Some("v5".into()),
            properties: Some(
                properties.iter().map(|&(k, v)| (k.into(), v.into())).collect::<HashMap<_, _>>(),
            ),
            ..Default::default()
        };
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter(|| peer.resolve_all(black_box(&context), &None));
        });
    }
}

fn compile(c: &mut Criterion) {
    let mut group = c.benchmark_group("compile");
    for size in SIZES {
        let body = document(size);
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("parapet", size), |b| {
            b.iter_with_large_drop(|| {
                let document = Document::parse(black_box(body.as_bytes())).expect("sound");
                let engine = Engine::compile(&document);
                (document, engine)
            });
        });
        group.bench_function(BenchmarkId::new("yggdrasil", size), |b| {
            b.iter_with_large_drop(|| yggdrasil(black_box(&body)));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = evaluate, compile
}
criterion_main!(benches);
