//! Errors of requests to upstream: the party at fault, and whether to retry.
//!
//! No error contains a token, a body or a request's URL: URLs may contain passwords, and bodies may echo
//! tokens.

use std::{io, path::PathBuf, time::Duration};

use jiff::{Timestamp, fmt::rfc2822};
use reqwest::{StatusCode, header::HeaderValue};

use super::client_certificate;

/// The cap of `Retry-After`.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(10);

/// Why a request to upstream failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection: nothing was sent.
    #[error("upstream is unreachable")]
    Unreachable(#[source] reqwest::Error),
    /// The connection broke before the response was complete.
    #[error("the connection to upstream broke")]
    Interrupted(#[source] reqwest::Error),
    /// No complete response within the timeout.
    #[error("upstream did not respond in time")]
    Timeout(#[source] reqwest::Error),
    /// No data of a stream within the timeout.
    #[error("upstream's stream sent nothing for {0:?}")]
    StreamTimeout(Duration),
    /// A status other than success.
    #[error("upstream answered {status}")]
    Status {
        /// The status.
        status: StatusCode,
        /// The `Retry-After` of the response, if any.
        retry_after: Option<Duration>,
    },
    /// A redirect that is not followed, because it could leak a token.
    #[error(
        "upstream answered {status}, a redirect to {target}: --upstream-url is not its address"
    )]
    Redirect {
        /// The status.
        status: StatusCode,
        /// Its target, for display.
        target: String,
    },
    /// 304 to a request without an `ETag`.
    #[error("upstream answered 304 to a request without an ETag")]
    UnexpectedNotModified,
    /// A body larger than the limit.
    #[error("upstream's response is larger than {limit} bytes")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// A body that is not the expected JSON.
    #[error("upstream's response is not Unleash JSON (line {line}, column {column})")]
    Decode {
        /// The line of the syntax error.
        line: usize,
        /// The column of the syntax error.
        column: usize,
    },
    /// The scheme of the configured URL is neither `http` nor `https`.
    #[error("upstream's URL begins neither with http:// nor with https://")]
    InvalidScheme,
    /// A file of the configuration cannot be read.
    #[error("cannot read {}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file of the configuration does not contain the expected PEM.
    #[error("{} does not contain the expected PEM", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: reqwest::Error,
    },
    /// The client certificate cannot be used.
    #[error(transparent)]
    ClientCertificate(#[from] client_certificate::Error),
    /// A setting that cannot be sent as a header.
    #[error("the {0} contains characters that are invalid in a header")]
    InvalidHeader(&'static str),
    /// The HTTP client cannot be built from the configuration.
    #[error("the HTTP client for upstream cannot be built")]
    Setup(#[source] reqwest::Error),
}

/// The party at fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Upstream, or the network in between; may be temporary.
    Upstream,
    /// The token: upstream does not, or no longer, accept it for this request.
    Credentials,
    /// Our request or our configuration.
    Local,
}

/// Whether the same request may succeed later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Retry {
    /// Not without a change.
    Never,
    /// After upstream's `Retry-After` if it sent one, otherwise after the caller's backoff.
    Later(Option<Duration>),
}

impl Retry {
    /// The `Retry-After` of upstream, if it sent one.
    pub fn retry_after(self) -> Option<Duration> {
        match self {
            Self::Later(retry_after) => retry_after,
            Self::Never => None,
        }
    }
}

impl Error {
    /// Classifies an error of the HTTP client and removes its URL.
    pub(super) fn from_transport(error: reqwest::Error) -> Self {
        let error = error.without_url();
        if error.is_connect() {
            Self::Unreachable(error)
        } else if error.is_timeout() {
            Self::Timeout(error)
        } else {
            Self::Interrupted(error)
        }
    }

    /// Keeps the position of a JSON error but not its text, which may quote a token.
    #[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
    pub(super) fn from_decode(error: serde_json::Error) -> Self {
        Self::Decode { line: error.line(), column: error.column() }
    }

