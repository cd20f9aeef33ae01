//! Coordinates one topic: keeps or acquires the lease, writes the leader's documents, and fetches those of
//! other leaders.
//!
//! It makes one request at a time, each with the timeouts of the Redis client. [`Lease`] and the
//! comparison of documents decide; nobody waits for this task.

use std::{sync::Arc, time::Duration};

use metrics::{counter, gauge};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{
    hub::{Hub, PrimaryLeader},
    lease::{Holder, Lease, patience},
    member::{Adoption, Exchange},
    role::{Fence, Role},
    scripts::{TopicRedis, TopicState},
    shared_document::{DocumentHead, EncodedDocument, SharedDocument, Version},
    timing::Timing,
    topic::Topic,
};
use crate::{backoff::Backoff, redis_client::Error, telemetry::error_chain};

/// How long a leader that has let others lead does not acquire the lease again: at first, and at most
/// while it does so again and again, for instance because upstream is away for all. At random up to half as
/// long.
const INITIAL_YIELD: Duration = Duration::from_secs(30);
const MAX_YIELD: Duration = Duration::from_mins(8);

/// For how many heartbeats a topic without a leader is left to the leader of the primary topic.
const DEFERENCE: u32 = 2;

/// How long the primary topic has had its leader before other topics are handed over to it.
const HANDOVER_DELAY: Duration = Duration::from_secs(30);

/// Coordinates one topic of one instance. Its [`Member`](super::Member) is for the user of the topic.
#[derive(Debug)]
pub struct Coordinator {
    topic: Topic,
    timing: Timing,
    hub: Arc<Hub>,
    exchange: Arc<Exchange>,
    redis: Arc<TopicRedis>,
    lease: Lease,
    /// The document in Redis, as of the last reply.
    stored: Option<DocumentHead>,
    /// The last document that this instance has written.
    written: Option<Written>,
    /// The number of a document that cannot be written.
    unwritable: Option<u64>,
    /// Since when this leader cannot write documents, or when upstream confirmed them.
    failing_since: Option<Instant>,
    heartbeat_at: Instant,
    /// Whether Redis has a newer document that could not be fetched.
    is_behind: bool,
    /// Why and until when others are let lead.
    yielding: Option<Yielding>,
    yields: Backoff,
    /// Since when the topic has no leader.
    vacant_since: Option<Instant>,
    /// The leader of the primary topic that has had the chance to lead this one.
    handed_over_to: Option<String>,
}

/// A time in which others are let lead.
#[derive(Clone, Copy, Debug)]
struct Yielding {
    since: Instant,
    until: Instant,
    /// Whether upstream's next confirmation ends it, because upstream had not responded.
    ends_on_confirmation: bool,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    version: Version,
    /// The number of the [`Outgoing`](super::member::Outgoing) document.
    number: u64,
}

impl Coordinator {
    pub(super) fn new(
        topic: Topic,
        timing: Timing,
        hub: Arc<Hub>,
        exchange: Arc<Exchange>,
        redis: Arc<TopicRedis>,
    ) -> Self {
        let now = Instant::now();
        record_role(&topic, Role::Follower);
        Self {
            lease: Lease::new(timing.lease, now + timing.start_patience),
            topic,
            timing,
            hub,
            exchange,
            redis,
            stored: None,
            written: None,
            unwritable: None,
            failing_since: None,
            heartbeat_at: now,
            is_behind: false,
            yielding: None,
            yields: Backoff::new(INITIAL_YIELD, MAX_YIELD),
            vacant_since: None,
            handed_over_to: None,
        }
    }

    /// Coordinates the topic until dropped.
    ///
    /// Dropping the future is safe: the lease ends by itself, or earlier by
    /// [`Fleet::leave`](super::Fleet::leave).
    pub async fn run(mut self) {
        loop {
            if self.exchange.lock().take_yields() {
                self.yield_lease().await;
            }
            let is_noticed = self.exchange.lock().take_noticed();
            if self.heartbeat_at <= Instant::now() || (is_noticed && self.lease.fence().is_none()) {
                self.heartbeat().await;
            }
            self.adopt().await;
            self.announce_role();
            self.write().await;
            self.give_up_if_failing().await;
            self.hand_over_to_primary().await;
            self.announce_role();
            let deadline = self.lease.next_deadline().map_or(self.heartbeat_at, |deadline| {
                // A deadline in the past has been applied above.
                if deadline <= Instant::now() {
                    self.heartbeat_at
                } else {
                    deadline.min(self.heartbeat_at)
                }
            });
            tokio::select! {
                () = sleep_until(deadline) => {}
                () = self.exchange.notified() => {}
            }
        }
    }

