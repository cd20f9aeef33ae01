//! What the tokens of one environment have fetched, and how that becomes one document.
//!
//! A fetch that fails takes nothing away: what a token brought stays until every token in use has
//! answered without it, and so does what an earlier run has left. Once all have answered, only what
//! some token in use sees is left. Whom to ask, and when, is the business of those who call.
//!
//! What an earlier run has left counts as what a token shows that is not in use any more: where that is
//! newer than what upstream answers at first, it stays until upstream has caught up or time is over.
//!
//! Upstream has two names for what a token sees: the entity tag that it gave when it was asked, and the
//! number that it told on a stream. Each is kept with the flags that it names, and goes with them.
//!
//! Where several tokens see a project, the newest of their states is published ([`Precedence`]).
//!
//! Tokens are told of the same change one after the other. A flag that moves from the projects of one
//! to those of another goes at the first before it comes at the second; so what one token sees no more
//! can be held for a while, until the others have had time to tell of it.

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

/// How long a response or a stream is passed over that has an older revision than was known: another
/// replica of upstream has answered, or upstream has been restored from a backup.
const OLDER_REVISION_FOR: Duration = Duration::from_mins(1);

/// What each token last fetched, and whether it is all published.
#[derive(Debug)]
pub(super) struct Sources {
    fetched: BTreeMap<TokenDigest, Source>,
    precedence: Precedence,
    /// What stood in the place of something fetched since.
    replaced: Vec<Arc<Document>>,
    /// The flags that a token sees no more and another may still tell of, and until when that is waited
    /// for, the earliest first.
    held: Vec<(Instant, Arc<Document>)>,
    round: u64,
    /// How many documents have been taken in.
    count: u64,
    dirty: bool,
}

/// A document that was fetched, and the states of its parts.
#[derive(Debug)]
pub(super) struct Received {
    document: Arc<Document>,
    states: States,
    /// Those that it went through since the document before, as far as they are known.
    passed: Vec<States>,
    revision: Option<u64>,
}

impl Received {
    /// Takes as much time as the document has text.
    pub(super) fn new(document: Document) -> Self {
        let states = States::of(&document);
        Self { document: Arc::new(document), states, passed: Vec::new(), revision: None }
    }

    /// The same, reached by way of these states.
    pub(super) fn having_passed(self, documents: &[Document]) -> Self {
        Self { passed: documents.iter().map(States::of).collect(), ..self }
    }

    /// The same, of a revision that can be compared between tokens.
    pub(super) fn with_revision(self, revision: Option<u64>) -> Self {
        Self { revision, ..self }
    }
}

#[derive(Debug)]
struct Source {
    etag: Option<String>,
    event: Option<EventId>,
    revision: Option<u64>,
    /// The newest revision that an entity tag or a stream has told of it. Only Unleash counts so that both
    /// can be compared; others, Parapet among them, number their streams anew at each start.
    latest_revision: Option<u64>,
    /// Since when polls have brought older revisions only.
    older_since: Option<Instant>,
    /// The same of streams.
    older_events_since: Option<Instant>,
    part: Part,
    /// The round in which upstream last said that this is current.
    confirmed: Option<u64>,
    standing: Standing,
}

/// Why something is here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    /// Its token is in use.
    InUse,
    /// It is newer than what others show, though its token is not in use any more.
    Retired,
    /// An earlier run has left it, and not all tokens in use have answered yet.
    Inherited,
}

/// What there is to publish.
#[derive(Debug)]
pub(super) struct Parts {
    fetched: Vec<Part>,
    /// Which of them has the newest state, where several tokens have been seen.
    leaders: HashMap<Unit, usize>,
    /// Where nothing that was fetched tells of them.
    held: Vec<Arc<Document>>,
}

/// The flags that a token sees.
#[derive(Clone, Debug)]
struct Part {
    projects: Projects,
    document: Arc<Document>,
    /// Flags of other projects are none of its any more.
    is_narrowed: bool,
    /// When the first document was taken in, and when flags came that were not in it, by the count of
    /// documents.
    first: u64,
    appeared: Arc<HashMap<Arc<str>, u64>>,
}

impl Part {
    /// Whether a flag of a project that no token is said to see may be published.
    fn may_show(&self, project: &str) -> bool {
        !self.is_narrowed || self.projects.contains(project)
    }

    fn appeared(&self, name: &str) -> u64 {
        self.appeared.get(name).copied().unwrap_or(self.first)
    }
}

impl Sources {
    /// Begins where `served` is what is known, from an earlier run.
    pub(super) fn new(served: Option<&Snapshot>, now: Instant) -> Self {
        let mut sources = Self {
            fetched: BTreeMap::new(),
            precedence: Precedence::default(),
            replaced: Vec::new(),
            held: Vec::new(),
            round: 0,
            count: 0,
            dirty: false,
        };
        if let Some(served) = served {
            sources.inherit(served.projects().clone(), Arc::clone(served.document()), now);
        }
        sources
    }

    fn inherit(&mut self, projects: Projects, document: Arc<Document>, now: Instant) {
        let digest = nobody();
        let (states, run) = (States::of(&document), document.earlier_run());
        self.precedence.inherit(&digest, &projects, &states, run, now);
        let appeared = Arc::default();
        let part = Part { projects, document, is_narrowed: false, first: self.count, appeared };
        let source = Source {
            etag: None,
            event: None,
            revision: None,
            latest_revision: run.and_then(|it| it.upstream_revision),
            older_since: None,
            older_events_since: None,
            part,
            confirmed: None,
            standing: Standing::Inherited,
        };
        self.fetched.insert(digest, source);
    }

