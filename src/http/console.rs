//! The console: the page, styles and modules that operators see, as they stand in `console/`.
//!
//! They are part of the binary, so that the console is always of the version that it talks to. What
//! it shows comes from the admin API, asked by the browser: nothing is rendered here, and no file
//! says who is asking or what is configured.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use hyper::{HeaderMap, header::HeaderValue};

use super::reply::{self, Reply};
use crate::snapshot::body::Body;

/// A file of the console.
struct Asset {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const STYLES: &str = "text/css; charset=utf-8";
const MODULE: &str = "text/javascript; charset=utf-8";
const IMAGE: &str = "image/svg+xml";

/// `console!("a.js" MODULE, …)`: the files below `console/`, served below `/console/`.
macro_rules! console {
    ($($file:literal $content_type:ident),+ $(,)?) => {
        &[
            Asset { path: "", content_type: HTML, text: include_str!("console/index.html") },
            $(Asset {
                path: concat!("/console/", $file),
                content_type: $content_type,
                text: include_str!(concat!("console/", $file)),
            }),+
        ]
    };
}

const ASSETS: &[Asset] = console![
    "api.js" MODULE,
    "app.js" MODULE,
    "charts.js" MODULE,
    "clipboard.js" MODULE,
    "definition.js" MODULE,
    "dialog.js" MODULE,
    "dom.js" MODULE,
    "explain.js" MODULE,
    "form.js" MODULE,
    "icon.svg" IMAGE,
    "icons.js" MODULE,
    "loose.js" MODULE,
    "notice.js" MODULE,
    "prometheus.js" MODULE,
    "router.js" MODULE,
    "session.js" MODULE,
    "snippets.js" MODULE,
    "status.js" MODULE,
    "style.css" STYLES,
    "table.js" MODULE,
    "theme.js" MODULE,
    "time.js" MODULE,
    "words.js" MODULE,
    "pages/accounts.js" MODULE,
    "pages/audit.js" MODULE,
    "pages/flag.js" MODULE,
    "pages/flags.js" MODULE,
    "pages/overview.js" MODULE,
    "pages/password.js" MODULE,
    "pages/signin.js" MODULE,
    "pages/tokens.js" MODULE,
];

/// What each of [`ASSETS`] is, with its entity tag.
static BODIES: LazyLock<Vec<Arc<Body>>> = LazyLock::new(|| {
    let body = |asset: &Asset| Arc::new(Body::new(Bytes::from_static(asset.text.as_bytes())));
    ASSETS.iter().map(body).collect()
});

/// The console's file of a normalised path, or the 304 that `request` asks for; `None` if it has
/// none.
pub async fn file(path: &str, request: &HeaderMap) -> Option<Reply> {
    let at = ASSETS.iter().position(|asset| asset.path == path)?;
    let content_type = HeaderValue::from_static(ASSETS[at].content_type);
    Some(reply::page(request, content_type, &BODIES[at]).await)
}
