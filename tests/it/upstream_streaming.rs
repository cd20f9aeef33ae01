//! An edge that streams from its upstream: what it does when the stream is refused, ends, breaks or
//! sends nonsense.
//!
//! Upstreams that misbehave are scripted; those that only crash are real.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;
use tempfile::TempDir;

use crate::rig::{
    ChaosProxy, EntityTags, FEATURES, LogEvent, Parapet, STREAM, ScriptedUpstream, event, feature,
    secret_leak_check, wait_until,
};

const TOKEN: &str = "*:development.followed-0123456789abcdef0123456789";
const ADMIN: &str = "*:*.admin-of-the-followed-0123456789abcdef0123456789";

/// Longer than the delay of one minute after some refusals.
const TIMEOUT: Duration = Duration::from_mins(2);

const FETCHING_FAILED: LogEvent = LogEvent::warn("sync::").with("error");

const OPEN_STREAMS: &str = "parapet_upstream_streams";

async fn ended_streams(parapet: &Parapet, why: &str) -> Option<f64> {
    let sample = format!("parapet_upstream_streams_ended_total{{why=\"{why}\"}}");
    parapet.metric(&sample).await
}

async fn wait_until_streaming(parapet: &Parapet) {
    wait_until("upstream's stream is followed", TIMEOUT, async || {
        (parapet.metric(OPEN_STREAMS).await == Some(1.0)).then_some(())
    })
    .await;
}

/// Waits until the log has this many lines of this kind. More are a failure.
async fn wait_until_logged(parapet: &Parapet, event: LogEvent, times: usize) {
    let lines = parapet.wait_until_logged_times(event, times).await;
    assert_eq!(lines.len(), times, "{lines:?}");
}

fn log_count(parapet: &Parapet, event: LogEvent) -> usize {
    parapet.logged(event).len()
}

/// An upstream with a stream, and one flag that every token sees.
async fn start_upstream() -> ScriptedUpstream {
    secret_leak_check::register(TOKEN);
    let upstream = ScriptedUpstream::start().await;
    set_state(&upstream, "first", 7);
    upstream.state().stream_status = StatusCode::OK;
    upstream
}

/// An upstream that rejects its stream with this status.
async fn start_upstream_without_stream(status: StatusCode) -> ScriptedUpstream {
    let upstream = start_upstream().await;
    upstream.state().stream_status = status;
    upstream
}

/// Serves this flag, as a replica might.
fn set_state(upstream: &ScriptedUpstream, flag: &str, revision: u32) {
    upstream.set_flags("*", &[&format!("default/{flag}")]);
    upstream.state().revision = Some(revision);
}

/// Replaces the flag without sending an event, and returns the event for it.
fn replace_flag(upstream: &ScriptedUpstream, flag: &str) -> String {
    let (before, revision) = {
        let state = upstream.state();
        (state.flags_of("*")[0].clone(), state.revision.unwrap() + 1)
    };
    set_state(upstream, flag, revision);
    let (before, flag) = (feature(&before), feature(&format!("default/{flag}")));
    let events = json!([
        { "type": "feature-updated", "eventId": revision, "feature": flag },
        { "type": "feature-removed", "eventId": revision, "featureName": before["name"], "project": "default" },
    ]);
    event("unleash-updated", revision, &json!({ "events": events }))
}

/// An edge that would poll once an hour.
async fn rarely_polling_edge(url: &str) -> Parapet {
    let edge = Parapet::edge(url).env("TOKENS", TOKEN);
    edge.flag("--features-refresh-interval-seconds", "3600").start().await
}

/// An edge that polls continuously whenever it polls.
async fn frequently_polling_edge(url: &str) -> Parapet {
    Parapet::edge(url).env("TOKENS", TOKEN).with_short_intervals().start().await
}