    /// Renews the lease, or tries to acquire it, and learns the state of the topic.
    async fn heartbeat(&mut self) {
        let sent_at = Instant::now();
        self.heartbeat_at = sent_at + self.timing.next_heartbeat(rand::random());
        let state = self.hub.request(self.renew_or_acquire()).await;
        if let Some(state) = state {
            self.apply(state, sent_at);
        }
    }

    async fn renew_or_acquire(&self) -> Result<TopicState, Error> {
        let (duration, highest) = (self.timing.lease, self.lease.highest_fence());
        if let Some(fence) = self.lease.fence() {
            let confirmed_at = self.confirmation_of_written(fence);
            let state = self.redis.renew(fence, duration, confirmed_at).await?;
            // Redis has lost the lease. If nobody else has acquired it, this instance goes on.
            let is_other = matches!(state.holder, Holder::Other(other) if other >= highest);
            if is_other || state.holder == Holder::Own(fence) {
                return Ok(state);
            }
        }
        if self.is_yielding() || self.is_left_to_primary() {
            return self.redis.look().await;
        }
        self.redis.acquire(highest, duration).await
    }

    /// Whether others are let lead.
    fn is_yielding(&self) -> bool {
        let Some(Yielding { since, until, ends_on_confirmation }) = self.yielding else {
            return false;
        };
        let is_confirmed = || self.exchange.lock().served.confirmed_at() > Some(since);
        Instant::now() < until && !(ends_on_confirmation && is_confirmed())
    }

    /// Whether the leader of the primary topic has the first chance to lead this one.
    fn is_left_to_primary(&self) -> bool {
        let deference = self.timing.heartbeat * DEFERENCE;
        self.lease.fence().is_none()
            && self.topic != Topic::PRIMARY
            && matches!(self.hub.primary_leader(), Some(PrimaryLeader::Other(_)))
            && self.vacant_since.is_none_or(|since| since.elapsed() < deference)
    }

    /// When upstream confirmed the document that this leader has written last. `None` once it serves
    /// another one.
    fn confirmation_of_written(&self, fence: Fence) -> Option<Instant> {
        let written = self.written.filter(|written| written.version.fence == fence)?;
        let state = self.exchange.lock();
        let outgoing = state.outgoing()?;
        if outgoing.number == written.number { state.served.confirmed_at() } else { None }
    }

    fn apply(&mut self, state: TopicState, sent_at: Instant) {
        let TopicState { holder, holder_name, held_for, document } = state;
        let patience = patience(self.timing.patience, self.hub.instances(), rand::random());
        let has_shared = match holder {
            Holder::Other(fence) => {
                // A document that this instance cannot read is none.
                !self.topic.has_documents()
                    || document.is_some_and(|head| {
                        head.version.fence == fence && !self.exchange.is_unreadable(&head)
                    })
            }
            Holder::Own(_) | Holder::Nobody => true,
        };
        let is_vacant = match holder {
            Holder::Nobody => true,
            Holder::Own(_) => false,
            Holder::Other(fence) => fence < self.lease.highest_fence(),
        };
        if is_vacant {
            self.vacant_since.get_or_insert(sent_at);
        } else if self.vacant_since.take().is_some()
            && let Some(PrimaryLeader::Other(Some((name, since)))) = self.hub.primary_leader()
            && since.elapsed() >= HANDOVER_DELAY
        {
            // It could have led this topic.
            self.handed_over_to = Some(name);
        }
        self.lease.on_reply(holder, (sent_at, Instant::now()), patience, has_shared);
        self.stored = document;
        self.check_confirmation();
        let mut exchange = self.exchange.lock();
        exchange.leader = holder_name;
        exchange.leader_since = held_for.and_then(|held_for| sent_at.checked_sub(held_for));
    }

