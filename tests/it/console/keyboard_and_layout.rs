//! Keyboard, layout, states and files of the console.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::browser::{Console, OWNER, PASSWORD, VIEWER_PASSWORD, standalone, text_of};
use crate::rig::{http, secret_leak_check};

#[tokio::test]
async fn console_is_usable_by_keyboard() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    for (name, then) in [("API access", "New API token"), ("New API token", "Cancel")] {
        let walk = console.call("tab_to", json!({ "name": name })).await;
        assert_eq!(walk, json!({ "found": true, "visible": true }), "{name}");
        console.call("press", json!({ "key": "Enter" })).await;
        let there = console.call("tab_to", json!({ "name": then })).await;
        assert_eq!(there["found"], true, "{then} is reached from {name}");
        console.call("press", json!({ "key": "Shift+Tab" })).await;
    }
    // Escape closes a form, and restores the focus.
    console.call("press", json!({ "key": "Escape" })).await;
    console.wait_for_focus("New API token").await;
    assert_eq!(console.call("dialog", Value::Null).await["open"], false);

    // It does not close a secret that cannot be shown again.
    for name in ["first", "second"] {
        let made = console.call("create_token", json!({ "name": name, "kind": "Backend" })).await;
        secret_leak_check::register(text_of(&made["secret"]));
        for _ in 0..3 {
            console.call("press", json!({ "key": "Escape" })).await;
        }
        assert_eq!(console.call("dialog", Value::Null).await["open"], true);
        console.call("close_dialog", Value::Null).await;
        console.wait_for_focus("New API token").await;
    }

    // Neither does the browser's back button, which would open another page behind it.
    console.open_section("Flags").await;
    console.open_section("API access").await;
    let made = console.call("create_token", json!({ "name": "third", "kind": "Backend" })).await;
    secret_leak_check::register(text_of(&made["secret"]));
    console.call("back", Value::Null).await;
    console.call("says", json!({ "text": "Open a flag to see who gets it" })).await;
    assert_eq!(console.call("dialog", Value::Null).await["open"], true);
    console.call("close_dialog", Value::Null).await;
    console.wait_for_focus("Flags").await;
    console.open_section("API access").await;

    // After a table is redrawn the focus is where it was, or else where reading starts.
    console.call("delete_token", json!({ "name": "first" })).await;
    console.wait_for_focus("API access").await;
    console.call("click", json!({ "name": "Change expiry of second" })).await;
    console.call("press", json!({ "key": "Escape" })).await;
    console.wait_for_focus("Change expiry of second").await;
    console.call("click", json!({ "name": "Change expiry of second" })).await;
    console.call("click", json!({ "name": "Save expiry" })).await;
    console.wait_for_focus("Change expiry of second").await;
    console.open_section("Accounts").await;
    let account = json!({ "username": "vera", "password": VIEWER_PASSWORD, "role": "Viewer" });
    console.call("create_account", account).await;
    let grant = json!({ "username": "vera", "kind": "Backend tokens", "permission": "Create" });
    console.call("grant", grant).await;
    console.wait_for_focus("Permissions of vera").await;
    // The overview redraws its tables continuously. Neither a slow click nor the focus is lost by it.
    console.open_section("Overview").await;
    console.call("hold", json!({ "name": "Mean time" })).await;
    console.call("chart", json!({ "moments": 2 })).await;
    console.call("release", Value::Null).await;
    console.wait_for_focus("Mean time ↑").await;
    console.call("chart", json!({ "moments": 4 })).await;
    console.wait_for_focus("Mean time ↑").await;
    console.close().await;
}

#[tokio::test]
async fn long_names_do_not_overflow_the_page() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    // Without a place for a line break.
    let long = "longname".repeat(31);
    console.open_section("API access").await;
    let form = json!({ "name": long, "kind": "Frontend", "environment": "production" });
    let made = console.call("create_token", form).await;
    secret_leak_check::register(text_of(&made["secret"]));
    console.assert_accessible("the secret of a long name").await;
    console.call("close_dialog", Value::Null).await;
    console.assert_no_overflow("API access").await;
    console.open_section("Accounts").await;
    let account = json!({ "username": long, "password": VIEWER_PASSWORD, "role": "Editor" });
    console.call("create_account", account).await;
    console.call("says", json!({ "text": long })).await;
    console.assert_no_overflow("Accounts").await;
    console.open_section("Overview").await;
    console.call("sign_out", Value::Null).await;
    console.sign_in(&long, VIEWER_PASSWORD).await;
    console.assert_no_overflow("the overview of an account with a long name").await;
    console.call("sign_out", Value::Null).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.open_section("Audit log").await;
    console.assert_no_overflow("Audit log").await;
    console.close().await;
}

