//! Stores reported usage by flag, application, environment and hour.
//!
//! Aggregation and retries are in `usage`. Rows older than the retention are deleted. If a table exceeds
//! its limit, the excess is deleted in this order, the oldest first in each group: flags and variants
//! that are not configured, which also have a smaller limit of their own; then usage by applications
//! that were seen for less than a day; then the rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::AssertUnwindSafe,
};

use futures_util::future::{BoxFuture, FutureExt as _};
use jiff::{SignedDuration, Timestamp};
use sqlx::Row as _;
use tokio::sync::Mutex;
use tracing::{error, info, warn};

use super::{
    database::{Connection, Database, WriteLock, now, timestamp_from_millis, unsigned_count},
    error::Error,
};
use crate::{
    protocol::usage::{BulkMetric, BulkReport, ClientApplication},
    served::{ServedSnapshot, Snapshots},
    telemetry::error_chain,
    token::Environment,
    usage::{BatchId, OutgoingBatch, SendOutcome, UsageSink, count_unstored_impact_metrics},
};

const HOUR_MILLIS: i64 = 3_600_000;
/// The maximum count: the largest integer that JavaScript represents exactly.
const MAX_COUNT: i64 = (1 << 53) - 1;
/// The maximum length of a name, in bytes.
const MAX_NAME_LEN: usize = 255;
/// The maximum number of rows for flags, and separately for variants.
const MAX_STORED_ROWS: i64 = 1_000_000;
/// The maximum number of these rows for flags, or variants, that are not configured.
const MAX_UNKNOWN_ROWS: i64 = 10_000;
/// The maximum number of applications.
const MAX_APPLICATIONS: i64 = 5000;
/// The maximum number of environments, SDKs, strategies and instances of all applications together.
const MAX_TRAITS: i64 = 100_000;
/// The maximum number of batch ids that are remembered for deduplication, and for how long: as long as a
/// batch that one instance left behind may wait for the next instance.
const MAX_BATCHES: i64 = 200_000;
const BATCH_RETENTION: SignedDuration = SignedDuration::from_hours(30 * 24);
/// The maximum number of rows of a query.
const MAX_QUERY_ROWS: i64 = 50_000;
/// An instance counts as active for this time after it was last seen.
const INSTANCE_ACTIVE_FOR: SignedDuration = SignedDuration::from_hours(24);

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
    /// The number of its instances seen during the last 24 hours.
    pub instances: u64,
    /// The time it was first seen.
    pub created_at: Timestamp,
    /// The time it was last seen.
    pub seen_at: Timestamp,
}

/// The usage of a flag by an application in an environment during one hour.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UsageHour {
    /// The flag.
    pub flag: String,
    /// The application.
    pub app_name: String,
    /// The environment.
    pub environment: String,
    /// The start of the hour.
    pub hour: Timestamp,
    /// The number of evaluations to enabled.
    pub yes: u64,
    /// The number of evaluations to disabled.
    pub no: u64,
    /// The number of evaluations by variant.
    pub variants: BTreeMap<String, u64>,
}

/// Stores usage in the database instead of sending it to an upstream.
#[derive(Debug)]
pub struct DatabaseUsageSink {
    database: Database,
    /// Determine which flags and variants are configured.
    snapshots: Snapshots,
    /// Held while a batch is stored, so that the next ones wait without a connection.
    storing: Mutex<()>,
}

impl DatabaseUsageSink {
    pub(super) fn new(database: Database, snapshots: Snapshots) -> Self {
        Self { database, snapshots, storing: Mutex::default() }
    }

    /// Stores a batch. Its impact metrics are not stored; they are counted as dropped.
    async fn store_batch(&self, OutgoingBatch { id, body, .. }: OutgoingBatch) -> SendOutcome {
        let Ok(report) = BulkReport::parse(&body) else { return SendOutcome::Rejected };
        let _storing = self.storing.lock().await;
        let health = self.database.health();
        match store(&self.database, &self.snapshots, id, &report).await {
            Ok(()) => {
                if health.record_usage(true) {
                    info!("Usage is stored again");
                }
                count_unstored_impact_metrics(report.impact_metrics.len());
                SendOutcome::Sent
            }
            Err(error) => {
                if health.record_usage(false) {
                    warn!(
                        error = error_chain(&error),
                        "Usage could not be stored; it stays queued"
                    );
                }
                SendOutcome::Retry(None)
            }
        }
    }
}

