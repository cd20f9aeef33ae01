//! The routes of the data listener: one table that requests are matched by, and that the OpenAPI document
//! and the labels of metrics derive from.
//!
//! To add an endpoint, add its variant and its row here, and its handler. The API of a request follows
//! from its route and never from a substring of its path. There is no IO and no state here.

use hyper::Method;

use crate::{snapshot::Include, token::TokenKind};

/// The endpoint of a route. The variants group endpoints by the API that handles them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Endpoint {
    /// Health, readiness and metrics.
    Probe(ProbeEndpoint),
    /// Validation of the tokens of another edge's clients.
    ValidateTokens,
    /// The configuration of flags, for server SDKs and other edges.
    Client(ClientEndpoint),
    /// Evaluated flags, for frontend SDKs.
    Frontend(FrontendEndpoint),
    /// Evaluated flags, for OpenFeature providers.
    Ofrep(OfrepEndpoint),
    /// Notifications to OpenFeature providers, to evaluate again. They need a ticket instead of a token.
    OfrepEvents,
    /// Reports of SDKs and other edges.
    Usage(UsageEndpoint),
}

/// Health, readiness and metrics.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProbeEndpoint {
    /// Whether the process lives.
    Health,
    /// Whether it is ready for requests.
    Ready,
    /// Its metrics, as Prometheus text.
    Metrics,
}

/// The configuration of flags.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientEndpoint {
    /// All flags.
    Features,
    /// One flag; the path parameter is its name.
    Feature,
    /// The changes since a state.
    Delta,
    /// The changes, as they happen.
    Streaming,
}

/// Evaluated flags, for frontend SDKs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FrontendEndpoint {
    /// The flags that are on, or all flags.
    Flags(Include),
    /// One flag; the path parameter is its name.
    Flag,
    /// The flags that are on, as they change.
    Streaming,
}

/// Evaluated flags, for OpenFeature providers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OfrepEndpoint {
    /// All flags.
    Flags,
    /// One flag; the path parameter is its key.
    Flag,
}

/// Reports of SDKs and other edges.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UsageEndpoint {
    /// An application that uses flags.
    Registration,
    /// The flags that an SDK counted.
    Metrics,
    /// The counts and applications that another edge collected.
    BulkMetrics,
    /// The state of another edge.
    EdgeInstance,
}

/// An endpoint that an operator can disable.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum OptionalEndpoint {
    /// `/api/frontend/all` and `/api/proxy/all`.
    FrontendAll,
    /// `/internal-backstage/metrics`, and its old name `prometheus`.
    Metrics,
    /// `/internal-backstage/metricsbatch`.
    MetricsBatch,
    /// `/internal-backstage/features`.
    Features,
    /// `/internal-backstage/tokens`.
    Tokens,
    /// `/internal-backstage/instancedata`.
    InstanceData,
}

/// A route: a row of the table.
#[derive(Debug)]
pub struct Route {
    /// The position in [`ROUTES`].
    pub index: usize,
    /// The path template, with at most one parameter, `{name}`, as the last segment. It is the label of
    /// the route in metrics.
    pub path: &'static str,
    /// Deprecated paths with the same meaning.
    pub deprecated_paths: &'static [&'static str],
    /// The handler.
    pub endpoint: Endpoint,
    /// The accepted kinds of token. None: the endpoint needs no token.
    pub token_kinds: &'static [TokenKind],
    /// The endpoint that an operator can disable.
    pub optional: Option<OptionalEndpoint>,
    /// `GET` and `HEAD`, if it supports them.
    pub get: Option<Operation>,
    /// `POST`, if it supports it.
    pub post: Option<Operation>,
    /// The length of the path before its parameter.
    prefix_length: Option<usize>,
}

/// The description of a method of a route, for the OpenAPI document.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// One line.
    pub summary: &'static str,
    /// The query parameters.
    pub query: &'static [QueryParameter],
    /// The name of the schema of the request body.
    pub body: Option<&'static str>,
    /// The successful response.
    pub response: ResponseSpec,
}

