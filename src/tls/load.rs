//! Loads the files of a configuration into a rustls configuration, or reports all errors in them.

use std::{path::PathBuf, sync::Arc};

use jiff::Timestamp;
use rustls::{
    RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::CertificateRevocationListDer,
    server::{
        NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use x509_parser::parse_x509_crl;
use xxhash_rust::xxh3::Xxh3;
use zeroize::Zeroizing;

use super::{
    certificate::Certificate,
    client_verification,
    config::{ClientVerification, Config, KeyPairFiles, Version},
    file_error::{FileError, FileErrors, FileSetting},
    handshake::Alpn,
    pem,
    sni_resolver::SniResolver,
};
use crate::telemetry::error_chain;

/// The configuration that handshakes use, loaded from files.
#[derive(Debug)]
pub(super) struct LoadedConfig {
    pub(super) server_config: Arc<ServerConfig>,
    /// The leaf certificate of each pair.
    pub(super) certificates: Vec<Certificate>,
    /// The file of revocation lists, and the earliest time at which one becomes outdated.
    crl_next_update: Option<(PathBuf, Timestamp)>,
    /// The hash of the contents of the files.
    pub(super) digest: u64,
}

impl LoadedConfig {
    /// Warnings about the validity of certificates and revocation lists.
    pub(super) fn warnings(&self, now: Timestamp) -> Vec<String> {
        let outdated = self.crl_next_update.as_ref().filter(|(_, until)| *until < now);
        let outdated = outdated.map(|(file, until)| {
            let file = file.display();
            format!(
                "a revocation list in {file} has been out of date since {until}; it stays in use"
            )
        });
        let certificates = self.certificates.iter().filter_map(|it| it.warning(now));
        certificates.chain(outdated).collect()
    }
}

/// The contents of a file, or the error of reading it.
type FileContents = Result<Zeroizing<Vec<u8>>, String>;

/// The contents of all files of a configuration, read once so that they are consistent.
pub(super) struct TlsFiles {
    /// Certificate chains and keys.
    key_pairs: Vec<[FileContents; 2]>,
    client_ca: Option<FileContents>,
    crl: Option<FileContents>,
}

impl TlsFiles {
    /// Reads the files. Blocks on the file system.
    pub(super) fn read(config: &Config) -> Self {
        let read = |path: &PathBuf| pem::read_file(path).map_err(|error| error_chain(&error));
        let clients = config.client_verification.as_ref();
        Self {
            key_pairs: config
                .key_pairs
                .iter()
                .map(|pair| [&pair.certificate_file, &pair.key_file].map(read))
                .collect(),
            client_ca: clients.map(|clients| read(&clients.ca_file)),
            crl: clients.and_then(|clients| clients.crl_file.as_ref()).map(read),
        }
    }

    /// A hash of the contents; equal contents have equal hashes.
    pub(super) fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for contents in self.key_pairs.iter().flatten().chain(&self.client_ca).chain(&self.crl) {
            let (is_read, bytes) = match contents {
                Ok(bytes) => (true, &bytes[..]),
                Err(error) => (false, error.as_bytes()),
            };
            hash.update(&[is_read.into()]);
            hash.update(&bytes.len().to_le_bytes());
            hash.update(bytes);
        }
        hash.digest()
    }

    /// Builds the configuration for handshakes. With `tickets`, clients can resume sessions.
    pub(super) fn build_config(
        &self,
        config: &Config,
        tickets: Option<&Arc<dyn ProducesTickets>>,
    ) -> Result<LoadedConfig, FileErrors> {
        let provider = Arc::new(ring::default_provider());
        let mut problems = ErrorCollector::default();
        let (mut pairs, mut certificates) = (Vec::new(), Vec::new());
        for (pair, contents) in config.key_pairs.iter().zip(&self.key_pairs) {
            if let Some((certified, certificate)) = problems.parse_key_pair(pair, contents) {
                pairs.push(certified);
                certificates.push(certificate);
            }
        }
        let mut crl_next_update = None;
        let verifier = match (&config.client_verification, &self.client_ca) {
            (Some(clients), Some(ca)) => {
                let (verifier, until) =
                    problems.build_client_verifier(&provider, clients, ca, self.crl.as_ref());
                crl_next_update = clients.crl_file.clone().zip(until);
                verifier
            }
            _ => Some(WebPkiClientVerifier::no_client_auth()),
        };
        FileErrors::check_empty(problems.0)?;
        let verifier = verifier.expect("a verifier that cannot be built is an error");
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(protocol_versions(config.min_version))
            .expect("the provider supports both versions")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SniResolver::new(pairs)));
        tls.alpn_protocols = Alpn::ALL.map(|alpn| alpn.as_bytes().to_vec()).into();
        // Clients store sessions in tickets; the server stores none.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        match tickets {
            Some(tickets) => tls.ticketer = Arc::clone(tickets),
            None => tls.send_tls13_tickets = 0,
        }
        let server_config = Arc::new(tls);
        Ok(LoadedConfig { server_config, certificates, crl_next_update, digest: self.digest() })
    }
}

