//! What other edges ask: which of their clients' tokens are valid.

use super::{
    guesses::Guess,
    reply::{self, Failure, Reply},
};
use crate::{
    auth::Authenticator,
    wire::tokens::{MAX_VALIDATED, ValidateReply, ValidateRequest, Validated},
};

/// The longest question, in bytes, after decompression: anybody may ask. It has room for as many tokens as
/// one may ask about.
pub const LONGEST_QUESTION: usize = 256 << 10;

/// `/edge/validate`: the valid ones of the tokens sent, as Unleash answers it.
pub async fn validate(auth: &Authenticator, body: &[u8]) -> Result<Guess<Reply>, Failure> {
    let request: ValidateRequest<'_> = serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        // The error's own text could repeat a token.
        Failure::Malformed(format!(
            "the body is not {{\"tokens\":[…]}} with at most {MAX_VALIDATED} tokens, line {line} column {column}"
        ))
    })?;
    let judged = auth.judge(&request.tokens).await?;
    let valid = request.tokens.iter().zip(judged).filter_map(|(token, grant)| {
        Some(Validated { token: token.clone(), grant: (*grant?).clone() })
    });
    let tokens: Vec<_> = valid.collect();
    let is_right = tokens.len() == request.tokens.len();
    let reply = reply::document(&ValidateReply { tokens });
    Ok(if is_right { Guess::Right(reply) } else { Guess::Wrong(reply) })
}
