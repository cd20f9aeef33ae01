//! The documents that the tokens of one environment have fetched, and which of them are published.
//!
//! A failed fetch removes nothing. A flag stays until upstream has responded to every token in use
//! without it; this also holds for flags of an earlier run. After that only flags that some token in use
//! sees are left. The caller decides when to fetch and with which token.
//!
//! Flags of an earlier run are treated like those of a token that is no longer in use: if they are newer
//! than upstream's first response, they stay until upstream has caught up or a timeout passes.
//!
//! Upstream identifies the state of a token in two ways: by the entity tag of a response, and by the
//! event id on a stream. Each is stored with the flags that it identifies, and replaced with them.
//!
//! If several tokens see a project, the newest of their states is published ([`TokenPrecedence`]).
//!
//! Tokens receive the same change at different times. A flag that moves from the projects of one token
//! to those of another disappears at the first before it appears at the second. So the removal of a flag
//! can be deferred until the other tokens had time to report it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    document_parts::{DocumentPart, PartHashes},
    merge::{MergeInput, TokenView},
    token_precedence::TokenPrecedence,
};
use crate::{
    protocol::{
        delta::EventId,
        features::{Document, Feature},
    },
    served::ServedSnapshot,
    token::{Projects, TokenDigest},
    upstream::Credential,
};

/// How long responses and streams with an older revision than the known one are ignored: another replica
/// of upstream responded, or upstream was restored from a backup.
const OLDER_REVISION_TIMEOUT: Duration = Duration::from_mins(1);

/// The last document of each token, and whether there are unpublished changes.
#[derive(Debug)]
pub(super) struct FetchedDocuments {
    by_token: BTreeMap<TokenDigest, TokenDocument>,
    precedence: TokenPrecedence,
    /// Documents that were replaced by newer ones, still to be dropped.
    replaced: Vec<Arc<Document>>,
    /// Flags that a token no longer sees and another may still report, with the time of their removal,
    /// the earliest first.
    deferred_removals: Vec<(Instant, Arc<Document>)>,
    round: u64,
    /// The number of documents inserted so far.
    sequence: u64,
    has_changes: bool,
}

/// A fetched document, with the states of its parts.
#[derive(Debug)]
pub(super) struct FetchedDocument {
    pub(super) document: Arc<Document>,
    states: PartHashes,
    /// The known states between the previous document and this one.
    pub(super) intermediate_states: Vec<PartHashes>,
    revision: Option<u64>,
}

impl FetchedDocument {
    /// Hashes the document, in time linear in its text.
    pub(super) fn new(document: Document) -> Self {
        let states = PartHashes::from_document(&document);
        Self {
            document: Arc::new(document),
            states,
            intermediate_states: Vec::new(),
            revision: None,
        }
    }

    /// Adds the states between the previous document and this one.
    pub(super) fn with_intermediate_states(self, documents: &[Document]) -> Self {
        Self {
            intermediate_states: documents.iter().map(PartHashes::from_document).collect(),
            ..self
        }
    }

    /// Sets the revision, if it is comparable between tokens.
    pub(super) fn with_revision(self, revision: Option<u64>) -> Self {
        Self { revision, ..self }
    }
}

#[derive(Debug)]
struct TokenDocument {
    etag: Option<String>,
    event_id: Option<EventId>,
    revision: Option<u64>,
    /// The newest revision from an entity tag or a stream. Only Unleash's event ids are comparable with
    /// revisions; other servers, including Parapet, restart their event ids at each start.
    latest_revision: Option<u64>,
    /// Since when polls have returned only older revisions.
    older_polls_since: Option<Instant>,
    /// Since when streams have sent only older revisions.
    older_events_since: Option<Instant>,
    view: TokenView,
    /// The round in which upstream last confirmed this document.
    confirmed_round: Option<u64>,
    status: DocumentStatus,
}

