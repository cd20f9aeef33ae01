//! An edge never serves an older state after a newer one, never reports stale flags as fresh, and is not
//! ready before it has flags to serve; a hanging disk does not change that.
//!
//! Most upstreams here are scripted: a real one shows the same state to every token, and has no stale
//! replicas.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::rig::{
    EntityTags, FakeWallClock, LogEvent, Parapet, STORE_TIMEOUT, ScriptedUpstream, Setup,
    TokenKind, Unleash, UnleashVersion, build_hanging_disk_library, free_port, secret_leak_check,
    wait_until,
};

const ALL: &str = "*:development.all-projects-0123456789abcdef0123456789";
const A: &str = "a:development.project-a-only-0123456789abcdef01234567";
const C: &str = "c:development.project-c-only-0123456789abcdef01234567";
const C_FRONTEND: &str = "c:development.frontend-of-c-0123456789abcdef01234567";
const A_AND_B: &str = "[]:development.projects-a-and-b-0123456789abcdef01234";
const B_AND_C: &str = "[]:development.projects-b-and-c-0123456789abcdef01234";

const TIMEOUT: Duration = Duration::from_mins(1);
const AGE: &str = r#"parapet_snapshot_age_seconds{environment="development"}"#;
const SWAPS: &str = r#"parapet_snapshot_swaps_total{environment="development"}"#;

/// An upstream whose tokens have the projects in their names.
async fn start_upstream() -> ScriptedUpstream {
    for token in [ALL, A, C, C_FRONTEND, A_AND_B, B_AND_C] {
        secret_leak_check::register(token);
    }
    let upstream = ScriptedUpstream::start().await;
    let mut state = upstream.state();
    state.entity_tags = EntityTags::Absent;
    state.projects = BTreeMap::from([(A_AND_B, &["a", "b"][..]), (B_AND_C, &["b", "c"])]);
    state.frontend_tokens.insert(C_FRONTEND);
    drop(state);
    upstream
}

/// An edge that polls twice a second.
fn edge(url: &str) -> Setup {
    Parapet::edge(url).with_short_intervals().flag("--upstream-mode", "poll")
}

/// The names of the flags that a token of any kind gets, or the status if it gets none.
async fn served_flags(parapet: &Parapet, token: &str) -> Result<Vec<String>, StatusCode> {
    if token != C_FRONTEND {
        return parapet.served_flags(token).await;
    }
    let (status, body) = parapet.get("/api/frontend", token).await;
    if status != StatusCode::OK {
        return Err(status);
    }
    let flags = body["toggles"].as_array().unwrap().iter();
    Ok(flags.map(|flag| flag["name"].as_str().unwrap().to_owned()).collect())
}

async fn wait_until_served(parapet: &Parapet, token: &str, names: &[&str]) {
    let expected = Ok(names.iter().map(|&name| name.to_owned()).collect());
    wait_until(&format!("{names:?} are served"), TIMEOUT, async || {
        (served_flags(parapet, token).await == expected).then_some(())
    })
    .await;
}

/// Whether the flags have not been confirmed since the start.
async fn is_unconfirmed(parapet: &Parapet) -> bool {
    parapet.metric(AGE).await.unwrap() > 1e6
}

async fn wait_until_confirmed(parapet: &Parapet) {
    wait_until("the flags are confirmed", TIMEOUT, async || {
        (parapet.metric(AGE).await.unwrap() < 60.0).then_some(())
    })
    .await;
}

/// Deletes the record of this name from the data directory of a stopped instance.
fn remove_record(parapet: &Parapet, name: &str) {
    let files = secret_leak_check::read_files(&parapet.data_dir())
        .into_iter()
        .map(|(path, _)| PathBuf::from(path));
    let is_meant = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(name);
    let records: Vec<_> = files.filter(is_meant).collect();
    assert!(!records.is_empty(), "{name}");
    for path in records {
        std::fs::remove_file(path).unwrap();
    }
}

