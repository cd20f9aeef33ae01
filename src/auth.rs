//! Who may read: verdicts on tokens, cached.
//!
//! A token with a verdict is answered from memory. Only a first-seen token waits, for one question
//! that all requests with it share, put together with those about other tokens, at a bounded rate
//! and with a deadline. Upstream being away changes no verdict that was reached before.
//!
//! This module does not know which route wants which kind of token; it says what a token grants.

mod given;
mod queue;
#[cfg(test)]
mod tests;
mod verdicts;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use tokio::{sync::Notify, time::Instant};
use tracing::{info, warn};

use self::{
    given::Given,
    queue::{Behalf, Queue},
    verdicts::{Accepted, Rejected, RequestStart, Verdicts},
};
pub use self::{
    queue::Denied,
    verdicts::{RestoreError, Verdict},
};
use crate::{
    telemetry::report,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    upstream::{Access, AdminToken, Credentials, Upstream},
    wire::tokens::{ListedSecret, TokenList, Validated},
};

/// How verdicts are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// How old a valid verdict may become before upstream is asked again.
    pub revalidate_after: Duration,
    /// How long an invalid verdict is believed.
    pub forget_invalid_after: Duration,
    /// How often upstream's token list is read (with an admin token).
    pub list_interval: Duration,
    /// The longest that a request waits for the verdict on a first-seen token.
    pub deadline: Duration,
    /// How many valid verdicts, and apart from them how many invalid ones, are kept.
    pub capacity: u64,
}

/// A request's token, admitted.
#[derive(Clone, Debug)]
pub struct Admission {
    /// What it allows.
    pub grant: Arc<Grant>,
    /// The token.
    pub digest: TokenDigest,
    /// Whether this request is the first of this process to present it.
    pub first_seen: bool,
}

/// What is known of a token without asking.
enum Known {
    /// A verdict.
    Judged(Result<Admission, Denied>),
    /// A valid one of an earlier process, to which nobody has presented the token since.
    FirstSeen(Arc<Verdict>, TokenDigest),
    /// Nothing.
    Not(Token, TokenDigest),
}

/// Who vouches for tokens that are not known here.
#[derive(Debug)]
pub enum Authority {
    /// Nobody: the given tokens are all there are.
    Nobody,
    /// Upstream.
    Upstream(Box<Issuer>),
}

/// Upstream as an authority.
#[derive(Debug)]
pub struct Issuer {
    /// Where to ask.
    pub upstream: Upstream,
    /// Opens upstream's token list.
    pub admin: Option<AdminToken>,
    /// Is offered each valid client token, where the edge has none of its own.
    pub credentials: Credentials,
    /// Is told when such an offer widened what can be fetched.
    pub discovered: Arc<Notify>,
}

/// Judges tokens. A cheap handle.
#[derive(Clone, Debug)]
pub struct Authenticator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    authority: Authority,
    /// Tokens that nobody needs to vouch for.
    given: Given,
    verdicts: Verdicts,
    queue: Queue,
    tally: Tally,
    /// Told when upstream's list is to be read before its time.
    relist: Notify,
    /// Whether upstream has not answered what it was asked last about tokens.
    unanswered: AtomicBool,
    /// Whether upstream's token list could not be read when it was asked for last.
    is_list_unread: AtomicBool,
    /// Until when upstream wants not to be asked about tokens.
    ask_not_before: Mutex<Instant>,
}

impl Authenticator {
    /// Judges by `given` tokens, what `authority` says, and what it said before.
    pub fn new(
        config: Config,
        authority: Authority,
        given: impl IntoIterator<Item = (TokenDigest, Grant)>,
    ) -> Self {
        Self(Arc::new(Inner {
            verdicts: Verdicts::new(config.capacity, config.forget_invalid_after),
            given: Given::new(given),
            queue: Queue::default(),
            tally: Tally::new(),
            relist: Notify::new(),
            unanswered: AtomicBool::new(false),
            is_list_unread: AtomicBool::new(false),
            ask_not_before: Mutex::new(Instant::now()),
            authority,
            config,
        }))
    }