/// Why a document is present.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum DocumentStatus {
    /// Its token is in use.
    InUse,
    /// Its token is no longer in use, but it is newer than the others' documents.
    Retired,
    /// It is from an earlier run, and upstream has not yet responded to all tokens in use.
    Inherited,
}

impl FetchedDocuments {
    /// Starts with the flags that are served, from an earlier run.
    pub(super) fn new(served: Option<&ServedSnapshot>, now: Instant) -> Self {
        let mut documents = Self {
            by_token: BTreeMap::new(),
            precedence: TokenPrecedence::default(),
            replaced: Vec::new(),
            deferred_removals: Vec::new(),
            round: 0,
            sequence: 0,
            has_changes: false,
        };
        if let Some(served) = served {
            documents.inherit(served.projects().clone(), Arc::clone(served.document()), now);
        }
        documents
    }

    fn inherit(&mut self, projects: Projects, document: Arc<Document>, now: Instant) {
        let digest = inherited_digest();
        let (states, run) = (PartHashes::from_document(&document), document.previous_run());
        self.precedence.inherit(&digest, &projects, &states, run, now);
        let view = TokenView::new(projects, document, self.sequence);
        let source = TokenDocument {
            etag: None,
            event_id: None,
            revision: None,
            latest_revision: run.and_then(|it| it.upstream_revision),
            older_polls_since: None,
            older_events_since: None,
            view,
            confirmed_round: None,
            status: DocumentStatus::Inherited,
        };
        self.by_token.insert(digest, source);
    }

    /// Begins a round in which every token in use is polled.
    pub(super) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// The entity tag for a conditional request with a token.
    pub(super) fn etag(&self, token: &TokenDigest) -> Option<&str> {
        self.by_token.get(token)?.etag.as_deref()
    }

    /// The event id of a token's document, to resume its stream from.
    pub(super) fn event_id(&self, token: &TokenDigest) -> Option<EventId> {
        self.by_token.get(token)?.event_id
    }

    /// The last known document of a token.
    pub(super) fn document(&self, token: &TokenDigest) -> Option<&Arc<Document>> {
        Some(&self.by_token.get(token)?.view.document)
    }

    /// Whether to ignore a response because its revision is older than the token's latest. Returns
    /// `false` after a minute of older revisions: upstream was then restored to an earlier state.
    pub(super) fn is_stale_response(
        &mut self,
        token: &TokenDigest,
        revision: Option<u64>,
        now: Instant,
    ) -> bool {
        let Some(source) = self.by_token.get_mut(token) else { return false };
        is_older_revision(revision, source.latest_revision, &mut source.older_polls_since, now)
    }

    /// Whether to ignore a stream event because its id is older than the token's latest revision.
    /// Returns `false` after a minute, even if polls confirm the newer revision meanwhile: an upstream
    /// may count event ids and entity tags separately.
    pub(super) fn is_stale_event(
        &mut self,
        token: &TokenDigest,
        event: Option<EventId>,
        now: Instant,
    ) -> bool {
        let Some(source) = self.by_token.get_mut(token) else { return false };
        let revision = event.map(u64::from);
        is_older_revision(revision, source.latest_revision, &mut source.older_events_since, now)
    }

    /// Records that a token's document is current.
    pub(super) fn confirm(&mut self, credential: &Credential, now: Instant) {
        let digest = credential.token.digest();
        let Some(source) = self.by_token.get_mut(&digest) else { return };
        source.confirmed_round = Some(self.round);
        source.older_polls_since = None;
        self.precedence.confirm(&digest, now);
        let view = &mut source.view;
        if source.status != DocumentStatus::InUse {
            source.status = DocumentStatus::InUse;
            let states = PartHashes::from_document(&view.document);
            self.precedence.observe(&digest, &view.projects, &states, source.revision, now);
            self.has_changes = true;
        }
        if view.projects != credential.projects {
            view.is_narrowed |= !credential.projects.covers(&view.projects);
            view.projects = credential.projects.clone();
            // Both identify the state before the change of projects.
            (source.etag, source.event_id) = (None, None);
            let states = PartHashes::from_document(&view.document);
            self.precedence.observe(&digest, &view.projects, &states, source.revision, now);
            self.has_changes = true;
        }
    }

