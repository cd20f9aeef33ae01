//! Tests of validation against an upstream that fails in part.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    error::AuthError,
    first_validation,
    pending_validations::{PendingValidations, Priority},
    revalidation,
    token_cache::{RequestStart, TokenCache},
    token_list_poller::{TokenListPoller, unusable_list_reason},
    upstream_validator::{FAILURE_PAUSE, UpstreamValidator},
};
use crate::{
    event_log::EventLog,
    token::{Environment, Grant, Projects, Scope, Token, TokenKind},
    upstream::{
        AdminToken, EnvironmentTokens, Upstream,
        scripted_server::{ReceivedRequest, ScriptedReply, ScriptedServer},
    },
};

const PROBE: &str = "GET /base/api/client/features/";
const VALIDATE: &str = "POST /base/edge/validate";

fn token(text: &str) -> Token {
    Token::parse(text).unwrap()
}

fn grant(environment: &str) -> Grant {
    let scope = Scope { environment: Environment::new(environment), projects: Projects::All };
    Grant { kind: TokenKind::Client, scope }
}

/// A token cache, and a scripted upstream at which tokens are validated.
struct Fixture {
    server: ScriptedServer,
    cache: TokenCache,
    validator: UpstreamValidator,
}

impl Fixture {
    async fn start(
        script: impl Fn(&ReceivedRequest) -> ScriptedReply + Clone + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(None, script).await
    }

    async fn start_with(
        admin: Option<AdminToken>,
        script: impl Fn(&ReceivedRequest) -> ScriptedReply + Clone + Send + Sync + 'static,
    ) -> Self {
        let server = ScriptedServer::start(script).await;
        let upstream = Upstream::new(server.config()).expect("client");
        let credentials = EnvironmentTokens::without_admin();
        Self {
            server,
            cache: TokenCache::new(10_000, Duration::from_secs(30)),
            validator: UpstreamValidator::new(
                upstream,
                admin,
                credentials,
                Arc::default(),
                EventLog::unavailable(),
                None,
            ),
        }
    }

    /// Caches `token` as valid and due for revalidation.
    fn cache(&self, token: &Token, environment: &str) {
        self.cache.record_valid(token, grant(environment), RequestStart::NEVER);
    }

    async fn revalidate_due(&self) -> Duration {
        revalidation::revalidate_due(&self.cache, &self.validator, Duration::ZERO).await
    }

    /// Revalidates once the pause of every single token has passed.
    async fn revalidate(&self) -> Duration {
        tokio::time::pause();
        tokio::time::advance(FAILURE_PAUSE).await;
        tokio::time::resume();
        self.revalidate_due().await
    }

    fn is_valid(&self, token: &Token) -> bool {
        self.cache.valid(&token.digest()).is_some()
    }
}