impl UsageSink for DatabaseUsageSink {
    fn send(&self, batch: OutgoingBatch) -> BoxFuture<'_, SendOutcome> {
        let stored = AssertUnwindSafe(self.store_batch(batch)).catch_unwind();
        Box::pin(async {
            stored.await.unwrap_or_else(|_| {
                // The others must not wait for a batch that always causes this.
                error!("Storing a batch of usage panicked; it is retried");
                SendOutcome::Retry(None)
            })
        })
    }
}

/// Stores a report in one transaction. A batch that is stored already is ignored.
async fn store(
    database: &Database,
    snapshots: &Snapshots,
    id: BatchId,
    report: &BulkReport,
) -> Result<(), Error> {
    let mut transaction = database.begin_write(WriteLock::Usage).await?;
    let mark = sqlx::query(
        "INSERT INTO usage_batches (id, stored_at) VALUES ($1, $2) ON CONFLICT DO NOTHING",
    );
    let mark = mark.bind(id.to_string()).bind(now().as_millisecond());
    if mark.execute(&mut *transaction).await?.rows_affected() == 0 {
        return Ok(());
    }
    let mut seen = ReportedApplications::default();
    for application in &report.applications {
        seen.add_application(application);
    }
    for metric in &report.metrics {
        let snapshot = snapshots.load(&Environment::new(&metric.environment));
        store_metric(&mut transaction, metric, snapshot.as_deref()).await?;
        seen.add_metric(metric);
    }
    seen.store(&mut transaction).await?;
    transaction.commit().await
}

async fn store_metric(
    transaction: &mut Connection,
    metric: &BulkMetric,
    snapshot: Option<&ServedSnapshot>,
) -> Result<(), Error> {
    let hour = metric.timestamp.as_millisecond().div_euclid(HOUR_MILLIS) * HOUR_MILLIS;
    let flag = snapshot.and_then(|snapshot| snapshot.flag(&metric.feature_name));
    sqlx::query(
        "INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no, known) \
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (flag, environment, app_name, hour) \
         DO UPDATE SET yes = CASE WHEN flag_usage.yes > $8 - excluded.yes THEN $8 \
         ELSE flag_usage.yes + excluded.yes END, \
         no = CASE WHEN flag_usage.no > $8 - excluded.no THEN $8 \
         ELSE flag_usage.no + excluded.no END, \
         known = CASE WHEN excluded.known = 1 THEN 1 ELSE flag_usage.known END",
    )
    .bind(stored_name(&metric.feature_name))
    .bind(stored_name(&metric.environment))
    .bind(stored_name(&metric.app_name))
    .bind(hour)
    .bind(stored_count(metric.stats.yes))
    .bind(stored_count(metric.stats.no))
    .bind(i64::from(flag.is_some()))
    .bind(MAX_COUNT)
    .execute(&mut *transaction)
    .await?;
    for (variant, times) in &metric.stats.variants {
        let is_known = flag.is_some_and(|flag| flag.has_variant(variant));
        sqlx::query(
            "INSERT INTO variant_usage (flag, environment, app_name, hour, variant, count, known) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) \
             ON CONFLICT (flag, environment, app_name, hour, variant) \
             DO UPDATE SET count = CASE WHEN variant_usage.count > $8 - excluded.count THEN $8 \
             ELSE variant_usage.count + excluded.count END, \
             known = CASE WHEN excluded.known = 1 THEN 1 ELSE variant_usage.known END",
        )
        .bind(stored_name(&metric.feature_name))
        .bind(stored_name(&metric.environment))
        .bind(stored_name(&metric.app_name))
        .bind(hour)
        .bind(stored_name(variant))
        .bind(stored_count(*times))
        .bind(i64::from(is_known))
        .bind(MAX_COUNT)
        .execute(&mut *transaction)
        .await?;
    }
    Ok(())
}

