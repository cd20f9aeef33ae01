//! Polls upstream's list of all its tokens, and applies it to the token cache.
//!
//! The list shows created, changed and deleted tokens without a request for each; it needs an admin
//! token. While upstream's event log is read, the list is requested when it changed; otherwise at its
//! interval. While it is unavailable, this module checks whether upstream still accepts that token.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use metrics::{Gauge, describe_gauge, gauge};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    token_cache::TokenCache,
    upstream_validator::{RECHECK_DELAY, UpstreamValidator},
};
use crate::{
    event_log::{RECONCILE_INTERVAL, next_list_at},
    protocol::tokens::TokenList,
    telemetry::error_chain,
    token::{Environment, Token, TokenKind},
    upstream::{AdminToken, EnvironmentTokens, TokenAccess, Upstream},
};

/// The interval at which is checked whether the edge now serves a further environment of listed tokens.
const SERVED_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Polls upstream's token list.
#[derive(Debug)]
pub(super) struct TokenListPoller {
    interval: Duration,
    /// Requests a poll before the next interval.
    refresh: Notify,
    /// Whether the latest poll failed.
    is_unavailable: AtomicBool,
}

impl TokenListPoller {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, refresh: Notify::new(), is_unavailable: AtomicBool::new(false) }
    }

    /// Polls the list before the next interval.
    pub(super) fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// The age at which cached tokens are validated one by one, because no list confirms them;
    /// [`Duration::MAX`] while the list is available.
    pub(super) fn max_unconfirmed_age(&self) -> Duration {
        if self.is_unavailable.load(Ordering::Relaxed) { self.interval } else { Duration::MAX }
    }

    /// Polls the list when it changed, at its interval while that is unknown, when one of its tokens
    /// expires and when [`refresh`](Self::refresh) is called, until dropped.
    pub(super) async fn run(&self, cache: &TokenCache, validator: &UpstreamValidator) {
        let Some(admin) = &validator.admin else { return std::future::pending().await };
        let unreadable_items = unreadable_items_gauge();
        let mut event_log = validator.event_log.clone();
        let mut schedule = Schedule::At(Instant::now());
        let mut not_before = Instant::now();
        let mut is_complete = true;
        let mut unserved = BTreeSet::new();
        let mut admin_check = AdminTokenCheck::default();
        loop {
            loop {
                let next = match schedule {
                    Schedule::At(time) => time,
                    Schedule::AfterList { started, expiry } => {
                        // Without jitter, because the interval limits how long a revoked token is accepted.
                        let intervals = (self.interval, RECONCILE_INTERVAL);
                        let next = next_list_at(event_log.tokens(), started, intervals, 0.5);
                        expiry.map_or(next, |expiry| next.min(expiry))
                    }
                };
                tokio::select! {
                    () = sleep_until(next) => break,
                    () = self.refresh.notified() => break,
                    () = wait_until_served(&validator.credentials, &unserved) => break,
                    // The next list may be due sooner or later now.
                    () = event_log.updated() => {}
                }
            }
            unserved.clear();
            sleep_until(not_before).await;
            let started = Instant::now();
            schedule = Schedule::At(started + self.interval);
            let start = cache.start_request();
            let list = match validator.upstream.list_api_tokens(admin).await {
                Ok(list) => list,
                Err(error) => {
                    if let Some(retry_after) = error.retry().retry_after() {
                        not_before = Instant::now() + retry_after;
                    }
                    self.report_unavailable(&error_chain(&error));
                    // The client has already recorded a 401 as a rejection of the admin token.
                    let is_refusal = error.status().is_some_and(|it| it.as_u16() == 401);
                    if !is_refusal && admin_check.needs_recheck(&validator.upstream, admin).await {
                        schedule = Schedule::At(Instant::now() + self.interval.min(RECHECK_DELAY));
                    }
                    continue;
                }
            };
            admin_check = AdminTokenCheck::default();
            let unreadable = list.unreadable.len();
            unreadable_items.set(f64::from(u32::try_from(unreadable).unwrap_or(u32::MAX)));
            if let Some(why) = unusable_list_reason(&list) {
                self.report_unavailable(why);
                continue;
            }
            if self.is_unavailable.swap(false, Ordering::Relaxed) {
                info!("Upstream's token list is read again");
            }
            if std::mem::replace(&mut is_complete, unreadable == 0) && unreadable > 0 {
                warn!(
                    unreadable,
                    "Some items of upstream's token list cannot be read; the tokens they may stand \
                     for are validated one by one"
                );
            }
            let served = validator.credentials.environments();
            let changes = cache.apply_token_list(&list, &served, start);
            // A token that was never listed is not known to be revoked when it is missing: until upstream
            // itself rejects it, each list has it validated again.
            if changes.marked_stale == 0 {
                let expiry = next_expiry(&list, started, start.wall);
                schedule = Schedule::AfterList { started, expiry };
            }
            unserved.extend(list.tokens.into_iter().map(|it| it.environment));
            unserved.retain(|it| !served.contains(it));
            if changes.learned + changes.revoked > 0 {
                info!(changes.learned, changes.revoked, "Upstream's tokens changed");
            }
        }
    }

    /// Switches to revalidation of single tokens because the list is unavailable.
    fn report_unavailable(&self, why: &str) {
        if !self.is_unavailable.swap(true, Ordering::Relaxed) {
            warn!(
                error = why,
                "Upstream's token list could not be read; known tokens are validated one by one"
            );
        }
    }
}

