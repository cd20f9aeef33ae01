//! A document becomes what is served: compiled, swapped in, told of.
//!
//! Where documents come from is the business of those who call.

use std::{sync::Arc, thread, time::Duration};

use jiff::Timestamp;
use metrics::counter;
use tokio::{
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::{info, warn};

use super::told::differs;
use crate::{
    answers,
    snapshot::{Snapshot, Snapshots},
    token::Scope,
    wire::features::Document,
};

/// How many problems of one document are logged one by one.
const PROBLEMS_LOGGED: usize = 10;

/// Compiles what `make` makes, which is to have every flag of `scope`, on a thread for such work, and
/// puts it in its environment's place; nobody who reads waits for it.
///
/// Returns the new snapshot; `None` where the same flags are served already, which are then confirmed.
/// Fails where compiling panics, which changes nothing.
pub(super) async fn publish(
    snapshots: &Snapshots,
    scope: Scope,
    confirmed: Option<Instant>,
    make: impl FnOnce() -> Document + Send + 'static,
) -> Result<Option<Arc<Snapshot>>, JoinError> {
    let previous = snapshots.load(&scope.environment);
    let inherited = previous.clone();
    let built = spawn_blocking(move || {
        let Some(previous) = inherited else {
            return Some(Snapshot::build(scope, make(), confirmed));
        };
        let document = make();
        if *previous.projects() == scope.projects && !differs(previous.document(), &document) {
            if let Some(at) = confirmed {
                previous.confirm(at);
            }
            return None;
        }
        // Requests that wait for the processor have it first.
        thread::yield_now();
        let snapshot = Snapshot::after(&previous, scope, document, confirmed);
        answers::prepare(&snapshot, &previous, Timestamp::now());
        Some(snapshot)
    });
    let Some(snapshot) = built.await? else { return Ok(None) };
    report(&snapshot);
    let snapshot = snapshots.swap(snapshot);
    if let Some(previous) = previous {
        spawn_blocking(|| retire(previous));
    }
    Ok(Some(snapshot))
}

/// How long a snapshot's last readers are waited for, and how often they are looked for.
const LAST_READERS: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Takes a snapshot down once nobody reads it: milliseconds of work for thousands of flags, with all
/// that it remembers, which else would fall to the last request that reads it.
fn retire(snapshot: Arc<Snapshot>) {
    let mut waited = Duration::ZERO;
    while Arc::strong_count(&snapshot) > 1 && waited < LAST_READERS {
        thread::sleep(LOOK_EVERY);
        waited += LOOK_EVERY;
    }
    drop(snapshot);
}

fn report(snapshot: &Snapshot) {
    let (environment, problems) = (snapshot.environment(), snapshot.problems());
    counter!("parapet_snapshot_swaps_total", "environment" => environment.as_str().to_owned())
        .increment(1);
    info!(
        environment = %environment,
        flags = snapshot.document().features().len(),
        revision = snapshot.document().revision(),
        problems = problems.len(),
        "New flags"
    );
    for problem in problems.iter().take(PROBLEMS_LOGGED) {
        warn!(environment = %environment, "{problem}");
    }
    if problems.len() > PROBLEMS_LOGGED {
        warn!(environment = %environment, "{} problems more; /status lists all", problems.len() - PROBLEMS_LOGGED);
    }
}
