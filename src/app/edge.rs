//! Edge mode: flags, token validation and usage through upstream.

use std::{collections::BTreeSet, sync::Arc};

use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use super::{
    admin_token_watcher,
    edge_sync::EdgeSync,
    mode::{AdminTokenParts, Error, FlagSource, ModeParts},
    reload::{EdgeTokens, Reloadable},
    store::{self, OpenedStore},
};
use crate::{
    auth::{self, UpstreamValidator, Validator},
    background_writer::BackgroundWriter,
    config::{self, Credentials as Given},
    event_log::{EventLog, EventLogFollower},
    fleet::Fleet,
    served::Snapshots,
    store::{EdgeBackup, RecordKey, edge_backup},
    sync::{
        UpstreamMode,
        environment_manager::{EnvironmentManager, EnvironmentSelection},
    },
    telemetry::{ReadinessCondition, error_chain},
    token::{Grant, Projects, Scope, Token, TokenKind},
    upstream::{AdminToken, EnvironmentTokens, Upstream, UpstreamUsageSink},
    usage::{self, UsageSink},
};

/// Connects the components of an edge and serves the flags that an earlier run, of Parapet or of Unleash
/// Edge, has left in the store.
pub(super) async fn build(
    edge: config::EdgeConfig,
    auth: &auth::Config,
    usage: &usage::Config,
    snapshots: &Snapshots,
    ready_when: ReadinessCondition,
) -> Result<ModeParts, Error> {
    let OpenedStore { store, edge_backup, redis } = store::open(&edge.store)?;
    let writer = BackgroundWriter::new(Arc::clone(&store));
    let upstream = Upstream::new(edge.upstream)?;
    let (credentials, selection, admin, tokens) = match edge.credentials {
        Given::Admin { token, file, fleet: name, environments } => {
            let token = AdminToken::new(token, file);
            let credentials = EnvironmentTokens::with_admin(
                token.clone(),
                &name,
                upstream.clone(),
                writer.clone(),
            );
            info!(fleet = name, list_interval = ?auth.list_interval, "Exchanging the admin token for one token per environment");
            let selection = environments.map_or_else(
                || EnvironmentSelection::Enabled(token.clone()),
                EnvironmentSelection::Named,
            );
            (credentials, selection, Some(token), Vec::new())
        }
        Given::BackendTokens(tokens) => {
            if tokens.is_empty() {
                info!(
                    "No token is configured. An environment's flags are fetched with the first valid client token that an SDK presents; until then this instance is not ready"
                );
            }
            (EnvironmentTokens::without_admin(), EnvironmentSelection::FromTokens, None, tokens)
        }
    };
    let fleet = edge.fleet.zip(redis).map(|(config, redis)| {
        info!(
            fleet = config.name,
            instance = config.instance_name,
            redis = redis.location(),
            "Acting towards upstream as one with the other instances of the fleet"
        );
        Fleet::new(redis, config)
    });
    let token_added = Arc::new(Notify::new());
    let follower = admin.clone().filter(|_| edge.sync.mode != UpstreamMode::Poll).map(|admin| {
        // As fresh as polling flags and tokens.
        let interval = edge.sync.interval.min(auth.list_interval);
        EventLogFollower::new(upstream.clone(), admin, interval)
    });
    let event_log =
        follower.as_ref().map_or_else(EventLog::unavailable, EventLogFollower::event_log);
    let environments = EnvironmentManager {
        config: edge.sync,
        selection,
        upstream: upstream.clone(),
        credentials: credentials.clone(),
        token_added: Arc::clone(&token_added),
        snapshots: snapshots.clone(),
        store: Arc::clone(&store),
        writer,
        event_log: event_log.clone(),
        fleet: fleet.clone(),
    };
    environments.restore().await;
    // These only check which records exist; problems with them are reported when they are loaded.
    let stored = store.list().await;
    // The backup in a remote store is read only before Parapet has stored anything itself, and only if
    // the store responds.
    let is_first_start = stored.as_ref().is_ok_and(Vec::is_empty);
    let imported = if is_first_start || !store.is_remote() {
        import_edge_backup(&edge_backup, &environments).await
    } else {
        Vec::new()
    };
    // Once Parapet has stored tokens itself, they also reflect later revocations.
    let has_token_cache = stored.map_or(true, |keys| keys.contains(&RecordKey::TokenCache));
    let imported = if has_token_cache { Vec::new() } else { imported };
    let local_tokens =
        admin.iter().map(|token| admin_token_watcher::admin_grant(&token.current())).collect();
    let (send_tokens, configured_tokens) = watch::channel(tokens);
    let edge_tokens = admin.clone().map_or(EdgeTokens::Backend(send_tokens), EdgeTokens::Admin);
    let reloadable = Reloadable::Edge { tokens: edge_tokens, refetch: Arc::clone(&token_added) };
    let upstream_sink: Arc<dyn UsageSink> =
        Arc::new(UpstreamUsageSink::new(upstream.clone(), credentials.clone()));
    let (usage_sink, usage_leader): (Arc<dyn UsageSink>, _) =
        match fleet.as_ref().filter(|_| edge.shares_usage) {
            Some(fleet) => (
                Arc::new(fleet.usage_sink(Arc::clone(&upstream_sink), usage.interval)),
                Some(fleet.usage_leader(upstream_sink, usage.interval)),
            ),
            None => (upstream_sink, None),
        };
    Ok(ModeParts {
        control_plane: None,
        saves_registry_copies: false,
        name: "edge",
        flag_source: FlagSource::Upstream(Box::new(EdgeSync {
            environments,
            event_log: follower,
            configured_tokens,
            imported_tokens: imported,
            tokens_validated: ready_when.add_condition(),
            flags_loaded: ready_when,
        })),
        validator: Validator::Upstream(Box::new(UpstreamValidator::new(
            upstream.clone(),
            admin.clone(),
            credentials.clone(),
            Arc::clone(&token_added),
            event_log,
            fleet.clone(),
        ))),
        admin_token: admin.map(|token| AdminTokenParts {
            token,
            credentials: credentials.clone(),
            token_added,
        }),
        reloadable: Some(reloadable),
        local_tokens,
        usage_sink: Some(usage_sink),
        upstream: Some(upstream),
        fleet,
        usage_leader,
        relays_admin_api: edge.admin_relay,
        store,
    })
}

/// Imports the backup of Unleash Edge; unreadable parts are skipped.
///
/// The scope of an environment's flags is the union of the scopes of Edge's client tokens.
async fn import_edge_backup(
    backup: &EdgeBackup,
    environments: &EnvironmentManager,
) -> Vec<(Token, Grant)> {
    let tokens = edge_backup::load_tokens(backup).await.unwrap_or_else(|error| {
        warn!(
            error = error_chain(&error),
            "Cannot read Unleash Edge's backup of tokens; it is ignored"
        );
        Vec::new()
    });
    match edge_backup::load_features(backup).await {
        Ok(backups) => {
            for (environment, text) in backups {
                let grants = tokens.iter().map(|(_, grant)| grant).filter(|grant| {
                    grant.kind == TokenKind::Client && grant.scope.environment == environment
                });
                let projects = grants.fold(Projects::Only(BTreeSet::new()), |seen, grant| {
                    seen.union(&grant.scope.projects)
                });
                environments
                    .serve_stored(Scope { environment, projects }, text.get().as_bytes())
                    .await;
            }
        }
        Err(error) => {
            warn!(
                error = error_chain(&error),
                "Cannot read Unleash Edge's backup of flags; it is ignored"
            );
        }
    }
    tokens
}
