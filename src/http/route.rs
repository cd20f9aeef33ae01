//! The routes of the SDK port: maps method and path to a [`Route`]. A pure table without IO or state.
//!
//! The API of a request follows from its route and never from a substring of its path.

use hyper::Method;

use crate::{snapshot::Include, token::TokenKind};

/// The endpoint of a request on the SDK port; `'a` is the path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Route<'a> {
    /// `GET`, `POST` and `HEAD /api/client/features`
    ClientFeatures,
    /// `GET /api/client/features/{name}`, the name still percent-encoded
    ClientFeature(&'a str),
    /// `GET /api/client/delta`
    ClientDelta,
    /// `GET /api/client/streaming`
    ClientStreaming,
    /// `POST /api/client/register` and `/api/{frontend,proxy}[/all]/client/register`
    Register(TokenKind),
    /// `POST /api/client/metrics` and `/api/{frontend,proxy}[/all]/client/metrics`
    UsageMetrics(TokenKind),
    /// `POST /api/client/metrics/bulk`
    BulkMetrics,
    /// `POST /api/client/metrics/edge`
    EdgeInstance,
    /// `GET` and `POST /api/frontend[/all]`, `/api/proxy[/all]`
    FrontendFlags(Include),
    /// `GET` and `POST /api/frontend/features/{name}`, the name still percent-encoded
    FrontendFeature(&'a str),
    /// `GET` and `POST /api/frontend/streaming`, `/api/proxy/streaming`
    FrontendStreaming,
    /// `POST /ofrep/v1/evaluate/flags`
    OfrepFlags,
    /// `POST /ofrep/v1/evaluate/flags/{key}`, the key still percent-encoded
    OfrepFlag(&'a str),
    /// `GET /ofrep/v1/events`
    OfrepEvents,
    /// `POST /edge/validate`
    ValidateTokens,
    /// `GET /internal-backstage/health`
    Health,
    /// `GET /internal-backstage/ready`
    Ready,
    /// `GET /internal-backstage/metrics`, `/internal-backstage/prometheus`
    Prometheus,
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

/// Why a request has no route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RouteError {
    /// No resource at that path.
    NotFound,
    /// The resource supports other methods only: the value of `Allow`.
    MethodNotAllowed(&'static str),
}

const GET_HEAD: &str = "GET, HEAD";
const GET_HEAD_POST: &str = "GET, HEAD, POST";
const POST: &str = "POST";

impl<'a> Route<'a> {
    /// The path template of each route, used as a label value, at [`Route::index`].
    pub const TEMPLATES: [&'static str; 21] = [
        "/api/client/features",
        "/api/client/features/{name}",
        "/api/client/register",
        "/api/client/metrics",
        "/api/client/metrics/bulk",
        "/api/client/metrics/edge",
        "/api/frontend",
        "/api/frontend/all",
        "/api/frontend/features/{name}",
        "/api/frontend/client/register",
        "/api/frontend/client/metrics",
        "/edge/validate",
        "/internal-backstage/health",
        "/internal-backstage/ready",
        "/internal-backstage/metrics",
        "/api/client/delta",
        "/api/client/streaming",
        "/ofrep/v1/evaluate/flags",
        "/ofrep/v1/evaluate/flags/{key}",
        "/api/frontend/streaming",
        "/ofrep/v1/events",
    ];

    /// Finds the route of a normalised path (see [`normalise`]).
    pub fn parse(method: &Method, path: &'a str) -> Result<Self, RouteError> {
        let (route, methods) = Self::match_path(path).ok_or(RouteError::NotFound)?;
        let is_allowed = match *method {
            Method::GET | Method::HEAD => methods != POST,
            Method::POST => methods != GET_HEAD,
            _ => false,
        };
        if is_allowed { Ok(route) } else { Err(RouteError::MethodNotAllowed(methods)) }
    }

    /// Whether a normalised path belongs to the APIs of SDKs and other edges, even if it has no route.
    pub fn is_sdk_path(path: &str) -> bool {
        ["/api/client/", "/api/frontend", "/api/proxy", "/ofrep/", "/edge/"]
            .iter()
            .any(|root| path.starts_with(root))
    }

    fn match_path(path: &'a str) -> Option<(Self, &'static str)> {
        if let Some(rest) = path.strip_prefix("/api/client/") {
            return Self::match_client_path(rest);
        }
        if let Some(rest) = path.strip_prefix("/api/frontend") {
            return match rest.strip_prefix("/features/") {
                Some(name) => Some((Self::FrontendFeature(single_segment(name)?), GET_HEAD_POST)),
                None => Self::match_frontend_path(rest),
            };
        }
        if let Some(rest) = path.strip_prefix("/api/proxy") {
            return Self::match_frontend_path(rest);
        }
        if let Some(rest) = path.strip_prefix("/ofrep/v1/evaluate/flags") {
            return match rest.strip_prefix('/') {
                Some(key) => Some((Self::OfrepFlag(single_segment(key)?), POST)),
                None => rest.is_empty().then_some((Self::OfrepFlags, POST)),
            };
        }
        match path {
            "/ofrep/v1/events" => Some((Self::OfrepEvents, GET_HEAD)),
            "/edge/validate" => Some((Self::ValidateTokens, POST)),
            "/internal-backstage/health" => Some((Self::Health, GET_HEAD)),
            "/internal-backstage/ready" => Some((Self::Ready, GET_HEAD)),
            "/internal-backstage/metrics" | "/internal-backstage/prometheus" => {
                Some((Self::Prometheus, GET_HEAD))
            }
            _ => None,
        }
    }

    fn match_client_path(rest: &'a str) -> Option<(Self, &'static str)> {
        match rest {
            "features" => Some((Self::ClientFeatures, GET_HEAD_POST)),
            "delta" => Some((Self::ClientDelta, GET_HEAD)),
            "streaming" => Some((Self::ClientStreaming, GET_HEAD)),
            "register" => Some((Self::Register(TokenKind::Client), POST)),
            "metrics" => Some((Self::UsageMetrics(TokenKind::Client), POST)),
            "metrics/bulk" => Some((Self::BulkMetrics, POST)),
            "metrics/edge" => Some((Self::EdgeInstance, POST)),
            _ => {
                let name = single_segment(rest.strip_prefix("features/")?)?;
                Some((Self::ClientFeature(name), GET_HEAD))
            }
        }
    }

    fn match_frontend_path(rest: &str) -> Option<(Self, &'static str)> {
        match rest {
            "" => Some((Self::FrontendFlags(Include::Enabled), GET_HEAD_POST)),
            "/all" => Some((Self::FrontendFlags(Include::All), GET_HEAD_POST)),
            "/streaming" => Some((Self::FrontendStreaming, GET_HEAD_POST)),
            "/client/metrics" | "/all/client/metrics" => {
                Some((Self::UsageMetrics(TokenKind::Frontend), POST))
            }
            "/client/register" | "/all/client/register" => {
                Some((Self::Register(TokenKind::Frontend), POST))
            }
            _ => None,
        }
    }

    /// The route's index in [`Route::TEMPLATES`].
    pub fn index(&self) -> usize {
        match self {
            Self::ClientFeatures => 0,
            Self::ClientFeature(_) => 1,
            Self::Register(TokenKind::Client | TokenKind::Admin) => 2,
            Self::UsageMetrics(TokenKind::Client | TokenKind::Admin) => 3,
            Self::BulkMetrics => 4,
            Self::EdgeInstance => 5,
            Self::FrontendFlags(Include::Enabled) => 6,
            Self::FrontendFlags(Include::All) => 7,
            Self::FrontendFeature(_) => 8,
            Self::Register(TokenKind::Frontend) => 9,
            Self::UsageMetrics(TokenKind::Frontend) => 10,
            Self::ValidateTokens => 11,
            Self::Health => 12,
            Self::Ready => 13,
            Self::Prometheus => 14,
            Self::ClientDelta => 15,
            Self::ClientStreaming => 16,
            Self::OfrepFlags => 17,
            Self::OfrepFlag(_) => 18,
            Self::FrontendStreaming => 19,
            Self::OfrepEvents => 20,
        }
    }
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

    #[track_caller]
    fn check(method: &Method, path: &str, expect: Result<Route<'_>, RouteError>) {
        let path = normalise(path, "").expect("there is no base path");
        assert_eq!(Route::parse(method, &path), expect, "{method} {path}");
    }

    #[test]
    fn documented_path_has_its_route() {
        check(&Method::GET, "/api/client/features", Ok(Route::ClientFeatures));
        check(&Method::POST, "/api/client/features", Ok(Route::ClientFeatures));
        check(&Method::HEAD, "/api/client/features/", Ok(Route::ClientFeatures));
        check(&Method::GET, "/api//client/features/a", Ok(Route::ClientFeature("a")));
        check(&Method::GET, "/api/client/delta", Ok(Route::ClientDelta));
        check(&Method::GET, "/api/client/streaming", Ok(Route::ClientStreaming));
        check(&Method::POST, "/api/client/metrics/bulk", Ok(Route::BulkMetrics));
        check(&Method::GET, "/api/proxy", Ok(Route::FrontendFlags(Include::Enabled)));
        check(&Method::GET, "/api/frontend/streaming", Ok(Route::FrontendStreaming));
        check(&Method::POST, "/api/proxy/streaming", Ok(Route::FrontendStreaming));
        check(&Method::GET, "/ofrep/v1/events", Ok(Route::OfrepEvents));
        check(&Method::POST, "/api/frontend/all", Ok(Route::FrontendFlags(Include::All)));
        check(&Method::GET, "/api/frontend/features/x", Ok(Route::FrontendFeature("x")));
        check(
            &Method::POST,
            "/api/proxy/all/client/metrics",
            Ok(Route::UsageMetrics(TokenKind::Frontend)),
        );
        check(&Method::POST, "/ofrep/v1/evaluate/flags", Ok(Route::OfrepFlags));
        check(&Method::POST, "/ofrep/v1/evaluate/flags/a", Ok(Route::OfrepFlag("a")));
        check(&Method::POST, "/edge/validate", Ok(Route::ValidateTokens));
        check(&Method::GET, "/internal-backstage/prometheus", Ok(Route::Prometheus));
    }

    #[test]
    fn unknown_path_and_unsupported_method_are_distinguished() {
        check(&Method::GET, "/", Err(RouteError::NotFound));
        check(&Method::GET, "/api/client/features/a/b", Err(RouteError::NotFound));
        check(&Method::GET, "/api/proxy/features/x", Err(RouteError::NotFound));
        check(&Method::GET, "/api/frontendx", Err(RouteError::NotFound));
        check(&Method::POST, "/ofrep/v1/evaluate/flagsx", Err(RouteError::NotFound));
        check(&Method::GET, "/ofrep/v1/evaluate/flags", Err(RouteError::MethodNotAllowed(POST)));
        check(&Method::GET, "/api/client/metrics", Err(RouteError::MethodNotAllowed(POST)));
        check(&Method::PUT, "/api/frontend", Err(RouteError::MethodNotAllowed(GET_HEAD_POST)));
        check(
            &Method::DELETE,
            "/internal-backstage/health",
            Err(RouteError::MethodNotAllowed(GET_HEAD)),
        );
    }

    #[test]
    fn flag_named_like_another_api_has_a_client_route() {
        check(&Method::GET, "/api/client/features/frontend", Ok(Route::ClientFeature("frontend")));
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
