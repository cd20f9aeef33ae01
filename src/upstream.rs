//! The client of the upstream Unleash server.
//!
//! [`Upstream`] sends the requests; [`Credentials`] provides the tokens. Neither retries, caches
//! responses or interprets flags: callers decide by [`Error::retry`], [`Error::fault`] and
//! [`ExchangeError::retry`].

mod admin_token;
mod client;
mod connect;
mod credentials;
mod error;
mod exchange;
mod identity;
pub mod no_proxy;
mod outcome;
mod redirect;
#[cfg(test)]
pub(crate) mod scripted;
mod seal;
mod stream;

pub use admin_token::{AdminToken, Error as AdminTokenError, State as AdminTokenState};
pub use client::{TokenAccess, FetchResult, FeaturesResponse, Upstream};
pub use connect::Config;
pub use credentials::Credentials;
pub use error::{Error, Fault, Retry};
pub use exchange::{Credential, Error as ExchangeError};
pub use identity::{Error as IdentityError, ClientCertificate, Passphrase};
pub use outcome::Health;
pub use stream::SseStream;