#[tokio::test]
async fn stream_is_resumed_from_last_event_after_end_or_reset() {
    let upstream = start_upstream().await;
    let parapet = rarely_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    upstream.send_event(&replace_flag(&upstream, "second"));
    parapet.wait_until_served(TOKEN, &["second"]).await;

    // Events that arrive together are published once.
    let swaps = r#"parapet_snapshot_swaps_total{environment="development"}"#;
    let before = parapet.metric(swaps).await.unwrap();
    let events = ["third", "fourth", "fifth"].map(|flag| replace_flag(&upstream, flag));
    upstream.send_event(&events.concat());
    parapet.wait_until_served(TOKEN, &["fifth"]).await;
    assert_eq!(parapet.metric(swaps).await, Some(before + 1.0));

    upstream.end_streams();
    let requests = upstream.wait_for_requests(STREAM, 2).await;
    assert_eq!(
        (&requests[0].last_event_id, requests[1].last_event_id.as_deref()),
        (&None, Some("11"))
    );
    assert_eq!(log_count(&parapet, LogEvent::POLLING), 0, "an end in good order is no news");
    wait_until_streaming(&parapet).await;
    upstream.send_event(&replace_flag(&upstream, "sixth"));
    parapet.wait_until_served(TOKEN, &["sixth"]).await;

    // Missed, because no stream was open.
    upstream.reset_streams();
    replace_flag(&upstream, "seventh");
    parapet.wait_until_served(TOKEN, &["seventh"]).await;
    let requests = upstream.wait_for_requests(STREAM, 3).await;
    assert_eq!(requests[2].last_event_id.as_deref(), Some("12"));
    assert_eq!(log_count(&parapet, LogEvent::POLLING), 1);
    wait_until_logged(&parapet, LogEvent::STREAMING, 2).await;
    assert_eq!(
        (ended_streams(&parapet, "over").await, ended_streams(&parapet, "broken").await),
        (Some(1.0), Some(1.0))
    );
    assert_eq!(upstream.requests(FEATURES).len(), 1, "it was polled once, at the start");
}

#[tokio::test]
async fn invalid_event_leads_to_a_new_snapshot() {
    let upstream = start_upstream().await;
    let parapet = rarely_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    let odd = json!({ "events": [{ "type": "feature-vanished", "eventId": 8, "name": "first" }] });
    let odd = [
        event("unleash-updated", 8, &odd),
        event("unleash-updated", 8, &json!("hello")),
        event("unleash-updated", 8, &json!({ "events": [{ "type": "hydration", "eventId": 8 }] })),
    ];
    for (count, odd) in (2..).zip(odd) {
        replace_flag(&upstream, &format!("flag-{count}"));
        upstream.send_event(&odd);
        parapet.wait_until_served(TOKEN, &[&format!("flag-{count}")]).await;
        let requests = upstream.wait_for_requests(STREAM, count).await;
        assert_eq!(requests[count - 1].last_event_id, None, "{odd}");
    }
    assert_eq!(ended_streams(&parapet, "unreadable").await, Some(3.0));
    upstream.send_event(&replace_flag(&upstream, "last"));
    parapet.wait_until_served(TOKEN, &["last"]).await;
    assert_eq!(upstream.requests(FEATURES).len(), 1);
}

#[tokio::test]
async fn edge_polls_without_stream_and_old_etags_do_not_confirm_streamed_state() {
    let upstream = start_upstream().await;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    upstream.send_event(&replace_flag(&upstream, "second"));
    parapet.wait_until_served(TOKEN, &["second"]).await;
    let before = upstream.requests(FEATURES).len();
    upstream.state().stream_status = StatusCode::SERVICE_UNAVAILABLE;
    // Upstream returns to the state of the first poll's entity tag, without an event.
    upstream.reset_streams();
    replace_flag(&upstream, "first");
    parapet.wait_until_served(TOKEN, &["first"]).await;
    let requests = upstream.wait_for_requests(FEATURES, before + 2).await;
    let tags = [before, before + 1].map(|poll| requests[poll].if_none_match.as_deref());
    assert_eq!(tags, [None, Some("\"default/first\"")]);
    upstream.state().stream_status = StatusCode::OK;
    wait_until_streaming(&parapet).await;
    upstream.send_event(&replace_flag(&upstream, "third"));
    parapet.wait_until_served(TOKEN, &["third"]).await;
    // A state from a poll has no event id.
    let requests = upstream.requests(STREAM);
    assert_eq!(requests.last().unwrap().last_event_id, None, "{requests:?}");
}

