//! `parapet backup` and `parapet restore`: from either database into either, while instances write.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{DatabaseKind, Installation, OWNER, PASSWORD, Session, sign_in};
use crate::rig::{Parapet, parapet_command, secret_leak_check, wait_until};

/// The number of tokens that are created while a backup is written.
const TOKENS_DURING_BACKUP: usize = 30;

/// Runs a command on the database of `place`, whose instance is `parapet`.
async fn run_command(place: &Installation, parapet: &Parapet, args: &[&str]) -> Output {
    let mut command = parapet_command(&place.folder);
    command.args(args);
    match &place.database {
        Some(url) => command.env("DATABASE_URL", url),
        None => command.env("DATA_DIR", parapet.data_dir()),
    };
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[track_caller]
fn assert_succeeded(output: &Output, expect: &str) {
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.starts_with(expect), "{output:?}");
}

#[track_caller]
fn assert_refused(output: &Output, expect: &str) {
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains(expect), "{printed}");
}

/// The stored data as the API shows it, without what signing in changes.
async fn api_contents(session: &Session) -> [Value; 5] {
    let mut accounts = session.get("/api/admin/user-admin").await;
    for account in accounts["users"].as_array_mut().unwrap() {
        account["seenAt"].take();
    }
    let events = session.get("/api/admin/events?limit=1000").await;
    let events = events["events"].as_array().unwrap().iter();
    let is_kept = |event: &&Value| event["type"] != "user-signed-in";
    [
        accounts["users"].take(),
        session.get("/api/admin/api-tokens").await["tokens"].take(),
        events.filter(is_kept).cloned().collect(),
        session.get("/api/admin/client-metrics/features/first/raw").await["data"].take(),
        session.get("/api/admin/metrics/applications").await["applications"].take(),
    ]
}

async fn report_usage(parapet: &Parapet, owner: &Session, token: &str) {
    let toggles = json!({ "first": { "yes": 3, "no": 1, "variants": { "a": 2 } } });
    parapet.report_usage(token, "shop", &toggles).await;
    wait_until("the usage is stored", Duration::from_secs(30), async || {
        let usage = owner.get("/api/admin/client-metrics/features/first/raw").await;
        usage["data"].as_array().filter(|hours| !hours.is_empty()).map(drop)
    })
    .await;
}

/// Creates tokens, one after the other.
async fn create_tokens(owner: &Session) {
    for number in 0..TOKENS_DURING_BACKUP {
        let (status, response) = owner.create_token("client", &format!("write-{number:02}")).await;
        assert_eq!(status, StatusCode::CREATED, "{response}");
    }
}

async fn backup_is_restored(from: DatabaseKind, to: DatabaseKind) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parapet.backup");
    let path = file.to_str().unwrap();
    let place = Installation::new(from).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let (_, made) = owner.create_token("client", "checkout").await;
    let secret = made["secret"].as_str().unwrap().to_owned();
    let ann = owner.create_account("ann", 2).await;
    owner.grant(ann, &["CREATE_CLIENT_API_TOKEN"]).await;
    let gone = owner.create_account("gone", 3).await;
    let delete = format!("/api/admin/user-admin/{gone}");
    assert_eq!(owner.call(Method::DELETE, &delete, &Value::Null).await.0, StatusCode::OK);
    report_usage(&parapet, &owner, &secret).await;

    // A backup is a consistent snapshot, even during writes.
    let args = ["backup", path];
    let ((), early) = tokio::join!(create_tokens(&owner), run_command(&place, &parapet, &args));
    assert_succeeded(&early, "wrote ");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let text = decompress(&file);
    secret_leak_check::assert_none_in(
        "the backup",
        &[("it".to_owned(), text.clone().into_bytes())],
    );
    assert!(text.contains("checkout") && text.contains("$argon2id$"), "it is readable");
    let names: BTreeSet<String> =
        (0..TOKENS_DURING_BACKUP).map(|it| format!("write-{it:02}")).collect();
    let in_rows = |row: &Value, name: &str| row["row"].as_array().unwrap().contains(&name.into());
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rows: Vec<_> = rows.iter().filter(|line| line["row"].is_array()).collect();
    let kept = names.iter().filter(|name| rows.iter().any(|row| in_rows(row, name))).count();
    let first: Vec<_> = names.iter().take(kept).collect();
    assert!(first.iter().all(|name| rows.iter().any(|row| in_rows(row, name))), "no gap");
    let created = text.matches("api-token-created").count();
    // Three tokens of the first start, one of this test, and each that was written.
    assert_eq!(created, 4 + kept, "tokens and their events belong together");

    assert_refused(&run_command(&place, &parapet, &["backup", path]).await, "--force");
    let before = api_contents(&owner).await;
    assert_succeeded(&run_command(&place, &parapet, &["backup", path, "--force"]).await, "wrote ");

    // A database with contents is overwritten only on request, and never by a damaged backup.
    let other = Installation::new(to).await;
    let restored = other.start().await;
    assert!(restored.terminate().await.success());
    assert_refused(&run_command(&other, &restored, &["restore", path]).await, "is not empty");
    let mut bytes = std::fs::read(&file).unwrap();
    let damaged = folder.path().join("damaged.backup");
    std::fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    let forced = ["restore", damaged.to_str().unwrap(), "--force"];
    assert_refused(&run_command(&other, &restored, &forced).await, "it is truncated");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, &bytes).unwrap();
    assert_refused(&run_command(&other, &restored, &forced).await, "is damaged");
    assert_succeeded(
        &run_command(&other, &restored, &["restore", path, "--force"]).await,
        "restored ",
    );
    restored.restart();
    restored.wait_until_ready().await;
    let owner = sign_in(&restored, OWNER, PASSWORD).await.unwrap();
    assert_eq!(api_contents(&owner).await, before);
    assert_eq!(restored.features_status(&secret).await, StatusCode::OK);
    // Ids are never reused, because the audit log names accounts by them.
    assert!(owner.create_account("later", 3).await > gone);

    // A missing database is created.
    let fresh = folder.path().join("new/data");
    let mut command = parapet_command(&folder);
    command.args(["restore", path, "--data-dir"]).arg(&fresh);
    assert_succeeded(&command.output().unwrap(), "restored ");
    let mut command = parapet_command(&folder);
    command.args(["token", "list", "--name", "checkout", "--data-dir"]).arg(&fresh);
    let listed = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout).lines().count(), 2, "{listed:?}");
}

fn decompress(file: &Path) -> String {
    let mut text = String::new();
    let file = std::fs::File::open(file).unwrap();
    flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_of_sqlite_is_restored_into_sqlite() {
    backup_is_restored(DatabaseKind::Sqlite, DatabaseKind::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn backup_of_sqlite_is_restored_into_postgresql() {
    backup_is_restored(DatabaseKind::Sqlite, DatabaseKind::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn backup_of_postgresql_is_restored_into_sqlite() {
    backup_is_restored(DatabaseKind::Postgres, DatabaseKind::Sqlite).await;
}
