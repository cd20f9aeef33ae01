//! The list of environments in a fleet: one instance reads it from upstream and shares what it decides,
//! and the others take that over.
//!
//! It shares the decision, not upstream's list: an environment is removed after several lists without it,
//! and an instance that sees only changes could not count them.

use std::collections::BTreeSet;

use futures_util::future::pending;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::warn;

use crate::{
    fleet::{Member, Role, Update},
    telemetry::error_chain,
    token::Environment,
};

/// The environments as one instance shares them with its fleet. Fields that a later version adds are
/// ignored.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
struct SharedList {
    enabled: BTreeSet<String>,
    removed: BTreeSet<String>,
}

/// The environments to synchronise, and those that were removed or disabled upstream.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct EnvironmentList {
    pub(super) enabled: BTreeSet<Environment>,
    pub(super) removed: BTreeSet<Environment>,
}

/// The part of this instance in listing the environments.
#[derive(Debug)]
pub(super) enum SharedEnvironments {
    /// The instance is in no fleet, or does not list environments.
    Single,
    /// The instance is in a fleet.
    Member {
        member: Member,
        role: Role,
        /// The list of the leader, or of this instance.
        list: Option<EnvironmentList>,
    },
}

impl SharedEnvironments {
    pub(super) fn member(member: Member) -> Self {
        Self::Member { member, role: Role::default(), list: None }
    }

    /// Whether this instance lists the environments at upstream.
    pub(super) fn uses_upstream(&self) -> bool {
        match self {
            Self::Single => true,
            Self::Member { role, .. } => role.uses_upstream(),
        }
    }

    /// The list of the leader, if this instance follows one that has shared it.
    pub(super) fn followed_list(&self) -> Option<&EnvironmentList> {
        match self {
            Self::Member { role: Role::Follower, list, .. } => list.as_ref(),
            Self::Single | Self::Member { .. } => None,
        }
    }

    /// Records a list of upstream, and shares it if this instance leads.
    pub(super) fn on_listed(&mut self, new: EnvironmentList) {
        let Self::Member { member, role, list } = self else { return };
        let is_changed = list.as_ref() != Some(&new);
        if is_changed {
            member.on_replaced(Some(Instant::now()));
        } else {
            member.on_fetched(Instant::now());
        }
        let list = list.insert(new);
        if *role == Role::Leader && is_changed {
            member.share(encode(list).into());
        }
    }

    /// Waits until the list to use may have changed; forever without a fleet. Dropping the future is
    /// safe.
    pub(super) async fn changed(&mut self) {
        let Self::Member { member, role, list } = self else { return pending().await };
        loop {
            match member.next_update().await {
                Update::Document(document) => match decode(&document.body) {
                    Ok(new) => {
                        *list = Some(new);
                        member.on_served(&document);
                        return;
                    }
                    Err(error) => {
                        member.on_unreadable(&document);
                        warn!(
                            error = error_chain(&error),
                            "The environments that the fleet's leader shares cannot be read; the known \
                             ones stay"
                        );
                    }
                },
                Update::Role(new) => {
                    let began = new.uses_upstream() && !role.uses_upstream();
                    *role = new;
                    if let (Role::Leader, Some(list)) = (new, &*list) {
                        member.share(encode(list).into());
                    }
                    if began {
                        return;
                    }
                }
                Update::Confirmed(_) => {}
            }
        }
    }
}

fn encode(EnvironmentList { enabled, removed }: &EnvironmentList) -> Vec<u8> {
    let names = |environments: &BTreeSet<Environment>| {
        environments.iter().map(|it| it.as_str().to_owned()).collect()
    };
    let list = SharedList { enabled: names(enabled), removed: names(removed) };
    serde_json::to_vec(&list).expect("lists of strings serialize")
}

fn decode(body: &[u8]) -> Result<EnvironmentList, serde_json::Error> {
    let SharedList { enabled, removed } = serde_json::from_slice(body)?;
    let environments =
        |names: BTreeSet<String>| names.iter().map(|name| Environment::new(name)).collect();
    Ok(EnvironmentList { enabled: environments(enabled), removed: environments(removed) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_list_survives_encoding_and_ignores_further_fields() {
        let environments = |names: &[&str]| names.iter().map(|it| Environment::new(it)).collect();
        let list = EnvironmentList {
            enabled: environments(&["dev", "prod"]),
            removed: environments(&["old \"one\""]),
        };
        assert_eq!(decode(&encode(&list)).expect("sound"), list);
        let later = br#"{"enabled":["dev"],"removed":[],"more":{"a":1}}"#;
        assert_eq!(decode(later).expect("sound").enabled, environments(&["dev"]));
        decode(b"[]").expect_err("no list");
    }
}
