//! The usage of a fleet in Redis, until its leader has sent it.
//!
//! An instance *appends* a batch, which Redis then holds once, however often it is appended. The leader
//! *takes* batches, merges them, and *claims* each merged batch before it sends it. When upstream has
//! accepted it, the leader *finishes* it: the batches are removed, and their outcomes stay until the
//! instances have seen them.
//!
//! * Only the holder of the last grant of the lease can take and claim. That alone would not stop two
//!   senders, because a lease ends earlier than a request to upstream may. So a claim lasts for
//!   [`CLAIM_DURATION`], longer than sending may take, and until then no other leader sends the
//!   batch. The claim contains the merged body, so that the next leader sends it unchanged.
//! * A batch that an instance has appended before, and that Redis has lost, waits as long as a claim lasts
//!   before it can be taken: the leader that had claimed it may still be sending it.
//! * The log is bounded in bytes and batches. When it is full it accepts nothing; it never drops usage.
//!
//! All keys expire after a time without any use. This module does not decide what to send or when.

mod scripts;

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use ulid::Ulid;

use self::scripts::Scripts;
use super::{role::Fence, topic::UsageKeys};
use crate::{
    redis_client::{Error, RedisClient, millis},
    token::Environment,
    usage::{BatchId, MergedBatch},
};

/// How long a claim lasts: no other leader sends the claimed batch meanwhile.
pub const CLAIM_DURATION: Duration = Duration::from_mins(1);
/// How long keys stay in Redis after the last use: as long as a batch that a stopped instance has stored
/// may wait for the next start.
const RETENTION: Duration = Duration::from_hours(30 * 24);
/// The maximum size of all bodies, in bytes.
const MAX_BYTES: usize = 64 << 20;
/// The maximum number of batches that wait.
const MAX_BATCHES: usize = 20_000;
/// The maximum number of outcomes that no instance has seen yet.
const MAX_OUTCOMES: usize = 65_536;
/// How much the leader takes at once.
const MAX_TAKEN_BYTES: usize = 4 << 20;
const MAX_TAKEN_BATCHES: usize = 1000;

/// The log of one fleet. A cheap handle.
#[derive(Clone)]
pub struct UsageLog(Arc<Inner>);

struct Inner {
    client: RedisClient,
    keys: UsageKeys,
    scripts: Scripts,
}

/// What the log knows about a batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BatchState {
    /// Nothing: it was never appended, or Redis has lost it.
    Absent,
    /// The leader has not sent it yet, or does not know the outcome yet.
    Waiting,
    /// The leader has sent it.
    Finished(FinalOutcome),
    /// It was not appended, because the log is full.
    Full,
}

/// The outcome of sending a batch that will not be sent again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FinalOutcome {
    /// Upstream accepted it.
    Sent,
    /// Upstream rejected it permanently.
    Rejected,
    /// Upstream rejected it as too large, although it was sent alone.
    TooLarge,
}

impl FinalOutcome {
    const ALL: [Self; 3] = [Self::Sent, Self::Rejected, Self::TooLarge];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Rejected => "rejected",
            Self::TooLarge => "too_large",
        }
    }
}

/// How much the log holds.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct LogSize {
    /// The number of batches that wait to be taken.
    pub waiting: usize,
    /// The bytes of all bodies.
    pub bytes: usize,
    /// The number of merged batches whose outcome is not known yet.
    pub claims: usize,
    /// Changes when Redis loses its data; empty if Redis has no memory for it.
    pub epoch: String,
}

/// What a leader has to send.
#[derive(Debug, Default)]
pub struct Taken {
    /// Merged batches that were claimed before.
    pub claims: Vec<Claim>,
    /// Batches that wait, the oldest first.
    pub batches: Vec<WaitingBatch>,
}

/// A merged batch that a leader has begun to send, and whose outcome is not known.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Claim {
    /// The environment of its usage.
    pub environment: Environment,
    /// The batch.
    pub batch: MergedBatch,
    /// How long another leader may still be sending it. Zero for the leader's own claims.
    pub held_for: Duration,
}

/// A batch that waits.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WaitingBatch {
    /// Its id.
    pub id: BatchId,
    /// The environment of its usage.
    pub environment: Environment,
    /// Its body.
    pub body: Bytes,
}

/// The replies of the scripts: merged batch, environment, body, parts and remaining ms of a claim.
type ClaimReply = (String, String, Vec<u8>, String, u64);
/// Id, environment and body of a batch.
type BatchReply = (String, String, Vec<u8>);

impl UsageLog {
    pub(super) fn new(client: RedisClient, keys: UsageKeys) -> Self {
        Self(Arc::new(Inner { client, keys, scripts: Scripts::new() }))
    }

