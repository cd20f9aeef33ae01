//! Names and help of all options, compatibility with Unleash Edge, and the sample file.

use std::{collections::HashSet, ffi::OsString, fmt::Write as _};

use proptest::prelude::*;

use super::*;
use crate::config::{
    Command,
    option_spec::{Compatibility, split_list},
    raw,
    tests::{EDGE, TOKEN, certificates, config, config_file, errors, printed},
};

#[test]
fn option_names_and_short_names_are_unique_within_a_command() {
    let names: HashSet<_> = OPTIONS.iter().map(|key| key.name).collect();
    let variables: HashSet<_> = OPTIONS.iter().map(|key| key.env_name()).collect();
    assert_eq!((names.len(), variables.len()), (OPTIONS.len(), OPTIONS.len()));
    for scope in
        [CommandScope::Edge, CommandScope::Offline, CommandScope::Standalone, CommandScope::Probe]
    {
        let mut letters = HashSet::from(['h', 'V']);
        for key in OPTIONS.iter().filter(|key| key.scope.applies_to(scope)) {
            assert!(key.short.is_none_or(|letter| letters.insert(letter)), "{}", key.name);
        }
    }
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
                    messages.contains(&format!("{name} has no effect: {}", key.help_text())),
                    "{messages:?}"
                );
            }
            Compatibility::Rejected => {
                let messages = errors(EDGE, &[(name, text)]);
                assert_eq!(
                    messages,
                    [format!("{name}: is not supported by Parapet; {}", key.help_text())]
                );
            }
        }
    }
    let off = config(EDGE, &[("TLS_ENABLE", "false"), ("STREAMING", "false"), ("PORT", "")]);
    assert!(off.warnings.iter().all(|warning| !warning.contains("no effect")), "{off:?}");
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
         # (`UPSTREAM_URL`). The variables of log, flags, store, fleet and hosting are\n\
         # `RUST_LOG`, `PARAPET_FLAGS`, `PARAPET_STORE`, `PARAPET_FLEET` and `EDGE_HOSTING`. The\n\
         # command line overrides the environment, and the environment overrides this file. An empty\n\
         # string counts as not set. Times are in seconds, whole or decimal. `parapet --check-config`\n\
         # prints the effective configuration.\n",
    );
    let mut heading = "";
    for key in OPTIONS.iter().filter(|key| is_in_file(key)) {
        if key.heading != heading {
            heading = key.heading;
            let rule = "-".repeat(70 - heading.len());
            writeln!(text, "\n# ---- {heading} {rule}").unwrap();
        }
        let default = match key.arity {
            List => key.default.map(split_list).unwrap_or_default(),
            One | Switch => vec![key.default.unwrap_or_default().to_owned()],
        };
        let (name, value) = (key.toml_name(), raw::to_toml_value(key, &default));
        writeln!(text, "\n# {}.\n{comment}{name} = {value}", key.help_text()).unwrap();
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
