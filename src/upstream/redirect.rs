//! Where a redirect leads, and whether it may be followed.
//!
//! A token goes to the origin that the operator has configured and to no other. Nothing here makes a
//! request.

use reqwest::{Method, Response, StatusCode, Url, header::LOCATION};

/// The longest target that an error names, in bytes.
const LONGEST_TARGET: usize = 200;

/// A redirect, and the request that it answered.
pub(super) struct Redirect {
    status: StatusCode,
    method: Method,
    url: Url,
    /// None where `Location` is missing or unreadable.
    location: Option<Url>,
}

impl Redirect {
    /// The redirect in an answer to a request of this method and URL.
    pub(super) fn of(response: &Response, method: Method, url: Url) -> Self {
        let location = response.headers().get(LOCATION).and_then(|it| it.to_str().ok());
        let location = location.and_then(|it| url.join(it).ok());
        Self { status: response.status(), method, url, location }
    }

    /// Where to ask next: within the origin of `base`, below another base, and where the request stays the
    /// same. That is any request after 307 and 308; others would turn a POST into a GET.
    ///
    /// Another page, as one for signing in, would not answer what was asked: it would vouch for a token
    /// that upstream has refused.
    pub(super) fn within(&self, base: &Url) -> Option<Url> {
        let keeps_request = match self.status {
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND | StatusCode::SEE_OTHER => {
                matches!(self.method, Method::GET | Method::HEAD)
            }
            _ => false,
        };
        let location = self.location.as_ref().filter(|it| it.origin() == base.origin());
        let leads_there = |it: &&Url| it.path().ends_with(self.asked(base));
        location.filter(|_| keeps_request).filter(leads_there).cloned()
    }

    /// What the request's path had below `base`.
    fn asked(&self, base: &Url) -> &str {
        let asked = self.url.path();
        asked.strip_prefix(base.path().trim_end_matches('/')).unwrap_or(asked)
    }

    /// The target without its query, and without what the request's path had below `base` where it ends
    /// with that: what is left is another base URL. A last segment of the request, which may be a token,
    /// is not repeated.
    pub(super) fn target(&self, base: &Url) -> String {
        let Some(location) = &self.location else { return "an unreadable address".to_owned() };
        let (origin, path) = (location.origin().ascii_serialization(), location.path());
        let asked = self.asked(base);
        let last = asked.rsplit('/').next().unwrap_or_default();
        let path = match path.strip_suffix(asked) {
            Some(base) => base,
            None if last.is_empty() || path.contains(last) => "",
            None => path,
        };
        let mut target = origin + path;
        // Ends at a boundary: URLs are ASCII.
        target.truncate(LONGEST_TARGET);
        target
    }
}
