//! Backup of the database to one file and restore from it, independent of the kind of database.
//!
//! The file contains password hashes and token digests, and no plaintext of either. Open sessions and
//! known browsers are not included, so that a restore never revives a session that was ended.
//!
//! Rows are stored by column name. A column added by a later version needs a default, or must be derived
//! here from what earlier versions have written.

mod error;
mod file_format;

use std::{
    fs::{self, DirBuilder, File},
    io,
    path::Path,
    time::Duration,
};

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use sqlx::{
    AssertSqlSafe, Column as _, Executor as _, Row as _,
    any::{AnyRow, AnyTypeInfoKind},
};
use tempfile::NamedTempFile;

pub use self::error::BackupError;
use self::file_format::{
    BackupReader, BackupWriter, Cell, ColumnHeader, ColumnKind, FORMAT_VERSION, Header, Line,
    TableHeader,
};
use super::{
    account_queries,
    database::{
        Connection, Database, DatabaseLocation, WriteLock,
        migrations::{self, Dialect},
    },
    error::Error,
};
use crate::secret_file::parent_dir;

/// The timeout of one statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_hours(1);

/// The number of rows that one statement inserts.
const INSERT_BATCH: usize = 100;

/// A table that is part of a backup.
struct Table {
    name: &'static str,
    /// The version of the schema that introduced it.
    since_schema: i64,
    /// Whether the database generates its column `id` and never reuses an id.
    has_generated_id: bool,
}

/// The tables in a backup. A table comes after those that it references.
const TABLES: [Table; 10] = [
    Table { name: "accounts", since_schema: 1, has_generated_id: true },
    Table { name: "account_permissions", since_schema: 1, has_generated_id: false },
    Table { name: "tokens", since_schema: 1, has_generated_id: false },
    Table { name: "events", since_schema: 1, has_generated_id: true },
    Table { name: "flag_usage", since_schema: 1, has_generated_id: false },
    Table { name: "variant_usage", since_schema: 1, has_generated_id: false },
    // Prevents usage that is delivered again after a restore from being counted twice.
    Table { name: "usage_batches", since_schema: 2, has_generated_id: false },
    Table { name: "applications", since_schema: 1, has_generated_id: false },
    Table { name: "application_traits", since_schema: 1, has_generated_id: false },
    Table { name: "initial_settings", since_schema: 4, has_generated_id: false },
];

/// Tables that are not part of a backup, and are emptied by a restore. The projects of events are
/// derived from the events.
const EXCLUDED_TABLES: [&str; 3] = ["sessions", "devices", "event_projects"];

/// Writes a consistent backup of the database to a file that only its owner can read; returns the number
/// of rows. On failure no file is written. Instances may be running. The database is not changed, and
/// not migrated if it is of an earlier version.
pub async fn save(
    location: &DatabaseLocation,
    path: &Path,
    replace: bool,
) -> Result<u64, BackupError> {
    if !replace && path.exists() {
        return Err(BackupError::Exists(path.to_owned()));
    }
    if let DatabaseLocation::Sqlite(file) = location {
        fs::metadata(file).map_err(|error| Error::file(file, error))?;
    }
    let failed = |source| BackupError::Write { path: path.to_owned(), source };
    let file = NamedTempFile::new_in(parent_dir(path)).map_err(failed)?;
    let mut output = BackupWriter::new(file);
    let database = Database::new(location).await?;
    let mut transaction = database.begin_read_unmigrated().await?;
    let schema = migrations::readable_version(&mut transaction, database.dialect()).await?;
    if account_queries::count(&mut transaction).await? == 0 {
        return Err(Error::NotInitialized.into());
    }
    raise_timeouts(&mut transaction, database.dialect()).await?;
    let (parapet_backup, created_at) = (FORMAT_VERSION, Timestamp::now());
    output.write(&Line::Head(Header { parapet_backup, schema, created_at })).map_err(failed)?;
    for table in TABLES.iter().filter(|table| table.since_schema <= schema) {
        let last_id = if table.has_generated_id {
            last_id(&mut transaction, database.dialect(), table).await?
        } else {
            None
        };
        let sql = AssertSqlSafe(format!("SELECT * FROM {}", table.name));
        let mut rows = sqlx::query(sql).fetch(&mut *transaction);
        let first = rows.try_next().await?;
        let columns = first.as_ref().map(column_headers).transpose()?.unwrap_or_default();
        let kinds: Vec<_> = columns.iter().map(|column| column.kind).collect();
        let head = TableHeader { name: table.name.to_owned(), columns, last_id };
        output.write(&Line::Table(head)).map_err(failed)?;
        let mut next = first;
        while let Some(row) = next {
            output.write(&Line::Row(row_cells(&row, &kinds)?)).map_err(failed)?;
            output.rows += 1;
            next = rows.try_next().await?;
        }
    }
    let rows = output.rows;
    let file = output.finish().map_err(failed)?;
    let persisted =
        if replace { file.persist(path).map(drop) } else { file.persist_noclobber(path).map(drop) };
    match persisted {
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(BackupError::Exists(path.to_owned()))
        }
        Err(error) => Err(failed(error.error)),
        // The directory must be synced too, or the new name may be lost in a crash.
        Ok(()) => {
            File::open(parent_dir(path)).and_then(|it| it.sync_all()).map_err(failed)?;
            Ok(rows)
        }
    }
}

