//! The reasons for which a token is not accepted. `http` chooses the response to each.

/// Why a token is not accepted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AuthError {
    /// The token is unknown, revoked or malformed.
    #[error("the token is not valid")]
    Unknown,
    /// Upstream knows the token and forbids its use, for instance because it does not serve the
    /// token's environment.
    #[error("the token is valid, but upstream forbids its use")]
    Forbidden,
    /// The token could not be validated: upstream does not answer, or too many tokens wait.
    #[error("the token cannot be validated at the moment")]
    Unavailable,
}
