//! What operators send to the admin API.
//!
//! Each type is what the API's document describes. Reading one collects everything that is wrong;
//! whether an environment exists, or who may do it, is for others to say.

use std::{borrow::Cow, fmt};

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::field::{Blank, Field, Member};
use crate::wire::instant;

/// The longest name, of a token or an account, in characters.
const MAX_NAME: usize = 255;

/// How many projects a token may name.
pub const MAX_PROJECTS: usize = 100;

/// The longest name of an environment or a project, in characters.
const MAX_ID: usize = 100;

/// A name for people: one line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Name(pub String);

impl Name {
    /// Reads it, without what surrounds it; an error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() || text.chars().count() > MAX_NAME || text.chars().any(is_unseen) {
            return Err(format!("must be one line of 1 to {MAX_NAME} visible characters"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Whether a character has no look of its own: two names that differ in such alone would look alike,
/// and one may turn the rest of a line around (Unicode's categories Cc, Zl and Zp, and of Cf those that
/// texts have no use for).
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl Member for Name {
    fn read(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a text")?)
    }
}

impl JsonSchema for Name {
    fn schema_name() -> Cow<'static, str> {
        "Name".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "minLength": 1, "maxLength": MAX_NAME })
    }
}

/// A name to sign in with: one word.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Username(pub String);

impl Username {
    /// Reads it, without what surrounds it; an error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_word = |name: &Name| !name.0.chars().any(char::is_whitespace);
        let word = Name::parse(text).ok().filter(is_word).map(|name| Self(name.0));
        word.ok_or_else(|| format!("must be 1 to {MAX_NAME} characters without white space"))
    }
}

impl Member for Username {
    fn read(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a text")?)
    }
}

impl JsonSchema for Username {
    fn schema_name() -> Cow<'static, str> {
        "Username".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": r"^\S+$",
        })
    }
}

/// The address of a person's mailbox, as far as it can be told without writing to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Email(pub String);

impl Email {
    /// Reads it, without what surrounds it; an error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let has_place = |word: &Username| {
            word.0.split_once('@').is_some_and(|(who, place)| {
                !who.is_empty() && !place.is_empty() && !place.contains('@')
            })
        };
        let address = Username::parse(text).ok().filter(has_place).map(|word| Self(word.0));
        address.ok_or_else(|| "must be an address, as in ann@example.org".to_owned())
    }
}

impl Member for Email {
    fn read(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a text")?)
    }
}

impl JsonSchema for Email {
    fn schema_name() -> Cow<'static, str> {
        "Email".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "email", "maxLength": MAX_NAME })
    }
}

/// The name of an environment or the id of a project; it becomes part of tokens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Id(pub String);

impl Member for Id {
    fn read(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or("must be a text")?;
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_~".contains(c);
        if text != "*" && (text.is_empty() || text.len() > MAX_ID || !text.chars().all(fits)) {
            return Err(format!("must be * or 1 to {MAX_ID} letters, digits, `-`, `_` or `~`"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl JsonSchema for Id {
    fn schema_name() -> Cow<'static, str> {
        "Id".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 1, "maxLength": MAX_ID,
            "pattern": r"^(\*|[A-Za-z0-9_~-]+)$",
        })
    }
}

/// The kind of a token, as [`crate::token::TokenKind::parse`] reads it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Kind(pub crate::token::TokenKind);

impl Member for Kind {
    fn read(value: &Value) -> Result<Self, String> {
        let kind = value.as_str().and_then(crate::token::TokenKind::parse);
        kind.map(Self).ok_or_else(|| "must be backend (or client), frontend or admin".to_owned())
    }
}

impl JsonSchema for Kind {
    fn schema_name() -> Cow<'static, str> {
        "TokenKind".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "enum": ["backend", "client", "frontend", "admin"],
            "description": "In any case; `client` is the older name of `backend`.",
        })
    }
}

/// A point in time, RFC 3339.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Instant(pub Timestamp);

impl Member for Instant {
    fn read(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .and_then(instant::parse)
            .map(Self)
            .ok_or_else(|| "must be a time, as in 2027-01-31T12:00:00Z".to_owned())
    }
}

impl JsonSchema for Instant {
    fn schema_name() -> Cow<'static, str> {
        "Instant".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "date-time" })
    }
}

/// A password on its way to be judged; not shown, and wiped.
pub struct Hidden(pub Zeroizing<String>);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden")
    }
}

