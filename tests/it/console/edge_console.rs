//! The console of an edge.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::browser::{Console, OWNER, PAGES, PASSWORD, VIEWER_PASSWORD, standalone, text_of};
use crate::rig::{Parapet, RedisServer, Unleash, UnleashVersion, run_parapet, secret_leak_check};

#[tokio::test]
async fn console_of_an_edge_manages_accounts_and_tokens_of_unleash() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    unleash.create_enabled_flag("told-in-words", "development", &[]).await;
    let parapet = Parapet::edge(&unleash.url())
        .admin_token(unleash.admin_token())
        .arg("--admin-relay")
        // Without short timeouts: Unleash takes long to check a password.
        .flag("--features-refresh-interval-seconds", "0.5")
        .flag("--token-list-interval-seconds", "0.5")
        .flag("--upstream-request-timeout", "30")
        .start()
        .await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in("admin", "unleash4all").await;
    console.open_section("API access").await;
    let form = json!({ "name": "of the edge", "kind": "Backend", "environment": "development" });
    let made = console.call("create_token", form).await;
    let secret = text_of(&made["secret"]).to_owned();
    secret_leak_check::register(&secret);
    console.call("close_dialog", Value::Null).await;
    let text = console.text().await;
    assert!(
        text.contains("of the edge") && !text.contains(&secret),
        "lists mask what Unleash shows"
    );
    let status = async || parapet.features_status(&secret).await;
    assert_eq!(status().await, StatusCode::OK);
    for (section, _) in PAGES.iter().filter(|(section, _)| *section != "Flags") {
        console.open_section(section).await;
        console.assert_accessible(section).await;
    }
    console.open_section("Flags").await;
    console.call("open_flag", json!({ "flag": "told-in-words" })).await;
    let explained = console.call("explain", json!({ "fields": { "User ID": "7" } })).await;
    assert!(text_of(&explained["text"]).contains("On"), "{explained}");
    console.open_section("API access").await;
    console.call("delete_token", json!({ "name": "of the edge" })).await;
    assert_eq!(status().await, StatusCode::UNAUTHORIZED);
    console.close().await;
}

#[tokio::test]
async fn overview_shows_that_upstream_refuses_the_admin_token() {
    let standalone = standalone().await;
    let data_dir = standalone.data_dir();
    let token_command = |args: &[&str]| {
        run_parapet(&[&["token"], args, &["--data-dir", data_dir.to_str().unwrap()]].concat(), "")
            .unwrap()
    };
    let token = token_command(&["create", "--name", "edge", "--type", "admin"]);
    let edge = Parapet::edge(&standalone.admin_url()).admin_token(token.trim());
    let edge = edge.arg("--admin-relay").with_short_intervals().start().await;
    let mut console = Console::open(&edge.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.call("says", json!({ "text": "Accepted" })).await;
    console.open_section("API access").await;
    console.call("delete_token", json!({ "name": "edge" })).await;
    console.open_section("Overview").await;
    console.call("says", json!({ "text": "Admin token refused" })).await;
    console.call("says", json!({ "text": "Flags are served as before" })).await;
    console.close().await;
}

#[tokio::test]
async fn console_of_an_edge_shows_its_standalone_upstream() {
    let standalone = standalone().await;
    let token = run_parapet(
        &[
            &["token", "create", "--name", "edge", "--type", "admin"][..],
            &["--data-dir", standalone.data_dir().to_str().unwrap()],
        ]
        .concat(),
        "",
    );
    let edge = Parapet::edge(&standalone.admin_url()).admin_token(token.unwrap().trim());
    let edge = edge.arg("--admin-relay").start().await;
    let mut console = Console::open(&edge.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.call("says", json!({ "text": "on 2 streams" })).await;
    console.open_section("API access").await;
    let form = json!({ "name": "far", "kind": "Admin" });
    let made = console.call("create_token", form).await;
    secret_leak_check::register(text_of(&made["secret"]));
    console.call("close_dialog", Value::Null).await;
    console.call("delete_token", json!({ "name": "far" })).await;
    console.open_section("Accounts").await;
    let account = json!({ "username": "vera", "password": VIEWER_PASSWORD, "role": "Viewer" });
    console.call("create_account", account).await;
    let grant = json!({ "username": "vera", "kind": "Frontend tokens", "permission": "Delete" });
    console.call("grant", grant).await;
    console.open_section("Audit log").await;
    let log = console.rows("Audit log", "By whom", OWNER).await;
    let displayed: Vec<_> = log.iter().map(|row| text_of(&row["What"])).collect();
    let expect = [
        "Permissions changed",
        "Account created",
        "API token deleted",
        "API token created",
        "Signed in",
    ];
    assert_eq!(displayed, expect);
    console.close().await;
}

#[tokio::test]
#[ignore = "needs redis-server, a browser and the npm packages, see tests/run"]
async fn overview_shows_the_fleet_of_an_edge_and_that_its_redis_fails() {
    let (standalone, mut redis) = (standalone().await, RedisServer::start().await);
    let data_dir = standalone.data_dir();
    let create = ["token", "create", "--name", "edge", "--type", "admin", "--data-dir"];
    let token = run_parapet(&[&create[..], &[data_dir.to_str().unwrap()]].concat(), "").unwrap();
    let edge =
        Parapet::edge(&standalone.admin_url()).admin_token(token.trim()).arg("--admin-relay");
    let edge = edge.flag("--instance-id", "edge-1").flag("--fleet-name", "north");
    let edge = edge.env("PARAPET_STORE", redis.url()).start().await;
    let mut console = Console::open(&edge.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    for text in ["north", "1 instance: edge-1", "Redis responds", "flags of development", "Leads"] {
        console.call("says", json!({ "text": text })).await;
    }
    console.assert_accessible("Overview").await;
    console.assert_no_overflow("Overview").await;
    console.screenshot("fleet").await;
    redis.kill();
    console.call("says", json!({ "text": "Redis fails" })).await;
    console.call("says", json!({ "text": "Fetches for itself" })).await;
    console.close().await;
}
