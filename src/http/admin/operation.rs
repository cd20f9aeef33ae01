//! The table of all admin operations. Requests are routed by it, and the OpenAPI document is generated
//! from it.
//!
//! Requests are neither handled nor authorized here.

use std::borrow::Cow;

use hyper::Method;
use percent_encoding::percent_decode_str;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::{
    control_plane::EventQuery,
    engine::explanation::Explanation,
    http::routes::OptionalEndpoint,
    protocol::{admin as wire, explain::ExplainRequest},
};

/// Identifies an operation. The variants group operations by their requirements; the `Debug` text is the
/// `operationId` of the OpenAPI document.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OperationId {
    /// Needs no authentication.
    Open(PublicOperation),
    /// Reads the instance's state in memory; the same for every operator.
    Instance(InstanceOperation),
    /// Needs the control plane.
    Control(ControlPlaneOperation),
}

/// Operations without authentication.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum PublicOperation {
    Live,
    Ready,
    Metrics,
    Document,
    SignIn,
    SignOut,
}

/// Operations on the state of the instance, for every operator.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum InstanceOperation {
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

/// Operations of the control plane.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ControlPlaneOperation {
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

/// Generates the schema of a type.
pub(super) type SchemaFn = fn(&mut SchemaGenerator) -> Schema;

/// The successful response of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) enum ResponseSpec {
    /// 200 with JSON.
    Json(SchemaFn),
    /// 201 with JSON.
    Created(SchemaFn),
    /// 200 without a body.
    Empty,
    /// 204 without a body.
    NoContent,
    /// 200 or 503 with JSON, depending on the state.
    Probe(SchemaFn),
    /// 200 with metrics in the Prometheus text format.
    Text,
}

/// The required authentication.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Access {
    /// None.
    Public,
    /// A session or an admin token. The operation may require further permissions.
    Operator,
    /// A session of an admin, or an admin token.
    Admin,
}

/// A query parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueryParameter {
    pub(super) name: &'static str,
    pub(super) description: &'static str,
    pub(super) kind: ParameterType,
    pub(super) required: bool,
}

/// The type of a query parameter.
#[derive(Clone, Copy, Debug)]
pub(super) enum ParameterType {
    Text,
    /// A text that may be repeated.
    TextList,
    Time,
    Number {
        least: u32,
        most: u32,
    },
}

/// One operation: a row of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) method: HttpMethod,
    /// The path template, with `{name}` for a parameter.
    pub(super) path: &'static str,
    pub(super) id: OperationId,
    pub(super) tag: &'static str,
    pub(super) summary: &'static str,
    pub(super) access: Access,
    pub(super) query: &'static [QueryParameter],
    pub(super) body: Option<SchemaFn>,
    pub(super) response: ResponseSpec,
    /// Whether the resource that a path or query names may be missing.
    pub(super) can_404: bool,
    /// The option that disables it.
    pub(super) disabled_by: Option<OptionalEndpoint>,
}

/// The methods of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum HttpMethod {
    Get,
    Post,
    Put,
    Delete,
}

impl HttpMethod {
    /// The name of the method.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }

    fn matches(self, method: &Method) -> bool {
        method.as_str() == self.as_str() || (self == Self::Get && *method == Method::HEAD)
    }

    /// Whether the method changes state.
    pub(super) fn is_mutation(self) -> bool {
        self != Self::Get
    }
}

/// The operation of a request, and its path parameters.
#[derive(Debug)]
pub(super) struct MatchedOperation<'a> {
    pub(super) operation: &'static Operation,
    pub(super) path_params: PathParams<'a>,
}

/// The values of the path parameters. No operation has more than two; unused ones are empty.
pub(super) type PathParams<'a> = [Cow<'a, str>; 2];

/// Why no operation matches a request.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum NoMatch {
    /// No operation has this path.
    UnknownPath,
    /// The path exists, but only with these methods.
    MethodNotAllowed(String),
}

