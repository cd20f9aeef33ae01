//! Sign-in and sessions.
//!
//! Cookies are random and stored as digests. Sign-in attempts are rate limited by address, by account,
//! and by the pair of both. A browser that has signed in to the account before has a rate limit of its
//! own instead, so that attackers cannot lock the owner out.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use sqlx::Row as _;
use tracing::warn;

use super::{
    account_changes,
    account_queries::{self, Account},
    audit::{self, EventKind, NewEvent},
    cookie_token::{CookieToken, CookieTokenHash},
    database::{Database, WriteLock, now, timestamp_from_millis},
    denial_log::{DenialLog, SignInFailure},
    error::Error,
    operator::{Actor, Operator},
    password::{Hasher, Password},
    session_ref::{SessionLimits, SessionRef},
};
use crate::{
    rate_limit::{KeyedRateLimiter, Rate, client_network},
    telemetry::error_chain,
};

/// Sign-in attempts from one address.
const ADDRESS_RATE: Rate = Rate { burst: 20, interval: Duration::from_secs(3) };
/// Sign-in attempts from one address on one account: the limit of a single attacker.
const ADDRESS_AND_ACCOUNT_RATE: Rate = Rate { burst: 5, interval: Duration::from_secs(15) };
/// Sign-in attempts from all addresses on one account: more than the limit of a single attacker, so that
/// one attacker cannot lock the owner out.
const ACCOUNT_RATE: Rate = Rate { burst: 100, interval: Duration::from_secs(10) };
/// Sign-in attempts from one known browser, independent of all others.
const DEVICE_RATE: Rate = Rate { burst: 10, interval: Duration::from_secs(10) };
/// Attempts to change one's own password.
const OWN_PASSWORD_RATE: Rate = Rate { burst: 5, interval: Duration::from_mins(1) };
/// Requests from one address with a cookie without a session.
const INVALID_COOKIE_RATE: Rate = Rate { burst: 50, interval: Duration::from_secs(1) };

/// The precision of the last use of a session; a quarter of the idle timeout if that is less.
const SEEN_AT_PRECISION: SignedDuration = SignedDuration::from_mins(1);
/// The maximum number of sessions, and separately of known browsers, per account. The oldest are
/// deleted.
const MAX_PER_ACCOUNT: i64 = 20;

/// An attempt to sign in.
#[derive(Clone, Copy, Debug)]
pub struct SignInAttempt<'a> {
    /// The username.
    pub username: &'a str,
    /// The password to check.
    pub password: &'a Password,
    /// The client address.
    pub address: IpAddr,
    /// The device cookie of the request.
    pub device: Option<&'a str>,
}

/// A successful sign-in.
#[derive(Clone, Debug)]
pub struct SignedIn {
    /// The value of the session cookie.
    pub session: CookieToken,
    /// The value of the device cookie, which gives later sign-ins from this browser their own rate
    /// limit.
    pub device: CookieToken,
    /// The account of the session.
    pub account: Account,
}

/// An open session at the time of a request.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its account.
    pub account: Account,
    reference: SessionRef,
}

impl Session {
    /// The account as the operator of requests in this session.
    pub fn operator(&self) -> Operator {
        self.account.operator(self.reference.clone())
    }
}

/// The cause of a request from a browser.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Activity {
    /// An action of the user, which extends the session.
    Interactive,
    /// Polling by an open page, which does not extend the session.
    Background,
}

/// The sessions, and the rate limits of sign-ins.
#[derive(Debug)]
pub(super) struct Sessions {
    database: Database,
    hasher: Hasher,
    limits: SessionLimits,
    by_address: KeyedRateLimiter<IpAddr>,
    by_address_and_account: KeyedRateLimiter<(IpAddr, u64)>,
    by_account: KeyedRateLimiter<u64>,
    by_device: KeyedRateLimiter<String>,
    own_password: KeyedRateLimiter<i64>,
    invalid_cookies: KeyedRateLimiter<IpAddr>,
    /// Hashes usernames to keys of a fixed size for the rate limiters.
    username_hasher: RandomState,
}

