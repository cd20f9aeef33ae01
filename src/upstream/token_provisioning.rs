//! Exchanges the admin token for a backend token of one environment.
//!
//! Unleash does not accept an admin token for flags or usage. So the edge looks up its fleet's token by
//! a stable name, or creates one, and stores it encrypted. A hanging disk does not delay this: records
//! are saved in the background, and reading one has a short timeout. This module does not know which
//! tokens are in use: [`EnvironmentTokens`](super::EnvironmentTokens) does, and runs one exchange at a
//! time per environment.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use super::{
    admin_token::AdminToken,
    client::Upstream,
    error::{self, Retry},
    token_cipher::TokenCipher,
    token_set::Credential,
};
use crate::{
    background_writer::BackgroundWriter,
    backoff::Backoff,
    protocol::tokens::{ListedSecret, ListedToken},
    store::{self, RecordKey},
    telemetry::error_chain,
    token::{Environment, Projects, TokenDigest, TokenKind},
};

/// A token with our name that was not used for this long counts as abandoned.
const ABANDONED_AFTER: SignedDuration = SignedDuration::from_hours(24);

/// The timeout for reading an environment's record, from the first attempt. After it, a token is looked
/// up upstream.
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// The timeout for reading the record before another token is created, if upstream lists a token that
/// may be the one in the record.
const READ_TIMEOUT_BEFORE_MINTING: Duration = Duration::from_secs(10);

/// The largest number of refused tokens remembered per environment.
const MAX_REFUSED_TOKENS: usize = 16;

/// Why the edge has no token for an environment.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request to the admin API failed.
    #[error("obtaining a token for environment {environment} from upstream failed")]
    Upstream {
        /// The environment.
        environment: Environment,
        /// The cause.
        source: error::Error,
    },
    /// Upstream refuses the tokens that were created, and must not be flooded with more.
    #[error("no further token for environment {environment} is created for {pause:?}")]
    Throttled {
        /// The environment.
        environment: Environment,
        /// How long no token is created.
        pause: Duration,
    },
    /// There is no admin token, and no usable token of that environment has been offered.
    #[error("no token for environment {environment} is available")]
    NoToken {
        /// The environment.
        environment: Environment,
    },
}

impl Error {
    /// When to retry: always later, since an operator can create the missing token upstream.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Upstream { source, .. } => match source.retry() {
                Retry::Never => Retry::Later(None),
                later @ Retry::Later(_) => later,
            },
            // Another edge may create one sooner, which the next attempt finds.
            Self::Throttled { .. } | Self::NoToken { .. } => Retry::Later(None),
        }
    }
}

/// Looks up or creates tokens for environments.
#[derive(Debug)]
pub(super) struct TokenProvisioner {
    admin: AdminToken,
    fleet: String,
    token_name: String,
    upstream: Upstream,
    writer: BackgroundWriter,
    /// Unknown tokens created after this were created by other edges.
    started: Timestamp,
}

/// The history of one environment's exchanges.
#[derive(Debug, Default)]
pub(super) struct ProvisioningHistory {
    refused: Vec<TokenDigest>,
    mint_limiter: MintLimiter,
    record: RecordState,
    /// When the record was first read, successfully or not.
    first_read_at: Option<Instant>,
}

/// The record of an environment, in the store or about to be saved there.
#[derive(Debug, Default)]
enum RecordState {
    /// Not read yet, or reading failed.
    #[default]
    Unread,
    Reading(JoinSet<Result<Option<Vec<u8>>, store::Error>>),
    Loaded(Option<CredentialRecord>),
}

/// Limits the creation of tokens: at most one a minute, and with doubling pauses while new tokens are
/// refused.
#[derive(Clone, Copy, Debug)]
struct MintLimiter {
    backoff: Backoff,
    /// When a token was last created, and the pause after it.
    last_mint: Option<(Instant, Duration)>,
}

/// The stored form of an environment's token.
#[derive(Debug, Deserialize, Serialize)]
struct CredentialRecord {
    version: u32,
    /// Whether this edge created the token. Others belong to the fleet.
    minted: bool,
    /// The public half of a v2 token.
    selector: Option<String>,
    projects: Vec<String>,
    sealed: Vec<u8>,
}

