//! Logs how the flags of an environment arrive, by polling or by streams, whenever that changes.
//!
//! It decides nothing: `environment_state` does.

use tracing::{debug, info, warn};

use crate::{
    sync::reconnect::{CloseReason, StreamUnavailable, UpstreamMode},
    token::Environment,
};

/// How the flags of an environment arrive, as last logged.
#[derive(Debug)]
pub(super) struct TransportLog {
    environment: Environment,
    mode: UpstreamMode,
    logged: Transport,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Transport {
    /// By polling; nothing was logged about streams yet.
    Polling,
    /// By polling, because a stream is missing.
    PollingBecause(PollingReason),
    /// By streams.
    Streaming,
}

/// Why an environment is polled rather than streamed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum PollingReason {
    NotSupported,
    Unauthorized,
    Throttled,
    OpenFailed,
    StreamLost,
    PollingPreferred,
}

impl PollingReason {
    fn as_str(self) -> &'static str {
        match self {
            Self::NotSupported => "it does not support streaming",
            Self::Unauthorized => "it does not accept the token for its stream",
            Self::Throttled => "it accepts no further stream",
            Self::OpenFailed => "its stream cannot be opened",
            Self::StreamLost => "its stream was lost",
            Self::PollingPreferred => "it requests polling",
        }
    }
}

impl TransportLog {
    pub(super) fn new(environment: Environment, mode: UpstreamMode) -> Self {
        Self { environment, mode, logged: Transport::Polling }
    }

    /// Every token in use has a synced stream.
    pub(super) fn on_streaming(&mut self) {
        if self.logged != Transport::Streaming {
            info!(
                environment = %self.environment,
                transport = "stream",
                "Upstream's event stream is open; polling stops"
            );
            self.logged = Transport::Streaming;
        }
    }

    /// A stream could not be opened.
    pub(super) fn on_unavailable(&mut self, refusal: StreamUnavailable, error: Option<&str>) {
        let reason = match refusal {
            StreamUnavailable::NotSupported => PollingReason::NotSupported,
            StreamUnavailable::Unauthorized => PollingReason::Unauthorized,
            StreamUnavailable::Throttled(_) => PollingReason::Throttled,
            StreamUnavailable::Failed(_) => PollingReason::OpenFailed,
        };
        self.on_polling(reason, error);
    }

    /// A stream was closed.
    pub(super) fn on_closed(&mut self, reason: CloseReason, error: Option<&str>) {
        let reason = match reason {
            CloseReason::Ended(_) => {
                return debug!(environment = %self.environment, "Upstream closed its stream");
            }
            CloseReason::PollingPreferred => PollingReason::PollingPreferred,
            CloseReason::Broken
            | CloseReason::TimedOut
            | CloseReason::Unreadable
            | CloseReason::Stale => PollingReason::StreamLost,
        };
        self.on_polling(reason, error);
    }

    fn on_polling(&mut self, reason: PollingReason, error: Option<&str>) {
        let (environment, why, before) = (&self.environment, reason.as_str(), self.logged);
        let is_new = match (before, reason) {
            (Transport::Polling | Transport::Streaming, _) => true,
            // The first reason has been logged; later failures of the same outage are not.
            (
                Transport::PollingBecause(_),
                PollingReason::OpenFailed | PollingReason::StreamLost,
            ) => false,
            (Transport::PollingBecause(logged), reason) => logged != reason,
        };
        if !is_new {
            return debug!(%environment, error, "Still polling upstream: {why}");
        }
        self.logged = Transport::PollingBecause(reason);
        let is_expected = self.mode == UpstreamMode::Stream;
        match (before, reason) {
            (_, PollingReason::NotSupported | PollingReason::Unauthorized) if is_expected => {
                warn!(%environment, transport = "poll", "Polling upstream although --upstream-mode is stream: {why}");
            }
            (Transport::Streaming, _) => {
                info!(%environment, transport = "poll", error, "Polling upstream again: {why}");
            }
            (Transport::Polling | Transport::PollingBecause(_), _) => {
                info!(%environment, transport = "poll", error, "Polling upstream: {why}");
            }
        }
    }
}
