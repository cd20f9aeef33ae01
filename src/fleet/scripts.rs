//! The Lua scripts that change the keys of a topic, each of them atomic.
//!
//! Only the holder of the last grant can write a document: the script compares the fence of the writer
//! with the last one that was granted. So a leader that was suspended for longer than its lease cannot
//! overwrite the document of its successor, even before that has written one.
//!
//! A Redis that has lost its data must not grant a fence again. The fence of a grant is therefore greater
//! than the last grant's, than the stored document's, than the highest that the acquiring instance has
//! seen, and than the time of Redis in milliseconds. Even if that clock was set back, fences do not go
//! back: an instance takes the lease from a holder with a lower fence than it has seen.
//!
//! All keys expire after a time without any instance, so that the keys of a fleet or an environment that
//! no longer exists do not stay.

use std::time::Duration;

use redis::Script;
use tokio::time::Instant;

use super::{
    lease::Holder,
    lua,
    notice::Notice,
    role::Fence,
    shared_document::{DocumentDigest, DocumentHead, EncodedDocument, Version, confirmed_at},
    topic::TopicKeys,
};
use crate::redis_client::{Error, RedisClient, millis};

/// How long keys stay in Redis after the last use.
const RETENTION: Duration = Duration::from_hours(7 * 24);

/// Functions that the scripts share. `KEYS` are lease, fence and document; `ARGV[1]` is the instance.
const FUNCTIONS: &str = r"
local function look()
  local lease = redis.call('HMGET', KEYS[1], 'fence', 'holder', 'name', 'since')
  local held = false
  if lease[4] then held = age_since(lease[4]) end
  local document = redis.call('HMGET', KEYS[3], 'fence', 'sequence', 'digest', 'confirmed')
  local age = false
  if document[4] then age = age_since(document[4]) end
  local own = 0
  if lease[2] == ARGV[1] then own = 1 end
  return {{lease[1], own, lease[3], held}, {document[1], document[2], document[3], age}}
end
";

/// `ARGV`: instance, its name, lease in ms, highest fence seen, retention in ms.
const ACQUIRE: &str = r"
local lease = redis.call('HMGET', KEYS[1], 'fence', 'holder')
local seen = tonumber(ARGV[4])
if lease[2] == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
elseif not lease[1] or tonumber(lease[1]) < seen then
  local last = tonumber(redis.call('GET', KEYS[2]) or '0')
  local stored = tonumber(redis.call('HGET', KEYS[3], 'fence') or '0')
  local fence = text(math.max(last, stored, seen, now()) + 1)
  redis.call('SET', KEYS[2], fence, 'PX', ARGV[5])
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'fence', fence, 'holder', ARGV[1], 'name', ARGV[2], 'since', text(now()))
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return look()
";

/// `ARGV`: instance, fence, lease in ms, age of the confirmation of the stored document in ms or nothing,
/// retention in ms.
const RENEW: &str = r"
local lease = redis.call('HMGET', KEYS[1], 'fence', 'holder')
if lease[1] == ARGV[2] and lease[2] == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[5])
  redis.call('PEXPIRE', KEYS[3], ARGV[5])
  if ARGV[4] ~= '' and redis.call('HGET', KEYS[3], 'fence') == ARGV[2] then
    redis.call('HSET', KEYS[3], 'confirmed', text(now() - ARGV[4]))
  end
end
return look()
";

/// `ARGV`: instance. Changes nothing.
const LOOK: &str = "return look()";

/// `ARGV`: instance, fence, channel, notice.
const RELEASE: &str = r"
local lease = redis.call('HMGET', KEYS[1], 'fence', 'holder')
if lease[1] == ARGV[2] and lease[2] == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', ARGV[3], ARGV[4])
end
return 0
";

