//! Authentication of API tokens, with a cache of validated ones.
//!
//! Cached tokens are answered from memory. Only a first-seen token waits: all requests that present
//! it share one validation, which is batched with those of other tokens, rate limited and subject to
//! a deadline. While upstream is unreachable, cached tokens keep their state.
//!
//! This module returns what a token grants. It does not know which route needs which kind of token.
//!
//! | module | responsibility |
//! |---|---|
//! | `authenticator` | decides whether the token of a request is valid; owns the state below |
//! | `local_tokens` | the static tokens, which need no validation |
//! | `token_cache` | the valid, rejected and revoked tokens by digest |
//! | `pending_validations` | the queue of first-seen tokens, and the requests that wait for them |
//! | `first_validation`, `revalidation`, `token_list_poller` | the background work: each changes the cache by upstream's responses |
//! | `shared_token_list` | the token list in a fleet, which one instance reads for all |
//! | `shared_verdicts` | the verdicts about first-seen tokens in a fleet |
//! | `upstream_validator` | validates a batch of tokens at upstream |

mod authenticator;
mod error;
mod first_validation;
mod local_tokens;
mod pending_validations;
mod revalidation;
mod shared_token_list;
mod shared_verdicts;
#[cfg(test)]
mod tests;
mod token_cache;
mod token_list_poller;
mod upstream_validator;

pub use self::{
    authenticator::{AuthenticatedToken, Authenticator, Config, Validator},
    error::AuthError,
    token_cache::{CachedToken, RestoreError},
    upstream_validator::UpstreamValidator,
};
