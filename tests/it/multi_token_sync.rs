//! An edge whose tokens each see one project, one of which may fail, and environments that appear and
//! disappear.
//!
//! The upstream is scripted, because a real open-source Unleash has only one project.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;

use crate::rig::{FEATURES, Parapet, ScriptedUpstream, wait_until};

const TOKEN_A: &str = "a:development.of-project-a-0123456789abcdef012345";
const TOKEN_B: &str = "b:development.of-project-b-0123456789abcdef012345";

const TIMEOUT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn change_is_served_when_another_token_fails_in_the_same_poll() {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN_A, &["a/a1"]);
    upstream.set_flags(TOKEN_B, &["b/b1"]);
    let setup = Parapet::edge(&upstream.url()).env("TOKENS", format!("{TOKEN_A},{TOKEN_B}"));
    let parapet = setup.with_short_intervals().start().await;
    parapet.wait_until_served(TOKEN_A, &["a1"]).await;
    parapet.wait_until_served(TOKEN_B, &["b1"]).await;
    // Either token may be polled first: a change with one coincides with a failure of the other.
    for (sound, failing, flag) in [(TOKEN_A, TOKEN_B, "a/a2"), (TOKEN_B, TOKEN_A, "b/b2")] {
        upstream.fail(FEATURES, failing, StatusCode::INTERNAL_SERVER_ERROR);
        upstream.set_flags(sound, &[flag]);
        upstream.wait_until_polled(&[sound]).await;
        upstream.clear_failures();
        parapet.wait_until_served(sound, &[&flag[2..]]).await;
    }
}

#[tokio::test]
async fn flags_of_rejected_token_stay_and_it_is_retried() {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN_A, &["a/a1"]);
    upstream.set_flags(TOKEN_B, &["b/b1"]);
    let setup = Parapet::edge(&upstream.url()).env("TOKENS", format!("{TOKEN_A},{TOKEN_B}"));
    let parapet = setup.with_short_intervals().start().await;
    parapet.wait_until_served(TOKEN_A, &["a1"]).await;
    parapet.wait_until_served(TOKEN_B, &["b1"]).await;
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        upstream.fail(FEATURES, TOKEN_A, status);
        upstream.set_flags(TOKEN_B, &[&format!("b/{}", status.as_str())]);
        parapet.wait_until_served(TOKEN_B, &[status.as_str()]).await;
        upstream.wait_until_polled(&[TOKEN_A]).await;
        assert_eq!(parapet.served_flags(TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    }
    upstream.clear_failures();
    upstream.set_flags(TOKEN_A, &["a/a2"]);
    parapet.wait_until_served(TOKEN_A, &["a2"]).await;
}

