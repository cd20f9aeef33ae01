//! What the tokens of one environment have fetched, and how that becomes one document.
//!
//! A fetch that fails takes nothing away: what a token brought stays until every token in use has
//! answered without it, and what an earlier run has left stays where no token sees. Whom to ask, and
//! when, is the business of those who call.
//!
//! Upstream has two names for what a token sees: the entity tag that it gave when it was asked, and the
//! number that it told on a stream. Each is kept with the flags that it names, and goes with them.
//!
//! Tokens are told of the same change one after the other. A flag that moves from the projects of one
//! to those of another goes at the first before it comes at the second; so what one token sees no more
//! can be held for a while, until the others have had time to tell of it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
};

use tokio::time::Instant;

use crate::{
    snapshot::Snapshot,
    token::{Projects, TokenDigest},
    upstream::Credential,
    wire::{
        delta::EventId,
        features::{Document, Feature},
    },
};

/// What each token last fetched, and whether it is all published.
#[derive(Debug)]
pub(super) struct Sources {
    fetched: BTreeMap<TokenDigest, Source>,
    /// What stood in the place of something fetched since.
    replaced: Vec<Part>,
    /// What was served before the first fetch.
    inherited: Option<Part>,
    /// The flags that a token sees no more and another may still tell of, and until when that is waited
    /// for, the earliest first.
    held: Vec<(Instant, Arc<Document>)>,
    round: u64,
    dirty: bool,
}

#[derive(Debug)]
struct Source {
    etag: Option<String>,
    event: Option<EventId>,
    part: Part,
    /// The round in which upstream last said that this is current.
    confirmed: u64,
}

/// What there is to publish.
#[derive(Debug)]
pub(super) struct Parts {
    /// The latest confirmed first.
    fetched: Vec<Part>,
    /// Where nothing that was fetched tells of them.
    held: Vec<Arc<Document>>,
}

/// Every flag of some projects.
#[derive(Clone, Debug)]
pub(super) struct Part {
    projects: Projects,
    document: Arc<Document>,
}

impl Sources {
    /// Begins where `served` is what is known.
    pub(super) fn new(served: Option<&Snapshot>) -> Self {
        let inherited = served.map(|it| Part {
            projects: it.projects().clone(),
            document: Arc::clone(it.document()),
        });
        let (fetched, replaced, held) = Default::default();
        Self { fetched, replaced, inherited, held, round: 0, dirty: false }
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

    /// Keeps that what a token fetched before is current.
    pub(super) fn confirm(&mut self, credential: &Credential) {
        if let Some(source) = self.fetched.get_mut(&credential.token.digest()) {
            source.confirmed = self.round;
            if source.part.projects != credential.projects {
                source.part.projects = credential.projects.clone();
                self.dirty = true;
            }
        }
    }

    /// Keeps what a token fetched; `is_news` tells whether these are other flags than before.
    pub(super) fn insert(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        document: Document,
        is_news: bool,
    ) {
        let digest = credential.token.digest();
        let event = self.event(&digest).filter(|_| !is_news);
        self.put(credential, (etag, event), Arc::new(document));
        self.dirty = true;
    }

    /// Keeps what a stream told of what a token sees: that it is current under this number, and the
    /// flags where they are others than before.
    pub(super) fn follow(
        &mut self,
        credential: &Credential,
        event: Option<EventId>,
        news: Option<Document>,
    ) {
        self.begin();
        let digest = credential.token.digest();
        match (news, self.fetched.get_mut(&digest)) {
            (Some(document), _) => {
                // The tag names other flags; by it upstream would confirm those as ours.
                self.put(credential, (None, event), Arc::new(document));
                self.dirty = true;
            }
            (None, Some(source)) => {
                source.event = event;
                self.confirm(credential);
            }
            (None, None) => {}
        }
    }

    /// Holds the flags of the names `gone`, which a token has seen and is about not to, until that time,
    /// as another may yet tell of them; whether there is any. Those that another tells of elsewhere
    /// already need not be held.
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
        let gone = gone.iter().filter_map(|name| document.feature(name));
        let gone: Vec<_> = gone.filter(|feature| !is_told(feature)).cloned().collect();
        if gone.is_empty() {
            return false;
        }
        let ids: BTreeSet<_> = gone.iter().flat_map(Feature::segment_ids).collect();
        let segments = ids.into_iter().filter_map(|id| document.segment(*id)).cloned().collect();
        self.held.push((until, Arc::new(Document::of(gone, segments))));
        true
    }

