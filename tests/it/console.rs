//! The console in a real browser, and real SDKs with the tokens that were created in it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::control_plane::run_parapet;
use crate::rig::{
    Driver, Parapet, Sdk, Unleash, UnleashVersion, http, node, secret_leak_check, tests_dir,
    wait_until,
};

const OWNER: &str = "admin";
const PASSWORD: &str = "correct horse battery";
const VIEWER_PASSWORD: &str = "another long password";

/// The navigation label of each page, and the name of its screenshot.
const PAGES: [(&str, &str); 5] = [
    ("Overview", "overview"),
    ("Flags", "flags"),
    ("API access", "api-access"),
    ("Accounts", "accounts"),
    ("Audit log", "audit-log"),
];
const THEMES: [&str; 2] = ["light", "dark"];
const DESKTOP_WIDTH: u32 = 1280;
const PHONE_WIDTH: u32 = 390;
/// From a desktop to a small phone, with the widths around each change of the layout.
const VIEWPORT_WIDTHS: [u32; 8] = [1440, 1100, 1000, 900, 861, 760, 480, 320];

/// A browser with the console.
struct Console(Driver);

impl Console {
    async fn open(url: &str) -> Self {
        Self::open_with(url, &Value::Null).await
    }

    /// With a session cookie that the browser already has.
    async fn open_with(url: &str, session: &Value) -> Self {
        let chromium = PathBuf::from("/usr/bin/chromium");
        assert!(chromium.exists(), "no Chromium: tests/run installs it");
        let options = json!({ "url": url, "chromium": chromium, "session": session });
        Self(Driver::start("console", node("console.mjs").into(), &options).await)
    }

    async fn call(&mut self, command: &str, argument: Value) -> Value {
        self.0.call(command, argument).await
    }

    async fn sign_in(&mut self, username: &str, password: &str) {
        let response = self.try_to_sign_in(username, password).await;
        assert_eq!(response["signedIn"], true, "{username} cannot sign in: {}", response["text"]);
    }

    async fn try_to_sign_in(&mut self, username: &str, password: &str) -> Value {
        self.call("sign_in", json!({ "username": username, "password": password })).await
    }

    async fn open_section(&mut self, section: &str) {
        self.call("go", json!({ "section": section })).await;
    }

    async fn text(&mut self) -> String {
        self.call("text", Value::Null).await["text"].as_str().unwrap().to_owned()
    }

    /// The rows of a table that have `value` in `column`.
    async fn rows(&mut self, table: &str, column: &str, value: &str) -> Vec<Value> {
        let rows = self.call("rows", json!({ "table": table })).await["rows"].take();
        let Value::Array(rows) = rows else { panic!("no rows: {rows}") };
        rows.into_iter().filter(|row| row[column] == value).collect()
    }

    async fn buttons(&mut self) -> Vec<String> {
        let response = self.call("buttons", Value::Null).await;
        response["buttons"].as_array().unwrap().iter().map(|it| text_of(it).to_owned()).collect()
    }

    /// Panics if the page has accessibility errors, in any theme, on a desktop or a phone.
    async fn assert_accessible(&mut self, page: &str) {
        for theme in THEMES {
            for width in [DESKTOP_WIDTH, PHONE_WIDTH] {
                let found = self.call("audit", json!({ "theme": theme, "width": width })).await;
                assert_eq!(found["violations"], json!([]), "{page}, {theme}, {width} px wide");
            }
        }
    }

    /// Panics if anything overflows the page, at any width.
    async fn assert_no_overflow(&mut self, page: &str) {
        let displayed = self.call("fit", json!({ "widths": VIEWPORT_WIDTHS })).await;
        assert_eq!(displayed["overflows"], json!([]), "{page}");
    }

    /// Waits until this element has the focus.
    async fn wait_for_focus(&mut self, name: &str) {
        wait_until(&format!("the focus is on {name}"), Duration::from_secs(10), async || {
            (self.focused_element().await == name).then_some(())
        })
        .await;
    }

    async fn focused_element(&mut self) -> String {
        let focus = self.call("focus", Value::Null).await;
        text_of(&focus["name"]).to_owned()
    }

    /// Takes a screenshot of the page in each theme.
    async fn screenshot(&mut self, name: &str) {
        let folder = screenshot_dir();
        for theme in THEMES {
            let path = folder.join(format!("{name}-{theme}.png"));
            let form = json!({ "path": path, "theme": theme, "width": DESKTOP_WIDTH });
            let taken = self.call("screenshot", form).await;
            assert!(taken["bytes"].as_u64().unwrap() > 10_000, "{name} is an empty picture");
        }
    }

