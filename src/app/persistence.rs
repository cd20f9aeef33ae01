//! Persists validated tokens and unsent usage across restarts.
//!
//! This module decides when to save. The owners of the data define its format.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::usage_files::{SaveError, UsageFiles};
use crate::{
    auth::Authenticator,
    store::{self, RecordKey, RecordLock, Store},
    telemetry::error_chain,
    usage::{Revision, Usage},
};

/// Interval at which changed tokens and pending usage are saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// Interval at which usage of ended instances is searched for, after the search at the start.
const ORPHAN_SCAN_INTERVAL: Duration = Duration::from_mins(1);

const TOKEN_CACHE_SUBJECT: &str = "Validated tokens";
const USAGE_SUBJECT: &str = "Pending usage";

/// Saves state for the next run.
#[derive(Clone, Debug)]
pub(super) struct Persistence {
    store: Arc<dyn Store>,
    pub(super) auth: Authenticator,
    pub(super) usage: Usage,
    usage_files: Arc<UsageFiles>,
}

impl Persistence {
    /// Restores the state of an earlier run; unreadable records are skipped.
    pub(super) async fn restore(store: Arc<dyn Store>, auth: Authenticator, usage: Usage) -> Self {
        match store.load(&RecordKey::TokenCache).await {
            Ok(Some(saved)) => match auth.restore(&saved) {
                Ok(count) => info!(count, "Restored tokens validated in an earlier run"),
                Err(error) => {
                    warn!(error = error_chain(&error), "Stored tokens cannot be used");
                }
            },
            Ok(None) => {}
            Err(error) if error.is_unavailable() => {}
            Err(error) => warn!(error = error_chain(&error), "Stored tokens cannot be used"),
        }
        let files = Arc::new(UsageFiles::open(Arc::clone(&store), &usage).await);
        let persistence = Self { store, auth, usage, usage_files: files };
        if persistence.usage_files.recover_orphans(&persistence.usage).await {
            persistence.save_usage(&mut None, &mut SaveLog::new(USAGE_SUBJECT)).await;
        }
        persistence
    }

    /// Saves changes until `stop`, so that a crash loses little.
    ///
    /// Usage is stored while upstream does not accept it, and the record is emptied as soon as upstream
    /// does: only a crash between the two counts usage twice. Must not be dropped while running, because
    /// a write continues without it and may complete after a later one.
    pub(super) async fn run(&self, stop: &CancellationToken) {
        // Separate, so that a disk that hangs with one record does not delay the other.
        tokio::join!(self.run_token_cache(stop), self.run_usage(stop), self.run_renewals(stop));
    }

