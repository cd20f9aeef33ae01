//! What can go wrong with upstream, whose fault it is and whether to try again.
//!
//! No error shows a token, a body or a request's URL: URLs may hold passwords, and bodies may echo
//! tokens.

use std::{io, path::PathBuf, time::Duration};

use jiff::{Timestamp, fmt::rfc2822};
use reqwest::{StatusCode, header::HeaderValue};

use super::identity;

/// The longest pause that upstream may ask for by `Retry-After`; longer ones are shortened to it.
const LONGEST_PAUSE: Duration = Duration::from_mins(10);

/// Why a request to upstream did not bring what it was made for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection: nothing was sent.
    #[error("upstream is unreachable")]
    Unreachable(#[source] reqwest::Error),
    /// The connection broke before the whole answer was there.
    #[error("upstream broke off the connection")]
    Interrupted(#[source] reqwest::Error),
    /// No whole answer within the time allowed.
    #[error("upstream did not answer in time")]
    Timeout(#[source] reqwest::Error),
    /// Nothing of a stream within the time allowed.
    #[error("upstream's stream was silent for {0:?}")]
    Silent(Duration),
    /// A status that tells of no success.
    #[error("upstream answered {status}")]
    Status {
        /// The status.
        status: StatusCode,
        /// The pause that upstream asked for, if any.
        retry_after: Option<Duration>,
    },
    /// A redirect that is not followed: it could carry a token elsewhere.
    #[error(
        "upstream answered {status}, a redirect to {target}: --upstream-url is not its address"
    )]
    Redirect {
        /// The status.
        status: StatusCode,
        /// Where it leads, for people to read.
        target: String,
    },
    /// 304 to a request that named no `ETag`.
    #[error("upstream answered 304 to a request without an ETag")]
    Unconditional,
    /// A body beyond the limit.
    #[error("upstream's answer is larger than {limit} bytes")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// A body that is not what Unleash sends.
    #[error("upstream's answer is not Unleash's JSON (line {line}, column {column})")]
    Decode {
        /// The line where reading stopped.
        line: usize,
        /// The column where reading stopped.
        column: usize,
    },
    /// The configured URL has another scheme than HTTP's.
    #[error("upstream's URL begins neither with http:// nor with https://")]
    Scheme,
    /// A file of the configuration cannot be read.
    #[error("cannot read {}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file of the configuration does not hold the PEM it should.
    #[error("{} does not hold the expected PEM", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: reqwest::Error,
    },
    /// The client certificate cannot be used.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A setting that cannot be sent as a header.
    #[error("the {0} has characters that no header may hold")]
    Header(&'static str),
    /// The connection pool cannot be built from the configuration.
    #[error("the connection to upstream cannot be set up")]
    Setup(#[source] reqwest::Error),
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Upstream, or the network before it: it may pass by itself.
    Upstream,
    /// The token: upstream does not, or no longer, accept it for this.
    Credentials,
    /// What we sent, or how we are configured.
    Ours,
}

/// Whether the same request may succeed later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Retry {
    /// Not without a change.
    Never,
    /// After this pause where upstream named one, else after the caller's own back-off.
    Later(Option<Duration>),
}

impl Retry {
    /// The pause that upstream named, if any.
    pub fn wish(self) -> Option<Duration> {
        match self {
            Self::Later(wish) => wish,
            Self::Never => None,
        }
    }
}

impl Error {
    /// Sorts a failure of the HTTP client; its URL is dropped.
    pub(super) fn transport(error: reqwest::Error) -> Self {
        let error = error.without_url();
        if error.is_connect() {
            Self::Unreachable(error)
        } else if error.is_timeout() {
            Self::Timeout(error)
        } else {
            Self::Interrupted(error)
        }
    }

    /// Keeps the place of a syntax error, and not its text, which may quote a token.
    #[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
    pub(super) fn decode(error: serde_json::Error) -> Self {
        Self::Decode { line: error.line(), column: error.column() }
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Status { status, .. } => match *status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Fault::Credentials,
                status if judges_content(status) => Fault::Ours,
                _ => Fault::Upstream,
            },
            Self::Unreachable(_)
            | Self::Interrupted(_)
            | Self::Timeout(_)
            | Self::Silent(_)
            | Self::Unconditional
            | Self::TooLarge { .. }
            | Self::Decode { .. } => Fault::Upstream,
            Self::Redirect { .. }
            | Self::Scheme
            | Self::File { .. }
            | Self::Pem { .. }
            | Self::Identity(_)
            | Self::Header(_)
            | Self::Setup(_) => Fault::Ours,
        }
    }

    /// Whether the same request may succeed later.
    ///
    /// Only a status that judges what was sent says never: a 404 or a redirect is also what a load
    /// balancer says while the server behind it is away.
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

    /// Whether upstream may have acted on the request although it did not say so.
    ///
    /// Sending usage again after such a failure may count it twice.
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
    pub fn is_unauthorized(&self) -> bool {
        self.fault() == Fault::Credentials
    }

    /// Whether upstream has no room for the request now (429).
    pub fn is_crowded(&self) -> bool {
        self.status() == Some(StatusCode::TOO_MANY_REQUESTS)
    }

    /// The status, if upstream answered with one.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } | Self::Redirect { status, .. } => Some(*status),
            Self::Unconditional => Some(StatusCode::NOT_MODIFIED),
            _ => None,
        }
    }
}

/// Whether a status judges what was sent, so that sending it again is of no use.
fn judges_content(status: StatusCode) -> bool {
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

/// Reads `Retry-After` in both of its forms (RFC 9110, section 10.2.3).
pub(super) fn retry_after(value: &HeaderValue, now: Timestamp) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    let pause = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let until = rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
        Duration::try_from(until.duration_since(now)).unwrap_or(Duration::ZERO)
    };
    Some(pause.min(LONGEST_PAUSE))
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
    fn a_status_tells_whose_fault_it_is_and_whether_to_try_again() {
        let later = Retry::Later(Some(Duration::from_secs(7)));
        for status in [404, 408, 429, 500, 502, 503, 504] {
            check(status, Fault::Upstream, later);
        }
        for status in [401, 403] {
            check(status, Fault::Credentials, Retry::Never);
        }
        for status in [400, 413, 415] {
            check(status, Fault::Ours, Retry::Never);
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms_and_capped() {
        let now: Timestamp = "1994-11-06T08:49:07Z".parse().expect("time");
        let check = |text: &str, seconds: Option<u64>| {
            let value = HeaderValue::from_str(text).expect("header");
            assert_eq!(retry_after(&value, now), seconds.map(Duration::from_secs), "{text}");
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
