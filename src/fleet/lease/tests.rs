//! The lease against replies, losses and delays, alone and with a model of Redis.

use proptest::{collection::vec, prelude::*};

use super::*;

const LEASE: Duration = Duration::from_secs(6);
const PATIENCE: Duration = Duration::from_secs(10);

fn lease(now: Instant) -> Lease {
    Lease::new(LEASE, now + Duration::from_secs(2))
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn leader_stops_when_its_lease_ends_counted_from_the_request() {
    let sent = Instant::now();
    let mut lease = lease(sent);
    lease.on_reply(Holder::Own(Fence::new(7)), (sent, sent + seconds(1)), PATIENCE, true);
    assert_eq!((lease.role(), lease.fence()), (Role::Leader, Some(Fence::new(7))));
    assert_eq!(lease.next_deadline(), Some(sent + LEASE));
    lease.advance(sent + LEASE - Duration::from_millis(1));
    assert_eq!(lease.role(), Role::Leader);
    lease.advance(sent + LEASE);
    assert_eq!((lease.role(), lease.fence()), (Role::Alone, None));
}

#[test]
fn grant_that_arrives_after_its_end_is_not_used() {
    let sent = Instant::now();
    let mut lease = lease(sent);
    lease.on_reply(Holder::Own(Fence::new(1)), (sent, sent + LEASE), PATIENCE, true);
    assert_eq!(lease.fence(), None);
}

#[test]
fn follower_synchronises_alone_after_its_patience_until_a_leader_is_seen() {
    let now = Instant::now();
    let mut lease = lease(now);
    lease.on_reply(Holder::Other(Fence::new(3)), (now, now), PATIENCE, true);
    lease.advance(now + PATIENCE - Duration::from_millis(1));
    assert_eq!(lease.role(), Role::Follower);
    lease.advance(now + PATIENCE);
    assert_eq!((lease.role(), lease.next_deadline()), (Role::Alone, None));
    let later = now + seconds(60);
    lease.on_reply(Holder::Nobody, (later, later), PATIENCE, true);
    assert_eq!(lease.role(), Role::Alone);
    lease.on_reply(Holder::Other(Fence::new(4)), (later, later), PATIENCE, true);
    assert_eq!((lease.role(), lease.highest_fence()), (Role::Follower, Fence::new(4)));
}

#[test]
fn leader_without_document_is_waited_for_once() {
    let now = Instant::now();
    let mut lease = lease(now);
    for passed in [0, 2, 4, 6, 8] {
        let now = now + seconds(passed);
        lease.on_reply(Holder::Other(Fence::new(1)), (now, now), PATIENCE, false);
        assert_eq!(lease.role(), Role::Follower);
    }
    let now = now + PATIENCE;
    lease.on_reply(Holder::Other(Fence::new(1)), (now, now), PATIENCE, false);
    assert_eq!(lease.role(), Role::Alone);
    lease.on_reply(Holder::Other(Fence::new(1)), (now, now), PATIENCE, true);
    assert_eq!(lease.role(), Role::Follower);
}

#[test]
fn leaders_that_cannot_share_do_not_keep_others_waiting() {
    let now = Instant::now();
    let mut lease = lease(now);
    lease.on_reply(Holder::Other(Fence::new(1)), (now, now), PATIENCE, true);
    for (passed, fence) in [(9, 2), (12, 2), (15, 3), (18, 4)] {
        let now = now + seconds(passed);
        lease.on_reply(Holder::Other(Fence::new(fence)), (now, now), PATIENCE, false);
        assert_eq!(lease.role(), Role::Follower, "after {passed} s");
    }
    let now = now + seconds(9) + PATIENCE;
    lease.on_reply(Holder::Other(Fence::new(5)), (now, now), PATIENCE, false);
    assert_eq!(lease.role(), Role::Alone);
    lease.on_reply(Holder::Other(Fence::new(6)), (now, now), PATIENCE, true);
    assert_eq!(lease.role(), Role::Follower);
}

#[test]
fn leader_that_gives_up_synchronises_alone_until_another_has_shared() {
    let now = Instant::now();
    let mut lease = lease(now);
    lease.on_reply(Holder::Own(Fence::new(1)), (now, now), PATIENCE, true);
    lease.on_given_up();
    assert_eq!((lease.role(), lease.fence()), (Role::Alone, None));
    lease.on_reply(Holder::Other(Fence::new(2)), (now, now), PATIENCE, false);
    assert_eq!(lease.role(), Role::Alone);
    lease.on_reply(Holder::Other(Fence::new(2)), (now, now), PATIENCE, true);
    assert_eq!(lease.role(), Role::Follower);
}

#[test]
fn leader_that_lost_its_lease_to_another_follows_it() {
    let now = Instant::now();
    let mut lease = lease(now);
    lease.on_reply(Holder::Own(Fence::new(1)), (now, now), PATIENCE, true);
    lease.on_lost();
    assert_eq!(lease.role(), Role::Follower);
    lease.on_reply(Holder::Other(Fence::new(2)), (now, now), PATIENCE, true);
    assert_eq!(lease.role(), Role::Follower);
}

#[test]
fn patience_grows_with_the_fleet_up_to_a_limit() {
    assert_eq!(patience(PATIENCE, 100, 0.0), PATIENCE);
    assert_eq!(patience(PATIENCE, 100, 1.0), PATIENCE + seconds(10));
    assert_eq!(patience(PATIENCE, 10_000, 1.0), PATIENCE + MAX_SPREAD);
}

/// The lease as the scripts in Redis implement it.
#[derive(Default)]
struct ModelRedis {
    /// Instance, fence and end.
    lease: Option<(usize, u64, Instant)>,
    counter: u64,
    written: u64,
}

impl ModelRedis {
    /// Acquires or renews.
    fn heartbeat(
        &mut self,
        instance: usize,
        held: Option<Fence>,
        highest: Fence,
        now: Instant,
    ) -> Holder {
        let current = self.lease.filter(|(.., until)| *until > now);
        let is_stale = |(_, fence, _): (usize, u64, Instant)| fence < highest.get();
        self.lease = match current {
            Some((holder, fence, _)) if holder == instance => Some((holder, fence, now + LEASE)),
            Some(other) if held.is_some() || !is_stale(other) => Some(other),
            _ => {
                self.counter = self.counter.max(highest.get()) + 1;
                Some((instance, self.counter, now + LEASE))
            }
        };
        match self.lease {
            Some((holder, fence, _)) if holder == instance => Holder::Own(Fence::new(fence)),
            Some((_, fence, _)) => Holder::Other(Fence::new(fence)),
            None => Holder::Nobody,
        }
    }

    /// Whether a write with this fence is accepted.
    fn write(&mut self, fence: Fence) -> bool {
        let is_accepted = fence.get() == self.counter;
        if is_accepted {
            assert!(fence.get() >= self.written, "the fence of accepted writes never falls");
            self.written = fence.get();
        }
        is_accepted
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Time passes.
    Wait(u64),
    /// An instance sends a heartbeat, which takes this long to Redis and back; `None`: no reply arrives.
    Heartbeat { instance: usize, there: u64, back: Option<u64> },
    /// An instance writes with the fence that it held last, even if its lease has ended.
    Write(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let heartbeat = (0..3_usize, 0..3000_u64, proptest::option::weighted(0.8, 0..3000_u64));
    let heartbeat =
        heartbeat.prop_map(|(instance, there, back)| Step::Heartbeat { instance, there, back });
    let step = prop_oneof![
        (0..4000_u64).prop_map(Step::Wait),
        heartbeat,
        (0..3_usize).prop_map(Step::Write),
    ];
    vec(step, 1..120)
}

/// A message on its way: to Redis, or back.
enum Message {
    Request { instance: usize, sent_at: Instant, back: Option<u64> },
    Reply { instance: usize, sent_at: Instant, holder: Holder },
}

proptest! {
    /// With any delays and losses, at most one instance believes that it leads, and only the last grant
    /// can write.
    #[test]
    fn at_most_one_instance_leads(steps in steps()) {
        let mut now = Instant::now();
        let mut redis = ModelRedis::default();
        let mut leases: Vec<_> = (0..3).map(|_| lease(now)).collect();
        let mut last_fence = [Fence::NONE; 3];
        let mut messages: Vec<(Instant, Message)> = Vec::new();
        for step in steps {
            let mut until = now;
            match step {
                Step::Wait(millis) => until += Duration::from_millis(millis),
                Step::Heartbeat { instance, there, back } => {
                    let at = now + Duration::from_millis(there);
                    messages.push((at, Message::Request { instance, sent_at: now, back }));
                }
                Step::Write(instance) => {
                    let fence = last_fence[instance];
                    let is_accepted = fence != Fence::NONE && redis.write(fence);
                    let is_superseded = last_fence.iter().any(|other| *other > fence);
                    prop_assert!(!(is_accepted && is_superseded));
                }
            }
            while let Some(first) = (0..messages.len()).min_by_key(|at| messages[*at].0) {
                if messages[first].0 > until {
                    break;
                }
                let (at, message) = messages.swap_remove(first);
                now = at.max(now);
                match message {
                    Message::Request { instance, sent_at, back } => {
                        let (held, highest) = (leases[instance].fence(), leases[instance].highest_fence());
                        let holder = redis.heartbeat(instance, held, highest, now);
                        if let Some(back) = back {
                            let reply = Message::Reply { instance, sent_at, holder };
                            messages.push((now + Duration::from_millis(back), reply));
                        }
                    }
                    Message::Reply { instance, sent_at, holder } => {
                        leases[instance].on_reply(holder, (sent_at, now), PATIENCE, true);
                        last_fence[instance] = leases[instance].fence().unwrap_or(last_fence[instance]);
                    }
                }
            }
            now = until.max(now);
            for lease in &mut leases {
                lease.advance(now);
            }
            let leaders = leases.iter().filter(|it| it.role() == Role::Leader).count();
            prop_assert!(leaders <= 1);
        }
    }
}
