//! What operators can ask: one table, from which requests find their way and the API's document is
//! written.
//!
//! Nothing is answered here, and nobody's rights are judged.

use std::borrow::Cow;

use hyper::Method;
use percent_encoding::percent_decode_str;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::{
    engine::explanation::Explanation,
    http::route::Endpoint,
    wire::{admin as wire, explain::Question},
};

/// One thing that can be asked, by what it takes to answer it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Call {
    /// Whoever asks is answered.
    Open(OpenCall),
    /// Every operator is told the same, from memory.
    Instance(InstanceCall),
    /// The control plane has a say in it.
    Control(ControlCall),
}

/// What everybody may ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OpenCall {
    Live,
    Ready,
    Metrics,
    Document,
    SignIn,
    SignOut,
}

/// What every operator may ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum InstanceCall {
    Status,
    Features,
    KnownTokens,
    MetricsBatch,
    InstanceData,
    Me,
    Environments,
    Projects,
    Flags,
    Flag,
    Explain,
}

/// What the control plane is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ControlCall {
    ChangeOwnPassword,
    Tokens,
    TokensNamed,
    CreateToken,
    UpdateToken,
    DeleteToken,
    ProjectTokens,
    CreateProjectToken,
    DeleteProjectToken,
    Users,
    CreateUser,
    User,
    UpdateUser,
    DeleteUser,
    SetPermissions,
    ResetPassword,
    Events,
    Applications,
    FlagUsage,
}

/// Makes the schema of a type.
pub(super) type Shape = fn(&mut SchemaGenerator) -> Schema;

/// What goes back when all is well.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// 200 with JSON.
    Json(Shape),
    /// 201 with JSON.
    Created(Shape),
    /// 200 without a body.
    Done,
    /// 204.
    Nothing,
    /// 200, or 503 while it is not so, with JSON.
    Probe(Shape),
    /// The Prometheus exposition.
    Text,
}

/// Who may ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Access {
    /// Everybody.
    Open,
    /// Whoever has signed in or presents an admin token; more may be asked for by what is done.
    Operator,
    /// Admins.
    Admin,
}

/// A member of a query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: QueryKind,
    pub(super) required: bool,
}

/// What a member of a query looks like.
#[derive(Clone, Copy, Debug)]
pub(super) enum QueryKind {
    Text,
    /// One text, or several in as many members.
    Texts,
    Time,
    Number {
        least: u32,
        most: u32,
    },
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) method: Verb,
    /// The path, with `{name}` for what varies.
    pub(super) path: &'static str,
    pub(super) call: Call,
    pub(super) topic: &'static str,
    pub(super) summary: &'static str,
    pub(super) access: Access,
    pub(super) query: &'static [Query],
    pub(super) body: Option<Shape>,
    pub(super) answer: Answer,
    /// Whether what a path or query names may not be there.
    pub(super) may_miss: bool,
    /// The switch that turns it off.
    pub(super) endpoint: Option<Endpoint>,
}

/// The methods of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verb {
    Get,
    Post,
    Put,
    Delete,
}

impl Verb {
    /// Its name in a request.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }

    fn is(self, method: &Method) -> bool {
        method.as_str() == self.as_str() || (self == Self::Get && *method == Method::HEAD)
    }

    /// Whether it changes something.
    pub(super) fn changes(self) -> bool {
        self != Self::Get
    }
}

/// A request's row, and what stands in its path for the parts in braces.
#[derive(Debug)]
pub(super) struct Found<'a> {
    pub(super) operation: &'static Operation,
    pub(super) arguments: Arguments<'a>,
}

/// What stands for the parts in braces, of which no row has more than two; those that it does not have
/// are empty.
pub(super) type Arguments<'a> = [Cow<'a, str>; 2];

/// Why a request has no row.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum NotFound {
    /// No row has its path.
    Path,
    /// These methods have rows of its path.
    Method(String),
}

/// Finds the row of a normalised path.
pub(super) fn find<'a>(method: &Method, path: &'a str) -> Result<Found<'a>, NotFound> {
    let mut known = Vec::new();
    for operation in OPERATIONS {
        let Some(arguments) = arguments(operation.path, path) else { continue };
        if operation.method.is(method) {
            return Ok(Found { operation, arguments });
        }
        known.push(operation.method.as_str());
    }
    if known.is_empty() {
        return Err(NotFound::Path);
    }
    if known.contains(&"GET") {
        known.push("HEAD");
    }
    Err(NotFound::Method(known.join(", ")))
}

