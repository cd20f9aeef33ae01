//! Client addresses: allow and deny lists, and the address that trusted proxies forward.
//!
//! A client has two addresses. The verified one, which the client cannot choose, is used for the lists,
//! rate limits, stream limits and the audit log. The one for evaluation may be an address that the
//! client claims, if every proxy is trusted.
//!
//! The forwarded address is read from `X-Forwarded-For`; `Forwarded` (RFC 7239) is read only if that
//! header is absent. Nearly every proxy sets the former and passes the latter on as the client sent it,
//! so a client could choose its address if `Forwarded` were read as well. A proxy that sets only
//! `Forwarded` has to remove the client's `X-Forwarded-For`.
//!
//! This module does not look at tokens.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{FORWARDED, HeaderMap, HeaderName};
use ipnet::IpNet;

/// Which addresses are served.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// When not empty, only these networks are served.
    pub allow: Vec<IpNet>,
    /// These networks are never served.
    pub deny: Vec<IpNet>,
    /// The proxies whose forwarded addresses are trusted.
    pub proxies: TrustedProxies,
}

/// The proxies whose `Forwarded` and `X-Forwarded-For` headers are trusted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum TrustedProxies {
    /// No proxy: the client is the peer.
    #[default]
    None,
    /// Any proxy (`--trust-proxy` alone): flags are evaluated for the leftmost address, as Unleash Edge
    /// does. Clients can write that address, so the verified address is the peer's.
    Any,
    /// Proxies in these networks: the rightmost address outside them is the client.
    Only(Vec<IpNet>),
}

/// The addresses of a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ClientAddresses {
    /// The address that the client cannot choose.
    pub verified: IpAddr,
    /// The address that flags are evaluated for.
    pub for_evaluation: IpAddr,
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

impl Config {
    /// Whether requests from this address are served.
    pub fn is_allowed(&self, client: IpAddr) -> bool {
        let listed = |list: &[IpNet]| list.iter().any(|network| network.contains(&client));
        !listed(&self.deny) && (self.allow.is_empty() || listed(&self.allow))
    }
}

impl TrustedProxies {
    /// The addresses of the client that a request comes from.
    pub fn client_addresses(&self, peer: SocketAddr, headers: &HeaderMap) -> ClientAddresses {
        let verified = self.verified_address(peer, headers);
        let for_evaluation = match self {
            Self::None | Self::Only(_) => verified,
            Self::Any => {
                forwarded_addresses(headers).first().copied().flatten().unwrap_or(verified)
            }
        };
        ClientAddresses { verified, for_evaluation }
    }

    /// The rightmost address that does not belong to a trusted proxy.
    ///
    /// An unreadable address ends the search: nothing to the left of it can be trusted.
    fn verified_address(&self, peer: SocketAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.ip().to_canonical();
        let trusted = match self {
            Self::None | Self::Any => return peer,
            Self::Only(networks) => networks,
        };
        let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(address));
        let mut client = peer;
        for hop in forwarded_addresses(headers).into_iter().rev() {
            let (true, Some(hop)) = (is_trusted(&client), hop) else { break };
            client = hop;
        }
        client
    }
}

/// The addresses in the forwarding headers, the client's first; `None` for an unreadable one.
fn forwarded_addresses(headers: &HeaderMap) -> Vec<Option<IpAddr>> {
    if headers.contains_key(X_FORWARDED_FOR) {
        return list_items(headers, &X_FORWARDED_FOR).map(|item| parse_address(item?)).collect();
    }
    let forwarded = list_items(headers, &FORWARDED).map(|item| {
        let node = item?.split(';').find_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            name.trim().eq_ignore_ascii_case("for").then_some(value.trim())
        })?;
        parse_address(node.trim_matches('"'))
    });
    forwarded.collect()
}

/// The items of a comma-separated header; `None` for an item that is not UTF-8. Items sent by the client
/// stand to the left of those a proxy appends, and must not make the latter unreadable.
fn list_items<'a>(
    headers: &'a HeaderMap,
    name: &'a HeaderName,
) -> impl Iterator<Item = Option<&'a str>> {
    headers
        .get_all(name)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|item| !item.is_empty())
        .map(|item| str::from_utf8(item).ok())
}

