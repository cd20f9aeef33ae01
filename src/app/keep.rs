//! What outlives a run: verdicts on tokens, and usage that upstream did not take.
//!
//! What is stored is its owners' matter; here is decided when.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::spools::{SaveError, Spools};
use crate::{
    auth::Authenticator,
    store::{Key, Store},
    telemetry::report,
    usage::{Revision, Usage},
};

/// How often verdicts and waiting usage are stored, where they changed.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// How often usage of instances that have ended is looked for, besides at the start.
const ADOPT_EVERY: Duration = Duration::from_mins(1);

const VERDICTS: &str = "Verdicts on tokens";
const USAGE: &str = "Usage that waits for upstream";

/// Keeps state for the next run.
#[derive(Clone, Debug)]
pub(super) struct Keeper {
    store: Store,
    pub(super) auth: Authenticator,
    pub(super) usage: Usage,
    spools: Arc<Spools>,
}

impl Keeper {
    /// Takes over what an earlier run left; what cannot be read is left out.
    pub(super) async fn restore(store: Store, auth: Authenticator, usage: Usage) -> Self {
        match store.load(&Key::Verdicts).await {
            Ok(Some(saved)) => match auth.restore(&saved) {
                Ok(count) => info!(count, "Tokens known from an earlier run"),
                Err(error) => {
                    warn!(error = report(&error), "Stored verdicts on tokens are not used");
                }
            },
            Ok(None) => {}
            Err(error) => warn!(error = report(&error), "Stored verdicts on tokens are not used"),
        }
        let spools = Arc::new(Spools::open(store.clone(), &usage).await);
        let keeper = Self { store, auth, usage, spools };
        if keeper.spools.adopt(&keeper.usage).await {
            keeper.store_usage(&mut None, &mut SaveLog::new(USAGE)).await;
        }
        keeper
    }

    /// Stores what changes until `stop`, so that a crash loses little.
    ///
    /// Usage is stored as long as upstream does not take it, and the record is emptied as soon as it
    /// did: only a crash in the middle of that counts twice. Not to be dropped while it runs: a
    /// write goes on without it and may end after a later one.
    pub(super) async fn run(&self, stop: &CancellationToken) {
        // A disk that hangs with one record does not hold up the other.
        tokio::join!(self.run_verdicts(stop), self.run_usage(stop));
    }

    async fn run_verdicts(&self, stop: &CancellationToken) {
        let mut log = SaveLog::new(VERDICTS);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SAVE_EVERY) => self.store_verdicts(&mut log).await,
            }
        }
    }

    async fn run_usage(&self, stop: &CancellationToken) {
        // What an earlier run left was restored, and is the first to be replaced.
        let (mut stored, mut log) = (None, SaveLog::new(USAGE));
        let mut adopted = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SAVE_EVERY) => {}
                () = self.usage.settled() => {}
            }
            if adopted.elapsed() >= ADOPT_EVERY {
                adopted = Instant::now();
                if self.spools.adopt(&self.usage).await {
                    // Also where it came to nothing: what it was read from is to be emptied.
                    stored = None;
                }
            }
            self.store_usage(&mut stored, &mut log).await;
        }
    }

    /// Stores everything, at the end.
    pub(super) async fn finish(&self) {
        let mut log = SaveLog::new(VERDICTS);
        tokio::join!(self.store_verdicts(&mut log), self.finish_usage());
    }

    async fn finish_usage(&self) {
        // Nothing left is stored too: the next start must not send what has been sent.
        let left = self.usage.save().unwrap_or_default();
        if let Err(error) = self.spools.save(left).await {
            error!(error = report(&error), "Usage that was not sent is lost");
        }
    }

    /// Stores what waits for upstream, unless it is what is `stored`.
    async fn store_usage(&self, stored: &mut Option<Revision>, log: &mut SaveLog) {
        let Some(backlog) = self.usage.backlog(*stored) else { return };
        match self.spools.save(backlog.bytes).await {
            Ok(()) => {
                *stored = Some(backlog.revision);
                log.succeeded();
            }
            // A warning was logged when no slot was left.
            Err(SaveError::NoSlot) => {}
            Err(error) => log.failed(&error),
        }
    }

    async fn store_verdicts(&self, log: &mut SaveLog) {
        let Some(verdicts) = self.auth.save() else { return };
        match self.store.save(&Key::Verdicts, verdicts).await {
            Ok(()) => log.succeeded(),
            Err(error) => {
                self.auth.not_saved();
                log.failed(&error);
            }
        }
    }
}

/// Of saves that are tried again and again, logs the first that fails and the first after it that does
/// not: a full disk lasts for hours.
#[derive(Debug)]
pub(super) struct SaveLog {
    what: &'static str,
    is_failing: bool,
}

