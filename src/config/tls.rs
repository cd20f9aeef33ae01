//! The TLS settings of both listeners, validated together with the files that they name.

use std::num::NonZero;
use std::path::PathBuf;

use jiff::Timestamp;

use super::{
    keys::{self, Key},
    settings::Settings,
};
use crate::tls::{
    ClientAuth, ClientVerification, Config, FileError, FileSetting, KeyPairFiles, TlsAcceptor,
    Version,
};

pub(super) const PEM_PATH: &str = "the path of a file (PEM)";

/// The path of a file, which is read elsewhere. Rejects PEM text: it is the contents of such a file, and
/// must not be repeated in an error.
pub(super) fn file_path(text: &str) -> Option<PathBuf> {
    (!text.is_empty() && !text.contains("-----BEGIN")).then(|| PathBuf::from(text))
}

/// The TLS options of one listener.
pub(super) struct Keys {
    listener: &'static str,
    /// The option that enables TLS; without it the others have no effect.
    enable: &'static Key,
    certificate: &'static Key,
    private_key: &'static Key,
    client_ca: &'static Key,
    client_auth: &'static Key,
    crl: &'static Key,
}

pub(super) static DATA: Keys = Keys {
    listener: "data",
    enable: &keys::TLS_ENABLE,
    certificate: &keys::TLS_SERVER_CERT,
    private_key: &keys::TLS_SERVER_KEY,
    client_ca: &keys::TLS_CLIENT_CA_FILE,
    client_auth: &keys::TLS_CLIENT_AUTH,
    crl: &keys::TLS_CRL_FILE,
};

pub(super) static ADMIN: Keys = Keys {
    listener: "admin",
    enable: &keys::ADMIN_TLS_CERT,
    certificate: &keys::ADMIN_TLS_CERT,
    private_key: &keys::ADMIN_TLS_KEY,
    client_ca: &keys::ADMIN_TLS_CLIENT_CA_FILE,
    client_auth: &keys::ADMIN_TLS_CLIENT_AUTH,
    crl: &keys::ADMIN_TLS_CRL_FILE,
};

/// The TLS configuration of the data listener, if it is enabled.
pub(super) fn data_listener(s: &mut Settings) -> Option<Config> {
    let is_enabled = s.switch(&keys::TLS_ENABLE);
    if s.switch(&keys::REDIRECT_HTTP_TO_HTTPS) && !is_enabled {
        warn_without(s, &keys::REDIRECT_HTTP_TO_HTTPS, &keys::TLS_ENABLE);
    }
    listener(s, &DATA, is_enabled)
}

/// The TLS configuration of the admin listener, if a certificate or a key is set.
pub(super) fn admin_listener(s: &mut Settings) -> Option<Config> {
    let is_enabled = s.has(ADMIN.certificate) || s.has(ADMIN.private_key);
    listener(s, &ADMIN, is_enabled)
}

/// Whether a listener with TLS rejects clients without a certificate.
pub(super) fn requires_certificates(s: &mut Settings, keys: &Keys) -> bool {
    client_auth(s, keys) == ClientAuth::Required && s.has(keys.client_ca)
}

fn client_auth(s: &mut Settings, keys: &Keys) -> ClientAuth {
    s.value(keys.client_auth, "required or optional", ClientAuth::parse)
}

/// Warns of options that apply to both listeners if neither has TLS.
pub(super) fn warn_of_unused(s: &mut Settings) {
    let keys =
        [&keys::TLS_MIN_VERSION, &keys::TLS_HANDSHAKE_TIMEOUT_SECONDS, &keys::TLS_MAX_HANDSHAKES];
    for key in keys {
        if s.has(key) {
            warn_without(s, key, &keys::TLS_ENABLE);
        }
    }
}

fn warn_without(s: &mut Settings, key: &Key, other: &Key) {
    s.warnings.push(format!("--{} has no effect without --{}", key.name, other.name));
}

fn listener(s: &mut Settings, keys: &Keys, is_enabled: bool) -> Option<Config> {
    let certificates = s.list(keys.certificate, PEM_PATH, file_path);
    let private_keys = s.list(keys.private_key, PEM_PATH, file_path);
    let ca_file = s.read(keys.client_ca, PEM_PATH, file_path);
    let auth = client_auth(s, keys);
    let crl_file = s.read(keys.crl, PEM_PATH, file_path);
    let min_version = s.value(&keys::TLS_MIN_VERSION, "1.2 or 1.3", Version::parse);
    let handshake_timeout = s.interval(&keys::TLS_HANDSHAKE_TIMEOUT_SECONDS);
    let half = std::thread::available_parallelism().map_or(1, NonZero::get).div_ceil(2);
    let max_handshakes = s.count_or(&keys::TLS_MAX_HANDSHAKES, half);
    if !is_enabled {
        for key in [keys.certificate, keys.private_key, keys.client_ca, keys.client_auth, keys.crl]
        {
            if s.has(key) {
                warn_without(s, key, keys.enable);
            }
        }
        return None;
    }
    for key in [keys.certificate, keys.private_key] {
        if !s.has(key) {
            s.mistake(key, format!("is required for TLS: {PEM_PATH}"));
        }
    }
    if s.has(keys.certificate)
        && s.has(keys.private_key)
        && certificates.len() != private_keys.len()
    {
        let (name, expected) = (keys.certificate.name, certificates.len());
        let reason = format!(
            "expected {expected} files, one for each of --{name}, not {}",
            private_keys.len()
        );
        s.mistake(keys.private_key, reason);
    }
    for key in [keys.client_auth, keys.crl] {
        if s.has(key) && !s.has(keys.client_ca) {
            s.mistake(key, format!("requires --{}", keys.client_ca.name));
        }
    }
    let pair = |(certificate_file, key_file)| KeyPairFiles { certificate_file, key_file };
    let config = Config {
        listener: keys.listener,
        key_pairs: certificates.into_iter().zip(private_keys).map(pair).collect(),
        min_version,
        client_verification: ca_file.map(|ca_file| ClientVerification { ca_file, auth, crl_file }),
        handshake_timeout,
        max_handshakes,
    };
    match TlsAcceptor::new(config.clone()) {
        Ok(server) => s.warnings.extend(server.warnings(Timestamp::now())),
        Err(problems) => {
            for FileError { setting, reason } in problems.iter() {
                let key = match setting {
                    FileSetting::Certificate => keys.certificate,
                    FileSetting::Key => keys.private_key,
                    FileSetting::ClientCa => keys.client_ca,
                    FileSetting::Crl => keys.crl,
                };
                s.mistake(key, reason.as_str());
            }
        }
    }
    Some(config)
}
