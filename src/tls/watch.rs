//! Reloads certificate files when they change, and warns before a certificate expires.

use std::time::Duration;

use jiff::Timestamp;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use tokio::{
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};

use super::{acceptor::TlsAcceptor, handshake::HANDSHAKES, load::TlsFiles};
use crate::telemetry::error_chain;

/// The interval at which the files are read. Comparing contents works on every kind of mount, including
/// Kubernetes' symbolic links.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// The interval at which warnings about expiry are repeated in the log.
const EXPIRY_WARNING_INTERVAL: Duration = Duration::from_hours(24);

const CERTIFICATE_EXPIRY: &str = "parapet_tls_certificate_expiry_seconds";
const RELOADS: &str = "parapet_tls_reloads_total";

/// The state of the watched files.
#[derive(Debug, Default)]
pub(super) struct WatchState {
    /// The hash of the contents at the last check.
    last_digest: Option<u64>,
    /// The hash of invalid contents that were reported.
    refused_digest: Option<u64>,
}

impl TlsAcceptor {
    /// Reloads the files when their contents change, until the future is dropped. Invalid files are
    /// logged and counted, and the last valid ones stay in use.
    pub async fn watch_files(&self) {
        describe_metrics();
        let mut watch = WatchState::default();
        // The startup logs its own warnings.
        let mut warned_at = Instant::now();
        let mut checks = interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            let is_replaced = self.check_files(&mut watch).await;
            let now = Timestamp::now();
            for certificate in self.certificates() {
                let file = certificate.file().display().to_string();
                let left = certificate.expires_in(now).as_secs_f64();
                gauge!(CERTIFICATE_EXPIRY, "listener" => self.listener(), "certificate" => file)
                    .set(left);
            }
            if is_replaced || warned_at.elapsed() >= EXPIRY_WARNING_INTERVAL {
                warned_at = Instant::now();
                for warning in self.warnings(now) {
                    warn!(listener = self.listener(), "TLS: {warning}");
                }
            }
        }
    }

    /// Reads the files and loads them if they have changed. Returns whether they were replaced.
    ///
    /// A change is loaded once two consecutive checks see the same contents, because certificate and key
    /// may be written one after the other.
    pub(super) async fn check_files(&self, watch: &mut WatchState) -> bool {
        let config = self.config().clone();
        let Ok(files) = spawn_blocking(move || TlsFiles::read(&config)).await else { return false };
        let digest = files.digest();
        let is_settled = watch.last_digest.replace(digest) == Some(digest);
        if digest == self.digest() {
            watch.refused_digest = None;
            return false;
        }
        if !is_settled || watch.refused_digest == Some(digest) {
            return false;
        }
        let listener = self.listener();
        let replaced = self.reload(&files);
        let outcome = if replaced.is_ok() { "applied" } else { "refused" };
        counter!(RELOADS, "listener" => listener, "outcome" => outcome).increment(1);
        match &replaced {
            Ok(()) => {
                watch.refused_digest = None;
                info!(listener, "TLS: changed files are in use");
            }
            Err(problems) => {
                watch.refused_digest = Some(digest);
                warn!(
                    listener,
                    error = error_chain(problems),
                    "TLS: changed files are invalid; the files loaded last stay in use"
                );
            }
        }
        replaced.is_ok()
    }
}

fn describe_metrics() {
    describe_counter!(HANDSHAKES, "TLS handshakes by version (none if they failed) and outcome");
    describe_counter!(
        RELOADS,
        "Reloads of changed TLS files by outcome: applied, or refused as invalid"
    );
    describe_gauge!(
        CERTIFICATE_EXPIRY,
        Unit::Seconds,
        "Time until a TLS certificate expires; negative afterwards"
    );
}