/// A successful response. The texts are names of schemas.
#[derive(Clone, Copy, Debug)]
pub enum ResponseSpec {
    /// 200 with JSON, or 304 if the client's entity tag matches.
    Cached(&'static str),
    /// 200 with JSON.
    Json(&'static str),
    /// 200 with server-sent events while the connection is open.
    EventStream,
    /// 202 without a body.
    Accepted,
    /// As the operation of the same path on the admin listener, which describes it.
    AsForOperators,
}

/// A query parameter.
#[derive(Clone, Copy, Debug)]
pub struct QueryParameter {
    /// Its name.
    pub name: &'static str,
    /// The form of its value.
    pub kind: ParameterKind,
}

/// The form of a query parameter.
#[derive(Clone, Copy, Debug)]
pub enum ParameterKind {
    /// A text.
    Text,
    /// A text that may be repeated.
    TextList,
    /// `name[key]=value`
    Properties,
}

const fn text(name: &'static str) -> QueryParameter {
    QueryParameter { name, kind: ParameterKind::Text }
}

const FILTER: &[QueryParameter] =
    &[text("namePrefix"), QueryParameter { name: "project", kind: ParameterKind::TextList }];

const CONTEXT: &[QueryParameter] = &[
    text("userId"),
    text("sessionId"),
    text("appName"),
    text("environment"),
    text("remoteAddress"),
    text("currentTime"),
    QueryParameter { name: "properties", kind: ParameterKind::Properties },
];

const CLIENT: &[TokenKind] = &[TokenKind::Client];
const FRONTEND: &[TokenKind] = &[TokenKind::Frontend];
const CLIENT_OR_FRONTEND: &[TokenKind] = &[TokenKind::Client, TokenKind::Frontend];

const AS_GET_WITH_CONTEXT: &str = "The same as GET, with the context in the body";

const fn operation(summary: &'static str, response: ResponseSpec) -> Operation {
    Operation { summary, query: &[], body: None, response }
}

impl Operation {
    const fn query(self, query: &'static [QueryParameter]) -> Self {
        Self { query, ..self }
    }

    const fn body(self, schema: &'static str) -> Self {
        Self { body: Some(schema), ..self }
    }
}

const fn route(path: &'static str, endpoint: Endpoint, token_kinds: &'static [TokenKind]) -> Route {
    Route {
        index: 0,
        path,
        deprecated_paths: &[],
        endpoint,
        token_kinds,
        optional: None,
        get: None,
        post: None,
        prefix_length: position(path, b'{'),
    }
}

/// An endpoint that receives a report.
const fn report(
    path: &'static str,
    endpoint: UsageEndpoint,
    token_kinds: &'static [TokenKind],
    schema: &'static str,
    summary: &'static str,
) -> Route {
    let operation = operation(summary, ResponseSpec::Accepted).body(schema);
    route(path, Endpoint::Usage(endpoint), token_kinds).post(operation)
}

const fn probe(path: &'static str, endpoint: ProbeEndpoint) -> Route {
    let operation = operation("", ResponseSpec::AsForOperators);
    route(path, Endpoint::Probe(endpoint), &[]).get(operation)
}

/// The position of a byte in a text.
const fn position(text: &str, byte: u8) -> Option<usize> {
    let mut at = 0;
    while at < text.len() {
        if text.as_bytes()[at] == byte {
            return Some(at);
        }
        at += 1;
    }
    None
}

impl Route {
    const fn get(self, operation: Operation) -> Self {
        Self { get: Some(operation), ..self }
    }

    const fn post(self, operation: Operation) -> Self {
        Self { post: Some(operation), ..self }
    }

    /// `GET` with the context in the query, and `POST` with the context in the body.
    const fn evaluates(self, summary: &'static str, response: ResponseSpec) -> Self {
        self.get(operation(summary, response).query(CONTEXT))
            .post(operation(AS_GET_WITH_CONTEXT, response).body("Context"))
    }

    const fn deprecated_paths(self, paths: &'static [&'static str]) -> Self {
        Self { deprecated_paths: paths, ..self }
    }

    const fn optional(self, endpoint: OptionalEndpoint) -> Self {
        Self { optional: Some(endpoint), ..self }
    }
}

/// All routes, the most frequent first, because they are matched in this order.
#[rustfmt::skip]
pub static ROUTES: [Route; 21] = numbered([
    route("/api/client/features", Endpoint::Client(ClientEndpoint::Features), CLIENT)
        .get(operation("The flag configuration that the token has access to", ResponseSpec::Cached("ClientFeatures")).query(FILTER))
        .post(operation("The same as GET", ResponseSpec::Cached("ClientFeatures")).query(FILTER)),
    route("/api/frontend", Endpoint::Frontend(FrontendEndpoint::Flags(Include::Enabled)), FRONTEND)
        .evaluates("The flags that are on for a context", ResponseSpec::Cached("Toggles"))
        .deprecated_paths(&["/api/proxy"]),
    report("/api/client/metrics", UsageEndpoint::Metrics, CLIENT, "ClientMetrics", "Usage counted by an SDK"),
    report("/api/frontend/client/metrics", UsageEndpoint::Metrics, FRONTEND, "ClientMetrics", "Usage counted by a frontend SDK")
        .deprecated_paths(&["/api/proxy/client/metrics", "/api/proxy/all/client/metrics", "/api/frontend/all/client/metrics"]),
    report("/api/client/register", UsageEndpoint::Registration, CLIENT, "Registration", "Register an application"),
    report("/api/frontend/client/register", UsageEndpoint::Registration, FRONTEND, "Registration", "Register a frontend application")
        .deprecated_paths(&["/api/proxy/client/register", "/api/proxy/all/client/register", "/api/frontend/all/client/register"]),
    report("/api/client/metrics/bulk", UsageEndpoint::BulkMetrics, CLIENT, "BulkMetrics", "Usage and registrations collected by an edge"),
    report("/api/client/metrics/edge", UsageEndpoint::EdgeInstance, CLIENT, "EdgeInstance", "The state of an edge"),
    route("/api/client/features/{name}", Endpoint::Client(ClientEndpoint::Feature), CLIENT)
        .get(operation("One flag's configuration", ResponseSpec::Cached("ClientFeature"))),
    route("/api/client/delta", Endpoint::Client(ClientEndpoint::Delta), CLIENT)
        .get(operation("Changes since the state named by If-None-Match", ResponseSpec::Cached("ClientDelta")).query(FILTER)),
    route("/api/client/streaming", Endpoint::Client(ClientEndpoint::Streaming), CLIENT)
        .get(operation("Changes, as server-sent events", ResponseSpec::EventStream).query(FILTER)),
    route("/api/frontend/all", Endpoint::Frontend(FrontendEndpoint::Flags(Include::All)), FRONTEND)
        .evaluates("All flags for a context", ResponseSpec::Cached("Toggles"))
        .deprecated_paths(&["/api/proxy/all"])
        .optional(OptionalEndpoint::FrontendAll),
    route("/api/frontend/features/{name}", Endpoint::Frontend(FrontendEndpoint::Flag), FRONTEND)
        .evaluates("One flag for a context", ResponseSpec::Cached("Toggle")),
    route("/api/frontend/streaming", Endpoint::Frontend(FrontendEndpoint::Streaming), FRONTEND)
        .evaluates("The flags that are on for a context and their changes, as server-sent events", ResponseSpec::EventStream)
        .deprecated_paths(&["/api/proxy/streaming"]),
    route("/ofrep/v1/evaluate/flags", Endpoint::Ofrep(OfrepEndpoint::Flags), FRONTEND)
        .post(operation("All flags for an OpenFeature provider", ResponseSpec::Cached("OfrepFlags")).body("OfrepQuestion")),
    route("/ofrep/v1/evaluate/flags/{key}", Endpoint::Ofrep(OfrepEndpoint::Flag), CLIENT_OR_FRONTEND)
        .post(operation("One flag for an OpenFeature provider", ResponseSpec::Cached("OfrepFlag")).body("OfrepQuestion")),
    route("/ofrep/v1/events", Endpoint::OfrepEvents, &[])
        .get(operation("Notifications to evaluate again, for an OpenFeature provider, as server-sent events", ResponseSpec::EventStream).query(&[text("ticket")])),
    route("/edge/validate", Endpoint::ValidateTokens, &[])
        .post(operation("Validate tokens", ResponseSpec::Json("ValidTokens")).body("Tokens")),
    probe("/internal-backstage/health", ProbeEndpoint::Health),
    probe("/internal-backstage/ready", ProbeEndpoint::Ready),
    probe("/internal-backstage/metrics", ProbeEndpoint::Metrics)
        .deprecated_paths(&["/internal-backstage/prometheus"])
        .optional(OptionalEndpoint::Metrics),
]);

/// Sets the position of each row.
const fn numbered<const COUNT: usize>(mut routes: [Route; COUNT]) -> [Route; COUNT] {
    let mut index = 0;
    while index < COUNT {
        routes[index].index = index;
        index += 1;
    }
    routes
}

/// The route of a request, and its path parameter.
#[derive(Clone, Copy, Debug)]
pub struct RouteMatch<'a> {
    /// The route.
    pub route: &'static Route,
    /// The value of the path parameter, still percent-encoded; empty for a path without one.
    pub parameter: &'a str,
}

