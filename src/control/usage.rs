//! The usage that this instance was told of: stored by flag, application, environment and hour.
//!
//! Merging and when to try again are `usage`'s. What is old is forgotten, and how many values of a
//! kind an application may have is bounded.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use sqlx::{AnyConnection, Row as _};

use super::{
    database::{Database, Lane, now, of_count, of_millis},
    error::Error,
};
use crate::wire::usage::{Application, Bulk, BulkMetric};

/// How many milliseconds an hour has.
const HOUR: i64 = 3_600_000;
/// How many values of one kind are kept of an application.
const MAX_TRAITS: i64 = 1000;
/// How many rows of usage are told at once.
const MAX_ROWS: i64 = 50_000;
/// After which time an instance no longer counts.
const GONE_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// An application that uses flags.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApplicationSummary {
    /// Its name.
    pub name: String,
    /// The environments that it was seen in.
    pub environments: Vec<String>,
    /// The SDKs that it was seen with, as `<sdk>:<version>`.
    pub sdk_versions: Vec<String>,
    /// The strategies that it implements.
    pub strategies: Vec<String>,
    /// How many of its instances were seen during the last day.
    pub instances: u64,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// When it was last seen.
    pub seen_at: Timestamp,
}

/// How a flag was used by an application in an environment during an hour.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UsageHour {
    /// The flag.
    pub flag: String,
    /// The application.
    pub app_name: String,
    /// The environment.
    pub environment: String,
    /// When the hour began.
    pub hour: Timestamp,
    /// How often the flag was on.
    pub yes: u64,
    /// How often it was off.
    pub no: u64,
    /// How often each variant was given.
    pub variants: BTreeMap<String, u64>,
}

/// Stores a report, the body of `/api/client/metrics/bulk`, whole or not at all; false where it
/// cannot be read.
pub(super) async fn store(database: &Database, body: &Bytes) -> Result<bool, Error> {
    let Ok(bulk) = Bulk::parse(body) else { return Ok(false) };
    let mut transaction = database.write(Lane::Usage).await?;
    for application in &bulk.applications {
        store_application(&mut transaction, application).await?;
    }
    for metric in &bulk.metrics {
        store_metric(&mut transaction, metric).await?;
    }
    transaction.commit().await?;
    Ok(true)
}

async fn store_metric(transaction: &mut AnyConnection, metric: &BulkMetric) -> Result<(), Error> {
    let hour = metric.timestamp.as_millisecond().div_euclid(HOUR) * HOUR;
    let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    sqlx::query(
        "INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (flag, environment, app_name, hour) \
         DO UPDATE SET yes = flag_usage.yes + excluded.yes, no = flag_usage.no + excluded.no",
    )
    .bind(&*metric.feature_name)
    .bind(&*metric.environment)
    .bind(&*metric.app_name)
    .bind(hour)
    .bind(count(metric.stats.yes))
    .bind(count(metric.stats.no))
    .execute(&mut *transaction)
    .await?;
    for (variant, times) in &metric.stats.variants {
        sqlx::query(
            "INSERT INTO variant_usage (flag, environment, app_name, hour, variant, count) \
             VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (flag, environment, app_name, hour, variant) \
             DO UPDATE SET count = variant_usage.count + excluded.count",
        )
        .bind(&*metric.feature_name)
        .bind(&*metric.environment)
        .bind(&*metric.app_name)
        .bind(hour)
        .bind(&**variant)
        .bind(count(*times))
        .execute(&mut *transaction)
        .await?;
    }
    see(transaction, &metric.app_name).await?;
    note(transaction, &metric.app_name, "environment", &metric.environment).await?;
    if let Some(sdk) = &metric.metadata.sdk_version {
        note(transaction, &metric.app_name, "sdk", sdk).await?;
    }
    Ok(())
}

async fn store_application(
    transaction: &mut AnyConnection,
    application: &Application,
) -> Result<(), Error> {
    let name = &application.app_name;
    see(transaction, name).await?;
    let traits = [
        ("environment", &application.environment),
        ("instance", &application.instance_id),
        ("sdk", &application.metadata.sdk_version),
    ];
    for (kind, value) in traits {
        if let Some(value) = value {
            note(transaction, name, kind, value).await?;
        }
    }
    for strategy in &application.strategies {
        note(transaction, name, "strategy", strategy).await?;
    }
    Ok(())
}

/// Notes that an application is there.
async fn see(transaction: &mut AnyConnection, name: &Arc<str>) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO applications (app_name, created_at, seen_at) VALUES ($1, $2, $2) \
         ON CONFLICT (app_name) DO UPDATE SET seen_at = excluded.seen_at",
    )
    .bind(&**name)
    .bind(now().as_millisecond())
    .execute(transaction)
    .await?;
    Ok(())
}