    /// Judges the token of an authorization header, with or without `Bearer`.
    ///
    /// Awaits for a first-seen token only, at most for the configured deadline. Dropping the future
    /// is safe: the question that it waited for is still settled for others.
    pub async fn authenticate(&self, header: &str) -> Result<Admission, Denied> {
        self.admit(header, Behalf::Bearer).await
    }

    /// The same for a token that was presented before; `None` for others, which may have to be waited for.
    pub fn authenticate_known(&self, header: &str) -> Option<Result<Admission, Denied>> {
        match self.recall(header) {
            Known::Judged(verdict) => Some(verdict),
            Known::FirstSeen(..) | Known::Not(..) => None,
        }
    }

    async fn admit(&self, header: &str, behalf: Behalf) -> Result<Admission, Denied> {
        match self.recall(header) {
            Known::Judged(verdict) => verdict,
            Known::FirstSeen(verdict, digest) => {
                self.0.tally.known.increment(1);
                self.0.learn(&verdict, header);
                Ok(Admission { grant: Arc::clone(verdict.grant()), digest, first_seen: true })
            }
            Known::Not(token, digest) => self.ask(token, digest, behalf).await,
        }
    }

    /// What is known of the token of an authorization header.
    fn recall(&self, header: &str) -> Known {
        let inner = &*self.0;
        let digest = TokenDigest::of(Token::bare(header));
        if let Some(grant) = inner.given.admit(&digest) {
            inner.tally.known.increment(1);
            return Known::Judged(Ok(Admission { grant, digest, first_seen: false }));
        }
        if let Some(verdict) = inner.verdicts.valid(&digest) {
            if verdict.wants_plaintext() {
                return Known::FirstSeen(verdict, digest);
            }
            inner.tally.known.increment(1);
            let grant = Arc::clone(verdict.grant());
            return Known::Judged(Ok(Admission { grant, digest, first_seen: false }));
        }
        if let Some(denied) = inner.verdicts.refusal(&digest) {
            inner.tally.refused.increment(1);
            return Known::Judged(Err(denied));
        }
        let Ok(token) = Token::from_header(header) else {
            inner.tally.malformed.increment(1);
            return Known::Judged(Err(Denied::Unknown));
        };
        if inner.verdicts.is_revoked_by_selector(&token) {
            inner.tally.refused.increment(1);
            return Known::Judged(Err(Denied::Unknown));
        }
        Known::Not(token, digest)
    }

    /// What a token that was admitted before allows now, if it still holds; being looked at counts as
    /// its use.
    pub fn standing(&self, digest: &TokenDigest) -> Option<Arc<Grant>> {
        let verdict = || Some(Arc::clone(self.0.verdicts.valid(digest)?.grant()));
        self.0.given.admit(digest).or_else(verdict)
    }

    /// Replaces the given tokens: from here on these are admitted, and no others of them.
    ///
    /// Work for as many tokens as there are; requests meanwhile see the former ones.
    pub fn set_given(&self, given: impl IntoIterator<Item = (TokenDigest, Grant)>) {
        self.0.given.replace(given);
    }

    /// The given tokens that were presented since the last call.
    pub fn take_used(&self) -> Vec<TokenDigest> {
        self.0.given.take_used()
    }

    /// Judges tokens for somebody else, another edge for instance: in the order given, `None` for
    /// those that are not valid. Those whose use is forbidden are, as upstream says of them.
    pub async fn judge(&self, tokens: &[Token]) -> Result<Vec<Option<Arc<Grant>>>, Denied> {
        let judged = tokens.iter().map(|token| async {
            match self.admit(token.expose(), Behalf::Other).await {
                Ok(admission) => Ok(Some(admission.grant)),
                Err(Denied::Unknown) => Ok(None),
                Err(Denied::Forbidden) => {
                    let grant = self.0.verdicts.forbidden(&token.digest());
                    grant.map(Some).ok_or(Denied::Unavailable)
                }
                Err(Denied::Unavailable) => Err(Denied::Unavailable),
            }
        });
        futures_util::future::join_all(judged).await.into_iter().collect()
    }

