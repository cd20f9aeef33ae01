//! Rate limit per address for failed requests that need no token, such as token validation.
//!
//! Such a request costs work, for example parsing a list of tokens. The limit bounds the work for
//! useless requests; requests about valid tokens do not count. Password attempts are limited by
//! [`control_plane`](crate::control_plane), not here.

use std::{net::IpAddr, time::Duration};

use super::reply::Failure;
use crate::throttle::{Buckets, Rate, origin};

/// The allowed rate of failures. An edge that forwards a flood of invalid tokens, ten requests a second,
/// stays below it.
const RATE: Rate = Rate { burst: 200, every: Duration::from_millis(50) };

/// The failed attempts of each address.
#[derive(Debug)]
pub struct Guesses(Buckets<IpAddr>);

impl Default for Guesses {
    fn default() -> Self {
        Self(Buckets::new(RATE))
    }
}

impl Guesses {
    /// Runs an attempt of `client` and counts it unless it is valid.
    ///
    /// # Errors
    /// [`HttpError::RateLimited`] after too many failures; and those of `attempt`, which count as
    /// failures even if validation is unavailable.
    pub async fn answer<T>(
        &self,
        client: IpAddr,
        attempt: impl Future<Output = Result<Guess<T>, Failure>>,
    ) -> Result<T, Failure> {
        let origin = origin(client);
        self.0.take(&origin).map_err(Failure::Throttled)?;
        let outcome = attempt.await;
        if matches!(outcome, Ok(Guess::Right(_))) {
            self.0.give_back(&origin);
        }
        outcome.map(|(Guess::Right(value) | Guess::Wrong(value))| value)
    }
}

/// The result of an attempt.
#[derive(Debug)]
pub enum Guess<T> {
    /// It succeeded and does not count.
    Right(T),
    /// It counts as a failure.
    Wrong(T),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn invalid_attempts_are_limited_and_valid_ones_are_not() {
        let (guesses, client) = (Guesses::default(), IpAddr::from([192, 0, 2, 7]));
        let attempt = async |client, outcome| guesses.answer(client, async { outcome }).await;
        for _ in 0..2 * RATE.burst {
            attempt(client, Ok(Guess::Right(()))).await.unwrap();
        }
        for _ in 0..RATE.burst {
            attempt(client, Ok(Guess::Wrong(()))).await.unwrap();
        }
        let limited = attempt(client, Ok(Guess::Right(()))).await;
        assert!(matches!(limited, Err(Failure::Throttled(_))), "{limited:?}");
        attempt(IpAddr::from([192, 0, 2, 8]), Ok(Guess::Wrong(()))).await.unwrap();
        tokio::time::advance(RATE.every).await;
        let failed = attempt(client, Err(Failure::MediaType)).await;
        assert!(matches!(failed, Err(Failure::MediaType)), "{failed:?}");
        let limited = attempt(client, Ok(Guess::Right(()))).await;
        assert!(matches!(limited, Err(Failure::Throttled(_))), "an error counts as a failure");
    }
}
