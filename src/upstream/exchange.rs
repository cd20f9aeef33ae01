//! Exchanges the admin token for a backend token of one environment.
//!
//! Real servers do not take an admin token for flags or usage, so the edge finds the token that its
//! fleet has under a stable name, or makes one, and stores it sealed. A disk that hangs does not delay
//! that: records are saved in the background, and reading one is waited for once, and not for long. It
//! does not know which tokens are in use: [`Credentials`](super::Credentials) does, and asks one at a
//! time per environment.

use std::time::Duration;

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
    seal::Seal,
};
use crate::{
    saver::Saver,
    store::{self, Key},
    telemetry::report,
    token::{Environment, Projects, Token, TokenDigest, TokenKind},
    wire::tokens::{Listed, ListedSecret},
};

/// A token under our name that nobody has used for so long is nobody's.
const ABANDONED: SignedDuration = SignedDuration::from_hours(24);

/// How long after it began the reading of an environment's record is waited for. Then a token is looked
/// for upstream.
const READ_PATIENCE: Duration = Duration::from_secs(1);

/// The same where upstream lists a token that may be the one in the record, before another is made.
const READ_PATIENCE_BEFORE_MINTING: Duration = Duration::from_secs(10);

/// How many refused tokens of an environment are remembered.
const REFUSED: usize = 16;

/// A token for upstream and what is seen with it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Credential {
    /// The token.
    pub token: Token,
    /// The projects that it sees.
    pub projects: Projects,
}

/// Why the edge has no token for an environment.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The admin calls failed.
    #[error("upstream gives no token for the environment {environment}")]
    Upstream {
        /// The environment.
        environment: Environment,
        /// The cause.
        source: error::Error,
    },
    /// Upstream refuses what was made for it, and is not to be flooded with more.
    #[error(
        "the next token for the environment {environment} is made in {pause:?} at the earliest"
    )]
    Throttled {
        /// The environment.
        environment: Environment,
        /// How long no token will be made.
        pause: Duration,
    },
    /// There is no admin token, and no usable token of that environment has been offered.
    #[error("no token for the environment {environment} is known")]
    Unknown {
        /// The environment.
        environment: Environment,
    },
}

impl Error {
    /// When asking again may help: always later, since what is missing can be made upstream.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Upstream { source, .. } => match source.retry() {
                Retry::Never => Retry::Later(None),
                later @ Retry::Later(_) => later,
            },
            // Another edge may make one sooner, which is found.
            Self::Throttled { .. } | Self::Unknown { .. } => Retry::Later(None),
        }
    }
}

/// What the exchange needs.
#[derive(Debug)]
pub(super) struct Exchange {
    admin: AdminToken,
    fleet: String,
    name: String,
    upstream: Upstream,
    saver: Saver,
    /// Tokens that were made later and are not in hand were made by others.
    started: Timestamp,
}

/// What has happened with one environment.
#[derive(Debug, Default)]
pub(super) struct Past {
    refused: Vec<TokenDigest>,
    mints: Mints,
    stored: Stored,
    /// When the record was read first, whatever came of it.
    first_read: Option<Instant>,
}

/// The record of an environment, in the store or about to be saved there.
#[derive(Debug, Default)]
enum Stored {
    /// Not read yet, or without success.
    #[default]
    Unread,
    Reading(JoinSet<Result<Option<Vec<u8>>, store::Error>>),
    Known(Option<Record>),
}

/// When tokens were made: at most one a minute, and ever more seldom while they do not hold.
#[derive(Debug, Default)]
struct Mints {
    last: Option<(Instant, Duration)>,
}

/// What the store keeps for an environment.
#[derive(Debug, Deserialize, Serialize)]
struct Record {
    version: u32,
    /// Whether this edge has made the token; found ones belong to the fleet.
    minted: bool,
    /// The public half of a v2 token.
    selector: Option<String>,
    projects: Vec<String>,
    sealed: Vec<u8>,
}

/// A [`Record`] as far as it could be opened.
#[derive(Debug)]
struct Kept {
    minted: bool,
    selector: Option<String>,
    credential: Option<Credential>,
}

impl Exchange {
    pub(super) fn new(admin: AdminToken, fleet: &str, upstream: Upstream, saver: Saver) -> Self {
        let (fleet, name) = (fleet.to_owned(), format!("parapet-{fleet}"));
        Self { admin, fleet, name, upstream, saver, started: Timestamp::now() }
    }

    /// The seal under the admin token of the moment.
    fn seal(&self) -> Seal {
        Seal::new(&self.admin.current(), &self.fleet)
    }

    /// A token for `environment`: the stored one, else one found by its name, else a new one.
    pub(super) async fn obtain(
        &self,
        environment: &Environment,
        past: &mut Past,
    ) -> Result<Credential, Error> {
        self.read(environment, past, READ_PATIENCE).await;
        if let Some(credential) = self.open(environment, past).and_then(|kept| kept.credential) {
            return Ok(credential);
        }
        self.find_or_mint(environment, past).await
    }

