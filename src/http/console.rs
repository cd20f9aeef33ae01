//! Serves the console, the web interface for operators: the static files in `console/`.
//!
//! The files are compiled into the binary, so the console always has the version of its server. The
//! browser fetches all data from the admin API. Nothing is rendered here, and no file depends on the
//! user or the configuration.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use hyper::{HeaderMap, header::HeaderValue};

use super::response::{self, HttpResponse};
use crate::snapshot::prepared_body::PreparedBody;

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

/// `console!("a.js" MODULE, …)` lists files below `console/`, which are served below `/console/`.
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
    "descriptions.js" MODULE,
    "dialog.js" MODULE,
    "dom.js" MODULE,
    "explain.js" MODULE,
    "form.js" MODULE,
    "icon.svg" IMAGE,
    "icons.js" MODULE,
    "lenient.js" MODULE,
    "messages.js" MODULE,
    "prometheus.js" MODULE,
    "router.js" MODULE,
    "session.js" MODULE,
    "snippets.js" MODULE,
    "status.js" MODULE,
    "style.css" STYLES,
    "table.js" MODULE,
    "theme.js" MODULE,
    "time.js" MODULE,
    "pages/accounts.js" MODULE,
    "pages/audit.js" MODULE,
    "pages/flag.js" MODULE,
    "pages/flags.js" MODULE,
    "pages/overview.js" MODULE,
    "pages/password.js" MODULE,
    "pages/signin.js" MODULE,
    "pages/tokens.js" MODULE,
];

/// The bodies of [`ASSETS`] with their entity tags, in the same order.
static BODIES: LazyLock<Vec<Arc<PreparedBody>>> = LazyLock::new(|| {
    let body =
        |asset: &Asset| Arc::new(PreparedBody::new(Bytes::from_static(asset.text.as_bytes())));
    ASSETS.iter().map(body).collect()
});

/// Serves the console file at a normalised path, with a 304 if `request` already has it; `None` if there
/// is no such file.
pub async fn file(path: &str, request: &HeaderMap) -> Option<HttpResponse> {
    let index = ASSETS.iter().position(|asset| asset.path == path)?;
    let content_type = HeaderValue::from_static(ASSETS[index].content_type);
    Some(response::console_file(request, content_type, &BODIES[index]).await)
}
