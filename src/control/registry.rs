//! The API tokens of this instance: kept as digests, held in memory, changed in the database.
//!
//! A secret exists in plaintext only while it is created; afterwards nobody can read it again. What
//! is in memory is what the database said last, and stays in force while the database is away.

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use sqlx::{Row as _, any::AnyRow};
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use zeroize::Zeroizing;

use super::{
    audit::{self, Entry, EventKind},
    copy,
    database::{Connection, Database, Lane, now, of_millis},
    error::Error,
    permission::{Action, Actor, Operator},
    rights, secret,
};
use crate::{
    auth::Authenticator,
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
    wire::admin::{MAX_PROJECTS, Name},
};

/// The longest name of an environment or a project, in bytes.
const MAX_WORD: usize = 100;
/// How exact `seen_at` is.
const SEEN: SignedDuration = SignedDuration::from_mins(1);

/// A token to create.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewToken {
    /// Tells it apart from others, for people.
    pub name: String,
    /// What it is for.
    pub kind: TokenKind,
    /// Whose flags it sees; `*` for admin tokens.
    pub environment: Environment,
    /// Which projects' flags it sees.
    pub projects: Projects,
    /// When it stops being valid.
    pub expires_at: Option<Timestamp>,
}

/// What may be told of a token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiToken {
    /// Names it without opening anything: 22 letters of base64url.
    pub id: String,
    /// Tells it apart from others, for people.
    pub name: String,
    /// What it is for.
    pub kind: TokenKind,
    /// Whose flags it sees; `*` for admin tokens.
    pub environment: Environment,
    /// Which projects' flags it sees.
    pub projects: Projects,
    /// When it stops being valid.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Who made it.
    pub created_by: String,
    /// When it was last used, to about a minute.
    pub seen_at: Option<Timestamp>,
    /// What may be shown of its secret.
    pub masked: Arc<str>,
}

impl NewToken {
    /// A secret for it, in the second form of Unleash's: the first part names it, the second
    /// proves it with 256 bits.
    pub(super) fn secret(&self) -> Token {
        let projects = match &self.projects {
            Projects::All => "*",
            Projects::Only(ids) => match ids.first() {
                Some(id) if ids.len() == 1 => id.as_str(),
                _ => "[]",
            },
        };
        let (selector, verifier) = (secret::random::<16>(), secret::random::<32>());
        let environment = &self.environment;
        let text = format!("{projects}:{environment}.v2_{}_{}", *selector, *verifier);
        Token::parse(&Zeroizing::new(text)).expect("checked names and base64url make a token")
    }

    fn check(&self) -> Result<(), Error> {
        Name::parse(&self.name).map_err(|reason| Error::invalid("tokenName", reason))?;
        let environment = self.environment.as_str();
        let is_any = environment == "*";
        match self.kind {
            TokenKind::Admin if !is_any => {
                return Err(Error::invalid("environment", "must be *: admin tokens see all"));
            }
            TokenKind::Client | TokenKind::Frontend if is_any => {
                let reason = format!("{} tokens are for one environment", self.kind.as_str());
                return Err(Error::invalid("environment", reason));
            }
            _ if !is_any && !is_word(environment) => {
                let reason = "must be letters, digits, - and _";
                return Err(Error::invalid("environment", reason));
            }
            _ => {}
        }
        if let Projects::Only(ids) = &self.projects {
            let are_ids = ids.iter().all(|id| is_word(id.as_str()));
            if ids.is_empty() || ids.len() > MAX_PROJECTS || !are_ids {
                let reason = "must be * or ids of letters, digits, - and _";
                return Err(Error::invalid("projects", reason));
            }
            if self.kind == TokenKind::Admin {
                return Err(Error::invalid("projects", "must be *: admin tokens see all"));
            }
        }
        if self.expires_at.is_some_and(|at| at <= now()) {
            return Err(Error::invalid("expiresAt", "must be in the future"));
        }
        Ok(())
    }
}