/// Finds the operation of a method and a normalised path.
pub(super) fn find<'a>(method: &Method, path: &'a str) -> Result<MatchedOperation<'a>, NoMatch> {
    let mut methods = Vec::new();
    for operation in OPERATIONS {
        let Some(path_params) = match_path(operation.path, path) else { continue };
        if operation.method.matches(method) {
            return Ok(MatchedOperation { operation, path_params });
        }
        methods.push(operation.method.as_str());
    }
    if methods.is_empty() {
        return Err(NoMatch::UnknownPath);
    }
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    Err(NoMatch::MethodNotAllowed(methods.join(", ")))
}

/// Matches `path` against `template` and returns the path parameters.
fn match_path<'a>(template: &str, path: &'a str) -> Option<PathParams<'a>> {
    let mut arguments = PathParams::default();
    let mut unset = arguments.iter_mut();
    let (mut expected, mut actual) = (template.split('/'), path.split('/'));
    loop {
        match (expected.next(), actual.next()) {
            (None, None) => break,
            (Some(expected), Some(actual)) if expected.starts_with('{') => {
                let argument = percent_decode_str(actual).decode_utf8().ok()?;
                // No name contains a NUL, and PostgreSQL rejects it.
                if argument.is_empty() || argument.contains('\0') {
                    return None;
                }
                *unset.next()? = argument;
            }
            (Some(expected), Some(actual)) if expected == actual => {}
            _ => return None,
        }
    }
    Some(arguments)
}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The schema of the instance's health.
fn status_schema(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "type": "object",
        "required": ["status"],
        "properties": { "status": { "type": "string" }, "error": { "type": "string" } },
    })
}

/// The schema of any object.
fn object_schema(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({ "type": "object" })
}

const fn operation(
    method: HttpMethod,
    path: &'static str,
    id: OperationId,
    summary: &'static str,
) -> Operation {
    Operation {
        method,
        path,
        id,
        tag: "",
        summary,
        access: match id {
            OperationId::Open(_) => Access::Public,
            OperationId::Instance(_) | OperationId::Control(_) => Access::Operator,
        },
        query: &[],
        body: None,
        response: ResponseSpec::Empty,
        can_404: false,
        disabled_by: None,
    }
}

const fn get(path: &'static str, call: OperationId, summary: &'static str) -> Operation {
    operation(HttpMethod::Get, path, call, summary).response(ResponseSpec::Json(object_schema))
}

const fn post(path: &'static str, call: OperationId, summary: &'static str) -> Operation {
    operation(HttpMethod::Post, path, call, summary)
}

const fn put(path: &'static str, call: OperationId, summary: &'static str) -> Operation {
    operation(HttpMethod::Put, path, call, summary)
}

const fn delete(path: &'static str, call: OperationId, summary: &'static str) -> Operation {
    operation(HttpMethod::Delete, path, call, summary)
}

impl Operation {
    const fn tag(self, tag: &'static str) -> Self {
        Self { tag, ..self }
    }

    const fn for_admins(self) -> Self {
        Self { access: Access::Admin, ..self }
    }

    const fn response(self, response: ResponseSpec) -> Self {
        Self { response, ..self }
    }

    const fn json<T: JsonSchema>(self) -> Self {
        self.response(ResponseSpec::Json(schema_of::<T>))
    }

    const fn created<T: JsonSchema>(self) -> Self {
        self.response(ResponseSpec::Created(schema_of::<T>))
    }

    const fn body<T: JsonSchema>(self) -> Self {
        Self { body: Some(schema_of::<T>), ..self }
    }

    const fn query(self, query: &'static [QueryParameter]) -> Self {
        Self { query, ..self }
    }

    const fn can_404(self) -> Self {
        Self { can_404: true, ..self }
    }

    const fn disabled_by(self, endpoint: OptionalEndpoint) -> Self {
        Self { disabled_by: Some(endpoint), ..self }
    }
}

const fn text(name: &'static str, description: &'static str) -> QueryParameter {
    QueryParameter { name, description, kind: ParameterType::Text, required: false }
}

const fn text_list(name: &'static str, description: &'static str) -> QueryParameter {
    QueryParameter { name, description, kind: ParameterType::TextList, required: false }
}

const fn time(name: &'static str, description: &'static str) -> QueryParameter {
    QueryParameter { name, description, kind: ParameterType::Time, required: false }
}

