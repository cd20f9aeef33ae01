//! Turns raw values into a [`Config`], or into a list of all errors.

use std::{
    collections::BTreeSet,
    mem::take,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use reqwest::{
    Url,
    header::{HeaderName, HeaderValue},
};

use super::{
    backup::BackupCommand,
    cli::{Probe, ServeMode, Subcommand},
    error::ConfigErrors,
    manage::{ManageCommand, RemoteServer},
    model::{
        AdminListenerConfig, BackupFolder, BackupOptions, Config, Credentials, DataListenerConfig,
        EdgeConfig, FlagsPath, InstanceInfo, ManageOptions, Mode, OfflineConfig, ProbeOptions,
        ProbeTrust, ShutdownConfig, StandaloneConfig, Target,
    },
    options::{self, OptionSpec},
    raw::RawSettings,
    tls::{self, EXPECTED_PEM_PATH, parse_file_path},
};
use crate::{
    auth,
    control_plane::{self, DatabaseLocation, DatabaseUrl, InitialAccount, InitialTokens, Password},
    http::{
        client_address, cors,
        ofrep::StreamTicketKey,
        routes::OptionalEndpoint,
        server::ConnectionLimits,
        streaming::{self, FetchMode},
    },
    sync,
    telemetry::{self, error_chain},
    token::{Environment, Token},
    upstream::{self, AdminToken, IdentityError, Passphrase},
    usage,
};

const EXPECTED_LOG_FILTER: &str =
    "a level (off, error, warn, info, debug or trace), or levels by target as in `info,hyper=warn`";

/// Validates the settings of a command that serves.
pub(super) fn config(s: &mut RawSettings, role: ServeMode) -> Result<Config, ConfigErrors> {
    s.read_secret_files(|_| true);
    let identity = parse_instance_info(s);
    let data_dir = path(s, &options::DATA_DIR);
    let mode = match role {
        ServeMode::Edge => edge(s, &identity, &data_dir).map(Box::new).map(Mode::Edge),
        ServeMode::Offline => offline(s).map(Mode::Offline),
        ServeMode::Standalone => standalone(s, &data_dir).map(Mode::Standalone),
    };
    let (data, admin) = listeners(s);
    let auth = auth::Config {
        revalidate_after: s.interval(&options::TOKEN_REVALIDATION_INTERVAL_SECONDS),
        forget_invalid_after: s.interval(&options::INVALID_TOKEN_TTL_SECONDS),
        list_interval: s.interval(&options::TOKEN_LIST_INTERVAL_SECONDS),
        deadline: s.interval(&options::UPSTREAM_REQUEST_TIMEOUT),
        capacity: s.count(&options::TOKEN_CACHE_CAPACITY) as u64,
    };
    let usage = usage::Config {
        interval: s.interval(&options::METRICS_INTERVAL_SECONDS),
        max_counters: s.count(&options::USAGE_MAX_COUNTERS),
    };
    let log = telemetry::Config {
        format: s.parse_or_default(
            &options::LOG_FORMAT,
            "plain, json or pretty",
            telemetry::LogFormat::parse,
        ),
        filter: s.parse_or_default(
            &options::LOG,
            EXPECTED_LOG_FILTER,
            telemetry::Config::parse_filter,
        ),
    };
    let shutdown = ShutdownConfig {
        drain_delay: s.delay(&options::DRAIN_DELAY_SECONDS),
        timeout: s.interval(&options::SHUTDOWN_TIMEOUT_SECONDS),
    };
    ConfigErrors::check_empty(take(&mut s.errors))?;
    let mode = mode.expect("an invalid mode is an error");
    let (warnings, effective_settings) = (take(&mut s.warnings), s.effective());
    Ok(Config {
        mode,
        data,
        admin,
        auth,
        usage,
        log,
        data_dir,
        shutdown,
        identity,
        warnings,
        effective_settings,
    })
}

/// Validates the settings of `health` and `ready`.
pub(super) fn probe(s: &mut RawSettings, question: Probe) -> Result<ProbeOptions, ConfigErrors> {
    let ca_file = s.parse_optional(&options::CA_CERTIFICATE_FILE, EXPECTED_FILE, existing_file);
    let sdk_path =
        format!("{}/internal-backstage/{}", base_path(s), Subcommand::Probe(question).name());
    let (url, path, trust) = if s.is_set(&options::EDGE_URL) {
        let url = s.parse_optional(&options::EDGE_URL, EXPECTED_HTTP_URL, parse_http_url);
        (url, sdk_path, ProbeTrust::Platform(ca_file))
    } else {
        let trust = ca_file.map_or(ProbeTrust::Any, ProbeTrust::Authority);
        let (address, is_tls, path) = local_address(s, question, sdk_path);
        let scheme = if is_tls { "https" } else { "http" };
        let host = if address.ip().is_unspecified() {
            format!("localhost:{}", address.port())
        } else {
            address.to_string()
        };
        (parse_http_url(&format!("{scheme}://{host}")), path, trust)
    };
    ConfigErrors::check_empty(take(&mut s.errors))?;
    let mut url = url.expect("an invalid URL is an error");
    let before = url.path().trim_end_matches('/').to_owned();
    url.set_path(&format!("{before}{path}"));
    Ok(ProbeOptions { url, trust })
}

/// The address, whether it uses TLS, and the path at which the instance on this machine answers
/// `question` without a client certificate: on the data listener, or else on the admin listener.
fn local_address(
    s: &mut RawSettings,
    question: Probe,
    sdk_path: String,
) -> (SocketAddr, bool, String) {
    let of_clients = tls::requires_client_certificates(s, &tls::DATA);
    let of_operators = tls::requires_client_certificates(s, &tls::ADMIN);
    let is_tls = s.switch(&options::TLS_ENABLE);
    if !is_tls || !of_clients {
        let port_key = if is_tls { &options::TLS_SERVER_PORT } else { &options::PORT };
        let address = SocketAddr::new(interface(s, &options::INTERFACE), port(s, port_key));
        return (address, is_tls, sdk_path);
    }
    let address =
        SocketAddr::new(interface(s, &options::ADMIN_INTERFACE), port(s, &options::ADMIN_PORT));
    let is_tls = s.is_set(&options::ADMIN_TLS_CERT);
    if is_tls && of_operators {
        let reason =
            "is required: both listeners require client certificates, and probes have none";
        s.report_error(&options::EDGE_URL, reason);
    }
    let path = match question {
        Probe::Health => "/live",
        Probe::Ready => "/ready",
    };
    (address, is_tls, path.to_owned())
}

fn parse_instance_info(s: &mut RawSettings) -> InstanceInfo {
    const HOSTINGS: [&str; 3] = ["self-hosted", "hosted", "enterprise-self-hosted"];
    let header = |text: &str| HeaderValue::from_str(text).ok().map(|_| text.to_owned());
    InstanceInfo {
        app_name: s.parse_or_default(&options::APP_NAME, "a name of visible characters", header),
        instance_id: s
            .parse_optional(&options::INSTANCE_ID, "a name of visible characters", header)
            .unwrap_or_else(|| format!("parapet@{}", ulid::Ulid::generate())),
        hosting: s.parse_or_default(
            &options::HOSTING,
            "self-hosted, hosted or enterprise-self-hosted",
            |text| HOSTINGS.contains(&text).then(|| text.to_owned()),
        ),
        region: s.text(&options::AWS_REGION).map(str::to_owned),
    }
}

fn edge(s: &mut RawSettings, identity: &InstanceInfo, data_dir: &Path) -> Option<EdgeConfig> {
    let credentials = credentials(s);
    let upstream = upstream(s, identity);
    let sync = sync::Config {
        interval: s.interval(&options::FEATURES_REFRESH_INTERVAL_SECONDS),
        mode: s.parse_or_default(
            &options::UPSTREAM_MODE,
            "auto, poll or stream",
            sync::UpstreamMode::parse,
        ),
    };
    let backup_folder = backup_folder(s, data_dir);
    let admin_relay = s.switch(&options::ADMIN_RELAY);
    Some(EdgeConfig {
        upstream: upstream?,
        credentials: credentials?,
        sync,
        backup_folder,
        admin_relay,
    })
}

/// The backup directory, from either option. An empty `--backup-folder` counts as not set, because
/// deployments of Unleash Edge set it so.
fn backup_folder(s: &RawSettings, data_dir: &Path) -> BackupFolder {
    let named = s.path(&options::BACKUP_FOLDER).filter(|path| !path.as_os_str().is_empty());
    match named {
        Some(path) => BackupFolder::Configured(path),
        None if s.is_set(&options::DATA_DIR) => BackupFolder::Configured(data_dir.join("backup")),
        None => BackupFolder::Default(data_dir.join("backup")),
    }
}

fn credentials(s: &mut RawSettings) -> Option<Credentials> {
    let tokens = s.tokens(&options::TOKENS);
    let environments = s.parse_list(&options::ENVIRONMENTS, "names of environments", |text| {
        (!text.is_empty()).then(|| Environment::new(text))
    });
    let fleet =
        s.parse_or_default(&options::FLEET_NAME, "letters, digits, `-`, `_` or `.`", |text| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (!text.is_empty() && text.len() <= 64 && text.chars().all(fits))
                .then(|| text.to_owned())
        });
    if !s.is_set(&options::UPSTREAM_ADMIN_TOKEN) {
        for key in [&options::ENVIRONMENTS, &options::FLEET_NAME] {
            if s.is_set(key) {
                s.warnings.push(format!("--{} has no effect without an admin token", key.name));
            }
        }
        if tokens.is_empty() {
            s.warnings.push(
                "neither --upstream-admin-token nor --tokens is set: each environment is fetched with \
                 the first of its SDK tokens that upstream finds valid"
                    .to_owned(),
            );
        }
        return Some(Credentials::BackendTokens(tokens));
    }
    if !tokens.is_empty() {
        s.warnings.push("--tokens has no effect with an admin token".to_owned());
    }
    let environments =
        (!environments.is_empty()).then(|| environments.into_iter().collect::<BTreeSet<_>>());
    let file = s.secret_file(&options::UPSTREAM_ADMIN_TOKEN).map(Path::to_owned);
    Some(Credentials::Admin { token: admin_token(s)?, file, fleet, environments })
}

