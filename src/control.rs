//! Who may do what, and what they did: accounts, API tokens, sessions, the audit log, and the usage
//! that was reported, over SQL.
//!
//! Tokens are held in memory, and `auth` is given them at each change, so that no request waits for
//! the database and losing it changes nothing that is served. There is no HTTP in here.

mod accounts;
mod audit;
pub mod backup;
mod copy;
mod database;
mod error;
mod first_start;
mod health;
mod initial;
mod migrations;
mod password;
mod permission;
mod refusals;
mod registry;
mod rights;
mod secret;
mod sessions;
mod usage;
mod watch;

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::{mpsc, watch::Receiver};
use tracing::{info, warn};

pub use self::{
    accounts::{Account, AccountChange, Grants, NewAccount},
    audit::{Event, EventKind, EventPage, EventQuery},
    database::{DatabaseUrl, DatabaseUrlError, Location},
    error::Error,
    first_start::{FirstAccount, FoundTokens, Generated, MadeAccount, Opened, Seed, grant_of},
    health::{ConnectionCount, DatabaseStatus},
    initial::InitialSetting,
    password::{Password, PasswordError},
    permission::{Action, Actor, Missing, Operator, Permission, RootRole},
    registry::{ApiToken, NewToken},
    secret::Secret,
    sessions::{Cause, Session, SessionRef, SignIn, SignedIn},
    usage::{ApplicationSummary, UsageHour},
};
use self::{
    database::Database,
    password::Hasher,
    refusals::{Denial, Refusals},
    registry::Registry,
    sessions::Sessions,
    watch::Retention,
};
use crate::{
    auth::Authenticator,
    snapshot::Snapshots,
    telemetry::report,
    token::{Grant, Token, TokenDigest, TokenKind},
    usage::{Delivery, Taken},
};

/// What a control plane is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where its database is.
    pub location: Location,
    /// Tokens for an empty registry.
    pub seed: Seed,
    /// The account of an empty database.
    pub first_account: FirstAccount,
    /// How many tokens there may be.
    pub token_limit: usize,
    /// How many accounts there may be.
    pub account_limit: usize,
    /// After which time without a request a session ends.
    pub session_idle: Duration,
    /// After which time a session ends at any rate.
    pub session_lifetime: Duration,
    /// How long events are kept; `None` for ever.
    pub event_retention: Option<Duration>,
    /// How long usage is kept.
    pub usage_retention: Duration,
}

/// The control plane of an instance that stands on its own. A cheap handle.
#[derive(Clone, Debug)]
pub struct Control(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    hasher: Hasher,
    registry: Registry,
    sessions: Sessions,
    account_limit: usize,
    refusals: Refusals,
    retention: Retention,
}

impl Control {
    /// Opens the database, and makes or migrates it; the first start makes an admin's account and
    /// tokens. Safe when several instances start at once.
    ///
    /// Where the database cannot be used, and `copy` is one of its tokens, they are in force
    /// until [`Control::run`] reaches it.
    ///
    /// `announce` is given what was found and made before any of it lasts: a password or a token that
    /// was generated can be read nowhere else.
    pub async fn open(
        config: Config,
        copy: Option<&[u8]>,
        announce: impl FnOnce(&Opened),
    ) -> Result<(Self, Opened), Error> {
        let database = Database::new(&config.location).await?;
        let hasher = Hasher::new();
        let Config { seed, first_account, .. } = &config;
        let begun = first_start::begin(&database, &hasher, seed, first_account, announce).await;
        let (registry, opened) = match begun {
            Ok(opened) => (Registry::open(database.clone(), config.token_limit).await?, opened),
            // Whatever is wrong with it, except that it is another's or a later version's.
            Err(error @ (Error::NotBegun | Error::Newer { .. })) => return Err(error),
            Err(error) => {
                let held = copy.and_then(|copy| copy::read(database.shown(), copy));
                let Some(held) = held else { return Err(error) };
                warn!(
                    error = report(&error),
                    tokens = held.len(),
                    "The control plane's database is away; tokens are those of a copy, and nothing \
                     can be changed until it is back"
                );
                database.require_existing();
                let registry = Registry::new(database.clone(), config.token_limit, held);
                let opened =
                    Opened { account: None, tokens: FoundTokens::Existing, ignored: Vec::new() };
                (registry, opened)
            }
        };
        let sessions = Sessions::new(
            database.clone(),
            hasher.clone(),
            config.session_idle,
            config.session_lifetime,
        );
        let inner = Inner {
            refusals: Refusals::new(database.clone()),
            database,
            hasher,
            registry,
            sessions,
            account_limit: config.account_limit,
            retention: Retention { events: config.event_retention, usage: config.usage_retention },
        };
        Ok((Self(Arc::new(inner)), opened))
    }

