//! The part of one environment's synchronisation in a fleet: its role, publishing what the leader shares,
//! and sharing what this instance fetches.
//!
//! It does not fetch anything itself, and does not decide on the role; `fleet` does.

use bytes::Bytes;
use futures_util::future::pending;
use tokio::{
    task::{JoinError, spawn_blocking},
    time::Instant,
};
use tracing::warn;

use super::publish::publish;
use crate::{
    fleet::{Member, Role, SharedDocument, Update},
    protocol::features::{Document, PreviousRun, parse_query_projects},
    served::{ServedSnapshot, Snapshots},
    telemetry::error_chain,
    token::{Environment, Projects, Scope},
};

/// A leader lets another instance lead after so many failed polls in a row.
const MAX_LEADER_FAILURES: u32 = 3;

/// The part of one environment's synchronisation in a fleet.
#[derive(Debug)]
pub(super) enum FleetSync {
    /// The instance is in no fleet.
    Single,
    /// The instance is in a fleet.
    Member {
        member: Member,
        role: Role,
        /// The state of the served flags that a later run needs.
        run: PreviousRun,
    },
}

/// A shared document, and where to publish it.
#[derive(Debug)]
pub(super) struct SharedFlags<'a> {
    pub(super) snapshots: &'a Snapshots,
    pub(super) environment: &'a Environment,
    pub(super) document: SharedDocument,
}

impl FleetSync {
    /// A member of a fleet, which already serves `served` from an earlier run.
    pub(super) fn member(member: Member, served: Option<&ServedSnapshot>) -> Self {
        let run = served.and_then(|it| it.document().previous_run());
        if let Some(served) = served {
            match served.confirmed_at() {
                Some(at) => member.on_fetched(at),
                None => member.on_restored(),
            }
        }
        Self::Member { member, role: Role::default(), run: run.unwrap_or_default() }
    }

    /// Whether this instance synchronises with upstream.
    pub(super) fn uses_upstream(&self) -> bool {
        match self {
            Self::Single => true,
            Self::Member { role, .. } => role.uses_upstream(),
        }
    }

    /// Waits for a change in the fleet; forever without one. Dropping the future is safe.
    pub(super) async fn next_update(&mut self) -> Update {
        match self {
            Self::Single => pending().await,
            Self::Member { member, .. } => member.next_update().await,
        }
    }

    /// Changes the role. Returns whether synchronisation with upstream begins or ends.
    pub(super) fn set_role(&mut self, new: Role) -> bool {
        let Self::Member { role, .. } = self else { return false };
        std::mem::replace(role, new).uses_upstream() != new.uses_upstream()
    }

    /// Publishes flags of the leader. Returns whether they are served.
    pub(super) async fn publish(
        &mut self,
        SharedFlags { snapshots, environment, document }: SharedFlags<'_>,
        served: Option<&ServedSnapshot>,
    ) -> bool {
        let Self::Member { member, role, run } = self else { return false };
        let confirmed_at = document.confirmed_at;
        if role.uses_upstream() && served.and_then(ServedSnapshot::confirmed_at) > confirmed_at {
            member.on_outdated(&document);
            return false;
        }
        let parsed = match parse(document.body.clone()).await {
            Ok(parsed) => parsed,
            Err(error) => {
                warn!(
                    %environment,
                    error = error_chain(&error),
                    "Flags that the fleet's leader shares cannot be read; the known ones stay"
                );
                member.on_unreadable(&document);
                return false;
            }
        };
        let ParsedFlags { projects, flags } = parsed;
        let scope = Scope { environment: environment.clone(), projects };
        let previous_run = flags.previous_run();
        match publish(snapshots, scope, confirmed_at, || flags).await {
            Ok(_) => {
                *run = previous_run.unwrap_or_default();
                member.on_served(&document);
                true
            }
            Err(error) => {
                warn!(
                    %environment,
                    error = error_chain(&error),
                    "Compiling flags that the fleet's leader shares failed; the known ones stay"
                );
                member.on_unreadable(&document);
                false
            }
        }
    }

    /// Upstream confirmed the served flags at this time.
    pub(super) fn on_fetched(&self, at: Instant) {
        if let Self::Member { member, .. } = self {
            member.on_fetched(at);
        }
    }

    /// The served flags were replaced by fetched ones, which upstream confirmed at this time, if at all.
    pub(super) fn on_replaced(&self, at: Option<Instant>) {
        if let Self::Member { member, .. } = self {
            member.on_replaced(at);
        }
    }

    /// The served flags leave this state to a later run.
    pub(super) fn set_previous_run(&mut self, new: PreviousRun) {
        if let Self::Member { run, .. } = self {
            *run = new;
        }
    }

    /// Shares the served flags if this instance leads.
    pub(super) fn share(&self, serialize: impl FnOnce(PreviousRun) -> Bytes) {
        if let Self::Member { member, role: Role::Leader, run } = self {
            member.share(serialize(*run));
        }
    }

    /// Lets another instance lead after several `failures` in a row.
    pub(super) fn on_polled(&self, failures: u32) {
        if let Self::Member { member, role: Role::Leader, .. } = self
            && failures >= MAX_LEADER_FAILURES
        {
            member.yield_leadership();
        }
    }
}

struct ParsedFlags {
    projects: Projects,
    flags: Document,
}

/// Parses stored flags on a blocking thread.
async fn parse(body: Bytes) -> Result<ParsedFlags, ParseError> {
    let parsed = spawn_blocking(move || {
        let flags = Document::parse_stored(&body)?;
        Ok(ParsedFlags { projects: parse_query_projects(&body), flags })
    });
    parsed.await?
}

/// Why shared flags cannot be read.
#[derive(Debug, thiserror::Error)]
enum ParseError {
    #[error("they are not a client features document")]
    Json(#[from] serde_json::Error),
    #[error("parsing them panicked")]
    Panic(#[from] JoinError),
}