    async fn ask(
        &self,
        token: Token,
        digest: TokenDigest,
        behalf: Behalf,
    ) -> Result<Admission, Denied> {
        let inner = &*self.0;
        if matches!(inner.authority, Authority::Nobody) {
            inner.tally.refused.increment(1);
            return Err(Denied::Unknown);
        }
        let Some(answer) = inner.queue.join(token, behalf) else {
            inner.tally.unavailable.increment(1);
            return Err(Denied::Unavailable);
        };
        let answer = match tokio::time::timeout(inner.config.deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(Denied::Unavailable),
        };
        match &answer {
            Ok(_) => inner.tally.accepted.increment(1),
            Err(Denied::Unknown | Denied::Forbidden) => inner.tally.rejected.increment(1),
            Err(Denied::Unavailable) => inner.tally.unavailable.increment(1),
        }
        answer.map(|grant| Admission { grant, digest, first_seen: true })
    }

    /// Asks the authority what is to be asked, until dropped: about first-seen tokens as they come,
    /// about known ones when their verdicts are due, and for its list at the interval.
    pub async fn run(&self) {
        let Authority::Upstream(issuer) = &self.0.authority else {
            return std::future::pending().await;
        };
        tokio::join!(
            self.0.ask_about_first_seen(issuer),
            self.0.revalidate(issuer),
            self.0.follow_list(issuer),
        );
    }

    /// Takes note that upstream has just deleted the token that is `named` so: it is refused from
    /// here on, before upstream's list or its caches tell.
    pub fn withdraw(&self, named: &ListedSecret) {
        let digests = self.0.verdicts.withdraw(named);
        if let Authority::Upstream(issuer) = &self.0.authority {
            for digest in &digests {
                issuer.credentials.withdraw(digest);
            }
        }
        self.0.relist.notify_one();
    }

    /// Takes note that upstream has just made or changed a token: its list is read again, and the
    /// token that is `named` so is asked for again.
    pub fn reconsider(&self, named: Option<&ListedSecret>) {
        if let Some(named) = named {
            self.0.verdicts.suspect(named);
        }
        self.0.relist.notify_one();
    }

    /// Forgets what upstream has said of a token that the operator has given and takes back. It is no
    /// credential any more; whoever presents it is asked about as if it came for the first time.
    pub fn forget(&self, token: &TokenDigest) {
        self.0.verdicts.forget(token);
        if let Authority::Upstream(issuer) = &self.0.authority {
            issuer.credentials.withdraw(token);
            issuer.discovered.notify_one();
        }
    }

    /// The verdicts to be stored, if they changed since the last call.
    pub fn save(&self) -> Option<Vec<u8>> {
        self.0.verdicts.save()
    }

    /// Says that what [`Authenticator::save`] gave could not be stored.
    pub fn not_saved(&self) {
        self.0.verdicts.not_saved();
    }

    /// Takes over what an earlier process saved; tells how many verdicts there were.
    pub fn restore(&self, saved: &[u8]) -> Result<usize, RestoreError> {
        let count = self.0.verdicts.restore(saved)?;
        if let Authority::Upstream(issuer) = &self.0.authority {
            for (digest, verdict) in self.0.verdicts.all_valid_by_digest() {
                issuer.credentials.expect(digest, verdict.grant());
            }
        }
        Ok(count)
    }

    /// Takes over a verdict that was reached elsewhere, in another edge's backup for instance.
    pub fn import(&self, token: &Token, grant: &Grant) {
        let accepted = self.0.verdicts.accept(token, grant.clone(), RequestStart::NEVER);
        if matches!(accepted, Accepted::New | Accepted::Known) {
            self.0.offer(token, grant);
        }
    }

    /// Every valid verdict, for the operator's eyes.
    pub fn verdicts(&self) -> Vec<Arc<Verdict>> {
        self.0.verdicts.all_valid()
    }

    /// What each given token allows, for the operator's eyes.
    pub fn given(&self) -> Vec<Arc<Grant>> {
        self.0.given.grants()
    }

    /// How many tokens are refused without asking at the moment.
    pub fn refused_count(&self) -> u64 {
        self.0.verdicts.refused_count()
    }
}