/// Why a request has no route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RouteError {
    /// No resource at that path.
    NotFound,
    /// The resource supports other methods only: the value of `Allow`.
    MethodNotAllowed(&'static str),
}

/// Finds the route of a normalised path (see [`normalise`]).
pub fn find<'a>(method: &Method, path: &'a str) -> Result<RouteMatch<'a>, RouteError> {
    let found = ROUTES.iter().find_map(|route| Some((route, route.match_path(path)?)));
    let (route, parameter) = found
        .or_else(|| {
            let route = ROUTES.iter().find(|route| route.deprecated_paths.contains(&path))?;
            Some((route, ""))
        })
        .ok_or(RouteError::NotFound)?;
    let is_allowed = match *method {
        Method::GET | Method::HEAD => route.get.is_some(),
        Method::POST => route.post.is_some(),
        _ => false,
    };
    if is_allowed {
        Ok(RouteMatch { route, parameter })
    } else {
        Err(RouteError::MethodNotAllowed(route.allowed_methods()))
    }
}

impl Route {
    /// The path parameter, empty if the template has none; `None` if the path is another one.
    fn match_path<'a>(&self, path: &'a str) -> Option<&'a str> {
        match self.prefix_length {
            None => (path == self.path).then_some(""),
            Some(length) => path.strip_prefix(&self.path[..length]).and_then(single_segment),
        }
    }

    /// The value of `Allow`.
    fn allowed_methods(&self) -> &'static str {
        match (&self.get, &self.post) {
            (Some(_), Some(_)) => "GET, HEAD, POST",
            (Some(_), None) => "GET, HEAD",
            (None, _) => "POST",
        }
    }
}

