//! Roles, permissions and operators.
//!
//! This module only defines them. The permissions of an account are stored by `accounts`; each operation
//! states itself which permission it requires.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use super::sessions::SessionRef;
use crate::token::{TokenDigest, TokenKind};

/// The role of an account, which implies permissions.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum RootRole {
    /// Has every permission.
    Admin,
    /// Can read client and frontend tokens.
    Editor,
    /// Can see client tokens, like every account.
    Viewer,
}

impl RootRole {
    /// Every role, in the order of their ids.
    pub const ALL: [Self; 3] = [Self::Admin, Self::Editor, Self::Viewer];

    /// The id of the role in Unleash's admin API.
    pub fn id(self) -> i64 {
        match self {
            Self::Admin => 1,
            Self::Editor => 2,
            Self::Viewer => 3,
        }
    }

    /// The role with that id.
    pub fn from_id(id: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.id() == id)
    }

    /// The display name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Editor => "Editor",
            Self::Viewer => "Viewer",
        }
    }

    fn permissions(self) -> &'static [TokenPermission] {
        match self {
            Self::Admin => &TokenPermission::ALL,
            Self::Editor => {
                &[TokenPermission::ReadClientApiToken, TokenPermission::ReadFrontendApiToken]
            }
            Self::Viewer => &[],
        }
    }
}

/// An operation on a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TokenAction {
    /// Creating a token.
    Create,
    /// Reading its properties; the secret can never be read.
    Read,
    /// Changing its expiry.
    Update,
    /// Deleting it.
    Delete,
}

/// A permission that an admin can grant to any account.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(missing_docs, reason = "each name is its documentation: an operation and a kind of token")]
pub enum TokenPermission {
    CreateClientApiToken,
    ReadClientApiToken,
    UpdateClientApiToken,
    DeleteClientApiToken,
    CreateFrontendApiToken,
    ReadFrontendApiToken,
    UpdateFrontendApiToken,
    DeleteFrontendApiToken,
}

impl TokenPermission {
    /// Every permission.
    pub const ALL: [Self; 8] = [
        Self::CreateClientApiToken,
        Self::ReadClientApiToken,
        Self::UpdateClientApiToken,
        Self::DeleteClientApiToken,
        Self::CreateFrontendApiToken,
        Self::ReadFrontendApiToken,
        Self::UpdateFrontendApiToken,
        Self::DeleteFrontendApiToken,
    ];

    /// The permission required for `action` on a token of `kind`; `None` if only an admin may do it.
    pub fn required_for_token(action: TokenAction, kind: TokenKind) -> Option<Self> {
        Some(match (kind, action) {
            (TokenKind::Admin, _) => return None,
            (TokenKind::Client, TokenAction::Create) => Self::CreateClientApiToken,
            (TokenKind::Client, TokenAction::Read) => Self::ReadClientApiToken,
            (TokenKind::Client, TokenAction::Update) => Self::UpdateClientApiToken,
            (TokenKind::Client, TokenAction::Delete) => Self::DeleteClientApiToken,
            (TokenKind::Frontend, TokenAction::Create) => Self::CreateFrontendApiToken,
            (TokenKind::Frontend, TokenAction::Read) => Self::ReadFrontendApiToken,
            (TokenKind::Frontend, TokenAction::Update) => Self::UpdateFrontendApiToken,
            (TokenKind::Frontend, TokenAction::Delete) => Self::DeleteFrontendApiToken,
        })
    }

    /// The name of the permission in the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CreateClientApiToken => "CREATE_CLIENT_API_TOKEN",
            Self::ReadClientApiToken => "READ_CLIENT_API_TOKEN",
            Self::UpdateClientApiToken => "UPDATE_CLIENT_API_TOKEN",
            Self::DeleteClientApiToken => "DELETE_CLIENT_API_TOKEN",
            Self::CreateFrontendApiToken => "CREATE_FRONTEND_API_TOKEN",
            Self::ReadFrontendApiToken => "READ_FRONTEND_API_TOKEN",
            Self::UpdateFrontendApiToken => "UPDATE_FRONTEND_API_TOKEN",
            Self::DeleteFrontendApiToken => "DELETE_FRONTEND_API_TOKEN",
        }
    }

    /// The permission with that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.as_str() == name)
    }

    /// The permissions that a grant of `name` contains: the one with that name, or both permissions to
    /// create tokens for `CREATE_API_TOKEN`.
    pub fn from_grant_name(name: &str) -> Option<&'static [Self]> {
        if name == "CREATE_API_TOKEN" {
            return Some(&[Self::CreateClientApiToken, Self::CreateFrontendApiToken]);
        }
        Self::ALL.iter().find(|it| it.as_str() == name).map(std::slice::from_ref)
    }
}

/// A permission that an operator lacks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MissingPermission {
    permission: &'static str,
    purpose: &'static str,
}

impl MissingPermission {
    pub(super) const ADMIN: Self = Self::new("ADMIN");

    const fn new(permission: &'static str) -> Self {
        Self { permission, purpose: "do this" }
    }

    /// The same with the purpose of the permission: the infinitive that follows "to" in the message.
    pub(super) fn with_purpose(self, purpose: &'static str) -> Self {
        Self { purpose, ..self }
    }

    /// The name in the admin API: that of a permission, or `ADMIN`.
    pub fn permission(self) -> &'static str {
        self.permission
    }
}

impl fmt::Display for MissingPermission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "you need the {} permission to {}", self.permission, self.purpose)
    }
}

impl std::error::Error for MissingPermission {}

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
            .then_some(MissingPermission::ADMIN.permission)
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

    #[test]
    fn permission_names_are_parsed_and_create_api_token_grants_both_creates() {
        for permission in TokenPermission::ALL {
            assert_eq!(TokenPermission::parse(permission.as_str()), Some(permission));
            assert_eq!(
                TokenPermission::from_grant_name(permission.as_str()),
                Some(&[permission][..])
            );
        }
        let both = [TokenPermission::CreateClientApiToken, TokenPermission::CreateFrontendApiToken];
        assert_eq!(TokenPermission::from_grant_name("CREATE_API_TOKEN"), Some(&both[..]));
        assert_eq!(TokenPermission::from_grant_name("ADMIN"), None);
    }
}
