//! The control plane of a standalone instance: accounts, permissions, API tokens, sessions, the audit
//! log and reported usage, stored in an SQL database.
//!
//! Tokens are also held in memory and passed to `auth` at each change. So no SDK request waits for the
//! database, and an unreachable database does not affect what is served. This module contains no HTTP.

mod account_changes;
mod account_queries;
mod audit;
mod authorization;
pub mod backup;
mod bootstrap;
mod cookie_token;
mod database;
mod database_health;
mod denial_log;
mod error;
mod initial_settings;
mod maintenance;
mod new_token;
mod operator;
mod password;
mod permissions;
mod registered_token;
mod session_ref;
mod sessions;
mod token_registry;
mod token_snapshot;
mod usage_store;

use std::{net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::watch::Receiver;
use tracing::warn;

pub use self::{
    account_changes::{AccountChange, NewAccount, PermissionChange},
    account_queries::Account,
    audit::{AuditEvent, EventKind, EventPage, EventQuery},
    bootstrap::{
        BootstrapReport, CreatedAccount, GeneratedTokens, InitialAccount, TokenBootstrapOutcome,
        grant_from_token,
    },
    cookie_token::CookieToken,
    database::{DatabaseLocation, DatabaseUrl, DatabaseUrlError},
    database_health::{ConnectionCount, DatabaseStatus},
    error::Error,
    initial_settings::{InitialSetting, InitialTokens},
    new_token::NewToken,
    operator::{Actor, Operator},
    password::{Password, PasswordError},
    permissions::{MissingPermission, RootRole, TokenAction, TokenPermission},
    registered_token::TokenMetadata,
    session_ref::SessionRef,
    sessions::{Activity, Session, SignInAttempt, SignedIn},
    usage_store::{ApplicationSummary, DatabaseUsageSink, UsageHour},
};
use self::{
    database::Database,
    denial_log::{DenialLog, DenialReason},
    maintenance::Retention,
    password::Hasher,
    sessions::Sessions,
    token_registry::TokenRegistry,
};
use crate::{
    auth::Authenticator,
    served::Snapshots,
    telemetry::error_chain,
    token::{Grant, Token, TokenDigest, TokenKind},
};

/// The configuration of a control plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// The location of the database.
    pub location: DatabaseLocation,
    /// Tokens to create if the database has none.
    pub initial_tokens: InitialTokens,
    /// The admin's account that the first start creates.
    pub initial_account: InitialAccount,
    /// The maximum number of API tokens.
    pub token_limit: usize,
    /// The maximum number of accounts.
    pub account_limit: usize,
    /// A session ends after this time without a request.
    pub session_idle_timeout: Duration,
    /// A session ends after this time in any case.
    pub session_lifetime: Duration,
    /// The retention of audit events; `None` keeps them forever.
    pub event_retention: Option<Duration>,
    /// The retention of usage.
    pub usage_retention: Duration,
}

/// The control plane of a standalone instance. A cheap handle.
#[derive(Clone, Debug)]
pub struct ControlPlane(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    hasher: Hasher,
    registry: TokenRegistry,
    sessions: Sessions,
    account_limit: usize,
    denial_log: DenialLog,
    retention: Retention,
}