/// Whether a normalised path belongs to the APIs of SDKs and other edges, even if it has no route.
pub fn is_sdk_path(path: &str) -> bool {
    ["/api/client/", "/api/frontend", "/api/proxy", "/ofrep/", "/edge/"]
        .iter()
        .any(|root| path.starts_with(root))
}

/// The path without the base path, doubled slashes and a trailing slash; `None` outside the base.
///
/// `base` is empty, or begins with a slash and does not end with one. A path without doubled slashes is
/// not copied.
pub fn normalise<'a>(path: &'a str, base: &str) -> Option<std::borrow::Cow<'a, str>> {
    use std::borrow::Cow;
    // Faster than a substring search for something as short as a path.
    let is_doubled = path.as_bytes().windows(2).any(|two| two == b"//");
    let path = if is_doubled {
        let mut single = String::with_capacity(path.len());
        for part in path.split('/').filter(|part| !part.is_empty()) {
            single.push('/');
            single.push_str(part);
        }
        Cow::Owned(single)
    } else {
        Cow::Borrowed(path.strip_suffix('/').unwrap_or(path))
    };
    if base.is_empty() {
        return Some(path);
    }
    let is_inside = |path: &str| {
        path.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    match path {
        Cow::Borrowed(path) if is_inside(path) => Some(Cow::Borrowed(&path[base.len()..])),
        Cow::Owned(path) if is_inside(&path) => Some(Cow::Owned(path[base.len()..].to_owned())),
        _ => None,
    }
}

