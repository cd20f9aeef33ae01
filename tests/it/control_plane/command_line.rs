//! `parapet token` and `parapet account`, beside a running instance and through its URL.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{DatabaseKind, Installation, NEW_PASSWORD, OWNER, PASSWORD, run_on_database, sign_in};
use crate::rig::{run_parapet, secret_leak_check, temp_file_with, wait_until};

#[tokio::test]
async fn command_line_changes_are_enforced_by_running_instance() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let made =
        run_on_database(&parapet, &["token", "create", "--name", "from the shell"], "").unwrap();
    let secret = made.trim();
    secret_leak_check::register(secret);
    wait_until("the new token works", Duration::from_secs(10), async || {
        (parapet.features_status(secret).await == StatusCode::OK).then_some(())
    })
    .await;
    let listed = run_on_database(&parapet, &["token", "list"], "").unwrap();
    assert!(listed.contains("from the shell") && !listed.contains(secret), "{listed}");
    run_on_database(&parapet, &["token", "revoke", "-"], secret).unwrap();
    wait_until("it is refused", Duration::from_secs(10), async || {
        (parapet.features_status(secret).await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    assert!(
        run_on_database(&parapet, &["token", "revoke", "-"], secret)
            .unwrap_err()
            .contains("no such token")
    );

    // A lost password can be replaced from the command line.
    let old = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    run_on_database(
        &parapet,
        &["account", "password", OWNER, "--password-file", "-"],
        NEW_PASSWORD,
    )
    .unwrap();
    secret_leak_check::register(NEW_PASSWORD);
    let status = old.call(Method::GET, "/api/admin/user", &Value::Null).await.0;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let owner = sign_in(&parapet, OWNER, NEW_PASSWORD).await.unwrap();
    let made =
        run_on_database(&parapet, &["account", "add", "ann", "--role", "Viewer"], "").unwrap();
    let password = made.split_whitespace().skip_while(|word| *word != "password").nth(1).unwrap();
    secret_leak_check::register(password);
    run_on_database(&parapet, &["account", "grant", "ann", "CREATE_API_TOKEN"], "").unwrap();
    let ann = sign_in(&parapet, "ann", password).await.unwrap();
    assert_eq!(ann.create_token("frontend", "ann's").await.0, StatusCode::CREATED);
    let accounts = run_on_database(&parapet, &["account", "list"], "").unwrap();
    assert!(accounts.contains("CREATE_CLIENT_API_TOKEN"), "{accounts}");
    let events = owner.get("/api/admin/events?createdBy=command%20line").await;
    assert!(events["totalEvents"].as_u64().unwrap() >= 5, "{events}");
    let wrong =
        run_on_database(&parapet, &["account", "grant", "ann", "EVERYTHING"], "").unwrap_err();
    assert!(wrong.contains("expected CREATE_CLIENT_API_TOKEN"), "{wrong}");
    assert!(
        run_on_database(&parapet, &["token", "list", "--port", "1"], "")
            .unwrap_err()
            .contains("does not apply")
    );
    let nowhere = run_parapet(&["token", "list", "--data-dir", "/nowhere"], "").unwrap_err();
    assert!(nowhere.contains("/nowhere/parapet.db cannot be opened"), "{nowhere}");
}

#[tokio::test]
async fn command_line_works_with_url_as_with_database() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let admin = run_parapet(
        &[
            &["token", "create", "--name", "shell", "--type", "admin"][..],
            &["--data-dir", parapet.data_dir().to_str().unwrap()],
        ]
        .concat(),
        "",
    );
    let admin = admin.unwrap().trim().to_owned();
    secret_leak_check::register(&admin);
    let (url, file) = (parapet.admin_url(), temp_file_with(&admin));
    let place = ["--url", &url, "--token-file", file.path().to_str().unwrap()];
    let run = |arguments: &[&str], input: &str| run_parapet(&[arguments, &place].concat(), input);
    let json = |arguments: &[&str]| -> Value {
        let printed = run(&[arguments, &["--json"]].concat(), "").unwrap();
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{printed}"))
    };
    wait_until("the new admin token works", Duration::from_secs(10), async || {
        run(&["token", "list"], "").is_ok().then_some(())
    })
    .await;

    let made = json(&["token", "create", "--name", "far", "--project", "web"]);
    let secret = made["secret"].as_str().unwrap();
    secret_leak_check::register(secret);
    assert_eq!(parapet.features_status(secret).await, StatusCode::OK);
    let listed = json(&["token", "list", "--name", "far"]);
    assert_eq!(listed[0]["projects"], json!(["web"]));
    // Both ways show the same token.
    let near =
        run_on_database(&parapet, &["token", "list", "--name", "far", "--json"], "").unwrap();
    let near: Value = serde_json::from_str(&near).unwrap();
    assert_eq!(near[0]["identifier"], listed[0]["identifier"]);
    assert_eq!(near[0]["type"], listed[0]["type"]);
    let gone = run(&["token", "revoke", "-"], secret).unwrap();
    assert!(gone.starts_with("revoked far (") && !gone.contains(secret), "{gone}");
    assert_eq!(parapet.features_status(secret).await, StatusCode::UNAUTHORIZED);
    let again = run(&["token", "revoke", "-"], secret).unwrap_err();
    assert!(again.contains("there is no such token"), "{again}");

    let made = json(&["account", "add", "ann", "--role", "Editor"]);
    let first = made["password"].as_str().unwrap();
    secret_leak_check::register(first);
    assert_eq!((&made["username"], &made["role"]), (&json!("ann"), &json!("Editor")));
    let granted = json(&["account", "grant", "ann", "CREATE_API_TOKEN"]);
    let both = json!(["CREATE_CLIENT_API_TOKEN", "CREATE_FRONTEND_API_TOKEN"]);
    assert_eq!(granted["permissions"], both);
    let taken = json(&["account", "grant", "ann", "CREATE_FRONTEND_API_TOKEN", "--revoke"]);
    assert_eq!(taken["permissions"], json!(["CREATE_CLIENT_API_TOKEN"]));
    let accounts = json(&["account", "list"]);
    let ann = accounts.as_array().unwrap().iter().find(|it| it["username"] == "ann").unwrap();
    assert_eq!(ann, &taken);
    run(&["account", "password", "ann", "--password-file", "-"], NEW_PASSWORD).unwrap();
    secret_leak_check::register(NEW_PASSWORD);
    assert!(sign_in(&parapet, "ann", first).await.is_err());
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    assert_eq!(ann.create_token("client", "ann's").await.0, StatusCode::CREATED);

    // Errors show the server's message, and never the token that was sent.
    let wrong = temp_file_with("*:*.nobody-0123456789abcdef0123456789abcdef");
    let stranger = ["--url", &url, "--token-file", wrong.path().to_str().unwrap()];
    let refused = run_parapet(&[&["token", "list"][..], &stranger].concat(), "").unwrap_err();
    assert!(refused.contains("answered 401"), "{refused}");
    assert!(!refused.contains("nobody-0123456789"), "{refused}");
    let taken = run(&["account", "add", "ann"], "").unwrap_err();
    assert!(taken.contains("answered 400: username is taken"), "{taken}");
    let absent = run(&["account", "grant", "bob", "CREATE_API_TOKEN"], "").unwrap_err();
    assert!(absent.contains("there is no account `bob`"), "{absent}");
    let silent = ["--url", "http://127.0.0.1:1", "--token-file", file.path().to_str().unwrap()];
    let silent = run_parapet(&[&["token", "list"][..], &silent].concat(), "").unwrap_err();
    assert!(silent.contains("no answer from http://127.0.0.1:1"), "{silent}");
    for (arguments, reason) in [
        (&["token", "list", "--url", &url][..], "--token-file"),
        (&["token", "list", "--url", "ftp://a", "--token-file", "-"], "expected a URL"),
        (&["token", "list", "--check-config"], "--check-config: does not apply to `token`"),
        (
            &["explain", "--flags", "a", "--flag", "b", "--print-config"],
            "does not apply to `explain`",
        ),
        (&["token", "revoke", "-", "--url", &url, "--token-file", "-"], "cannot be read twice"),
        (&["token", "list", "--url", &url, "--token-file", "-", "--data-dir", "x"], "with --url"),
    ] {
        let printed = run_parapet(arguments, "").unwrap_err();
        assert!(printed.contains(reason), "{arguments:?}: {printed}");
    }
}