    /// A token for `environment` other than those that upstream has refused.
    pub(super) async fn replace(
        &self,
        environment: &Environment,
        past: &mut Past,
        refused: TokenDigest,
    ) -> Result<Credential, Error> {
        past.refuse(refused);
        self.find_or_mint(environment, past).await
    }

    async fn find_or_mint(
        &self,
        environment: &Environment,
        past: &mut Past,
    ) -> Result<Credential, Error> {
        let failed = |source| Error::Upstream { environment: environment.clone(), source };
        let listed = self.upstream.api_tokens_named(&self.admin, &self.name).await;
        let mut fleet = listed.map_err(failed)?;
        fleet.retain(|it| {
            it.name == self.name && it.kind == TokenKind::Client && it.environment == *environment
        });
        let now = Timestamp::now();
        if let Some(found) = best(&fleet, past, now) {
            info!("Found token {} for environment {environment}", found.token.masked());
            self.save(environment, past, &found, false);
            return Ok(found);
        }
        if let Some(pause) = past.mints.pause() {
            return Err(Error::Throttled { environment: environment.clone(), pause });
        }
        if past.stored.is_being_read() && fleet.iter().any(|it| self.may_be_stored(it, now)) {
            self.read(environment, past, READ_PATIENCE_BEFORE_MINTING).await;
            if let Some(stored) = self.open(environment, past).and_then(|kept| kept.credential) {
                return Ok(stored);
            }
        }
        let before = past.mints.begin();
        let created = self.upstream.create_token(&self.admin, &self.name, environment).await;
        if created.as_ref().is_err_and(|error| !error.is_ambiguous()) {
            past.mints.last = before;
        }
        let minted = Credential { token: created.map_err(failed)?, projects: Projects::All };
        info!("Made token {} for environment {environment}", minted.token.masked());
        let kept = self.open(environment, past);
        self.save(environment, past, &minted, true);
        for old in fleet.iter().filter(|it| is_ours_to_delete(it, kept.as_ref(), past, now)) {
            self.delete(environment, &old.secret).await;
        }
        Ok(minted)
    }

    /// Whether a listed token may be the one in a record that could not be read yet.
    fn may_be_stored(&self, listed: &Listed, now: Timestamp) -> bool {
        matches!(listed.secret, ListedSecret::Selector(_))
            && !listed.is_expired(now)
            && listed.created_at.is_none_or(|at| at < self.started)
    }

    async fn delete(&self, environment: &Environment, secret: &ListedSecret) {
        match self.upstream.delete_token(&self.admin, secret).await {
            Ok(()) => info!("Deleted a former token of ours for environment {environment}"),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(error, "Could not delete a former token for environment {environment}");
            }
        }
    }

    /// Reads the record of `environment` unless its contents are known, and waits for that until
    /// `patience` has passed since the first attempt. A read that takes longer, or is repeated after a
    /// failure, goes on in the background, and its result is taken at a later call.
    async fn read(&self, environment: &Environment, past: &mut Past, patience: Duration) {
        if matches!(past.stored, Stored::Unread) {
            let (store, key) = (self.saver.store().clone(), Key::Credentials(environment.clone()));
            let mut read = JoinSet::new();
            read.spawn(async move { store.load(&key).await });
            past.stored = Stored::Reading(read);
        }
        let Stored::Reading(read) = &mut past.stored else { return };
        let until = *past.first_read.get_or_insert_with(Instant::now) + patience;
        let Ok(read) = timeout_at(until, read.join_next()).await else { return };
        past.stored = match read {
            Some(Ok(Ok(bytes))) => {
                let record = bytes.as_deref().and_then(Record::parse);
                if bytes.is_some() && record.is_none() {
                    warn!("The stored token for environment {environment} is of an unknown form");
                }
                Stored::Known(record)
            }
            Some(Ok(Err(error))) => {
                let error = report(&error);
                warn!(error, "Cannot read the stored token for environment {environment}");
                Stored::Unread
            }
            // The runtime is shutting down.
            Some(Err(_)) | None => Stored::Unread,
        };
    }

    /// The record of `environment`, opened, if there is one and it has been read.
    fn open(&self, environment: &Environment, past: &Past) -> Option<Kept> {
        let Stored::Known(Some(record)) = &past.stored else { return None };
        let token = self.seal().open(environment, &record.sealed);
        if token.is_none() {
            info!(
                "The stored token for environment {environment} is of another admin token or fleet"
            );
        }
        let projects = Projects::from_list(record.projects.iter().map(String::as_str));
        let credential = token.map(|token| Credential { token, projects });
        Some(Kept { minted: record.minted, selector: record.selector.clone(), credential })
    }

    /// Seals the token in use for `environment` anew, under an admin token that has replaced the one of its
    /// seal.
    pub(super) fn reseal(
        &self,
        environment: &Environment,
        past: &mut Past,
        credential: &Credential,
    ) {
        let minted = matches!(&past.stored, Stored::Known(Some(record)) if record.minted);
        self.save(environment, past, credential, minted);
    }

    /// Has the token in use stored. Without a store that works it lasts as long as the process.
    pub(super) fn save(
        &self,
        environment: &Environment,
        past: &mut Past,
        credential: &Credential,
        minted: bool,
    ) {
        let Credential { token, projects } = credential;
        let record = Record {
            version: Record::VERSION,
            minted,
            selector: token.selector().map(str::to_owned),
            projects: projects.to_list().into_iter().map(str::to_owned).collect(),
            sealed: self.seal().close(environment, token),
        };
        let bytes = serde_json::to_vec(&record).expect("a record of plain fields serializes");
        let bytes = Bytes::from(bytes);
        self.saver.save(Key::Credentials(environment.clone()), move || bytes.clone());
        past.stored = Stored::Known(Some(record));
    }
}

