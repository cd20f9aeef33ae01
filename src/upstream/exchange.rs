//! Exchanges the admin token for a backend token of one environment.
//!
//! Real servers do not take an admin token for flags or usage, so the edge finds the token that its
//! fleet has under a stable name, or makes one, and keeps it sealed. It does not know which tokens are
//! in use: [`Credentials`](super::Credentials) does, and asks one at a time per environment.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    admin_token::AdminToken,
    client::Upstream,
    error::{self, Retry},
    seal::Seal,
};
use crate::{
    store::{Key, Store},
    token::{Environment, Projects, Token, TokenDigest, TokenKind},
    wire::tokens::{Listed, ListedSecret},
};

/// A token under our name that nobody has used for so long is nobody's.
const ABANDONED: SignedDuration = SignedDuration::from_hours(24);

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
    store: Store,
}

/// What has happened with one environment.
#[derive(Debug, Default)]
pub(super) struct Past {
    refused: Vec<TokenDigest>,
    mints: Mints,
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
    pub(super) fn new(admin: AdminToken, fleet: &str, upstream: Upstream, store: Store) -> Self {
        let name = format!("parapet-{fleet}");
        Self { admin, fleet: fleet.to_owned(), name, upstream, store }
    }

    /// The seal under the admin token of the moment.
    fn seal(&self) -> Seal {
        Seal::new(&self.admin.current(), &self.fleet)
    }

    /// A token for `environment`: the kept one, else one found by its name, else a new one.
    pub(super) async fn obtain(
        &self,
        environment: &Environment,
        past: &mut Past,
    ) -> Result<Credential, Error> {
        let kept = self.load(environment).await;
        if let Some(credential) = kept.as_ref().and_then(|kept| kept.credential.clone()) {
            return Ok(credential);
        }
        self.find_or_mint(environment, past, kept).await
    }

    /// A token for `environment` other than those that upstream has refused.
    pub(super) async fn replace(
        &self,
        environment: &Environment,
        past: &mut Past,
        refused: TokenDigest,
    ) -> Result<Credential, Error> {
        past.refuse(refused);
        let kept = self.load(environment).await;
        self.find_or_mint(environment, past, kept).await
    }

    async fn find_or_mint(
        &self,
        environment: &Environment,
        past: &mut Past,
        kept: Option<Kept>,
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
            self.save(environment, &found, false).await;
            return Ok(found);
        }
        if let Some(pause) = past.mints.pause() {
            return Err(Error::Throttled { environment: environment.clone(), pause });
        }
        let before = past.mints.begin();
        let created = self.upstream.create_token(&self.admin, &self.name, environment).await;
        if created.as_ref().is_err_and(|error| !error.is_ambiguous()) {
            past.mints.last = before;
        }
        let minted = Credential { token: created.map_err(failed)?, projects: Projects::All };
        info!("Made token {} for environment {environment}", minted.token.masked());
        self.save(environment, &minted, true).await;
        for old in fleet.iter().filter(|it| is_ours_to_delete(it, kept.as_ref(), past, now)) {
            self.delete(environment, &old.secret).await;
        }
        Ok(minted)
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

    async fn load(&self, environment: &Environment) -> Option<Kept> {
        let bytes = match self.store.load(&Key::Credentials(environment.clone())).await {
            Ok(bytes) => bytes?,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(error, "Going on without the kept token for environment {environment}");
                return None;
            }
        };
        let Some(record) = Record::parse(&bytes) else {
            warn!("The kept token for environment {environment} is of an unknown form");
            return None;
        };
        let token = self.seal().open(environment, &record.sealed);
        if token.is_none() {
            info!(
                "The kept token for environment {environment} is of another admin token or fleet"
            );
        }
        let projects = Projects::from_list(record.projects.iter().map(String::as_str));
        let credential = token.map(|token| Credential { token, projects });
        Some(Kept { minted: record.minted, selector: record.selector, credential })
    }

    /// Seals the stored token for `environment` anew, under an admin token that has replaced the one of
    /// its seal; true if nothing is left to do. What is not `credential`'s is left alone.
    pub(super) async fn reseal(&self, environment: &Environment, credential: &Credential) -> bool {
        let stored = match self.store.load(&Key::Credentials(environment.clone())).await {
            Ok(stored) => stored,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(error, "Cannot seal the kept token for environment {environment} anew");
                return false;
            }
        };
        let minted = match stored.and_then(|bytes| Record::parse(&bytes)) {
            Some(record) if record.selector.as_deref() == credential.token.selector() => {
                record.minted
            }
            Some(_) => return true,
            None => false,
        };
        self.save(environment, credential, minted).await
    }

    /// Keeps a token; true if that worked. Without a store that works it lasts as long as the process.
    pub(super) async fn save(
        &self,
        environment: &Environment,
        credential: &Credential,
        minted: bool,
    ) -> bool {
        let Credential { token, projects } = credential;
        let record = Record {
            version: Record::VERSION,
            minted,
            selector: token.selector().map(str::to_owned),
            projects: projects.to_list().into_iter().map(str::to_owned).collect(),
            sealed: self.seal().close(environment, token),
        };
        let bytes = serde_json::to_vec(&record).expect("a record of plain fields serializes");
        match self.store.save(&Key::Credentials(environment.clone()), bytes).await {
            Ok(()) => {
                debug!("Kept token {} for environment {environment}", token.masked());
                true
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                warn!(error, "Cannot keep the token for environment {environment}");
                false
            }
        }
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
