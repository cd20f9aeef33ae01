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
    protocol::context::FrontendContext,
    token::{Token, TokenDigest},
};

const NONCE_LEN: usize = 24;
const KEY_INFO: &[u8] = b"parapet: OFREP tickets, 1";
const CIPHER_INFO: &[u8] = b"parapet: OFREP ticket, cipher, 1";
const NONCE_INFO: &[u8] = b"parapet: OFREP ticket, nonces, 1";

/// How long the same ticket is issued, in seconds.
const PERIOD_SECONDS: i64 = 3600;
/// How many further periods a ticket is accepted for.
const GRACE_PERIODS: i64 = 1;

/// The longest context in a ticket, as JSON, in bytes: many proxies reject URLs beyond 8 kB.
const MAX_CONTEXT_BYTES: usize = 4 << 10;

/// The key that tickets are encrypted with.
#[derive(Clone)]
pub struct StreamTicketKey {
    bytes: Zeroizing<[u8; 32]>,
    /// Whether it is derived from a token, and is therefore replaced with the token.
    is_from_token: bool,
}

impl StreamTicketKey {
    /// Derives the key from a shared secret.
    pub fn derive(secret: &str) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        hkdf_expand(&Hkdf::new(None, secret.as_bytes()), KEY_INFO, &mut *key);
        Self { bytes: key, is_from_token: false }
    }

    /// Derives the key from a token.
    pub fn from_token(token: &Token) -> Self {
        Self { bytes: token.derive_key(KEY_INFO), is_from_token: true }
    }

    /// A random key of this process.
    pub fn random() -> Self {
        Self { bytes: Zeroizing::new(rand::random()), is_from_token: false }
    }
}

impl fmt::Debug for StreamTicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamTicketKey(..)")
    }
}

/// The contents of a ticket.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StreamTicket {
    /// The token of the evaluation.
    pub digest: TokenDigest,
    /// Hash of the evaluated flags that the provider has.
    pub outcome_hash: u128,
    /// The random seed of the evaluation; 0 if it used none.
    pub random_seed: u64,
    /// The context of the evaluation.
    pub context: FrontendContext<'static>,
}

/// Issues and verifies tickets.
pub struct StreamTickets(ArcSwap<Keys>);

/// The current key, and the one that it replaced.
struct Keys {
    current: Arc<TicketCipher>,
    /// Its tickets are accepted until this time, when the last of them expires.
    previous: Option<(Arc<TicketCipher>, Timestamp)>,
}

/// The cipher and the nonce key derived from a [`StreamTicketKey`].
struct TicketCipher {
    is_from_token: bool,
    cipher: XChaCha20Poly1305,
    /// Nonces are derived from this key and the plaintext.
    nonce_key: Hkdf<Sha256>,
}

impl StreamTickets {
    /// Uses this key.
    pub fn new(key: StreamTicketKey) -> Self {
        let current = Arc::new(TicketCipher::new(key));
        Self(ArcSwap::from_pointee(Keys { current, previous: None }))
    }

    /// Replaces the key. Tickets of the previous key are accepted until they expire.
    pub fn replace_key(&self, key: StreamTicketKey, now: Timestamp) {
        self.replace_key_if(|_| true, key, now);
    }

    /// Replaces a key that was derived from a token by that of `token`. A key from a configured secret
    /// stays.
    pub fn replace_token_key(&self, token: &Token, now: Timestamp) {
        self.replace_key_if(
            |current| current.is_from_token,
            StreamTicketKey::from_token(token),
            now,
        );
    }

    fn replace_key_if(
        &self,
        is_replaceable: fn(&TicketCipher) -> bool,
        key: StreamTicketKey,
        now: Timestamp,
    ) {
        let until = now + SignedDuration::from_secs((1 + GRACE_PERIODS) * PERIOD_SECONDS);
        let sealing = Arc::new(TicketCipher::new(key));
        self.0.rcu(|keys| {
            if !is_replaceable(&keys.current) {
                return Arc::clone(keys);
            }
            let previous = Some((Arc::clone(&keys.current), until));
            Arc::new(Keys { current: Arc::clone(&sealing), previous })
        });
    }

    /// The number of the current period for this token and context. Periods of different tokens and
    /// contexts start at different times.
    pub fn period(digest: &TokenDigest, context: &str, now: Timestamp) -> i64 {
        let phase = xxh3_64(&[&digest.as_bytes()[..], context.as_bytes()].concat());
        let phase = i64::try_from(phase % PERIOD_SECONDS.unsigned_abs()).unwrap_or_default();
        (now.as_second() + phase).div_euclid(PERIOD_SECONDS)
    }

