//! Logs requests at level `debug`: one event per request, and its id on every line that is logged
//! while it is handled.
//!
//! While that level is off, a request costs two atomic loads. Neither paths nor queries are logged,
//! because they can contain tokens; the route's template is.

use std::time::Duration;

use hyper::{HeaderMap, Method};
use tracing::{Level, Span, debug, debug_span, enabled};

use super::{request_metrics::EndpointLabel, response::HttpResponse};

/// The header with a request's id, which load balancers set.
const REQUEST_ID: &str = "x-request-id";

/// The longest id that is accepted from a client, in bytes.
const MAX_ID_LENGTH: usize = 128;

/// The span of a request, with its id. Disabled while the level is off.
pub(super) fn request_span(headers: &HeaderMap) -> Span {
    if !enabled!(Level::DEBUG) {
        return Span::none();
    }
    debug_span!("request", request_id = request_id(headers))
}

/// Logs the response to a request, within the request's span.
pub(super) fn log_response(
    label: EndpointLabel,
    method: &Method,
    response: &HttpResponse,
    took: Duration,
) {
    let (route, status) = (label.as_str(), response.status().as_u16());
    // A number of 128 bits would be a text in JSON.
    let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    debug!(route, %method, status, took_us, "Request served");
}

/// The id that the client or a load balancer sent, if it is short and printable; otherwise a random one.
fn request_id(headers: &HeaderMap) -> String {
    let sent = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|id| {
        (1..=MAX_ID_LENGTH).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    });
    sent.map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_keeps_its_id_unless_that_is_missing_long_or_not_printable() {
        let id = |sent: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, sent.parse().unwrap());
            request_id(&headers)
        };
        assert_eq!(id("f058ebd6-02f7-4d3f"), "f058ebd6-02f7-4d3f");
        assert_eq!(id(&"x".repeat(MAX_ID_LENGTH)).len(), MAX_ID_LENGTH);
        for unusable in ["", "two words", "tab\there", &"x".repeat(MAX_ID_LENGTH + 1)] {
            let id = id(unusable);
            assert!(id.len() == 32 && id != unusable, "{id}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
