//! The list of all options.
//!
//! Command line options, environment variables, keys of the file, defaults, help and the printed
//! configuration derive from it. Where Unleash Edge has an option, its name, meaning and default are
//! the same here (`docs/CLI.md` of v20). Values are validated in `from_raw`, not here.

use std::{iter, sync::LazyLock};

use super::option_spec::{
    Arity::{List, One, Switch},
    CommandScope, OptionSpec, ignored, list, one, rejected, switch,
};
use crate::token::Environment;

macro_rules! keys {
    ($($scope:ident, $heading:literal: {
        $($(#[doc = $help:literal])+ $id:ident = $key:expr;)*
    })*) => {
        $($(
            $(#[doc = $help])+
            pub(super) static $id: OptionSpec =
                $key.in_section(CommandScope::$scope, $heading, concat!($($help),+));
        )*)*

        /// The options that are declared here.
        static DECLARED: &[&OptionSpec] = &[$($(&$id,)*)*];
    };
}

/// All options, in the order of `--help` and of `config/parapet.toml`. Each secret is followed by the
/// option that names its file.
pub(super) static OPTIONS: LazyLock<Vec<&'static OptionSpec>> = LazyLock::new(|| {
    DECLARED.iter().flat_map(|key| iter::once(*key).chain(key.file_option())).collect()
});

keys! {
    All, "Serving": {
        /// The port for SDKs; 0 lets the system choose one.
        PORT = one("port").short('p').default("3063");
        /// The IP address to listen on for SDKs; `::` is every address, IPv4 included.
        INTERFACE = one("interface").short('i').default("::");
        /// The prefix of all SDK paths, as in `/flags`.
        BASE_PATH = one("base-path").default("");
        /// The port of the admin listener; 0 lets the system choose one.
        ADMIN_PORT = one("admin-port").default("3064");
        /// The IP address of the admin listener.
        ADMIN_INTERFACE = one("admin-interface").default("127.0.0.1");
        /// The header that carries tokens, both from SDKs and to upstream.
        TOKEN_HEADER = one("token-header");
        /// The header that carries the tokens of SDKs.
        EDGE_AUTH_HEADER = one("edge-auth-header").default("authorization");
        /// The header that carries tokens to upstream.
        UPSTREAM_AUTH_HEADER = one("upstream-auth-header").default("authorization");
        /// Do not serve /api/frontend/all and /api/proxy/all.
        DISABLE_ALL_ENDPOINT = switch("disable-all-endpoint");
        /// Do not serve /internal-backstage/metrics, nor /metrics on the admin listener.
        DISABLE_METRICS_ENDPOINT = switch("disable-metrics-endpoint");
        /// Do not serve /internal-backstage/metricsbatch.
        DISABLE_METRICS_BATCH_ENDPOINT = switch("disable-metrics-batch-endpoint");
        /// Do not serve /internal-backstage/features.
        DISABLE_FEATURES_ENDPOINT = switch("disable-features-endpoint");
        /// Do not serve /internal-backstage/tokens.
        DISABLE_TOKENS_ENDPOINT = switch("disable-tokens-endpoint");
        /// Do not serve /internal-backstage/instancedata.
        DISABLE_INSTANCE_DATA_ENDPOINT = switch("disable-instance-data-endpoint");
    }
    All, "TLS": {
        /// Serve SDKs over TLS on --tls-server-port. Nothing listens on --port then, unless
        /// --redirect-http-to-https is set.
        TLS_ENABLE = switch("tls-enable");
        /// The file with the server's certificate chain (PEM), leaf first. With several files, for
        /// instance one per host name, the first is the default.
        TLS_SERVER_CERT = list("tls-server-cert");
        /// The file with the certificate's private key (PEM: PKCS #8, PKCS #1 or SEC 1). One per
        /// certificate, in the same order.
        TLS_SERVER_KEY = list("tls-server-key");
        /// The port for SDKs over TLS; 0 lets the system choose one.
        TLS_SERVER_PORT = one("tls-server-port").default("3043");
        /// With --tls-enable: redirect requests on --port (308) to the same host at --tls-server-port.
        REDIRECT_HTTP_TO_HTTPS = switch("redirect-http-to-https");
        /// The lowest TLS version on both listeners: 1.2 or 1.3.
        TLS_MIN_VERSION = one("tls-min-version").default("1.2");
        /// The certificate authorities (PEM) for client certificates. If not set, clients are not asked
        /// for a certificate.
        TLS_CLIENT_CA_FILE = one("tls-client-ca-file");
        /// With --tls-client-ca-file: `required` rejects clients without a certificate, `optional`
        /// accepts them.
        TLS_CLIENT_AUTH = one("tls-client-auth").default("required");
        /// With --tls-client-ca-file: certificate revocation lists (PEM) of every authority that issues
        /// client certificates, including intermediate ones.
        TLS_CRL_FILE = one("tls-crl-file");
        /// The timeout of a TLS handshake on both listeners, in seconds.
        TLS_HANDSHAKE_TIMEOUT_SECONDS = one("tls-handshake-timeout-seconds").default("10");
        /// How many TLS handshakes each listener processes at once, so that many new connections leave
        /// processor time for the open ones. Default: half of the processors.
        TLS_MAX_HANDSHAKES = one("tls-max-handshakes");
        /// The file with the certificate chain (PEM) of the admin listener, which then serves TLS. With
        /// several files, the first is the default.
        ADMIN_TLS_CERT = list("admin-tls-cert");
        /// The file with that certificate's private key (PEM). One per certificate, in the same order.
        ADMIN_TLS_KEY = list("admin-tls-key");
        /// The certificate authorities (PEM) for client certificates on the admin listener.
        ADMIN_TLS_CLIENT_CA_FILE = one("admin-tls-client-ca-file");
        /// With --admin-tls-client-ca-file: `required` rejects clients without a certificate, `optional`
        /// accepts them.
        ADMIN_TLS_CLIENT_AUTH = one("admin-tls-client-auth").default("required");
        /// With --admin-tls-client-ca-file: certificate revocation lists (PEM) of all its authorities.
        ADMIN_TLS_CRL_FILE = one("admin-tls-crl-file");
    }
    All, "Streams": {
        /// The mode to which SDKs that support both are switched: `streaming` or `polling`. If not set,
        /// each SDK uses the mode that it is configured for.
        SDK_FETCH_MODE = one("sdk-fetch-mode");
        /// The maximum number of open streams. Further SDKs get 429 and poll.
        MAX_STREAMS = one("max-streams").default("10000");
        /// The maximum number of open streams per client address; for IPv6 per /64 network. Default:
        /// half of --max-streams. Behind a load balancer, set --trust-proxy and --proxy-trusted-servers;
        /// otherwise all clients share its address.
        MAX_STREAMS_PER_ADDRESS = one("max-streams-per-address");
        /// The maximum number of open streams per token. Default: three quarters of --max-streams.
        MAX_STREAMS_PER_TOKEN = one("max-streams-per-token");
        /// The approximate lifetime of a stream, in seconds. Its client then reconnects.
        STREAM_MAX_AGE_SECONDS = one("stream-max-age-seconds").default("3600");
        /// A secret shared by the instances behind one address, so that each accepts the event stream
        /// URLs that another has issued to OpenFeature providers. Default: the upstream admin token, or
        /// else a random secret per run.
        OFREP_TICKET_SECRET = one("ofrep-ticket-secret").secret();
    }
    All, "Browsers": {
        /// Origins that may read responses; `*` is any.
        CORS_ORIGIN = list("cors-origin").default("*");
        /// Methods that other origins may use; `*` is any.
        CORS_METHODS = list("cors-methods").default("*");
        /// Request headers that other origins may send; `*` is any.
        CORS_ALLOWED_HEADERS = list("cors-allowed-headers").default("*");
        /// Response headers that other origins may read; `*` is any.
        CORS_EXPOSED_HEADERS = list("cors-exposed-headers").default("*");
        /// Allow other origins to send cookies; requires --cors-origin.
        CORS_CREDENTIALS = switch("cors-credentials");
        /// How long browsers may cache these rules, in seconds.
        CORS_MAX_AGE = one("cors-max-age").default("172800");
    }
    All, "Access": {
        /// The only networks (CIDR) or addresses that are served, on both listeners, including health,
        /// metrics and the console. Empty allows all.
        ALLOW_LIST = list("allow-list");
        /// Networks (CIDR) or addresses that are never served.
        DENY_LIST = list("deny-list");
        /// Trust X-Forwarded-For, or else Forwarded, from the proxies in --proxy-trusted-servers.
        /// Without that list, such a header from any client sets the address that flags are evaluated
        /// for; --allow-list, --deny-list, rate limits and the audit log then use the address of the
        /// connection.
        TRUST_PROXY = switch("trust-proxy");
        /// Networks (CIDR) or addresses of the proxies that are trusted to report the client's address.
        /// With --trust-proxy they report it in X-Forwarded-For, or else in Forwarded. A proxy that sets
        /// only Forwarded must remove the client's X-Forwarded-For.
        PROXY_TRUSTED_SERVERS = list("proxy-trusted-servers");
        /// With --proxy-trusted-servers: connections from these addresses are passed through by load
        /// balancers and begin with the PROXY protocol, version 1 or 2. Connections from elsewhere do
        /// not.
        PROXY_PROTOCOL = switch("proxy-protocol");
        /// The same as --proxy-protocol, for the admin listener.
        ADMIN_PROXY_PROTOCOL = switch("admin-proxy-protocol");
    }
    All, "Limits": {
        /// The maximum size of a request body, in bytes, after decompression.
        BODY_LIMIT_BYTES = one("body-limit-bytes").default("2097152");
        /// The maximum number of open connections for SDKs. The admin listener, and a port that redirects,
        /// have at most 256.
        MAX_CONNECTIONS = one("max-connections").default("20000");
        /// The maximum number of open connections per client address. Default: half of
        /// --max-connections; no separate limit with --trust-proxy, where the address is the proxy's.
        MAX_CONNECTIONS_PER_ADDRESS = one("max-connections-per-address");
        /// The timeout for receiving a request head, from its first byte, in seconds.
        HEADER_READ_TIMEOUT_SECONDS = one("header-read-timeout-seconds").default("15");
        /// The minimum idle timeout of client connections, in seconds; the actual one is up to a quarter
        /// longer. Set it longer than that of clients and load balancers, so that no connection is
        /// closed while they write a request.
        EDGE_KEEPALIVE_TIMEOUT = one("edge-keepalive-timeout").default("80");
        /// The approximate lifetime of a client connection, in seconds. The client is then told to open
        /// another, so that clients spread over new instances. Default: unlimited.
        MAX_CONNECTION_AGE_SECONDS = one("max-connection-age-seconds");
        /// The timeout of a request, from its head until its response is ready, in seconds.
        EDGE_REQUEST_TIMEOUT = one("edge-request-timeout").default("10");
        /// How many valid tokens are cached, and separately how many invalid ones.
        TOKEN_CACHE_CAPACITY = one("token-cache-capacity").default("100000");
        /// How long an invalid token is rejected without validating it again, in seconds.
        INVALID_TOKEN_TTL_SECONDS = one("invalid-token-ttl-seconds").default("30");
        /// How many distinct usage counters are kept, for all tokens, before they are merged more
        /// coarsely. A further 32nd of this number is reserved for flags that the reporting token does
        /// not see.
        USAGE_MAX_COUNTERS = one("usage-max-counters").default("100000");
    }
    All, "Running": {
        /// The configuration file (TOML). Default: config/parapet.toml, if it exists.
        CONFIG = one("config").env("PARAPET_CONFIG");
        /// The directory where state is stored between runs.
        DATA_DIR = one("data-dir").default("data");
        /// The log format: plain, json or pretty.
        LOG_FORMAT = one("log-format").short('l').default("plain");
        /// The log level, or levels by target as in `info,parapet=debug`.
        LOG = one("log").env("RUST_LOG").default("info");
        /// The application name that all instances report to upstream.
        APP_NAME = one("app-name").short('a').default("parapet");
        /// The name of this instance. Default: a new one at each start.
        INSTANCE_ID = one("instance-id");
        /// How this instance is hosted: self-hosted, hosted or enterprise-self-hosted.
        HOSTING = one("hosting").env("EDGE_HOSTING").default("self-hosted");
        /// The region that this instance reports.
        AWS_REGION = one("aws-region");
        /// How long requests are still accepted after SIGTERM, in seconds. Meanwhile readiness is
        /// withdrawn, and every response tells its client to disconnect. SIGINT skips the delay, and a
        /// second signal ends it.
        DRAIN_DELAY_SECONDS = one("drain-delay-seconds").default("5");
        /// The timeout at shutdown for requests in progress and for the last usage, in seconds.
        SHUTDOWN_TIMEOUT_SECONDS = one("shutdown-timeout-seconds").default("10");
    }
    WithUsage, "Store": {
        /// Where state is kept between runs, as a URL: a folder (file:), Redis (redis:, or rediss: with
        /// TLS, redis+cluster:, redis+sentinel:), or a bucket with a path in it (s3:, gs:, az:), whose
        /// credentials are read from the variables of its cloud. Default: the backup folder of an edge,
        /// the data dir of a standalone.
        STORE = one("store").env("PARAPET_STORE").secret();
        /// The certificate authorities (PEM) to trust for a Redis with TLS, instead of those of the
        /// platform.
        STORE_CA_FILE = one("store-ca-file");
    }
    Edge, "Store of Unleash Edge": {
        /// The same as --store, as Unleash Edge names it: redis://user:password@host:port/database. With
        /// --redis-mode cluster, the URLs of some nodes.
        REDIS_URL = list("redis-url").secret();
        /// Whether Redis is one server (single) or a Cluster (cluster).
        REDIS_MODE = one("redis-mode").default("single");
        /// The host of Redis, instead of --redis-url.
        REDIS_HOST = one("redis-host");
        /// The port of Redis; replaces that of --redis-url.
        REDIS_PORT = one("redis-port");
        /// The ACL user of Redis; replaces that of --redis-url.
        REDIS_USERNAME = one("redis-username");
        /// The password of Redis; replaces that of --redis-url.
        REDIS_PASSWORD = one("redis-password").secret();
        /// Connect to Redis over TLS.
        REDIS_SECURE = switch("redis-secure");
        /// With --redis-host: redis or tcp; rediss or tls for TLS.
        REDIS_SCHEME = one("redis-scheme").default("redis");
        /// The bucket in S3 in which state is kept. Endpoint, region and credentials are read from AWS_*
        /// variables.
        S3_BUCKET_NAME = one("s3-bucket-name");
    }
    WithUsage, "Timeouts of Redis": {
        /// The timeout for loading from Redis, in milliseconds.
        REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS =
            one("redis-read-connection-timeout-milliseconds").default("2000");
        /// The timeout for saving in Redis, in milliseconds.
        REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS =
            one("redis-write-connection-timeout-milliseconds").default("2000");
    }
    WithUsage, "Usage": {
        /// The interval at which usage is sent to upstream, or stored in standalone mode, in seconds.
        METRICS_INTERVAL_SECONDS = one("metrics-interval-seconds").short('m').default("60");
    }
    Edge, "Upstream": {
        /// The URL of the Unleash server, without /api; required.
        UPSTREAM_URL = one("upstream-url").short('u');
        /// An admin token of upstream (`*:*.…`), which is exchanged for one backend token per
        /// environment.
        UPSTREAM_ADMIN_TOKEN = one("upstream-admin-token").secret();
        /// With an admin token: the environments to serve. Empty serves all that upstream has enabled.
        ENVIRONMENTS = list("environments");
        /// With an admin token: the name of a group of instances, which share their backend tokens and,
        /// with --fleet on, what they fetch from upstream. At most 64 letters, digits, `-`, `_` or `.`.
        FLEET_NAME = one("fleet-name").default("default");
        /// Whether the instances with the same --fleet-name act towards upstream as one: on or off. That
        /// needs a Redis as the store, and an admin token. Default: on if there are both.
        FLEET = one("fleet").env("PARAPET_FLEET");
        /// The sender of a fleet's usage: the leader for all instances (`shared`), or each instance for
        /// itself (`own`).
        FLEET_USAGE = one("fleet-usage").default("shared");
        /// Without an admin token: backend tokens to fetch flags with from the start.
        TOKENS = list("tokens").short('t').secret();
        /// How flags are fetched from upstream: `auto` (by streaming if upstream supports it, else when
        /// upstream's event log shows a change, else by polling), `poll`, or `stream` (like `auto`, but a
        /// warning is logged if upstream does not support streaming). The event log needs an admin token.
        UPSTREAM_MODE = one("upstream-mode").default("auto");
        /// The interval at which upstream is asked for changed flags while no stream delivers them, in
        /// seconds.
        FEATURES_REFRESH_INTERVAL_SECONDS =
            one("features-refresh-interval-seconds").short('f').default("15");
        /// The interval at which upstream validates a cached valid token again, in seconds.
        TOKEN_REVALIDATION_INTERVAL_SECONDS =
            one("token-revalidation-interval-seconds").default("3600");
        /// With an admin token: the interval at which upstream is asked for changed tokens, in seconds. A
        /// revoked token is rejected within this time.
        TOKEN_LIST_INTERVAL_SECONDS = one("token-list-interval-seconds").default("15");
        /// The timeout of a request to upstream, in seconds.
        UPSTREAM_REQUEST_TIMEOUT = one("upstream-request-timeout").default("5");
        /// The timeout for connecting to upstream, in seconds.
        UPSTREAM_SOCKET_TIMEOUT = one("upstream-socket-timeout").default("5");
        /// The idle timeout of connections to upstream, in seconds.
        CLIENT_KEEPALIVE_TIMEOUT = one("client-keepalive-timeout").default("15");
        /// Certificates (PEM) to trust for upstream, in addition to those of the platform.
        UPSTREAM_CERTIFICATE_FILE = one("upstream-certificate-file");
        /// The client certificate chain (PEM) to present to upstream, leaf first.
        PKCS8_CLIENT_CERTIFICATE_FILE = one("pkcs8-client-certificate-file");
        /// The private key (PEM) of that certificate.
        PKCS8_CLIENT_KEY_FILE = one("pkcs8-client-key-file");
        /// Instead of these two files: one file with certificate and key (PKCS #12: .p12, .pfx).
        PKCS12_IDENTITY_FILE = one("pkcs12-identity-file");
        /// The passphrase of --pkcs12-identity-file.
        PKCS12_PASSPHRASE = one("pkcs12-passphrase").secret();
        /// Instead of these files: one file with certificate and key (PEM).
        PEM_CERT_FILE = one("pem-cert-file");
        /// Accept any certificate of upstream; for tests only.
        SKIP_SSL_VERIFICATION = switch("skip-ssl-verification").short('s');
        /// Headers to add to every request to upstream, as in `X-Api-Key: secret`.
        CUSTOM_CLIENT_HEADERS = list("custom-client-headers").short('H').secret();
        /// The directory for flags and token digests, which allow a start without upstream. Default:
        /// `backup` in the data dir. If it is set, here or by --data-dir, it must be writable.
        BACKUP_FOLDER = one("backup-folder").short('b');
        /// Relay upstream's admin API and sign-in on the admin listener, with the console. Callers use
        /// their own tokens and accounts of upstream.
        ADMIN_RELAY = switch("admin-relay");
    }
    Offline, "Offline": {
        /// The file with the flags; required.
        BOOTSTRAP_FILE = one("bootstrap-file").short('b');
        /// Tokens that may read flag configuration.
        CLIENT_TOKENS = list("client-tokens").short('c').secret();
        /// Tokens that may read evaluated flags.
        FRONTEND_TOKENS = list("frontend-tokens").short('f').secret();
        /// The interval at which the file is read again even if no change was detected, in seconds; 0
        /// turns this off.
        RELOAD_INTERVAL = one("reload-interval").short('r').default("0");
    }
    WithoutUpstream, "Without upstream": {
        /// Admin tokens for the admin listener. Offline mode accepts exactly these; in standalone mode
        /// the first start creates them.
        INIT_ADMIN_API_TOKENS = list("init-admin-api-tokens").secret();
    }
    Standalone, "Standalone": {
        /// The file with the flags, or the folder of such files. If it is not set and the default does
        /// not exist, the first start writes an example.
        FLAGS = one("flags").env("PARAPET_FLAGS").default("config/flags.json");
        /// Backend tokens to create at the first start.
        INIT_BACKEND_API_TOKENS = list("init-backend-api-tokens").secret();
        /// The former name of --init-backend-api-tokens.
        INIT_CLIENT_API_TOKENS = list("init-client-api-tokens").secret();
        /// Frontend tokens to create at the first start.
        INIT_FRONTEND_API_TOKENS = list("init-frontend-api-tokens").secret();
        /// The environments that a single file of flags serves, in addition to those named by tokens at
        /// the start of the server.
        FLAG_ENVIRONMENTS = list("flag-environments").default(Environment::DEFAULT);
        /// The database for accounts and tokens: postgres://… if instances share them, with several
        /// hosts separated by commas if needed. Default: the file parapet.db in the data dir.
        DATABASE_URL = one("database-url").secret();
        /// The name of the account that the first start creates.
        UNLEASH_DEFAULT_ADMIN_USERNAME = one("unleash-default-admin-username").default("admin");
        /// The password of that account, at least 10 characters. Default: generated, and printed once.
        UNLEASH_DEFAULT_ADMIN_PASSWORD = one("unleash-default-admin-password").secret();
        /// The maximum number of API tokens.
        UNLEASH_API_TOKENS_LIMIT = one("unleash-api-tokens-limit").default("2000");
        /// The maximum number of accounts.
        ACCOUNTS_LIMIT = one("accounts-limit").default("1000");
        /// The idle timeout of a session, in seconds.
        SESSION_IDLE_SECONDS = one("session-idle-seconds").default("28800");
        /// The maximum lifetime of a session, in seconds.
        SESSION_LIFETIME_SECONDS = one("session-lifetime-seconds").default("604800");
        /// How long the audit log is kept, in seconds; 0 is forever.
        AUDIT_RETENTION_SECONDS = one("audit-retention-seconds").default("0");
        /// How long usage is kept, in seconds.
        USAGE_RETENTION_SECONDS = one("usage-retention-seconds").default("2592000");
    }
    Probe, "Probe": {
        /// The URL of the instance to probe. Default: the instance that listens on this machine with the
        /// same settings, over TLS if it is enabled. Its certificate is then verified only with
        /// --ca-certificate-file, for any host name.
        EDGE_URL = one("edge-url").short('e');
        /// A certificate authority (PEM) to trust in addition to those of the platform.
        CA_CERTIFICATE_FILE = one("ca-certificate-file").short('c');
    }
    // Options of Unleash Edge, accepted so that existing deployments start and report what has changed.
    All, "Without effect": {
        /// there are as many threads as processors.
        WORKERS = ignored("workers", One).short('w');
        /// nothing is sent to Sentry; errors are logged.
        SENTRY_DSN = ignored("sentry-dsn", One);
        /// nothing is sent to Sentry.
        SENTRY_TRACING_RATE = ignored("sentry-tracing-rate", One);
        /// nothing is sent to Sentry.
        SENTRY_DEBUG = ignored("sentry-debug", Switch);
        /// nothing is sent to Sentry.
        SENTRY_ENABLE_LOGS = ignored("sentry-enable-logs", Switch);
        /// let Datadog scrape /internal-backstage/metrics.
        DATADOG_URL = ignored("datadog-url", One);
        /// traces are not exported yet.
        OTEL_COLLECTOR_URL = ignored("otel-collector-url", One);
    }
    Edge, "Without effect": {
        /// every token that upstream finds valid is served.
        STRICT = ignored("strict", Switch);
        /// every token that upstream finds valid is served.
        DYNAMIC = ignored("dynamic", Switch);
        /// upstream streams changes if it supports that (--upstream-mode); otherwise flags are fetched
        /// in full, and only when they have changed.
        DELTA = ignored("delta", Switch);
        /// flags are fetched in full.
        DELTA_DIFF = ignored("delta-diff", Switch);
        /// upstream's stream is used if it supports streaming (--upstream-mode).
        STREAMING = ignored("streaming", Switch);
        /// consumption is not billed.
        CONSUMPTION = ignored("consumption", Switch);
        /// projects are those of the tokens.
        DESIRED_PROJECTS = ignored("desired-projects", List);
        /// a start never waits for upstream to validate tokens.
        EDGE_DEFER_TOKEN_VALIDATION = ignored("edge-defer-token-validation", Switch);
        /// metrics are scraped, not pushed.
        PROMETHEUS_PUSH_INTERVAL = ignored("prometheus-push-interval", One);
        /// metrics are scraped, not pushed.
        PROMETHEUS_USERNAME = ignored("prometheus-username", One);
        /// metrics are scraped, not pushed.
        PROMETHEUS_PASSWORD = ignored("prometheus-password", One);
        /// metrics are scraped, not pushed.
        PROMETHEUS_USER_ID = ignored("prometheus-user-id", One);
    }
    Edge, "Not supported": {
        /// let Prometheus scrape /internal-backstage/metrics.
        PROMETHEUS_REMOTE_WRITE_URL = rejected("prometheus-remote-write-url", One);
        /// create the tokens in upstream, or run `offline` with --frontend-tokens.
        PRETRUSTED_TOKENS = rejected("pretrusted-tokens", List);
        /// use --upstream-admin-token or --tokens.
        UNLEASH_CLIENT_SECRET = rejected("unleash-client-secret", One);
    }
}

#[cfg(test)]
mod tests;
