//! The connection between the coordination of a topic and the user of that topic: `sync`, for flags.
//!
//! The user learns its role and gets shared documents; it reports what it serves. Only the newest of each
//! is kept, so neither side waits for the other, and memory is bounded by two documents.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::{sync::Notify, time::Instant};

use super::{
    role::{Fence, Role},
    shared_document::{DocumentDigest, DocumentHead, ServedDocument, SharedDocument, Version},
};

/// The part of this instance in one topic, for the user of that topic. One for each
/// [`Coordinator`](super::Coordinator).
#[derive(Debug)]
pub struct Member {
    exchange: Arc<Exchange>,
    /// The role that was returned last.
    known_role: Role,
}

/// A change for the user of a topic.
#[derive(Debug)]
pub enum Update {
    /// The leader shares a document that is newer than the one being served. To be answered by
    /// [`Member::on_served`], [`Member::on_outdated`] or [`Member::on_unreadable`]; until then there is no
    /// other.
    Document(SharedDocument),
    /// The role has changed.
    Role(Role),
    /// Upstream has confirmed the shared document being served, at this time or a little later.
    Confirmed(Instant),
}

impl Member {
    pub(super) fn new(exchange: Arc<Exchange>) -> Self {
        Self { exchange, known_role: Role::default() }
    }

    /// Waits for a change. Documents come before a change to [`Role::Leader`], so that a leader
    /// continues from the newest one. Dropping the future is safe.
    pub async fn next_update(&mut self) -> Update {
        loop {
            if let Some(update) = self.take_update() {
                return update;
            }
            self.exchange.for_member.notified().await;
        }
    }

    fn take_update(&mut self) -> Option<Update> {
        let mut state = self.exchange.lock();
        if let Incoming::Fetched(document) = &state.incoming {
            let document = document.clone();
            state.incoming = Incoming::Taken;
            return Some(Update::Document(document));
        }
        if state.role != self.known_role {
            self.known_role = state.role;
            return Some(Update::Role(state.role));
        }
        state.confirmed.take().map(Update::Confirmed)
    }

    /// The document of an [`Update::Document`] is being served.
    pub fn on_served(&self, document: &SharedDocument) {
        let mut state = self.exchange.lock();
        state.served = ServedDocument::Shared(document.head);
        state.incoming = Incoming::None;
        drop(state);
        self.exchange.for_coordinator.notify_one();
    }

    /// The document of an [`Update::Document`] is not served, because this instance has fetched a newer
    /// one meanwhile. It is offered again once upstream has confirmed it later than that.
    pub fn on_outdated(&self, _document: &SharedDocument) {
        self.exchange.lock().incoming = Incoming::None;
        self.exchange.for_coordinator.notify_one();
    }

    /// The document of an [`Update::Document`] cannot be read. It is not offered again.
    pub fn on_unreadable(&self, document: &SharedDocument) {
        let mut state = self.exchange.lock();
        state.unreadable = Some((document.head.version, document.head.digest));
        state.incoming = Incoming::None;
        drop(state);
        self.exchange.for_coordinator.notify_one();
    }

    /// The instance serves a document of an earlier run, which nobody has confirmed.
    pub fn on_restored(&self) {
        self.exchange.lock().served = ServedDocument::Unconfirmed;
    }

    /// Upstream confirmed the document being served at this time.
    pub fn on_fetched(&self, confirmed_at: Instant) {
        self.exchange.lock().confirm(confirmed_at);
    }

    /// The instance serves another document than before, which it has fetched, and which upstream confirmed
    /// at this time, if at all. The previous one is not shared any more: a confirmation of the new one
    /// must not count for it.
    pub fn on_replaced(&self, confirmed_at: Option<Instant>) {
        let mut state = self.exchange.lock();
        state.clear_outgoing();
        if let Some(confirmed_at) = confirmed_at {
            state.confirm(confirmed_at);
        }
    }

    /// Shares the document being served. It is written once this instance leads, and again whenever Redis
    /// has lost it.
    pub fn share(&self, body: Bytes) {
        let mut state = self.exchange.lock();
        state.shared_count += 1;
        state.outgoing = Some(Outgoing { body, number: state.shared_count });
        drop(state);
        self.exchange.for_coordinator.notify_one();
    }

    /// The fence of the lease, if this instance leads.
    pub(super) fn fence(&self) -> Option<Fence> {
        self.exchange.lock().fence
    }

    /// Upstream does not respond to this leader: it lets another instance lead.
    pub fn yield_leadership(&self) {
        self.exchange.lock().yields = true;
        self.exchange.for_coordinator.notify_one();
    }
}

/// The state that a [`Member`] and its coordinator share.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    state: Mutex<ExchangeState>,
    for_member: Notify,
    for_coordinator: Notify,
}

