//! Why a command failed, and whether it may have run.

use std::{sync::Arc, time::Duration};

use redis::{ErrorKind, RedisError, ServerErrorKind};

/// The settings cannot be used, for instance because a certificate is malformed.
#[derive(Debug, thiserror::Error)]
#[error("the settings of Redis cannot be used")]
pub struct ConfigError(#[from] pub(super) RedisError);

/// Why a command failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// There is no connection: the last attempt failed, and the next one has to wait. The command was
    /// not sent.
    #[error("no connection to {location}")]
    NotConnected {
        /// The servers.
        location: Arc<str>,
        /// Why the last attempt to connect failed, or why the connection before it was closed.
        source: Arc<RedisError>,
    },
    /// The connection was lost before the answer arrived. The command may have run.
    #[error("the connection to {location} was lost")]
    Disconnected {
        /// The servers.
        location: Arc<str>,
        /// The cause.
        source: Arc<RedisError>,
    },
    /// No answer arrived in time. The command may have run, or may still run.
    #[error("{location} did not respond within {timeout:?}")]
    Timeout {
        /// The servers.
        location: Arc<str>,
        /// The timeout.
        timeout: Duration,
    },
    /// The server rejected the command, or its answer has an unexpected type.
    #[error("{location} rejected a command")]
    Rejected {
        /// The servers.
        location: Arc<str>,
        /// The cause.
        source: Arc<RedisError>,
    },
}

impl Error {
    /// Whether the server denied the command or a key to this user.
    pub fn is_permission_denied(&self) -> bool {
        matches!(self, Self::Rejected { source, .. } if source.code() == Some("NOPERM"))
    }

    /// Whether the command may have run although it failed.
    ///
    /// The library sends a command to a Cluster again if a node is lost, so that the last node may reject
    /// what an earlier one has run.
    pub fn is_outcome_unknown(&self) -> bool {
        match self {
            Self::NotConnected { .. } => false,
            Self::Disconnected { .. } | Self::Timeout { .. } => true,
            Self::Rejected { source, .. } => matches!(
                source.kind(),
                ErrorKind::Server(
                    ServerErrorKind::ClusterDown
                        | ServerErrorKind::MasterDown
                        | ServerErrorKind::TryAgain
                        | ServerErrorKind::BusyLoading
                        | ServerErrorKind::Moved
                        | ServerErrorKind::Ask
                )
            ),
        }
    }
}