fn admin_token(s: &mut RawSettings) -> Option<Token> {
    let key = &options::UPSTREAM_ADMIN_TOKEN;
    match AdminToken::parse(s.text(key)?) {
        Ok(token) => Some(token),
        Err(error) => {
            s.report_error(key, error.to_string());
            None
        }
    }
}

fn upstream(s: &mut RawSettings, identity: &InstanceInfo) -> Option<upstream::Config> {
    let url = required(s, &options::UPSTREAM_URL, EXPECTED_HTTP_URL, parse_http_url)
        .map(|url| strip_api_suffix(s, url));
    let client_identity = client_identity(s);
    let skip_certificate_verification = s.switch(&options::SKIP_SSL_VERIFICATION);
    if skip_certificate_verification {
        s.warnings.push(
            "--skip-ssl-verification: certificates of upstream are not verified; an attacker on the \
             network can read tokens and change flags"
                .to_owned(),
        );
    }
    let (_, token_header) = token_headers(s);
    let extra_headers =
        s.parse_list(&options::CUSTOM_CLIENT_HEADERS, "headers, `Name: value`", parse_header);
    let request_timeout = s.interval(&options::UPSTREAM_REQUEST_TIMEOUT);
    let connect_timeout = s.interval(&options::UPSTREAM_SOCKET_TIMEOUT);
    let keepalive = s.interval(&options::CLIENT_KEEPALIVE_TIMEOUT);
    let certificate_file =
        s.parse_optional(&options::UPSTREAM_CERTIFICATE_FILE, EXPECTED_FILE, existing_file);
    Some(upstream::Config {
        url: url?,
        token_header,
        extra_headers,
        request_timeout,
        connect_timeout,
        keepalive,
        certificate_file,
        client_certificate: client_identity,
        skip_certificate_verification,
        no_proxy: s.no_proxy.clone(),
        app_name: identity.app_name.clone(),
        instance_id: identity.instance_id.clone(),
    })
}

