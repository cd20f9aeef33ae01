//! Decides whether Redis works for a fleet, so that an outage is logged once.
//!
//! A Redis without free memory, or an overloaded one, accepts some requests and not others. So it counts
//! as working again only after [`RECOVERY_TIME`] without a failure.
//!
//! Pure: times are arguments.

use std::time::Duration;

use tokio::time::Instant;

/// How long no request may fail before Redis counts as working again.
pub(super) const RECOVERY_TIME: Duration = Duration::from_secs(10);

/// Whether requests to Redis succeed.
#[derive(Clone, Debug, Default)]
pub(super) struct RedisHealth {
    outage: Option<Outage>,
}

#[derive(Clone, Debug)]
struct Outage {
    error: String,
    last_failure: Instant,
}

impl RedisHealth {
    /// A request has succeeded. Returns whether that ends an outage.
    pub(super) fn on_success(&mut self, now: Instant) -> bool {
        self.outage.take_if(|outage| outage.last_failure + RECOVERY_TIME <= now).is_some()
    }

    /// A request has failed with this error. Returns whether that begins an outage.
    pub(super) fn on_failure(&mut self, error: String, now: Instant) -> bool {
        self.outage.replace(Outage { error, last_failure: now }).is_none()
    }

    /// The last error of an outage; `None` if there is none.
    pub(super) fn error(&self) -> Option<&str> {
        self.outage.as_ref().map(|outage| &*outage.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outage_is_reported_once_although_some_requests_succeed() {
        let mut health = RedisHealth::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!health.on_success(start));
        assert!(health.on_failure("away".to_owned(), at(0)));
        for seconds in (1..60).step_by(5) {
            assert!(!health.on_success(at(seconds)));
            assert!(!health.on_failure("no memory".to_owned(), at(seconds + 2)));
        }
        assert_eq!(health.error(), Some("no memory"));
        assert!(!health.on_success(at(66)));
        assert!(health.on_success(at(68)));
        assert_eq!(health.error(), None);
        assert!(health.on_failure("away".to_owned(), at(69)));
    }
}
