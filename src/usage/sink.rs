//! Where usage goes, and what upstream's answers mean for a batch.
//!
//! When a batch is tried again is the outbox's affair.

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
    telemetry::report,
    token::{Environment, Token, TokenKind},
    upstream::{Access, Credentials, Error, Retry, Upstream},
};

/// How often a warning is logged of an environment whose usage alone is refused.
const WARN_INTERVAL: Duration = Duration::from_mins(5);

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
    /// To whoever keeps it on this instance; when it is gone, usage waits.
    Registry(mpsc::Sender<Delivery>),
    /// Nowhere: it is counted and let go.
    None,
}

/// A batch for the registry of this instance.
#[derive(Debug)]
pub struct Delivery {
    /// Names it: a batch that comes again, with the same body, has the same name.
    pub batch: BatchId,
    /// The body that `/api/client/metrics/bulk` would be sent.
    pub body: Bytes,
    /// Where to say what became of it; dropped, the batch comes again.
    pub done: oneshot::Sender<Taken>,
}

/// What became of a delivery.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Taken {
    /// It is stored.
    Stored,
    /// It cannot be stored, now or later.
    Refused,
    /// It could not be stored now.
    Failed,
}

/// What was logged of environments whose usage upstream does not take, so that an outage is not logged
/// with each attempt.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Arc<Mutex<Logged>>);

#[derive(Debug, Default)]
struct Logged {
    /// When a warning was last logged of an environment whose usage upstream refuses although it serves
    /// flags with the same token.
    refused: BTreeMap<Environment, Instant>,
    /// Why a batch was not taken the last time.
    reasons: BTreeMap<Environment, String>,
}

impl Refusals {
    /// Notes a refusal; whether a warning is to be logged.
    fn refused(&self, environment: &Environment, now: Instant) -> bool {
        let refused = &mut self.lock().refused;
        let last = refused.get(environment);
        let is_due = last.is_none_or(|last| now.duration_since(*last) >= WARN_INTERVAL);
        if is_due {
            refused.insert(environment.clone(), now);
        }
        is_due
    }

    /// Notes why a batch was not taken; whether that is new.
    fn failed(&self, environment: &Environment, reason: &str) -> bool {
        let before = self.lock().reasons.insert(environment.clone(), reason.to_owned());
        before.is_none_or(|before| before != reason)
    }

    /// Notes that upstream takes the usage of an environment; whether it did not before.
    fn taken(&self, environment: &Environment) -> bool {
        let mut logged = self.lock();
        logged.refused.remove(environment);
        logged.reasons.remove(environment).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Logged> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a batch. Where upstream refuses the token for usage and for flags, the token is replaced
/// once, and the same bytes are sent with the new one.
///
/// A firewall may refuse usage alone. Another token would not help then: the batch waits.
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
            debug!("Usage of environment {environment} waits for a token");
            return (id, Outcome::Unauthorized);
        };
        let mut result = upstream.send_usage(&token, body.clone()).await;
        if result.as_ref().is_err_and(Error::is_unauthorized) {
            let held = credentials.usage_token(&environment);
            let other = match held.filter(|held| *held != token) {
                // Replaced meanwhile, by whoever fetches flags.
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
                    info!("Upstream takes usage of environment {environment} again");
                }
                Outcome::Sent
            }
            Err(error) => {
                let outcome = outcome(error);
                let again = if error.is_ambiguous() { ", perhaps for the second time" } else { "" };
                let what = match outcome {
                    Outcome::Rejected => "is dropped",
                    Outcome::TooLarge => "is too large",
                    _ => "will be sent again",
                };
                let reason = report(&error);
                let is_last = matches!(outcome, Outcome::Rejected | Outcome::TooLarge);
                if refusals.failed(&environment, &reason) || is_last {
                    warn!("A batch of usage for environment {environment} {what}{again}: {reason}");
                }
                outcome
            }
        };
        (id, outcome)
    }
}