#[tokio::test]
async fn flags_never_fetched_are_unavailable_instead_of_empty() {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN_A, &["a/a1"]);
    upstream.set_flags(TOKEN_B, &["b/b1"]);
    let parapet = Parapet::edge(&upstream.url()).with_short_intervals().start_listening().await;
    assert_eq!(parapet.served_flags(TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    assert_eq!(parapet.served_flags(TOKEN_B).await, Ok(vec!["b1".to_owned()]), "it waits for them");

    parapet.wait_until_stored("b1").await;
    parapet.terminate().await;
    upstream.set_flags(TOKEN_A, &["a/a2"]);
    parapet.restart();
    parapet.wait_until_ready().await;
    parapet.wait_until_served(TOKEN_A, &["a2"]).await;
    parapet.wait_until_stored("a2").await;
    parapet.terminate().await;
    upstream.fail("/", "", StatusCode::SERVICE_UNAVAILABLE);
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(parapet.served_flags(TOKEN_A).await, Ok(vec!["a2".to_owned()]));
    assert_eq!(
        parapet.served_flags(TOKEN_B).await,
        Ok(vec!["b1".to_owned()]),
        "its token may be presented again, and no other flags were fetched since"
    );
}

#[tokio::test]
async fn flags_that_cannot_be_fetched_get_503() {
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN_A, &["a/a1"]);
    upstream.set_flags(TOKEN_B, &["b/b1"]);
    upstream.fail(FEATURES, TOKEN_B, StatusCode::INTERNAL_SERVER_ERROR);
    let parapet = Parapet::edge(&upstream.url()).with_short_intervals().start_listening().await;
    assert_eq!(parapet.served_flags(TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    for _ in 0..2 {
        assert_eq!(parapet.served_flags(TOKEN_B).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    }
    upstream.clear_failures();
    parapet.wait_until_served(TOKEN_B, &["b1"]).await;
}

const ADMIN: &str = "*:*.admin-0123456789abcdef0123456789abcdef";
const DEVELOPMENT: &str = "*:development.client-0123456789abcdef0123456789";
const PRODUCTION: &str = "*:production.client-0123456789abcdef0123456789ab";

#[tokio::test]
async fn disabled_environment_is_not_served_from_the_store() {
    let upstream = ScriptedUpstream::start().await;
    upstream.state().environments = vec![("development", true), ("production", true)];
    let parapet =
        Parapet::edge(&upstream.url()).admin_token(ADMIN).with_short_intervals().start().await;
    assert!(parapet.served_flags(DEVELOPMENT).await.is_ok());
    assert!(parapet.served_flags(PRODUCTION).await.is_ok());
    parapet.terminate().await;
    upstream.state().environments = vec![("development", true), ("production", false)];
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until("production is not served", TIMEOUT, async || {
        (parapet.served_flags(PRODUCTION).await == Err(StatusCode::FORBIDDEN)).then_some(())
    })
    .await;
    assert!(parapet.served_flags(DEVELOPMENT).await.is_ok());
    let (_, status_page) = parapet.admin_get("/status").await;
    let environments = status_page["environments"].as_array().unwrap();
    assert_eq!(environments.len(), 1, "{status_page}");
    parapet.terminate().await;

    // An Unleash has at least one enabled environment; none is a fault.
    upstream.state().environments = vec![("development", false), ("production", false)];
    parapet.restart();
    parapet.wait_until_ready().await;
    assert!(parapet.served_flags(DEVELOPMENT).await.is_ok());
}

#[tokio::test]
async fn edge_with_selected_environments_names_those_it_does_not_serve() {
    let upstream = ScriptedUpstream::start().await;
    let setup =
        Parapet::edge(&upstream.url()).admin_token(ADMIN).flag("--environments", "development");
    let parapet = setup.with_short_intervals().start().await;
    assert!(parapet.served_flags(DEVELOPMENT).await.is_ok());
    let (status, body) = parapet.get(FEATURES, PRODUCTION).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(body["message"], "this instance does not serve the environment of this token");
}

#[tokio::test]
async fn unleash_edge_backup_serves_selected_environments_and_existing_projects_only() {
    let folder = tempfile::tempdir().unwrap();
    let flags =
        |name| json!({"version": 2, "features": [{"name": name, "project": "a", "enabled": true}]});
    let features = json!([["development", flags("dev")], ["production", flags("prod")]]);
    std::fs::write(folder.path().join("unleash_features.json"), features.to_string()).unwrap();
    let known = |token: &str, environment: &str, project: &str| {
        json!({"token": token, "type": "client", "environment": environment, "projects": [project],
            "status": "Validated"})
    };
    let tokens = json!([known(TOKEN_A, "development", "a"), known(PRODUCTION, "production", "*")]);
    std::fs::write(folder.path().join("unleash_tokens.json"), tokens.to_string()).unwrap();
    let upstream = ScriptedUpstream::start().await;
    for token in [TOKEN_A, TOKEN_B, "*:development.minted-0123456789abcdef0123456789"] {
        upstream.fail(FEATURES, token, StatusCode::BAD_GATEWAY);
    }
    let folder = folder.path().to_str().unwrap();
    let setup =
        Parapet::edge(&upstream.url()).admin_token(ADMIN).flag("--environments", "development");
    let parapet = setup.flag("--backup-folder", folder).with_short_intervals().start().await;
    assert_eq!(parapet.served_flags(TOKEN_A).await, Ok(vec!["dev".to_owned()]));
    assert_eq!(parapet.served_flags(TOKEN_B).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(parapet.served_flags(PRODUCTION).await, Err(StatusCode::FORBIDDEN));
}

#[tokio::test]
async fn token_from_unleash_edge_backup_fetches_current_flags() {
    let folder = tempfile::tempdir().unwrap();
    let old = json!({"version": 2, "features": [{"name": "old", "project": "a", "enabled": true}]});
    let features = json!([["development", old]]);
    std::fs::write(folder.path().join("unleash_features.json"), features.to_string()).unwrap();
    let tokens = json!([{"token": TOKEN_A, "type": "client", "environment": "development", "projects": ["a"],
        "status": "Validated"}]);
    std::fs::write(folder.path().join("unleash_tokens.json"), tokens.to_string()).unwrap();
    let upstream = ScriptedUpstream::start().await;
    upstream.set_flags(TOKEN_A, &["a/new"]);
    let setup = Parapet::edge(&upstream.url()).flag("--tokens", TOKEN_A);
    let setup = setup.flag("--backup-folder", folder.path().to_str().unwrap());
    let parapet = setup.with_short_intervals().start().await;
    wait_until("the new flag is served", TIMEOUT, async || {
        (parapet.served_flags(TOKEN_A).await == Ok(vec!["new".to_owned()])).then_some(())
    })
    .await;
}
