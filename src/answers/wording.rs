//! A frontend's question as it was written: whoever asks in the same words is given the same answer,
//! and nobody reads the words again.

use std::net::IpAddr;

use jiff::Timestamp;

use super::answer::{self, Answer, Shown};
use crate::{
    engine::{FieldId, Key},
    snapshot::{Holds, Snapshot, View},
};

/// All that an answer depends on besides its snapshot, unread; unless lots are drawn.
#[derive(Debug)]
pub struct Wording<'a> {
    snapshot: &'a Snapshot,
    view: &'a View,
    words: Key,
    /// When it was asked, where that matters.
    now: Option<Timestamp>,
}

impl<'a> Wording<'a> {
    /// A query from a client's address, of the flags of `view`, which is one of the snapshot's.
    pub fn of(
        snapshot: &'a Snapshot,
        view: &'a View,
        shown: Shown,
        client: IpAddr,
        query: &str,
    ) -> Self {
        Self::at(snapshot, view, shown, client, query, Timestamp::now)
    }

    pub(super) fn at(
        snapshot: &'a Snapshot,
        view: &'a View,
        shown: Shown,
        client: IpAddr,
        query: &str,
        now: impl FnOnce() -> Timestamp,
    ) -> Self {
        let reads = view.reads();
        let mut words = answer::key(view, shown);
        // It completes a context, unless that has its own.
        if reads.matters(FieldId::REMOTE_ADDRESS, |_| true) {
            let client = match client {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            words.extend_from_slice(&client.octets());
        }
        words.extend_from_slice(query.as_bytes());
        Self { snapshot, view, words, now: reads.is_timed().then(now) }
    }

    /// What was asked.
    pub fn snapshot(&self) -> &'a Snapshot {
        self.snapshot
    }

    /// The hash of the answer, if it is known.
    pub fn hash(&self) -> Option<u128> {
        self.snapshot.answers().verbatim().find(&self.words, self.now)
    }

    /// Remembers what is answered, which has just been found out.
    pub fn remember(&self, answer: &Answer<'_>) {
        self.remember_at(answer, Timestamp::now);
    }

    pub(super) fn remember_at(&self, answer: &Answer<'_>, now: impl FnOnce() -> Timestamp) {
        let holds = match self.now {
            None => Holds::Always,
            Some(from) => {
                let until = self.view.reads().next_change(from);
                // A date that came meanwhile: nobody knows of when the answer is.
                if until.is_some_and(|until| until <= now()) {
                    return;
                }
                Holds::During(from, until)
            }
        };
        if answer.is_settled() {
            self.snapshot.answers().verbatim().remember(&self.words, answer.hash(), holds);
        }
    }
}