/// Replaces the contents of the database with a backup in one transaction; returns the number of rows.
/// The whole file is verified first. A database that is not empty is left unchanged unless `replace` is
/// set; one that does not exist is created.
pub async fn restore(
    location: &DatabaseLocation,
    path: &Path,
    replace: bool,
) -> Result<u64, BackupError> {
    let mut check = BackupReader::open(path)?;
    while check.next_line()?.is_some() {}
    let mut input = BackupReader::open(path)?;
    if let DatabaseLocation::Sqlite(file) = location {
        create_directory(parent_dir(file)).map_err(|error| Error::file(file, error))?;
    }
    let database = Database::new(location).await?;
    let dialect = database.dialect();
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    raise_timeouts(&mut transaction, dialect).await?;
    if input.schema > migrations::NEWEST_VERSION {
        return Err(BackupError::Newer(path.to_owned()));
    }
    if dialect == Dialect::Postgres {
        // Running instances may write usage under another lock than the one of this transaction.
        let names = TABLES.map(|table| table.name).join(", ");
        let lock = format!("LOCK TABLE {names} IN EXCLUSIVE MODE");
        (&mut *transaction).execute(AssertSqlSafe(lock)).await?;
    }
    let names = EXCLUDED_TABLES.into_iter().chain(TABLES.iter().rev().map(|table| table.name));
    for name in names {
        let sql = if replace {
            format!("DELETE FROM {name}")
        } else {
            format!("SELECT 1 FROM {name} LIMIT 1")
        };
        let found = (&mut *transaction).fetch_optional(AssertSqlSafe(sql)).await?;
        if found.is_some() {
            return Err(BackupError::NotEmpty);
        }
    }
    let mut rows = 0;
    let mut batch: Option<InsertBatch> = None;
    while let Some(line) = input.next_line()? {
        match line {
            Line::Row(row) => {
                let Some(batch) = &mut batch else {
                    return Err(input.damaged("rows without a table"));
                };
                if row.len() != batch.columns.len() {
                    return Err(input.damaged("a row does not match the columns of its table"));
                }
                batch.rows.push(row);
                rows += 1;
                if batch.rows.len() == INSERT_BATCH {
                    batch.insert(&mut transaction, dialect).await?;
                }
            }
            Line::Table(head) => {
                if let Some(batch) = &mut batch {
                    batch.insert(&mut transaction, dialect).await?;
                }
                let Some(table) = TABLES.iter().find(|table| table.name == head.name) else {
                    return Err(input.damaged("it has an unknown table"));
                };
                let is_name = |it: &ColumnHeader| {
                    it.name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
                };
                if !head.columns.iter().all(is_name) {
                    return Err(input.damaged("it has an invalid column name"));
                }
                if let Some(last_id) = head.last_id.filter(|_| table.has_generated_id) {
                    advance_id_sequence(&mut transaction, dialect, table, last_id).await?;
                }
                batch = Some(InsertBatch { table, columns: head.columns, rows: Vec::new() });
            }
            Line::Head(_) | Line::End(_) => return Err(input.damaged("its lines are out of order")),
        }
    }
    if let Some(batch) = &mut batch {
        batch.insert(&mut transaction, dialect).await?;
    }
    database.notify_token_change(&mut transaction).await?;
    transaction.commit().await?;
    Ok(rows)
}