#[derive(Debug, Default)]
pub(super) struct ExchangeState {
    pub(super) role: Role,
    /// The name of the instance that leads, according to the last reply of Redis.
    pub(super) leader: Option<String>,
    /// Since when it leads.
    pub(super) leader_since: Option<Instant>,
    /// The fence of the lease, if this instance holds it.
    pub(super) fence: Option<Fence>,
    pub(super) served: ServedDocument,
    incoming: Incoming,
    /// The last document that could not be read.
    unreadable: Option<(Version, DocumentDigest)>,
    /// A confirmation of the served document that the member does not know yet.
    confirmed: Option<Instant>,
    outgoing: Option<Outgoing>,
    shared_count: u64,
    yields: bool,
    /// Whether a notice has arrived.
    is_noticed: bool,
}

/// The document for the member.
#[derive(Debug, Default)]
enum Incoming {
    #[default]
    None,
    /// Fetched, and not taken yet.
    Fetched(SharedDocument),
    /// The member works on it.
    Taken,
}

/// The document to share.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) body: Bytes,
    /// Different for each document.
    pub(super) number: u64,
}

/// What to do about a document in Redis.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Adoption {
    /// Nothing: it is served already, or is not newer.
    Nothing,
    /// Fetch it.
    Fetch,
    /// Wait for the member, which works on another.
    Wait,
}

impl Exchange {
    /// Ignores poisoning: each change under this lock is complete.
    pub(super) fn lock(&self) -> MutexGuard<'_, ExchangeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the member or a notice needs attention. Dropping the future is safe.
    pub(super) async fn notified(&self) {
        self.for_coordinator.notified().await;
    }

    /// Changes the role. Returns the previous one.
    pub(super) fn set_role(&self, role: Role) -> Role {
        let previous = std::mem::replace(&mut self.lock().role, role);
        if previous != role {
            self.for_member.notify_one();
        }
        previous
    }

    /// Compares a document in Redis with the served one.
    pub(super) fn consider(&self, candidate: &DocumentHead) -> Adoption {
        let state = &mut *self.lock();
        if !matches!(state.incoming, Incoming::None) {
            return Adoption::Wait;
        }
        if let ServedDocument::Shared(served) = &mut state.served
            && served.digest == candidate.digest
        {
            // The same text, perhaps of the next leader.
            if served.version <= candidate.version {
                served.version = candidate.version;
                if served.confirmed_at < candidate.confirmed_at {
                    served.confirmed_at = candidate.confirmed_at;
                    state.confirmed = candidate.confirmed_at;
                    self.for_member.notify_one();
                }
            }
            return Adoption::Nothing;
        }
        let is_unreadable = state.unreadable == Some((candidate.version, candidate.digest));
        if is_unreadable || !state.served.is_superseded_by(candidate) {
            return Adoption::Nothing;
        }
        Adoption::Fetch
    }

    /// Whether a document in Redis could not be read.
    pub(super) fn is_unreadable(&self, head: &DocumentHead) -> bool {
        self.lock().unreadable == Some((head.version, head.digest))
    }

    /// A document in Redis is damaged.
    pub(super) fn on_damaged(&self, head: &DocumentHead) {
        self.lock().unreadable = Some((head.version, head.digest));
    }

    /// Offers a document to the member.
    pub(super) fn offer(&self, document: SharedDocument) {
        self.lock().incoming = Incoming::Fetched(document);
        self.for_member.notify_one();
    }

    /// A notice has arrived.
    pub(super) fn notice(&self) {
        self.lock().is_noticed = true;
        self.for_coordinator.notify_one();
    }
}

impl ExchangeState {
    fn confirm(&mut self, confirmed_at: Instant) {
        let previous = match self.served {
            ServedDocument::Fetched { confirmed_at } => Some(confirmed_at),
            ServedDocument::Nothing | ServedDocument::Unconfirmed | ServedDocument::Shared(_) => {
                None
            }
        };
        let confirmed_at = previous.unwrap_or(confirmed_at).max(confirmed_at);
        self.served = ServedDocument::Fetched { confirmed_at };
    }

    /// Whether the member has a document to decide on.
    pub(super) fn is_member_busy(&self) -> bool {
        !matches!(self.incoming, Incoming::None)
    }

    /// The document to share, if any. Cheap.
    pub(super) fn outgoing(&self) -> Option<Outgoing> {
        self.outgoing.clone()
    }

    /// Drops the document to share: another instance leads.
    pub(super) fn clear_outgoing(&mut self) {
        self.outgoing = None;
    }

    /// Whether the member has asked to let another lead since the last call.
    pub(super) fn take_yields(&mut self) -> bool {
        std::mem::take(&mut self.yields)
    }

