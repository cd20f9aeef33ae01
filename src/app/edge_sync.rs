//! The background work of an edge: it keeps flags up to date, and the configured tokens validated.
//!
//! `edge` connects the components; this module only runs them.

use std::{collections::BTreeSet, time::Duration};

use tokio::{sync::watch, time::sleep};
use tracing::warn;

use crate::{
    auth::{AuthError, AuthenticatedToken, Authenticator},
    background_writer::BackgroundWriter,
    event_log::EventLogFollower,
    sync::environment_manager::EnvironmentManager,
    telemetry::ReadinessCondition,
    token::{Environment, Grant, Token, TokenKind},
};

/// Delay before configured tokens are validated again after upstream was unavailable.
const UNAVAILABLE_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Interval at which configured tokens are validated again.
const REVALIDATE_INTERVAL: Duration = Duration::from_secs(30);

/// The background work of an edge.
#[derive(Debug)]
pub(super) struct EdgeSync {
    /// Fetches the flags of each environment.
    pub(super) environments: EnvironmentManager,
    /// Reads upstream's event log, with an admin token.
    pub(super) event_log: Option<EventLogFollower>,
    /// Configured tokens, which must be validated before use.
    pub(super) configured_tokens: watch::Receiver<Vec<Token>>,
    /// Tokens of Unleash Edge's backup, with the rights that it had validated.
    pub(super) imported_tokens: Vec<(Token, Grant)>,
    /// Met when the configured tokens are validated and have flags.
    pub(super) tokens_validated: ReadinessCondition,
    /// Met when the environments selected at the start have flags.
    pub(super) flags_loaded: ReadinessCondition,
}

impl EdgeSync {
    /// Saves flags and credentials in the background.
    pub(super) fn background_writer(&self) -> BackgroundWriter {
        self.environments.writer.clone()
    }

    /// Synchronizes with upstream until dropped.
    pub(super) async fn run(&self, auth: &Authenticator) {
        for (token, grant) in &self.imported_tokens {
            auth.import(token, grant);
        }
        let Self {
            environments,
            event_log,
            configured_tokens,
            tokens_validated: validated,
            flags_loaded: loaded,
            ..
        } = self;
        let tokens =
            validate_configured_tokens(configured_tokens.clone(), auth, environments, validated);
        let follow = async {
            match (event_log, &environments.fleet) {
                (Some(follower), Some(fleet)) => follower.run_while(fleet.upstream_use()).await,
                (Some(follower), None) => follower.run().await,
                (None, _) => {}
            }
        };
        tokio::join!(environments.clone().run(loaded), tokens, follow);
    }
}

/// Validates the configured tokens repeatedly. Validation offers each valid token as a credential,
/// including one that upstream rejected for a while.
///
/// The condition is met when every token has been validated once and the valid ones have flags, so that
/// a mistyped token does not affect the others. While upstream is unavailable, or accepts none of them,
/// flags of an earlier run are sufficient.
///
/// The list may be replaced at any time. Tokens missing from the new list are removed only after the
/// others are validated, so that there is always a usable one.
async fn validate_configured_tokens(
    mut configured: watch::Receiver<Vec<Token>>,
    auth: &Authenticator,
    EnvironmentManager { snapshots, credentials, .. }: &EnvironmentManager,
    ready_when: &ReadinessCondition,
) {
    let mut rejected = BTreeSet::new();
    // Tokens of this list, and of earlier ones until this one is validated.
    let mut active_tokens: Vec<Token> = Vec::new();
    loop {
        let tokens = configured.borrow_and_update().clone();
        if tokens.is_empty() {
            ready_when.mark_met();
        }
        let mut environments = BTreeSet::new();
        let mut all_validated = true;
        for token in &tokens {
            let reason = match auth.authenticate(token.expose()).await {
                Ok(AuthenticatedToken { grant, .. }) if grant.kind == TokenKind::Client => {
                    environments.insert(grant.scope.environment.clone());
                    rejected.remove(&token.digest());
                    continue;
                }
                Err(AuthError::Unavailable) => {
                    all_validated = false;
                    continue;
                }
                Ok(_) => "it is not a backend token",
                Err(AuthError::Unknown) => "upstream does not know it",
                Err(AuthError::Forbidden) => "upstream rejects it (403)",
            };
            if rejected.insert(token.digest()) {
                // Unleash does not validate admin tokens, none of which names an environment.
                let hint = match token.environment() {
                    Some(_) => "",
                    None => "; an admin token belongs in --upstream-admin-token",
                };
                warn!(token = %token.masked(), "A token of --tokens cannot be used: {reason}{hint}");
            }
        }
        active_tokens.extend(
            tokens
                .iter()
                .filter(|token| !active_tokens.contains(token))
                .cloned()
                .collect::<Vec<_>>(),
        );
        if all_validated {
            credentials.mark_configured_validated();
            for token in active_tokens.iter().filter(|token| !tokens.contains(token)) {
                auth.remove_token(&token.digest());
                rejected.remove(&token.digest());
            }
            active_tokens.clone_from(&tokens);
        }
        let flags_loaded = async {
            for environment in &environments {
                snapshots.wait_for_environment(environment).await;
            }
        };
        let waits_for_flags = all_validated && !ready_when.is_met() && !environments.is_empty();
        if waits_for_flags {
            let names: Vec<_> = environments.iter().map(Environment::as_str).collect();
            ready_when.describe(format!("the first flags of {}", names.join(", ")));
        } else {
            ready_when.describe(if all_validated {
                "a configured client token that upstream accepts"
            } else {
                "upstream's answer to the configured tokens"
            });
            if !snapshots.environments().is_empty() {
                ready_when.mark_met();
            }
        }
        tokio::select! {
            () = sleep(if all_validated { REVALIDATE_INTERVAL } else { UNAVAILABLE_RETRY_DELAY }) => {}
            Ok(()) = configured.changed() => {}
            () = flags_loaded, if waits_for_flags => ready_when.mark_met(),
        }
    }
}
