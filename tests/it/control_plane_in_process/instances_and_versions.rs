//! Several instances on one database, databases of older and newer versions, and a database that becomes
//! unavailable.

use std::time::Duration;

use jiff::Timestamp;
use parapet::control_plane::{
    ControlPlane, Error, NewToken, TokenBootstrapOutcome,
    backup::{self, BackupError},
};
use parapet::token::{Environment, Projects, Token, TokenKind};
use sqlx::migrate::{Migration, MigrationType, Migrator};

use super::fixture::{RunningInstance, SHELL, TestDatabase, sign_in_first_admin};
use crate::rig::{Postgres, wait_until};

super::on_both!(
    change_on_one_instance_takes_effect_on_the_other,
    instances_that_start_concurrently_create_one_account_and_one_token_set,
    token_use_is_recorded_within_a_minute,
    version_1_database_opens_with_all_contents,
    backup_does_not_migrate_version_1_database,
    database_of_newer_version_is_not_opened_or_changed,
    concurrent_writers_wait_for_each_other,
);

async fn create_token(control: &ControlPlane) -> (Token, String) {
    let new = NewToken {
        name: "made".to_owned(),
        kind: TokenKind::Client,
        environment: Environment::new("development"),
        projects: Projects::All,
        expires_at: None,
    };
    let (secret, token) = control.create_token(&SHELL, new).await.unwrap();
    (secret, token.id)
}

async fn change_on_one_instance_takes_effect_on_the_other(db: TestDatabase) {
    let (one, other) = (db.open().await, db.open().await);
    let instance = RunningInstance::start(&other);
    for _ in 0..3 {
        let (secret, id) = create_token(&one).await;
        instance.wait_until(&secret, true).await;
        one.update_token(&SHELL, &id, Some(Timestamp::UNIX_EPOCH)).await.unwrap();
        instance.wait_until(&secret, false).await;
        one.update_token(&SHELL, &id, None).await.unwrap();
        instance.wait_until(&secret, true).await;
        one.delete_token(&SHELL, &id).await.unwrap();
        instance.wait_until(&secret, false).await;
    }
}

async fn instances_that_start_concurrently_create_one_account_and_one_token_set(db: TestDatabase) {
    let open = || db.open_with(db.config());
    let (one, two, three, four) = tokio::join!(open(), open(), open(), open());
    let opened = [&one.1, &two.1, &three.1, &four.1];
    assert_eq!(opened.iter().filter(|it| it.account.is_some()).count(), 1, "{opened:?}");
    let generated = |it: &&&_| {
        matches!(
            it,
            parapet::control_plane::BootstrapReport {
                tokens: TokenBootstrapOutcome::Generated(_),
                ..
            }
        )
    };
    assert_eq!(opened.iter().filter(generated).count(), 1, "{opened:?}");
    assert_eq!(one.0.accounts(&SHELL.operator).await.unwrap().len(), 1);
    let again = db.open().await;
    assert_eq!(again.tokens(&SHELL.operator).len(), 3);
    for (control, _) in [one, two, three, four] {
        assert_eq!(control.tokens(&SHELL.operator), again.tokens(&SHELL.operator));
    }
}

async fn token_use_is_recorded_within_a_minute(db: TestDatabase) {
    let control = db.open().await;
    let (secret, _) = create_token(&control).await;
    let instance = RunningInstance::start(&control);
    instance.wait_until(&secret, true).await;
    // It is written periodically, independent of this test's clock.
    let seen = async || {
        let tokens = db.open().await.tokens(&SHELL.operator);
        tokens.iter().find(|token| token.name == "made").and_then(|token| token.seen_at)
    };
    wait_until("the token's use is noted", Duration::from_mins(1), seen).await;
}

const SQLITE_VERSION_1: &str =
    include_str!("../../../src/control_plane/database/migrations/sqlite/0001_initial.sql");
const POSTGRES_VERSION_1: &str =
    include_str!("../../../src/control_plane/database/migrations/postgres/0001_initial.sql");
const VERSION_1_CONTENT: &str = include_str!("version_1.sql");

/// Creates a database of the first version, with contents.
async fn create_version_1(db: &TestDatabase) {
    let schema = match db {
        TestDatabase::Sqlite(_) => SQLITE_VERSION_1,
        TestDatabase::Postgres { .. } => POSTGRES_VERSION_1,
    };
    let schema = sqlx::SqlSafeStr::into_sql_str(schema);
    let first = Migration::new(1, "initial".into(), MigrationType::Simple, schema, false);
    Migrator::with_migrations(vec![first]).run(&mut db.connect().await).await.unwrap();
    db.execute(VERSION_1_CONTENT).await;
}

