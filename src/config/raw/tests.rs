//! Sources of values: the command line, the environment, files, and files with secrets.

use super::*;
use crate::{
    config::{
        Credentials,
        tests::{ADMIN, EDGE, SECRET, TOKEN, config, config_file, edge, errors, printed},
    },
    telemetry::LogFormat,
};

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
fn variable_of_another_command_warns() {
    let messages =
        config("", &[("UPSTREAM_URL", "http://u"), ("UNLEASH_CLIENT_SECRET", "r")]).warnings;
    assert_eq!(messages, ["UPSTREAM_URL does not apply to `standalone`"]);
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
        "store" | "redis-url" => "redis://user:456789abcdef@host",
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
        let changed = in_file.settings_digests.changed_since(&in_environment.settings_digests);
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
    let messages = errors(EDGE, &[("PRETRUSTED_TOKENS_FILE", "/run/tokens")]);
    let expected = "PRETRUSTED_TOKENS_FILE: is not supported by Parapet";
    assert!(messages[0].starts_with(expected), "{messages:?}");
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
fn changed_options_are_listed_by_name() {
    let before = config(&format!("{EDGE} --tokens {TOKEN} --port 0"), &[]).settings_digests;
    let same = config(EDGE, &[("TOKENS", TOKEN), ("PORT", "0")]).settings_digests;
    assert!(same.changed_since(&before).is_empty(), "a generated name is no change");
    let after = config(EDGE, &[("LOG_FORMAT", "json")]).settings_digests;
    let mut changed = after.changed_since(&before);
    changed.sort_unstable();
    assert_eq!(changed, ["log-format", "port", "tokens"]);
    let mut updated = before.clone();
    for name in changed {
        updated.update(name, &after);
    }
    assert!(after.changed_since(&updated).is_empty());
}
