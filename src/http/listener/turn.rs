//! Whose turn it is on a connection: what hyper was given, and whether it is done with it.
//!
//! Bytes may be answered without hyper only where hyper has nothing of theirs, and nothing of its own
//! left to be sent. It does not say so, and so it is followed: it was given one request and no byte
//! more, the service has answered that request, and what hyper wrote since is flushed.

use std::{
    cmp::Ordering,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
};

use hyper::{
    HeaderMap, Method, Request, Version,
    body::Body,
    header::{CONNECTION, EXPECT, UPGRADE},
};

use super::response_cache::RequestKey;
use crate::http::reply::{Outgoing, Reply};

/// The request that hyper has been given, as far as the service knows of it. All is seen by the task
/// of the connection alone, and is of no interest where that speaks HTTP/2.
#[derive(Debug)]
pub(super) struct Turn {
    /// How long its body is.
    body: AtomicU64,
    stage: AtomicU8,
    /// Under which key its answer is to be cached.
    key: Mutex<Option<RequestKey>>,
}

/// No request has come, or nobody knows how long its body is, or it does not matter.
const UNKNOWN: u64 = u64::MAX;

/// Hyper has been given a request; it has asked the service; which has answered, with all that there
/// will be; hyper writes that; it is sent.
const GIVEN: u8 = 0;
const ASKED: u8 = 1;
const ANSWERED: u8 = 2;
const WRITTEN: u8 = 3;
const SENT: u8 = 4;

impl Default for Turn {
    fn default() -> Self {
        Self { body: AtomicU64::new(UNKNOWN), stage: AtomicU8::new(ASKED), key: Mutex::default() }
    }
}

impl Turn {
    /// Hyper is given a request, whose answer is to be cached under `key`.
    pub(super) fn begin(&self, key: Option<RequestKey>) {
        self.body.store(UNKNOWN, Relaxed);
        self.stage.store(GIVEN, Relaxed);
        // A panic under this lock cannot leave a part of it.
        *self.key.lock().unwrap_or_else(PoisonError::into_inner) = key;
    }

    /// The service is asked by hyper; the key under which the answer is to be cached.
    ///
    /// A second time it is so about a request that came in one piece with the first. Nobody has seen
    /// where that ended, so that what follows could be its body, and would look like a request.
    pub(super) fn asked<B: Body>(&self, request: &Request<B>) -> Option<RequestKey> {
        let is_first = self.stage.load(Relaxed) == GIVEN;
        self.stage.store(ASKED, Relaxed);
        let body = match request.body().size_hint().exact() {
            Some(length) if is_first && leaves_nothing(request) => length,
            _ => UNKNOWN,
        };
        self.body.store(body, Relaxed);
        let key = self.key.lock().unwrap_or_else(PoisonError::into_inner).take();
        key.filter(|_| body == 0 && is_plain(request))
    }

    /// The service has answered; hyper is about to write that. Where there is more to come, nobody here
    /// would notice the end of it.
    pub(super) fn answered(&self, reply: &Reply) {
        if matches!(reply.body(), Outgoing::Whole(_)) {
            self.stage.store(ANSWERED, Relaxed);
        }
    }

    /// Hyper writes something.
    pub(super) fn written(&self) {
        if self.stage.load(Relaxed) >= ANSWERED {
            self.stage.store(WRITTEN, Relaxed);
        }
    }

    /// All that hyper has written is sent.
    pub(super) fn flushed(&self) {
        if self.stage.load(Relaxed) == WRITTEN {
            self.stage.store(SENT, Relaxed);
        }
    }

    /// How long the body was of the request whose answer is sent.
    fn body(&self) -> Option<u64> {
        (self.stage.load(Relaxed) == SENT).then(|| self.body.load(Relaxed))
    }
}

/// Whether hyper is after a request as it was before: it keeps that the last was of another version,
/// and that one wanted to go on in another protocol.
fn leaves_nothing<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && request.method() != Method::CONNECT
        && !request.headers().contains_key(UPGRADE)
}

/// Whether a request asks for nothing but an answer, to which the connection is as before.
fn is_plain<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let keeps_alive = |headers: &HeaderMap| {
        let mut all = headers.get_all(CONNECTION).iter();
        all.all(|it| it.as_bytes().eq_ignore_ascii_case(b"keep-alive"))
    };
    request.method() == Method::GET && keeps_alive(headers) && !headers.contains_key(EXPECT)
}

/// What hyper was given of a connection's bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Given {
    /// Nothing that it is not done with.
    Nothing,
    /// A request's whole head, which was so long, with all that followed it so far.
    Request { head: usize, bytes: usize },
    /// Nobody has kept count.
    Unknown,
}

impl Given {
    /// What hyper has if it is given `bytes` as well.
    pub(super) fn and(self, bytes: &[u8]) -> Self {
        match self {
            Self::Nothing if bytes.is_empty() => Self::Nothing,
            Self::Nothing => head_length(bytes)
                .map_or(Self::Unknown, |head| Self::Request { head, bytes: bytes.len() }),
            Self::Request { head, bytes: before } => {
                Self::Request { head, bytes: before + bytes.len() }
            }
            Self::Unknown => Self::Unknown,
        }
    }

    /// What hyper has by now.
    pub(super) fn settled(self, turn: &Turn) -> Self {
        let (Self::Request { head, bytes }, Some(body)) = (self, turn.body()) else { return self };
        match ((bytes - head) as u64).cmp(&body) {
            // The service did not wait for the rest.
            Ordering::Less if body != UNKNOWN => self,
            Ordering::Equal => Self::Nothing,
            _ => Self::Unknown,
        }
    }

    /// Whether it is a head and nothing else.
    pub(super) fn is_a_head(self) -> bool {
        matches!(self, Self::Request { head, bytes } if head == bytes)
    }
}

/// How long the head of a request is with which `bytes` begin: up to the first empty line, which
/// hyper's parser takes for the end as well, whether lines end as they should or with a line feed
/// alone. `None` if there is no end, or an empty line to begin with, over which hyper reads.
pub(super) fn head_length(bytes: &[u8]) -> Option<usize> {
    if matches!(bytes, [b'\r' | b'\n', ..]) {
        return None;
    }
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match bytes.get(at + 1..)? {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_where_a_line_is_empty_however_lines_end() {
        for (bytes, expect) in [
            ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", Some(27)),
            ("GET / HTTP/1.1\r\nhost: a\r\n\r\nGET", Some(27)),
            ("GET / HTTP/1.1\n\nGET / HTTP/1.1\r\n\r\n", Some(16)),
            ("GET / HTTP/1.1\n\r\nGET", Some(17)),
            ("GET / HTTP/1.1\r\n\n", Some(17)),
            ("GET / HTTP/1.1\r\nhost: a\r\n", None),
            ("GET / HTTP/1.1\r\nhost: a\r\n\r", None),
            ("\r\nGET / HTTP/1.1\r\n\r\n", None),
            ("\nGET / HTTP/1.1\r\n\r\n", None),
            ("", None),
        ] {
            assert_eq!(head_length(bytes.as_bytes()), expect, "{bytes:?}");
        }
    }
}