#[tokio::test]
async fn flags_of_unused_tokens_are_removed_after_a_restart() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1", "c/c1"]);
    upstream.set_flags(A, &["a/a1"]);
    let parapet = edge(&upstream.url()).start_listening().await;
    wait_until_served(&parapet, ALL, &["a1", "c1"]).await;
    wait_until_served(&parapet, C_FRONTEND, &["c1"]).await;
    parapet.wait_until_stored("c1").await;
    parapet.wait_until_stored("c:development.fron****").await;
    parapet.terminate().await;

    // Project c changes, and from now on only a token of project a is in use.
    upstream.set_flags(A, &["a/a2"]);
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
    assert!(is_unconfirmed(&parapet).await);
    wait_until_served(&parapet, A, &["a2"]).await;
    upstream.wait_until_polled(&[A]).await;
    // The other token of the earlier run may still be in use.
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
    assert!(is_unconfirmed(&parapet).await);
    upstream.state().revoked.insert(ALL);
    wait_until("flags that only a revoked token has seen are removed", TIMEOUT, async || {
        // When an SDK presents it, validation finds that it is revoked.
        let _ = served_flags(&parapet, ALL).await;
        (served_flags(&parapet, C_FRONTEND).await == Err(StatusCode::SERVICE_UNAVAILABLE))
            .then_some(())
    })
    .await;
    wait_until_confirmed(&parapet).await;
    // The next start does not bring them back either.
    parapet.wait_until_stored("a2").await;
    parapet.kill();
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    wait_until_served(&parapet, C, &[]).await;
}

#[tokio::test]
async fn stored_flags_stay_while_a_configured_token_cannot_be_validated() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1", "c/c1"]);
    let mut parapet = edge(&upstream.url()).env("TOKENS", ALL).start().await;
    wait_until_served(&parapet, C_FRONTEND, &["c1"]).await;
    parapet.wait_until_stored("c1").await;
    parapet.wait_until_stored("c:development.fron****").await;
    parapet.terminate().await;

    upstream.set_flags(A, &["a/a2"]);
    upstream.set_flags(C, &["c/c2"]);
    upstream.fail("/edge/validate", C, StatusCode::SERVICE_UNAVAILABLE);
    parapet.restart_with_env("TOKENS", format!("{A},{C}"));
    parapet.wait_until_ready().await;
    wait_until_served(&parapet, A, &["a2"]).await;
    upstream.wait_until_polled(&[A]).await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
    assert!(is_unconfirmed(&parapet).await);

    // They are saved as well.
    parapet.wait_until_stored("a2").await;
    parapet.terminate().await;
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until_served(&parapet, A, &["a2"]).await;
    upstream.wait_until_polled(&[A]).await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
    upstream.clear_failures();
    wait_until_served(&parapet, C_FRONTEND, &["c2"]).await;
}

#[tokio::test]
async fn stored_flags_stay_until_sdks_present_their_tokens_again() {
    let upstream = start_upstream().await;
    upstream.set_flags(A, &["a/a1"]);
    upstream.set_flags(C, &["c/c1"]);
    let parapet = edge(&upstream.url()).start_listening().await;
    wait_until_served(&parapet, A, &["a1"]).await;
    wait_until_served(&parapet, C, &["c1"]).await;
    wait_until_served(&parapet, C_FRONTEND, &["c1"]).await;
    parapet.wait_until_stored("a1").await;
    parapet.wait_until_stored("c1").await;
    parapet.terminate().await;

    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until_served(&parapet, A, &["a1"]).await;
    upstream.wait_until_polled(&[A]).await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
    assert!(is_unconfirmed(&parapet).await);
    wait_until_served(&parapet, C, &["c1"]).await;
    wait_until_confirmed(&parapet).await;

    // The first request with a known token waits for its flags.
    parapet.terminate().await;
    remove_record(&parapet, "flags-");
    parapet.restart();
    parapet.wait_until_listening().await;
    assert_eq!(served_flags(&parapet, C).await, Ok(vec!["c1".to_owned()]));
}

#[tokio::test]
async fn edge_with_invalid_tokens_is_ready_with_stored_flags() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1", "c/c1"]);
    let parapet = edge(&upstream.url()).env("TOKENS", ALL).start().await;
    parapet.wait_until_stored("c1").await;
    parapet.terminate().await;
    remove_record(&parapet, "verdicts");
    upstream.state().revoked.insert(ALL);
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(served_flags(&parapet, C_FRONTEND).await, Ok(vec!["c1".to_owned()]));
}

