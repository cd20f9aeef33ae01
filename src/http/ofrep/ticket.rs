//! What a provider opens its stream with: a short-lived ticket in the stream's address.
//!
//! Browsers' `EventSource` sends no headers, and a token has no place in an address, which proxies
//! log. A ticket tells whose token it was, by its digest, and for which context flags were asked; it
//! is sealed, because contexts are nobody's business either. Whoever has one may learn that some
//! flag has changed, and nothing else, until it expires or the token does.
//!
//! The same question has the same ticket for an hour, so that a provider which asks again keeps its
//! stream. Instances that share a key take each other's.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305, XNonce, aead::Aead as _};
use hkdf::Hkdf;
use jiff::{SignedDuration, Timestamp};
use sha2::Sha256;
use xxhash_rust::xxh3::xxh3_64;
use zeroize::Zeroizing;

use crate::{
    token::{Token, TokenDigest},
    wire::context::FrontendContext,
};

const NONCE: usize = 24;
const PURPOSE: &[u8] = b"parapet: OFREP tickets, 1";
const CIPHER: &[u8] = b"parapet: OFREP ticket, cipher, 1";
const NONCES: &[u8] = b"parapet: OFREP ticket, nonces, 1";

/// How many seconds a ticket is given out, and how many of these periods after its own it is taken.
const PERIOD: i64 = 3600;
const TAKEN_LATER: i64 = 1;

/// The longest context that a ticket holds, as JSON, in bytes: addresses beyond 8 kB are refused by
/// many proxies.
const LONGEST_CONTEXT: usize = 4 << 10;

/// What tickets are sealed with.
#[derive(Clone)]
pub struct TicketKey {
    bytes: Zeroizing<[u8; 32]>,
    /// Whether it is derived from a token, and is replaced with it.
    is_of_token: bool,
}

impl TicketKey {
    /// The key that everybody has who knows this secret.
    pub fn derive(secret: &str) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        expand(&Hkdf::new(None, secret.as_bytes()), PURPOSE, &mut *key);
        Self { bytes: key, is_of_token: false }
    }

    /// The key that everybody has who knows this token.
    pub fn of(token: &Token) -> Self {
        Self { bytes: token.derive_key(PURPOSE), is_of_token: true }
    }

    /// A key that nobody else has.
    pub fn random() -> Self {
        Self { bytes: Zeroizing::new(rand::random()), is_of_token: false }
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKey(..)")
    }
}

/// What a stream is opened for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ticket {
    /// The token that asked.
    pub digest: TokenDigest,
    /// What identifies the answer that the provider has.
    pub outcome: u128,
    /// The lots that were drawn for it; 0 where none were.
    pub draw: u64,
    /// What it was asked for.
    pub context: FrontendContext<'static>,
}

/// Gives out and takes tickets.
pub struct Tickets(ArcSwap<Keys>);

/// The key in use, and the one that it has replaced.
struct Keys {
    current: Arc<Sealing>,
    /// Its tickets are accepted until the time when the last of them expires.
    former: Option<(Arc<Sealing>, Timestamp)>,
}

/// What is derived from a key.
struct Sealing {
    is_of_token: bool,
    cipher: XChaCha20Poly1305,
    /// What nonces are derived from.
    nonces: Hkdf<Sha256>,
}

impl Tickets {
    /// Those of this key.
    pub fn new(key: TicketKey) -> Self {
        let current = Arc::new(Sealing::new(key));
        Self(ArcSwap::from_pointee(Keys { current, former: None }))
    }

    /// Seals with another key from now on. Tickets of the one before are accepted until they expire.
    pub fn replace_key(&self, key: TicketKey, now: Timestamp) {
        self.replace_key_if(|_| true, key, now);
    }

    /// Seals with the key of `token` from now on if the current key is that of a token: a secret that
    /// was configured meanwhile stays in use.
    pub fn replace_token(&self, token: &Token, now: Timestamp) {
        self.replace_key_if(|current| current.is_of_token, TicketKey::of(token), now);
    }

    fn replace_key_if(&self, is_wanted: fn(&Sealing) -> bool, key: TicketKey, now: Timestamp) {
        let until = now + SignedDuration::from_secs((1 + TAKEN_LATER) * PERIOD);
        let sealing = Arc::new(Sealing::new(key));
        self.0.rcu(|keys| {
            if !is_wanted(&keys.current) {
                return Arc::clone(keys);
            }
            let former = Some((Arc::clone(&keys.current), until));
            Arc::new(Keys { current: Arc::clone(&sealing), former })
        });
    }