    /// The party at fault.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Status { status, .. } => match *status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Fault::Credentials,
                status if is_content_error(status) => Fault::Local,
                _ => Fault::Upstream,
            },
            Self::Unreachable(_)
            | Self::Interrupted(_)
            | Self::Timeout(_)
            | Self::StreamTimeout(_)
            | Self::UnexpectedNotModified
            | Self::TooLarge { .. }
            | Self::Decode { .. } => Fault::Upstream,
            Self::Redirect { .. }
            | Self::InvalidScheme
            | Self::File { .. }
            | Self::Pem { .. }
            | Self::ClientCertificate(_)
            | Self::InvalidHeader(_)
            | Self::Setup(_) => Fault::Local,
        }
    }

    /// Whether the same request may succeed later.
    ///
    /// Only a status about the content of the request rules out a retry: a 404 or a redirect may also
    /// come from a load balancer while the server behind it is down.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Redirect { .. } => Retry::Later(None),
            Self::Status { retry_after, .. } if self.fault() == Fault::Upstream => {
                Retry::Later(*retry_after)
            }
            _ if self.fault() == Fault::Upstream => Retry::Later(None),
            _ => Retry::Never,
        }
    }

    /// Whether upstream may have processed the request despite the error.
    ///
    /// Retrying usage after such an error may count it twice.
    pub fn is_ambiguous(&self) -> bool {
        match self {
            Self::Interrupted(_)
            | Self::Timeout(_)
            | Self::TooLarge { .. }
            | Self::Decode { .. } => true,
            Self::Status { status, .. } => {
                matches!(*status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT)
            }
            _ => false,
        }
    }

    /// Whether upstream refused the token (401 or 403).
    pub fn is_token_refused(&self) -> bool {
        self.fault() == Fault::Credentials
    }

    /// Whether upstream throttled the request (429).
    pub fn is_throttled(&self) -> bool {
        self.status() == Some(StatusCode::TOO_MANY_REQUESTS)
    }

    /// The status of the response, if there was one.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } | Self::Redirect { status, .. } => Some(*status),
            Self::UnexpectedNotModified => Some(StatusCode::NOT_MODIFIED),
            _ => None,
        }
    }
}

/// Whether a status rejects the content of the request, so that a retry is useless.
fn is_content_error(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::URI_TOO_LONG
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::UNPROCESSABLE_ENTITY
            | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    )
}

/// Parses `Retry-After`, as seconds or as a date (RFC 9110, section 10.2.3).
pub(super) fn parse_retry_after(value: &HeaderValue, now: Timestamp) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    let pause = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let until = rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
        Duration::try_from(until.duration_since(now)).unwrap_or(Duration::ZERO)
    };
    Some(pause.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: u16, fault: Fault, retry: Retry) {
        let status = StatusCode::from_u16(status).expect("status");
        let error = Error::Status { status, retry_after: Some(Duration::from_secs(7)) };
        assert_eq!((error.fault(), error.retry()), (fault, retry), "{status}");
    }

    #[test]
    fn status_determines_fault_and_retry() {
        let later = Retry::Later(Some(Duration::from_secs(7)));
        for status in [404, 408, 429, 500, 502, 503, 504] {
            check(status, Fault::Upstream, later);
        }
        for status in [401, 403] {
            check(status, Fault::Credentials, Retry::Never);
        }
        for status in [400, 413, 415] {
            check(status, Fault::Local, Retry::Never);
        }
    }

    #[test]
    fn retry_after_is_parsed_in_both_forms_and_capped() {
        let now: Timestamp = "1994-11-06T08:49:07Z".parse().expect("time");
        let check = |text: &str, seconds: Option<u64>| {
            let value = HeaderValue::from_str(text).expect("header");
            assert_eq!(parse_retry_after(&value, now), seconds.map(Duration::from_secs), "{text}");
        };
        check("120", Some(120));
        check(" 0 ", Some(0));
        check("86400", Some(600));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(30));
        check("Sun, 06 Nov 1994 08:00:00 GMT", Some(0));
        check("Mon, 07 Nov 1994 08:49:37 GMT", Some(600));
        check("soon", None);
        check("-1", None);
    }
}
