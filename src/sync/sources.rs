//! Merges the documents that the tokens of one environment have fetched into one document.
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
//! If several tokens see a project, the newest of their states is published ([`Precedence`]).
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

use super::precedence::{Precedence, States, Unit};
use crate::{
    snapshot::Snapshot,
    token::{Projects, TokenDigest},
    upstream::Credential,
    wire::{
        delta::EventId,
        features::{Document, Feature, Segment},
    },
};

/// How long responses and streams with an older revision than the known one are ignored: another replica
/// of upstream responded, or upstream was restored from a backup.
const OLDER_REVISION_FOR: Duration = Duration::from_mins(1);

/// The last document of each token, and whether there are unpublished changes.
#[derive(Debug)]
pub(super) struct Sources {
    fetched: BTreeMap<TokenDigest, Source>,
    precedence: Precedence,
    /// Documents that were replaced by newer ones, still to be dropped.
    replaced: Vec<Arc<Document>>,
    /// Flags that a token no longer sees and another may still report, with the time of their removal,
    /// the earliest first.
    held: Vec<(Instant, Arc<Document>)>,
    round: u64,
    /// The number of documents inserted so far.
    count: u64,
    dirty: bool,
}

/// A fetched document, with the states of its parts.
#[derive(Debug)]
pub(super) struct Received {
    document: Arc<Document>,
    states: States,
    /// The known states between the previous document and this one.
    passed: Vec<States>,
    revision: Option<u64>,
}

impl Received {
    /// Hashes the document, in time linear in its text.
    pub(super) fn new(document: Document) -> Self {
        let states = States::of(&document);
        Self { document: Arc::new(document), states, passed: Vec::new(), revision: None }
    }

    /// Adds the states between the previous document and this one.
    pub(super) fn having_passed(self, documents: &[Document]) -> Self {
        Self { passed: documents.iter().map(States::of).collect(), ..self }
    }

    /// Sets the revision, if it is comparable between tokens.
    pub(super) fn with_revision(self, revision: Option<u64>) -> Self {
        Self { revision, ..self }
    }
}

#[derive(Debug)]
struct Source {
    etag: Option<String>,
    event: Option<EventId>,
    revision: Option<u64>,
    /// The newest revision from an entity tag or a stream. Only Unleash's event ids are comparable with
    /// revisions; other servers, including Parapet, restart their event ids at each start.
    latest_revision: Option<u64>,
    /// Since when polls have returned only older revisions.
    older_since: Option<Instant>,
    /// Since when streams have sent only older revisions.
    older_events_since: Option<Instant>,
    part: Part,
    /// The round in which upstream last confirmed this document.
    confirmed: Option<u64>,
    standing: Standing,
}

/// Why a document is present.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    /// Its token is in use.
    InUse,
    /// Its token is no longer in use, but it is newer than the others' documents.
    Retired,
    /// It is from an earlier run, and upstream has not yet responded to all tokens in use.
    Inherited,
}

/// The input of [`merge`].
#[derive(Debug)]
pub(super) struct Parts {
    fetched: Vec<Part>,
    /// The index of the view with the newest state; empty if there is only one view.
    leaders: HashMap<Unit, usize>,
    /// Flags that are published unless a view contains them.
    held: Vec<Arc<Document>>,
}

/// The flags that a token sees.
#[derive(Clone, Debug)]
struct Part {
    projects: Projects,
    document: Arc<Document>,
    /// The token once saw more projects: flags of other projects are not its own.
    is_narrowed: bool,
    /// The sequence number of the token's first document.
    first: u64,
    /// The sequence number of the document in which a flag appeared, if it was not in the first.
    appeared: Arc<HashMap<Arc<str>, u64>>,
}

impl Part {
    /// Whether a flag of a project without a leader may be published.
    fn may_show(&self, project: &str) -> bool {
        !self.is_narrowed || self.projects.contains(project)
    }

    fn sequence_of(&self, name: &str) -> u64 {
        self.appeared.get(name).copied().unwrap_or(self.first)
    }
}

impl Sources {
    /// Starts with the flags that are served, from an earlier run.
    pub(super) fn new(served: Option<&Snapshot>, now: Instant) -> Self {
        let mut documents = Self {
            fetched: BTreeMap::new(),
            precedence: Precedence::default(),
            replaced: Vec::new(),
            held: Vec::new(),
            round: 0,
            count: 0,
            dirty: false,
        };
        if let Some(served) = served {
            documents.inherit(served.projects().clone(), Arc::clone(served.document()), now);
        }
        documents
    }

    fn inherit(&mut self, projects: Projects, document: Arc<Document>, now: Instant) {
        let digest = nobody();
        let (states, run) = (States::of(&document), document.previous_run());
        self.precedence.inherit(&digest, &projects, &states, run, now);
        let appeared = Arc::default();
        let view = Part { projects, document, is_narrowed: false, first: self.count, appeared };
        let source = Source {
            etag: None,
            event: None,
            revision: None,
            latest_revision: run.and_then(|it| it.upstream_revision),
            older_since: None,
            older_events_since: None,
            part: view,
            confirmed: None,
            standing: Standing::Inherited,
        };
        self.fetched.insert(digest, source);
    }

    /// Begins a round in which every token in use is polled.
    pub(super) fn begin(&mut self) {
        self.round += 1;
    }

    /// The entity tag for a conditional request with a token.
    pub(super) fn etag(&self, token: &TokenDigest) -> Option<&str> {
        self.fetched.get(token)?.etag.as_deref()
    }

    /// The event id of a token's document, to resume its stream from.
    pub(super) fn event(&self, token: &TokenDigest) -> Option<EventId> {
        self.fetched.get(token)?.event
    }

    /// The last known document of a token.
    pub(super) fn document(&self, token: &TokenDigest) -> Option<&Arc<Document>> {
        Some(&self.fetched.get(token)?.part.document)
    }