const fn number(
    name: &'static str,
    least: u32,
    most: u32,
    description: &'static str,
) -> QueryParameter {
    QueryParameter {
        name,
        description,
        kind: ParameterType::Number { least, most },
        required: false,
    }
}

const ENVIRONMENT_PARAMETER: &[QueryParameter] = &[QueryParameter {
    name: "environment",
    description: "The environment of the flags",
    kind: ParameterType::Text,
    required: true,
}];

const INSTANCE_TAG: &str = "Instance";
const SESSION_TAG: &str = "Session";
const TOKENS_TAG: &str = "API tokens";
const ACCOUNTS_TAG: &str = "Accounts";
const AUDIT_TAG: &str = "Audit";
const FLAGS_TAG: &str = "Flags";
const USAGE_TAG: &str = "Usage";

/// The maximum number of accounts in a page.
pub(super) const MAX_ACCOUNTS: u32 = 1000;

/// The maximum period of flag usage, in hours.
pub(super) const MAX_USAGE_HOURS: u32 = 24 * 90;

/// All admin operations.
#[rustfmt::skip]
pub(super) static OPERATIONS: &[Operation] = &[
    get("/live", OperationId::Open(PublicOperation::Live), "Whether the instance lives").tag(INSTANCE_TAG).response(ResponseSpec::Json(status_schema)),
    get("/ready", OperationId::Open(PublicOperation::Ready), "Whether it is ready for requests").tag(INSTANCE_TAG).response(ResponseSpec::Probe(status_schema)),
    get("/metrics", OperationId::Open(PublicOperation::Metrics), "Its metrics, as Prometheus text").tag(INSTANCE_TAG).response(ResponseSpec::Text).disabled_by(OptionalEndpoint::Metrics),
    get("/docs/openapi.json", OperationId::Open(PublicOperation::Document), "This document").tag(INSTANCE_TAG),
    get("/status", OperationId::Instance(InstanceOperation::Status), "The state of environments, upstream and tokens").tag(INSTANCE_TAG),
    get("/internal-backstage/health", OperationId::Open(PublicOperation::Live), "Whether the instance lives").tag(INSTANCE_TAG).response(ResponseSpec::Json(status_schema)),
    get("/internal-backstage/ready", OperationId::Open(PublicOperation::Ready), "Whether it is ready for requests").tag(INSTANCE_TAG).response(ResponseSpec::Probe(status_schema)),
    get("/internal-backstage/metrics", OperationId::Open(PublicOperation::Metrics), "Its metrics, as Prometheus text").tag(INSTANCE_TAG).response(ResponseSpec::Text).disabled_by(OptionalEndpoint::Metrics),
    get("/internal-backstage/prometheus", OperationId::Open(PublicOperation::Metrics), "The same metrics under an older path").tag(INSTANCE_TAG).response(ResponseSpec::Text).disabled_by(OptionalEndpoint::Metrics),
    get("/internal-backstage/features", OperationId::Instance(InstanceOperation::Features), "The flag configuration of each environment").tag(INSTANCE_TAG).disabled_by(OptionalEndpoint::Features),
    get("/internal-backstage/tokens", OperationId::Instance(InstanceOperation::KnownTokens), "The valid tokens, masked").tag(INSTANCE_TAG).disabled_by(OptionalEndpoint::Tokens),
    get("/internal-backstage/metricsbatch", OperationId::Instance(InstanceOperation::MetricsBatch), "Usage data that is not sent yet").tag(INSTANCE_TAG).disabled_by(OptionalEndpoint::MetricsBatch),
    get("/internal-backstage/instancedata", OperationId::Instance(InstanceOperation::InstanceData), "This instance and the edges behind it").tag(INSTANCE_TAG).disabled_by(OptionalEndpoint::InstanceData),

    post("/auth/simple/login", OperationId::Open(PublicOperation::SignIn), "Sign in; the response sets a session cookie").tag(SESSION_TAG).body::<wire::Login>().json::<wire::Caller>(),
    post("/logout", OperationId::Open(PublicOperation::SignOut), "Sign out").tag(SESSION_TAG).response(ResponseSpec::NoContent),
    post("/auth/logout", OperationId::Open(PublicOperation::SignOut), "Sign out").tag(SESSION_TAG).response(ResponseSpec::NoContent),
    get("/api/admin/user", OperationId::Instance(InstanceOperation::Me), "The current user and their permissions").tag(SESSION_TAG).json::<wire::Me>(),
    post("/api/admin/user/change-password", OperationId::Control(ControlPlaneOperation::ChangeOwnPassword), "Change your own password; ends your other sessions").tag(SESSION_TAG).body::<wire::ChangePassword>(),

    get("/api/admin/api-tokens", OperationId::Control(ControlPlaneOperation::Tokens), "The tokens that the caller may see").tag(TOKENS_TAG).json::<wire::ApiTokens>(),
    post("/api/admin/api-tokens", OperationId::Control(ControlPlaneOperation::CreateToken), "Create a token; only this response contains its secret").tag(TOKENS_TAG).body::<wire::CreateToken>().created::<wire::ApiToken>(),
    get("/api/admin/api-tokens/{token}", OperationId::Control(ControlPlaneOperation::TokensNamed), "The tokens of this name that the caller may see").tag(TOKENS_TAG).json::<wire::ApiTokens>(),
    put("/api/admin/api-tokens/{token}", OperationId::Control(ControlPlaneOperation::UpdateToken), "Change the expiry of a token, named by its secret or by its identifier in lists").tag(TOKENS_TAG).body::<wire::UpdateToken>(),
    delete("/api/admin/api-tokens/{token}", OperationId::Control(ControlPlaneOperation::DeleteToken), "Delete a token, named by its secret or by its identifier in lists").tag(TOKENS_TAG),
    get("/api/admin/projects/{project}/api-tokens", OperationId::Control(ControlPlaneOperation::ProjectTokens), "The tokens with access to this project").tag(TOKENS_TAG).json::<wire::ApiTokens>().can_404(),
    post("/api/admin/projects/{project}/api-tokens", OperationId::Control(ControlPlaneOperation::CreateProjectToken), "Create a token for this project").tag(TOKENS_TAG).body::<wire::CreateToken>().created::<wire::ApiToken>().can_404(),
    delete("/api/admin/projects/{project}/api-tokens/{token}", OperationId::Control(ControlPlaneOperation::DeleteProjectToken), "Delete a token of this project").tag(TOKENS_TAG).can_404(),

    get("/api/admin/user-admin", OperationId::Control(ControlPlaneOperation::Users), "The accounts, oldest first").tag(ACCOUNTS_TAG).for_admins().json::<wire::Users>().query(&[
        number("after", 0, u32::MAX, "Accounts after the one with this id, for the next page"),
        number("limit", 1, MAX_ACCOUNTS, "The maximum number of accounts; all by default"),
    ]),
    post("/api/admin/user-admin", OperationId::Control(ControlPlaneOperation::CreateUser), "Create an account").tag(ACCOUNTS_TAG).for_admins().body::<wire::CreateUser>().created::<wire::User>(),
    get("/api/admin/user-admin/{id}", OperationId::Control(ControlPlaneOperation::User), "One account").tag(ACCOUNTS_TAG).json::<wire::User>().can_404(),
    put("/api/admin/user-admin/{id}", OperationId::Control(ControlPlaneOperation::UpdateUser), "Change an account").tag(ACCOUNTS_TAG).for_admins().body::<wire::UpdateUser>().json::<wire::User>().can_404(),
    delete("/api/admin/user-admin/{id}", OperationId::Control(ControlPlaneOperation::DeleteUser), "Delete an account").tag(ACCOUNTS_TAG).for_admins().can_404(),
    put("/api/admin/user-admin/{id}/permissions", OperationId::Control(ControlPlaneOperation::SetPermissions), "Set the permissions of an account beyond its role").tag(ACCOUNTS_TAG).for_admins().body::<wire::SetPermissions>().json::<wire::User>().can_404(),
    post("/api/admin/user-admin/{id}/change-password", OperationId::Control(ControlPlaneOperation::ResetPassword), "Set a new password for an account; ends its sessions").tag(ACCOUNTS_TAG).for_admins().body::<wire::ResetPassword>().can_404(),

    get("/api/admin/events", OperationId::Control(ControlPlaneOperation::Events), "The audit log: changes and denied requests").tag(AUDIT_TAG).for_admins().json::<wire::Events>().query(&[
        text_list("type", "Events of this type, such as api-token-created; repeat for several types"),
        text("createdBy", "Events caused by this account or token"),
        text("environment", "Events of this environment"),
        text("project", "Events of this project"),
        time("from", "Events at or after this time"),
        time("to", "Events before this time"),
        number("before", 1, u32::MAX, "Events before the one with this id, for the next page"),
        number("limit", 1, EventQuery::MAX_LIMIT, "The maximum number of events; 100 by default"),
        number("offset", 0, u32::MAX, "The number of newest events to skip"),
    ]),

    get("/api/admin/environments", OperationId::Instance(InstanceOperation::Environments), "The environments").tag(FLAGS_TAG).json::<wire::Environments>(),
    get("/api/admin/projects", OperationId::Instance(InstanceOperation::Projects), "The projects").tag(FLAGS_TAG).json::<wire::Projects>(),
    get("/api/admin/flags", OperationId::Instance(InstanceOperation::Flags), "The flags of an environment").tag(FLAGS_TAG).json::<wire::Flags>().query(ENVIRONMENT_PARAMETER).can_404(),
    get("/api/admin/flags/{name}", OperationId::Instance(InstanceOperation::Flag), "One flag, as sent to SDKs").tag(FLAGS_TAG).json::<wire::FlagDetail>().query(ENVIRONMENT_PARAMETER).can_404(),
    post("/api/admin/explain", OperationId::Instance(InstanceOperation::Explain), "Explain the evaluation of a flag for a context").tag(FLAGS_TAG).body::<ExplainRequest<'static>>().json::<Explanation>().can_404(),

    get("/api/admin/metrics/applications", OperationId::Control(ControlPlaneOperation::Applications), "The applications that use flags").tag(USAGE_TAG).json::<wire::Applications>(),
    get("/api/admin/client-metrics/features/{name}/raw", OperationId::Control(ControlPlaneOperation::FlagUsage), "The usage of a flag, by hour").tag(USAGE_TAG).json::<wire::FlagUsage>().query(&[
        number("hoursBack", 1, MAX_USAGE_HOURS, "The period in hours; 24 by default"),
    ]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_found_by_its_path() {
        for row in OPERATIONS {
            let path = row.path.replace('{', "x").replace('}', "%20y");
            let method = Method::from_bytes(row.method.as_str().as_bytes()).unwrap();
            let found = find(&method, &path).unwrap();
            assert_eq!(found.operation.path, row.path);
            assert_eq!(found.operation.method, row.method);
            let (set, unset) = found.path_params.split_at(row.path.matches('{').count());
            assert!(set.iter().all(|it| it.ends_with(" y")), "{set:?}");
            assert!(unset.iter().all(|it| it.is_empty()), "{unset:?}");
        }
    }

    #[test]
    fn unknown_path_and_unsupported_method_are_distinguished() {
        let check = |method: Method, path: &str, expect: NoMatch| {
            assert_eq!(find(&method, path).unwrap_err(), expect, "{method} {path}");
        };
        let methods = |text: &str| NoMatch::MethodNotAllowed(text.to_owned());
        check(Method::PUT, "/api/admin/api-tokens", methods("GET, POST, HEAD"));
        check(Method::POST, "/api/admin/api-tokens/a", methods("GET, PUT, DELETE, HEAD"));
        check(Method::GET, "/logout", methods("POST"));
        check(Method::GET, "/api/admin/api-tokens/", NoMatch::UnknownPath);
        check(Method::GET, "/api/admin", NoMatch::UnknownPath);
        check(Method::GET, "/api/admin/user-admin/1/2", NoMatch::UnknownPath);
        check(Method::DELETE, "/api/admin/api-tokens/a%00", NoMatch::UnknownPath);
    }
}
