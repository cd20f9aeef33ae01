//! Answers by the very bytes that asked for them.
//!
//! Who polls sends the same bytes again and again. An answer that is found by them needs no reading of
//! a head and no writing of one. Requests are known by a keyed hash of 128 bits, so that nothing of
//! them is kept, tokens least of all, and nobody can make up two that are taken for one. What an
//! answer rests on, and whether it still holds, is not known here.
//!
//! A table of fixed size, in which an answer takes the place of another, and with a bound on its bytes,
//! for which places are emptied in turn. Nobody waits for a lock.

use std::{
    cell::Cell,
    hash::Hasher as _,
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use siphasher::sip128::{Hasher128 as _, SipHasher13};
use smallvec::SmallVec;

use crate::http::reply::{self, Reply, Written};

/// How many answers are remembered at most, and the most that they may hold together, in bytes.
const PLACES: usize = 8192;
const MOST_BYTES: usize = 32 << 20;

/// The longest body that is remembered: where much is sent, little is saved.
const LONGEST_BODY: u64 = 64 << 10;

/// A request, by its bytes and where it came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct RequestKey(u128);

/// What was answered, on terms of the kind `T`.
#[derive(Debug)]
pub(super) struct ResponseCache<T> {
    // Made when something is asked: some listeners are not even connected to.
    places: OnceLock<Box<[Place<T>]>>,
    secret: [u8; 16],
    bytes: AtomicUsize,
    /// The place that is emptied next where there are too many bytes.
    next: AtomicUsize,
}

#[derive(Debug)]
struct Place<T> {
    /// A part of the key that was asked for last.
    asked: AtomicU64,
    known: ArcSwapOption<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    key: RequestKey,
    answer: Written,
    terms: T,
}

/// An answer that is ready to be sent.
#[derive(Debug)]
pub(super) struct CachedResponse {
    pub(super) head: SmallVec<[u8; 512]>,
    pub(super) body: Bytes,
}

impl<T> ResponseCache<T> {
    pub(super) fn new() -> Self {
        Self {
            places: OnceLock::new(),
            secret: rand::random(),
            bytes: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
        }
    }

    /// The key of a request from `peer`: its whole head, and there is nothing else of it.
    pub(super) fn key(&self, peer: IpAddr, head: &[u8]) -> RequestKey {
        let peer = match peer {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let mut hasher = SipHasher13::new_with_key(&self.secret);
        hasher.write(&peer.octets());
        hasher.write(head);
        RequestKey(hasher.finish128().as_u128())
    }

    /// What was answered under this key, if that `holds`; if not, it is forgotten.
    pub(super) fn find(
        &self,
        key: RequestKey,
        holds: impl FnOnce(&T) -> bool,
    ) -> Option<CachedResponse> {
        let place = self.place(key)?;
        let known = place.known.load();
        let known = known.as_deref().filter(|known| known.key == key)?;
        if !holds(&known.terms) {
            self.put(place, None);
            return None;
        }
        let mut head = SmallVec::from_slice(&known.answer.head);
        head.extend_from_slice(&date());
        head.extend_from_slice(b"\r\n\r\n");
        Some(CachedResponse { head, body: known.answer.body.clone() })
    }

    /// Notes that this key was asked for; whether it was lately, too: what is asked once is not worth
    /// remembering.
    pub(super) fn mark_asked(&self, key: RequestKey) -> bool {
        let make = || {
            let place = || Place { asked: AtomicU64::new(0), known: ArcSwapOption::empty() };
            (0..PLACES).map(|_| place()).collect()
        };
        self.places.get_or_init(make);
        let mark = (key.0 >> 64) as u64;
        self.place(key).is_some_and(|it| it.asked.swap(mark, Ordering::Relaxed) == mark)
    }

    /// Remembers what was answered under this key, if it is an answer to be remembered.
    pub(super) fn remember(&self, key: RequestKey, reply: &Reply, terms: T) {
        if reply::length(reply) > LONGEST_BODY {
            return;
        }
        let (Some(answer), Some(place)) = (Written::of(reply), self.place(key)) else { return };
        self.put(place, Some(Arc::new(Entry { key, answer, terms })));
        self.keep_within_bounds();
    }

    fn keep_within_bounds(&self) {
        let Some(places) = self.places.get() else { return };
        // Others may be at it, too: nobody goes round more than once.
        for _ in 0..PLACES {
            if self.bytes.load(Ordering::Relaxed) <= MOST_BYTES {
                return;
            }
            let next = self.next.fetch_add(1, Ordering::Relaxed) % PLACES;
            self.put(&places[next], None);
        }
    }

    fn put(&self, place: &Place<T>, known: Option<Arc<Entry<T>>>) {
        let weight = |known: Option<&Arc<Entry<T>>>| known.map_or(0, |known| known.weight());
        self.bytes.fetch_add(weight(known.as_ref()), Ordering::Relaxed);
        let old = place.known.swap(known);
        self.bytes.fetch_sub(weight(old.as_ref()), Ordering::Relaxed);
    }

    fn place(&self, key: RequestKey) -> Option<&Place<T>> {
        Some(&self.places.get()?[(key.0 % PLACES as u128) as usize])
    }
}

impl<T> Entry<T> {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.answer.head.len() + self.answer.body.len()
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`.
type Date = [u8; 29];

/// The time as HTTP writes it, which is written once a second and thread.
fn date() -> Date {
    thread_local! {
        static WRITTEN: Cell<(i64, Date)> = const { Cell::new((i64::MIN, [0; _])) };
    }
    let now = Timestamp::now();
    let (second, date) = WRITTEN.get();
    if second == now.as_second() {
        return date;
    }
    let text = DateTimePrinter::new().timestamp_to_rfc9110_string(&now);
    let text = text.expect("the clock tells a year of four digits");
    let date = text.as_bytes().try_into().expect("all times are as long");
    WRITTEN.set((now.as_second(), date));
    date
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, stream};
    use hyper::{Response, StatusCode};

    use super::*;
    use crate::http::reply::Outgoing;

    #[expect(clippy::cast_possible_truncation, reason = "it is far below 2^32")]
    const LONGEST: usize = LONGEST_BODY as usize;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn reply(length: usize) -> Reply {
        Response::new(Bytes::from(vec![b'x'; length]).into())
    }

    /// The key of a request that was asked before.
    fn asked(cache: &ResponseCache<()>, head: &str) -> RequestKey {
        let key = cache.key(PEER, head.as_bytes());
        cache.mark_asked(key);
        key
    }

    #[test]
    fn an_answer_is_found_by_its_key_as_long_as_it_holds() {
        let cache = ResponseCache::new();
        let key = asked(&cache, "GET /");
        cache.remember(key, &reply(3), ());
        let found = cache.find(key, |()| true).unwrap();
        let head = std::str::from_utf8(&found.head).unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\ncontent-length: 3\r\ndate: "), "{head}");
        assert!(head.ends_with(" GMT\r\n\r\n"), "{head}");
        assert_eq!(&found.body[..], b"xxx");

        let elsewhere = cache.key("::1".parse().unwrap(), b"GET /");
        let mapped = cache.key("::ffff:127.0.0.1".parse().unwrap(), b"GET /");
        assert!(elsewhere != key && mapped == key);
        assert!(cache.find(elsewhere, |()| true).is_none());
        assert_ne!(ResponseCache::<()>::new().key(PEER, b"GET /"), key, "strangers know no key");

        assert!(cache.find(key, |()| false).is_none());
        assert!(cache.find(key, |()| true).is_none(), "it was forgotten");
        assert_eq!(cache.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_is_asked_once_is_not_worth_remembering() {
        let cache = ResponseCache::<()>::new();
        let key = cache.key(PEER, b"GET /");
        assert_eq!([(); 3].map(|()| cache.mark_asked(key)), [false, true, true]);
    }

    #[test]
    fn only_what_is_asked_again_and_again_is_remembered() {
        let cache = ResponseCache::new();
        let mut unchanged = reply(0);
        *unchanged.status_mut() = StatusCode::NOT_MODIFIED;
        let mut refused = reply(1);
        *refused.status_mut() = StatusCode::UNAUTHORIZED;
        let told = Response::new(Outgoing::Live(Box::pin(stream::empty().fuse())));
        for (reply, expect) in [
            (reply(LONGEST), true),
            (reply(LONGEST + 1), false),
            (reply(0), false),
            (unchanged, true),
            (refused, false),
            (told, false),
        ] {
            let key = asked(&cache, "GET /");
            cache.remember(key, &reply, ());
            assert_eq!(cache.find(key, |()| true).is_some(), expect, "{reply:?}");
            cache.find(key, |()| false);
        }
    }

    #[test]
    fn what_is_remembered_stays_within_bounds() {
        let cache = ResponseCache::new();
        let mut most = 0;
        for n in 0..5000 {
            cache.remember(asked(&cache, &format!("GET /{n}")), &reply(10_000), ());
            let held = cache.places.get().into_iter().flatten();
            if n % 500 == 0 {
                let held = held.filter_map(|it| it.known.load().as_ref().map(|it| it.weight()));
                assert_eq!(held.sum::<usize>(), cache.bytes.load(Ordering::Relaxed));
            }
            most = most.max(cache.bytes.load(Ordering::Relaxed));
        }
        assert!((MOST_BYTES / 2..=MOST_BYTES).contains(&most), "{most}");
        let kept = cache.bytes.load(Ordering::Relaxed);
        assert!(kept > MOST_BYTES - 30_000, "no more is forgotten than has to be: {kept}");
    }
}