#[tokio::test]
async fn newest_state_is_served_when_two_tokens_see_a_project() {
    let upstream = start_upstream().await;
    let (mut one, mut two) = (vec!["a/a1", "b/b1"], vec!["b/b1", "c/c1"]);
    upstream.set_flags(A_AND_B, &one);
    upstream.set_flags(B_AND_C, &two);
    let parapet = edge(&upstream.url()).env("TOKENS", format!("{A_AND_B},{B_AND_C}")).start().await;
    wait_until_served(&parapet, A_AND_B, &["a1", "b1"]).await;
    wait_until_served(&parapet, B_AND_C, &["b1", "c1"]).await;
    // Either token may be the first to see a change of project b; the other one sees only changes of its
    // own project.
    for round in [["b/b2", "c/c2", "a/a2"], ["b/b3", "a/a3", "c/c3"]] {
        let [b, first, second] = round;
        let leads = if first.starts_with('c') { A_AND_B } else { B_AND_C };
        let before = one[1];
        let set = |flags: &mut Vec<&'static str>, flag: &'static str| {
            let at = flags.iter().position(|it| it[..2] == flag[..2]).unwrap();
            flags[at] = flag;
        };
        let name = |flag: &str| flag[2..].to_owned();
        set(if leads == A_AND_B { &mut one } else { &mut two }, b);
        upstream.set_flags(A_AND_B, &one);
        upstream.set_flags(B_AND_C, &two);
        wait_until("the first token's change is served to both", TIMEOUT, async || {
            let both = [
                served_flags(&parapet, A_AND_B).await.ok()?,
                served_flags(&parapet, B_AND_C).await.ok()?,
            ];
            both.iter().all(|names| names.contains(&name(b))).then_some(())
        })
        .await;
        for flag in [first, second] {
            set(if flag.starts_with('a') { &mut one } else { &mut two }, flag);
            upstream.set_flags(A_AND_B, &one);
            upstream.set_flags(B_AND_C, &two);
            let token = if flag.starts_with('a') { A_AND_B } else { B_AND_C };
            wait_until("the other change is served", TIMEOUT, async || {
                let names = served_flags(&parapet, token).await.ok()?;
                assert!(
                    !names.contains(&name(before)),
                    "an older state is served again: {names:?}"
                );
                names.contains(&name(flag)).then_some(())
            })
            .await;
        }
        set(&mut one, b);
        set(&mut two, b);
        upstream.set_flags(A_AND_B, &one);
        upstream.set_flags(B_AND_C, &two);
        upstream.wait_until_polled(&[A_AND_B, B_AND_C]).await;
    }
    wait_until_served(&parapet, A_AND_B, &["a3", "b3"]).await;
    wait_until_served(&parapet, B_AND_C, &["b3", "c3"]).await;
}

/// A stale replica of upstream responds to the first requests after a restart.
async fn restart_with_stale_replica(has_revisions: bool) {
    let upstream = start_upstream().await;
    let show = |flag, revision| {
        upstream.set_flags(A, &[flag]);
        let mut state = upstream.state();
        if has_revisions {
            (state.entity_tags, state.revision) = (EntityTags::Revision, Some(revision));
        } else {
            state.entity_tags = EntityTags::Names;
        }
    };
    show("a/a2", 12);
    let parapet = edge(&upstream.url()).env("TOKENS", A).start().await;
    wait_until_served(&parapet, A, &["a2"]).await;
    parapet.wait_until_stored("a2").await;
    parapet.terminate().await;

    show("a/a1", 11);
    parapet.restart();
    parapet.wait_until_ready().await;
    upstream.wait_until_polled(&[A]).await;
    assert_eq!(
        served_flags(&parapet, A).await,
        Ok(vec!["a2".to_owned()]),
        "an older state is served"
    );
    for (flag, revision) in [("a/a2", 12), ("a/a3", 13)] {
        show(flag, revision);
        wait_until("the newest state is served", TIMEOUT, async || {
            let names = served_flags(&parapet, A).await.ok()?;
            assert_ne!(names, ["a1"], "an older state is served");
            (names == [&flag[2..]]).then_some(())
        })
        .await;
        upstream.wait_until_polled(&[A]).await;
    }
}

