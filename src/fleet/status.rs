//! The state of a fleet as one instance sees it, for operators.

use std::time::Duration;

use tokio::time::Instant;

use super::{role::Fence, role::Role, shared_document::Version};

/// The state of a fleet as this instance sees it.
#[derive(Clone, Debug)]
pub struct FleetStatus {
    /// The name of the fleet.
    pub name: String,
    /// The URL of Redis without credentials.
    pub redis: String,
    /// The last error of Redis; `None` if no request has failed for ten seconds.
    pub redis_error: Option<String>,
    /// The number of instances, with this one, as last seen.
    pub instance_count: u32,
    /// The names of at most a hundred of them.
    pub instances: Vec<String>,
    /// The time since the last notice of any instance.
    pub last_notice_age: Option<Duration>,
    /// The topics that this instance takes part in, by name.
    pub topics: Vec<TopicStatus>,
}

/// The part of this instance in a topic.
#[derive(Clone, Debug)]
pub struct TopicStatus {
    /// The name of the topic, for instance `flags:development`.
    pub topic: String,
    /// The role of this instance.
    pub role: Role,
    /// The name of the leader, as last seen.
    pub leader: Option<String>,
    /// Since when it leads.
    pub leader_since: Option<Instant>,
    /// The fence of this instance's lease, if it leads.
    pub fence: Option<Fence>,
    /// The version of the shared document being served, if it is one.
    pub version: Option<Version>,
}