/// A count as it is stored, capped at [`MAX_COUNT`].
fn stored_count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(MAX_COUNT).min(MAX_COUNT)
}

/// A name as it is stored, without NUL, which PostgreSQL rejects, and truncated, because indexes reject
/// long texts.
fn stored_name(name: &str) -> String {
    name[..name.floor_char_boundary(MAX_NAME_LEN)].replace('\0', "")
}

/// The applications in a report with their environments, SDKs, strategies and instances, deduplicated.
#[derive(Debug, Default)]
struct ReportedApplications(BTreeMap<String, BTreeSet<(&'static str, String)>>);

impl ReportedApplications {
    fn add_application(&mut self, application: &ClientApplication) {
        let traits = self.0.entry(stored_name(&application.app_name)).or_default();
        let named = [
            ("environment", &application.environment),
            ("instance", &application.instance_id),
            ("sdk", &application.metadata.sdk_version),
        ];
        let named =
            named.into_iter().filter_map(|(kind, it)| Some((kind, stored_name(it.as_ref()?))));
        traits.extend(named);
        let strategies = application.strategies.iter().flatten();
        traits.extend(strategies.map(|it| ("strategy", stored_name(it))));
    }

    fn add_metric(&mut self, metric: &BulkMetric) {
        let traits = self.0.entry(stored_name(&metric.app_name)).or_default();
        traits.insert(("environment", stored_name(&metric.environment)));
        traits.extend(metric.metadata.sdk_version.as_deref().map(|sdk| ("sdk", stored_name(sdk))));
    }

    async fn store(&self, transaction: &mut Connection) -> Result<(), Error> {
        let now = now().as_millisecond();
        for (name, traits) in &self.0 {
            sqlx::query(
                "INSERT INTO applications (app_name, created_at, seen_at) VALUES ($1, $2, $2) \
                 ON CONFLICT (app_name) DO UPDATE SET seen_at = excluded.seen_at",
            )
            .bind(name)
            .bind(now)
            .execute(&mut *transaction)
            .await?;
            for (kind, value) in traits {
                sqlx::query(
                    "INSERT INTO application_traits (app_name, kind, value, seen_at) \
                     VALUES ($1, $2, $3, $4) \
                     ON CONFLICT (app_name, kind, value) DO UPDATE SET seen_at = excluded.seen_at",
                )
                .bind(name)
                .bind(*kind)
                .bind(value)
                .bind(now)
                .execute(&mut *transaction)
                .await?;
            }
        }
        Ok(())
    }
}

/// The applications, sorted by name.
pub(super) async fn applications(database: &Database) -> Result<Vec<ApplicationSummary>, Error> {
    let mut transaction = database.begin_read().await?;
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
            created_at: timestamp_from_millis(row.try_get("created_at")?),
            seen_at: timestamp_from_millis(row.try_get("seen_at")?),
        };
        applications.insert(name, summary);
    }
    let here = now();
    for row in &traits {
        let Some(summary) = applications.get_mut(row.try_get::<&str, _>("app_name")?) else {
            continue;
        };
        let value: String = row.try_get("value")?;
        let seen = timestamp_from_millis(row.try_get("seen_at")?);
        match row.try_get::<&str, _>("kind")? {
            "environment" => summary.environments.push(value),
            "sdk" => summary.sdk_versions.push(value),
            "strategy" => summary.strategies.push(value),
            "instance" => {
                summary.instances += u64::from(here.duration_since(seen) < INSTANCE_ACTIVE_FOR);
            }
            _ => {}
        }
    }
    Ok(applications.into_values().collect())
}

