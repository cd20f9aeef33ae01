//! Why a request is not served, and which status and words that comes to.

use std::{borrow::Cow, time::Duration};

use hyper::{
    StatusCode,
    header::{ALLOW, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE},
};

use crate::{
    control::Missing,
    wire::admin::{self as wire, Detail, Problem},
};

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No authorization header, or one that no issuer knows. The text is Unleash's own, which SDKs'
    /// users search for.
    #[error(
        "This endpoint requires an API token. Please add an authorization header to your request \
         with a valid token"
    )]
    Unauthorized,
    /// An address of events that is not, or no longer, taken.
    #[error("this address of events has expired; ask for the flags again, which tells another")]
    Ticket,
    /// Neither a session nor an admin token.
    #[error("you must sign in, or present an admin token, to use this")]
    SignIn,
    /// A name and a password that do not belong together.
    #[error("the username or the password is wrong")]
    WrongPassword,
    /// A valid token of another kind. The text is Unleash's own.
    #[error("invalid token: expected a different token type for this endpoint")]
    WrongKind,
    /// A valid token of an environment that is not served here, and will not be by itself.
    #[error("this instance does not serve the environment of this token")]
    NotServed,
    /// A valid token to which upstream opens nothing.
    #[error(
        "upstream knows this token and refuses it (403): it may not serve the token's environment"
    )]
    ForbiddenUpstream,
    /// The client's address is not served here.
    #[error("requests from this address are not allowed")]
    Blocked,
    /// A change that a page of another origin may have asked for.
    #[error(
        "changes with a session must come from this console: the request's Origin is missing or \
         another than its Host"
    )]
    CrossOrigin,
    /// A permission that the caller does not have.
    #[error(transparent)]
    Permission(Missing),
    /// What nobody may do.
    #[error("{0}")]
    Denied(String),
    /// Something that would answer is not there yet, or not reachable.
    #[error("{what}; try again later")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// When trying again makes sense.
        retry_after: Duration,
    },
    /// Too many attempts.
    #[error("too many attempts; try again later")]
    Throttled(Duration),
    /// A report for which its token has no room left.
    #[error("there is no room for more usage of this token; report again later")]
    UsageFull(Duration),
    /// As many streams are open as may be.
    #[error("too many clients follow streams here; poll, or try again later")]
    Crowded(Duration),
    /// No resource of this path.
    #[error("not found")]
    NotFound,
    /// What the path or the query names is not there; the text tells what.
    #[error("{0}")]
    Missing(String),
    /// The resource knows other methods.
    #[error("this resource allows {0}")]
    Method(Cow<'static, str>),
    /// A body in something else than JSON.
    #[error("the body must be JSON, sent with content-type application/json")]
    MediaType,
    /// A body or query that says nothing usable; the text tells where.
    #[error("{0}")]
    Malformed(String),
    /// A context that says nothing usable; the text tells why.
    #[error("the context cannot be read: {0}")]
    Context(String),
    /// A body of which parts cannot be used.
    #[error("the request cannot be used as it is: {}", summary(.0))]
    Invalid(Vec<Problem>),
    /// A body beyond the limit.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// A request that took longer than one may, mostly to arrive.
    #[error("the request took longer than {0:?}")]
    TooSlow(Duration),
    /// Upstream, which was to answer this, did not.
    #[error("upstream did not answer")]
    Upstream,
    /// Our own fault.
    #[error("internal error")]
    Internal,
}

impl From<Vec<Problem>> for Failure {
    fn from(problems: Vec<Problem>) -> Self {
        Self::Invalid(problems)
    }
}

/// What is wrong with each part, in one line.
fn summary(problems: &[Problem]) -> String {
    problems.iter().map(sentence).collect::<Vec<_>>().join("; ")
}

fn sentence(problem: &Problem) -> String {
    format!("{} {}", problem.path, problem.reason)
}

impl Failure {
    /// The status and the name that Unleash gives errors of its kind in its JSON.
    fn parts(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Unauthorized | Self::SignIn | Self::Ticket => {
                (StatusCode::UNAUTHORIZED, "AuthenticationRequired")
            }
            Self::WrongPassword => (StatusCode::UNAUTHORIZED, "PasswordMismatch"),
            Self::WrongKind
            | Self::NotServed
            | Self::ForbiddenUpstream
            | Self::Blocked
            | Self::CrossOrigin => (StatusCode::FORBIDDEN, "NoAccessError"),
            Self::Permission(_) => (StatusCode::FORBIDDEN, "PermissionError"),
            Self::Denied(_) => (StatusCode::FORBIDDEN, "OperationDeniedError"),
            Self::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "UnavailableError"),
            Self::Throttled(_) | Self::UsageFull(_) | Self::Crowded(_) => {
                (StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsError")
            }
            Self::NotFound | Self::Missing(_) => (StatusCode::NOT_FOUND, "NotFoundError"),
            Self::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowedError"),
            Self::MediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaTypeError"),
            Self::Malformed(_) | Self::Context(_) | Self::Invalid(_) => {
                (StatusCode::BAD_REQUEST, "BadDataError")
            }
            Self::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "ContentTooLargeError"),
            Self::TooSlow(_) => (StatusCode::REQUEST_TIMEOUT, "RequestTimeoutError"),
            Self::Upstream => (StatusCode::BAD_GATEWAY, "BadGatewayError"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        }
    }

    fn details(&self) -> Vec<Detail> {
        match self {
            Self::Invalid(problems) => {
                let detail = |it: &Problem| Detail { message: sentence(it), path: Some(it.path) };
                problems.iter().map(detail).collect()
            }
            Self::Malformed(_) | Self::Context(_) | Self::Permission(_) => {
                vec![Detail { message: self.to_string(), path: None }]
            }
            _ => Vec::new(),
        }
    }

    /// What the client reads.
    pub(super) fn error(&self) -> wire::Error {
        let sign_in = matches!(self, Self::SignIn);
        wire::Error {
            id: ulid::Ulid::generate().to_string(),
            name: self.parts().1,
            message: self.to_string(),
            details: self.details(),
            permissions: match self {
                Self::Permission(missing) => vec![missing.permission()],
                _ => Vec::new(),
            },
            r#type: sign_in.then_some("password"),
            path: sign_in.then_some("/auth/simple/login"),
        }
    }

    /// The status.
    pub(super) fn status(&self) -> StatusCode {
        self.parts().0
    }

    /// What is said beside the body.
    pub(super) fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Unavailable { retry_after, .. }
            | Self::Throttled(retry_after)
            | Self::UsageFull(retry_after)
            | Self::Crowded(retry_after) => {
                // Rounded up: who comes a moment too early is sent away again.
                let seconds = retry_after.as_millis().div_ceil(1000).max(1);
                let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
                Some((RETRY_AFTER, HeaderValue::from(seconds)))
            }
            Self::Method(methods) => {
                let methods = HeaderValue::from_str(methods).expect("methods are words");
                Some((ALLOW, methods))
            }
            Self::Unauthorized => Some((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
            _ => None,
        }
    }
}