impl Member for Hidden {
    fn read(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or("must be a text")?;
        if text.is_empty() || text.len() > 1024 {
            return Err("must have 1 to 1024 bytes".to_owned());
        }
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl JsonSchema for Hidden {
    fn schema_name() -> Cow<'static, str> {
        "Password".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "password", "minLength": 1, "maxLength": 1024 })
    }
}

/// `POST /auth/simple/login`
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["username", "password"]))]
pub struct Login {
    /// The account's name.
    #[serde(default)]
    pub username: Field<Name>,
    /// Its password.
    #[serde(default)]
    pub password: Field<Hidden>,
}

/// `POST /api/admin/api-tokens`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["tokenName", "type"]))]
pub struct CreateToken {
    /// What tells it apart in lists and in the audit log.
    #[serde(default)]
    pub token_name: Field<Name>,
    /// The name that `tokenName` had before Unleash 4.22.
    #[serde(default)]
    pub username: Field<Name>,
    /// What it is for.
    #[serde(default)]
    pub r#type: Field<Kind>,
    /// The environment that it sees, `development` where none is named; admin tokens see all, `*`.
    #[serde(default)]
    pub environment: Field<Id>,
    /// The projects that it sees, all where none is named; admin tokens see all, `*`.
    #[serde(default)]
    #[schemars(length(min = 1, max = MAX_PROJECTS))]
    pub projects: Field<Vec<Id>>,
    /// One project, as before Unleash 4.5.
    #[serde(default)]
    pub project: Field<Id>,
    /// When it ends.
    #[serde(default)]
    pub expires_at: Field<Option<Instant>>,
}

/// `PUT /api/admin/api-tokens/{token}`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["expiresAt"]))]
pub struct UpdateToken {
    /// When it ends; null is never.
    #[serde(default)]
    pub expires_at: Field<Option<Instant>>,
}

/// `POST /api/admin/user-admin`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["rootRole", "password"]))]
pub struct CreateUser {
    /// The name to sign in with; `email` stands in for it.
    #[serde(default)]
    pub username: Field<Blank<Username>>,
    /// The name to be shown.
    #[serde(default)]
    pub name: Field<Blank<Name>>,
    /// Where its owner can be reached.
    #[serde(default)]
    pub email: Field<Blank<Email>>,
    /// 1 Admin, 2 Editor, 3 Viewer; or that name.
    #[serde(default)]
    pub root_role: Field<Role>,
    /// Its first password.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<Hidden>,
}

/// `PUT /api/admin/user-admin/{id}`; what is left out stays.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateUser {
    /// The name to be shown; null or nothing for none.
    #[serde(default)]
    pub name: Field<Blank<Name>>,
    /// Where its owner can be reached; null or nothing for nowhere.
    #[serde(default)]
    pub email: Field<Blank<Email>>,
    /// 1 Admin, 2 Editor, 3 Viewer; or that name.
    #[serde(default)]
    pub root_role: Field<Role>,
    /// A new password; ends its sessions.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<Hidden>,
}

/// `PUT /api/admin/user-admin/{id}/permissions`
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["permissions"]))]
pub struct SetPermissions {
    /// All that the account is granted beyond its role.
    #[serde(default)]
    pub permissions: Field<Vec<Name>>,
}

/// `POST /api/admin/user-admin/{id}/change-password`
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["password"]))]
pub struct ResetPassword {
    /// The new password.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<Hidden>,
}

/// `POST /api/admin/user/change-password`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["password", "oldPassword"]))]
pub struct ChangePassword {
    /// The new password.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<Hidden>,
    /// The new one again, where a form asks for it twice.
    #[serde(default)]
    pub confirm_password: Field<Hidden>,
    /// The present one.
    #[serde(default)]
    pub old_password: Field<Hidden>,
}

/// A root role by its number or its name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// 1, 2 or 3.
    Id(i64),
    /// `Admin`, `Editor` or `Viewer`.
    Name(String),
}

impl Member for Role {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Number(number) => number.as_i64().map(Self::Id),
            Value::String(name) => Some(Self::Name(name.clone())),
            _ => None,
        }
        .ok_or_else(|| "must be 1 (Admin), 2 (Editor) or 3 (Viewer)".to_owned())
    }
}

impl JsonSchema for Role {
    fn schema_name() -> Cow<'static, str> {
        "RootRole".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": [1, 2, 3, "Admin", "Editor", "Viewer"] })
    }
}
