//! The one list of everything that can be set.
//!
//! Flags, environment variables, keys of the file, defaults, help and the printed configuration
//! all derive from it. Names, meanings and defaults are Unleash Edge's where it has the option
//! (`docs/CLI.md` of v20). What a value must look like is `check`'s business.

use clap::builder::StyledStr;

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
    /// The default as one would write it; where it is computed, `None`, and `help` tells it.
    pub(super) default: Option<&'static str>,
    pub(super) help: &'static str,
    pub(super) support: Support,
    /// Its value is neither printed nor repeated, whatever is wrong with it.
    pub(super) secret: bool,
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
    /// `health` and `ready`.
    Probe,
}

/// What becomes of a value that was given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Support {
    /// It does what its help says.
    Full,
    /// Known from Unleash Edge; has no effect, for the stated reason, and warns.
    Ignored(&'static str),
    /// Known from Unleash Edge; starting without it would not be what was asked for.
    Refused(&'static str),
}

impl Key {
    const fn new(name: &'static str, shape: Shape, help: &'static str) -> Self {
        Self {
            name,
            short: None,
            env: None,
            shape,
            scope: Scope::Everywhere,
            heading: "",
            default: None,
            help,
            support: Support::Full,
            secret: false,
        }
    }

    const fn one(name: &'static str, help: &'static str) -> Self {
        Self::new(name, Shape::One, help)
    }

    const fn list(name: &'static str, help: &'static str) -> Self {
        Self::new(name, Shape::List, help)
    }

    const fn switch(name: &'static str, help: &'static str) -> Self {
        Self::new(name, Shape::Switch, help).default("false")
    }

    const fn ignored(name: &'static str, shape: Shape, why: &'static str) -> Self {
        Self { support: Support::Ignored(why), ..Self::new(name, shape, why) }
    }

    const fn refused(name: &'static str, shape: Shape, instead: &'static str) -> Self {
        Self { support: Support::Refused(instead), secret: true, ..Self::new(name, shape, instead) }
    }

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

    const fn under(self, scope: Scope, heading: &'static str) -> Self {
        Self { scope, heading, ..self }
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
            (Shape::Switch, _) | (_, None | Some("")) => String::new(),
            (_, Some(default)) => format!(" [default: {default}]"),
        };
        format!("{}{default} [env: {}]", self.help, self.env_name()).into()
    }
}