    /// What the log knows about a batch. The outcomes of `seen` are removed.
    pub async fn look(&self, id: BatchId, seen: &[BatchId]) -> Result<BatchState, Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let reply: String =
            client.run_script(&scripts.look, &keys.all(), (id.to_string(), texts(seen))).await?;
        Ok(parse_state(&reply))
    }

    /// Appends a batch, unless the log knows it already. It can be taken after `delay`.
    pub async fn append(
        &self,
        id: BatchId,
        environment: &Environment,
        body: &[u8],
        delay: Duration,
    ) -> Result<BatchState, Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let limits = (MAX_BYTES, MAX_BATCHES, millis(RETENTION));
        let arguments = (id.to_string(), environment.as_str(), body, millis(delay), limits);
        let reply: String = client.run_script(&scripts.append, &keys.all(), arguments).await?;
        Ok(parse_state(&reply))
    }

    /// How much the log holds.
    pub async fn size(&self) -> Result<LogSize, Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let arguments = (Ulid::generate().to_string(), millis(RETENTION));
        let (waiting, bytes, claims, epoch) =
            client.run_script(&scripts.size, &keys.all(), arguments).await?;
        Ok(LogSize { waiting, bytes, claims, epoch })
    }

    /// What the leader with this fence has to send; `None` if another instance leads. Without
    /// `with_waiting` only claims.
    pub async fn take(&self, fence: Fence, with_waiting: bool) -> Result<Option<Taken>, Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let max_batches = if with_waiting { MAX_TAKEN_BATCHES } else { 0 };
        let arguments = (fence.get(), MAX_TAKEN_BYTES, max_batches);
        let reply: Option<(Vec<ClaimReply>, Vec<BatchReply>)> =
            client.run_script(&scripts.take, &keys.all(), arguments).await?;
        let taken = |(claims, batches): (Vec<_>, Vec<_>)| Taken {
            claims: claims.into_iter().filter_map(parse_claim).collect(),
            batches: batches.into_iter().filter_map(parse_batch).collect(),
        };
        Ok(reply.map(taken))
    }

    /// Claims a merged batch, or changes how long its claim lasts. The leader may send it if this returns
    /// true, and must stop within `duration` of its call. False if another leader has a claim to any part.
    pub async fn claim(
        &self,
        fence: Fence,
        environment: &Environment,
        batch: &MergedBatch,
        duration: Duration,
    ) -> Result<bool, Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let MergedBatch { id, parts, body } = batch;
        let batch = (id.to_string(), environment.as_str(), &**body);
        let arguments = (fence.get(), batch, millis(duration), texts(parts));
        client.run_script(&scripts.claim, &keys.all(), arguments).await
    }

    /// Removes a merged batch with its parts, and stores their outcome for the instances. May be repeated.
    pub async fn finish(&self, batch: &MergedBatch, outcome: FinalOutcome) -> Result<(), Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let MergedBatch { id, parts, body: _ } = batch;
        let limits = (MAX_OUTCOMES, millis(RETENTION));
        let arguments = (id.to_string(), outcome.as_str(), limits, texts(parts));
        let _: u64 = client.run_script(&scripts.finish, &keys.all(), arguments).await?;
        Ok(())
    }

    /// Lets the parts of a merged batch wait again, because upstream has certainly not accepted it.
    pub async fn release(&self, fence: Fence, batch: &MergedBatch) -> Result<(), Error> {
        let Inner { client, keys, scripts } = &*self.0;
        let MergedBatch { id, parts, body: _ } = batch;
        let arguments = (fence.get(), id.to_string(), texts(parts));
        let _: u64 = client.run_script(&scripts.release, &keys.all(), arguments).await?;
        Ok(())
    }

    /// The servers as a URL without credentials, for logs.
    pub fn location(&self) -> &str {
        self.0.client.location()
    }
}

impl fmt::Debug for UsageLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("UsageLog").field(&self.location()).finish()
    }
}

fn parse_state(reply: &str) -> BatchState {
    match reply {
        "" => BatchState::Absent,
        "full" => BatchState::Full,
        outcome => FinalOutcome::ALL
            .into_iter()
            .find(|known| known.as_str() == outcome)
            .map_or(BatchState::Waiting, BatchState::Finished),
    }
}

/// `None` for a claim that no version of Parapet has written.
fn parse_claim((id, environment, body, parts, rest): ClaimReply) -> Option<Claim> {
    let parts = parts.split(' ').map(BatchId::parse).collect::<Option<Vec<_>>>()?;
    let batch = MergedBatch { id: BatchId::parse(&id)?, parts, body: body.into() };
    let environment = Environment::new(&environment);
    Some(Claim { environment, batch, held_for: Duration::from_millis(rest) })
}

fn parse_batch((id, environment, body): BatchReply) -> Option<WaitingBatch> {
    let environment = Environment::new(&environment);
    Some(WaitingBatch { id: BatchId::parse(&id)?, environment, body: body.into() })
}

fn texts(ids: &[BatchId]) -> Vec<String> {
    ids.iter().map(BatchId::to_string).collect()
}
