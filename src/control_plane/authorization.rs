//! Checks the current permissions of an actor in the transaction of a change.
//!
//! Permissions can be withdrawn and sessions can end between the authentication of a request and its
//! effect, because hashing a password is slow and writers wait for each other. So each change checks
//! both again in its own transaction. Each change states itself which permission it requires.

use super::{
    account_queries,
    database::{Connection, now},
    error::Error,
    operator::{Actor, Operator},
    permissions::{MissingPermission, TokenAction},
};
use crate::token::TokenKind;

/// Fails unless `actor` is currently an admin.
pub(super) async fn require_admin(
    transaction: &mut Connection,
    actor: &Actor,
) -> Result<(), Error> {
    Ok(current_operator(transaction, &actor.operator).await?.require_admin()?)
}

/// Fails unless `actor` currently has the permission for `action` on tokens of `kind`.
pub(super) async fn require_permission(
    transaction: &mut Connection,
    actor: &Actor,
    action: TokenAction,
    kind: TokenKind,
) -> Result<(), Error> {
    Ok(current_operator(transaction, &actor.operator).await?.require_permission(action, kind)?)
}

/// The operator with its current permissions. Fails if its account, session or token no longer exists.
pub(super) async fn current_operator(
    transaction: &mut Connection,
    operator: &Operator,
) -> Result<Operator, Error> {
    match operator {
        Operator::Account { account_id, session, .. } => {
            session.require_open(transaction, *account_id).await?;
            let account = account_queries::find(transaction, *account_id)
                .await?
                .ok_or(Error::SessionEnded)?;
            Ok(account.operator(session.clone()))
        }
        Operator::Token { digest, .. } => {
            let valid = sqlx::query(
                "SELECT id FROM tokens WHERE digest = $1 AND kind = $2 \
                 AND (expires_at IS NULL OR expires_at > $3)",
            )
            .bind(digest.to_hex())
            .bind(TokenKind::Admin.as_str())
            .bind(now().as_millisecond())
            .fetch_optional(transaction)
            .await?;
            valid
                .map(|_| operator.clone())
                .ok_or(Error::MissingPermission(MissingPermission::ADMIN))
        }
        Operator::Upstream { .. } | Operator::CommandLine => Ok(operator.clone()),
    }
}