#[tokio::test]
async fn stale_replicas_do_not_bring_back_older_state() {
    let upstream = start_upstream_without_stream(StatusCode::SERVICE_UNAVAILABLE).await;
    upstream.state().entity_tags = EntityTags::Revision;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    set_state(&upstream, "second", 8);
    parapet.wait_until_served(TOKEN, &["second"]).await;
    // Through its stream.
    set_state(&upstream, "first", 7);
    upstream.state().stream_status = StatusCode::OK;
    wait_until("such a stream is closed", TIMEOUT, async || {
        (ended_streams(&parapet, "outdated").await >= Some(2.0)).then_some(())
    })
    .await;
    assert_eq!(parapet.served_flags(TOKEN).await.unwrap(), ["second"]);
    set_state(&upstream, "second", 8);
    wait_until_streaming(&parapet).await;
    upstream.send_event(&replace_flag(&upstream, "third"));
    parapet.wait_until_served(TOKEN, &["third"]).await;
    // Through polling.
    upstream.state().stream_status = StatusCode::SERVICE_UNAVAILABLE;
    set_state(&upstream, "second", 8);
    upstream.end_streams();
    let before = upstream.requests(FEATURES).len();
    upstream.wait_for_requests(FEATURES, before + 3).await;
    assert_eq!(parapet.served_flags(TOKEN).await.unwrap(), ["third"]);
}

#[tokio::test]
async fn upstream_without_stream_is_polled_until_it_hints_at_one() {
    let upstream = start_upstream_without_stream(StatusCode::NOT_FOUND).await;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    upstream.wait_for_requests(FEATURES, 6).await;
    assert_eq!(upstream.requests(STREAM).len(), 1, "it is left in peace");
    assert_eq!(log_count(&parapet, LogEvent::POLLING), 1);
    replace_flag(&upstream, "second");
    parapet.wait_until_served(TOKEN, &["second"]).await;
    let refused = "parapet_upstream_requests_total{purpose=\"stream\",outcome=\"not_offered\"}";
    assert_eq!(parapet.metric(refused).await, Some(1.0));
    assert!(!parapet.log().contains("WARN"), "{}", parapet.log());

    upstream.state().stream_status = StatusCode::OK;
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
    assert_eq!(upstream.requests(STREAM).len(), 2);
    upstream.send_event(&replace_flag(&upstream, "third"));
    parapet.wait_until_served(TOKEN, &["third"]).await;
}

#[tokio::test]
async fn edge_polls_when_upstream_requests_polling() {
    let upstream = start_upstream().await;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    let before = upstream.requests(FEATURES).len();
    upstream.send_event(&event("fetch-mode", 7, &json!("streaming")));
    upstream.send_event("event: fetch-mode\ndata: polling\n\n");
    wait_until_logged(&parapet, LogEvent::POLLING, 1).await;
    replace_flag(&upstream, "second");
    parapet.wait_until_served(TOKEN, &["second"]).await;
    upstream.wait_for_requests(FEATURES, before + 6).await;
    assert_eq!(upstream.requests(STREAM).len(), 1, "it stays unavailable");
    assert_eq!(ended_streams(&parapet, "dismissed").await, Some(1.0));
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
}

#[tokio::test]
async fn upstream_at_stream_limit_is_polled_until_retry_after() {
    let upstream = start_upstream_without_stream(StatusCode::TOO_MANY_REQUESTS).await;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    upstream.wait_for_requests(STREAM, 3).await;
    replace_flag(&upstream, "second");
    parapet.wait_until_served(TOKEN, &["second"]).await;
    assert_eq!(log_count(&parapet, LogEvent::POLLING), 1);
    upstream.state().stream_status = StatusCode::OK;
    wait_until_streaming(&parapet).await;
}

#[tokio::test]
async fn token_rejected_by_stream_only_is_polled() {
    // Unleash Edge responds so if it does not stream itself.
    let upstream = start_upstream_without_stream(StatusCode::FORBIDDEN).await;
    let parapet = frequently_polling_edge(&upstream.url()).await;
    upstream.wait_for_requests(FEATURES, 6).await;
    replace_flag(&upstream, "second");
    parapet.wait_until_served(TOKEN, &["second"]).await;
    assert_eq!(upstream.requests(STREAM).len(), 1);
    assert!(!parapet.log().contains(" WARN "), "{}", parapet.log());
    assert_eq!(log_count(&parapet, LogEvent::POLLING), 1);
}

