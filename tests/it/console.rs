//! The console, as people use it: a real browser, and real SDKs with the tokens that were made in it.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::rig::{Driver, Parapet, Sdk, Unleash, Version, http, node, secrets, until};

const OWNER: &str = "admin";
const PASSWORD: &str = "correct horse battery";
const VIEWERS: &str = "another long password";

/// What each page is called in the navigation, and its picture.
const PAGES: [(&str, &str); 5] = [
    ("Overview", "overview"),
    ("Flags", "flags"),
    ("API access", "api-access"),
    ("Accounts", "accounts"),
    ("Audit log", "audit-log"),
];
const THEMES: [&str; 2] = ["light", "dark"];
const WIDE: u32 = 1280;
const NARROW: u32 = 390;

/// A browser that shows the console.
struct Console(Driver);

impl Console {
    async fn open(url: &str) -> Self {
        let chromium = PathBuf::from("/usr/bin/chromium");
        assert!(chromium.exists(), "no Chromium: tests/run installs it");
        let options = json!({ "url": url, "chromium": chromium });
        Self(Driver::start("console", node("console.mjs").into(), &options).await)
    }

    async fn ask(&mut self, command: &str, argument: Value) -> Value {
        self.0.ask(command, argument).await
    }

    async fn sign_in(&mut self, username: &str, password: &str) -> Value {
        self.ask("sign_in", json!({ "username": username, "password": password })).await
    }

    async fn go(&mut self, section: &str) {
        self.ask("go", json!({ "section": section })).await;
    }

    async fn text(&mut self) -> String {
        self.ask("text", Value::Null).await["text"].as_str().unwrap().to_owned()
    }

    /// The rows of a table that have `value` in `column`.
    async fn rows(&mut self, table: &str, column: &str, value: &str) -> Vec<Value> {
        let rows = self.ask("rows", json!({ "table": table })).await["rows"].take();
        let Value::Array(rows) = rows else { panic!("no rows: {rows}") };
        rows.into_iter().filter(|row| row[column] == value).collect()
    }

    async fn buttons(&mut self) -> Vec<String> {
        let answer = self.ask("buttons", Value::Null).await;
        answer["buttons"].as_array().unwrap().iter().map(|it| text_of(it).to_owned()).collect()
    }

    /// What is wrong with the page for people who read by ear, or see little, or hold a phone.
    async fn audit(&mut self, page: &str) {
        for theme in THEMES {
            for width in [WIDE, NARROW] {
                let found = self.ask("audit", json!({ "theme": theme, "width": width })).await;
                assert_eq!(found["violations"], json!([]), "{page}, {theme}, {width} px wide");
            }
        }
    }

    /// A picture of the page in each theme.
    async fn photograph(&mut self, name: &str) {
        let folder = pictures();
        for theme in THEMES {
            let path = folder.join(format!("{name}-{theme}.png"));
            let wish = json!({ "path": path, "theme": theme, "width": WIDE });
            let taken = self.ask("screenshot", wish).await;
            assert!(taken["bytes"].as_u64().unwrap() > 10_000, "{name} is an empty picture");
        }
    }

    /// Ends the browser; no script may have failed, and nothing may have broken the page's policy.
    async fn close(mut self) {
        let troubles = self.ask("troubles", Value::Null).await;
        assert_eq!(troubles["troubles"], json!([]));
        self.0.close().await;
    }
}

/// Where pictures go: where the documentation keeps them, if `PARAPET_SCREENSHOTS` says so.
fn pictures() -> PathBuf {
    let kept = std::env::var_os("PARAPET_SCREENSHOTS").map(PathBuf::from);
    let folder = kept.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("console"));
    std::fs::create_dir_all(&folder).unwrap();
    std::path::absolute(folder).unwrap()
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// A standalone that serves the example flags, and whose owner has the password above.
async fn standalone() -> Parapet {
    for password in [PASSWORD, VIEWERS] {
        secrets::remember(password);
    }
    let flags = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("config/flags.json");
    Parapet::mode("standalone")
        .flag("--flags", flags)
        .flag("--flag-environments", "development,production")
        .flag("--metrics-interval-seconds", "1")
        .env("UNLEASH_DEFAULT_ADMIN_PASSWORD", PASSWORD)
        .start()
        .await
}

