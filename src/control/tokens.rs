//! The registry of a standalone instance's tokens: digests, names and grants, kept in the store.
//!
//! A secret exists in plaintext only while it is created; afterwards nobody can read it again.

use jiff::Timestamp;
use rand::Rng as _;
use serde::{Deserialize, Serialize};

use crate::{
    store::{self, Key, Store},
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
};

/// The environment that generated tokens are for.
const FIRST_ENVIRONMENT: &str = "development";

/// The random bytes of a generated secret, 256 bits.
const SECRET_BYTES: usize = 32;

/// Why the registry cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed.
    #[error("the registry of tokens cannot be opened")]
    Store(#[from] store::Error),
    /// What was stored is no registry of this version.
    #[error("the stored registry of tokens cannot be read")]
    Malformed(#[source] serde_json::Error),
}

/// Tokens to create.
#[derive(Clone, Copy, Debug)]
pub struct Seed<'a> {
    /// For operators.
    pub admin: &'a [Token],
    /// For server SDKs.
    pub client: &'a [Token],
    /// For frontend SDKs.
    pub frontend: &'a [Token],
}

/// Every token that this instance has issued.
#[derive(Debug)]
pub struct Registry {
    entries: Vec<Entry>,
}

/// Freshly created tokens, to be shown to their owner once.
#[derive(Debug)]
pub struct Generated {
    /// Opens the admin listener.
    pub admin: Token,
    /// For server SDKs.
    pub client: Token,
    /// For frontend SDKs.
    pub frontend: Token,
}

/// How the registry was found.
#[derive(Debug)]
pub enum Opened {
    /// It had tokens already; seeds are ignored.
    Existing,
    /// It was empty and has taken over the seeds.
    Seeded,
    /// It was empty, there were no seeds, and these were generated.
    Generated(Generated),
}

impl Registry {
    /// Opens the registry of `store`; the first time, creates the seeds or else generates tokens.
    pub async fn open(store: &Store, seed: Seed<'_>) -> Result<(Self, Opened), Error> {
        if let Some(stored) = store.load(&Key::Registry).await? {
            let stored: Stored = serde_json::from_slice(&stored).map_err(Error::Malformed)?;
            return Ok((Self { entries: stored.tokens }, Opened::Existing));
        }
        let given = [
            (TokenKind::Admin, seed.admin),
            (TokenKind::Client, seed.client),
            (TokenKind::Frontend, seed.frontend),
        ];
        let given =
            given.into_iter().flat_map(|(kind, tokens)| tokens.iter().map(move |it| (kind, it)));
        let mut registry =
            Self { entries: given.map(|(kind, it)| Entry::new("init", kind, it)).collect() };
        let opened = if registry.entries.is_empty() {
            let generated = Generated::new();
            registry.entries.extend(generated.entries());
            Opened::Generated(generated)
        } else {
            Opened::Seeded
        };
        let stored = Stored { version: VERSION, tokens: registry.entries };
        let bytes = serde_json::to_vec(&stored).expect("entries are plain text");
        store.save(&Key::Registry, &bytes).await?;
        Ok((Self { entries: stored.tokens }, opened))
    }

    /// What each token allows, by its digest.
    pub fn grants(&self) -> impl Iterator<Item = (TokenDigest, Grant)> {
        self.entries.iter().filter_map(Entry::grant)
    }
}

impl Generated {
    fn new() -> Self {
        Self {
            admin: generate("*:*"),
            client: generate(&format!("*:{FIRST_ENVIRONMENT}")),
            frontend: generate(&format!("*:{FIRST_ENVIRONMENT}")),
        }
    }

    fn entries(&self) -> [Entry; 3] {
        [
            Entry::new("first admin", TokenKind::Admin, &self.admin),
            Entry::new("first client", TokenKind::Client, &self.client),
            Entry::new("first frontend", TokenKind::Frontend, &self.frontend),
        ]
    }
}

fn generate(scope: &str) -> Token {
    let mut secret = [0_u8; SECRET_BYTES];
    rand::rng().fill_bytes(&mut secret);
    let digits = secret.iter().map(|byte| format!("{byte:02x}"));
    let text = zeroize::Zeroizing::new(format!("{scope}.{}", digits.collect::<String>()));
    Token::parse(&text).expect("a scope, a dot and hexadecimal digits are a token")
}

/// The grant that a token's own text names; for forms that name no environment, that of `fallback`.
pub fn grant_of(kind: TokenKind, token: &Token, fallback: &Environment) -> Grant {
    let environment = token.environment().unwrap_or_else(|| fallback.clone());
    let projects = token.projects().unwrap_or(Projects::All);
    Grant { kind, scope: Scope { environment, projects } }
}

const VERSION: u32 = 1;

#[derive(Deserialize, Serialize)]
struct Stored {
    version: u32,
    tokens: Vec<Entry>,
}

/// A token as it is stored.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    token_name: String,
    r#type: String,
    environment: String,
    projects: Vec<String>,
    digest: String,
    masked: String,
    created_at: Timestamp,
}

impl Entry {
    fn new(name: &str, kind: TokenKind, token: &Token) -> Self {
        let Grant { scope, .. } = grant_of(kind, token, &Environment::new("*"));
        Self {
            token_name: name.to_owned(),
            r#type: kind.as_str().to_owned(),
            environment: scope.environment.as_str().to_owned(),
            projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            digest: token.digest().hex(),
            masked: token.masked().to_string(),
            created_at: Timestamp::now(),
        }
    }

    fn grant(&self) -> Option<(TokenDigest, Grant)> {
        let scope = Scope {
            environment: Environment::new(&self.environment),
            projects: Projects::from_list(self.projects.iter().map(String::as_str)),
        };
        let kind = TokenKind::parse(&self.r#type)?;
        Some((TokenDigest::from_hex(&self.digest)?, Grant { kind, scope }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Seed<'_> = Seed { admin: &[], client: &[], frontend: &[] };

    #[tokio::test]
    async fn the_first_start_generates_tokens_and_later_ones_know_them() {
        let store = Store::memory();
        let (first, opened) = Registry::open(&store, NONE).await.unwrap();
        let Opened::Generated(generated) = opened else { panic!("nothing was there") };
        assert_eq!(first.grants().count(), 3);
        let stored = store.load(&Key::Registry).await.unwrap().unwrap();
        assert!(!String::from_utf8(stored).unwrap().contains(generated.client.expose()));
        let (again, opened) = Registry::open(&store, NONE).await.unwrap();
        assert!(matches!(opened, Opened::Existing));
        let found = again.grants().find(|(digest, _)| *digest == generated.frontend.digest());
        let (_, grant) = found.unwrap();
        assert_eq!(grant.kind, TokenKind::Frontend);
        assert_eq!(grant.scope.environment.as_str(), FIRST_ENVIRONMENT);
    }

    #[tokio::test]
    async fn seeds_fill_an_empty_registry_and_no_other() {
        let store = Store::memory();
        let client = [Token::parse("web:production.some-secret").unwrap()];
        let seed = Seed { client: &client, ..NONE };
        let (registry, opened) = Registry::open(&store, seed).await.unwrap();
        assert!(matches!(opened, Opened::Seeded));
        let (digest, grant) = registry.grants().next().unwrap();
        assert_eq!(digest, client[0].digest());
        assert_eq!(grant.scope.projects, Projects::from_list(["web"]));
        let other = [Token::parse("*:production.another").unwrap()];
        let (registry, _) = Registry::open(&store, Seed { client: &other, ..NONE }).await.unwrap();
        assert_eq!(registry.grants().count(), 1);
    }
}