    /// Begins a round in which every token in use is asked with.
    pub(super) fn begin(&mut self) {
        self.round += 1;
    }

    /// What to name as known when asking with a token.
    pub(super) fn etag(&self, token: &TokenDigest) -> Option<&str> {
        self.fetched.get(token)?.etag.as_deref()
    }

    /// The number under which a stream told what a token sees, to go on from there.
    pub(super) fn event(&self, token: &TokenDigest) -> Option<EventId> {
        self.fetched.get(token)?.event
    }

    /// What a token sees, as far as is known.
    pub(super) fn document(&self, token: &TokenDigest) -> Option<&Arc<Document>> {
        Some(&self.fetched.get(token)?.part.document)
    }

    /// Whether a poll has brought an older revision than the token has shown before, which is to be
    /// passed over: for a minute at most, in case that upstream has gone back for good.
    pub(super) fn is_outdated(
        &mut self,
        token: &TokenDigest,
        revision: Option<u64>,
        now: Instant,
    ) -> bool {
        let Some(source) = self.fetched.get_mut(token) else { return false };
        is_older(revision, source.latest_revision, &mut source.older_since, now)
    }

    /// The same of what a stream has told under this number. That polls confirm the newer revision does
    /// not prolong the minute: should an upstream count its streams apart from its entity tags, they are
    /// followed nevertheless.
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

    /// Keeps that what a token fetched before is current.
    pub(super) fn confirm(&mut self, credential: &Credential, now: Instant) {
        let digest = credential.token.digest();
        let Some(source) = self.fetched.get_mut(&digest) else { return };
        source.confirmed = Some(self.round);
        source.older_since = None;
        self.precedence.confirm(&digest, now);
        let part = &mut source.part;
        if source.standing != Standing::InUse {
            source.standing = Standing::InUse;
            let states = States::of(&part.document);
            self.precedence.observe(&digest, &part.projects, &states, source.revision, now);
            self.dirty = true;
        }
        if part.projects != credential.projects {
            part.is_narrowed |= !credential.projects.covers(&part.projects);
            part.projects = credential.projects.clone();
            // Both name what was seen before.
            (source.etag, source.event) = (None, None);
            let states = States::of(&part.document);
            self.precedence.observe(&digest, &part.projects, &states, source.revision, now);
            self.dirty = true;
        }
    }

