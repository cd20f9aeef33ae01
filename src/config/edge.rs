//! The settings of an edge: upstream, credentials, and the folder of stored state.

use std::{collections::BTreeSet, path::Path};

use reqwest::{
    Url,
    header::{HeaderName, HeaderValue},
};

use super::{
    model::{BackupFolder, Credentials, EdgeConfig, InstanceInfo, StoreConfig},
    options,
    raw::RawSettings,
    store::edge_store,
    tls::{EXPECTED_PEM_PATH, parse_file_path},
    values::{
        EXPECTED_FILE, EXPECTED_HTTP_URL, existing_file, parse_http_url, required, token_headers,
    },
};
use crate::{
    fleet, sync,
    telemetry::error_chain,
    token::{Environment, Token},
    upstream::{self, AdminToken, ClientCertificateError, Passphrase},
};

pub(super) fn edge(
    s: &mut RawSettings,
    identity: &InstanceInfo,
    data_dir: &Path,
) -> Option<EdgeConfig> {
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
    let folder = backup_folder(s, data_dir);
    let store = edge_store(s, folder);
    let admin_relay = s.switch(&options::ADMIN_RELAY);
    let is_fleet = s.parse_optional(&options::FLEET, "on or off", |text| match text {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    });
    let parse_sharing = |text: &str| match text {
        "shared" => Some(true),
        "own" => Some(false),
        _ => None,
    };
    let shares_usage = s.parse_or_default(&options::FLEET_USAGE, "shared or own", parse_sharing);
    let (upstream, credentials, store) = (upstream?, credentials?, store?);
    let fleet = match is_fleet {
        Some(false) => None,
        Some(true) | None => fleet(&upstream, &credentials, &store),
    };
    match (is_fleet, &fleet, &store) {
        (Some(true), None, StoreConfig::Redis(_)) => s.report_error(
            &options::FLEET,
            "needs an admin token (--upstream-admin-token): backend tokens of several instances may be \
             for different projects, so their flags cannot be shared",
        ),
        (Some(true), None, StoreConfig::Folder(_) | StoreConfig::Bucket(_)) => s.report_error(
            &options::FLEET,
            "needs a Redis that the instances share (--store redis://…)",
        ),
        (Some(_) | None, _, _) => {}
    }
    Some(EdgeConfig { upstream, credentials, sync, store, fleet, shares_usage, admin_relay })
}

/// The fleet, if the store and the credentials allow one.
///
/// Without an admin token each instance fetches the flags that its own tokens may read. Those of one
/// instance would not be sufficient for the tokens of another.
fn fleet(
    upstream: &upstream::Config,
    credentials: &Credentials,
    store: &StoreConfig,
) -> Option<fleet::Config> {
    let StoreConfig::Redis(redis) = store else { return None };
    let Credentials::Admin { fleet, .. } = credentials else { return None };
    Some(fleet::Config {
        prefix: redis.prefix.clone(),
        name: fleet.clone(),
        upstream: format!("{}{}", upstream.url.origin().ascii_serialization(), upstream.url.path()),
        instance_name: upstream.instance_id.clone(),
        timing: fleet::Timing::default(),
    })
}

/// The backup directory, from either option. An empty `--backup-folder` counts as not set, because
/// deployments of Unleash Edge set it so.
fn backup_folder(s: &RawSettings, data_dir: &Path) -> BackupFolder {
    let named = s.path_value(&options::BACKUP_FOLDER).filter(|path| !path.as_os_str().is_empty());
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
    let fleet = s.parse_or_default(
        &options::FLEET_NAME,
        "at most 64 letters, digits, `-`, `_` or `.`",
        |text| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (!text.is_empty() && text.len() <= 64 && text.chars().all(fits))
                .then(|| text.to_owned())
        },
    );
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
    let client_certificate = client_certificate(s);
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
        client_certificate,
        skip_certificate_verification,
        no_proxy: s.no_proxy.clone(),
        app_name: identity.app_name.clone(),
        instance_id: identity.instance_id.clone(),
    })
}