    /// Whether to ignore a response because its revision is older than the token's latest. Returns
    /// `false` after a minute of older revisions: upstream was then restored to an earlier state.
    pub(super) fn is_outdated(
        &mut self,
        token: &TokenDigest,
        revision: Option<u64>,
        now: Instant,
    ) -> bool {
        let Some(source) = self.fetched.get_mut(token) else { return false };
        is_older(revision, source.latest_revision, &mut source.older_since, now)
    }

    /// Whether to ignore a stream event because its id is older than the token's latest revision.
    /// Returns `false` after a minute, even if polls confirm the newer revision meanwhile: an upstream
    /// may count event ids and entity tags separately.
    pub(super) fn is_event_outdated(
        &mut self,
        token: &TokenDigest,
        event: Option<EventId>,
        now: Instant,
    ) -> bool {
        let Some(source) = self.fetched.get_mut(token) else { return false };
        let revision = event.map(u64::from);
        is_older(revision, source.latest_revision, &mut source.older_events_since, now)
    }

    /// Records that a token's document is current.
    pub(super) fn confirm(&mut self, credential: &Credential, now: Instant) {
        let digest = credential.token.digest();
        let Some(source) = self.fetched.get_mut(&digest) else { return };
        source.confirmed = Some(self.round);
        source.older_since = None;
        self.precedence.confirm(&digest, now);
        let view = &mut source.part;
        if source.standing != Standing::InUse {
            source.standing = Standing::InUse;
            let states = States::of(&view.document);
            self.precedence.observe(&digest, &view.projects, &states, source.revision, now);
            self.dirty = true;
        }
        if view.projects != credential.projects {
            view.is_narrowed |= !credential.projects.covers(&view.projects);
            view.projects = credential.projects.clone();
            // Both identify the state before the change of projects.
            (source.etag, source.event) = (None, None);
            let states = States::of(&view.document);
            self.precedence.observe(&digest, &view.projects, &states, source.revision, now);
            self.dirty = true;
        }
    }

    /// Stores a fetched document; `is_changed` is whether its flags differ from the previous ones.
    pub(super) fn insert(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        received: Received,
        is_changed: bool,
        now: Instant,
    ) {
        let digest = credential.token.digest();
        match self.fetched.get_mut(&digest) {
            Some(source) if !is_changed => {
                source.revision = source.revision.max(received.revision);
                source.latest_revision = source.latest_revision.max(received.revision);
                self.precedence.reach_revision(&digest, received.revision);
                self.confirm(credential, now);
                if let Some(source) = self.fetched.get_mut(&digest) {
                    source.etag = etag;
                }
            }
            _ => self.put(credential, (etag, None), received, now),
        }
    }

    /// Applies the state of a stream: its event id, and the document if it has changed.
    pub(super) fn follow(
        &mut self,
        credential: &Credential,
        event: Option<EventId>,
        changed: Option<Received>,
        now: Instant,
    ) {
        self.begin();
        if let Some(received) = changed {
            // The old entity tag identifies other flags: a 304 would wrongly confirm these.
            self.put(credential, (None, event), received, now);
            return;
        }
        self.confirm(credential, now);
        if let Some(source) = self.fetched.get_mut(&credential.token.digest()) {
            source.event = event;
            source.older_events_since = None;
            source.latest_revision = source.latest_revision.max(event_revision(source, event));
        }
    }

