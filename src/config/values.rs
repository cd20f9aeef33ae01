//! Parsers of values that several settings have in common. Those that take [`RawSettings`] report their
//! errors there; the others return `None`.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use ipnet::IpNet;
use reqwest::{Url, header::HeaderName};

use super::{
    cli::{ServeMode, Subcommand},
    option_spec::OptionSpec,
    options,
    raw::RawSettings,
};
use crate::token::Token;

pub(super) const EXPECTED_HTTP_URL: &str =
    "an http or https URL without user or query, as in `https://unleash.example.com`";
pub(super) const EXPECTED_FILE: &str = "a file that exists";

pub(super) const EXPECTED_HEADER_NAME: &str = "the name of a header";

pub(super) const EXPECTED_NETWORKS: &str = "networks or addresses, as in `10.0.0.0/8`";

/// The value of a required key without default.
pub(super) fn required<T>(
    s: &mut RawSettings,
    key: &OptionSpec,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    if !s.is_set(key) {
        s.report_error(key, format!("is required: {expected}"));
    }
    s.parse_optional(key, expected, parse)
}

pub(super) fn path(s: &mut RawSettings, key: &OptionSpec) -> PathBuf {
    s.parse_or_default(key, "a path", |text| (!text.is_empty()).then(|| PathBuf::from(text)))
}

pub(super) fn existing_file(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|path| path.is_file())
}

pub(super) fn port(s: &mut RawSettings, key: &OptionSpec) -> u16 {
    let expected = "a port, 0 to 65535";
    if key.name == options::PORT.name
        && s.subcommand == Subcommand::Serve(ServeMode::Edge)
        && is_pretrusted_token(s, key)
    {
        let reason = format!(
            "expected {expected}; in Unleash Edge, -p of `edge` is --pretrusted-tokens, which is not \
             supported: {}",
            options::PRETRUSTED_TOKENS.help_text()
        );
        s.report_error(key, reason);
        return 0;
    }
    s.parse_or_default(key, expected, |text| text.parse().ok())
}

/// Whether a value looks like a pretrusted token of Unleash Edge: `<token>` or `<token>@<environment>`.
fn is_pretrusted_token(s: &RawSettings, key: &OptionSpec) -> bool {
    s.text(key).is_some_and(|text| {
        let token = text.split_once('@').map_or(text, |(token, _)| token);
        text.contains('@') || Token::parse(token).is_ok()
    })
}

pub(super) fn interface(s: &mut RawSettings, key: &OptionSpec) -> IpAddr {
    s.parse_or_default(key, "an IP address or localhost", |text| match text {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        text => text.trim_start_matches('[').trim_end_matches(']').parse().ok(),
    })
}

pub(super) fn base_path(s: &mut RawSettings) -> String {
    s.parse_or_default(&options::BASE_PATH, "a path as in `/flags`", |text| {
        let path = text.trim_matches('/');
        let fits = |c: char| c.is_ascii_graphic() && !"?#%".contains(c);
        path.chars().all(fits).then(|| match path {
            "" => String::new(),
            path => format!("/{path}"),
        })
    })
}

/// The headers that carry tokens: from SDKs, and to upstream.
pub(super) fn token_headers(s: &mut RawSettings) -> (HeaderName, HeaderName) {
    let parse = |text: &str| text.parse::<HeaderName>().ok();
    if let Some(both) = s.parse_optional(&options::TOKEN_HEADER, EXPECTED_HEADER_NAME, parse) {
        for key in [&options::EDGE_AUTH_HEADER, &options::UPSTREAM_AUTH_HEADER] {
            if s.is_set(key) {
                s.report_error(key, "cannot be combined with --token-header");
            }
        }
        return (both.clone(), both);
    }
    (
        s.parse_or_default(&options::EDGE_AUTH_HEADER, EXPECTED_HEADER_NAME, parse),
        s.parse_or_default(&options::UPSTREAM_AUTH_HEADER, EXPECTED_HEADER_NAME, parse),
    )
}

pub(super) fn parse_network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Parses a URL to which paths can be appended.
pub(super) fn parse_http_url(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    plain.then_some(url)
}