/// Whether a text can stand in a token's first part.
fn is_word(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~');
    (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(is_letter)
}

impl ApiToken {
    /// A token that is made now.
    pub(super) fn new(new: NewToken, secret: &Token, created_by: &str) -> Self {
        Self {
            id: id_of(secret),
            name: new.name.trim().to_owned(),
            kind: new.kind,
            environment: new.environment,
            projects: new.projects,
            expires_at: new.expires_at.map(|at| of_millis(at.as_millisecond())),
            created_at: now(),
            created_by: created_by.to_owned(),
            seen_at: None,
            masked: secret.masked(),
        }
    }

    fn grant(&self) -> Grant {
        let scope =
            Scope { environment: self.environment.clone(), projects: self.projects.clone() };
        Grant { kind: self.kind, scope }
    }

    fn is_valid(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|at| now < at)
    }

    /// The token as audit events tell it, without its secret.
    fn data(&self) -> Value {
        let projects = self.projects.to_list();
        json!({
            "id": self.id,
            "tokenName": self.name,
            "type": self.kind.as_str(),
            "environment": self.environment.as_str(),
            "project": projects.join(","),
            "projects": projects,
            "expiresAt": self.expires_at,
            "createdAt": self.created_at,
            "seenAt": self.seen_at,
            "alias": null,
            "secure": true,
        })
    }

    fn entry(&self) -> Entry {
        Entry {
            environment: Some(self.environment.as_str().to_owned()),
            project: Some(self.projects.to_list().join(",")),
            ..Entry::default()
        }
    }
}

/// What names a token in public.
fn id_of(secret: &Token) -> String {
    let of_digest = || {
        let mut id = secret::base64url(&Sha256::digest(secret.expose()));
        id.truncate(22);
        id
    };
    secret.selector().map_or_else(of_digest, str::to_owned)
}

/// The tokens.
#[derive(Debug)]
pub(super) struct Registry {
    database: Database,
    limit: usize,
    held: RwLock<Vec<Held>>,
    /// Held from before a change of the database, or a look at it, until `held` says the same: so
    /// nothing old ever follows something new.
    change: Mutex<()>,
    /// Says that `held` has changed.
    changed: watch::Sender<()>,
    /// Whom to tell. Locked from before a look at `held` until it is told.
    told: std::sync::Mutex<Option<Authenticator>>,
}

/// A token as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Held {
    pub(super) digest: TokenDigest,
    pub(super) token: ApiToken,
}

impl Registry {
    /// Reads the tokens of `database`, of which there may be `limit`.
    pub(super) async fn open(database: Database, limit: usize) -> Result<Self, Error> {
        let held = load(&database).await?;
        Ok(Self::new(database, limit, held))
    }

    /// Begins with the tokens of a copy; they are read at the next [`Registry::reload`].
    pub(super) fn new(database: Database, limit: usize, held: Vec<Held>) -> Self {
        Self {
            database,
            limit,
            held: RwLock::new(held),
            change: Mutex::default(),
            changed: watch::Sender::new(()),
            told: std::sync::Mutex::default(),
        }
    }

    /// Tells when tokens have changed.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// A copy of the tokens.
    pub(super) fn copy(&self) -> Vec<u8> {
        copy::write(self.database.shown(), &self.held())
    }

