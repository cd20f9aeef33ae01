//! Answers that hyper has no part in: to requests that came before, byte by byte.
//!
//! They stand between the bytes of a connection and what its service has answered to anybody. Whose
//! turn it is on the connection is known to [`Turn`], what an answer rests on to the service.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::{
    attended::Watch,
    response_cache::{CachedResponse, RequestKey, ResponseCache},
    service::{Answered, Service},
    turn::Turn,
};
use crate::http::reply::Reply;

/// What the bytes of a connection are answered with.
pub(super) struct Repeats {
    pub(super) known: Arc<dyn Recall>,
    pub(super) turn: Arc<Turn>,
    pub(super) watch: Arc<Watch>,
}

/// Who may know the answer to a request before anybody has read it.
pub(super) trait Recall: Send + Sync {
    /// The answer to a request that is this head and nothing else; if it is not known, the key under
    /// which it is to be cached, where it is.
    fn recall(&self, head: &[u8]) -> Result<CachedResponse, Option<RequestKey>>;
}

/// A service to which one peer is connected, and what it has answered to all.
#[derive(Debug)]
pub(super) struct Known<S: Service> {
    pub(super) service: Arc<S>,
    pub(super) cache: Arc<ResponseCache<S::Terms>>,
    pub(super) peer: SocketAddr,
}

impl<S: Service> Known<S> {
    /// The reply of an answer, which is cached under `key` if it may be given again.
    pub(super) fn note(&self, key: Option<RequestKey>, answered: Answered<S::Terms>) -> Reply {
        let Answered { reply, terms } = answered;
        if let (Some(key), Some(terms)) = (key, terms) {
            self.cache.remember(key, &reply, terms);
        }
        reply
    }
}

impl<S: Service> Recall for Known<S> {
    fn recall(&self, head: &[u8]) -> Result<CachedResponse, Option<RequestKey>> {
        let started = Instant::now();
        let key = self.cache.key(self.peer.ip(), head);
        let found = self.cache.find(key, |terms| self.service.revalidate(terms, started));
        found.ok_or_else(|| Some(key).filter(|key| self.cache.mark_asked(*key)))
    }
}

#[cfg(test)]
mod tests;
