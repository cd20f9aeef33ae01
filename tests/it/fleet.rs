//! Instances on a real Redis, in this process: which of them leads, and which documents are accepted.
//!
//! A killed instance is one whose future is dropped without leaving, and a suspended one is not polled: to
//! the others both look like a process that was killed or suspended. `fleet_sync` covers flags.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use parapet::fleet::{Config, Coordinator, Fence, Fleet, Member, Role, Timing, Topic, Update};
use parapet::redis_client::{self, Credentials, RedisClient, Server, Timeouts, Topology};
use parapet::token::Environment;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::rig::{RedisServer, wait_until};

/// Many times the intervals of [`TIMING`].
pub(crate) const TIMEOUT: Duration = Duration::from_mins(1);

/// Shorter than the defaults, so that the tests are, and long enough for a busy machine.
pub(crate) const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(300),
    lease: Duration::from_secs(3),
    patience: Duration::from_secs(3),
    start_patience: Duration::from_secs(1),
};

/// Timing of tests in which no lease ends and nobody loses patience.
pub(crate) const STABLE: Timing = Timing {
    heartbeat: Duration::from_millis(300),
    lease: Duration::from_mins(10),
    patience: Duration::from_mins(10),
    start_patience: Duration::from_mins(10),
};

pub(crate) const ENVIRONMENT: &str = "dev";

/// The start of the topic's keys: they contain a digest of upstream's URL.
const TOPIC_KEY: &str = "test:fleet:{eu@3e48579bfb7fcc6e:flags:dev}";

fn client(redis: &RedisServer) -> RedisClient {
    let server = Server { host: "127.0.0.1".to_owned(), port: redis.port() };
    let timeouts = Timeouts { connect: Duration::from_secs(2), command: Duration::from_secs(2) };
    let config = redis_client::Config {
        topology: Topology::Single(server),
        credentials: Credentials::default(),
        tls: None,
        database: 0,
        timeouts,
    };
    RedisClient::new(config).unwrap()
}

/// The part of an instance in the fleet `test`.
pub(crate) fn fleet(redis: &RedisServer, instance: &str, timing: Timing) -> Fleet {
    let config = Config {
        prefix: "test".to_owned(),
        name: "eu".to_owned(),
        upstream: "http://unleash".to_owned(),
        instance_name: instance.to_owned(),
        timing,
    };
    Fleet::new(client(redis), config)
}

fn topic() -> Topic {
    Topic::Flags(Environment::new(ENVIRONMENT))
}

/// A future that is not polled while it is suspended.
struct Suspendable<F> {
    work: Pin<Box<F>>,
    resumed: watch::Receiver<bool>,
}

impl<F: Future<Output = ()>> Suspendable<F> {
    async fn run(mut self) {
        loop {
            let is_running = *self.resumed.borrow_and_update();
            let mut changed = Box::pin(self.resumed.changed());
            let step = std::future::poll_fn(|context: &mut Context<'_>| {
                if changed.as_mut().poll(context).is_ready() {
                    return Poll::Ready(false);
                }
                if !is_running {
                    return Poll::Pending;
                }
                self.work.as_mut().poll(context).map(|()| true)
            });
            if step.await {
                return;
            }
        }
    }
}

