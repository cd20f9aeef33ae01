//! Roles, permissions, and who acts.
//!
//! Pure words: which account has what is `accounts`', and which operation needs what is written
//! where the operation is.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use super::sessions::SessionRef;
use crate::token::{TokenDigest, TokenKind};

/// What an account may do without any grant.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum RootRole {
    /// Everything.
    Admin,
    /// Reads client and frontend tokens.
    Editor,
    /// Sees client tokens, as everybody does.
    Viewer,
}

impl RootRole {
    /// Every role, in the order of their ids.
    pub const ALL: [Self; 3] = [Self::Admin, Self::Editor, Self::Viewer];

    /// The number by which Unleash's admin API names the role.
    pub fn id(self) -> i64 {
        match self {
            Self::Admin => 1,
            Self::Editor => 2,
            Self::Viewer => 3,
        }
    }

    /// The role of that number.
    pub fn from_id(id: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.id() == id)
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "Admin",
            Self::Editor => "Editor",
            Self::Viewer => "Viewer",
        }
    }

    fn grants(self) -> &'static [Permission] {
        match self {
            Self::Admin => &Permission::ALL,
            Self::Editor => &[Permission::ReadClientApiToken, Permission::ReadFrontendApiToken],
            Self::Viewer => &[],
        }
    }
}

/// What is done to a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Making one.
    Create,
    /// Looking at what it allows; its secret can be read by nobody.
    Read,
    /// Changing when it expires.
    Update,
    /// Ending it.
    Delete,
}

/// What an admin can grant to any account.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(missing_docs, reason = "each name is its documentation: what is done to which tokens")]
pub enum Permission {
    CreateClientApiToken,
    ReadClientApiToken,
    UpdateClientApiToken,
    DeleteClientApiToken,
    CreateFrontendApiToken,
    ReadFrontendApiToken,
    UpdateFrontendApiToken,
    DeleteFrontendApiToken,
}

impl Permission {
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

    /// What `action` on a token of `kind` needs; `None` where only an admin may.
    pub fn for_token(action: Action, kind: TokenKind) -> Option<Self> {
        Some(match (kind, action) {
            (TokenKind::Admin, _) => return None,
            (TokenKind::Client, Action::Create) => Self::CreateClientApiToken,
            (TokenKind::Client, Action::Read) => Self::ReadClientApiToken,
            (TokenKind::Client, Action::Update) => Self::UpdateClientApiToken,
            (TokenKind::Client, Action::Delete) => Self::DeleteClientApiToken,
            (TokenKind::Frontend, Action::Create) => Self::CreateFrontendApiToken,
            (TokenKind::Frontend, Action::Read) => Self::ReadFrontendApiToken,
            (TokenKind::Frontend, Action::Update) => Self::UpdateFrontendApiToken,
            (TokenKind::Frontend, Action::Delete) => Self::DeleteFrontendApiToken,
        })
    }

    /// The name that the admin API has for it.
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

    /// The permission of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.as_str() == name)
    }

    /// What is granted under `name`: one permission, or both creates by `CREATE_API_TOKEN`.
    pub fn granted_by(name: &str) -> Option<&'static [Self]> {
        if name == "CREATE_API_TOKEN" {
            return Some(&[Self::CreateClientApiToken, Self::CreateFrontendApiToken]);
        }
        Self::ALL.iter().find(|it| it.as_str() == name).map(std::slice::from_ref)
    }
}

/// The right that an operator lacks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Missing {
    permission: &'static str,
    purpose: &'static str,
}

impl Missing {
    pub(super) const ADMIN: Self = Self::new("ADMIN");

    const fn new(permission: &'static str) -> Self {
        Self { permission, purpose: "do this" }
    }

    /// The same, with the purpose that the right is needed for: the infinitive that follows "to".
    pub(super) fn to(self, purpose: &'static str) -> Self {
        Self { purpose, ..self }
    }

    /// The name by which the admin API tells it: a permission's, or `ADMIN`.
    pub fn permission(self) -> &'static str {
        self.permission
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "you need the {} permission to {}", self.permission, self.purpose)
    }
}

impl std::error::Error for Missing {}

/// Who acts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Operator {
    /// A person who has signed in.
    Account {
        /// Which account.
        id: i64,
        /// Its name.
        username: String,
        /// Its role.
        role: RootRole,
        /// What was granted to it beyond its role.
        permissions: BTreeSet<Permission>,
        /// The session in which it acts.
        session: SessionRef,
    },
    /// A person who has signed in to the upstream Unleash server: has no permission here.
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
    /// The command line, by whoever may write the database.
    Shell,
}

impl Operator {
    /// The name that audit events show.
    pub fn name(&self) -> &str {
        match self {
            Self::Account { username, .. } => username,
            Self::Upstream { name } | Self::Token { name, .. } => name,
            Self::Shell => "command line",
        }
    }

    /// Which account it is.
    pub fn id(&self) -> Option<i64> {
        match self {
            Self::Account { id, .. } => Some(*id),
            Self::Upstream { .. } | Self::Token { .. } | Self::Shell => None,
        }
    }

    /// Whether it may do everything.
    pub fn is_admin(&self) -> bool {
        match self {
            Self::Account { role, .. } => *role == RootRole::Admin,
            Self::Upstream { .. } => false,
            Self::Token { .. } | Self::Shell => true,
        }
    }

    /// Insists on an admin.
    pub fn require_admin(&self) -> Result<(), Missing> {
        if self.is_admin() { Ok(()) } else { Err(Missing::ADMIN) }
    }