    /// Closes the browser. Panics if a script has failed or the page's content security policy was
    /// violated.
    async fn close(mut self) {
        let troubles = self.call("troubles", Value::Null).await;
        assert_eq!(troubles["troubles"], json!([]));
        self.0.close().await;
    }
}

/// The directory of screenshots: the one in the documentation if `PARAPET_SCREENSHOTS` is set.
fn screenshot_dir() -> PathBuf {
    let configured = std::env::var_os("PARAPET_SCREENSHOTS").map(PathBuf::from);
    let folder =
        configured.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("console"));
    std::fs::create_dir_all(&folder).unwrap();
    std::path::absolute(folder).unwrap()
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// A standalone with the example flags, whose owner has the password above.
async fn standalone() -> Parapet {
    standalone_with(&Path::new(env!("CARGO_MANIFEST_DIR")).join("config/flags.json")).await
}

/// A standalone with other flags.
async fn standalone_with(flags: &Path) -> Parapet {
    for password in [PASSWORD, VIEWER_PASSWORD] {
        secret_leak_check::register(password);
    }
    Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--flag-environments", "development,production")
        .flag("--metrics-interval-seconds", "1")
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await
}

/// Polls for flags until dropped, sometimes with an unknown token.
async fn generate_traffic(url: String, token: String) {
    let mut ticks = tokio::time::interval(Duration::from_millis(40));
    for count in 0_u32.. {
        ticks.tick().await;
        let token = if count.is_multiple_of(9) { "*:development.nobodys" } else { &token };
        let poll = http().get(format!("{url}/api/client/features"));
        poll.header("authorization", token).send().await.unwrap();
    }
}

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
async fn flag_is_described_and_explained_for_a_user() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.open_section("Flags").await;
    console.call("open_flag", json!({ "flag": "demo.gradual-rollout" })).await;
    let displayed = console.text().await;
    assert!(displayed.contains("25 %") && displayed.contains("Not used yet"), "{displayed}");
    let context_form = json!({ "fields": { "User ID": "7" } });
    let explained = console.call("explain", context_form).await;
    // The bucket from the Python SDK's hash of `demo.gradual-rollout:7`: modulo 100, plus 1.
    let displayed = text_of(&explained["text"]);
    assert!(displayed.contains("30"), "{displayed}");
    console.assert_accessible("a flag, explained").await;
    console.screenshot("flag").await;
    console.close().await;
}

/// Malformed parts of flags, and what the console says about them.
const MALFORMED_PARTS: [(&str, &str); 7] = [
    (r#""strategies":"x","variants":{"a":1}"#, "a strategy here cannot be read"),
    (r#""strategies":[null,{"name":"default","parameters":"x"}]"#, "The first strategy that"),
    (r#""strategies":[{"name":"default","segments":"x","variants":[null]}]"#, "A segment cannot"),
    (r#""strategies":[{"name":"default","constraints":[{"values":"abc"}]}]"#, "it never holds"),
    (r#""strategies":[],"dependencies":[{"feature":"a","variants":null},"x"]"#, "it never holds"),
    (r#""strategies":[],"description":{"onclick":"x"},"type":["x"]"#, "Everyone"),
    (r#""strategies":[],"variants":[{"name":"v","weight":1,"overrides":[{}]}]"#, "100 %"),
];

#[tokio::test]
async fn malformed_flag_is_shown_as_far_as_possible() {
    let named = MALFORMED_PARTS
        .iter()
        .enumerate()
        .map(|(at, (flag, _))| format!(r#"{{"name":"flag-{at}","enabled":true,{flag}}}"#));
    // No URL can contain these names.
    let steps = [".", ".."];
    let step = |name: &str| format!(r#"{{"name":"{name}","enabled":true,"strategies":[]}}"#);
    let flags: Vec<_> = named.chain(steps.map(step)).collect();
    let document = format!(r#"{{"features":[{}]}}"#, flags.join(","));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, document).unwrap();
    let parapet = standalone_with(&file).await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    let odd =
        MALFORMED_PARTS.iter().enumerate().map(|(at, (_, text))| (format!("flag-{at}"), *text));
    for (name, text) in odd.chain(steps.map(|name| (name.to_owned(), "Everyone"))) {
        console.open_section("Flags").await;
        console.call("open_flag", json!({ "flag": name })).await;
        console.call("says", json!({ "text": text })).await;
        let explained = console.call("explain", json!({ "fields": {} })).await;
        assert!(text_of(&explained["text"]).contains(&format!("{name} is o")), "{explained}");
    }
    console.close().await;
}

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
