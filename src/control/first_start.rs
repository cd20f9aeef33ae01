//! What an empty database begins with: an admin's account, and tokens.

use std::collections::HashSet;

use super::{
    accounts::{self, NewAccount},
    database::{Database, Lane},
    error::Error,
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
        self.admin.is_empty() && self.client.is_empty() && self.frontend.is_empty()
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
pub(super) async fn begin(
    database: &Database,
    hasher: &Hasher,
    seed: &Seed,
    first: &FirstAccount,
) -> Result<Opened, Error> {
    let password = first.password.clone().unwrap_or_else(Password::generate);
    let generated = first.password.is_none().then(|| password.clone());
    // The last account is never deleted, so that only a first start finds none. Hashing is slow,
    // and so done before the database is locked.
    let hash = match accounts::count(&mut *database.connection().await?).await? {
        0 => Some(hasher.hash(&password).await?),
        _ => None,
    };
    let mut transaction = database.write(Lane::Control).await?;
    let actor = Actor { operator: Operator::Shell, address: None };
    let mut account = None;
    if let Some(hash) = &hash
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
        let of = |kind, tokens: &[Token]| {
            tokens.iter().map(move |it| ("init", kind, it.clone())).collect::<Vec<_>>()
        };
        let mut seeds = of(TokenKind::Admin, &seed.admin);
        seeds.extend(of(TokenKind::Client, &seed.client));
        seeds.extend(of(TokenKind::Frontend, &seed.frontend));
        (seeds, FoundTokens::Seeded)
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
    transaction.commit().await?;
    Ok(Opened { account, tokens })
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