/// A [`CredentialRecord`], decrypted if possible.
#[derive(Debug)]
struct StoredCredential {
    minted: bool,
    selector: Option<String>,
    credential: Option<Credential>,
}

impl TokenProvisioner {
    pub(super) fn new(
        admin: AdminToken,
        fleet: &str,
        upstream: Upstream,
        writer: BackgroundWriter,
    ) -> Self {
        let (fleet, token_name) = (fleet.to_owned(), format!("parapet-{fleet}"));
        Self { admin, fleet, token_name, upstream, writer, started: Timestamp::now() }
    }

    /// The cipher of the current admin token.
    fn cipher(&self) -> TokenCipher {
        TokenCipher::new(&self.admin.current(), &self.fleet)
    }

    /// Obtains a token for `environment`: the stored one, otherwise one found by its name, otherwise a
    /// new one.
    pub(super) async fn obtain(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
    ) -> Result<Credential, Error> {
        self.load_record(environment, history, READ_TIMEOUT).await;
        if let Some(credential) =
            self.stored_credential(environment, history).and_then(|previous| previous.credential)
        {
            return Ok(credential);
        }
        self.find_or_mint(environment, history).await
    }

    /// Obtains a token for `environment` other than those that upstream has refused.
    pub(super) async fn replace(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
        refused: TokenDigest,
    ) -> Result<Credential, Error> {
        history.add_refused(refused);
        self.find_or_mint(environment, history).await
    }

    async fn find_or_mint(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
    ) -> Result<Credential, Error> {
        let failed = |source| Error::Upstream { environment: environment.clone(), source };
        let listed = self.upstream.list_api_tokens_named(&self.admin, &self.token_name).await;
        let mut fleet = listed.map_err(failed)?;
        fleet.retain(|it| {
            it.name == self.token_name
                && it.kind == TokenKind::Client
                && it.environment == *environment
        });
        let now = Timestamp::now();
        if let Some(found) = best_token(&fleet, history, now) {
            info!("Found token {} for environment {environment}", found.token.masked());
            self.save(environment, history, &found, false);
            return Ok(found);
        }
        if let Some(pause) = history.mint_limiter.remaining_pause() {
            return Err(Error::Throttled { environment: environment.clone(), pause });
        }
        if history.record.is_loading() && fleet.iter().any(|it| self.can_be_stored(it, now)) {
            self.load_record(environment, history, READ_TIMEOUT_BEFORE_MINTING).await;
            if let Some(stored) = self
                .stored_credential(environment, history)
                .and_then(|previous| previous.credential)
            {
                return Ok(stored);
            }
        }
        let before = history.mint_limiter;
        history.mint_limiter.record_mint();
        let created = self.upstream.create_token(&self.admin, &self.token_name, environment).await;
        if created.as_ref().is_err_and(|error| !error.is_ambiguous()) {
            history.mint_limiter = before;
        }
        let minted = Credential { token: created.map_err(failed)?, projects: Projects::All };
        info!("Created token {} for environment {environment}", minted.token.masked());
        let previous = self.stored_credential(environment, history);
        self.save(environment, history, &minted, true);
        for old in fleet.iter().filter(|it| can_delete(it, previous.as_ref(), history, now)) {
            self.delete(environment, &old.secret).await;
        }
        Ok(minted)
    }

    /// Whether a listed token may be the one in a record that has not been read yet.
    fn can_be_stored(&self, listed: &ListedToken, now: Timestamp) -> bool {
        matches!(listed.secret, ListedSecret::Selector(_))
            && !listed.is_expired(now)
            && listed.created_at.is_none_or(|at| at < self.started)
    }