    /// Insists on the permission for `action` on tokens of `kind`.
    pub fn may(&self, action: Action, kind: TokenKind) -> Result<(), Missing> {
        let Some(needed) = Permission::for_token(action, kind) else { return self.require_admin() };
        if self.holds(needed) { Ok(()) } else { Err(Missing::new(needed.as_str())) }
    }

    /// Whether it sees that tokens of `kind` exist, and what they allow.
    ///
    /// Everybody sees client tokens; whoever may do anything with frontend tokens sees those.
    pub fn may_see(&self, kind: TokenKind) -> bool {
        let any = [Action::Create, Action::Read, Action::Update, Action::Delete];
        match kind {
            TokenKind::Admin => self.is_admin(),
            TokenKind::Client => true,
            TokenKind::Frontend => any.into_iter().any(|action| self.may(action, kind).is_ok()),
        }
    }

    /// What it holds by name: `ADMIN`, or each permission by role or grant.
    pub fn permissions(&self) -> impl Iterator<Item = &'static str> {
        let held = Permission::ALL.into_iter().filter(|it| !self.is_admin() && self.holds(*it));
        self.is_admin()
            .then_some(Missing::ADMIN.permission)
            .into_iter()
            .chain(held.map(Permission::as_str))
    }

    fn holds(&self, permission: Permission) -> bool {
        match self {
            Self::Account { role, permissions, .. } => {
                role.grants().contains(&permission) || permissions.contains(&permission)
            }
            Self::Upstream { .. } => false,
            Self::Token { .. } | Self::Shell => true,
        }
    }
}

/// An operator, and from where it acts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Actor {
    /// Who.
    pub operator: Operator,
    /// The address that it was seen to come from.
    pub address: Option<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTIONS: [Action; 4] = [Action::Create, Action::Read, Action::Update, Action::Delete];
    const KINDS: [TokenKind; 3] = [TokenKind::Admin, TokenKind::Client, TokenKind::Frontend];

    fn account(role: RootRole, permissions: &[Permission]) -> Operator {
        let permissions = permissions.iter().copied().collect();
        let (username, session) = ("ann".to_owned(), SessionRef::example());
        Operator::Account { id: 7, username, role, permissions, session }
    }

    /// The whole table: role or grant, operation, kind of token.
    #[test]
    fn each_right_comes_by_its_role_or_its_grant_and_no_other() {
        let of = |operator: &Operator, action, kind| operator.may(action, kind).is_ok();
        for action in ACTIONS {
            for kind in KINDS {
                let needed = Permission::for_token(action, kind);
                let name = needed.map_or("ADMIN", Permission::as_str);
                for admin in [
                    account(RootRole::Admin, &[]),
                    Operator::Token { name: "ci".to_owned(), digest: TokenDigest::of("ci") },
                    Operator::Shell,
                ] {
                    assert!(of(&admin, action, kind));
                }
                let editor = account(RootRole::Editor, &[]);
                assert_eq!(of(&editor, action, kind), name.starts_with("READ_"), "{name}");
                let viewer = account(RootRole::Viewer, &[]);
                assert_eq!(viewer.may(action, kind), Err(Missing::new(name)));
                for granted in Permission::ALL {
                    let viewer = account(RootRole::Viewer, &[granted]);
                    assert_eq!(of(&viewer, action, kind), needed == Some(granted), "{name}");
                }
            }
        }
    }

    #[test]
    fn client_tokens_are_seen_by_all_frontend_tokens_by_whoever_handles_them() {
        let viewer = account(RootRole::Viewer, &[]);
        assert!(viewer.may_see(TokenKind::Client));
        assert!(!viewer.may_see(TokenKind::Frontend));
        assert!(account(RootRole::Editor, &[]).may_see(TokenKind::Frontend));
        for granted in Permission::ALL {
            let viewer = account(RootRole::Viewer, &[granted]);
            let frontend = granted.as_str().contains("FRONTEND");
            assert_eq!(viewer.may_see(TokenKind::Frontend), frontend, "{granted:?}");
            assert!(!viewer.may_see(TokenKind::Admin));
        }
        assert!(account(RootRole::Admin, &[]).may_see(TokenKind::Admin));
    }

    #[test]
    fn permissions_are_named_with_those_of_the_role() {
        let names = |operator: &Operator| operator.permissions().collect::<Vec<_>>();
        assert_eq!(names(&Operator::Shell), ["ADMIN"]);
        assert_eq!(names(&account(RootRole::Admin, &Permission::ALL)), ["ADMIN"]);
        let editor = account(RootRole::Editor, &[Permission::CreateClientApiToken]);
        let expect =
            ["CREATE_CLIENT_API_TOKEN", "READ_CLIENT_API_TOKEN", "READ_FRONTEND_API_TOKEN"];
        assert_eq!(names(&editor), expect);
    }

    #[test]
    fn names_are_read_back_and_the_short_one_means_both_creates() {
        for permission in Permission::ALL {
            assert_eq!(Permission::parse(permission.as_str()), Some(permission));
            assert_eq!(Permission::granted_by(permission.as_str()), Some(&[permission][..]));
        }
        let both = [Permission::CreateClientApiToken, Permission::CreateFrontendApiToken];
        assert_eq!(Permission::granted_by("CREATE_API_TOKEN"), Some(&both[..]));
        assert_eq!(Permission::granted_by("ADMIN"), None);
    }
}
