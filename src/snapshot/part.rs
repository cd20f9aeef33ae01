//! The part of a snapshot that one set of projects sees: made on the first wish, then read without a
//! lock or a queue, because nearly every request reads one.
//!
//! Filtered listings are not here: clients choose filters, and what they can make up without end is
//! kept where the least used falls out.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;

use super::{body::Body, listing::Segments, view::View};
use crate::token::Projects;

/// The most memory that a snapshot's parts may hold, in bytes, and the most parts; beyond either all
/// but the newest are made again when they are asked for. A deployment has as many as kinds of tokens.
const BYTES: usize = 128 << 20;
const PARTS: usize = 1_000;

/// What a set of projects sees.
#[derive(Debug, Default)]
pub(super) struct Part {
    view: OnceLock<Arc<View>>,
    separate: OnceLock<Arc<Body>>,
    inlined: OnceLock<Arc<Body>>,
}

impl Part {
    /// What frontends are answered by.
    pub(super) fn view(&self) -> &OnceLock<Arc<View>> {
        &self.view
    }

    /// The whole flag configuration.
    pub(super) fn listing(&self, segments: Segments) -> &OnceLock<Arc<Body>> {
        match segments {
            Segments::Separate => &self.separate,
            Segments::Inlined => &self.inlined,
        }
    }

    fn weight(&self) -> usize {
        let bodies = [&self.separate, &self.inlined].into_iter().filter_map(OnceLock::get);
        let bodies: usize = bodies.map(|body| body.weight()).sum();
        size_of::<Self>() + bodies + self.view.get().map_or(0, |view| view.weight())
    }
}

/// The parts that have been asked for.
#[derive(Debug, Default)]
pub(super) struct Parts(ArcSwap<HashMap<Projects, Arc<Part>, RandomState>>);

impl Parts {
    /// The part that `projects` see.
    pub(super) fn of(&self, projects: &Projects) -> Arc<Part> {
        if let Some(part) = self.0.load().get(projects) {
            return Arc::clone(part);
        }
        let new = Arc::<Part>::default();
        self.0.rcu(|parts| {
            let mut parts = HashMap::clone(parts);
            if parts.len() >= PARTS {
                parts.clear();
            }
            parts.entry(projects.clone()).or_insert_with(|| Arc::clone(&new));
            parts
        });
        self.0.load().get(projects).map_or(new, Arc::clone)
    }

    /// Lets go of all parts but that of `projects` if they hold too much; to be called when one has
    /// grown.
    pub(super) fn keep_within_bounds(&self, projects: &Projects) {
        if self.0.load().values().map(|part| part.weight()).sum::<usize>() > BYTES {
            self.0.rcu(|parts| {
                let kept = parts.get_key_value(projects);
                let kept = kept.map(|(projects, part)| (projects.clone(), Arc::clone(part)));
                kept.into_iter().collect::<HashMap<_, _, _>>()
            });
        }
    }

    /// Every part, with the projects that see it.
    pub(super) fn all(&self) -> Arc<HashMap<Projects, Arc<Part>, RandomState>> {
        self.0.load_full()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::token::Project;

    fn only(n: usize) -> Projects {
        Projects::Only([Project::new(&format!("p{n}"))].into())
    }

    #[test]
    fn parts_are_bounded_in_number_and_in_bytes() {
        let parts = Parts::default();
        let first = parts.of(&only(0));
        assert!(Arc::ptr_eq(&first, &parts.of(&only(0))));
        for n in 0..3 * PARTS {
            parts.of(&only(n));
            assert!(parts.all().len() <= PARTS);
        }
        let fill = |n: usize| {
            let large = || Arc::new(Body::new(Bytes::from(vec![b'x'; BYTES / 5])));
            parts.of(&only(n)).listing(Segments::Inlined).get_or_init(large);
            parts.keep_within_bounds(&only(n));
        };
        fill(1);
        fill(2);
        assert!(parts.of(&only(1)).listing(Segments::Inlined).get().is_some());
        fill(3);
        assert_eq!(parts.all().len(), 1, "three with their codings are more than the bound");
        assert!(parts.of(&only(3)).listing(Segments::Inlined).get().is_some());
    }
}
