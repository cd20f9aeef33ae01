//! Requests of the admin API.
//!
//! The documentation of these types appears in the OpenAPI document. Parsing collects all errors of a
//! request. It does not check permissions, or whether an environment exists.

use std::{borrow::Cow, fmt};

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::field::{BlankAsNull, Field, FieldType};
use crate::protocol::rfc3339;

/// The maximum length of the name of a token or account, in characters.
const MAX_NAME_CHARS: usize = 255;

/// The maximum number of projects of a token.
pub const MAX_PROJECTS: usize = 100;

/// The maximum length of the name of an environment or the id of a project, in characters.
const MAX_SCOPE_ID_LEN: usize = 100;

/// A name for humans, in one line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Name(pub String);

impl Name {
    /// Parses a name and trims it; the error describes the expected value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty()
            || text.chars().count() > MAX_NAME_CHARS
            || text.chars().any(is_invisible)
        {
            return Err(format!("must be one line of 1 to {MAX_NAME_CHARS} visible characters"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Whether a character is invisible (Unicode categories Cc, Zl and Zp, and those of Cf without use in
/// names). Names that differ only in such characters look the same, and some of them reverse the rest of
/// a line.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl FieldType for Name {
    fn from_json(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a string")?)
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
        json_schema!({ "type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS })
    }
}

/// A name to sign in with, in one word.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Username(pub String);

impl Username {
    /// Parses a user name and trims it; the error describes the expected value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_word = |name: &Name| !name.0.chars().any(char::is_whitespace);
        let word = Name::parse(text).ok().filter(is_word).map(|name| Self(name.0));
        word.ok_or_else(|| format!("must be 1 to {MAX_NAME_CHARS} characters without white space"))
    }
}

impl FieldType for Username {
    fn from_json(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a string")?)
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
            "type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS, "pattern": r"^\S+$",
        })
    }
}

/// An email address; only its form is checked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Email(pub String);

impl Email {
    /// Parses an address and trims it; the error describes the expected value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let has_domain = |word: &Username| {
            word.0.split_once('@').is_some_and(|(local, domain)| {
                !local.is_empty() && !domain.is_empty() && !domain.contains('@')
            })
        };
        let address = Username::parse(text).ok().filter(has_domain).map(|word| Self(word.0));
        address.ok_or_else(|| "must be an email address, as in ann@example.org".to_owned())
    }
}

impl FieldType for Email {
    fn from_json(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a string")?)
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
        json_schema!({ "type": "string", "format": "email", "maxLength": MAX_NAME_CHARS })
    }
}

/// The name of an environment or the id of a project, restricted to characters that tokens may contain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ScopeId(pub String);

impl ScopeId {
    /// Parses a name or an id, or `*`; the error describes the expected value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_~".contains(c);
        if text != "*"
            && (text.is_empty() || text.len() > MAX_SCOPE_ID_LEN || !text.chars().all(fits))
        {
            return Err(format!(
                "must be * or 1 to {MAX_SCOPE_ID_LEN} letters, digits, `-`, `_` or `~`"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FieldType for ScopeId {
    fn from_json(value: &Value) -> Result<Self, String> {
        Self::parse(value.as_str().ok_or("must be a string")?)
    }
}

impl JsonSchema for ScopeId {
    fn schema_name() -> Cow<'static, str> {
        "Id".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string", "minLength": 1, "maxLength": MAX_SCOPE_ID_LEN,
            "pattern": r"^(\*|[A-Za-z0-9_~-]+)$",
        })
    }
}

/// The kind of a token, as [`crate::token::TokenKind::parse`] reads it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenKindField(pub crate::token::TokenKind);

impl FieldType for TokenKindField {
    fn from_json(value: &Value) -> Result<Self, String> {
        let kind = value.as_str().and_then(crate::token::TokenKind::parse);
        kind.map(Self).ok_or_else(|| "must be backend (or client), frontend or admin".to_owned())
    }
}

impl JsonSchema for TokenKindField {
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
            "description": "Case-insensitive; `client` is the former name of `backend`.",
        })
    }
}

/// A timestamp (RFC 3339).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rfc3339(pub Timestamp);

impl FieldType for Rfc3339 {
    fn from_json(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .and_then(rfc3339::parse)
            .map(Self)
            .ok_or_else(|| "must be a time, as in 2027-01-31T12:00:00Z".to_owned())
    }
}