/// When to poll the list.
#[derive(Clone, Copy, Debug)]
enum Schedule {
    /// At this time.
    At(Instant),
    /// Some time after a list that was requested at `started`, and at the latest when one of its tokens
    /// expires, which upstream does not log.
    AfterList { started: Instant, expiry: Option<Instant> },
}

/// When the next token of a list expires that was requested at `started`, which was `wall` by the clock.
fn next_expiry(list: &TokenList, started: Instant, wall: Timestamp) -> Option<Instant> {
    let times = list.tokens.iter().filter(|it| !it.is_expired(wall)).filter_map(|it| it.expires_at);
    let remaining = Duration::try_from(times.min()?.duration_since(wall)).ok()?;
    started.checked_add(remaining)
}

/// Checks whether upstream rejects the admin token while its token list is unavailable.
#[derive(Debug, Default)]
struct AdminTokenCheck {
    /// The token that upstream did not know at the previous check.
    denied: Option<Arc<Token>>,
    /// The token that was marked as refused by this check.
    refused: Option<Arc<Token>>,
}

impl AdminTokenCheck {
    /// Checks whether upstream's admin API knows the token; true if the check is to be repeated soon.
    ///
    /// The token is marked as refused after two denials in a row. A later success reverts that.
    async fn needs_recheck(&mut self, upstream: &Upstream, admin: &AdminToken) -> bool {
        let token = admin.current();
        match upstream.probe_access(&token, TokenKind::Admin).await {
            Ok(TokenAccess::Unauthorized) if self.denied.as_ref() == Some(&token) => {
                admin.mark_refused(&token);
                self.refused = Some(token);
                false
            }
            Ok(TokenAccess::Unauthorized) => {
                self.denied = Some(token);
                true
            }
            Ok(TokenAccess::Granted) => {
                self.denied = None;
                if self.refused.take().as_ref() == Some(&token) {
                    admin.mark_accepted(&token);
                }
                false
            }
            Ok(TokenAccess::Forbidden) | Err(_) => false,
        }
    }
}

/// Waits until the edge has a token of one of these environments.
async fn wait_until_served(credentials: &EnvironmentTokens, unserved: &BTreeSet<Environment>) {
    if unserved.is_empty() {
        return std::future::pending().await;
    }
    while credentials.environments().is_disjoint(unserved) {
        tokio::time::sleep(SERVED_CHECK_INTERVAL).await;
    }
}

/// Why a token list must be ignored, if it must: it always contains the edge's own admin token, so an
/// empty list is a fault and does not revoke all tokens.
pub(super) fn unusable_list_reason(list: &TokenList) -> Option<&'static str> {
    if !list.tokens.is_empty() {
        None
    } else if list.unreadable.is_empty() {
        Some("it is empty, although it must contain the admin token it was read with")
    } else {
        Some("none of its items can be read")
    }
}

fn unreadable_items_gauge() -> Gauge {
    const NAME: &str = "parapet_token_list_items_unreadable";
    describe_gauge!(
        NAME,
        "Items of upstream's token list that cannot be read, at its last reading"
    );
    gauge!(NAME)
}
