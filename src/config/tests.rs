//! The configuration as operators use it: accepted and rejected values, messages, and secrets.

use std::{collections::HashMap, time::Duration};

use super::*;
use crate::{http::client_address::TrustedProxies, sync, telemetry::LogFormat};

pub(super) const TOKEN: &str = "*:development.0123456789abcdef0123456789abcdef";

/// The part of [`TOKEN`] that must never be printed.
pub(super) const SECRET: &str = "456789abcdef";

pub(super) const ADMIN: &str = "*:*.0123456789abcdef0123456789abcdef";

pub(super) const EDGE: &str = "edge -u http://unleash:4242";

/// Parses `line`, split at spaces, with `env` as environment variables.
pub(super) fn parse(line: &str, env: &[(&str, &str)]) -> Result<Command, ConfigErrors> {
    let args = std::iter::once("parapet").chain(line.split_whitespace()).map(OsString::from);
    let env: HashMap<_, _> = env.iter().copied().collect();
    Command::parse(args, &|name| env.get(name).map(|&text| text.to_owned()))
}

#[track_caller]
pub(super) fn config(line: &str, env: &[(&str, &str)]) -> Config {
    match parse(line, env) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
pub(super) fn edge(line: &str, env: &[(&str, &str)]) -> EdgeConfig {
    match config(line, env).mode {
        Mode::Edge(edge) => *edge,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
pub(super) fn printed(line: &str, env: &[(&str, &str)]) -> String {
    match parse(line, env) {
        Ok(Command::Print(text)) => text,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
pub(super) fn errors(line: &str, env: &[(&str, &str)]) -> Vec<String> {
    parse(line, env).expect_err(line).iter().map(ToString::to_string).collect()
}

/// A certificate and its key, in each supported file format.
pub(super) struct Certificates {
    _folder: tempfile::TempDir,
    pub(super) certificate: String,
    pub(super) key: String,
    pub(super) both: String,
    /// Its passphrase is `word`.
    pub(super) pkcs12: String,
}

pub(super) fn certificates() -> Certificates {
    use p12_keystore::{Certificate, KeyStore, KeyStoreEntry, PrivateKey, PrivateKeyChain};
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let chain = [Certificate::from_der(made.cert.der()).unwrap()];
    let key = PrivateKey::from_der(made.signing_key.serialized_der()).unwrap();
    let mut store = KeyStore::new();
    let entry = KeyStoreEntry::PrivateKeyChain(PrivateKeyChain::new("1", key, chain));
    store.add_entry("localhost", entry);
    let pkcs12 = store.writer("word").write().unwrap();
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    Certificates {
        certificate: write("tls.crt", certificate.as_bytes()),
        key: write("tls.key", key.as_bytes()),
        both: write("both.pem", (key + &certificate).as_bytes()),
        pkcs12: write("both.p12", &pkcs12),
        _folder: folder,
    }
}

pub(super) fn config_file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("parapet.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path.to_str().unwrap().to_owned())
}

#[test]
fn default_command_is_standalone_on_port_of_unleash_edge() {
    let config = config("", &[]);
    let Mode::Standalone(standalone) = &config.mode else { panic!("{config:?}") };
    assert_eq!(standalone.flags, FlagsPath::Existing("config/flags.json".into()));
    assert!(standalone.control.initial_tokens.is_empty());
    assert_eq!(config.data.address.to_string(), "[::]:3063");
    assert_eq!(config.admin.address.to_string(), "127.0.0.1:3064");
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn defaults_match_unleash_edge() {
    let config = config(EDGE, &[]);
    assert_eq!(config.data.cors.max_age, Duration::from_hours(48));
    assert_eq!(config.data.cors.origins, None);
    assert_eq!(config.data.access.proxies, TrustedProxies::None);
    assert_eq!(config.data.token_header, "authorization");
    assert_eq!(config.auth.revalidate_after, Duration::from_hours(1));
    assert_eq!(config.usage.interval, Duration::from_mins(1));
    assert_eq!(config.log.format, LogFormat::Plain);
    let edge = edge(EDGE, &[]);
    assert_eq!(edge.sync.interval, Duration::from_secs(15));
    assert_eq!(edge.sync.mode, sync::UpstreamMode::Auto);
    assert_eq!(edge.upstream.request_timeout, Duration::from_secs(5));
    let folder = BackupFolder::Default("data/backup".into());
    assert!(matches!(edge.store, StoreConfig::Folder(it) if it == folder));
    assert!(matches!(edge.credentials, Credentials::BackendTokens(tokens) if tokens.is_empty()));
}

#[test]
fn every_command_prints_version() {
    for line in ["--version", "edge --version", "standalone -V", "token --version", "health -V"] {
        let messages = printed(line, &[]);
        assert!(messages.contains(env!("CARGO_PKG_VERSION")), "{line}: {messages}");
    }
}

#[test]
fn unknown_log_level_is_rejected() {
    let messages = errors("--log debugg", &[]);
    let expected = "--log: expected a level (off, error, warn, info, debug or trace)";
    assert!(
        messages[0].starts_with(expected) && messages[0].ends_with("not `debugg`"),
        "{messages:?}"
    );
    assert_eq!(config("", &[("RUST_LOG", "warning")]).log.filter, "warn");
}

#[test]
fn common_options_are_accepted_before_and_after_subcommand() {
    for line in
        ["-p 7 edge -u http://u", "edge -u http://u -p 7", "edge --upstream-url=http://u --port=7"]
    {
        assert_eq!(config(line, &[]).data.address.port(), 7, "{line}");
    }
    assert_eq!(errors("--flags x edge -u http://u", &[]), ["--flags: does not apply to `edge`"]);
}

#[test]
fn all_errors_are_reported_at_once() {
    let (_folder, path) = config_file("max_connections = 0\nprot = 1\nbase_path = false\n");
    let line = format!("--config {path} edge --allow-list 10.0.0.0/40 --admin-port 99999");
    let env = [
        ("PORT", "x"),
        ("TOKENS", "a:b,c"),
        ("REDIS_HOST", "r"),
        ("REDIS_PORT", "x"),
        ("PRETRUSTED_TOKENS", "a@dev"),
    ];
    let messages = errors(&line, &env);
    for part in [
        "--upstream-url (UPSTREAM_URL): is required",
        "--allow-list: expected networks or addresses, as in `10.0.0.0/8`, not `10.0.0.0/40`",
        "--admin-port: expected a port, 0 to 65535, not `99999`",
        "PORT: expected a port, 0 to 65535, not `x`",
        "TOKENS: expected tokens; token 1: ",
        "TOKENS: expected tokens; token 2: ",
        "REDIS_PORT: expected a port, 1 to 65535, not `x`",
        "PRETRUSTED_TOKENS: is not supported by Parapet; create the tokens in upstream",
        ":1: max_connections: expected a whole number above 0, not `0`",
        ":2: unknown key `prot`",
        ":3: `base_path`: expected a string or a number",
    ] {
        assert!(messages.iter().any(|mistake| mistake.contains(part)), "{part}\n{messages:#?}");
    }
    assert_eq!(messages.len(), 11, "{messages:#?}");
}

#[test]
fn named_config_file_must_exist_and_be_toml() {
    assert!(errors("--config /nowhere.toml", &[])[0].contains("expected a readable file"));
    let (_folder, path) = config_file(&format!("port = 1\nupstream_admin_token = {ADMIN}\n"));
    let messages = errors(&format!("--config {path}"), &[]);
    assert!(messages[0].contains("parapet.toml:2: expected TOML"), "{messages:?}");
    assert!(!messages[0].contains(SECRET));
}

#[test]
fn offline_accepts_variables_of_unleash_edge() {
    let env = [
        ("BOOTSTRAP_FILE", "config/flags.json"),
        ("CLIENT_TOKENS", TOKEN),
        ("FRONTEND_TOKENS", "*:production.a,*:development.b"),
        ("RELOAD_INTERVAL", "5"),
    ];
    let Mode::Offline(offline) = config("offline", &env).mode else { panic!() };
    assert_eq!(offline.client_tokens.len(), 1);
    assert_eq!(offline.frontend_tokens.len(), 2);
    assert_eq!(offline.reload_interval, Some(Duration::from_secs(5)));
    let line = "offline -b config/flags.json -c *:d.x -c *:d.y,*:d.z -f *:d.f -r 0";
    let Mode::Offline(offline) = config(line, &[]).mode else { panic!() };
    assert_eq!((offline.client_tokens.len(), offline.reload_interval), (3, None));
}

#[test]
fn secrets_are_never_printed() {
    let (_folder, token_file) = config_file(ADMIN);
    let lines = [
        format!("{EDGE} -t {TOKEN},{SECRET} -H X-Key:{SECRET}"),
        format!("{EDGE} -t {TOKEN} -H X-Key={SECRET} --check-config"),
        format!("{EDGE} -t {TOKEN} -H X-Key={SECRET}"),
        format!("{EDGE} --upstream-admin-token {ADMIN}"),
        format!("{EDGE} --upstream-admin-token {ADMIN} --check-config"),
        format!("{EDGE} --upstream-admin-token {SECRET}"),
        format!("{EDGE} --upstream-admin-token-file {token_file}"),
        format!("{EDGE} --tokens-file {TOKEN}"),
        format!("{EDGE} --tokens-file {token_file} --check-config"),
        format!("--database-url-file postgres://user:{SECRET}@host/db"),
        format!("{EDGE} --port {TOKEN} --interface {TOKEN} --custom-client-headers {SECRET}"),
        format!("edge -u http://user:{SECRET}@unleash"),
        format!("edge {TOKEN}"),
        TOKEN.to_owned(),
        format!("edge --tokns={TOKEN}"),
        format!("edge --skip-ssl-verification={TOKEN}"),
        format!("offline -b config/flags.json -c {TOKEN} -f {TOKEN}"),
        format!("offline -b config/flags.json --init-admin-api-tokens {ADMIN}"),
        format!("--init-admin-api-tokens {ADMIN} --init-client-api-tokens {TOKEN}"),
        format!("{EDGE} --redis-url redis://u:{SECRET}@h --sentry-dsn https://{SECRET}@s"),
        format!("{EDGE} --redis-url redis://u:{SECRET}@h --check-config"),
        format!("{EDGE} --redis-host h --redis-password {SECRET}"),
        format!("{EDGE} --store redis+sentinel://u:{SECRET}@h/m?sentinel_password={SECRET}"),
        format!("{EDGE} --store redis://u:{SECRET}@h/x"),
    ];
    for line in lines {
        let text = match parse(&line, &[]) {
            Ok(Command::Print(text)) => text,
            Ok(command) => format!("{command:?} {command:#?}"),
            Err(mistakes) => format!("{mistakes} {mistakes:?}"),
        };
        assert!(!text.contains(SECRET), "{line}\n{text}");
    }
}

#[test]
fn option_of_another_command_names_that_command() {
    for (line, expect) in [
        ("--upstream-url http://u", "`--upstream-url` belongs to `parapet edge`"),
        ("offline --tokens x", "`--tokens` belongs to `parapet edge`"),
        (&format!("{EDGE} --metrics-interval-second 7"), "--metrics-interval-seconds"),
        ("edge --flag-environments=x", "`--flag-environments` belongs to `parapet standalone`"),
        ("health --tokens x", "`--tokens` belongs to `parapet edge`"),
    ] {
        let messages = errors(line, &[]);
        assert!(messages[0].contains(expect), "{line}: {messages:?}");
    }
}

#[test]
fn misplaced_password_is_not_repeated() {
    for line in ["account add bob Pa55word-in-clear", "account password bob Pa55word-in-clear"] {
        let messages = errors(line, &[]);
        assert!(
            messages[0].contains("--password-file") && !messages[0].contains("Pa55"),
            "{messages:?}"
        );
    }
    let messages = errors("edge -u http://u/?key=Pa55word-in-clear", &[]);
    assert!(
        messages[0].contains("without user or query") && !messages[0].contains("Pa55"),
        "{messages:?}"
    );
}

#[test]
fn retention_may_exceed_the_limit_of_intervals() {
    let seven_years = "220898664";
    let audit = |text: &str| errors("standalone", &[("AUDIT_RETENTION_SECONDS", text)]);
    let kept = config("standalone", &[("AUDIT_RETENTION_SECONDS", seven_years)]);
    assert!(format!("{kept:?}").contains("event_retention: Some(220898664s)"), "{kept:?}");
    assert!(audit("1e10")[0].contains("at most a hundred years"));
    let interval = errors(EDGE, &[("METRICS_INTERVAL_SECONDS", seven_years)]);
    assert!(interval[0].contains("at most a year"), "{interval:?}");
}

#[test]
fn check_config_prints_warnings() {
    let both = [("UPSTREAM_ADMIN_TOKEN", ADMIN), ("TOKENS", TOKEN)];
    let shown = printed(&format!("{EDGE} --check-config"), &both);
    assert!(shown.starts_with("# Warning: --tokens has no effect with an admin token"), "{shown}");
    assert!(shown.parse::<toml::Table>().is_ok(), "{shown}");
}
