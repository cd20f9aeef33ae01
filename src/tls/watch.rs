//! Follows the files of certificates, and warns before one expires.

use std::time::Duration;

use jiff::Timestamp;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use tokio::{
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{info, warn};

use super::{handshake::HANDSHAKES, load::Files, server::Server};
use crate::telemetry::report;

/// How often files are read. Contents are compared, which works on every kind of mount, Kubernetes'
/// links included.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How often the log repeats that a certificate is about to expire.
const WARN_INTERVAL: Duration = Duration::from_hours(24);

const EXPIRY: &str = "parapet_tls_certificate_expiry_seconds";
const RELOADS: &str = "parapet_tls_reloads_total";

/// What is known of the files, besides what is in use.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The contents at the last check.
    seen: Option<u64>,
    /// Contents that cannot be used, and were reported.
    refused: Option<u64>,
}

impl Server {
    /// Loads files anew when their contents change, until dropped. What cannot be used is logged and
    /// counted, and what was loaded last stays in use.
    pub async fn run(&self) {
        describe();
        let mut watch = Watch::default();
        // A start warns by itself.
        let mut warned_at = Instant::now();
        let mut checks = interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            let is_replaced = self.check(&mut watch).await;
            let now = Timestamp::now();
            for certificate in self.certificates() {
                let file = certificate.file().display().to_string();
                let left = certificate.expires_in(now).as_secs_f64();
                gauge!(EXPIRY, "listener" => self.listener(), "certificate" => file).set(left);
            }
            if is_replaced || warned_at.elapsed() >= WARN_INTERVAL {
                warned_at = Instant::now();
                for warning in self.warnings(now) {
                    warn!(listener = self.listener(), "TLS: {warning}");
                }
            }
        }
    }

    /// Reads the files, and uses them if they differ from what is in use; whether they were replaced.
    ///
    /// Contents count once they were the same at two checks in a row, since certificate and key may be
    /// written one after the other.
    pub(super) async fn check(&self, watch: &mut Watch) -> bool {
        let config = self.config().clone();
        let Ok(files) = spawn_blocking(move || Files::read(&config)).await else { return false };
        let digest = files.digest();
        let is_settled = watch.seen.replace(digest) == Some(digest);
        if digest == self.digest() {
            watch.refused = None;
            return false;
        }
        if !is_settled || watch.refused == Some(digest) {
            return false;
        }
        let listener = self.listener();
        let replaced = self.replace(&files);
        let outcome = if replaced.is_ok() { "applied" } else { "refused" };
        counter!(RELOADS, "listener" => listener, "outcome" => outcome).increment(1);
        match &replaced {
            Ok(()) => {
                watch.refused = None;
                info!(listener, "TLS: changed files are in use");
            }
            Err(problems) => {
                watch.refused = Some(digest);
                warn!(
                    listener,
                    error = report(problems),
                    "TLS: changed files cannot be used, those loaded last stay in use"
                );
            }
        }
        replaced.is_ok()
    }
}

fn describe() {
    describe_counter!(HANDSHAKES, "TLS handshakes by version (none if they failed) and outcome");
    describe_counter!(RELOADS, "Changed files of TLS certificates: applied, or refused");
    describe_gauge!(
        EXPIRY,
        Unit::Seconds,
        "Time until a TLS certificate expires; negative afterwards"
    );
}