    /// Tells `auth` from here on which tokens are valid.
    pub(super) fn publish_to(&self, auth: &Authenticator) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(auth.clone());
        self.publish();
    }

    /// What each valid token allows.
    pub(super) fn grants(&self) -> Vec<(TokenDigest, Grant)> {
        let (now, held) = (Timestamp::now(), self.held());
        let valid = held.iter().filter(|held| held.token.is_valid(now));
        valid.map(|held| (held.digest, held.token.grant())).collect()
    }

    /// The tokens that `operator` may see, the oldest first.
    pub(super) fn tokens(&self, operator: &Operator) -> Vec<ApiToken> {
        let held = self.held();
        let seen = held.iter().filter(|held| operator.may_see(held.token.kind));
        seen.map(|held| held.token.clone()).collect()
    }

    /// One token that `operator` may see, by its id or its secret.
    pub(super) fn token(&self, operator: &Operator, identifier: &str) -> Option<ApiToken> {
        let held = self.held();
        let found = named(&held, identifier)?;
        operator.may_see(found.token.kind).then(|| found.token.clone())
    }

    /// The id of a token, by that or by its secret.
    pub(super) fn id(&self, identifier: &str) -> Option<String> {
        named(&self.held(), identifier).map(|found| found.token.id.clone())
    }

    /// The name of a valid token.
    pub(super) fn name(&self, digest: &TokenDigest) -> Option<String> {
        let (now, held) = (Timestamp::now(), self.held());
        let found = held.iter().find(|held| held.digest == *digest);
        found.filter(|held| held.token.is_valid(now)).map(|held| held.token.name.clone())
    }

    /// When the next token expires after `now`.
    pub(super) fn next_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        self.held().iter().filter_map(|held| held.token.expires_at).filter(|at| *at > now).min()
    }

    /// Reads what others may have changed, and publishes it.
    pub(super) async fn reload(&self) -> Result<(), Error> {
        let _change = self.change.lock().await;
        let now = load(&self.database).await?;
        if *self.held() == now {
            return Ok(());
        }
        self.replace(now);
        self.publish();
        Ok(())
    }

    pub(super) async fn create(
        &self,
        actor: &Actor,
        new: NewToken,
    ) -> Result<(Token, ApiToken), Error> {
        actor.operator.may(Action::Create, new.kind)?;
        new.check()?;
        let secret = new.secret();
        let token = ApiToken::new(new, &secret, actor.operator.name());
        let _change = self.change.lock().await;
        let mut transaction = self.database.write(Lane::Control).await?;
        rights::require(&mut transaction, actor, Action::Create, token.kind).await?;
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM tokens").fetch_one(&mut *transaction).await?;
        if usize::try_from(count).is_ok_and(|count| count >= self.limit) {
            return Err(Error::Limit { what: "API tokens", limit: self.limit });
        }
        insert(&mut transaction, actor, &token, &secret).await?;
        self.database.announce(&mut transaction).await?;
        transaction.commit().await?;
        let mut held = self.held().clone();
        held.push(Held { digest: secret.digest(), token: token.clone() });
        self.replace(held);
        self.publish();
        Ok((secret, token))
    }

    /// Changes when a token expires.
    ///
    /// An expiry in the past ends a token as deleting it does, and a new one revives an expired token
    /// as creating it does: who may only update can do neither.
    pub(super) async fn update(
        &self,
        actor: &Actor,
        identifier: &str,
        expires_at: Option<Timestamp>,
    ) -> Result<Option<ApiToken>, Error> {
        let _change = self.change.lock().await;
        let mut transaction = self.database.write(Lane::Control).await?;
        let Some(before) = find(&mut transaction, identifier).await? else { return Ok(None) };
        let kind = before.token.kind;
        let operator = rights::current(&mut transaction, &actor.operator).await?;
        operator.may(Action::Update, kind)?;
        let mut after = before.clone();
        after.token.expires_at = expires_at.map(|at| of_millis(at.as_millisecond()));
        let now = now();
        match (before.token.is_valid(now), after.token.is_valid(now)) {
            (true, false) => operator
                .may(Action::Delete, kind)
                .map_err(|missing| missing.to("end a token by an expiry in the past"))?,
            (false, true) => operator
                .may(Action::Create, kind)
                .map_err(|missing| missing.to("revive an expired token"))?,
            (true, true) | (false, false) => {}
        }
        sqlx::query("UPDATE tokens SET expires_at = $1 WHERE id = $2")
            .bind(after.token.expires_at.map(Timestamp::as_millisecond))
            .bind(&after.token.id)
            .execute(&mut *transaction)
            .await?;
        let (data, pre_data) = (Some(after.token.data()), Some(before.token.data()));
        let entry = Entry { data, pre_data, ..after.token.entry() };
        audit::record(&mut transaction, actor, EventKind::TokenUpdated, entry).await?;
        self.database.announce(&mut transaction).await?;
        transaction.commit().await?;
        let mut held = self.held().clone();
        held.retain(|held| held.token.id != after.token.id);
        held.push(after.clone());
        self.replace(held);
        self.publish();
        Ok(Some(after.token))
    }

    pub(super) async fn delete(
        &self,
        actor: &Actor,
        identifier: &str,
    ) -> Result<Option<ApiToken>, Error> {
        let _change = self.change.lock().await;
        let mut transaction = self.database.write(Lane::Control).await?;
        let Some(Held { token, .. }) = find(&mut transaction, identifier).await? else {
            return Ok(None);
        };
        rights::require(&mut transaction, actor, Action::Delete, token.kind).await?;
        sqlx::query("DELETE FROM tokens WHERE id = $1")
            .bind(&token.id)
            .execute(&mut *transaction)
            .await?;
        let entry = Entry { pre_data: Some(token.data()), ..token.entry() };
        audit::record(&mut transaction, actor, EventKind::TokenDeleted, entry).await?;
        self.database.announce(&mut transaction).await?;
        transaction.commit().await?;
        let mut held = self.held().clone();
        held.retain(|held| held.token.id != token.id);
        self.replace(held);
        self.publish();
        Ok(Some(token))
    }

    /// Notes that tokens were used just now, at most once a minute each.
    pub(super) async fn note_uses(&self, used: &HashSet<TokenDigest>) -> Result<(), Error> {
        let now = now();
        let is_due = |held: &&Held| {
            let seen = held.token.seen_at.is_some_and(|at| now.duration_since(at) < SEEN);
            !seen && used.contains(&held.digest)
        };
        let due: HashSet<TokenDigest> =
            self.held().iter().filter(is_due).map(|held| held.digest).collect();
        if due.is_empty() {
            return Ok(());
        }
        let _change = self.change.lock().await;
        let mut transaction = self.database.write(Lane::Control).await?;
        for digest in &due {
            sqlx::query("UPDATE tokens SET seen_at = $1 WHERE digest = $2")
                .bind(now.as_millisecond())
                .bind(digest.hex())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        let mut held = self.held().clone();
        for held in held.iter_mut().filter(|held| due.contains(&held.digest)) {
            held.token.seen_at = Some(now);
        }
        self.replace(held);
        Ok(())
    }

    fn held(&self) -> RwLockReadGuard<'_, Vec<Held>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn replace(&self, mut held: Vec<Held>) {
        sort(&mut held);
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = held;
        self.changed.send_replace(());
    }

    /// Tells which tokens are valid, after a change and when one has expired.
    pub(super) fn publish(&self) {
        if let Some(auth) = &*self.told.lock().unwrap_or_else(PoisonError::into_inner) {
            auth.set_given(self.grants());
        }
    }
}

