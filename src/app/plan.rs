//! What a mode comes to, and why it may not come to it.

use std::{io, path::PathBuf, sync::Arc};

use tokio::sync::{Mutex, Notify, mpsc};

use super::{edge::Edge, reload::Live, tasks::Tasks};
use crate::{
    auth::{Authenticator, Authority},
    config::Mistakes,
    control::{self, Control},
    saver::Saver,
    store::{self, Store},
    sync::files,
    tls,
    token::{Grant, TokenDigest},
    upstream::{self, AdminToken, Credentials, Upstream},
    usage::{Delivery, Sink},
};

/// Why Parapet does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Addresses cannot be listened on, which is a mistake of the configuration that a start alone finds.
    #[error(transparent)]
    Listen(#[from] Mistakes),
    /// The certificates of a listener cannot be used any more; the configuration was checked with them.
    #[error("cannot use the certificates")]
    Tls(#[from] tls::Problems),
    /// A listener ended although nobody told it to.
    #[error("a listener ended on its own")]
    Listener,
    /// The store cannot be used.
    #[error("cannot keep state")]
    Store(#[from] store::Error),
    /// Accounts and tokens cannot be used.
    #[error("cannot open the registry of accounts and tokens")]
    Registry(#[from] control::Error),
    /// Flags cannot be read.
    #[error("cannot read flags")]
    Flags(#[from] files::Error),
    /// There are no flags, and no example of them can be written.
    #[error("cannot write an example of flags to {}; name a file or folder by --flags", path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Upstream cannot be talked to, whatever it says.
    #[error("cannot set up the client of upstream")]
    Upstream(#[from] upstream::Error),
}

/// The usage that is on its way to the registry, for the one task that takes it.
pub(super) type Deliveries = Arc<Mutex<mpsc::Receiver<Delivery>>>;

/// What a mode comes to.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) source: Source,
    pub(super) authority: Authority,
    pub(super) given: Vec<(TokenDigest, Grant)>,
    pub(super) sink: Sink,
    pub(super) upstream: Option<Upstream>,
    /// The admin token that is presented to upstream, with what depends on it.
    pub(super) admin: Option<Admin>,
    /// What can change while the instance runs.
    pub(super) live: Option<Live>,
    /// Whether upstream's admin API is passed on.
    pub(super) relays: bool,
    /// Accounts and tokens, and the usage that is kept with them, where that is here.
    pub(super) control: Option<(Control, Deliveries)>,
    /// Whether a copy of its tokens is kept, because the database may be away at the next start.
    pub(super) copies_registry: bool,
    /// Where verdicts, usage and credentials are kept between runs.
    pub(super) store: Store,
}

/// The admin token, and what is to follow it when it is replaced.
#[derive(Clone, Debug)]
pub(super) struct Admin {
    pub(super) token: AdminToken,
    pub(super) credentials: Credentials,
    pub(super) discovered: Arc<Notify>,
}

impl Plan {
    /// Who vouches for tokens; asked once.
    pub(super) fn take_authority(&mut self) -> Authority {
        std::mem::replace(&mut self.authority, Authority::Nobody)
    }
}

/// Where flags come from.
#[derive(Debug)]
pub(super) enum Source {
    Files(files::Running),
    Upstream(Box<Edge>),
}

impl Source {
    /// Saves its flags and credentials, where they are to outlive the process.
    pub(super) fn saver(&self) -> Option<Saver> {
        match self {
            Self::Files(_) => None,
            Self::Upstream(edge) => Some(edge.saver()),
        }
    }

    /// Keeps flags current from now on.
    pub(super) fn spawn(self, workers: &mut Tasks, auth: &Authenticator) {
        match self {
            Self::Files(running) => workers.spawn("files", running, files::Running::run),
            Self::Upstream(edge) => {
                let parts = (Arc::new(*edge), auth.clone());
                workers.spawn("sync", parts, |(edge, auth)| async move { edge.run(&auth).await });
            }
        }
    }
}
