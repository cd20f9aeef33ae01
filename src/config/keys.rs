//! The one list of everything that can be set.
//!
//! Flags, environment variables, keys of the file, defaults, help and the printed configuration
//! all derive from it. Names, meanings and defaults are Unleash Edge's where it has the option
//! (`docs/CLI.md` of v20). What a value must look like is `check`'s business.

use std::{iter, sync::LazyLock};

use clap::builder::StyledStr;

use self::Shape::{List, One, Switch};

/// One thing that can be set.
#[derive(Debug)]
pub(super) struct Key {
    /// The flag's name without dashes; every other name derives from it.
    pub(super) name: &'static str,
    pub(super) short: Option<char>,
    env: Option<&'static str>,
    pub(super) shape: Shape,
    pub(super) scope: Scope,
    pub(super) heading: &'static str,
    /// The default as one would write it; where it is computed, `None`, and the help tells it.
    pub(super) default: Option<&'static str>,
    help: &'static str,
    pub(super) support: Support,
    /// Its value is neither printed nor repeated, whatever is wrong with it.
    pub(super) secret: bool,
    /// The secret whose value this key names a file for.
    pub(super) file_of: Option<&'static Self>,
}

/// How many values a key takes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Shape {
    /// One text.
    One,
    /// Texts, separated by commas or given repeatedly.
    List,
    /// Yes or no; the bare flag is yes.
    Switch,
}

/// Which commands a key belongs to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    Everywhere,
    Edge,
    Offline,
    Standalone,
    /// `offline` and `standalone`, which have no upstream.
    Local,
    /// `edge` and `standalone`, which hand usage on.
    Serving,
    /// `health` and `ready`.
    Probe,
}

impl Scope {
    /// Whether a key of this scope has a meaning for the command whose own scope is `command`.
    pub(super) fn concerns(self, command: Self) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Serving => matches!(command, Self::Edge | Self::Standalone),
            Self::Local => matches!(command, Self::Offline | Self::Standalone),
            own => own == command,
        }
    }
}

/// What becomes of a value that was given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Support {
    /// It does what its help says.
    Full,
    /// Known from Unleash Edge; has no effect, and warns.
    Ignored,
    /// Known from Unleash Edge; starting without it would not be what was asked for.
    Refused,
}

/// Something to be given as one text.
const fn one(name: &'static str) -> Key {
    Key {
        name,
        short: None,
        env: None,
        shape: One,
        scope: Scope::Everywhere,
        heading: "",
        default: None,
        help: "",
        support: Support::Full,
        secret: false,
        file_of: None,
    }
}

/// Something to be given as several texts.
const fn list(name: &'static str) -> Key {
    Key { shape: List, ..one(name) }
}

/// Something to be turned on.
const fn switch(name: &'static str) -> Key {
    Key { shape: Switch, default: Some("false"), ..one(name) }
}

/// Something of Unleash Edge that warns; its text says why it has no effect.
const fn ignored(name: &'static str, shape: Shape) -> Key {
    Key { shape, support: Support::Ignored, secret: true, ..one(name) }
}

/// Something of Unleash Edge that prevents a start; its text says what to do instead.
const fn refused(name: &'static str, shape: Shape) -> Key {
    Key { shape, support: Support::Refused, secret: true, ..one(name) }
}

impl Key {
    const fn short(self, short: char) -> Self {
        Self { short: Some(short), ..self }
    }

    const fn env(self, env: &'static str) -> Self {
        Self { env: Some(env), ..self }
    }

