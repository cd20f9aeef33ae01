//! Encrypts tokens for the store: XChaCha20-Poly1305 with a key derived from the admin token by
//! HKDF-SHA256. The store alone reveals no token.

use std::fmt;

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use zeroize::Zeroizing;

use crate::token::{Environment, Token};

const NONCE_LEN: usize = 24;
const KEY_DERIVATION_INFO: &[u8] = b"parapet: seal of an upstream credential, 1";

/// Encrypts and decrypts the tokens of one fleet.
pub(super) struct TokenCipher {
    key: Zeroizing<[u8; 32]>,
    fleet: String,
}

impl TokenCipher {
    /// A cipher for `fleet`. Decryption needs the same admin token.
    pub(super) fn new(admin: &Token, fleet: &str) -> Self {
        Self { key: admin.derive_key(KEY_DERIVATION_INFO), fleet: fleet.to_owned() }
    }

    /// Encrypts `token`, bound to `environment` and the fleet. Returns nonce and ciphertext.
    pub(super) fn encrypt(&self, environment: &Environment, token: &Token) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = rand::random();
        let aad = self.associated_data(environment);
        let payload = Payload { msg: token.expose().as_bytes(), aad: aad.as_bytes() };
        let text = self
            .aead()
            .encrypt(&XNonce::from(nonce), payload)
            .expect("a token is far below the cipher's limit");
        [&nonce[..], &text].concat()
    }

    /// Decrypts a token; `None` if it was encrypted for another admin token, environment or fleet, or if
    /// it was altered.
    pub(super) fn decrypt(&self, environment: &Environment, sealed: &[u8]) -> Option<Token> {
        let (nonce, text) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let aad = self.associated_data(environment);
        let payload = Payload { msg: text, aad: aad.as_bytes() };
        let plain = self.aead().decrypt(&XNonce::from(*nonce), payload).ok()?;
        let plain = Zeroizing::new(plain);
        Token::parse(str::from_utf8(&plain).ok()?).ok()
    }

    fn aead(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.key).into())
    }

    /// The length prefix makes the concatenation unambiguous.
    fn associated_data(&self, environment: &Environment) -> String {
        let environment = environment.as_str();
        format!("{} {environment} {}", environment.len(), self.fleet)
    }
}

impl fmt::Debug for TokenCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCipher").field("fleet", &self.fleet).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::parse(text).expect("token")
    }

    #[test]
    fn token_is_decrypted_only_with_same_admin_token_environment_and_fleet() {
        let (dev, prod) = (Environment::new("dev"), Environment::new("prod"));
        let secret = token("*:dev.964a287e1b728cb5f4f3e012");
        let seal = TokenCipher::new(&token("*:*.admin"), "main");
        let sealed = seal.encrypt(&dev, &secret);
        assert_eq!(seal.decrypt(&dev, &sealed), Some(secret.clone()));
        assert_eq!(seal.decrypt(&prod, &sealed), None);
        assert_eq!(TokenCipher::new(&token("*:*.other"), "main").decrypt(&dev, &sealed), None);
        assert_eq!(TokenCipher::new(&token("*:*.admin"), "other").decrypt(&dev, &sealed), None);
        assert_ne!(seal.encrypt(&dev, &secret), sealed);
    }

    #[test]
    fn altered_or_truncated_ciphertext_is_rejected() {
        let dev = Environment::new("dev");
        let seal = TokenCipher::new(&token("*:*.admin"), "main");
        let sealed = seal.encrypt(&dev, &token("*:dev.964a287e1b728cb5f4f3e012"));
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert_eq!(seal.decrypt(&dev, &altered), None);
            assert_eq!(seal.decrypt(&dev, &sealed[..at]), None);
        }
    }
}