/// The client certificate for upstream, in one of three forms.
fn client_certificate(s: &mut RawSettings) -> Option<upstream::ClientCertificateFiles> {
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
            upstream::ClientCertificateFiles::PemPair { certificate_file, key_file }
        }
        (_, Some(file), _) => {
            let passphrase = Passphrase::new(s.text(&PKCS12_PASSPHRASE).unwrap_or_default());
            upstream::ClientCertificateFiles::Pkcs12 { file, passphrase }
        }
        (_, _, Some(file)) => upstream::ClientCertificateFiles::PemFile(file),
        (None, None, None) => return None,
    };
    if let Err(error) = identity.load() {
        let key = match (&identity, &error) {
            (_, ClientCertificateError::Passphrase { .. }) => &PKCS12_PASSPHRASE,
            (upstream::ClientCertificateFiles::Pkcs12 { .. }, _) => &PKCS12_IDENTITY_FILE,
            (upstream::ClientCertificateFiles::PemFile(_), _) => &PEM_CERT_FILE,
            (_, ClientCertificateError::Key(_)) => &PKCS8_CLIENT_KEY_FILE,
            (upstream::ClientCertificateFiles::PemPair { .. }, _) => &PKCS8_CLIENT_CERTIFICATE_FILE,
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

/// Parses a header, as `Name: value` (the form of curl) or `name=value`. The value is marked as
/// sensitive.
fn parse_header(text: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once([':', '='])?;
    let mut value = HeaderValue::from_str(value.trim()).ok()?;
    value.set_sensitive(true);
    Some((name.trim().parse().ok()?, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{
        ADMIN, Certificates, EDGE, TOKEN, certificates, config, config_file, edge, errors, printed,
    };

    #[test]
    fn backup_folder_is_set_by_either_option_unless_empty() {
        let of = |line: &str, env: &[(&str, &str)]| match edge(&format!("{EDGE} {line}"), env).store
        {
            StoreConfig::Folder(folder) => folder,
            other => panic!("{other:?}"),
        };
        let default = BackupFolder::Default("data/backup".into());
        assert_eq!(of("", &[("BACKUP_FOLDER", "")]), default);
        assert_eq!(of("--backup-folder=", &[]), default);
        assert_eq!(of("", &[("BACKUP_FOLDER", "/b")]), BackupFolder::Configured("/b".into()));
        assert_eq!(
            of("--backup-folder= --data-dir /d", &[]),
            BackupFolder::Configured("/d/backup".into())
        );
        let (_folder, path) = config_file("data_dir = '/d'");
        assert_eq!(
            of("", &[("PARAPET_CONFIG", &path)]),
            BackupFolder::Configured("/d/backup".into())
        );
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
    fn upstream_url_with_api_is_printed_without_it() {
        let shown = printed("edge -u http://unleash:4242/base/api/ --check-config", &[]);
        assert!(shown.contains("# Warning: --upstream-url must not end with /api"), "{shown}");
        assert!(shown.contains("upstream_url = \"http://unleash:4242/base\" # -"), "{shown}");
    }

    #[test]
    fn client_certificate_for_upstream_has_three_forms() {
        use crate::upstream::{ClientCertificateFiles, Passphrase};
        let Certificates { certificate, key, both, pkcs12, .. } = &certificates();
        let check = |env: &[(&str, &str)], expected: ClientCertificateFiles| {
            assert_eq!(edge(EDGE, env).upstream.client_certificate, Some(expected));
        };
        let pair =
            [("PKCS8_CLIENT_CERTIFICATE_FILE", &**certificate), ("PKCS8_CLIENT_KEY_FILE", &**key)];
        check(
            &pair,
            ClientCertificateFiles::PemPair {
                certificate_file: certificate.into(),
                key_file: key.into(),
            },
        );
        check(&[("PEM_CERT_FILE", both)], ClientCertificateFiles::PemFile(both.into()));
        let passphrase = Passphrase::new("word");
        let env = [("PKCS12_IDENTITY_FILE", &**pkcs12), ("PKCS12_PASSPHRASE", "word")];
        check(&env, ClientCertificateFiles::Pkcs12 { file: pkcs12.into(), passphrase });

        let messages =
            errors(EDGE, &[("PKCS12_IDENTITY_FILE", pkcs12), ("PKCS12_PASSPHRASE", "w0rd")]);
        assert_eq!(messages, [format!("PKCS12_PASSPHRASE: the passphrase does not open {pkcs12}")]);
        let messages = errors(EDGE, &[("PKCS12_IDENTITY_FILE", both)]);
        let expected =
            format!("PKCS12_IDENTITY_FILE: {both} is not a PKCS #12 file that can be read");
        assert!(messages.len() == 1 && messages[0].starts_with(&expected), "{messages:?}");
        let messages = errors(EDGE, &[("PEM_CERT_FILE", certificate)]);
        assert!(
            messages[0].contains("contains no private key") && messages.len() == 1,
            "{messages:?}"
        );
        let messages = errors(EDGE, &[("PEM_CERT_FILE", both), ("PKCS12_IDENTITY_FILE", pkcs12)]);
        assert_eq!(messages, ["PEM_CERT_FILE: cannot be combined with --pkcs12-identity-file"]);
        let other = certificates();
        let messages = errors(EDGE, &[pair[0], ("PKCS8_CLIENT_KEY_FILE", &other.key)]);
        assert!(
            messages[0].starts_with("PKCS8_CLIENT_KEY_FILE: the private key in "),
            "{messages:?}"
        );
    }

    #[test]
    fn admin_token_is_read_from_option_or_file_but_not_both() {
        let (_folder, path) = config_file(&format!("{ADMIN}\n"));
        for env in [[("UPSTREAM_ADMIN_TOKEN", ADMIN)], [("UPSTREAM_ADMIN_TOKEN_FILE", &*path)]] {
            let line = format!("{EDGE} --environments dev,prod --fleet-name eu");
            let Credentials::Admin { token, file, fleet, environments } =
                edge(&line, &env).credentials
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

    #[test]
    fn fleet_is_on_with_a_shared_redis_and_an_admin_token() {
        let fleet = |line: &str, env: &[(&str, &str)]| edge(&format!("{EDGE} {line}"), env).fleet;
        let admin = ("UPSTREAM_ADMIN_TOKEN", ADMIN);
        let redis = ("REDIS_URL", "redis://h/0");
        let found = fleet("--fleet-name eu --instance-id a", &[admin, redis]).expect("a fleet");
        assert_eq!((&*found.name, &*found.instance_name), ("eu", "a"));
        assert_eq!((&*found.prefix, &*found.upstream), ("parapet", "http://unleash:4242/"));
        assert!(fleet("--fleet on --store redis://h?prefix=p", &[admin]).is_some());
        let shares_usage = |line: &str| edge(&format!("{EDGE} {line}"), &[admin]).shares_usage;
        assert!(shares_usage("") && !shares_usage("--fleet-usage own"));
        for env in [&[admin][..], &[redis], &[admin, redis, ("PARAPET_FLEET", "off")]] {
            assert!(fleet("", env).is_none(), "{env:?}");
        }
    }

    #[test]
    fn fleet_needs_a_shared_redis_and_an_admin_token() {
        let messages = |env: &[(&str, &str)]| errors(&format!("{EDGE} --fleet on"), env);
        let found = messages(&[("UPSTREAM_ADMIN_TOKEN", ADMIN)]);
        assert!(
            found[0].starts_with("--fleet: needs a Redis that the instances share"),
            "{found:?}"
        );
        let found = messages(&[("REDIS_URL", "redis://h/0")]);
        assert!(found[0].starts_with("--fleet: needs an admin token"), "{found:?}");
        let expected = "--fleet: expected on or off, not `maybe`";
        assert_eq!(errors(&format!("{EDGE} --fleet maybe"), &[]), [expected]);
        let expected = "--fleet-usage: expected shared or own, not `maybe`";
        assert_eq!(errors(&format!("{EDGE} --fleet-usage maybe"), &[]), [expected]);
        let expected =
            "--fleet-name: expected at most 64 letters, digits, `-`, `_` or `.`, not `a b`";
        let env = [("UPSTREAM_ADMIN_TOKEN", ADMIN)];
        let args = format!("{EDGE} --fleet-name=a{{}}b");
        assert_eq!(errors(&args, &env), [expected.replace("a b", "a{}b")]);
        errors(&format!("{EDGE} --fleet-name={}", "a".repeat(65)), &env);
    }

    #[test]
    fn token_of_one_environment_is_rejected_as_admin_token() {
        let messages = errors(EDGE, &[("UPSTREAM_ADMIN_TOKEN", TOKEN)]);
        assert!(
            messages[0].contains("expected an admin token; this one is for the environment"),
            "{messages:?}"
        );
        assert!(!messages[0].contains(TOKEN), "{messages:?}");
        let personal =
            edge(EDGE, &[("UPSTREAM_ADMIN_TOKEN", "user:0123456789abcdef0123456789abcdef")]);
        assert!(matches!(personal.credentials, Credentials::Admin { .. }));
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
}
