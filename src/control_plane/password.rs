//! Passwords: parsing, generation, and hashing with Argon2id.
//!
//! Hashing is slow and needs much memory by design. So at most 2 hashes are computed at once and at most
//! 64 may wait, which protects the process from a flood of sign-ins. Rate limits per client are in
//! `sessions`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use argon2::{
    Algorithm, Argon2, Params, Version,
    password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash},
};
use rand::Rng as _;
use tokio::sync::{OnceCell, Semaphore};
use zeroize::Zeroizing;

use super::error::Error;

/// The shortest password, in bytes.
const MIN_LEN: usize = 10;
/// The longest password, in bytes.
const MAX_LEN: usize = 1024;
const MAX_CONCURRENT_HASHES: usize = 2;
const MAX_WAITING_HASHES: usize = 64;
/// The retry delay for requests that were rejected because the queue is full.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A password in plaintext: wiped when dropped, and never printed.
#[derive(Clone)]
pub struct Password(Zeroizing<String>);

/// Why a text is not a valid password. Never contains the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PasswordError {
    /// It is too easy to guess.
    #[error("must have at least {MIN_LEN} characters")]
    TooShort,
    /// Hashing it would cost too much.
    #[error("must have at most {MAX_LEN} bytes")]
    TooLong,
}

impl Password {
    /// Parses a new password.
    pub fn parse(text: &str) -> Result<Self, PasswordError> {
        if text.chars().count() < MIN_LEN {
            return Err(PasswordError::TooShort);
        }
        Self::for_sign_in(text)
    }

    /// Parses a password for verification: any text up to 1,024 bytes.
    pub fn for_sign_in(text: &str) -> Result<Self, PasswordError> {
        if text.len() > MAX_LEN {
            return Err(PasswordError::TooLong);
        }
        Ok(Self(Zeroizing::new(text.to_owned())))
    }

    /// Generates a password of 130 random bits, without letters that are easily confused.
    pub fn generate() -> Self {
        const LETTERS: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz023456789";
        const LEN: usize = 26;
        let mut bytes = Zeroizing::new([0_u8; LEN]);
        rand::rng().fill_bytes(&mut *bytes);
        let mut text = Zeroizing::new(String::with_capacity(LEN + 4));
        for (at, byte) in bytes.iter().enumerate() {
            if at > 0 && at.is_multiple_of(6) {
                text.push('-');
            }
            text.push(char::from(LETTERS[usize::from(byte % 32)]));
        }
        Self(text)
    }

    /// The plaintext, to show to its owner.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Computes and verifies hashes with bounded concurrency. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Hasher {
    permits: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    /// The hash to verify against if there is no account, so that the duration does not reveal that. It
    /// matches no password.
    decoy: Arc<OnceCell<String>>,
}

impl Hasher {
    pub(super) fn new() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT_HASHES)),
            waiting: Arc::default(),
            decoy: Arc::default(),
        }
    }

    /// The hash of a password as a PHC string.
    pub(super) async fn hash(&self, password: &Password) -> Result<String, Error> {
        let password = password.clone();
        let hash = move || argon2().hash_password(password.0.as_bytes()).map(|it| it.to_string());
        Ok(self
            .run_blocking(hash)
            .await?
            .expect("a salt can be drawn and the parameters are valid"))
    }

    /// Whether `password` matches `hash`. Without a hash the result is false after the same time.
    pub(super) async fn verify(
        &self,
        password: &Password,
        hash: Option<&str>,
    ) -> Result<bool, Error> {
        let is_account = hash.is_some();
        let hash = if let Some(hash) = hash {
            hash.to_owned()
        } else {
            let decoy = async || self.hash(&Password::generate()).await;
            self.decoy.get_or_try_init(decoy).await?.clone()
        };
        let password = password.clone();
        let verify = move || {
            let matches = |hash| argon2().verify_password(password.0.as_bytes(), &hash).is_ok();
            PasswordHash::new(&hash).is_ok_and(matches)
        };
        Ok(self.run_blocking(verify).await? && is_account)
    }

    /// Runs slow work on a blocking thread once a permit is free.
    async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let Some(waiting) = QueueSlot::acquire(&self.waiting) else {
            return Err(Error::RateLimited(RETRY_AFTER));
        };
        let free = Arc::clone(&self.permits);
        let permit = free.acquire_owned().await.expect("the semaphore is never closed");
        drop(waiting);
        // The work owns the permit: a cancelled caller does not free it early.
        let run = move || {
            let done = work();
            drop(permit);
            done
        };
        Ok(tokio::task::spawn_blocking(run).await.expect("hashing does not panic"))
    }
}

/// A slot in the queue, released when dropped.
struct QueueSlot<'a>(&'a AtomicUsize);

impl<'a> QueueSlot<'a> {
    fn acquire(count: &'a AtomicUsize) -> Option<Self> {
        let place = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < MAX_WAITING_HASHES).then_some(place)
    }
}

impl Drop for QueueSlot<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn argon2() -> Argon2<'static> {
    /// 19 MiB.
    const MEMORY_KIB: u32 = 19_456;
    let params = Params::new(MEMORY_KIB, 2, 1, None).expect("the parameters are valid");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_length_is_checked_and_debug_omits_the_text() {
        let error = |text: &str| Password::parse(text).err();
        assert_eq!(error("nine char"), Some(PasswordError::TooShort));
        assert_eq!(error("ten chars!"), None);
        assert_eq!(error(&"x".repeat(1025)), Some(PasswordError::TooLong));
        assert!(Password::for_sign_in("short").is_ok());
        assert!(Password::for_sign_in(&"x".repeat(1025)).is_err());
        let generated = Password::generate();
        assert!(Password::parse(generated.expose()).is_ok());
        assert_ne!(generated.expose(), Password::generate().expose());
        assert!(!format!("{generated:?}").contains(generated.expose()));
    }

    #[tokio::test]
    async fn a_hash_matches_its_password_and_no_other() {
        let hasher = Hasher::new();
        let password = Password::generate();
        let hash = hasher.hash(&password).await.unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(hasher.verify(&password, Some(&hash)).await.unwrap());
        assert!(!hasher.verify(&Password::generate(), Some(&hash)).await.unwrap());
        assert!(!hasher.verify(&password, None).await.unwrap());
        assert!(!hasher.verify(&password, Some("no hash")).await.unwrap());
    }

    #[tokio::test]
    async fn hashes_beyond_the_queue_are_rejected() {
        let hasher = Hasher::new();
        let all = Arc::clone(&hasher.permits).acquire_many_owned(2).await.unwrap();
        let mut queue: Vec<_> =
            (0..MAX_WAITING_HASHES).map(|_| Box::pin(hasher.run_blocking(|| ()))).collect();
        for place in &mut queue {
            assert!(futures_util::poll!(place.as_mut()).is_pending());
        }
        assert!(matches!(hasher.run_blocking(|| ()).await, Err(Error::RateLimited(_))));
        drop(queue);
        drop(all);
        hasher.run_blocking(|| ()).await.unwrap();
    }
}