/// The one of this id, or of this secret.
fn named<'a>(held: &'a [Held], identifier: &str) -> Option<&'a Held> {
    let digest = TokenDigest::of(identifier);
    held.iter().find(|it| it.token.id == identifier || it.digest == digest)
}

fn sort(held: &mut [Held]) {
    held.sort_by(|one, other| {
        let key = |held: &Held| (held.token.created_at, held.token.id.clone());
        key(one).cmp(&key(other))
    });
}

async fn load(database: &Database) -> Result<Vec<Held>, Error> {
    let begun = Instant::now();
    let mut connection = database.connection().await?;
    let rows = sqlx::query("SELECT * FROM tokens").fetch_all(&mut *connection).await?;
    drop(connection);
    database.health().record_reload(begun);
    let mut held: Vec<Held> =
        rows.iter().filter_map(|row| read(row).transpose()).collect::<Result<_, _>>()?;
    sort(&mut held);
    Ok(held)
}

async fn find(transaction: &mut Connection, identifier: &str) -> Result<Option<Held>, Error> {
    let row = sqlx::query("SELECT * FROM tokens WHERE id = $1 OR digest = $2")
        .bind(identifier)
        .bind(TokenDigest::of(identifier).hex())
        .fetch_optional(transaction)
        .await?;
    Ok(row.as_ref().map(read).transpose()?.flatten())
}

/// The token of a row; `None` where it is of a kind that only a later version knows.
fn read(row: &AnyRow) -> Result<Option<Held>, sqlx::Error> {
    let time = |millis: Option<i64>| millis.map(of_millis);
    let kind = TokenKind::parse(row.try_get("kind")?);
    let digest = TokenDigest::from_hex(row.try_get("digest")?);
    let projects: Vec<String> = serde_json::from_str(row.try_get("projects")?).unwrap_or_default();
    let (Some(kind), Some(digest)) = (kind, digest) else { return Ok(None) };
    let token = ApiToken {
        id: row.try_get("id")?,
        name: row.try_get("name")?,
        kind,
        environment: Environment::new(row.try_get("environment")?),
        projects: Projects::from_list(projects.iter().map(String::as_str)),
        expires_at: time(row.try_get("expires_at")?),
        created_at: of_millis(row.try_get("created_at")?),
        created_by: row.try_get("created_by")?,
        seen_at: time(row.try_get("seen_at")?),
        masked: row.try_get::<String, _>("masked")?.into(),
    };
    Ok(Some(Held { digest, token }))
}

/// Whether there is no token.
pub(super) async fn is_empty(connection: &mut Connection) -> Result<bool, Error> {
    let any = sqlx::query("SELECT id FROM tokens LIMIT 1").fetch_optional(connection).await?;
    Ok(any.is_none())
}

/// Whether there is each of these tokens.
pub(super) async fn has_all(
    connection: &mut Connection,
    tokens: impl Iterator<Item = (TokenKind, &Token)>,
) -> Result<bool, Error> {
    for (_, token) in tokens {
        let found = sqlx::query("SELECT id FROM tokens WHERE digest = $1");
        let found = found.bind(token.digest().hex()).fetch_optional(&mut *connection).await?;
        if found.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes a new token and its event.
pub(super) async fn insert(
    transaction: &mut Connection,
    actor: &Actor,
    token: &ApiToken,
    secret: &Token,
) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO tokens (id, digest, name, kind, environment, projects, masked, expires_at, \
         created_at, created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(&token.id)
    .bind(secret.digest().hex())
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
    let entry = Entry { data: Some(token.data()), ..token.entry() };
    audit::record(transaction, actor, EventKind::TokenCreated, entry).await
}
