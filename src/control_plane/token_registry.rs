//! The registry of API tokens: stored as digests in the database, with a copy in memory.
//!
//! A secret exists in plaintext only during its creation and cannot be read later. The copy in memory is
//! the latest known state of the database, and stays valid while the database is unreachable.

use std::{
    collections::HashSet,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use sqlx::{Row as _, any::AnyRow};
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};

use super::{
    audit::{self, EventKind, NewEvent},
    authorization,
    database::{Connection, Database, WriteLock, now, timestamp_from_millis},
    error::Error,
    new_token::NewToken,
    operator::{Actor, Operator},
    permissions::TokenAction,
    registered_token::{RegisteredToken, TokenMetadata},
    token_snapshot,
};
use crate::{
    auth::Authenticator,
    token::{Environment, Grant, Projects, Token, TokenDigest, TokenKind},
};

/// The precision of `seen_at`.
const SEEN_AT_PRECISION: SignedDuration = SignedDuration::from_mins(1);

/// The tokens of this instance.
#[derive(Debug)]
pub(super) struct TokenRegistry {
    database: Database,
    limit: usize,
    entries: RwLock<Vec<RegisteredToken>>,
    /// Held while the database is changed or read until `entries` is updated, so that an older state
    /// never replaces a newer one.
    change_lock: Mutex<()>,
    /// Signals changes of `entries`.
    changed: watch::Sender<()>,
    /// Receives the valid tokens. Locked while `entries` is read for it, so that updates stay in order.
    subscriber: std::sync::Mutex<Option<Authenticator>>,
}

impl TokenRegistry {
    /// Reads the tokens of `database`. At most `limit` tokens can be created.
    pub(super) async fn open(database: Database, limit: usize) -> Result<Self, Error> {
        let entries = load(&database).await?;
        Ok(Self::new(database, limit, entries))
    }

    /// Starts with the given tokens, until the next [`TokenRegistry::reload`].
    pub(super) fn new(database: Database, limit: usize, entries: Vec<RegisteredToken>) -> Self {
        Self {
            database,
            limit,
            entries: RwLock::new(entries),
            change_lock: Mutex::default(),
            changed: watch::Sender::new(()),
            subscriber: std::sync::Mutex::default(),
        }
    }

    /// Signals each change of tokens or of their last use.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// A serialized snapshot of the tokens.
    pub(super) fn snapshot(&self) -> Vec<u8> {
        token_snapshot::serialize(self.database.redacted_location(), &self.entries())
    }

    /// Publishes the valid tokens to `auth` now and after each change.
    pub(super) fn subscribe_authenticator(&self, auth: &Authenticator) {
        *self.subscriber.lock().unwrap_or_else(PoisonError::into_inner) = Some(auth.clone());
        self.publish_grants();
    }

    /// The grant of each valid token.
    pub(super) fn grants(&self) -> Vec<(TokenDigest, Grant)> {
        let (now, entries) = (Timestamp::now(), self.entries());
        let valid = entries.iter().filter(|entry| entry.token.is_valid(now));
        valid.map(|entry| (entry.digest, entry.token.grant())).collect()
    }

    /// The tokens that `operator` may see, the oldest first.
    pub(super) fn visible_tokens(&self, operator: &Operator) -> Vec<TokenMetadata> {
        let entries = self.entries();
        let visible = entries.iter().filter(|entry| operator.can_see(entry.token.kind));
        visible.map(|entry| entry.token.clone()).collect()
    }

    /// One token that `operator` may see, by its id or its secret.
    pub(super) fn visible_token(
        &self,
        operator: &Operator,
        identifier: &str,
    ) -> Option<TokenMetadata> {
        let entries = self.entries();
        let found = find_by_identifier(&entries, identifier)?;
        operator.can_see(found.token.kind).then(|| found.token.clone())
    }

    /// The id of a token, found by its id or its secret.
    pub(super) fn token_id(&self, identifier: &str) -> Option<String> {
        find_by_identifier(&self.entries(), identifier).map(|found| found.token.id.clone())
    }

    /// The name of a valid token.
    pub(super) fn token_name(&self, digest: &TokenDigest) -> Option<String> {
        let (now, entries) = (Timestamp::now(), self.entries());
        let found = entries.iter().find(|entry| entry.digest == *digest);
        found.filter(|entry| entry.token.is_valid(now)).map(|entry| entry.token.name.clone())
    }

