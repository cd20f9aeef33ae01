//! Connections that go silent at random moments, while two instances write.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;

use super::super::Session;
use super::{InstancePair, delete, wait_until_token_created};
use crate::rig::{Parapet, PostgresProxy, SilencePoint, wait_until};

/// Pseudo-random numbers from a seed.
struct SeededRandom(u64);

impl SeededRandom {
    fn below(&mut self, sides: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// The responses to a writer.
#[derive(Default)]
struct WriterLog {
    /// Tokens that were created: their names and secrets.
    created: Vec<(String, String)>,
    /// Secrets of tokens that were deleted.
    deleted: Vec<String>,
    /// Names of tokens whose outcome is unknown.
    uncertain: Vec<String>,
}

/// Creates and deletes tokens until `end`.
async fn write_until(parapet: &Parapet, session: &Session, name: &str, end: Instant) -> WriterLog {
    let mut reported = WriterLog::default();
    let mut count = 0;
    while Instant::now() < end {
        count += 1;
        let name = format!("{name} {count}");
        let (status, made) = session.create_token("client", &name).await;
        if status != StatusCode::CREATED {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{made}");
            reported.uncertain.push(name);
            // As a client does that retries later.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        let secret = made["secret"].as_str().unwrap().to_owned();
        assert_eq!(
            parapet.features_status(&secret).await,
            StatusCode::OK,
            "what is made is in force"
        );
        if count % 2 == 0 {
            reported.created.push((name, secret));
            continue;
        }
        match delete(session, &secret).await {
            StatusCode::OK => {
                let status = parapet.features_status(&secret).await;
                assert_eq!(status, StatusCode::UNAUTHORIZED, "what is deleted is refused");
                reported.deleted.push(secret);
            }
            // A deletion without a response may have been done.
            StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE => {
                reported.uncertain.push(name);
            }
            other => panic!("{other}"),
        }
    }
    reported
}

/// Uses a flag until `end`, each time as a new application. Returns the names of the applications whose
/// usage was acknowledged.
async fn use_flag(parapet: &Parapet, secret: &str, name: &str, end: Instant) -> Vec<String> {
    let mut acknowledged = Vec::new();
    while Instant::now() < end {
        let app = format!("{name} {}", acknowledged.len());
        parapet.report_usage(secret, &app, &json!({ "first": { "yes": 1, "no": 0 } })).await;
        acknowledged.push(app);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    acknowledged
}

/// The number of uses of the flag by application.
async fn usage_by_application(session: &Session) -> BTreeMap<String, u64> {
    let usage = session.get("/api/admin/client-metrics/features/first/raw").await;
    let mut uses = BTreeMap::new();
    for hour in usage["data"].as_array().unwrap() {
        let app = hour["appName"].as_str().unwrap().to_owned();
        *uses.entry(app).or_default() += hour["yes"].as_u64().unwrap();
    }
    uses
}

/// Injects one fault after the other until `end`.
async fn inject_faults(proxies: &[PostgresProxy], dice: &mut SeededRandom, end: Instant) {
    let moments = [
        "COMMIT",
        "SELECT * FROM tokens",
        "INSERT INTO tokens",
        "pg_advisory",
        "DELETE",
        "INSERT INTO usage_batches",
        "INSERT INTO flag_usage",
    ];
    while Instant::now() < end {
        let proxy = &proxies[usize::try_from(dice.below(2)).unwrap()];
        let moment = moments[usize::try_from(dice.below(7)).unwrap()];
        match dice.below(5) {
            0 => proxy.silence_next_at(SilencePoint::BeforeStatement(moment)),
            1 => proxy.silence_next_at(SilencePoint::AfterStatement(moment)),
            2 => proxy.silence_connections(""),
            3 => proxy.silence_connections("LISTEN"),
            _ => {
                proxy.refuse().await;
                tokio::time::sleep(Duration::from_millis(dice.below(2000))).await;
                proxy.restore().await;
            }
        }
        tokio::time::sleep(Duration::from_millis(4000 + dice.below(5000))).await;
    }
    for proxy in proxies {
        proxy.restore().await;
    }
}

/// One minute of faults while both instances write.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn random_silence_loses_no_acknowledged_write_and_instances_agree() {
    let pair = InstancePair::start().await;
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let end = Instant::now() + Duration::from_mins(1);
    let proxies = [pair.proxy_of_one.clone(), pair.proxy_of_two.clone()];
    let (owner, owner_of_two) = (&pair.owner, pair.owner_of_two());
    let user = pair.token("user").await;
    let mut dice = SeededRandom(seed);
    let (of_one, of_two, more, used_at_one, used_at_two, ()) = tokio::join!(
        write_until(&pair.one, owner, "one", end),
        write_until(&pair.two, &owner_of_two, "two", end),
        write_until(&pair.one, owner, "more", end),
        use_flag(&pair.one, &user, "one", end),
        use_flag(&pair.two, &user, "two", end),
        inject_faults(&proxies, &mut dice, end),
    );
    wait_until_token_created(owner, Duration::from_secs(20)).await;
    wait_until_token_created(&owner_of_two, Duration::from_secs(20)).await;
    let reported = [of_one, of_two, more];
    let made: usize = reported.iter().map(|reported| reported.created.len()).sum();
    let deleted: usize = reported.iter().map(|reported| reported.deleted.len()).sum();
    println!("made {made}, deleted {deleted}");
    assert!(made > 20 && deleted > 20, "there was some success: {made}, {deleted}");

    let names = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let at_one = wait_until("both have the same tokens", Duration::from_secs(20), async || {
        let at_one = names(owner.token_names().await);
        (at_one == names(owner_of_two.token_names().await)).then_some(at_one)
    })
    .await;
    for parapet in [&pair.one, &pair.two] {
        for reported in &reported {
            for (name, secret) in &reported.created {
                assert_eq!(
                    parapet.features_status(secret).await,
                    StatusCode::OK,
                    "{name}, seed {seed}"
                );
            }
            for secret in &reported.deleted {
                let status = parapet.features_status(secret).await;
                assert_eq!(status, StatusCode::UNAUTHORIZED, "seed {seed}");
            }
        }
    }
    for reported in &reported {
        for (name, _) in &reported.created {
            let count = at_one.iter().filter(|it| *it == name).count();
            assert_eq!(count, 1, "{name}, seed {seed}");
        }
        for name in &reported.uncertain {
            let count = at_one.iter().filter(|it| *it == name).count();
            assert!(count <= 1, "{name}: {count}, seed {seed}");
        }
    }
    // Batches are stored again until the database acknowledges them, and are still counted once.
    let used: Vec<String> = [used_at_one, used_at_two].concat();
    assert!(used.len() > 200, "flags were used: {}", used.len());
    let stored = wait_until("all usage is stored", Duration::from_mins(2), async || {
        let stored = usage_by_application(owner).await;
        (stored.len() >= used.len()).then_some(stored)
    })
    .await;
    let once: BTreeMap<_, _> = used.into_iter().map(|app| (app, 1)).collect();
    assert_eq!(stored, once, "seed {seed}");
    assert_eq!(usage_by_application(&owner_of_two).await, once, "seed {seed}");
}
