//! The settings of both listeners: addresses, connections, streams, CORS and trusted proxies. TLS is in
//! `tls`.

use std::{collections::BTreeSet, net::SocketAddr};

use ipnet::IpNet;
use reqwest::header::HeaderValue;

use super::{
    model::{AdminListenerConfig, DataListenerConfig},
    option_spec::OptionSpec,
    options,
    raw::RawSettings,
    tls,
    values::{EXPECTED_NETWORKS, base_path, interface, parse_network, port, token_headers},
};
use crate::{
    http::{
        client_address, cors,
        ofrep::StreamTicketKey,
        routes::OptionalEndpoint,
        streaming::{self, FetchMode},
    },
    server::ConnectionLimits,
};

pub(super) fn listeners(s: &mut RawSettings) -> (DataListenerConfig, AdminListenerConfig) {
    let is_tls = s.switch(&options::TLS_ENABLE);
    let redirects = s.switch(&options::REDIRECT_HTTP_TO_HTTPS);
    let ip = interface(s, &options::INTERFACE);
    let plain = (SocketAddr::new(ip, port(s, &options::PORT)), &options::PORT);
    let encrypted =
        (SocketAddr::new(ip, port(s, &options::TLS_SERVER_PORT)), &options::TLS_SERVER_PORT);
    let (sdks, redirect_from) = match (is_tls, redirects) {
        (true, true) => (encrypted, Some(plain)),
        (true, false) => (encrypted, None),
        (false, _) => (plain, None),
    };
    let admin =
        SocketAddr::new(interface(s, &options::ADMIN_INTERFACE), port(s, &options::ADMIN_PORT));
    let admin = (admin, &options::ADMIN_PORT);
    require_distinct_ports(s, sdks, admin);
    if let Some(redirect_from) = redirect_from {
        require_distinct_ports(s, redirect_from, sdks);
        require_distinct_ports(s, redirect_from, admin);
    }
    if is_tls && !redirects && s.is_set(&options::PORT) {
        let warning = "--port has no effect with --tls-enable: SDKs are served on --tls-server-port \
            alone, unless --redirect-http-to-https redirects them";
        s.warnings.push(warning.to_owned());
    }
    let data_tls = tls::data_listener(s);
    let admin_tls = tls::admin_listener(s);
    if data_tls.is_none() && admin_tls.is_none() {
        tls::warn_without_tls(s);
    }
    let (token_header, _) = token_headers(s);
    let streams = streams(s);
    let stream_ticket_key =
        s.parse_optional(&options::OFREP_TICKET_SECRET, "at least 16 characters", |text| {
            (text.len() >= 16).then(|| StreamTicketKey::derive(text))
        });
    let access = client_address_config(s);
    let data = DataListenerConfig {
        address: sdks.0,
        tls: data_tls,
        redirect_from: redirect_from.map(|(address, _)| address),
        streams,
        stream_ticket_key,
        base_path: base_path(s),
        token_header,
        cors: cors(s),
        disabled_endpoints: disabled_endpoints(s),
        connection_limits: connection_limits(s, &access),
        has_explicit_max_connections: s.is_set(&options::MAX_CONNECTIONS),
        load_balancers: load_balancers(s, &options::PROXY_PROTOCOL),
        max_body_bytes: s.count(&options::BODY_LIMIT_BYTES),
        request_timeout: s.interval(&options::EDGE_REQUEST_TIMEOUT),
        access,
    };
    let balancers = load_balancers(s, &options::ADMIN_PROXY_PROTOCOL);
    (data, AdminListenerConfig { address: admin.0, tls: admin_tls, load_balancers: balancers })
}

