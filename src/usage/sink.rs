//! Destinations of usage, and the meaning of their responses for a batch.
//!
//! The delivery queue decides when to retry a batch.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use reqwest::StatusCode;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tracing::{debug, info, warn};

use super::{
    lane::BatchId,
    meter,
    outbox::{Dispatch, Outcome},
};
use crate::{
    telemetry::error_chain,
    token::{Environment, Token, TokenKind},
    upstream::{TokenAccess, Credentials, Error, Retry, Upstream},
};

/// Interval between warnings for environments in which only usage is rejected.
const WARN_INTERVAL: Duration = Duration::from_mins(5);

/// The destination of usage.
#[derive(Clone, Debug)]
pub enum Sink {
    /// Upstream, with one token per environment.
    Upstream {
        /// The upstream server.
        upstream: Upstream,
        /// The tokens to send it with.
        credentials: Credentials,
    },
    /// The registry of this instance. Usage waits while the receiver is gone.
    Registry(mpsc::Sender<Delivery>),
    /// No destination: usage is counted and dropped.
    None,
}

/// A batch for the registry of this instance.
#[derive(Debug)]
pub struct Delivery {
    /// Identifies the batch: a retry has the same ID and the same body.
    pub batch: BatchId,
    /// The body in the format of `/api/client/metrics/bulk`.
    pub body: Bytes,
    /// For the result. If it is dropped, the batch is retried.
    pub done: oneshot::Sender<Taken>,
}

/// The result of a delivery to the registry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Taken {
    /// It is stored.
    Stored,
    /// It can never be stored.
    Refused,
    /// It could not be stored this time.
    Failed,
}

/// Limits logging of environments whose usage upstream does not accept, so that an outage is not logged
/// with each attempt.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Arc<Mutex<Logged>>);

#[derive(Debug, Default)]
struct Logged {
    /// When a warning was last logged for an environment whose usage upstream rejects although it serves
    /// flags with the same token.
    refused: BTreeMap<Environment, Instant>,
    /// Why the latest batch of an environment was not accepted.
    reasons: BTreeMap<Environment, String>,
}

impl Refusals {
    /// Records that only usage was rejected; whether to log a warning.
    fn refused(&self, environment: &Environment, now: Instant) -> bool {
        let refused = &mut self.lock().refused;
        let last = refused.get(environment);
        let is_due = last.is_none_or(|last| now.duration_since(*last) >= WARN_INTERVAL);
        if is_due {
            refused.insert(environment.clone(), now);
        }
        is_due
    }

    /// Records why a batch was not accepted; whether the reason is new.
    fn failed(&self, environment: &Environment, reason: &str) -> bool {
        let before = self.lock().reasons.insert(environment.clone(), reason.to_owned());
        before.is_none_or(|before| before != reason)
    }