/// The client certificate for upstream, in one of three forms.
fn client_identity(s: &mut RawSettings) -> Option<upstream::ClientIdentity> {
    use options::{
        PEM_CERT_FILE, PKCS8_CLIENT_CERTIFICATE_FILE, PKCS8_CLIENT_KEY_FILE, PKCS12_IDENTITY_FILE,
        PKCS12_PASSPHRASE,
    };
    let certificate =
        s.parse_optional(&PKCS8_CLIENT_CERTIFICATE_FILE, EXPECTED_PEM_PATH, parse_file_path);
    let key = s.parse_optional(&PKCS8_CLIENT_KEY_FILE, EXPECTED_PEM_PATH, parse_file_path);
    let pkcs12 =
        s.parse_optional(&PKCS12_IDENTITY_FILE, "the path of a file (PKCS #12)", parse_file_path);
    let pem = s.parse_optional(&PEM_CERT_FILE, EXPECTED_PEM_PATH, parse_file_path);
    match (s.is_set(&PKCS8_CLIENT_CERTIFICATE_FILE), s.is_set(&PKCS8_CLIENT_KEY_FILE)) {
        (true, false) => s.report_error(&PKCS8_CLIENT_KEY_FILE, "is required with a certificate"),
        (false, true) => s.report_error(&PKCS8_CLIENT_CERTIFICATE_FILE, "is required with a key"),
        (true, true) | (false, false) => {}
    }
    if s.is_set(&PKCS12_PASSPHRASE) && !s.is_set(&PKCS12_IDENTITY_FILE) {
        let warning = "--pkcs12-passphrase has no effect without --pkcs12-identity-file";
        s.warnings.push(warning.to_owned());
    }
    let forms = [&PKCS8_CLIENT_CERTIFICATE_FILE, &PKCS12_IDENTITY_FILE, &PEM_CERT_FILE];
    let mut configured = forms.into_iter().filter(|key| s.is_set(key));
    if let (Some(first), Some(second)) = (configured.next(), configured.next()) {
        s.report_error(second, format!("cannot be combined with --{}", first.name));
        return None;
    }
    let identity = match (certificate.zip(key), pkcs12, pem) {
        (Some((certificate_file, key_file)), ..) => {
            upstream::ClientIdentity::PemPair { certificate_file, key_file }
        }
        (_, Some(file), _) => {
            let passphrase = Passphrase::new(s.text(&PKCS12_PASSPHRASE).unwrap_or_default());
            upstream::ClientIdentity::Pkcs12 { file, passphrase }
        }
        (_, _, Some(file)) => upstream::ClientIdentity::PemFile(file),
        (None, None, None) => return None,
    };
    if let Err(error) = identity.load() {
        let key = match (&identity, &error) {
            (_, IdentityError::Passphrase { .. }) => &PKCS12_PASSPHRASE,
            (upstream::ClientIdentity::Pkcs12 { .. }, _) => &PKCS12_IDENTITY_FILE,
            (upstream::ClientIdentity::PemFile(_), _) => &PEM_CERT_FILE,
            (_, IdentityError::Key(_)) => &PKCS8_CLIENT_KEY_FILE,
            (upstream::ClientIdentity::PemPair { .. }, _) => &PKCS8_CLIENT_CERTIFICATE_FILE,
        };
        s.report_error(key, error_chain(&error));
    }
    Some(identity)
}

