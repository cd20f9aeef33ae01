//! The modes without an upstream: flags from files, tokens given or of an own registry.

use std::{collections::BTreeSet, path::Path};

use tracing::warn;

use super::plan::{Error, Plan, Source};
use crate::{
    auth::Authority,
    config::{Offline, Standalone},
    control::tokens::{Generated, Opened, Registry, Seed, grant_of},
    snapshot::Snapshots,
    store::Store,
    sync::files::Files,
    telemetry::Latch,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    usage::Sink,
};

/// The environment of a given token that names none.
const FALLBACK: &str = "development";

/// Flags of a file, tokens of the command line.
pub(super) async fn offline(
    offline: Offline,
    snapshots: &Snapshots,
    latch: Latch,
) -> Result<Plan, Error> {
    let fallback = Environment::new(FALLBACK);
    let grants = |kind, tokens: &[Token]| {
        let grant = |token| grant_of(kind, token, &fallback);
        tokens.iter().map(|token| (token.digest(), grant(token))).collect::<Vec<_>>()
    };
    let mut given = grants(TokenKind::Client, &offline.client_tokens);
    given.extend(grants(TokenKind::Frontend, &offline.frontend_tokens));
    given.extend(grants(TokenKind::Admin, &offline.admin_tokens));
    let path = offline.bootstrap_file;
    let files = Files::new(path, environments(&given), snapshots.clone(), offline.reload_interval);
    plan("offline", files, given, Store::memory(), latch).await
}

/// A server of its own; tokens that it generates are announced once.
pub(super) async fn standalone(
    standalone: Standalone,
    data_dir: &Path,
    snapshots: &Snapshots,
    latch: Latch,
    announce: impl FnOnce(&Generated),
) -> Result<Plan, Error> {
    let store = Store::directory(data_dir)?;
    let seed = &standalone.seed;
    let seeds = Seed { admin: &seed.admin, client: &seed.client, frontend: &seed.frontend };
    let (registry, opened) = Registry::open(&store, seeds).await?;
    let given: Vec<_> = registry.grants().collect();
    let files = Files::new(standalone.flags, environments(&given), snapshots.clone(), None);
    let plan = plan("standalone", files, given, store, latch).await?;
    match opened {
        Opened::Existing if !seed.is_empty() => {
            warn!("INIT_*_API_TOKENS are ignored: the registry has tokens already");
        }
        Opened::Existing | Opened::Seeded => {}
        Opened::Generated(generated) => announce(&generated),
    }
    Ok(plan)
}

/// Serves the files; from then on the instance is ready.
async fn plan(
    name: &'static str,
    files: Files,
    given: Vec<(TokenDigest, Grant)>,
    store: Store,
    latch: Latch,
) -> Result<Plan, Error> {
    let source = Source::Files(files.start().await?);
    latch.release();
    let (authority, sink, upstream) = (Authority::Nobody, Sink::None, None);
    Ok(Plan { name, source, authority, given, sink, upstream, store })
}

/// The environments that tokens for SDKs name.
fn environments(given: &[(TokenDigest, Grant)]) -> BTreeSet<Environment> {
    let sdk = given.iter().filter(|(_, grant)| grant.kind != TokenKind::Admin);
    sdk.map(|(_, grant)| grant.scope.environment.clone()).collect()
}