impl Stored {
    fn is_being_read(&self) -> bool {
        matches!(self, Self::Reading(_))
    }
}

impl Past {
    fn refuse(&mut self, token: TokenDigest) {
        if !self.refused.contains(&token) {
            if self.refused.len() == REFUSED {
                self.refused.remove(0);
            }
            self.refused.push(token);
        }
    }
}

impl Mints {
    const SHORTEST: Duration = Duration::from_mins(1);
    const LONGEST: Duration = Duration::from_hours(1);

    /// How long no token may be made yet.
    fn pause(&self) -> Option<Duration> {
        let (at, pause) = self.last?;
        pause.checked_sub(at.elapsed()).filter(|rest| !rest.is_zero())
    }

    /// Takes note that a token is about to be made; returns what was noted before.
    fn begin(&mut self) -> Option<(Instant, Duration)> {
        let pause = match self.last {
            // The last one did not hold for long.
            Some((at, pause)) if at.elapsed() < 2 * pause => (2 * pause).min(Self::LONGEST),
            _ => Self::SHORTEST,
        };
        self.last.replace((Instant::now(), pause))
    }
}

impl Record {
    const VERSION: u32 = 1;

    fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|record: &Self| record.version == Self::VERSION)
    }
}

/// The token of the fleet to use: the widest, of these the newest, so that all edges choose the same.
fn best(fleet: &[Listed], past: &Past, now: Timestamp) -> Option<Credential> {
    let usable = fleet.iter().filter(|it| !it.is_expired(now)).filter_map(|it| match &it.secret {
        ListedSecret::Full(token) if !past.refused.contains(&token.digest()) => Some((it, token)),
        ListedSecret::Full(_) | ListedSecret::Selector(_) => None,
    });
    usable
        .max_by_key(|(it, token)| (it.projects == Projects::All, it.created_at, token.digest()))
        .map(|(it, token)| Credential { token: token.clone(), projects: it.projects.clone() })
}

/// Whether a token under our name may go now that another has been made.
///
/// Its secret may be in the hands of another edge of the fleet, so it must be one that this edge made
/// and can no longer use, or one that nobody uses.
fn is_ours_to_delete(listed: &Listed, kept: Option<&Kept>, past: &Past, now: Timestamp) -> bool {
    let replaced = kept.filter(|kept| kept.minted).is_some_and(|kept| match &kept.credential {
        Some(Credential { token, .. }) => {
            listed.secret.is_of(token) && past.refused.contains(&token.digest())
        }
        None => match &listed.secret {
            ListedSecret::Selector(selector) => kept.selector.as_ref() == Some(selector),
            ListedSecret::Full(_) => false,
        },
    });
    let last_sign = listed.seen_at.or(listed.created_at);
    replaced || last_sign.is_some_and(|last| now.duration_since(last) > ABANDONED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tokens_are_made_at_most_once_a_minute_and_ever_more_seldom() {
        let mut mints = Mints::default();
        for minutes in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(mints.pause(), None);
            mints.begin();
            let pause = Duration::from_mins(minutes);
            assert_eq!(mints.pause(), Some(pause));
            tokio::time::advance(pause).await;
        }
        tokio::time::advance(Duration::from_hours(2)).await;
        mints.begin();
        assert_eq!(mints.pause(), Some(Duration::from_mins(1)));
    }

    #[test]
    fn a_record_of_version_1_is_read() {
        let json = br#"{"version":1,"minted":true,"selector":null,"projects":["*"],"sealed":[
            198, 183, 113, 121, 8, 160, 54, 149, 170, 79, 162, 3, 217, 40, 35, 18, 78, 192,
            187, 218, 82, 147, 167, 179, 133, 52, 40, 101, 195, 239, 215, 198, 23, 61, 31,
            131, 50, 185, 83, 122, 174, 16, 94, 71, 42, 226, 130, 226, 151, 117, 218, 221,
            244, 123, 133, 146, 224, 254, 8, 50, 72, 117, 76, 151, 10, 54, 70, 253, 206, 67]}"#;
        let record = Record::parse(json).expect("record");
        let seal = Seal::new(&Token::parse("*:*.admin").expect("token"), "main");
        let token = seal.open(&Environment::new("dev"), &record.sealed).expect("the same seal");
        assert_eq!(token, Token::parse("*:dev.964a287e1b728cb5f4f3e012").expect("token"));
        assert!(record.minted && record.selector.is_none() && record.projects == ["*"]);
    }
}
