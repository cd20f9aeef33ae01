//! What a mode comes to, and why it may not come to it.

use std::{io, net::SocketAddr};

use super::edge::Edge;
use crate::{
    auth::Authority,
    control::tokens as registry,
    store::{self, Store},
    sync::files,
    token::{Grant, TokenDigest},
    upstream::{self, Upstream},
    usage::Sink,
};

/// Why Parapet does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address cannot be listened on.
    #[error("cannot listen on {0}")]
    Listen(SocketAddr, #[source] io::Error),
    /// The store cannot be used.
    #[error("cannot keep state")]
    Store(#[from] store::Error),
    /// The registry of tokens cannot be used.
    #[error("cannot open the registry of tokens")]
    Registry(#[from] registry::Error),
    /// Flags cannot be read.
    #[error("cannot read flags")]
    Flags(#[from] files::Error),
    /// Upstream cannot be talked to, whatever it says.
    #[error("cannot set up the client of upstream")]
    Upstream(#[from] upstream::Error),
}

/// What a mode comes to.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) source: Source,
    pub(super) authority: Authority,
    pub(super) given: Vec<(TokenDigest, Grant)>,
    pub(super) sink: Sink,
    pub(super) upstream: Option<Upstream>,
    /// Where verdicts, usage and credentials are kept between runs.
    pub(super) store: Store,
}

/// Where flags come from.
#[derive(Debug)]
pub(super) enum Source {
    Files(files::Running),
    Upstream(Box<Edge>),
}
