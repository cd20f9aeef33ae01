//! What an empty database begins with: an admin's account, and tokens.

use std::collections::HashSet;

use super::{
    accounts::{self, NewAccount},
    database::{Connection, Database, Lane},
    error::Error,
    initial::{self, InitialSetting},
    password::{Hasher, Password},
    permission::{Actor, Operator, RootRole},
    registry::{self, ApiToken, NewToken},
};
use crate::token::{Environment, Grant, Projects, Scope, Token, TokenKind};

/// The environment of tokens that name none.
const FIRST_ENVIRONMENT: &str = "development";

/// Tokens for an empty registry.
#[derive(Clone, Debug, Default)]
pub struct Seed {
    /// For operators.
    pub admin: Vec<Token>,
    /// For server SDKs.
    pub client: Vec<Token>,
    /// For frontend SDKs.
    pub frontend: Vec<Token>,
}

impl Seed {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all().next().is_none()
    }

    /// Each of them, with what it is for.
    pub(super) fn all(&self) -> impl Iterator<Item = (TokenKind, &Token)> {
        let kinds = [
            (TokenKind::Admin, &self.admin),
            (TokenKind::Client, &self.client),
            (TokenKind::Frontend, &self.frontend),
        ];
        kinds.into_iter().flat_map(|(kind, tokens)| tokens.iter().map(move |it| (kind, it)))
    }
}

/// The account of an empty database.
#[derive(Clone, Debug)]
pub struct FirstAccount {
    /// Its name.
    pub username: String,
    /// Its password; `None` generates one.
    pub password: Option<Password>,
}

/// What was found and what was made.
#[derive(Debug)]
pub struct Opened {
    /// The account, when this was the first start.
    pub account: Option<MadeAccount>,
    /// The tokens.
    pub tokens: FoundTokens,
    /// What was given and is not what the first start was given: it has no effect.
    pub ignored: Vec<InitialSetting>,
}

/// The account of the first start.
#[derive(Debug)]
pub struct MadeAccount {
    /// Its name.
    pub username: String,
    /// Its password where that was generated, to be shown to its owner once.
    pub generated: Option<Password>,
}

/// How the registry of tokens was found.
#[derive(Debug)]
pub enum FoundTokens {
    /// It had tokens, or has lost them all since the first start; seeds are ignored where it had.
    Existing,
    /// It was empty and has taken over the seeds.
    Seeded,
    /// This was the first start, there were no seeds, and these were generated.
    Generated(Box<Generated>),
}

/// Freshly made tokens, to be shown to their owner once.
#[derive(Debug)]
pub struct Generated {
    /// Opens the admin listener.
    pub admin: Token,
    /// For server SDKs.
    pub client: Token,
    /// For frontend SDKs.
    pub frontend: Token,
}

/// The grant that a token's own text names; for forms that name no environment, that of `fallback`.
pub fn grant_of(kind: TokenKind, token: &Token, fallback: &Environment) -> Grant {
    let environment = match kind {
        TokenKind::Admin => Environment::new("*"),
        _ => token.environment().unwrap_or_else(|| fallback.clone()),
    };
    let projects = token.projects().unwrap_or(Projects::All);
    Grant { kind, scope: Scope { environment, projects } }
}