    const fn default(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    const fn placed(self, scope: Scope, heading: &'static str, help: &'static str) -> Self {
        Self { scope, heading, help, ..self }
    }

    /// Whether its value may be in a file instead: true of every secret that is used.
    pub(super) fn has_file(&self) -> bool {
        self.secret && self.support == Support::Full
    }

    /// The key of the file that may hold the value of this one; made once, for `KEYS`.
    fn file_key(&'static self) -> Option<&'static Self> {
        if !self.has_file() {
            return None;
        }
        let text = |text: String| -> &'static str { text.leak() };
        let help = match self.shape {
            List => format!("A file that holds --{}, separated by commas or lines.", self.name),
            One | Switch => format!("A file that holds --{}.", self.name),
        };
        let file = Self {
            env: self.env.map(|env| text(format!("{env}_FILE"))),
            scope: self.scope,
            heading: self.heading,
            help: text(help),
            file_of: Some(self),
            ..one(text(format!("{}-file", self.name)))
        };
        Some(Box::leak(Box::new(file)))
    }

    /// What it means, or for a key of Unleash Edge what became of it; without a stop.
    pub(super) fn help(&self) -> &'static str {
        self.help.trim().trim_end_matches('.')
    }

    /// The name of the environment variable.
    pub(super) fn env_name(&self) -> String {
        self.env.map_or_else(|| self.name.replace('-', "_").to_ascii_uppercase(), str::to_owned)
    }

    /// The name in the file.
    pub(super) fn file_name(&self) -> String {
        self.name.replace('-', "_")
    }

    /// What `--help` says.
    pub(super) fn help_text(&self) -> StyledStr {
        let default = match (self.shape, self.default) {
            (Switch, _) | (_, None | Some("")) => String::new(),
            (_, Some(default)) => format!(" [default: {default}]"),
        };
        format!("{}{default} [env: {}]", self.help(), self.env_name()).into()
    }
}

/// The items of a list that is written as one text.
pub(super) fn split(text: &str) -> Vec<String> {
    split_at(text, &[','])
}

/// The items of a list in a file, separated by commas or lines.
pub(super) fn split_lines(text: &str) -> Vec<String> {
    split_at(text, &[',', '\n', '\r'])
}

fn split_at(text: &str, separators: &[char]) -> Vec<String> {
    text.split(separators)
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(str::to_owned)
        .collect()
}

macro_rules! keys {
    ($($scope:ident, $heading:literal: {
        $($(#[doc = $help:literal])+ $id:ident = $key:expr;)*
    })*) => {
        $($(
            $(#[doc = $help])+
            pub(super) static $id: Key =
                $key.placed(Scope::$scope, $heading, concat!($($help),+));
        )*)*

        /// The keys that are written here.
        static WRITTEN: &[&Key] = &[$($(&$id,)*)*];
    };
}

/// All keys, in the order of help and of `config/parapet.toml`: each that is written here, and behind
/// each secret the one of its file.
pub(super) static KEYS: LazyLock<Vec<&'static Key>> = LazyLock::new(|| {
    WRITTEN.iter().flat_map(|key| iter::once(*key).chain(key.file_key())).collect()
});

keys! {
    Everywhere, "Serving": {
        /// The port that SDKs talk to; 0 lets the system choose.
        PORT = one("port").short('p').default("3063");
        /// The IP address that SDKs talk to; `::` is every address, IPv4 too.
        INTERFACE = one("interface").short('i').default("::");
        /// What precedes every path of what SDKs ask, as in `/flags`.
        BASE_PATH = one("base-path").default("");
        /// The port for operators; 0 lets the system choose.
        ADMIN_PORT = one("admin-port").default("3064");
        /// The IP address for operators.
        ADMIN_INTERFACE = one("admin-interface").default("127.0.0.1");
        /// The header that carries tokens, from SDKs and to upstream.
        TOKEN_HEADER = one("token-header");
        /// The header that carries SDKs' tokens.
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
    Everywhere, "TLS": {
        /// Serve SDKs over TLS, on --tls-server-port alone; nothing listens on --port then, unless
        /// --redirect-http-to-https is given.
        TLS_ENABLE = switch("tls-enable");
        /// The file of the server's certificate chain (PEM), leaf first. Of several, one for each host
        /// name for instance, the first is the default.
        TLS_SERVER_CERT = list("tls-server-cert");
        /// The file of the certificate's private key (PEM: PKCS #8, PKCS #1 or SEC 1); as many as there are
        /// certificates, in the same order.
        TLS_SERVER_KEY = list("tls-server-key");
        /// The port that SDKs talk to over TLS; 0 lets the system choose.
        TLS_SERVER_PORT = one("tls-server-port").default("3043");
        /// With --tls-enable: answer requests on --port with a redirect (308) to the same host
        /// at --tls-server-port.
        REDIRECT_HTTP_TO_HTTPS = switch("redirect-http-to-https");
        /// The lowest version of TLS on either listener: 1.2 or 1.3.
        TLS_MIN_VERSION = one("tls-min-version").default("1.2");
        /// The authorities (PEM) whose client certificates are accepted; none are asked for when left out.
        TLS_CLIENT_CA_FILE = one("tls-client-ca-file");
        /// With --tls-client-ca-file: whether every client needs a certificate, `required`, or `optional`.
        TLS_CLIENT_AUTH = one("tls-client-auth").default("required");
        /// With --tls-client-ca-file: revocation lists (PEM) of all authorities that issue client
        /// certificates, intermediate ones too.
        TLS_CRL_FILE = one("tls-crl-file");
        /// The longest that a TLS handshake may take on either listener, in seconds.
        TLS_HANDSHAKE_TIMEOUT_SECONDS = one("tls-handshake-timeout-seconds").default("10");
        /// How many TLS handshakes each listener processes at once, so that many new connections leave
        /// processors to those that there are; half of the processors when left out.
        TLS_MAX_HANDSHAKES = one("tls-max-handshakes");
        /// The file of the certificate chain (PEM) of the admin listener, which then talks TLS; of several the
        /// first is the default.
        ADMIN_TLS_CERT = list("admin-tls-cert");
        /// The file of that certificate's private key (PEM); as many as there are certificates, in
        /// the same order.
        ADMIN_TLS_KEY = list("admin-tls-key");
        /// The authorities (PEM) whose client certificates the admin listener accepts.
        ADMIN_TLS_CLIENT_CA_FILE = one("admin-tls-client-ca-file");
        /// With --admin-tls-client-ca-file: whether every operator needs a certificate, `required`, or
        /// `optional`.
        ADMIN_TLS_CLIENT_AUTH = one("admin-tls-client-auth").default("required");
        /// With --admin-tls-client-ca-file: revocation lists (PEM) of all its authorities.
        ADMIN_TLS_CRL_FILE = one("admin-tls-crl-file");
    }
    Everywhere, "Streams": {
        /// Where SDKs that can do both are sent: `streaming` (those that poll) or `polling` (those
        /// that follow a stream); as they are set up themselves when left out.
        SDK_FETCH_MODE = one("sdk-fetch-mode");
        /// How many streams may be open at once; beyond it SDKs are told to poll (429).
        MAX_STREAMS = one("max-streams").default("10000");
        /// How many of them clients of one address may have, of IPv6 those of one network of 64 bits; half
        /// of --max-streams when left out. Behind a load balancer name it by --trust-proxy and
        /// --proxy-trusted-servers, else all clients are of its address.
        MAX_STREAMS_PER_ADDRESS = one("max-streams-per-address");
        /// How many of them the bearers of one token may have; three quarters of --max-streams when left
        /// out.
        MAX_STREAMS_PER_TOKEN = one("max-streams-per-token");
        /// About how long a stream lasts before its client has to open another, in seconds.
        STREAM_MAX_AGE_SECONDS = one("stream-max-age-seconds").default("3600");
        /// What instances behind one address have in common, so that each takes the addresses of event
        /// streams that another told to OpenFeature's providers; by default the upstream admin
        /// token, else a secret of this run's own.
        OFREP_TICKET_SECRET = one("ofrep-ticket-secret").secret();
    }
    Everywhere, "Browsers": {
        /// Origins that may read; `*` is any.
        CORS_ORIGIN = list("cors-origin").default("*");
        /// Methods that other origins may use; `*` is any.
        CORS_METHODS = list("cors-methods").default("*");
        /// Request headers that other origins may send; `*` is any.
        CORS_ALLOWED_HEADERS = list("cors-allowed-headers").default("*");
        /// Response headers that other origins may read; `*` is any.
        CORS_EXPOSED_HEADERS = list("cors-exposed-headers").default("*");
        /// Let other origins send cookies; needs --cors-origin.
        CORS_CREDENTIALS = switch("cors-credentials");
        /// How many seconds a browser may remember these rules.
        CORS_MAX_AGE = one("cors-max-age").default("172800");
    }
    Everywhere, "Access": {
        /// Networks (CIDR) or addresses that alone are served, on both listeners, health, metrics and the
        /// console included; empty is all.
        ALLOW_LIST = list("allow-list");
        /// Networks (CIDR) or addresses that are never served.
        DENY_LIST = list("deny-list");
        /// Trust X-Forwarded-For, else Forwarded, of the proxies in --proxy-trusted-servers. Without that
        /// list the header of any client sets the address that flags see; lists, throttles and the
        /// audit log use the address of the connection.
        TRUST_PROXY = switch("trust-proxy");
        /// Networks (CIDR) or addresses of the proxies whose word on the client's address is believed. With
        /// --trust-proxy that is X-Forwarded-For, else Forwarded; one that sets Forwarded alone has to
        /// remove the client's X-Forwarded-For.
        PROXY_TRUSTED_SERVERS = list("proxy-trusted-servers");
        /// With --proxy-trusted-servers: the load balancers among those pass connections through, and say
        /// whose they are by the PROXY protocol, version 1 or 2. Connections from elsewhere begin as
        /// they do without.
        PROXY_PROTOCOL = switch("proxy-protocol");
        /// The same for the admin listener.
        ADMIN_PROXY_PROTOCOL = switch("admin-proxy-protocol");
    }
    Everywhere, "Limits": {
        /// The largest request body.
        BODY_LIMIT_BYTES = one("body-limit-bytes").default("2097152");
        /// How many connections may be open at once, on each listener.
        MAX_CONNECTIONS = one("max-connections").default("20000");
        /// How many of them clients of one address may have; half of --max-connections when left out, and as
        /// many as there are with --trust-proxy, where the address is the proxy's.
        MAX_CONNECTIONS_PER_ADDRESS = one("max-connections-per-address");
        /// The longest that a client may take to send a request's head, from its first byte.
        HEADER_READ_TIMEOUT_SECONDS = one("header-read-timeout-seconds").default("15");
        /// How long a connection is kept at least on which nothing is under way, in seconds; up to a
        /// quarter longer. Longer than clients and load balancers keep theirs, so that none is closed
        /// while they write.
        EDGE_KEEPALIVE_TIMEOUT = one("edge-keepalive-timeout").default("80");
        /// About how long a connection is used before its client is told to open another, in seconds,
        /// so that clients spread over new instances; for ever when left out.
        MAX_CONNECTION_AGE_SECONDS = one("max-connection-age-seconds");
        /// The longest that one request may take, in seconds, from its head until its answer is
        /// ready.
        EDGE_REQUEST_TIMEOUT = one("edge-request-timeout").default("10");
        /// How many valid tokens, and apart from them how many invalid ones, are remembered.
        TOKEN_CACHE_CAPACITY = one("token-cache-capacity").default("100000");
        /// How long a token that was found invalid is refused without asking again.
        INVALID_TOKEN_TTL_SECONDS = one("invalid-token-ttl-seconds").default("30");
        /// How many distinct usage counters are held, for all tokens, before they are merged harder; a
        /// 32nd part of that besides for flags that the reporting token does not see.
        USAGE_MAX_COUNTERS = one("usage-max-counters").default("100000");
    }
    Everywhere, "Running": {
        /// The configuration file (TOML); config/parapet.toml where that exists.
        CONFIG = one("config").env("PARAPET_CONFIG");
        /// Where state is kept between runs.
        DATA_DIR = one("data-dir").default("data");
        /// The form of log lines: plain, json or pretty.
        LOG_FORMAT = one("log-format").short('l').default("plain");
        /// What is logged: a level, or levels by target as in `info,parapet=debug`.
        LOG = one("log").env("RUST_LOG").default("info");
        /// The name under which upstream knows all instances.
        APP_NAME = one("app-name").short('a').default("parapet");
        /// The name of this instance; a new one at each start when not given.
        INSTANCE_ID = one("instance-id");
        /// Who runs this instance: self-hosted, hosted or enterprise-self-hosted.
        HOSTING = one("hosting").env("EDGE_HOSTING").default("self-hosted");
        /// The region that this instance reports.
        AWS_REGION = one("aws-region");
        /// How long after SIGTERM requests are still accepted, while readiness is withdrawn and every
        /// answer tells its client to leave; SIGINT leaves this out, and a second signal ends it early.
        DRAIN_DELAY_SECONDS = one("drain-delay-seconds").default("5");
        /// The longest that requests under way and the last usage may take at the end.
        SHUTDOWN_TIMEOUT_SECONDS = one("shutdown-timeout-seconds").default("10");
    }
    Serving, "Usage": {
        /// How often usage is sent, or stored where it is kept.
        METRICS_INTERVAL_SECONDS = one("metrics-interval-seconds").short('m').default("60");
    }
    Edge, "Upstream": {
        /// The address of the Unleash server, without /api; required.
        UPSTREAM_URL = one("upstream-url").short('u');
        /// An admin token of upstream (`*:*.…`); exchanged for one backend token per environment.
        UPSTREAM_ADMIN_TOKEN = one("upstream-admin-token").secret();
        /// With an admin token: the environments to serve; empty is all that upstream has enabled.
        ENVIRONMENTS = list("environments");
        /// With an admin token: the name that instances share, so that they share backend tokens.
        FLEET_NAME = one("fleet-name").default("default");
        /// Without an admin token: backend tokens to fetch flags with from the start.
        TOKENS = list("tokens").short('t').secret();
        /// How flags come from upstream: `auto` (its stream is followed where it offers one, else it is
        /// polled), `poll`, or `stream` (expected: a warning is logged when it is not offered).
        UPSTREAM_MODE = one("upstream-mode").default("auto");
        /// How often flags are fetched while no stream tells of changes.
        FEATURES_REFRESH_INTERVAL_SECONDS =
            one("features-refresh-interval-seconds").short('f').default("15");
        /// How old a valid verdict on a token may become.
        TOKEN_REVALIDATION_INTERVAL_SECONDS =
            one("token-revalidation-interval-seconds").default("3600");
        /// With an admin token: how often upstream's list of tokens is read; a revoked token is
        /// refused within it.
        TOKEN_LIST_INTERVAL_SECONDS = one("token-list-interval-seconds").default("15");
        /// The longest that a request to upstream may take, in seconds.
        UPSTREAM_REQUEST_TIMEOUT = one("upstream-request-timeout").default("5");
        /// The longest that connecting to upstream may take, in seconds.
        UPSTREAM_SOCKET_TIMEOUT = one("upstream-socket-timeout").default("5");
        /// How long an idle connection to upstream is kept, in seconds.
        CLIENT_KEEPALIVE_TIMEOUT = one("client-keepalive-timeout").default("15");
        /// Certificates (PEM) to trust besides the platform's.
        UPSTREAM_CERTIFICATE_FILE = one("upstream-certificate-file");
        /// This edge's own certificate chain (PEM), leaf first.
        PKCS8_CLIENT_CERTIFICATE_FILE = one("pkcs8-client-certificate-file");
        /// The key (PEM) of that certificate.
        PKCS8_CLIENT_KEY_FILE = one("pkcs8-client-key-file");
        /// Instead of these two files: one with certificate and key (PKCS #12: .p12, .pfx).
        PKCS12_IDENTITY_FILE = one("pkcs12-identity-file");
        /// The passphrase of --pkcs12-identity-file.
        PKCS12_PASSPHRASE = one("pkcs12-passphrase").secret();
        /// Instead of these files: one with certificate and key (PEM).
        PEM_CERT_FILE = one("pem-cert-file");
        /// Accept any certificate of upstream; for tests only.
        SKIP_SSL_VERIFICATION = switch("skip-ssl-verification").short('s');
        /// Headers for every request to upstream, as in `X-Api-Key: secret`.
        CUSTOM_CLIENT_HEADERS = list("custom-client-headers").short('H').secret();
        /// Where flags and digests of tokens are kept for a start without upstream; `backup` in the
        /// data dir when not given. A place that is given, by this or --data-dir, must be writable.
        BACKUP_FOLDER = one("backup-folder").short('b');
        /// Pass the admin API and the sign-in of upstream on at the admin listener, with the console:
        /// callers use their own tokens and accounts of upstream.
        ADMIN_RELAY = switch("admin-relay");
    }
    Offline, "Offline": {
        /// The file of flags; required.
        BOOTSTRAP_FILE = one("bootstrap-file").short('b');
        /// Tokens that may read flag configuration.
        CLIENT_TOKENS = list("client-tokens").short('c').secret();
        /// Tokens that may read evaluated flags.
        FRONTEND_TOKENS = list("frontend-tokens").short('f').secret();
        /// How often, in seconds, the file is read again although nothing told of a change; 0 is
        /// never.
        RELOAD_INTERVAL = one("reload-interval").short('r').default("0");
    }
    Local, "Without upstream": {
        /// Admin tokens, for the admin listener: those of offline mode; in standalone mode those
        /// that the first start creates.
        INIT_ADMIN_API_TOKENS = list("init-admin-api-tokens").secret();
    }
    Standalone, "Standalone": {
        /// The file of flags, or the folder of such files. Where neither this is given nor the default is
        /// there, the first start writes an example.
        FLAGS = one("flags").env("PARAPET_FLAGS").default("config/flags.json");
        /// Backend tokens that the first start creates.
        INIT_BACKEND_API_TOKENS = list("init-backend-api-tokens").secret();
        /// The older name of --init-backend-api-tokens.
        INIT_CLIENT_API_TOKENS = list("init-client-api-tokens").secret();
        /// Frontend tokens that the first start creates.
        INIT_FRONTEND_API_TOKENS = list("init-frontend-api-tokens").secret();
        /// The environments that one file of flags serves, besides those that tokens name when the
        /// server starts.
        FLAG_ENVIRONMENTS = list("flag-environments").default("development");
        /// Where accounts and tokens are kept: postgres://… for instances that share them, perhaps
        /// with several hosts separated by commas; parapet.db in the data dir when not given.
        DATABASE_URL = one("database-url").secret();
        /// The account that the first start creates.
        UNLEASH_DEFAULT_ADMIN_USERNAME = one("unleash-default-admin-username").default("admin");
        /// Its password, of at least 10 characters; generated and printed once when not given.
        UNLEASH_DEFAULT_ADMIN_PASSWORD = one("unleash-default-admin-password").secret();
        /// How many API tokens there may be.
        UNLEASH_API_TOKENS_LIMIT = one("unleash-api-tokens-limit").default("2000");
        /// How many accounts there may be.
        ACCOUNTS_LIMIT = one("accounts-limit").default("1000");
        /// After how many seconds without a request a session ends.
        SESSION_IDLE_SECONDS = one("session-idle-seconds").default("28800");
        /// After how many seconds a session ends at any rate.
        SESSION_LIFETIME_SECONDS = one("session-lifetime-seconds").default("604800");
        /// How many seconds the audit log is kept; 0 is for ever.
        AUDIT_RETENTION_SECONDS = one("audit-retention-seconds").default("0");
        /// How many seconds usage is kept.
        USAGE_RETENTION_SECONDS = one("usage-retention-seconds").default("2592000");
    }
    Probe, "Probe": {
        /// The instance to ask. When not given, the one that listens with the same settings on this machine, over TLS
        /// where it does so; its certificate is verified by --ca-certificate-file only, whatever name it is for.
        EDGE_URL = one("edge-url").short('e');
        /// A certificate authority (PEM) to trust besides the platform's.
        CA_CERTIFICATE_FILE = one("ca-certificate-file").short('c');
    }
    // Known from Unleash Edge, accepted so that old deployments start and learn what changed.
    Everywhere, "Without effect": {
        /// as many threads run as there are processors.
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
        /// changes come by upstream's stream where it offers one (--upstream-mode), else flags are
        /// fetched whole, and only when they changed.
        DELTA = ignored("delta", Switch);
        /// flags are fetched whole.
        DELTA_DIFF = ignored("delta-diff", Switch);
        /// upstream's stream is followed where it offers one (--upstream-mode).
        STREAMING = ignored("streaming", Switch);
        /// consumption is not billed.
        CONSUMPTION = ignored("consumption", Switch);
        /// projects are those of the tokens.
        DESIRED_PROJECTS = ignored("desired-projects", List);
        /// a start never waits for upstream's verdict on tokens.
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
        /// use --backup-folder on a volume that outlives the instance.
        REDIS_URL = refused("redis-url", List);
        /// use --backup-folder on a volume that outlives the instance.
        REDIS_HOST = refused("redis-host", One);
        /// Redis is not used.
        REDIS_MODE = ignored("redis-mode", One);
        /// Redis is not used.
        REDIS_PORT = ignored("redis-port", One);
        /// Redis is not used.
        REDIS_USERNAME = ignored("redis-username", One);
        /// Redis is not used.
        REDIS_PASSWORD = ignored("redis-password", One);
        /// Redis is not used.
        REDIS_SECURE = ignored("redis-secure", Switch);
        /// Redis is not used.
        REDIS_SCHEME = ignored("redis-scheme", One);
        /// Redis is not used.
        REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS =
            ignored("redis-read-connection-timeout-milliseconds", One);
        /// Redis is not used.
        REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS =
            ignored("redis-write-connection-timeout-milliseconds", One);
        /// use --backup-folder on a volume that outlives the instance.
        S3_BUCKET_NAME = refused("s3-bucket-name", One);
        /// let Prometheus scrape /internal-backstage/metrics.
        PROMETHEUS_REMOTE_WRITE_URL = refused("prometheus-remote-write-url", One);
        /// create the tokens in upstream, or run `offline` with --frontend-tokens.
        PRETRUSTED_TOKENS = refused("pretrusted-tokens", List);
        /// use --upstream-admin-token or --tokens.
        UNLEASH_CLIENT_SECRET = refused("unleash-client-secret", One);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_keys_share_a_name_nor_a_letter_within_a_command() {
        let names: HashSet<_> = KEYS.iter().map(|key| key.name).collect();
        let variables: HashSet<_> = KEYS.iter().map(|key| key.env_name()).collect();
        assert_eq!((names.len(), variables.len()), (KEYS.len(), KEYS.len()));
        for scope in [Scope::Edge, Scope::Offline, Scope::Standalone, Scope::Probe] {
            let mut letters = HashSet::from(['h', 'V']);
            for key in KEYS.iter().filter(|key| key.scope.concerns(scope)) {
                assert!(key.short.is_none_or(|letter| letters.insert(letter)), "{}", key.name);
            }
        }
    }
}
