//! Polls upstream's list of all its tokens, and applies it to the token cache.
//!
//! The list shows created, changed and deleted tokens without a request for each; it needs an admin
//! token. While upstream's event log is read, the list is requested when it changed; otherwise at its
//! interval. While it is unavailable, this module checks whether upstream still accepts that token.
//!
//! In a fleet one instance requests it, and the others apply what that one shares, as of the time of its
//! request. If they do not get a confirmation in time, the list counts as unavailable.

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
    shared_token_list::{ListEvent, SharedTokenList},
    token_cache::{ListChanges, TokenCache, TokenListing},
    upstream_validator::{RECHECK_DELAY, UpstreamValidator},
};
use crate::{
    backoff::jittered,
    event_log::{Observed, RECONCILE_INTERVAL, next_list_at},
    fleet::{Coordinator, Topic},
    protocol::tokens::TokenList,
    telemetry::error_chain,
    token::{Environment, Token, TokenKind},
    upstream::{AdminToken, EnvironmentTokens, TokenAccess, Upstream},
};

/// The interval at which is checked whether the edge now serves a further environment of listed tokens.
const SERVED_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How much longer than the interval the confirmation of a shared list may take: another instance may have
/// to lead first.
const MAX_SHARING_DELAY: Duration = Duration::from_secs(15);