/// Makes what an empty database lacks; of instances that start at once, one does.
///
/// It is announced before it lasts, for once it does nobody can read it again. Where it does not last
/// after all, the next start makes and announces others.
pub(super) async fn begin(
    database: &Database,
    hasher: &Hasher,
    seed: &Seed,
    first: &FirstAccount,
    announce: impl FnOnce(&Opened),
) -> Result<Opened, Error> {
    let password = first.password.clone().unwrap_or_else(Password::generate);
    let generated = first.password.is_none().then(|| password.clone());
    let (is_first, kept) = {
        let mut connection = database.connection().await?;
        // The last account is never deleted, so that only a first start finds none.
        let is_first = accounts::count(&mut connection).await? == 0;
        (is_first, initial::find(&mut connection, InitialSetting::Password).await?)
    };
    // Of a database that has kept no password yet, the first that is given counts as unchanged.
    let keeps_given = !is_first && first.password.is_some() && kept.is_none();
    // Hashing is slow, and so done before the database is locked.
    let hash = if is_first || keeps_given { Some(hasher.hash(&password).await?) } else { None };
    let mut ignored = Vec::new();
    if let (Some(given), Some(kept)) = (&first.password, &kept)
        && !hasher.verify(given, Some(kept)).await?
    {
        ignored.push(InitialSetting::Password);
    }
    let mut transaction = database.write(Lane::Control).await?;
    let actor = Actor { operator: Operator::Shell, address: None };
    let mut account = None;
    if let Some(hash) = &hash
        && is_first
        && accounts::count(&mut transaction).await? == 0
    {
        let username = first.username.clone();
        let role = RootRole::Admin;
        let new = NewAccount { username, name: None, email: None, role, password };
        let made = accounts::insert(&mut transaction, &actor, new, hash).await?;
        account = Some(MadeAccount { username: made.username, generated });
    }
    let (seeds, tokens) = if !registry::is_empty(&mut transaction).await? {
        (Vec::new(), FoundTokens::Existing)
    } else if !seed.is_empty() {
        let seeds = seed.all().map(|(kind, token)| ("init", kind, token.clone()));
        (seeds.collect(), FoundTokens::Seeded)
    } else if account.is_some() {
        let generated = Generated::new();
        let seeds = vec![
            ("first admin", TokenKind::Admin, generated.admin.clone()),
            ("first client", TokenKind::Client, generated.client.clone()),
            ("first frontend", TokenKind::Frontend, generated.frontend.clone()),
        ];
        (seeds, FoundTokens::Generated(Box::new(generated)))
    } else {
        // Somebody has deleted them all, and was not asked for others.
        (Vec::new(), FoundTokens::Existing)
    };
    // A token that is given twice is what it was given for first.
    let mut seen = HashSet::new();
    for (name, kind, secret) in seeds.into_iter().filter(|it| seen.insert(it.2.digest())) {
        let Grant { scope, .. } = grant_of(kind, &secret, &Environment::new(FIRST_ENVIRONMENT));
        let Scope { environment, projects } = scope;
        let new = NewToken { name: name.to_owned(), kind, environment, projects, expires_at: None };
        let token = ApiToken::new(new, &secret, actor.operator.name());
        registry::insert(&mut transaction, &actor, &token, &secret).await?;
    }
    if !seen.is_empty() {
        database.announce(&mut transaction).await?;
    }
    if let Some(hash) = hash.filter(|_| keeps_given || account.is_some()) {
        initial::keep(&mut transaction, InitialSetting::Password, &hash).await?;
    }
    if !seed.is_empty() && !keeps_seed(&mut transaction, seed, &tokens).await? {
        ignored.push(InitialSetting::Tokens);
    }
    let opened = Opened { account, tokens, ignored };
    announce(&opened);
    transaction.commit().await?;
    Ok(opened)
}

/// Whether `seed` is what the registry began with, which is then kept.
///
/// Of a database that has kept no digest yet, it is that if the registry has all of its tokens.
async fn keeps_seed(
    transaction: &mut Connection,
    seed: &Seed,
    found: &FoundTokens,
) -> Result<bool, Error> {
    let digest = initial::digest_of(seed);
    let is_kept = match (found, initial::find(transaction, InitialSetting::Tokens).await?) {
        (FoundTokens::Existing, Some(kept)) => return Ok(kept == digest),
        (FoundTokens::Existing, None) => registry::has_all(transaction, seed.all()).await?,
        (FoundTokens::Seeded | FoundTokens::Generated(_), _) => true,
    };
    if is_kept {
        initial::keep(transaction, InitialSetting::Tokens, &digest).await?;
    }
    Ok(is_kept)
}

impl Generated {
    fn new() -> Self {
        let secret = |kind, environment: &str| {
            let environment = Environment::new(environment);
            let projects = Projects::All;
            NewToken { name: String::new(), kind, environment, projects, expires_at: None }.secret()
        };
        Self {
            admin: secret(TokenKind::Admin, "*"),
            client: secret(TokenKind::Client, FIRST_ENVIRONMENT),
            frontend: secret(TokenKind::Frontend, FIRST_ENVIRONMENT),
        }
    }
}