/// Notes what an application was seen with.
async fn note(
    transaction: &mut AnyConnection,
    name: &Arc<str>,
    kind: &'static str,
    value: &Arc<str>,
) -> Result<(), Error> {
    let count = sqlx::query_scalar(
        "SELECT COUNT(*) FROM application_traits WHERE app_name = $1 AND kind = $2 AND value <> $3",
    );
    let others: i64 =
        count.bind(&**name).bind(kind).bind(&**value).fetch_one(&mut *transaction).await?;
    if others >= MAX_TRAITS {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO application_traits (app_name, kind, value, seen_at) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (app_name, kind, value) DO UPDATE SET seen_at = excluded.seen_at",
    )
    .bind(&**name)
    .bind(kind)
    .bind(&**value)
    .bind(now().as_millisecond())
    .execute(transaction)
    .await?;
    Ok(())
}

/// The applications, by name.
pub(super) async fn applications(database: &Database) -> Result<Vec<ApplicationSummary>, Error> {
    let mut transaction = database.read().await?;
    let rows = sqlx::query("SELECT * FROM applications ORDER BY app_name");
    let rows = rows.fetch_all(&mut *transaction).await?;
    let traits = sqlx::query("SELECT * FROM application_traits ORDER BY value");
    let traits = traits.fetch_all(&mut *transaction).await?;
    let mut applications: BTreeMap<String, ApplicationSummary> = BTreeMap::new();
    for row in &rows {
        let name: String = row.try_get("app_name")?;
        let summary = ApplicationSummary {
            name: name.clone(),
            environments: Vec::new(),
            sdk_versions: Vec::new(),
            strategies: Vec::new(),
            instances: 0,
            created_at: of_millis(row.try_get("created_at")?),
            seen_at: of_millis(row.try_get("seen_at")?),
        };
        applications.insert(name, summary);
    }
    let here = now();
    for row in &traits {
        let Some(summary) = applications.get_mut(row.try_get::<&str, _>("app_name")?) else {
            continue;
        };
        let value: String = row.try_get("value")?;
        let seen = of_millis(row.try_get("seen_at")?);
        match row.try_get::<&str, _>("kind")? {
            "environment" => summary.environments.push(value),
            "sdk" => summary.sdk_versions.push(value),
            "strategy" => summary.strategies.push(value),
            "instance" => summary.instances += u64::from(here.duration_since(seen) < GONE_AFTER),
            _ => {}
        }
    }
    Ok(applications.into_values().collect())
}

/// How a flag was used since a time, the newest hour first.
pub(super) async fn of_flag(
    database: &Database,
    flag: &str,
    since: Timestamp,
) -> Result<Vec<UsageHour>, Error> {
    let mut transaction = database.read().await?;
    let from = since.as_millisecond().div_euclid(HOUR) * HOUR;
    let rows = sqlx::query(
        "SELECT * FROM flag_usage WHERE flag = $1 AND hour >= $2 \
         ORDER BY hour DESC, environment, app_name LIMIT $3",
    );
    let rows = rows.bind(flag).bind(from).bind(MAX_ROWS).fetch_all(&mut *transaction).await?;
    let variants = sqlx::query("SELECT * FROM variant_usage WHERE flag = $1 AND hour >= $2");
    let variants = variants.bind(flag).bind(from).fetch_all(&mut *transaction).await?;
    let mut counts: BTreeMap<(i64, String, String), BTreeMap<String, u64>> = BTreeMap::new();
    for row in &variants {
        let key = (row.try_get("hour")?, row.try_get("environment")?, row.try_get("app_name")?);
        let count = of_count(row.try_get("count")?);
        counts.entry(key).or_default().insert(row.try_get("variant")?, count);
    }
    let hour = |row: &sqlx::any::AnyRow| -> Result<UsageHour, sqlx::Error> {
        let key: (i64, String, String) =
            (row.try_get("hour")?, row.try_get("environment")?, row.try_get("app_name")?);
        let variants = counts.get(&key).cloned().unwrap_or_default();
        let (hour, environment, app_name) = key;
        Ok(UsageHour {
            flag: flag.to_owned(),
            app_name,
            environment,
            hour: of_millis(hour),
            yes: of_count(row.try_get("yes")?),
            no: of_count(row.try_get("no")?),
            variants,
        })
    };
    Ok(rows.iter().map(hour).collect::<Result<_, _>>()?)
}

/// Forgets usage and applications from before a time.
pub(super) async fn prune(database: &Database, before: Timestamp) -> Result<(), Error> {
    let mut transaction = database.write(Lane::Usage).await?;
    for forget in [
        "DELETE FROM flag_usage WHERE hour < $1",
        "DELETE FROM variant_usage WHERE hour < $1",
        "DELETE FROM application_traits WHERE seen_at < $1",
        "DELETE FROM applications WHERE seen_at < $1",
    ] {
        sqlx::query(forget).bind(before.as_millisecond()).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(())
}