impl SaveLog {
    /// For saves of this, as the beginning of a sentence.
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, is_failing: false }
    }

    pub(super) fn failed(&mut self, error: &dyn std::error::Error) {
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(error = report(error), "{} cannot be stored", self.what);
        }
    }

    pub(super) fn succeeded(&mut self) {
        if std::mem::take(&mut self.is_failing) {
            info!("{} can be stored again", self.what);
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
        auth::{self, Authority},
        token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
        usage::{self, Reporter, SdkKind},
        wire::usage::{ClientMetrics, ConnectVia},
    };

    /// An instance that keeps a folder; upstream is away.
    async fn start(folder: &Path) -> Keeper {
        let config = auth::Config {
            revalidate_after: Duration::from_mins(1),
            forget_invalid_after: Duration::from_mins(1),
            list_interval: Duration::from_mins(1),
            deadline: Duration::from_secs(1),
            capacity: 10,
        };
        let config_of_usage = usage::Config { interval: Duration::from_mins(1), max_counters: 100 };
        let hop = ConnectVia { app_name: "parapet".into(), instance_id: "i".into() };
        Keeper::restore(
            Store::directory(folder).expect("store"),
            Authenticator::new(config, Authority::Nobody, []),
            Usage::new(&config_of_usage, hop),
        )
        .await
    }

    fn count(keeper: &Keeper, yes: u64) {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let now = Timestamp::now();
        let bucket = json!({"start": now, "stop": now, "toggles": {"f": {"yes": yes, "no": 0}}});
        let report = json!({"appName": "a", "instanceId": "i", "bucket": bucket}).to_string();
        let report = ClientMetrics::parse(report.as_bytes()).expect("report");
        let token = &TokenDigest::of("token");
        let reporter = Reporter { token, kind: SdkKind::Backend, scope: &scope, snapshot: None };
        keeper.usage.record_metrics(&reporter, report, now).expect("there is room");
    }

    /// How many evaluations an instance would send.
    fn waiting(keeper: &Keeper) -> u64 {
        let pending = keeper.usage.pending();
        let metrics = pending["metrics"].as_array().expect("list").iter();
        metrics.filter_map(|metric| Value::as_u64(&metric["bucket"]["yes"])).sum()
    }

    /// Stores what waits, as every few seconds, and dies without a word.
    async fn store_and_crash(keeper: Keeper) {
        let _ = keeper.usage.save();
        keeper.store_usage(&mut None, &mut SaveLog::new(USAGE)).await;
    }

    #[tokio::test]
    async fn two_instances_on_one_folder_lose_nothing() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&one, 100);
        count(&other, 7);
        one.finish().await;
        other.finish().await;
        drop((one, other));
        assert_eq!(waiting(&start(folder.path()).await), 107);
    }

    #[tokio::test]
    async fn what_an_instance_has_stored_is_nobody_elses_while_it_runs() {
        let folder = tempfile::tempdir().expect("folder");
        let one = start(folder.path()).await;
        count(&one, 100);
        let _ = one.usage.save();
        one.store_usage(&mut None, &mut SaveLog::new(USAGE)).await;
        let other = start(folder.path()).await;
        assert_eq!(waiting(&other), 0);
        other.finish().await;
        store_and_crash(one).await;
        assert_eq!(waiting(&start(folder.path()).await), 100);
    }

    #[tokio::test]
    async fn what_was_taken_over_is_stored_once() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&other, 7);
        store_and_crash(other).await;
        // Two that start at once: one has it, from here on in its own record.
        let (third, fourth) = tokio::join!(start(folder.path()), start(folder.path()));
        assert_eq!(waiting(&third) + waiting(&fourth), 7);
        drop((one, third, fourth));
        assert_eq!(waiting(&start(folder.path()).await), 7);
        // And once more, from a record that was emptied by its second owner.
        assert_eq!(waiting(&start(folder.path()).await), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn disk_that_hangs_with_verdicts_holds_up_neither_usage_nor_the_end() {
        let folder = tempfile::tempdir().expect("folder");
        let keeper = start(folder.path()).await;
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let token = Token::parse("*:dev.0123456789abcdef").expect("token");
        keeper.auth.import(&token, &Grant { kind: TokenKind::Client, scope });
        let _hangs = keeper.store.stall(&Key::Verdicts).await;
        count(&keeper, 7);
        let _ = keeper.usage.save();
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        tokio::join!(keeper.run(&stop), async {
            let record = folder.path().join("usage.parapet");
            let is_stored =
                || std::fs::read_to_string(&record).is_ok_and(|it| it.contains("\"f\""));
            while !is_stored() {
                sleep(SAVE_EVERY / 10).await;
                assert!(begun.elapsed() < SAVE_EVERY * 2, "usage waits for verdicts");
            }
            stop.cancel();
        });
        keeper.finish().await;
        assert!(begun.elapsed() < Duration::from_mins(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_running_instance_takes_over_what_ended_beside_it() {
        let folder = tempfile::tempdir().expect("folder");
        let (one, other) = (start(folder.path()).await, start(folder.path()).await);
        count(&other, 7);
        other.finish().await;
        drop(other);
        let stop = CancellationToken::new();
        tokio::join!(one.run(&stop), async {
            for _ in 0..100 {
                if waiting(&one) > 0 {
                    break;
                }
                sleep(SAVE_EVERY).await;
            }
            stop.cancel();
        });
        assert_eq!(waiting(&one), 7);
        one.finish().await;
        drop(one);
        assert_eq!(waiting(&start(folder.path()).await), 7);
    }
}
