//! A token to create: its rules, and the generation of its secret.
//!
//! The admin API applies the same rules to the fields of a request, to report all errors at once. This
//! module does not check whether an environment or a project exists: the command line may create a token
//! before the flags.

use jiff::Timestamp;
use zeroize::Zeroizing;

use super::{cookie_token, database::now, error::Error};
use crate::{
    protocol::admin::{MAX_PROJECTS, Name, ScopeId},
    token::{Environment, Projects, Token, TokenKind},
};

/// The error for an admin token with a narrower scope, so that it never has more access than requested.
const ADMIN_SCOPE_ERROR: &str = "must be *: admin tokens see all";

/// A token to create.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NewToken {
    /// Its display name.
    pub name: String,
    /// Its kind.
    pub kind: TokenKind,
    /// Its environment; `*` for admin tokens.
    pub environment: Environment,
    /// Its projects.
    pub projects: Projects,
    /// The time of its expiry.
    pub expires_at: Option<Timestamp>,
}

impl NewToken {
    /// Generates a secret in Unleash's v2 format: a public selector, and a verifier of 256 random bits.
    pub(super) fn generate_secret(&self) -> Token {
        let projects = match &self.projects {
            Projects::All => "*",
            Projects::Only(ids) => match ids.first() {
                Some(id) if ids.len() == 1 => id.as_str(),
                _ => "[]",
            },
        };
        let (selector, verifier) =
            (cookie_token::random_base64url::<16>(), cookie_token::random_base64url::<32>());
        let environment = &self.environment;
        let text = format!("{projects}:{environment}.v2_{}_{}", *selector, *verifier);
        Token::parse(&Zeroizing::new(text)).expect("checked names and base64url make a token")
    }

    /// Checks all rules; the error is the first one that is violated.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let Self { kind, environment, projects, .. } = self;
        Name::parse(&self.name).map_err(|reason| Error::invalid("tokenName", reason))?;
        Self::check_environment(Some(*kind), environment.as_str())
            .map_err(|reason| Error::invalid("environment", reason))?;
        Self::check_projects(Some(*kind), &projects.to_list())
            .map_err(|reason| Error::invalid("projects", reason))?;
        match self.expires_at.map(Self::check_expiry) {
            Some(Err(reason)) => Err(Error::invalid("expiresAt", reason)),
            Some(Ok(())) | None => Ok(()),
        }
    }

    /// Checks an environment for a token of this kind, if the kind is known. The error describes the
    /// expected value.
    pub fn check_environment(kind: Option<TokenKind>, environment: &str) -> Result<(), String> {
        match (kind, environment) {
            (Some(TokenKind::Client | TokenKind::Frontend), "*") => {
                Err("must be one: only admin tokens see all of them".to_owned())
            }
            (Some(TokenKind::Admin), name) if name != "*" => Err(ADMIN_SCOPE_ERROR.to_owned()),
            (_, name) => ScopeId::parse(name).map(drop),
        }
    }

    /// Checks the projects for a token of this kind, if the kind is known. The error describes the
    /// expected value.
    pub fn check_projects(kind: Option<TokenKind>, projects: &[&str]) -> Result<(), String> {
        if projects.is_empty() || projects.len() > MAX_PROJECTS {
            return Err(format!("must name 1 to {MAX_PROJECTS}, or `*` for all"));
        }
        if kind == Some(TokenKind::Admin) && projects.iter().any(|id| *id != "*") {
            return Err(ADMIN_SCOPE_ERROR.to_owned());
        }
        projects.iter().try_for_each(|id| ScopeId::parse(id).map(drop))
    }

    /// Checks the time of an expiry. The error describes the expected value.
    pub fn check_expiry(expires_at: Timestamp) -> Result<(), &'static str> {
        if expires_at <= now() { Err("must be in the future") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scope_must_suit_the_kind_of_a_token() {
        let (admin, client) = (Some(TokenKind::Admin), Some(TokenKind::Client));
        for (kind, environment, is_valid) in [
            (admin, "*", true),
            (admin, "dev", false),
            (client, "dev", true),
            (client, "*", false),
            (client, "a.b", false),
            (client, "", false),
            (None, "*", true),
            (None, "a.b", false),
        ] {
            let checked = NewToken::check_environment(kind, environment);
            assert_eq!(checked.is_ok(), is_valid, "{kind:?} {environment}: {checked:?}");
        }
        let many = vec!["a"; MAX_PROJECTS + 1];
        for (kind, projects, is_valid) in [
            (admin, &["*"][..], true),
            (admin, &["web"], false),
            (client, &["*"], true),
            (client, &["web", "api"], true),
            (client, &["a b"], false),
            (client, &[], false),
            (client, &many[1..], true),
            (client, &many, false),
        ] {
            let checked = NewToken::check_projects(kind, projects);
            assert_eq!(checked.is_ok(), is_valid, "{kind:?} {projects:?}: {checked:?}");
        }
    }
}