impl JsonSchema for Rfc3339 {
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

/// A password in a request. It is hidden from `Debug` and wiped from memory after use.
pub struct SecretString(pub Zeroizing<String>);

impl fmt::Debug for SecretString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretString")
    }
}

impl FieldType for SecretString {
    fn from_json(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or("must be a string")?;
        if text.is_empty() || text.len() > 1024 {
            return Err("must have 1 to 1024 bytes".to_owned());
        }
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl JsonSchema for SecretString {
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
    /// The user name of the account.
    #[serde(default)]
    pub username: Field<Name>,
    /// The password of the account.
    #[serde(default)]
    pub password: Field<SecretString>,
}

/// `POST /api/admin/api-tokens`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["tokenName", "type"]))]
pub struct CreateToken {
    /// The name of the token in lists and in the audit log.
    #[serde(default)]
    pub token_name: Field<Name>,
    /// The former name of `tokenName`, before Unleash 4.22.
    #[serde(default)]
    pub username: Field<Name>,
    /// The kind of the token.
    #[serde(default)]
    pub r#type: Field<TokenKindField>,
    /// The environment that it can access, by default `development`; `*` for admin tokens, which can
    /// access all.
    #[serde(default)]
    pub environment: Field<ScopeId>,
    /// The projects that it can access, by default all; `*` for admin tokens, which can access all.
    #[serde(default)]
    #[schemars(length(min = 1, max = MAX_PROJECTS))]
    pub projects: Field<Vec<ScopeId>>,
    /// A single project; the form used before Unleash 4.5.
    #[serde(default)]
    pub project: Field<ScopeId>,
    /// The time when it expires.
    #[serde(default)]
    pub expires_at: Field<Option<Rfc3339>>,
}

/// `PUT /api/admin/api-tokens/{token}`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["expiresAt"]))]
pub struct UpdateToken {
    /// The time when it expires; null is never.
    #[serde(default)]
    pub expires_at: Field<Option<Rfc3339>>,
}

/// `POST /api/admin/user-admin`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["rootRole", "password"]))]
pub struct CreateUser {
    /// The name to sign in with; by default the email address.
    #[serde(default)]
    pub username: Field<BlankAsNull<Username>>,
    /// The display name.
    #[serde(default)]
    pub name: Field<BlankAsNull<Name>>,
    /// The email address of the owner.
    #[serde(default)]
    pub email: Field<BlankAsNull<Email>>,
    /// 1 Admin, 2 Editor, 3 Viewer; or the name of the role.
    #[serde(default)]
    pub root_role: Field<RoleRef>,
    /// The initial password.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<SecretString>,
}

/// `PUT /api/admin/user-admin/{id}`; absent fields remain unchanged.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UpdateUser {
    /// The display name; null or blank removes it.
    #[serde(default)]
    pub name: Field<BlankAsNull<Name>>,
    /// The email address of the owner; null or blank removes it.
    #[serde(default)]
    pub email: Field<BlankAsNull<Email>>,
    /// 1 Admin, 2 Editor, 3 Viewer; or the name of the role.
    #[serde(default)]
    pub root_role: Field<RoleRef>,
    /// A new password; ends its sessions.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<SecretString>,
}

/// `PUT /api/admin/user-admin/{id}/permissions`
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["permissions"]))]
pub struct SetPermissions {
    /// All permissions of the account in addition to those of its role.
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
    pub password: Field<SecretString>,
}

/// `POST /api/admin/user/change-password`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["password", "oldPassword"]))]
pub struct ChangePassword {
    /// The new password.
    #[serde(default)]
    #[schemars(length(min = 10))]
    pub password: Field<SecretString>,
    /// The new password again, if a form requests it twice.
    #[serde(default)]
    pub confirm_password: Field<SecretString>,
    /// The current password.
    #[serde(default)]
    pub old_password: Field<SecretString>,
}

/// A root role by its number or its name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RoleRef {
    /// 1, 2 or 3.
    Id(i64),
    /// `Admin`, `Editor` or `Viewer`.
    Name(String),
}

impl FieldType for RoleRef {
    fn from_json(value: &Value) -> Result<Self, String> {
        match value {
            Value::Number(number) => number.as_i64().map(Self::Id),
            Value::String(name) => Some(Self::Name(name.clone())),
            _ => None,
        }
        .ok_or_else(|| "must be 1 (Admin), 2 (Editor) or 3 (Viewer)".to_owned())
    }
}

impl JsonSchema for RoleRef {
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
