//! Polls flags once with each token of an environment.
//!
//! The caller decides when to poll and publishes the result.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt as _, stream};
use tokio::{
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::debug;

use super::{
    fetched_documents::{FetchedDocument, FetchedDocuments},
    stream_events::differences,
};
use crate::{
    protocol::features::Document,
    token::{Environment, TokenDigest},
    upstream::{
        Credential, EnvironmentTokens, Error, FeaturesResponse, FetchResult, ProvisioningError,
        Upstream,
    },
};

/// The number of concurrent fetches per environment.
const MAX_CONCURRENT_FETCHES: usize = 4;

/// One poll of an environment.
#[derive(Debug)]
pub(super) struct Poll<'a> {
    pub(super) upstream: &'a Upstream,
    pub(super) credentials: &'a EnvironmentTokens,
    pub(super) environment: &'a Environment,
    /// How long the removal of a flag is deferred while other tokens have streams that may report it.
    pub(super) removal_grace: Duration,
}

/// The result of a poll.
#[derive(Debug, Default)]
pub(super) struct PollResult {
    /// The first error. Refused tokens count only if no token got a response.
    pub(super) error: Option<PollError>,
    /// Whether upstream asks polling clients to use its streams.
    pub(super) prefers_streaming: bool,
}

impl Poll<'_> {
    /// Polls with every available token except those with a synced stream (`followed`).
    pub(super) async fn run(
        &self,
        documents: &mut FetchedDocuments,
        followed: &BTreeSet<TokenDigest>,
    ) -> PollResult {
        let mut result = PollResult::default();
        let removal_grace = (!followed.is_empty()).then_some(self.removal_grace);
        let mut tokens = match self.credentials.obtain(self.environment).await {
            Ok(tokens) => tokens,
            Err(error) => return PollResult { error: Some(error.into()), ..result },
        };
        let mut done = BTreeSet::new();
        tokens.retain(|it| !followed.contains(&it.token.digest()));
        let (mut has_response, mut refusal) = (tokens.is_empty(), None);
        while !tokens.is_empty() {
            let mut others = Vec::new();
            for (credential, response) in self.fetch_flags(tokens, documents).await {
                let digest = credential.token.digest();
                done.insert(digest);
                match apply_response(&credential, response, documents, removal_grace).await {
                    Ok(prefers_streaming) => {
                        self.credentials.mark_accepted(self.environment, &digest);
                        has_response = true;
                        result.prefers_streaming |= prefers_streaming;
                    }
                    Err(PollError::Upstream(error)) if error.is_token_refused() => {
                        let cause =
                            match self.credentials.replace_refused(self.environment, &digest).await
                            {
                                // At most one replacement per poll: upstream may refuse every token.
                                Ok(found) if refusal.is_none() => {
                                    others = found;
                                    PollError::Upstream(error)
                                }
                                Ok(_) => PollError::Upstream(error),
                                Err(cause) => PollError::Credentials(cause),
                            };
                        refusal.get_or_insert(cause);
                    }
                    Err(cause) => {
                        result.error.get_or_insert(cause);
                    }
                }
            }
            others.retain(|it| {
                let digest = it.token.digest();
                !done.contains(&digest) && !followed.contains(&digest)
            });
            tokens = others;
        }
        result.error = result.error.or(refusal.filter(|_| !has_response));
        result
    }

    /// Fetches flags with each of `tokens`, a few at a time.
    async fn fetch_flags(
        &self,
        tokens: Vec<Credential>,
        documents: &FetchedDocuments,
    ) -> Vec<(Credential, Result<FeaturesResponse, Error>)> {
        let fetch = |credential: Credential| {
            let upstream = self.upstream.clone();
            let known = documents.etag(&credential.token.digest()).map(str::to_owned);
            async move {
                let polled = upstream.fetch_features(&credential.token, known.as_deref()).await;
                (credential, polled)
            }
        };
        let fetches: Vec<_> = tokens.into_iter().map(fetch).collect();
        stream::iter(fetches).buffered(MAX_CONCURRENT_FETCHES).collect().await
    }
}

/// Applies the response to one token. The removal of flags is deferred by `removal_grace`. Returns
/// whether upstream asks polling clients to use streams.
async fn apply_response(
    credential: &Credential,
    response: Result<FeaturesResponse, Error>,
    documents: &mut FetchedDocuments,
    removal_grace: Option<Duration>,
) -> Result<bool, PollError> {
    let FeaturesResponse { flags, prefers_streaming } = response.map_err(PollError::Upstream)?;
    match flags {
        FetchResult::NotModified => documents.confirm(credential, Instant::now()),
        FetchResult::Changed { body, etag } => {
            let digest = credential.token.digest();
            let known = documents.document(&digest).cloned();
            let tag_revision = etag.as_deref().and_then(revision_from_etag);
            let read = spawn_blocking(move || {
                let (document, (is_changed, removed)) = match known {
                    None => (Document::parse(&body)?, (true, Vec::new())),
                    Some(known) => {
                        let document = Document::parse_reusing(&body, &known)?;
                        let differences = differences(&known, &document);
                        (document, differences)
                    }
                };
                let revision = tag_revision.filter(|_| document.revision() == tag_revision);
                let received = FetchedDocument::new(document).with_revision(revision);
                Ok((received, revision, is_changed, removed))
            });
            let (received, revision, is_changed, removed) =
                read.await?.map_err(PollError::Document)?;
            let now = Instant::now();
            if is_changed && documents.is_stale_response(&digest, revision, now) {
                debug!(
                    revision,
                    "Upstream responded with an older revision; the response is ignored"
                );
                return Ok(prefers_streaming);
            }
            if let Some(removal_grace) = removal_grace {
                documents.defer_removal(credential, &removed, now + removal_grace);
            }
            documents.insert(credential, etag, received, is_changed, now);
        }
    }
    Ok(prefers_streaming)
}

/// The revision in an entity tag of Unleash, `"<query hash>:<revision>:v1"`. It counts all changes of
/// the server, so it is comparable between tokens.
fn revision_from_etag(etag: &str) -> Option<u64> {
    let tag = etag.trim_start_matches("W/").trim_matches('"');
    tag.split(':').nth(1)?.parse().ok()
}

/// Why a poll failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PollError {
    #[error("no token to fetch flags with")]
    Credentials(#[from] ProvisioningError),
    #[error("fetching flags from upstream failed")]
    Upstream(#[source] Error),
    #[error("upstream's response is not a client features document")]
    Document(#[source] serde_json::Error),
    #[error("parsing or compiling flags panicked")]
    Panic(#[from] JoinError),
}

impl PollError {
    /// The `Retry-After` of upstream, if it sent one.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Upstream(error) => error.retry().retry_after(),
            Self::Credentials(error) => error.retry().retry_after(),
            Self::Document(_) | Self::Panic(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_is_parsed_only_from_unleash_etags() {
        for (tag, expect) in [
            (r#""76d8bb0e:28:v1""#, Some(28)),
            (r#"W/"76d8bb0e:28""#, Some(28)),
            (r#""76d8bb0e""#, None),
            (r#""5d41402abc4b2a76b9719d911017c592""#, None),
            (r#""a:b:c""#, None),
            ("", None),
        ] {
            assert_eq!(revision_from_etag(tag), expect, "{tag}");
        }
    }
}
