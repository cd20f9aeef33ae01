//! A fleet: edges that act towards upstream as one. They share a name and a Redis.
//!
//! # How it works
//!
//! For each [`Topic`], for instance the flags of an environment, one instance leads: it synchronises with
//! upstream and writes the result to Redis. The others request nothing from upstream and serve what the
//! leader writes; a notice tells them at once, and they also look every 2 s, because a notice can be lost.
//!
//! * **The leader** holds a lease in Redis for 6 s and renews it every 2 s. Each grant has a fencing
//!   number that is greater than all before ([`Fence`]). Redis accepts a document only from the last
//!   grant, so a leader that was suspended beyond its lease cannot overwrite its successor's documents.
//! * **One instance leads all topics, mostly**, so that upstream's event log is read once. The leader of the
//!   tokens has the first chance to lead the others, and they are handed over to it.
//! * **Nobody goes back.** `shared_document` orders documents of one leader by number, and all others
//!   by the time at which upstream confirmed them.
//! * **Redis coordinates, memory serves.** No request waits for Redis. Without Redis, or without a leader,
//!   an instance synchronises with upstream by itself after 10 s and a random part of a time that grows with
//!   the number of instances ([`Role::Alone`]). A leader that loses Redis does so when its lease ends.
//! * **A Redis that returns, even empty, is used again.** The next heartbeat acquires a lease, and the leader
//!   writes its documents again.
//! * **Usage** is appended to a log in Redis by all instances, and sent by the leader of [`Topic::Usage`]
//!   ([`UsageLog`]).
//!
//! # Structure
//!
//! Single questions to upstream, about first-seen tokens, need no leader: see [`SharedAnswers`].
//!
//! `lease` and `shared_document` decide and perform no IO. `scripts` has the atomic operations in Redis.
//! A [`Coordinator`] per topic performs them, and a [`Member`] connects it to the user of the topic. `hub`
//! has the state that all topics share. This module does not know the contents of documents, and makes no
//! request to upstream; the users of the topics do.

mod answers;
mod coordinator;
mod hub;
mod instances;
mod lease;
mod lua;
mod member;
mod notice;
mod recent_outcomes;
mod redis_health;
mod role;
mod scripts;
mod shared_document;
mod status;
mod timing;
mod topic;
mod usage_leader;
mod usage_log;
mod usage_sink;

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use metrics::{counter, describe_counter, describe_gauge};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use ulid::Ulid;

pub use self::{
    answers::{Answer, SharedAnswers},
    coordinator::Coordinator,
    member::{Member, Update},
    role::{Fence, Role},
    shared_document::{SharedDocument, Version},
    status::{FleetStatus, TopicStatus},
    timing::Timing,
    topic::Topic,
    usage_leader::UsageLeader,
    usage_log::{
        BatchState, CLAIM_DURATION, Claim, FinalOutcome, LogSize, Taken, UsageLog, WaitingBatch,
    },
    usage_sink::FleetUsageSink,
};
use self::{
    hub::Hub,
    instances::Registry,
    member::Exchange,
    scripts::{Instance, Scripts, TopicRedis},
    topic::Namespace,
};
use crate::{backoff::Backoff, redis_client::RedisClient, usage::UsageSink};

/// The delays before another attempt to subscribe to notices.
const INITIAL_RESUBSCRIBE_DELAY: Duration = Duration::from_millis(500);
const MAX_RESUBSCRIBE_DELAY: Duration = Duration::from_secs(5);

/// The longest that leaving takes.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// The settings of a fleet.
#[derive(Clone, Debug)]
pub struct Config {
    /// The start of all keys in Redis.
    pub prefix: String,
    /// The name that all instances of the fleet share.
    pub name: String,
    /// The URL of upstream without credentials. Instances of different upstreams never share anything, not
    /// even by mistake.
    pub upstream: String,
    /// The name of this instance, for operators.
    pub instance_name: String,
    /// The intervals.
    pub timing: Timing,
}

/// The fleet of this instance. A cheap handle.
#[derive(Clone, Debug)]
pub struct Fleet(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: RedisClient,
    keys: Namespace,
    timing: Timing,
    instance: Instance,
    channel: String,
    scripts: Arc<Scripts>,
    registry: Registry,
    hub: Arc<Hub>,
}

impl Fleet {
    /// A member of the fleet `config.name` in this Redis. Sends nothing yet.
    pub fn new(client: RedisClient, config: Config) -> Self {
        describe_metrics();
        let keys = Namespace::new(&config.prefix, &config.name, &config.upstream);
        let Config { name, instance_name, timing, .. } = config;
        let instance = Instance { id: Ulid::generate().to_string(), name: instance_name };
        let location = client.location().to_owned();
        let hub = Arc::new(Hub::new(name, location, timing.request_timeout()));
        Self(Arc::new(Inner {
            registry: Registry::new(client.clone(), keys.instances(), &instance),
            channel: keys.notice_channel(),
            scripts: Arc::new(Scripts::new()),
            client,
            keys,
            timing,
            instance,
            hub,
        }))
    }