/// The questions of one batch begin this long after its first token came, so that a fleet which
/// starts at once is asked for together.
const GATHER: Duration = Duration::from_millis(3);

/// The most questions about first-seen tokens: so many at once, then so many a second.
const BURST: f64 = 20.0;
const PER_SECOND: f64 = 10.0;

/// How often due verdicts are looked for, and how long nobody looks after upstream did not answer,
/// nor after a probe failed for the token that was probed.
const REVALIDATION_STEP: Duration = Duration::from_secs(1);
const REVALIDATION_PAUSE: Duration = Duration::from_secs(15);

/// How often it is looked whether the edge serves another environment of listed tokens by now.
const SERVED_STEP: Duration = Duration::from_secs(1);

/// How long after a known token was denied it is asked for again, before that is believed.
const DOUBT: Duration = Duration::from_secs(5);

/// How many known tokens are asked about in a second, at the most.
const REVALIDATION_RATE: usize = 50;

/// How many tokens are probed at a time.
const PROBES_AT_ONCE: usize = 8;

impl Inner {
    /// A token whose digest is known from an earlier process, presented again.
    fn learn(&self, verdict: &Verdict, header: &str) {
        if let Ok(token) = Token::from_header(header) {
            self.offer(&token, verdict.grant());
            verdict.learn(token);
        }
    }

    fn offer(&self, token: &Token, grant: &Grant) {
        if let Authority::Upstream(issuer) = &self.authority
            && grant.kind == TokenKind::Client
            && issuer.credentials.offer(token, grant)
        {
            issuer.discovered.notify_one();
        }
    }

    async fn ask_about_first_seen(&self, issuer: &Issuer) {
        self.queue.abandon();
        let mut allowance = Allowance::new(Instant::now());
        loop {
            self.queue.wait().await;
            tokio::time::sleep(GATHER).await;
            if self.pause_left().is_none() {
                allowance.one().await;
            }
            let tokens = self.queue.take();
            self.settle(issuer, &tokens).await;
        }
    }

    /// Asks about `tokens` and tells those who wait.
    async fn settle(&self, issuer: &Issuer, tokens: &[Token]) {
        let Validation { start, mut judged, .. } = self.judge(issuer, tokens).await;
        for token in tokens {
            let digest = token.digest();
            let fallback = match judged.remove(&digest) {
                Some(Judgement::Valid(grant)) => self.accept(token, grant, start),
                Some(Judgement::Forbidden(grant)) => {
                    self.verdicts.forbid(token, grant, start);
                    Err(Denied::Forbidden)
                }
                Some(Judgement::Invalid) => {
                    self.verdicts.refuse(token, start);
                    Err(Denied::Unknown)
                }
                None => Err(Denied::Unavailable),
            };
            // Something newer may be known by now; a full cache may have no room for the verdict.
            let answer = self.verdicts.known(token).unwrap_or(fallback);
            self.queue.settle(&digest, &answer);
        }
    }

    /// Keeps that upstream calls a token valid.
    fn accept(
        &self,
        token: &Token,
        grant: Grant,
        start: RequestStart,
    ) -> Result<Arc<Grant>, Denied> {
        let grant = Arc::new(grant);
        match self.verdicts.accept(token, (*grant).clone(), start) {
            Accepted::New | Accepted::Known => {
                self.offer(token, &grant);
                Ok(grant)
            }
            Accepted::Outdated | Accepted::Revoked => Err(Denied::Unknown),
        }
    }

    /// Asks again about verdicts that are due; nothing changes while upstream does not answer.
    ///
    /// With a token list that is read regularly that is seldom. While it cannot be read, tokens are
    /// asked about as often as the list should be.
    ///
    /// A denial counts when it is repeated: one answer of an upstream that is not itself, an empty
    /// list of valid tokens for instance, denies nobody.
    async fn revalidate(&self, issuer: &Issuer) {
        let mut pause = REVALIDATION_STEP;
        loop {
            tokio::time::sleep(pause).await;
            pause = self.revalidate_due(issuer).await;
        }
    }

