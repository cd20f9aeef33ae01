//! Decides whether a redirect may be followed.
//!
//! Tokens are sent only to the configured origin. This module sends no request.

use reqwest::{Method, Response, StatusCode, Url, header::LOCATION};

/// The longest redirect target shown in an error, in bytes.
const MAX_TARGET_LEN: usize = 200;

/// A redirect, with the method and URL of its request.
pub(super) struct Redirect {
    status: StatusCode,
    method: Method,
    url: Url,
    /// `None` if `Location` is missing or invalid.
    location: Option<Url>,
}

impl Redirect {
    /// The redirect in a response to a request with this method and URL.
    pub(super) fn from_response(response: &Response, method: Method, url: Url) -> Self {
        let location = response.headers().get(LOCATION).and_then(|it| it.to_str().ok());
        let location = location.and_then(|it| url.join(it).ok());
        Self { status: response.status(), method, url, location }
    }

    /// The URL to follow: the same path below another base, within the origin of `base`, and only if the
    /// request stays the same. 307 and 308 preserve every request; other statuses turn a POST into a
    /// GET.
    ///
    /// Any other target is not followed: the success of a login page, for example, would make a refused
    /// token look accepted.
    pub(super) fn followable_target(&self, base: &Url) -> Option<Url> {
        let keeps_request = match self.status {
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND | StatusCode::SEE_OTHER => {
                matches!(self.method, Method::GET | Method::HEAD)
            }
            _ => false,
        };
        let location = self.location.as_ref().filter(|it| it.origin() == base.origin());
        let leads_there = |it: &&Url| it.path().ends_with(self.request_path(base));
        location.filter(|_| keeps_request).filter(leads_there).cloned()
    }

    /// The request's path relative to `base`.
    fn request_path(&self, base: &Url) -> &str {
        let path = self.url.path();
        path.strip_prefix(base.path().trim_end_matches('/')).unwrap_or(path)
    }

    /// The target for an error message, without its query. If it ends with the request's path, that is
    /// removed, which leaves another base URL. The last path segment of the request, which may be a
    /// token, is never shown.
    pub(super) fn display_target(&self, base: &Url) -> String {
        let Some(location) = &self.location else { return "an unreadable address".to_owned() };
        let (origin, path) = (location.origin().ascii_serialization(), location.path());
        let requested = self.request_path(base);
        let last = requested.rsplit('/').next().unwrap_or_default();
        let path = match path.strip_suffix(requested) {
            Some(base) => base,
            None if last.is_empty() || path.contains(last) => "",
            None => path,
        };
        let mut target = origin + path;
        // Truncating cannot panic: URLs are ASCII.
        target.truncate(MAX_TARGET_LEN);
        target
    }
}
