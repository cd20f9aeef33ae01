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
    delivery_queue::{OutgoingBatch, SendOutcome},
    environment_queue::BatchId,
    usage_metrics,
};
use crate::{
    telemetry::error_chain,
    token::{Environment, Token, TokenKind},
    upstream::{Credentials, Error, Retry, TokenAccess, Upstream},
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
    Registry(mpsc::Sender<RegistryDelivery>),
    /// No destination: usage is counted and dropped.
    Discard,
}

/// A batch for the registry of this instance.
#[derive(Debug)]
pub struct RegistryDelivery {
    /// Identifies the batch: a retry has the same ID and the same body.
    pub id: BatchId,
    /// The body in the format of `/api/client/metrics/bulk`.
    pub body: Bytes,
    /// For the result. If it is dropped, the batch is retried.
    pub reply: oneshot::Sender<DeliveryOutcome>,
}

/// The result of a delivery to the registry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeliveryOutcome {
    /// It is stored.
    Stored,
    /// It can never be stored.
    Rejected,
    /// It could not be stored this time.
    Failed,
}

/// Limits logging of environments whose usage upstream does not accept, so that an outage is not logged
/// with each attempt.
#[derive(Clone, Debug, Default)]
pub(super) struct FailureLog(Arc<Mutex<LoggedFailures>>);

#[derive(Debug, Default)]
struct LoggedFailures {
    /// When a warning was last logged for an environment whose usage upstream rejects although it serves
    /// flags with the same token.
    last_warned: BTreeMap<Environment, Instant>,
    /// Why the latest batch of an environment was not accepted.
    last_reasons: BTreeMap<Environment, String>,
}

impl FailureLog {
    /// Records that only usage was rejected; whether to log a warning.
    fn record_refusal(&self, environment: &Environment, now: Instant) -> bool {
        let refused = &mut self.lock().last_warned;
        let last = refused.get(environment);
        let is_due = last.is_none_or(|last| now.duration_since(*last) >= WARN_INTERVAL);
        if is_due {
            refused.insert(environment.clone(), now);
        }
        is_due
    }

    /// Records why a batch was not accepted; whether the reason is new.
    fn record_failure(&self, environment: &Environment, reason: &str) -> bool {
        let before = self.lock().last_reasons.insert(environment.clone(), reason.to_owned());
        before.is_none_or(|before| before != reason)
    }

