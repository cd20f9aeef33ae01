//! The configuration as operators use it: accepted and rejected values, messages, and secrets.

use std::{collections::HashMap, fmt::Write as _, time::Duration};

use proptest::prelude::*;

use super::{
    options::{Arity, CONFIG, CommandScope, Compatibility, OPTIONS, OptionSpec},
    raw, *,
};
use crate::{http::client_address::TrustedProxies, sync, telemetry::LogFormat};

const TOKEN: &str = "*:development.0123456789abcdef0123456789abcdef";
/// The part of [`TOKEN`] that must never be printed.
const SECRET: &str = "456789abcdef";
const ADMIN: &str = "*:*.0123456789abcdef0123456789abcdef";
const EDGE: &str = "edge -u http://unleash:4242";

/// Parses `line`, split at spaces, with `env` as environment variables.
fn parse(line: &str, env: &[(&str, &str)]) -> Result<Command, ConfigErrors> {
    let args = std::iter::once("parapet").chain(line.split_whitespace()).map(OsString::from);
    let env: HashMap<_, _> = env.iter().copied().collect();
    Command::parse(args, &|name| env.get(name).map(|&text| text.to_owned()))
}

#[track_caller]
fn config(line: &str, env: &[(&str, &str)]) -> Config {
    match parse(line, env) {
        Ok(Command::Run(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
fn edge(line: &str, env: &[(&str, &str)]) -> EdgeConfig {
    match config(line, env).mode {
        Mode::Edge(edge) => *edge,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
fn printed(line: &str, env: &[(&str, &str)]) -> String {
    match parse(line, env) {
        Ok(Command::Print(text)) => text,
        other => panic!("{line}: {other:?}"),
    }
}

#[track_caller]
fn errors(line: &str, env: &[(&str, &str)]) -> Vec<String> {
    parse(line, env).expect_err(line).iter().map(ToString::to_string).collect()
}

/// A certificate and its key, in each supported file format.
struct Certificates {
    _folder: tempfile::TempDir,
    certificate: String,
    key: String,
    both: String,
    /// Its passphrase is `word`.
    pkcs12: String,
}

fn certificates() -> Certificates {
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

fn config_file(text: &str) -> (tempfile::TempDir, String) {
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
    assert_eq!(edge.backup_folder, BackupFolder::Default("data/backup".into()));
    assert!(matches!(edge.credentials, Credentials::BackendTokens(tokens) if tokens.is_empty()));
}

#[test]
fn backup_folder_is_set_by_either_option_unless_empty() {
    let of = |line: &str, env: &[(&str, &str)]| edge(&format!("{EDGE} {line}"), env).backup_folder;
    let default = BackupFolder::Default("data/backup".into());
    assert_eq!(of("", &[("BACKUP_FOLDER", "")]), default);
    assert_eq!(of("--backup-folder=", &[]), default);
    assert_eq!(of("", &[("BACKUP_FOLDER", "/b")]), BackupFolder::Configured("/b".into()));
    assert_eq!(
        of("--backup-folder= --data-dir /d", &[]),
        BackupFolder::Configured("/d/backup".into())
    );
    let (_folder, path) = config_file("data_dir = '/d'");
    assert_eq!(of("", &[("PARAPET_CONFIG", &path)]), BackupFolder::Configured("/d/backup".into()));
}

#[test]
fn upstream_mode_is_auto_poll_or_stream() {
    use sync::UpstreamMode::{Auto, Poll, Stream};
    for (name, mode) in [("auto", Auto), ("poll", Poll), ("stream", Stream)] {
        assert_eq!(edge(EDGE, &[("UPSTREAM_MODE", name)]).sync.mode, mode);
    }
    assert_eq!(
        errors(&format!("{EDGE} --upstream-mode delta"), &[]),
        ["--upstream-mode: expected auto, poll or stream, not `delta`"]
    );
}

#[test]
fn command_line_overrides_environment_overrides_file() {
    let (_folder, path) = config_file("port = 1001\nlog_format = 'json'\nmax_connections = 7\n");
    let env = [("PARAPET_CONFIG", &*path), ("PORT", "1002"), ("LOG_FORMAT", "pretty")];
    let config = config("-p 1003", &env);
    assert_eq!(config.data.address.port(), 1003);
    assert_eq!(config.log.format, LogFormat::Pretty);
    assert_eq!(config.data.connection_limits.max_connections, 7);
    assert_eq!(config.admin.address.port(), 3064);
}

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
fn upstream_url_with_api_is_printed_without_it() {
    let shown = printed("edge -u http://unleash:4242/base/api/ --check-config", &[]);
    assert!(shown.contains("# Warning: --upstream-url must not end with /api"), "{shown}");
    assert!(shown.contains("upstream_url = \"http://unleash:4242/base\" # -"), "{shown}");
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
    let messages = errors(&line, &[("PORT", "x"), ("TOKENS", "a:b,c"), ("REDIS_URL", "redis://r")]);
    for part in [
        "--upstream-url (UPSTREAM_URL): is required",
        "--allow-list: expected networks or addresses, as in `10.0.0.0/8`, not `10.0.0.0/40`",
        "--admin-port: expected a port, 0 to 65535, not `99999`",
        "PORT: expected a port, 0 to 65535, not `x`",
        "TOKENS: expected tokens; token 1: ",
        "TOKENS: expected tokens; token 2: ",
        "REDIS_URL: is not supported by Parapet; use --backup-folder",
        ":1: max_connections: expected a whole number above 0, not `0`",
        ":2: unknown key `prot`",
        ":3: `base_path`: expected a string or a number",
    ] {
        assert!(messages.iter().any(|mistake| mistake.contains(part)), "{part}\n{messages:#?}");
    }
    assert_eq!(messages.len(), 10, "{messages:#?}");
}

#[test]
fn named_config_file_must_exist_and_be_toml() {
    assert!(errors("--config /nowhere.toml", &[])[0].contains("expected a readable file"));
    let (_folder, path) = config_file(&format!("port = 1\nupstream_admin_token = {ADMIN}\n"));
    let messages = errors(&format!("--config {path}"), &[]);
    assert!(messages[0].contains("parapet.toml:2: expected TOML"), "{messages:?}");
    assert!(!messages[0].contains(SECRET));
}

/// Every variable of Unleash Edge v20, with a value that its documentation allows.
const UNLEASH_EDGE: &[(&str, &str)] = &[
    ("PORT", "3163"),
    ("INTERFACE", "0.0.0.0"),
    ("BASE_PATH", "/base"),
    ("WORKERS", "4"),
    ("TLS_ENABLE", "true"),
    ("TLS_SERVER_KEY", "<key>"),
    ("TLS_SERVER_CERT", "<certificate>"),
    ("TLS_SERVER_PORT", "3043"),
    ("REDIRECT_HTTP_TO_HTTPS", "true"),
    ("CORS_ORIGIN", "https://a.example,https://b.example"),
    ("CORS_ALLOWED_HEADERS", "authorization,x-custom"),
    ("CORS_MAX_AGE", "60"),
    ("CORS_EXPOSED_HEADERS", "etag"),
    ("CORS_METHODS", "GET,POST"),
    ("ALLOW_LIST", "10.0.0.0/8,::1/128"),
    ("DENY_LIST", "10.1.0.0/16"),
    ("INSTANCE_ID", "one"),
    ("APP_NAME", "flags"),
    ("TRUST_PROXY", "true"),
    ("DISABLE_ALL_ENDPOINT", "true"),
    ("EDGE_REQUEST_TIMEOUT", "5"),
    ("EDGE_KEEPALIVE_TIMEOUT", "5"),
    ("LOG_FORMAT", "json"),
    ("RUST_LOG", "debug"),
    ("EDGE_AUTH_HEADER", "x-token"),
    ("UPSTREAM_AUTH_HEADER", "x-token"),
    ("TOKEN_HEADER", "x-token"),
    ("DISABLE_METRICS_BATCH_ENDPOINT", "true"),
    ("DISABLE_METRICS_ENDPOINT", "true"),
    ("DISABLE_FEATURES_ENDPOINT", "true"),
    ("DISABLE_TOKENS_ENDPOINT", "true"),
    ("DISABLE_INSTANCE_DATA_ENDPOINT", "true"),
    ("SENTRY_DSN", "https://key@sentry.example/1"),
    ("SENTRY_TRACING_RATE", "0.1"),
    ("SENTRY_DEBUG", "true"),
    ("SENTRY_ENABLE_LOGS", "true"),
    ("DATADOG_URL", "https://datadog.example"),
    ("OTEL_COLLECTOR_URL", "http://otel:4317"),
    ("UPSTREAM_URL", "http://unleash:4242"),
    ("BACKUP_FOLDER", "/backup"),
    ("METRICS_INTERVAL_SECONDS", "30"),
    ("FEATURES_REFRESH_INTERVAL_SECONDS", "10"),
    ("TOKEN_REVALIDATION_INTERVAL_SECONDS", "600"),
    ("TOKENS", TOKEN),
    ("PRETRUSTED_TOKENS", "secret-123@development"),
    ("CUSTOM_CLIENT_HEADERS", "X-Api-Key: mysecretapikey"),
    ("SKIP_SSL_VERIFICATION", "true"),
    ("PKCS12_IDENTITY_FILE", "<pkcs12>"),
    ("PKCS12_PASSPHRASE", "word"),
    ("PEM_CERT_FILE", "<both>"),
    ("UPSTREAM_REQUEST_TIMEOUT", "10"),
    ("UPSTREAM_SOCKET_TIMEOUT", "10"),
    ("CLIENT_KEEPALIVE_TIMEOUT", "20"),
    ("REDIS_URL", "redis://localhost"),
    ("REDIS_MODE", "single"),
    ("REDIS_PASSWORD", "word"),
    ("REDIS_USERNAME", "user"),
    ("REDIS_PORT", "6379"),
    ("REDIS_HOST", "localhost"),
    ("REDIS_SECURE", "true"),
    ("REDIS_SCHEME", "rediss"),
    ("REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS", "2000"),
    ("REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS", "2000"),
    ("S3_BUCKET_NAME", "bucket"),
    ("STREAMING", "true"),
    ("DELTA", "true"),
    ("DELTA_DIFF", "true"),
    ("CONSUMPTION", "true"),
    ("PROMETHEUS_REMOTE_WRITE_URL", "http://prometheus"),
    ("PROMETHEUS_PUSH_INTERVAL", "60"),
    ("PROMETHEUS_USERNAME", "user"),
    ("PROMETHEUS_PASSWORD", "word"),
    ("PROMETHEUS_USER_ID", "1"),
    ("EDGE_DEFER_TOKEN_VALIDATION", "true"),
];

#[test]
fn every_variable_of_unleash_edge_takes_effect_or_warns_or_is_rejected() {
    let files = certificates();
    for &(name, text) in UNLEASH_EDGE {
        let key = OPTIONS.iter().find(|key| key.env_name() == name).expect(name);
        let text = match text {
            "<key>" => &*files.key,
            "<certificate>" => &*files.certificate,
            "<pkcs12>" => &*files.pkcs12,
            "<both>" => &*files.both,
            text => text,
        };
        // Options that this one requires.
        let others = match name {
            "TLS_ENABLE" => {
                format!("--tls-server-cert {} --tls-server-key {}", files.certificate, files.key)
            }
            "PKCS12_IDENTITY_FILE" => "--pkcs12-passphrase word".to_owned(),
            _ => String::new(),
        };
        match key.compatibility {
            Compatibility::Supported => {
                let shown = printed(&format!("{EDGE} {others} --check-config"), &[(name, text)]);
                let start = format!("{} = ", key.toml_name());
                let line = shown.lines().find(|line| line.starts_with(&start)).unwrap();
                let overridden = name == "UPSTREAM_URL";
                assert!(overridden || line.ends_with(&format!("# {name}")), "{line}");
            }
            Compatibility::Ignored => {
                let messages = config(EDGE, &[(name, text)]).warnings;
                assert!(
                    messages.contains(&format!("{name} has no effect: {}", key.help())),
                    "{messages:?}"
                );
            }
            Compatibility::Rejected => {
                let messages = errors(EDGE, &[(name, text)]);
                assert_eq!(
                    messages,
                    [format!("{name}: is not supported by Parapet; {}", key.help())]
                );
            }
        }
    }
    let off = config(EDGE, &[("TLS_ENABLE", "false"), ("STREAMING", "false"), ("PORT", "")]);
    assert!(off.warnings.iter().all(|warning| !warning.contains("no effect")), "{off:?}");
}

#[test]
fn tls_uses_separate_port_and_plain_port_redirects() {
    let files = certificates();
    let (certificate, key) = (&*files.certificate, &*files.key);
    let mut env =
        vec![("TLS_ENABLE", "true"), ("TLS_SERVER_CERT", certificate), ("TLS_SERVER_KEY", key)];
    let pair =
        crate::tls::KeyPairFiles { certificate_file: certificate.into(), key_file: key.into() };
    let data = config(EDGE, &env).data;
    assert_eq!((data.address.to_string(), data.redirect_from), ("[::]:3043".to_owned(), None));
    let tls = data.tls.unwrap();
    assert_eq!(tls.key_pairs, std::slice::from_ref(&pair));
    assert_eq!((tls.min_version, tls.client_verification), (crate::tls::Version::Tls12, None));
    assert_eq!(tls.handshake_timeout, Duration::from_secs(10));
    assert!(tls.max_handshakes >= 1);
    let messages = config(&format!("{EDGE} --port 80"), &env).warnings;
    assert!(messages.iter().any(|it| it.starts_with("--port has no effect with --tls-enable")));

    env.push(("REDIRECT_HTTP_TO_HTTPS", "true"));
    let line = format!("{EDGE} -i 127.0.0.1 -p 80 --tls-server-port 443");
    let data = config(&line, &env).data;
    assert_eq!(data.address.to_string(), "127.0.0.1:443");
    assert_eq!(data.redirect_from.unwrap().to_string(), "127.0.0.1:80");
    let line = format!(
        "{EDGE} --tls-enable --tls-server-cert {certificate},{certificate} --tls-server-key {key} \
         --tls-server-key {key} --tls-client-ca-file {certificate} --tls-min-version 1.3 \
         --admin-tls-cert {certificate} --admin-tls-key {key} \
         --admin-tls-client-ca-file {certificate} --admin-tls-client-auth optional"
    );
    let config = config(&line, &[]);
    let (data, admin) = (config.data.tls.unwrap(), config.admin.tls.unwrap());
    assert_eq!(data.key_pairs, [pair.clone(), pair.clone()]);
    assert_eq!((admin.listener, &admin.key_pairs[..]), ("admin", &[pair][..]));
    assert_eq!(data.client_verification.unwrap().auth, crate::tls::ClientAuth::Required);
    assert_eq!(admin.client_verification.unwrap().auth, crate::tls::ClientAuth::Optional);
    assert_eq!([data.min_version, admin.min_version], [crate::tls::Version::Tls13; 2]);
}

#[test]
fn all_tls_errors_are_reported_at_once() {
    let (files, others) = (certificates(), certificates());
    let line = format!(
        "{EDGE} --tls-enable --tls-server-cert {0},/nowhere.crt --tls-server-key {1},{0},{0} \
         --tls-min-version 1.1 --tls-client-auth perhaps --tls-crl-file {0} --admin-port 3043 \
         --admin-tls-key /nowhere.key",
        files.certificate, others.key
    );
    let mut messages = errors(&line, &[]);
    messages.sort();
    let mut expected = [
        "--admin-port: expected another port than --tls-server-port".to_owned(),
        "--admin-tls-cert (ADMIN_TLS_CERT): is required for TLS: the path of a file (PEM)"
            .to_owned(),
        "--tls-min-version: expected 1.2 or 1.3, not `1.1`".to_owned(),
        "--tls-client-auth: expected required or optional, not `perhaps`".to_owned(),
        "--tls-client-auth: requires --tls-client-ca-file".to_owned(),
        "--tls-crl-file: requires --tls-client-ca-file".to_owned(),
        "--tls-server-key: expected 2 files, one for each of --tls-server-cert, not 3".to_owned(),
        format!(
            "--tls-server-key: the private key in {} does not belong to the first certificate in {}",
            others.key, files.certificate
        ),
        "--tls-server-cert: cannot read /nowhere.crt: No such file or directory (os error 2)"
            .to_owned(),
        format!(
            "--tls-server-key: {} contains no private key (PEM: PKCS #8, PKCS #1 or SEC 1)",
            files.certificate
        ),
    ];
    expected.sort();
    assert_eq!(messages, expected);
    let env = [("TLS_ENABLE", "1")];
    for key in ["TLS_SERVER_CERT", "TLS_SERVER_KEY"] {
        let messages = errors(EDGE, &env);
        assert!(
            messages.iter().any(|it| it.contains(&format!("({key}): is required"))),
            "{messages:?}"
        );
    }
    let same = "--tls-server-port 3063 --redirect-http-to-https";
    let messages = errors(&format!("{EDGE} {same}"), &env);
    assert!(messages.contains(&"--tls-server-port: expected another port than --port".to_owned()));
}

#[test]
fn private_key_in_place_of_its_path_is_not_repeated() {
    let key = std::fs::read_to_string(certificates().key).unwrap();
    let env = [("TLS_ENABLE", "true"), ("TLS_SERVER_KEY", &*key), ("PEM_CERT_FILE", &*key)];
    let messages = errors(EDGE, &env);
    for name in ["TLS_SERVER_KEY", "PEM_CERT_FILE"] {
        assert!(
            messages.contains(&format!("{name}: expected the path of a file (PEM)")),
            "{messages:?}"
        );
    }
    let secret = key.lines().nth(1).unwrap();
    assert!(messages.iter().all(|mistake| !mistake.contains(secret)), "{messages:?}");
}

#[test]
fn tls_options_without_tls_warn() {
    let env = [
        ("TLS_SERVER_CERT", "tls.crt"),
        ("REDIRECT_HTTP_TO_HTTPS", "true"),
        ("ADMIN_TLS_CLIENT_CA_FILE", "ca.crt"),
    ];
    let config = config("offline -b config/flags.json -c *:d.x", &env);
    assert_eq!(config.data.tls, None);
    let expected = [
        "--redirect-http-to-https has no effect without --tls-enable",
        "--tls-server-cert has no effect without --tls-enable",
        "--admin-tls-client-ca-file has no effect without --admin-tls-cert",
    ];
    assert_eq!(config.warnings, expected);
}

#[test]
fn client_certificate_for_upstream_has_three_forms() {
    use crate::upstream::{ClientIdentity, Passphrase};
    let Certificates { certificate, key, both, pkcs12, .. } = &certificates();
    let check = |env: &[(&str, &str)], expected: ClientIdentity| {
        assert_eq!(edge(EDGE, env).upstream.client_certificate, Some(expected));
    };
    let pair =
        [("PKCS8_CLIENT_CERTIFICATE_FILE", &**certificate), ("PKCS8_CLIENT_KEY_FILE", &**key)];
    check(
        &pair,
        ClientIdentity::PemPair { certificate_file: certificate.into(), key_file: key.into() },
    );
    check(&[("PEM_CERT_FILE", both)], ClientIdentity::PemFile(both.into()));
    let passphrase = Passphrase::new("word");
    let env = [("PKCS12_IDENTITY_FILE", &**pkcs12), ("PKCS12_PASSPHRASE", "word")];
    check(&env, ClientIdentity::Pkcs12 { file: pkcs12.into(), passphrase });

    let messages = errors(EDGE, &[("PKCS12_IDENTITY_FILE", pkcs12), ("PKCS12_PASSPHRASE", "w0rd")]);
    assert_eq!(messages, [format!("PKCS12_PASSPHRASE: the passphrase does not open {pkcs12}")]);
    let messages = errors(EDGE, &[("PKCS12_IDENTITY_FILE", both)]);
    let expected = format!("PKCS12_IDENTITY_FILE: {both} is not a PKCS #12 file that can be read");
    assert!(messages.len() == 1 && messages[0].starts_with(&expected), "{messages:?}");
    let messages = errors(EDGE, &[("PEM_CERT_FILE", certificate)]);
    assert!(messages[0].contains("contains no private key") && messages.len() == 1, "{messages:?}");
    let messages = errors(EDGE, &[("PEM_CERT_FILE", both), ("PKCS12_IDENTITY_FILE", pkcs12)]);
    assert_eq!(messages, ["PEM_CERT_FILE: cannot be combined with --pkcs12-identity-file"]);
    let other = certificates();
    let messages = errors(EDGE, &[pair[0], ("PKCS8_CLIENT_KEY_FILE", &other.key)]);
    assert!(messages[0].starts_with("PKCS8_CLIENT_KEY_FILE: the private key in "), "{messages:?}");
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
fn variable_of_another_command_warns() {
    let messages = config("", &[("UPSTREAM_URL", "http://u"), ("REDIS_URL", "redis://r")]).warnings;
    assert_eq!(messages, ["UPSTREAM_URL does not apply to `standalone`"]);
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
fn help_mentions_every_option_with_its_variable_and_default() {
    let help = ["", "edge", "offline", "standalone", "health", "ready"]
        .map(|verb| printed(&format!("{verb} --help"), &[]))
        .concat();
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for key in OPTIONS.iter() {
        assert!(words.contains(&format!("--{}", key.name)), "--{}", key.name);
        assert!(words.contains(&format!("[env: {}]", key.env_name())), "{}", key.env_name());
    }
    assert!(words.contains("[default: 3063]"));
}

#[test]
fn admin_token_is_read_from_option_or_file_but_not_both() {
    let (_folder, path) = config_file(&format!("{ADMIN}\n"));
    for env in [[("UPSTREAM_ADMIN_TOKEN", ADMIN)], [("UPSTREAM_ADMIN_TOKEN_FILE", &*path)]] {
        let line = format!("{EDGE} --environments dev,prod --fleet-name eu");
        let Credentials::Admin { token, file, fleet, environments } = edge(&line, &env).credentials
        else {
            panic!("{env:?}")
        };
        assert_eq!(file.is_some(), env[0].0.ends_with("_FILE"));
        assert_eq!((token.expose(), &*fleet), (ADMIN, "eu"));
        assert_eq!(environments.map(|names| names.len()), Some(2));
    }
    let both = [("UPSTREAM_ADMIN_TOKEN", ADMIN), ("UPSTREAM_ADMIN_TOKEN_FILE", &*path)];
    assert!(errors(EDGE, &both)[0].contains("cannot be combined with --upstream-admin-token"));
}

/// A command to which `key` applies.
fn command_of(key: &OptionSpec) -> &'static str {
    match key.scope {
        CommandScope::All | CommandScope::Edge | CommandScope::WithUsage => EDGE,
        CommandScope::Offline | CommandScope::WithoutUpstream => "offline -b config/flags.json",
        CommandScope::Standalone => "standalone",
        CommandScope::Probe => "ready",
    }
}

/// A valid value for a secret.
fn value_of(secret: &OptionSpec) -> &'static str {
    match secret.name {
        "upstream-admin-token" => ADMIN,
        "custom-client-headers" => "X-Key: 0123456789abcdef",
        "database-url" => "postgres://user:456789abcdef@host/db",
        name if name.contains("tokens") => TOKEN,
        _ => "0123456789abcdef0123456789abcdef",
    }
}

#[test]
fn every_secret_may_be_in_a_file() {
    let secrets = OPTIONS.iter().filter(|key| key.accepts_file()).collect::<Vec<_>>();
    let variables: Vec<_> = secrets.iter().map(|key| key.env_name()).collect();
    for known in ["TOKENS", "CLIENT_TOKENS", "DATABASE_URL", "UNLEASH_DEFAULT_ADMIN_PASSWORD"] {
        assert!(variables.contains(&known.to_owned()), "{known}: {variables:?}");
    }
    for secret in secrets {
        let (line, variable) = (command_of(secret), secret.env_name());
        let value = value_of(secret);
        let (_folder, path) = config_file(&format!("\u{feff} {value}\r\n"));
        let in_environment = config(line, &[(&variable, value)]);
        let variable = format!("{variable}_FILE");
        let in_file = config(line, &[(&variable, &path)]);
        let changed = in_file.effective_settings.changed_since(&in_environment.effective_settings);
        assert_eq!(changed, Vec::<&str>::new(), "{variable}");
        config(&format!("{line} --{}-file {path}", secret.name), &[]);
        let text = format!("{}_file = {path:?}", secret.toml_name());
        let (_folder, toml) = config_file(&text);
        config(&format!("{line} --config {toml}"), &[]);
        let checked = printed(&format!("{line} --check-config"), &[(&variable, &path)]);
        assert!(checked.contains(&format!("{}_file = {path:?}", secret.toml_name())), "{checked}");
        assert!(!checked.contains("456789abcdef"), "{checked}");
    }
}

#[test]
fn list_in_secret_file_is_separated_by_commas_or_lines() {
    let (_folder, path) = config_file("*:development.a, *:development.b\n\n*:development.c,\r\n");
    let Credentials::BackendTokens(tokens) = edge(EDGE, &[("TOKENS_FILE", &path)]).credentials
    else {
        panic!()
    };
    let tokens: Vec<_> = tokens.iter().map(|token| token.expose().to_owned()).collect();
    assert_eq!(tokens, ["*:development.a", "*:development.b", "*:development.c"]);
}

#[test]
fn unusable_secret_file_is_named_without_its_contents() {
    let (_folder, empty) = config_file(" \n");
    let (_other, wrong) = config_file(&format!("{SECRET}\n"));
    for (path, expect) in [
        (&*empty, format!("TOKENS_FILE: expected a file with a secret: {empty} is empty")),
        (&*wrong, format!("TOKENS_FILE ({wrong}): expected tokens; token 1: ")),
        (TOKEN, "TOKENS_FILE: expected the path of a file".to_owned()),
        ("/nowhere/tokens", "cannot read /nowhere/tokens: No such file".to_owned()),
    ] {
        let messages = errors(EDGE, &[("TOKENS_FILE", path)]);
        assert!(messages[0].contains(&expect) && messages.len() == 1, "{messages:?}");
        assert!(!messages[0].contains(SECRET), "{messages:?}");
    }
}

#[test]
fn secret_file_is_read_from_any_path() {
    let folder = tempfile::tempdir().expect("folder");
    for name in ["parapet@prod.service", "what?", "*:development.name"] {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).expect("folder");
        let path = folder.join("tokens").display().to_string();
        std::fs::write(&path, TOKEN).expect("file");
        let Credentials::BackendTokens(tokens) = edge(EDGE, &[("TOKENS_FILE", &path)]).credentials
        else {
            panic!()
        };
        assert_eq!(tokens[0].expose(), TOKEN, "{path}");
    }
}

#[test]
fn secret_in_place_of_its_path_is_not_repeated() {
    for (variable, secret) in [
        ("TOKENS_FILE", TOKEN),
        ("TOKENS_FILE", "https://me:secret@unleash.test/api"),
        ("UPSTREAM_ADMIN_TOKEN_FILE", ADMIN),
    ] {
        let messages = errors(EDGE, &[(variable, secret)]);
        assert!(messages[0].contains("expected the path of a file: No such file"), "{messages:?}");
        assert!(messages.len() == 1 && !messages[0].contains(secret), "{messages:?}");
    }
}

#[test]
fn secret_and_its_file_cannot_be_combined() {
    let (_folder, path) = config_file(TOKEN);
    let env = [("TOKENS_FILE", &*path), ("TOKENS", TOKEN)];
    assert_eq!(errors(EDGE, &env), ["TOKENS_FILE: cannot be combined with --tokens"]);
    let line = format!("{EDGE} --tokens {TOKEN}");
    assert_eq!(errors(&line, &env[..1]), ["TOKENS_FILE: cannot be combined with --tokens"]);
    // A secret file of another command is never read.
    let messages = config("standalone", &[("TOKENS_FILE", "/nowhere")]).warnings;
    assert_eq!(messages, ["TOKENS_FILE does not apply to `standalone`"]);
}

#[test]
fn file_variable_of_non_secret_option_is_an_error() {
    let messages = errors(EDGE, &[("PORT_FILE", "/run/port"), ("UPSTREAM_URL_FILE", "/run/url")]);
    assert_eq!(
        messages,
        [
            "PORT_FILE: PORT cannot be read from a file",
            "UPSTREAM_URL_FILE: UPSTREAM_URL cannot be read from a file"
        ]
    );
    let messages = errors(EDGE, &[("REDIS_URL_FILE", "/run/redis")]);
    assert!(messages[0].starts_with("REDIS_URL_FILE: is not supported by Parapet"), "{messages:?}");
    let messages = config(EDGE, &[("SENTRY_DSN_FILE", "/run/dsn")]).warnings;
    assert!(messages[0].starts_with("SENTRY_DSN_FILE has no effect"), "{messages:?}");
    // Variables of other programs, of another command, and options whose names end in `_FILE`.
    let env = [
        ("SSL_CERT_FILE", "/etc/ssl/cert.pem"),
        ("BOOTSTRAP_FILE", "config/flags.json"),
        ("UPSTREAM_CERTIFICATE_FILE", "config/flags.json"),
        ("MYSQL_PASSWORD_FILE", "/run/other"),
        ("PORT_FILE", " "),
    ];
    config(EDGE, &env);
    let messages = config("standalone", &[("UPSTREAM_URL_FILE", "/run/url")]).warnings;
    assert_eq!(messages, ["UPSTREAM_URL_FILE does not apply to `standalone`"]);
    let messages = config(EDGE, &[("RELOAD_INTERVAL_FILE", "/run/interval")]).warnings;
    assert_eq!(messages[0], "RELOAD_INTERVAL_FILE does not apply to `edge`");
}

#[test]
fn manage_reads_database_url_file_and_no_other_file() {
    let (_folder, path) = config_file("postgres://user:secret@host/db\n");
    let other = ("UNLEASH_DEFAULT_ADMIN_PASSWORD_FILE", "/nowhere");
    let env = [("DATABASE_URL_FILE", &*path), other];
    let Ok(Command::Manage(manage)) = parse("token list", &env) else { panic!() };
    assert!(matches!(
        manage.target,
        Target::Database(crate::control_plane::DatabaseLocation::Postgres(_))
    ));
    let line = format!("token list --database-url-file {path}");
    assert!(matches!(parse(&line, &[other]), Ok(Command::Manage(_))));
    assert!(parse("token list", &[("DATABASE_URL_FILE", "/nowhere")]).is_err());
}

#[test]
fn changed_options_are_listed_by_name() {
    let before = config(&format!("{EDGE} --tokens {TOKEN} --port 0"), &[]).effective_settings;
    let same = config(EDGE, &[("TOKENS", TOKEN), ("PORT", "0")]).effective_settings;
    assert!(same.changed_since(&before).is_empty(), "a generated name is no change");
    let after = config(EDGE, &[("LOG_FORMAT", "json")]).effective_settings;
    let mut changed = after.changed_since(&before);
    changed.sort_unstable();
    assert_eq!(changed, ["log-format", "port", "tokens"]);
    let mut updated = before.clone();
    for name in changed {
        updated.update(name, &after);
    }
    assert!(after.changed_since(&updated).is_empty());
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
fn probe_uses_address_of_instance() {
    for (line, expect) in [
        ("health", "http://localhost:3063/internal-backstage/health"),
        ("health -i 0.0.0.0 -p 7", "http://localhost:7/internal-backstage/health"),
        ("ready -i 127.0.0.2", "http://127.0.0.2:3063/internal-backstage/ready"),
        ("ready -i ::1 --base-path /x", "http://[::1]:3063/x/internal-backstage/ready"),
    ] {
        let Ok(Command::Probe(probe)) = parse(line, &[]) else { panic!("{line}") };
        assert_eq!(probe.url.as_str(), expect);
    }
}

#[test]
fn token_identifier_may_begin_with_hyphen() {
    for line in ["token revoke -QRSb0aB --data-dir d", "token revoke --data-dir d -dRSb0aB"] {
        let Ok(Command::Manage(manage)) = parse(line, &[]) else { panic!("{line}") };
        assert!(format!("{manage:?}").contains("RSb0aB"), "{manage:?}");
    }
}

#[test]
fn token_of_one_environment_is_rejected_as_admin_token() {
    let messages = errors(EDGE, &[("UPSTREAM_ADMIN_TOKEN", TOKEN)]);
    assert!(
        messages[0].contains("expected an admin token; this one is for the environment"),
        "{messages:?}"
    );
    assert!(!messages[0].contains(TOKEN), "{messages:?}");
    let personal = edge(EDGE, &[("UPSTREAM_ADMIN_TOKEN", "user:0123456789abcdef0123456789abcdef")]);
    assert!(matches!(personal.credentials, Credentials::Admin { .. }));
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

#[test]
fn edge_without_credentials_warns() {
    let warnings = config(EDGE, &[]).warnings;
    assert!(warnings[0].contains("first of its SDK tokens"), "{warnings:?}");
}

#[test]
fn upstream_url_is_used_without_api() {
    let check = |given: &str, read: &str| {
        assert_eq!(edge(&format!("edge -u {given}"), &[]).upstream.url.as_str(), read);
    };
    check("http://unleash:4242", "http://unleash:4242/");
    check("https://unleash.example/eu/", "https://unleash.example/eu/");
    check("https://unleash.example/eu/api/", "https://unleash.example/eu");
    for wrong in ["unleash:4242", "ftp://unleash", "http://a:b@unleash", "http://unleash?x"] {
        assert_eq!(errors(&format!("edge -u {wrong}"), &[]).len(), 1, "{wrong}");
    }
}

#[test]
fn upstream_headers_are_parsed_with_either_separator() {
    let env = [("CUSTOM_CLIENT_HEADERS", "X-Api-Key: a=b, Authorization=test:test.secret")];
    let headers = edge(EDGE, &env).upstream.extra_headers;
    let read: Vec<_> = headers.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
    assert_eq!(read, [("x-api-key", "a=b"), ("authorization", "test:test.secret")]);
    assert!(headers.iter().all(|(_, value)| value.is_sensitive()));
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

#[test]
fn probe_uses_local_instance_by_default() {
    let check = |line: &str, env: &[(&str, &str)], url: &str| match parse(line, env) {
        Ok(Command::Probe(probe)) => assert_eq!(probe.url.as_str(), url),
        other => panic!("{line}: {other:?}"),
    };
    check("health", &[], "http://localhost:3063/internal-backstage/health");
    check("ready", &[("PORT", "80")], "http://localhost/internal-backstage/ready");
    let env = [("BASE_PATH", "/base"), ("TLS_ENABLE", "true")];
    check("ready -e http://edge:1/", &env, "http://edge:1/base/internal-backstage/ready");
    check("ready", &env, "https://localhost:3043/base/internal-backstage/ready");
    check("ready --tls-server-port 443", &env, "https://localhost/base/internal-backstage/ready");
    // Probes have no client certificate.
    let env = [("TLS_ENABLE", "true"), ("TLS_CLIENT_CA_FILE", "ca.crt")];
    check("ready", &env, "http://127.0.0.1:3064/ready");
    check("health --admin-tls-cert tls.crt", &env, "https://127.0.0.1:3064/live");
    check(
        "health --tls-client-auth optional",
        &env,
        "https://localhost:3043/internal-backstage/health",
    );
    let both = "ready --admin-tls-cert tls.crt --admin-tls-client-ca-file ca.crt";
    assert!(errors(both, &env)[0].contains("both listeners require client certificates"));
}

#[test]
fn probe_verifies_certificates_of_remote_instances() {
    let check = |line: &str, expected: ProbeTrust| match parse(line, &[("TLS_ENABLE", "true")]) {
        Ok(Command::Probe(probe)) => assert_eq!(probe.trust, expected, "{line}"),
        other => panic!("{line}: {other:?}"),
    };
    let file = "config/flags.json";
    check("ready", ProbeTrust::Any);
    check(&format!("ready -c {file}"), ProbeTrust::Authority(file.into()));
    check("ready -e https://edge", ProbeTrust::Platform(None));
    check(&format!("ready -e https://edge -c {file}"), ProbeTrust::Platform(Some(file.into())));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_value_of_any_option_makes_validation_panic(at in 0..OPTIONS.len(), text in ".{0,40}") {
        let key = OPTIONS[at];
        for verb in ["edge", "offline", "standalone", "ready"] {
            let flag = format!("--{}={text}", key.name);
            let args = ["parapet", verb, &flag].map(OsString::from);
            let _ = Command::parse(args, &|_| None);
            let args = ["parapet", verb].map(OsString::from);
            let _ = Command::parse(args, &|name| (name == key.env_name()).then(|| text.clone()));
        }
    }
}

/// `config/parapet.toml` as generated from the options. `comment` precedes each key.
fn sample(comment: &str) -> String {
    let mut text = String::from(
        "# The configuration of Parapet: every key with its default value.\n\
         #\n\
         # Each key is also a command line option (`--upstream-url`) and an environment variable\n\
         # (`UPSTREAM_URL`). The variables of log, flags and hosting are `RUST_LOG`,\n\
         # `PARAPET_FLAGS` and `EDGE_HOSTING`. The command line overrides the environment, and the\n\
         # environment overrides this file. An empty string counts as not set. Times are in\n\
         # seconds, whole or decimal. `parapet --check-config` prints the effective configuration.\n",
    );
    let mut heading = "";
    for key in OPTIONS.iter().filter(|key| is_in_file(key)) {
        if key.heading != heading {
            heading = key.heading;
            let rule = "-".repeat(70 - heading.len());
            writeln!(text, "\n# ---- {heading} {rule}").unwrap();
        }
        let default = match key.arity {
            Arity::List => key.default.map(options::split_list).unwrap_or_default(),
            Arity::One | Arity::Switch => vec![key.default.unwrap_or_default().to_owned()],
        };
        let (name, value) = (key.toml_name(), raw::to_toml_value(key, &default));
        writeln!(text, "\n# {}.\n{comment}{name} = {value}", key.help()).unwrap();
    }
    text
}

fn is_in_file(key: &OptionSpec) -> bool {
    key.compatibility == Compatibility::Supported && key.name != CONFIG.name
}

#[test]
fn sample_file_lists_every_option_with_its_default() {
    let written = std::fs::read_to_string("config/parapet.toml").unwrap();
    assert!(written == sample("# "), "config/parapet.toml should be:\n{}", sample("# "));
}

#[test]
fn uncommented_sample_file_changes_nothing() {
    let (_folder, path) = config_file(&sample(""));
    for (line, env) in [
        (EDGE, &[][..]),
        ("standalone", &[]),
        ("offline", &[("BOOTSTRAP_FILE", "config/flags.json")]),
    ] {
        let values = |line: &str| -> Vec<String> {
            let shown = printed(&format!("{line} --check-config"), env);
            let lines = shown.lines().filter(|line| !line.starts_with('#'));
            let values = lines.filter_map(|line| line.split(" # ").next());
            values.map(str::to_owned).collect()
        };
        assert_eq!(values(line), values(&format!("{line} --config {path}")));
    }
    assert!(OPTIONS.iter().any(|key| key.scope == CommandScope::Probe && is_in_file(key)));
}
