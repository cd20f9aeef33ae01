//! Where usage goes, and what upstream's answers mean for a batch.
//!
//! When a batch is tried again is the outbox's affair.

use std::future::Future;

use reqwest::StatusCode;
use tracing::{debug, warn};

use super::{
    lane::BatchId,
    outbox::{Dispatch, Outcome},
};
use crate::{
    token::{Environment, Token},
    upstream::{Credentials, Error, Retry, Upstream},
};

/// Where usage goes.
#[derive(Clone, Debug)]
pub enum Sink {
    /// To upstream, with a token of each environment.
    Upstream {
        /// Whom it is sent to.
        upstream: Upstream,
        /// With which tokens.
        credentials: Credentials,
    },
    /// Nowhere: it is counted and let go.
    None,
}

/// Sends a batch; a refused token is replaced once, and the same bytes are sent with the new one.
pub(super) fn deliver(
    upstream: &Upstream,
    credentials: &Credentials,
    batch: Dispatch,
) -> impl Future<Output = (BatchId, Outcome)> {
    let (upstream, credentials) = (upstream.clone(), credentials.clone());
    async move {
        let Dispatch { id, environment, body } = batch;
        let Some(token) = token(&credentials, &environment).await else {
            debug!("Usage of environment {environment} waits for a token");
            return (id, Outcome::Unauthorized);
        };
        let mut result = upstream.send_usage(&token, body.clone()).await;
        if result.as_ref().is_err_and(Error::is_unauthorized) {
            // Whatever upstream says here, another token may be in hand now.
            let _ = credentials.replace(&environment, &token.digest()).await;
            let other = credentials.usage_token(&environment).filter(|other| *other != token);
            if let Some(other) = other {
                result = upstream.send_usage(&other, body).await;
            }
        }
        let outcome = match &result {
            Ok(()) => Outcome::Sent,
            Err(error) => {
                let outcome = outcome(error);
                let again = if error.is_ambiguous() { ", perhaps for the second time" } else { "" };
                let what = match outcome {
                    Outcome::Rejected => "is dropped",
                    _ => "will be sent again",
                };
                warn!(
                    "A batch of usage for environment {environment} {what}{again}: {}",
                    error.report()
                );
                outcome
            }
        };
        (id, outcome)
    }
}

/// The token in hand for an environment, or one that can be had.
async fn token(credentials: &Credentials, environment: &Environment) -> Option<Token> {
    if let Some(token) = credentials.usage_token(environment) {
        return Some(token);
    }
    let obtained = credentials.obtain(environment).await.ok()?;
    obtained.into_iter().next().map(|credential| credential.token)
}

/// What a failure means for the batch.
///
/// Only what judges the body itself ends it: a 404 is also what a proxy says while upstream is
/// away, and the same bytes may be taken later.
fn outcome(error: &Error) -> Outcome {
    if error.is_unauthorized() {
        return Outcome::Unauthorized;
    }
    match error.status() {
        Some(StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY) => Outcome::Rejected,
        Some(StatusCode::PAYLOAD_TOO_LARGE) => Outcome::TooLarge,
        _ => match error.retry() {
            Retry::Later(pause) => Outcome::Later(pause),
            Retry::Never => Outcome::Later(None),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_answer_decides_what_becomes_of_a_batch() {
        let check = |status: u16, expected| {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(outcome(&Error::Status { status, retry_after: None }), expected, "{status}");
        };
        check(400, Outcome::Rejected);
        check(422, Outcome::Rejected);
        check(413, Outcome::TooLarge);
        check(401, Outcome::Unauthorized);
        check(403, Outcome::Unauthorized);
        for status in [404, 405, 408, 415, 429, 500, 502, 503, 504] {
            check(status, Outcome::Later(None));
        }
        let pause = Some(Duration::from_secs(7));
        let busy = Error::Status { status: StatusCode::TOO_MANY_REQUESTS, retry_after: pause };
        assert_eq!(outcome(&busy), Outcome::Later(pause));
        assert_eq!(outcome(&Error::Redirect(StatusCode::FOUND)), Outcome::Later(None));
    }
}