#[tokio::test]
async fn upstream_mode_forces_polling_or_streaming() {
    let upstream = start_upstream().await;
    let edge = Parapet::edge(&upstream.url()).env("TOKENS", TOKEN).env("UPSTREAM_MODE", "poll");
    let parapet = edge.with_short_intervals().start().await;
    upstream.wait_for_requests(FEATURES, 4).await;
    assert_eq!(
        (upstream.requests(STREAM).len(), parapet.upstream_poll_count().await >= 3),
        (0, true)
    );

    upstream.state().stream_status = StatusCode::NOT_IMPLEMENTED;
    let edge =
        Parapet::edge(&upstream.url()).env("TOKENS", TOKEN).flag("--upstream-mode", "stream");
    let parapet = edge.with_short_intervals().start().await;
    let warning = LogEvent::warn("sync::").with("transport=poll");
    wait_until_logged(&parapet, warning, 1).await;
    upstream.state().stream_status = StatusCode::OK;
    upstream.state().has_stream_hint = true;
    wait_until_streaming(&parapet).await;
    assert_eq!(log_count(&parapet, warning), 1);
}

/// A real Parapet as upstream, offline, and its flag file.
async fn offline(flag: &str) -> (Parapet, TempDir, PathBuf) {
    secret_leak_check::register(TOKEN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write_flags(&file, flag);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let parapet = offline.env("CLIENT_TOKENS", TOKEN).start().await;
    (parapet, folder, file)
}

fn write_flags(file: &PathBuf, flag: &str) {
    std::fs::write(file, json!({ "features": [feature(&format!("default/{flag}"))] }).to_string())
        .unwrap();
}

#[tokio::test]
async fn restarted_upstream_is_streamed_again_without_polling() {
    let (upstream, _folder, file) = offline("first").await;
    let parapet = rarely_polling_edge(&upstream.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    let before = parapet.upstream_poll_count().await;
    write_flags(&file, "second");
    parapet.wait_until_served(TOKEN, &["second"]).await;

    upstream.kill();
    wait_until_logged(&parapet, LogEvent::POLLING, 1).await;
    assert_eq!(parapet.served_flags(TOKEN).await.unwrap(), ["second"]);
    write_flags(&file, "third");
    upstream.restart();
    parapet.wait_until_served(TOKEN, &["third"]).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 2).await;

    assert!(upstream.terminate().await.success());
    write_flags(&file, "fourth");
    upstream.restart();
    parapet.wait_until_served(TOKEN, &["fourth"]).await;
    assert_eq!(parapet.upstream_poll_count().await, before, "none was due");
    let state = r#"parapet_snapshot_age_seconds{environment="development"}"#;
    assert!(parapet.metric(state).await.unwrap() < 60.0);
}

#[tokio::test]
async fn flags_stay_during_network_failure_and_stream_resumes() {
    let (upstream, _folder, file) = offline("first").await;
    let proxy = ChaosProxy::start(&upstream.url()).await;
    let parapet = frequently_polling_edge(&proxy.url()).await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    for (flag, stalls) in [("second", false), ("third", true)] {
        let (streams, polls) = (proxy.request_count(STREAM), proxy.request_count(FEATURES));
        let seen = log_count(&parapet, FETCHING_FAILED);
        proxy.disconnect().await;
        if stalls {
            proxy.stall().await;
            wait_until("both are tried again", TIMEOUT, async || {
                (proxy.request_count(STREAM) > streams && proxy.request_count(FEATURES) > polls)
                    .then_some(())
            })
            .await;
        }
        wait_until("upstream is missed", TIMEOUT, async || {
            (log_count(&parapet, FETCHING_FAILED) > seen).then_some(())
        })
        .await;
        let before = parapet.served_flags(TOKEN).await.unwrap();
        write_flags(&file, flag);
        assert_eq!(parapet.served_flags(TOKEN).await.unwrap(), before);
        proxy.restore().await;
        parapet.wait_until_served(TOKEN, &[flag]).await;
        wait_until_streaming(&parapet).await;
        let polls = proxy.request_count(FEATURES);
        write_flags(&file, &format!("{flag}-followed"));
        parapet.wait_until_served(TOKEN, &[&format!("{flag}-followed")]).await;
        assert_eq!(proxy.request_count(FEATURES), polls, "it gets an event, and does not poll");
    }
}

#[tokio::test]
async fn stream_of_revoked_token_closes_without_removing_flags() {
    let upstream = start_upstream().await;
    let edge = Parapet::edge(&upstream.url()).flag("--token-revalidation-interval-seconds", "0.5");
    let edge = edge.flag("--features-refresh-interval-seconds", "3600");
    let parapet = edge.start_listening().await;
    assert_eq!(
        parapet.served_flags(TOKEN).await.unwrap(),
        ["first"],
        "it waits for the flags of a first-seen token"
    );
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    upstream.state().revoked.insert(TOKEN);
    wait_until("the stream is closed", TIMEOUT, async || {
        upstream.are_streams_closed().then_some(())
    })
    .await;
    assert_eq!(parapet.features_status(TOKEN).await, StatusCode::UNAUTHORIZED);
    let flags = r#"parapet_snapshot_flags{environment="development"}"#;
    assert_eq!(parapet.metric(flags).await, Some(1.0));
}

#[tokio::test]
async fn each_required_token_has_its_own_stream() {
    let tokens = ["a", "b"].map(|it| format!("{it}:development.followed-0123456789abcdef0123456"));
    for token in &tokens {
        secret_leak_check::register(token);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    let write = |names: [&str; 2]| {
        let features = ["a", "b"].into_iter().zip(names).map(|(project, name)| {
            json!({ "name": name, "project": project, "enabled": true, "strategies": [] })
        });
        let flags = json!({ "features": features.collect::<Vec<_>>() }).to_string();
        std::fs::write(&file, flags).unwrap();
    };
    write(["one", "two"]);
    let offline = Parapet::mode("offline").flag("--bootstrap-file", &file);
    let upstream = offline.env("CLIENT_TOKENS", tokens.join(",")).start().await;
    let edge = Parapet::edge(&upstream.url()).flag("--features-refresh-interval-seconds", "3600");
    let parapet = edge.start_listening().await;
    let served = async |at: usize| {
        let (_, body) = parapet.get(FEATURES, &tokens[at]).await;
        body["features"][0]["name"].as_str().map(str::to_owned)
    };
    for (at, flag) in ["one", "two"].into_iter().enumerate() {
        assert_eq!(served(at).await.as_deref(), Some(flag));
        wait_until("it has a stream", TIMEOUT, async || {
            let expect = f64::from(u8::try_from(at + 1).unwrap());
            (parapet.metric(OPEN_STREAMS).await == Some(expect)).then_some(())
        })
        .await;
    }
    let before = parapet.upstream_poll_count().await;
    assert_eq!(before, 2, "a token with a stream is not polled");
    for names in [["three", "two"], ["three", "four"], ["five", "six"]] {
        write(names);
        wait_until("both get the event", TIMEOUT, async || {
            let both = (served(0).await, served(1).await);
            (both == (Some(names[0].to_owned()), Some(names[1].to_owned()))).then_some(())
        })
        .await;
    }
    assert_eq!(parapet.upstream_poll_count().await, before);
}

#[tokio::test]
async fn edge_in_front_of_standalone_streams_with_admin_token_and_reports_streams() {
    secret_leak_check::register(ADMIN);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    write_flags(&file, "first");
    let standalone = Parapet::mode("standalone").flag("--flags", &file);
    let upstream = standalone.env("INIT_ADMIN_API_TOKENS", ADMIN).start().await;
    let edge = Parapet::edge(&upstream.admin_url()).admin_token(ADMIN);
    let parapet = edge.flag("--features-refresh-interval-seconds", "3600").start().await;
    wait_until_logged(&parapet, LogEvent::STREAMING, 1).await;
    let streams = async || parapet.admin_get("/status").await.1["upstream"]["streams"].clone();
    assert_eq!(streams().await, 1);
    write_flags(&file, "second");
    wait_until("the change arrives", TIMEOUT, async || {
        let (_, features) = parapet.admin_get("/internal-backstage/features").await;
        (features["development"]["features"][0]["name"] == "second").then_some(())
    })
    .await;
    upstream.kill();
    wait_until("the stream has closed", TIMEOUT, async || (streams().await == 0).then_some(()))
        .await;
}
