//! From the files of a configuration to what handshakes use, or everything that is wrong with them.

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
    client,
    config::{Clients, Config, Pair, Version},
    handshake::Alpn,
    pem,
    problem::{Problem, Problems, Setting},
    resolver::ByName,
};
use crate::telemetry::report;

/// What handshakes use.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) tls: Arc<ServerConfig>,
    /// The leaf of each pair.
    pub(super) certificates: Vec<Certificate>,
    /// The file of revocation lists, and when the first of them goes out of date.
    crl_until: Option<(PathBuf, Timestamp)>,
    /// Identifies the contents of the files.
    pub(super) digest: u64,
}

impl Loaded {
    /// What an operator has to know of the validity of certificates and revocation lists.
    pub(super) fn warnings(&self, now: Timestamp) -> Vec<String> {
        let outdated = self.crl_until.as_ref().filter(|(_, until)| *until < now);
        let outdated = outdated.map(|(file, until)| {
            let file = file.display();
            format!(
                "a revocation list in {file} has been out of date since {until}; it is still used"
            )
        });
        let certificates = self.certificates.iter().filter_map(|it| it.warning(now));
        certificates.chain(outdated).collect()
    }
}

/// What a file contains, or why it cannot be read.
type Contents = Result<Zeroizing<Vec<u8>>, String>;

/// The files of a configuration, read once, so that all that is made of them fits together.
pub(super) struct Files {
    /// Certificate chains and keys.
    pairs: Vec<[Contents; 2]>,
    client_ca: Option<Contents>,
    crl: Option<Contents>,
}

impl Files {
    /// Reads them; blocks for as long as the file system does.
    pub(super) fn read(config: &Config) -> Self {
        let read = |path: &PathBuf| pem::read(path).map_err(|error| report(&error));
        let clients = config.clients.as_ref();
        Self {
            pairs: config
                .pairs
                .iter()
                .map(|pair| [&pair.certificate_file, &pair.key_file].map(read))
                .collect(),
            client_ca: clients.map(|clients| read(&clients.ca_file)),
            crl: clients.and_then(|clients| clients.crl_file.as_ref()).map(read),
        }
    }

    /// Equal for equal contents.
    pub(super) fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        for contents in self.pairs.iter().flatten().chain(&self.client_ca).chain(&self.crl) {
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

    /// What handshakes are to use. With `tickets` clients may resume sessions by them.
    pub(super) fn load(
        &self,
        config: &Config,
        tickets: Option<&Arc<dyn ProducesTickets>>,
    ) -> Result<Loaded, Problems> {
        let provider = Arc::new(ring::default_provider());
        let mut problems = Found::default();
        let (mut pairs, mut certificates) = (Vec::new(), Vec::new());
        for (pair, contents) in config.pairs.iter().zip(&self.pairs) {
            if let Some((certified, certificate)) = problems.pair(pair, contents) {
                pairs.push(certified);
                certificates.push(certificate);
            }
        }
        let mut crl_until = None;
        let verifier = match (&config.clients, &self.client_ca) {
            (Some(clients), Some(ca)) => {
                let (verifier, until) = problems.clients(&provider, clients, ca, self.crl.as_ref());
                crl_until = clients.crl_file.clone().zip(until);
                verifier
            }
            _ => Some(WebPkiClientVerifier::no_client_auth()),
        };
        Problems::none_in(problems.0)?;
        let verifier = verifier.expect("a verifier that cannot be built is a problem");
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions(config.min_version))
            .expect("the provider supports both versions")
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(ByName::new(pairs)));
        tls.alpn_protocols = Alpn::ALL.map(|alpn| alpn.as_bytes().to_vec()).into();
        // Sessions are kept by clients, in tickets; nothing is kept here for each.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        match tickets {
            Some(tickets) => tls.ticketer = Arc::clone(tickets),
            None => tls.send_tls13_tickets = 0,
        }
        let tls = Arc::new(tls);
        Ok(Loaded { tls, certificates, crl_until, digest: self.digest() })
    }
}

fn versions(min: Version) -> &'static [&'static SupportedProtocolVersion] {
    static FROM_1_2: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    match min {
        Version::Tls12 => &FROM_1_2,
        Version::Tls13 => &FROM_1_2[..1],
    }
}

/// The problems that were found so far.
#[derive(Default)]
struct Found(Vec<Problem>);

impl Found {
    fn add(&mut self, setting: Setting, reason: String) {
        self.0.push(Problem { setting, reason });
    }

    /// What a file contains, parsed.
    fn parse<T>(
        &mut self,
        setting: Setting,
        contents: &Contents,
        parse: impl FnOnce(&[u8]) -> Result<T, pem::Error>,
    ) -> Option<T> {
        let parsed = match contents {
            Ok(pem) => parse(pem).map_err(|error| report(&error)),
            Err(reason) => Err(reason.clone()),
        };
        parsed.map_err(|reason| self.add(setting, reason)).ok()
    }

    fn pair(
        &mut self,
        Pair { certificate_file, key_file }: &Pair,
        [chain, key]: &[Contents; 2],
    ) -> Option<(CertifiedKey, Certificate)> {
        let chain = self.parse(Setting::Certificate, chain, |pem| {
            let chain = pem::certificates(certificate_file, pem)?;
            let leaf = Certificate::parse(certificate_file, &chain[0])?;
            Ok((chain, leaf))
        });
        let key = self.parse(Setting::Key, key, |pem| pem::private_key(key_file, pem));
        let ((chain, leaf), key) = chain.zip(key)?;
        match pem::pair((certificate_file, chain), (key_file, key)) {
            Ok(certified) => Some((certified, leaf)),
            Err(error) => {
                let setting = match error {
                    pem::Error::Certificate { .. } | pem::Error::OldCertificate { .. } => {
                        Setting::Certificate
                    }
                    _ => Setting::Key,
                };
                self.add(setting, report(&error));
                None
            }
        }
    }

    /// What verifies client certificates, and when the first revocation list goes out of date.
    fn clients(
        &mut self,
        provider: &Arc<CryptoProvider>,
        clients: &Clients,
        ca: &Contents,
        crl: Option<&Contents>,
    ) -> (Option<Arc<dyn ClientCertVerifier>>, Option<Timestamp>) {
        let Clients { ca_file, auth, crl_file } = clients;
        let roots = self.parse(Setting::ClientCa, ca, |pem| {
            let mut roots = RootCertStore::empty();
            for certificate in pem::certificates(ca_file, pem)? {
                let failed = |_| pem::Error::Certificate { path: ca_file.clone() };
                roots.add(certificate).map_err(failed)?;
            }
            Ok(roots)
        });
        let crls = match (crl_file, crl) {
            (Some(file), Some(crl)) => self.parse(Setting::Crl, crl, |pem| pem::crls(file, pem)),
            _ => Some(Vec::new()),
        };
        let Some((roots, crls)) = roots.zip(crls) else { return (None, None) };
        let until = crls.iter().filter_map(next_update).min();
        match client::verifier(provider, roots, crls, *auth) {
            Ok(verifier) => (Some(verifier), until),
            Err(error) => {
                let file = crl_file.as_ref().unwrap_or(ca_file).display();
                let reason =
                    format!("{file} contains a revocation list that cannot be used: {error}");
                self.add(Setting::Crl, reason);
                (None, None)
            }
        }
    }
}

fn next_update(crl: &CertificateRevocationListDer<'_>) -> Option<Timestamp> {
    let (_, crl) = parse_x509_crl(crl).ok()?;
    Timestamp::from_second(crl.next_update()?.timestamp()).ok()
}
