//! Stream tickets: short-lived credentials in the URL of an OpenFeature provider's event stream.
//!
//! Browsers' `EventSource` cannot send headers, and proxies log URLs, so a token must not be part of
//! one. A ticket contains the token's digest and the context of the evaluation. It is encrypted, because
//! contexts are private too. Its holder learns that some flag has changed, and nothing else, until the
//! ticket expires or the token becomes invalid.
//!
//! The same token and context get the same ticket for an hour, so that a provider that evaluates again
//! keeps its stream. Instances with the same key accept each other's tickets.

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

/// How long the same ticket is issued, in seconds.
const PERIOD: i64 = 3600;
/// How many further periods a ticket is accepted for.
const TAKEN_LATER: i64 = 1;

/// The longest context in a ticket, as JSON, in bytes: many proxies reject URLs beyond 8 kB.
const LONGEST_CONTEXT: usize = 4 << 10;

/// The key that tickets are encrypted with.
#[derive(Clone)]
pub struct TicketKey {
    bytes: Zeroizing<[u8; 32]>,
    /// Whether it is derived from a token, and is therefore replaced with the token.
    is_of_token: bool,
}

impl TicketKey {
    /// Derives the key from a shared secret.
    pub fn derive(secret: &str) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        expand(&Hkdf::new(None, secret.as_bytes()), PURPOSE, &mut *key);
        Self { bytes: key, is_of_token: false }
    }

    /// Derives the key from a token.
    pub fn of(token: &Token) -> Self {
        Self { bytes: token.derive_key(PURPOSE), is_of_token: true }
    }

    /// A random key of this process.
    pub fn random() -> Self {
        Self { bytes: Zeroizing::new(rand::random()), is_of_token: false }
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamTicketKey(..)")
    }
}

/// The contents of a ticket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ticket {
    /// The token of the evaluation.
    pub digest: TokenDigest,
    /// Hash of the evaluated flags that the provider has.
    pub outcome: u128,
    /// The random seed of the evaluation; 0 if it used none.
    pub draw: u64,
    /// The context of the evaluation.
    pub context: FrontendContext<'static>,
}

/// Issues and verifies tickets.
pub struct Tickets(ArcSwap<Keys>);

/// The current key, and the one that it replaced.
struct Keys {
    current: Arc<Sealing>,
    /// Its tickets are accepted until this time, when the last of them expires.
    former: Option<(Arc<Sealing>, Timestamp)>,
}

/// The cipher and the nonce key derived from a [`StreamTicketKey`].
struct Sealing {
    is_of_token: bool,
    cipher: XChaCha20Poly1305,
    /// Nonces are derived from this key and the plaintext.
    nonces: Hkdf<Sha256>,
}

impl Tickets {
    /// Uses this key.
    pub fn new(key: TicketKey) -> Self {
        let current = Arc::new(Sealing::new(key));
        Self(ArcSwap::from_pointee(Keys { current, former: None }))
    }

    /// Replaces the key. Tickets of the previous key are accepted until they expire.
    pub fn replace_key(&self, key: TicketKey, now: Timestamp) {
        self.replace_key_if(|_| true, key, now);
    }

    /// Replaces a key that was derived from a token by that of `token`. A key from a configured secret
    /// stays.
    pub fn replace_token(&self, token: &Token, now: Timestamp) {
        self.replace_key_if(|current| current.is_of_token, TicketKey::of(token), now);
    }

    fn replace_key_if(&self, is_replaceable: fn(&Sealing) -> bool, key: TicketKey, now: Timestamp) {
        let until = now + SignedDuration::from_secs((1 + TAKEN_LATER) * PERIOD);
        let sealing = Arc::new(Sealing::new(key));
        self.0.rcu(|keys| {
            if !is_replaceable(&keys.current) {
                return Arc::clone(keys);
            }
            let former = Some((Arc::clone(&keys.current), until));
            Arc::new(Keys { current: Arc::clone(&sealing), former })
        });
    }

    /// The number of the current period for this token and context. Periods of different tokens and
    /// contexts start at different times.
    pub fn period(digest: &TokenDigest, context: &str, now: Timestamp) -> i64 {
        let phase = xxh3_64(&[&digest.as_bytes()[..], context.as_bytes()].concat());
        let phase = i64::try_from(phase % PERIOD.unsigned_abs()).unwrap_or_default();
        (now.as_second() + phase).div_euclid(PERIOD)
    }

    /// Issues a URL-safe ticket for an evaluation of `context`, which is JSON. `None` if the context is
    /// too long for a URL.
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

