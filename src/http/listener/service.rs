//! What answers requests.

use std::{future::Future, net::SocketAddr, time::Instant};

use hyper::{Request, body::Incoming};

use crate::http::reply::Reply;

/// What answers requests.
pub trait Service: Send + Sync + 'static {
    /// What an answer rests on that may be given again, to the same bytes from the same address.
    type Terms: Send + Sync + 'static;

    /// Answers one request of a peer.
    fn call(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> impl Future<Output = Answered<Self::Terms>> + Send;

    /// Whether what was answered on these terms is right now as well, to a request that came at
    /// `started`. It is given then, and counts like any other.
    fn revalidate(&self, terms: &Self::Terms, started: Instant) -> bool;
}

/// An answer.
#[derive(Debug)]
pub struct Answered<T> {
    /// What goes back.
    pub reply: Reply,
    /// What it rests on, if it may be given again.
    pub terms: Option<T>,
}

impl<T> From<Reply> for Answered<T> {
    fn from(reply: Reply) -> Self {
        Self { reply, terms: None }
    }
}
