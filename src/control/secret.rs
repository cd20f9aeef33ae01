//! Random secrets for cookies, and how they are kept: a public selector, and a digest to compare.
//!
//! API tokens have their own form, and their own type in `token`.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng as _;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::token::TokenDigest;

/// How many random bytes find a secret.
const SELECTOR: usize = 16;
/// How many random bytes prove it, 256 bits.
const VERIFIER: usize = 32;
/// The letters of a selector.
const SELECTOR_LETTERS: usize = 22;

/// The value of a cookie, for its owner alone: wiped when dropped, and never printed.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// A fresh one.
    pub(super) fn generate() -> Self {
        Self(Zeroizing::new(format!("{}.{}", *random::<SELECTOR>(), *random::<VERIFIER>())))
    }

    /// The text, for the cookie.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// How it is kept.
    pub(super) fn kept(&self) -> Kept {
        Kept::of(&self.0).expect("a generated secret has the form of one")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What is kept of a secret.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) struct Kept {
    /// Where it is found.
    pub(super) selector: String,
    /// The digest of the whole, 64 hexadecimal digits.
    pub(super) digest: String,
}

impl Kept {
    /// That of the secret in a cookie; `None` where the text cannot be one.
    pub(super) fn of(cookie: &str) -> Option<Self> {
        const LEN: usize = SELECTOR_LETTERS + 1 + 43;
        let (selector, verifier) = cookie.split_at_checked(SELECTOR_LETTERS)?;
        let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let verifier = verifier.strip_prefix('.')?;
        let shape = cookie.len() == LEN && selector.bytes().chain(verifier.bytes()).all(is_letter);
        let digest = || TokenDigest::of(cookie).hex();
        shape.then(|| Self { selector: selector.to_owned(), digest: digest() })
    }

    /// Whether `digest` is this one's, in a time that does not tell where they differ.
    pub(super) fn proves(&self, digest: &str) -> bool {
        self.digest.as_bytes().ct_eq(digest.as_bytes()).into()
    }
}

/// `N` random bytes, as base64url.
pub(super) fn random<const N: usize>() -> Zeroizing<String> {
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
    fn a_secret_is_found_by_its_selector_and_proven_by_the_whole() {
        let secret = Secret::generate();
        let kept = Kept::of(secret.expose()).unwrap();
        assert!(secret.expose().starts_with(&kept.selector));
        assert!(!format!("{kept:?} {secret:?}").contains(secret.expose()));
        assert!(kept.proves(&kept.digest));
        let mut other = secret.expose().to_owned();
        other.replace_range(64.., if other.ends_with('A') { "B" } else { "A" });
        let other =
            Kept::of(&format!("{}{}", &secret.expose()[..64], &other[64..])).unwrap_or(kept);
        assert!(!other.proves(&secret.kept().digest) || other.digest == secret.kept().digest);
        for text in ["", "x", &"a".repeat(66), &"ä".repeat(33)] {
            assert_eq!(Kept::of(text), None, "{text}");
        }
    }
}
