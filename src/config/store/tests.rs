//! URLs of stores, and the options of Unleash Edge.

use super::*;
use crate::config::{
    model::Mode,
    tests::{config, errors},
};

const EDGE: &str = "edge -u http://unleash:4242";

fn server(host: &str, port: u16) -> Server {
    Server { host: host.to_owned(), port }
}

fn edge_store_of(line: &str, env: &[(&str, &str)]) -> StoreConfig {
    let Mode::Edge(edge) = config(&format!("{EDGE} {line}"), env).mode else { panic!("edge") };
    edge.store
}

fn redis_of(line: &str, env: &[(&str, &str)]) -> RedisStoreConfig {
    match edge_store_of(line, env) {
        StoreConfig::Redis(redis) => *redis,
        other => panic!("{other:?}"),
    }
}

#[test]
fn urls_of_redis_are_parsed() {
    let redis = redis_of("--store valkeys://ann:s%40cret@[::1]:7/3?prefix=eu", &[]);
    assert_eq!(redis.client.topology, Topology::Single(server("::1", 7)));
    assert_eq!(redis.client.credentials.username.as_deref(), Some("ann"));
    assert_eq!(redis.client.credentials.password.as_ref().map(|it| it.as_str()), Some("s@cret"));
    assert_eq!((redis.client.database, redis.prefix.as_str()), (3, "eu"));
    assert!(redis.client.tls.is_some());

    let redis = redis_of("--store redis+cluster://:word@a,b:7000", &[]);
    let nodes = vec![server("a", 6379), server("b", 7000)];
    assert_eq!(redis.client.topology, Topology::Cluster(nodes));
    assert_eq!(redis.client.credentials.username, None);

    let redis = redis_of("--store redis+sentinel://a,b:7000/main/2?sentinel_password=w", &[]);
    let Topology::Sentinel { sentinels, master, credentials } = redis.client.topology else {
        panic!("sentinel")
    };
    assert_eq!(sentinels, [server("a", 26379), server("b", 7000)]);
    assert_eq!((master.as_str(), redis.client.database), ("main", 2));
    assert_eq!(credentials.password.as_ref().map(|it| it.as_str()), Some("w"));
}

#[test]
fn urls_of_folders_and_buckets_are_parsed() {
    for line in ["--store file:/var/p", "--store file:///var/p"] {
        let folder = BackupFolder::Configured("/var/p".into());
        assert!(matches!(edge_store_of(line, &[]), StoreConfig::Folder(it) if it == folder));
    }
    for (line, cloud, prefix) in [
        ("--store s3://b-1", Cloud::S3, ""),
        ("--store gs://b-1/x/y/", Cloud::Gcs, "x/y"),
        ("--store az://b-1/x", Cloud::Azure, "x"),
    ] {
        let StoreConfig::Bucket(bucket) = edge_store_of(line, &[]) else { panic!("{line}") };
        assert_eq!(bucket, Bucket { cloud, name: "b-1".to_owned(), prefix: prefix.to_owned() });
    }
}

#[test]
fn malformed_urls_are_rejected_without_repeating_them() {
    for url in [
        "s3cr3t",
        "http://s3cr3t",
        "redis:s3cr3t",
        "redis://u:s3cr3t@",
        "redis://u:s3cr3t@h:x",
        "redis://u:s3cr3t@a,b",
        "redis://u:s3cr3t@h/x",
        "redis://u:s3cr3t@h#insecure",
        "redis://u:s3cr3t@h?x=y",
        "redis+cluster://u:s3cr3t@h/1",
        "redis+sentinel://u:s3cr3t@h",
        "s3://u:s3cr3t@b",
        "s3://",
        "file:",
    ] {
        let messages = errors(&format!("{EDGE} --store {url}"), &[]);
        assert!(
            messages.len() == 1 && messages[0].starts_with("--store: expected"),
            "{messages:?}"
        );
        assert!(!messages[0].contains("s3cr3t"), "{messages:?}");
    }
}

#[test]
fn options_of_unleash_edge_mean_the_same() {
    let redis = redis_of("", &[("REDIS_URL", "rediss://ann:one@h:7/2"), ("REDIS_PASSWORD", "two")]);
    assert_eq!(redis.client.topology, Topology::Single(server("h", 7)));
    assert_eq!(redis.client.credentials.password.as_ref().map(|it| it.as_str()), Some("two"));
    assert!(redis.client.tls.is_some() && redis.client.database == 2);
    assert_eq!(redis.timeouts.load, Duration::from_secs(2));

    let env = [
        ("REDIS_HOST", "h"),
        ("REDIS_PORT", "7"),
        ("REDIS_USERNAME", "ann"),
        ("REDIS_SECURE", "true"),
        ("REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS", "500"),
    ];
    let redis = redis_of("", &env);
    assert_eq!(redis.client.topology, Topology::Single(server("h", 7)));
    assert!(redis.client.tls.is_some());
    assert_eq!(redis.timeouts.load, Duration::from_millis(500));
    assert_eq!(redis.timeouts.save, Duration::from_secs(2));

    let env = [("REDIS_URL", "redis://a:7,redis://b"), ("REDIS_MODE", "cluster")];
    let nodes = vec![server("a", 7), server("b", 6379)];
    assert_eq!(redis_of("", &env).client.topology, Topology::Cluster(nodes));

    let StoreConfig::Bucket(bucket) = edge_store_of("", &[("S3_BUCKET_NAME", "flags")]) else {
        panic!("bucket")
    };
    assert_eq!(bucket.to_string(), "s3://flags");
}

#[test]
fn stores_that_contradict_each_other_are_rejected() {
    let messages = errors(EDGE, &[("PARAPET_STORE", "redis://h"), ("REDIS_URL", "redis://h")]);
    assert_eq!(messages, ["REDIS_URL: cannot be combined with --store"]);
    let messages = errors(&format!("{EDGE} -b /tmp/x"), &[("S3_BUCKET_NAME", "b")]);
    assert_eq!(messages, ["--backup-folder: cannot be combined with --s3-bucket-name"]);
    let warnings = config(EDGE, &[("REDIS_PASSWORD", "w")]).warnings;
    assert!(
        warnings.iter().any(|it| it.contains("--redis-password has no effect")),
        "{warnings:?}"
    );
}
