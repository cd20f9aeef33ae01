//! Publishes a document: compiles it into a snapshot, swaps that in and logs it.
//!
//! The caller provides the documents.

use std::{sync::Arc, thread, time::Duration};

use jiff::Timestamp;
use metrics::counter;
use tokio::{
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::{info, warn};

use super::stream_events::differences;
use crate::{
    evaluation,
    protocol::features::Document,
    served::{ServedSnapshot, Snapshots, StateId},
    token::Scope,
};

/// The largest number of problems logged per document.
const MAX_LOGGED_PROBLEMS: usize = 10;

/// Compiles the document of `make`, which must contain every flag of `scope`, on a blocking thread and
/// swaps it in. Readers never wait.
///
/// Returns the new snapshot; `None` if the same flags are already served, whose confirmation time is
/// then updated. The same flags are published again if they come with another state id, so that
/// subscribers can continue from either.
///
/// # Errors
/// If compiling panics. The served snapshot then stays.
pub(super) async fn publish(
    snapshots: &Snapshots,
    scope: Scope,
    confirmed: Option<Instant>,
    make: impl FnOnce() -> Document + Send + 'static,
) -> Result<Option<Arc<ServedSnapshot>>, JoinError> {
    let previous = snapshots.load(&scope.environment);
    let inherited = previous.clone();
    let built = spawn_blocking(move || {
        let Some(previous) = inherited else {
            return Some(ServedSnapshot::build(scope, make(), confirmed));
        };
        let document = make();
        if *previous.projects() == scope.projects
            && StateId::stored_with(&document).is_none_or(|id| id == previous.state_id())
            && !differences(previous.document(), &document).0
        {
            if let Some(at) = confirmed {
                previous.confirm(at);
            }
            return None;
        }
        // Let waiting requests run first.
        thread::yield_now();
        let snapshot = ServedSnapshot::rebuild_from(&previous, scope, document, confirmed);
        evaluation::prewarm(&snapshot, &previous, Timestamp::now());
        Some(snapshot)
    });
    let Some(snapshot) = built.await? else { return Ok(None) };
    log_published(&snapshot);
    let snapshot = snapshots.swap(snapshot);
    if let Some(previous) = previous {
        spawn_blocking(|| drop_when_unused(previous));
    }
    Ok(Some(snapshot))
}

/// How long to wait for a snapshot's last readers, and how often to check for them.
const MAX_READER_WAIT: Duration = Duration::from_secs(1);
const READER_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Drops a snapshot once it has no other readers. Dropping thousands of flags with their caches takes
/// milliseconds, which the last reading request would otherwise pay for.
fn drop_when_unused(snapshot: Arc<ServedSnapshot>) {
    let mut waited = Duration::ZERO;
    while Arc::strong_count(&snapshot) > 1 && waited < MAX_READER_WAIT {
        thread::sleep(READER_CHECK_INTERVAL);
        waited += READER_CHECK_INTERVAL;
    }
    drop(snapshot);
}

fn log_published(snapshot: &ServedSnapshot) {
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
    for problem in problems.iter().take(MAX_LOGGED_PROBLEMS) {
        warn!(environment = %environment, "{problem}");
    }
    if problems.len() > MAX_LOGGED_PROBLEMS {
        let more = problems.len() - MAX_LOGGED_PROBLEMS;
        warn!(environment = %environment, "{more} more problems; /status lists all");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        protocol::features::PreviousRun,
        token::{Environment, Projects},
    };

    fn document(flag: &str) -> Document {
        Document::parse(format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#).as_bytes()).unwrap()
    }

    /// The document as another instance has shared it.
    fn shared(flag: &str, state_id: u32) -> Document {
        let listing = format!(r#"{{"features":[{{"name":"{flag}"}}]}}"#);
        let run = PreviousRun { state_id: Some(state_id), ..PreviousRun::default() };
        Document::parse_stored(&Document::encode_stored(listing.as_bytes(), run)).unwrap()
    }

    #[tokio::test]
    async fn shared_flags_keep_their_state_id_and_own_flags_get_a_later_one() {
        let snapshots = Snapshots::default();
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let publish_next = async |document: Document| {
            let published = publish(&snapshots, scope.clone(), None, || document).await.unwrap();
            let id = snapshots.load(&scope.environment).unwrap().state_id().get();
            (published.is_some(), id)
        };
        assert_eq!(publish_next(shared("a", 7)).await, (true, 7));
        assert_eq!(publish_next(shared("a", 7)).await, (false, 7));
        assert_eq!(publish_next(document("a")).await, (false, 7), "fetched, and the same");
        let revised = br#"{"features":[{"name":"a"}],"meta":{"revisionId":2}}"#;
        let revised = Document::parse(revised).unwrap();
        assert_eq!(publish_next(revised).await, (false, 7), "with another revision only");
        assert_eq!(publish_next(shared("a", 3)).await, (true, 3), "of another leader");
        let (is_published, first) = publish_next(document("b")).await;
        assert!(is_published && first > 3);
        assert_eq!(publish_next(document("c")).await, (true, first + 1));
        assert_eq!(publish_next(shared("d", 9)).await, (true, 9));
    }
}
