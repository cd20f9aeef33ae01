//! The list of a fleet's instances in Redis. Its length decides over how long a time requests to upstream
//! are spread when there is no leader.
//!
//! An instance that ends without leaving disappears from the list half a minute later.

use std::time::Duration;

use redis::Script;
use tokio::time::sleep;

use super::{
    hub::{Hub, Instances},
    scripts::Instance,
};
use crate::redis_client::{Error, RedisClient, millis};

/// How often an instance adds itself again.
const INTERVAL: Duration = Duration::from_secs(5);

/// An instance that has not added itself for so long has ended.
const EXPIRY: Duration = Duration::from_secs(30);

/// The number of instances whose names are read.
const MAX_NAMES: usize = 100;

/// `ARGV`: instance with its name, expiry in ms, number of names. Returns the number of instances, and
/// some of them.
const REGISTER: &str = r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2] * 2)
return {redis.call('ZCARD', KEYS[1]), redis.call('ZRANGE', KEYS[1], 0, ARGV[3] - 1)}
";

/// Adds this instance to the list, and reads it.
#[derive(Debug)]
pub(super) struct Registry {
    client: RedisClient,
    script: Script,
    key: String,
    /// The id and the name of this instance.
    entry: String,
}

impl Registry {
    pub(super) fn new(client: RedisClient, key: String, Instance { id, name }: &Instance) -> Self {
        let script = Script::new(REGISTER);
        Self { client, script, key, entry: format!("{id} {name}") }
    }

    /// Keeps this instance in the list, until dropped.
    pub(super) async fn run(&self, hub: &Hub) {
        loop {
            if let Some(instances) = hub.request(self.register()).await {
                metrics::gauge!("parapet_fleet_instances").set(f64::from(instances.count));
                hub.set_instances(instances);
            }
            sleep(INTERVAL.mul_f64(0.9 + 0.2 * rand::random::<f64>())).await;
        }
    }

    /// Removes this instance from the list.
    pub(super) async fn leave(&self) -> Result<(), Error> {
        let mut command = redis::cmd("ZREM");
        command.arg(&self.key).arg(&self.entry);
        self.client.run(&command).await
    }

    async fn register(&self) -> Result<Instances, Error> {
        let expiry = millis(EXPIRY);
        let arguments = (&self.entry, expiry, MAX_NAMES);
        let (count, entries): (u32, Vec<String>) =
            self.client.run_script(&self.script, &[&self.key], arguments).await?;
        let name = |entry: &String| entry.split_once(' ').map(|(_, name)| name.to_owned());
        Ok(Instances { count, names: entries.iter().filter_map(name).collect() })
    }
}