    /// Fetches the document in Redis if it is newer than the one being served.
    async fn adopt(&mut self) {
        self.is_behind = false;
        let Some(head) = self.stored else { return };
        if self.lease.fence() == Some(head.version.fence)
            || self.exchange.consider(&head) != Adoption::Fetch
        {
            return;
        }
        self.is_behind = true;
        let Some(read) = self.hub.request(self.redis.read()).await else { return };
        self.is_behind = false;
        let Some((head, encoded)) = read else {
            self.stored = None;
            return;
        };
        self.stored = Some(head);
        if self.exchange.consider(&head) != Adoption::Fetch {
            return;
        }
        let decoded = spawn_blocking(move || encoded.decode());
        match decoded.await {
            Ok(Ok(body)) => {
                counter!("parapet_fleet_documents_total").increment(1);
                let confirmed_at = head.confirmed_at;
                self.exchange.offer(SharedDocument { body, confirmed_at, head });
            }
            Ok(Err(error)) => {
                self.exchange.on_damaged(&head);
                warn!(
                    topic = %self.topic,
                    error = error_chain(&error),
                    "The fleet's document in Redis is damaged; the known one stays until the next is \
                     written"
                );
            }
            Err(error) => {
                self.exchange.on_damaged(&head);
                warn!(topic = %self.topic, error = error_chain(&error), "Reading a document panicked");
            }
        }
    }

    /// Tells the member its role. A leader first serves the newest document of its predecessor.
    fn announce_role(&mut self) {
        self.lease.advance(Instant::now());
        self.exchange.lock().fence = self.lease.fence();
        let role = self.lease.role();
        if role == Role::Leader && (self.is_behind || self.exchange.lock().is_member_busy()) {
            return;
        }
        let previous = self.exchange.set_role(role);
        if previous == role {
            return;
        }
        self.hub.on_role_changed();
        if self.topic == Topic::PRIMARY && role == Role::Leader {
            self.hub.notice_all();
        }
        let (topic, leader) = (&self.topic, self.exchange.lock().leader.clone());
        match role {
            Role::Leader => {}
            Role::Follower => self.exchange.lock().clear_outgoing(),
            Role::Alone => self.exchange.lock().leader = None,
        }
        record_role(topic, role);
        match role {
            Role::Leader => info!(
                %topic,
                role = role.as_str(),
                fence = self.lease.fence().map(Fence::get),
                "This instance leads the fleet: it {}",
                topic.work_of_leader()
            ),
            Role::Follower | Role::Alone if !topic.has_documents() => {}
            Role::Follower => info!(
                %topic,
                role = role.as_str(),
                leader,
                "Another instance leads the fleet: {topic} come from it"
            ),
            Role::Alone => warn!(
                %topic,
                role = role.as_str(),
                "The fleet has no leader within reach: this instance fetches {topic} from upstream itself"
            ),
        }
    }

    /// Writes the document to share, unless Redis has it.
    async fn write(&mut self) {
        let Some(fence) = self.lease.fence() else { return };
        let (outgoing, confirmed_at) = {
            let state = self.exchange.lock();
            if state.role != Role::Leader || state.is_member_busy() || self.is_behind {
                return;
            }
            let Some(outgoing) = state.outgoing() else { return };
            (outgoing, state.served.confirmed_at())
        };
        let is_stored = |written: Written| {
            written.number == outgoing.number
                && written.version.fence == fence
                && self.stored.is_some_and(|stored| stored.version == written.version)
        };
        if self.written.is_some_and(is_stored) || self.unwritable == Some(outgoing.number) {
            return;
        }
        let now = Instant::now();
        let body = outgoing.body;
        let encoded = match spawn_blocking(move || EncodedDocument::encode(&body)).await {
            Ok(Ok(encoded)) => encoded,
            Ok(Err(error)) => {
                self.unwritable = Some(outgoing.number);
                self.failing_since.get_or_insert(now);
                warn!(topic = %self.topic, error = error_chain(&error), "A document cannot be shared");
                return;
            }
            Err(error) => {
                self.unwritable = Some(outgoing.number);
                self.failing_since.get_or_insert(now);
                warn!(topic = %self.topic, error = error_chain(&error), "Compressing panicked");
                return;
            }
        };
        let previous = self.written.map(|written| written.version).filter(|it| it.fence == fence);
        let sequence = previous.map_or(1, |version| version.sequence + 1);
        let version = Version { fence, sequence };
        let digest = encoded.digest;
        let result = self.hub.request(self.redis.write(version, &encoded, confirmed_at)).await;
        let outcome = match result {
            Some(true) => {
                self.written = Some(Written { version, number: outgoing.number });
                self.failing_since = None;
                self.stored = Some(DocumentHead { version, digest, confirmed_at });
                "written"
            }
            Some(false) => {
                self.lease.on_lost();
                self.heartbeat_at = Instant::now();
                warn!(
                    topic = %self.topic,
                    fence = fence.get(),
                    "Another instance has led the fleet meanwhile; this one's document was refused"
                );
                "refused"
            }
            // The next heartbeat retries. The write may have succeeded: the number is not used again.
            None => {
                self.written = Some(Written { version, number: 0 });
                self.failing_since.get_or_insert(now);
                "failed"
            }
        };
        counter!("parapet_fleet_writes_total", "result" => outcome).increment(1);
    }