    /// Defers until `until` the removal of the flags named `removed`, which a token no longer sees, because
    /// another token may still report them. Skips flags that another token already reports in another
    /// project, and flags that are no longer published. Returns whether any removal was deferred.
    pub(super) fn hold(
        &mut self,
        credential: &Credential,
        removed: &[Arc<str>],
        until: Instant,
    ) -> bool {
        let Some(document) = self.document(&credential.token.digest()) else { return false };
        let is_reported = |feature: &Feature| {
            let mut reported =
                self.fetched.values().filter_map(|it| it.part.document.feature(feature.name()));
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
        self.held.push((until, Arc::new(Document::from_parts(removed, segments))));
        true
    }

    /// Removes flags whose deferral has expired, and lets timeouts decide which states are the newest.
    /// `last_activity` is when data last arrived on each token's stream.
    pub(super) fn advance(
        &mut self,
        now: Instant,
        last_activity: impl IntoIterator<Item = (TokenDigest, Instant)>,
    ) {
        let before = self.held.len();
        self.held.retain(|(until, _)| *until > now);
        self.dirty |= self.held.len() != before;
        for (token, at) in last_activity {
            self.precedence.confirm(&token, at);
        }
        self.dirty |= self.precedence.settle(now);
    }

    /// When to call [`TokenDocuments::advance_time`] next.
    pub(super) fn next_change(&self) -> Option<Instant> {
        let held_until = self.held.first().map(|(until, _)| *until);
        held_until.into_iter().chain(self.precedence.next_decision()).min()
    }

    /// When to poll again to confirm responses that do not count yet.
    pub(super) fn next_question(&self) -> Option<Instant> {
        self.precedence.next_question()
    }

    /// The upstream revision of all documents, if it is known and the same for each token.
    pub(super) fn revision(&self) -> Option<u64> {
        let mut revisions = self.fetched.values().map(|source| source.latest_revision);
        let first = revisions.next()?;
        first.filter(|_| revisions.all(|other| other == first))
    }

    /// Clears the event id, so that the token's next stream starts with a full state.
    pub(super) fn forget_event(&mut self, token: &TokenDigest) {
        if let Some(source) = self.fetched.get_mut(token) {
            source.event = None;
        }
    }

    fn put(
        &mut self,
        credential: &Credential,
        (etag, event_id): (Option<String>, Option<EventId>),
        Received { document, states, passed: intermediate_states, revision }: Received,
        now: Instant,
    ) {
        self.count += 1;
        self.dirty = true;
        let (digest, projects) = (credential.token.digest(), credential.projects.clone());
        for states in intermediate_states.iter().chain([&states]) {
            self.precedence.observe(&digest, &projects, states, revision, now);
        }
        let is_alone = self.fetched.len() == 1;
        let before = self.fetched.remove(&digest);
        let streamed = before.as_ref().and_then(|it| event_revision(it, event_id));
        let latest_revision = revision.or(streamed);
        // A poll (without event id) does not change what is known about streams.
        let older_events_since =
            before.as_ref().and_then(|it| it.older_events_since).filter(|_| event_id.is_none());
        let before = before.map(|it| it.part);
        let (initial_sequence, flag_sequences) = match &before {
            None => (self.count, Arc::default()),
            // No other document has flags with the same names.
            Some(_) if is_alone => (self.count, Arc::default()),
            Some(before) => (before.first, Arc::new(appeared(before, &document, self.count))),
        };
        let view = Part {
            projects,
            document,
            is_narrowed: false,
            first: initial_sequence,
            appeared: flag_sequences,
        };
        let source = Source {
            etag,
            event: event_id,
            revision,
            latest_revision,
            older_since: None,
            older_events_since,
            part: view,
            confirmed: Some(self.round),
            standing: Standing::InUse,
        };
        self.fetched.insert(digest, source);
        self.replaced.extend(before.map(|it| it.document));
    }

    /// Completes a round. Returns true if upstream has responded to every token in use or streams to it
    /// (`followed`). Flags that no token in use sees are then removed.
    ///
    /// While more tokens are expected (`is_complete` is false), flags of an earlier run that no token in
    /// use sees stay, and are not confirmed.
    pub(super) fn settle(
        &mut self,
        in_use: &[Credential],
        followed: &BTreeSet<TokenDigest>,
        is_complete: bool,
    ) -> bool {
        let used: BTreeSet<_> = in_use.iter().map(|it| it.token.digest()).collect();
        let current = |token: &TokenDigest| {
            let source = self.fetched.get(token);
            source.is_some_and(|it| it.confirmed == Some(self.round) || followed.contains(token))
        };
        if used.is_empty() || !used.iter().all(current) {
            return false;
        }
        let seen = in_use.iter().fold(nothing(), |seen, it| seen.union(&it.projects));
        let is_needed = |it: &Source| !seen.covers(&it.part.projects);
        if !is_complete && self.inherited().is_some_and(is_needed) {
            return false;
        }
        let Self { fetched, precedence, .. } = self;
        let mut is_less = false;
        fetched.retain(|token, source| {
            // An unused document with the newest state of a project stays until others have that state.
            let is_used = used.contains(token);
            let stays = is_used || precedence.retire(token, &seen);
            is_less |= !stays || !is_used && source.standing != Standing::Retired;
            source.standing = if is_used { Standing::InUse } else { Standing::Retired };
            stays
        });
        self.dirty |= is_less;
        true
    }

    /// Whether upstream has responded to any token in this round.
    pub(super) fn heard(&self) -> bool {
        self.fetched.values().any(|source| source.confirmed == Some(self.round))
    }

    /// Whether there are flags of an earlier run, which wait for responses to more tokens.
    pub(super) fn has_inherited(&self) -> bool {
        self.inherited().is_some()
    }

    fn inherited(&self) -> Option<&Source> {
        self.fetched.values().find(|source| source.standing == Standing::Inherited)
    }

    /// Whether there are unpublished changes.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Records that all changes are published.
    pub(super) fn published(&mut self) {
        self.dirty = false;
    }

    /// The views to merge and publish.
    pub(super) fn parts(&self) -> Parts {
        let mut leaders = HashMap::new();
        if self.fetched.len() > 1 {
            let places: HashMap<_, _> = self.fetched.keys().zip(0..).collect();
            let of_unit = |(unit, token)| Some((Unit::clone(unit), *places.get(token)?));
            leaders.extend(self.precedence.leaders().filter_map(of_unit));
        }
        let view = |source: &Source| {
            // A retired document contributes only the parts in which it leads.
            let is_retired = source.standing == Standing::Retired;
            let projects = if is_retired { nothing() } else { source.part.projects.clone() };
            let is_narrowed = is_retired || source.part.is_narrowed;
            Part { projects, is_narrowed, ..source.part.clone() }
        };
        let views = self.fetched.values().map(view).collect();
        let deferred_removals =
            self.held.iter().map(|(_, document)| Arc::clone(document)).collect();
        Parts { fetched: views, leaders, held: deferred_removals }
    }

    /// Takes the documents replaced since the last call. Dropping thousands of flags takes milliseconds,
    /// so drop them on a blocking thread.
    pub(super) fn take_replaced(&mut self) -> Vec<Arc<Document>> {
        mem::take(&mut self.replaced)
    }

    /// The projects of which [`TokenDocuments::merge_input`] has every flag.
    pub(super) fn projects(&self) -> Projects {
        let documents = self.fetched.values().filter(|it| it.standing != Standing::Retired);
        documents.fold(nothing(), |seen, source| seen.union(&source.part.projects))
    }
}

/// The digest under which flags of an earlier run are stored: no known token has it.
fn nobody() -> TokenDigest {
    TokenDigest::from_bytes([0; 32])
}

/// Whether a revision is older than the `known` one, and this has not yet lasted for
/// [`OLDER_REVISION_TIMEOUT`].
fn is_older(
    revision: Option<u64>,
    known: Option<u64>,
    since: &mut Option<Instant>,
    now: Instant,
) -> bool {
    let (Some(revision), Some(known)) = (revision, known) else { return false };
    if revision >= known {
        return false;
    }
    now.saturating_duration_since(*since.get_or_insert(now)) < OLDER_REVISION_FOR
}

/// The event id as a revision, if upstream has sent revisions before.
fn event_revision(source: &Source, event: Option<EventId>) -> Option<u64> {
    source.latest_revision.and(event.map(u64::from))
}

fn nothing() -> Projects {
    Projects::Only(BTreeSet::new())
}

/// The sequence number at which each flag appeared that was not in the token's first document.
fn appeared(before: &Part, document: &Document, count: u64) -> HashMap<Arc<str>, u64> {
    let came = |feature: &Feature| {
        let known = before.document.feature(feature.name());
        let stays = known.is_some_and(|known| known.project() == feature.project());
        if stays { before.appeared.get(feature.name()).copied() } else { Some(count) }
    };
    let features = document.features().iter();
    features.filter_map(|it| Some((Arc::clone(it.name()), came(it)?))).collect()
}

/// The union of all views: of each project and segment the newest state, and of two flags with the same
/// name the one that appeared later.
pub(super) fn merged(
    Parts { fetched: views, leaders, held: deferred_removals }: &Parts,
) -> Document {
    let leads = |at: usize, feature: &Feature| match leaders
        .get(&Unit::Project(Arc::clone(feature.project())))
    {
        Some(leader) => *leader == at,
        None => views[at].may_show(feature.project()),
    };
    let mut latest = HashMap::<&str, (u64, usize)>::new();
    if views.len() > 1 {
        for (at, view) in views.iter().enumerate() {
            for feature in view.document.features().iter().filter(|it| leads(at, it)) {
                let appeared = (view.sequence_of(feature.name()), at);
                let latest = latest.entry(feature.name()).or_insert(appeared);
                *latest = appeared.max(*latest);
            }
        }
    }
    let newest = views.iter().enumerate().map(|(at, view)| {
        let has_feature = |feature: &Feature| {
            leads(at, feature) && latest.get(&**feature.name()).is_none_or(|it| it.1 == at)
        };
        let has_segment = |segment: &Segment| {
            leaders.get(&Unit::Segment(segment.id())).is_none_or(|leader| *leader == at)
        };
        view.document.filter(has_feature, has_segment)
    });
    // In a merge later documents win, so deferred removals come first.
    let deferred = deferred_removals.iter().map(|document| Document::clone(document));
    Document::merge(deferred.chain(newest))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        token::{Environment, Scope, Token},
        wire::features::PreviousRun,
    };
    use proptest::{collection::vec, prelude::*};