    /// Issues a URL-safe ticket for an evaluation of `context`, which is JSON. `None` if the context is
    /// too long for a URL.
    pub fn issue(
        &self,
        digest: &TokenDigest,
        (outcome, draw): (u128, u64),
        context: &str,
        now: Timestamp,
    ) -> Option<String> {
        if context.len() > MAX_CONTEXT_BYTES {
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
        Some(URL_SAFE_NO_PAD.encode(self.0.load().current.encrypt(&plain)))
    }

    /// Decrypts a ticket; `None` if it is not valid or has expired.
    pub fn verify(&self, text: &str, now: Timestamp) -> Option<StreamTicket> {
        let sealed = URL_SAFE_NO_PAD.decode(text).ok()?;
        let keys = self.0.load();
        let former = keys.previous.as_ref().filter(|(_, until)| now < *until);
        let former = || former.and_then(|(sealing, _)| sealing.decrypt(&sealed));
        let plain = keys.current.decrypt(&sealed).or_else(former)?;
        let (period, rest) = plain.split_first_chunk()?;
        let (digest, rest) = rest.split_first_chunk()?;
        let (outcome, rest) = rest.split_first_chunk()?;
        let (draw, context) = rest.split_first_chunk()?;
        let digest = TokenDigest::from_bytes(*digest);
        let age =
            Self::period(&digest, str::from_utf8(context).ok()?, now) - i64::from_le_bytes(*period);
        if !(0..=GRACE_PERIODS).contains(&age) {
            return None;
        }
        let context = FrontendContext::from_json(context).ok()?.into_owned();
        let (outcome_hash, random_seed) =
            (u128::from_le_bytes(*outcome), u64::from_le_bytes(*draw));
        Some(StreamTicket { digest, outcome_hash, random_seed, context })
    }
}

impl TicketCipher {
    #[expect(clippy::needless_pass_by_value, reason = "the caller must not keep the key")]
    fn new(key: StreamTicketKey) -> Self {
        let from_prk = |key: &[u8]| Hkdf::from_prk(key).expect("the key is as long as the hash");
        let (key_material, mut derived) = (from_prk(&*key.bytes), Zeroizing::new([0; 32]));
        hkdf_expand(&key_material, CIPHER_INFO, &mut *derived);
        let cipher = XChaCha20Poly1305::new((&*derived).into());
        hkdf_expand(&key_material, NONCE_INFO, &mut *derived);
        Self { is_from_token: key.is_from_token, cipher, nonce_key: from_prk(&*derived) }
    }

    fn encrypt(&self, plain: &[u8]) -> Vec<u8> {
        let nonce = self.nonce(plain);
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), plain);
        let sealed = sealed.expect("a ticket is far below the cipher's limit");
        [&nonce[..], &sealed].concat()
    }

    fn decrypt(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
        self.cipher.decrypt(&XNonce::from(*nonce), sealed).ok()
    }

    /// A nonce derived from the plaintext, so that equal plaintexts give equal tickets. An observer of
    /// two equal tickets learns only that their contents are equal.
    fn nonce(&self, plain: &[u8]) -> [u8; NONCE_LEN] {
        let mut nonce = [0; NONCE_LEN];
        hkdf_expand(&self.nonce_key, plain, &mut nonce);
        nonce
    }
}

impl fmt::Debug for StreamTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamTickets(..)")
    }
}