/// What stands in `path` for the parts in braces of `template`.
fn arguments<'a>(template: &str, path: &'a str) -> Option<Arguments<'a>> {
    let mut arguments = Arguments::default();
    let mut blanks = arguments.iter_mut();
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => break,
            (Some(wanted), Some(given)) if wanted.starts_with('{') => {
                let argument = percent_decode_str(given).decode_utf8().ok()?;
                // Nothing has a name with NUL, and PostgreSQL is not to be asked for one.
                if argument.is_empty() || argument.contains('\0') {
                    return None;
                }
                *blanks.next()? = argument;
            }
            (Some(wanted), Some(given)) if wanted == given => {}
            _ => return None,
        }
    }
    Some(arguments)
}

fn shape<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The state of the instance.
fn state(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "type": "object",
        "required": ["status"],
        "properties": { "status": { "type": "string" }, "error": { "type": "string" } },
    })
}

/// Anything that is an object.
fn object(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({ "type": "object" })
}

const fn operation(
    method: Verb,
    path: &'static str,
    call: Call,
    summary: &'static str,
) -> Operation {
    Operation {
        method,
        path,
        call,
        topic: "",
        summary,
        access: match call {
            Call::Open(_) => Access::Open,
            Call::Instance(_) | Call::Control(_) => Access::Operator,
        },
        query: &[],
        body: None,
        answer: Answer::Done,
        may_miss: false,
        endpoint: None,
    }
}

const fn get(path: &'static str, call: Call, summary: &'static str) -> Operation {
    operation(Verb::Get, path, call, summary).answers(Answer::Json(object))
}

const fn post(path: &'static str, call: Call, summary: &'static str) -> Operation {
    operation(Verb::Post, path, call, summary)
}

const fn put(path: &'static str, call: Call, summary: &'static str) -> Operation {
    operation(Verb::Put, path, call, summary)
}

const fn delete(path: &'static str, call: Call, summary: &'static str) -> Operation {
    operation(Verb::Delete, path, call, summary)
}

impl Operation {
    const fn of(self, topic: &'static str) -> Self {
        Self { topic, ..self }
    }

    const fn for_admins(self) -> Self {
        Self { access: Access::Admin, ..self }
    }

    const fn answers(self, answer: Answer) -> Self {
        Self { answer, ..self }
    }

    const fn json<T: JsonSchema>(self) -> Self {
        self.answers(Answer::Json(shape::<T>))
    }

    const fn creates<T: JsonSchema>(self) -> Self {
        self.answers(Answer::Created(shape::<T>))
    }

    const fn takes<T: JsonSchema>(self) -> Self {
        Self { body: Some(shape::<T>), ..self }
    }

    const fn asks(self, query: &'static [Query]) -> Self {
        Self { query, ..self }
    }

    const fn may_miss(self) -> Self {
        Self { may_miss: true, ..self }
    }

    const fn off_by(self, endpoint: Endpoint) -> Self {
        Self { endpoint: Some(endpoint), ..self }
    }
}

const fn text(name: &'static str, help: &'static str) -> Query {
    Query { name, help, kind: QueryKind::Text, required: false }
}

const fn texts(name: &'static str, help: &'static str) -> Query {
    Query { name, help, kind: QueryKind::Texts, required: false }
}

const fn time(name: &'static str, help: &'static str) -> Query {
    Query { name, help, kind: QueryKind::Time, required: false }
}

const fn number(name: &'static str, least: u32, most: u32, help: &'static str) -> Query {
    Query { name, help, kind: QueryKind::Number { least, most }, required: false }
}

const ENVIRONMENT: &[Query] = &[Query {
    name: "environment",
    help: "The environment whose flags are meant",
    kind: QueryKind::Text,
    required: true,
}];

const INSTANCE: &str = "Instance";
const SESSION: &str = "Session";
const TOKENS: &str = "API tokens";
const ACCOUNTS: &str = "Accounts";
const AUDIT: &str = "Audit";
const FLAGS: &str = "Flags";
const USAGE: &str = "Usage";

/// The largest page of events.
pub(super) const MOST_EVENTS: u32 = 1000;

/// How many accounts are told at most where a page is asked for.
pub(super) const MOST_ACCOUNTS: u32 = 1000;

/// How far back usage is told, in hours.
pub(super) const MOST_HOURS: u32 = 24 * 90;

