//! Sends usage to upstream, and classifies its responses.
//!
//! A retry follows at once only if a rejected token could be replaced. The delivery queue of
//! [`usage`](crate::usage) decides when to retry otherwise.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use reqwest::StatusCode;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    client::{TokenAccess, Upstream},
    environment_tokens::EnvironmentTokens,
    error::{Error, Retry},
};
use crate::{
    telemetry::error_chain,
    token::{Environment, Token, TokenKind},
    usage::{OutgoingBatch, SendOutcome, UsageSink},
};

/// Interval between warnings for environments in which only usage is rejected.
const WARN_INTERVAL: Duration = Duration::from_mins(5);

/// Sends usage to upstream, with one token per environment.
#[derive(Debug)]
pub struct UpstreamUsageSink {
    upstream: Upstream,
    credentials: EnvironmentTokens,
    failures: FailureLog,
}

/// Limits logging of environments whose usage upstream does not accept, so that an outage is not logged
/// with each attempt.
#[derive(Debug, Default)]
struct FailureLog(Mutex<BTreeMap<Environment, LoggedFailure>>);

#[derive(Debug, Default)]
struct LoggedFailure {
    /// When a warning was last logged because upstream rejects usage although it serves flags with the
    /// same token.
    last_warned: Option<Instant>,
    /// Why the latest batch was not accepted.
    reason: Option<String>,
}

impl FailureLog {
    /// Records that only usage was rejected; whether to log a warning.
    fn record_refusal(&self, environment: &Environment, now: Instant) -> bool {
        let mut failures = self.lock();
        let last_warned = &mut failures.entry(environment.clone()).or_default().last_warned;
        let is_due = last_warned.is_none_or(|last| now.duration_since(last) >= WARN_INTERVAL);
        if is_due {
            *last_warned = Some(now);
        }
        is_due
    }

    /// Records why a batch was not accepted; whether the reason is new.
    fn record_failure(&self, environment: &Environment, reason: &str) -> bool {
        let mut failures = self.lock();
        let before = &mut failures.entry(environment.clone()).or_default().reason;
        before.replace(reason.to_owned()).is_none_or(|before| before != reason)
    }