/// The items of a list that is written as one text.
pub(super) fn split(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

macro_rules! keys {
    ($($scope:ident, $heading:literal: { $($id:ident = $key:expr;)* })*) => {
        $($(pub(super) static $id: Key = $key.under(Scope::$scope, $heading);)*)*

        /// All keys, in the order of help and of `config/parapet.toml`.
        pub(super) static KEYS: &[&Key] = &[$($(&$id,)*)*];
    };
}

keys! {
    Everywhere, "Serving": {
        PORT = Key::one("port", "The port that SDKs talk to; 0 lets the system choose")
            .short('p').default("3063");
        INTERFACE = Key::one("interface", "The IP address that SDKs talk to; `::` is every address, IPv4 too")
            .short('i').default("::");
        BASE_PATH = Key::one("base-path", "What precedes every path, as in `/flags`").default("");
        ADMIN_PORT = Key::one("admin-port", "The port for operators; 0 lets the system choose").default("3064");
        ADMIN_INTERFACE = Key::one("admin-interface", "The IP address for operators").default("127.0.0.1");
        TOKEN_HEADER = Key::one("token-header", "The header that carries tokens, from SDKs and to upstream");
        EDGE_AUTH_HEADER = Key::one("edge-auth-header", "The header that carries SDKs' tokens")
            .default("authorization");
        UPSTREAM_AUTH_HEADER = Key::one("upstream-auth-header", "The header that carries tokens to upstream")
            .default("authorization");
        DISABLE_ALL_ENDPOINT = Key::switch("disable-all-endpoint", "Do not serve /api/frontend/all and /api/proxy/all");
        DISABLE_METRICS_ENDPOINT = Key::switch("disable-metrics-endpoint", "Do not serve /internal-backstage/metrics");
        DISABLE_METRICS_BATCH_ENDPOINT = Key::switch("disable-metrics-batch-endpoint", "Do not serve /internal-backstage/metricsbatch");
        DISABLE_FEATURES_ENDPOINT = Key::switch("disable-features-endpoint", "Do not serve /internal-backstage/features");
        DISABLE_TOKENS_ENDPOINT = Key::switch("disable-tokens-endpoint", "Do not serve /internal-backstage/tokens");
        DISABLE_INSTANCE_DATA_ENDPOINT = Key::switch("disable-instance-data-endpoint", "Do not serve /internal-backstage/instancedata");
    }
    Everywhere, "Browsers": {
        CORS_ORIGIN = Key::list("cors-origin", "Origins that may read; `*` is any").default("*");
        CORS_METHODS = Key::list("cors-methods", "Methods that other origins may use; `*` is any").default("*");
        CORS_ALLOWED_HEADERS = Key::list("cors-allowed-headers", "Request headers that other origins may send; `*` is any").default("*");
        CORS_EXPOSED_HEADERS = Key::list("cors-exposed-headers", "Response headers that other origins may read; `*` is any").default("*");
        CORS_CREDENTIALS = Key::switch("cors-credentials", "Let other origins send cookies; needs --cors-origin");
        CORS_MAX_AGE = Key::one("cors-max-age", "How many seconds a browser may remember these rules").default("172800");
    }
    Everywhere, "Access": {
        ALLOW_LIST = Key::list("allow-list", "Networks (CIDR) or addresses that alone are served; empty is all");
        DENY_LIST = Key::list("deny-list", "Networks (CIDR) or addresses that are never served");
        TRUST_PROXY = Key::switch("trust-proxy", "Believe Forwarded and X-Forwarded-For, whoever sends them");
        PROXY_TRUSTED_SERVERS = Key::list("proxy-trusted-servers", "Networks (CIDR) or addresses of the proxies whose word on the client's address is believed");
    }
    Everywhere, "Limits": {
        BODY_LIMIT_BYTES = Key::one("body-limit-bytes", "The largest request body").default("2097152");
        MAX_CONNECTIONS = Key::one("max-connections", "How many connections may be open at once").default("20000");
        HEADER_READ_TIMEOUT_SECONDS = Key::one("header-read-timeout-seconds", "The longest that a client may take to send a request's head").default("15");
        EDGE_REQUEST_TIMEOUT = Key::one("edge-request-timeout", "The longest that one request may take, in seconds; streams excepted").default("10");
        TOKEN_CACHE_CAPACITY = Key::one("token-cache-capacity", "How many valid tokens, and apart from them how many invalid ones, are remembered").default("100000");
        INVALID_TOKEN_TTL_SECONDS = Key::one("invalid-token-ttl-seconds", "How long a token that was found invalid is refused without asking again").default("30");
        USAGE_MAX_COUNTERS = Key::one("usage-max-counters", "How many distinct usage counters are held before they are merged harder").default("100000");
    }
    Everywhere, "Running": {
        CONFIG = Key::one("config", "The configuration file (TOML); config/parapet.toml where that exists").env("PARAPET_CONFIG");
        DATA_DIR = Key::one("data-dir", "Where state is kept between runs").default("data");
        LOG_FORMAT = Key::one("log-format", "The form of log lines: plain, json or pretty").short('l').default("plain");
        LOG = Key::one("log", "What is logged: a level, or levels by target as in `info,parapet=debug`").env("RUST_LOG").default("info");
        APP_NAME = Key::one("app-name", "The name under which upstream knows all instances").short('a').default("parapet");
        INSTANCE_ID = Key::one("instance-id", "The name of this instance; a new one at each start when not given");
        HOSTING = Key::one("hosting", "Who runs this instance: self-hosted, hosted or enterprise-self-hosted").default("self-hosted");
        AWS_REGION = Key::one("aws-region", "The region that this instance reports");
        DRAIN_DELAY_SECONDS = Key::one("drain-delay-seconds", "How long requests are still accepted after readiness was withdrawn").default("0");
        SHUTDOWN_TIMEOUT_SECONDS = Key::one("shutdown-timeout-seconds", "The longest that requests under way and the last usage may take at the end").default("10");
    }
    Edge, "Upstream": {
        UPSTREAM_URL = Key::one("upstream-url", "The address of the Unleash server, without /api; required").short('u');
        UPSTREAM_ADMIN_TOKEN = Key::one("upstream-admin-token", "An admin token of upstream; exchanged for one backend token per environment").secret();
        UPSTREAM_ADMIN_TOKEN_FILE = Key::one("upstream-admin-token-file", "A file that holds the admin token");
        ENVIRONMENTS = Key::list("environments", "With an admin token: the environments to serve; empty is all that upstream has enabled");
        FLEET_NAME = Key::one("fleet-name", "With an admin token: the name that instances share, so that they share backend tokens").default("default");
        TOKENS = Key::list("tokens", "Without an admin token: backend tokens to fetch flags with from the start").short('t').secret();
        FEATURES_REFRESH_INTERVAL_SECONDS = Key::one("features-refresh-interval-seconds", "How often flags are fetched").short('f').default("15");
        METRICS_INTERVAL_SECONDS = Key::one("metrics-interval-seconds", "How often usage is sent").short('m').default("60");
        TOKEN_REVALIDATION_INTERVAL_SECONDS = Key::one("token-revalidation-interval-seconds", "How old a valid verdict on a token may become").default("3600");
        TOKEN_LIST_INTERVAL_SECONDS = Key::one("token-list-interval-seconds", "With an admin token: how often upstream's list of tokens is read; a revoked token is refused within it").default("15");
        UPSTREAM_REQUEST_TIMEOUT = Key::one("upstream-request-timeout", "The longest that a request to upstream may take, in seconds").default("5");
        UPSTREAM_SOCKET_TIMEOUT = Key::one("upstream-socket-timeout", "The longest that connecting to upstream may take, in seconds").default("5");
        CLIENT_KEEPALIVE_TIMEOUT = Key::one("client-keepalive-timeout", "How long an idle connection to upstream is kept, in seconds").default("15");
        UPSTREAM_CERTIFICATE_FILE = Key::one("upstream-certificate-file", "Certificates (PEM) to trust besides the platform's");
        PKCS8_CLIENT_CERTIFICATE_FILE = Key::one("pkcs8-client-certificate-file", "This edge's own certificate chain (PEM), leaf first");
        PKCS8_CLIENT_KEY_FILE = Key::one("pkcs8-client-key-file", "The key (PEM, PKCS #8) of that certificate");
        SKIP_SSL_VERIFICATION = Key::switch("skip-ssl-verification", "Accept any certificate of upstream; for tests only").short('s');
        CUSTOM_CLIENT_HEADERS = Key::list("custom-client-headers", "Headers for every request to upstream, as in `X-Api-Key: secret`").short('H').secret();
        BACKUP_FOLDER = Key::one("backup-folder", "Where flags and digests of tokens are kept for a start without upstream; `backup` in the data dir when not given").short('b');
    }
    Offline, "Offline": {
        BOOTSTRAP_FILE = Key::one("bootstrap-file", "The file of flags; required").short('b');
        CLIENT_TOKENS = Key::list("client-tokens", "Tokens that may read flag configuration").short('c').secret();
        FRONTEND_TOKENS = Key::list("frontend-tokens", "Tokens that may read evaluated flags").short('f').secret();
        RELOAD_INTERVAL = Key::one("reload-interval", "How often, in seconds, the file is read again although nothing told of a change; 0 is never").short('r').default("0");
    }
    Standalone, "Standalone": {
        FLAGS = Key::one("flags", "The file of flags, or the folder of such files").env("PARAPET_FLAGS").default("config/flags.json");
        INIT_ADMIN_API_TOKENS = Key::list("init-admin-api-tokens", "Admin tokens that the first start creates").secret();
        INIT_BACKEND_API_TOKENS = Key::list("init-backend-api-tokens", "Backend tokens that the first start creates").secret();
        INIT_CLIENT_API_TOKENS = Key::list("init-client-api-tokens", "The older name of --init-backend-api-tokens").secret();
        INIT_FRONTEND_API_TOKENS = Key::list("init-frontend-api-tokens", "Frontend tokens that the first start creates").secret();
    }
    Probe, "Probe": {
        EDGE_URL = Key::one("edge-url", "The instance to ask; localhost and --port when not given").short('e');
        CA_CERTIFICATE_FILE = Key::one("ca-certificate-file", "A certificate authority (PEM) to trust besides the platform's").short('c');
    }
    // Known from Unleash Edge, accepted so that old deployments start and learn what changed.
    Everywhere, "Without effect": {
        WORKERS = Key::ignored("workers", Shape::One, "as many threads run as there are processors").short('w');
        EDGE_KEEPALIVE_TIMEOUT = Key::ignored("edge-keepalive-timeout", Shape::One, "idle connections end by --header-read-timeout-seconds");
        SENTRY_DSN = Key::ignored("sentry-dsn", Shape::One, "nothing is sent to Sentry; errors are logged").secret();
        SENTRY_TRACING_RATE = Key::ignored("sentry-tracing-rate", Shape::One, "nothing is sent to Sentry");
        SENTRY_DEBUG = Key::ignored("sentry-debug", Shape::Switch, "nothing is sent to Sentry");
        SENTRY_ENABLE_LOGS = Key::ignored("sentry-enable-logs", Shape::Switch, "nothing is sent to Sentry");
        DATADOG_URL = Key::ignored("datadog-url", Shape::One, "let Datadog scrape /internal-backstage/metrics").secret();
        OTEL_COLLECTOR_URL = Key::ignored("otel-collector-url", Shape::One, "traces are not exported yet").secret();
    }
    Edge, "Without effect": {
        STRICT = Key::ignored("strict", Shape::Switch, "every token that upstream finds valid is served");
        DYNAMIC = Key::ignored("dynamic", Shape::Switch, "every token that upstream finds valid is served");
        DELTA = Key::ignored("delta", Shape::Switch, "flags are fetched whole, and only when they changed");
        DELTA_DIFF = Key::ignored("delta-diff", Shape::Switch, "flags are fetched whole");
        STREAMING = Key::ignored("streaming", Shape::Switch, "upstream is polled by --features-refresh-interval-seconds");
        CONSUMPTION = Key::ignored("consumption", Shape::Switch, "consumption is not billed");
        DESIRED_PROJECTS = Key::ignored("desired-projects", Shape::List, "projects are those of the tokens");
        EDGE_DEFER_TOKEN_VALIDATION = Key::ignored("edge-defer-token-validation", Shape::Switch, "a start never waits for upstream's verdict on tokens");
        PROMETHEUS_PUSH_INTERVAL = Key::ignored("prometheus-push-interval", Shape::One, "metrics are scraped, not pushed");
        PROMETHEUS_USERNAME = Key::ignored("prometheus-username", Shape::One, "metrics are scraped, not pushed").secret();
        PROMETHEUS_PASSWORD = Key::ignored("prometheus-password", Shape::One, "metrics are scraped, not pushed").secret();
        PROMETHEUS_USER_ID = Key::ignored("prometheus-user-id", Shape::One, "metrics are scraped, not pushed").secret();
    }
    Everywhere, "Not supported": {
        TLS_ENABLE = Key::refused("tls-enable", Shape::Switch, "let a reverse proxy in front end TLS");
        TLS_SERVER_KEY = Key::ignored("tls-server-key", Shape::One, "let a reverse proxy in front end TLS");
        TLS_SERVER_CERT = Key::ignored("tls-server-cert", Shape::One, "let a reverse proxy in front end TLS");
        TLS_SERVER_PORT = Key::ignored("tls-server-port", Shape::One, "let a reverse proxy in front end TLS");
        REDIRECT_HTTP_TO_HTTPS = Key::refused("redirect-http-to-https", Shape::Switch, "let a reverse proxy in front redirect");
    }
    Edge, "Not supported": {
        REDIS_URL = Key::refused("redis-url", Shape::List, "use --backup-folder on a volume that outlives the instance");
        REDIS_HOST = Key::refused("redis-host", Shape::One, "use --backup-folder on a volume that outlives the instance");
        REDIS_MODE = Key::ignored("redis-mode", Shape::One, "Redis is not used");
        REDIS_PORT = Key::ignored("redis-port", Shape::One, "Redis is not used");
        REDIS_USERNAME = Key::ignored("redis-username", Shape::One, "Redis is not used").secret();
        REDIS_PASSWORD = Key::ignored("redis-password", Shape::One, "Redis is not used").secret();
        REDIS_SECURE = Key::ignored("redis-secure", Shape::Switch, "Redis is not used");
        REDIS_SCHEME = Key::ignored("redis-scheme", Shape::One, "Redis is not used");
        REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS = Key::ignored("redis-read-connection-timeout-milliseconds", Shape::One, "Redis is not used");
        REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS = Key::ignored("redis-write-connection-timeout-milliseconds", Shape::One, "Redis is not used");
        S3_BUCKET_NAME = Key::refused("s3-bucket-name", Shape::One, "use --backup-folder on a volume that outlives the instance");
        PROMETHEUS_REMOTE_WRITE_URL = Key::refused("prometheus-remote-write-url", Shape::One, "let Prometheus scrape /internal-backstage/metrics");
        PKCS12_IDENTITY_FILE = Key::refused("pkcs12-identity-file", Shape::One, "convert it: --pkcs8-client-certificate-file and --pkcs8-client-key-file");
        PKCS12_PASSPHRASE = Key::ignored("pkcs12-passphrase", Shape::One, "PKCS #12 files are not read").secret();
        PEM_CERT_FILE = Key::refused("pem-cert-file", Shape::One, "use --pkcs8-client-certificate-file and --pkcs8-client-key-file");
        PRETRUSTED_TOKENS = Key::refused("pretrusted-tokens", Shape::List, "create the tokens in upstream, or run `offline` with --frontend-tokens");
        UNLEASH_CLIENT_SECRET = Key::refused("unleash-client-secret", Shape::One, "use --upstream-admin-token or --tokens");
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
            for key in KEYS.iter().filter(|key| [scope, Scope::Everywhere].contains(&key.scope)) {
                assert!(key.short.is_none_or(|letter| letters.insert(letter)), "{}", key.name);
            }
        }
    }
}