    async fn delete(&self, environment: &Environment, secret: &ListedSecret) {
        match self.upstream.delete_token(&self.admin, secret).await {
            Ok(()) => info!("Deleted a former token of this edge for environment {environment}"),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(error, "Deleting a former token for environment {environment} failed");
            }
        }
    }

    /// Loads the record of `environment` unless it is loaded. Waits for at most `limit` since the first
    /// attempt. A slower read, or one repeated after a failure, continues in the background; a later
    /// call uses its result.
    async fn load_record(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
        limit: Duration,
    ) {
        if matches!(history.record, RecordState::Unread) {
            let (store, key) =
                (Arc::clone(self.writer.store()), RecordKey::Credentials(environment.clone()));
            let mut read = JoinSet::new();
            read.spawn(async move { store.load(&key).await });
            history.record = RecordState::Reading(read);
        }
        let RecordState::Reading(read) = &mut history.record else { return };
        let until = *history.first_read_at.get_or_insert_with(Instant::now) + limit;
        let Ok(read) = timeout_at(until, read.join_next()).await else { return };
        history.record = match read {
            Some(Ok(Ok(bytes))) => {
                let record = bytes.as_deref().and_then(CredentialRecord::parse);
                if bytes.is_some() && record.is_none() {
                    warn!(
                        "The stored token for environment {environment} has an unknown format; \
                         it is ignored"
                    );
                }
                RecordState::Loaded(record)
            }
            Some(Ok(Err(error))) => {
                let error = error_chain(&error);
                warn!(
                    error,
                    "Reading the stored token for environment {environment} failed and is retried"
                );
                RecordState::Unread
            }
            // The runtime is shutting down.
            Some(Err(_)) | None => RecordState::Unread,
        };
    }

    /// Decrypts the record of `environment`; `None` if there is none or it has not been loaded.
    fn stored_credential(
        &self,
        environment: &Environment,
        history: &ProvisioningHistory,
    ) -> Option<StoredCredential> {
        let RecordState::Loaded(Some(record)) = &history.record else { return None };
        let token = self.cipher().decrypt(environment, &record.sealed);
        if token.is_none() {
            info!(
                "The stored token for environment {environment} belongs to another admin token or \
                 fleet; it is ignored"
            );
        }
        let projects = Projects::from_list(record.projects.iter().map(String::as_str));
        let credential = token.map(|token| Credential { token, projects });
        Some(StoredCredential {
            minted: record.minted,
            selector: record.selector.clone(),
            credential,
        })
    }

    /// Encrypts and saves the token in use for `environment` with the current admin token.
    pub(super) fn reencrypt(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
        credential: &Credential,
    ) {
        let minted = matches!(&history.record, RecordState::Loaded(Some(record)) if record.minted);
        self.save(environment, history, credential, minted);
    }

    /// Saves the token in use in the background. If the store fails, the token is lost at exit.
    pub(super) fn save(
        &self,
        environment: &Environment,
        history: &mut ProvisioningHistory,
        credential: &Credential,
        minted: bool,
    ) {
        let Credential { token, projects } = credential;
        let record = CredentialRecord {
            version: CredentialRecord::VERSION,
            minted,
            selector: token.selector().map(str::to_owned),
            projects: projects.to_list().into_iter().map(str::to_owned).collect(),
            sealed: self.cipher().encrypt(environment, token),
        };
        let bytes = serde_json::to_vec(&record).expect("a record of plain fields serializes");
        let bytes = Bytes::from(bytes);
        self.writer.save(RecordKey::Credentials(environment.clone()), move || bytes.clone());
        history.record = RecordState::Loaded(Some(record));
    }
}

impl RecordState {
    fn is_loading(&self) -> bool {
        matches!(self, Self::Reading(_))
    }
}

impl ProvisioningHistory {
    fn add_refused(&mut self, token: TokenDigest) {
        if !self.refused.contains(&token) {
            if self.refused.len() == MAX_REFUSED_TOKENS {
                self.refused.remove(0);
            }
            self.refused.push(token);
        }
    }
}

impl MintLimiter {
    const MIN_PAUSE: Duration = Duration::from_mins(1);
    const MAX_PAUSE: Duration = Duration::from_hours(1);

    /// How long no token may be created yet; `None` if one may be created now.
    fn remaining_pause(&self) -> Option<Duration> {
        let (at, pause) = self.last_mint?;
        pause.checked_sub(at.elapsed()).filter(|rest| !rest.is_zero())
    }