    /// Asks once about verdicts that are due; returns the pause before the next time.
    ///
    /// Tokens that cannot be judged wait on their own, and others meanwhile take their turn.
    async fn revalidate_due(&self, issuer: &Issuer) -> Duration {
        let due = self.take_due();
        if due.is_empty() {
            return REVALIDATION_STEP;
        }
        let Validation { start, mut judged, is_answered, retry_after } =
            self.judge(issuer, &due).await;
        for token in &due {
            match judged.remove(&token.digest()) {
                Some(Judgement::Valid(grant)) => {
                    let accepted = self.verdicts.accept(token, grant.clone(), start);
                    // What it allows has changed.
                    if accepted == Accepted::New {
                        self.offer(token, &grant);
                    }
                }
                Some(Judgement::Forbidden(grant)) => {
                    self.verdicts.forbid(token, grant, start);
                }
                Some(Judgement::Invalid) => match self.verdicts.deny(token, start) {
                    Rejected::Doubted => self.verdicts.postpone(&token.digest(), DOUBT),
                    // Believed for a short time only: should upstream have been wrong, the
                    // token is asked for again as soon as that is over.
                    Rejected::Refused => {
                        info!(token = %token.masked(), "A token is no longer valid");
                        issuer.credentials.withdraw(&token.digest());
                    }
                    Rejected::Outdated => {}
                },
                None => {}
            }
        }
        let pause = if is_answered { REVALIDATION_STEP } else { REVALIDATION_PAUSE };
        pause.max(retry_after.unwrap_or_default())
    }

    /// Takes the tokens to be asked about again.
    fn take_due(&self) -> Vec<Token> {
        let Config { revalidate_after, list_interval, .. } = self.config;
        let age = if self.is_list_unread.load(Ordering::Relaxed) {
            list_interval.min(revalidate_after)
        } else {
            revalidate_after
        };
        self.verdicts.take_unconfirmed_for(age, REVALIDATION_RATE)
    }

    /// What upstream says of `tokens`; those of which it says nothing at the moment are left out.
    ///
    /// One that validates must be admitted as well: upstream's word on a deleted token stays good
    /// for long, and a list tells of no token that came and went between two readings. A known one
    /// that does not validate is denied unless it is admitted: upstream remembers for minutes that
    /// it did not know a token, and the list may have told of it since.
    async fn judge(&self, issuer: &Issuer, tokens: &[Token]) -> Validation {
        let start = self.verdicts.start_request();
        if let Some(pause) = self.pause_left() {
            return Validation::unanswered(start, Some(pause));
        }
        let valid = match issuer.upstream.validate(tokens).await {
            Ok(valid) => valid,
            Err(error) => {
                if !self.unanswered.swap(true, Ordering::Relaxed) {
                    warn!(
                        error = report(&error),
                        "Cannot ask upstream about tokens; those that are new get a 503"
                    );
                }
                let retry_after = error.retry().wish();
                self.pause_for(retry_after);
                return Validation::unanswered(start, retry_after);
            }
        };
        if self.unanswered.swap(false, Ordering::Relaxed) {
            info!("Upstream answers about tokens again");
        }
        // Upstream has no say about tokens that were not asked for.
        let mut judged: HashMap<_, _> =
            tokens.iter().map(|token| (token.digest(), Judgement::Invalid)).collect();
        let valid = valid.into_iter().filter(|it| judged.contains_key(&it.token.digest()));
        let mut probed: HashMap<_, _> = valid.map(|it| (it.token.digest(), (it, true))).collect();
        for token in tokens {
            if let Some(known) = self.verdicts.valid(&token.digest()) {
                let grant = Grant::clone(known.grant());
                let known = Validated { token: token.clone(), grant };
                probed.entry(token.digest()).or_insert((known, false));
            }
        }
        let probes: Vec<_> = stream::iter(probed)
            .map(|(digest, (Validated { token, grant }, is_validated))| async move {
                let access = issuer.upstream.admits(&token, grant.kind).await;
                (digest, grant, is_validated, access)
            })
            .buffer_unordered(PROBES_AT_ONCE)
            .collect()
            .await;
        let mut retry_after = None;
        for (digest, grant, is_validated, access) in probes {
            match access {
                Ok(Access::Granted) => drop(judged.insert(digest, Judgement::Valid(grant))),
                Ok(Access::Forbidden) if is_validated => {
                    judged.insert(digest, Judgement::Forbidden(grant));
                }
                Ok(Access::Forbidden | Access::Unknown) => {}
                Err(error) => {
                    let wish = error.retry().wish();
                    // One environment that fails is no reason to leave all of upstream alone.
                    if error.is_crowded() {
                        retry_after = retry_after.max(wish);
                    }
                    let pause = wish.unwrap_or_default().max(REVALIDATION_PAUSE);
                    self.verdicts.postpone(&digest, pause);
                    judged.remove(&digest);
                }
            }
        }
        self.pause_for(retry_after);
        Validation { start, judged, is_answered: true, retry_after }
    }

