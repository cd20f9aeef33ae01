//! The TLS settings as operators use them.

use std::time::Duration;

use crate::config::tests::{EDGE, certificates, config, errors};

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
