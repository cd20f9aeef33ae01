//! The versions of the database's schema, and the way from each to the next.
//!
//! A file that was released is never changed again; another follows it.

use sqlx::{
    AnyConnection,
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

/// Every version, the oldest first.
const STEPS: &[Step] = &[
    Step {
        version: 1,
        description: "initial",
        sqlite: include_str!("migrations/sqlite/0001_initial.sql"),
        postgres: include_str!("migrations/postgres/0001_initial.sql"),
    },
    Step {
        version: 2,
        description: "usage",
        sqlite: include_str!("migrations/sqlite/0002_usage.sql"),
        postgres: include_str!("migrations/postgres/0002_usage.sql"),
    },
    Step {
        version: 3,
        description: "pages of events",
        sqlite: include_str!("migrations/sqlite/0003_pages_of_events.sql"),
        postgres: include_str!("migrations/postgres/0003_pages_of_events.sql"),
    },
    Step {
        version: 4,
        description: "initial settings",
        sqlite: include_str!("migrations/sqlite/0004_initial_settings.sql"),
        postgres: include_str!("migrations/postgres/0004_initial_settings.sql"),
    },
];

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
    let known = STEPS.last().map_or(0, |step| step.version);
    let mut migrator = Migrator::with_migrations(STEPS.iter().map(|it| it.of(dialect)).collect());
    migrator.set_locking(false);
    migrator.run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(found) => Error::Newer { found, known },
        other => Error::Migration(other),
    })
}

/// The version that the schema has.
pub(super) async fn version(connection: &mut Connection) -> Result<i64, Error> {
    let version = sqlx::query_scalar("SELECT MAX(version) FROM _sqlx_migrations");
    Ok(version.fetch_one(connection).await?)
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