#[tokio::test]
async fn empty_wrong_and_unavailable_states_are_described() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    let visit = |hash: &str, heading: &str| json!({ "hash": hash, "heading": heading });
    for (hash, heading, text) in [
        ("#/nowhere", "Not found", "There is no page at this address."),
        (
            "#/flags/nothing?environment=production",
            "nothing",
            "production has no flag with this name",
        ),
        ("#/flags?q=nothing-like-that", "Flags", "No flag matches"),
        ("#/api-access?q=nothing-like-that", "API access", "No token matches"),
        ("#/audit-log?type=user-deleted", "Audit log", "No event fits these filters."),
        ("#/audit-log?type=unheard-of", "Audit log", "The server refused"),
        ("#/audit-log?from=x&to=2026-99-99", "Audit log", "1 to "),
        ("#/overview", "Overview", "No applications yet"),
    ] {
        console.call("visit", visit(hash, heading)).await;
        console.call("says", json!({ "text": text })).await;
        console.assert_accessible(hash).await;
        console.assert_no_overflow(hash).await;
    }
    console.call("visit", visit("#/audit-log?type=unheard-of", "Audit log")).await;
    let displayed = console.text().await;
    assert_eq!(
        displayed.matches("must be one of api-token-created").count(),
        1,
        "it appears once: {displayed}"
    );

    // Errors appear beside their fields, in the words of the form.
    console.open_section("Accounts").await;
    let account = json!({ "username": "vera", "password": VIEWER_PASSWORD, "role": "Viewer" });
    console.call("create_account", account).await;
    console.call("click", json!({ "name": "New account" })).await;
    for (label, value) in
        [("Username", "VERA"), ("Email", "vera@example.org"), ("Password", VIEWER_PASSWORD)]
    {
        console.call("fill", json!({ "label": label, "value": value })).await;
    }
    console.call("click", json!({ "name": "Create account" })).await;
    let wrong = console.call("mistakes", Value::Null).await;
    assert_eq!(wrong["messages"], json!(["Is taken."]));
    console.assert_accessible("a form with a mistake").await;
    console.call("press", json!({ "key": "Escape" })).await;

    console.open_section("Overview").await;
    console.call("chart", json!({ "moments": 1 })).await;
    assert!(parapet.terminate().await.success());
    console.call("gap", Value::Null).await;
    console.call("visit", visit("#/flags", "Flags")).await;
    console.call("says", json!({ "text": "The server cannot be reached" })).await;
    console.assert_accessible("no server").await;
    console.assert_no_overflow("no server").await;
    parapet.restart();
    parapet.wait_until_ready().await;
    console.call("click", json!({ "name": "Try again" })).await;
    console.call("says", json!({ "text": "demo.on-for-all" })).await;
    console.close().await;
}

#[tokio::test]
async fn console_files_forbid_foreign_scripts_and_are_revalidated() {
    let parapet = standalone().await;
    let page = http().get(parapet.admin_url()).send().await.unwrap();
    assert_eq!(page.status(), StatusCode::OK);
    let header = |name: &str| page.headers()[name].to_str().unwrap().to_owned();
    let policy = header("content-security-policy");
    assert!(policy.contains("default-src 'none'") && policy.contains("script-src 'self';"));
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(header("x-content-type-options"), "nosniff");
    let etag = header("etag");
    let again = http().get(parapet.admin_url()).header("if-none-match", etag);
    assert_eq!(again.send().await.unwrap().status(), StatusCode::NOT_MODIFIED);
    let html = page.text().await.unwrap();
    assert!(!html.contains("<script>") && !html.contains("style=") && !html.contains("http"));
    // The data listener has no console.
    let there = http().get(parapet.url()).send().await.unwrap();
    assert_eq!(there.status(), StatusCode::NOT_FOUND);
    let odd = http().get(parapet.admin_url() + "/console/../../Cargo.toml").send().await.unwrap();
    assert_eq!(odd.status(), StatusCode::NOT_FOUND);
}
