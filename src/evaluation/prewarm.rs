//! Fills the evaluation cache of a new snapshot before it is served, so that frequent requests do not
//! wait for an evaluation of all flags after each change. The previous snapshot records which requests
//! are frequent. This is an optimization only: any other request is evaluated when it arrives.

use std::thread;

use jiff::Timestamp;

use super::cached_evaluation::EvaluatedFlags;
use crate::served::ServedSnapshot;

/// Evaluates the hot contexts of the previous snapshot on the next one: 64 evaluations at most.
///
/// Reuses bodies whose content did not change, with all their content codings.
pub fn prewarm(next: &ServedSnapshot, previous: &ServedSnapshot, now: Timestamp) {
    for hot in previous.evaluation_cache().prewarm_candidates() {
        // Lets waiting requests run first.
        thread::yield_now();
        let view = next.frontend_view(&hot.projects);
        let hash = hot.context.with_context_at(now, |context| {
            EvaluatedFlags::evaluate_untracked(next, &view, context, hot.include).hash()
        });
        if hash == hot.hash
            && let Some(body) = previous.evaluation_cache().cached_body(hash)
        {
            next.evaluation_cache().insert_body(hash, body);
        }
    }
}
