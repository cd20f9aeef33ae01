//! The versions of the database schema and the migrations between them.
//!
//! A released migration is never changed; a later one corrects it.

use std::sync::Arc;

use sqlx::{
    AnyConnection, Executor as _,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use super::{super::error::Error, connection::Connection};

/// A version of the schema with its migration for each database.
struct SchemaVersion {
    version: i64,
    description: &'static str,
    sqlite: &'static str,
    postgres: &'static str,
}

/// A version whose SQL is in a file with this name for each database.
macro_rules! schema_version {
    ($version:literal, $description:literal, $file:literal) => {
        SchemaVersion {
            version: $version,
            description: $description,
            sqlite: include_str!(concat!("migrations/sqlite/", $file)),
            postgres: include_str!(concat!("migrations/postgres/", $file)),
        }
    };
}

/// Every version, the oldest first.
const VERSIONS: [SchemaVersion; 5] = [
    schema_version!(1, "initial", "0001_initial.sql"),
    schema_version!(2, "usage", "0002_usage.sql"),
    schema_version!(3, "pages of events", "0003_pages_of_events.sql"),
    schema_version!(4, "initial settings", "0004_initial_settings.sql"),
    schema_version!(5, "projects of events", "0005_projects_of_events.sql"),
];

/// The newest version.
pub(in crate::control_plane) const NEWEST_VERSION: i64 = VERSIONS[VERSIONS.len() - 1].version;

/// The SQL dialect of the database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::control_plane) enum Dialect {
    Sqlite,
    Postgres,
}

/// Migrates the database of `connection` to the newest version.
///
/// The caller must have begun an exclusive write transaction.
pub(super) async fn migrate(connection: &mut AnyConnection, dialect: Dialect) -> Result<(), Error> {
    let mut migrator =
        Migrator::with_migrations(VERSIONS.iter().map(|it| it.migration(dialect)).collect());
    migrator.set_locking(false);
    migrator.run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(found) => Error::NewerSchema { found, known: NEWEST_VERSION },
        other => Error::Migration(Arc::new(other)),
    })
}

/// The version of the schema, which may be older than [`NEWEST_VERSION`]. Fails if it is newer, or if
/// the database is not initialized.
pub(in crate::control_plane) async fn readable_version(
    connection: &mut Connection,
    dialect: Dialect,
) -> Result<i64, Error> {
    let is_begun = match dialect {
        Dialect::Sqlite => "SELECT name FROM sqlite_master WHERE name = '_sqlx_migrations'",
        Dialect::Postgres => {
            "SELECT relname::text FROM pg_class WHERE oid = to_regclass('_sqlx_migrations')"
        }
    };
    (&mut *connection).fetch_optional(is_begun).await?.ok_or(Error::NotInitialized)?;
    let found = sqlx::query_scalar("SELECT MAX(version) FROM _sqlx_migrations");
    let found: Option<i64> = found.fetch_one(connection).await?;
    match found.ok_or(Error::NotInitialized)? {
        found if found > NEWEST_VERSION => Err(Error::NewerSchema { found, known: NEWEST_VERSION }),
        found => Ok(found),
    }
}

impl SchemaVersion {
    fn migration(&self, dialect: Dialect) -> Migration {
        let sql = match dialect {
            Dialect::Sqlite => self.sqlite,
            Dialect::Postgres => self.postgres,
        };
        let sql = sqlx::SqlSafeStr::into_sql_str(sql);
        Migration::new(self.version, self.description.into(), MigrationType::Simple, sql, false)
    }
}