    /// Opens a database that an instance has begun, for the command line.
    pub async fn attach(location: Location) -> Result<Self, Error> {
        if let Location::Sqlite(path) = &location {
            let there = tokio::fs::metadata(path).await;
            there.map_err(|error| Error::file(path, error))?;
        }
        let database = Database::new(&location).await?;
        database.require_existing();
        let hasher = Hasher::new();
        let inner = Inner {
            registry: Registry::open(database.clone(), usize::MAX).await?,
            sessions: Sessions::new(database.clone(), hasher.clone(), Duration::MAX, Duration::MAX),
            refusals: Refusals::new(database.clone()),
            database,
            hasher,
            account_limit: usize::MAX,
            retention: Retention { events: None, usage: Duration::MAX },
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Tells when tokens have changed, or how they are used.
    pub fn changes(&self) -> Receiver<()> {
        self.0.registry.subscribe()
    }

    /// A copy of the tokens as they are now, for [`Control::open`]; it holds no secret.
    pub fn copy(&self) -> Vec<u8> {
        self.0.registry.copy()
    }

    /// What each token allows that is valid now, by its digest.
    pub fn grants(&self) -> Vec<(TokenDigest, Grant)> {
        self.0.registry.grants()
    }

    /// Keeps `auth` told of every change here and on other instances, and the database in order;
    /// until dropped.
    ///
    /// While the database is away, the tokens known stay in force.
    pub async fn run(&self, auth: &Authenticator) {
        let Inner { database, registry, sessions, retention, .. } = &*self.0;
        registry.publish_to(auth);
        tokio::join!(
            watch::follow(database, registry),
            watch::expire(registry),
            watch::note_uses(registry, auth),
            watch::prune(database, sessions, *retention),
        );
    }

    /// Stores usage as it is delivered, until nobody can deliver any more; `snapshots` tell which flags
    /// are configured.
    pub async fn run_usage(
        &self,
        snapshots: &Snapshots,
        deliveries: &mut mpsc::Receiver<Delivery>,
    ) {
        let health = self.0.database.health();
        while let Some(delivery) = deliveries.recv().await {
            let taken = match usage::store(&self.0.database, snapshots, &delivery).await {
                Ok(true) => Taken::Stored,
                Ok(false) => Taken::Refused,
                Err(error) => {
                    if health.record_usage(false) {
                        warn!(error = report(&error), "Usage could not be stored, and waits");
                    }
                    Taken::Failed
                }
            };
            if taken == Taken::Stored && health.record_usage(true) {
                info!("Usage is stored again");
            }
            // Whoever delivered may have given up; then it comes again.
            let _ = delivery.done.send(taken);
        }
    }

    /// How the database is doing.
    pub fn database(&self) -> DatabaseStatus {
        self.0.database.status()
    }

    /// The tokens that `operator` may see, the oldest first.
    pub fn tokens(&self, operator: &Operator) -> Vec<ApiToken> {
        self.0.registry.tokens(operator)
    }

    /// One token that `operator` may see, by its id or its secret.
    pub fn token(&self, operator: &Operator, identifier: &str) -> Option<ApiToken> {
        self.0.registry.token(operator, identifier)
    }

    /// The name of a token that is valid now.
    pub fn token_name(&self, digest: &TokenDigest) -> Option<String> {
        self.0.registry.name(digest)
    }

    /// Insists on the permission to create tokens of `kind`, or of any where none is said; who
    /// lacks it is written down.
    pub async fn require_create(
        &self,
        actor: &Actor,
        kind: Option<TokenKind>,
    ) -> Result<(), Error> {
        let may = |kind| actor.operator.may(Action::Create, kind);
        let judged = match kind {
            Some(kind) => may(kind),
            None => may(TokenKind::Frontend).or_else(|_| may(TokenKind::Client)),
        };
        self.noting(actor, "create an API token", judged.map_err(Error::from)).await
    }

    /// Makes a token, whose secret is here for the only time; it is valid when this returns.
    pub async fn create_token(
        &self,
        actor: &Actor,
        new: NewToken,
    ) -> Result<(Token, ApiToken), Error> {
        let made = self.0.registry.create(actor, new).await;
        self.noting(actor, "create an API token", made).await
    }

    /// Changes when a token expires, by its id or its secret; `None` where there is no such token.
    pub async fn update_token(
        &self,
        actor: &Actor,
        identifier: &str,
        expires_at: Option<Timestamp>,
    ) -> Result<Option<ApiToken>, Error> {
        let what = self.of_token("change", identifier);
        let changed = self.0.registry.update(actor, identifier, expires_at).await;
        self.noting(actor, &what, changed).await
    }

    /// Ends a token, by its id or its secret; it is refused when this returns. `None` where there
    /// is no such token.
    pub async fn delete_token(
        &self,
        actor: &Actor,
        identifier: &str,
    ) -> Result<Option<ApiToken>, Error> {
        let what = self.of_token("delete", identifier);
        let deleted = self.0.registry.delete(actor, identifier).await;
        self.noting(actor, &what, deleted).await
    }

    /// Every account, the oldest first; for admins.
    pub async fn accounts(&self, operator: &Operator) -> Result<Vec<Account>, Error> {
        self.accounts_after(operator, 0, u32::MAX).await
    }

    /// At most `limit` accounts with numbers above `after`, the oldest first; for admins.
    pub async fn accounts_after(
        &self,
        operator: &Operator,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Account>, Error> {
        operator.require_admin()?;
        accounts::page(&self.0.database, after, limit).await
    }

    /// One account; for admins and for itself.
    pub async fn account(&self, actor: &Actor, id: i64) -> Result<Option<Account>, Error> {
        if actor.operator.id() != Some(id) {
            self.require_admin(actor, &of_account("see", id)).await?;
        }
        let mut connection = self.0.database.connection().await?;
        accounts::find(&mut connection, id).await
    }

    /// Makes an account; for admins.
    pub async fn create_account(&self, actor: &Actor, new: NewAccount) -> Result<Account, Error> {
        let what = "create an account";
        self.require_admin(actor, what).await?;
        let hash = self.0.hasher.hash(&new.password).await?;
        let made = accounts::create(&self.0.database, actor, new, &hash, self.0.account_limit);
        self.noting(actor, what, made.await).await
    }

    /// Changes an account; for admins. A new password ends its sessions. `None` where there is no
    /// such account, here and below.
    pub async fn update_account(
        &self,
        actor: &Actor,
        id: i64,
        change: AccountChange,
    ) -> Result<Option<Account>, Error> {
        let what = of_account("change", id);
        self.require_admin(actor, &what).await?;
        let hash = match &change.password {
            Some(password) => Some(self.0.hasher.hash(password).await?),
            None => None,
        };
        let changed = accounts::update(&self.0.database, actor, id, change, hash.as_deref()).await;
        self.noting(actor, &what, changed).await
    }

    /// Changes what is granted to an account beyond its role; for admins.
    pub async fn grant(
        &self,
        actor: &Actor,
        id: i64,
        change: Grants,
    ) -> Result<Option<Account>, Error> {
        let what = of_account("grant permissions to", id);
        self.require_admin(actor, &what).await?;
        let granted = accounts::grant(&self.0.database, actor, id, change).await;
        self.noting(actor, &what, granted).await
    }

    /// Sets an account's password and ends all of its sessions; for admins.
    pub async fn set_password(
        &self,
        actor: &Actor,
        id: i64,
        password: Password,
    ) -> Result<Option<Account>, Error> {
        let what = of_account("set the password of", id);
        self.require_admin(actor, &what).await?;
        let hash = self.0.hasher.hash(&password).await?;
        let set = accounts::set_password(&self.0.database, actor, id, &hash).await;
        self.noting(actor, &what, set).await
    }

    /// Sets the actor's own password, and ends its sessions except the one in which it acts.
    pub async fn change_own_password(
        &self,
        actor: &Actor,
        current: &Password,
        new: Password,
    ) -> Result<(), Error> {
        let changed = self.0.sessions.change_password(actor, current, &new).await;
        self.noting(actor, "change the own password", changed).await
    }

    /// Deletes an account and ends its sessions; for admins, and never the last of them.
    pub async fn delete_account(&self, actor: &Actor, id: i64) -> Result<Option<Account>, Error> {
        let what = of_account("delete", id);
        self.require_admin(actor, &what).await?;
        let deleted = accounts::delete(&self.0.database, actor, id).await;
        self.noting(actor, &what, deleted).await
    }

    /// Begins a session for whoever has the password.
    pub async fn sign_in(&self, attempt: SignIn<'_>) -> Result<SignedIn, Error> {
        self.0.sessions.sign_in(attempt, &self.0.refusals).await
    }

    /// The session that a cookie opens; `None` where it opens none.
    pub async fn session(
        &self,
        cookie: &str,
        address: IpAddr,
        cause: Cause,
    ) -> Result<Option<Session>, Error> {
        self.0.sessions.find(cookie, address, cause).await
    }

    /// Ends the session of a cookie, if it is one.
    pub async fn sign_out(&self, cookie: &str, address: IpAddr) -> Result<(), Error> {
        self.0.sessions.sign_out(cookie, address).await
    }

    /// What happened, the newest first; for admins.
    pub async fn events(
        &self,
        operator: &Operator,
        query: &EventQuery,
    ) -> Result<EventPage, Error> {
        operator.require_admin()?;
        audit::page(&self.0.database, query).await
    }

    /// The applications that reported usage, by name.
    pub async fn applications(&self) -> Result<Vec<ApplicationSummary>, Error> {
        usage::applications(&self.0.database).await
    }

    /// How a flag was used since a time, by hour.
    pub async fn usage_of(&self, flag: &str, since: Timestamp) -> Result<Vec<UsageHour>, Error> {
        usage::of_flag(&self.0.database, flag, since).await
    }

    /// Insists on an admin, to do `what`; who is none is written down.
    pub async fn require_admin(&self, actor: &Actor, what: &str) -> Result<(), Error> {
        let judged = actor.operator.require_admin().map_err(Error::from);
        self.noting(actor, what, judged).await
    }

    /// The outcome of an operation; a refusal is written down.
    async fn noting<T>(
        &self,
        actor: &Actor,
        what: &str,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        if let Err(error) = &outcome
            && let Some(denial) = Denial::of(error)
        {
            self.0.refusals.operation(actor, what, denial).await;
        }
        outcome
    }

    /// What is done to a token, in the words of the audit log: by the name that everybody may know,
    /// since its secret may have been given instead.
    fn of_token(&self, verb: &str, identifier: &str) -> String {
        match self.0.registry.id(identifier) {
            Some(id) => format!("{verb} the API token {id}"),
            None => format!("{verb} an API token"),
        }
    }
}

/// What is done to an account, in the words of the audit log.
fn of_account(verb: &str, id: i64) -> String {
    format!("{verb} the account {id}")
}
