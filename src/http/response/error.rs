//! Errors of requests, with the status, body and headers of each.

use std::{borrow::Cow, time::Duration};

use hyper::{
    StatusCode,
    header::{ALLOW, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE},
};

use crate::{
    control_plane::MissingPermission,
    protocol::admin::{self as wire, Detail, FieldError},
};

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No authorization header. The text is Unleash's own, because SDK users search for it.
    #[error(
        "This endpoint requires an API token. Please add an authorization header to your request \
         with a valid token"
    )]
    MissingToken,
    /// A token that is malformed, unknown or revoked; the response does not say which.
    #[error("this API token is unknown or has been revoked")]
    InvalidToken,
    /// A stream ticket that is invalid or has expired.
    #[error("the event stream URL has expired; evaluate the flags again to obtain a new one")]
    InvalidStreamTicket,
    /// Neither a session nor an admin token.
    #[error("you must sign in, or present an admin token, to use this")]
    SignInRequired,
    /// An unknown username or a wrong password.
    #[error("the username or the password is wrong")]
    WrongPassword,
    /// A valid token of another kind. The text is Unleash's own.
    #[error("invalid token: expected a different token type for this endpoint")]
    WrongTokenKind,
    /// A valid token for an environment that this instance is not configured to serve.
    #[error("this instance does not serve the environment of this token")]
    EnvironmentNotServed,
    /// A valid token that upstream answers with 403.
    #[error(
        "upstream knows this token and refuses it (403): it may not serve the token's environment"
    )]
    ForbiddenUpstream,
    /// A client address that is not allowed.
    #[error("requests from this address are not allowed")]
    AddressBlocked,
    /// A change in a session whose request may come from a page of another origin.
    #[error(
        "changes with a session must come from this console: the request's Origin is missing or \
         another than its Host"
    )]
    CrossOrigin,
    /// A permission that the caller does not have.
    #[error(transparent)]
    MissingPermission(MissingPermission),
    /// An operation that no permission allows.
    #[error("{0}")]
    OperationDenied(String),
    /// Something that the response depends on is not available yet, or not reachable.
    #[error("{what}; try again later")]
    Unavailable {
        /// The missing part.
        what: &'static str,
        /// When to retry.
        retry_after: Duration,
    },
    /// The client's rate limit is exceeded.
    #[error("too many attempts; try again later")]
    RateLimited(Duration),
    /// The usage buffer of the token is full.
    #[error("there is no room for more usage of this token; report again later")]
    UsageFull(Duration),
    /// The limit of open streams is reached.
    #[error("too many clients follow streams here; poll, or try again later")]
    TooManyStreams(Duration),
    /// No resource at this path.
    #[error("not found")]
    NotFound,
    /// A resource named in the path or query does not exist; the text names it.
    #[error("{0}")]
    ResourceNotFound(String),
    /// The resource supports other methods only.
    #[error("this resource allows {0}")]
    MethodNotAllowed(Cow<'static, str>),
    /// A body that is not JSON.
    #[error("the body must be JSON, sent with content-type application/json")]
    UnsupportedMediaType,
    /// A malformed body or query; the text says where.
    #[error("{0}")]
    Malformed(String),
    /// An invalid context; the text says why.
    #[error("the context cannot be read: {0}")]
    InvalidContext(String),
    /// A body with invalid fields.
    #[error("the request cannot be used as it is: {}", summarize(.0))]
    InvalidFields(Vec<FieldError>),
    /// A body larger than the limit.
    #[error("the body is larger than {0} bytes")]
    BodyTooLarge(usize),
    /// A request that exceeded its timeout, usually while its body arrived.
    #[error("the request took longer than {0:?}")]
    RequestTimeout(Duration),
    /// Upstream did not answer a relayed request.
    #[error("upstream did not answer")]
    BadGateway,
    /// A bug in Parapet.
    #[error("internal error")]
    Internal,
}

impl From<Vec<FieldError>> for HttpError {
    fn from(problems: Vec<FieldError>) -> Self {
        Self::InvalidFields(problems)
    }
}

/// All problems in one line.
fn summarize(problems: &[FieldError]) -> String {
    problems.iter().map(describe_problem).collect::<Vec<_>>().join("; ")
}

fn describe_problem(problem: &FieldError) -> String {
    format!("{} {}", problem.field, problem.reason)
}

