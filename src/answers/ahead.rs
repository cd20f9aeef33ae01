//! What is asked again and again is answered before a new snapshot is served, so that nobody waits for
//! an evaluation of all flags who had an answer at hand before. Which questions those are is for the
//! snapshot to know, and nothing depends on it: who asks something else is evaluated for as ever.

use std::thread;

use jiff::Timestamp;

use super::answer::Answer;
use crate::snapshot::Snapshot;

/// Asks the next snapshot some of what the previous one was asked, and was asked more than once: at
/// most a few dozen evaluations.
///
/// Bodies whose content did not change are taken over as they are, with all their codings.
pub fn prepare(next: &Snapshot, previous: &Snapshot, now: Timestamp) {
    for asked in previous.answers().often_asked() {
        // Requests that wait for the processor have it first.
        thread::yield_now();
        let view = next.view(&asked.projects);
        let hash = asked
            .context
            .at(now, |context| Answer::unnoted(next, &view, context, asked.shown).hash());
        if hash == asked.hash
            && let Some(body) = previous.answers().kept(hash)
        {
            next.answers().keep(hash, body);
        }
    }
}
