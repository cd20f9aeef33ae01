//! Responses of the admin API: Unleash's shapes of tokens, accounts, events and usage, and some
//! additional ones. Requests are in `request`.
//!
//! The documentation of these types appears in the OpenAPI document. This module checks no permissions
//! and stores nothing.

mod field;
mod request;

use std::{borrow::Cow, collections::BTreeMap};

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};
use serde_json::Value;

pub use self::{
    field::{BlankAsNull, Field, FieldError, FieldErrors, FieldType},
    request::{
        ChangePassword, CreateToken, CreateUser, Email, Login, MAX_PROJECTS, Name, ResetPassword,
        Rfc3339, RoleRef, ScopeId, SecretString, SetPermissions, TokenKindField, UpdateToken,
        UpdateUser, Username,
    },
};

use crate::token::Token;

/// A timestamp as Unleash writes it: RFC 3339 with milliseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rfc3339Millis(pub Timestamp);

impl Serialize for Rfc3339Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))
    }
}

impl JsonSchema for Rfc3339Millis {
    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "date-time" })
    }
}

/// The response to a rejected request.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Error {
    /// A unique id of this response.
    pub id: String,
    /// The kind of error, as Unleash names it.
    pub name: &'static str,
    /// A message for humans.
    pub message: String,
    /// The errors of individual fields of the request.
    #[schemars(default)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<Detail>,
    /// The permissions of which the caller needs one.
    #[schemars(default)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub permissions: Vec<&'static str>,
    /// The method to sign in with, if the caller is not signed in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// The path to sign in at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'static str>,
}

/// The error of a field of a request.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Detail {
    /// A message for humans.
    pub message: String,
    /// The field, as in `projects`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'static str>,
}

/// A token in a response: its secret, only once and only for its creator, or else its identifier.
#[derive(Debug)]
pub enum SecretOrIdentifier {
    /// The whole token, which has just been created.
    Secret(Token),
    /// The identifier of the token in the admin API.
    Identifier(String),
}

impl Serialize for SecretOrIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Secret(token) => serializer.serialize_str(token.expose()),
            Self::Identifier(identifier) => serializer.serialize_str(identifier),
        }
    }
}

impl JsonSchema for SecretOrIdentifier {
    fn schema_name() -> Cow<'static, str> {
        "Shown".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

/// An API token.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiToken {
    /// The whole token if it has just been created, otherwise its identifier.
    pub secret: SecretOrIdentifier,
    /// The name of the token.
    pub token_name: String,
    /// `backend`, `frontend` or `admin`.
    pub r#type: &'static str,
    /// The environment that it can access; `*` for admin tokens.
    pub environment: String,
    /// The project that it can access; `*` for all, `[]` for several.
    pub project: String,
    /// The projects that it can access; `*` for all.
    pub projects: Vec<String>,
    /// The time when it expires, if ever.
    pub expires_at: Option<Rfc3339Millis>,
    /// The time when it was created.
    pub created_at: Rfc3339Millis,
    /// The account or token that created it.
    pub created_by: String,
    /// The time when it was last used, accurate to about a minute.
    pub seen_at: Option<Rfc3339Millis>,
    /// Always null here.
    pub alias: Option<String>,
    /// Whether only a digest of the secret is stored: always true.
    pub secure: bool,
    /// The token with its secret part masked.
    pub masked: String,
}

/// `GET /api/admin/api-tokens`
#[derive(Debug, Serialize, JsonSchema)]
pub struct ApiTokens {
    /// The tokens that the caller may see, oldest first.
    pub tokens: Vec<ApiToken>,
}

/// An account.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// The id of the account.
    pub id: i64,
    /// The name to sign in with.
    pub username: String,
    /// The display name.
    pub name: Option<String>,
    /// The email address of the owner.
    pub email: Option<String>,
    /// 1 Admin, 2 Editor, 3 Viewer.
    pub root_role: i64,
    /// The permissions granted in addition to those of the role.
    pub permissions: Vec<&'static str>,
    /// The time when it was created.
    pub created_at: Rfc3339Millis,
    /// The time of the last sign-in.
    pub seen_at: Option<Rfc3339Millis>,
    /// Whether it is an API token and not an account: always false.
    #[serde(rename = "isAPI")]
    pub is_api: bool,
}

/// A root role.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RootRole {
    /// The id of the role.
    pub id: i64,
    /// The name of the role.
    pub name: &'static str,
    /// The purpose of the role.
    pub description: &'static str,
    /// Always `root`.
    pub r#type: &'static str,
}

/// `GET /api/admin/user-admin`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Users {
    /// All accounts.
    pub users: Vec<User>,
    /// The roles that accounts can have.
    pub root_roles: Vec<RootRole>,
}

/// The caller and its permissions: `GET /api/admin/user`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Me {
    /// The caller.
    pub user: Caller,
    /// The permissions of the caller; `ADMIN` includes all.
    pub permissions: Vec<Permission>,
    /// Always empty here.
    pub feedback: Vec<Value>,
    /// Always empty here.
    pub splash: BTreeMap<String, bool>,
}