#[tokio::test]
async fn older_revision_is_not_served_after_a_restart() {
    restart_with_stale_replica(true).await;
}

#[tokio::test]
async fn state_without_revision_is_not_served_in_the_first_seconds_after_a_restart() {
    restart_with_stale_replica(false).await;
}

#[tokio::test]
async fn newer_revision_is_served_at_once_after_a_restart() {
    let upstream = start_upstream().await;
    upstream.set_flags(A, &["a/a1"]);
    upstream.state().entity_tags = EntityTags::Revision;
    upstream.state().revision = Some(10);
    let parapet = edge(&upstream.url()).env("TOKENS", A).start().await;
    wait_until_served(&parapet, A, &["a1"]).await;
    parapet.wait_until_stored("a1").await;
    parapet.terminate().await;

    upstream.set_flags(A, &["a/a2"]);
    upstream.state().revision = Some(11);
    let before = upstream.poll_count(A);
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until("the first response is dealt with", TIMEOUT, async || {
        (upstream.poll_count(A) > before + 1).then_some(())
    })
    .await;
    assert_eq!(served_flags(&parapet, A).await, Ok(vec!["a2".to_owned()]));
}

#[tokio::test]
async fn unchanged_flags_without_etag_are_confirmed_but_not_swapped_or_saved() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1"]);
    let parapet = edge(&upstream.url()).env("TOKENS", ALL).start().await;
    wait_until_served(&parapet, ALL, &["a1"]).await;
    parapet.wait_until_stored("a1").await;
    let record = parapet.data_dir().join("backup/flags-development.parapet");
    let saved = || std::fs::metadata(&record).unwrap().modified().unwrap();
    let before = (parapet.metric(SWAPS).await, saved());
    for _ in 0..3 {
        upstream.wait_until_polled(&[ALL]).await;
    }
    assert_eq!((parapet.metric(SWAPS).await, saved()), before);
    assert!(parapet.metric(AGE).await.unwrap() < 60.0);
    upstream.set_flags(ALL, &["a/a2"]);
    wait_until_served(&parapet, ALL, &["a2"]).await;
    assert_eq!(parapet.metric(SWAPS).await, before.0.map(|swaps| swaps + 1.0));
}

