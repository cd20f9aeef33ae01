//! Bootstrap of an empty database: creates an admin's account and the initial tokens.

use std::collections::HashSet;

use super::{
    account_changes::{self, NewAccount},
    account_queries,
    database::{Connection, Database, WriteLock},
    error::Error,
    initial_settings::{self, InitialSetting, InitialTokens},
    new_token::NewToken,
    operator::{Actor, Operator},
    password::{Hasher, Password},
    permissions::RootRole,
    registered_token::TokenMetadata,
    token_registry,
};
use crate::token::{Environment, Grant, Projects, Scope, Token, TokenKind};

/// The admin's account that the first start creates.
#[derive(Clone, Debug)]
pub struct InitialAccount {
    /// Its username.
    pub username: String,
    /// Its password; `None` generates one.
    pub password: Option<Password>,
}

/// The result of the bootstrap.
#[derive(Debug)]
pub struct BootstrapReport {
    /// The created account, if this was the first start.
    pub account: Option<CreatedAccount>,
    /// The state of the token registry.
    pub tokens: TokenBootstrapOutcome,
    /// Settings that differ from those of the first start and therefore have no effect.
    pub ignored_settings: Vec<InitialSetting>,
}

/// The account that the first start has created.
#[derive(Debug)]
pub struct CreatedAccount {
    /// Its username.
    pub username: String,
    /// Its password if that was generated, to be shown to its owner once.
    pub generated_password: Option<Password>,
}

/// The state of the token registry at the start.
#[derive(Debug)]
pub enum TokenBootstrapOutcome {
    /// It had tokens, in which case initial tokens are ignored, or all were deleted since the first
    /// start.
    Existing,
    /// It was empty, and the initial tokens were created.
    Seeded,
    /// This was the first start without initial tokens, and these were generated.
    Generated(Box<GeneratedTokens>),
}

/// Generated tokens, to be shown to their owner once.
#[derive(Debug)]
pub struct GeneratedTokens {
    /// For the admin API.
    pub admin: Token,
    /// For server SDKs.
    pub client: Token,
    /// For frontend SDKs.
    pub frontend: Token,
}

/// The grant that the text of a token contains; `fallback` is the environment of formats without one.
pub fn grant_from_token(kind: TokenKind, token: &Token, fallback: &Environment) -> Grant {
    let environment = match kind {
        TokenKind::Admin => Environment::new("*"),
        _ => token.environment().unwrap_or_else(|| fallback.clone()),
    };
    let projects = token.projects().unwrap_or(Projects::All);
    Grant { kind, scope: Scope { environment, projects } }
}

