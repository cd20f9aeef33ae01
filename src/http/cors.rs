//! Cross-origin rules for frontends.

use std::time::Duration;

use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};

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