/// Default `Retry-After`.
const UNAVAILABLE_RETRY_AFTER: Duration = Duration::from_secs(5);

impl HttpError {
    /// The flags of the token's scope were never fetched.
    pub const FLAGS_NOT_FETCHED: Self = Self::Unavailable {
        what: "the flags that this token sees have not been fetched",
        retry_after: UNAVAILABLE_RETRY_AFTER,
    };

    /// A token that is not cached cannot be validated, because upstream does not answer.
    pub const TOKEN_NOT_VALIDATED: Self = Self::Unavailable {
        what: "the token cannot be validated at the moment",
        retry_after: UNAVAILABLE_RETRY_AFTER,
    };

    /// The status, and Unleash's name for this kind of error.
    fn status_and_name(&self) -> (StatusCode, &'static str) {
        match self {
            Self::MissingToken
            | Self::InvalidToken
            | Self::SignInRequired
            | Self::InvalidStreamTicket => (StatusCode::UNAUTHORIZED, "AuthenticationRequired"),
            Self::WrongPassword => (StatusCode::UNAUTHORIZED, "PasswordMismatch"),
            Self::WrongTokenKind
            | Self::EnvironmentNotServed
            | Self::ForbiddenUpstream
            | Self::AddressBlocked
            | Self::CrossOrigin => (StatusCode::FORBIDDEN, "NoAccessError"),
            Self::MissingPermission(_) => (StatusCode::FORBIDDEN, "PermissionError"),
            Self::OperationDenied(_) => (StatusCode::FORBIDDEN, "OperationDeniedError"),
            Self::Unavailable { .. } => (StatusCode::SERVICE_UNAVAILABLE, "UnavailableError"),
            Self::RateLimited(_) | Self::UsageFull(_) | Self::TooManyStreams(_) => {
                (StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsError")
            }
            Self::NotFound | Self::ResourceNotFound(_) => (StatusCode::NOT_FOUND, "NotFoundError"),
            Self::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowedError"),
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaTypeError")
            }
            Self::Malformed(_) | Self::InvalidContext(_) | Self::InvalidFields(_) => {
                (StatusCode::BAD_REQUEST, "BadDataError")
            }
            Self::BodyTooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "ContentTooLargeError"),
            Self::RequestTimeout(_) => (StatusCode::REQUEST_TIMEOUT, "RequestTimeoutError"),
            Self::BadGateway => (StatusCode::BAD_GATEWAY, "BadGatewayError"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        }
    }

    fn details(&self) -> Vec<Detail> {
        match self {
            Self::InvalidFields(problems) => {
                let detail = |it: &FieldError| Detail {
                    message: describe_problem(it),
                    path: Some(it.field),
                };
                problems.iter().map(detail).collect()
            }
            Self::Malformed(_) | Self::InvalidContext(_) | Self::MissingPermission(_) => {
                vec![Detail { message: self.to_string(), path: None }]
            }
            _ => Vec::new(),
        }
    }

    /// The JSON body.
    pub(super) fn error_body(&self) -> wire::Error {
        let sign_in = matches!(self, Self::SignInRequired);
        wire::Error {
            id: ulid::Ulid::generate().to_string(),
            name: self.status_and_name().1,
            message: self.to_string(),
            details: self.details(),
            permissions: match self {
                Self::MissingPermission(missing) => vec![missing.permission()],
                _ => Vec::new(),
            },
            r#type: sign_in.then_some("password"),
            path: sign_in.then_some("/auth/simple/login"),
        }
    }

    /// The status.
    pub(super) fn status(&self) -> StatusCode {
        self.status_and_name().0
    }

    /// An additional header, if the error has one.
    pub(super) fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Unavailable { retry_after, .. }
            | Self::RateLimited(retry_after)
            | Self::UsageFull(retry_after)
            | Self::TooManyStreams(retry_after) => {
                // Rounded up, because a client that retries too early is rejected again.
                let seconds = retry_after.as_millis().div_ceil(1000).max(1);
                let seconds = u64::try_from(seconds).unwrap_or(u64::MAX);
                Some((RETRY_AFTER, HeaderValue::from(seconds)))
            }
            Self::MethodNotAllowed(methods) => {
                let methods = HeaderValue::from_str(methods).expect("methods are words");
                Some((ALLOW, methods))
            }
            Self::MissingToken | Self::InvalidToken => {
                Some((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")))
            }
            _ => None,
        }
    }
}
