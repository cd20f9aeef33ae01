//! A store in Redis or Valkey, which the instances of a deployment share.
//!
//! All records are fields of one hash, whose name is a hash tag, so that a Cluster keeps it and its
//! companions on one node:
//!
//! | key | contents |
//! |---|---|
//! | `{<prefix>}:records` | the records by name |
//! | `{<prefix>}:set-aside` | records that were damaged or came from a newer version |
//! | `{<prefix>}:lock:<name>` | the owner of a locked record; expires |
//! | `{<prefix>}:writes:<process>` | numbers of the last saves of a process by record; expires |

use std::{
    fmt, io,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use redis::{Script, cmd};
use tokio::time::{Instant, timeout};
use ulid::Ulid;

use super::{
    key::RecordKey,
    outage_log::{Access, OutageLog},
    record::{self, MAX_RECORD_LEN},
    save_metrics,
    store_trait::{Error, LEASE_DURATION, Lease, RecordLock, Store},
};
use crate::redis_client::{self, RedisClient, millis};

/// A [`Store`] in Redis.
pub struct RedisStore {
    client: RedisClient,
    keys: Keys,
    timeouts: RedisStoreTimeouts,
    /// Numbers the saves of this process.
    saves: AtomicU64,
    outage: OutageLog,
}

/// How long operations on a [`RedisStore`] may take, including the time to connect.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RedisStoreTimeouts {
    /// For loading and listing records.
    pub load: Duration,
    /// For saving and locking records.
    pub save: Duration,
}

/// The names of the keys in Redis.
struct Keys {
    tag: String,
    records: String,
    set_aside: String,
    writes: String,
}

/// How long the numbers of a process's saves are kept: longer than a save can be under way.
const WRITES_TTL: Duration = Duration::from_hours(1);

/// Saves a record unless a later save of the same process has already been applied: after a timeout the
/// next save uses another connection, which may be faster.
static SAVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local last = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
        if tonumber(ARGV[2]) <= last then return 0 end
        redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
        redis.call('PEXPIRE', KEYS[2], ARGV[3])
        redis.call('HSET', KEYS[1], ARGV[1], ARGV[4])
        return 1",
    )
});

/// Moves a record to the set-aside ones, unless it has been replaced: its start contains a checksum.
static SET_ASIDE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local record = redis.call('HGET', KEYS[1], ARGV[1])
        if not record or #record ~= tonumber(ARGV[2]) or record:sub(1, #ARGV[3]) ~= ARGV[3] then
            return 0
        end
        redis.call('HSET', KEYS[2], ARGV[1], record)
        redis.call('HDEL', KEYS[1], ARGV[1])
        return 1",
    )
});

/// Extends a lease, or takes it again if nobody has it: a server may have been restarted empty.
static RENEW: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local owner = redis.call('GET', KEYS[1])
        if owner and owner ~= ARGV[1] then return 0 end
        redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
        return 1",
    )
});

/// Ends a lease unless another process has it.
static RELEASE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
        return 0",
    )
});

impl RedisStore {
    /// Stores records under keys that begin with `{prefix}:`. Connects at the first operation.
    pub fn new(client: RedisClient, prefix: &str, timeouts: RedisStoreTimeouts) -> Self {
        save_metrics::describe();
        let tag = format!("{{{prefix}}}");
        let keys = Keys {
            records: format!("{tag}:records"),
            set_aside: format!("{tag}:set-aside"),
            writes: format!("{tag}:writes:{}", Ulid::generate()),
            tag,
        };
        Self { client, keys, timeouts, saves: AtomicU64::new(0), outage: OutageLog::default() }
    }

