//! Tokens that are created in the console, and the code that it shows for them.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::browser::{Console, OWNER, PAGES, PASSWORD, generate_traffic, standalone, text_of};
use crate::rig::{Sdk, secret_leak_check, tests_dir, wait_until};

#[tokio::test]
async fn token_created_in_the_console_works_in_an_sdk() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;

    let refused = console.try_to_sign_in(OWNER, "not the password").await;
    assert_eq!(refused["signedIn"], false);
    console.assert_accessible("sign-in").await;
    console.screenshot("sign-in").await;
    console.sign_in(OWNER, PASSWORD).await;

    // Advanced → API access → New API token.
    let navigation = console.call("navigation", Value::Null).await;
    let (advanced, access) = ("ADVANCED", "API ACCESS");
    let displayed = text_of(&navigation["text"]).to_uppercase();
    assert!(displayed.find(advanced).unwrap() < displayed.find(access).unwrap(), "{displayed}");
    console.open_section("API access").await;
    let wrong = console.call("create_token_wrongly", json!({ "name": "   " })).await;
    assert_eq!(wrong["messages"].as_array().unwrap().len(), 1, "{wrong}");
    let form = json!({ "name": "checkout", "kind": "Backend", "environment": "development" });
    let made = console.call("create_token", form).await;
    let secret = text_of(&made["secret"]).to_owned();
    secret_leak_check::register(&secret);
    assert_eq!(made["clipboard"], secret.as_str(), "Copy copies the secret");
    for sdk in ["curl", "Node", "Python"] {
        assert!(text_of(&made["snippets"][sdk]).contains(&secret), "{sdk} has a snippet");
    }
    console.call("close_dialog", Value::Null).await;
    assert!(!console.text().await.contains(&secret), "it is shown once");
    let rows = console.rows("API tokens", "Name", "checkout").await;
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((&row["Type"], &row["Environment"]), (&json!("Backend"), &json!("development")));
    assert_eq!(row["Last seen"], "Never");

    // A real SDK with that secret gets flags and reports usage, which the console then shows.
    let mut sdk = Sdk::node(&parapet.url(), &secret, "checkout").await;
    assert!(sdk.evaluate(json!({})).await["demo.on-for-all"].enabled);
    sdk.use_flag("demo.on-for-all", 7).await;
    sdk.flush().await;
    sdk.close().await;
    console.open_section("Flags").await;
    console.call("open_flag", json!({ "flag": "demo.on-for-all" })).await;
    wait_until("the console shows the usage", Duration::from_secs(30), async || {
        let shown = console.text().await;
        if shown.contains("7 yes") && shown.contains("checkout") {
            return Some(());
        }
        console.call("reload", json!({ "heading": "demo.on-for-all" })).await;
        None
    })
    .await;
    console.open_section("Overview").await;
    assert!(console.text().await.contains("checkout"), "the application is connected");

    // The page is accessible with a screen reader, on a phone and in the dark theme.
    let frontend = json!({ "name": "web shop", "kind": "Frontend", "environment": "production",
        "projects": ["default"] });
    console.open_section("API access").await;
    let made = console.call("create_token", frontend).await;
    secret_leak_check::register(text_of(&made["secret"]));
    assert!(text_of(&made["snippets"]["Frontend SDK"]).contains(text_of(&made["secret"])));
    console.assert_accessible("the new secret").await;
    console.call("close_dialog", Value::Null).await;
    let load = JoinSet::from_iter([generate_traffic(parapet.url(), secret.clone())]);
    for (section, picture) in PAGES {
        console.open_section(section).await;
        if section == "Overview" {
            console.call("chart", json!({ "moments": 5 })).await;
        }
        console.assert_no_overflow(section).await;
        console.assert_accessible(section).await;
        console.screenshot(picture).await;
    }
    drop(load);

    // Deleting asks for confirmation, and revokes the token.
    let status = async || parapet.features_status(&secret).await;
    assert_eq!(status().await, StatusCode::OK);
    console.open_section("API access").await;
    console.call("delete_token", json!({ "name": "checkout" })).await;
    wait_until("the token is refused", Duration::from_secs(30), async || {
        (status().await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    assert!(console.rows("API tokens", "Name", "checkout").await.is_empty());
    console.open_section("Audit log").await;
    let log = console.rows("Audit log", "Of", "checkout").await;
    let displayed: Vec<_> = log.iter().map(|row| text_of(&row["What"])).collect();
    assert_eq!(displayed, ["API token deleted", "API token created"]);
    console.call("sign_out", Value::Null).await;
    console.close().await;
}

/// The first line that a program prints for this standard input.
async fn first_line(program: &Path, arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(tests_dir()).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = command.spawn().unwrap();
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    let mut line = String::new();
    let mut output = BufReader::new(process.stdout.take().unwrap());
    let read = tokio::time::timeout(Duration::from_secs(150), output.read_line(&mut line)).await;
    read.unwrap_or_else(|_| panic!("{} prints nothing", program.display())).unwrap();
    line.trim().to_owned()
}

#[tokio::test]
async fn code_snippets_of_the_console_work_unchanged() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.open_section("API access").await;
    let (shell, python) = (Path::new("/bin/sh"), tests_dir().join(".venv/bin/python"));
    let module = ["--input-type=module", "-"];
    for (kind, ways) in [
        (
            "Backend",
            &[
                ("curl", shell, &["-"][..], "\"features\":["),
                ("Node", Path::new("node"), &module, "true"),
                ("Python", &python, &["-"], "True"),
            ][..],
        ),
        (
            "Frontend",
            &[
                ("curl", shell, &["-"], "demo.on-for-all"),
                ("Frontend SDK", Path::new("node"), &module, "true"),
            ],
        ),
        ("Admin", &[("curl", shell, &["-"], "\"tokenName\":\"for Admin\"")]),
    ] {
        let form = json!({ "name": format!("for {kind}"), "kind": kind });
        let made = console.call("create_token", form).await;
        secret_leak_check::register(text_of(&made["secret"]));
        console.call("close_dialog", Value::Null).await;
        assert_eq!(made["snippets"].as_object().unwrap().len(), ways.len(), "{kind}");
        for (way, program, arguments, expect) in ways {
            // The flag is a placeholder for one of the reader's flags.
            let text = text_of(&made["snippets"][way]).replace("my-flag", "demo.on-for-all");
            let displayed = first_line(program, arguments, &text).await;
            assert!(displayed.contains(expect), "{kind}, {way}: {displayed}");
        }
    }
    console.close().await;
}
