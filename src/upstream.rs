//! The client of the Unleash server that Parapet stands in front of.
//!
//! [`Upstream`] makes the requests, [`Credentials`] knows with which tokens. Neither retries, caches
//! what it fetched, nor interprets flags: callers decide by [`Error::retry`] and [`Error::fault`].

mod client;
mod connect;
mod error;
mod outcome;
#[cfg(test)]
mod scripted;

pub use client::{Fetched, Upstream};
pub use connect::{Config, Identity};
pub use error::{Error, Fault, Retry};
pub use outcome::Health;