    /// Decrypts a ticket; `None` if it is not valid or has expired.
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
        let age =
            Self::period(&digest, str::from_utf8(context).ok()?, now) - i64::from_le_bytes(*period);
        if !(0..=TAKEN_LATER).contains(&age) {
            return None;
        }
        let context = FrontendContext::from_json(context).ok()?.into_owned();
        let (outcome, draw) = (u128::from_le_bytes(*outcome), u64::from_le_bytes(*draw));
        Some(Ticket { digest, outcome, draw, context })
    }
}

impl Sealing {
    #[expect(clippy::needless_pass_by_value, reason = "the caller must not keep the key")]
    fn new(key: TicketKey) -> Self {
        let from_prk = |key: &[u8]| Hkdf::from_prk(key).expect("the key is as long as the hash");
        let (key_material, mut derived) = (from_prk(&*key.bytes), Zeroizing::new([0; 32]));
        expand(&key_material, CIPHER, &mut *derived);
        let cipher = XChaCha20Poly1305::new((&*derived).into());
        expand(&key_material, NONCES, &mut *derived);
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

    /// A nonce derived from the plaintext, so that equal plaintexts give equal tickets. An observer of
    /// two equal tickets learns only that their contents are equal.
    fn nonce(&self, plain: &[u8]) -> [u8; NONCE] {
        let mut nonce = [0; NONCE];
        expand(&self.nonces, plain, &mut nonce);
        nonce
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamTickets(..)")
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

    fn issued(tickets: &Tickets, at: Timestamp) -> String {
        tickets.give(&TokenDigest::of("a token"), (1 << 100, 5), CONTEXT, at).unwrap()
    }

    #[test]
    fn ticket_is_decrypted_only_with_its_key_and_only_unaltered() {
        let tickets = Tickets::new(TicketKey::derive("secret"));
        let text = issued(&tickets, now());
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
        let first = issued(&tickets, now());
        tickets.replace_key(TicketKey::derive("second"), now());
        let second = issued(&tickets, now());
        assert_ne!(first, second);
        assert!(tickets.take(&first, now()).is_some() && tickets.take(&second, now()).is_some());
        let another = Tickets::new(TicketKey::derive("second"));
        assert!(another.take(&second, now()).is_some());
        let hours = |n| now() + SignedDuration::from_hours(n);
        let forged = issued(&Tickets::new(TicketKey::derive("first")), hours(3));
        assert!(tickets.take(&forged, hours(3)).is_none());
    }

    #[test]
    fn key_of_a_token_is_replaced_with_the_token_and_a_secret_is_not() {
        let token = |text| Token::parse(text).unwrap();
        let (first, second) = (token("*:*.first"), token("*:*.second"));
        let accepts = |key, by: &Tickets| {
            let text = issued(&Tickets::new(key), now());
            by.take(&text, now()).is_some()
        };
        let tickets = Tickets::new(TicketKey::of(&first));
        tickets.replace_token(&second, now());
        assert!(accepts(TicketKey::of(&second), &tickets));
        tickets.replace_key(TicketKey::derive("secret"), now());
        tickets.replace_token(&first, now());
        let text = issued(&tickets, now());
        assert!(Tickets::new(TicketKey::derive("secret")).take(&text, now()).is_some());
        assert!(accepts(TicketKey::of(&second), &tickets), "accepted until it expires");
        assert!(!accepts(TicketKey::of(&first), &tickets));
    }

    #[test]
    fn ticket_is_unchanged_within_its_period_and_expires_after_the_next() {
        let tickets = Tickets::new(TicketKey::random());
        let minutes = |n: i64| now() + SignedDuration::from_mins(n);
        let first = issued(&tickets, now());
        let renewed = (0..=60).find(|&n| issued(&tickets, minutes(n)) != first).unwrap();
        assert!((1..=60).contains(&renewed));
        assert!((renewed..renewed + 59).all(|n| issued(&tickets, minutes(n)) != first));
        assert!(tickets.take(&first, minutes(renewed + 59)).is_some());
        assert!(tickets.take(&first, minutes(renewed + 60)).is_none());
        assert!(tickets.take(&first, minutes(-61)).is_none(), "the clock was set back");
    }

    #[test]
    fn no_ticket_is_issued_for_a_context_too_long_for_a_url() {
        let tickets = Tickets::new(TicketKey::random());
        let give = |context: &str| tickets.give(&TokenDigest::of(""), (0, 0), context, now());
        assert!(give(&"x".repeat(LONGEST_CONTEXT)).unwrap().len() < 6000);
        assert!(give(&"x".repeat(LONGEST_CONTEXT + 1)).is_none());
    }
}