    /// Whether a notice has arrived since the last call.
    pub(super) fn take_noticed(&mut self) -> bool {
        std::mem::take(&mut self.is_noticed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn head(sequence: u64, digest: u8, confirmed_at: Instant) -> DocumentHead {
        DocumentHead {
            version: Version { fence: Fence::new(1), sequence },
            digest: DocumentDigest::from_bytes(&[digest; 32]).expect("32 bytes"),
            confirmed_at: Some(confirmed_at),
        }
    }

    fn document(head: DocumentHead) -> SharedDocument {
        SharedDocument { body: Bytes::new(), confirmed_at: head.confirmed_at, head }
    }

    #[tokio::test]
    async fn document_comes_before_the_role_and_blocks_others_until_it_is_answered() {
        let exchange = Arc::<Exchange>::default();
        let mut member = Member::new(Arc::clone(&exchange));
        let now = Instant::now();
        let first = head(1, 1, now);
        assert_eq!(exchange.consider(&first), Adoption::Fetch);
        exchange.offer(document(first));
        exchange.set_role(Role::Leader);
        let Update::Document(taken) = member.next_update().await else { panic!("a document") };
        assert_eq!(exchange.consider(&head(2, 2, now)), Adoption::Wait);
        member.on_served(&taken);
        assert!(matches!(member.next_update().await, Update::Role(Role::Leader)));
        assert_eq!(exchange.consider(&first), Adoption::Nothing);
        assert_eq!(exchange.consider(&head(2, 2, now)), Adoption::Fetch);
    }

    #[tokio::test]
    async fn confirmation_of_the_same_text_reaches_the_member_without_the_text() {
        let exchange = Arc::<Exchange>::default();
        let mut member = Member::new(Arc::clone(&exchange));
        let now = Instant::now();
        member.on_served(&document(head(1, 1, now)));
        let later = now + Duration::from_secs(1);
        assert_eq!(exchange.consider(&head(2, 1, later)), Adoption::Nothing);
        assert!(matches!(member.next_update().await, Update::Confirmed(at) if at == later));
        assert_eq!(exchange.consider(&head(2, 1, later)), Adoption::Nothing);
        assert!(member.take_update().is_none());
    }

    #[test]
    fn replaced_document_is_not_shared_or_confirmed_any_more() {
        let exchange = Arc::<Exchange>::default();
        let member = Member::new(Arc::clone(&exchange));
        let now = Instant::now();
        member.on_replaced(Some(now));
        member.share(Bytes::from_static(b"first"));
        member.on_fetched(now + Duration::from_secs(1));
        assert!(exchange.lock().outgoing().is_some());
        member.on_replaced(Some(now + Duration::from_secs(2)));
        assert!(exchange.lock().outgoing().is_none());
        assert_eq!(exchange.lock().served.confirmed_at(), Some(now + Duration::from_secs(2)));
    }

    #[tokio::test]
    async fn outdated_document_is_offered_again_after_its_next_confirmation() {
        let exchange = Arc::<Exchange>::default();
        let mut member = Member::new(Arc::clone(&exchange));
        let (early, now) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        exchange.offer(document(head(1, 1, early)));
        let Update::Document(taken) = member.next_update().await else { panic!("a document") };
        member.on_fetched(now);
        member.on_outdated(&taken);
        assert_eq!(exchange.consider(&head(1, 1, early)), Adoption::Nothing);
        assert_eq!(exchange.consider(&head(1, 1, now + Duration::from_secs(1))), Adoption::Fetch);
    }

    #[tokio::test]
    async fn unreadable_document_is_not_offered_again() {
        let exchange = Arc::<Exchange>::default();
        let mut member = Member::new(Arc::clone(&exchange));
        let now = Instant::now();
        exchange.offer(document(head(1, 1, now)));
        let Update::Document(taken) = member.next_update().await else { panic!("a document") };
        member.on_unreadable(&taken);
        assert_eq!(exchange.consider(&head(1, 1, now + Duration::from_secs(1))), Adoption::Nothing);
        assert_eq!(exchange.consider(&head(2, 2, now)), Adoption::Fetch);
    }

    #[test]
    fn fetched_document_keeps_its_latest_confirmation() {
        let exchange = Arc::<Exchange>::default();
        let member = Member::new(Arc::clone(&exchange));
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        member.on_fetched(later);
        member.on_fetched(now);
        assert_eq!(exchange.lock().served.confirmed_at(), Some(later));
        assert_eq!(exchange.consider(&head(9, 1, now)), Adoption::Nothing);
        assert_eq!(exchange.consider(&head(9, 1, later)), Adoption::Fetch);
    }
}
