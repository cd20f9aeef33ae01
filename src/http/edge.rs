//! What other edges ask: which of their clients' tokens are valid.

use super::reply::{self, Failure, Reply};
use crate::{
    auth::Authenticator,
    wire::tokens::{ValidateReply, ValidateRequest, Validated},
};

/// The most tokens of one question.
const MAX_TOKENS: usize = 1_000;

/// `/edge/validate`: the valid ones of the tokens sent, as Unleash answers it.
pub async fn validate(auth: &Authenticator, body: &[u8]) -> Result<Reply, Failure> {
    let request: ValidateRequest<'_> = serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        // The error's own text could repeat a token.
        Failure::Malformed(format!(
            "the body is not {{\"tokens\":[…]}}, line {line} column {column}"
        ))
    })?;
    if request.tokens.len() > MAX_TOKENS {
        return Err(Failure::Malformed(format!("more than {MAX_TOKENS} tokens at once")));
    }
    let judged = auth.judge(&request.tokens).await?;
    let valid = request.tokens.iter().zip(judged).filter_map(|(token, grant)| {
        Some(Validated { token: token.clone(), grant: (*grant?).clone() })
    });
    Ok(reply::document(&ValidateReply { tokens: valid.collect() }))
}