    /// The number of the period in which a question is asked: another for each hour, and not for all
    /// questions at once.
    pub fn period(digest: &TokenDigest, context: &str, now: Timestamp) -> i64 {
        let phase = xxh3_64(&[&digest.as_bytes()[..], context.as_bytes()].concat());
        let phase = i64::try_from(phase % PERIOD.unsigned_abs()).unwrap_or_default();
        (now.as_second() + phase).div_euclid(PERIOD)
    }

    /// The ticket of a question whose context is written as `context`, in letters that addresses take
    /// as they are; `None` where the context is too long for that.
    pub fn give(
        &self,
        digest: &TokenDigest,
        (outcome, draw): (u128, u64),
        context: &str,
        now: Timestamp,
    ) -> Option<String> {
        if context.len() > LONGEST_CONTEXT {
            return None;
        }
        let period = Self::period(digest, context, now);
        let plain = [
            &period.to_le_bytes()[..],
            digest.as_bytes(),
            &outcome.to_le_bytes(),
            &draw.to_le_bytes(),
            context.as_bytes(),
        ]
        .concat();
        Some(URL_SAFE_NO_PAD.encode(self.0.load().current.close(&plain)))
    }

    /// Reads a ticket of ours that has not expired.
    pub fn take(&self, text: &str, now: Timestamp) -> Option<Ticket> {
        let sealed = URL_SAFE_NO_PAD.decode(text).ok()?;
        let keys = self.0.load();
        let former = keys.former.as_ref().filter(|(_, until)| now < *until);
        let former = || former.and_then(|(sealing, _)| sealing.open(&sealed));
        let plain = keys.current.open(&sealed).or_else(former)?;
        let (period, rest) = plain.split_first_chunk()?;
        let (digest, rest) = rest.split_first_chunk()?;
        let (outcome, rest) = rest.split_first_chunk()?;
        let (draw, context) = rest.split_first_chunk()?;
        let digest = TokenDigest::from_bytes(*digest);
        let late =
            Self::period(&digest, str::from_utf8(context).ok()?, now) - i64::from_le_bytes(*period);
        if !(0..=TAKEN_LATER).contains(&late) {
            return None;
        }
        let context = FrontendContext::from_json(context).ok()?.into_owned();
        let (outcome, draw) = (u128::from_le_bytes(*outcome), u64::from_le_bytes(*draw));
        Some(Ticket { digest, outcome, draw, context })
    }
}

impl Sealing {
    #[expect(clippy::needless_pass_by_value, reason = "nobody else is to keep the key")]
    fn new(key: TicketKey) -> Self {
        let from_prk = |key: &[u8]| Hkdf::from_prk(key).expect("the key is as long as the hash");
        let (given, mut derived) = (from_prk(&*key.bytes), Zeroizing::new([0; 32]));
        expand(&given, CIPHER, &mut *derived);
        let cipher = XChaCha20Poly1305::new((&*derived).into());
        expand(&given, NONCES, &mut *derived);
        Self { is_of_token: key.is_of_token, cipher, nonces: from_prk(&*derived) }
    }

    fn close(&self, plain: &[u8]) -> Vec<u8> {
        let nonce = self.nonce(plain);
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), plain);
        let sealed = sealed.expect("a ticket is far below the cipher's limit");
        [&nonce[..], &sealed].concat()
    }

    fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE>()?;
        self.cipher.decrypt(&XNonce::from(*nonce), sealed).ok()
    }

    /// A nonce that another text does not have: the same text is sealed the same way, which tells
    /// those who see both that they are the same.
    fn nonce(&self, plain: &[u8]) -> [u8; NONCE] {
        let mut nonce = [0; NONCE];
        expand(&self.nonces, plain, &mut nonce);
        nonce
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets(..)")
    }
}