/// Removes a final `/api`, with a warning. Unleash's own setting is without it, and the server is the
/// same.
fn strip_api_suffix(s: &mut RawSettings, mut url: Url) -> Url {
    let path = url.path().trim_end_matches('/').to_owned();
    if let Some(base) = path.strip_suffix("/api") {
        url.set_path(base);
        s.replace(&options::UPSTREAM_URL, url.as_str().trim_end_matches('/').to_owned());
        s.warnings.push("--upstream-url must not end with /api; the suffix is ignored".to_owned());
    }
    url
}

fn offline(s: &mut RawSettings) -> Option<OfflineConfig> {
    let bootstrap_file = required(s, &options::BOOTSTRAP_FILE, EXPECTED_FILE, existing_file);
    let client_tokens = s.tokens(&options::CLIENT_TOKENS);
    let frontend_tokens = s.tokens(&options::FRONTEND_TOKENS);
    if client_tokens.is_empty() && frontend_tokens.is_empty() {
        s.warnings.push(
            "neither --client-tokens nor --frontend-tokens is set: no token can read flags"
                .to_owned(),
        );
    }
    let reload_interval = Some(s.delay(&options::RELOAD_INTERVAL)).filter(|time| !time.is_zero());
    Some(OfflineConfig {
        bootstrap_file: bootstrap_file?,
        client_tokens,
        frontend_tokens,
        admin_tokens: s.tokens(&options::INIT_ADMIN_API_TOKENS),
        reload_interval,
    })
}

