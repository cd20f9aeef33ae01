//! The tokens with which the edge itself authenticates at upstream, per environment.
//!
//! With an admin token they come from the token exchange. Without one they are the valid client tokens
//! of the configuration and of SDKs. This module does not validate tokens: upstream and `auth` do.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

use super::{
    admin_token::AdminToken,
    client::Upstream,
    token_provisioning::{Error, ProvisioningHistory, TokenProvisioner},
    token_set::{Credential, TokenSet},
};
use crate::{
    background_writer::BackgroundWriter,
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
};

/// How long after the start to wait for SDKs to present tokens of an earlier run again.
const EXPECTATION_TIMEOUT: Duration = Duration::from_mins(5);

/// The edge's own tokens for upstream. A cheap handle.
#[derive(Clone)]
pub struct EnvironmentTokens(Arc<Inner>);

struct Inner {
    token_sets: RwLock<HashMap<Environment, TokenSet>>,
    provisioning: Option<(TokenProvisioner, ProvisioningHistories)>,
    started: Instant,
    /// Whether upstream has validated each configured token.
    are_configured_tokens_validated: AtomicBool,
    /// Client tokens of an earlier run that have not been presented since, with their projects.
    expected_tokens: RwLock<HashMap<Environment, HashMap<TokenDigest, Projects>>>,
}

/// The exchange history of each environment. Its lock is held during an exchange, so that concurrent
/// callers share one exchange.
type ProvisioningHistories =
    Mutex<HashMap<Environment, Arc<tokio::sync::Mutex<ProvisioningHistory>>>>;

impl EnvironmentTokens {
    /// Exchanges `admin` for tokens named `parapet-<fleet>`, which `writer` stores encrypted.
    pub fn with_admin(
        admin: AdminToken,
        fleet: &str,
        upstream: Upstream,
        writer: BackgroundWriter,
    ) -> Self {
        let exchange = TokenProvisioner::new(admin, fleet, upstream, writer);
        Self::new(Some((exchange, ProvisioningHistories::default())))
    }

    /// Uses only [offered](Self::offer) tokens.
    pub fn without_admin() -> Self {
        Self::new(None)
    }

    fn new(provisioning: Option<(TokenProvisioner, ProvisioningHistories)>) -> Self {
        Self(Arc::new(Inner {
            token_sets: RwLock::default(),
            provisioning,
            started: Instant::now(),
            are_configured_tokens_validated: AtomicBool::new(false),
            expected_tokens: RwLock::default(),
        }))
    }

    /// The tokens to use for `environment`: accepted before refused ones, those with the most projects
    /// first, of equals the one offered first. Tokens covered by an earlier one are left out.
    pub fn tokens(&self, environment: &Environment) -> Vec<Credential> {
        let token_sets = self.0.token_sets.read().unwrap_or_else(PoisonError::into_inner);
        token_sets.get(environment).map(TokenSet::tokens_in_use).unwrap_or_default()
    }

    /// The environments with at least one token.
    pub fn environments(&self) -> BTreeSet<Environment> {
        let token_sets = self.0.token_sets.read().unwrap_or_else(PoisonError::into_inner);
        token_sets.iter().filter(|(_, set)| !set.is_empty()).map(|(name, _)| name.clone()).collect()
    }

    /// The token for sending usage of `environment`: the one with the most projects.
    pub fn usage_token(&self, environment: &Environment) -> Option<Token> {
        self.tokens(environment).into_iter().next().map(|it| it.token)
    }

    /// Adds a valid token, unless the edge uses an admin token. Returns whether it covers projects that
    /// no token covered before.
    pub fn offer(&self, token: &Token, grant: &Grant) -> bool {
        if self.0.provisioning.is_some() || grant.kind != TokenKind::Client {
            return false;
        }
        let credential =
            Credential { token: token.clone(), projects: grant.scope.projects.clone() };
        let is_wider =
            self.update_token_set(&grant.scope.environment, |set| set.insert(credential));
        self.remove_expected(&token.digest());
        is_wider
    }

    /// Records a token that was valid in an earlier run and will probably be offered again.
    pub fn expect_token(&self, token: TokenDigest, grant: &Grant) {
        if self.0.provisioning.is_none() && grant.kind == TokenKind::Client {
            let Scope { environment, projects } = grant.scope.clone();
            let mut expected =
                self.0.expected_tokens.write().unwrap_or_else(PoisonError::into_inner);
            expected.entry(environment).or_default().insert(token, projects);
        }
    }

    fn remove_expected(&self, token: &TokenDigest) {
        let mut expected = self.0.expected_tokens.write().unwrap_or_else(PoisonError::into_inner);
        expected.retain(|_, tokens| {
            tokens.remove(token);
            !tokens.is_empty()
        });
    }

    /// Records that upstream has validated each configured token.
    pub fn mark_configured_validated(&self) {
        self.0.are_configured_tokens_validated.store(true, Ordering::Relaxed);
    }

