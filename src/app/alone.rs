//! The modes without an upstream: flags from files, tokens given or of an own registry.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};
use tracing::{info, warn};

use super::{
    keep::SaveLog,
    plan::{Error, Plan, Source},
    reload::Live,
};
use crate::{
    auth::Authority,
    config::{FlagsPath, Offline, Standalone},
    control::{Control, InitialSetting, Location, Opened, grant_of},
    secret_file::folder_of,
    snapshot::Snapshots,
    store::{Key, Store},
    sync::files::Files,
    telemetry::{Latch, report},
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
    usage::Sink,
};

/// The environment of a given token that names none.
const FALLBACK: &str = "development";

/// What the given tokens of offline mode allow, and the environments that those for SDKs name.
pub(super) fn given(offline: &Offline) -> (Vec<(TokenDigest, Grant)>, BTreeSet<Environment>) {
    let fallback = Environment::new(FALLBACK);
    let grants = |kind, tokens: &[Token]| {
        let grant = |token| grant_of(kind, token, &fallback);
        tokens.iter().map(|token| (token.digest(), grant(token))).collect::<Vec<_>>()
    };
    let mut given = grants(TokenKind::Client, &offline.client_tokens);
    given.extend(grants(TokenKind::Frontend, &offline.frontend_tokens));
    given.extend(grants(TokenKind::Admin, &offline.admin_tokens));
    let environments = environments(&given);
    (given, environments)
}

/// Flags of a file, tokens of the command line.
pub(super) async fn offline(
    offline: Offline,
    snapshots: &Snapshots,
    latch: Latch,
) -> Result<Plan, Error> {
    let (given, environments) = given(&offline);
    let path = offline.bootstrap_file;
    let files = Files::new(path, environments, snapshots.clone(), offline.reload_interval);
    let live = Live::Offline(files.rereader());
    plan("offline", files, given, Store::memory(), latch, live).await
}

/// How many batches of usage may wait for the registry.
const DELIVERIES: usize = 16;

/// A server of its own; what its first start makes is announced once.
pub(super) async fn standalone(
    standalone: Standalone,
    data_dir: &Path,
    snapshots: &Snapshots,
    latch: Latch,
    announce: impl FnOnce(&Opened),
) -> Result<Plan, Error> {
    let store = Store::directory(data_dir)?;
    // Before there is a database, so that a start which fails here is not the first.
    let flags = flags_of(standalone.flags)?;
    // The file of SQLite is there or not, as the copy would be.
    let is_elsewhere = matches!(standalone.control.location, Location::Postgres(_));
    let copy = if is_elsewhere { load_copy(&store).await } else { None };
    let (control, opened) = Control::open(standalone.control, copy.as_deref(), announce).await?;
    let given = control.grants();
    let named = environments(&given);
    let served = named.iter().cloned().chain(standalone.environments).collect();
    let files = Files::new(flags, served, snapshots.clone(), None);
    let live = Live::Standalone(files.rereader());
    let mut plan = plan("standalone", files, given, store, latch, live).await?;
    let (deliver, deliveries) = mpsc::channel(DELIVERIES);
    plan.sink = Sink::Registry(deliver);
    plan.copies_registry = is_elsewhere;
    plan.control = Some((control, Arc::new(Mutex::new(deliveries))));
    for environment in named.difference(&snapshots.environments()) {
        warn!(%environment, "There are tokens for an environment that no file has flags of");
    }
    for setting in opened.ignored {
        match setting {
            InitialSetting::Tokens => warn!(
                "INIT_*_API_TOKENS have changed since the first start, and are ignored: the registry has tokens already"
            ),
            InitialSetting::Password => warn!(
                "UNLEASH_DEFAULT_ADMIN_PASSWORD has changed since the first start, and is ignored: `parapet account password` sets another"
            ),
        }
    }
    Ok(plan)
}

/// The place of the flags, with an example of them where they are missing.
fn flags_of(flags: FlagsPath) -> Result<PathBuf, Error> {
    /// Flags for everything that can be tried.
    const EXAMPLE: &[u8] = include_bytes!("../../config/flags.json");
    let path = match flags {
        FlagsPath::Existing(path) => return Ok(path),
        FlagsPath::Example(path) => path,
    };
    let write = || {
        fs::create_dir_all(folder_of(&path))?;
        File::create_new(&path)?.write_all(EXAMPLE)
    };
    match write() {
        Ok(()) => {
            let file = path.display();
            info!(%file, "There were no flags: an example of them is written, to be edited");
            Ok(path)
        }
        Err(source) => Err(Error::Example { path, source }),
    }
}

/// Serves the files; the instance is ready once they have flags of any environment.
async fn plan(
    name: &'static str,
    files: Files,
    given: Vec<(TokenDigest, Grant)>,
    store: Store,
    latch: Latch,
    live: Live,
) -> Result<Plan, Error> {
    let source = Source::Files(files.start(latch).await?);
    let (authority, sink, upstream) = (Authority::Nobody, Sink::None, None);
    let (control, relays, admin) = (None, false, None);
    Ok(Plan {
        name,
        source,
        authority,
        given,
        sink,
        upstream,
        admin,
        live: Some(live),
        relays,
        control,
        copies_registry: false,
        store,
    })
}

/// The copy of the tokens that an earlier run has left.
async fn load_copy(store: &Store) -> Option<Vec<u8>> {
    let copy = store.load(&Key::Registry).await;
    copy.unwrap_or_else(|error| {
        warn!(error = report(&error), "The copy of the tokens cannot be used");
        None
    })
}

/// Keeps a copy of the tokens, from which a start serves where their database is away; until
/// dropped.
pub(super) async fn keep_copy(control: &Control, store: &Store) {
    /// How long to wait before a save that failed is tried again.
    const RETRY: Duration = Duration::from_secs(5);
    let mut changes = control.changes();
    let (mut saved, mut log) = (None, SaveLog::new("The copy of the tokens"));
    loop {
        changes.borrow_and_update();
        let copy = Bytes::from(control.copy());
        if saved.as_ref() != Some(&copy) {
            match store.save(&Key::Registry, copy.clone()).await {
                Ok(()) => {
                    saved = Some(copy);
                    log.succeeded();
                }
                Err(error) => {
                    log.failed(&error);
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// The environments that tokens for SDKs name.
fn environments(given: &[(TokenDigest, Grant)]) -> BTreeSet<Environment> {
    let sdk = given.iter().filter(|(_, grant)| grant.kind != TokenKind::Admin);
    sdk.map(|(_, grant)| grant.scope.environment.clone()).collect()
}
