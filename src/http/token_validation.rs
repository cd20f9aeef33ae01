//! Token validation for other edges: which of their clients' tokens are valid.

use super::{
    failed_request_limiter::Attempt,
    response::{self, HttpError, HttpResponse},
};
use crate::{
    auth::Authenticator,
    protocol::tokens::{MAX_VALIDATED_TOKENS, ValidateRequest, ValidateResponse, ValidatedToken},
};

/// The largest request, in bytes after decompression. The endpoint needs no token, so the limit is
/// small; it fits the largest allowed number of tokens.
pub const MAX_REQUEST_BYTES: usize = 256 << 10;

/// `/edge/validate`: returns the valid ones of the tokens sent, in Unleash's format.
pub async fn validate(
    auth: &Authenticator,
    body: &[u8],
) -> Result<Attempt<HttpResponse>, HttpError> {
    let request: ValidateRequest<'_> = serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        // serde's error text could contain a token.
        HttpError::Malformed(format!(
            "the body is not {{\"tokens\":[…]}} with at most {MAX_VALIDATED_TOKENS} tokens, line {line} column {column}"
        ))
    })?;
    let grants = auth.validate(&request.tokens).await?;
    let valid = request.tokens.iter().zip(grants).filter_map(|(token, grant)| {
        Some(ValidatedToken { token: token.clone(), grant: (*grant?).clone() })
    });
    let tokens: Vec<_> = valid.collect();
    let all_valid = tokens.len() == request.tokens.len();
    let reply = response::json_document(&ValidateResponse { tokens });
    Ok(if all_valid { Attempt::Valid(reply) } else { Attempt::Invalid(reply) })
}