/// An instance that takes part in one topic, whose test is the user of that topic.
struct Participant {
    fleet: Fleet,
    member: Member,
    role: Role,
    /// The document that was served last.
    served: String,
    resume: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Participant {
    fn start(redis: &RedisServer, name: &str, timing: Timing) -> Self {
        let fleet = fleet(redis, name, timing);
        let (member, coordinator) = fleet.join(topic());
        let (resume, resumed) = watch::channel(true);
        let work = Box::pin(Coordinator::run(coordinator));
        let coordination = tokio::spawn(Suspendable { work, resumed }.run());
        let receiver = fleet.clone();
        let notices = tokio::spawn(async move { receiver.run().await });
        let tasks = vec![coordination, notices];
        Self { fleet, member, role: Role::Follower, served: String::new(), resume, tasks }
    }

    /// Waits for a change, within a minute, and serves each document.
    async fn next(&mut self) -> Update {
        let update = tokio::time::timeout(TIMEOUT, self.member.next_update()).await;
        let update = update.unwrap_or_else(|_| panic!("no change; {:?}", self.fleet.status()));
        match &update {
            Update::Document(document) => {
                self.served = String::from_utf8(document.body.to_vec()).unwrap();
                self.member.on_served(document);
            }
            Update::Role(role) => self.role = *role,
            Update::Confirmed(_) => {}
        }
        update
    }

    async fn wait_for_role(&mut self, role: Role) {
        while self.role != role {
            self.next().await;
        }
    }

    async fn wait_for_document(&mut self, text: &str) {
        while self.served != text {
            self.next().await;
        }
    }

    /// Serves a document of upstream, and shares it as a leader does.
    fn fetch_and_share(&self, text: &'static str) {
        self.member.on_fetched(tokio::time::Instant::now());
        self.member.share(text.into());
    }

    fn fence(&self) -> Option<Fence> {
        self.fleet.status().topics.first().and_then(|topic| topic.fence)
    }

    /// Ends without leaving.
    fn kill(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The text of a hash's field.
async fn hash_field(client: &RedisClient, key: &str, field: &str) -> Option<String> {
    let mut command = redis::cmd("HGET");
    client.run(command.arg(key).arg(field)).await.unwrap()
}

async fn wait_until_stored(redis: &RedisServer, fence: Fence, sequence: u64) {
    let (client, key) = (client(redis), format!("{TOPIC_KEY}:document"));
    wait_until("the document is stored", TIMEOUT, async || {
        let stored = hash_field(&client, &key, "fence").await;
        let is_fence = stored == Some(fence.get().to_string());
        let number = hash_field(&client, &key, "sequence").await;
        (is_fence && number == Some(sequence.to_string())).then_some(())
    })
    .await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn one_instance_leads_and_the_others_get_its_documents() {
    let redis = RedisServer::start().await;
    let mut leader = Participant::start(&redis, "a", STABLE);
    leader.wait_for_role(Role::Leader).await;
    leader.fetch_and_share("one");
    let mut followers = [(); 3].map(|()| Participant::start(&redis, "f", STABLE));
    for follower in &mut followers {
        follower.wait_for_document("one").await;
    }
    for text in ["two", "three"] {
        leader.fetch_and_share(text);
        for follower in &mut followers {
            follower.wait_for_document(text).await;
            assert_eq!(follower.role, Role::Follower);
        }
    }
    wait_until("all are in the list of instances", TIMEOUT, async || {
        (leader.fleet.status().instance_count == 4).then_some(())
    })
    .await;
    let status = followers[0].fleet.status();
    assert_eq!(status.topics[0].leader.as_deref(), Some("a"));
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn confirmation_of_the_leader_reaches_followers() {
    let redis = RedisServer::start().await;
    let mut leader = Participant::start(&redis, "a", STABLE);
    leader.wait_for_role(Role::Leader).await;
    let now = tokio::time::Instant::now();
    leader.member.on_fetched(now - Duration::from_mins(1));
    leader.member.share("one".into());
    let mut follower = Participant::start(&redis, "b", STABLE);
    follower.wait_for_document("one").await;
    leader.member.on_fetched(now);
    loop {
        // Confirmations of a minute ago may arrive before. The time of a request makes each older.
        if let Update::Confirmed(at) = follower.next().await
            && at + Duration::from_secs(30) >= now
        {
            break;
        }
    }
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn another_instance_leads_after_the_leader_was_killed() {
    let redis = RedisServer::start().await;
    let mut leader = Participant::start(&redis, "a", TIMING);
    leader.wait_for_role(Role::Leader).await;
    leader.fetch_and_share("one");
    let first = leader.fence().unwrap();
    let mut follower = Participant::start(&redis, "b", TIMING);
    follower.wait_for_document("one").await;
    leader.kill();
    follower.wait_for_role(Role::Leader).await;
    assert!(follower.fence().unwrap() > first);
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leaving_leader_is_replaced_without_waiting_for_its_lease() {
    let redis = RedisServer::start().await;
    let mut leader = Participant::start(&redis, "a", STABLE);
    leader.wait_for_role(Role::Leader).await;
    leader.fetch_and_share("one");
    let mut follower = Participant::start(&redis, "b", STABLE);
    follower.wait_for_document("one").await;
    leader.resume.send_replace(false);
    leader.fleet.leave().await;
    follower.wait_for_role(Role::Leader).await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn leader_suspended_beyond_its_lease_follows_its_successor() {
    let redis = RedisServer::start().await;
    let mut old = Participant::start(&redis, "old", TIMING);
    old.wait_for_role(Role::Leader).await;
    old.fetch_and_share("one");
    let mut new = Participant::start(&redis, "new", TIMING);
    new.wait_for_document("one").await;

    old.resume.send_replace(false);
    new.wait_for_role(Role::Leader).await;
    let fence = new.fence().unwrap();
    new.fetch_and_share("two");
    wait_until_stored(&redis, fence, 1).await;
    old.member.share("late".into());
    old.resume.send_replace(true);
    old.wait_for_document("two").await;
    old.wait_for_role(Role::Follower).await;
    wait_until_stored(&redis, fence, 1).await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn document_of_a_leader_that_does_not_know_its_successor_is_refused() {
    let redis = RedisServer::start().await;
    // Its clock stands still, as that of a suspended machine: it does not notice the end of its lease.
    let timing = Timing { heartbeat: Duration::from_hours(1), ..STABLE };
    let mut old = Participant::start(&redis, "old", timing);
    old.wait_for_role(Role::Leader).await;
    old.fetch_and_share("one");
    let mut new = Participant::start(&redis, "new", STABLE);
    new.wait_for_document("one").await;
    let mut expire = redis::cmd("DEL");
    let expire = expire.arg(format!("{TOPIC_KEY}:lease"));
    client(&redis).run::<()>(expire).await.unwrap();

    new.wait_for_role(Role::Leader).await;
    // Refused although the successor has written nothing yet.
    old.member.share("late".into());
    old.wait_for_role(Role::Follower).await;
    new.fetch_and_share("two");
    old.wait_for_document("two").await;
    wait_until_stored(&redis, new.fence().unwrap(), 1).await;
    assert_eq!(new.served, "one");
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn redis_that_restarts_empty_is_filled_again_with_a_higher_fence() {
    let mut redis = RedisServer::start().await;
    let mut leader = Participant::start(&redis, "a", TIMING);
    leader.wait_for_role(Role::Leader).await;
    leader.fetch_and_share("one");
    let mut follower = Participant::start(&redis, "b", TIMING);
    follower.wait_for_document("one").await;
    let before = leader.fence().unwrap();

    redis.kill();
    leader.wait_for_role(Role::Alone).await;
    follower.wait_for_role(Role::Alone).await;
    for instance in [&leader, &follower] {
        instance.fetch_and_share("one");
    }
    redis.restart().await;
    // Either of them may lead now, and the other follows.
    wait_until("one of them leads", TIMEOUT, async || {
        let fence = [&leader, &follower].iter().find_map(|it| it.fence())?;
        (fence > before).then_some(())
    })
    .await;
    let mut fresh = Participant::start(&redis, "c", TIMING);
    fresh.wait_for_document("one").await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn lease_with_a_fence_of_the_past_is_taken_over() {
    let redis = RedisServer::start().await;
    let mut instance = Participant::start(&redis, "a", TIMING);
    instance.wait_for_role(Role::Leader).await;
    instance.fetch_and_share("one");
    wait_until_stored(&redis, instance.fence().unwrap(), 1).await;
    // As from a Redis that has lost its data, and whose clock was set back.
    let (client, key) = (client(&redis), TOPIC_KEY);
    let mut lost = redis::cmd("DEL");
    lost.arg(
        [format!("{key}:lease"), format!("{key}:fence"), format!("{key}:document")].as_slice(),
    );
    let mut other = redis::cmd("HSET");
    other.arg(format!("{key}:lease")).arg(&["fence", "7", "holder", "other", "name", "other"]);
    let mut swap = redis::pipe();
    swap.atomic().add_command(lost).add_command(other);
    let before = instance.fence().unwrap();
    client.run_pipeline::<redis::Value>(&swap).await.unwrap();
    wait_until("it leads again", TIMEOUT, async || (instance.fence()? > before).then_some(()))
        .await;
    wait_until_stored(&redis, instance.fence().unwrap(), 1).await;
}

#[tokio::test]
#[ignore = "needs redis-server, see tests/run"]
async fn instance_without_redis_is_alone_soon_after_its_start() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let mut instance = Participant::start(&redis, "a", TIMING);
    instance.wait_for_role(Role::Alone).await;
    redis.restart().await;
    instance.wait_for_role(Role::Leader).await;
}
