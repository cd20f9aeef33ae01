//! Cross-origin rules for frontends (the Fetch standard's CORS protocol).

use std::time::Duration;

use hyper::Method;
use hyper::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName,
    HeaderValue, ORIGIN, VARY,
};

/// What browsers on other origins may do; by default everything.
#[derive(Clone, Debug)]
pub struct Config {
    /// Origins that may read; `None` is any.
    pub origins: Option<Vec<HeaderValue>>,
    /// Methods that may be used; `None` is any.
    pub methods: Option<Vec<Method>>,
    /// Request headers that may be sent; `None` is any.
    pub headers: Option<Vec<HeaderName>>,
    /// Response headers that scripts may read; `None` is any.
    pub exposed_headers: Option<Vec<HeaderName>>,
    /// Whether cookies and the like may be sent along.
    pub credentials: bool,
    /// How long a browser may remember a preflight's answer.
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

/// All that SDKs are sent and browsers show to nobody unasked, for where `*` is no more than a name:
/// with credentials (Fetch, 3.3.3).
const ALL_THAT_IS_SENT: HeaderValue = HeaderValue::from_static(
    "allow, content-encoding, date, etag, fetch-mode, retry-after, vary, www-authenticate",
);
const TRUE: HeaderValue = HeaderValue::from_static("true");

/// The rules with their header values ready.
#[derive(Debug)]
pub struct Cors {
    origins: Option<Vec<HeaderValue>>,
    methods: Option<HeaderValue>,
    headers: Option<HeaderValue>,
    exposed: HeaderValue,
    credentials: bool,
    max_age: HeaderValue,
}

impl Cors {
    /// Readies the rules.
    pub fn new(config: Config) -> Self {
        let any = if config.credentials { ALL_THAT_IS_SENT } else { ANY };
        let exposed = config.exposed_headers;
        let exposed = exposed.map(|names| joined(names.iter().map(HeaderName::as_str)));
        Self {
            origins: config.origins,
            methods: config.methods.map(|methods| joined(methods.iter().map(Method::as_str))),
            headers: config.headers.map(|names| joined(names.iter().map(HeaderName::as_str))),
            exposed: exposed.unwrap_or(any),
            credentials: config.credentials,
            max_age: HeaderValue::from(config.max_age.as_secs()),
        }
    }

    /// Adds what every response to a cross-origin request carries.
    pub fn decorate(&self, request: &HeaderMap, reply: &mut HeaderMap) {
        let Some(origin) = request.get(ORIGIN) else {
            if self.depends_on_origin() {
                reply.append(VARY, HeaderValue::from_static("origin"));
            }
            return;
        };
        self.allow_origin(origin, reply);
        reply.insert(ACCESS_CONTROL_EXPOSE_HEADERS, self.exposed.clone());
    }

    /// Adds what the answer to a preflight carries.
    ///
    /// With credentials the star has no meaning, so that the request's own wishes are repeated.
    pub fn decorate_preflight(&self, request: &HeaderMap, reply: &mut HeaderMap) {
        if let Some(origin) = request.get(ORIGIN) {
            self.allow_origin(origin, reply);
        }
        let granted = |rule: &Option<HeaderValue>, wish: HeaderName| match rule {
            Some(names) => Some(names.clone()),
            None if self.credentials => request.get(wish).cloned(),
            None => Some(ANY),
        };
        if let Some(methods) = granted(&self.methods, ACCESS_CONTROL_REQUEST_METHOD) {
            reply.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        // The star never covers `Authorization`, which every SDK sends (Fetch, 3.3.4): what is
        // asked for is repeated.
        let headers = match (&self.headers, request.get(ACCESS_CONTROL_REQUEST_HEADERS)) {
            (None, Some(asked)) => Some(asked.clone()),
            _ => granted(&self.headers, ACCESS_CONTROL_REQUEST_HEADERS),
        };
        if let Some(headers) = headers {
            reply.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
        reply.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
    }

    fn depends_on_origin(&self) -> bool {
        self.origins.is_some() || self.credentials
    }

    fn allow_origin(&self, origin: &HeaderValue, reply: &mut HeaderMap) {
        if self.depends_on_origin() {
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

fn joined<'a>(names: impl Iterator<Item = &'a str>) -> HeaderValue {
    let names = names.collect::<Vec<_>>().join(", ");
    HeaderValue::try_from(names).expect("names of methods and headers are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(origin: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, HeaderValue::from_static(origin));
        let asked = HeaderValue::from_static("authorization,x-custom");
        headers.insert(ACCESS_CONTROL_REQUEST_HEADERS, asked);
        headers
    }

    fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
        headers.get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn by_default_any_origin_may_read_and_send_what_it_asks_for() {
        let cors = Cors::new(Config::default());
        let mut reply = HeaderMap::new();
        cors.decorate_preflight(&request("https://a.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), Some("*"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_METHODS), Some("*"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_HEADERS), Some("authorization,x-custom"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_MAX_AGE), Some("172800"));
    }

    #[test]
    fn a_named_origin_is_repeated_and_another_gets_nothing() {
        let origins = Some(vec![HeaderValue::from_static("https://a.example")]);
        let cors = Cors::new(Config { origins, credentials: true, ..Config::default() });
        let mut reply = HeaderMap::new();
        cors.decorate(&request("https://a.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), Some("https://a.example"));
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_CREDENTIALS), Some("true"));
        assert_eq!(text(&reply, &VARY), Some("origin"));
        let mut reply = HeaderMap::new();
        cors.decorate(&request("https://b.example"), &mut reply);
        assert_eq!(text(&reply, &ACCESS_CONTROL_ALLOW_ORIGIN), None);
    }

    #[test]
    fn what_scripts_may_read_is_named_where_a_star_would_not_do() {
        let check = |exposed_headers: Option<&[HeaderName]>, credentials, expect: &str| {
            let exposed_headers = exposed_headers.map(<[_]>::to_vec);
            let cors = Cors::new(Config { exposed_headers, credentials, ..Config::default() });
            let mut reply = HeaderMap::new();
            cors.decorate(&request("https://a.example"), &mut reply);
            let exposed = text(&reply, &ACCESS_CONTROL_EXPOSE_HEADERS).unwrap();
            assert!(exposed.split(", ").any(|name| name == expect), "{exposed}");
        };
        check(None, false, "*");
        check(None, true, "etag");
        check(Some(&[ORIGIN]), false, "origin");
        check(Some(&[ORIGIN]), true, "origin");
    }

    #[test]
    fn a_request_of_the_same_origin_gets_no_cross_origin_headers() {
        let mut reply = HeaderMap::new();
        Cors::new(Config::default()).decorate(&HeaderMap::new(), &mut reply);
        assert!(reply.is_empty());
    }
}
