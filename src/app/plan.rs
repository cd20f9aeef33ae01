//! The components that a mode consists of, and why an instance may not start.

use std::{io, path::PathBuf, sync::Arc};

use tokio::sync::{Mutex, Notify, mpsc};

use super::{edge::Edge, reload::Live, tasks::Tasks};
use crate::{
    auth::{Authenticator, Validator},
    config::ConfigErrors,
    control::{self, ControlPlane},
    saver::BackgroundWriter,
    store::{self, Store},
    sync::files,
    tls,
    token::{Grant, TokenDigest},
    upstream::{self, AdminToken, Credentials, Upstream},
    usage::{Delivery, Sink},
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
    Listener,
    /// The store cannot be opened.
    #[error("cannot open the store")]
    Store(#[from] store::Error),
    /// The registry of accounts and tokens cannot be opened.
    #[error("cannot open the registry of accounts and tokens")]
    Registry(#[from] control::Error),
    /// Flags cannot be read.
    #[error("cannot read flags")]
    Flags(#[from] files::Error),
    /// There are no flags, and an example cannot be written.
    #[error("cannot write an example of flags to {}; name a file or folder with --flags", path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The HTTP client cannot be set up, regardless of upstream's responses.
    #[error("cannot set up the client for upstream")]
    Upstream(#[from] upstream::Error),
}

/// Usage on its way to the registry, for the one task that stores it.
pub(super) type Deliveries = Arc<Mutex<mpsc::Receiver<Delivery>>>;

/// The components of a mode.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) source: Source,
    pub(super) authority: Validator,
    pub(super) given: Vec<(TokenDigest, Grant)>,
    pub(super) sink: Sink,
    pub(super) upstream: Option<Upstream>,
    /// The admin token for upstream, with everything that depends on it.
    pub(super) admin: Option<Admin>,
    /// The parts that can be reconfigured at run time.
    pub(super) live: Option<Live>,
    /// Whether requests to upstream's admin API are relayed.
    pub(super) relays: bool,
    /// The control plane and the usage to store in it, if this instance has one.
    pub(super) control: Option<(ControlPlane, Deliveries)>,
    /// Whether copies of its tokens are saved, because the database may be unavailable at the next
    /// start.
    pub(super) copies_registry: bool,
    /// Stores validated tokens, usage and credentials between runs.
    pub(super) store: Store,
}

/// The admin token, and what must follow when it is replaced.
#[derive(Clone, Debug)]
pub(super) struct Admin {
    pub(super) token: AdminToken,
    pub(super) credentials: Credentials,
    pub(super) discovered: Arc<Notify>,
}

impl Plan {
    /// Takes the validator out; call once.
    pub(super) fn take_authority(&mut self) -> Validator {
        std::mem::replace(&mut self.authority, Validator::StaticOnly)
    }
}

/// Where flags come from.
#[derive(Debug)]
pub(super) enum Source {
    Files(files::Watcher),
    Upstream(Box<Edge>),
}

impl Source {
    /// Saves flags and credentials in the background, if they are stored.
    pub(super) fn saver(&self) -> Option<BackgroundWriter> {
        match self {
            Self::Files(_) => None,
            Self::Upstream(edge) => Some(edge.saver()),
        }
    }

    /// Spawns the tasks that keep flags up to date.
    pub(super) fn spawn(self, workers: &mut Tasks, auth: &Authenticator) {
        match self {
            Self::Files(running) => workers.spawn("files", running, files::Watcher::run),
            Self::Upstream(edge) => {
                let parts = (Arc::new(*edge), auth.clone());
                workers.spawn("sync", parts, |(edge, auth)| async move { edge.run(&auth).await });
            }
        }
    }
}