impl ControlPlane {
    /// Opens the database, creating or migrating it first. The first start creates an admin's account
    /// and tokens. Several instances may start at once.
    ///
    /// If the database is unreachable and `snapshot` contains its tokens, these tokens are valid
    /// until [`ControlPlane::run`] reaches the database.
    ///
    /// `announce` is called before the transaction is committed, because a generated password or token
    /// can be read nowhere else.
    pub async fn open(
        config: Config,
        snapshot: Option<&[u8]>,
        announce: impl FnOnce(&BootstrapReport),
    ) -> Result<(Self, BootstrapReport), Error> {
        let database = Database::new(&config.location).await?;
        let hasher = Hasher::new();
        let Config { initial_tokens, initial_account, .. } = &config;
        let bootstrapped =
            bootstrap::initialize(&database, &hasher, initial_tokens, initial_account, announce)
                .await;
        let (registry, report) = match bootstrapped {
            Ok(report) => {
                (TokenRegistry::open(database.clone(), config.token_limit).await?, report)
            }
            // Every other failure of the database is survivable with a snapshot of its tokens.
            Err(error @ (Error::NotInitialized | Error::NewerSchema { .. })) => return Err(error),
            Err(error) => {
                let tokens = snapshot
                    .and_then(|bytes| token_snapshot::parse(database.redacted_location(), bytes));
                let Some(tokens) = tokens else { return Err(error) };
                warn!(
                    error = error_chain(&error),
                    tokens = tokens.len(),
                    "The control plane's database is unreachable; serving with a saved copy of the \
                     tokens, and changes fail until the database is reachable again"
                );
                database.require_existing();
                let registry = TokenRegistry::new(database.clone(), config.token_limit, tokens);
                let report = BootstrapReport {
                    account: None,
                    tokens: TokenBootstrapOutcome::Existing,
                    ignored_settings: Vec::new(),
                };
                (registry, report)
            }
        };
        let sessions = Sessions::new(
            database.clone(),
            hasher.clone(),
            config.session_idle_timeout,
            config.session_lifetime,
        );
        let inner = Inner {
            denial_log: DenialLog::new(database.clone()),
            database,
            hasher,
            registry,
            sessions,
            account_limit: config.account_limit,
            retention: Retention { events: config.event_retention, usage: config.usage_retention },
        };
        Ok((Self(Arc::new(inner)), report))
    }