/// `ARGV`: instance, fence, sequence, digest, document, age of the confirmation in ms or nothing,
/// retention in ms, channel, notice. Returns whether the document is stored.
///
/// A repetition of a write whose reply was lost succeeds. A write that Redis runs after the end of the lease,
/// because it did not respond for a while, is refused: its confirmation would seem as new as that moment.
const WRITE: &str = r"
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return 0 end
local lease = redis.call('HMGET', KEYS[1], 'fence', 'holder')
if lease[1] ~= ARGV[2] or lease[2] ~= ARGV[1] then return 0 end
local stored = redis.call('HMGET', KEYS[3], 'fence', 'sequence', 'digest')
if stored[1] and tonumber(stored[1]) > tonumber(ARGV[2]) then return 0 end
if stored[1] == ARGV[2] and tonumber(stored[2]) >= tonumber(ARGV[3]) then
  if stored[2] == ARGV[3] and stored[3] == ARGV[4] then return 1 end
  return 0
end
redis.call('HSET', KEYS[3], 'fence', ARGV[2], 'sequence', ARGV[3], 'digest', ARGV[4], 'document', ARGV[5])
if ARGV[6] == '' then
  redis.call('HDEL', KEYS[3], 'confirmed')
else
  redis.call('HSET', KEYS[3], 'confirmed', text(now() - ARGV[6]))
end
redis.call('PEXPIRE', KEYS[3], ARGV[7])
redis.call('PUBLISH', ARGV[8], ARGV[9])
return 1
";

/// `ARGV`: instance. Returns the document with its description.
const READ: &str = r"
return {look()[2], redis.call('HGET', KEYS[3], 'document')}
";

/// The scripts, with their hashes.
#[derive(Debug)]
pub(super) struct Scripts {
    acquire: Script,
    renew: Script,
    look: Script,
    release: Script,
    write: Script,
    read: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let script = |code| lua::script(FUNCTIONS, code);
        Self {
            acquire: script(ACQUIRE),
            renew: script(RENEW),
            look: script(LOOK),
            release: script(RELEASE),
            write: script(WRITE),
            read: script(READ),
        }
    }
}

/// The identity of an instance in Redis.
#[derive(Clone, Debug)]
pub(super) struct Instance {
    /// Unique to this process.
    pub(super) id: String,
    /// Its name, for operators.
    pub(super) name: String,
}

/// The state of a topic in Redis.
#[derive(Clone, Debug)]
pub(super) struct TopicState {
    pub(super) holder: Holder,
    /// The name of the instance that holds the lease.
    pub(super) holder_name: Option<String>,
    /// How long it has held the lease.
    pub(super) held_for: Option<Duration>,
    pub(super) document: Option<DocumentHead>,
}

/// The reply of `look()`.
type LookReply = (LeaseReply, DocumentReply);

/// The lease: fence, whether this instance holds it, name of its holder, and how long it has been held in
/// ms.
type LeaseReply = (Option<u64>, bool, Option<String>, Option<u64>);

/// The document: fence, sequence, digest, and the age of its confirmation in ms.
type DocumentReply = (Option<u64>, Option<u64>, Option<Vec<u8>>, Option<u64>);

/// The reply of [`READ`]: the description of the document, and the document.
type ReadReply = (DocumentReply, Option<Vec<u8>>);

impl TopicState {
    fn from_reply(reply: LookReply, sent_at: Instant) -> Self {
        let ((fence, is_own, holder_name, held_for), document) = reply;
        let holder = match fence.map(Fence::new) {
            None => Holder::Nobody,
            Some(fence) if is_own => Holder::Own(fence),
            Some(fence) => Holder::Other(fence),
        };
        let held_for = held_for.map(Duration::from_millis);
        Self { holder, holder_name, held_for, document: document_head(document, sent_at) }
    }
}

/// `None` if there is no document, or its description is damaged.
fn document_head(reply: DocumentReply, sent_at: Instant) -> Option<DocumentHead> {
    let (fence, sequence, digest, age) = reply;
    let version = Version { fence: Fence::new(fence?), sequence: sequence? };
    let digest = DocumentDigest::from_bytes(&digest?)?;
    let age = age.map(Duration::from_millis);
    let confirmed_at = age.and_then(|age| confirmed_at(sent_at, age));
    Some(DocumentHead { version, digest, confirmed_at })
}

