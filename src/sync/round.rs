//! A round of polls: flags are asked for with each token of an environment, once.
//!
//! When there is a round, and what becomes of what it brought, is the business of those who call.

use std::{collections::BTreeSet, time::Duration};

use futures_util::{StreamExt as _, stream};
use tokio::{
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::debug;

use super::{
    sources::{Received, Sources},
    told::differences,
};
use crate::{
    token::{Environment, TokenDigest},
    upstream::{Credential, Credentials, Error, ExchangeError, Fetched, Polled, Upstream},
    wire::features::Document,
};

/// With how many tokens of an environment flags are fetched at a time.
const FETCHES_AT_ONCE: usize = 4;

/// Whom a round asks, for what, and in whose name.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub(super) upstream: &'a Upstream,
    pub(super) credentials: &'a Credentials,
    pub(super) environment: &'a Environment,
    /// How long flags that a token sees no more are held where streams tell of others' meanwhile.
    pub(super) held_for: Duration,
}

/// How a round went.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Why not all tokens were answered, a refusal of some aside.
    pub(super) failure: Option<Failure>,
    /// Whether upstream sends those who poll to its streams.
    pub(super) prefers_streaming: bool,
}

impl Round<'_> {
    /// Asks with every token in hand but those of which upstream tells by itself what changes
    /// (`followed`).
    pub(super) async fn ask(
        &self,
        sources: &mut Sources,
        followed: &BTreeSet<TokenDigest>,
    ) -> Asked {
        let mut asked = Asked::default();
        let held_for = (!followed.is_empty()).then_some(self.held_for);
        let mut tokens = match self.credentials.obtain(self.environment).await {
            Ok(tokens) => tokens,
            Err(error) => return Asked { failure: Some(error.into()), ..asked },
        };
        let mut done = BTreeSet::new();
        tokens.retain(|it| !followed.contains(&it.token.digest()));
        let (mut answered, mut refusal) = (tokens.is_empty(), None);
        while !tokens.is_empty() {
            let mut others = Vec::new();
            for (credential, answer) in self.fetch(tokens, sources).await {
                let digest = credential.token.digest();
                done.insert(digest);
                match take(&credential, answer, sources, held_for).await {
                    Ok(prefers_streaming) => {
                        self.credentials.accept(self.environment, &digest);
                        answered = true;
                        asked.prefers_streaming |= prefers_streaming;
                    }
                    Err(Failure::Upstream(error)) if error.is_unauthorized() => {
                        let cause = match self.credentials.replace(self.environment, &digest).await
                        {
                            // One replacement in a round: upstream may refuse every token.
                            Ok(found) if refusal.is_none() => {
                                others = found;
                                Failure::Upstream(error)
                            }
                            Ok(_) => Failure::Upstream(error),
                            Err(cause) => Failure::Credentials(cause),
                        };
                        refusal.get_or_insert(cause);
                    }
                    Err(cause) => {
                        asked.failure.get_or_insert(cause);
                    }
                }
            }
            others.retain(|it| {
                let digest = it.token.digest();
                !done.contains(&digest) && !followed.contains(&digest)
            });
            tokens = others;
        }
        asked.failure = asked.failure.or(refusal.filter(|_| !answered));
        asked
    }

    /// Asks with each of `tokens`, with a few at a time.
    async fn fetch(
        &self,
        tokens: Vec<Credential>,
        sources: &Sources,
    ) -> Vec<(Credential, Result<Polled, Error>)> {
        let fetch = |credential: Credential| {
            let upstream = self.upstream.clone();
            let known = sources.etag(&credential.token.digest()).map(str::to_owned);
            async move {
                let polled = upstream.features(&credential.token, known.as_deref()).await;
                (credential, polled)
            }
        };
        let fetches: Vec<_> = tokens.into_iter().map(fetch).collect();
        stream::iter(fetches).buffered(FETCHES_AT_ONCE).collect().await
    }
}

/// Takes what a token was answered, and holds for so long what it sees no more; true if that hints at
/// streams.
async fn take(
    credential: &Credential,
    answer: Result<Polled, Error>,
    sources: &mut Sources,
    held_for: Option<Duration>,
) -> Result<bool, Failure> {
    let Polled { flags, prefers_streaming } = answer.map_err(Failure::Upstream)?;
    match flags {
        Fetched::NotModified => sources.confirm(credential, Instant::now()),
        Fetched::Changed { body, etag } => {
            let digest = credential.token.digest();
            let known = sources.document(&digest).cloned();
            let number = etag.as_deref().and_then(revision_in);
            let read = spawn_blocking(move || {
                let (document, (is_news, gone)) = match known {
                    None => (Document::parse(&body)?, (true, Vec::new())),
                    Some(known) => {
                        let document = Document::parse_after(&body, &known)?;
                        let differences = differences(&known, &document);
                        (document, differences)
                    }
                };
                let revision = number.filter(|_| document.revision() == number);
                let received = Received::new(document).with_revision(revision);
                Ok((received, revision, is_news, gone))
            });
            let (received, revision, is_news, gone) = read.await?.map_err(Failure::Document)?;
            let now = Instant::now();
            if is_news && sources.is_outdated(&digest, revision, now) {
                debug!(revision, "Upstream has answered with an older revision than before");
                return Ok(prefers_streaming);
            }
            if let Some(held_for) = held_for {
                sources.hold(credential, &gone, now + held_for);
            }
            sources.insert(credential, etag, received, is_news, now);
        }
    }
    Ok(prefers_streaming)
}

/// The revision that Unleash writes into its entity tags, `"<query's hash>:<revision>:v1"`. It counts the
/// changes of all that the server has, so that what different tokens see can be compared by it.
fn revision_in(etag: &str) -> Option<u64> {
    let tag = etag.trim_start_matches("W/").trim_matches('"');
    tag.split(':').nth(1)?.parse().ok()
}

/// Why a round brought nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("no token to ask with")]
    Credentials(#[from] ExchangeError),
    #[error("upstream gives no flags")]
    Upstream(#[source] Error),
    #[error("upstream's answer is no client-features document")]
    Document(#[source] serde_json::Error),
    #[error("reading or compiling flags has panicked")]
    Panic(#[from] JoinError),
}

impl Failure {
    /// When the source wants to be asked again.
    pub(super) fn wish(&self) -> Option<Duration> {
        match self {
            Self::Upstream(error) => error.retry().wish(),
            Self::Credentials(error) => error.retry().wish(),
            Self::Document(_) | Self::Panic(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revision_is_read_from_the_tags_of_unleash_only() {
        for (tag, expect) in [
            (r#""76d8bb0e:28:v1""#, Some(28)),
            (r#"W/"76d8bb0e:28""#, Some(28)),
            (r#""76d8bb0e""#, None),
            (r#""5d41402abc4b2a76b9719d911017c592""#, None),
            (r#""a:b:c""#, None),
            ("", None),
        ] {
            assert_eq!(revision_in(tag), expect, "{tag}");
        }
    }
}
