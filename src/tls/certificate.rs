//! The details of a server certificate that operators see.

use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::CertificateDer;
use x509_parser::parse_x509_certificate;

use super::pem;

/// The period before the expiry in which a certificate causes a warning: 14 days.
const EXPIRY_WARNING_WINDOW: SignedDuration = SignedDuration::from_hours(14 * 24);

/// A server certificate in use.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Certificate {
    file: PathBuf,
    subject: String,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl Certificate {
    /// Parses a certificate of `file`.
    pub(super) fn parse(file: &Path, certificate: &CertificateDer<'_>) -> Result<Self, pem::Error> {
        let failed = || pem::Error::InvalidCertificate { path: file.to_owned() };
        let (_, parsed) = parse_x509_certificate(certificate).map_err(|_| failed())?;
        let validity = parsed.validity();
        let [not_before, not_after] = [validity.not_before, validity.not_after]
            // Year 9999 is beyond the range of `Timestamp`.
            .map(|at| Timestamp::from_second(at.timestamp()).unwrap_or(Timestamp::MAX));
        let subject = parsed.subject().to_string();
        Ok(Self { file: file.to_owned(), subject, not_before, not_after })
    }

    /// The path of its file, as configured.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The distinguished name of its subject; may be empty.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// When it expires.
    pub fn not_after(&self) -> Timestamp {
        self.not_after
    }

    /// The time until it expires; negative afterwards.
    pub fn expires_in(&self, now: Timestamp) -> SignedDuration {
        self.not_after.duration_since(now)
    }

    /// A warning if it is not valid yet, has expired, or expires within 14 days.
    pub fn warning(&self, now: Timestamp) -> Option<String> {
        let (file, not_after) = (self.file.display(), self.not_after);
        let left = self.expires_in(now);
        if now < self.not_before {
            Some(format!("the certificate in {file} is not valid before {}", self.not_before))
        } else if left.is_negative() {
            Some(format!("the certificate in {file} expired at {not_after}"))
        } else if left < EXPIRY_WARNING_WINDOW {
            Some(format!("the certificate in {file} expires at {not_after}"))
        } else {
            None
        }
    }
}