    /// Lets go of what was held until now.
    pub(super) fn release(&mut self, now: Instant) {
        let before = self.held.len();
        self.held.retain(|(until, _)| *until > now);
        self.dirty |= self.held.len() != before;
    }

    /// Until when the first of what is held is.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.held.first().map(|(until, _)| *until)
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
        document: Arc<Document>,
    ) {
        let part = Part { projects: credential.projects.clone(), document };
        let source = Source { etag, event, part, confirmed: self.round };
        let old = self.fetched.insert(credential.token.digest(), source);
        self.replaced.extend(old.map(|it| it.part));
    }

    /// Ends a round: true if every token in use has answered, or upstream follows up on it by itself
    /// (`followed`), and then what others fetched goes.
    pub(super) fn settle(
        &mut self,
        in_use: &[Credential],
        followed: &BTreeSet<TokenDigest>,
    ) -> bool {
        let used: BTreeSet<_> = in_use.iter().map(|it| it.token.digest()).collect();
        let current = |token: &TokenDigest| {
            let source = self.fetched.get(token);
            source.is_some_and(|it| it.confirmed == self.round || followed.contains(token))
        };
        if used.is_empty() || !used.iter().all(current) {
            return false;
        }
        let before = self.fetched.len();
        self.fetched.retain(|token, _| used.contains(token));
        self.dirty |= self.fetched.len() != before;
        let seen = in_use.iter().fold(nothing(), |seen, it| seen.union(&it.projects));
        if self.inherited.take_if(|part| seen.covers(&part.projects)).is_some() {
            self.dirty = true;
        }
        true
    }

    /// Whether upstream has answered to any token in this round.
    pub(super) fn heard(&self) -> bool {
        self.fetched.values().any(|source| source.confirmed == self.round)
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
        let mut sources: Vec<_> = self.fetched.values().collect();
        sources.sort_by_key(|source| Reverse(source.confirmed));
        let fetched = sources.into_iter().map(|source| source.part.clone());
        let held = self.held.iter().map(|(_, document)| Arc::clone(document)).collect();
        Parts { fetched: fetched.chain(self.inherited.clone()).collect(), held }
    }

    /// What was replaced since this was called last. To let go of it takes milliseconds for thousands of
    /// flags: it is for a thread that may take that time.
    pub(super) fn take_replaced(&mut self) -> Vec<Part> {
        mem::take(&mut self.replaced)
    }

    /// The projects that [`Sources::parts`] have every flag of.
    pub(super) fn projects(&self) -> Projects {
        let fetched = self.fetched.values().map(|source| &source.part);
        fetched.chain(&self.inherited).fold(nothing(), |seen, part| seen.union(&part.projects))
    }
}

fn nothing() -> Projects {
    Projects::Only(BTreeSet::new())
}

