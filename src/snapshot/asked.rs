//! The contexts that are requested repeatedly, so that a new snapshot can evaluate them before it is
//! served. This module only records them; `crate::evaluation` evaluates.

use std::{
    hash::BuildHasher,
    sync::{Arc, OnceLock},
};

use foldhash::fast::RandomState;

use super::recent::Recent;
use crate::{
    engine::{Context, KeptContext},
    token::Projects,
};

/// Maximum number of hot contexts. Each costs one evaluation of all flags when flags change.
const PLACES: usize = 64;

/// Number of consecutive slots that a context may use. With a single one, collisions would keep hot
/// contexts out often enough to matter, even if there are few.
const TRIED: usize = 4;

/// The flags that a response includes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Shown {
    /// Only flags that are on for the context.
    Enabled,
    /// Every flag of the scope.
    All,
}

/// A repeated request and its result.
#[derive(Debug)]
pub struct Asked {
    /// The projects whose flags were requested.
    pub projects: Projects,
    /// The flags to include.
    pub shown: Shown,
    /// The context of the request.
    pub context: KeptContext,
    /// The hash of the evaluated flags.
    pub hash: u128,
}

/// Some of the requests that one snapshot received and that it or an earlier one had received before.
///
/// The first request that uses a slot keeps it for the lifetime of the snapshot. It is likely to be a
/// frequent one, and a slot that is never overwritten costs readers nothing.
#[derive(Debug)]
pub(super) struct Often {
    /// Each with the hash of its request.
    places: Box<[OnceLock<(u64, Asked)>]>,
    heard: Arc<Heard>,
}

/// Recent requests, shared by consecutive snapshots.
#[derive(Debug, Default)]
struct Heard {
    recent: Recent,
    hasher: RandomState,
}

impl Default for Often {
    fn default() -> Self {
        Self::with(Arc::default())
    }
}

impl Often {
    fn with(heard: Arc<Heard>) -> Self {
        Self { places: (0..PLACES).map(|_| OnceLock::new()).collect(), heard }
    }

    /// The empty set of a new snapshot, which shares the recent requests with the previous one.
    pub(super) fn after(previous: &Self) -> Self {
        Self::with(Arc::clone(&previous.heard))
    }

    /// Records a request if it is a repeated one: if its result was cached, or if it was seen recently.
    pub(super) fn note(
        &self,
        (projects, include, context): (&Projects, Shown, &Context<'_>),
        is_cached: bool,
        hash: u128,
    ) {
        let request = self.heard.hasher.hash_one((projects, include, context));
        let Some(slot) = self.place(request) else { return };
        let both_halves = u128::from(request) << 64 | u128::from(request);
        if !(self.heard.recent.insert(both_halves) || is_cached) {
            return;
        }
        if let Some(context) = KeptContext::of(context) {
            let projects = projects.clone();
            // Another thread may have taken the slot.
            let _ = slot.set((request, Asked { projects, shown: include, context, hash }));
        }
    }

    /// A free slot for a request with this hash; `None` if the request is recorded already or all its
    /// slots are taken.
    fn place(&self, request: u64) -> Option<&OnceLock<(u64, Asked)>> {
        let first = (u128::from(request) % PLACES as u128) as usize;
        for n in first..first + TRIED {
            let slot = &self.places[n % PLACES];
            match slot.get() {
                None => return Some(slot),
                Some((recorded, _)) if *recorded == request => return None,
                Some(_) => {}
            }
        }
        None
    }

    /// The recorded requests.
    pub(super) fn all(&self) -> impl Iterator<Item = &Asked> {
        self.places.iter().filter_map(OnceLock::get).map(|(_, it)| it)
    }
}