    /// Asks upstream about no token before `pause` is over.
    fn pause_for(&self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            let until = Instant::now() + pause;
            let mut not_before = self.ask_not_before.lock().unwrap_or_else(PoisonError::into_inner);
            *not_before = until.max(*not_before);
        }
    }

    /// For how long upstream is still to be asked about no token.
    fn pause_left(&self) -> Option<Duration> {
        let not_before = *self.ask_not_before.lock().unwrap_or_else(PoisonError::into_inner);
        not_before.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    async fn follow_list(&self, issuer: &Issuer) {
        let Some(admin) = &issuer.admin else { return std::future::pending().await };
        let unreadable_items = unreadable_items();
        let mut step = tokio::time::interval(self.config.list_interval);
        step.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut not_before = Instant::now();
        let mut is_complete = true;
        let mut unserved = BTreeSet::new();
        let mut admin_check = AdminCheck::default();
        loop {
            tokio::select! {
                _ = step.tick() => {}
                () = self.relist.notified() => {}
                () = serves_one_of(&issuer.credentials, &unserved) => {}
            }
            unserved.clear();
            tokio::time::sleep_until(not_before).await;
            let start = self.verdicts.start_request();
            let list = match issuer.upstream.api_tokens(admin).await {
                Ok(list) => list,
                Err(error) => {
                    if let Some(retry_after) = error.retry().wish() {
                        not_before = Instant::now() + retry_after;
                    }
                    self.list_is_unread(&report(&error));
                    // That has been noted as the refusal of the admin token.
                    let is_refusal = error.status().is_some_and(|it| it.as_u16() == 401);
                    if !is_refusal && admin_check.is_in_doubt(&issuer.upstream, admin).await {
                        step.reset_after(self.config.list_interval.min(DOUBT));
                    }
                    continue;
                }
            };
            admin_check = AdminCheck::default();
            let unreadable = list.unreadable.len();
            unreadable_items.set(f64::from(u32::try_from(unreadable).unwrap_or(u32::MAX)));
            if let Some(why) = why_unusable(&list) {
                self.list_is_unread(why);
                continue;
            }
            if self.is_list_unread.swap(false, Ordering::Relaxed) {
                info!("Upstream's token list is read again");
            }
            if std::mem::replace(&mut is_complete, unreadable == 0) && unreadable > 0 {
                warn!(
                    unreadable,
                    "Some items of upstream's token list cannot be read; tokens that they may stand for are asked about one by one"
                );
            }
            let served = issuer.credentials.environments();
            let changes = self.verdicts.take_list(&list, &served, start);
            unserved.extend(list.tokens.into_iter().map(|it| it.environment));
            unserved.retain(|it| !served.contains(it));
            if changes.learned + changes.revoked > 0 {
                info!(changes.learned, changes.revoked, "Upstream's tokens changed");
            }
        }
    }

    /// Has tokens asked about one by one, because the list cannot be read.
    fn list_is_unread(&self, why: &str) {
        if !self.is_list_unread.swap(true, Ordering::Relaxed) {
            warn!(
                error = why,
                "Cannot read upstream's token list; known tokens are asked about one by one"
            );
        }
    }
}

/// Finds out whether upstream refuses the admin token while it does not answer with its token list.
#[derive(Debug, Default)]
struct AdminCheck {
    /// The token that upstream did not know the last time.
    denied: Option<Arc<Token>>,
    /// The token that was refused because of this.
    refused: Option<Arc<Token>>,
}

