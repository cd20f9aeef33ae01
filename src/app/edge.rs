//! The edge: flags, verdicts and usage by way of upstream.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tracing::{info, warn};

use super::{
    admin_token,
    plan::{Admin, Error, Plan, Source},
    reload::{EdgeTokens, Live},
};
use crate::{
    auth::{self, Admission, Authenticator, Authority, Denied, Issuer},
    config::{self, Credentials as Given, Folder},
    saver::Saver,
    snapshot::Snapshots,
    store::{self, Key, Store, edge_backup},
    sync::upstream::{Follower, Wanted},
    telemetry::{Latch, report},
    token::{Environment, Grant, Projects, Scope, Token, TokenKind},
    upstream::{AdminToken, Credentials, Upstream},
    usage::Sink,
};

/// How often tokens of the operator that nobody could judge are asked for again.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How often the operator's tokens are looked at again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// What an edge does besides answering.
#[derive(Debug)]
pub(super) struct Edge {
    follower: Follower,
    /// Tokens of the operator, to be judged before they are used.
    tokens: watch::Receiver<Vec<Token>>,
    backup: Vec<(Token, Grant)>,
    /// Released when the operator's tokens are judged and have flags.
    tokens_taken: Latch,
    /// Released when the environments that are wanted at the start have flags.
    flags_there: Latch,
}

/// Connects the parts of an edge and serves what an earlier run, of Parapet or of Unleash Edge, has
/// left in the backup folder.
pub(super) async fn plan(
    edge: config::Edge,
    auth: &auth::Config,
    snapshots: &Snapshots,
    latch: Latch,
) -> Result<Plan, Error> {
    let store = keep_in(&edge.backup_folder)?;
    let saver = Saver::new(store.clone());
    let upstream = Upstream::new(edge.upstream)?;
    let (credentials, wanted, admin, tokens) = match edge.credentials {
        Given::Admin { token, file, fleet, environments } => {
            let token = AdminToken::new(token, file);
            let credentials =
                Credentials::with_admin(token.clone(), &fleet, upstream.clone(), saver.clone());
            info!(fleet, list_interval = ?auth.list_interval, "Upstream's admin token is exchanged for a token per environment");
            let wanted = environments.map_or_else(|| Wanted::Enabled(token.clone()), Wanted::Named);
            (credentials, wanted, Some(token), Vec::new())
        }
        Given::Given(tokens) => {
            if tokens.is_empty() {
                info!(
                    "No token is configured: the first valid client token of an environment that an SDK presents fetches its flags, and until then this instance is not ready"
                );
            }
            (Credentials::without_admin(), Wanted::Offered, None, tokens)
        }
    };
    let discovered = Arc::new(Notify::new());
    let follower = Follower {
        config: edge.sync,
        wanted,
        upstream: upstream.clone(),
        credentials: credentials.clone(),
        discovered: Arc::clone(&discovered),
        snapshots: snapshots.clone(),
        store: store.clone(),
        saver,
    };
    follower.restore().await;
    let backup = migrate(edge.backup_folder.path(), &follower).await;
    // Later starts have verdicts of their own, which know of revocations since. Only looked for: who
    // loads the record reports what is wrong with it.
    let backup = if store.has(&Key::Verdicts).await { Vec::new() } else { backup };
    let given = admin.iter().map(|token| admin_token::grant(&token.current())).collect();
    let (send_tokens, tokens) = watch::channel(tokens);
    let tokens_given = admin.clone().map_or(EdgeTokens::Backend(send_tokens), EdgeTokens::Admin);
    let live = Live::Edge { tokens: tokens_given, refetch: Arc::clone(&discovered) };
    Ok(Plan {
        control: None,
        copies_registry: false,
        name: "edge",
        source: Source::Upstream(Box::new(Edge {
            follower,
            tokens,
            backup,
            tokens_taken: latch.another(),
            flags_there: latch,
        })),
        authority: Authority::Upstream(Box::new(Issuer {
            upstream: upstream.clone(),
            admin: admin.clone(),
            credentials: credentials.clone(),
            discovered: Arc::clone(&discovered),
        })),
        admin: admin.map(|token| Admin { token, credentials: credentials.clone(), discovered }),
        live: Some(live),
        given,
        sink: Sink::Upstream { upstream: upstream.clone(), credentials },
        upstream: Some(upstream),
        relays: edge.admin_relay,
        store,
    })
}

/// Keeps state in a folder. One that nobody named is not insisted on: Unleash Edge starts in a
/// container that has no place to write to, and so does its successor.
fn keep_in(folder: &Folder) -> Result<Store, store::Error> {
    Store::directory(folder.path()).or_else(|error| match folder {
        Folder::Named(_) => Err(error),
        Folder::Default(_) => {
            warn!(
                error = report(&error),
                "Nothing is kept for the next start, which needs upstream for flags and tokens; usage that upstream has not taken at the end is lost. Name a place that can be written to by --backup-folder"
            );
            Ok(Store::memory())
        }
    })
}