/// Creates the directory of a new database, accessible for its owner only.
fn create_directory(folder: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Raises the timeouts of a transaction so that it can read or write a large table.
async fn raise_timeouts(transaction: &mut Connection, dialect: Dialect) -> Result<(), sqlx::Error> {
    transaction.set_timeout(STATEMENT_TIMEOUT);
    if dialect == Dialect::Postgres {
        let sql =
            "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0";
        transaction.execute(sql).await?;
    }
    Ok(())
}

/// The last id that the database has generated for `table`.
async fn last_id(
    transaction: &mut Connection,
    dialect: Dialect,
    table: &Table,
) -> Result<Option<i64>, sqlx::Error> {
    let name = table.name;
    let sql = match dialect {
        Dialect::Sqlite => format!("SELECT seq AS id FROM sqlite_sequence WHERE name = '{name}'"),
        Dialect::Postgres => format!(
            "SELECT pg_sequence_last_value(pg_get_serial_sequence('{name}', 'id')::regclass) AS id"
        ),
    };
    let row = sqlx::query(AssertSqlSafe(sql)).fetch_optional(transaction).await?;
    Ok(row.map(|row| row.try_get("id")).transpose()?.flatten())
}

/// Ensures that ids generated for `table` are higher than `last_id`.
async fn advance_id_sequence(
    transaction: &mut Connection,
    dialect: Dialect,
    table: &Table,
    last_id: i64,
) -> Result<(), sqlx::Error> {
    let name = table.name;
    match dialect {
        Dialect::Sqlite => {
            let update = format!(
                "UPDATE sqlite_sequence SET seq = MAX(seq, {last_id}) WHERE name = '{name}'"
            );
            let updated = transaction.execute(AssertSqlSafe(update)).await?;
            if updated.rows_affected() == 0 {
                let insert =
                    format!("INSERT INTO sqlite_sequence (name, seq) VALUES ('{name}', {last_id})");
                transaction.execute(AssertSqlSafe(insert)).await?;
            }
        }
        Dialect::Postgres => {
            let sequence = format!("pg_get_serial_sequence('{name}', 'id')::regclass");
            let set = format!(
                "SELECT setval({sequence}, \
                 GREATEST({last_id}, COALESCE(pg_sequence_last_value({sequence}), 1)))"
            );
            transaction.execute(AssertSqlSafe(set)).await?;
        }
    }
    Ok(())
}

/// The names and types of a row's columns.
fn column_headers(row: &AnyRow) -> Result<Vec<ColumnHeader>, sqlx::Error> {
    let heads = row.columns().iter().map(|column| {
        let kind = match column.type_info().kind() {
            AnyTypeInfoKind::SmallInt | AnyTypeInfoKind::Integer | AnyTypeInfoKind::BigInt => {
                ColumnKind::Integer
            }
            AnyTypeInfoKind::Text => ColumnKind::Text,
            other => {
                let reason = format!(
                    "a backup cannot contain the type {other:?} of column {}",
                    column.name()
                );
                return Err(sqlx::Error::AnyDriverError(reason.into()));
            }
        };
        Ok(ColumnHeader { name: column.name().to_owned(), kind })
    });
    heads.collect()
}

fn row_cells(row: &AnyRow, kinds: &[ColumnKind]) -> Result<Vec<Option<Cell>>, sqlx::Error> {
    let cell = |(at, kind): (usize, &ColumnKind)| {
        Ok(match kind {
            ColumnKind::Integer => row.try_get::<Option<i64>, _>(at)?.map(Cell::Integer),
            ColumnKind::Text => row.try_get::<Option<String>, _>(at)?.map(Cell::Text),
        })
    };
    kinds.iter().enumerate().map(cell).collect()
}

/// Rows to insert into one table.
struct InsertBatch {
    table: &'static Table,
    columns: Vec<ColumnHeader>,
    rows: Vec<Vec<Option<Cell>>>,
}

impl InsertBatch {
    /// Inserts the rows and clears the batch.
    async fn insert(
        &mut self,
        transaction: &mut Connection,
        dialect: Dialect,
    ) -> Result<(), sqlx::Error> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let mut number = 0;
        let mut parameters = || {
            let parameters = names.iter().map(|_| {
                number += 1;
                format!("${number}")
            });
            format!("({})", parameters.collect::<Vec<_>>().join(", "))
        };
        let values: Vec<_> = self.rows.iter().map(|_| parameters()).collect();
        // PostgreSQL rejects explicit ids of a generated column otherwise.
        let overriding = match dialect {
            Dialect::Sqlite => "",
            Dialect::Postgres => "OVERRIDING SYSTEM VALUE ",
        };
        let sql = format!(
            "INSERT INTO {} ({}) {overriding}VALUES {}",
            self.table.name,
            names.join(", "),
            values.join(", ")
        );
        let mut insert = sqlx::query(AssertSqlSafe(sql));
        for row in self.rows.drain(..) {
            for (cell, column) in row.into_iter().zip(&self.columns) {
                insert = match (cell, column.kind) {
                    (Some(Cell::Integer(number)), _) => insert.bind(number),
                    (Some(Cell::Text(text)), _) => insert.bind(text),
                    (None, ColumnKind::Integer) => insert.bind(None::<i64>),
                    (None, ColumnKind::Text) => insert.bind(None::<String>),
                };
            }
        }
        insert.execute(transaction).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[tokio::test]
    async fn every_table_is_either_included_or_excluded() {
        let folder = tempfile::tempdir().unwrap();
        let location = DatabaseLocation::Sqlite(folder.path().join("parapet.db"));
        let database = Database::new(&location).await.unwrap();
        let mut transaction = database.begin_read().await.unwrap();
        let names: Vec<String> = sqlx::query_scalar(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' \
             AND name NOT LIKE '_sqlx_%'",
        )
        .fetch_all(&mut *transaction)
        .await
        .unwrap();
        let known = TABLES.iter().map(|table| table.name).chain(EXCLUDED_TABLES);
        let known: BTreeSet<_> = known.map(str::to_owned).collect();
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), known);
    }
}