/// The account or API token that makes the request.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// The id of the account; 0 for an API token.
    pub id: i64,
    /// The name of the account or token.
    pub username: String,
    /// The display name.
    pub name: Option<String>,
    /// The email address of the owner.
    pub email: Option<String>,
    /// 1 Admin, 2 Editor, 3 Viewer.
    pub root_role: i64,
    /// Whether it is an API token.
    #[serde(rename = "isAPI")]
    pub is_api: bool,
}

/// A permission of the caller.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Permission {
    /// The name of the permission.
    pub permission: &'static str,
}

/// `GET /api/admin/environments`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Environments {
    /// Always 1.
    pub version: u32,
    /// All environments that are served.
    pub environments: Vec<Environment>,
}

/// An environment.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Environment {
    /// The name of the environment.
    pub name: String,
    /// `production` or `development`, derived from its name.
    pub r#type: &'static str,
    /// Whether it is served.
    pub enabled: bool,
    /// Whether it cannot be removed.
    pub protected: bool,
    /// The position in lists.
    pub sort_order: usize,
    /// The number of flags.
    pub total_toggle_count: usize,
}

/// `GET /api/admin/projects`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Projects {
    /// Always 1.
    pub version: u32,
    /// All projects that have flags, and `default`.
    pub projects: Vec<Project>,
}

/// A project.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Project {
    /// The id of the project.
    pub id: String,
    /// The name of the project, the same as its id.
    pub name: String,
    /// The number of flags in all environments.
    pub feature_count: usize,
}

/// `GET /api/admin/events`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Events {
    /// Always 1.
    pub version: u32,
    /// The events, newest first.
    pub events: Vec<Event>,
    /// The number of matching events on all pages. Counting stops at 10,000, which then means at least
    /// that many.
    pub total_events: u64,
}

/// An entry of the audit log: a change, or a rejected request.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// The id of the event; ids increase.
    pub id: i64,
    /// The type of the event, as in `api-token-created`.
    pub r#type: String,
    /// The name of the account or token that caused it.
    pub created_by: String,
    /// The id of the account, if an account caused it.
    pub created_by_user_id: Option<i64>,
    /// The time of the event.
    pub created_at: Rfc3339Millis,
    /// The address of the client.
    pub ip: Option<String>,
    /// The environment of the changed object, if it has one.
    pub environment: Option<String>,
    /// The project of the changed object, if it has one.
    pub project: Option<String>,
    /// The object after the change, or details of the event.
    pub data: Value,
    /// The object before the change.
    pub pre_data: Value,
}

/// `GET /api/admin/flags`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Flags {
    /// The environment of the flags.
    pub environment: String,
    /// The flags, sorted by name.
    pub flags: Vec<FlagSummary>,
}

/// A summary of a flag.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlagSummary {
    /// The name of the flag.
    pub name: String,
    /// `release`, `experiment`, …
    pub r#type: Option<String>,
    /// The project of the flag.
    pub project: String,
    /// Whether it is switched on, regardless of its strategies.
    pub enabled: bool,
    /// Whether it is marked as stale, to be removed.
    pub stale: bool,
    /// The purpose of the flag.
    pub description: Option<String>,
    /// The number of strategies.
    pub strategies: usize,
    /// The number of variants.
    pub variants: usize,
    /// Whether SDKs report each evaluation to the application.
    pub impression_data: bool,
}

/// `GET /api/admin/flags/{name}`
#[derive(Debug, Serialize, JsonSchema)]
pub struct FlagDetail {
    /// The environment.
    pub environment: String,
    /// The flag as it is sent to SDKs.
    pub flag: Value,
    /// The segments that it uses.
    pub segments: Vec<Value>,
}

/// `GET /api/admin/metrics/applications`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Applications {
    /// The applications, sorted by name.
    pub applications: Vec<Application>,
    /// The number of applications.
    pub total: usize,
}

/// An application that has registered or reported usage.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Application {
    /// The name of the application.
    pub app_name: String,
    /// The environments that it uses.
    pub environments: Vec<String>,
    /// The SDKs that it uses, `<sdk>:<version>`.
    pub sdk_versions: Vec<String>,
    /// The strategies that it implements.
    pub strategies: Vec<String>,
    /// The number of its instances.
    pub instances: u64,
    /// The time when it was first seen.
    pub created_at: Rfc3339Millis,
    /// The time when it was last seen.
    pub seen_at: Rfc3339Millis,
}

/// `GET /api/admin/client-metrics/features/{name}/raw`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlagUsage {
    /// Always 1.
    pub version: u32,
    /// Always `stable`.
    pub maturity: &'static str,
    /// The name of the flag.
    pub feature_name: String,
    /// The usage by hour, newest first.
    pub data: Vec<UsageHour>,
}

/// The usage of a flag by one application in one hour.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageHour {
    /// The name of the flag.
    pub feature_name: String,
    /// The name of the application.
    pub app_name: String,
    /// The environment.
    pub environment: String,
    /// The start of the hour.
    pub timestamp: Rfc3339Millis,
    /// The number of evaluations to on.
    pub yes: u64,
    /// The number of evaluations to off.
    pub no: u64,
    /// The number of evaluations to each variant.
    pub variants: BTreeMap<String, u64>,
}