    async fn run_renewals(&self, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(RecordLock::RENEWAL_INTERVAL) => self.usage_files.renew_locks().await,
            }
        }
    }

    async fn run_token_cache(&self, stop: &CancellationToken) {
        let mut log = SaveLog::new(TOKEN_CACHE_SUBJECT);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SAVE_INTERVAL) => self.save_token_cache(&mut log).await,
            }
        }
    }

    async fn run_usage(&self, stop: &CancellationToken) {
        // `None`: the first save replaces what an earlier run left.
        let (mut stored, mut log) = (None, SaveLog::new(USAGE_SUBJECT));
        let mut last_scan = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SAVE_INTERVAL) => {}
                () = self.usage.wait_until_stored_usage_delivered() => {}
            }
            if last_scan.elapsed() >= ORPHAN_SCAN_INTERVAL {
                last_scan = Instant::now();
                if self.usage_files.recover_orphans(&self.usage).await {
                    // Even if nothing is pending: the records that were read must be emptied.
                    stored = None;
                }
            }
            self.save_usage(&mut stored, &mut log).await;
        }
    }

    /// Saves everything at shutdown.
    pub(super) async fn save_final(&self) {
        let mut log = SaveLog::new(TOKEN_CACHE_SUBJECT);
        tokio::join!(self.save_token_cache(&mut log), self.save_final_usage());
    }

    async fn save_final_usage(&self) {
        // An empty record is saved too, so that the next start does not resend usage.
        let unsent = self.usage.serialize().unwrap_or_default();
        if let Err(error) = self.usage_files.save(unsent).await {
            error!(error = error_chain(&error), "Unsent usage cannot be stored and is lost");
        }
        self.usage_files.release_locks().await;
    }

    /// Saves pending usage, unless its revision is `stored`.
    async fn save_usage(&self, stored: &mut Option<Revision>, log: &mut SaveLog) {
        let Some(backlog) = self.usage.backlog(*stored) else { return };
        match self.usage_files.save(backlog.bytes).await {
            Ok(()) => {
                *stored = Some(backlog.revision);
                log.record_success();
            }
            // A warning was logged when no slot was left.
            Err(SaveError::NoSlot) => {}
            Err(SaveError::Store(error)) => log.record_failure(&error),
        }
    }

    async fn save_token_cache(&self, log: &mut SaveLog) {
        let Some(tokens) = self.auth.serialize_if_changed() else { return };
        match self.store.save(&RecordKey::TokenCache, tokens.into()).await {
            Ok(()) => log.record_success(),
            Err(error) => {
                self.auth.mark_unsaved();
                log.record_failure(&error);
            }
        }
    }
}

/// Limits logging of repeated saves to the first failure and the first success after it: a full disk may
/// last for hours.
#[derive(Debug)]
pub(super) struct SaveLog {
    subject: &'static str,
    is_failing: bool,
}

impl SaveLog {
    /// `subject` names what is saved and begins the log message.
    pub(super) fn new(subject: &'static str) -> Self {
        Self { subject, is_failing: false }
    }

    /// An unavailable store is logged by the store itself.
    pub(super) fn record_failure(&mut self, error: &store::Error) {
        if !error.is_unavailable() && !std::mem::replace(&mut self.is_failing, true) {
            warn!(error = error_chain(error), "{} cannot be stored", self.subject);
        }
    }