fn answer(status: u16) -> ScriptedReply {
    (status, &[], r#"{"tokens":[]}"#.to_owned())
}

#[tokio::test]
async fn a_token_stays_valid_while_its_probe_fails_even_if_validation_does_not_know_it() {
    let probe = Arc::new(AtomicU16::new(503));
    let status = Arc::clone(&probe);
    let fixture = Fixture::start(move |request| {
        let is_probe = request.line.starts_with(PROBE);
        answer(if is_probe { status.load(Ordering::Relaxed) } else { 200 })
    })
    .await;
    let used = token("*:dev.used");
    fixture.cache(&used, "dev");
    for _ in 0..3 {
        fixture.revalidate().await;
        assert!(fixture.is_valid(&used));
    }
    assert_eq!((fixture.server.count(VALIDATE), fixture.server.count(PROBE)), (3, 3));
    probe.store(401, Ordering::Relaxed);
    for _ in 0..2 {
        fixture.revalidate().await;
    }
    assert!(!fixture.is_valid(&used), "upstream denies it");
}

#[tokio::test]
async fn tokens_that_cannot_be_validated_delay_no_others() {
    let fixture = Fixture::start(|request| {
        let is_probe = request.line.starts_with(PROBE);
        let token = request.headers.get("authorization").and_then(|it| it.to_str().ok());
        let is_stuck = token.is_some_and(|it| it.starts_with("*:broken."));
        answer(if !is_probe {
            200
        } else if is_stuck {
            503
        } else {
            401
        })
    })
    .await;
    let stuck: Vec<_> = (0..55).map(|n| token(&format!("*:broken.stuck-{n}"))).collect();
    for token in &stuck {
        fixture.cache(token, "broken");
    }
    let revoked = token("*:dev.revoked");
    fixture.cache.record_valid(&revoked, grant("dev"), fixture.cache.start_request());
    for _ in 0..4 {
        let pause = fixture.revalidate().await;
        assert_eq!(pause, revalidation::INTERVAL, "the others are validated meanwhile");
    }
    assert!(!fixture.is_valid(&revoked));
    assert!(stuck.iter().all(|token| fixture.is_valid(token)));
}

#[tokio::test]
async fn revalidation_takes_a_limited_number_of_tokens_per_interval() {
    let fixture =
        Fixture::start(|request| answer(if request.line.starts_with(PROBE) { 404 } else { 200 }))
            .await;
    for n in 0..120 {
        fixture.cache(&token(&format!("*:dev.stale-{n}")), "dev");
    }
    let probes = async || {
        assert_eq!(fixture.revalidate_due().await, revalidation::INTERVAL);
        fixture.server.count(PROBE)
    };
    assert_eq!(
        (probes().await, probes().await),
        (revalidation::MAX_BATCH_LEN, 2 * revalidation::MAX_BATCH_LEN)
    );
}

#[test]
fn an_unreadable_list_is_reported_differently_from_an_empty_one() {
    let why =
        |json| unusable_list_reason(&serde_json::from_str(json).expect("list")).unwrap_or_default();
    assert!(why(r#"{"tokens":[]}"#).starts_with("it is empty"));
    assert_eq!(why(r#"{"tokens":[{"secret":"*:dev.a"},7]}"#), "none of its items can be read");
}

#[tokio::test]
async fn no_token_is_validated_before_retry_after_has_passed() {
    let paused = Arc::new(AtomicBool::new(true));
    let is_paused = Arc::clone(&paused);
    let fixture = Fixture::start(move |request| {
        let is_probe = request.line.starts_with(PROBE);
        if !is_probe && is_paused.load(Ordering::Relaxed) {
            return (429, &[("retry-after", "60")], String::new());
        }
        let token = r#"{"token":"*:dev.new","type":"client","environment":"dev"}"#;
        (if is_probe { 404 } else { 200 }, &[], format!(r#"{{"tokens":[{token}]}}"#))
    })
    .await;
    let used = token("*:dev.used");
    fixture.cache(&used, "dev");
    let pending = PendingValidations::default();
    let validate = async || {
        let answer = pending.enqueue(token("*:dev.new"), Priority::Presented).unwrap();
        tokio::select! {
            answer = answer => answer.unwrap().map(drop),
            () = first_validation::run(&pending, &fixture.cache, &fixture.validator, Duration::from_secs(5)) => unreachable!(),
        }
    };
    for _ in 0..30 {
        assert_eq!(validate().await, Err(AuthError::Unavailable));
    }
    assert!(fixture.revalidate().await > FAILURE_PAUSE);
    assert_eq!(fixture.server.count(VALIDATE), 1);
    paused.store(false, Ordering::Relaxed);
    tokio::time::pause();
    tokio::time::advance(Duration::from_mins(1)).await;
    tokio::time::resume();
    assert_eq!(validate().await, Ok(()));
    fixture.revalidate().await;
    assert_eq!(fixture.server.count(VALIDATE), 3);
}

#[tokio::test]
async fn a_deleted_admin_token_is_refused_while_the_token_list_is_unavailable() {
    let checks = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&checks);
    let admin = AdminToken::new(token("*:*.admin"), None);
    let fixture = Fixture::start_with(Some(admin.clone()), move |request| {
        let is_check = request.line.starts_with("GET /base/api/admin/environments");
        let check = is_check.then(|| count.fetch_add(1, Ordering::Relaxed));
        answer(check.map_or(503, |n| [401, 503, 200, 401, 401, 200][n.min(5)]))
    })
    .await;
    let token_list = TokenListPoller::new(Duration::from_millis(10));
    let mut changes = admin.subscribe();
    let changes = async {
        for (expected, is_refused) in [(5, true), (6, false)] {
            changes.changed().await.expect("the token");
            assert_eq!(checks.load(Ordering::Relaxed), expected);
            assert_eq!(changes.borrow().is_refused(), is_refused);
        }
    };
    tokio::select! {
        () = changes => {}
        () = token_list.run(&fixture.cache, &fixture.validator) => unreachable!(),
    }
}