    /// Records that a token is about to be created.
    fn record_mint(&mut self) {
        // Upstream accepts a token that was not replaced for two pauses.
        if self.last_mint.is_none_or(|(at, pause)| at.elapsed() >= 2 * pause) {
            self.backoff.reset();
        }
        // Without jitter: the pause is a limit.
        self.last_mint = Some((Instant::now(), self.backoff.next_delay(None, 1.0)));
    }
}

impl Default for MintLimiter {
    fn default() -> Self {
        Self { backoff: Backoff::new(Self::MIN_PAUSE, Self::MAX_PAUSE), last_mint: None }
    }
}

impl CredentialRecord {
    const VERSION: u32 = 1;

    fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|record: &Self| record.version == Self::VERSION)
    }
}

/// The fleet's token to use: one for all projects if there is one, then the newest, so that all edges
/// choose the same.
fn best_token(
    fleet: &[ListedToken],
    history: &ProvisioningHistory,
    now: Timestamp,
) -> Option<Credential> {
    let usable = fleet.iter().filter(|it| !it.is_expired(now)).filter_map(|it| match &it.secret {
        ListedSecret::Full(token) if !history.refused.contains(&token.digest()) => {
            Some((it, token))
        }
        ListedSecret::Full(_) | ListedSecret::Selector(_) => None,
    });
    usable
        .max_by_key(|(it, token)| (it.projects == Projects::All, it.created_at, token.digest()))
        .map(|(it, token)| Credential { token: token.clone(), projects: it.projects.clone() })
}

/// Whether a token with our name may be deleted after another has been created.
///
/// Another edge of the fleet may use it. So it must be one that this edge created and can no longer use,
/// or an abandoned one.
fn can_delete(
    listed: &ListedToken,
    previous: Option<&StoredCredential>,
    history: &ProvisioningHistory,
    now: Timestamp,
) -> bool {
    let replaced = previous.filter(|previous| previous.minted).is_some_and(|previous| {
        match &previous.credential {
            Some(Credential { token, .. }) => {
                listed.secret.matches(token) && history.refused.contains(&token.digest())
            }
            None => match &listed.secret {
                ListedSecret::Selector(selector) => previous.selector.as_ref() == Some(selector),
                ListedSecret::Full(_) => false,
            },
        }
    });
    let last_sign = listed.seen_at.or(listed.created_at);
    replaced || last_sign.is_some_and(|last| now.duration_since(last) > ABANDONED_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Token;

    #[tokio::test(start_paused = true)]
    async fn tokens_are_created_at_most_once_a_minute_with_doubling_pauses() {
        let mut mints = MintLimiter::default();
        for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(mints.remaining_pause(), None);
            mints.record_mint();
            let pause = Duration::from_mins(minutes);
            assert_eq!(mints.remaining_pause(), Some(pause));
            tokio::time::advance(pause).await;
        }
        tokio::time::advance(Duration::from_hours(2)).await;
        mints.record_mint();
        assert_eq!(mints.remaining_pause(), Some(Duration::from_mins(1)));
    }

    #[test]
    fn record_of_version_1_is_parsed() {
        let json = br#"{"version":1,"minted":true,"selector":null,"projects":["*"],"sealed":[
            198, 183, 113, 121, 8, 160, 54, 149, 170, 79, 162, 3, 217, 40, 35, 18, 78, 192,
            187, 218, 82, 147, 167, 179, 133, 52, 40, 101, 195, 239, 215, 198, 23, 61, 31,
            131, 50, 185, 83, 122, 174, 16, 94, 71, 42, 226, 130, 226, 151, 117, 218, 221,
            244, 123, 133, 146, 224, 254, 8, 50, 72, 117, 76, 151, 10, 54, 70, 253, 206, 67]}"#;
        let record = CredentialRecord::parse(json).expect("record");
        let seal = TokenCipher::new(&Token::parse("*:*.admin").expect("token"), "main");
        let token = seal.decrypt(&Environment::new("dev"), &record.sealed).expect("the same seal");
        assert_eq!(token, Token::parse("*:dev.964a287e1b728cb5f4f3e012").expect("token"));
        assert!(record.minted && record.selector.is_none() && record.projects == ["*"]);
    }
}