/// Runs the scripts on the keys of one topic.
#[derive(Debug)]
pub(super) struct TopicRedis {
    client: RedisClient,
    scripts: std::sync::Arc<Scripts>,
    keys: TopicKeys,
    topic: String,
    channel: String,
    instance: Instance,
}

impl TopicRedis {
    pub(super) fn new(
        client: RedisClient,
        scripts: std::sync::Arc<Scripts>,
        keys: TopicKeys,
        topic: String,
        channel: String,
        instance: Instance,
    ) -> Self {
        Self { client, scripts, keys, topic, channel, instance }
    }

    /// Acquires the lease if nobody holds it, or its holder has a lower fence than `highest`.
    pub(super) async fn acquire(
        &self,
        highest: Fence,
        lease: Duration,
    ) -> Result<TopicState, Error> {
        let Instance { id, name } = &self.instance;
        let arguments = (id, name, millis(lease), highest.get(), millis(RETENTION));
        let sent_at = Instant::now();
        let reply = self.client.run_script(&self.scripts.acquire, &self.keys(), arguments).await?;
        Ok(TopicState::from_reply(reply, sent_at))
    }

    /// Renews the lease if this instance holds it with `fence`, and reports when upstream confirmed the
    /// document.
    pub(super) async fn renew(
        &self,
        fence: Fence,
        lease: Duration,
        confirmed_at: Option<Instant>,
    ) -> Result<TopicState, Error> {
        let arguments =
            (&self.instance.id, fence.get(), millis(lease), age(confirmed_at), millis(RETENTION));
        let sent_at = Instant::now();
        let reply = self.client.run_script(&self.scripts.renew, &self.keys(), arguments).await?;
        Ok(TopicState::from_reply(reply, sent_at))
    }

    /// Reads the state and changes nothing.
    pub(super) async fn look(&self) -> Result<TopicState, Error> {
        let sent_at = Instant::now();
        let arguments = &self.instance.id;
        let reply = self.client.run_script(&self.scripts.look, &self.keys(), arguments).await?;
        Ok(TopicState::from_reply(reply, sent_at))
    }

    /// Gives the lease back, if this instance holds it with `fence`, and notifies the others.
    pub(super) async fn release(&self, fence: Fence) -> Result<(), Error> {
        let notice = Notice { topic: &self.topic, version: None }.encode();
        let arguments = (&self.instance.id, fence.get(), &self.channel, notice);
        let _: u64 = self.client.run_script(&self.scripts.release, &self.keys(), arguments).await?;
        Ok(())
    }

    /// Writes a document and notifies the others. Returns false if another instance has been granted the
    /// lease since, or has written a newer document.
    pub(super) async fn write(
        &self,
        version: Version,
        document: &EncodedDocument,
        confirmed_at: Option<Instant>,
    ) -> Result<bool, Error> {
        let notice = Notice { topic: &self.topic, version: Some(version) }.encode();
        let arguments = (
            &self.instance.id,
            version.fence.get(),
            version.sequence,
            document.digest.as_bytes(),
            &*document.compressed,
            age(confirmed_at),
            millis(RETENTION),
            &self.channel,
            notice,
        );
        self.client.run_script(&self.scripts.write, &self.keys(), arguments).await
    }

    /// Reads the document.
    pub(super) async fn read(&self) -> Result<Option<(DocumentHead, EncodedDocument)>, Error> {
        let sent_at = Instant::now();
        let arguments = &self.instance.id;
        let reply: ReadReply =
            self.client.run_script(&self.scripts.read, &self.keys(), arguments).await?;
        let (description, compressed) = reply;
        let head = document_head(description, sent_at);
        let document = head.zip(compressed).map(|(head, compressed)| {
            let digest = head.digest;
            (head, EncodedDocument { digest, compressed })
        });
        Ok(document)
    }

    fn keys(&self) -> [&str; 3] {
        [&self.keys.lease, &self.keys.fence, &self.keys.document]
    }
}

/// The age of a confirmation in ms, or nothing.
fn age(confirmed_at: Option<Instant>) -> String {
    confirmed_at.map(|at| millis(at.elapsed()).to_string()).unwrap_or_default()
}