#[tokio::test]
async fn hanging_disk_delays_neither_flags_nor_shutdown() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1"]);
    let folder = tempfile::tempdir().unwrap();
    let marker = folder.path().join("hangs");
    let setup = edge(&upstream.url()).env("TOKENS", ALL).env("HANG", &marker);
    let parapet = setup.env("LD_PRELOAD", build_hanging_disk_library(folder.path())).start().await;
    wait_until_served(&parapet, ALL, &["a1"]).await;
    parapet.wait_until_stored("a1").await;

    std::fs::write(&marker, "").unwrap();
    for flag in ["a/a2", "a/a3", "a/a4"] {
        upstream.set_flags(ALL, &[flag]);
        wait_until_served(&parapet, ALL, &[&flag[2..]]).await;
    }
    wait_until("the operator can see it", TIMEOUT, async || {
        let failures = r#"parapet_store_save_failures_total{record="flags"}"#;
        parapet.metric(failures).await.filter(|count| *count > 0.0)
    })
    .await;
    assert!(parapet.metric(AGE).await.unwrap() < 60.0);
    std::fs::remove_file(&marker).unwrap();
    parapet.wait_until_stored("a4").await;

    std::fs::write(&marker, "").unwrap();
    upstream.set_flags(ALL, &["a/a5"]);
    wait_until_served(&parapet, ALL, &["a5"]).await;
    assert!(parapet.terminate().await.success(), "it ends although the disk hangs");
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn hanging_disk_does_not_delay_a_new_environment() {
    const FLEET: &str = "hanging-disk";
    // Its lists do not show whole tokens, so that the edge has to create one.
    let unleash = Unleash::start(UnleashVersion::V8SecureTokens).await;
    unleash.create_enabled_flag("there", "production", &[]).await;
    let token = unleash.create_token(TokenKind::Backend, "production", &["*"], "sdk").await;
    unleash.admin_post("/api/admin/environments/production/off", &json!({})).await;
    let folder = tempfile::tempdir().unwrap();
    let marker = folder.path().join("hangs");
    let setup = edge(&unleash.url()).admin_token(unleash.admin_token());
    let setup = setup.flag("--fleet-name", FLEET).env("HANG", &marker);
    let parapet = setup.env("LD_PRELOAD", build_hanging_disk_library(folder.path())).start().await;
    let own_tokens = async || {
        let tokens = unleash.tokens_named(&format!("parapet-{FLEET}")).await;
        let tokens = tokens.iter().map(|it| it["secret"].as_str().unwrap().to_owned());
        tokens.collect::<BTreeSet<_>>()
    };
    let before = own_tokens().await;
    assert_eq!(before.len(), 1, "production is disabled: {before:?}");
    for selector in &before {
        parapet.wait_until_stored(selector).await;
    }

    std::fs::write(&marker, "").unwrap();
    unleash.admin_post("/api/admin/environments/production/on", &json!({})).await;
    // Makes it fetch the environments at once.
    parapet.send_sighup();
    wait_until_served(&parapet, &token, &["there"]).await;
    // By then neither the read nor the save has completed.
    let failures = r#"parapet_store_save_failures_total{record="credentials"}"#;
    assert!(parapet.metric(failures).await.is_none_or(|count| count < 1.0));
    let reads = parapet.logged(LogEvent::warn("upstream::token_provisioning"));
    assert!(reads.is_empty(), "{reads:?}");
    let after = own_tokens().await;
    assert_eq!(after.len(), 2, "{after:?}");
    unleash.register_tokens_named(&format!("parapet-{FLEET}")).await;

    std::fs::remove_file(&marker).unwrap();
    for selector in &after {
        parapet.wait_until_stored(selector).await;
    }
    parapet.terminate().await;
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until_served(&parapet, &token, &["there"]).await;
    assert_eq!(own_tokens().await, after, "the stored tokens are used again");
}

