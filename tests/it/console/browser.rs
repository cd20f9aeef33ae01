//! The console in a browser, and a standalone that serves it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::rig::{Driver, Parapet, http, node, secret_leak_check, wait_until};

pub(super) const OWNER: &str = "admin";
pub(super) const PASSWORD: &str = "correct horse battery";
pub(super) const VIEWER_PASSWORD: &str = "another long password";

/// The navigation label of each page, and the name of its screenshot.
pub(super) const PAGES: [(&str, &str); 5] = [
    ("Overview", "overview"),
    ("Flags", "flags"),
    ("API access", "api-access"),
    ("Accounts", "accounts"),
    ("Audit log", "audit-log"),
];
pub(super) const THEMES: [&str; 2] = ["light", "dark"];
pub(super) const DESKTOP_WIDTH: u32 = 1280;
pub(super) const PHONE_WIDTH: u32 = 390;
/// From a desktop to a small phone, with the widths around each change of the layout.
pub(super) const VIEWPORT_WIDTHS: [u32; 8] = [1440, 1100, 1000, 900, 861, 760, 480, 320];

/// A browser with the console.
pub(super) struct Console(Driver);

impl Console {
    pub(super) async fn open(url: &str) -> Self {
        Self::open_with(url, &Value::Null).await
    }

    /// With a session cookie that the browser already has.
    pub(super) async fn open_with(url: &str, session: &Value) -> Self {
        let chromium = PathBuf::from("/usr/bin/chromium");
        assert!(chromium.exists(), "no Chromium: tests/run installs it");
        let options = json!({ "url": url, "chromium": chromium, "session": session });
        Self(Driver::start("console", node("console.mjs").into(), &options).await)
    }

    pub(super) async fn call(&mut self, command: &str, argument: Value) -> Value {
        self.0.call(command, argument).await
    }

    pub(super) async fn sign_in(&mut self, username: &str, password: &str) {
        let response = self.try_to_sign_in(username, password).await;
        assert_eq!(response["signedIn"], true, "{username} cannot sign in: {}", response["text"]);
    }

    pub(super) async fn try_to_sign_in(&mut self, username: &str, password: &str) -> Value {
        self.call("sign_in", json!({ "username": username, "password": password })).await
    }

    pub(super) async fn open_section(&mut self, section: &str) {
        self.call("go", json!({ "section": section })).await;
    }

    pub(super) async fn text(&mut self) -> String {
        self.call("text", Value::Null).await["text"].as_str().unwrap().to_owned()
    }

    /// The rows of a table that have `value` in `column`.
    pub(super) async fn rows(&mut self, table: &str, column: &str, value: &str) -> Vec<Value> {
        let rows = self.call("rows", json!({ "table": table })).await["rows"].take();
        let Value::Array(rows) = rows else { panic!("no rows: {rows}") };
        rows.into_iter().filter(|row| row[column] == value).collect()
    }

    pub(super) async fn buttons(&mut self) -> Vec<String> {
        let response = self.call("buttons", Value::Null).await;
        response["buttons"].as_array().unwrap().iter().map(|it| text_of(it).to_owned()).collect()
    }

    /// Panics if the page has accessibility errors, in any theme, on a desktop or a phone.
    pub(super) async fn assert_accessible(&mut self, page: &str) {
        for theme in THEMES {
            for width in [DESKTOP_WIDTH, PHONE_WIDTH] {
                let found = self.call("audit", json!({ "theme": theme, "width": width })).await;
                assert_eq!(found["violations"], json!([]), "{page}, {theme}, {width} px wide");
            }
        }
    }

    /// Panics if anything overflows the page, at any width.
    pub(super) async fn assert_no_overflow(&mut self, page: &str) {
        let displayed = self.call("fit", json!({ "widths": VIEWPORT_WIDTHS })).await;
        assert_eq!(displayed["overflows"], json!([]), "{page}");
    }

    /// Waits until this element has the focus.
    pub(super) async fn wait_for_focus(&mut self, name: &str) {
        wait_until(&format!("the focus is on {name}"), Duration::from_secs(10), async || {
            (self.focused_element().await == name).then_some(())
        })
        .await;
    }

    pub(super) async fn focused_element(&mut self) -> String {
        let focus = self.call("focus", Value::Null).await;
        text_of(&focus["name"]).to_owned()
    }

    /// Takes a screenshot of the page in each theme.
    pub(super) async fn screenshot(&mut self, name: &str) {
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
    pub(super) async fn close(mut self) {
        let troubles = self.call("troubles", Value::Null).await;
        assert_eq!(troubles["troubles"], json!([]));
        self.0.close().await;
    }
}

/// The directory of screenshots: the one in the documentation if `PARAPET_SCREENSHOTS` is set.
pub(super) fn screenshot_dir() -> PathBuf {
    let configured = std::env::var_os("PARAPET_SCREENSHOTS").map(PathBuf::from);
    let folder =
        configured.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("console"));
    std::fs::create_dir_all(&folder).unwrap();
    std::path::absolute(folder).unwrap()
}

pub(super) fn text_of(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// A standalone with the example flags, whose owner has the password above.
pub(super) async fn standalone() -> Parapet {
    standalone_with(&Path::new(env!("CARGO_MANIFEST_DIR")).join("config/flags.json")).await
}

/// A standalone with other flags.
pub(super) async fn standalone_with(flags: &Path) -> Parapet {
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
pub(super) async fn generate_traffic(url: String, token: String) {
    let mut ticks = tokio::time::interval(Duration::from_millis(40));
    for count in 0_u32.. {
        ticks.tick().await;
        let token = if count.is_multiple_of(9) { "*:development.nobodys" } else { &token };
        let poll = http().get(format!("{url}/api/client/features"));
        poll.header("authorization", token).send().await.unwrap();
    }
}