/// The hourly usage of a flag since a time, the newest hour first.
pub(super) async fn flag_usage(
    database: &Database,
    flag: &str,
    since: Timestamp,
) -> Result<Vec<UsageHour>, Error> {
    let mut transaction = database.begin_read().await?;
    let from = since.as_millisecond().div_euclid(HOUR_MILLIS) * HOUR_MILLIS;
    let rows = sqlx::query(
        "SELECT * FROM flag_usage WHERE flag = $1 AND hour >= $2 \
         ORDER BY hour DESC, environment, app_name LIMIT $3",
    );
    let rows = rows.bind(flag).bind(from).bind(MAX_QUERY_ROWS).fetch_all(&mut *transaction).await?;
    let variants = sqlx::query(
        "SELECT * FROM variant_usage WHERE flag = $1 AND hour >= $2 ORDER BY hour DESC LIMIT $3",
    );
    let variants =
        variants.bind(flag).bind(from).bind(MAX_QUERY_ROWS).fetch_all(&mut *transaction).await?;
    let mut counts: BTreeMap<(i64, String, String), BTreeMap<String, u64>> = BTreeMap::new();
    for row in &variants {
        let key = (row.try_get("hour")?, row.try_get("environment")?, row.try_get("app_name")?);
        let count = unsigned_count(row.try_get("count")?);
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
            hour: timestamp_from_millis(hour),
            yes: unsigned_count(row.try_get("yes")?),
            no: unsigned_count(row.try_get("no")?),
            variants,
        })
    };
    Ok(rows.iter().map(hour).collect::<Result<_, _>>()?)
}

/// A limit on the number of rows of a table.
struct RowLimit {
    /// Counts the rows that the limit applies to.
    count: &'static str,
    /// Deletes the `$1` least important of them.
    delete: &'static str,
    max_rows: i64,
}

/// Applied in this order. Applications seen for at least a day are preferred, because made-up names
/// rarely last that long.
const ROW_LIMITS: [RowLimit; 7] = [
    RowLimit {
        count: "SELECT COUNT(*) FROM flag_usage WHERE known = 0",
        delete: "DELETE FROM flag_usage WHERE (flag, environment, app_name, hour) IN \
                 (SELECT flag, environment, app_name, hour FROM flag_usage WHERE known = 0 \
                 ORDER BY hour, yes + no LIMIT $1)",
        max_rows: MAX_UNKNOWN_ROWS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM flag_usage",
        delete: "DELETE FROM flag_usage WHERE (flag, environment, app_name, hour) IN \
                 (SELECT it.flag, it.environment, it.app_name, it.hour FROM flag_usage it \
                 LEFT JOIN applications app ON app.app_name = it.app_name \
                 ORDER BY it.known, \
                 CASE WHEN app.seen_at - app.created_at >= 86400000 THEN 1 ELSE 0 END, \
                 it.hour, it.yes + it.no LIMIT $1)",
        max_rows: MAX_STORED_ROWS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM variant_usage WHERE known = 0",
        delete: "DELETE FROM variant_usage \
                 WHERE (flag, environment, app_name, hour, variant) IN \
                 (SELECT flag, environment, app_name, hour, variant FROM variant_usage \
                 WHERE known = 0 ORDER BY hour, count LIMIT $1)",
        max_rows: MAX_UNKNOWN_ROWS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM variant_usage",
        delete: "DELETE FROM variant_usage \
                 WHERE (flag, environment, app_name, hour, variant) IN \
                 (SELECT it.flag, it.environment, it.app_name, it.hour, it.variant \
                 FROM variant_usage it \
                 LEFT JOIN applications app ON app.app_name = it.app_name \
                 ORDER BY it.known, \
                 CASE WHEN app.seen_at - app.created_at >= 86400000 THEN 1 ELSE 0 END, \
                 it.hour, it.count LIMIT $1)",
        max_rows: MAX_STORED_ROWS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM application_traits",
        delete: "DELETE FROM application_traits WHERE (app_name, kind, value) IN \
                 (SELECT it.app_name, it.kind, it.value FROM application_traits it \
                 JOIN applications app ON app.app_name = it.app_name \
                 ORDER BY CASE WHEN app.seen_at - app.created_at >= 86400000 THEN 1 ELSE 0 END, \
                 CASE WHEN it.kind = 'instance' THEN 0 ELSE 1 END, it.seen_at LIMIT $1)",
        max_rows: MAX_TRAITS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM applications",
        delete: "DELETE FROM applications WHERE app_name IN \
                 (SELECT app_name FROM applications \
                 ORDER BY CASE WHEN seen_at - created_at >= 86400000 THEN 1 ELSE 0 END, \
                 seen_at LIMIT $1)",
        max_rows: MAX_APPLICATIONS,
    },
    RowLimit {
        count: "SELECT COUNT(*) FROM usage_batches",
        delete: "DELETE FROM usage_batches WHERE id IN \
                 (SELECT id FROM usage_batches ORDER BY stored_at LIMIT $1)",
        max_rows: MAX_BATCHES,
    },
];

