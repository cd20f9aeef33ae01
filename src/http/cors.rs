//! CORS response headers for browsers on other origins (the Fetch standard's CORS protocol).

use std::time::Duration;

use hyper::Method;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName,
    HeaderValue, ORIGIN, VARY,
};

/// The cross-origin permissions. By default everything is allowed, without credentials.
#[derive(Clone, Debug)]
pub struct Config {
    /// Allowed origins; `None` is any.
    pub origins: Option<Vec<HeaderValue>>,
    /// Allowed methods; `None` is any.
    pub methods: Option<Vec<Method>>,
    /// Allowed request headers; `None` is any.
    pub headers: Option<Vec<HeaderName>>,
    /// Response headers that scripts may read; `None` is any.
    pub exposed_headers: Option<Vec<HeaderName>>,
    /// Whether browsers may send credentials such as cookies.
    pub credentials: bool,
    /// How long a browser may cache the response to a preflight.
    pub max_age: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            origins: None,
            methods: None,
            headers: None,
            exposed_headers: None,
            credentials: false,
            max_age: Duration::from_hours(48),
        }
    }
}

const ANY: HeaderValue = HeaderValue::from_static("*");

/// The response headers that SDKs need and browsers hide from scripts by default. With credentials `*`
/// is not a wildcard but a plain header name (Fetch, 3.3.3), so they are listed.
const EXPOSED_WITH_CREDENTIALS: HeaderValue = HeaderValue::from_static(
    "allow, content-encoding, date, etag, fetch-mode, retry-after, vary, www-authenticate",
);
const TRUE: HeaderValue = HeaderValue::from_static("true");

/// The permissions as ready-made header values.
#[derive(Debug)]
pub struct Cors {
    origins: Option<Vec<HeaderValue>>,
    methods: Option<HeaderValue>,
    headers: Option<HeaderValue>,
    exposed_headers: HeaderValue,
    credentials: bool,
    max_age: HeaderValue,
}

impl Cors {
    /// Builds the header values once.
    pub fn new(config: Config) -> Self {
        let any = if config.credentials { EXPOSED_WITH_CREDENTIALS } else { ANY };
        let exposed = config.exposed_headers;
        let exposed = exposed.map(|names| join_names(names.iter().map(HeaderName::as_str)));
        Self {
            origins: config.origins,
            methods: config.methods.map(|methods| join_names(methods.iter().map(Method::as_str))),
            headers: config.headers.map(|names| join_names(names.iter().map(HeaderName::as_str))),
            exposed_headers: exposed.unwrap_or(any),
            credentials: config.credentials,
            max_age: HeaderValue::from(config.max_age.as_secs()),
        }
    }

    /// Adds the headers that every response to a cross-origin request needs.
    pub fn add_headers(&self, request: &HeaderMap, reply: &mut HeaderMap) {
        let Some(origin) = request.get(ORIGIN) else {
            if self.varies_by_origin() {
                reply.append(VARY, HeaderValue::from_static("origin"));
            }
            return;
        };
        self.allow_origin(origin, reply);
        reply.insert(ACCESS_CONTROL_EXPOSE_HEADERS, self.exposed_headers.clone());
    }

    /// Adds the headers of the response to a preflight.
    ///
    /// With credentials `*` is not a wildcard, so the requested method and headers are echoed.
    pub fn add_preflight_headers(&self, request: &HeaderMap, reply: &mut HeaderMap) {
        if let Some(origin) = request.get(ORIGIN) {
            self.allow_origin(origin, reply);
        }
        let allowed = |rule: &Option<HeaderValue>, requested: HeaderName| match rule {
            Some(names) => Some(names.clone()),
            None if self.credentials => request.get(requested).cloned(),
            None => Some(ANY),
        };
        if let Some(methods) = allowed(&self.methods, ACCESS_CONTROL_REQUEST_METHOD) {
            reply.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        // `*` never covers `Authorization`, which every SDK sends (Fetch, 3.3.4), so the requested
        // headers are echoed.
        let headers = match (&self.headers, request.get(ACCESS_CONTROL_REQUEST_HEADERS)) {
            (None, Some(requested)) => Some(requested.clone()),
            _ => allowed(&self.headers, ACCESS_CONTROL_REQUEST_HEADERS),
        };
        if let Some(headers) = headers {
            reply.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
        reply.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
    }

    fn varies_by_origin(&self) -> bool {
        self.origins.is_some() || self.credentials
    }

    fn allow_origin(&self, origin: &HeaderValue, reply: &mut HeaderMap) {
        if self.varies_by_origin() {
            reply.append(VARY, HeaderValue::from_static("origin"));
        }
        match &self.origins {
            Some(allowed) if !allowed.contains(origin) => return,
            None if !self.credentials => reply.insert(ACCESS_CONTROL_ALLOW_ORIGIN, ANY),
            _ => reply.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()),
        };
        if self.credentials {
            reply.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
        }
    }
}

fn join_names<'a>(names: impl Iterator<Item = &'a str>) -> HeaderValue {
    let names = names.collect::<Vec<_>>().join(", ");
    HeaderValue::try_from(names).expect("names of methods and headers are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(origin: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, HeaderValue::from_static(origin));
        let requested = HeaderValue::from_static("authorization,x-custom");
        headers.insert(ACCESS_CONTROL_REQUEST_HEADERS, requested);
        headers
    }

    fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
        headers.get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn any_origin_may_send_the_requested_headers_by_default() {
        let cors = Cors::new(Config::default());
        let mut reply = HeaderMap::new();
        cors.add_preflight_headers(&request("https://a.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), Some("*"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_METHODS), Some("*"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_HEADERS), Some("authorization,x-custom"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_MAX_AGE), Some("172800"));
    }

    #[test]
    fn allowed_origin_is_echoed_and_others_get_no_header() {
        let origins = Some(vec![HeaderValue::from_static("https://a.example")]);
        let cors = Cors::new(Config { origins, credentials: true, ..Config::default() });
        let mut reply = HeaderMap::new();
        cors.add_headers(&request("https://a.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), Some("https://a.example"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_CREDENTIALS), Some("true"));
        assert_eq!(text(&reply, &VARY), Some("origin"));
        let mut reply = HeaderMap::new();
        cors.add_headers(&request("https://b.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), None);
    }

    #[test]
    fn exposed_headers_are_listed_when_credentials_are_allowed() {
        let check = |exposed_headers: Option<&[HeaderName]>, credentials, expect: &str| {
            let exposed_headers = exposed_headers.map(<[_]>::to_vec);
            let cors = Cors::new(Config { exposed_headers, credentials, ..Config::default() });
            let mut reply = HeaderMap::new();
            cors.add_headers(&request("https://a.example"), &mut reply);
            let exposed = text(&reply, &ACCESS_CONTROL_EXPOSE_HEADERS).unwrap();
            assert!(exposed.split(", ").any(|name| name == expect), "{exposed}");
        };
        check(None, false, "*");
        check(None, true, "etag");
        check(Some(&[ORIGIN]), false, "origin");
        check(Some(&[ORIGIN]), true, "origin");
    }

    #[test]
    fn same_origin_request_gets_no_cors_headers() {
        let mut reply = HeaderMap::new();
        Cors::new(Config::default()).add_headers(&HeaderMap::new(), &mut reply);
        assert!(reply.is_empty());
    }
}