    pub(super) fn record_success(&mut self) {
        if std::mem::take(&mut self.is_failing) {
            info!("{} can be stored again", self.subject);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        auth::{self, Validator},
        protocol::usage::{ClientMetrics, ConnectVia},
        store::FileStore,
        token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
        usage::{self, ReportingClient, SdkKind},
    };

    fn open(folder: &Path) -> Arc<FileStore> {
        Arc::new(FileStore::open(folder).expect("store"))
    }

    /// An instance that uses this folder; upstream is unreachable.
    async fn start(folder: &Path) -> Persistence {
        start_with(open(folder)).await
    }

    async fn start_with(store: Arc<FileStore>) -> Persistence {
        let config = auth::Config {
            revalidate_after: Duration::from_mins(1),
            forget_invalid_after: Duration::from_mins(1),
            list_interval: Duration::from_mins(1),
            deadline: Duration::from_secs(1),
            capacity: 10,
        };
        let config_of_usage = usage::Config { interval: Duration::from_mins(1), max_counters: 100 };
        let hop = ConnectVia { app_name: "parapet".into(), instance_id: "i".into() };
        Persistence::restore(
            store,
            Authenticator::new(config, Validator::StaticOnly, []),
            Usage::new(&config_of_usage, hop),
        )
        .await
    }

    fn count(persistence: &Persistence, yes: u64) {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let now = Timestamp::now();
        let bucket = json!({"start": now, "stop": now, "toggles": {"f": {"yes": yes, "no": 0}}});
        let report = json!({"appName": "a", "instanceId": "i", "bucket": bucket}).to_string();
        let report = ClientMetrics::parse(report.as_bytes()).expect("report");
        let token = &TokenDigest::of("token");
        let reporter =
            ReportingClient { token, sdk_kind: SdkKind::Backend, scope: &scope, snapshot: None };
        persistence.usage.record_metrics(&reporter, report, now).expect("there is room");
    }

    /// Number of evaluations that an instance would send.
    fn pending_evaluations(persistence: &Persistence) -> u64 {
        let pending = persistence.usage.pending();
        let metrics = pending["metrics"].as_array().expect("list").iter();
        metrics.filter_map(|metric| Value::as_u64(&metric["bucket"]["yes"])).sum()
    }

    /// Saves pending usage, as happens every few seconds, and then crashes.
    async fn save_and_crash(persistence: Persistence) {
        let _ = persistence.usage.serialize();
        persistence.save_usage(&mut None, &mut SaveLog::new(USAGE_SUBJECT)).await;
    }

    #[tokio::test]
    async fn two_instances_in_one_folder_lose_no_usage() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&one, 100);
        count(&other, 7);
        one.save_final().await;
        other.save_final().await;
        drop((one, other));
        assert_eq!(pending_evaluations(&start(folder.path()).await), 107);
    }

    #[tokio::test]
    async fn stored_usage_of_a_running_instance_is_not_recovered_by_another() {
        let folder = tempfile::tempdir().expect("folder");
        let one = start(folder.path()).await;
        count(&one, 100);
        let _ = one.usage.serialize();
        one.save_usage(&mut None, &mut SaveLog::new(USAGE_SUBJECT)).await;
        let other = start(folder.path()).await;
        assert_eq!(pending_evaluations(&other), 0);
        other.save_final().await;
        save_and_crash(one).await;
        assert_eq!(pending_evaluations(&start(folder.path()).await), 100);
    }

    #[tokio::test]
    async fn recovered_usage_is_stored_once() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&other, 7);
        save_and_crash(other).await;
        // Two that start at once: one restores it and stores it in its own record.
        let (third, fourth) = tokio::join!(start(folder.path()), start(folder.path()));
        assert_eq!(pending_evaluations(&third) + pending_evaluations(&fourth), 7);
        drop((one, third, fourth));
        assert_eq!(pending_evaluations(&start(folder.path()).await), 7);
        // The same for a record that its second owner emptied.
        assert_eq!(pending_evaluations(&start(folder.path()).await), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn hanging_save_of_tokens_delays_neither_usage_nor_shutdown() {
        let folder = tempfile::tempdir().expect("folder");
        let store = open(folder.path());
        let persistence = start_with(Arc::clone(&store)).await;
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let token = Token::parse("*:dev.0123456789abcdef").expect("token");
        persistence.auth.import(&token, &Grant { kind: TokenKind::Client, scope });
        let _hangs = store.block_saves(&RecordKey::TokenCache).await;
        count(&persistence, 7);
        let _ = persistence.usage.serialize();
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        tokio::join!(persistence.run(&stop), async {
            let record = folder.path().join("usage.parapet");
            let is_stored =
                || std::fs::read_to_string(&record).is_ok_and(|it| it.contains("\"f\""));
            while !is_stored() {
                sleep(SAVE_INTERVAL / 10).await;
                assert!(begun.elapsed() < SAVE_INTERVAL * 2, "usage waits for tokens");
            }
            stop.cancel();
        });
        persistence.save_final().await;
        assert!(begun.elapsed() < Duration::from_mins(1));
    }

    #[tokio::test(start_paused = true)]
    async fn running_instance_recovers_usage_of_an_ended_one() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&other, 7);
        other.save_final().await;
        drop(other);
        let stop = CancellationToken::new();
        tokio::join!(one.run(&stop), async {
            for _ in 0..100 {
                if pending_evaluations(&one) > 0 {
                    break;
                }
                sleep(SAVE_INTERVAL).await;
            }
            stop.cancel();
        });
        assert_eq!(pending_evaluations(&one), 7);
        one.save_final().await;
        drop(one);
        assert_eq!(pending_evaluations(&start(folder.path()).await), 7);
    }
}