    /// Keeps what a token fetched; `is_news` tells whether these are other flags than before.
    pub(super) fn insert(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        received: Received,
        is_news: bool,
        now: Instant,
    ) {
        let digest = credential.token.digest();
        match self.fetched.get_mut(&digest) {
            Some(source) if !is_news => {
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

    /// Keeps what a stream told of what a token sees: that it is current under this number, and the
    /// flags where they are others than before.
    pub(super) fn follow(
        &mut self,
        credential: &Credential,
        event: Option<EventId>,
        news: Option<Received>,
        now: Instant,
    ) {
        self.begin();
        if let Some(received) = news {
            // The tag names other flags; by it upstream would confirm those as ours.
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

    /// Holds the flags of the names `gone`, which a token has seen and is about not to, until that time,
    /// as another may yet tell of them; whether there is any. Those that another tells of elsewhere
    /// already need not be held, nor those that are not published any more.
    pub(super) fn hold(
        &mut self,
        credential: &Credential,
        gone: &[Arc<str>],
        until: Instant,
    ) -> bool {
        let Some(document) = self.document(&credential.token.digest()) else { return false };
        let is_told = |feature: &Feature| {
            let mut told =
                self.fetched.values().filter_map(|it| it.part.document.feature(feature.name()));
            told.any(|it| !credential.projects.contains(it.project()))
        };
        let is_published = |feature: &Feature| {
            let leader = self.precedence.leader_of_project(feature.project());
            leader.and_then(|leader| self.document(leader)).is_none_or(|newest| {
                let newest = newest.feature(feature.name());
                newest.is_some_and(|it| it.project() == feature.project())
            })
        };
        let gone = gone.iter().filter_map(|name| document.feature(name));
        let gone = gone.filter(|feature| is_published(feature) && !is_told(feature));
        let gone: Vec<_> = gone.cloned().collect();
        if gone.is_empty() {
            return false;
        }
        let ids: BTreeSet<_> = gone.iter().flat_map(Feature::segment_ids).collect();
        let segments = ids.into_iter().filter_map(|id| document.segment(*id)).cloned().collect();
        self.held.push((until, Arc::new(Document::of(gone, segments))));
        true
    }

    /// Lets go of what was held until now, and has time decide whose state is the newest: `signs` are
    /// the last signs of life on the streams of tokens.
    pub(super) fn advance(
        &mut self,
        now: Instant,
        signs: impl IntoIterator<Item = (TokenDigest, Instant)>,
    ) {
        let before = self.held.len();
        self.held.retain(|(until, _)| *until > now);
        self.dirty |= self.held.len() != before;
        for (token, at) in signs {
            self.precedence.confirm(&token, at);
        }
        self.dirty |= self.precedence.settle(now);
    }

    /// When [`Sources::advance`] is to be called next, if time alone changes something.
    pub(super) fn next_change(&self) -> Option<Instant> {
        let held_until = self.held.first().map(|(until, _)| *until);
        held_until.into_iter().chain(self.precedence.next_decision()).min()
    }

    /// When to ask upstream again for the sake of those answers that do not count yet.
    pub(super) fn next_question(&self) -> Option<Instant> {
        self.precedence.next_question()
    }

    /// The revision of upstream that all of this is of, where it is the same for each token and can be
    /// compared.
    pub(super) fn revision(&self) -> Option<u64> {
        let mut revisions = self.fetched.values().map(|source| source.latest_revision);
        let first = revisions.next()?;
        first.filter(|_| revisions.all(|other| other == first))
    }

    /// Lets go of the number that a stream told, so that the next tells everything.
    pub(super) fn forget_event(&mut self, token: &TokenDigest) {
        if let Some(source) = self.fetched.get_mut(token) {
            source.event = None;
        }
    }

    fn put(
        &mut self,
        credential: &Credential,
        (etag, event): (Option<String>, Option<EventId>),
        Received { document, states, passed, revision }: Received,
        now: Instant,
    ) {
        self.count += 1;
        self.dirty = true;
        let (digest, projects) = (credential.token.digest(), credential.projects.clone());
        for states in passed.iter().chain([&states]) {
            self.precedence.observe(&digest, &projects, states, revision, now);
        }
        let is_alone = self.fetched.len() == 1;
        let before = self.fetched.remove(&digest);
        let told = before.as_ref().and_then(|it| event_revision(it, event));
        let latest_revision = revision.or(told);
        // A poll tells nothing of streams.
        let older_events_since =
            before.as_ref().and_then(|it| it.older_events_since).filter(|_| event.is_none());
        let before = before.map(|it| it.part);
        let (first, appeared) = match &before {
            None => (self.count, Arc::default()),
            // Nobody else has flags of the same names.
            Some(_) if is_alone => (self.count, Arc::default()),
            Some(before) => (before.first, Arc::new(appeared(before, &document, self.count))),
        };
        let part = Part { projects, document, is_narrowed: false, first, appeared };
        let source = Source {
            etag,
            event,
            revision,
            latest_revision,
            older_since: None,
            older_events_since,
            part,
            confirmed: Some(self.round),
            standing: Standing::InUse,
        };
        self.fetched.insert(digest, source);
        self.replaced.extend(before.map(|it| it.document));
    }

    /// Ends a round: true if every token in use has answered, or upstream follows up on it by itself
    /// (`followed`), and then what no token in use sees goes, whoever fetched it.
    ///
    /// While not all tokens are known that will be in use (`is_complete`), flags of an earlier run that
    /// none of those in use sees stay, and are not confirmed.
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
            // An unused one whose state of a project is newer than others' stays until they have it.
            let is_used = used.contains(token);
            let stays = is_used || precedence.retire(token, &seen);
            is_less |= !stays || !is_used && source.standing != Standing::Retired;
            source.standing = if is_used { Standing::InUse } else { Standing::Retired };
            stays
        });
        self.dirty |= is_less;
        true
    }

    /// Whether upstream has answered to any token in this round.
    pub(super) fn heard(&self) -> bool {
        self.fetched.values().any(|source| source.confirmed == Some(self.round))
    }

    /// Whether there are flags of an earlier run that wait for the answers of more tokens.
    pub(super) fn has_inherited(&self) -> bool {
        self.inherited().is_some()
    }

    fn inherited(&self) -> Option<&Source> {
        self.fetched.values().find(|source| source.standing == Standing::Inherited)
    }

    /// Whether something here is not published.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Keeps that all of it is published.
    pub(super) fn published(&mut self) {
        self.dirty = false;
    }

    /// What there is to publish.
    pub(super) fn parts(&self) -> Parts {
        let mut leaders = HashMap::new();
        if self.fetched.len() > 1 {
            let places: HashMap<_, _> = self.fetched.keys().zip(0..).collect();
            let of_unit = |(unit, token)| Some((Unit::clone(unit), *places.get(token)?));
            leaders.extend(self.precedence.leaders().filter_map(of_unit));
        }
        let part = |source: &Source| {
            // Of a token that is not in use, only what is newer than others have it.
            let is_retired = source.standing == Standing::Retired;
            let projects = if is_retired { nothing() } else { source.part.projects.clone() };
            let is_narrowed = is_retired || source.part.is_narrowed;
            Part { projects, is_narrowed, ..source.part.clone() }
        };
        let fetched = self.fetched.values().map(part).collect();
        let held = self.held.iter().map(|(_, document)| Arc::clone(document)).collect();
        Parts { fetched, leaders, held }
    }

    /// What was replaced since this was called last. To let go of it takes milliseconds for thousands of
    /// flags: it is for a thread that may take that time.
    pub(super) fn take_replaced(&mut self) -> Vec<Arc<Document>> {
        mem::take(&mut self.replaced)
    }

    /// The projects that [`Sources::parts`] have every flag of.
    pub(super) fn projects(&self) -> Projects {
        let sources = self.fetched.values().filter(|it| it.standing != Standing::Retired);
        sources.fold(nothing(), |seen, source| seen.union(&source.part.projects))
    }
}

/// Stands for the token under which an earlier run has left its flags: no text of a token has this digest,
/// as far as anybody knows.
fn nobody() -> TokenDigest {
    TokenDigest::from_bytes([0; 32])
}

/// Whether a revision is older than the `known` one, and has not been for a minute.
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

/// The revision that the number of an event is, where upstream has told revisions before.
fn event_revision(source: &Source, event: Option<EventId>) -> Option<u64> {
    source.latest_revision.and(event.map(u64::from))
}

fn nothing() -> Projects {
    Projects::Only(BTreeSet::new())
}

/// When each flag came that was not in the token's first document.
fn appeared(before: &Part, document: &Document, count: u64) -> HashMap<Arc<str>, u64> {
    let came = |feature: &Feature| {
        let known = before.document.feature(feature.name());
        let stays = known.is_some_and(|known| known.project() == feature.project());
        if stays { before.appeared.get(feature.name()).copied() } else { Some(count) }
    };
    let features = document.features().iter();
    features.filter_map(|it| Some((Arc::clone(it.name()), came(it)?))).collect()
}

/// The union of `parts`: of each project and segment the newest state, and of two flags of the same name
/// the one that came later.
pub(super) fn merged(Parts { fetched, leaders, held }: &Parts) -> Document {
    let leads = |at: usize, feature: &Feature| match leaders
        .get(&Unit::Project(Arc::clone(feature.project())))
    {
        Some(leader) => *leader == at,
        None => fetched[at].may_show(feature.project()),
    };
    let mut latest = HashMap::<&str, (u64, usize)>::new();
    if fetched.len() > 1 {
        for (at, part) in fetched.iter().enumerate() {
            for feature in part.document.features().iter().filter(|it| leads(at, it)) {
                let appeared = (part.appeared(feature.name()), at);
                let latest = latest.entry(feature.name()).or_insert(appeared);
                *latest = appeared.max(*latest);
            }
        }
    }
    let newest = fetched.iter().enumerate().map(|(at, part)| {
        let has_feature = |feature: &Feature| {
            leads(at, feature) && latest.get(&**feature.name()).is_none_or(|it| it.1 == at)
        };
        let has_segment = |segment: &Segment| {
            leaders.get(&Unit::Segment(segment.id())).is_none_or(|leader| *leader == at)
        };
        part.document.filter(has_feature, has_segment)
    });
    // The later document counts where two hold the same.
    let held = held.iter().map(|document| Document::clone(document));
    Document::merge(held.chain(newest))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        token::{Environment, Scope, Token},
        wire::features::EarlierRun,
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
            is_news: bool,
        ) {
            self.insert(credential, etag, received, is_news, Instant::now());
        }

        fn follow_now(
            &mut self,
            credential: &Credential,
            event: Option<EventId>,
            news: Option<Received>,
        ) {
            self.follow(credential, event, news, Instant::now());
        }

        fn confirm_now(&mut self, credential: &Credential) {
            self.confirm(credential, Instant::now());
        }

        fn release(&mut self, now: Instant) {
            self.advance(now, []);
        }
    }

