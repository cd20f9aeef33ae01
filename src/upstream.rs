//! The client of the upstream Unleash server.
//!
//! [`Upstream`] sends the requests; [`Credentials`] provides the tokens. Neither retries, caches
//! responses or interprets flags: callers decide by [`Error::retry`], [`Error::fault`] and
//! [`ProvisioningError::retry`].

mod admin_token;
mod client;
mod client_identity;
mod credentials;
mod encryption;
mod error;
mod health;
mod http_client;
pub mod no_proxy;
mod redirect;
#[cfg(test)]
pub(crate) mod scripted;
mod stream;
mod token_provisioning;

pub use admin_token::{AdminToken, Error as AdminTokenError, State as AdminTokenState};
pub use client::{FeaturesResponse, FetchResult, TokenAccess, Upstream};
pub use client_identity::{ClientIdentity, Error as IdentityError, Passphrase};
pub use credentials::Credentials;
pub use error::{Error, Fault, Retry};
pub use health::Health;
pub use http_client::Config;
pub use stream::UpstreamEventStream;
pub use token_provisioning::{Credential, Error as ProvisioningError};
