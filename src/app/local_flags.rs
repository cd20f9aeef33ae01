//! What the modes without an upstream have in common: flags from files, and tokens that are known.

use std::sync::Arc;

use super::{
    mode::{Error, FlagSource, ModeParts},
    reload::Reloadable,
};
use crate::{
    auth::Validator,
    store::Store,
    sync::file_source::FileSource,
    telemetry::Latch,
    token::{Grant, TokenDigest},
};

/// Serves flags from files. The instance is ready once any environment has flags.
pub(super) async fn parts_from_files(
    name: &'static str,
    files: FileSource,
    tokens: Vec<(TokenDigest, Grant)>,
    store: Arc<dyn Store>,
    latch: Latch,
    reloadable: Reloadable,
) -> Result<ModeParts, Error> {
    let flag_source = FlagSource::Files(files.start(latch).await?);
    let validator = Validator::StaticOnly;
    Ok(ModeParts {
        name,
        flag_source,
        validator,
        local_tokens: tokens,
        usage_sink: None,
        upstream: None,
        admin_token: None,
        reloadable: Some(reloadable),
        relays_admin_api: false,
        control_plane: None,
        saves_registry_copies: false,
        store,
    })
}