    /// The earliest expiry of a token after `now`.
    pub(super) fn next_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        self.entries()
            .iter()
            .filter_map(|entry| entry.token.expires_at)
            .filter(|at| *at > now)
            .min()
    }

    /// Reads the tokens from the database, and publishes them if they have changed.
    pub(super) async fn reload(&self) -> Result<(), Error> {
        let _change = self.change_lock.lock().await;
        let entries = load(&self.database).await?;
        if *self.entries() == entries {
            return Ok(());
        }
        self.replace_entries(entries);
        self.publish_grants();
        Ok(())
    }

    pub(super) async fn create(
        &self,
        actor: &Actor,
        new: NewToken,
    ) -> Result<(Token, TokenMetadata), Error> {
        actor.operator.require_permission(TokenAction::Create, new.kind)?;
        new.validate()?;
        let secret = new.generate_secret();
        let token = TokenMetadata::new(new, &secret, actor.operator.name());
        let _change = self.change_lock.lock().await;
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        authorization::require_permission(&mut transaction, actor, TokenAction::Create, token.kind)
            .await?;
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM tokens").fetch_one(&mut *transaction).await?;
        if usize::try_from(count).is_ok_and(|count| count >= self.limit) {
            return Err(Error::LimitReached { what: "API tokens", limit: self.limit });
        }
        insert(&mut transaction, actor, &token, &secret).await?;
        self.database.notify_token_change(&mut transaction).await?;
        transaction.commit().await?;
        let mut entries = self.entries().clone();
        entries.push(RegisteredToken { digest: secret.digest(), token: token.clone() });
        self.replace_entries(entries);
        self.publish_grants();
        Ok((secret, token))
    }

    /// Changes the expiry of a token.
    ///
    /// An expiry in the past has the effect of a deletion and requires that permission too. A new expiry
    /// of an expired token has the effect of a creation and requires that permission too.
    pub(super) async fn update(
        &self,
        actor: &Actor,
        identifier: &str,
        expires_at: Option<Timestamp>,
    ) -> Result<Option<TokenMetadata>, Error> {
        let _change = self.change_lock.lock().await;
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        let Some(before) = find(&mut transaction, identifier).await? else { return Ok(None) };
        let kind = before.token.kind;
        let operator = authorization::current_operator(&mut transaction, &actor.operator).await?;
        operator.require_permission(TokenAction::Update, kind)?;
        let mut after = before.clone();
        after.token.expires_at = expires_at.map(|at| timestamp_from_millis(at.as_millisecond()));
        let now = now();
        match (before.token.is_valid(now), after.token.is_valid(now)) {
            (true, false) => operator
                .require_permission(TokenAction::Delete, kind)
                .map_err(|missing| missing.with_purpose("end a token by an expiry in the past"))?,
            (false, true) => operator
                .require_permission(TokenAction::Create, kind)
                .map_err(|missing| missing.with_purpose("revive an expired token"))?,
            (true, true) | (false, false) => {}
        }
        sqlx::query("UPDATE tokens SET expires_at = $1 WHERE id = $2")
            .bind(after.token.expires_at.map(Timestamp::as_millisecond))
            .bind(&after.token.id)
            .execute(&mut *transaction)
            .await?;
        let (data, pre_data) = (Some(after.token.audit_data()), Some(before.token.audit_data()));
        let entry = NewEvent { data, pre_data, ..after.token.audit_event() };
        audit::record(&mut transaction, actor, EventKind::TokenUpdated, entry).await?;
        self.database.notify_token_change(&mut transaction).await?;
        transaction.commit().await?;
        let mut entries = self.entries().clone();
        entries.retain(|entry| entry.token.id != after.token.id);
        entries.push(after.clone());
        self.replace_entries(entries);
        self.publish_grants();
        Ok(Some(after.token))
    }

    pub(super) async fn delete(
        &self,
        actor: &Actor,
        identifier: &str,
    ) -> Result<Option<TokenMetadata>, Error> {
        let _change = self.change_lock.lock().await;
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        let Some(RegisteredToken { token, .. }) = find(&mut transaction, identifier).await? else {
            return Ok(None);
        };
        authorization::require_permission(&mut transaction, actor, TokenAction::Delete, token.kind)
            .await?;
        sqlx::query("DELETE FROM tokens WHERE id = $1")
            .bind(&token.id)
            .execute(&mut *transaction)
            .await?;
        let entry = NewEvent { pre_data: Some(token.audit_data()), ..token.audit_event() };
        audit::record(&mut transaction, actor, EventKind::TokenDeleted, entry).await?;
        self.database.notify_token_change(&mut transaction).await?;
        transaction.commit().await?;
        let mut entries = self.entries().clone();
        entries.retain(|entry| entry.token.id != token.id);
        self.replace_entries(entries);
        self.publish_grants();
        Ok(Some(token))
    }

    /// Stores the current time as the last use of tokens, at most once a minute per token.
    pub(super) async fn record_uses(&self, used: &HashSet<TokenDigest>) -> Result<(), Error> {
        let now = now();
        let is_due = |entry: &&RegisteredToken| {
            let is_recent =
                entry.token.seen_at.is_some_and(|at| now.duration_since(at) < SEEN_AT_PRECISION);
            !is_recent && used.contains(&entry.digest)
        };
        let due: HashSet<TokenDigest> =
            self.entries().iter().filter(is_due).map(|entry| entry.digest).collect();
        if due.is_empty() {
            return Ok(());
        }
        let _change = self.change_lock.lock().await;
        let mut transaction = self.database.begin_write(WriteLock::Control).await?;
        for digest in &due {
            sqlx::query("UPDATE tokens SET seen_at = $1 WHERE digest = $2")
                .bind(now.as_millisecond())
                .bind(digest.to_hex())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        let mut entries = self.entries().clone();
        for entry in entries.iter_mut().filter(|entry| due.contains(&entry.digest)) {
            entry.token.seen_at = Some(now);
        }
        self.replace_entries(entries);
        Ok(())
    }

    fn entries(&self) -> RwLockReadGuard<'_, Vec<RegisteredToken>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace_entries(&self, mut entries: Vec<RegisteredToken>) {
        sort_by_creation(&mut entries);
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = entries;
        self.changed.send_replace(());
    }

    /// Publishes the valid tokens, after a change and when a token has expired.
    pub(super) fn publish_grants(&self) {
        if let Some(auth) = &*self.subscriber.lock().unwrap_or_else(PoisonError::into_inner) {
            auth.set_local_tokens(self.grants());
        }
    }
}