fn standalone(s: &mut RawSettings, data_dir: &Path) -> Option<StandaloneConfig> {
    let location = database_location(s, data_dir);
    let flags = flags_path(s, location.as_ref());
    let mut client = s.tokens(&options::INIT_BACKEND_API_TOKENS);
    client.extend(s.tokens(&options::INIT_CLIENT_API_TOKENS));
    let initial_tokens = InitialTokens {
        admin: s.tokens(&options::INIT_ADMIN_API_TOKENS),
        client,
        frontend: s.tokens(&options::INIT_FRONTEND_API_TOKENS),
    };
    let environments = s.parse_list(&options::FLAG_ENVIRONMENTS, "names of environments", |text| {
        (!text.is_empty()).then(|| Environment::new(text))
    });
    let username = s.parse_or_default(&options::UNLEASH_DEFAULT_ADMIN_USERNAME, "a name", |text| {
        (!text.is_empty()).then(|| text.to_owned())
    });
    let expected = "a password of at least 10 characters";
    let password = s.parse_optional(&options::UNLEASH_DEFAULT_ADMIN_PASSWORD, expected, |text| {
        Password::parse(text).ok()
    });
    let event_retention = s.retention(&options::AUDIT_RETENTION_SECONDS);
    let control = control_plane::Config {
        location: location?,
        initial_tokens,
        initial_account: InitialAccount { username, password },
        token_limit: s.count(&options::UNLEASH_API_TOKENS_LIMIT),
        account_limit: s.count(&options::ACCOUNTS_LIMIT),
        session_idle_timeout: s.interval(&options::SESSION_IDLE_SECONDS),
        session_lifetime: s.interval(&options::SESSION_LIFETIME_SECONDS),
        event_retention: (!event_retention.is_zero()).then_some(event_retention),
        usage_retention: s.interval(&options::USAGE_RETENTION_SECONDS),
    };
    Some(StandaloneConfig { flags, environments: environments.into_iter().collect(), control })
}

/// The path of the flags. On a first start without configuration it is a path for an example. With an
/// existing database, or one that instances share, a missing file is an error.
fn flags_path(s: &mut RawSettings, location: Option<&DatabaseLocation>) -> FlagsPath {
    let path =
        s.parse_or_default(&options::FLAGS, "a file or folder", |text| Some(PathBuf::from(text)));
    if path.exists() {
        return FlagsPath::Existing(path);
    }
    let is_new = matches!(location, Some(DatabaseLocation::Sqlite(file)) if !file.exists());
    if is_new && !s.is_set(&options::FLAGS) {
        return FlagsPath::Example(path);
    }
    let reason = format!("expected a file or folder; {} does not exist", path.display());
    s.report_error(&options::FLAGS, reason);
    FlagsPath::Existing(path)
}

/// The database of accounts and tokens.
fn database_location(s: &mut RawSettings, data_dir: &Path) -> Option<DatabaseLocation> {
    if !s.is_set(&options::DATABASE_URL) {
        return Some(DatabaseLocation::Sqlite(data_dir.join("parapet.db")));
    }
    let expected = "postgres://user:password@host:port/database";
    let url =
        s.parse_optional(&options::DATABASE_URL, expected, |text| DatabaseUrl::parse(text).ok());
    url.map(DatabaseLocation::Postgres)
}

