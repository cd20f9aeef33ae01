//! Redirects requests on the unencrypted port to the TLS port.
//!
//! The host of the target is that of the request. `X-Forwarded-Host` is ignored: a client that sets it
//! could redirect other clients of a shared cache to a host of its choice.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{
    Request,
    body::Incoming,
    header::HOST,
    http::uri::{Authority, PathAndQuery},
};

use super::{
    request_body::RequestBody,
    response::{self, HttpError, HttpResponse},
};
use crate::server::{ConnectionInfo, HttpService, ServiceResponse};

/// The default port of HTTPS, which URLs omit.
const HTTPS_PORT: u16 = 443;

/// Redirects every request to another port of the same host.
#[derive(Clone, Copy, Debug)]
pub struct HttpsRedirect {
    port: u16,
}

impl HttpsRedirect {
    /// Redirects to this port, which must serve TLS.
    pub fn to_port(port: u16) -> Self {
        Self { port }
    }

    /// The response to any request: 308, so that clients repeat method and body; 400 without a `Host`.
    fn response<B>(self, head: &Request<B>) -> HttpResponse {
        let host_header = || head.headers().get(HOST)?.to_str().ok()?.parse::<Authority>().ok();
        let Some(authority) = head.uri().authority().cloned().or_else(host_header) else {
            return HttpError::Malformed("the request has no Host to redirect to".to_owned())
                .into();
        };
        let path = head.uri().path_and_query().map(PathAndQuery::as_str);
        let path = path.filter(|path| path.starts_with('/')).unwrap_or("/");
        let (host, port) = (authority.host(), self.port);
        response::permanent_redirect(&if port == HTTPS_PORT {
            format!("https://{host}{path}")
        } else {
            format!("https://{host}:{port}{path}")
        })
    }
}

impl HttpService for HttpsRedirect {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        _: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        let reply = self.response(&request);
        let body = RequestBody::new(request.into_body(), Instant::now(), Duration::ZERO);
        ServiceResponse::deferred(async {
            body.discard().await;
            reply
        })
    }

    fn panic_response() -> HttpResponse {
        HttpError::Internal.into()
    }
}

#[cfg(test)]
mod tests {
    use hyper::{Request, StatusCode, header::LOCATION};

    use super::*;

    fn redirected(port: u16, uri: &str, host: Option<&str>) -> (StatusCode, Option<String>) {
        let mut request = Request::post(uri);
        if let Some(host) = host {
            request = request.header(HOST, host).header("x-forwarded-host", "elsewhere.test");
        }
        let request = request.body(()).expect("request");
        let reply = HttpsRedirect::to_port(port).response(&request);
        let location = reply.headers().get(LOCATION);
        (reply.status(), location.map(|it| it.to_str().expect("text").to_owned()))
    }

    #[test]
    fn request_is_redirected_to_the_same_path_on_the_tls_port() {
        let check = |port, uri, host, expected: &str| {
            let expected = (StatusCode::PERMANENT_REDIRECT, Some(expected.to_owned()));
            assert_eq!(redirected(port, uri, host), expected, "{uri} {host:?}");
        };
        check(
            3043,
            "/api/a?b=c%20",
            Some("flags.test:3063"),
            "https://flags.test:3043/api/a?b=c%20",
        );
        check(443, "/", Some("flags.test"), "https://flags.test/");
        check(3043, "/", Some("[::1]:3063"), "https://[::1]:3043/");
        check(3043, "http://flags.test:3063/api", None, "https://flags.test:3043/api");
        check(
            3043,
            "//elsewhere.test/",
            Some("flags.test"),
            "https://flags.test:3043//elsewhere.test/",
        );
        check(3043, "*", Some("me@flags.test"), "https://flags.test:3043/");
    }

    #[test]
    fn request_without_a_host_is_rejected() {
        for host in [None, Some("a b"), Some("")] {
            assert_eq!(redirected(3043, "/", host), (StatusCode::BAD_REQUEST, None), "{host:?}");
        }
    }
}
