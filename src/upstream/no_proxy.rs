//! `NO_PROXY`: hosts that are reached without a proxy.
//!
//! The list is parsed as curl does, with two extensions: `*` is also accepted among other entries, and
//! an entry may have a port.

use std::net::IpAddr;

use ipnet::IpNet;
use reqwest::Url;

/// Whether a list includes the host of a URL.
///
/// Entries are separated by commas or white space: `*` for every host, an address or a network
/// (CIDR), or a domain, which includes its subdomains (`example.com`, `.example.com` and
/// `*.example.com` are the same).
pub fn includes(list: &str, url: &Url) -> bool {
    let Some(host) = url.host_str() else { return false };
    let host = host.trim_matches(['[', ']']).trim_end_matches('.');
    let port = url.port_or_known_default();
    list.split(|char: char| char == ',' || char.is_whitespace())
        .filter(|entry| !entry.is_empty())
        .any(|entry| entry_includes(entry, host, port))
}

fn entry_includes(entry: &str, host: &str, port: Option<u16>) -> bool {
    if entry == "*" {
        return true;
    }
    if let Ok(address) = host.parse::<IpAddr>()
        && let Some(network) = network(entry)
    {
        return network.contains(&address);
    }
    match entry.rsplit_once(':') {
        Some((entry, of_entry)) if of_entry.parse().ok() == port => {
            entry == "*" || entry_matches(entry, host)
        }
        // Another port, or an invalid one.
        Some(_) => false,
        None => entry_matches(entry, host),
    }
}

fn entry_matches(entry: &str, host: &str) -> bool {
    if let Ok(address) = host.parse::<IpAddr>() {
        return network(entry).is_some_and(|network| network.contains(&address));
    }
    let domain = entry.strip_prefix('*').unwrap_or(entry).trim_matches('.');
    let Some(start) = host.len().checked_sub(domain.len()) else { return false };
    let ends_so = host.get(start..).is_some_and(|end| end.eq_ignore_ascii_case(domain));
    let is_label = start == 0 || host.as_bytes()[start - 1] == b'.';
    !domain.is_empty() && ends_so && is_label
}

/// An address or network, which may be in brackets.
fn network(entry: &str) -> Option<IpNet> {
    let entry = entry.strip_prefix('[').and_then(|it| it.strip_suffix(']')).unwrap_or(entry);
    entry.parse().ok().or_else(|| entry.parse::<IpAddr>().ok().map(IpNet::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_parsed_like_curl_does() {
        let check = |list: &str, url: &str, expect: bool| {
            assert_eq!(includes(list, &Url::parse(url).unwrap()), expect, "{url} in {list}");
        };
        check("", "http://10.0.0.1", false);
        check("*", "http://10.0.0.1:4242", true);
        check("*", "https://[::1]", true);
        check("*", "https://unleash.example.com", true);
        check("a.example, *", "http://10.0.0.1", true);
        check("10.0.0.1", "http://10.0.0.1:4242", true);
        check("10.0.0.1", "http://10.0.0.11", false);
        check("10.0.0.0/8", "http://10.9.8.7", true);
        check("10.0.0.0/8", "http://11.9.8.7", false);
        check("::1", "http://[::1]:4242", true);
        check("[::1]", "http://[0:0:0:0:0:0:0:1]", true);
        check("[::1]:4242", "http://[::1]:4242", true);
        check("[::1]:4243", "http://[::1]:4242", false);
        check("fd00::/8", "http://[fd12::1]", true);
        check("example.com", "http://example.com", true);
        check(".example.com", "http://example.com", true);
        check("EXAMPLE.com", "http://unleash.Example.com.", true);
        check("*.example.com", "http://unleash.example.com", true);
        check("example.com.", "http://unleash.example.com", true);
        check("example.com", "http://notexample.com", false);
        check("unleash.example.com", "http://example.com", false);
        check("example.com:4242", "http://example.com:4242", true);
        check("example.com:443", "https://example.com", true);
        check("example.com:4243", "http://example.com:4242", false);
        check("*:4242", "http://10.0.0.1:4242", true);
        check("*:4242", "http://example.com:4242", true);
        check("*:4243", "http://10.0.0.1:4242", false);
        check("10.0.0.1:4242", "http://10.0.0.1:4242", true);
        check("10.0.0.1:1", "http://10.0.0.1:4242", false);
        check("one.example two.example\tthree.example", "http://two.example", true);
        check("., .., *., :", "http://example.com", false);
        check("ex\u{e9}mple", "http://example.com", false);
    }
}