/// Validates the settings of `backup` and `restore`.
pub(super) fn backup(
    settings: RawSettings,
    order: BackupCommand,
) -> Result<BackupOptions, ConfigErrors> {
    let BackupCommand { action, file, replace } = order;
    Ok(BackupOptions { action, file, replace, location: database(settings)? })
}

/// The database for a command; a running instance may use it at the same time.
fn database(mut settings: RawSettings) -> Result<DatabaseLocation, ConfigErrors> {
    settings.read_secret_files(|secret| secret.name == options::DATABASE_URL.name);
    let data_dir = path(&mut settings, &options::DATA_DIR);
    let location = database_location(&mut settings, &data_dir);
    ConfigErrors::check_empty(settings.errors)?;
    Ok(location.expect("an invalid database URL is an error"))
}

/// Validates the settings of `token` and `account`.
pub(super) fn manage(
    settings: RawSettings,
    errand: ManageCommand,
) -> Result<ManageOptions, ConfigErrors> {
    let ManageCommand { task, json, server } = errand;
    if let Some(server) = server {
        // Other settings of a shared environment or file are for the server, not for this command.
        let server = RemoteServer { no_proxy: settings.no_proxy, ..server };
        return Ok(ManageOptions { target: Target::Server(server), task, json });
    }
    Ok(ManageOptions { target: Target::Database(database(settings)?), task, json })
}

fn listeners(s: &mut RawSettings) -> (DataListenerConfig, AdminListenerConfig) {
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
    let access = access(s);
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
        connection_limits: limits(s, &access),
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

fn limits(s: &mut RawSettings, access: &client_address::Config) -> ConnectionLimits {
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

/// The headers that carry tokens: from SDKs, and to upstream.
fn token_headers(s: &mut RawSettings) -> (HeaderName, HeaderName) {
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

fn access(s: &mut RawSettings) -> client_address::Config {
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

/// The value of a required key without default.
fn required<T>(
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

const EXPECTED_HTTP_URL: &str =
    "an http or https URL without user or query, as in `https://unleash.example.com`";
const EXPECTED_FILE: &str = "a file that exists";
const EXPECTED_HEADER_NAME: &str = "the name of a header";
const EXPECTED_NETWORKS: &str = "networks or addresses, as in `10.0.0.0/8`";

fn path(s: &mut RawSettings, key: &OptionSpec) -> PathBuf {
    s.parse_or_default(key, "a path", |text| (!text.is_empty()).then(|| PathBuf::from(text)))
}

fn existing_file(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|path| path.is_file())
}

fn port(s: &mut RawSettings, key: &OptionSpec) -> u16 {
    let expected = "a port, 0 to 65535";
    if key.name == options::PORT.name
        && s.subcommand == Subcommand::Serve(ServeMode::Edge)
        && is_pretrusted_token(s, key)
    {
        let reason = format!(
            "expected {expected}; in Unleash Edge, -p of `edge` is --pretrusted-tokens, which is not \
             supported: {}",
            options::PRETRUSTED_TOKENS.help()
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

fn interface(s: &mut RawSettings, key: &OptionSpec) -> IpAddr {
    s.parse_or_default(key, "an IP address or localhost", |text| match text {
        "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
        text => text.trim_start_matches('[').trim_end_matches(']').parse().ok(),
    })
}

fn base_path(s: &mut RawSettings) -> String {
    s.parse_or_default(&options::BASE_PATH, "a path as in `/flags`", |text| {
        let path = text.trim_matches('/');
        let fits = |c: char| c.is_ascii_graphic() && !"?#%".contains(c);
        path.chars().all(fits).then(|| match path {
            "" => String::new(),
            path => format!("/{path}"),
        })
    })
}

fn parse_network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Parses a URL to which paths can be appended.
fn parse_http_url(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    plain.then_some(url)
}

/// Parses a header, as `Name: value` (the form of curl) or `name=value`. The value is marked as
/// sensitive.
fn parse_header(text: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once([':', '='])?;
    let mut value = HeaderValue::from_str(value.trim()).ok()?;
    value.set_sensitive(true);
    Some((name.trim().parse().ok()?, value))
}