    /// Records that upstream accepted usage of an environment; whether it had failed before.
    fn taken(&self, environment: &Environment) -> bool {
        let mut logged = self.lock();
        logged.refused.remove(environment);
        logged.reasons.remove(environment).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Logged> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a batch to upstream. If upstream rejects the token for both usage and flags, the token is
/// replaced once and the same bytes are sent with the new one.
///
/// If only usage is rejected, for instance by a firewall, another token would not help: the batch waits.
pub(super) fn deliver(
    upstream: &Upstream,
    credentials: &Credentials,
    refusals: &Refusals,
    batch: Dispatch,
) -> impl Future<Output = (BatchId, Outcome)> {
    let (upstream, credentials) = (upstream.clone(), credentials.clone());
    let refusals = refusals.clone();
    async move {
        let Dispatch { id, environment, body, .. } = batch;
        let Some(token) = token(&credentials, &environment).await else {
            debug!(%environment, "No token for this environment yet; its usage waits");
            return (id, Outcome::Unauthorized);
        };
        let mut result = upstream.send_usage(&token, body.clone()).await;
        if result.as_ref().is_err_and(Error::is_unauthorized) {
            let current = credentials.usage_token(&environment);
            let other = match current.filter(|current| *current != token) {
                // Another task that fetches flags has replaced it.
                Some(other) => Some(other),
                None => replace(&upstream, &credentials, &refusals, &environment, &token).await,
            };
            if let Some(other) = other {
                result = upstream.send_usage(&other, body).await;
            }
        }
        let outcome = match &result {
            Ok(()) => {
                if refusals.taken(&environment) {
                    info!(%environment, "Upstream accepts usage again");
                }
                Outcome::Sent
            }
            Err(error) => {
                let outcome = outcome(error);
                let note = if error.is_ambiguous() { "; it may be counted twice" } else { "" };
                let consequence = match outcome {
                    Outcome::Rejected => "it is dropped",
                    Outcome::TooLarge => "it is too large and is split",
                    _ => "it will be retried",
                };
                let reason = error_chain(&error);
                let is_last = matches!(outcome, Outcome::Rejected | Outcome::TooLarge);
                if refusals.failed(&environment, &reason) || is_last {
                    warn!(
                        %environment,
                        error = reason,
                        "Sending a batch of usage failed; {consequence}{note}"
                    );
                }
                outcome
            }
        };
        (id, outcome)
    }
}

/// Another token, if upstream rejects `token` for flags too; otherwise `None`, and nothing changes.
async fn replace(
    upstream: &Upstream,
    credentials: &Credentials,
    refusals: &Refusals,
    environment: &Environment,
    token: &Token,
) -> Option<Token> {
    match upstream.probe_access(token, TokenKind::Client).await {
        Ok(TokenAccess::Granted) => {
            if refusals.refused(environment, Instant::now()) {
                warn!(
                    %environment,
                    "Upstream rejects usage although it serves flags with the same token; usage is \
                     kept and retried. Check whether a firewall or proxy blocks POST requests to \
                     /api/client/metrics"
                );
            }
            return None;
        }
        Ok(TokenAccess::Forbidden | TokenAccess::Unauthorized) => {}
        // The token's validity is unknown.
        Err(_) => return None,
    }
    // Even if this fails, another token may be available now.
    let _ = credentials.replace_refused(environment, &token.digest()).await;
    credentials.usage_token(environment).filter(|other| other != token)
}

/// Delivers a batch to the registry and waits for the result. The registry does not store impact
/// metrics; they are counted as dropped.
pub(super) fn hand_over(
    registry: &mpsc::Sender<Delivery>,
    batch: Dispatch,
) -> impl Future<Output = (BatchId, Outcome)> {
    let registry = registry.clone();
    async move {
        let Dispatch { id, body, impact, .. } = batch;
        let (reply, outcome) = oneshot::channel();
        let sent = registry.send(Delivery { batch: id, body, done: reply }).await;
        let outcome = match outcome.await {
            Ok(Taken::Stored) if sent.is_ok() => {
                // A registry does not store them.
                meter::items_dropped("impact_metric_not_kept", impact);
                Outcome::Sent
            }
            Ok(Taken::Refused) => Outcome::Rejected,
            Ok(Taken::Stored | Taken::Failed) | Err(_) => Outcome::Later(None),
        };
        (id, outcome)
    }
}

/// The current token of an environment, or one that can be obtained.
async fn token(credentials: &Credentials, environment: &Environment) -> Option<Token> {
    if let Some(token) = credentials.usage_token(environment) {
        return Some(token);
    }
    let obtained = credentials.obtain(environment).await.ok()?;
    obtained.into_iter().next().map(|credential| credential.token)
}

/// The outcome of a batch that failed with this error.
///
/// Only a rejection of the body itself is final: a proxy may respond with 404 while upstream is
/// unavailable, and the same bytes may be accepted later.
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
    use bytes::Bytes;
    use http_body_util::Empty;
    use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
    use hyper_util::rt::TokioIo;
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::{
        token::{Grant, Projects, Scope},
        upstream::scripted::config,
    };

    const GOOD: &str = "web:dev.good";
    const REVOKED: &str = "*:dev.revoked";
    /// Valid for flags; a firewall rejects usage with it.
    const FLAGS_ONLY: &str = "*:dev.flags-only";

    /// An upstream that accepts usage with one token only. Also returns the tokens presented with usage
    /// or with a request for all flags.
    async fn upstream() -> (Upstream, Arc<Mutex<Vec<String>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let log = Arc::clone(&log);
                let service = service_fn(move |request: Request<Incoming>| {
                    let token = request.headers()["authorization"].to_str().unwrap().to_owned();
                    let gets_all = request.uri().path() == "/api/client/features";
                    let status = match (request.method().as_str(), token.as_str()) {
                        ("GET", GOOD | FLAGS_ONLY) => {
                            if gets_all {
                                200
                            } else {
                                404
                            }
                        }
                        ("POST", GOOD) => 202,
                        ("POST", FLAGS_ONLY) => 403,
                        _ => 401,
                    };
                    if request.method() == hyper::Method::POST || gets_all {
                        log.lock().unwrap().push(token);
                    }
                    async move { Response::builder().status(status).body(Empty::<Bytes>::new()) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        (Upstream::new(config(&url)).unwrap(), seen)
    }

    fn credentials(tokens: &[&str]) -> Credentials {
        let credentials = Credentials::without_admin();
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
        let (upstream, seen) = upstream().await;
        let check = async |tokens: &[&str], expected, shown: &[&str]| {
            let batch = Dispatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact: 0,
            };
            let credentials = credentials(tokens);
            let before = credentials.usage_token(&Environment::new("dev"));
            let (_, outcome) = deliver(&upstream, &credentials, &Refusals::default(), batch).await;
            assert_eq!(outcome, expected, "{tokens:?}");
            assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), shown, "{tokens:?}");
            let after = credentials.usage_token(&Environment::new("dev"));
            assert_eq!(before == after, !tokens.contains(&REVOKED) || tokens.len() == 1);
        };
        check(&[GOOD], Outcome::Sent, &[GOOD]).await;
        check(&[GOOD, REVOKED], Outcome::Sent, &[REVOKED, GOOD]).await;
        check(&[REVOKED], Outcome::Unauthorized, &[REVOKED]).await;
        check(&[], Outcome::Unauthorized, &[]).await;
        check(&[GOOD, FLAGS_ONLY], Outcome::Unauthorized, &[FLAGS_ONLY]).await;
    }

    #[test]
    fn rejection_of_only_usage_is_logged_at_once_and_every_five_minutes() {
        let failures = Refusals::default();
        let (dev, prod) = (Environment::new("dev"), Environment::new("prod"));
        let start = Instant::now();
        let minutes = |n| start + Duration::from_mins(n);
        assert!(failures.refused(&dev, start));
        assert!(failures.refused(&prod, start));
        assert!(!failures.refused(&dev, minutes(4)));
        assert!(failures.refused(&dev, minutes(5)));
        assert!(!failures.refused(&dev, minutes(6)));
        failures.taken(&dev);
        assert!(failures.refused(&dev, minutes(6)));
        assert!(!failures.refused(&prod, minutes(4)));
    }

    #[tokio::test]
    async fn batch_is_retried_until_the_registry_stores_it() {
        let check = async |reply: Option<Taken>, expected| {
            let (registry, mut deliveries) = mpsc::channel::<Delivery>(1);
            let batch = Dispatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact: 0,
            };
            let registry_task = async {
                let delivery = deliveries.recv().await.unwrap();
                if let Some(reply) = reply {
                    delivery.done.send(reply).unwrap();
                }
            };
            let ((_, outcome), ()) = tokio::join!(hand_over(&registry, batch), registry_task);
            assert_eq!(outcome, expected, "{reply:?}");
        };
        check(Some(Taken::Stored), Outcome::Sent).await;
        check(Some(Taken::Refused), Outcome::Rejected).await;
        check(Some(Taken::Failed), Outcome::Later(None)).await;
        check(None, Outcome::Later(None)).await;
    }