/// Parses an address as proxies write it: bare, with a port, or in brackets.
fn parse_address(node: &str) -> Option<IpAddr> {
    let address = match (node.parse::<SocketAddr>(), node.parse::<IpAddr>()) {
        (Ok(socket), _) => socket.ip(),
        (_, Ok(address)) => address,
        _ => node.strip_prefix('[')?.strip_suffix(']')?.parse().ok()?,
    };
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|network| network.parse().unwrap()).collect()
    }

    #[track_caller]
    fn check(proxies: &TrustedProxies, name: &'static str, value: &'static str, expect: &str) {
        check_all(proxies, &[(name, value.as_bytes())], expect);
    }

    #[track_caller]
    fn check_all(proxies: &TrustedProxies, sent: &[(&'static str, &[u8])], expect: &str) {
        let mut headers = HeaderMap::new();
        for (name, value) in sent {
            headers.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        let peer = "[::ffff:10.0.0.1]:4000".parse().unwrap();
        let ClientAddresses { verified, for_evaluation } = proxies.client_addresses(peer, &headers);
        assert_eq!(for_evaluation.to_string(), expect, "{sent:?}");
        let is_chosen = *proxies == TrustedProxies::Any;
        assert_eq!(verified.to_string(), if is_chosen { "10.0.0.1" } else { expect }, "{sent:?}");
    }

    #[test]
    fn client_is_the_peer_without_trusted_proxies() {
        check(&TrustedProxies::None, "x-forwarded-for", "1.2.3.4", "10.0.0.1");
    }

    #[test]
    fn leftmost_address_is_used_for_evaluation_when_any_proxy_is_trusted() {
        check(&TrustedProxies::Any, "x-forwarded-for", "1.2.3.4, 5.6.7.8", "1.2.3.4");
        check(&TrustedProxies::Any, "forwarded", "for=1.2.3.4;proto=http, for=5.6.7.8", "1.2.3.4");
        check(&TrustedProxies::Any, "forwarded", "For=\"[2001:db8::1]:99\"", "2001:db8::1");
        check(&TrustedProxies::Any, "x-forwarded-for", "[2001:db8::1]", "2001:db8::1");
        check(&TrustedProxies::Any, "x-forwarded-for", "unknown, 5.6.7.8", "10.0.0.1");
    }

    #[test]
    fn forwarded_address_is_trusted_only_from_a_trusted_proxy() {
        let ours = TrustedProxies::Only(networks(&["10.0.0.0/8"]));
        check(&ours, "x-forwarded-for", "6.6.6.6, 1.2.3.4", "1.2.3.4");
        check(&ours, "x-forwarded-for", "6.6.6.6, 1.2.3.4, 10.9.9.9", "1.2.3.4");
        check(&ours, "x-forwarded-for", "6.6.6.6, nonsense, 10.9.9.9", "10.9.9.9");
        let others = TrustedProxies::Only(networks(&["192.168.0.0/16"]));
        check(&others, "x-forwarded-for", "1.2.3.4", "10.0.0.1");
    }

    #[test]
    fn client_cannot_choose_its_address_by_a_header_that_the_proxy_passes_on() {
        let ours = TrustedProxies::Only(networks(&["10.0.0.0/8"]));
        let set_by_proxy = ("x-forwarded-for", &b"1.2.3.4"[..]);
        for proxies in [&ours, &TrustedProxies::Any] {
            check_all(proxies, &[("forwarded", b"for=6.6.6.6"), set_by_proxy], "1.2.3.4");
            check_all(proxies, &[set_by_proxy, ("forwarded", b"for=6.6.6.6")], "1.2.3.4");
            check_all(
                proxies,
                &[("x-forwarded-for", b""), ("forwarded", b"for=6.6.6.6")],
                "10.0.0.1",
            );
        }
        check_all(&ours, &[("forwarded", b"for=6.6.6.6, for=1.2.3.4")], "1.2.3.4");
        for before in [&b"\xff, 1.2.3.4"[..], b"\xc3\xa9,1.2.3.4"] {
            check_all(&ours, &[("x-forwarded-for", before)], "1.2.3.4");
        }
        check_all(&ours, &[("x-forwarded-for", b"1.2.3.4, \xff")], "10.0.0.1");
    }

    #[test]
    fn deny_list_overrides_allow_list_and_empty_allow_list_allows_all() {
        let check = |allow: &[&str], deny: &[&str], client: &str, expect| {
            let (allow, deny) = (networks(allow), networks(deny));
            let config = Config { allow, deny, proxies: TrustedProxies::None };
            assert_eq!(config.is_allowed(client.parse().unwrap()), expect, "{client}");
        };
        check(&[], &[], "1.2.3.4", true);
        check(&["1.0.0.0/8"], &[], "1.2.3.4", true);
        check(&["1.0.0.0/8"], &[], "2.2.3.4", false);
        check(&["1.0.0.0/8"], &["1.2.0.0/16"], "1.2.3.4", false);
    }
}