    async fn load_record(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let (mut hstrlen, mut hget) = (cmd("HSTRLEN"), cmd("HGET"));
        let length = self.client.run(hstrlen.arg(&self.keys.records).arg(name));
        let length: usize = self.within(self.timeouts.load, length).await?;
        let record = self.place(&self.keys.records, name);
        if length > MAX_RECORD_LEN {
            return Err(Error::Read { record, source: record::too_large_error(length as u64) });
        }
        let found = self.client.run(hget.arg(&self.keys.records).arg(name));
        let found: Option<Vec<u8>> = self.within(self.timeouts.load, found).await?;
        let Some(found) = found else { return Ok(None) };
        let length = found.len();
        let start = found[..length.min(record::MAX_HEADER_LEN)].to_vec();
        let reason = match record::decode(found) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(reason) => reason,
        };
        let keys = [&*self.keys.records, &*self.keys.set_aside];
        let moved = self.client.run_script::<()>(&SET_ASIDE, &keys, (name, length, start));
        self.within(self.timeouts.load, moved).await?;
        Err(reason.into_error(record, self.place(&self.keys.set_aside, name)))
    }

    async fn save_record(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let number = self.saves.fetch_add(1, Ordering::Relaxed) + 1;
        let record = record::encode(bytes);
        let keys = [&*self.keys.records, &*self.keys.writes];
        let arguments = (name, number, millis(WRITES_TTL), record);
        let saved = self.client.run_script::<()>(&SAVE, &keys, arguments);
        self.within(self.timeouts.save, saved).await
    }

    async fn list_records(&self) -> Result<Vec<RecordKey>, Error> {
        let mut hkeys = cmd("HKEYS");
        let names = self.client.run::<Vec<String>>(hkeys.arg(&self.keys.records));
        let names = self.within(self.timeouts.load, names).await?;
        let mut keys: Vec<_> = names.iter().filter_map(|name| RecordKey::from_name(name)).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    async fn lock_record(&self, name: &str) -> Result<Option<RecordLock>, Error> {
        let lease = RedisLease {
            client: self.client.clone(),
            key: format!("{}:lock:{name}", self.keys.tag),
            owner: Ulid::generate().to_string(),
            timeout: self.timeouts.save,
        };
        let mut set = cmd("SET");
        set.arg(&lease.key).arg(&lease.owner).arg("NX").arg("PX").arg(millis(LEASE_DURATION));
        let taken: bool = self.within(self.timeouts.save, self.client.run(&set)).await?;
        Ok(taken.then(|| RecordLock::lease(lease)))
    }

    async fn within<T>(
        &self,
        deadline: Duration,
        command: impl Future<Output = Result<T, redis_client::Error>>,
    ) -> Result<T, Error> {
        within(&self.client, deadline, command).await
    }

    /// Where a record is, as errors name it.
    fn place(&self, key: &str, name: &str) -> String {
        format!("{} {key} {name}", self.client.location())
    }
}

impl Store for RedisStore {
    fn load<'a>(&'a self, key: &'a RecordKey) -> BoxFuture<'a, Result<Option<Vec<u8>>, Error>> {
        let load = async {
            let loaded = self.load_record(&key.name()).await;
            self.outage.record(self.client.location(), Access::Read, loaded)
        };
        load.boxed()
    }

    fn save<'a>(&'a self, key: &'a RecordKey, bytes: Bytes) -> BoxFuture<'a, Result<(), Error>> {
        let save = async move {
            let begun = Instant::now();
            let saved = self.save_record(&key.name(), &bytes).await;
            save_metrics::record(key, begun.elapsed(), saved.is_ok());
            self.outage.record(self.client.location(), Access::Write, saved)
        };
        save.boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<RecordKey>, Error>> {
        let list = async {
            let listed = self.list_records().await;
            self.outage.record(self.client.location(), Access::Read, listed)
        };
        list.boxed()
    }

    fn try_lock<'a>(
        &'a self,
        key: &'a RecordKey,
    ) -> BoxFuture<'a, Result<Option<RecordLock>, Error>> {
        let lock = async {
            let locked = self.lock_record(&key.name()).await;
            self.outage.record(self.client.location(), Access::Write, locked)
        };
        lock.boxed()
    }

    fn is_remote(&self) -> bool {
        true
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisStore({} {})", self.client.location(), self.keys.tag)
    }
}

/// A lock whose key has this owner and expires.
#[derive(Debug)]
struct RedisLease {
    client: RedisClient,
    key: String,
    owner: String,
    timeout: Duration,
}

impl Lease for RedisLease {
    fn renew(&self) -> BoxFuture<'_, Result<bool, Error>> {
        let arguments = (&self.owner, millis(LEASE_DURATION));
        let keys = [self.key.as_str()];
        let renew = async move {
            let renewed = self.client.run_script(&RENEW, &keys, arguments);
            within(&self.client, self.timeout, renewed).await
        };
        renew.boxed()
    }

    fn release(&self) -> BoxFuture<'_, Result<(), Error>> {
        let keys = [self.key.as_str()];
        let release = async move {
            let released = self.client.run_script(&RELEASE, &keys, &self.owner);
            within(&self.client, self.timeout, released).await
        };
        release.boxed()
    }
}

/// The result of a command. Every failure concerns all records: the server is away, full, still loading
/// its data, or does not permit the command.
async fn within<T>(
    client: &RedisClient,
    deadline: Duration,
    command: impl Future<Output = Result<T, redis_client::Error>>,
) -> Result<T, Error> {
    let source = match timeout(deadline, command).await {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => io::Error::other(error),
        Err(_) => {
            let text = format!("it did not respond within {deadline:?}");
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
    };
    Err(Error::Unavailable { store: client.location().to_owned(), source })
}