#[tokio::test]
#[ignore = "needs PostgreSQL, the npm packages and libfaketime, see tests/run"]
async fn wall_clock_set_back_stops_neither_polls_nor_revocations_nor_usage() {
    const BEFORE: &str = "clock.before";
    const AFTER: &str = "clock.after";
    const APP: &str = "clock-app";
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    unleash.create_enabled_flag(BEFORE, "development", &[]).await;
    unleash.wait_until_counted(BEFORE, "development").await;
    let token =
        async |name| unleash.create_token(TokenKind::Backend, "development", &["*"], name).await;
    let (own, reporter, first, second) = (
        token("clock-own").await,
        token("clock-reporter").await,
        token("clock-first").await,
        token("clock-second").await,
    );
    let clock = FakeWallClock::new();
    // One edge learns of revocations from the token list, the other by validating each token.
    let listing = edge(&unleash.url()).admin_token(unleash.admin_token());
    let listing = clock.apply_to(listing.flag("--fleet-name", "clock")).start().await;
    unleash.register_tokens_named("parapet-clock").await;
    let asking = edge(&unleash.url()).env("TOKENS", &own);
    let asking = asking.flag("--token-revalidation-interval-seconds", "1");
    let asking = clock.apply_to(asking).start().await;
    let edges = [(&listing, &first), (&asking, &second)];
    let serves = async |parapet: &Parapet, token: &str, flag: &str| {
        served_flags(parapet, token).await.is_ok_and(|names| names.iter().any(|name| name == flag))
    };
    for (parapet, token) in edges {
        wait_until("the flag is served", TIMEOUT, async || {
            serves(parapet, token, BEFORE).await.then_some(())
        })
        .await;
        let age = parapet.metric(AGE).await.unwrap();
        assert!((0.0..60.0).contains(&age), "{age}");
    }

    // Unleash shows the hours of usage of the last two days.
    clock.set_offset("-47h");
    let yesterday = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24);
    unleash.create_enabled_flag(AFTER, "development", &[]).await;
    for (parapet, token) in edges {
        wait_until("a change is served", TIMEOUT, async || {
            serves(parapet, token, AFTER).await.then_some(())
        })
        .await;
        let log = parapet.log();
        let times = log.lines().filter_map(|line| line.split_once(' ')?.0.parse().ok());
        let times = times.collect::<Vec<jiff::Timestamp>>();
        assert!(times.iter().any(|time| *time < yesterday), "its clock is right: {log}");
        let polls = r#"parapet_upstream_requests_total{purpose="features",outcome="not_modified"}"#;
        let polls = async || parapet.metric(polls).await.unwrap_or_default();
        let enough = polls().await + 4.0;
        wait_until("polls go on", TIMEOUT, async || {
            let age = parapet.metric(AGE).await.unwrap();
            assert!((0.0..60.0).contains(&age), "{age}");
            (polls().await >= enough).then_some(())
        })
        .await;
    }

    let now = jiff::Timestamp::now();
    let registration = json!({"appName": APP, "instanceId": "one", "strategies": ["default"],
        "started": now, "interval": 15_000});
    for (parapet, _) in edges {
        let status = parapet.post("/api/client/register", &reporter, &registration).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        parapet.report_usage(&reporter, APP, &json!({BEFORE: {"yes": 3, "no": 1}})).await;
    }
    wait_until("usage of both edges is stored", STORE_TIMEOUT, async || {
        // An hour in the future of their clock is counted as the next one.
        let path = format!("/api/admin/client-metrics/features/{BEFORE}/raw?hoursBack=48");
        let stored = unleash.admin_ok(Method::GET, &path, &Value::Null).await;
        let hours = stored["data"].as_array().unwrap().iter().filter(|it| it["appName"] == APP);
        let sum = |field: &str| hours.clone().map(|it| it[field].as_u64().unwrap()).sum::<u64>();
        (sum("yes") == 6 && sum("no") == 2).then_some(())
    })
    .await;
    wait_until("the application is registered", STORE_TIMEOUT, async || {
        unleash.applications().await.iter().any(|it| it == APP).then_some(())
    })
    .await;

    for (parapet, token) in edges {
        unleash.delete_token(token).await;
        // Unleash itself accepts a deleted token for up to a minute.
        wait_until("a revoked token is refused", 2 * TIMEOUT, async || {
            (served_flags(parapet, token).await == Err(StatusCode::UNAUTHORIZED)).then_some(())
        })
        .await;
        assert!(served_flags(parapet, &reporter).await.is_ok());
    }
}

/// The status and the body of `/ready`.
async fn ready_response(parapet: &Parapet) -> (StatusCode, Value) {
    parapet.get("/internal-backstage/ready", "").await
}

#[tokio::test]
async fn edge_without_tokens_is_ready_once_a_client_token_fetches_flags() {
    let upstream = start_upstream().await;
    upstream.set_flags(ALL, &["a/a1"]);
    let parapet = edge(&upstream.url()).start_listening().await;
    let (status, body) = ready_response(&parapet).await;
    assert_eq!((status, &body["status"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("NOTREADY")));
    assert!(body["error"].as_str().unwrap().contains("token"), "{body}");
    wait_until_served(&parapet, ALL, &["a1"]).await;
    parapet.wait_until_ready().await;
    parapet.wait_until_stored("a1").await;

    // Stored flags of an earlier run can be served at once.
    parapet.terminate().await;
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(ready_response(&parapet).await, (StatusCode::OK, json!({"status": "READY"})));
}

#[tokio::test]
async fn edge_with_unreachable_upstream_is_not_ready() {
    let url = format!("http://127.0.0.1:{}", free_port());
    let admin = "*:*.admin-of-nobody-0123456789abcdef0123456789abcdef";
    let setups = [
        edge(&url),
        edge(&url).env("TOKENS", A),
        edge(&url).admin_token(admin),
        edge(&url).admin_token(admin).flag("--environments", "development"),
    ];
    for setup in setups {
        secret_leak_check::register(A);
        let parapet = setup.start_listening().await;
        let (status, body) = ready_response(&parapet).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
        assert_eq!(body["status"], "NOTREADY");
        assert!(!body["error"].as_str().unwrap().is_empty());
    }
}
