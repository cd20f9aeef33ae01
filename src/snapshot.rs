//! An environment's flags, as of one response of their source, prepared for serving.
//!
//! A [`Snapshot`] is immutable and built once from a document: the compiled engine, the flags' text as
//! upstream sent it, and each flag's JSON. Responses that also depend on a request are built from it on
//! demand; this module does not remember them, which [`served`](crate::served) does. It does not fetch,
//! store or schedule anything either. The caller chooses the thread that builds a snapshot; building
//! yields the processor between its steps.

mod client_features;
mod flag_states;
mod fragments;
mod frontend_view;
pub mod prepared_body;

use std::{sync::Arc, thread};

use jiff::Timestamp;
use tokio::time::Instant;

use self::prepared_body::PreparedBody;
pub use self::{
    client_features::{ClientFeaturesKey, Filter, SegmentFormat, filter_document},
    flag_states::{FlagState, FlagStates},
    fragments::{Fragment, FragmentId, Fragments, OfrepHashes},
    frontend_view::{FrontendView, Include, ScopedFlag},
};
use crate::{
    engine::{Engine, Flag, Problem},
    protocol::features::Document,
    token::{Environment, Projects, Scope},
};

/// The flags of one environment.
#[derive(Debug)]
pub struct Snapshot {
    environment: Environment,
    projects: Projects,
    document: Arc<Document>,
    revision: u32,
    engine: Engine,
    problems: Vec<Problem>,
    /// When the source sent them.
    received_at: Instant,
    fragments: Fragments,
}

impl Snapshot {
    /// Compiles a document that has every flag of the scope's projects. Problems with single flags do
    /// not fail the build; they are available as [`Snapshot::problems`].
    ///
    /// Takes milliseconds for thousands of flags.
    pub fn build(Scope { environment, projects }: Scope, document: Document) -> Self {
        let received_at = Instant::now();
        let (engine, problems) = Engine::compile(&document);
        let fragments = Fragments::build(&engine, None);
        let stored = document.stored_revision().and_then(|it| u32::try_from(it).ok());
        let revision = stored.unwrap_or_else(|| revision_at(Timestamp::now()));
        let document = Arc::new(document);
        Self { environment, projects, document, revision, engine, problems, received_at, fragments }
    }

    /// Like [`Snapshot::build`], to replace a snapshot of the same environment. Reuses the text, the
    /// compiled form and the JSON of each flag that did not change.
    pub fn rebuild_from(
        previous: &Self,
        Scope { environment, projects }: Scope,
        document: Document,
    ) -> Self {
        let received_at = Instant::now();
        let document = Arc::new(document.reuse_unchanged(&previous.document));
        yield_cpu();
        let (engine, problems) =
            previous.engine.recompile(&previous.document, &previous.problems, &document);
        yield_cpu();
        let fragments = Fragments::build(&engine, Some((&previous.engine, &previous.fragments)));
        yield_cpu();
        let revision = revision_at(Timestamp::now()).max(previous.revision.saturating_add(1));
        Self { environment, projects, document, revision, engine, problems, received_at, fragments }
    }

    /// The environment whose state this is.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The projects whose flags are complete. Flags of other projects may be present, too.
    pub fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The flags and segments as the source sent them.
    pub fn document(&self) -> &Arc<Document> {
        &self.document
    }

    /// The compiled flags.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The compiled flag of this name.
    pub fn flag(&self, name: &str) -> Option<&Flag> {
        self.engine.find(name).map(|id| self.engine.flag(id))
    }

    /// Problems with the definitions of single flags.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// When the source sent this state, or when it was read from the store.
    pub fn received_at(&self) -> Instant {
        self.received_at
    }

    /// The prepared JSON of each flag.
    pub fn fragments(&self) -> &Fragments {
        &self.fragments
    }

    /// Prepares the flags of `projects` for evaluation. `id` is unique among the views of this snapshot.
    pub fn build_frontend_view(&self, projects: &Projects, id: u64) -> FrontendView {
        FrontendView::build(&self.engine, &self.fragments, projects, id)
    }

    /// Writes the flag configuration for a key, as `/api/client/features` sends it. Takes about 275,000
    /// instructions for 350 flags.
    pub fn build_client_features(&self, key: &ClientFeaturesKey) -> PreparedBody {
        client_features::build(&self.environment, &self.document, key, self.revision)
    }
}

/// The revision of a state that begins now: seconds since 1970. It grows from state to state, across
/// restarts and instances, and fits the 32 bits into which SDKs read it.
fn revision_at(now: Timestamp) -> u32 {
    u32::try_from(now.as_second()).unwrap_or(1)
}

/// Yields the processor to waiting threads between two steps of a task that takes milliseconds.
/// A server kernel may preempt only at ticks of 4 ms, and a request that needs microseconds would wait
/// that long.
fn yield_cpu() {
    thread::yield_now();
}