/// The outcome of a sign-in attempt that could be checked.
enum SignInOutcome<'a> {
    Success(SignedIn),
    /// The password is wrong, or there is no such account, in which case `username` is `None`.
    WrongPassword {
        username: Option<&'a str>,
    },
}

/// The rate limit permits that an attempt has acquired.
enum AcquiredPermits {
    KnownDevice { selector: String },
    UnknownDevice { from: IpAddr, name: u64 },
}

impl Sessions {
    /// Sessions that end `idle` after their last request, and `lifetime` after they began.
    pub(super) fn new(
        database: Database,
        hasher: Hasher,
        idle: Duration,
        lifetime: Duration,
    ) -> Self {
        let span = |time| SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX);
        Self {
            database,
            hasher,
            limits: SessionLimits { idle: span(idle), lifetime: span(lifetime) },
            by_address: KeyedRateLimiter::new(ADDRESS_RATE),
            by_address_and_account: KeyedRateLimiter::new(ADDRESS_AND_ACCOUNT_RATE),
            by_account: KeyedRateLimiter::new(ACCOUNT_RATE),
            by_device: KeyedRateLimiter::new(DEVICE_RATE),
            own_password: KeyedRateLimiter::new(OWN_PASSWORD_RATE),
            invalid_cookies: KeyedRateLimiter::new(INVALID_COOKIE_RATE),
            username_hasher: RandomState::new(),
        }
    }

    /// Checks a password and begins a session.
    pub(super) async fn sign_in(
        &self,
        attempt: SignInAttempt<'_>,
        refusals: &DenialLog,
    ) -> Result<SignedIn, Error> {
        let device = self.known_device(attempt).await?;
        let paid = match self.acquire(attempt, device) {
            Ok(paid) => paid,
            Err(wait) => {
                refusals.record_sign_in(None, attempt.address, SignInFailure::Throttled).await;
                return Err(Error::RateLimited(wait));
            }
        };
        let judged = self.check_password(attempt).await;
        // Only a wrong guess counts: neither a correct password nor a failure of the database does.
        if !matches!(judged, Ok(SignInOutcome::WrongPassword { .. })) {
            self.refund(&paid);
        }
        match judged? {
            SignInOutcome::Success(signed_in) => Ok(signed_in),
            SignInOutcome::WrongPassword { username } => {
                refusals
                    .record_sign_in(username, attempt.address, SignInFailure::WrongPassword)
                    .await;
                Err(Error::WrongPassword)
            }
        }
    }

    async fn check_password<'a>(
        &self,
        attempt: SignInAttempt<'a>,
    ) -> Result<SignInOutcome<'a>, Error> {
        let found = account_queries::credentials(&self.database, attempt.username).await?;
        let hash = found.as_ref().map(|(_, hash)| hash.as_str());
        let matches = self.hasher.verify(attempt.password, hash).await?;
        if let Some((id, hash)) = found.as_ref().filter(|_| matches)
            && let Some(signed_in) = self.create_session(*id, hash, attempt.address).await?
        {
            return Ok(SignInOutcome::Success(signed_in));
        }
        Ok(SignInOutcome::WrongPassword { username: found.map(|_| attempt.username.trim()) })
    }

    /// Acquires the permits for an attempt; fails with the time to wait.
    fn acquire(
        &self,
        attempt: SignInAttempt<'_>,
        device: Option<CookieTokenHash>,
    ) -> Result<AcquiredPermits, Duration> {
        if let Some(CookieTokenHash { selector, .. }) = device {
            self.by_device.acquire(&selector)?;
            return Ok(AcquiredPermits::KnownDevice { selector });
        }
        let from = client_network(attempt.address);
        let name = self.username_hasher.hash_one(account_queries::username_key(attempt.username));
        self.by_address.acquire(&from)?;
        let pair = (from, name);
        self.by_address_and_account
            .acquire(&pair)
            .inspect_err(|_| self.by_address.refund(&from))?;
        self.by_account.acquire(&name).inspect_err(|_| {
            self.by_address.refund(&from);
            self.by_address_and_account.refund(&pair);
        })?;
        Ok(AcquiredPermits::UnknownDevice { from, name })
    }

    fn refund(&self, paid: &AcquiredPermits) {
        match paid {
            AcquiredPermits::KnownDevice { selector } => self.by_device.refund(selector),
            AcquiredPermits::UnknownDevice { from, name } => {
                self.by_address.refund(from);
                self.by_address_and_account.refund(&(*from, *name));
                self.by_account.refund(name);
            }
        }
    }

    /// Begins a session, unless the password was changed since its `hash` was read.
    async fn create_session(
        &self,
        id: i64,
        hash: &str,
        address: IpAddr,
    ) -> Result<Option<SignedIn>, Error> {
        let (session, device) = (CookieToken::generate(), CookieToken::generate());
        let now = now().as_millisecond();
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        let update =
            sqlx::query("UPDATE accounts SET seen_at = $1 WHERE id = $2 AND password = $3");
        let update = update.bind(now).bind(id).bind(hash).execute(&mut *transaction).await?;
        if update.rows_affected() == 0 {
            return Ok(None);
        }
        let Some(account) = account_queries::find(&mut transaction, id).await? else {
            return Ok(None);
        };
        let kept = session.hash();
        sqlx::query(
            "INSERT INTO sessions (selector, digest, account_id, created_at, seen_at) \
             VALUES ($1, $2, $3, $4, $4)",
        )
        .bind(&kept.selector)
        .bind(&kept.digest)
        .bind(id)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        let kept = device.hash();
        sqlx::query(
            "INSERT INTO devices (selector, digest, account_id, created_at) \
             VALUES ($1, $2, $3, $4)",
        )
        .bind(&kept.selector)
        .bind(&kept.digest)
        .bind(id)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        for delete_oldest in [
            "DELETE FROM sessions WHERE account_id = $1 AND selector NOT IN (SELECT selector \
             FROM sessions WHERE account_id = $1 ORDER BY created_at DESC, selector LIMIT $2)",
            "DELETE FROM devices WHERE account_id = $1 AND selector NOT IN (SELECT selector \
             FROM devices WHERE account_id = $1 ORDER BY created_at DESC, selector LIMIT $2)",
        ] {
            sqlx::query(delete_oldest)
                .bind(id)
                .bind(MAX_PER_ACCOUNT)
                .execute(&mut *transaction)
                .await?;
        }
        let author = account.author(address);
        audit::record_by(&mut transaction, &author, EventKind::UserSignedIn, NewEvent::default())
            .await?;
        transaction.commit().await?;
        Ok(Some(SignedIn { session, device, account }))
    }

    /// The open session of a cookie.
    pub(super) async fn find(
        &self,
        cookie: &str,
        address: IpAddr,
        cause: Activity,
    ) -> Result<Option<Session>, Error> {
        if let Some(kept) = CookieTokenHash::parse(cookie)
            && let Some(session) = self.find_open(kept, cause).await?
        {
            return Ok(Some(session));
        }
        self.invalid_cookies.acquire(&client_network(address)).map_err(Error::RateLimited)?;
        Ok(None)
    }

    async fn find_open(
        &self,
        kept: CookieTokenHash,
        cause: Activity,
    ) -> Result<Option<Session>, Error> {
        let mut connection = self.database.connection().await?;
        let row = sqlx::query("SELECT * FROM sessions WHERE selector = $1").bind(&kept.selector);
        let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
        let limits = self.limits;
        if limits.is_exceeded_by(&row)? || !kept.matches(row.try_get("digest")?) {
            return Ok(None);
        }
        let (now, seen) = (now(), timestamp_from_millis(row.try_get("seen_at")?));
        if cause == Activity::Interactive
            && now.duration_since(seen) >= SEEN_AT_PRECISION.min(limits.idle / 4)
        {
            let touch = sqlx::query("UPDATE sessions SET seen_at = $1 WHERE selector = $2");
            let touch = touch.bind(now.as_millisecond()).bind(&kept.selector);
            // A full disk must not prevent reading.
            if let Err(error) = touch.execute(&mut *connection).await {
                warn!(error = error_chain(&error), "The last use of a session could not be stored");
            }
        }
        let account = account_queries::find(&mut connection, row.try_get("account_id")?).await?;
        let reference = SessionRef { selector: kept.selector, limits };
        Ok(account.map(|account| Session { account, reference }))
    }

    /// Ends the session of a cookie, if there is one.
    pub(super) async fn sign_out(&self, cookie: &str, address: IpAddr) -> Result<(), Error> {
        let Some(kept) = CookieTokenHash::parse(cookie) else { return Ok(()) };
        let Some(session) = self.find_open(kept, Activity::Interactive).await? else {
            return Ok(());
        };
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        let delete = sqlx::query("DELETE FROM sessions WHERE selector = $1");
        delete.bind(session.reference.selector()).execute(&mut *transaction).await?;
        let author = session.account.author(address);
        audit::record_by(&mut transaction, &author, EventKind::UserSignedOut, NewEvent::default())
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Deletes sessions that have ended.
    pub(super) async fn prune(&self) -> Result<(), Error> {
        let before = |age| {
            Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH).as_millisecond()
        };
        sqlx::query("DELETE FROM sessions WHERE seen_at < $1 OR created_at < $2")
            .bind(before(self.limits.idle))
            .bind(before(self.limits.lifetime))
            .execute(&mut *self.database.connection().await?)
            .await?;
        Ok(())
    }

    /// Sets the actor's own password, if `current` is correct, and ends all of its sessions except the
    /// current one.
    pub(super) async fn change_password(
        &self,
        actor: &Actor,
        current: &Password,
        new: &Password,
    ) -> Result<(), Error> {
        let Operator::Account { account_id, ref session, .. } = actor.operator else {
            return Err(Error::WrongPassword);
        };
        self.own_password.acquire(&account_id).map_err(Error::RateLimited)?;
        let changed = self.replace_own_password(actor, (account_id, session), current, new).await;
        // As for sign-ins: only a wrong guess counts.
        if !matches!(changed, Err(Error::WrongPassword)) {
            self.own_password.refund(&account_id);
        }
        changed
    }

    async fn replace_own_password(
        &self,
        actor: &Actor,
        (id, session): (i64, &SessionRef),
        current: &Password,
        new: &Password,
    ) -> Result<(), Error> {
        let compared = self.verify_own_password(id, current).await?;
        let hash = self.hasher.hash(new).await?;
        // If an admin has set another password since the comparison, that one stays.
        let own = (id, session);
        let changed =
            account_changes::set_own_password(&self.database, actor, own, &compared, &hash);
        changed.await?.map(drop).ok_or(Error::WrongPassword)
    }

    /// The password hash of account `id`. Fails unless it matches `password`.
    async fn verify_own_password(&self, id: i64, password: &Password) -> Result<String, Error> {
        let hash = account_queries::password_hash(&self.database, id).await?;
        let matches = self.hasher.verify(password, hash.as_deref()).await?;
        hash.filter(|_| matches).ok_or(Error::WrongPassword)
    }

    /// The hash of an attempt's device cookie, if the browser is known for the account.
    async fn known_device(
        &self,
        attempt: SignInAttempt<'_>,
    ) -> Result<Option<CookieTokenHash>, Error> {
        let Some(kept) = attempt.device.and_then(CookieTokenHash::parse) else { return Ok(None) };
        let digest: Option<String> = sqlx::query_scalar(
            "SELECT devices.digest FROM devices JOIN accounts ON accounts.id = devices.account_id \
             WHERE selector = $1 AND username_key = $2",
        )
        .bind(&kept.selector)
        .bind(account_queries::username_key(attempt.username))
        .fetch_optional(&mut *self.database.connection().await?)
        .await?;
        Ok(digest.is_some_and(|digest| kept.matches(&digest)).then_some(kept))
    }
}