    /// Notices that Redis has accepted the lease, and not the confirmation of the document.
    fn check_confirmation(&mut self) {
        let Some(fence) = self.lease.fence() else {
            self.failing_since = None;
            return;
        };
        let Some(stored) = self.stored.filter(|stored| stored.version.fence == fence) else {
            return;
        };
        let (outgoing, confirmed_at) = {
            let state = self.exchange.lock();
            // The member serves another document, which it shares next.
            let Some(outgoing) = state.outgoing() else { return };
            (Some(outgoing.number), state.served.confirmed_at())
        };
        let is_outdated = |confirmed_at| {
            stored.confirmed_at.is_none_or(|at| at + self.timing.lease < confirmed_at)
        };
        if confirmed_at.is_some_and(is_outdated) {
            self.failing_since.get_or_insert_with(Instant::now);
        } else if self.written.map(|written| written.number) == outgoing {
            self.failing_since = None;
        }
    }

    /// Lets another instance lead if this one cannot write: its followers would serve old flags as long as
    /// they see a leader.
    async fn give_up_if_failing(&mut self) {
        let (Some(since), Some(fence)) = (self.failing_since, self.lease.fence()) else { return };
        if since.elapsed() < self.timing.patience || self.hub.instances() < 2 {
            return;
        }
        warn!(
            topic = %self.topic,
            "This instance leads the fleet but cannot write {} to Redis: it lets another lead",
            self.topic
        );
        self.failing_since = None;
        self.begin_yielding(false);
        self.lease.on_given_up();
        self.hub.request(self.redis.release(fence)).await;
    }

    /// Does not acquire the lease for a while, or until upstream confirms what this instance serves.
    fn begin_yielding(&mut self, ends_on_confirmation: bool) {
        let since = Instant::now();
        let confirmed_at = self.exchange.lock().served.confirmed_at();
        if self.yielding.is_none_or(|last| confirmed_at > Some(last.since)) {
            self.yields.reset();
        }
        let duration = self.yields.next_delay(None, rand::random());
        self.yielding = Some(Yielding { since, until: since + duration, ends_on_confirmation });
    }

    /// Lets the leader of the primary topic lead this one, too.
    async fn hand_over_to_primary(&mut self) {
        let Some(fence) = self.lease.fence() else { return };
        let Some(PrimaryLeader::Other(Some((name, since)))) = self.hub.primary_leader() else {
            return;
        };
        if self.topic == Topic::PRIMARY
            || since.elapsed() < HANDOVER_DELAY
            || self.handed_over_to.as_ref() == Some(&name)
        {
            return;
        }
        self.handed_over_to = Some(name);
        if self.hub.request(self.redis.release(fence)).await.is_some() {
            self.lease.on_lost();
        }
    }

    /// Lets another instance lead.
    async fn yield_lease(&mut self) {
        let Some(fence) = self.lease.fence() else { return };
        // Without others there is nobody to lead better.
        if self.hub.instances() < 2 {
            return;
        }
        self.begin_yielding(true);
        if self.hub.request(self.redis.release(fence)).await.is_some() {
            self.lease.on_lost();
        }
    }
}

/// Records the role in the metrics.
fn record_role(topic: &Topic, role: Role) {
    let set = |gauge: &'static str, is_set: bool| {
        gauge!(gauge, "topic" => topic.name()).set(if is_set { 1.0 } else { 0.0 });
    };
    set("parapet_fleet_leader", role == Role::Leader);
    set("parapet_fleet_alone", role == Role::Alone);
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        record_role(&self.topic, Role::Follower);
        self.hub.remove(&self.topic.name(), &self.exchange);
    }
}