    /// Records that upstream accepted usage of an environment; whether it had failed before.
    fn record_success(&self, environment: &Environment) -> bool {
        self.lock().remove(environment).is_some_and(|failure| failure.reason.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Environment, LoggedFailure>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UsageSink for UpstreamUsageSink {
    fn send(&self, batch: OutgoingBatch) -> BoxFuture<'_, SendOutcome> {
        Box::pin(self.deliver(batch))
    }
}

impl UpstreamUsageSink {
    /// Sends usage with the tokens of `credentials`.
    pub fn new(upstream: Upstream, credentials: EnvironmentTokens) -> Self {
        Self { upstream, credentials, failures: FailureLog::default() }
    }

    /// Sends a batch. If upstream rejects the token for both usage and flags, the token is replaced once
    /// and the same bytes are sent with the new one.
    ///
    /// If only usage is rejected, for instance by a firewall, another token would not help: the batch
    /// waits.
    async fn deliver(&self, batch: OutgoingBatch) -> SendOutcome {
        let OutgoingBatch { id, environment, body, may_be_parked: _ } = batch;
        let Some(token) = self.token(&environment).await else {
            debug!(%environment, "No token for this environment yet; its usage waits");
            return SendOutcome::Unauthorized;
        };
        let mut result = self.upstream.send_usage(&token, id, body.clone()).await;
        if result.as_ref().is_err_and(Error::is_token_refused) {
            let current = self.credentials.usage_token(&environment);
            let other = match current.filter(|current| *current != token) {
                // Another task that fetches flags has replaced it.
                Some(other) => Some(other),
                None => self.replace_token(&environment, &token).await,
            };
            if let Some(other) = other {
                result = self.upstream.send_usage(&other, id, body).await;
            }
        }
        let Err(error) = &result else {
            if self.failures.record_success(&environment) {
                info!(%environment, "Upstream accepts usage again");
            }
            return SendOutcome::Sent;
        };
        let outcome = outcome_of_error(error);
        let note = if error.is_ambiguous() { "; it may be counted twice" } else { "" };
        let consequence = match outcome {
            SendOutcome::Rejected => "it is dropped",
            SendOutcome::TooLarge => "it is too large and is split",
            _ => "it will be retried",
        };
        let reason = error_chain(error);
        let is_last = matches!(outcome, SendOutcome::Rejected | SendOutcome::TooLarge);
        if self.failures.record_failure(&environment, &reason) || is_last {
            warn!(
                %environment,
                error = reason,
                "Sending a batch of usage failed; {consequence}{note}"
            );
        }
        outcome
    }

    /// The current token of an environment, or one that can be obtained.
    async fn token(&self, environment: &Environment) -> Option<Token> {
        if let Some(token) = self.credentials.usage_token(environment) {
            return Some(token);
        }
        let obtained = self.credentials.obtain(environment).await.ok()?;
        obtained.into_iter().next().map(|credential| credential.token)
    }

    /// Another token, if upstream rejects `token` for flags too; otherwise `None`, and nothing changes.
    async fn replace_token(&self, environment: &Environment, token: &Token) -> Option<Token> {
        match self.upstream.probe_access(token, TokenKind::Client).await {
            Ok(TokenAccess::Granted) => {
                if self.failures.record_refusal(environment, Instant::now()) {
                    warn!(
                        %environment,
                        "Upstream rejects usage although it serves flags with the same token; usage \
                         is kept and retried. Check whether a firewall or proxy blocks POST requests \
                         to /api/client/metrics"
                    );
                }
                return None;
            }
            Ok(TokenAccess::Forbidden | TokenAccess::Unauthorized) => {}
            // The token's validity is unknown.
            Err(_) => return None,
        }
        // Even if this fails, another token may be available now.
        let _ = self.credentials.replace_refused(environment, &token.digest()).await;
        self.credentials.usage_token(environment).filter(|other| other != token)
    }
}

/// The outcome of a batch that failed with this error.
///
/// Only a rejection of the body itself is final: a proxy may respond with 404 while upstream is
/// unavailable, and the same bytes may be accepted later.
fn outcome_of_error(error: &Error) -> SendOutcome {
    if error.is_token_refused() {
        return SendOutcome::Unauthorized;
    }
    match error.status() {
        Some(StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY) => SendOutcome::Rejected,
        Some(StatusCode::PAYLOAD_TOO_LARGE) => SendOutcome::TooLarge,
        _ => match error.retry() {
            Retry::Later(pause) => SendOutcome::Retry(pause),
            Retry::Never => SendOutcome::Retry(None),
        },
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        token::{Grant, Projects, Scope},
        upstream::scripted_server::{ReceivedRequest, ScriptedServer},
        usage::BatchId,
    };

    const GOOD: &str = "web:dev.good";
    const REVOKED: &str = "*:dev.revoked";
    /// Valid for flags; a firewall rejects usage with it.
    const FLAGS_ONLY: &str = "*:dev.flags-only";

    /// An upstream that accepts usage with one token only.
    async fn upstream() -> ScriptedServer {
        ScriptedServer::start(|request| {
            let (method, _) = request.line.split_once(' ').unwrap();
            let status = match (method, request.headers["authorization"].to_str().unwrap()) {
                // A probe of a token that upstream accepts.
                ("GET", GOOD | FLAGS_ONLY) => 404,
                ("POST", GOOD) => 202,
                ("POST", FLAGS_ONLY) => 403,
                _ => 401,
            };
            (status, &[], String::new())
        })
        .await
    }

    fn credentials(tokens: &[&str]) -> EnvironmentTokens {
        let credentials = EnvironmentTokens::without_admin();
        for text in tokens {
            let token = Token::parse(text).unwrap();
            let projects = token.projects().unwrap_or(Projects::All);
            let scope = Scope { environment: Environment::new("dev"), projects };
            credentials.offer(&token, &Grant { kind: TokenKind::Client, scope });
        }
        credentials
    }

    #[tokio::test]
    async fn rejected_token_is_replaced_and_batch_waits_without_a_token() {
        let check = async |tokens: &[&str], expected, presented: &[&str]| {
            let server = upstream().await;
            let upstream = Upstream::new(server.config()).unwrap();
            let batch = OutgoingBatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                may_be_parked: false,
            };
            let credentials = credentials(tokens);
            let before = credentials.usage_token(&Environment::new("dev"));
            let sink = UpstreamUsageSink::new(upstream, credentials.clone());
            assert_eq!(sink.send(batch).await, expected, "{tokens:?}");
            let requests = server.received_requests();
            let is_probe = |request: &&ReceivedRequest| request.line.contains("/features/");
            let others = requests.iter().filter(|request| !is_probe(request));
            let seen: Vec<_> = others.map(|request| &request.headers["authorization"]).collect();
            assert_eq!(seen, presented, "{tokens:?}");
            let after = credentials.usage_token(&Environment::new("dev"));
            assert_eq!(before == after, !tokens.contains(&REVOKED) || tokens.len() == 1);
        };
        check(&[GOOD], SendOutcome::Sent, &[GOOD]).await;
        check(&[GOOD, REVOKED], SendOutcome::Sent, &[REVOKED, GOOD]).await;
        check(&[REVOKED], SendOutcome::Unauthorized, &[REVOKED]).await;
        check(&[], SendOutcome::Unauthorized, &[]).await;
        check(&[GOOD, FLAGS_ONLY], SendOutcome::Unauthorized, &[FLAGS_ONLY]).await;
    }

    #[test]
    fn rejection_of_only_usage_is_logged_at_once_and_every_five_minutes() {
        let failures = FailureLog::default();
        let (dev, prod) = (Environment::new("dev"), Environment::new("prod"));
        let start = Instant::now();
        let minutes = |n| start + Duration::from_mins(n);
        assert!(failures.record_refusal(&dev, start));
        assert!(failures.record_refusal(&prod, start));
        assert!(!failures.record_refusal(&dev, minutes(4)));
        assert!(failures.record_refusal(&dev, minutes(5)));
        assert!(!failures.record_refusal(&dev, minutes(6)));
        failures.record_success(&dev);
        assert!(failures.record_refusal(&dev, minutes(6)));
        assert!(!failures.record_refusal(&prod, minutes(4)));
    }

    #[test]
    fn response_status_decides_the_outcome_of_a_batch() {
        let check = |status: u16, expected| {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                outcome_of_error(&Error::Status { status, retry_after: None }),
                expected,
                "{status}"
            );
        };
        check(400, SendOutcome::Rejected);
        check(422, SendOutcome::Rejected);
        check(413, SendOutcome::TooLarge);
        check(401, SendOutcome::Unauthorized);
        check(403, SendOutcome::Unauthorized);
        for status in [404, 405, 408, 415, 429, 500, 502, 503, 504] {
            check(status, SendOutcome::Retry(None));
        }
        let delay = Some(Duration::from_secs(7));
        let busy = Error::Status { status: StatusCode::TOO_MANY_REQUESTS, retry_after: delay };
        assert_eq!(outcome_of_error(&busy), SendOutcome::Retry(delay));
        let redirect = Error::Redirect { status: StatusCode::FOUND, target: String::new() };
        assert_eq!(outcome_of_error(&redirect), SendOutcome::Retry(None));
    }
}