#[tokio::test]
async fn an_admin_makes_a_token_in_the_console_and_an_sdk_works_with_it() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;

    let refused = console.sign_in(OWNER, "not the password").await;
    assert_eq!(refused["signedIn"], false);
    console.audit("sign-in").await;
    console.photograph("sign-in").await;
    assert_eq!(console.sign_in(OWNER, PASSWORD).await["signedIn"], true);

    // Advanced → API access → New API token.
    let navigation = console.ask("navigation", Value::Null).await;
    let (advanced, access) = ("ADVANCED", "API ACCESS");
    let told = text_of(&navigation["text"]).to_uppercase();
    assert!(told.find(advanced).unwrap() < told.find(access).unwrap(), "{told}");
    console.go("API access").await;
    let wrong = console.ask("create_token_wrongly", json!({ "name": "   " })).await;
    assert_eq!(wrong["told"].as_array().unwrap().len(), 1, "{wrong}");
    let wish = json!({ "name": "checkout", "kind": "Backend", "environment": "development" });
    let made = console.ask("create_token", wish).await;
    let secret = text_of(&made["secret"]).to_owned();
    secrets::remember(&secret);
    assert_eq!(made["clipboard"], secret.as_str(), "Copy copies the secret");
    for sdk in ["curl", "Node", "Python"] {
        assert!(text_of(&made["snippets"][sdk]).contains(&secret), "{sdk} has a snippet");
    }
    console.ask("close_dialog", Value::Null).await;
    assert!(!console.text().await.contains(&secret), "it is shown once");
    let rows = console.rows("API tokens", "Name", "checkout").await;
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((&row["Type"], &row["Environment"]), (&json!("Backend"), &json!("development")));
    assert_eq!(row["Last seen"], "Never");

    // A real SDK with that secret gets flags and reports usage, which the console then shows.
    let mut sdk = Sdk::node(&parapet.url(), &secret, "checkout").await;
    assert!(sdk.evaluate(json!({})).await["demo.on-for-all"].enabled);
    sdk.count("demo.on-for-all", 7).await;
    sdk.flush().await;
    sdk.close().await;
    console.go("Flags").await;
    console.ask("open_flag", json!({ "flag": "demo.on-for-all" })).await;
    until("the console shows the usage", Duration::from_secs(30), async || {
        let shown = console.text().await;
        if shown.contains("7 yes") && shown.contains("checkout") {
            return Some(());
        }
        console.ask("reload", json!({ "heading": "demo.on-for-all" })).await;
        None
    })
    .await;
    console.go("Overview").await;
    assert!(console.text().await.contains("checkout"), "the application is connected");

    // Whoever reads by ear, holds a phone or likes the dark finds the same.
    let frontend = json!({ "name": "web shop", "kind": "Frontend", "environment": "production",
        "projects": ["default"] });
    console.go("API access").await;
    let made = console.ask("create_token", frontend).await;
    secrets::remember(text_of(&made["secret"]));
    assert!(text_of(&made["snippets"]["Frontend SDK"]).contains(text_of(&made["secret"])));
    console.audit("the new secret").await;
    console.ask("close_dialog", Value::Null).await;
    for (section, picture) in PAGES {
        console.go(section).await;
        console.audit(section).await;
        console.photograph(picture).await;
    }

    // Deleting asks first, and ends the token.
    let status = async || parapet.get("/api/client/features", &secret).await.0;
    assert_eq!(status().await, StatusCode::OK);
    console.go("API access").await;
    console.ask("delete_token", json!({ "name": "checkout" })).await;
    until("the token is refused", Duration::from_secs(30), async || {
        (status().await == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    assert!(console.rows("API tokens", "Name", "checkout").await.is_empty());
    console.go("Audit log").await;
    let log = console.rows("Audit log", "Of", "checkout").await;
    let told: Vec<_> = log.iter().map(|row| text_of(&row["What"])).collect();
    assert_eq!(told, ["API token deleted", "API token created"]);
    console.ask("sign_out", Value::Null).await;
    console.close().await;
}

#[tokio::test]
async fn a_viewer_is_offered_what_it_may_do_and_refused_the_rest() {
    let parapet = standalone().await;
    let mut admin = Console::open(&parapet.admin_url()).await;
    admin.sign_in(OWNER, PASSWORD).await;
    admin.go("API access").await;
    for (name, kind) in [("checkout", "Backend"), ("web shop", "Frontend"), ("robot", "Admin")] {
        let made = admin.ask("create_token", json!({ "name": name, "kind": kind })).await;
        secrets::remember(text_of(&made["secret"]));
        admin.ask("close_dialog", Value::Null).await;
    }
    admin.go("Accounts").await;
    let account = json!({ "username": "vera", "password": VIEWERS, "role": "Viewer" });
    admin.ask("create_account", account).await;

    let mut viewer = Console::open(&parapet.admin_url()).await;
    assert_eq!(viewer.sign_in("vera", VIEWERS).await["signedIn"], true);
    let navigation = viewer.ask("navigation", Value::Null).await;
    let told = text_of(&navigation["text"]).to_owned();
    assert!(!told.contains("Accounts") && !told.contains("Audit log"), "{told}");
    viewer.go("API access").await;
    let shows = async |viewer: &mut Console, name| {
        !viewer.rows("API tokens", "Name", name).await.is_empty()
    };
    assert!(shows(&mut viewer, "checkout").await, "everybody sees client tokens");
    assert!(!shows(&mut viewer, "robot").await, "only admins see admin tokens");
    let offered = viewer.buttons().await;
    let offers = |offered: &[String], what: &str| offered.iter().any(|it| it == what);
    assert!(!offers(&offered, "New API token") && !offers(&offered, "Delete"), "{offered:?}");
    viewer.audit("API access of a viewer").await;
    viewer.photograph("api-access-viewer").await;

    // What is not offered is refused all the same.
    let token = json!({ "tokenName": "own", "type": "client", "environment": "development" });
    let create = json!({ "method": "POST", "path": "api/admin/api-tokens", "body": token });
    let refused = viewer.ask("ask", create).await;
    assert_eq!(refused["status"], 403, "{refused}");
    assert!(text_of(&refused["text"]).contains("CREATE_CLIENT_API_TOKEN"), "{refused}");

    // A grant takes effect at once, and shows with the next page.
    let grant = json!({ "username": "vera", "kind": "Backend tokens", "permission": "Create" });
    admin.ask("grant", grant).await;
    viewer.ask("reload", json!({ "heading": "API access" })).await;
    let offered = viewer.buttons().await;
    assert!(offers(&offered, "New API token") && !offers(&offered, "Delete"), "{offered:?}");
    let made = viewer.ask("create_token", json!({ "name": "own", "kind": "Backend" })).await;
    secrets::remember(text_of(&made["secret"]));
    viewer.ask("close_dialog", Value::Null).await;
    assert_eq!(
        parapet.get("/api/client/features", text_of(&made["secret"])).await.0,
        StatusCode::OK
    );

    admin.go("Audit log").await;
    let log = admin.rows("Audit log", "By whom", "vera").await;
    let told: Vec<_> = log.iter().map(|row| text_of(&row["What"])).collect();
    assert_eq!(told, ["API token created", "Permission denied", "Signed in"]);
    admin.close().await;
    viewer.close().await;
}

#[tokio::test]
async fn a_flag_is_told_in_words_and_explained_for_a_user() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.go("Flags").await;
    console.ask("open_flag", json!({ "flag": "demo.gradual-rollout" })).await;
    let told = console.text().await;
    assert!(told.contains("25 %") && told.contains("Not used yet"), "{told}");
    let asked = json!({ "fields": { "User ID": "7" } });
    let explained = console.ask("explain", asked).await;
    // What the Python SDK's hash makes of `demo.gradual-rollout:7`: modulo 100, plus 1.
    let told = text_of(&explained["text"]);
    assert!(told.contains("30"), "{told}");
    console.audit("a flag, explained").await;
    console.photograph("flag").await;
    console.close().await;
}

#[tokio::test]
async fn the_console_of_an_edge_works_with_the_accounts_and_tokens_of_its_unleash() {
    let unleash = Unleash::shared(Version::V8).await;
    unleash.create_enabled_flag("told-in-words", "development", &[]).await;
    let parapet = Parapet::edge(&unleash.url())
        .admin_token(unleash.admin_token())
        .arg("--admin-relay")
        .impatient()
        .start()
        .await;
    let mut console = Console::open(&parapet.admin_url()).await;
    assert_eq!(console.sign_in("admin", "unleash4all").await["signedIn"], true);
    console.go("API access").await;
    let wish = json!({ "name": "of the edge", "kind": "Backend", "environment": "development" });
    let made = console.ask("create_token", wish).await;
    let secret = text_of(&made["secret"]).to_owned();
    secrets::remember(&secret);
    console.ask("close_dialog", Value::Null).await;
    let text = console.text().await;
    assert!(
        text.contains("of the edge") && !text.contains(&secret),
        "lists mask what Unleash tells"
    );
    let status = async || parapet.get("/api/client/features", &secret).await.0;
    assert_eq!(status().await, StatusCode::OK);
    for (section, _) in PAGES.iter().filter(|(section, _)| *section != "Flags") {
        console.go(section).await;
        console.audit(section).await;
    }
    console.go("Flags").await;
    console.ask("open_flag", json!({ "flag": "told-in-words" })).await;
    let explained = console.ask("explain", json!({ "fields": { "User ID": "7" } })).await;
    assert!(text_of(&explained["text"]).contains("On"), "{explained}");
    console.go("API access").await;
    console.ask("delete_token", json!({ "name": "of the edge" })).await;
    assert_eq!(status().await, StatusCode::UNAUTHORIZED);
    console.close().await;
}

#[tokio::test]
async fn the_console_is_walked_by_keyboard() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    for (name, then) in [("API access", "New API token"), ("New API token", "Cancel")] {
        let walk = console.ask("tab_to", json!({ "name": name })).await;
        assert_eq!(walk, json!({ "found": true, "visible": true }), "{name}");
        console.ask("press", json!({ "key": "Enter" })).await;
        let there = console.ask("tab_to", json!({ "name": then })).await;
        assert_eq!(there["found"], true, "{then} is reached from {name}");
        console.ask("press", json!({ "key": "Shift+Tab" })).await;
    }
    console.close().await;
}

#[tokio::test]
async fn the_consoles_files_allow_no_foreign_script_and_are_asked_for_again_cheaply() {
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