/// Creates the admin's account and the tokens that an empty database lacks. Of several instances that
/// start at once, one does.
///
/// The result is announced before the commit, because generated secrets cannot be read again after it.
/// If the commit fails, the next start generates and announces new ones.
pub(super) async fn initialize(
    database: &Database,
    hasher: &Hasher,
    seed: &InitialTokens,
    first: &InitialAccount,
    announce: impl FnOnce(&BootstrapReport),
) -> Result<BootstrapReport, Error> {
    let password = first.password.clone().unwrap_or_else(Password::generate);
    let generated_password = first.password.is_none().then(|| password.clone());
    let (is_first, stored) = {
        let mut connection = database.connection().await?;
        // The last account cannot be deleted, so only the first start finds none.
        let is_first = account_queries::count(&mut connection).await? == 0;
        (is_first, initial_settings::find(&mut connection, InitialSetting::Password).await?)
    };
    // In a database of an earlier version without a stored hash, the first given password counts as
    // unchanged.
    let stores_given = !is_first && first.password.is_some() && stored.is_none();
    // Hashing is slow, so it is done before the database is locked.
    let hash = if is_first || stores_given { Some(hasher.hash(&password).await?) } else { None };
    let mut ignored_settings = Vec::new();
    if let (Some(given), Some(stored)) = (&first.password, &stored)
        && !hasher.verify(given, Some(stored)).await?
    {
        ignored_settings.push(InitialSetting::Password);
    }
    let mut transaction = database.begin_write(WriteLock::Control).await?;
    let actor = Actor { operator: Operator::CommandLine, address: None };
    let mut account = None;
    if let Some(hash) = &hash
        && is_first
        && account_queries::count(&mut transaction).await? == 0
    {
        let username = first.username.clone();
        let role = RootRole::Admin;
        let new = NewAccount { username, name: None, email: None, role, password };
        let made = account_changes::insert(&mut transaction, &actor, new, hash).await?;
        account = Some(CreatedAccount { username: made.username, generated_password });
    }
    let (seeds, tokens) = if !token_registry::is_empty(&mut transaction).await? {
        (Vec::new(), TokenBootstrapOutcome::Existing)
    } else if !seed.is_empty() {
        let seeds = seed.iter().map(|(kind, token)| ("init", kind, token.clone()));
        (seeds.collect(), TokenBootstrapOutcome::Seeded)
    } else if account.is_some() {
        let generated = GeneratedTokens::new();
        let seeds = vec![
            ("first admin", TokenKind::Admin, generated.admin.clone()),
            ("first client", TokenKind::Client, generated.client.clone()),
            ("first frontend", TokenKind::Frontend, generated.frontend.clone()),
        ];
        (seeds, TokenBootstrapOutcome::Generated(Box::new(generated)))
    } else {
        // All tokens were deleted on purpose; no new ones are generated.
        (Vec::new(), TokenBootstrapOutcome::Existing)
    };
    // A token that is given twice has the kind of its first occurrence.
    let mut seen = HashSet::new();
    for (name, kind, secret) in seeds.into_iter().filter(|it| seen.insert(it.2.digest())) {
        let Grant { scope, .. } =
            grant_from_token(kind, &secret, &Environment::new(Environment::DEFAULT));
        let Scope { environment, projects } = scope;
        let new = NewToken { name: name.to_owned(), kind, environment, projects, expires_at: None };
        let token = TokenMetadata::new(new, &secret, actor.operator.name());
        token_registry::insert(&mut transaction, &actor, &token, &secret).await?;
    }
    if !seen.is_empty() {
        database.notify_token_change(&mut transaction).await?;
    }
    if let Some(hash) = hash.filter(|_| stores_given || account.is_some()) {
        initial_settings::store(&mut transaction, InitialSetting::Password, &hash).await?;
    }
    if !seed.is_empty() && !initial_tokens_match(&mut transaction, seed, &tokens).await? {
        ignored_settings.push(InitialSetting::Tokens);
    }
    let opened = BootstrapReport { account, tokens, ignored_settings };
    announce(&opened);
    transaction.commit().await?;
    Ok(opened)
}

/// Whether `seed` equals the initial tokens of the first start; stores their digest if none is stored
/// yet.
///
/// In a database of an earlier version without a stored digest, they count as equal if the registry
/// contains all of them.
async fn initial_tokens_match(
    transaction: &mut Connection,
    seed: &InitialTokens,
    found: &TokenBootstrapOutcome,
) -> Result<bool, Error> {
    let digest = initial_settings::tokens_digest(seed);
    let is_unchanged =
        match (found, initial_settings::find(transaction, InitialSetting::Tokens).await?) {
            (TokenBootstrapOutcome::Existing, Some(stored)) => return Ok(stored == digest),
            (TokenBootstrapOutcome::Existing, None) => {
                token_registry::has_all(transaction, seed.iter()).await?
            }
            (TokenBootstrapOutcome::Seeded | TokenBootstrapOutcome::Generated(_), _) => true,
        };
    if is_unchanged {
        initial_settings::store(transaction, InitialSetting::Tokens, &digest).await?;
    }
    Ok(is_unchanged)
}

impl GeneratedTokens {
    fn new() -> Self {
        let secret = |kind, environment: &str| {
            let environment = Environment::new(environment);
            let projects = Projects::All;
            NewToken { name: String::new(), kind, environment, projects, expires_at: None }
                .generate_secret()
        };
        Self {
            admin: secret(TokenKind::Admin, "*"),
            client: secret(TokenKind::Client, Environment::DEFAULT),
            frontend: secret(TokenKind::Frontend, Environment::DEFAULT),
        }
    }
}