/// Reports an error if two listeners share a port. Each address comes with the option of its port.
fn require_distinct_ports(
    s: &mut RawSettings,
    (one, one_key): (SocketAddr, &'static OptionSpec),
    (other, other_key): (SocketAddr, &'static OptionSpec),
) {
    let overlap =
        one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    if one.port() == other.port() && one.port() != 0 && overlap {
        s.report_error(other_key, format!("expected another port than --{}", one_key.name));
    }
}

fn connection_limits(s: &mut RawSettings, access: &client_address::Config) -> ConnectionLimits {
    let max_connections = s.count(&options::MAX_CONNECTIONS);
    let is_direct = access.proxies == client_address::TrustedProxies::None;
    let share = is_direct.then_some(max_connections.div_ceil(2));
    ConnectionLimits {
        max_connections,
        max_connections_per_address: s
            .optional_count(&options::MAX_CONNECTIONS_PER_ADDRESS)
            .or(share),
        header_read_timeout: s.interval(&options::HEADER_READ_TIMEOUT_SECONDS),
        idle_timeout: s.interval(&options::EDGE_KEEPALIVE_TIMEOUT),
        max_age: s.optional_interval(&options::MAX_CONNECTION_AGE_SECONDS),
    }
}

fn streams(s: &mut RawSettings) -> streaming::Config {
    let fetch_mode =
        s.parse_optional(&options::SDK_FETCH_MODE, "polling or streaming", FetchMode::parse);
    let max_streams = s.count(&options::MAX_STREAMS);
    let streams = streaming::Config {
        max_streams,
        max_per_address: s.count_or(&options::MAX_STREAMS_PER_ADDRESS, max_streams.div_ceil(2)),
        max_per_token: s.count_or(&options::MAX_STREAMS_PER_TOKEN, max_streams - max_streams / 4),
        max_age: s.interval(&options::STREAM_MAX_AGE_SECONDS),
        fetch_mode,
    };
    if s.count(&options::MAX_CONNECTIONS) <= streams.max_streams {
        s.warnings.push(
            "--max-connections is not larger than --max-streams: streams can take all connections, and \
             other requests are then rejected"
                .to_owned(),
        );
    }
    streams
}

fn disabled_endpoints(s: &mut RawSettings) -> BTreeSet<OptionalEndpoint> {
    [
        (&options::DISABLE_ALL_ENDPOINT, OptionalEndpoint::FrontendAll),
        (&options::DISABLE_METRICS_ENDPOINT, OptionalEndpoint::Metrics),
        (&options::DISABLE_METRICS_BATCH_ENDPOINT, OptionalEndpoint::MetricsBatch),
        (&options::DISABLE_FEATURES_ENDPOINT, OptionalEndpoint::Features),
        (&options::DISABLE_TOKENS_ENDPOINT, OptionalEndpoint::Tokens),
        (&options::DISABLE_INSTANCE_DATA_ENDPOINT, OptionalEndpoint::InstanceData),
    ]
    .into_iter()
    .filter_map(|(key, endpoint)| s.switch(key).then_some(endpoint))
    .collect()
}

fn cors(s: &mut RawSettings) -> cors::Config {
    let origins =
        list_or_any(s, &options::CORS_ORIGIN, "origins as in `https://example.com`", |text| {
            HeaderValue::from_str(text).ok()
        });
    let credentials = s.switch(&options::CORS_CREDENTIALS);
    if credentials && origins.is_none() {
        let reason = "requires --cors-origin: browsers reject credentials if any origin is allowed";
        s.report_error(&options::CORS_CREDENTIALS, reason);
    }
    cors::Config {
        origins,
        methods: list_or_any(s, &options::CORS_METHODS, "HTTP methods", |text| text.parse().ok()),
        headers: list_or_any(s, &options::CORS_ALLOWED_HEADERS, "names of headers", |text| {
            text.parse().ok()
        }),
        exposed_headers: list_or_any(
            s,
            &options::CORS_EXPOSED_HEADERS,
            "names of headers",
            |text| text.parse().ok(),
        ),
        credentials,
        max_age: s.delay(&options::CORS_MAX_AGE),
    }
}

/// The networks of load balancers whose connections to a listener begin with the PROXY protocol.
fn load_balancers(s: &mut RawSettings, key: &OptionSpec) -> Vec<IpNet> {
    if !s.switch(key) {
        return Vec::new();
    }
    if !s.is_set(&options::PROXY_TRUSTED_SERVERS) {
        s.report_error(key, "requires the load balancers in --proxy-trusted-servers");
    }
    s.parse_list(&options::PROXY_TRUSTED_SERVERS, EXPECTED_NETWORKS, parse_network)
}

fn client_address_config(s: &mut RawSettings) -> client_address::Config {
    let servers = s.parse_list(&options::PROXY_TRUSTED_SERVERS, EXPECTED_NETWORKS, parse_network);
    let trust = s.switch(&options::TRUST_PROXY);
    let reads_header =
        s.switch(&options::PROXY_PROTOCOL) || s.switch(&options::ADMIN_PROXY_PROTOCOL);
    let proxies = match (trust, servers.is_empty()) {
        (false, true) => client_address::TrustedProxies::None,
        (true, true) => {
            let warning = "--trust-proxy without --proxy-trusted-servers: clients can choose the \
                address that flags are evaluated for, and --allow-list, --deny-list, rate limits and \
                the audit log use the address of the connection, which may be your proxy's. List your \
                proxies in --proxy-trusted-servers";
            s.warnings.push(warning.to_owned());
            client_address::TrustedProxies::Any
        }
        (true, false) => client_address::TrustedProxies::Only(servers),
        (false, false) if reads_header => client_address::TrustedProxies::None,
        (false, false) => {
            let warning = "--proxy-trusted-servers has no effect without --trust-proxy or \
                --proxy-protocol";
            s.warnings.push(warning.to_owned());
            client_address::TrustedProxies::None
        }
    };
    client_address::Config {
        allow: s.parse_list(&options::ALLOW_LIST, EXPECTED_NETWORKS, parse_network),
        deny: s.parse_list(&options::DENY_LIST, EXPECTED_NETWORKS, parse_network),
        proxies,
    }
}

/// The items of a list. `None`, which is any, if `*` is among them.
fn list_or_any<T>(
    s: &mut RawSettings,
    key: &OptionSpec,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Option<Vec<T>> {
    let items = s.parse_list(key, expected, |text| match text {
        "*" => Some(None),
        text => parse(text).map(Some),
    });
    items.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use crate::{
        config::tests::{EDGE, SECRET, TOKEN, config, edge, errors},
        http::client_address::TrustedProxies,
    };

    #[test]
    fn pretrusted_token_as_port_is_explained() {
        for text in [TOKEN, "secret-123@development"] {
            let messages = errors(&format!("{EDGE} -p {text}"), &[]);
            assert!(messages[0].contains("-p of `edge` is --pretrusted-tokens"), "{messages:?}");
            assert!(
                !messages[0].contains("secret-123") && !messages[0].contains(SECRET),
                "{messages:?}"
            );
        }
        assert_eq!(errors("-p x", &[])[0], "--port: expected a port, 0 to 65535, not `x`");
    }

    #[test]
    fn token_header_applies_to_both_directions() {
        let line = format!("{EDGE} --token-header X-Token");
        assert_eq!(config(&line, &[]).data.token_header, "x-token");
        assert_eq!(edge(&line, &[]).upstream.token_header, "x-token");
        let conflict = format!("{line} --edge-auth-header x-other");
        assert_eq!(errors(&conflict, &[]).len(), 1);
    }

    #[test]
    fn trusted_proxies_follow_options() {
        let check = |flags: &str, proxies: &TrustedProxies| {
            assert_eq!(&config(flags, &[]).data.access.proxies, proxies, "{flags}");
        };
        check("--trust-proxy", &TrustedProxies::Any);
        assert_eq!(config("--trust-proxy", &[]).warnings.len(), 1);
        check("--trust-proxy=false", &TrustedProxies::None);
        let only =
            TrustedProxies::Only(vec!["10.0.0.1/32".parse().unwrap(), "fd00::/8".parse().unwrap()]);
        check("--trust-proxy --proxy-trusted-servers 10.0.0.1,fd00::/8", &only);
        check("--proxy-trusted-servers 10.0.0.1", &TrustedProxies::None);
        assert_eq!(config("--proxy-trusted-servers 10.0.0.1", &[]).warnings.len(), 1);
    }

    #[test]
    fn cors_credentials_require_named_origins() {
        assert_eq!(errors("--cors-credentials", &[]).len(), 1);
        let cors = config("--cors-credentials --cors-origin https://a.example", &[]).data.cors;
        assert!(cors.credentials && cors.origins.is_some());
    }

    #[test]
    fn base_path_has_leading_and_no_trailing_slash() {
        for given in ["flags", "/flags", "/flags/"] {
            assert_eq!(config(&format!("--base-path {given}"), &[]).data.base_path, "/flags");
        }
        assert_eq!(config("--base-path /", &[]).data.base_path, "");
        assert_eq!(errors("--base-path /a?b", &[]).len(), 1);
    }

    #[test]
    fn listeners_cannot_share_a_port() {
        assert_eq!(errors("--admin-port 3063", &[]).len(), 1);
        assert_eq!(config("-p 0 --admin-port 0", &[]).admin.address.port(), 0);
    }
}