    /// Takes part in a topic. The coordinator does so while it [runs](Coordinator::run); the member is for
    /// the user of the topic.
    pub fn join(&self, topic: Topic) -> (Member, Coordinator) {
        let inner = &*self.0;
        let (name, exchange) = (topic.name(), Arc::<Exchange>::default());
        let redis = Arc::new(TopicRedis::new(
            inner.client.clone(),
            Arc::clone(&inner.scripts),
            inner.keys.topic(&name),
            name.clone(),
            inner.channel.clone(),
            inner.instance.clone(),
        ));
        inner.hub.add(name, Arc::clone(&exchange), Arc::clone(&redis));
        let member = Member::new(Arc::clone(&exchange));
        let hub = Arc::clone(&inner.hub);
        (member, Coordinator::new(topic, inner.timing, hub, exchange, redis))
    }

    /// The usage of the fleet that its leader has not sent yet.
    pub fn usage_log(&self) -> UsageLog {
        UsageLog::new(self.0.client.clone(), self.0.keys.usage())
    }

    /// Hands usage over to the leader, or sends it to `upstream` while that is impossible. `interval` is how
    /// often usage is sent.
    pub fn usage_sink(&self, upstream: Arc<dyn UsageSink>, interval: Duration) -> FleetUsageSink {
        let (hub, timing) = (Arc::clone(&self.0.hub), self.0.timing);
        FleetUsageSink::new(self.usage_log(), upstream, hub, timing, interval)
    }

    /// Sends the usage of all instances to `upstream` every `interval`, while this instance leads.
    pub fn usage_leader(&self, upstream: Arc<dyn UsageSink>, interval: Duration) -> UsageLeader {
        UsageLeader::new(self.usage_log(), Arc::clone(&self.0.hub), upstream, interval)
    }

    /// Receives notices and keeps this instance in the list of instances, until dropped.
    pub async fn run(&self) {
        let Inner { registry, hub, .. } = &*self.0;
        tokio::join!(registry.run(hub), self.receive_notices());
    }

    /// Lets other instances lead at once, because this one ends. Call it after everything that uses a
    /// [`Member`] has stopped. Takes at most a second.
    pub async fn leave(&self) {
        let Inner { registry, hub, .. } = &*self.0;
        let leave = async { tokio::join!(hub.release_leases(), registry.leave()) };
        // The leases end by themselves if Redis does not respond.
        let _ = timeout(LEAVE_TIMEOUT, leave).await;
    }

    /// The answers of upstream to single questions, which all instances share.
    pub fn answers(&self) -> SharedAnswers {
        let Inner { client, hub, keys, instance, .. } = &*self.0;
        SharedAnswers::new(client.clone(), Arc::clone(hub), &keys.answers(), &instance.id)
    }

    /// Whether this instance requests any topic from upstream.
    pub fn upstream_use(&self) -> watch::Receiver<bool> {
        self.0.hub.upstream_use()
    }

    /// The state of the fleet, as far as this instance knows it. Does not ask Redis.
    pub fn status(&self) -> FleetStatus {
        self.0.hub.status()
    }

    /// Passes notices on to the topics. After each connection, all topics look for what was lost.
    async fn receive_notices(&self) {
        let Inner { client, hub, channel, .. } = &*self.0;
        let mut backoff = Backoff::new(INITIAL_RESUBSCRIBE_DELAY, MAX_RESUBSCRIBE_DELAY);
        loop {
            if let Some(mut notices) = hub.request(Box::pin(client.subscribe(channel))).await {
                hub.notice_all();
                while let Some(payload) = notices.next().await {
                    backoff.reset();
                    counter!("parapet_fleet_notices_total").increment(1);
                    hub.on_notice(&payload);
                }
            }
            sleep(backoff.next_delay(None, rand::random())).await;
        }
    }
}

fn describe_metrics() {
    describe_gauge!("parapet_fleet_leader", "Whether this instance leads the fleet, by topic");
    describe_gauge!(
        "parapet_fleet_alone",
        "Whether this instance synchronises with upstream for itself because no leader is within reach, \
         by topic"
    );
    describe_gauge!(
        "parapet_fleet_redis_failing",
        "Whether a request to Redis has failed within 10 s"
    );
    describe_gauge!("parapet_fleet_instances", "Instances of the fleet, with this one");
    describe_counter!("parapet_fleet_notices_total", "Notices received from other instances");
    describe_counter!("parapet_fleet_documents_total", "Documents read from Redis");
    describe_counter!(
        "parapet_fleet_writes_total",
        "Documents written to Redis as the leader, by result: written, refused because another instance \
         leads, failed"
    );
}
