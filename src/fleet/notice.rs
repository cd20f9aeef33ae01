//! Notices: messages of Redis that tell the instances of a fleet to look at a topic.
//!
//! A notice is only a hint. It may be lost, repeated or late, so it never changes what is served by
//! itself, and instances also look at intervals.

use super::{role::Fence, shared_document::Version};

/// Longer payloads are no notices.
const MAX_BYTES: usize = 4096;

const FORMAT: &str = "1";

/// A topic has a new document, or no leader.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Notice<'a> {
    /// The name of the topic.
    pub(super) topic: &'a str,
    /// The version of the document; `None` if the leader has left.
    pub(super) version: Option<Version>,
}

impl<'a> Notice<'a> {
    /// The payload of its message.
    pub(super) fn encode(&self) -> String {
        let (fence, sequence) = self.version.map_or((0, 0), |it| (it.fence.get(), it.sequence));
        format!("{FORMAT} {fence} {sequence} {}", self.topic)
    }

    /// The notice in a payload; `None` for one of another format.
    pub(super) fn decode(payload: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(payload).ok().filter(|text| text.len() <= MAX_BYTES)?;
        let mut parts = text.split(' ');
        let (format, fence) = (parts.next()?, parts.next()?.parse().ok()?);
        let (sequence, topic) = (parts.next()?.parse().ok()?, parts.next()?);
        let version = (fence > 0).then(|| Version { fence: Fence::new(fence), sequence });
        (format == FORMAT && parts.next().is_none()).then_some(Self { topic, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notice_survives_encoding() {
        let version = Version { fence: Fence::new(1 << 53), sequence: 4 };
        for version in [None, Some(version)] {
            let notice = Notice { topic: "flags:dev%20x", version };
            assert_eq!(Notice::decode(notice.encode().as_bytes()), Some(notice));
        }
    }

    #[test]
    fn other_payloads_are_no_notices() {
        for payload in ["", "1", "1 2 3", "2 2 3 a", "1 x 3 a", "1 2 3 a b", "1 -2 3 a", "\u{fe}"] {
            assert_eq!(Notice::decode(payload.as_bytes()), None, "{payload}");
        }
        assert_eq!(Notice::decode(b"\xff 1 1 a"), None);
        assert_eq!(Notice::decode(format!("1 1 1 {}", "a".repeat(MAX_BYTES)).as_bytes()), None);
    }
}
