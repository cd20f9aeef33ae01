//! The components that a mode consists of, and why an instance may not start.

use std::{io, path::PathBuf, sync::Arc};

use tokio::sync::Notify;

use super::{edge_sync::EdgeSync, reload::Reloadable, store::StoreError, supervisor::Supervisor};
use crate::{
    auth::{Authenticator, Validator},
    background_writer::BackgroundWriter,
    config::ConfigErrors,
    control_plane::{self, ControlPlane},
    fleet::{Fleet, UsageLeader},
    store::Store,
    sync::file_source::{self, FileSource},
    telemetry::ReadinessCondition,
    tls,
    token::{Grant, TokenDigest},
    upstream::{self, AdminToken, EnvironmentTokens, Upstream},
    usage::UsageSink,
};

/// Why an instance does not start or stops.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Addresses cannot be bound: a configuration error that only shows at the start.
    #[error(transparent)]
    Listen(#[from] ConfigErrors),
    /// The certificates of a listener have become unusable since the configuration was checked.
    #[error("cannot use the certificates")]
    Tls(#[from] tls::FileErrors),
    /// A listener stopped unexpectedly.
    #[error("a listener stopped unexpectedly")]
    ListenerStopped,
    /// The store cannot be opened.
    #[error("cannot open the store")]
    Store(#[from] StoreError),
    /// The registry of accounts and tokens cannot be opened.
    #[error("cannot open the registry of accounts and tokens")]
    Registry(#[from] control_plane::Error),
    /// Flags cannot be read.
    #[error("cannot read flags")]
    Flags(#[from] file_source::Error),
    /// There are no flags, and an example cannot be written.
    #[error("cannot write an example of flags to {}; name a file or folder with --flags", path.display())]
    ExampleFlags {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The HTTP client cannot be set up, regardless of upstream's responses.
    #[error("cannot set up the client for upstream")]
    Upstream(#[from] upstream::Error),
}

/// The components of a mode.
#[derive(Debug)]
pub(super) struct ModeParts {
    pub(super) name: &'static str,
    pub(super) flag_source: FlagSource,
    pub(super) validator: Validator,
    pub(super) local_tokens: Vec<(TokenDigest, Grant)>,
    /// The destination of usage; without one, usage is counted and dropped.
    pub(super) usage_sink: Option<Arc<dyn UsageSink>>,
    pub(super) upstream: Option<Upstream>,
    /// The fleet, if this instance is in one.
    pub(super) fleet: Option<Fleet>,
    /// Sends the usage of the fleet while this instance leads, if the fleet shares its usage.
    pub(super) usage_leader: Option<UsageLeader>,
    /// The admin token for upstream, with everything that depends on it.
    pub(super) admin_token: Option<AdminTokenParts>,
    /// The parts that can be reconfigured at run time.
    pub(super) reloadable: Option<Reloadable>,
    /// Whether requests to upstream's admin API are relayed.
    pub(super) relays_admin_api: bool,
    /// The control plane, if this instance has one.
    pub(super) control_plane: Option<ControlPlane>,
    /// Whether copies of its tokens are saved, because the database may be unavailable at the next
    /// start.
    pub(super) saves_registry_copies: bool,
    /// Stores validated tokens, usage and credentials between runs.
    pub(super) store: Arc<dyn Store>,
}

/// The admin token, and what must follow when it is replaced.
#[derive(Clone, Debug)]
pub(super) struct AdminTokenParts {
    pub(super) token: AdminToken,
    pub(super) credentials: EnvironmentTokens,
    pub(super) token_added: Arc<Notify>,
}

impl ModeParts {
    /// The components of a mode without an upstream: flags from files. The instance is ready once any
    /// environment has flags.
    pub(super) async fn from_files(
        name: &'static str,
        files: FileSource,
        tokens: Vec<(TokenDigest, Grant)>,
        store: Arc<dyn Store>,
        ready_when: ReadinessCondition,
        reloadable: Reloadable,
    ) -> Result<Self, Error> {
        let flag_source = FlagSource::Files(files.start(ready_when).await?);
        let validator = Validator::StaticOnly;
        Ok(Self {
            name,
            flag_source,
            validator,
            local_tokens: tokens,
            usage_sink: None,
            upstream: None,
            fleet: None,
            usage_leader: None,
            admin_token: None,
            reloadable: Some(reloadable),
            relays_admin_api: false,
            control_plane: None,
            saves_registry_copies: false,
            store,
        })
    }

    /// Takes the validator out; call once.
    pub(super) fn take_validator(&mut self) -> Validator {
        std::mem::replace(&mut self.validator, Validator::StaticOnly)
    }
}

/// Where flags come from.
#[derive(Debug)]
pub(super) enum FlagSource {
    Files(file_source::FlagFileWatcher),
    Upstream(Box<EdgeSync>),
}

impl FlagSource {
    /// Saves flags and credentials in the background, if they are stored.
    pub(super) fn background_writer(&self) -> Option<BackgroundWriter> {
        match self {
            Self::Files(_) => None,
            Self::Upstream(edge) => Some(edge.background_writer()),
        }
    }

    /// Spawns the tasks that keep flags up to date.
    pub(super) fn spawn_updates(self, workers: &mut Supervisor, auth: &Authenticator) {
        match self {
            Self::Files(watcher) => {
                workers.spawn("files", watcher, file_source::FlagFileWatcher::run);
            }
            Self::Upstream(edge) => {
                let parts = (Arc::new(*edge), auth.clone());
                workers.spawn("sync", parts, |(edge, auth)| async move { edge.run(&auth).await });
            }
        }
    }
}