/// The text, if it is one non-empty path segment.
fn single_segment(text: &str) -> Option<&str> {
    (!text.is_empty() && !text.contains('/')).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the template and the parameter that a request is matched to.
    #[track_caller]
    fn check(method: &Method, path: &str, expect: Result<(&str, &str), RouteError>) {
        let path = normalise(path, "").expect("there is no base path");
        let found = find(method, &path).map(|found| (found.route.path, found.parameter));
        assert_eq!(found, expect, "{method} {path}");
    }

    #[test]
    fn every_row_is_found_by_its_paths_and_methods() {
        for (index, route) in ROUTES.iter().enumerate() {
            assert_eq!(route.index, index);
            for path in route.deprecated_paths.iter().chain([&route.path]) {
                let parameter = if path.contains('{') { "a%20b" } else { "" };
                let path = path.replace("{name}", parameter).replace("{key}", parameter);
                for (method, operation) in [
                    (Method::GET, route.get),
                    (Method::HEAD, route.get),
                    (Method::POST, route.post),
                ] {
                    let other = Err(RouteError::MethodNotAllowed(route.allowed_methods()));
                    let expect = operation.map_or(other, |_| Ok((route.path, parameter)));
                    check(&method, &path, expect);
                }
            }
        }
    }

    #[test]
    fn documented_paths_have_their_endpoints() {
        use TokenKind::{Client, Frontend};
        let flags = |include| Endpoint::Frontend(FrontendEndpoint::Flags(include));
        let streaming = Endpoint::Frontend(FrontendEndpoint::Streaming);
        let [metrics, registration, bulk, edge] = [
            UsageEndpoint::Metrics,
            UsageEndpoint::Registration,
            UsageEndpoint::BulkMetrics,
            UsageEndpoint::EdgeInstance,
        ]
        .map(Endpoint::Usage);
        for (path, endpoint, kind) in [
            ("/api/client/features", Endpoint::Client(ClientEndpoint::Features), Client),
            ("/api/client/metrics", metrics, Client),
            ("/api/client/register", registration, Client),
            ("/api/client/metrics/bulk", bulk, Client),
            ("/api/client/metrics/edge", edge, Client),
            ("/api/frontend", flags(Include::Enabled), Frontend),
            ("/api/frontend/all", flags(Include::All), Frontend),
            ("/api/frontend/streaming", streaming, Frontend),
            ("/api/frontend/client/metrics", metrics, Frontend),
            ("/api/frontend/client/register", registration, Frontend),
            ("/api/frontend/all/client/metrics", metrics, Frontend),
            ("/api/frontend/all/client/register", registration, Frontend),
            ("/api/proxy", flags(Include::Enabled), Frontend),
            ("/api/proxy/all", flags(Include::All), Frontend),
            ("/api/proxy/streaming", streaming, Frontend),
            ("/api/proxy/client/metrics", metrics, Frontend),
            ("/api/proxy/client/register", registration, Frontend),
            ("/api/proxy/all/client/metrics", metrics, Frontend),
            ("/api/proxy/all/client/register", registration, Frontend),
        ] {
            let route = find(&Method::POST, path).unwrap().route;
            assert_eq!((route.endpoint, route.token_kinds), (endpoint, &[kind][..]), "{path}");
        }
        let prometheus = find(&Method::GET, "/internal-backstage/prometheus").unwrap().route;
        assert_eq!(prometheus.endpoint, Endpoint::Probe(ProbeEndpoint::Metrics));
    }

    #[test]
    fn slashes_at_the_end_and_doubled_ones_are_ignored() {
        let features = Ok(("/api/client/features", ""));
        check(&Method::HEAD, "/api/client/features/", features);
        check(&Method::GET, "//api//client/features", features);
        check(&Method::GET, "/api//client/features/a", Ok(("/api/client/features/{name}", "a")));
    }

    #[test]
    fn unknown_path_and_unsupported_method_are_distinguished() {
        check(&Method::GET, "/", Err(RouteError::NotFound));
        check(&Method::GET, "/api/client/features/a/b", Err(RouteError::NotFound));
        check(&Method::GET, "/api/proxy/features/x", Err(RouteError::NotFound));
        check(&Method::GET, "/api/frontendx", Err(RouteError::NotFound));
        check(&Method::POST, "/ofrep/v1/evaluate/flagsx", Err(RouteError::NotFound));
        let other = |allow| Err(RouteError::MethodNotAllowed(allow));
        check(&Method::GET, "/ofrep/v1/evaluate/flags", other("POST"));
        check(&Method::GET, "/api/client/metrics", other("POST"));
        check(&Method::PUT, "/api/frontend", other("GET, HEAD, POST"));
        check(&Method::DELETE, "/internal-backstage/health", other("GET, HEAD"));
    }

    #[test]
    fn flag_may_have_the_name_of_another_api_or_of_the_parameter() {
        let route = "/api/client/features/{name}";
        check(&Method::GET, "/api/client/features/frontend", Ok((route, "frontend")));
        check(&Method::GET, route, Ok((route, "{name}")));
    }

    #[test]
    fn base_path_is_removed_and_required() {
        let check = |path, expect: Option<&str>| {
            assert_eq!(normalise(path, "/edge").as_deref(), expect, "{path}");
        };
        check("/edge/api/frontend", Some("/api/frontend"));
        check("/edge//api/frontend/", Some("/api/frontend"));
        check("/edge", Some(""));
        check("/edgeapi", None);
        check("/api/frontend", None);
    }
}