    /// Stores a fetched document; `is_changed` is whether its flags differ from the previous ones.
    pub(super) fn insert(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        received: FetchedDocument,
        is_changed: bool,
        now: Instant,
    ) {
        let digest = credential.token.digest();
        match self.by_token.get_mut(&digest) {
            Some(source) if !is_changed => {
                source.revision = source.revision.max(received.revision);
                source.latest_revision = source.latest_revision.max(received.revision);
                self.precedence.raise_revision(&digest, received.revision);
                self.confirm(credential, now);
                if let Some(source) = self.by_token.get_mut(&digest) {
                    source.etag = etag;
                }
            }
            _ => self.replace_document(credential, (etag, None), received, now),
        }
    }

    /// Applies the state of a stream: its event id, and the document if it has changed.
    pub(super) fn apply_stream_flags(
        &mut self,
        credential: &Credential,
        event: Option<EventId>,
        changed: Option<FetchedDocument>,
        now: Instant,
    ) {
        self.begin_round();
        if let Some(received) = changed {
            // The old entity tag identifies other flags: a 304 would wrongly confirm these.
            self.replace_document(credential, (None, event), received, now);
            return;
        }
        self.confirm(credential, now);
        if let Some(source) = self.by_token.get_mut(&credential.token.digest()) {
            source.event_id = event;
            source.older_events_since = None;
            source.latest_revision = source.latest_revision.max(event_revision(source, event));
        }
    }

    /// Defers until `until` the removal of the flags named `removed`, which a token no longer sees, because
    /// another token may still report them. Skips flags that another token already reports in another
    /// project, and flags that are no longer published. Returns whether any removal was deferred.
    pub(super) fn defer_removal(
        &mut self,
        credential: &Credential,
        removed: &[Arc<str>],
        until: Instant,
    ) -> bool {
        let Some(document) = self.document(&credential.token.digest()) else { return false };
        let is_reported = |feature: &Feature| {
            let mut reported =
                self.by_token.values().filter_map(|it| it.view.document.feature(feature.name()));
            reported.any(|it| !credential.projects.contains(it.project()))
        };
        let is_published = |feature: &Feature| {
            let leader = self.precedence.leader_of_project(feature.project());
            leader.and_then(|leader| self.document(leader)).is_none_or(|newest| {
                let newest = newest.feature(feature.name());
                newest.is_some_and(|it| it.project() == feature.project())
            })
        };
        let removed = removed.iter().filter_map(|name| document.feature(name));
        let removed = removed.filter(|feature| is_published(feature) && !is_reported(feature));
        let removed: Vec<_> = removed.cloned().collect();
        if removed.is_empty() {
            return false;
        }
        let ids: BTreeSet<_> = removed.iter().flat_map(Feature::segment_ids).collect();
        let segments = ids.into_iter().filter_map(|id| document.segment(*id)).cloned().collect();
        self.deferred_removals.push((until, Arc::new(Document::from_parts(removed, segments))));
        true
    }

    /// Removes flags whose deferral has expired, and lets timeouts decide which states are the newest.
    /// `last_activity` is when data last arrived on each token's stream.
    pub(super) fn advance_time(
        &mut self,
        now: Instant,
        last_activity: impl IntoIterator<Item = (TokenDigest, Instant)>,
    ) {
        let before = self.deferred_removals.len();
        self.deferred_removals.retain(|(until, _)| *until > now);
        self.has_changes |= self.deferred_removals.len() != before;
        for (token, at) in last_activity {
            self.precedence.confirm(&token, at);
        }
        self.has_changes |= self.precedence.resolve_timeouts(now);
    }