    /// Opens a database that an instance has initialized, for the command line. Fails where there is
    /// none.
    pub async fn open_existing(location: DatabaseLocation) -> Result<Self, Error> {
        if let DatabaseLocation::Sqlite(path) = &location {
            let there = tokio::fs::metadata(path).await;
            there.map_err(|error| Error::file(path, error))?;
        }
        let database = Database::new(&location).await?;
        database.require_existing();
        let hasher = Hasher::new();
        let inner = Inner {
            registry: TokenRegistry::open(database.clone(), usize::MAX).await?,
            sessions: Sessions::new(database.clone(), hasher.clone(), Duration::MAX, Duration::MAX),
            denial_log: DenialLog::new(database.clone()),
            database,
            hasher,
            account_limit: usize::MAX,
            retention: Retention { events: None, usage: Duration::MAX },
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Signals each change of tokens or of their last use.
    pub fn subscribe_to_tokens(&self) -> Receiver<()> {
        self.0.registry.subscribe()
    }

    /// A snapshot of the tokens for [`ControlPlane::open`], without secrets.
    pub fn token_snapshot(&self) -> Vec<u8> {
        self.0.registry.snapshot()
    }

    /// The grant of each currently valid token, by its digest.
    pub fn grants(&self) -> Vec<(TokenDigest, Grant)> {
        self.0.registry.grants()
    }

    /// Runs the background work until dropped: publishes token changes of this and other instances to
    /// `auth`, records token uses, and prunes the database.
    ///
    /// While the database is unreachable, the tokens in memory stay valid.
    pub async fn run(&self, auth: &Authenticator) {
        let Inner { database, registry, sessions, retention, .. } = &*self.0;
        registry.subscribe_authenticator(auth);
        tokio::join!(
            maintenance::follow_changes(database, registry),
            maintenance::expire_tokens(registry),
            maintenance::record_token_uses(registry, auth),
            maintenance::run_pruning(database, sessions, *retention),
        );
    }

    /// The destination of usage in the database; `snapshots` determine which flags are configured.
    pub fn usage_sink(&self, snapshots: Snapshots) -> DatabaseUsageSink {
        DatabaseUsageSink::new(self.0.database.clone(), snapshots)
    }

    /// The status of the database.
    pub fn database_status(&self) -> DatabaseStatus {
        self.0.database.status()
    }

    /// The tokens that `operator` may see, the oldest first.
    pub fn tokens(&self, operator: &Operator) -> Vec<TokenMetadata> {
        self.0.registry.visible_tokens(operator)
    }

    /// One token that `operator` may see, by its id or its secret.
    pub fn token(&self, operator: &Operator, identifier: &str) -> Option<TokenMetadata> {
        self.0.registry.visible_token(operator, identifier)
    }

    /// The name of a token that is valid now.
    pub fn token_name(&self, digest: &TokenDigest) -> Option<String> {
        self.0.registry.token_name(digest)
    }

    /// Requires the permission to create tokens of `kind`, or of at least one kind if it is `None`. A
    /// denial is recorded in the audit log.
    pub async fn require_create_token(
        &self,
        actor: &Actor,
        kind: Option<TokenKind>,
    ) -> Result<(), Error> {
        let may = |kind| actor.operator.require_permission(TokenAction::Create, kind);
        let judged = match kind {
            Some(kind) => may(kind),
            None => may(TokenKind::Frontend).or_else(|_| may(TokenKind::Client)),
        };
        self.record_denial(actor, "create an API token", judged.map_err(Error::from)).await
    }

    /// Creates a token, which is valid when this returns. Its secret cannot be read again later.
    pub async fn create_token(
        &self,
        actor: &Actor,
        new: NewToken,
    ) -> Result<(Token, TokenMetadata), Error> {
        let made = self.0.registry.create(actor, new).await;
        self.record_denial(actor, "create an API token", made).await
    }

    /// Changes the expiry of a token, found by its id or its secret; `None` if there is no such token.
    pub async fn update_token(
        &self,
        actor: &Actor,
        identifier: &str,
        expires_at: Option<Timestamp>,
    ) -> Result<Option<TokenMetadata>, Error> {
        let what = self.token_operation("change", identifier);
        let changed = self.0.registry.update(actor, identifier, expires_at).await;
        self.record_denial(actor, &what, changed).await
    }

    /// Deletes a token, found by its id or its secret; it is rejected when this returns. `None` if there
    /// is no such token.
    pub async fn delete_token(
        &self,
        actor: &Actor,
        identifier: &str,
    ) -> Result<Option<TokenMetadata>, Error> {
        let what = self.token_operation("delete", identifier);
        let deleted = self.0.registry.delete(actor, identifier).await;
        self.record_denial(actor, &what, deleted).await
    }

    /// Every account, the oldest first. For admins only.
    pub async fn accounts(&self, operator: &Operator) -> Result<Vec<Account>, Error> {
        self.accounts_after(operator, 0, u32::MAX).await
    }

    /// At most `limit` accounts with ids above `after`, the oldest first. For admins only.
    pub async fn accounts_after(
        &self,
        operator: &Operator,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Account>, Error> {
        operator.require_admin()?;
        account_queries::page(&self.0.database, after, limit).await
    }

    /// One account. For admins and for the account itself.
    pub async fn account(&self, actor: &Actor, id: i64) -> Result<Option<Account>, Error> {
        if actor.operator.account_id() != Some(id) {
            self.require_admin(actor, &account_operation("see", id)).await?;
        }
        let mut connection = self.0.database.connection().await?;
        account_queries::find(&mut connection, id).await
    }

    /// Creates an account. For admins only.
    pub async fn create_account(&self, actor: &Actor, new: NewAccount) -> Result<Account, Error> {
        let what = "create an account";
        self.require_admin(actor, what).await?;
        let hash = self.0.hasher.hash(&new.password).await?;
        let made =
            account_changes::create(&self.0.database, actor, new, &hash, self.0.account_limit);
        self.record_denial(actor, what, made.await).await
    }

    /// Changes an account. For admins only. A new password ends its sessions. Returns `None` if there is
    /// no such account, like the methods below.
    pub async fn update_account(
        &self,
        actor: &Actor,
        id: i64,
        change: AccountChange,
    ) -> Result<Option<Account>, Error> {
        let what = account_operation("change", id);
        self.require_admin(actor, &what).await?;
        let hash = match &change.password {
            Some(password) => Some(self.0.hasher.hash(password).await?),
            None => None,
        };
        let changed =
            account_changes::update(&self.0.database, actor, id, change, hash.as_deref()).await;
        self.record_denial(actor, &what, changed).await
    }

    /// Changes the permissions that an account has in addition to its role. For admins only.
    pub async fn update_permissions(
        &self,
        actor: &Actor,
        id: i64,
        change: PermissionChange,
    ) -> Result<Option<Account>, Error> {
        let what = account_operation("grant permissions to", id);
        self.require_admin(actor, &what).await?;
        let granted =
            account_changes::update_permissions(&self.0.database, actor, id, change).await;
        self.record_denial(actor, &what, granted).await
    }

    /// Sets an account's password and ends all of its sessions. For admins only.
    pub async fn set_password(
        &self,
        actor: &Actor,
        id: i64,
        password: Password,
    ) -> Result<Option<Account>, Error> {
        let what = account_operation("set the password of", id);
        self.require_admin(actor, &what).await?;
        let hash = self.0.hasher.hash(&password).await?;
        let set = account_changes::set_password(&self.0.database, actor, id, &hash).await;
        self.record_denial(actor, &what, set).await
    }

    /// Sets the actor's own password, and ends all of its sessions except the current one.
    pub async fn change_own_password(
        &self,
        actor: &Actor,
        current: &Password,
        new: Password,
    ) -> Result<(), Error> {
        let changed = self.0.sessions.change_password(actor, current, &new).await;
        self.record_denial(actor, "change the own password", changed).await
    }

    /// Deletes an account and ends its sessions. For admins only. The last admin cannot be deleted.
    pub async fn delete_account(&self, actor: &Actor, id: i64) -> Result<Option<Account>, Error> {
        let what = account_operation("delete", id);
        self.require_admin(actor, &what).await?;
        let deleted = account_changes::delete(&self.0.database, actor, id).await;
        self.record_denial(actor, &what, deleted).await
    }

    /// Checks a password and begins a session.
    pub async fn sign_in(&self, attempt: SignInAttempt<'_>) -> Result<SignedIn, Error> {
        self.0.sessions.sign_in(attempt, &self.0.denial_log).await
    }

    /// The open session of a cookie, if any.
    pub async fn session(
        &self,
        cookie: &str,
        address: IpAddr,
        cause: Activity,
    ) -> Result<Option<Session>, Error> {
        self.0.sessions.find(cookie, address, cause).await
    }

    /// Ends the session of a cookie, if there is one.
    pub async fn sign_out(&self, cookie: &str, address: IpAddr) -> Result<(), Error> {
        self.0.sessions.sign_out(cookie, address).await
    }

    /// Audit events, the newest first. For admins only.
    pub async fn events(
        &self,
        operator: &Operator,
        query: &EventQuery,
    ) -> Result<EventPage, Error> {
        operator.require_admin()?;
        audit::page(&self.0.database, query).await
    }

    /// The applications that reported usage, sorted by name.
    pub async fn applications(&self) -> Result<Vec<ApplicationSummary>, Error> {
        usage_store::applications(&self.0.database).await
    }

    /// The hourly usage of a flag since a time.
    pub async fn flag_usage(&self, flag: &str, since: Timestamp) -> Result<Vec<UsageHour>, Error> {
        usage_store::flag_usage(&self.0.database, flag, since).await
    }

    /// Requires an admin for the operation `what`. A denial is recorded in the audit log.
    pub async fn require_admin(&self, actor: &Actor, what: &str) -> Result<(), Error> {
        let judged = actor.operator.require_admin().map_err(Error::from);
        self.record_denial(actor, what, judged).await
    }

    /// Passes `outcome` on, and records it in the audit log if it is a denial.
    async fn record_denial<T>(
        &self,
        actor: &Actor,
        what: &str,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        if let Err(error) = &outcome
            && let Some(denial) = DenialReason::from_error(error)
        {
            self.0.denial_log.record_operation(actor, what, denial).await;
        }
        outcome
    }

    /// An operation on a token as the audit log describes it: with the public id, because the identifier
    /// may be the secret.
    fn token_operation(&self, verb: &str, identifier: &str) -> String {
        match self.0.registry.token_id(identifier) {
            Some(id) => format!("{verb} the API token {id}"),
            None => format!("{verb} an API token"),
        }
    }
}

/// An operation on an account as the audit log describes it.
fn account_operation(verb: &str, id: i64) -> String {
    format!("{verb} the account {id}")
}
