//! Signing in and staying so.
//!
//! Cookies are random, and kept as digests. Who tries too often waits: by address, by account, and
//! by both together; a browser from which somebody has signed in before waits for its own attempts
//! only, so that nobody can lock an owner out.

use std::{net::IpAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};
use sqlx::{AnyConnection, Row as _};

use super::{
    accounts::{self, Account},
    audit::{self, Entry, EventKind},
    database::{Database, Lane, now, of_millis},
    error::Error,
    password::{Hasher, Password},
    permission::{Actor, Operator},
    secret::{Kept, Secret},
    throttle::{Buckets, Rate, origin},
};

/// How often sign-ins may be tried from one address.
const BY_ADDRESS: Rate = Rate { burst: 20, every: Duration::from_secs(3) };
/// How often to one account from one address.
const BY_PAIR: Rate = Rate { burst: 5, every: Duration::from_secs(10) };
/// How often to one account from anywhere.
const BY_ACCOUNT: Rate = Rate { burst: 50, every: Duration::from_secs(2) };
/// How often from one known browser.
const BY_DEVICE: Rate = Rate { burst: 10, every: Duration::from_secs(10) };
/// How often one address may present cookies that open nothing.
const STRANGERS: Rate = Rate { burst: 50, every: Duration::from_secs(1) };
/// How often refusals are written down, so that a flood of them does not fill the disk.
const RECORDED: Rate = Rate { burst: 100, every: Duration::from_secs(1) };

/// How exact the last use of a session is.
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