/// All that operators can ask.
#[rustfmt::skip]
pub(super) static OPERATIONS: &[Operation] = &[
    get("/live", Call::Open(OpenCall::Live), "Whether the instance lives").of(INSTANCE).answers(Answer::Json(state)),
    get("/ready", Call::Open(OpenCall::Ready), "Whether it is ready for requests").of(INSTANCE).answers(Answer::Probe(state)),
    get("/metrics", Call::Open(OpenCall::Metrics), "Its metrics, as Prometheus text").of(INSTANCE).answers(Answer::Text).off_by(Endpoint::Metrics),
    get("/docs/openapi.json", Call::Open(OpenCall::Document), "This document").of(INSTANCE),
    get("/status", Call::Instance(InstanceCall::Status), "Environments, upstream and tokens at a glance").of(INSTANCE),
    get("/internal-backstage/health", Call::Open(OpenCall::Live), "Whether the instance lives").of(INSTANCE).answers(Answer::Json(state)),
    get("/internal-backstage/ready", Call::Open(OpenCall::Ready), "Whether it is ready for requests").of(INSTANCE).answers(Answer::Probe(state)),
    get("/internal-backstage/metrics", Call::Open(OpenCall::Metrics), "Its metrics, as Prometheus text").of(INSTANCE).answers(Answer::Text).off_by(Endpoint::Metrics),
    get("/internal-backstage/prometheus", Call::Open(OpenCall::Metrics), "The same under its older name").of(INSTANCE).answers(Answer::Text).off_by(Endpoint::Metrics),
    get("/internal-backstage/features", Call::Instance(InstanceCall::Features), "The flag configuration of each environment").of(INSTANCE).off_by(Endpoint::Features),
    get("/internal-backstage/tokens", Call::Instance(InstanceCall::KnownTokens), "The tokens with a verdict, masked").of(INSTANCE).off_by(Endpoint::Tokens),
    get("/internal-backstage/metricsbatch", Call::Instance(InstanceCall::MetricsBatch), "Usage that waits to be sent").of(INSTANCE).off_by(Endpoint::MetricsBatch),
    get("/internal-backstage/instancedata", Call::Instance(InstanceCall::InstanceData), "This instance and those behind it").of(INSTANCE).off_by(Endpoint::InstanceData),

    post("/auth/simple/login", Call::Open(OpenCall::SignIn), "Sign in; the answer sets a session cookie").of(SESSION).takes::<wire::Login>().json::<wire::Caller>(),
    post("/logout", Call::Open(OpenCall::SignOut), "Sign out").of(SESSION).answers(Answer::Nothing),
    post("/auth/logout", Call::Open(OpenCall::SignOut), "Sign out").of(SESSION).answers(Answer::Nothing),
    get("/api/admin/user", Call::Instance(InstanceCall::Me), "Who is asking, and what they may do").of(SESSION).json::<wire::Me>(),
    post("/api/admin/user/change-password", Call::Control(ControlCall::ChangeOwnPassword), "Change one's own password; ends one's other sessions").of(SESSION).takes::<wire::ChangePassword>(),

    get("/api/admin/api-tokens", Call::Control(ControlCall::Tokens), "The tokens that the caller may see").of(TOKENS).json::<wire::ApiTokens>(),
    post("/api/admin/api-tokens", Call::Control(ControlCall::CreateToken), "Create a token; the answer alone holds its secret").of(TOKENS).takes::<wire::CreateToken>().creates::<wire::ApiToken>(),
    get("/api/admin/api-tokens/{token}", Call::Control(ControlCall::TokensNamed), "The tokens of this name that the caller may see").of(TOKENS).json::<wire::ApiTokens>(),
    put("/api/admin/api-tokens/{token}", Call::Control(ControlCall::UpdateToken), "Change when a token ends: by its secret, or by what stands for it in lists").of(TOKENS).takes::<wire::UpdateToken>(),
    delete("/api/admin/api-tokens/{token}", Call::Control(ControlCall::DeleteToken), "Delete a token: by its secret, or by what stands for it in lists").of(TOKENS),
    get("/api/admin/projects/{project}/api-tokens", Call::Control(ControlCall::ProjectTokens), "The tokens that see this project").of(TOKENS).json::<wire::ApiTokens>().may_miss(),
    post("/api/admin/projects/{project}/api-tokens", Call::Control(ControlCall::CreateProjectToken), "Create a token for this project").of(TOKENS).takes::<wire::CreateToken>().creates::<wire::ApiToken>().may_miss(),
    delete("/api/admin/projects/{project}/api-tokens/{token}", Call::Control(ControlCall::DeleteProjectToken), "Delete a token of this project").of(TOKENS).may_miss(),

    get("/api/admin/user-admin", Call::Control(ControlCall::Users), "The accounts, the oldest first").of(ACCOUNTS).for_admins().json::<wire::Users>().asks(&[
        number("after", 0, u32::MAX, "Those after the account of this id: the next page after it"),
        number("limit", 1, MOST_ACCOUNTS, "At most so many; all where nothing is said"),
    ]),
    post("/api/admin/user-admin", Call::Control(ControlCall::CreateUser), "Create an account").of(ACCOUNTS).for_admins().takes::<wire::CreateUser>().creates::<wire::User>(),
    get("/api/admin/user-admin/{id}", Call::Control(ControlCall::User), "One account").of(ACCOUNTS).json::<wire::User>().may_miss(),
    put("/api/admin/user-admin/{id}", Call::Control(ControlCall::UpdateUser), "Change an account").of(ACCOUNTS).for_admins().takes::<wire::UpdateUser>().json::<wire::User>().may_miss(),
    delete("/api/admin/user-admin/{id}", Call::Control(ControlCall::DeleteUser), "Delete an account").of(ACCOUNTS).for_admins().may_miss(),
    put("/api/admin/user-admin/{id}/permissions", Call::Control(ControlCall::SetPermissions), "Say what an account may do beyond its role").of(ACCOUNTS).for_admins().takes::<wire::SetPermissions>().json::<wire::User>().may_miss(),
    post("/api/admin/user-admin/{id}/change-password", Call::Control(ControlCall::ResetPassword), "Give an account a new password; ends its sessions").of(ACCOUNTS).for_admins().takes::<wire::ResetPassword>().may_miss(),

    get("/api/admin/events", Call::Control(ControlCall::Events), "What was done, and what was refused").of(AUDIT).for_admins().json::<wire::Events>().asks(&[
        texts("type", "Events of this kind alone, as in api-token-created; repeated, of any of these"),
        text("createdBy", "Those by this account or token"),
        text("environment", "Those of this environment"),
        text("project", "Those of this project"),
        time("from", "Those since then"),
        time("to", "Those before then"),
        number("before", 1, u32::MAX, "Those before the event of this id: the next page after it"),
        number("limit", 1, MOST_EVENTS, "At most so many; 100 where nothing is said"),
        number("offset", 0, u32::MAX, "Leave out so many of the newest"),
    ]),

    get("/api/admin/environments", Call::Instance(InstanceCall::Environments), "The environments that are served").of(FLAGS).json::<wire::Environments>(),
    get("/api/admin/projects", Call::Instance(InstanceCall::Projects), "The projects of which there are flags").of(FLAGS).json::<wire::Projects>(),
    get("/api/admin/flags", Call::Instance(InstanceCall::Flags), "The flags of an environment").of(FLAGS).json::<wire::Flags>().asks(ENVIRONMENT).may_miss(),
    get("/api/admin/flags/{name}", Call::Instance(InstanceCall::Flag), "One flag as SDKs are sent it").of(FLAGS).json::<wire::FlagDetail>().asks(ENVIRONMENT).may_miss(),
    post("/api/admin/explain", Call::Instance(InstanceCall::Explain), "Why a flag comes out as it does for a context").of(FLAGS).takes::<Question<'static>>().json::<Explanation>().may_miss(),

    get("/api/admin/metrics/applications", Call::Control(ControlCall::Applications), "The applications that use flags").of(USAGE).json::<wire::Applications>(),
    get("/api/admin/client-metrics/features/{name}/raw", Call::Control(ControlCall::FlagUsage), "How often a flag was used, by hour").of(USAGE).json::<wire::FlagUsage>().asks(&[
        number("hoursBack", 1, MOST_HOURS, "How far back; 24 where nothing is said"),
    ]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_finds_itself() {
        for row in OPERATIONS {
            let path = row.path.replace('{', "x").replace('}', "%20y");
            let method = Method::from_bytes(row.method.as_str().as_bytes()).unwrap();
            let found = find(&method, &path).unwrap();
            assert_eq!(found.operation.path, row.path);
            assert_eq!(found.operation.method, row.method);
            let (given, missing) = found.arguments.split_at(row.path.matches('{').count());
            assert!(given.iter().all(|it| it.ends_with(" y")), "{given:?}");
            assert!(missing.iter().all(|it| it.is_empty()), "{missing:?}");
        }
    }

    #[test]
    fn other_methods_and_paths_are_told_apart() {
        let check = |method: Method, path: &str, expect: NotFound| {
            assert_eq!(find(&method, path).unwrap_err(), expect, "{method} {path}");
        };
        let methods = |text: &str| NotFound::Method(text.to_owned());
        check(Method::PUT, "/api/admin/api-tokens", methods("GET, POST, HEAD"));
        check(Method::POST, "/api/admin/api-tokens/a", methods("GET, PUT, DELETE, HEAD"));
        check(Method::GET, "/logout", methods("POST"));
        check(Method::GET, "/api/admin/api-tokens/", NotFound::Path);
        check(Method::GET, "/api/admin", NotFound::Path);
        check(Method::GET, "/api/admin/user-admin/1/2", NotFound::Path);
        check(Method::DELETE, "/api/admin/api-tokens/a%00", NotFound::Path);
    }
}