    /// What upstream tells by itself is none of the tokens'.
    const NOBODY: &BTreeSet<TokenDigest> = &BTreeSet::new();

    fn names(sources: &Sources) -> Vec<String> {
        let document = merged(&sources.parts());
        document.features().iter().map(|it| it.name().to_string()).collect()
    }

    #[test]
    fn news_wait_for_being_published_whatever_other_tokens_do() {
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let mut sources = Sources::new(None, Instant::now());
        sources.begin();
        sources.insert_now(&one, Some("1".to_owned()), document(&["a/x"]), true);
        assert!(!sources.settle(&[one.clone(), two], NOBODY, true), "the other did not answer");
        sources.begin();
        assert!(!sources.heard());
        sources.confirm_now(&one);
        assert!(sources.heard());
        assert!(sources.is_dirty(), "what nobody has published is news still");
        sources.published();
        assert!(!sources.is_dirty());
        assert_eq!(sources.etag(&one.token.digest()), Some("1"));
    }

    #[test]
    fn what_was_replaced_is_handed_out_once_to_whoever_lets_go_of_it() {
        let one = credential(&["a"]);
        let mut sources = Sources::new(None, Instant::now());
        sources.insert_now(&one, None, document(&["a/x"]), true);
        assert!(sources.take_replaced().is_empty());
        let first = Arc::downgrade(sources.document(&one.token.digest()).unwrap());
        sources.insert_now(&one, None, document(&["a/y"]), true);
        sources.follow_now(&one, None, Some(document(&["a/z"])));
        let replaced = sources.take_replaced();
        assert_eq!((replaced.len(), first.strong_count()), (2, 1));
        assert!(sources.take_replaced().is_empty());
    }

    #[test]
    fn what_a_token_fetched_stays_until_all_in_use_have_answered_without_it() {
        let (one, two, all) = (credential(&["a"]), credential(&["b"]), credential(&["*"]));
        let mut sources = Sources::new(None, Instant::now());
        sources.begin();
        sources.insert_now(&one, None, document(&["a/x"]), true);
        sources.insert_now(&two, None, document(&["b/y"]), true);
        assert!(sources.settle(&[one.clone(), two.clone()], NOBODY, true));
        sources.published();
        sources.begin();
        sources.confirm_now(&two);
        assert!(
            !sources.settle(&[two.clone(), one.clone()], NOBODY, true),
            "one is refused, and asked with still"
        );
        assert!(
            !sources.settle(std::slice::from_ref(&all), NOBODY, true),
            "a wider one has not answered yet"
        );
        assert!(!sources.settle(&[], NOBODY, true), "there is no token at all");
        assert_eq!(
            (names(&sources).as_slice(), sources.is_dirty()),
            (&["x", "y"].map(String::from)[..], false)
        );
        sources.begin();
        sources.insert_now(&all, None, document(&["a/w", "b/y", "c/z"]), true);
        let later = Instant::now() + Duration::from_secs(10);
        sources.confirm(&all, later);
        assert!(sources.settle(&[all], NOBODY, true));
        sources.advance(later, []);
        assert_eq!(names(&sources), ["w", "y", "z"]);
    }