/// Open sessions, and who may try to open one.
#[derive(Debug)]
pub(super) struct Sessions {
    database: Database,
    hasher: Hasher,
    idle: SignedDuration,
    lifetime: SignedDuration,
    by_address: Buckets<IpAddr>,
    by_pair: Buckets<(IpAddr, String)>,
    by_account: Buckets<String>,
    by_device: Buckets<String>,
    strangers: Buckets<IpAddr>,
    recorded: Buckets<()>,
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
            idle: span(idle),
            lifetime: span(lifetime),
            by_address: Buckets::new(BY_ADDRESS),
            by_pair: Buckets::new(BY_PAIR),
            by_account: Buckets::new(BY_ACCOUNT),
            by_device: Buckets::new(BY_DEVICE),
            strangers: Buckets::new(STRANGERS),
            recorded: Buckets::new(RECORDED),
        }
    }

    /// Begins a session for whoever has the password.
    pub(super) async fn sign_in(&self, attempt: SignIn<'_>) -> Result<SignedIn, Error> {
        let from = origin(attempt.address);
        let name = accounts::key_of(&attempt.username.chars().take(256).collect::<String>());
        let known = accounts::credentials(&self.database, &name).await?;
        let device = self.device(attempt.device, known.as_ref().map(|it| it.0)).await?;
        if let Some(device) = &device {
            self.by_device.take(&device.selector).map_err(Error::Throttled)?;
        } else {
            self.by_address.take(&from).map_err(Error::Throttled)?;
            self.by_pair.take(&(from, name.clone())).map_err(Error::Throttled)?;
            self.by_account.take(&name).map_err(Error::Throttled)?;
        }
        let hash = known.as_ref().map(|(_, hash)| hash.as_str());
        if !self.hasher.verify(attempt.password, hash).await? {
            self.record_refusal(known.map(|it| it.0), attempt.address).await?;
            return Err(Error::WrongPassword);
        }
        if let Some(device) = &device {
            self.by_device.give_back(&device.selector);
        } else {
            self.by_address.give_back(&from);
            self.by_pair.give_back(&(from, name.clone()));
            self.by_account.give_back(&name);
        }
        let (id, _) = known.ok_or(Error::WrongPassword)?;
        self.begin(id, attempt.address).await
    }

    async fn begin(&self, id: i64, address: IpAddr) -> Result<SignedIn, Error> {
        let (session, device) = (Secret::generate(), Secret::generate());
        let now = now().as_millisecond();
        let mut transaction = self.database.write(Lane::Control).await?;
        sqlx::query("UPDATE accounts SET seen_at = $1 WHERE id = $2")
            .bind(now)
            .bind(id)
            .execute(&mut *transaction)
            .await?;
        let account = accounts::find(&mut transaction, id).await?.ok_or(Error::WrongPassword)?;
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
        let actor = Actor { operator: account.operator(), address: Some(address) };
        audit::record(&mut transaction, &actor, EventKind::UserSignedIn, Entry::default()).await?;
        transaction.commit().await?;
        Ok(SignedIn { session, device, account })
    }

    /// Whose session a cookie opens.
    pub(super) async fn find(
        &self,
        cookie: &str,
        address: IpAddr,
    ) -> Result<Option<Account>, Error> {
        if let Some(kept) = Kept::of(cookie)
            && let Some(account) = self.open_session(&kept).await?
        {
            return Ok(Some(account));
        }
        self.strangers.take(&origin(address)).map_err(Error::Throttled)?;
        Ok(None)
    }

    async fn open_session(&self, kept: &Kept) -> Result<Option<Account>, Error> {
        let row = sqlx::query("SELECT * FROM sessions WHERE selector = $1").bind(&kept.selector);
        let Some(row) = row.fetch_optional(self.database.pool()).await? else { return Ok(None) };
        let (created, seen) =
            (of_millis(row.try_get("created_at")?), of_millis(row.try_get("seen_at")?));
        let now = now();
        let is_over =
            now.duration_since(seen) > self.idle || now.duration_since(created) > self.lifetime;
        if is_over || !kept.proves(row.try_get("digest")?) {
            return Ok(None);
        }
        if now.duration_since(seen) >= TOUCH {
            let touch = sqlx::query("UPDATE sessions SET seen_at = $1 WHERE selector = $2");
            let touch = touch.bind(now.as_millisecond()).bind(&kept.selector);
            touch.execute(self.database.pool()).await?;
        }
        let mut connection = self.database.pool().acquire().await?;
        accounts::find(&mut connection, row.try_get("account_id")?).await
    }

    /// Ends the session of a cookie, if it is one.
    pub(super) async fn sign_out(&self, cookie: &str, address: IpAddr) -> Result<(), Error> {
        let Some(kept) = Kept::of(cookie) else { return Ok(()) };
        let Some(account) = self.open_session(&kept).await? else { return Ok(()) };
        let mut transaction = self.database.write(Lane::Control).await?;
        let delete = sqlx::query("DELETE FROM sessions WHERE selector = $1").bind(&kept.selector);
        delete.execute(&mut *transaction).await?;
        let actor = Actor { operator: account.operator(), address: Some(address) };
        audit::record(&mut transaction, &actor, EventKind::UserSignedOut, Entry::default()).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Forgets sessions that are over.
    pub(super) async fn prune(&self) -> Result<(), Error> {
        let before = |age| {
            Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH).as_millisecond()
        };
        sqlx::query("DELETE FROM sessions WHERE seen_at < $1 OR created_at < $2")
            .bind(before(self.idle))
            .bind(before(self.lifetime))
            .execute(self.database.pool())
            .await?;
        Ok(())
    }

    /// Writes down that somebody was not let do something, unless there was too much of that.
    pub(super) async fn record_denial(&self, actor: &Actor, entry: Entry) -> Result<(), Error> {
        self.record(actor, EventKind::PermissionDenied, entry).await
    }

    /// What the attempted name was is not told where there is no such account: people type
    /// passwords into the wrong field.
    async fn record_refusal(&self, account: Option<i64>, address: IpAddr) -> Result<(), Error> {
        let account = match account {
            Some(id) => {
                let mut connection = self.database.pool().acquire().await?;
                accounts::find(&mut connection, id).await?
            }
            None => None,
        };
        let unknown = || Operator::Token { name: "unknown account".to_owned() };
        let operator = account.as_ref().map_or_else(unknown, Account::operator);
        let actor = Actor { operator, address: Some(address) };
        self.record(&actor, EventKind::SignInRefused, Entry::default()).await
    }

    async fn record(&self, actor: &Actor, kind: EventKind, entry: Entry) -> Result<(), Error> {
        if self.recorded.take(&()).is_err() {
            return Ok(());
        }
        let mut transaction = self.database.write(Lane::Control).await?;
        audit::record(&mut transaction, actor, kind, entry).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The known browser that a cookie stands for, if it is one of this account.
    async fn device(
        &self,
        cookie: Option<&str>,
        account: Option<i64>,
    ) -> Result<Option<Kept>, Error> {
        let (Some(kept), Some(account)) = (cookie.and_then(Kept::of), account) else {
            return Ok(None);
        };
        let mut connection = self.database.pool().acquire().await?;
        let digest = device_digest(&mut connection, &kept.selector, account).await?;
        Ok(digest.is_some_and(|digest| kept.proves(&digest)).then_some(kept))
    }
}

async fn device_digest(
    connection: &mut AnyConnection,
    selector: &str,
    account: i64,
) -> Result<Option<String>, Error> {
    let digest =
        sqlx::query_scalar("SELECT digest FROM devices WHERE selector = $1 AND account_id = $2");
    Ok(digest.bind(selector).bind(account).fetch_optional(connection).await?)
}
