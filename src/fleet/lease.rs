//! Decides the role of an instance from the replies of Redis and the time.
//!
//! Pure: times are arguments. It sends nothing; `coordinator` does.
//!
//! A leader counts its lease from before it sent the request that granted or renewed it, so it stops
//! before Redis gives the lease to another. It need not know the time of day. A leader that cannot reach
//! Redis until its lease ends synchronises alone from then on, because it is connected to upstream
//! already. A follower first waits for a new leader, longer in larger fleets.

use std::time::Duration;

use tokio::time::Instant;

use super::role::{Fence, Role};

/// The share of one instance in the time over which a fleet spreads its requests to upstream.
const SPREAD_PER_INSTANCE: Duration = Duration::from_millis(100);

/// The longest time over which a fleet spreads its requests to upstream.
const MAX_SPREAD: Duration = Duration::from_mins(1);

/// How long an instance waits for a leader before it synchronises alone: `base`, and a part of a window
/// that grows with the number of instances. `jitter`, from 0 to 1, selects the part.
pub(super) fn patience(base: Duration, instances: u32, jitter: f64) -> Duration {
    let window = SPREAD_PER_INSTANCE.saturating_mul(instances).min(MAX_SPREAD);
    base + window.mul_f64(jitter.clamp(0.0, 1.0))
}

/// Who holds the lease, according to Redis.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Holder {
    /// Nobody.
    Nobody,
    /// This instance, with this fence.
    Own(Fence),
    /// Another instance, with this fence.
    Other(Fence),
}

/// The lease of one topic, as one instance knows it.
#[derive(Debug)]
pub(super) struct Lease {
    duration: Duration,
    held: Option<HeldLease>,
    highest_fence: Fence,
    is_alone: bool,
    /// When to synchronise alone, unless a leader is seen before.
    alone_at: Instant,
    /// Whether `alone_at` takes into account that there is a leader, which has shared nothing yet.
    is_document_expected: bool,
}

#[derive(Clone, Copy, Debug)]
struct HeldLease {
    fence: Fence,
    until: Instant,
}

impl Lease {
    /// Not held. The instance synchronises alone from `alone_at` on if it sees no leader before.
    pub(super) fn new(duration: Duration, alone_at: Instant) -> Self {
        Self {
            duration,
            held: None,
            highest_fence: Fence::NONE,
            is_alone: false,
            alone_at,
            is_document_expected: false,
        }
    }

    /// Applies a reply to a request that was sent at `sent_at`.
    ///
    /// `has_shared` is whether the leader has shared a document. One that has not is waited for only once,
    /// even if others replace it: perhaps none of them can.
    pub(super) fn on_reply(
        &mut self,
        holder: Holder,
        (sent_at, now): (Instant, Instant),
        patience: Duration,
        has_shared: bool,
    ) {
        self.held = None;
        match holder {
            Holder::Nobody => {}
            Holder::Own(fence) => {
                self.highest_fence = self.highest_fence.max(fence);
                self.held = Some(HeldLease { fence, until: sent_at + self.duration });
                self.is_alone = false;
                self.alone_at = now + patience;
            }
            Holder::Other(fence) => {
                self.highest_fence = self.highest_fence.max(fence);
                if has_shared {
                    self.is_alone = false;
                    self.alone_at = now + patience;
                } else if !self.is_document_expected {
                    self.alone_at = self.alone_at.max(now + patience);
                }
                self.is_document_expected = !has_shared;
            }
        }
        self.advance(now);
    }

    /// Another instance has been granted the lease, or this one has given it back.
    pub(super) fn on_lost(&mut self) {
        self.held = None;
    }

    /// The instance gives the lease back, and synchronises alone until another leads.
    pub(super) fn on_given_up(&mut self) {
        self.held = None;
        self.is_alone = true;
    }

    /// Applies the time.
    pub(super) fn advance(&mut self, now: Instant) {
        if self.held.is_some_and(|held| held.until <= now) {
            self.held = None;
            self.is_alone = true;
        }
        self.is_alone |= self.held.is_none() && self.alone_at <= now;
    }

    /// When to call [`Lease::advance`] next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match self.held {
            Some(held) => Some(held.until),
            None => (!self.is_alone).then_some(self.alone_at),
        }
    }

    /// The role, as of the last call.
    pub(super) fn role(&self) -> Role {
        match self.held {
            Some(_) => Role::Leader,
            None if self.is_alone => Role::Alone,
            None => Role::Follower,
        }
    }

    /// The fence of the lease, if this instance holds it.
    pub(super) fn fence(&self) -> Option<Fence> {
        self.held.map(|held| held.fence)
    }

    /// The highest fence seen so far. A lease with a lower one was granted by a Redis that has lost its
    /// data.
    pub(super) fn highest_fence(&self) -> Fence {
        self.highest_fence
    }
}

#[cfg(test)]
mod tests;
