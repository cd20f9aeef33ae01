//! The verdicts about first-seen tokens that the instances of a fleet share: only digests and grants.
//!
//! It validates nothing; [`first_validation`](super::first_validation) does.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::upstream_validator::ValidationResult;
use crate::{
    fleet::{Answer, SharedAnswers},
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
};

/// How long other instances may use the verdict that a token is valid. The token list revokes it earlier.
const VALID_DURATION: Duration = Duration::from_hours(1);

/// How long they may use the verdict that a token is not valid: only those that wait for it already.
const INVALID_DURATION: Duration = Duration::from_secs(2);

/// The interval at which an instance looks for the verdict of another.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The longest that an instance waits for the verdict of another, as a part of the time that a request
/// waits for a first-seen token: there must be time to validate it.
const WAIT_SHARE: u32 = 3;

/// The verdicts of other instances about some tokens.
#[derive(Debug, Default)]
pub(super) struct SharedVerdicts {
    /// Tokens that another instance has validated, with the time of its request.
    pub(super) known: Vec<(Token, ValidationResult, Instant)>,
    /// Tokens that another instance is validating.
    pub(super) claimed: Vec<Token>,
    /// Tokens that this instance has to validate.
    pub(super) open: Vec<Token>,
}

/// A verdict as it is shared; `None` for a token that is not valid.
#[derive(Deserialize, Serialize)]
struct VerdictRecord(Option<GrantRecord>);

#[derive(Deserialize, Serialize)]
struct GrantRecord {
    kind: String,
    environment: String,
    projects: Vec<String>,
}

/// The verdicts of other instances about `tokens`; claims those without one.
pub(super) async fn claim(answers: &SharedAnswers, tokens: Vec<Token>) -> SharedVerdicts {
    let digests: Vec<_> = tokens.iter().map(Token::digest).collect();
    sort(tokens, answers.claim(&digests).await)
}

/// Waits for the verdicts of other instances, a part of `deadline`, the longest that a request waits. No
/// token is claimed in the end.
pub(super) async fn wait_for_others(
    answers: &SharedAnswers,
    tokens: Vec<Token>,
    deadline: Duration,
) -> SharedVerdicts {
    let until = Instant::now() + deadline / WAIT_SHARE;
    let mut verdicts = SharedVerdicts { claimed: tokens, ..SharedVerdicts::default() };
    while !verdicts.claimed.is_empty() && Instant::now() < until {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let digests: Vec<_> = verdicts.claimed.iter().map(Token::digest).collect();
        let looked = answers.look(&digests).await;
        let SharedVerdicts { known, claimed, open } =
            sort(std::mem::take(&mut verdicts.claimed), looked);
        verdicts.known.extend(known);
        verdicts.open.extend(open);
        verdicts.claimed = claimed;
    }
    verdicts.open.append(&mut verdicts.claimed);
    verdicts
}

fn sort(tokens: Vec<Token>, answers: Option<Vec<Answer>>) -> SharedVerdicts {
    let Some(answers) = answers else {
        return SharedVerdicts { open: tokens, ..SharedVerdicts::default() };
    };
    let mut verdicts = SharedVerdicts::default();
    for (token, answer) in tokens.into_iter().zip(answers) {
        match answer {
            Answer::Known(body, asked_at) => match decode(&body) {
                Some(result) => verdicts.known.push((token, result, asked_at)),
                None => verdicts.open.push(token),
            },
            Answer::Claimed => verdicts.claimed.push(token),
            Answer::Open => verdicts.open.push(token),
        }
    }
    verdicts
}

/// A result as other instances get it, and for how long. Results that are not final withdraw the claim.
pub(super) fn share(
    token: &Token,
    result: Option<&ValidationResult>,
) -> (TokenDigest, Bytes, Duration) {
    let (record, duration) = match result {
        Some(ValidationResult::Valid(Grant { kind, scope })) => {
            let grant = GrantRecord {
                kind: kind.as_str().to_owned(),
                environment: scope.environment.as_str().to_owned(),
                projects: scope.projects.to_list().into_iter().map(str::to_owned).collect(),
            };
            (VerdictRecord(Some(grant)), VALID_DURATION)
        }
        Some(ValidationResult::Invalid) => (VerdictRecord(None), INVALID_DURATION),
        Some(ValidationResult::Forbidden(_) | ValidationResult::Failed { .. }) | None => {
            (VerdictRecord(None), Duration::ZERO)
        }
    };
    let body = serde_json::to_vec(&record).expect("strings serialize");
    (token.digest(), body.into(), duration)
}

fn decode(body: &[u8]) -> Option<ValidationResult> {
    let VerdictRecord(record) = serde_json::from_slice(body).ok()?;
    let Some(GrantRecord { kind, environment, projects }) = record else {
        return Some(ValidationResult::Invalid);
    };
    let scope = Scope {
        environment: Environment::new(&environment),
        projects: Projects::from_list(projects.iter().map(String::as_str)),
    };
    Some(ValidationResult::Valid(Grant { kind: TokenKind::parse(&kind)?, scope }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::parse("*:dev.secret").expect("token")
    }

    #[test]
    fn shared_verdict_has_the_grant_and_no_token() {
        let scope =
            Scope { environment: Environment::new("dev"), projects: Projects::from_list(["p"]) };
        let grant = Grant { kind: TokenKind::Frontend, scope };
        let (digest, body, duration) =
            share(&token(), Some(&ValidationResult::Valid(grant.clone())));
        assert_eq!((digest, duration), (token().digest(), VALID_DURATION));
        assert!(!String::from_utf8_lossy(&body).contains("secret"));
        let Some(ValidationResult::Valid(read)) = decode(&body) else { panic!("{body:?}") };
        assert_eq!(read, grant);
        let (_, body, duration) = share(&token(), Some(&ValidationResult::Invalid));
        assert!(matches!(decode(&body), Some(ValidationResult::Invalid)));
        assert_eq!(duration, INVALID_DURATION);
        assert!(decode(br#"{"kind":"later","environment":"","projects":[]}"#).is_none());
    }

    #[test]
    fn result_that_is_not_final_withdraws_the_claim() {
        let failed = ValidationResult::Failed { pause: Duration::ZERO };
        for result in [None, Some(&failed)] {
            assert_eq!(share(&token(), result).2, Duration::ZERO);
        }
    }
}
