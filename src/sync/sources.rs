//! What the tokens of one environment have fetched, and how that becomes one document.
//!
//! A fetch that fails takes nothing away: what a token brought stays until every token in use has
//! answered without it, and what an earlier run has left stays where no token sees. Whom to ask, and when, is the business of those who call.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    snapshot::Snapshot,
    token::{Projects, TokenDigest},
    upstream::Credential,
    wire::features::Document,
};

/// What each token last fetched, and whether it is all published.
#[derive(Debug)]
pub(super) struct Sources {
    fetched: BTreeMap<TokenDigest, Source>,
    /// What was served before the first fetch.
    inherited: Option<Part>,
    round: u64,
    dirty: bool,
}

#[derive(Debug)]
struct Source {
    etag: Option<String>,
    part: Part,
    /// The round in which upstream last said that this is current.
    confirmed: u64,
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
        Self { fetched: BTreeMap::new(), inherited, round: 0, dirty: false }
    }

    /// Begins a round in which every token in use is asked with.
    pub(super) fn begin(&mut self) {
        self.round += 1;
    }

    /// What to name as known when asking with a token.
    pub(super) fn etag(&self, token: &TokenDigest) -> Option<&str> {
        self.fetched.get(token)?.etag.as_deref()
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

    /// Keeps what a token fetched.
    pub(super) fn insert(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        document: Document,
    ) {
        let part = Part { projects: credential.projects.clone(), document: Arc::new(document) };
        let source = Source { etag, part, confirmed: self.round };
        self.fetched.insert(credential.token.digest(), source);
        self.dirty = true;
    }

    /// Ends a round: true if every token in use has answered, and then what others fetched goes.
    pub(super) fn settle(&mut self, in_use: &[Credential]) -> bool {
        let used: BTreeSet<_> = in_use.iter().map(|it| it.token.digest()).collect();
        let current = |token| self.fetched.get(token).is_some_and(|it| it.confirmed == self.round);
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

    /// What there is to publish, the latest confirmed first.
    pub(super) fn parts(&self) -> Vec<Part> {
        let mut sources: Vec<_> = self.fetched.values().collect();
        sources.sort_by_key(|source| Reverse(source.confirmed));
        let fetched = sources.into_iter().map(|source| source.part.clone());
        fetched.chain(self.inherited.clone()).collect()
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
pub(super) fn merged(parts: &[Part]) -> Document {
    let mut seen = nothing();
    let mut documents = Vec::new();
    for Part { projects, document } in parts {
        documents.push(document.outside(&seen));
        seen = seen.union(projects);
    }
    // The later document counts where two hold the same.
    Document::merge(documents.into_iter().rev())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

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

    fn names(sources: &Sources) -> Vec<String> {
        let document = merged(&sources.parts());
        document.features().iter().map(|it| it.name().to_string()).collect()
    }

    #[test]
    fn news_wait_for_being_published_whatever_other_tokens_do() {
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, Some("1".to_owned()), document(&["a/x"]));
        assert!(!sources.settle(&[one.clone(), two]), "the other did not answer");
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
    fn what_a_token_fetched_stays_until_all_in_use_have_answered_without_it() {
        let (one, two, all) = (credential(&["a"]), credential(&["b"]), credential(&["*"]));
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]));
        sources.insert(&two, None, document(&["b/y"]));
        assert!(sources.settle(&[one.clone(), two.clone()]));
        sources.published();
        sources.begin();
        sources.confirm(&two);
        assert!(
            !sources.settle(&[two.clone(), one.clone()]),
            "one is refused, and asked with still"
        );
        assert!(!sources.settle(std::slice::from_ref(&all)), "a wider one has not answered yet");
        assert!(!sources.settle(&[]), "there is no token at all");
        assert_eq!(
            (names(&sources).as_slice(), sources.is_dirty()),
            (&["x", "y"].map(String::from)[..], false)
        );
        sources.begin();
        sources.insert(&all, None, document(&["b/y", "c/z"]));
        assert!(sources.settle(&[all]));
        assert_eq!(names(&sources), ["y", "z"]);
    }

    #[test]
    fn of_two_that_see_a_project_the_latest_confirmed_tells_its_flags() {
        let (old, new) = (credential(&["a", "b"]), credential(&["b", "c"]));
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&old, None, document(&["a/x", "b/gone", "b/kept"]));
        sources.begin();
        sources.insert(&new, None, document(&["b/kept", "c/z"]));
        assert_eq!(names(&sources), ["kept", "x", "z"]);
        sources.begin();
        sources.confirm(&old);
        assert_eq!(names(&sources), ["gone", "kept", "x", "z"]);
    }

    #[test]
    fn a_token_that_sees_more_than_before_is_news() {
        let mut one = credential(&["a"]);
        let mut sources = Sources::new(None);
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]));
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
        let before = Snapshot::build(scope, flags, Timestamp::UNIX_EPOCH);
        let (one, two) = (credential(&["a"]), credential(&["b"]));
        let mut sources = Sources::new(Some(&before));
        sources.begin();
        sources.insert(&one, None, document(&["a/x"]));
        assert!(sources.settle(std::slice::from_ref(&one)));
        assert_eq!(
            (names(&sources), sources.projects()),
            (vec!["kept".into(), "x".into()], projects)
        );
        sources.begin();
        sources.confirm(&one);
        sources.insert(&two, None, document(&[]));
        assert!(sources.settle(&[one, two]));
        assert_eq!(names(&sources), ["x"]);
    }
}
