//! The grants of offline mode's configured tokens, and the environments that local tokens name.

use std::collections::BTreeSet;

use crate::{
    config::OfflineConfig,
    control_plane::grant_from_token,
    token::{Environment, Grant, Token, TokenDigest, TokenKind},
};

/// The grants of offline mode's configured tokens, and the environments of its SDK tokens.
pub(super) fn offline_tokens(
    offline: &OfflineConfig,
) -> (Vec<(TokenDigest, Grant)>, BTreeSet<Environment>) {
    let fallback = Environment::new(Environment::DEFAULT);
    let grants = |kind, tokens: &[Token]| {
        let grant = |token| grant_from_token(kind, token, &fallback);
        tokens.iter().map(|token| (token.digest(), grant(token))).collect::<Vec<_>>()
    };
    let mut tokens = grants(TokenKind::Client, &offline.client_tokens);
    tokens.extend(grants(TokenKind::Frontend, &offline.frontend_tokens));
    tokens.extend(grants(TokenKind::Admin, &offline.admin_tokens));
    let environments = sdk_environments(&tokens);
    (tokens, environments)
}

/// The environments of SDK tokens.
pub(super) fn sdk_environments(tokens: &[(TokenDigest, Grant)]) -> BTreeSet<Environment> {
    let sdk = tokens.iter().filter(|(_, grant)| grant.kind != TokenKind::Admin);
    sdk.map(|(_, grant)| grant.scope.environment.clone()).collect()
}