/// Deletes usage and applications from before a time, and the rows beyond the limits.
pub(super) async fn prune(database: &Database, before: Timestamp) -> Result<(), Error> {
    let mut transaction = database.begin_background_write(WriteLock::Usage).await?;
    let batches = now().saturating_sub(BATCH_RETENTION).unwrap_or(Timestamp::UNIX_EPOCH);
    for (delete, before) in [
        ("DELETE FROM flag_usage WHERE hour < $1", before),
        ("DELETE FROM variant_usage WHERE hour < $1", before),
        ("DELETE FROM application_traits WHERE seen_at < $1", before),
        ("DELETE FROM applications WHERE seen_at < $1", before),
        ("DELETE FROM usage_batches WHERE stored_at < $1", batches),
    ] {
        let delete = sqlx::query(delete).bind(before.as_millisecond());
        delete.execute(&mut *transaction).await?;
    }
    // If a flag was configured only after its first use, its earlier rows become known too.
    let mark_known = sqlx::query(
        "UPDATE flag_usage SET known = 1 WHERE known = 0 AND EXISTS (SELECT 1 FROM flag_usage it \
         WHERE it.flag = flag_usage.flag AND it.environment = flag_usage.environment \
         AND it.known = 1)",
    );
    mark_known.execute(&mut *transaction).await?;
    for RowLimit { count, delete, max_rows } in &ROW_LIMITS {
        let count: i64 = sqlx::query_scalar(*count).fetch_one(&mut *transaction).await?;
        if count > *max_rows {
            let delete = sqlx::query(*delete).bind(count - max_rows);
            delete.execute(&mut *transaction).await?;
        }
    }
    transaction.commit().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tempfile::TempDir;

    use super::*;
    use crate::control_plane::DatabaseLocation;

    /// Three impact metrics.
    const IMPACT: &str = r#"{"applications":[],"metrics":[],"impactMetrics":[
        {"name":"a","help":"h","type":"counter","samples":[{"value":1}]},
        {"name":"b","help":"h","type":"counter","samples":[{"value":1}]},
        {"name":"c","help":"h","type":"gauge","samples":[{"value":1}]}]}"#;

    async fn sink(folder: &TempDir) -> DatabaseUsageSink {
        let location = DatabaseLocation::Sqlite(folder.path().join("parapet.db"));
        DatabaseUsageSink::new(Database::new(&location).await.unwrap(), Snapshots::default())
    }

    fn batch(body: &'static str) -> OutgoingBatch {
        let (id, environment) = (BatchId::default(), Environment::new("dev"));
        OutgoingBatch { id, environment, body: body.into(), may_be_parked: false }
    }

    #[tokio::test]
    async fn batch_is_retried_while_the_database_fails_and_rejected_if_malformed() {
        let folder = tempfile::tempdir().unwrap();
        let no_database = "This is another file.".repeat(200);
        std::fs::write(folder.path().join("parapet.db"), no_database).unwrap();
        let sink = sink(&folder).await;
        assert_eq!(sink.send(batch(IMPACT)).await, SendOutcome::Retry(None));
        assert_eq!(sink.send(batch("{}")).await, SendOutcome::Rejected);
    }

    #[tokio::test]
    async fn impact_metrics_are_counted_as_dropped() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let registry = recorder.handle();
        let _counting = metrics::set_default_local_recorder(&recorder);
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(sink(&folder).await.send(batch(IMPACT)).await, SendOutcome::Sent);
        let (text, item) = (registry.render(), "{item=\"impact_metric_not_kept\"} 3\n");
        assert!(text.contains(&format!("parapet_usage_items_dropped_total{item}")), "{text}");
    }
}