/// The union of `parts`; a project's flags come from the first that sees the project.
pub(super) fn merged(Parts { fetched, held }: &Parts) -> Document {
    let mut seen = nothing();
    let mut documents = Vec::new();
    for Part { projects, document } in fetched {
        documents.push(document.outside(&seen));
        seen = seen.union(projects);
    }
    // The later document counts where two hold the same.
    let held = held.iter().map(|document| Document::clone(document));
    Document::merge(held.chain(documents.into_iter().rev()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::token::{Environment, Scope, Token};

    fn credential(projects: &[&str]) -> Credential {
        let token = Token::parse(&format!("[]:dev.{}", projects.concat())).unwrap();
        Credential { token, projects: Projects::from_list(projects.iter().copied()) }
    }

    /// Flags written as `project/name`.
    fn document(flags: &[&str]) -> Document {
        let flag = |it: &&str| {
            let (project, name) = it.split_once('/').unwrap();
            format!(r#"{{"name":"{name}","project":"{project}"}}"#)
        };
        let flags: Vec<_> = flags.iter().map(flag).collect();
        Document::parse(format!(r#"{{"features":[{}]}}"#, flags.join(",")).as_bytes()).unwrap()
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
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, Some("1".to_owned()), document(&["a/x"]), true);
        assert!(!sources.settle(&[one.clone(), two], NOBODY), "the other did not answer");
        sources.begin();
        assert!(!sources.heard());
        sources.confirm(&one);
        assert!(sources.heard());
        assert!(sources.is_dirty(), "what nobody has published is news still");
        sources.published();
        assert!(!sources.is_dirty());
        assert_eq!(sources.etag(&one.token.digest()), Some("1"));
    }

    #[test]
    fn what_was_replaced_is_handed_out_once_to_whoever_lets_go_of_it() {
        let one = credential(&["a"]);
        let mut sources = Sources::new(None);
        sources.insert(&one, None, document(&["a/x"]), true);
        assert!(sources.take_replaced().is_empty());
        let first = Arc::downgrade(sources.document(&one.token.digest()).unwrap());
        sources.insert(&one, None, document(&["a/y"]), true);
        sources.follow(&one, None, Some(document(&["a/z"])));
        let replaced = sources.take_replaced();
        assert_eq!((replaced.len(), first.strong_count()), (2, 1));
        assert!(sources.take_replaced().is_empty());
    }

    #[test]
    fn what_a_token_fetched_stays_until_all_in_use_have_answered_without_it() {
        let (one, two, all) = (credential(&["a"]), credential(&["b"]), credential(&["*"]));
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]), true);
        sources.insert(&two, None, document(&["b/y"]), true);
        assert!(sources.settle(&[one.clone(), two.clone()], NOBODY));
        sources.published();
        sources.begin();
        sources.confirm(&two);
        assert!(
            !sources.settle(&[two.clone(), one.clone()], NOBODY),
            "one is refused, and asked with still"
        );
        assert!(
            !sources.settle(std::slice::from_ref(&all), NOBODY),
            "a wider one has not answered yet"
        );
        assert!(!sources.settle(&[], NOBODY), "there is no token at all");
        assert_eq!(
            (names(&sources).as_slice(), sources.is_dirty()),
            (&["x", "y"].map(String::from)[..], false)
        );
        sources.begin();
        sources.insert(&all, None, document(&["b/y", "c/z"]), true);
        assert!(sources.settle(&[all], NOBODY));
        assert_eq!(names(&sources), ["y", "z"]);
    }

    #[test]
    fn of_two_that_see_a_project_the_latest_confirmed_tells_its_flags() {
        let (old, new) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&old, None, document(&["a/x", "b/gone", "b/kept"]), true);
        sources.begin();
        sources.insert(&new, None, document(&["b/kept", "c/z"]), true);
        assert_eq!(names(&sources), ["kept", "x", "z"]);
        sources.begin();
        sources.confirm(&old);
        assert_eq!(names(&sources), ["gone", "kept", "x", "z"]);
    }

    /// The entity tag and the number of what a token sees.
    fn known(sources: &Sources, credential: &Credential) -> (Option<String>, Option<EventId>) {
        let digest = credential.token.digest();
        (sources.etag(&digest).map(str::to_owned), sources.event(&digest))
    }

    #[test]
    fn the_names_of_a_state_go_with_it() {
        let one = credential(&["a"]);
        let mut sources = Sources::new(None);
        let etag = |name: &str| Some(name.to_owned());
        let state = |flag: &str| document(&[&format!("a/{flag}")]);
        sources.follow(&one, Some(1), None);
        assert_eq!(known(&sources, &one), (None, None), "there is nothing that it could be of");

        sources.insert(&one, etag("x"), state("x"), true);
        assert_eq!(known(&sources, &one), (etag("x"), None));
        sources.follow(&one, Some(1), None);
        assert_eq!(known(&sources, &one), (etag("x"), Some(1)), "both are of one state");
        // Else the answer that nothing has changed since x would confirm y.
        sources.follow(&one, Some(2), Some(state("y")));
        assert_eq!(known(&sources, &one), (None, Some(2)));
        sources.insert(&one, etag("y"), state("y"), false);
        assert_eq!(known(&sources, &one), (etag("y"), Some(2)));
        // Else the changes since y would be taken for changes of z.
        sources.insert(&one, etag("z"), state("z"), true);
        assert_eq!(known(&sources, &one), (etag("z"), None));

        sources.follow(&one, Some(4), None);
        sources.forget_event(&one.token.digest());
        assert_eq!(known(&sources, &one), (etag("z"), None));
        assert_eq!(names(&sources), ["z"]);
    }

    #[test]
    fn a_token_that_upstream_follows_up_on_need_not_be_asked_with() {
        let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let both = [one.clone(), two.clone()];
        let followed = |of: &[&Credential]| of.iter().map(|it| it.token.digest()).collect();
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, None, document(&["a/x", "b/old"]), true);
        sources.insert(&two, None, document(&["b/old", "c/z"]), true);
        sources.published();
        sources.begin();
        assert!(!sources.settle(&both, &followed(&[&one])));
        sources.confirm(&two);
        assert!(sources.settle(&both, &followed(&[&one])));
        assert!(!sources.is_dirty());
        // What is told last counts, whoever is asked with.
        for (told, name) in [(&one, "new"), (&two, "newer"), (&one, "newest")] {
            let flags = if told == &one { ["a/x", "b/"] } else { ["c/z", "b/"] };
            let flags = [flags[0].to_owned(), format!("{}{name}", flags[1])];
            sources.follow(told, Some(1), Some(document(&[&flags[0], &flags[1]])));
            assert!(sources.settle(&both, &followed(&[&one, &two])));
            assert_eq!(names(&sources), [name, "x", "z"]);
        }
        assert!(!sources.settle(&both, &followed(&[&one])), "the other is to be asked with");
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
            let mut sources = Sources::new(None);
            sources.insert(&one, None, document(&["a/x", "b/y"]), true);
            sources.insert(&two, None, document(&["b/y"]), true);
            assert!(sources.hold(&one, &gone, later));
            assert!(!sources.hold(&one, &[Arc::from("never")], later), "it was not there");
            sources.follow(&one, None, Some(document(&["b/y"])));
            sources.release(now);
            assert_eq!(
                (flags(&sources), sources.held_until()),
                (vec!["a/x".into(), "b/y".into()], Some(later))
            );
            if let Some(told) = told {
                sources.follow(&two, None, Some(document(&["b/y", told])));
                assert_eq!(flags(&sources), [told, "b/y"], "what is told counts");
            }
            sources.published();
            sources.release(later);
            assert!(sources.is_dirty() && sources.held_until().is_none());
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
            let mut sources = Sources::new(None);
            sources.insert(&one, None, document(&[first]), true);
            sources.insert(&two, None, document(&[other]), true);
            sources.hold(&one, &gone, Instant::now())
        };
        assert!(!holds("c/x", "a/x"), "it has moved");
        assert!(holds("b/x", "b/x"), "it goes from both, and may come back at either");
    }

    #[test]
    fn a_held_flag_has_its_segments() {
        let text = r#"{"features":[{"name":"x","project":"a","strategies":[{"name":"default","segments":[2]}]}],"segments":[{"id":1},{"id":2}]}"#;
        let one = credential(&["a"]);
        let mut sources = Sources::new(None);
        sources.insert(&one, None, Document::parse(text.as_bytes()).unwrap(), true);
        assert!(sources.hold(&one, &[Arc::from("x")], Instant::now()));
        sources.follow(&one, None, Some(document(&[])));
        let document = merged(&sources.parts());
        assert!(document.feature("x").is_some());
        assert!(document.segment(2).is_some() && document.segment(1).is_none());
    }

    #[test]
    fn a_token_that_sees_more_than_before_is_news() {
        let mut one = credential(&["a"]);
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]), true);
        sources.published();
        one.projects = Projects::All;
        sources.confirm(&one);
        assert!(sources.is_dirty());
    }

    #[test]
    fn what_was_served_before_stays_where_no_token_sees() {
        let projects = Projects::from_list(["a", "b"]);
        let scope = Scope { environment: Environment::new("dev"), projects: projects.clone() };
        let flags = document(&["a/gone", "b/kept"]);
        let before = Snapshot::build(scope, flags, None);
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let mut sources = Sources::new(Some(&before));
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]), true);
        assert!(sources.settle(std::slice::from_ref(&one), NOBODY));
        assert_eq!(
            (names(&sources), sources.projects()),
            (vec!["kept".into(), "x".into()], projects)
        );
        sources.begin();
        sources.confirm(&one);
        sources.insert(&two, None, document(&[]), true);
        assert!(sources.settle(&[one, two], NOBODY));
        assert_eq!(names(&sources), ["x"]);
    }
}
