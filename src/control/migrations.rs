//! The versions of the database's schema, and the way from each to the next.
//!
//! A file that was released is never changed again; another follows it.

use std::sync::Arc;

use sqlx::{
    AnyConnection, Executor as _,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use super::{database::Connection, error::Error};

/// One version: its number, what it brings, and how, for SQLite and for PostgreSQL.
struct Step {
    version: i64,
    description: &'static str,
    sqlite: &'static str,
    postgres: &'static str,
}

/// A version whose SQL is in a file of this name for each database.
macro_rules! step {
    ($version:literal, $description:literal, $file:literal) => {
        Step {
            version: $version,
            description: $description,
            sqlite: include_str!(concat!("migrations/sqlite/", $file)),
            postgres: include_str!(concat!("migrations/postgres/", $file)),
        }
    };
}

/// Every version, the oldest first.
const STEPS: [Step; 5] = [
    step!(1, "initial", "0001_initial.sql"),
    step!(2, "usage", "0002_usage.sql"),
    step!(3, "pages of events", "0003_pages_of_events.sql"),
    step!(4, "initial settings", "0004_initial_settings.sql"),
    step!(5, "projects of events", "0005_projects_of_events.sql"),
];

/// The newest version.
pub(super) const NEWEST: i64 = STEPS[STEPS.len() - 1].version;

/// Which SQL is spoken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

/// Brings the database of `connection` to the newest version.
///
/// The caller has begun a transaction in which nobody else writes.
pub(super) async fn migrate(connection: &mut AnyConnection, dialect: Dialect) -> Result<(), Error> {
    let mut migrator = Migrator::with_migrations(STEPS.iter().map(|it| it.of(dialect)).collect());
    migrator.set_locking(false);
    migrator.run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(found) => Error::Newer { found, known: NEWEST },
        other => Error::Migration(Arc::new(other)),
    })
}

/// The version of a schema that this version of Parapet can read; it may be an older one.
pub(super) async fn readable_version(
    connection: &mut Connection,
    dialect: Dialect,
) -> Result<i64, Error> {
    let is_begun = match dialect {
        Dialect::Sqlite => "SELECT name FROM sqlite_master WHERE name = '_sqlx_migrations'",
        Dialect::Postgres => {
            "SELECT relname::text FROM pg_class WHERE oid = to_regclass('_sqlx_migrations')"
        }
    };
    (&mut *connection).fetch_optional(is_begun).await?.ok_or(Error::NotBegun)?;
    let found = sqlx::query_scalar("SELECT MAX(version) FROM _sqlx_migrations");
    let found: Option<i64> = found.fetch_one(connection).await?;
    match found.ok_or(Error::NotBegun)? {
        found if found > NEWEST => Err(Error::Newer { found, known: NEWEST }),
        found => Ok(found),
    }
}

impl Step {
    fn of(&self, dialect: Dialect) -> Migration {
        let sql = match dialect {
            Dialect::Sqlite => self.sqlite,
            Dialect::Postgres => self.postgres,
        };
        let sql = sqlx::SqlSafeStr::into_sql_str(sql);
        Migration::new(self.version, self.description.into(), MigrationType::Simple, sql, false)
    }
}
