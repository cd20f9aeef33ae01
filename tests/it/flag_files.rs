//! Flags from files: their formats, and files of a directory that change or break one by one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet};
use crate::rig::{Parapet, parapet_command, wait_until};

const TIMEOUT: Duration = Duration::from_secs(20);

/// The format that Unleash Edge reads in offline mode.
const SIMPLIFIED_FORMAT: &str = r#"{"on1":{"enabled":true},"off1":{"enabled":false,"variant":null},"var1":{"enabled":true,"variant":"blue"}}"#;

#[tokio::test]
async fn simplified_offline_file_of_unleash_edge_is_read_and_reloaded() {
    let parapet = InProcessParapet::offline(SIMPLIFIED_FORMAT).await;
    let toggles =
        async || parapet.get("/api/frontend/all", FRONTEND).await.json()["toggles"].clone();
    let flags = toggles().await;
    let by_name = |name: &str| {
        let found = flags.as_array().unwrap().iter().find(|it| it["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}: {flags}")).clone()
    };
    assert_eq!(by_name("on1")["enabled"], true);
    assert_eq!(by_name("on1")["variant"]["name"], "disabled");
    assert_eq!(by_name("off1")["enabled"], false);
    assert_eq!(by_name("var1")["enabled"], true);
    assert_eq!(by_name("var1")["variant"]["name"], "blue");

    let listing = parapet.get("/api/client/features", CLIENT).await.json();
    let flag = |name: &str| {
        let flags = listing["features"].as_array().unwrap();
        flags.iter().find(|it| it["name"] == name).unwrap().clone()
    };
    assert_eq!(flag("on1")["strategies"][0]["name"], "default");
    let variant = &flag("var1")["variants"][0];
    assert_eq!((&variant["name"], &variant["weight"]), (&json!("blue"), &json!(1000)));

    std::fs::write(parapet.flags_file(), SIMPLIFIED_FORMAT.replace("blue", "green")).unwrap();
    wait_until("the file is read again", TIMEOUT, async || {
        let flags = toggles().await;
        let found = flags.as_array().unwrap().iter().find(|it| it["name"] == "var1").unwrap();
        (found["variant"]["name"] == "green").then_some(())
    })
    .await;
}

#[test]
fn file_of_neither_format_is_rejected_naming_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    for text in
        ["{}", "[]", r#"{"a":{"enabled":"yes"}}"#, r#"{"a":{"variant":"b"}}"#, r#"{"features":{}}"#]
    {
        std::fs::write(&file, text).unwrap();
        let mut command = parapet_command(&folder);
        command
            .args(["offline", "--port", "0", "--admin-port", "0", "-c", CLIENT, "-b"])
            .arg(&file);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}: {output:?}");
        let message =
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        for part in ["flags.json", "features", r#""enabled""#, r#""variant""#] {
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}

fn flag(name: &str) -> String {
    json!({ "features": [{ "name": name, "enabled": true, "strategies": [{ "name": "default" }] }] }).to_string()
}

const STAGING: &str = "*:staging.flag-files-0123456789abcdef0123456789";
const PRODUCTION: &str = "*:production.flag-files-0123456789abcdef0123456";

struct FlagsDirectory(tempfile::TempDir);

impl FlagsDirectory {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.replace_file("staging.json", &flag("one"));
        folder.replace_file("production.json", &flag("one"));
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Replaces a file atomically, so that a partly written file is never seen.
    fn replace_file(&self, name: &str, text: &str) -> PathBuf {
        let (path, draft) = (self.0.path().join(name), self.0.path().join(".draft"));
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, &path).unwrap();
        path
    }

    async fn start(&self) -> Parapet {
        let standalone = Parapet::mode("standalone").flag("--flags", self.path());
        let tokens = format!("{STAGING},{PRODUCTION}");
        standalone.env("INIT_CLIENT_API_TOKENS", tokens).start().await
    }
}

async fn served_flag_name(parapet: &Parapet, token: &str) -> Value {
    let (status, body) = parapet.get("/api/client/features", token).await;
    assert_eq!(status, StatusCode::OK, "{}", parapet.log());
    body["features"][0]["name"].clone()
}

async fn wait_until_served(parapet: &Parapet, token: &str, name: &str) {
    wait_until(&format!("{token} sees {name}"), TIMEOUT, async || {
        (served_flag_name(parapet, token).await == name).then_some(())
    })
    .await;
}

async fn snapshot_age(parapet: &Parapet, environment: &str) -> f64 {
    let sample = format!("parapet_snapshot_age_seconds{{environment=\"{environment}\"}}");
    parapet.metric(&sample).await.unwrap()
}

#[tokio::test]
async fn malformed_file_affects_only_its_own_environment() {
    let folder = FlagsDirectory::new();
    let parapet = folder.start().await;
    let whole = flag("two");
    folder.replace_file("staging.json", &whole[..whole.len() / 2]);
    folder.replace_file("production.json", &flag("kill-switch"));
    wait_until_served(&parapet, PRODUCTION, "kill-switch").await;
    assert_eq!(served_flag_name(&parapet, STAGING).await, "one");
    wait_until("the broken one's flags become old", TIMEOUT, async || {
        (snapshot_age(&parapet, "staging").await > 3.0).then_some(())
    })
    .await;
    assert!(snapshot_age(&parapet, "production").await < snapshot_age(&parapet, "staging").await);
    let log = parapet.log();
    let reports = log.lines().filter(|line| line.contains("WARN") && line.contains("staging.json"));
    assert_eq!(reports.count(), 1, "{log}");
    assert!(!log.contains("production.json"), "{log}");
    folder.replace_file("staging.json", &whole);
    wait_until_served(&parapet, STAGING, "two").await;
}

#[tokio::test]
async fn new_malformed_file_does_not_affect_other_environments() {
    let folder = FlagsDirectory::new();
    let parapet = folder.start().await;
    folder.replace_file("new.json", "{");
    folder.replace_file("production.json", &flag("two"));
    wait_until_served(&parapet, PRODUCTION, "two").await;
    wait_until_served(&parapet, STAGING, "one").await;
}

#[tokio::test]
async fn replacement_with_same_time_and_length_is_noticed() {
    let folder = FlagsDirectory::new();
    let parapet = folder.start().await;
    let times = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let path = folder.path().join("production.json");
    let (modified, other) = (times(&path), folder.replace_file("other", &flag("two")));
    let file = std::fs::File::options().write(true).open(&other).unwrap();
    file.set_modified(modified).unwrap();
    drop(file);
    assert_eq!(std::fs::metadata(&other).unwrap().len(), std::fs::metadata(&path).unwrap().len());
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(times(&path), modified);
    wait_until_served(&parapet, PRODUCTION, "two").await;
    // Written in place, with its modification time set back.
    std::fs::write(&path, flag("six")).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    wait_until_served(&parapet, PRODUCTION, "six").await;
}

#[test]
fn start_reports_every_malformed_file() {
    let folder = FlagsDirectory::new();
    folder.replace_file("staging.json", "{");
    folder.replace_file("testing.json", "{}");
    let mut command = parapet_command(folder.path());
    let data = folder.path().join("data");
    command.args(["standalone", "--port", "0", "--admin-port", "0"]);
    command.arg("--flags").arg(folder.path()).arg("--data-dir").arg(data);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let message =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("staging.json") && message.contains("testing.json"), "{message}");
}