    #[test]
    fn newest_state_of_a_project_that_two_tokens_see_is_published() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let mut sources = Sources::new(None, Instant::now());
        sources.begin();
        sources.insert_now(&one, None, document(&["a/x", "b/old"]), true);
        sources.insert_now(&two, None, document(&["b/old", "c/z"]), true);
        // The first is ahead: the flag of b has changed there.
        sources.follow_now(&one, Some(2), Some(document(&["a/x", "b/new"])));
        assert_eq!(names(&sources), ["new", "x", "z"]);
        // The second lags: of an earlier change, of c only, it is told now.
        sources.follow_now(&two, Some(1), Some(document(&["b/old", "c/y"])));
        assert_eq!(names(&sources), ["new", "x", "y"], "an older state is published again");
        sources.begin();
        sources.confirm_now(&two);
        assert_eq!(names(&sources), ["new", "x", "y"], "an old state is confirmed");
        // It catches up, and is the first to see the next change.
        sources.follow_now(&two, Some(2), Some(document(&["b/new", "c/y"])));
        sources.follow_now(&two, Some(3), Some(document(&["c/y"])));
        assert_eq!(names(&sources), ["x", "y"], "a removal counts as a change");
        sources.follow_now(&one, Some(3), Some(document(&["a/w", "b/new"])));
        assert_eq!(names(&sources), ["w", "y"]);
    }

    #[test]
    fn flag_that_was_removed_is_not_held_again_for_a_token_that_lags() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let (mut sources, later) =
            (Sources::new(None, Instant::now()), Instant::now() + Duration::from_secs(1));
        sources.insert_now(&one, None, document(&["b/gone"]), true);
        sources.insert_now(&two, None, document(&["b/gone"]), true);
        assert!(sources.hold(&one, &[Arc::from("gone")], later));
        sources.follow_now(&one, None, Some(document(&[])));
        sources.release(later);
        assert_eq!(names(&sources), [""; 0]);
        assert!(!sources.hold(&two, &[Arc::from("gone")], later), "it is not published");
        sources.follow_now(&two, None, Some(document(&[])));
        assert_eq!(names(&sources), [""; 0]);
    }

    #[test]
    fn older_revision_of_another_replica_is_passed_over_for_a_minute() {
        let one = credential(&["a"]);
        let (digest, start) = (one.token.digest(), Instant::now());
        let mut sources = Sources::new(None, Instant::now());
        let received = |flag: &str, revision| document(&[flag]).with_revision(Some(revision));
        sources.insert(&one, None, received("a/new", 7), true, start);
        assert!(!sources.is_outdated(&digest, Some(7), start));
        assert!(!sources.is_outdated(&digest, None, start), "not every upstream counts");
        assert!(sources.is_outdated(&digest, Some(6), start));
        let later = start + OLDER_REVISION_FOR;
        assert!(!sources.is_outdated(&digest, Some(6), later), "upstream has gone back for good");
        sources.confirm(&one, later);
        assert!(sources.is_outdated(&digest, Some(6), later), "it has not, as it said then");
    }

    #[test]
    fn revisions_of_streams_and_polls_are_compared_where_upstream_counts() {
        let one = credential(&["a"]);
        let (digest, start) = (one.token.digest(), Instant::now());
        let state = |flag: &str, revision| document(&[flag]).with_revision(revision);
        let later = start + OLDER_REVISION_FOR;
        let mut sources = Sources::new(None, Instant::now());
        sources.insert(&one, None, state("a/x", Some(9)), true, start);
        assert!(!sources.is_event_outdated(&digest, Some(9), start));
        sources.follow(&one, Some(10), Some(state("a/y", None)), start);
        assert!(sources.is_outdated(&digest, Some(9), start), "a poll that lags behind the stream");
        assert!(sources.is_event_outdated(&digest, Some(9), start), "another stream");
        assert!(!sources.is_event_outdated(&digest, None, start));
        // A poll that confirms the state does not keep streams out for good.
        sources.confirm(&one, later);
        assert!(sources.is_outdated(&digest, Some(9), later));
        assert!(!sources.is_event_outdated(&digest, Some(9), later));
        // A stream that is followed again does.
        sources.follow(&one, Some(11), None, later);
        assert!(sources.is_event_outdated(&digest, Some(10), later));
        sources.insert(&one, None, state("a/z", Some(12)), true, later);
        assert!(sources.is_event_outdated(&digest, Some(11), later), "a stream that lags behind");

        // Of an upstream without revisions the numbers of streams say nothing.
        sources.insert(&one, None, state("a/x", None), true, start);
        sources.follow(&one, Some(10), Some(state("a/y", None)), start);
        assert!(!sources.is_event_outdated(&digest, Some(1), start));
        assert!(!sources.is_outdated(&digest, Some(1), start));
    }

    #[test]
    fn flags_of_a_token_that_is_replaced_stay_until_its_successor_has_them() {
        let (one, all) = (credential(&["a"]), credential(&["*"]));
        let (mut sources, start) = (Sources::new(None, Instant::now()), Instant::now());
        sources.insert(&one, None, document(&["a/new"]), true, start);
        // Another replica of upstream answers to the wider token.
        sources.begin();
        sources.insert(&all, None, document(&["a/old", "b/y"]), true, start);
        assert!(sources.settle(std::slice::from_ref(&all), NOBODY, true));
        assert_eq!(
            (names(&sources).as_slice(), sources.projects()),
            (&["new", "y"].map(String::from)[..], Projects::All)
        );
        sources.begin();
        sources.insert(&all, None, document(&["a/new", "b/y"]), true, start);
        assert!(sources.settle(std::slice::from_ref(&all), NOBODY, true));
        assert_eq!((names(&sources).len(), sources.fetched.len()), (2, 1));
    }

    #[test]
    fn token_whose_projects_shrink_shows_no_flags_of_the_others() {
        let mut one = credential(&["a", "b"]);
        let mut sources = Sources::new(None, Instant::now());
        let etag = Some("tag".to_owned());
        sources.insert_now(&one, etag, document(&["a/x", "b/y"]), true);
        one.projects = Projects::from_list(["a"]);
        sources.begin();
        sources.confirm_now(&one);
        assert!(sources.settle(std::slice::from_ref(&one), NOBODY, true));
        assert_eq!((names(&sources), sources.projects()), (vec!["x".into()], one.projects.clone()));
        assert_eq!(sources.etag(&one.token.digest()), None, "it named what was seen before");
    }

    #[test]
    fn equal_flags_are_no_news_and_keep_their_document() {
        let one = credential(&["a"]);
        let mut sources = Sources::new(None, Instant::now());
        sources.insert_now(&one, None, document(&["a/x"]), true);
        sources.published();
        let before = Arc::clone(sources.document(&one.token.digest()).unwrap());
        sources.begin();
        sources.insert_now(&one, Some("new".to_owned()), document(&["a/x"]), false);
        assert!(!sources.is_dirty() && sources.heard());
        assert!(Arc::ptr_eq(&before, sources.document(&one.token.digest()).unwrap()));
        assert_eq!(sources.etag(&one.token.digest()), Some("new"));
    }

    /// What happens at a made-up upstream, or to a token's view of it.
    #[derive(Clone, Debug)]
    enum Step {
        /// A project has another state.
        Change(usize),
        /// A token's view moves on by so many changes, at most to the last, by a poll or by its stream.
        Advance { token: usize, by: usize, by_stream: bool },
        /// Those of the tokens are in use from now on, and all of them have answered.
        Use(Vec<bool>),
        /// The edge begins anew with what it has stored.
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

    /// What two of three projects have after `changes`: a flag, and a segment, named by how often the project
    /// has changed.
    fn seen(projects: [usize; 2], changes: &[usize]) -> Received {
        let count = |project| changes.iter().filter(|it| **it == project).count();
        let flags =
            projects.map(|it| format!(r#"{{"name":"{it}-{}","project":"p{it}"}}"#, count(it)));
        let segments = projects.map(|it| format!(r#"{{"id":{it},"n":{}}}"#, count(it)));
        let (flags, segments) = (flags.join(","), segments.join(","));
        let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
        Received::new(Document::parse(text.as_bytes()).unwrap())
    }

    /// How often each project had changed, by what is published; its segment is as new.
    fn published(sources: &Sources) -> BTreeMap<usize, usize> {
        let document = merged(&sources.parts());
        let flags = document.features().iter().map(|it| {
            let (project, count) = it.name().split_once('-').unwrap();
            (project.parse().unwrap(), count.parse().unwrap())
        });
        let flags: Vec<(usize, usize)> = flags.collect();
        let published: BTreeMap<_, _> = flags.iter().copied().collect();
        assert_eq!(published.len(), flags.len(), "two states of a project: {flags:?}");
        published
    }

    /// The sources of the next run, after these have been stored.
    fn restarted(sources: &Sources, now: Instant) -> Sources {
        let document = merged(&sources.parts());
        let flags: Vec<_> = document.features().iter().map(Feature::raw).collect();
        let segments: Vec<_> = document.segments().iter().map(Segment::raw).collect();
        let (flags, segments) = (flags.join(","), segments.join(","));
        let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
        let run = EarlierRun { upstream_revision: sources.revision() };
        let stored = Document::to_store(text.as_bytes(), run);
        let document = Document::parse_stored(&stored).unwrap();
        let scope = Scope { environment: Environment::new("dev"), projects: sources.projects() };
        Sources::new(Some(&Snapshot::build(scope, document, None)), now)
    }

    proptest! {
        /// Each token's view moves forward through one history, and lags as it likes.
        #[test]
        fn no_project_goes_back_whichever_token_lags(
            steps in vec(step(), 1..60),
            has_revisions in any::<bool>(),
        ) {
            const SEES: [[usize; 2]; 3] = [[0, 1], [1, 2], [0, 2]];
            let tokens = SEES.map(|[a, b]| credential(&[&format!("p{a}"), &format!("p{b}")]));
            let followed: BTreeSet<_> = tokens.iter().map(|it| it.token.digest()).collect();
            let (mut sources, start) = (Sources::new(None, Instant::now()), Instant::now());
            let (mut changes, mut views) = (Vec::new(), [0; 3]);
            let mut used = vec![true; 3];
            let seen = |projects, changes: &[usize]| {
                let revision = has_revisions.then_some(changes.len() as u64);
                seen(projects, changes).with_revision(revision)
            };
            for (token, sees) in tokens.iter().zip(SEES) {
                sources.insert(token, None, seen(sees, &[]), true, start);
            }
            let mut last = published(&sources);
            for step in steps {
                match step {
                    Step::Change(project) => changes.push(project),
                    Step::Advance { token, by, by_stream } if used[token] => {
                        let (sees, credential) = (SEES[token], &tokens[token]);
                        let before = seen(sees, &changes[..views[token]]).document;
                        views[token] = changes.len().min(views[token] + by);
                        let now = seen(sees, &changes[..views[token]]);
                        let is_news = !before.reports_as(&now.document)
                            || before.features() != now.document.features();
                        let is_known = sources.document(&credential.token.digest()).is_some();
                        if by_stream {
                            sources.follow(credential, None, (is_news || !is_known).then_some(now), start);
                        } else {
                            sources.begin();
                            sources.insert(credential, None, now, is_news, start);
                        }
                    }
                    Step::Advance { .. } => {}
                    Step::Restart => sources = restarted(&sources, start),
                    Step::Use(now) => {
                        used = now;
                        let in_use = (0..3).filter(|token| used[*token]);
                        let in_use = in_use.map(|token| {
                            let credential = &tokens[token];
                            if sources.document(&credential.token.digest()).is_none() {
                                let now = seen(SEES[token], &changes[..views[token]]);
                                sources.insert(credential, None, now, true, start);
                            }
                            sources.confirm(credential, start);
                            credential.clone()
                        });
                        let in_use: Vec<_> = in_use.collect();
                        sources.settle(&in_use, &followed, true);
                    }
                }
                sources.advance(start, []);
                let now = published(&sources);
                for (project, count) in &now {
                    let before = last.get(project).copied().unwrap_or_default();
                    prop_assert!(before <= *count, "project {} is older: {:?} after {:?}", project, now, last);
                }
                last = now;
            }
            // Once all have caught up and are confirmed for a while, the last state is published.
            let later = start + Duration::from_mins(1);
            for (token, sees) in tokens.iter().zip(SEES) {
                sources.insert(token, None, seen(sees, &changes), true, start);
                sources.confirm(token, later);
            }
            sources.settle(&tokens, &followed, true);
            sources.advance(later, []);
            let count = |project| changes.iter().filter(|it| **it == project).count();
            prop_assert_eq!(published(&sources), (0..3).map(|it| (it, count(it))).collect());
            for segment in merged(&sources.parts()).segments() {
                let expect = count(usize::try_from(segment.id()).unwrap());
                let expect = format!(r#""n":{expect}}}"#);
                prop_assert!(segment.raw().ends_with(&expect));
            }
        }
    }

    /// The entity tag and the number of what a token sees.
    fn known(sources: &Sources, credential: &Credential) -> (Option<String>, Option<EventId>) {
        let digest = credential.token.digest();
        (sources.etag(&digest).map(str::to_owned), sources.event(&digest))
    }

    #[test]
    fn the_names_of_a_state_go_with_it() {
        let one = credential(&["a"]);
        let mut sources = Sources::new(None, Instant::now());
        let etag = |name: &str| Some(name.to_owned());
        let state = |flag: &str| document(&[&format!("a/{flag}")]);
        sources.follow_now(&one, Some(1), None);
        assert_eq!(known(&sources, &one), (None, None), "there is nothing that it could be of");

        sources.insert_now(&one, etag("x"), state("x"), true);
        assert_eq!(known(&sources, &one), (etag("x"), None));
        sources.follow_now(&one, Some(1), None);
        assert_eq!(known(&sources, &one), (etag("x"), Some(1)), "both are of one state");
        // Else the answer that nothing has changed since x would confirm y.
        sources.follow_now(&one, Some(2), Some(state("y")));
        assert_eq!(known(&sources, &one), (None, Some(2)));
        sources.insert_now(&one, etag("y"), state("y"), false);
        assert_eq!(known(&sources, &one), (etag("y"), Some(2)));
        // Else the changes since y would be taken for changes of z.
        sources.insert_now(&one, etag("z"), state("z"), true);
        assert_eq!(known(&sources, &one), (etag("z"), None));

        sources.follow_now(&one, Some(4), None);
        sources.forget_event(&one.token.digest());
        assert_eq!(known(&sources, &one), (etag("z"), None));
        assert_eq!(names(&sources), ["z"]);
    }

    #[test]
    fn a_token_that_upstream_follows_up_on_need_not_be_asked_with() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let both = [one.clone(), two.clone()];
        let followed = |of: &[&Credential]| of.iter().map(|it| it.token.digest()).collect();
        let mut sources = Sources::new(None, Instant::now());
        sources.begin();
        sources.insert_now(&one, None, document(&["a/x", "b/old"]), true);
        sources.insert_now(&two, None, document(&["b/old", "c/z"]), true);
        sources.published();
        sources.begin();
        assert!(!sources.settle(&both, &followed(&[&one]), true));
        sources.confirm_now(&two);
        assert!(sources.settle(&both, &followed(&[&one]), true));
        assert!(!sources.is_dirty());
        // What is told last counts, whoever is asked with.
        let told =
            [(&one, "new"), (&two, "new"), (&two, "newer"), (&one, "newer"), (&one, "newest")];
        for (told, name) in told {
            let flags = if told == &one { ["a/x", "b/"] } else { ["c/z", "b/"] };
            let flags = [flags[0].to_owned(), format!("{}{name}", flags[1])];
            sources.follow_now(told, Some(1), Some(document(&[&flags[0], &flags[1]])));
            assert!(sources.settle(&both, &followed(&[&one, &two]), true));
            assert_eq!(names(&sources), [name, "x", "z"]);
        }
        assert!(!sources.settle(&both, &followed(&[&one]), true), "the other is to be asked with");
    }

    /// The flags that are served, as `project/name`.
    fn flags(sources: &Sources) -> Vec<String> {
        let document = merged(&sources.parts());
        let flags = document.features().iter();
        flags.map(|it| format!("{}/{}", it.project(), it.name())).collect()
    }

    #[test]
    fn a_flag_that_one_token_sees_no_more_is_held_until_another_tells_of_it_or_time_is_over() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let (now, gone) = (Instant::now(), [Arc::from("x")]);
        let later = now + Duration::from_secs(1);
        for (told, expect) in [(Some("c/x"), "c/x"), (None, "nothing")] {
            let mut sources = Sources::new(None, Instant::now());
            sources.insert_now(&one, None, document(&["a/x", "b/y"]), true);
            sources.insert_now(&two, None, document(&["b/y"]), true);
            assert!(sources.hold(&one, &gone, later));
            assert!(!sources.hold(&one, &[Arc::from("never")], later), "it was not there");
            sources.follow_now(&one, None, Some(document(&["b/y"])));
            sources.release(now);
            assert_eq!(
                (flags(&sources), sources.next_change()),
                (vec!["a/x".into(), "b/y".into()], Some(later))
            );
            if let Some(told) = told {
                sources.follow_now(&two, None, Some(document(&["b/y", told])));
                assert_eq!(flags(&sources), [told, "b/y"], "what is told counts");
            }
            sources.published();
            sources.release(later);
            assert!(sources.is_dirty() && sources.next_change().is_none());
            assert_eq!(flags(&sources)[0] == expect, told.is_some());
            assert!(flags(&sources).contains(&"b/y".to_owned()));
            assert!(!flags(&sources).contains(&"a/x".to_owned()));
        }
    }

    #[test]
    fn what_another_token_tells_of_elsewhere_is_not_held_and_what_it_has_not_lost_yet_is() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let gone = [Arc::from("x")];
        let holds = |other: &str, first: &str| {
            let mut sources = Sources::new(None, Instant::now());
            sources.insert_now(&one, None, document(&[first]), true);
            sources.insert_now(&two, None, document(&[other]), true);
            sources.hold(&one, &gone, Instant::now())
        };
        assert!(!holds("c/x", "a/x"), "it has moved");
        assert!(holds("b/x", "b/x"), "it goes from both, and may come back at either");
    }

    #[test]
    fn a_held_flag_has_its_segments() {
        let text = r#"{"features":[{"name":"x","project":"a","strategies":[{"name":"default","segments":[2]}]}],"segments":[{"id":1},{"id":2}]}"#;
        let one = credential(&["a"]);
        let mut sources = Sources::new(None, Instant::now());
        let received = Received::new(Document::parse(text.as_bytes()).unwrap());
        sources.insert_now(&one, None, received, true);
        assert!(sources.hold(&one, &[Arc::from("x")], Instant::now()));
        sources.follow_now(&one, None, Some(document(&[])));
        let document = merged(&sources.parts());
        assert!(document.feature("x").is_some());
        assert!(document.segment(2).is_some() && document.segment(1).is_none());
    }

    #[test]
    fn a_token_that_sees_more_than_before_is_news() {
        let mut one = credential(&["a"]);
        let mut sources = Sources::new(None, Instant::now());
        sources.begin();
        sources.insert_now(&one, None, document(&["a/x"]), true);
        sources.published();
        one.projects = Projects::All;
        sources.confirm_now(&one);
        assert!(sources.is_dirty());
    }

    #[test]
    fn flags_of_an_earlier_run_stay_until_every_token_in_use_has_answered() {
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let both = [one.clone(), two.clone()];
        for projects in [Projects::All, Projects::from_list(["a", "c"])] {
            let scope = Scope { environment: Environment::new("dev"), projects: projects.clone() };
            let before = Snapshot::build(scope, parsed(&["a/gone", "c/frozen"]), None);
            let mut sources = Sources::new(Some(&before), Instant::now());
            assert!(!sources.settle(&[], NOBODY, true), "nobody has answered");
            sources.begin();
            sources.insert_now(&one, None, document(&["a/x"]), true);
            assert!(!sources.settle(&both, NOBODY, true));
            assert_eq!(names(&sources), ["frozen", "x"]);
            assert!(sources.projects().covers(&projects));
            sources.insert_now(&two, None, document(&["b/y"]), true);
            assert!(!sources.settle(&both, NOBODY, false), "others may come, and see project c");
            assert_eq!(names(&sources), ["frozen", "x", "y"]);
            assert!(sources.settle(&both, NOBODY, true));
            assert_eq!(names(&sources), ["x", "y"]);
            assert_eq!(sources.projects(), Projects::from_list(["a", "b"]));
        }
    }

    #[test]
    fn first_answer_that_is_older_than_what_was_served_waits_until_it_is_confirmed() {
        let one = credential(&["a"]);
        let (start, sees) = (Instant::now(), |flag: &str, revision| {
            document(&[&format!("a/{flag}")]).with_revision(Some(revision))
        });
        let mut before = Sources::new(None, start);
        before.insert(&one, None, sees("served", 7), true, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        // What upstream answers first, and when it is served if upstream goes on to answer that.
        for (first, revision, expect) in [("newer", 8, 0), ("served", 8, 0), ("older", 6, 60)] {
            let mut sources = restarted(&before, start);
            sources.begin();
            sources.insert(&one, None, sees(first, revision), true, start);
            assert!(sources.settle(std::slice::from_ref(&one), NOBODY, true));
            assert_eq!(names(&sources), [if expect == 0 { first } else { "served" }]);
            assert_eq!(sources.next_question(), (expect > 0).then_some(at(expect)));
            for seconds in [expect.saturating_sub(1), expect] {
                sources.begin();
                sources.confirm(&one, at(seconds));
                sources.settle(std::slice::from_ref(&one), NOBODY, true);
                sources.advance(at(seconds), []);
                assert_eq!(names(&sources) == [first], seconds == expect, "{first}");
            }
            assert_eq!((names(&sources), sources.next_question()), (vec![first.to_owned()], None));
        }
    }

    #[test]
    fn flags_of_an_earlier_run_go_at_once_where_tokens_in_use_see_all_of_their_projects() {
        let one = credential(&["a", "b"]);
        let projects = Projects::from_list(["a"]);
        let scope = Scope { environment: Environment::new("dev"), projects };
        let before = Snapshot::build(scope, parsed(&["a/gone"]), None);
        let mut sources = Sources::new(Some(&before), Instant::now());
        sources.begin();
        sources.insert_now(&one, None, document(&["a/x"]), true);
        assert!(sources.settle(std::slice::from_ref(&one), NOBODY, false));
        assert_eq!((names(&sources), sources.has_inherited()), (vec!["x".into()], false));
    }
}