    #[tokio::test]
    async fn impact_metrics_for_a_registry_are_counted_as_dropped() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let registry = recorder.handle();
        let deliver = async |reply| {
            let (registry, mut deliveries) = mpsc::channel::<Delivery>(1);
            let batch = Dispatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact: 3,
            };
            let registry_task =
                async { deliveries.recv().await.unwrap().done.send(reply).unwrap() };
            tokio::join!(hand_over(&registry, batch), registry_task);
        };
        let _counting = metrics::set_default_local_recorder(&recorder);
        deliver(Taken::Failed).await;
        deliver(Taken::Stored).await;
        let (text, item) = (registry.render(), "{item=\"impact_metric_not_kept\"} 3\n");
        assert!(text.contains(&format!("parapet_usage_items_dropped_total{item}")), "{text}");
    }

    #[test]
    fn response_status_decides_the_outcome_of_a_batch() {
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
        let delay = Some(Duration::from_secs(7));
        let busy = Error::Status { status: StatusCode::TOO_MANY_REQUESTS, retry_after: delay };
        assert_eq!(outcome(&busy), Outcome::Later(delay));
        let redirect = Error::Redirect { status: StatusCode::FOUND, target: String::new() };
        assert_eq!(outcome(&redirect), Outcome::Later(None));
    }
}
