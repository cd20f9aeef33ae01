//! The client of the upstream Unleash server.
//!
//! [`Upstream`] sends the requests, and [`EnvironmentTokens`] provides the tokens. Neither retries, caches
//! responses or interprets flags: callers decide by [`Error::retry`], [`Error::fault`] and
//! [`ProvisioningError::retry`]. [`UpstreamUsageSink`] sends usage with both; it retries at once only
//! with a replaced token.

mod admin_token;
mod client;
mod client_certificate;
mod environment_tokens;
mod error;
mod event_stream;
mod health;
mod http_client;
pub mod no_proxy;
mod redirect_policy;
mod request_metrics;
#[cfg(test)]
pub(crate) mod scripted_server;
mod token_cipher;
mod token_provisioning;
mod token_set;
mod transport;
mod usage_sink;

pub use admin_token::{AdminToken, Error as AdminTokenError, State as AdminTokenState};
pub use client::{FeaturesResponse, FetchResult, TokenAccess, Upstream};
pub use client_certificate::{ClientCertificateFiles, Error as ClientCertificateError, Passphrase};
pub use environment_tokens::EnvironmentTokens;
pub use error::{Error, Fault, Retry};
pub use event_stream::UpstreamEventStream;
pub use health::UpstreamHealth;
pub use http_client::Config;
pub use token_provisioning::Error as ProvisioningError;
pub use token_set::Credential;
pub use usage_sink::UpstreamUsageSink;
