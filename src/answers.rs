//! Evaluated flags for frontends, by outcome: the hash of what every flag came to is the entity tag,
//! and equal outcomes share one body.
//!
//! It reads a snapshot and a context and has no state of its own: bodies are kept by the snapshot
//! that they were made from, and vanish with it.

use std::{fmt::Write as _, sync::Arc};

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    engine::Context,
    snapshot::{
        Fragment, Snapshot,
        body::{Body, etag_of},
    },
    token::Projects,
};

/// Which flags an answer lists.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Shown {
    /// Only those that are on for the context.
    Enabled,
    /// Every flag of the scope.
    All,
}

/// What a context's flags came to; its body is not written yet.
#[derive(Debug)]
pub struct Answer<'a> {
    snapshot: &'a Snapshot,
    fragments: Vec<&'a Fragment>,
    hash: u128,
}

impl<'a> Answer<'a> {
    /// Evaluates every flag that `projects` see.
    pub fn of(
        snapshot: &'a Snapshot,
        projects: &Projects,
        context: &Context<'_>,
        shown: Shown,
    ) -> Self {
        let engine = snapshot.engine();
        let bound = engine.bind(context);
        let visible = snapshot.visible(projects);
        let mut fragments = Vec::with_capacity(visible.len());
        for &flag in visible.iter() {
            let outcome = engine.evaluate(flag, &bound);
            if shown == Shown::All || outcome.is_on() {
                fragments.push(snapshot.fragments().get(flag, outcome));
            }
        }
        // What the body is made of, hashed without writing it: equal bodies have equal tags on every
        // instance and across snapshots.
        let hashes: Vec<u8> = fragments.iter().flat_map(|it| it.hash().to_le_bytes()).collect();
        Self { snapshot, fragments, hash: xxh3_128(&hashes) }
    }

    /// The entity tag of the answer.
    pub fn etag(&self) -> HeaderValue {
        etag_of(self.hash)
    }

    /// `{"toggles":[…]}`, flags sorted by name.
    pub fn body(&self) -> Arc<Body> {
        self.snapshot.answer(self.hash, || {
            let length: usize = self.fragments.iter().map(|it| it.json().len() + 1).sum();
            let mut text = String::with_capacity(length + 16);
            text.push_str(r#"{"toggles":["#);
            for (n, fragment) in self.fragments.iter().enumerate() {
                let separator = if n > 0 { "," } else { "" };
                write!(text, "{separator}{}", fragment.json())
                    .expect("writing to a string cannot fail");
            }
            text.push_str("]}");
            Body::tagged(Bytes::from(text), self.hash)
        })
    }
}

/// The answer about one flag that `projects` see; `None` if there is no such flag.
pub fn one(
    snapshot: &Snapshot,
    projects: &Projects,
    context: &Context<'_>,
    name: &str,
) -> Option<Body> {
    let engine = snapshot.engine();
    let flag = engine.find(name)?;
    if !projects.contains(engine.flag(flag).project()) {
        return None;
    }
    let outcome = engine.evaluate(flag, &engine.bind(context));
    let json = snapshot.fragments().get(flag, outcome).json();
    Some(Body::new(Bytes::copy_from_slice(json.as_bytes())))
}