    fn credential(projects: &[&str]) -> Credential {
        let token = Token::parse(&format!("[]:dev.{}", projects.concat())).unwrap();
        Credential { token, projects: Projects::from_list(projects.iter().copied()) }
    }

    /// Flags written as `project/name`.
    fn document(flags: &[&str]) -> Received {
        Received::new(parsed(flags))
    }

    fn parsed(flags: &[&str]) -> Document {
        let flag = |it: &&str| {
            let (project, name) = it.split_once('/').unwrap();
            format!(r#"{{"name":"{name}","project":"{project}"}}"#)
        };
        let flags: Vec<_> = flags.iter().map(flag).collect();
        Document::parse(format!(r#"{{"features":[{}]}}"#, flags.join(",")).as_bytes()).unwrap()
    }

    impl Sources {
        fn insert_now(
            &mut self,
            credential: &Credential,
            etag: Option<String>,
            received: Received,
            is_changed: bool,
        ) {
            self.insert(credential, etag, received, is_changed, Instant::now());
        }

        fn follow_now(
            &mut self,
            credential: &Credential,
            event: Option<EventId>,
            changed: Option<Received>,
        ) {
            self.follow(credential, event, changed, Instant::now());
        }

        fn confirm_now(&mut self, credential: &Credential) {
            self.confirm(credential, Instant::now());
        }

        fn release(&mut self, now: Instant) {
            self.advance(now, []);
        }
    }

    /// No token has a synced stream.
    const NOBODY: &BTreeSet<TokenDigest> = &BTreeSet::new();

    fn names(documents: &Sources) -> Vec<String> {
        let document = merged(&documents.parts());
        document.features().iter().map(|it| it.name().to_string()).collect()
    }

    #[test]
    fn changes_stay_unpublished_until_marked_as_published() {
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let mut documents = Sources::new(None, Instant::now());
        documents.begin();
        documents.insert_now(&one, Some("1".to_owned()), document(&["a/x"]), true);
        assert!(!documents.settle(&[one.clone(), two], NOBODY, true), "no response to the other");
        documents.begin();
        assert!(!documents.heard());
        documents.confirm_now(&one);
        assert!(documents.heard());
        assert!(documents.is_dirty(), "not yet published");
        documents.published();
        assert!(!documents.is_dirty());
        assert_eq!(documents.etag(&one.token.digest()), Some("1"));
    }

    #[test]
    fn replaced_documents_are_returned_once_for_dropping() {
        let one = credential(&["a"]);
        let mut documents = Sources::new(None, Instant::now());
        documents.insert_now(&one, None, document(&["a/x"]), true);
        assert!(documents.take_replaced().is_empty());
        let first = Arc::downgrade(documents.document(&one.token.digest()).unwrap());
        documents.insert_now(&one, None, document(&["a/y"]), true);
        documents.follow_now(&one, None, Some(document(&["a/z"])));
        let replaced = documents.take_replaced();
        assert_eq!((replaced.len(), first.strong_count()), (2, 1));
        assert!(documents.take_replaced().is_empty());
    }

    #[test]
    fn flags_of_a_token_stay_until_upstream_responds_to_all_tokens_in_use() {
        let (one, two, all) = (credential(&["a"]), credential(&["b"]), credential(&["*"]));
        let mut documents = Sources::new(None, Instant::now());
        documents.begin();
        documents.insert_now(&one, None, document(&["a/x"]), true);
        documents.insert_now(&two, None, document(&["b/y"]), true);
        assert!(documents.settle(&[one.clone(), two.clone()], NOBODY, true));
        documents.published();
        documents.begin();
        documents.confirm_now(&two);
        assert!(
            !documents.settle(&[two.clone(), one.clone()], NOBODY, true),
            "one is refused and still in use"
        );
        assert!(
            !documents.settle(std::slice::from_ref(&all), NOBODY, true),
            "no response to the wider one yet"
        );
        assert!(!documents.settle(&[], NOBODY, true), "there is no token at all");
        assert_eq!(
            (names(&documents).as_slice(), documents.is_dirty()),
            (&["x", "y"].map(String::from)[..], false)
        );
        documents.begin();
        documents.insert_now(&all, None, document(&["a/w", "b/y", "c/z"]), true);
        let later = Instant::now() + Duration::from_secs(10);
        documents.confirm(&all, later);
        assert!(documents.settle(&[all], NOBODY, true));
        documents.advance(later, []);
        assert_eq!(names(&documents), ["w", "y", "z"]);
    }

    #[test]
    fn newest_state_of_a_project_that_two_tokens_see_is_published() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let mut documents = Sources::new(None, Instant::now());
        documents.begin();
        documents.insert_now(&one, None, document(&["a/x", "b/old"]), true);
        documents.insert_now(&two, None, document(&["b/old", "c/z"]), true);
        // The first is ahead: the flag of b has changed there.
        documents.follow_now(&one, Some(2), Some(document(&["a/x", "b/new"])));
        assert_eq!(names(&documents), ["new", "x", "z"]);
        // The second lags: it now receives an earlier change, of c only.
        documents.follow_now(&two, Some(1), Some(document(&["b/old", "c/y"])));
        assert_eq!(names(&documents), ["new", "x", "y"], "an older state is published again");
        documents.begin();
        documents.confirm_now(&two);
        assert_eq!(names(&documents), ["new", "x", "y"], "an old state is confirmed");
        // It catches up, and is the first to see the next change.
        documents.follow_now(&two, Some(2), Some(document(&["b/new", "c/y"])));
        documents.follow_now(&two, Some(3), Some(document(&["c/y"])));
        assert_eq!(names(&documents), ["x", "y"], "a removal counts as a change");
        documents.follow_now(&one, Some(3), Some(document(&["a/w", "b/new"])));
        assert_eq!(names(&documents), ["w", "y"]);
    }

    #[test]
    fn removal_is_not_deferred_again_for_lagging_token() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let (mut documents, later) =
            (Sources::new(None, Instant::now()), Instant::now() + Duration::from_secs(1));
        documents.insert_now(&one, None, document(&["b/gone"]), true);
        documents.insert_now(&two, None, document(&["b/gone"]), true);
        assert!(documents.hold(&one, &[Arc::from("gone")], later));
        documents.follow_now(&one, None, Some(document(&[])));
        documents.release(later);
        assert_eq!(names(&documents), [""; 0]);
        assert!(!documents.hold(&two, &[Arc::from("gone")], later), "it is not published");
        documents.follow_now(&two, None, Some(document(&[])));
        assert_eq!(names(&documents), [""; 0]);
    }

    #[test]
    fn older_revision_is_ignored_for_one_minute() {
        let one = credential(&["a"]);
        let (digest, start) = (one.token.digest(), Instant::now());
        let mut documents = Sources::new(None, Instant::now());
        let received = |flag: &str, revision| document(&[flag]).with_revision(Some(revision));
        documents.insert(&one, None, received("a/new", 7), true, start);
        assert!(!documents.is_outdated(&digest, Some(7), start));
        assert!(!documents.is_outdated(&digest, None, start), "not every upstream sends revisions");
        assert!(documents.is_outdated(&digest, Some(6), start));
        let later = start + OLDER_REVISION_FOR;
        assert!(!documents.is_outdated(&digest, Some(6), later), "upstream was restored");
        documents.confirm(&one, later);
        assert!(
            documents.is_outdated(&digest, Some(6), later),
            "confirmed since: the minute restarts"
        );
    }

    #[test]
    fn event_ids_and_revisions_are_compared_if_upstream_sends_revisions() {
        let one = credential(&["a"]);
        let (digest, start) = (one.token.digest(), Instant::now());
        let state = |flag: &str, revision| document(&[flag]).with_revision(revision);
        let later = start + OLDER_REVISION_FOR;
        let mut documents = Sources::new(None, Instant::now());
        documents.insert(&one, None, state("a/x", Some(9)), true, start);
        assert!(!documents.is_event_outdated(&digest, Some(9), start));
        documents.follow(&one, Some(10), Some(state("a/y", None)), start);
        assert!(
            documents.is_outdated(&digest, Some(9), start),
            "a poll that lags behind the stream"
        );
        assert!(documents.is_event_outdated(&digest, Some(9), start), "another stream");
        assert!(!documents.is_event_outdated(&digest, None, start));
        // Polls that confirm the state do not block streams for longer than a minute.
        documents.confirm(&one, later);
        assert!(documents.is_outdated(&digest, Some(9), later));
        assert!(!documents.is_event_outdated(&digest, Some(9), later));
        // A stream that is accepted again restarts the minute.
        documents.follow(&one, Some(11), None, later);
        assert!(documents.is_event_outdated(&digest, Some(10), later));
        documents.insert(&one, None, state("a/z", Some(12)), true, later);
        assert!(documents.is_event_outdated(&digest, Some(11), later), "a stream that lags behind");

        // Without revisions, event ids are not comparable.
        documents.insert(&one, None, state("a/x", None), true, start);
        documents.follow(&one, Some(10), Some(state("a/y", None)), start);
        assert!(!documents.is_event_outdated(&digest, Some(1), start));
        assert!(!documents.is_outdated(&digest, Some(1), start));
    }

    #[test]
    fn flags_of_replaced_token_stay_until_its_successor_has_them() {
        let (one, all) = (credential(&["a"]), credential(&["*"]));
        let (mut documents, start) = (Sources::new(None, Instant::now()), Instant::now());
        documents.insert(&one, None, document(&["a/new"]), true, start);
        // Another replica of upstream responds to the wider token.
        documents.begin();
        documents.insert(&all, None, document(&["a/old", "b/y"]), true, start);
        assert!(documents.settle(std::slice::from_ref(&all), NOBODY, true));
        assert_eq!(
            (names(&documents).as_slice(), documents.projects()),
            (&["new", "y"].map(String::from)[..], Projects::All)
        );
        documents.begin();
        documents.insert(&all, None, document(&["a/new", "b/y"]), true, start);
        assert!(documents.settle(std::slice::from_ref(&all), NOBODY, true));
        assert_eq!((names(&documents).len(), documents.fetched.len()), (2, 1));
    }

    #[test]
    fn token_with_fewer_projects_contributes_no_flags_of_the_others() {
        let mut one = credential(&["a", "b"]);
        let mut documents = Sources::new(None, Instant::now());
        let etag = Some("tag".to_owned());
        documents.insert_now(&one, etag, document(&["a/x", "b/y"]), true);
        one.projects = Projects::from_list(["a"]);
        documents.begin();
        documents.confirm_now(&one);
        assert!(documents.settle(std::slice::from_ref(&one), NOBODY, true));
        assert_eq!(
            (names(&documents), documents.projects()),
            (vec!["x".into()], one.projects.clone())
        );
        assert_eq!(documents.etag(&one.token.digest()), None, "it identified the state before");
    }

    #[test]
    fn equal_flags_are_no_change_and_keep_their_document() {
        let one = credential(&["a"]);
        let mut documents = Sources::new(None, Instant::now());
        documents.insert_now(&one, None, document(&["a/x"]), true);
        documents.published();
        let before = Arc::clone(documents.document(&one.token.digest()).unwrap());
        documents.begin();
        documents.insert_now(&one, Some("new".to_owned()), document(&["a/x"]), false);
        assert!(!documents.is_dirty() && documents.heard());
        assert!(Arc::ptr_eq(&before, documents.document(&one.token.digest()).unwrap()));
        assert_eq!(documents.etag(&one.token.digest()), Some("new"));
    }

    /// An action of a fake upstream, or a change of a token's view of it.
    #[derive(Clone, Debug)]
    enum Step {
        /// Changes a project.
        Change(usize),
        /// Moves a token's view on by up to `by` changes, by a poll or by its stream.
        Advance { token: usize, by: usize, by_stream: bool },
        /// Sets which tokens are in use; upstream responds to all of them.
        Use(Vec<bool>),
        /// Restarts the edge with its stored flags.
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..3_usize).prop_map(Step::Change),
            6 => (0..3_usize, 0..4_usize, any::<bool>())
                .prop_map(|(token, by, by_stream)| Step::Advance { token, by, by_stream }),
            1 => vec(any::<bool>(), 3).prop_map(Step::Use),
            1 => Just(Step::Restart),
        ]
    }

    /// The document of two of three projects after `changes`: a flag and a segment each, named after the
    /// number of the project's changes.
    fn seen(projects: [usize; 2], changes: &[usize]) -> Received {
        let count = |project| changes.iter().filter(|it| **it == project).count();
        let flags =
            projects.map(|it| format!(r#"{{"name":"{it}-{}","project":"p{it}"}}"#, count(it)));
        let segments = projects.map(|it| format!(r#"{{"id":{it},"n":{}}}"#, count(it)));
        let (flags, segments) = (flags.join(","), segments.join(","));
        let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
        Received::new(Document::parse(text.as_bytes()).unwrap())
    }

    /// The number of changes of each project, according to the published flags.
    fn published(documents: &Sources) -> BTreeMap<usize, usize> {
        let document = merged(&documents.parts());
        let flags = document.features().iter().map(|it| {
            let (project, count) = it.name().split_once('-').unwrap();
            (project.parse().unwrap(), count.parse().unwrap())
        });
        let flags: Vec<(usize, usize)> = flags.collect();
        let published: BTreeMap<_, _> = flags.iter().copied().collect();
        assert_eq!(published.len(), flags.len(), "two states of a project: {flags:?}");
        published
    }

    /// The documents of the next run, restored from what these would store.
    fn restarted(documents: &Sources, now: Instant) -> Sources {
        let document = merged(&documents.parts());
        let flags: Vec<_> = document.features().iter().map(Feature::raw).collect();
        let segments: Vec<_> = document.segments().iter().map(Segment::raw).collect();
        let (flags, segments) = (flags.join(","), segments.join(","));
        let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
        let run = PreviousRun { upstream_revision: documents.revision() };
        let stored = Document::encode_stored(text.as_bytes(), run);
        let document = Document::parse_stored(&stored).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: documents.projects() };
        Sources::new(Some(&Snapshot::build(scope, document, None)), now)
    }

    proptest! {
        /// Each token's view moves forward through one history, with an arbitrary lag.
        #[test]
        fn no_project_goes_back_while_any_token_lags(
            steps in vec(step(), 1..60),
            has_revisions in any::<bool>(),
        ) {
            const SEES: [[usize; 2]; 3] = [[0, 1], [1, 2], [0, 2]];
            let tokens = SEES.map(|[a, b]| credential(&[&format!("p{a}"), &format!("p{b}")]));
            let followed: BTreeSet<_> = tokens.iter().map(|it| it.token.digest()).collect();
            let (mut documents, start) = (Sources::new(None, Instant::now()), Instant::now());
            let (mut changes, mut views) = (Vec::new(), [0; 3]);
            let mut used = vec![true; 3];
            let seen = |projects, changes: &[usize]| {
                let revision = has_revisions.then_some(changes.len() as u64);
                seen(projects, changes).with_revision(revision)
            };
            for (token, sees) in tokens.iter().zip(SEES) {
                documents.insert(token, None, seen(sees, &[]), true, start);
            }
            let mut last = published(&documents);
            for step in steps {
                match step {
                    Step::Change(project) => changes.push(project),
                    Step::Advance { token, by, by_stream } if used[token] => {
                        let (sees, credential) = (SEES[token], &tokens[token]);
                        let before = seen(sees, &changes[..views[token]]).document;
                        views[token] = changes.len().min(views[token] + by);
                        let now = seen(sees, &changes[..views[token]]);
                        let is_changed = !before.has_same_diagnostics(&now.document)
                            || before.features() != now.document.features();
                        let is_known = documents.document(&credential.token.digest()).is_some();
                        if by_stream {
                            documents.follow(credential, None, (is_changed || !is_known).then_some(now), start);
                        } else {
                            documents.begin();
                            documents.insert(credential, None, now, is_changed, start);
                        }
                    }
                    Step::Advance { .. } => {}
                    Step::Restart => documents = restarted(&documents, start),
                    Step::Use(now) => {
                        used = now;
                        let in_use = (0..3).filter(|token| used[*token]);
                        let in_use = in_use.map(|token| {
                            let credential = &tokens[token];
                            if documents.document(&credential.token.digest()).is_none() {
                                let now = seen(SEES[token], &changes[..views[token]]);
                                documents.insert(credential, None, now, true, start);
                            }
                            documents.confirm(credential, start);
                            credential.clone()
                        });
                        let in_use: Vec<_> = in_use.collect();
                        documents.settle(&in_use, &followed, true);
                    }
                }
                documents.advance(start, []);
                let now = published(&documents);
                for (project, count) in &now {
                    let before = last.get(project).copied().unwrap_or_default();
                    prop_assert!(before <= *count, "project {} is older: {:?} after {:?}", project, now, last);
                }
                last = now;
            }
            // Once all have caught up and stay confirmed for a minute, the last state is published.
            let later = start + Duration::from_mins(1);
            for (token, sees) in tokens.iter().zip(SEES) {
                documents.insert(token, None, seen(sees, &changes), true, start);
                documents.confirm(token, later);
            }
            documents.settle(&tokens, &followed, true);
            documents.advance(later, []);
            let count = |project| changes.iter().filter(|it| **it == project).count();
            prop_assert_eq!(published(&documents), (0..3).map(|it| (it, count(it))).collect());
            for segment in merged(&documents.parts()).segments() {
                let expect = count(usize::try_from(segment.id()).unwrap());
                let expect = format!(r#""n":{expect}}}"#);
                prop_assert!(segment.raw().ends_with(&expect));
            }
        }
    }

    /// The entity tag and event id of a token's document.
    fn known(documents: &Sources, credential: &Credential) -> (Option<String>, Option<EventId>) {
        let digest = credential.token.digest();
        (documents.etag(&digest).map(str::to_owned), documents.event(&digest))
    }

    #[test]
    fn etag_and_event_id_are_replaced_with_their_document() {
        let one = credential(&["a"]);
        let mut documents = Sources::new(None, Instant::now());
        let etag = |name: &str| Some(name.to_owned());
        let state = |flag: &str| document(&[&format!("a/{flag}")]);
        documents.follow_now(&one, Some(1), None);
        assert_eq!(known(&documents, &one), (None, None), "there is no document yet");

        documents.insert_now(&one, etag("x"), state("x"), true);
        assert_eq!(known(&documents, &one), (etag("x"), None));
        documents.follow_now(&one, Some(1), None);
        assert_eq!(known(&documents, &one), (etag("x"), Some(1)), "both identify the same state");
        // Otherwise a 304 for x would confirm y.
        documents.follow_now(&one, Some(2), Some(state("y")));
        assert_eq!(known(&documents, &one), (None, Some(2)));
        documents.insert_now(&one, etag("y"), state("y"), false);
        assert_eq!(known(&documents, &one), (etag("y"), Some(2)));
        // Otherwise deltas since y would be applied to z.
        documents.insert_now(&one, etag("z"), state("z"), true);
        assert_eq!(known(&documents, &one), (etag("z"), None));

        documents.follow_now(&one, Some(4), None);
        documents.forget_event(&one.token.digest());
        assert_eq!(known(&documents, &one), (etag("z"), None));
        assert_eq!(names(&documents), ["z"]);
    }

    #[test]
    fn token_with_synced_stream_needs_no_poll() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let both = [one.clone(), two.clone()];
        let followed = |of: &[&Credential]| of.iter().map(|it| it.token.digest()).collect();
        let mut documents = Sources::new(None, Instant::now());
        documents.begin();
        documents.insert_now(&one, None, document(&["a/x", "b/old"]), true);
        documents.insert_now(&two, None, document(&["b/old", "c/z"]), true);
        documents.published();
        documents.begin();
        assert!(!documents.settle(&both, &followed(&[&one]), true));
        documents.confirm_now(&two);
        assert!(documents.settle(&both, &followed(&[&one]), true));
        assert!(!documents.is_dirty());
        // The last streamed state wins, whichever token it is for.
        let streamed =
            [(&one, "new"), (&two, "new"), (&two, "newer"), (&one, "newer"), (&one, "newest")];
        for (token, name) in streamed {
            let flags = if token == &one { ["a/x", "b/"] } else { ["c/z", "b/"] };
            let flags = [flags[0].to_owned(), format!("{}{name}", flags[1])];
            documents.follow_now(token, Some(1), Some(document(&[&flags[0], &flags[1]])));
            assert!(documents.settle(&both, &followed(&[&one, &two]), true));
            assert_eq!(names(&documents), [name, "x", "z"]);
        }
        assert!(!documents.settle(&both, &followed(&[&one]), true), "the other needs a poll");
    }

    /// The published flags, as `project/name`.
    fn flags(documents: &Sources) -> Vec<String> {
        let document = merged(&documents.parts());
        let flags = document.features().iter();
        flags.map(|it| format!("{}/{}", it.project(), it.name())).collect()
    }

    #[test]
    fn removal_is_deferred_until_another_token_reports_the_flag_or_time_expires() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let (now, gone) = (Instant::now(), [Arc::from("x")]);
        let later = now + Duration::from_secs(1);
        for (reported, expect) in [(Some("c/x"), "c/x"), (None, "nothing")] {
            let mut documents = Sources::new(None, Instant::now());
            documents.insert_now(&one, None, document(&["a/x", "b/y"]), true);
            documents.insert_now(&two, None, document(&["b/y"]), true);
            assert!(documents.hold(&one, &gone, later));
            assert!(!documents.hold(&one, &[Arc::from("never")], later), "it was not there");
            documents.follow_now(&one, None, Some(document(&["b/y"])));
            documents.release(now);
            assert_eq!(
                (flags(&documents), documents.next_change()),
                (vec!["a/x".into(), "b/y".into()], Some(later))
            );
            if let Some(reported) = reported {
                documents.follow_now(&two, None, Some(document(&["b/y", reported])));
                assert_eq!(flags(&documents), [reported, "b/y"], "the reported flag wins");
            }
            documents.published();
            documents.release(later);
            assert!(documents.is_dirty() && documents.next_change().is_none());
            assert_eq!(flags(&documents)[0] == expect, reported.is_some());
            assert!(flags(&documents).contains(&"b/y".to_owned()));
            assert!(!flags(&documents).contains(&"a/x".to_owned()));
        }
    }

    #[test]
    fn removal_is_deferred_unless_another_token_reports_the_flag_in_another_project() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let gone = [Arc::from("x")];
        let is_deferred = |other: &str, first: &str| {
            let mut documents = Sources::new(None, Instant::now());
            documents.insert_now(&one, None, document(&[first]), true);
            documents.insert_now(&two, None, document(&[other]), true);
            documents.hold(&one, &gone, Instant::now())
        };
        assert!(!is_deferred("c/x", "a/x"), "it has moved");
        assert!(is_deferred("b/x", "b/x"), "both lose it, and either may report it again");
    }

    #[test]
    fn deferred_removal_includes_segments_of_the_flag() {
        let text = r#"{"features":[{"name":"x","project":"a","strategies":[{"name":"default","segments":[2]}]}],"segments":[{"id":1},{"id":2}]}"#;
        let one = credential(&["a"]);
        let mut documents = Sources::new(None, Instant::now());
        let received = Received::new(Document::parse(text.as_bytes()).unwrap());
        documents.insert_now(&one, None, received, true);
        assert!(documents.hold(&one, &[Arc::from("x")], Instant::now()));
        documents.follow_now(&one, None, Some(document(&[])));
        let document = merged(&documents.parts());
        assert!(document.feature("x").is_some());
        assert!(document.segment(2).is_some() && document.segment(1).is_none());
    }

    #[test]
    fn wider_projects_of_a_token_are_a_change() {
        let mut one = credential(&["a"]);
        let mut documents = Sources::new(None, Instant::now());
        documents.begin();
        documents.insert_now(&one, None, document(&["a/x"]), true);
        documents.published();
        one.projects = Projects::All;
        documents.confirm_now(&one);
        assert!(documents.is_dirty());
    }

    #[test]
    fn flags_of_earlier_run_stay_until_upstream_responds_to_every_token_in_use() {
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let both = [one.clone(), two.clone()];
        for projects in [Projects::All, Projects::from_list(["a", "c"])] {
            let scope = Scope { environment: Environment::new("dev"), projects: projects.clone() };
            let before = Snapshot::build(scope, parsed(&["a/gone", "c/frozen"]), None);
            let mut documents = Sources::new(Some(&before), Instant::now());
            assert!(!documents.settle(&[], NOBODY, true), "no response yet");
            documents.begin();
            documents.insert_now(&one, None, document(&["a/x"]), true);
            assert!(!documents.settle(&both, NOBODY, true));
            assert_eq!(names(&documents), ["frozen", "x"]);
            assert!(documents.projects().covers(&projects));
            documents.insert_now(&two, None, document(&["b/y"]), true);
            assert!(
                !documents.settle(&both, NOBODY, false),
                "other tokens may follow, and see project c"
            );
            assert_eq!(names(&documents), ["frozen", "x", "y"]);
            assert!(documents.settle(&both, NOBODY, true));
            assert_eq!(names(&documents), ["x", "y"]);
            assert_eq!(documents.projects(), Projects::from_list(["a", "b"]));
        }
    }

    #[test]
    fn first_response_older_than_served_flags_waits_until_confirmed() {
        let one = credential(&["a"]);
        let (start, sees) = (Instant::now(), |flag: &str, revision| {
            document(&[&format!("a/{flag}")]).with_revision(Some(revision))
        });
        let mut before = Sources::new(None, start);
        before.insert(&one, None, sees("served", 7), true, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        // Upstream's first response, and after how many seconds of repeating it is published.
        for (first, revision, expect) in [("newer", 8, 0), ("served", 8, 0), ("older", 6, 60)] {
            let mut documents = restarted(&before, start);
            documents.begin();
            documents.insert(&one, None, sees(first, revision), true, start);
            assert!(documents.settle(std::slice::from_ref(&one), NOBODY, true));
            assert_eq!(names(&documents), [if expect == 0 { first } else { "served" }]);
            assert_eq!(documents.next_question(), (expect > 0).then_some(at(expect)));
            for seconds in [expect.saturating_sub(1), expect] {
                documents.begin();
                documents.confirm(&one, at(seconds));
                documents.settle(std::slice::from_ref(&one), NOBODY, true);
                documents.advance(at(seconds), []);
                assert_eq!(names(&documents) == [first], seconds == expect, "{first}");
            }
            assert_eq!(
                (names(&documents), documents.next_question()),
                (vec![first.to_owned()], None)
            );
        }
    }

    #[test]
    fn flags_of_earlier_run_are_removed_at_once_if_tokens_in_use_see_all_their_projects() {
        let one = credential(&["a", "b"]);
        let projects = Projects::from_list(["a"]);
        let scope = Scope { environment: Environment::new("dev"), projects };
        let before = Snapshot::build(scope, parsed(&["a/gone"]), None);
        let mut documents = Sources::new(Some(&before), Instant::now());
        documents.begin();
        documents.insert_now(&one, None, document(&["a/x"]), true);
        assert!(documents.settle(std::slice::from_ref(&one), NOBODY, false));
        assert_eq!((names(&documents), documents.has_inherited()), (vec!["x".into()], false));
    }
}