fn hkdf_expand(from: &Hkdf<Sha256>, info: &[u8], into: &mut [u8]) {
    from.expand(info, into).expect("HKDF-SHA256 gives keys and nonces of this length");
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: &str = r#"{"userId":"7","properties":{"plan":"gold"}}"#;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn issued(tickets: &StreamTickets, at: Timestamp) -> String {
        tickets.issue(&TokenDigest::of("a token"), (1 << 100, 5), CONTEXT, at).unwrap()
    }

    #[test]
    fn ticket_is_decrypted_only_with_its_key_and_only_unaltered() {
        let tickets = StreamTickets::new(StreamTicketKey::derive("secret"));
        let text = issued(&tickets, now());
        assert!(text.bytes().all(|it| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'_')));
        let ticket = tickets.verify(&text, now()).unwrap();
        let context = FrontendContext::from_json(CONTEXT.as_bytes()).unwrap().into_owned();
        let digest = TokenDigest::of("a token");
        assert_eq!(
            ticket,
            StreamTicket { digest, outcome_hash: 1 << 100, random_seed: 5, context }
        );
        assert!(
            StreamTickets::new(StreamTicketKey::derive("secret")).verify(&text, now()).is_some()
        );
        let token = Token::parse("*:*.secret").unwrap();
        assert!(
            StreamTickets::new(StreamTicketKey::from_token(&token)).verify(&text, now()).is_none()
        );
        assert!(
            StreamTickets::new(StreamTicketKey::derive("other")).verify(&text, now()).is_none()
        );
        assert!(StreamTickets::new(StreamTicketKey::random()).verify(&text, now()).is_none());
        for other in ["", "x", "Zg", &text[1..], &text[..text.len() - 1], &format!("{text}A")] {
            assert!(tickets.verify(other, now()).is_none(), "{other}");
        }
        for at in 0..text.len() {
            let mut altered = text.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            assert!(tickets.verify(str::from_utf8(&altered).unwrap(), now()).is_none(), "{at}");
        }
    }

    #[test]
    fn ticket_of_a_replaced_key_is_accepted_until_it_expires() {
        let tickets = StreamTickets::new(StreamTicketKey::derive("first"));
        let first = issued(&tickets, now());
        tickets.replace_key(StreamTicketKey::derive("second"), now());
        let second = issued(&tickets, now());
        assert_ne!(first, second);
        assert!(
            tickets.verify(&first, now()).is_some() && tickets.verify(&second, now()).is_some()
        );
        let another = StreamTickets::new(StreamTicketKey::derive("second"));
        assert!(another.verify(&second, now()).is_some());
        let hours = |n| now() + SignedDuration::from_hours(n);
        let forged = issued(&StreamTickets::new(StreamTicketKey::derive("first")), hours(3));
        assert!(tickets.verify(&forged, hours(3)).is_none());
    }

    #[test]
    fn key_of_a_token_is_replaced_with_the_token_and_a_secret_is_not() {
        let token = |text| Token::parse(text).unwrap();
        let (first, second) = (token("*:*.first"), token("*:*.second"));
        let accepts = |key, by: &StreamTickets| {
            let text = issued(&StreamTickets::new(key), now());
            by.verify(&text, now()).is_some()
        };
        let tickets = StreamTickets::new(StreamTicketKey::from_token(&first));
        tickets.replace_token_key(&second, now());
        assert!(accepts(StreamTicketKey::from_token(&second), &tickets));
        tickets.replace_key(StreamTicketKey::derive("secret"), now());
        tickets.replace_token_key(&first, now());
        let text = issued(&tickets, now());
        assert!(
            StreamTickets::new(StreamTicketKey::derive("secret")).verify(&text, now()).is_some()
        );
        assert!(
            accepts(StreamTicketKey::from_token(&second), &tickets),
            "accepted until it expires"
        );
        assert!(!accepts(StreamTicketKey::from_token(&first), &tickets));
    }

    #[test]
    fn ticket_is_unchanged_within_its_period_and_expires_after_the_next() {
        let tickets = StreamTickets::new(StreamTicketKey::random());
        let minutes = |n: i64| now() + SignedDuration::from_mins(n);
        let first = issued(&tickets, now());
        let renewed = (0..=60).find(|&n| issued(&tickets, minutes(n)) != first).unwrap();
        assert!((1..=60).contains(&renewed));
        assert!((renewed..renewed + 59).all(|n| issued(&tickets, minutes(n)) != first));
        assert!(tickets.verify(&first, minutes(renewed + 59)).is_some());
        assert!(tickets.verify(&first, minutes(renewed + 60)).is_none());
        assert!(tickets.verify(&first, minutes(-61)).is_none(), "the clock was set back");
    }

    #[test]
    fn no_ticket_is_issued_for_a_context_too_long_for_a_url() {
        let tickets = StreamTickets::new(StreamTicketKey::random());
        let give = |context: &str| tickets.issue(&TokenDigest::of(""), (0, 0), context, now());
        assert!(give(&"x".repeat(MAX_CONTEXT_BYTES)).unwrap().len() < 6000);
        assert!(give(&"x".repeat(MAX_CONTEXT_BYTES + 1)).is_none());
    }
}
