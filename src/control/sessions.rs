//! Signing in and staying so.
//!
//! Cookies are random, and kept as digests. Who tries too often waits: by address, by account, and
//! by both together; a browser from which somebody has signed in before waits for its own attempts
//! only, so that nobody can lock an owner out.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use sqlx::{Row as _, any::AnyRow};
use tracing::warn;

use super::{
    accounts::{self, Account},
    audit::{self, Entry, EventKind},
    database::{Connection, Database, Lane, now, of_millis},
    error::Error,
    password::{Hasher, Password},
    permission::{Actor, Operator},
    refusals::{Reason, Refusals},
    secret::{Kept, Secret},
};
use crate::{
    telemetry::report,
    throttle::{Buckets, Rate, origin},
};

/// Attempts from one address.
const BY_ADDRESS: Rate = Rate { burst: 20, every: Duration::from_secs(3) };
/// Attempts from one address on one account: what one guesser gets.
const BY_PAIR: Rate = Rate { burst: 5, every: Duration::from_secs(15) };
/// Attempts from anywhere on one account: more than one guesser gets, so that no single one can
/// keep the owner out.
const BY_ACCOUNT: Rate = Rate { burst: 100, every: Duration::from_secs(10) };
/// Attempts from one known browser, whatever others do.
const BY_DEVICE: Rate = Rate { burst: 10, every: Duration::from_secs(10) };
/// Attempts to change one's own password.
const OWN_PASSWORD: Rate = Rate { burst: 5, every: Duration::from_mins(1) };
/// Cookies from one address that open nothing.
const STRANGERS: Rate = Rate { burst: 50, every: Duration::from_secs(1) };

/// How exact the last use of a session is, where a quarter of the idle time is not less.
const TOUCH: SignedDuration = SignedDuration::from_mins(1);
/// How many sessions, and apart from them how many browsers, an account may have; older ones go.
const PER_ACCOUNT: i64 = 20;

/// An attempt to sign in.
#[derive(Clone, Copy, Debug)]
pub struct SignIn<'a> {
    /// The account's name.
    pub username: &'a str,
    /// Its password, perhaps.
    pub password: &'a Password,
    /// Where the attempt comes from.
    pub address: IpAddr,
    /// The device cookie that came with it.
    pub device: Option<&'a str>,
}

/// A successful one.
#[derive(Clone, Debug)]
pub struct SignedIn {
    /// The value of the session cookie.
    pub session: Secret,
    /// The value of the device cookie, which lets its holder try again when others are throttled.
    pub device: Secret,
    /// Whose session it is.
    pub account: Account,
}

/// An open session, as a request has found it.
#[derive(Clone, Debug)]
pub struct Session {
    /// Whose it is.
    pub account: Account,
    reference: SessionRef,
}

impl Session {
    /// The account as somebody who acts in this session.
    pub fn operator(&self) -> Operator {
        self.account.operator(self.reference.clone())
    }
}

/// Names a session, by the public half of its cookie, which opens nothing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRef {
    selector: String,
    limits: Limits,
}

impl SessionRef {
    /// Where the session is found in the database.
    pub(super) fn selector(&self) -> &str {
        &self.selector
    }

    /// Fails unless this is an open session of the account `id`, as `transaction` sees it.
    pub(super) async fn require_open(
        &self,
        transaction: &mut Connection,
        id: i64,
    ) -> Result<(), Error> {
        let row = sqlx::query("SELECT * FROM sessions WHERE selector = $1 AND account_id = $2")
            .bind(&self.selector)
            .bind(id)
            .fetch_optional(transaction)
            .await?;
        match row {
            Some(row) if !self.limits.exceeded_by(&row)? => Ok(()),
            _ => Err(Error::SessionEnded),
        }
    }

    /// One that names nothing.
    #[cfg(test)]
    pub(super) fn example() -> Self {
        let limits = Limits { idle: SignedDuration::MAX, lifetime: SignedDuration::MAX };
        Self { selector: String::new(), limits }
    }
}

/// When sessions end by themselves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Limits {
    /// After this time without a request.
    idle: SignedDuration,
    /// After this time in any case.
    lifetime: SignedDuration,
}

impl Limits {
    /// Whether the session of a row has ended by now.
    fn exceeded_by(self, row: &AnyRow) -> Result<bool, sqlx::Error> {
        let age = |column| -> Result<_, sqlx::Error> {
            Ok(now().duration_since(of_millis(row.try_get(column)?)))
        };
        Ok(age("seen_at")? > self.idle || age("created_at")? > self.lifetime)
    }
}

/// What made a browser ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// Somebody who is there.
    Person,
    /// A page that looks for news by itself: its session ends as if it did not.
    Page,
}

/// Open sessions, and who may try to open one.
#[derive(Debug)]
pub(super) struct Sessions {
    database: Database,
    hasher: Hasher,
    limits: Limits,
    by_address: Buckets<IpAddr>,
    by_pair: Buckets<(IpAddr, u64)>,
    by_account: Buckets<u64>,
    by_device: Buckets<String>,
    own_password: Buckets<i64>,
    strangers: Buckets<IpAddr>,
    /// Usernames come in all lengths; what is kept of them in buckets does not.
    names: RandomState,
}