    /// When to call [`FetchedDocuments::advance_time`] next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let removed_at = self.deferred_removals.first().map(|(until, _)| *until);
        removed_at.into_iter().chain(self.precedence.next_timeout()).min()
    }

    /// When to poll again to confirm responses that do not count yet.
    pub(super) fn next_recheck(&self) -> Option<Instant> {
        self.precedence.next_recheck()
    }

    /// The upstream revision of all documents, if it is known and the same for each token.
    pub(super) fn common_revision(&self) -> Option<u64> {
        let mut revisions = self.by_token.values().map(|source| source.latest_revision);
        let first = revisions.next()?;
        first.filter(|_| revisions.all(|other| other == first))
    }

    /// When the documents of all these tokens were last known to be current: the oldest confirmation.
    pub(super) fn confirmed_at(&self, tokens: &[Credential]) -> Option<Instant> {
        let confirmed = tokens.iter().map(|it| self.precedence.confirmed_at(&it.token.digest()));
        confirmed.min().flatten()
    }

    /// Clears the event id, so that the token's next stream starts with a full state.
    pub(super) fn clear_event_id(&mut self, token: &TokenDigest) {
        if let Some(source) = self.by_token.get_mut(token) {
            source.event_id = None;
        }
    }

    fn replace_document(
        &mut self,
        credential: &Credential,
        (etag, event_id): (Option<String>, Option<EventId>),
        FetchedDocument { document, states, intermediate_states, revision }: FetchedDocument,
        now: Instant,
    ) {
        self.sequence += 1;
        self.has_changes = true;
        let (digest, projects) = (credential.token.digest(), credential.projects.clone());
        for states in intermediate_states.iter().chain([&states]) {
            self.precedence.observe(&digest, &projects, states, revision, now);
        }
        let is_alone = self.by_token.len() == 1;
        let before = self.by_token.remove(&digest);
        let streamed = before.as_ref().and_then(|it| event_revision(it, event_id));
        let latest_revision = revision.or(streamed);
        // A poll (without event id) does not change what is known about streams.
        let older_events_since =
            before.as_ref().and_then(|it| it.older_events_since).filter(|_| event_id.is_none());
        let before = before.map(|it| it.view);
        let view = match &before {
            Some(before) if !is_alone => before.next(projects, document, self.sequence),
            // No other document has flags with the same names.
            _ => TokenView::new(projects, document, self.sequence),
        };
        let source = TokenDocument {
            etag,
            event_id,
            revision,
            latest_revision,
            older_polls_since: None,
            older_events_since,
            view,
            confirmed_round: Some(self.round),
            status: DocumentStatus::InUse,
        };
        self.by_token.insert(digest, source);
        self.replaced.extend(before.map(|it| it.document));
    }

    /// Completes a round. Returns true if upstream has responded to every token in use or streams to it
    /// (`followed`). Flags that no token in use sees are then removed.
    ///
    /// While more tokens are expected (`is_complete` is false), flags of an earlier run that no token in
    /// use sees stay, and are not confirmed.
    pub(super) fn complete_round(
        &mut self,
        in_use: &[Credential],
        followed: &BTreeSet<TokenDigest>,
        is_complete: bool,
    ) -> bool {
        if !self.is_confirmed_in_round(in_use, followed) {
            return false;
        }
        let used: BTreeSet<_> = in_use.iter().map(|it| it.token.digest()).collect();
        let seen = in_use.iter().fold(no_projects(), |seen, it| seen.union(&it.projects));
        let is_needed = |it: &TokenDocument| !seen.covers(&it.view.projects);
        if !is_complete && self.inherited().is_some_and(is_needed) {
            return false;
        }
        let Self { by_token, precedence, .. } = self;
        let mut is_less = false;
        by_token.retain(|token, source| {
            // An unused document with the newest state of a project stays until others have that state.
            let is_used = used.contains(token);
            let stays = is_used || precedence.retire(token, &seen);
            is_less |= !stays || !is_used && source.status != DocumentStatus::Retired;
            source.status = if is_used { DocumentStatus::InUse } else { DocumentStatus::Retired };
            stays
        });
        self.has_changes |= is_less;
        true
    }

    /// Whether there are tokens in use, and upstream has confirmed the document of each in this round or
    /// streams to it (`followed`).
    pub(super) fn is_confirmed_in_round(
        &self,
        in_use: &[Credential],
        followed: &BTreeSet<TokenDigest>,
    ) -> bool {
        let is_confirmed = |credential: &Credential| {
            let token = credential.token.digest();
            let source = self.by_token.get(&token);
            source.is_some_and(|it| {
                it.confirmed_round == Some(self.round) || followed.contains(&token)
            })
        };
        !in_use.is_empty() && in_use.iter().all(is_confirmed)
    }

    /// Whether upstream has responded to any token in this round.
    pub(super) fn has_response_in_round(&self) -> bool {
        self.by_token.values().any(|source| source.confirmed_round == Some(self.round))
    }

    /// Whether there are flags of an earlier run, which wait for responses to more tokens.
    pub(super) fn has_inherited(&self) -> bool {
        self.inherited().is_some()
    }

    fn inherited(&self) -> Option<&TokenDocument> {
        self.by_token.values().find(|source| source.status == DocumentStatus::Inherited)
    }

    /// Whether there are unpublished changes.
    pub(super) fn has_changes(&self) -> bool {
        self.has_changes
    }

    /// Records that all changes are published.
    pub(super) fn mark_published(&mut self) {
        self.has_changes = false;
    }

    /// The views to merge and publish.
    pub(super) fn merge_input(&self) -> MergeInput {
        let mut leaders = HashMap::new();
        if self.by_token.len() > 1 {
            let places: HashMap<_, _> = self.by_token.keys().zip(0..).collect();
            let of_unit = |(unit, token)| Some((DocumentPart::clone(unit), *places.get(token)?));
            leaders.extend(self.precedence.leaders().filter_map(of_unit));
        }
        let view = |source: &TokenDocument| {
            let mut view = source.view.clone();
            // A retired document contributes only the parts in which it leads.
            if source.status == DocumentStatus::Retired {
                (view.projects, view.is_narrowed) = (no_projects(), true);
            }
            view
        };
        let views = self.by_token.values().map(view).collect();
        let deferred_removals =
            self.deferred_removals.iter().map(|(_, document)| Arc::clone(document)).collect();
        MergeInput { views, leaders, deferred_removals }
    }

    /// Takes the documents replaced since the last call. Dropping thousands of flags takes milliseconds,
    /// so drop them on a blocking thread.
    pub(super) fn take_replaced(&mut self) -> Vec<Arc<Document>> {
        mem::take(&mut self.replaced)
    }

    /// The projects of which [`FetchedDocuments::merge_input`] has every flag.
    pub(super) fn projects(&self) -> Projects {
        let documents = self.by_token.values().filter(|it| it.status != DocumentStatus::Retired);
        documents.fold(no_projects(), |seen, source| seen.union(&source.view.projects))
    }
}

/// The digest under which flags of an earlier run are stored: no known token has it.
fn inherited_digest() -> TokenDigest {
    TokenDigest::from_bytes([0; 32])
}

/// Whether a revision is older than the `known` one, and this has not yet lasted for
/// [`OLDER_REVISION_TIMEOUT`].
fn is_older_revision(
    revision: Option<u64>,
    known: Option<u64>,
    since: &mut Option<Instant>,
    now: Instant,
) -> bool {
    let (Some(revision), Some(known)) = (revision, known) else { return false };
    if revision >= known {
        return false;
    }
    now.saturating_duration_since(*since.get_or_insert(now)) < OLDER_REVISION_TIMEOUT
}

/// The event id as a revision, if upstream has sent revisions before.
fn event_revision(source: &TokenDocument, event: Option<EventId>) -> Option<u64> {
    source.latest_revision.and(event.map(u64::from))
}

fn no_projects() -> Projects {
    Projects::Only(BTreeSet::new())
}

#[cfg(test)]
mod tests;
