//! The topics of a fleet, and the names of their keys in Redis.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest as _, Sha256};

use crate::token::Environment;

/// Something that a fleet fetches from upstream once for all its instances.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Topic {
    /// The environments that upstream has.
    Environments,
    /// The API tokens that upstream lists.
    Tokens,
    /// The flags of an environment.
    Flags(Environment),
    /// The usage of all instances. It has no document: its leader sends what is in the usage log.
    Usage,
}

/// Braces delimit hash tags, colons the parts of a key, and spaces the parts of a notice.
const NAME_ESCAPES: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

impl Topic {
    /// The topic whose leader is to lead the others, too.
    pub(super) const PRIMARY: Self = Self::Tokens;

    /// The name of the topic in keys, notices and metrics: letters, digits and `:-_.%`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Environments => "environments".to_owned(),
            Self::Tokens => "tokens".to_owned(),
            Self::Flags(environment) => format!("flags:{}", escape(environment.as_str())),
            Self::Usage => "usage".to_owned(),
        }
    }

    /// Whether the leader shares documents. If not, the other instances wait for none, and it is reported
    /// elsewhere what they do without a leader.
    pub(super) fn has_documents(&self) -> bool {
        !matches!(self, Self::Usage)
    }

    /// The work of the leader, for logs.
    pub(super) fn work_of_leader(&self) -> String {
        if self.has_documents() {
            format!("fetches {self} from upstream and shares them")
        } else {
            "sends the usage of all instances to upstream".to_owned()
        }
    }
}

/// Formats the topic for logs.
impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environments => f.write_str("the environments"),
            Self::Tokens => f.write_str("the tokens"),
            Self::Flags(environment) => write!(f, "the flags of {environment}"),
            Self::Usage => f.write_str("usage"),
        }
    }
}

/// The start of a fleet's keys.
///
/// It contains a digest of upstream's URL: two deployments that share a Redis by mistake, and have the
/// default name, must not serve each other's flags.
#[derive(Debug)]
pub(super) struct Namespace {
    prefix: String,
    fleet: String,
}

/// The keys of one topic. They share a hash tag, so that a Cluster stores them on one node and a script
/// can use them together.
#[derive(Debug)]
pub(super) struct TopicKeys {
    /// A hash: the holder of the lease, until it expires.
    pub(super) lease: String,
    /// The last fence that was granted.
    pub(super) fence: String,
    /// A hash: the shared document, its version and when upstream confirmed it.
    pub(super) document: String,
}

/// The keys of the usage log. They share a hash tag with the topic's other keys.
#[derive(Debug)]
pub(super) struct UsageKeys {
    /// The last fence that was granted.
    fence: String,
    /// A hash: the bodies of batches and merged batches, by id.
    bodies: String,
    /// A hash: the environments of these.
    environments: String,
    /// A sorted set: the batches that wait, by the time from which they may be taken.
    waiting: String,
    /// A hash: the merged batch of each batch that is claimed.
    claimed: String,
    /// A hash: the parts of each merged batch, separated by spaces.
    claims: String,
    /// A hash: for each merged batch the fence of the leader that may send it, a colon, and until when.
    deadlines: String,
    /// A hash: the outcomes that instances have not seen yet, by batch.
    outcomes: String,
    /// A sorted set: these batches by the time of their outcome.
    finished: String,
    /// The size of all bodies, in bytes.
    bytes: String,
    /// A random text that changes when Redis loses its data.
    epoch: String,
}

impl UsageKeys {
    /// All keys, in the order of their declaration.
    pub(super) fn all(&self) -> [&str; 11] {
        let Self { fence, bodies, environments, waiting, claimed, .. } = self;
        let Self { claims, deadlines, outcomes, finished, bytes, epoch, .. } = self;
        [
            fence,
            bodies,
            environments,
            waiting,
            claimed,
            claims,
            deadlines,
            outcomes,
            finished,
            bytes,
            epoch,
        ]
    }
}

impl Namespace {
    pub(super) fn new(prefix: &str, fleet: &str, upstream: &str) -> Self {
        let digest = Sha256::digest(upstream);
        let upstream = u64::from_be_bytes(*digest.first_chunk().expect("32 bytes"));
        Self { prefix: prefix.to_owned(), fleet: format!("{}@{upstream:016x}", escape(fleet)) }
    }

    /// The keys of the topic with this name.
    pub(super) fn topic(&self, topic: &str) -> TopicKeys {
        let key = |part: &str| format!("{}:{part}", self.tagged(topic));
        TopicKeys { lease: key("lease"), fence: key("fence"), document: key("document") }
    }

    /// The start of the keys of answers, with one hash tag.
    pub(super) fn answers(&self) -> String {
        self.tagged("answers")
    }

    /// The keys of the usage log.
    pub(super) fn usage(&self) -> UsageKeys {
        let topic = Topic::Usage.name();
        let key = |part: &str| format!("{}:{part}", self.tagged(&topic));
        UsageKeys {
            fence: self.topic(&topic).fence,
            bodies: key("bodies"),
            environments: key("environments"),
            waiting: key("waiting"),
            claimed: key("claimed"),
            claims: key("claims"),
            deadlines: key("deadlines"),
            outcomes: key("outcomes"),
            finished: key("finished"),
            bytes: key("bytes"),
            epoch: key("epoch"),
        }
    }

    /// The start of keys that have a hash tag of their own.
    fn tagged(&self, name: &str) -> String {
        format!("{}:fleet:{{{}:{name}}}", self.prefix, self.fleet)
    }

    /// The channel of the notices.
    pub(super) fn notice_channel(&self) -> String {
        format!("{}:fleet:{{{}}}:notices", self.prefix, self.fleet)
    }

    /// The key of the sorted set of the instances.
    pub(super) fn instances(&self) -> String {
        format!("{}:fleet:{{{}}}:instances", self.prefix, self.fleet)
    }
}

fn escape(text: &str) -> impl fmt::Display {
    utf8_percent_encode(text, NAME_ESCAPES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_topic_share_one_hash_tag_for_any_name() {
        let topic = Topic::Flags(Environment::new("a} b:c")).name();
        let keys = Namespace::new("p", "eu {1}", "https://unleash.example");
        let TopicKeys { lease, fence, document } = keys.topic(&topic);
        let tag = "{eu%20%7B1%7D@4910400c12bcc617:flags:a%7D%20b%3Ac}";
        assert_eq!(lease, format!("p:fleet:{tag}:lease"));
        assert_eq!(fence, format!("p:fleet:{tag}:fence"));
        assert_eq!(document, format!("p:fleet:{tag}:document"));
        let tag = "{eu%20%7B1%7D@4910400c12bcc617:usage}";
        assert!(keys.usage().all().iter().all(|key| key.starts_with(&format!("p:fleet:{tag}:"))));
        assert_eq!(keys.usage().all()[0], keys.topic(&Topic::Usage.name()).fence);
        assert_eq!(keys.instances(), "p:fleet:{eu%20%7B1%7D@4910400c12bcc617}:instances");
    }

    #[test]
    fn fleets_of_different_upstreams_have_different_keys() {
        let [production, staging] = ["https://unleash.example", "https://staging.example"]
            .map(|upstream| Namespace::new("p", "default", upstream));
        assert_ne!(production.notice_channel(), staging.notice_channel());
        assert_ne!(production.topic("environments").lease, staging.topic("environments").lease);
    }
}
