//! Users of the console with few permissions, and sessions that end.

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::browser::{Console, OWNER, PASSWORD, VIEWER_PASSWORD, standalone, text_of};
use crate::rig::{http, secret_leak_check};

#[tokio::test]
async fn viewer_sees_only_permitted_actions_and_is_denied_the_others() {
    let parapet = standalone().await;
    let mut admin = Console::open(&parapet.admin_url()).await;
    admin.sign_in(OWNER, PASSWORD).await;
    admin.open_section("API access").await;
    for (name, kind) in [("checkout", "Backend"), ("web shop", "Frontend"), ("robot", "Admin")] {
        let made = admin.call("create_token", json!({ "name": name, "kind": kind })).await;
        secret_leak_check::register(text_of(&made["secret"]));
        admin.call("close_dialog", Value::Null).await;
    }
    admin.open_section("Accounts").await;
    let account = json!({ "username": "vera", "password": VIEWER_PASSWORD, "role": "Viewer" });
    admin.call("create_account", account).await;

    let mut viewer = Console::open(&parapet.admin_url()).await;
    viewer.sign_in("vera", VIEWER_PASSWORD).await;
    let navigation = viewer.call("navigation", Value::Null).await;
    let displayed = text_of(&navigation["text"]).to_owned();
    assert!(!displayed.contains("Accounts") && !displayed.contains("Audit log"), "{displayed}");
    viewer.open_section("API access").await;
    let shows = async |viewer: &mut Console, name| {
        !viewer.rows("API tokens", "Name", name).await.is_empty()
    };
    assert!(shows(&mut viewer, "checkout").await, "everybody sees client tokens");
    assert!(!shows(&mut viewer, "robot").await, "only admins see admin tokens");
    let offered = viewer.buttons().await;
    let offers = |offered: &[String], what: &str| offered.iter().any(|it| it == what);
    assert!(!offers(&offered, "New API token") && !offers(&offered, "Delete"), "{offered:?}");
    viewer.assert_accessible("API access of a viewer").await;
    viewer.screenshot("api-access-viewer").await;

    // Actions that are not offered are denied by the API as well.
    let token = json!({ "tokenName": "own", "type": "client", "environment": "development" });
    let create = json!({ "method": "POST", "path": "api/admin/api-tokens", "body": token });
    let refused = viewer.call("ask", create).await;
    assert_eq!(refused["status"], 403, "{refused}");
    assert!(text_of(&refused["text"]).contains("CREATE_CLIENT_API_TOKEN"), "{refused}");

    // A grant takes effect at once, and is visible on the next page.
    let grant = json!({ "username": "vera", "kind": "Backend tokens", "permission": "Create" });
    admin.call("grant", grant).await;
    viewer.call("reload", json!({ "heading": "API access" })).await;
    let offered = viewer.buttons().await;
    assert!(offers(&offered, "New API token") && !offers(&offered, "Delete"), "{offered:?}");
    let made = viewer.call("create_token", json!({ "name": "own", "kind": "Backend" })).await;
    secret_leak_check::register(text_of(&made["secret"]));
    viewer.call("close_dialog", Value::Null).await;
    assert_eq!(
        parapet.get("/api/client/features", text_of(&made["secret"])).await.0,
        StatusCode::OK
    );

    admin.open_section("Audit log").await;
    let log = admin.rows("Audit log", "By whom", "vera").await;
    let displayed: Vec<_> = log.iter().map(|row| text_of(&row["What"])).collect();
    assert_eq!(displayed, ["API token created", "Permission denied", "Signed in"]);
    admin.close().await;
    viewer.close().await;
}

#[tokio::test]
async fn page_left_during_a_reload_does_not_fail() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.open_section("Accounts").await;
    console.call("withhold", json!({ "path": "api/admin/user-admin" })).await;
    let account = json!({ "username": "vera", "password": VIEWER_PASSWORD, "role": "Viewer" });
    console.call("create_account", account).await;
    console.open_section("Audit log").await;
    assert_eq!(console.rows("Audit log", "Of", "vera").await.len(), 1);
    console.close().await;
}

#[tokio::test]
async fn session_ended_elsewhere_is_reported_on_every_page() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    let elsewhere = json!({ "method": "POST", "path": "logout" });
    let ended = json!({ "text": "Your session has ended." });
    // The overview sends requests periodically.
    console.sign_in(OWNER, PASSWORD).await;
    console.call("ask", elsewhere.clone()).await;
    console.call("says", ended.clone()).await;

    // A denied page does not end the session.
    console.sign_in(OWNER, PASSWORD).await;
    console.call("refuse", json!({ "path": "status" })).await;
    console.call("says", json!({ "text": "Not available to this account" })).await;
    console.open_section("API access").await;
    console.call("ask", elsewhere).await;
    console.call("visit", json!({ "hash": "#/flags", "heading": "Sign in" })).await;
    console.call("says", ended).await;
    console.close().await;
}

async fn request_with_guessed_cookie(url: &str, number: u64) -> StatusCode {
    let cookie = format!("parapet-session={number:022}.{number:043}");
    let me = http().get(format!("{url}/api/admin/user")).header("cookie", cookie);
    me.send().await.unwrap().status()
}

#[tokio::test]
async fn owner_with_stale_cookie_signs_in_during_cookie_guessing() {
    let parapet = standalone().await;
    let url = parapet.admin_url();
    let mut number = 0;
    while request_with_guessed_cookie(&url, number).await != StatusCode::TOO_MANY_REQUESTS {
        number += 1;
    }
    let guessing = JoinSet::from_iter([async move {
        for number in 0.. {
            request_with_guessed_cookie(&url, number).await;
        }
    }]);
    let old = json!(format!("{}.{}", "o".repeat(22), "l".repeat(43)));
    let mut console = Console::open_with(&parapet.admin_url(), &old).await;
    console.sign_in(OWNER, PASSWORD).await;
    drop(guessing);
    console.close().await;
}