    /// Records that upstream accepted usage of an environment; whether it had failed before.
    fn record_success(&self, environment: &Environment) -> bool {
        let mut logged = self.lock();
        logged.last_warned.remove(environment);
        logged.last_reasons.remove(environment).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, LoggedFailures> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a batch to upstream. If upstream rejects the token for both usage and flags, the token is
/// replaced once and the same bytes are sent with the new one.
///
/// If only usage is rejected, for instance by a firewall, another token would not help: the batch waits.
pub(super) fn deliver_upstream(
    upstream: &Upstream,
    credentials: &Credentials,
    refusals: &FailureLog,
    batch: OutgoingBatch,
) -> impl Future<Output = (BatchId, SendOutcome)> {
    let (upstream, credentials) = (upstream.clone(), credentials.clone());
    let refusals = refusals.clone();
    async move {
        let OutgoingBatch { id, environment, body, .. } = batch;
        let Some(token) = usage_token(&credentials, &environment).await else {
            debug!(%environment, "No token for this environment yet; its usage waits");
            return (id, SendOutcome::Unauthorized);
        };
        let mut result = upstream.send_usage(&token, body.clone()).await;
        if result.as_ref().is_err_and(Error::is_unauthorized) {
            let current = credentials.usage_token(&environment);
            let other = match current.filter(|current| *current != token) {
                // Another task that fetches flags has replaced it.
                Some(other) => Some(other),
                None => {
                    replace_token(&upstream, &credentials, &refusals, &environment, &token).await
                }
            };
            if let Some(other) = other {
                result = upstream.send_usage(&other, body).await;
            }
        }
        let outcome = match &result {
            Ok(()) => {
                if refusals.record_success(&environment) {
                    info!(%environment, "Upstream accepts usage again");
                }
                SendOutcome::Sent
            }
            Err(error) => {
                let outcome = outcome_of_error(error);
                let note = if error.is_ambiguous() { "; it may be counted twice" } else { "" };
                let consequence = match outcome {
                    SendOutcome::Rejected => "it is dropped",
                    SendOutcome::TooLarge => "it is too large and is split",
                    _ => "it will be retried",
                };
                let reason = error_chain(&error);
                let is_last = matches!(outcome, SendOutcome::Rejected | SendOutcome::TooLarge);
                if refusals.record_failure(&environment, &reason) || is_last {
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
async fn replace_token(
    upstream: &Upstream,
    credentials: &Credentials,
    refusals: &FailureLog,
    environment: &Environment,
    token: &Token,
) -> Option<Token> {
    match upstream.probe_access(token, TokenKind::Client).await {
        Ok(TokenAccess::Granted) => {
            if refusals.record_refusal(environment, Instant::now()) {
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
pub(super) fn deliver_to_registry(
    registry: &mpsc::Sender<RegistryDelivery>,
    batch: OutgoingBatch,
) -> impl Future<Output = (BatchId, SendOutcome)> {
    let registry = registry.clone();
    async move {
        let OutgoingBatch { id, body, impact_metrics, .. } = batch;
        let (reply, outcome) = oneshot::channel();
        let sent = registry.send(RegistryDelivery { id, body, reply }).await;
        let outcome = match outcome.await {
            Ok(DeliveryOutcome::Stored) if sent.is_ok() => {
                // A registry does not store them.
                usage_metrics::count_dropped_items("impact_metric_not_kept", impact_metrics);
                SendOutcome::Sent
            }
            Ok(DeliveryOutcome::Rejected) => SendOutcome::Rejected,
            Ok(DeliveryOutcome::Stored | DeliveryOutcome::Failed) | Err(_) => {
                SendOutcome::Retry(None)
            }
        };
        (id, outcome)
    }
}

/// The current token of an environment, or one that can be obtained.
async fn usage_token(credentials: &Credentials, environment: &Environment) -> Option<Token> {
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
fn outcome_of_error(error: &Error) -> SendOutcome {
    if error.is_unauthorized() {
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
            let batch = OutgoingBatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact_metrics: 0,
            };
            let credentials = credentials(tokens);
            let before = credentials.usage_token(&Environment::new("dev"));
            let (_, outcome) =
                deliver_upstream(&upstream, &credentials, &FailureLog::default(), batch).await;
            assert_eq!(outcome, expected, "{tokens:?}");
            assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), shown, "{tokens:?}");
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

    #[tokio::test]
    async fn batch_is_retried_until_the_registry_stores_it() {
        let check = async |reply: Option<DeliveryOutcome>, expected| {
            let (registry, mut deliveries) = mpsc::channel::<RegistryDelivery>(1);
            let batch = OutgoingBatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact_metrics: 0,
            };
            let registry_task = async {
                let delivery = deliveries.recv().await.unwrap();
                if let Some(reply) = reply {
                    delivery.reply.send(reply).unwrap();
                }
            };
            let ((_, outcome), ()) =
                tokio::join!(deliver_to_registry(&registry, batch), registry_task);
            assert_eq!(outcome, expected, "{reply:?}");
        };
        check(Some(DeliveryOutcome::Stored), SendOutcome::Sent).await;
        check(Some(DeliveryOutcome::Rejected), SendOutcome::Rejected).await;
        check(Some(DeliveryOutcome::Failed), SendOutcome::Retry(None)).await;
        check(None, SendOutcome::Retry(None)).await;
    }

    #[tokio::test]
    async fn impact_metrics_for_a_registry_are_counted_as_dropped() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let registry = recorder.handle();
        let deliver = async |reply| {
            let (registry, mut deliveries) = mpsc::channel::<RegistryDelivery>(1);
            let batch = OutgoingBatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact_metrics: 3,
            };
            let registry_task =
                async { deliveries.recv().await.unwrap().reply.send(reply).unwrap() };
            tokio::join!(deliver_to_registry(&registry, batch), registry_task);
        };
        let _counting = metrics::set_default_local_recorder(&recorder);
        deliver(DeliveryOutcome::Failed).await;
        deliver(DeliveryOutcome::Stored).await;
        let (text, item) = (registry.render(), "{item=\"impact_metric_not_kept\"} 3\n");
        assert!(text.contains(&format!("parapet_usage_items_dropped_total{item}")), "{text}");
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
