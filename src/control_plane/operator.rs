//! The originator of an operation, and the permissions that it has.
//!
//! Whether they are still current is checked by `authorization`.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    permissions::{MissingPermission, RootRole, TokenAction, TokenPermission},
    session_ref::SessionRef,
};
use crate::token::{TokenDigest, TokenKind};

/// The authenticated originator of an operation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Operator {
    /// A person who has signed in.
    Account {
        /// The id of the account.
        account_id: i64,
        /// Its username.
        username: String,
        /// Its role.
        role: RootRole,
        /// Permissions in addition to its role.
        granted_permissions: BTreeSet<TokenPermission>,
        /// The session of the request.
        session: SessionRef,
    },
    /// A person who has signed in to the upstream Unleash server, without permissions on this instance.
    Upstream {
        /// The person's name there.
        name: String,
    },
    /// An admin API token.
    Token {
        /// The token's name.
        name: String,
        /// The token.
        digest: TokenDigest,
    },
    /// The command line, with access to the database.
    CommandLine,
}

impl Operator {
    /// The name in audit events.
    pub fn name(&self) -> &str {
        match self {
            Self::Account { username, .. } => username,
            Self::Upstream { name } | Self::Token { name, .. } => name,
            Self::CommandLine => "command line",
        }
    }

    /// The id of the operator's account, if it has one.
    pub fn account_id(&self) -> Option<i64> {
        match self {
            Self::Account { account_id: id, .. } => Some(*id),
            Self::Upstream { .. } | Self::Token { .. } | Self::CommandLine => None,
        }
    }

    /// Whether the operator has every permission.
    pub fn is_admin(&self) -> bool {
        match self {
            Self::Account { role, .. } => *role == RootRole::Admin,
            Self::Upstream { .. } => false,
            Self::Token { .. } | Self::CommandLine => true,
        }
    }

    /// Fails unless the operator is an admin.
    pub fn require_admin(&self) -> Result<(), MissingPermission> {
        if self.is_admin() { Ok(()) } else { Err(MissingPermission::ADMIN) }
    }

    /// Fails unless the operator has the permission for `action` on tokens of `kind`.
    pub fn require_permission(
        &self,
        action: TokenAction,
        kind: TokenKind,
    ) -> Result<(), MissingPermission> {
        let Some(needed) = TokenPermission::required_for_token(action, kind) else {
            return self.require_admin();
        };
        if self.has_permission(needed) {
            Ok(())
        } else {
            Err(MissingPermission::new(needed.as_str()))
        }
    }

    /// Whether the operator can see tokens of `kind` and their properties.
    ///
    /// Every operator can see client tokens. Frontend tokens need any permission on them.
    pub fn can_see(&self, kind: TokenKind) -> bool {
        let any =
            [TokenAction::Create, TokenAction::Read, TokenAction::Update, TokenAction::Delete];
        match kind {
            TokenKind::Admin => self.is_admin(),
            TokenKind::Client => true,
            TokenKind::Frontend => {
                any.into_iter().any(|action| self.require_permission(action, kind).is_ok())
            }
        }
    }

    /// The names of the operator's permissions: `ADMIN`, or each permission by role or grant.
    pub fn permission_names(&self) -> impl Iterator<Item = &'static str> {
        let held = TokenPermission::ALL
            .into_iter()
            .filter(|it| !self.is_admin() && self.has_permission(*it));
        self.is_admin()
            .then_some(MissingPermission::ADMIN.permission())
            .into_iter()
            .chain(held.map(TokenPermission::as_str))
    }

    fn has_permission(&self, permission: TokenPermission) -> bool {
        match self {
            Self::Account { role, granted_permissions: permissions, .. } => {
                role.permissions().contains(&permission) || permissions.contains(&permission)
            }
            Self::Upstream { .. } => false,
            Self::Token { .. } | Self::CommandLine => true,
        }
    }
}

/// An operator with its client address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Actor {
    /// The operator.
    pub operator: Operator,
    /// The client address of the request; `None` for the command line.
    pub address: Option<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTIONS: [TokenAction; 4] =
        [TokenAction::Create, TokenAction::Read, TokenAction::Update, TokenAction::Delete];
    const KINDS: [TokenKind; 3] = [TokenKind::Admin, TokenKind::Client, TokenKind::Frontend];

    fn account(role: RootRole, permissions: &[TokenPermission]) -> Operator {
        let permissions = permissions.iter().copied().collect();
        let (username, session) = ("ann".to_owned(), SessionRef::example());
        Operator::Account {
            account_id: 7,
            username,
            role,
            granted_permissions: permissions,
            session,
        }
    }

    /// All combinations of role or grant, action and kind of token.
    #[test]
    fn each_action_needs_its_role_or_its_own_grant() {
        let may =
            |operator: &Operator, action, kind| operator.require_permission(action, kind).is_ok();
        for action in ACTIONS {
            for kind in KINDS {
                let needed = TokenPermission::required_for_token(action, kind);
                let name = needed.map_or("ADMIN", TokenPermission::as_str);
                for admin in [
                    account(RootRole::Admin, &[]),
                    Operator::Token { name: "ci".to_owned(), digest: TokenDigest::of("ci") },
                    Operator::CommandLine,
                ] {
                    assert!(may(&admin, action, kind));
                }
                let editor = account(RootRole::Editor, &[]);
                assert_eq!(may(&editor, action, kind), name.starts_with("READ_"), "{name}");
                let viewer = account(RootRole::Viewer, &[]);
                assert_eq!(
                    viewer.require_permission(action, kind),
                    Err(MissingPermission::new(name))
                );
                for granted in TokenPermission::ALL {
                    let viewer = account(RootRole::Viewer, &[granted]);
                    assert_eq!(may(&viewer, action, kind), needed == Some(granted), "{name}");
                }
            }
        }
    }

    #[test]
    fn client_tokens_are_visible_to_all_and_frontend_tokens_by_permission() {
        let viewer = account(RootRole::Viewer, &[]);
        assert!(viewer.can_see(TokenKind::Client));
        assert!(!viewer.can_see(TokenKind::Frontend));
        assert!(account(RootRole::Editor, &[]).can_see(TokenKind::Frontend));
        for granted in TokenPermission::ALL {
            let viewer = account(RootRole::Viewer, &[granted]);
            let frontend = granted.as_str().contains("FRONTEND");
            assert_eq!(viewer.can_see(TokenKind::Frontend), frontend, "{granted:?}");
            assert!(!viewer.can_see(TokenKind::Admin));
        }
        assert!(account(RootRole::Admin, &[]).can_see(TokenKind::Admin));
    }

    #[test]
    fn permission_names_include_those_of_the_role() {
        let names = |operator: &Operator| operator.permission_names().collect::<Vec<_>>();
        assert_eq!(names(&Operator::CommandLine), ["ADMIN"]);
        assert_eq!(names(&account(RootRole::Admin, &TokenPermission::ALL)), ["ADMIN"]);
        let editor = account(RootRole::Editor, &[TokenPermission::CreateClientApiToken]);
        let expect =
            ["CREATE_CLIENT_API_TOKEN", "READ_CLIENT_API_TOKEN", "READ_FRONTEND_API_TOKEN"];
        assert_eq!(names(&editor), expect);
    }
}
