//! Limits how often one event is logged: at once when it first happens, then with a count of what was
//! left out.
//!
//! What the event is, and at which level, is its owner's matter.

use std::time::Duration;

use tokio::time::Instant;

/// How often one event is logged at most.
const INTERVAL: Duration = Duration::from_mins(1);

/// Decides which occurrences of one event are logged.
#[derive(Debug, Default)]
pub struct Sparing {
    logged_at: Option<Instant>,
    left_out: u64,
}

impl Sparing {
    /// Notes an occurrence. `Some` where it is to be logged, with the number of those before it that
    /// were not.
    pub fn admit(&mut self) -> Option<u64> {
        if self.logged_at.is_some_and(|logged_at| logged_at.elapsed() < INTERVAL) {
            self.left_out += 1;
            return None;
        }
        self.logged_at = Some(Instant::now());
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn first_occurrence_is_logged_at_once_and_later_ones_once_an_interval_with_a_count() {
        let mut sparing = Sparing::default();
        let mut logged = Vec::new();
        for _ in 0..25 {
            logged.extend(sparing.admit());
            tokio::time::advance(INTERVAL / 10).await;
        }
        assert_eq!(logged, [0, 9, 9]);
    }
}
