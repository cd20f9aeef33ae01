//! The topics of a fleet, and the names of their keys in Redis.

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::token::Environment;

/// Something that a fleet fetches from upstream once for all its instances.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Topic {
    /// The environments that upstream has.
    Environments,
    /// The flags of an environment.
    Flags(Environment),
}

/// Braces delimit hash tags, colons the parts of a key, and spaces the parts of a notice.
const NAME_ESCAPES: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

impl Topic {
    /// The name of the topic in keys, notices and metrics: letters, digits and `:-_.%`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Environments => "environments".to_owned(),
            Self::Flags(environment) => format!("flags:{}", escape(environment.as_str())),
        }
    }
}

/// Formats the topic for logs.
impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environments => f.write_str("the environments"),
            Self::Flags(environment) => write!(f, "the flags of {environment}"),
        }
    }
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

impl TopicKeys {
    pub(super) fn new(fleet: &str, topic: &str) -> Self {
        let key = |part: &str| format!("parapet:fleet:{{{}:{topic}}}:{part}", escape(fleet));
        Self { lease: key("lease"), fence: key("fence"), document: key("document") }
    }
}

/// The channel of a fleet's notices.
pub(super) fn notice_channel(fleet: &str) -> String {
    format!("parapet:fleet:{{{}}}:notices", escape(fleet))
}

/// The key of the sorted set of a fleet's instances.
pub(super) fn instances_key(fleet: &str) -> String {
    format!("parapet:fleet:{{{}}}:instances", escape(fleet))
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
        let TopicKeys { lease, fence, document } = TopicKeys::new("eu {1}", &topic);
        let tag = "{eu%20%7B1%7D:flags:a%7D%20b%3Ac}";
        assert_eq!(lease, format!("parapet:fleet:{tag}:lease"));
        assert_eq!(fence, format!("parapet:fleet:{tag}:fence"));
        assert_eq!(document, format!("parapet:fleet:{tag}:document"));
    }
}
