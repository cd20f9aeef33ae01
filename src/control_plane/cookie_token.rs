//! Random secrets for cookies and their stored form: a public selector for lookup, and a digest.
//!
//! API tokens have another format, in `token`.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng as _;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::token::TokenDigest;

/// The number of random bytes in the selector.
const SELECTOR_BYTES: usize = 16;
/// The number of random bytes in the verifier, 256 bits.
const VERIFIER_BYTES: usize = 32;
/// The length of an encoded selector.
const SELECTOR_LEN: usize = 22;

/// The value of a cookie: wiped when dropped, and never printed.
#[derive(Clone)]
pub struct CookieToken(Zeroizing<String>);

impl CookieToken {
    /// Generates a random secret.
    pub(super) fn generate() -> Self {
        Self(Zeroizing::new(format!(
            "{}.{}",
            *random_base64url::<SELECTOR_BYTES>(),
            *random_base64url::<VERIFIER_BYTES>()
        )))
    }

    /// The plaintext, for the cookie.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The stored form.
    pub(super) fn hash(&self) -> CookieTokenHash {
        CookieTokenHash::parse(&self.0).expect("a generated secret has the form of one")
    }
}

impl fmt::Debug for CookieToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The stored form of a secret.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct CookieTokenHash {
    /// The key for lookup.
    pub(super) selector: String,
    /// The digest of the whole secret, 64 hexadecimal digits.
    pub(super) digest: String,
}

impl CookieTokenHash {
    /// The hash of the secret in a cookie; `None` if the text is malformed.
    pub(super) fn parse(cookie: &str) -> Option<Self> {
        const LEN: usize = SELECTOR_LEN + 1 + 43;
        let (selector, verifier) = cookie.split_at_checked(SELECTOR_LEN)?;
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let verifier = verifier.strip_prefix('.')?;
        let shape = cookie.len() == LEN && selector.bytes().chain(verifier.bytes()).all(is_letter);
        let digest = || TokenDigest::of(cookie).to_hex();
        shape.then(|| Self { selector: selector.to_owned(), digest: digest() })
    }

    /// Whether `digest` equals this one, compared in constant time.
    pub(super) fn matches(&self, digest: &str) -> bool {
        self.digest.as_bytes().ct_eq(digest.as_bytes()).into()
    }
}

/// `N` random bytes, as base64url.
pub(super) fn random_base64url<const N: usize>() -> Zeroizing<String> {
    let mut bytes = Zeroizing::new([0_u8; N]);
    rand::rng().fill_bytes(&mut *bytes);
    Zeroizing::new(base64url(&*bytes))
}

/// RFC 4648, section 5, without padding.
pub(super) fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_hash_matches_its_own_digest_only() {
        let secret = CookieToken::generate();
        let hash = CookieTokenHash::parse(secret.expose()).unwrap();
        assert!(secret.expose().starts_with(&hash.selector));
        assert!(!format!("{hash:?} {secret:?}").contains(secret.expose()));
        assert!(hash.matches(&hash.digest));
        let mut other = secret.expose().to_owned();
        other.replace_range(64.., if other.ends_with('A') { "B" } else { "A" });
        let other = CookieTokenHash::parse(&format!("{}{}", &secret.expose()[..64], &other[64..]))
            .unwrap_or(hash);
        assert!(!other.matches(&secret.hash().digest) || other.digest == secret.hash().digest);
        for text in ["", "x", &"a".repeat(66), &"ä".repeat(33)] {
            assert_eq!(CookieTokenHash::parse(text), None, "{text}");
        }
    }
}