fn expand(from: &Hkdf<Sha256>, info: &[u8], into: &mut [u8]) {
    from.expand(info, into).expect("HKDF-SHA256 gives keys and nonces of this length");
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: &str = r#"{"userId":"7","properties":{"plan":"gold"}}"#;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn given(tickets: &Tickets, at: Timestamp) -> String {
        tickets.give(&TokenDigest::of("a token"), (1 << 100, 5), CONTEXT, at).unwrap()
    }

    #[test]
    fn a_ticket_tells_what_it_was_given_for_to_those_who_have_the_key() {
        let tickets = Tickets::new(TicketKey::derive("secret"));
        let text = given(&tickets, now());
        assert!(text.bytes().all(|it| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'_')));
        let ticket = tickets.take(&text, now()).unwrap();
        let context = FrontendContext::from_json(CONTEXT.as_bytes()).unwrap().into_owned();
        let digest = TokenDigest::of("a token");
        assert_eq!(ticket, Ticket { digest, outcome: 1 << 100, draw: 5, context });
        assert!(Tickets::new(TicketKey::derive("secret")).take(&text, now()).is_some());
        let token = Token::parse("*:*.secret").unwrap();
        assert!(Tickets::new(TicketKey::of(&token)).take(&text, now()).is_none());
        assert!(Tickets::new(TicketKey::derive("other")).take(&text, now()).is_none());
        assert!(Tickets::new(TicketKey::random()).take(&text, now()).is_none());
        for other in ["", "x", "Zg", &text[1..], &text[..text.len() - 1], &format!("{text}A")] {
            assert!(tickets.take(other, now()).is_none(), "{other}");
        }
        for at in 0..text.len() {
            let mut altered = text.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            assert!(tickets.take(str::from_utf8(&altered).unwrap(), now()).is_none(), "{at}");
        }
    }

    #[test]
    fn ticket_of_a_replaced_key_is_accepted_until_it_expires() {
        let tickets = Tickets::new(TicketKey::derive("first"));
        let first = given(&tickets, now());
        tickets.replace_key(TicketKey::derive("second"), now());
        let second = given(&tickets, now());
        assert_ne!(first, second);
        assert!(tickets.take(&first, now()).is_some() && tickets.take(&second, now()).is_some());
        let another = Tickets::new(TicketKey::derive("second"));
        assert!(another.take(&second, now()).is_some());
        let hours = |n| now() + SignedDuration::from_hours(n);
        let forged = given(&Tickets::new(TicketKey::derive("first")), hours(3));
        assert!(tickets.take(&forged, hours(3)).is_none());
    }

    #[test]
    fn key_of_a_token_follows_the_token_and_a_secret_stays() {
        let token = |text| Token::parse(text).unwrap();
        let (first, second) = (token("*:*.first"), token("*:*.second"));
        let accepts = |key, by: &Tickets| {
            let text = given(&Tickets::new(key), now());
            by.take(&text, now()).is_some()
        };
        let tickets = Tickets::new(TicketKey::of(&first));
        tickets.replace_token(&second, now());
        assert!(accepts(TicketKey::of(&second), &tickets));
        tickets.replace_key(TicketKey::derive("secret"), now());
        tickets.replace_token(&first, now());
        let text = given(&tickets, now());
        assert!(Tickets::new(TicketKey::derive("secret")).take(&text, now()).is_some());
        assert!(accepts(TicketKey::of(&second), &tickets), "until they expire");
        assert!(!accepts(TicketKey::of(&first), &tickets));
    }

    #[test]
    fn it_is_the_same_within_its_period_and_expires_after_the_next() {
        let tickets = Tickets::new(TicketKey::random());
        let minutes = |n: i64| now() + SignedDuration::from_mins(n);
        let first = given(&tickets, now());
        let renewed = (0..=60).find(|&n| given(&tickets, minutes(n)) != first).unwrap();
        assert!((1..=60).contains(&renewed));
        assert!((renewed..renewed + 59).all(|n| given(&tickets, minutes(n)) != first));
        assert!(tickets.take(&first, minutes(renewed + 59)).is_some());
        assert!(tickets.take(&first, minutes(renewed + 60)).is_none());
        assert!(tickets.take(&first, minutes(-61)).is_none(), "the clock was set back");
    }

    #[test]
    fn a_context_that_no_address_holds_gets_none() {
        let tickets = Tickets::new(TicketKey::random());
        let give = |context: &str| tickets.give(&TokenDigest::of(""), (0, 0), context, now());
        assert!(give(&"x".repeat(LONGEST_CONTEXT)).unwrap().len() < 6000);
        assert!(give(&"x".repeat(LONGEST_CONTEXT + 1)).is_none());
    }
}