/// Another token, if upstream refuses `token` for flags too; nothing changes if it does not.
async fn replace(
    upstream: &Upstream,
    credentials: &Credentials,
    refusals: &Refusals,
    environment: &Environment,
    token: &Token,
) -> Option<Token> {
    match upstream.admits(token, TokenKind::Client).await {
        Ok(Access::Granted) => {
            if refusals.refused(environment, Instant::now()) {
                warn!(
                    "Upstream refuses usage of environment {environment} although it serves flags \
                     with the same token: does a firewall or proxy refuse POST requests to \
                     /api/client/metrics? Usage is kept and sent again later"
                );
            }
            return None;
        }
        Ok(Access::Forbidden | Access::Unknown) => {}
        // Nothing is known about the token.
        Err(_) => return None,
    }
    // Whatever upstream says here, another token may be in hand now.
    let _ = credentials.replace(environment, &token.digest()).await;
    credentials.usage_token(environment).filter(|other| other != token)
}

/// Hands a batch to the registry and waits for its word. Impact metrics are not kept there, and are
/// counted as dropped.
pub(super) fn hand_over(
    registry: &mpsc::Sender<Delivery>,
    batch: Dispatch,
) -> impl Future<Output = (BatchId, Outcome)> {
    let registry = registry.clone();
    async move {
        let Dispatch { id, body, impact, .. } = batch;
        let (done, taken) = oneshot::channel();
        let sent = registry.send(Delivery { batch: id, body, done }).await;
        let outcome = match taken.await {
            Ok(Taken::Stored) if sent.is_ok() => {
                // A registry has no place for them.
                meter::items_dropped("impact_metric_not_kept", impact);
                Outcome::Sent
            }
            Ok(Taken::Refused) => Outcome::Rejected,
            Ok(Taken::Stored | Taken::Failed) | Err(_) => Outcome::Later(None),
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
    /// Good for flags; a firewall refuses usage with it.
    const FLAGS_ONLY: &str = "*:dev.flags-only";

    /// An upstream that takes the usage of one token only; the tokens that it is shown with usage,
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
    async fn a_refused_token_is_replaced_and_without_any_the_batch_waits() {
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
    fn refusal_of_usage_alone_is_logged_when_it_begins_and_every_few_minutes() {
        let refusals = Refusals::default();
        let (dev, prod) = (Environment::new("dev"), Environment::new("prod"));
        let start = Instant::now();
        let minutes = |n| start + Duration::from_mins(n);
        assert!(refusals.refused(&dev, start));
        assert!(refusals.refused(&prod, start));
        assert!(!refusals.refused(&dev, minutes(4)));
        assert!(refusals.refused(&dev, minutes(5)));
        assert!(!refusals.refused(&dev, minutes(6)));
        refusals.taken(&dev);
        assert!(refusals.refused(&dev, minutes(6)));
        assert!(!refusals.refused(&prod, minutes(4)));
    }

    #[tokio::test]
    async fn what_the_registry_does_not_store_comes_again() {
        let check = async |answer: Option<Taken>, expected| {
            let (registry, mut deliveries) = mpsc::channel::<Delivery>(1);
            let batch = Dispatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact: 0,
            };
            let keep = async {
                let delivery = deliveries.recv().await.unwrap();
                if let Some(answer) = answer {
                    delivery.done.send(answer).unwrap();
                }
            };
            let ((_, outcome), ()) = tokio::join!(hand_over(&registry, batch), keep);
            assert_eq!(outcome, expected, "{answer:?}");
        };
        check(Some(Taken::Stored), Outcome::Sent).await;
        check(Some(Taken::Refused), Outcome::Rejected).await;
        check(Some(Taken::Failed), Outcome::Later(None)).await;
        check(None, Outcome::Later(None)).await;
    }

    #[tokio::test]
    async fn impact_metrics_that_a_registry_cannot_keep_are_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let registry = recorder.handle();
        let hand = async |answer| {
            let (registry, mut deliveries) = mpsc::channel::<Delivery>(1);
            let batch = Dispatch {
                id: BatchId::default(),
                environment: Environment::new("dev"),
                body: Bytes::from_static(b"{}"),
                impact: 3,
            };
            let keep = async { deliveries.recv().await.unwrap().done.send(answer).unwrap() };
            tokio::join!(hand_over(&registry, batch), keep);
        };
        let _counting = metrics::set_default_local_recorder(&recorder);
        hand(Taken::Failed).await;
        hand(Taken::Stored).await;
        let (text, item) = (registry.render(), "{item=\"impact_metric_not_kept\"} 3\n");
        assert!(text.contains(&format!("parapet_usage_items_dropped_total{item}")), "{text}");
    }

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
        let redirect = Error::Redirect { status: StatusCode::FOUND, target: String::new() };
        assert_eq!(outcome(&redirect), Outcome::Later(None));
    }
}
