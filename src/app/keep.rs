//! What outlives a run: verdicts on tokens, and usage that upstream did not take.
//!
//! What is stored is its owners' matter; here is decided when.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    auth::Authenticator,
    store::{Key, Store},
    telemetry::report,
    usage::Usage,
};

/// How often verdicts and waiting usage are stored, where they changed.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// Keeps state for the next run.
#[derive(Clone, Debug)]
pub(super) struct Keeper {
    pub(super) store: Store,
    pub(super) auth: Authenticator,
    pub(super) usage: Usage,
}

impl Keeper {
    /// Takes over what an earlier run left; what cannot be read is left out.
    pub(super) async fn restore(&self) {
        match self.store.load(&Key::Verdicts).await {
            Ok(Some(saved)) => match self.auth.restore(&saved) {
                Ok(count) => info!(count, "Tokens known from an earlier run"),
                Err(error) => {
                    warn!(error = report(&error), "Stored verdicts on tokens are not used");
                }
            },
            Ok(None) => {}
            Err(error) => warn!(error = report(&error), "Stored verdicts on tokens are not used"),
        }
        match self.store.load(&Key::Usage).await {
            Ok(Some(saved)) if saved.is_empty() => {}
            Ok(Some(saved)) => match self.usage.restore(&saved) {
                Ok(()) => info!("Usage of an earlier run waits to be sent"),
                Err(error) => warn!(error = report(&error), "Stored usage is lost"),
            },
            Ok(None) => {}
            Err(error) => warn!(error = report(&error), "Stored usage is lost"),
        }
    }

    /// Stores what changes until `stop`, so that a crash loses little.
    ///
    /// Usage is stored as long as upstream does not take it, and the record is emptied as soon as it
    /// did: only a crash in the middle of that counts twice. Not to be dropped while it runs: a
    /// write goes on without it and may end after a later one.
    pub(super) async fn run(&self, stop: &CancellationToken) {
        // What an earlier run left was restored, and is the first to be replaced.
        let mut stored = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(SAVE_EVERY) => {}
                () = self.usage.settled() => {}
            }
            self.store_verdicts().await;
            let Some(backlog) = self.usage.backlog(stored) else { continue };
            match self.store.save(&Key::Usage, backlog.bytes).await {
                Ok(()) => stored = Some(backlog.revision),
                Err(error) => {
                    warn!(error = report(&error), "Usage that waits for upstream cannot be stored");
                }
            }
        }
    }

    /// Stores everything, at the end.
    pub(super) async fn finish(&self) {
        self.store_verdicts().await;
        // Nothing left is stored too: the next start must not send what has been sent.
        let left = self.usage.save().unwrap_or_default();
        if let Err(error) = self.store.save(&Key::Usage, left).await {
            error!(error = report(&error), "Usage that was not sent is lost");
        }
    }

    async fn store_verdicts(&self) {
        let Some(verdicts) = self.auth.save() else { return };
        if let Err(error) = self.store.save(&Key::Verdicts, verdicts).await {
            self.auth.not_saved();
            warn!(error = report(&error), "Verdicts on tokens cannot be stored");
        }
    }
}
