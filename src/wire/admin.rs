//! The admin API on the network: Unleash's shapes of tokens, accounts, events and usage, and a few
//! of our own beside them.
//!
//! Every type is described in the API's document as it is here. Nothing is judged or kept.

mod field;
mod request;

use std::{borrow::Cow, collections::BTreeMap};

use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};
use serde_json::Value;

pub use self::{
    field::{Blank, Field, Member, Problem, Problems},
    request::{
        ChangePassword, CreateToken, CreateUser, Email, Hidden, Id, Instant, Kind, Login,
        MAX_PROJECTS, Name, ResetPassword, Role, SetPermissions, UpdateToken, UpdateUser, Username,
    },
};

use crate::token::Token;

/// A point in time as Unleash writes it: RFC 3339 with milliseconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Time(pub Timestamp);

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))
    }
}

impl JsonSchema for Time {
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

/// Why a request is refused.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Error {
    /// Names this answer among others.
    pub id: String,
    /// What kind of error it is, by the name that Unleash gives it.
    pub name: &'static str,
    /// What is wrong, for people.
    pub message: String,
    /// What is wrong with each part of the request.
    #[schemars(default)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<Detail>,
    /// The permissions of which one is missing.
    #[schemars(default)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub permissions: Vec<&'static str>,
    /// How to sign in, where that is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// Where to sign in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'static str>,
}

/// What is wrong with a part of a request.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Detail {
    /// What is wrong, for people.
    pub message: String,
    /// The part, as in `projects`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'static str>,
}

/// What stands for a token: all of it, to its owner and once, or what names it.
#[derive(Debug)]
pub enum Shown {
    /// The whole token, which has just been created.
    Secret(Token),
    /// What names it in the admin API.
    Identifier(String),
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Secret(token) => serializer.serialize_str(token.expose()),
            Self::Identifier(identifier) => serializer.serialize_str(identifier),
        }
    }
}

impl JsonSchema for Shown {
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

/// A token.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiToken {
    /// The whole token when it has just been created; otherwise what names it here.
    pub secret: Shown,
    /// What tells it apart.
    pub token_name: String,
    /// `backend`, `frontend` or `admin`.
    pub r#type: &'static str,
    /// The environment that it sees; `*` for admin tokens.
    pub environment: String,
    /// The project that it sees; `*` for all, `[]` for several.
    pub project: String,
    /// The projects that it sees; `*` for all.
    pub projects: Vec<String>,
    /// When it ends, if ever.
    pub expires_at: Option<Time>,
    /// When it was created.
    pub created_at: Time,
    /// Who created it.
    pub created_by: String,
    /// When it was last used, within a minute or so.
    pub seen_at: Option<Time>,
    /// Always null here.
    pub alias: Option<String>,
    /// Whether the secret is kept as a digest only: always.
    pub secure: bool,
    /// What may be shown of it.
    pub masked: String,
}

/// `GET /api/admin/api-tokens`
#[derive(Debug, Serialize, JsonSchema)]
pub struct ApiTokens {
    /// Those that the caller may see, oldest first.
    pub tokens: Vec<ApiToken>,
}

/// An account.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// Its number.
    pub id: i64,
    /// The name to sign in with.
    pub username: String,
    /// The name to be shown.
    pub name: Option<String>,
    /// Where its owner can be reached.
    pub email: Option<String>,
    /// 1 Admin, 2 Editor, 3 Viewer.
    pub root_role: i64,
    /// What it is granted beyond its role.
    pub permissions: Vec<&'static str>,
    /// When it was created.
    pub created_at: Time,
    /// When it last signed in.
    pub seen_at: Option<Time>,
    /// Whether it is a token rather than an account: never.
    #[serde(rename = "isAPI")]
    pub is_api: bool,
}

/// A root role.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RootRole {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub description: &'static str,
    /// `root`.
    pub r#type: &'static str,
}

/// `GET /api/admin/user-admin`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Users {
    /// All of them.
    pub users: Vec<User>,
    /// The roles that they can have.
    pub root_roles: Vec<RootRole>,
}

/// Who is asking: `GET /api/admin/user`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Me {
    /// Who it is.
    pub user: Caller,
    /// What the caller may do; `ADMIN` is everything.
    pub permissions: Vec<Permission>,
    /// Always empty here.
    pub feedback: Vec<Value>,
    /// Always empty here.
    pub splash: BTreeMap<String, bool>,
}

/// Who is asking.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// The account's number; 0 for an API token.
    pub id: i64,
    /// The account's or the token's name.
    pub username: String,
    /// The name to be shown.
    pub name: Option<String>,
    /// Where the owner can be reached.
    pub email: Option<String>,
    /// 1 Admin, 2 Editor, 3 Viewer.
    pub root_role: i64,
    /// Whether it is an API token.
    #[serde(rename = "isAPI")]
    pub is_api: bool,
}