/// The outcome of an attempt that could be judged.
enum Judged<'a> {
    Right(SignedIn),
    /// The password is wrong, or there is no such account; then there is no `username`.
    Wrong {
        username: Option<&'a str>,
    },
}

/// The buckets that an attempt was taken from.
enum Paid {
    Known { selector: String },
    Stranger { from: IpAddr, name: u64 },
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
            limits: Limits { idle: span(idle), lifetime: span(lifetime) },
            by_address: Buckets::new(BY_ADDRESS),
            by_pair: Buckets::new(BY_PAIR),
            by_account: Buckets::new(BY_ACCOUNT),
            by_device: Buckets::new(BY_DEVICE),
            own_password: Buckets::new(OWN_PASSWORD),
            strangers: Buckets::new(STRANGERS),
            names: RandomState::new(),
        }
    }

    /// Begins a session for whoever has the password.
    pub(super) async fn sign_in(
        &self,
        attempt: SignIn<'_>,
        refusals: &Refusals,
    ) -> Result<SignedIn, Error> {
        let device = self.device(attempt).await?;
        let paid = match self.pay(attempt, device) {
            Ok(paid) => paid,
            Err(wait) => {
                refusals.sign_in(None, attempt.address, Reason::Throttled).await;
                return Err(Error::Throttled(wait));
            }
        };
        let judged = self.judge(attempt).await;
        // Nothing was guessed where the password was right, or where the database kept it from being
        // judged.
        if !matches!(judged, Ok(Judged::Wrong { .. })) {
            self.pay_back(&paid);
        }
        match judged? {
            Judged::Right(signed_in) => Ok(signed_in),
            Judged::Wrong { username } => {
                refusals.sign_in(username, attempt.address, Reason::WrongPassword).await;
                Err(Error::WrongPassword)
            }
        }
    }

    async fn judge<'a>(&self, attempt: SignIn<'a>) -> Result<Judged<'a>, Error> {
        let found = accounts::credentials(&self.database, attempt.username).await?;
        let hash = found.as_ref().map(|(_, hash)| hash.as_str());
        let matches = self.hasher.verify(attempt.password, hash).await?;
        if let Some((id, hash)) = found.as_ref().filter(|_| matches)
            && let Some(signed_in) = self.begin(*id, hash, attempt.address).await?
        {
            return Ok(Judged::Right(signed_in));
        }
        Ok(Judged::Wrong { username: found.map(|_| attempt.username.trim()) })
    }

    /// Takes an attempt from the buckets that it belongs to, or says when it may be made.
    fn pay(&self, attempt: SignIn<'_>, device: Option<Kept>) -> Result<Paid, Duration> {
        if let Some(Kept { selector, .. }) = device {
            self.by_device.take(&selector)?;
            return Ok(Paid::Known { selector });
        }
        let from = origin(attempt.address);
        let name = self.names.hash_one(accounts::key_of(attempt.username));
        self.by_address.take(&from)?;
        let pair = (from, name);
        self.by_pair.take(&pair).inspect_err(|_| self.by_address.give_back(&from))?;
        self.by_account.take(&name).inspect_err(|_| {
            self.by_address.give_back(&from);
            self.by_pair.give_back(&pair);
        })?;
        Ok(Paid::Stranger { from, name })
    }

    fn pay_back(&self, paid: &Paid) {
        match paid {
            Paid::Known { selector } => self.by_device.give_back(selector),
            Paid::Stranger { from, name } => {
                self.by_address.give_back(from);
                self.by_pair.give_back(&(*from, *name));
                self.by_account.give_back(name);
            }
        }
    }

    /// Begins a session, unless the password was changed since its `hash` was read.
    async fn begin(&self, id: i64, hash: &str, address: IpAddr) -> Result<Option<SignedIn>, Error> {
        let (session, device) = (Secret::generate(), Secret::generate());
        let now = now().as_millisecond();
        let mut transaction = self.database.write(Lane::Control).await?;
        let update =
            sqlx::query("UPDATE accounts SET seen_at = $1 WHERE id = $2 AND password = $3");
        let update = update.bind(now).bind(id).bind(hash).execute(&mut *transaction).await?;
        if update.rows_affected() == 0 {
            return Ok(None);
        }
        let Some(account) = accounts::find(&mut transaction, id).await? else { return Ok(None) };
        let kept = session.kept();
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
        let kept = device.kept();
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
        for forget in [
            "DELETE FROM sessions WHERE account_id = $1 AND selector NOT IN (SELECT selector \
             FROM sessions WHERE account_id = $1 ORDER BY created_at DESC, selector LIMIT $2)",
            "DELETE FROM devices WHERE account_id = $1 AND selector NOT IN (SELECT selector \
             FROM devices WHERE account_id = $1 ORDER BY created_at DESC, selector LIMIT $2)",
        ] {
            sqlx::query(forget).bind(id).bind(PER_ACCOUNT).execute(&mut *transaction).await?;
        }
        let author = account.author(address);
        audit::record_by(&mut transaction, &author, EventKind::UserSignedIn, Entry::default())
            .await?;
        transaction.commit().await?;
        Ok(Some(SignedIn { session, device, account }))
    }

    /// The session that a cookie opens.
    pub(super) async fn find(
        &self,
        cookie: &str,
        address: IpAddr,
        cause: Cause,
    ) -> Result<Option<Session>, Error> {
        if let Some(kept) = Kept::of(cookie)
            && let Some(session) = self.open_session(kept, cause).await?
        {
            return Ok(Some(session));
        }
        self.strangers.take(&origin(address)).map_err(Error::Throttled)?;
        Ok(None)
    }

    async fn open_session(&self, kept: Kept, cause: Cause) -> Result<Option<Session>, Error> {
        let mut connection = self.database.connection().await?;
        let row = sqlx::query("SELECT * FROM sessions WHERE selector = $1").bind(&kept.selector);
        let Some(row) = row.fetch_optional(&mut *connection).await? else { return Ok(None) };
        let limits = self.limits;
        if limits.exceeded_by(&row)? || !kept.proves(row.try_get("digest")?) {
            return Ok(None);
        }
        let (now, seen) = (now(), of_millis(row.try_get("seen_at")?));
        if cause == Cause::Person && now.duration_since(seen) >= TOUCH.min(limits.idle / 4) {
            let touch = sqlx::query("UPDATE sessions SET seen_at = $1 WHERE selector = $2");
            let touch = touch.bind(now.as_millisecond()).bind(&kept.selector);
            // A disk without room keeps nobody from reading.
            if let Err(error) = touch.execute(&mut *connection).await {
                warn!(error = report(&error), "The use of a session could not be written down");
            }
        }
        let account = accounts::find(&mut connection, row.try_get("account_id")?).await?;
        let reference = SessionRef { selector: kept.selector, limits };
        Ok(account.map(|account| Session { account, reference }))
    }

    /// Ends the session of a cookie, if it is one.
    pub(super) async fn sign_out(&self, cookie: &str, address: IpAddr) -> Result<(), Error> {
        let Some(kept) = Kept::of(cookie) else { return Ok(()) };
        let Some(session) = self.open_session(kept, Cause::Person).await? else { return Ok(()) };
        let mut transaction = self.database.write(Lane::Control).await?;
        let delete = sqlx::query("DELETE FROM sessions WHERE selector = $1");
        delete.bind(session.reference.selector()).execute(&mut *transaction).await?;
        let author = session.account.author(address);
        audit::record_by(&mut transaction, &author, EventKind::UserSignedOut, Entry::default())
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Forgets sessions that are over.
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

    /// Sets the actor's own password, if `current` is it, and ends its sessions except the one in
    /// which it acts.
    pub(super) async fn change_password(
        &self,
        actor: &Actor,
        current: &Password,
        new: &Password,
    ) -> Result<(), Error> {
        let Operator::Account { id, ref session, .. } = actor.operator else {
            return Err(Error::WrongPassword);
        };
        self.own_password.take(&id).map_err(Error::Throttled)?;
        let changed = self.replace_own(actor, (id, session), current, new).await;
        // As for sign-ins: a failure of the database is no guess.
        if !matches!(changed, Err(Error::WrongPassword)) {
            self.own_password.give_back(&id);
        }
        changed
    }

    async fn replace_own(
        &self,
        actor: &Actor,
        (id, session): (i64, &SessionRef),
        current: &Password,
        new: &Password,
    ) -> Result<(), Error> {
        let compared = self.verify_own(id, current).await?;
        let hash = self.hasher.hash(new).await?;
        // An admin may have set another password since the comparison: that one stays.
        let own = (id, session);
        let changed = accounts::set_own_password(&self.database, actor, own, &compared, &hash);
        changed.await?.map(drop).ok_or(Error::WrongPassword)
    }

    /// The hash of the password of account `id`, which is that of `password`.
    async fn verify_own(&self, id: i64, password: &Password) -> Result<String, Error> {
        let hash = accounts::hash_of(&self.database, id).await?;
        let matches = self.hasher.verify(password, hash.as_deref()).await?;
        hash.filter(|_| matches).ok_or(Error::WrongPassword)
    }

    /// The known browser that an attempt comes from, if it is one of its account's.
    async fn device(&self, attempt: SignIn<'_>) -> Result<Option<Kept>, Error> {
        let Some(kept) = attempt.device.and_then(Kept::of) else { return Ok(None) };
        let digest: Option<String> = sqlx::query_scalar(
            "SELECT devices.digest FROM devices JOIN accounts ON accounts.id = devices.account_id \
             WHERE selector = $1 AND username_key = $2",
        )
        .bind(&kept.selector)
        .bind(accounts::key_of(attempt.username))
        .fetch_optional(&mut *self.database.connection().await?)
        .await?;
        Ok(digest.is_some_and(|digest| kept.proves(&digest)).then_some(kept))
    }
}