/// The token with this id or this secret.
fn find_by_identifier<'a>(
    entries: &'a [RegisteredToken],
    identifier: &str,
) -> Option<&'a RegisteredToken> {
    let digest = TokenDigest::of(identifier);
    entries.iter().find(|it| it.token.id == identifier || it.digest == digest)
}

fn sort_by_creation(entries: &mut [RegisteredToken]) {
    entries.sort_by(|one, other| {
        let key = |entry: &RegisteredToken| (entry.token.created_at, entry.token.id.clone());
        key(one).cmp(&key(other))
    });
}

async fn load(database: &Database) -> Result<Vec<RegisteredToken>, Error> {
    let begun = Instant::now();
    let mut connection = database.connection().await?;
    let rows = sqlx::query("SELECT * FROM tokens").fetch_all(&mut *connection).await?;
    drop(connection);
    database.health().record_reload(begun);
    let mut entries: Vec<RegisteredToken> =
        rows.iter().filter_map(|row| read_token(row).transpose()).collect::<Result<_, _>>()?;
    sort_by_creation(&mut entries);
    Ok(entries)
}

async fn find(
    transaction: &mut Connection,
    identifier: &str,
) -> Result<Option<RegisteredToken>, Error> {
    let row = sqlx::query("SELECT * FROM tokens WHERE id = $1 OR digest = $2")
        .bind(identifier)
        .bind(TokenDigest::of(identifier).to_hex())
        .fetch_optional(transaction)
        .await?;
    Ok(row.as_ref().map(read_token).transpose()?.flatten())
}

/// The token in a row; `None` if its kind is known to later versions only.
fn read_token(row: &AnyRow) -> Result<Option<RegisteredToken>, sqlx::Error> {
    let time = |millis: Option<i64>| millis.map(timestamp_from_millis);
    let kind = TokenKind::parse(row.try_get("kind")?);
    let digest = TokenDigest::from_hex(row.try_get("digest")?);
    let projects: Vec<String> = serde_json::from_str(row.try_get("projects")?).unwrap_or_default();
    let (Some(kind), Some(digest)) = (kind, digest) else { return Ok(None) };
    let token = TokenMetadata {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        kind,
        environment: Environment::new(row.try_get("environment")?),
        projects: Projects::from_list(projects.iter().map(String::as_str)),
        expires_at: time(row.try_get("expires_at")?),
        created_at: timestamp_from_millis(row.try_get("created_at")?),
        created_by: row.try_get("created_by")?,
        seen_at: time(row.try_get("seen_at")?),
        masked: row.try_get::<String, _>("masked")?.into(),
    };
    Ok(Some(RegisteredToken { digest, token }))
}

/// Whether the database contains no token.
pub(super) async fn is_empty(connection: &mut Connection) -> Result<bool, Error> {
    let any = sqlx::query("SELECT id FROM tokens LIMIT 1").fetch_optional(connection).await?;
    Ok(any.is_none())
}

/// Whether the database contains all of these tokens.
pub(super) async fn has_all(
    connection: &mut Connection,
    tokens: impl Iterator<Item = (TokenKind, &Token)>,
) -> Result<bool, Error> {
    for (_, token) in tokens {
        let found = sqlx::query("SELECT id FROM tokens WHERE digest = $1");
        let found = found.bind(token.digest().to_hex()).fetch_optional(&mut *connection).await?;
        if found.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes a new token and its audit event.
pub(super) async fn insert(
    transaction: &mut Connection,
    actor: &Actor,
    token: &TokenMetadata,
    secret: &Token,
) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO tokens (id, digest, name, kind, environment, projects, masked, expires_at, \
         created_at, created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(&token.id)
    .bind(secret.digest().to_hex())
    .bind(&token.name)
    .bind(token.kind.as_str())
    .bind(token.environment.as_str())
    .bind(json!(token.projects.to_list()).to_string())
    .bind(&*token.masked)
    .bind(token.expires_at.map(Timestamp::as_millisecond))
    .bind(token.created_at.as_millisecond())
    .bind(&token.created_by)
    .execute(&mut *transaction)
    .await?;
    let entry = NewEvent { data: Some(token.audit_data()), ..token.audit_event() };
    audit::record(transaction, actor, EventKind::TokenCreated, entry).await
}