/// A permission that somebody holds.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Permission {
    /// Its name.
    pub permission: &'static str,
}

/// `GET /api/admin/environments`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Environments {
    /// 1.
    pub version: u32,
    /// All that are served.
    pub environments: Vec<Environment>,
}

/// An environment.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Environment {
    /// Its name.
    pub name: String,
    /// `production` or `development`, told by its name.
    pub r#type: &'static str,
    /// Whether it is served.
    pub enabled: bool,
    /// Whether it cannot be removed.
    pub protected: bool,
    /// Its place in lists.
    pub sort_order: usize,
    /// How many flags it has.
    pub total_toggle_count: usize,
}

/// `GET /api/admin/projects`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Projects {
    /// 1.
    pub version: u32,
    /// All of which there are flags, and `default`.
    pub projects: Vec<Project>,
}

/// A project.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Project {
    /// Its id.
    pub id: String,
    /// Its name, which is its id here.
    pub name: String,
    /// How many flags it has, over all environments.
    pub feature_count: usize,
}

/// `GET /api/admin/events`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Events {
    /// 1.
    pub version: u32,
    /// Newest first.
    pub events: Vec<Event>,
    /// How many match, on all pages. Counted up to 10,000: that number stands for as many or more.
    pub total_events: u64,
}

/// Something that was done, or refused.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Its number, which grows.
    pub id: i64,
    /// What happened, as in `api-token-created`.
    pub r#type: String,
    /// The account's or the token's name.
    pub created_by: String,
    /// The account's number, where it was one.
    pub created_by_user_id: Option<i64>,
    /// When.
    pub created_at: Time,
    /// From where.
    pub ip: Option<String>,
    /// The environment that it concerns.
    pub environment: Option<String>,
    /// The project that it concerns.
    pub project: Option<String>,
    /// What it is about, or what it became.
    pub data: Value,
    /// What it was before.
    pub pre_data: Value,
}

/// `GET /api/admin/flags`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Flags {
    /// The environment whose flags these are.
    pub environment: String,
    /// Sorted by name.
    pub flags: Vec<FlagSummary>,
}

/// A flag at a glance.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlagSummary {
    /// Its name.
    pub name: String,
    /// `release`, `experiment`, …
    pub r#type: Option<String>,
    /// The project that owns it.
    pub project: String,
    /// Whether it is switched on, whatever its strategies say.
    pub enabled: bool,
    /// Whether it is marked as one to be removed.
    pub stale: bool,
    /// What it is for.
    pub description: Option<String>,
    /// How many strategies it has.
    pub strategies: usize,
    /// How many variants it has.
    pub variants: usize,
    /// Whether SDKs report each evaluation to the application.
    pub impression_data: bool,
}

/// `GET /api/admin/flags/{name}`
#[derive(Debug, Serialize, JsonSchema)]
pub struct FlagDetail {
    /// The environment.
    pub environment: String,
    /// The flag as SDKs are sent it.
    pub flag: Value,
    /// The segments that it refers to.
    pub segments: Vec<Value>,
}

/// `GET /api/admin/metrics/applications`
#[derive(Debug, Serialize, JsonSchema)]
pub struct Applications {
    /// Sorted by name.
    pub applications: Vec<Application>,
    /// How many there are.
    pub total: usize,
}

/// An application that has registered or reported usage.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Application {
    /// Its name.
    pub app_name: String,
    /// Where it runs.
    pub environments: Vec<String>,
    /// The SDKs that it uses, `<sdk>:<version>`.
    pub sdk_versions: Vec<String>,
    /// The strategies that it knows.
    pub strategies: Vec<String>,
    /// How many instances of it are known.
    pub instances: u64,
    /// When it was first seen.
    pub created_at: Time,
    /// When it was last seen.
    pub seen_at: Time,
}

/// `GET /api/admin/client-metrics/features/{name}/raw`
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlagUsage {
    /// 1.
    pub version: u32,
    /// `stable`.
    pub maturity: &'static str,
    /// The flag.
    pub feature_name: String,
    /// Hour by hour, newest first.
    pub data: Vec<UsageHour>,
}

/// One hour of one application's use of a flag.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UsageHour {
    /// The flag.
    pub feature_name: String,
    /// The application.
    pub app_name: String,
    /// The environment.
    pub environment: String,
    /// The start of the hour.
    pub timestamp: Time,
    /// How often it was on.
    pub yes: u64,
    /// How often it was off.
    pub no: u64,
    /// How often each variant was given.
    pub variants: BTreeMap<String, u64>,
}
