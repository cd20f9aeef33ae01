//! The role of an instance in a topic, and the fencing number of a leader.

/// How an instance takes part in a topic.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Role {
    /// Another instance leads, or is expected to: this one requests nothing from upstream.
    #[default]
    Follower,
    /// This instance leads: it synchronises with upstream and shares the result.
    Leader,
    /// There has been no leader, or no Redis, for a while: this instance synchronises with upstream for
    /// itself.
    Alone,
}

impl Role {
    /// Whether the instance requests the topic from upstream.
    pub const fn uses_upstream(self) -> bool {
        match self {
            Self::Follower => false,
            Self::Leader | Self::Alone => true,
        }
    }

    /// The name in `/status` and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Follower => "follower",
            Self::Leader => "leader",
            Self::Alone => "alone",
        }
    }
}

/// The fencing number of a grant of the lease. Each grant has a greater one than the grants before.
/// [`Fence::NONE`] is less than all of them.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Fence(u64);

impl Fence {
    /// Before the first grant.
    pub const NONE: Self = Self(0);

    /// A fence that Redis has granted.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}
