//! Several instances on one database, old and new databases, and one that goes away.

use std::time::Duration;

use jiff::Timestamp;
use parapet::control::{
    Control, Error, FoundTokens, NewToken,
    backup::{self, BackupError},
};
use parapet::token::{Environment, Projects, Token, TokenKind};
use sqlx::migrate::{Migration, MigrationType, Migrator};

use super::bed::{Bed, Door, SHELL, admin};
use crate::rig::{Postgres, until};

super::on_both!(
    a_change_on_one_instance_is_in_force_on_the_other,
    instances_that_start_at_once_make_one_account_and_one_set_of_tokens,
    uses_are_noted_once_a_minute,
    a_database_of_the_first_version_opens_as_it_was,
    a_backup_leaves_a_database_of_an_earlier_version_as_it_is,
    a_database_of_a_newer_version_is_left_alone,
    two_that_write_at_once_wait_for_each_other,
);

async fn make(control: &Control) -> (Token, String) {
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

async fn a_change_on_one_instance_is_in_force_on_the_other(bed: Bed) {
    let (one, other) = (bed.open().await, bed.open().await);
    let door = Door::of(&other);
    for _ in 0..3 {
        let (secret, id) = make(&one).await;
        door.until(&secret, true).await;
        one.update_token(&SHELL, &id, Some(Timestamp::UNIX_EPOCH)).await.unwrap();
        door.until(&secret, false).await;
        one.update_token(&SHELL, &id, None).await.unwrap();
        door.until(&secret, true).await;
        one.delete_token(&SHELL, &id).await.unwrap();
        door.until(&secret, false).await;
    }
}

async fn instances_that_start_at_once_make_one_account_and_one_set_of_tokens(bed: Bed) {
    let open = || bed.open_as(bed.config());
    let (one, two, three, four) = tokio::join!(open(), open(), open(), open());
    let opened = [&one.1, &two.1, &three.1, &four.1];
    assert_eq!(opened.iter().filter(|it| it.account.is_some()).count(), 1, "{opened:?}");
    let generated =
        |it: &&&_| matches!(it, parapet::control::Opened { tokens: FoundTokens::Generated(_), .. });
    assert_eq!(opened.iter().filter(generated).count(), 1, "{opened:?}");
    assert_eq!(one.0.accounts(&SHELL.operator).await.unwrap().len(), 1);
    let again = bed.open().await;
    assert_eq!(again.tokens(&SHELL.operator).len(), 3);
    for (control, _) in [one, two, three, four] {
        assert_eq!(control.tokens(&SHELL.operator), again.tokens(&SHELL.operator));
    }
}

async fn uses_are_noted_once_a_minute(bed: Bed) {
    let control = bed.open().await;
    let (secret, _) = make(&control).await;
    let door = Door::of(&control);
    door.until(&secret, true).await;
    // Written every so often, whatever the clock of this test says.
    let seen = async || {
        let tokens = bed.open().await.tokens(&SHELL.operator);
        tokens.iter().find(|token| token.name == "made").and_then(|token| token.seen_at)
    };
    until("the token's use is noted", Duration::from_mins(1), seen).await;
}

const SQLITE: &str = include_str!("../../../src/control/migrations/sqlite/0001_initial.sql");
const POSTGRES: &str = include_str!("../../../src/control/migrations/postgres/0001_initial.sql");
const CONTENT: &str = include_str!("version_1.sql");

/// Makes a database of the first version, with contents.
async fn make_first_version(bed: &Bed) {
    let schema = match bed {
        Bed::Sqlite(_) => SQLITE,
        Bed::Postgres { .. } => POSTGRES,
    };
    let schema = sqlx::SqlSafeStr::into_sql_str(schema);
    let first = Migration::new(1, "initial".into(), MigrationType::Simple, schema, false);
    Migrator::with_migrations(vec![first]).run(&mut bed.connect().await).await.unwrap();
    bed.execute(CONTENT).await;
}

/// Opens what was a database of the first version, with all of its contents.
async fn open_first_version(bed: &Bed) {
    let (control, opened) = bed.open_as(bed.config()).await;
    assert!(opened.account.is_none() && matches!(opened.tokens, FoundTokens::Existing));
    let tokens = control.tokens(&SHELL.operator);
    assert_eq!(tokens.len(), 1);
    assert_eq!((tokens[0].name.as_str(), &*tokens[0].masked), ("billing", "web:dev.AbCd****"));
    assert_eq!(tokens[0].projects, Projects::from_list(["web"]));
    let secret = Token::parse("web:dev.an-old-secret").unwrap();
    assert_eq!(control.token_name(&secret.digest()).as_deref(), Some("billing"));
    let accounts = control.accounts(&SHELL.operator).await.unwrap();
    assert_eq!((accounts.len(), accounts[0].username.as_str()), (1, "admin"));
    assert_eq!(accounts[0].permissions.len(), 1);
    admin(&control).await;
    let told = super::bed::kinds(&control).await;
    assert_eq!(told, ["api-token-created", "user-signed-in"]);
    let usage = control.usage_of("blue", Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!((usage.len(), usage[0].yes, usage[0].variants["a"]), (1, 7, 3));
    assert_eq!(control.applications().await.unwrap()[0].sdk_versions, ["node:6.0.0"]);
}

async fn a_database_of_the_first_version_opens_as_it_was(bed: Bed) {
    make_first_version(&bed).await;
    open_first_version(&bed).await;
}

async fn a_backup_leaves_a_database_of_an_earlier_version_as_it_is(bed: Bed) {
    make_first_version(&bed).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parapet.backup");
    assert_eq!(backup::save(&bed.config().location, &file, false).await.unwrap(), 8);
    assert_eq!(bed.count("SELECT MAX(version) FROM _sqlx_migrations").await, 1);
    let restored = Bed::sqlite();
    assert_eq!(backup::restore(&restored.config().location, &file, false).await.unwrap(), 8);
    open_first_version(&restored).await;
}

async fn a_database_of_a_newer_version_is_left_alone(bed: Bed) {
    bed.open().await;
    bed.execute(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         SELECT 9999, 'of tomorrow', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
    )
    .await;
    let error = Control::open(bed.config(), None, |_| ()).await.unwrap_err();
    assert!(matches!(error, Error::Newer { found: 9999, .. }), "{error:?}");
    assert!(error.to_string().contains("newer version of Parapet"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parapet.backup");
    let error = backup::save(&bed.config().location, &file, false).await.unwrap_err();
    assert!(matches!(error, BackupError::Database(Error::Newer { found: 9999, .. })), "{error:?}");
    assert!(!file.exists());
}

async fn two_that_write_at_once_wait_for_each_other(bed: Bed) {
    let (one, other) = (bed.open().await, bed.open().await);
    let write = async |control: &Control| {
        for _ in 0..5 {
            let (_, id) = make(control).await;
            control.delete_token(&SHELL, &id).await.unwrap();
        }
    };
    tokio::join!(write(&one), write(&other), write(&one), write(&other));
    assert_eq!(super::bed::kinds(&one).await.len(), 4 + 40);
}

/// PostgreSQL is away, with the connection on which changes are heard.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn a_database_that_goes_away_changes_nothing_until_it_is_back() {
    let bed = Bed::postgres().await;
    let Bed::Postgres { name, .. } = &bed else { panic!("it is PostgreSQL") };
    let server = Postgres::shared().await;
    let control = bed.open().await;
    let door = Door::of(&control);
    let ((kept, _), (ended, id)) = (make(&control).await, make(&control).await);
    door.until(&ended, true).await;

    server.execute("postgres", &format!("alter database {name} allow_connections false")).await;
    let cut =
        format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'");
    server.execute("postgres", &cut).await;
    let made = control.delete_token(&SHELL, &id).await;
    assert!(matches!(made, Err(Error::Database(_) | Error::Unreachable(_))), "{made:?}");
    assert!(door.admits(&kept).await && door.admits(&ended).await);

    server.execute("postgres", &format!("alter database {name} allow_connections true")).await;
    // Behind its back, and before it listens again perhaps.
    bed.execute(&format!("DELETE FROM tokens WHERE id = '{id}'")).await;
    let caught_up = async || (!door.admits(&ended).await).then_some(());
    until("what was missed is read", Duration::from_secs(20), caught_up).await;
    assert!(door.admits(&kept).await);
    make(&control).await;
}

/// Only the connection on which changes are heard is cut.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL"]
async fn a_change_during_a_cut_of_the_listening_connection_is_caught_up() {
    let bed = Bed::postgres().await;
    let Bed::Postgres { name, .. } = &bed else { panic!("it is PostgreSQL") };
    let (one, other) = (bed.open().await, bed.open().await);
    let door = Door::of(&other);
    let (secret, id) = make(&one).await;
    door.until(&secret, true).await;
    let cut = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity \
         where datname = '{name}' and query like 'LISTEN%'"
    );
    Postgres::shared().await.execute("postgres", &cut).await;
    one.delete_token(&SHELL, &id).await.unwrap();
    let caught_up = async || (!door.admits(&secret).await).then_some(());
    until("what was missed is read", Duration::from_secs(10), caught_up).await;
    let (secret, _) = make(&one).await;
    door.until(&secret, true).await;
}

/// Nobody else on the machine reads the digests.
#[cfg(unix)]
#[tokio::test]
async fn the_files_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let bed = Bed::sqlite();
    let _control = bed.open().await;
    let Bed::Sqlite(directory) = &bed else { panic!("it is SQLite") };
    let files: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(Result::unwrap).collect();
    assert!(files.len() > 1, "the log is beside the database: {files:?}");
    for file in files {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
    }
}