/// Opens a database that was created by the first version, and checks all of its contents.
async fn open_version_1(db: &TestDatabase) {
    let (control, opened) = db.open_with(db.config()).await;
    assert!(opened.account.is_none() && matches!(opened.tokens, TokenBootstrapOutcome::Existing));
    let tokens = control.tokens(&SHELL.operator);
    assert_eq!(tokens.len(), 1);
    assert_eq!((tokens[0].name.as_str(), &*tokens[0].masked), ("billing", "web:dev.AbCd****"));
    assert_eq!(tokens[0].projects, Projects::from_list(["web"]));
    let secret = Token::parse("web:dev.an-old-secret").unwrap();
    assert_eq!(control.token_name(&secret.digest()).as_deref(), Some("billing"));
    let accounts = control.accounts(&SHELL.operator).await.unwrap();
    assert_eq!((accounts.len(), accounts[0].username.as_str()), (1, "admin"));
    assert_eq!(accounts[0].permissions.len(), 1);
    sign_in_first_admin(&control).await;
    let recorded = super::fixture::event_kinds(&control).await;
    assert_eq!(recorded, ["api-token-created", "user-signed-in"]);
    let usage = control.flag_usage("blue", Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!((usage.len(), usage[0].yes, usage[0].variants["a"]), (1, 7, 3));
    assert_eq!(control.applications().await.unwrap()[0].sdk_versions, ["node:6.0.0"]);
}

async fn version_1_database_opens_with_all_contents(db: TestDatabase) {
    create_version_1(&db).await;
    open_version_1(&db).await;
}

async fn backup_does_not_migrate_version_1_database(db: TestDatabase) {
    create_version_1(&db).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parapet.backup");
    assert_eq!(backup::save(&db.config().location, &file, false).await.unwrap(), 8);
    assert_eq!(db.count("SELECT MAX(version) FROM _sqlx_migrations").await, 1);
    let restored = TestDatabase::sqlite();
    assert_eq!(backup::restore(&restored.config().location, &file, false).await.unwrap(), 8);
    open_version_1(&restored).await;
}

async fn database_of_newer_version_is_not_opened_or_changed(db: TestDatabase) {
    db.open().await;
    db.execute(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         SELECT 9999, 'of tomorrow', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
    )
    .await;
    let error = ControlPlane::open(db.config(), None, |_| ()).await.unwrap_err();
    assert!(matches!(error, Error::NewerSchema { found: 9999, .. }), "{error:?}");
    assert!(error.to_string().contains("newer version of Parapet"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parapet.backup");
    let error = backup::save(&db.config().location, &file, false).await.unwrap_err();
    assert!(
        matches!(error, BackupError::Database(Error::NewerSchema { found: 9999, .. })),
        "{error:?}"
    );
    assert!(!file.exists());
}

async fn concurrent_writers_wait_for_each_other(db: TestDatabase) {
    let (one, other) = (db.open().await, db.open().await);
    let write = async |control: &ControlPlane| {
        for _ in 0..5 {
            let (_, id) = create_token(control).await;
            control.delete_token(&SHELL, &id).await.unwrap();
        }
    };
    tokio::join!(write(&one), write(&other), write(&one), write(&other));
    assert_eq!(crate::control_plane_in_process::fixture::event_kinds(&one).await.len(), 4 + 40);
}

/// PostgreSQL is unavailable, and the connection that listens for changes breaks.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn tokens_stay_valid_while_database_is_unavailable() {
    let db = TestDatabase::postgres().await;
    let TestDatabase::Postgres { name, .. } = &db else { panic!("it is PostgreSQL") };
    let server = Postgres::shared().await;
    let control = db.open().await;
    let instance = RunningInstance::start(&control);
    let ((kept, _), (ended, id)) = (create_token(&control).await, create_token(&control).await);
    instance.wait_until(&ended, true).await;

    server.execute("postgres", &format!("alter database {name} allow_connections false")).await;
    let cut =
        format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'");
    server.execute("postgres", &cut).await;
    let made = control.delete_token(&SHELL, &id).await;
    assert!(matches!(made, Err(Error::Database(_) | Error::Unreachable(_))), "{made:?}");
    assert!(instance.accepts(&kept).await && instance.accepts(&ended).await);

    server.execute("postgres", &format!("alter database {name} allow_connections true")).await;
    // Without the instance's knowledge, and perhaps before it listens again.
    db.execute(&format!("DELETE FROM tokens WHERE id = '{id}'")).await;
    let caught_up = async || (!instance.accepts(&ended).await).then_some(());
    wait_until("what was missed is read", Duration::from_secs(20), caught_up).await;
    assert!(instance.accepts(&kept).await);
    create_token(&control).await;
}

/// Only the connection that listens for changes breaks.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn change_while_listening_connection_is_down_is_picked_up() {
    let db = TestDatabase::postgres().await;
    let TestDatabase::Postgres { name, .. } = &db else { panic!("it is PostgreSQL") };
    let (one, other) = (db.open().await, db.open().await);
    let instance = RunningInstance::start(&other);
    let (secret, id) = create_token(&one).await;
    instance.wait_until(&secret, true).await;
    let cut = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity \
         where datname = '{name}' and query like 'LISTEN%'"
    );
    Postgres::shared().await.execute("postgres", &cut).await;
    one.delete_token(&SHELL, &id).await.unwrap();
    let caught_up = async || (!instance.accepts(&secret).await).then_some(());
    wait_until("what was missed is read", Duration::from_secs(10), caught_up).await;
    let (secret, _) = create_token(&one).await;
    instance.wait_until(&secret, true).await;
}

/// Other users of the machine cannot read the digests.
#[cfg(unix)]
#[tokio::test]
async fn database_files_are_readable_by_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;

    let db = TestDatabase::sqlite();
    let _control = db.open().await;
    let TestDatabase::Sqlite(directory) = &db else { panic!("it is SQLite") };
    let files: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(Result::unwrap).collect();
    assert!(files.len() > 1, "the log is beside the database: {files:?}");
    for file in files {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
    }
}
