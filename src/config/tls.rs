//! The TLS settings of both listeners, validated together with the files that they name.

use std::num::NonZero;
use std::path::PathBuf;

use jiff::Timestamp;

use super::{option_spec::OptionSpec, options, raw::RawSettings};
use crate::tls::{
    ClientAuth, ClientVerification, Config, FileError, FileSetting, KeyPairFiles, TlsAcceptor,
    Version,
};

pub(super) const EXPECTED_PEM_PATH: &str = "the path of a file (PEM)";

/// The path of a file, which is read elsewhere. Rejects PEM text: it is the contents of such a file, and
/// must not be repeated in an error.
pub(super) fn parse_file_path(text: &str) -> Option<PathBuf> {
    (!text.is_empty() && !text.contains("-----BEGIN")).then(|| PathBuf::from(text))
}

/// The TLS options of one listener.
pub(super) struct ListenerOptions {
    listener: &'static str,
    /// The option that enables TLS; without it the others have no effect.
    enabled_by: &'static OptionSpec,
    certificate: &'static OptionSpec,
    private_key: &'static OptionSpec,
    client_ca: &'static OptionSpec,
    client_auth: &'static OptionSpec,
    crl: &'static OptionSpec,
}

pub(super) static DATA: ListenerOptions = ListenerOptions {
    listener: "data",
    enabled_by: &options::TLS_ENABLE,
    certificate: &options::TLS_SERVER_CERT,
    private_key: &options::TLS_SERVER_KEY,
    client_ca: &options::TLS_CLIENT_CA_FILE,
    client_auth: &options::TLS_CLIENT_AUTH,
    crl: &options::TLS_CRL_FILE,
};

pub(super) static ADMIN: ListenerOptions = ListenerOptions {
    listener: "admin",
    enabled_by: &options::ADMIN_TLS_CERT,
    certificate: &options::ADMIN_TLS_CERT,
    private_key: &options::ADMIN_TLS_KEY,
    client_ca: &options::ADMIN_TLS_CLIENT_CA_FILE,
    client_auth: &options::ADMIN_TLS_CLIENT_AUTH,
    crl: &options::ADMIN_TLS_CRL_FILE,
};

/// The TLS configuration of the data listener, if it is enabled.
pub(super) fn data_listener(s: &mut RawSettings) -> Option<Config> {
    let is_enabled = s.switch(&options::TLS_ENABLE);
    if s.switch(&options::REDIRECT_HTTP_TO_HTTPS) && !is_enabled {
        warn_no_effect_without(s, &options::REDIRECT_HTTP_TO_HTTPS, &options::TLS_ENABLE);
    }
    listener(s, &DATA, is_enabled)
}

/// The TLS configuration of the admin listener, if a certificate or a key is set.
pub(super) fn admin_listener(s: &mut RawSettings) -> Option<Config> {
    let is_enabled = s.is_set(ADMIN.certificate) || s.is_set(ADMIN.private_key);
    listener(s, &ADMIN, is_enabled)
}

/// Whether a listener with TLS rejects clients without a certificate.
pub(super) fn requires_client_certificates(s: &mut RawSettings, keys: &ListenerOptions) -> bool {
    client_auth(s, keys) == ClientAuth::Required && s.is_set(keys.client_ca)
}

fn client_auth(s: &mut RawSettings, keys: &ListenerOptions) -> ClientAuth {
    s.parse_or_default(keys.client_auth, "required or optional", ClientAuth::parse)
}

/// Warns of options that apply to both listeners if neither has TLS.
pub(super) fn warn_without_tls(s: &mut RawSettings) {
    let keys = [
        &options::TLS_MIN_VERSION,
        &options::TLS_HANDSHAKE_TIMEOUT_SECONDS,
        &options::TLS_MAX_HANDSHAKES,
    ];
    for key in keys {
        if s.is_set(key) {
            warn_no_effect_without(s, key, &options::TLS_ENABLE);
        }
    }
}

fn warn_no_effect_without(s: &mut RawSettings, key: &OptionSpec, other: &OptionSpec) {
    s.warnings.push(format!("--{} has no effect without --{}", key.name, other.name));
}

fn listener(s: &mut RawSettings, keys: &ListenerOptions, is_enabled: bool) -> Option<Config> {
    let certificates = s.parse_list(keys.certificate, EXPECTED_PEM_PATH, parse_file_path);
    let private_keys = s.parse_list(keys.private_key, EXPECTED_PEM_PATH, parse_file_path);
    let ca_file = s.parse_optional(keys.client_ca, EXPECTED_PEM_PATH, parse_file_path);
    let auth = client_auth(s, keys);
    let crl_file = s.parse_optional(keys.crl, EXPECTED_PEM_PATH, parse_file_path);
    let min_version = s.parse_or_default(&options::TLS_MIN_VERSION, "1.2 or 1.3", Version::parse);
    let handshake_timeout = s.interval(&options::TLS_HANDSHAKE_TIMEOUT_SECONDS);
    let half = std::thread::available_parallelism().map_or(1, NonZero::get).div_ceil(2);
    let max_handshakes = s.count_or(&options::TLS_MAX_HANDSHAKES, half);
    if !is_enabled {
        for key in [keys.certificate, keys.private_key, keys.client_ca, keys.client_auth, keys.crl]
        {
            if s.is_set(key) {
                warn_no_effect_without(s, key, keys.enabled_by);
            }
        }
        return None;
    }
    for key in [keys.certificate, keys.private_key] {
        if !s.is_set(key) {
            s.report_error(key, format!("is required for TLS: {EXPECTED_PEM_PATH}"));
        }
    }
    if s.is_set(keys.certificate)
        && s.is_set(keys.private_key)
        && certificates.len() != private_keys.len()
    {
        let (name, expected) = (keys.certificate.name, certificates.len());
        let reason = format!(
            "expected {expected} files, one for each of --{name}, not {}",
            private_keys.len()
        );
        s.report_error(keys.private_key, reason);
    }
    for key in [keys.client_auth, keys.crl] {
        if s.is_set(key) && !s.is_set(keys.client_ca) {
            s.report_error(key, format!("requires --{}", keys.client_ca.name));
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
                s.report_error(key, reason.as_str());
            }
        }
    }
    Some(config)
}

#[cfg(test)]
mod tests;