/// How often an instance checks by itself whether upstream still accepts the admin token, while it gets no
/// list from the leader.
const FOLLOWER_CHECK_INTERVAL: Duration = Duration::from_secs(30);

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
        let Some(fleet) = &validator.fleet else {
            return self.keep_current(cache, validator, admin, SharedTokenList::Single).await;
        };
        let (member, coordinator) = fleet.join(Topic::Tokens);
        let shared = SharedTokenList::member(member);
        tokio::select! {
            () = self.keep_current(cache, validator, admin, shared) => {}
            // Neither of these ends.
            () = Coordinator::run(coordinator) => {}
        }
    }

    async fn keep_current(
        &self,
        cache: &TokenCache,
        validator: &UpstreamValidator,
        admin: &AdminToken,
        mut shared: SharedTokenList,
    ) {
        let mut list = PolledList::new(unreadable_items_gauge());
        let mut event_log = validator.event_log.clone();
        loop {
            if !shared.uses_upstream() {
                self.follow(cache, validator, admin, &mut list, &mut shared).await;
            }
            let next = list.next_poll(event_log.tokens(), self.interval);
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.refresh.notified() => {}
                () = wait_until_served(&validator.credentials, &list.unserved) => {}
                // The next list may be due sooner or later now.
                () = event_log.updated() => {
                    if let Some(at) = list.confirmed_by(event_log.tokens()) {
                        shared.on_confirmed(at);
                    }
                    continue;
                }
                event = shared.next_event() => {
                    // A list that this instance reads itself is newer.
                    let is_foreign = matches!(event, ListEvent::Listing(..));
                    self.on_event(event, cache, validator, &mut list);
                    if is_foreign {
                        list.schedule = Schedule::At(Instant::now());
                    }
                    continue;
                }
            }
            self.poll(cache, validator, admin, &mut list, &mut shared).await;
        }
    }

    /// Applies the lists that another instance shares, until this one has to poll.
    async fn follow(
        &self,
        cache: &TokenCache,
        validator: &UpstreamValidator,
        admin: &AdminToken,
        list: &mut PolledList,
        shared: &mut SharedTokenList,
    ) {
        let started = Instant::now();
        let mut next_admin_check = started;
        while !shared.uses_upstream() {
            let confirmed_at = list.shared.as_ref().map_or(started, |(_, at)| started.max(*at));
            let deadline = confirmed_at + self.interval + MAX_SHARING_DELAY;
            let is_late = self.is_unavailable.load(Ordering::Relaxed);
            tokio::select! {
                event = shared.next_event() => self.on_event(event, cache, validator, list),
                () = wait_until_served(&validator.credentials, &list.unserved) => {
                    if let Some((listing, at)) = list.shared.clone() {
                        self.apply(&listing, at, cache, validator, list);
                    }
                }
                // An operator has changed a token by this instance.
                () = self.refresh.notified() => {
                    list.schedule = Schedule::At(Instant::now());
                    return;
                }
                () = sleep_until(deadline), if !is_late => {
                    self.report_unavailable("the fleet's leader has not confirmed it in time");
                    next_admin_check = Instant::now() + jittered(RECHECK_DELAY, rand::random());
                }
                // Only the leader sees that upstream rejects its requests for the list.
                () = sleep_until(next_admin_check), if is_late => {
                    let is_denied = list.admin_check.needs_recheck(&validator.upstream, admin).await;
                    let delay = if is_denied { RECHECK_DELAY } else { FOLLOWER_CHECK_INTERVAL };
                    next_admin_check = Instant::now() + jittered(delay, rand::random());
                }
            }
        }
    }

    fn on_event(
        &self,
        event: ListEvent,
        cache: &TokenCache,
        validator: &UpstreamValidator,
        list: &mut PolledList,
    ) {
        match event {
            ListEvent::Begin => {
                list.failures = 0;
                list.schedule = Schedule::At(Instant::now());
            }
            ListEvent::End => {}
            ListEvent::Listing(listing, at) => {
                // Upstream has not confirmed it since its leader started: it may be old.
                let Some(at) = at else { return };
                list.shared = Some((Arc::clone(&listing), at));
                self.apply(&listing, at, cache, validator, list);
            }
            ListEvent::Confirmed(at) => {
                let Some((listing, confirmed_at)) = &mut list.shared else { return };
                *confirmed_at = at;
                let listing = Arc::clone(listing);
                self.apply(&listing, at, cache, validator, list);
            }
        }
    }

    /// Applies a list that another instance has requested.
    fn apply(
        &self,
        listing: &TokenListing,
        at: Instant,
        cache: &TokenCache,
        validator: &UpstreamValidator,
        list: &mut PolledList,
    ) {
        if list.applied.is_some_and(|applied| at < applied) {
            return;
        }
        list.applied = Some(at);
        self.on_available();
        list.record_unreadable(listing.unreadable_count());
        let served = validator.credentials.environments();
        let changes = cache.apply_token_list(listing, &served, cache.request_started_at(at));
        list.set_unserved(listing, &served);
        log_changes(changes);
    }

    /// Requests the list once, and applies it.
    async fn poll(
        &self,
        cache: &TokenCache,
        validator: &UpstreamValidator,
        admin: &AdminToken,
        list: &mut PolledList,
        shared: &mut SharedTokenList,
    ) {
        list.unserved.clear();
        sleep_until(list.not_before).await;
        let started = Instant::now();
        list.schedule = Schedule::At(started + self.interval);
        let start = cache.start_request();
        let tokens = match validator.upstream.list_api_tokens(admin).await {
            Ok(tokens) => tokens,
            Err(error) => {
                if let Some(retry_after) = error.retry().retry_after() {
                    list.not_before = Instant::now() + retry_after;
                }
                self.report_unavailable(&error_chain(&error));
                list.failures += 1;
                shared.on_failed(list.failures);
                // The client has already recorded a 401 as a rejection of the admin token.
                let is_refusal = error.status().is_some_and(|it| it.as_u16() == 401);
                if !is_refusal && list.admin_check.needs_recheck(&validator.upstream, admin).await {
                    let delay = self.interval.min(RECHECK_DELAY);
                    list.schedule = Schedule::At(Instant::now() + delay);
                }
                return;
            }
        };
        list.admin_check = AdminTokenCheck::default();
        if let Some(why) = unusable_list_reason(&tokens) {
            list.unreadable_items
                .set(f64::from(u32::try_from(tokens.unreadable.len()).unwrap_or(u32::MAX)));
            self.report_unavailable(why);
            return;
        }
        self.on_available();
        list.failures = 0;
        list.applied = Some(started);
        let listing = TokenListing::new(&tokens, start.wall);
        list.record_unreadable(listing.unreadable_count());
        let served = validator.credentials.environments();
        let changes = cache.apply_token_list(&listing, &served, start);
        // A token that was never listed is not known to be revoked when it is missing: until upstream
        // itself rejects it, each list has it validated again.
        if changes.marked_stale == 0 {
            let expiry = next_expiry(&tokens, started, start.wall);
            list.schedule = Schedule::AfterList { started, expiry };
        }
        list.set_unserved(&listing, &served);
        shared.on_listed(&listing, started);
        log_changes(changes);
    }

    fn on_available(&self) {
        if self.is_unavailable.swap(false, Ordering::Relaxed) {
            info!("Upstream's token list is read again");
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

/// The state of polling the list.
#[derive(Debug)]
struct PolledList {
    schedule: Schedule,
    /// The number of polls in a row that failed.
    failures: u32,
    /// No poll before this time (`Retry-After` of upstream).
    not_before: Instant,
    /// Environments of listed tokens that the edge does not serve yet.
    unserved: BTreeSet<Environment>,
    /// When the request of the list that was applied last has started. An older list would revoke what was
    /// created since.
    applied: Option<Instant>,
    /// The list of another instance, and when upstream confirmed it.
    shared: Option<(Arc<TokenListing>, Instant)>,
    admin_check: AdminTokenCheck,
    unreadable_items: Gauge,
    is_complete: bool,
}

impl PolledList {
    fn new(unreadable_items: Gauge) -> Self {
        let now = Instant::now();
        Self {
            schedule: Schedule::At(now),
            failures: 0,
            not_before: now,
            unserved: BTreeSet::new(),
            applied: None,
            shared: None,
            admin_check: AdminTokenCheck::default(),
            unreadable_items,
            is_complete: true,
        }
    }

    fn next_poll(&self, observed: Option<Observed>, interval: Duration) -> Instant {
        match self.schedule {
            Schedule::At(time) => time,
            Schedule::AfterList { started, expiry } => {
                // Without jitter, because the interval limits how long a revoked token is accepted.
                let intervals = (interval, RECONCILE_INTERVAL);
                let next = next_list_at(observed, started, intervals, 0.5);
                expiry.map_or(next, |expiry| next.min(expiry))
            }
        }
    }

    /// When the event log has shown that the list has not changed, if it has.
    fn confirmed_by(&self, observed: Option<Observed>) -> Option<Instant> {
        let Observed { changed_at, checked_at } = observed?;
        match self.schedule {
            Schedule::AfterList { started, .. } if changed_at <= started => Some(checked_at),
            Schedule::AfterList { .. } | Schedule::At(_) => None,
        }
    }

    fn record_unreadable(&mut self, unreadable: usize) {
        self.unreadable_items.set(f64::from(u32::try_from(unreadable).unwrap_or(u32::MAX)));
        if std::mem::replace(&mut self.is_complete, unreadable == 0) && unreadable > 0 {
            warn!(
                unreadable,
                "Some items of upstream's token list cannot be read; the tokens they may stand for are \
                 validated one by one"
            );
        }
    }

    fn set_unserved(&mut self, listing: &TokenListing, served: &BTreeSet<Environment>) {
        self.unserved = listing.environments().filter(|it| !served.contains(it)).cloned().collect();
    }
}

fn log_changes(changes: ListChanges) {
    if changes.learned + changes.revoked > 0 {
        info!(changes.learned, changes.revoked, "Upstream's tokens changed");
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
