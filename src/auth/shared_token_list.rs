//! The token list in a fleet: one instance reads it from upstream and shares it, and the others take it
//! over.
//!
//! It requests nothing, and applies nothing to the token cache; [`token_list_poller`] does.
//!
//! [`token_list_poller`]: super::token_list_poller

use std::{future::pending, sync::Arc};

use bytes::Bytes;
use tokio::time::Instant;
use tracing::warn;

use super::token_cache::TokenListing;
use crate::{
    fleet::{Member, Role, Update},
    telemetry::error_chain,
};

/// A leader lets another instance lead after so many failures in a row.
const MAX_LEADER_FAILURES: u32 = 2;

/// The part of this instance in reading the token list.
#[derive(Debug)]
pub(super) enum SharedTokenList {
    /// The instance is in no fleet.
    Single,
    /// The instance is in a fleet.
    Member {
        member: Member,
        role: Role,
        /// The list that was read or taken over last, as it is shared.
        encoded: Bytes,
    },
}

/// The next task of a poller of the list.
#[derive(Debug)]
pub(super) enum ListEvent {
    /// Read the list: this instance begins to use upstream.
    Begin,
    /// Nothing: this instance does not read the list any more.
    End,
    /// Apply the list of another instance, as of the time at which upstream confirmed it.
    Listing(Arc<TokenListing>, Option<Instant>),
    /// Upstream has confirmed the last list.
    Confirmed(Instant),
}

impl SharedTokenList {
    pub(super) fn member(member: Member) -> Self {
        Self::Member { member, role: Role::default(), encoded: Bytes::new() }
    }

    /// Whether this instance reads the list at upstream.
    pub(super) fn uses_upstream(&self) -> bool {
        match self {
            Self::Single => true,
            Self::Member { role, .. } => role.uses_upstream(),
        }
    }

    /// Records a list of upstream, and shares it if this instance leads.
    pub(super) fn on_listed(&mut self, listing: &TokenListing, started: Instant) {
        let Self::Member { member, role, encoded } = self else { return };
        let new = Bytes::from(listing.encode());
        let is_changed = *encoded != new;
        *encoded = new;
        if is_changed {
            member.on_replaced(Some(started));
        } else {
            member.on_fetched(started);
        }
        if *role == Role::Leader && is_changed {
            member.share(encoded.clone());
        }
    }

    /// Lets another instance lead after several `failures` in a row to read the list.
    pub(super) fn on_failed(&self, failures: u32) {
        if let Self::Member { member, role: Role::Leader, .. } = self
            && failures >= MAX_LEADER_FAILURES
        {
            member.yield_leadership();
        }
    }

    /// Upstream has shown that the list is unchanged at this time.
    pub(super) fn on_confirmed(&self, at: Instant) {
        if let Self::Member { member, .. } = self {
            member.on_fetched(at);
        }
    }

    /// Waits for a change in the fleet; forever without one. Dropping the future is safe.
    pub(super) async fn next_event(&mut self) -> ListEvent {
        let Self::Member { member, role, encoded } = self else { return pending().await };
        loop {
            match member.next_update().await {
                Update::Document(document) => match TokenListing::decode(&document.body) {
                    Ok(listing) => {
                        encoded.clone_from(&document.body);
                        member.on_served(&document);
                        return ListEvent::Listing(Arc::new(listing), document.confirmed_at);
                    }
                    Err(error) => {
                        member.on_unreadable(&document);
                        warn!(
                            error = error_chain(&error),
                            "The token list that the fleet's leader shares cannot be read; the known \
                             one stays"
                        );
                    }
                },
                Update::Role(new) => {
                    let previous = std::mem::replace(role, new);
                    if new == Role::Leader && !encoded.is_empty() {
                        member.share(encoded.clone());
                    }
                    match (previous.uses_upstream(), new.uses_upstream()) {
                        (false, true) => return ListEvent::Begin,
                        (true, false) => return ListEvent::End,
                        (true, true) | (false, false) => {}
                    }
                }
                Update::Confirmed(at) => return ListEvent::Confirmed(at),
            }
        }
    }
}
