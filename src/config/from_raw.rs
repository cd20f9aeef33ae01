//! Turns raw values into a [`Config`], or into a list of all errors.
//!
//! The settings of an edge, of the listeners and of probes are in modules of their own.

use std::{
    mem::take,
    path::{Path, PathBuf},
};

use reqwest::header::HeaderValue;

use super::{
    backup::BackupCommand,
    cli::ServeMode,
    edge,
    error::ConfigErrors,
    listeners,
    manage::{ManageArgs, RemoteServer},
    model::{
        BackupFolder, BackupOptions, Config, FlagsPath, InstanceInfo, ManageOptions, Mode,
        OfflineConfig, ShutdownConfig, StandaloneConfig, StoreConfig, Target,
    },
    options,
    raw::RawSettings,
    store::store_url,
    values::{EXPECTED_FILE, existing_file, path, required},
};
use crate::{
    auth,
    control_plane::{self, DatabaseLocation, DatabaseUrl, InitialAccount, InitialTokens, Password},
    telemetry,
    token::Environment,
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
        ServeMode::Edge => edge::edge(s, &identity, &data_dir).map(Box::new).map(Mode::Edge),
        ServeMode::Offline => offline(s).map(Mode::Offline),
        ServeMode::Standalone => standalone(s, &data_dir).map(Box::new).map(Mode::Standalone),
    };
    let (data, admin) = listeners::listeners(s);
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
    let (warnings, effective_settings) = (take(&mut s.warnings), s.digests());
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
        settings_digests: effective_settings,
    })
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
    let store = if s.is_set(&options::STORE) {
        store_url(s)?
    } else {
        StoreConfig::Folder(BackupFolder::Configured(data_dir.to_owned()))
    };
    let environments = environments.into_iter().collect();
    Some(StandaloneConfig { flags, environments, store, control })
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
    args: ManageArgs,
) -> Result<ManageOptions, ConfigErrors> {
    let ManageArgs { task, json, server } = args;
    if let Some(server) = server {
        // Other settings of a shared environment or file are for the server, not for this command.
        let server = RemoteServer { no_proxy: settings.no_proxy, ..server };
        return Ok(ManageOptions { target: Target::Server(server), task, json });
    }
    Ok(ManageOptions { target: Target::Database(database(settings)?), task, json })
}