    /// Whether every expected token for `environment` is available. Flags of an earlier run may still be
    /// needed until upstream has validated each configured token and SDKs have presented theirs again,
    /// for at most 5 minutes.
    pub fn is_complete(&self, environment: &Environment) -> bool {
        if self.0.provisioning.is_some() {
            return true;
        }
        if !self.0.are_configured_tokens_validated.load(Ordering::Relaxed) {
            return false;
        }
        if self.0.started.elapsed() >= EXPECTATION_TIMEOUT {
            return true;
        }
        let available = self.tokens(environment);
        let no_projects = Projects::Only(BTreeSet::new());
        let seen = available.iter().fold(no_projects, |seen, it| seen.union(&it.projects));
        let expected = self.0.expected_tokens.read().unwrap_or_else(PoisonError::into_inner);
        expected.get(environment).is_none_or(|it| it.values().all(|it| seen.covers(it)))
    }

    /// Records that upstream accepts a token; an earlier refusal was temporary.
    pub fn mark_accepted(&self, environment: &Environment, token: &TokenDigest) {
        self.update_token_set(environment, |set| set.mark_accepted(token));
    }

    /// Removes an offered token that was revoked; its flags may then be removed.
    ///
    /// A refusal alone does not mean revocation. Exchanged tokens are replaced, not removed.
    pub fn revoke(&self, token: &TokenDigest) {
        if self.0.provisioning.is_some() {
            return;
        }
        let mut token_sets = self.0.token_sets.write().unwrap_or_else(PoisonError::into_inner);
        for set in token_sets.values_mut() {
            set.remove(token);
        }
        drop(token_sets);
        self.remove_expected(token);
    }

    /// The tokens for `environment`, never empty; obtained by an exchange if there is none.
    ///
    /// Concurrent callers share one exchange. Dropping the future while a token is being created loses
    /// that token.
    pub async fn obtain(&self, environment: &Environment) -> Result<Vec<Credential>, Error> {
        let available = self.tokens(environment);
        if !available.is_empty() {
            return Ok(available);
        }
        let Some((exchange, histories)) = &self.0.provisioning else {
            return Err(Error::NoToken { environment: environment.clone() });
        };
        let history = exchange_history(histories, environment);
        let mut history = history.lock().await;
        let available = self.tokens(environment);
        if !available.is_empty() {
            return Ok(available);
        }
        let credential = exchange.obtain(environment, &mut history).await?;
        Ok(self.set_token(environment, credential))
    }

    /// The tokens for `environment` after upstream has refused one of them with 401 or 403.
    ///
    /// Tokens are created at most once a minute, and with growing pauses while upstream keeps refusing
    /// them.
    ///
    /// # Errors
    /// If there is no other token. The refused one then stays in use: the refusal may be temporary.
    pub async fn replace_refused(
        &self,
        environment: &Environment,
        refused: &TokenDigest,
    ) -> Result<Vec<Credential>, Error> {
        let Some((exchange, histories)) = &self.0.provisioning else {
            let (is_new, has_accepted) = self.update_token_set(environment, |set| {
                (set.mark_refused(refused), set.has_accepted())
            });
            if is_new {
                warn!("Upstream refuses a token for environment {environment}");
            }
            let no_token = || Error::NoToken { environment: environment.clone() };
            return has_accepted.then(|| self.tokens(environment)).ok_or_else(no_token);
        };
        let history = exchange_history(histories, environment);
        let mut history = history.lock().await;
        let available = self.tokens(environment);
        if !available.is_empty() && available.iter().all(|it| it.token.digest() != *refused) {
            return Ok(available);
        }
        warn!(
            "Upstream refuses the edge's token for environment {environment}; looking for another"
        );
        let credential = exchange.replace(environment, &mut history, *refused).await?;
        Ok(self.set_token(environment, credential))
    }

    /// Encrypts the tokens in use with the current admin token, after it has been replaced, and saves
    /// them.
    ///
    /// Stored tokens that are not in use can no longer be decrypted; when one is needed, another token
    /// is found or created. Waits for exchanges in progress, and so for upstream.
    pub async fn reencrypt(&self) {
        let Some((exchange, histories)) = &self.0.provisioning else { return };
        // Includes environments with an exchange in progress: their token may already be encrypted.
        let environments: Vec<_> =
            histories.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        for environment in environments {
            let history = exchange_history(histories, &environment);
            // The lock prevents a concurrent replacement of the token.
            let mut history = history.lock().await;
            for credential in self.tokens(&environment) {
                exchange.reencrypt(&environment, &mut history, &credential);
            }
        }
    }

    /// Makes `credential` the only token of `environment`.
    fn set_token(&self, environment: &Environment, credential: Credential) -> Vec<Credential> {
        self.update_token_set(environment, |set| {
            *set = TokenSet::default();
            set.insert(credential.clone());
        });
        vec![credential]
    }

    fn update_token_set<T>(
        &self,
        environment: &Environment,
        change: impl FnOnce(&mut TokenSet) -> T,
    ) -> T {
        let mut token_sets = self.0.token_sets.write().unwrap_or_else(PoisonError::into_inner);
        change(token_sets.entry(environment.clone()).or_default())
    }
}

impl fmt::Debug for EnvironmentTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnvironmentTokens").finish_non_exhaustive()
    }
}

fn exchange_history(
    histories: &ProvisioningHistories,
    environment: &Environment,
) -> Arc<tokio::sync::Mutex<ProvisioningHistory>> {
    let mut histories = histories.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(histories.entry(environment.clone()).or_default())
}

#[cfg(test)]
mod tests;