/// Reads what Unleash Edge has left in the folder; what cannot be read is left out.
///
/// Its flags of an environment are those that the client tokens which it knew see.
async fn migrate(folder: &Path, follower: &Follower) -> Vec<(Token, Grant)> {
    let tokens = edge_backup::tokens(folder).await.unwrap_or_else(|error| {
        warn!(error = report(&error), "Unleash Edge's backup of tokens is not used");
        Vec::new()
    });
    match edge_backup::features(folder).await {
        Ok(backups) => {
            for (environment, text) in backups {
                let grants = tokens.iter().map(|(_, grant)| grant).filter(|grant| {
                    grant.kind == TokenKind::Client && grant.scope.environment == environment
                });
                let projects = grants.fold(Projects::Only(BTreeSet::new()), |seen, grant| {
                    seen.union(&grant.scope.projects)
                });
                follower.serve(Scope { environment, projects }, text.get().as_bytes()).await;
            }
        }
        Err(error) => warn!(error = report(&error), "Unleash Edge's backup of flags is not used"),
    }
    tokens
}

impl Edge {
    /// Saves flags and credentials.
    pub(super) fn saver(&self) -> Saver {
        self.follower.saver.clone()
    }

    /// Follows upstream until dropped.
    pub(super) async fn run(&self, auth: &Authenticator) {
        for (token, grant) in &self.backup {
            auth.import(token, grant);
        }
        let Self { follower, tokens, tokens_taken, flags_there, .. } = self;
        let tokens = take_tokens(tokens.clone(), auth, follower, tokens_taken);
        tokio::join!(follower.clone().run(flags_there), tokens);
    }
}

/// Has the operator's tokens judged, again and again: each that is valid is offered as a credential on
/// the way, also one that upstream denied for a while.
///
/// The latch is released when each has been judged once and those that are valid have flags: a
/// mistyped token keeps nobody from the flags of the others. While upstream cannot be asked, or accepts
/// none of them, flags of an earlier run are enough.
///
/// The list may be replaced at any time. A token that is missing in the new one is forgotten once the
/// others are judged, so that there is no time without any.
async fn take_tokens(
    mut configured: watch::Receiver<Vec<Token>>,
    auth: &Authenticator,
    Follower { snapshots, credentials, .. }: &Follower,
    latch: &Latch,
) {
    let mut useless = BTreeSet::new();
    // Those of this list, and of earlier ones until this one is judged.
    let mut taken: Vec<Token> = Vec::new();
    loop {
        let tokens = configured.borrow_and_update().clone();
        if tokens.is_empty() {
            latch.release();
        }
        let mut environments = BTreeSet::new();
        let mut judged = true;
        for token in &tokens {
            let why = match auth.authenticate(token.expose()).await {
                Ok(Admission { grant, .. }) if grant.kind == TokenKind::Client => {
                    environments.insert(grant.scope.environment.clone());
                    useless.remove(&token.digest());
                    continue;
                }
                Err(Denied::Unavailable) => {
                    judged = false;
                    continue;
                }
                Ok(_) => "it is no backend token",
                Err(Denied::Unknown) => "upstream does not know it",
                Err(Denied::Forbidden) => "upstream forbids its use (403)",
            };
            if useless.insert(token.digest()) {
                // Unleash does not vouch for admin tokens, none of which names an environment.
                let hint = match token.environment() {
                    Some(_) => "",
                    None => "; an admin token belongs into --upstream-admin-token",
                };
                warn!(token = %token.masked(), "A token of --tokens fetches nothing: {why}{hint}");
            }
        }
        taken.extend(
            tokens.iter().filter(|token| !taken.contains(token)).cloned().collect::<Vec<_>>(),
        );
        if judged {
            credentials.set_configured_validated();
            for token in taken.iter().filter(|token| !tokens.contains(token)) {
                auth.forget(&token.digest());
                useless.remove(&token.digest());
            }
            taken.clone_from(&tokens);
        }
        let flags_are_there = async {
            for environment in &environments {
                snapshots.wait_for(environment).await;
            }
        };
        let waits_for_flags = judged && !latch.is_released() && !environments.is_empty();
        if waits_for_flags {
            let names: Vec<_> = environments.iter().map(Environment::as_str).collect();
            latch.waits_for(format!("the first flags of {}", names.join(", ")));
        } else {
            latch.waits_for(if judged {
                "a configured client token that upstream accepts"
            } else {
                "upstream's answer to the configured tokens"
            });
            if !snapshots.environments().is_empty() {
                latch.release();
            }
        }
        tokio::select! {
            () = sleep(if judged { LOOK_AGAIN_AFTER } else { ASK_AGAIN_AFTER }) => {}
            Ok(()) = configured.changed() => {}
            () = flags_are_there, if waits_for_flags => latch.release(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_folder_that_was_named_must_be_writable() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let nowhere = file.path().join("backup");
        let error = keep_in(&Folder::Named(nowhere.clone())).expect_err("a file is in the way");
        assert!(matches!(error, store::Error::Directory { .. }), "{error:?}");
        let store = keep_in(&Folder::Default(nowhere)).expect("memory");
        store.save(&Key::Verdicts, "x").await.expect("save");

        let folder = tempfile::tempdir().expect("folder");
        keep_in(&Folder::Default(folder.path().join("backup"))).expect("store");
        assert!(folder.path().join("backup").is_dir());
    }
}
