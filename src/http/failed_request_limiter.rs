//! Rate limit per address for failed requests that need no token, such as token validation.
//!
//! Such a request costs work, for example parsing a list of tokens. The limit bounds the work for
//! useless requests; requests about valid tokens do not count. Password attempts are limited by
//! [`control_plane`](crate::control_plane), not here.

use std::{net::IpAddr, time::Duration};

use super::response::HttpError;
use crate::rate_limit::{KeyedRateLimiter, Rate, client_network};

/// The allowed rate of failures. An edge that forwards a flood of invalid tokens, ten requests a second,
/// stays below it.
const RATE: Rate = Rate { burst: 200, interval: Duration::from_millis(50) };

/// The failed attempts of each address.
#[derive(Debug)]
pub struct FailedRequestLimiter(KeyedRateLimiter<IpAddr>);

impl Default for FailedRequestLimiter {
    fn default() -> Self {
        Self(KeyedRateLimiter::new(RATE))
    }
}

impl FailedRequestLimiter {
    /// Runs an attempt of `client` and counts it unless it is valid.
    ///
    /// # Errors
    /// [`HttpError::RateLimited`] after too many failures; and those of `attempt`, which count as
    /// failures even if validation is unavailable.
    pub async fn run_limited<T>(
        &self,
        client: IpAddr,
        attempt: impl Future<Output = Result<Attempt<T>, HttpError>>,
    ) -> Result<T, HttpError> {
        let origin = client_network(client);
        self.0.acquire(&origin).map_err(HttpError::RateLimited)?;
        let outcome = attempt.await;
        if matches!(outcome, Ok(Attempt::Valid(_))) {
            self.0.refund(&origin);
        }
        outcome.map(|(Attempt::Valid(value) | Attempt::Invalid(value))| value)
    }
}

/// The result of an attempt.
#[derive(Debug)]
pub enum Attempt<T> {
    /// It succeeded and does not count.
    Valid(T),
    /// It counts as a failure.
    Invalid(T),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn invalid_attempts_are_limited_and_valid_ones_are_not() {
        let (guesses, client) = (FailedRequestLimiter::default(), IpAddr::from([192, 0, 2, 7]));
        let attempt = async |client, outcome| guesses.run_limited(client, async { outcome }).await;
        for _ in 0..2 * RATE.burst {
            attempt(client, Ok(Attempt::Valid(()))).await.unwrap();
        }
        for _ in 0..RATE.burst {
            attempt(client, Ok(Attempt::Invalid(()))).await.unwrap();
        }
        let limited = attempt(client, Ok(Attempt::Valid(()))).await;
        assert!(matches!(limited, Err(HttpError::RateLimited(_))), "{limited:?}");
        attempt(IpAddr::from([192, 0, 2, 8]), Ok(Attempt::Invalid(()))).await.unwrap();
        tokio::time::advance(RATE.interval).await;
        let failed = attempt(client, Err(HttpError::UnsupportedMediaType)).await;
        assert!(matches!(failed, Err(HttpError::UnsupportedMediaType)), "{failed:?}");
        let limited = attempt(client, Ok(Attempt::Valid(()))).await;
        assert!(matches!(limited, Err(HttpError::RateLimited(_))), "an error counts as a failure");
    }
}
