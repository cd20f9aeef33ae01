//! Roles and permissions.
//!
//! This module only defines them. The permissions of an account are stored by `account_changes`; each
//! operation states itself which permission it requires.

use std::fmt;

use crate::token::TokenKind;

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

    pub(super) fn permissions(self) -> &'static [TokenPermission] {
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

    pub(super) const fn new(permission: &'static str) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

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