impl AdminCheck {
    /// Asks whether upstream's admin API knows the token; true if that is to be asked again soon.
    ///
    /// A denial counts when it is repeated. An answer after that takes it back.
    async fn is_in_doubt(&mut self, upstream: &Upstream, admin: &AdminToken) -> bool {
        let token = admin.current();
        match upstream.admits(&token, TokenKind::Admin).await {
            Ok(Access::Unknown) if self.denied.as_ref() == Some(&token) => {
                admin.refuse(&token);
                self.refused = Some(token);
                false
            }
            Ok(Access::Unknown) => {
                self.denied = Some(token);
                true
            }
            Ok(Access::Granted) => {
                self.denied = None;
                if self.refused.take().as_ref() == Some(&token) {
                    admin.accept(&token);
                }
                false
            }
            Ok(Access::Forbidden) | Err(_) => false,
        }
    }
}

/// Waits until the edge has a token of one of these environments.
async fn serves_one_of(credentials: &Credentials, unserved: &BTreeSet<Environment>) {
    if unserved.is_empty() {
        return std::future::pending().await;
    }
    while credentials.environments().is_disjoint(unserved) {
        tokio::time::sleep(SERVED_STEP).await;
    }
}

/// Why a list that was read revokes no token, if so: the edge's own token is on it, so a list
/// without any token is a fault and no revocation of all.
fn why_unusable(list: &TokenList) -> Option<&'static str> {
    if !list.tokens.is_empty() {
        None
    } else if list.unreadable.is_empty() {
        Some("it is empty, although it was read with a token of it")
    } else {
        Some("none of its items can be read")
    }
}

/// What upstream says of tokens.
#[derive(Debug)]
struct Validation {
    start: RequestStart,
    judged: HashMap<TokenDigest, Judgement>,
    /// Whether upstream has answered; it may still have judged none.
    is_answered: bool,
    /// How long upstream wants to be left alone.
    retry_after: Option<Duration>,
}

impl Validation {
    /// Upstream says nothing.
    fn unanswered(start: RequestStart, retry_after: Option<Duration>) -> Self {
        Self { start, judged: HashMap::new(), is_answered: false, retry_after }
    }
}

/// What an issuer says of a token.
#[derive(Debug)]
enum Judgement {
    Valid(Grant),
    Forbidden(Grant),
    Invalid,
}

/// How many items of upstream's token list cannot be read.
fn unreadable_items() -> Gauge {
    const NAME: &str = "parapet_token_list_items_unreadable";
    describe_gauge!(
        NAME,
        "Items of upstream's token list that cannot be read, at its last reading"
    );
    gauge!(NAME)
}

/// A token bucket for questions.
struct Allowance {
    left: f64,
    as_of: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, as_of: now }
    }

    /// Returns when one more question may be asked.
    async fn one(&mut self) {
        loop {
            let now = Instant::now();
            let earned = now.duration_since(self.as_of).as_secs_f64() * PER_SECOND;
            self.left = (self.left + earned).min(BURST);
            self.as_of = now;
            if self.left >= 1.0 {
                self.left -= 1.0;
                return;
            }
            tokio::time::sleep(Duration::from_secs_f64((1.0 - self.left) / PER_SECOND)).await;
        }
    }
}

/// Counters of what became of presented tokens.
#[derive(Debug)]
struct Tally {
    known: Counter,
    refused: Counter,
    malformed: Counter,
    accepted: Counter,
    rejected: Counter,
    unavailable: Counter,
}

impl Tally {
    fn new() -> Self {
        const NAME: &str = "parapet_token_verdicts_total";
        describe_counter!(
            NAME,
            "Tokens presented, by verdict: known and refused are answered from memory, accepted and \
             rejected by upstream, malformed by their form, unavailable not at all"
        );
        let of = |verdict: &'static str| counter!(NAME, "verdict" => verdict);
        Self {
            known: of("known"),
            refused: of("refused"),
            malformed: of("malformed"),
            accepted: of("accepted"),
            rejected: of("rejected"),
            unavailable: of("unavailable"),
        }
    }
}