fn protocol_versions(min: Version) -> &'static [&'static SupportedProtocolVersion] {
    static FROM_1_2: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    match min {
        Version::Tls12 => &FROM_1_2,
        Version::Tls13 => &FROM_1_2[..1],
    }
}

/// The errors found so far.
#[derive(Default)]
struct ErrorCollector(Vec<FileError>);

impl ErrorCollector {
    fn add(&mut self, setting: FileSetting, reason: String) {
        self.0.push(FileError { setting, reason });
    }

    /// Parses the contents of a file; collects the error if that fails.
    fn parse_file<T>(
        &mut self,
        setting: FileSetting,
        contents: &FileContents,
        parse: impl FnOnce(&[u8]) -> Result<T, pem::Error>,
    ) -> Option<T> {
        let parsed = match contents {
            Ok(pem) => parse(pem).map_err(|error| error_chain(&error)),
            Err(reason) => Err(reason.clone()),
        };
        parsed.map_err(|reason| self.add(setting, reason)).ok()
    }

    fn parse_key_pair(
        &mut self,
        KeyPairFiles { certificate_file, key_file }: &KeyPairFiles,
        [chain, key]: &[FileContents; 2],
    ) -> Option<(CertifiedKey, Certificate)> {
        let chain = self.parse_file(FileSetting::Certificate, chain, |pem| {
            let chain = pem::certificates(certificate_file, pem)?;
            let leaf = Certificate::parse(certificate_file, &chain[0])?;
            Ok((chain, leaf))
        });
        let key = self.parse_file(FileSetting::Key, key, |pem| pem::private_key(key_file, pem));
        let ((chain, leaf), key) = chain.zip(key)?;
        match pem::certified_key((certificate_file, chain), (key_file, key)) {
            Ok(certified) => Some((certified, leaf)),
            Err(error) => {
                let setting = match error {
                    pem::Error::InvalidCertificate { .. } | pem::Error::X509Version1 { .. } => {
                        FileSetting::Certificate
                    }
                    _ => FileSetting::Key,
                };
                self.add(setting, error_chain(&error));
                None
            }
        }
    }

    /// Builds the verifier of client certificates. Also returns the earliest time at which a revocation
    /// list becomes outdated.
    fn build_client_verifier(
        &mut self,
        provider: &Arc<CryptoProvider>,
        clients: &ClientVerification,
        ca: &FileContents,
        crl: Option<&FileContents>,
    ) -> (Option<Arc<dyn ClientCertVerifier>>, Option<Timestamp>) {
        let ClientVerification { ca_file, auth, crl_file } = clients;
        let roots = self.parse_file(FileSetting::ClientCa, ca, |pem| {
            let mut roots = RootCertStore::empty();
            for certificate in pem::certificates(ca_file, pem)? {
                let failed = |_| pem::Error::InvalidCertificate { path: ca_file.clone() };
                roots.add(certificate).map_err(failed)?;
            }
            Ok(roots)
        });
        let crls = match (crl_file, crl) {
            (Some(file), Some(crl)) => {
                self.parse_file(FileSetting::Crl, crl, |pem| pem::crls(file, pem))
            }
            _ => Some(Vec::new()),
        };
        let Some((roots, crls)) = roots.zip(crls) else { return (None, None) };
        let until = crls.iter().filter_map(crl_next_update).min();
        match client_verification::client_verifier(provider, roots, crls, *auth) {
            Ok(verifier) => (Some(verifier), until),
            Err(error) => {
                let file = crl_file.as_ref().unwrap_or(ca_file).display();
                let reason = format!("{file} contains an invalid revocation list: {error}");
                self.add(FileSetting::Crl, reason);
                (None, None)
            }
        }
    }
}

fn crl_next_update(crl: &CertificateRevocationListDer<'_>) -> Option<Timestamp> {
    let (_, crl) = parse_x509_crl(crl).ok()?;
    Timestamp::from_second(crl.next_update()?.timestamp()).ok()
}
