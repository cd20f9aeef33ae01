//! Several tokens whose views move on at different times, and what is published of them.

use std::time::Duration;

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    protocol::features::{PreviousRun, Segment},
    sync::merge::merge,
    token::{Environment, Scope, Token},
};

fn credential(projects: &[&str]) -> Credential {
    let token = Token::parse(&format!("[]:dev.{}", projects.concat())).unwrap();
    Credential { token, projects: Projects::from_list(projects.iter().copied()) }
}

/// Flags written as `project/name`.
fn document(flags: &[&str]) -> FetchedDocument {
    FetchedDocument::new(parsed(flags))
}

fn parsed(flags: &[&str]) -> Document {
    let flag = |it: &&str| {
        let (project, name) = it.split_once('/').unwrap();
        format!(r#"{{"name":"{name}","project":"{project}"}}"#)
    };
    let flags: Vec<_> = flags.iter().map(flag).collect();
    Document::parse(format!(r#"{{"features":[{}]}}"#, flags.join(",")).as_bytes()).unwrap()
}

impl FetchedDocuments {
    fn insert_now(
        &mut self,
        credential: &Credential,
        etag: Option<String>,
        received: FetchedDocument,
        is_changed: bool,
    ) {
        self.insert(credential, etag, received, is_changed, Instant::now());
    }

    fn apply_stream_flags_now(
        &mut self,
        credential: &Credential,
        event: Option<EventId>,
        changed: Option<FetchedDocument>,
    ) {
        self.apply_stream_flags(credential, event, changed, Instant::now());
    }

    fn confirm_now(&mut self, credential: &Credential) {
        self.confirm(credential, Instant::now());
    }

    fn expire_removals(&mut self, now: Instant) {
        self.advance_time(now, []);
    }
}

/// No token has a synced stream.
const NO_TOKENS: &BTreeSet<TokenDigest> = &BTreeSet::new();

fn flag_names(documents: &FetchedDocuments) -> Vec<String> {
    let document = merge(&documents.merge_input());
    document.features().iter().map(|it| it.name().to_string()).collect()
}

#[test]
fn changes_stay_unpublished_until_marked_as_published() {
    let (one, two) = (credential(&["a"]), credential(&["b"]));
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.begin_round();
    documents.insert_now(&one, Some("1".to_owned()), document(&["a/x"]), true);
    assert!(
        !documents.complete_round(&[one.clone(), two], NO_TOKENS, true),
        "no response to the other"
    );
    documents.begin_round();
    assert!(!documents.has_response_in_round());
    documents.confirm_now(&one);
    assert!(documents.has_response_in_round());
    assert!(documents.has_changes(), "not yet published");
    documents.mark_published();
    assert!(!documents.has_changes());
    assert_eq!(documents.etag(&one.token.digest()), Some("1"));
}

#[test]
fn replaced_documents_are_returned_once_for_dropping() {
    let one = credential(&["a"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.insert_now(&one, None, document(&["a/x"]), true);
    assert!(documents.take_replaced().is_empty());
    let first = Arc::downgrade(documents.document(&one.token.digest()).unwrap());
    documents.insert_now(&one, None, document(&["a/y"]), true);
    documents.apply_stream_flags_now(&one, None, Some(document(&["a/z"])));
    let replaced = documents.take_replaced();
    assert_eq!((replaced.len(), first.strong_count()), (2, 1));
    assert!(documents.take_replaced().is_empty());
}

#[test]
fn flags_of_a_token_stay_until_upstream_responds_to_all_tokens_in_use() {
    let (one, two, all) = (credential(&["a"]), credential(&["b"]), credential(&["*"]));
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.begin_round();
    documents.insert_now(&one, None, document(&["a/x"]), true);
    documents.insert_now(&two, None, document(&["b/y"]), true);
    assert!(documents.complete_round(&[one.clone(), two.clone()], NO_TOKENS, true));
    documents.mark_published();
    documents.begin_round();
    documents.confirm_now(&two);
    assert!(
        !documents.complete_round(&[two.clone(), one.clone()], NO_TOKENS, true),
        "one is refused and still in use"
    );
    assert!(
        !documents.complete_round(std::slice::from_ref(&all), NO_TOKENS, true),
        "no response to the wider one yet"
    );
    assert!(!documents.complete_round(&[], NO_TOKENS, true), "there is no token at all");
    assert_eq!(
        (flag_names(&documents).as_slice(), documents.has_changes()),
        (&["x", "y"].map(String::from)[..], false)
    );
    documents.begin_round();
    documents.insert_now(&all, None, document(&["a/w", "b/y", "c/z"]), true);
    let later = Instant::now() + Duration::from_secs(10);
    documents.confirm(&all, later);
    assert!(documents.complete_round(&[all], NO_TOKENS, true));
    documents.advance_time(later, []);
    assert_eq!(flag_names(&documents), ["w", "y", "z"]);
}

#[test]
fn newest_state_of_a_project_that_two_tokens_see_is_published() {
    let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.begin_round();
    documents.insert_now(&one, None, document(&["a/x", "b/old"]), true);
    documents.insert_now(&two, None, document(&["b/old", "c/z"]), true);
    // The first is ahead: the flag of b has changed there.
    documents.apply_stream_flags_now(&one, Some(2), Some(document(&["a/x", "b/new"])));
    assert_eq!(flag_names(&documents), ["new", "x", "z"]);
    // The second lags: it now receives an earlier change, of c only.
    documents.apply_stream_flags_now(&two, Some(1), Some(document(&["b/old", "c/y"])));
    assert_eq!(flag_names(&documents), ["new", "x", "y"], "an older state is published again");
    documents.begin_round();
    documents.confirm_now(&two);
    assert_eq!(flag_names(&documents), ["new", "x", "y"], "an old state is confirmed");
    // It catches up, and is the first to see the next change.
    documents.apply_stream_flags_now(&two, Some(2), Some(document(&["b/new", "c/y"])));
    documents.apply_stream_flags_now(&two, Some(3), Some(document(&["c/y"])));
    assert_eq!(flag_names(&documents), ["x", "y"], "a removal counts as a change");
    documents.apply_stream_flags_now(&one, Some(3), Some(document(&["a/w", "b/new"])));
    assert_eq!(flag_names(&documents), ["w", "y"]);
}

#[test]
fn removal_is_not_deferred_again_for_lagging_token() {
    let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
    let (mut documents, later) =
        (FetchedDocuments::new(None, Instant::now()), Instant::now() + Duration::from_secs(1));
    documents.insert_now(&one, None, document(&["b/gone"]), true);
    documents.insert_now(&two, None, document(&["b/gone"]), true);
    assert!(documents.defer_removal(&one, &[Arc::from("gone")], later));
    documents.apply_stream_flags_now(&one, None, Some(document(&[])));
    documents.expire_removals(later);
    assert_eq!(flag_names(&documents), [""; 0]);
    assert!(!documents.defer_removal(&two, &[Arc::from("gone")], later), "it is not published");
    documents.apply_stream_flags_now(&two, None, Some(document(&[])));
    assert_eq!(flag_names(&documents), [""; 0]);
}

#[test]
fn older_revision_is_ignored_for_one_minute() {
    let one = credential(&["a"]);
    let (digest, start) = (one.token.digest(), Instant::now());
    let mut documents = FetchedDocuments::new(None, Instant::now());
    let received = |flag: &str, revision| document(&[flag]).with_revision(Some(revision));
    documents.insert(&one, None, received("a/new", 7), true, start);
    assert!(!documents.is_stale_response(&digest, Some(7), start));
    assert!(
        !documents.is_stale_response(&digest, None, start),
        "not every upstream sends revisions"
    );
    assert!(documents.is_stale_response(&digest, Some(6), start));
    let later = start + OLDER_REVISION_TIMEOUT;
    assert!(!documents.is_stale_response(&digest, Some(6), later), "upstream was restored");
    documents.confirm(&one, later);
    assert!(
        documents.is_stale_response(&digest, Some(6), later),
        "confirmed since: the minute restarts"
    );
}

#[test]
fn event_ids_and_revisions_are_compared_if_upstream_sends_revisions() {
    let one = credential(&["a"]);
    let (digest, start) = (one.token.digest(), Instant::now());
    let state = |flag: &str, revision| document(&[flag]).with_revision(revision);
    let later = start + OLDER_REVISION_TIMEOUT;
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.insert(&one, None, state("a/x", Some(9)), true, start);
    assert!(!documents.is_stale_event(&digest, Some(9), start));
    documents.apply_stream_flags(&one, Some(10), Some(state("a/y", None)), start);
    assert!(
        documents.is_stale_response(&digest, Some(9), start),
        "a poll that lags behind the stream"
    );
    assert!(documents.is_stale_event(&digest, Some(9), start), "another stream");
    assert!(!documents.is_stale_event(&digest, None, start));
    // Polls that confirm the state do not block streams for longer than a minute.
    documents.confirm(&one, later);
    assert!(documents.is_stale_response(&digest, Some(9), later));
    assert!(!documents.is_stale_event(&digest, Some(9), later));
    // A stream that is accepted again restarts the minute.
    documents.apply_stream_flags(&one, Some(11), None, later);
    assert!(documents.is_stale_event(&digest, Some(10), later));
    documents.insert(&one, None, state("a/z", Some(12)), true, later);
    assert!(documents.is_stale_event(&digest, Some(11), later), "a stream that lags behind");

    // Without revisions, event ids are not comparable.
    documents.insert(&one, None, state("a/x", None), true, start);
    documents.apply_stream_flags(&one, Some(10), Some(state("a/y", None)), start);
    assert!(!documents.is_stale_event(&digest, Some(1), start));
    assert!(!documents.is_stale_response(&digest, Some(1), start));
}

#[test]
fn flags_of_replaced_token_stay_until_its_successor_has_them() {
    let (one, all) = (credential(&["a"]), credential(&["*"]));
    let (mut documents, start) = (FetchedDocuments::new(None, Instant::now()), Instant::now());
    documents.insert(&one, None, document(&["a/new"]), true, start);
    // Another replica of upstream responds to the wider token.
    documents.begin_round();
    documents.insert(&all, None, document(&["a/old", "b/y"]), true, start);
    assert!(documents.complete_round(std::slice::from_ref(&all), NO_TOKENS, true));
    assert_eq!(
        (flag_names(&documents).as_slice(), documents.projects()),
        (&["new", "y"].map(String::from)[..], Projects::All)
    );
    documents.begin_round();
    documents.insert(&all, None, document(&["a/new", "b/y"]), true, start);
    assert!(documents.complete_round(std::slice::from_ref(&all), NO_TOKENS, true));
    assert_eq!((flag_names(&documents).len(), documents.by_token.len()), (2, 1));
}

#[test]
fn token_with_fewer_projects_contributes_no_flags_of_the_others() {
    let mut one = credential(&["a", "b"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    let etag = Some("tag".to_owned());
    documents.insert_now(&one, etag, document(&["a/x", "b/y"]), true);
    one.projects = Projects::from_list(["a"]);
    documents.begin_round();
    documents.confirm_now(&one);
    assert!(documents.complete_round(std::slice::from_ref(&one), NO_TOKENS, true));
    assert_eq!(
        (flag_names(&documents), documents.projects()),
        (vec!["x".into()], one.projects.clone())
    );
    assert_eq!(documents.etag(&one.token.digest()), None, "it identified the state before");
}

#[test]
fn equal_flags_are_no_change_and_keep_their_document() {
    let one = credential(&["a"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.insert_now(&one, None, document(&["a/x"]), true);
    documents.mark_published();
    let before = Arc::clone(documents.document(&one.token.digest()).unwrap());
    documents.begin_round();
    documents.insert_now(&one, Some("new".to_owned()), document(&["a/x"]), false);
    assert!(!documents.has_changes() && documents.has_response_in_round());
    assert!(Arc::ptr_eq(&before, documents.document(&one.token.digest()).unwrap()));
    assert_eq!(documents.etag(&one.token.digest()), Some("new"));
}

/// An action of a fake upstream, or a change of a token's view of it.
#[derive(Clone, Debug)]
enum Action {
    /// Changes a project.
    Change(usize),
    /// Moves a token's view on by up to `by` changes, by a poll or by its stream.
    Advance { token: usize, by: usize, by_stream: bool },
    /// Sets which tokens are in use; upstream responds to all of them.
    Use(Vec<bool>),
    /// Restarts the edge with its stored flags.
    Restart,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (0..3_usize).prop_map(Action::Change),
        6 => (0..3_usize, 0..4_usize, any::<bool>())
            .prop_map(|(token, by, by_stream)| Action::Advance { token, by, by_stream }),
        1 => vec(any::<bool>(), 3).prop_map(Action::Use),
        1 => Just(Action::Restart),
    ]
}

/// The document of two of three projects after `changes`: a flag and a segment each, named after the
/// number of the project's changes.
fn fetched_after(projects: [usize; 2], changes: &[usize]) -> FetchedDocument {
    let count = |project| changes.iter().filter(|it| **it == project).count();
    let flags = projects.map(|it| format!(r#"{{"name":"{it}-{}","project":"p{it}"}}"#, count(it)));
    let segments = projects.map(|it| format!(r#"{{"id":{it},"n":{}}}"#, count(it)));
    let (flags, segments) = (flags.join(","), segments.join(","));
    let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
    FetchedDocument::new(Document::parse(text.as_bytes()).unwrap())
}

/// The number of changes of each project, according to the published flags.
fn published_counts(documents: &FetchedDocuments) -> BTreeMap<usize, usize> {
    let document = merge(&documents.merge_input());
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
fn restarted(documents: &FetchedDocuments, now: Instant) -> FetchedDocuments {
    let document = merge(&documents.merge_input());
    let flags: Vec<_> = document.features().iter().map(Feature::raw).collect();
    let segments: Vec<_> = document.segments().iter().map(Segment::raw).collect();
    let (flags, segments) = (flags.join(","), segments.join(","));
    let text = format!(r#"{{"features":[{flags}],"segments":[{segments}]}}"#);
    let run = PreviousRun { upstream_revision: documents.common_revision(), state_id: None };
    let stored = Document::encode_stored(text.as_bytes(), run);
    let document = Document::parse_stored(&stored).unwrap();
    let scope = Scope { environment: Environment::new("dev"), projects: documents.projects() };
    FetchedDocuments::new(Some(&ServedSnapshot::build(scope, document, None)), now)
}

proptest! {
    /// Each token's view moves forward through one history, with an arbitrary lag.
    #[test]
    fn no_project_goes_back_while_any_token_lags(
        steps in vec(action(), 1..60),
        has_revisions in any::<bool>(),
    ) {
        const SEES: [[usize; 2]; 3] = [[0, 1], [1, 2], [0, 2]];
        let tokens = SEES.map(|[a, b]| credential(&[&format!("p{a}"), &format!("p{b}")]));
        let followed: BTreeSet<_> = tokens.iter().map(|it| it.token.digest()).collect();
        let (mut documents, start) = (FetchedDocuments::new(None, Instant::now()), Instant::now());
        let (mut changes, mut views) = (Vec::new(), [0; 3]);
        let mut used = vec![true; 3];
        let seen = |projects, changes: &[usize]| {
            let revision = has_revisions.then_some(changes.len() as u64);
            fetched_after(projects, changes).with_revision(revision)
        };
        for (token, sees) in tokens.iter().zip(SEES) {
            documents.insert(token, None, seen(sees, &[]), true, start);
        }
        let mut last = published_counts(&documents);
        for step in steps {
            match step {
                Action::Change(project) => changes.push(project),
                Action::Advance { token, by, by_stream } if used[token] => {
                    let (sees, credential) = (SEES[token], &tokens[token]);
                    let before = seen(sees, &changes[..views[token]]).document;
                    views[token] = changes.len().min(views[token] + by);
                    let now = seen(sees, &changes[..views[token]]);
                    let is_changed = !before.has_same_diagnostics(&now.document)
                        || before.features() != now.document.features();
                    let is_known = documents.document(&credential.token.digest()).is_some();
                    if by_stream {
                        documents.apply_stream_flags(credential, None, (is_changed || !is_known).then_some(now), start);
                    } else {
                        documents.begin_round();
                        documents.insert(credential, None, now, is_changed, start);
                    }
                }
                Action::Advance { .. } => {}
                Action::Restart => documents = restarted(&documents, start),
                Action::Use(now) => {
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
                    documents.complete_round(&in_use, &followed, true);
                }
            }
            documents.advance_time(start, []);
            let now = published_counts(&documents);
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
        documents.complete_round(&tokens, &followed, true);
        documents.advance_time(later, []);
        let count = |project| changes.iter().filter(|it| **it == project).count();
        prop_assert_eq!(published_counts(&documents), (0..3).map(|it| (it, count(it))).collect());
        for segment in merge(&documents.merge_input()).segments() {
            let expect = count(usize::try_from(segment.id()).unwrap());
            let expect = format!(r#""n":{expect}}}"#);
            prop_assert!(segment.raw().ends_with(&expect));
        }
    }
}

/// The entity tag and event id of a token's document.
fn etag_and_event_id(
    documents: &FetchedDocuments,
    credential: &Credential,
) -> (Option<String>, Option<EventId>) {
    let digest = credential.token.digest();
    (documents.etag(&digest).map(str::to_owned), documents.event_id(&digest))
}

#[test]
fn etag_and_event_id_are_replaced_with_their_document() {
    let one = credential(&["a"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    let etag = |name: &str| Some(name.to_owned());
    let state = |flag: &str| document(&[&format!("a/{flag}")]);
    documents.apply_stream_flags_now(&one, Some(1), None);
    assert_eq!(etag_and_event_id(&documents, &one), (None, None), "there is no document yet");

    documents.insert_now(&one, etag("x"), state("x"), true);
    assert_eq!(etag_and_event_id(&documents, &one), (etag("x"), None));
    documents.apply_stream_flags_now(&one, Some(1), None);
    assert_eq!(
        etag_and_event_id(&documents, &one),
        (etag("x"), Some(1)),
        "both identify the same state"
    );
    // Otherwise a 304 for x would confirm y.
    documents.apply_stream_flags_now(&one, Some(2), Some(state("y")));
    assert_eq!(etag_and_event_id(&documents, &one), (None, Some(2)));
    documents.insert_now(&one, etag("y"), state("y"), false);
    assert_eq!(etag_and_event_id(&documents, &one), (etag("y"), Some(2)));
    // Otherwise deltas since y would be applied to z.
    documents.insert_now(&one, etag("z"), state("z"), true);
    assert_eq!(etag_and_event_id(&documents, &one), (etag("z"), None));

    documents.apply_stream_flags_now(&one, Some(4), None);
    documents.clear_event_id(&one.token.digest());
    assert_eq!(etag_and_event_id(&documents, &one), (etag("z"), None));
    assert_eq!(flag_names(&documents), ["z"]);
}

#[test]
fn token_with_synced_stream_needs_no_poll() {
    let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
    let both = [one.clone(), two.clone()];
    let followed = |of: &[&Credential]| of.iter().map(|it| it.token.digest()).collect();
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.begin_round();
    documents.insert_now(&one, None, document(&["a/x", "b/old"]), true);
    documents.insert_now(&two, None, document(&["b/old", "c/z"]), true);
    documents.mark_published();
    documents.begin_round();
    assert!(!documents.complete_round(&both, &followed(&[&one]), true));
    documents.confirm_now(&two);
    assert!(documents.complete_round(&both, &followed(&[&one]), true));
    assert!(!documents.has_changes());
    // The last streamed state wins, whichever token it is for.
    let streamed =
        [(&one, "new"), (&two, "new"), (&two, "newer"), (&one, "newer"), (&one, "newest")];
    for (token, name) in streamed {
        let flags = if token == &one { ["a/x", "b/"] } else { ["c/z", "b/"] };
        let flags = [flags[0].to_owned(), format!("{}{name}", flags[1])];
        documents.apply_stream_flags_now(token, Some(1), Some(document(&[&flags[0], &flags[1]])));
        assert!(documents.complete_round(&both, &followed(&[&one, &two]), true));
        assert_eq!(flag_names(&documents), [name, "x", "z"]);
    }
    assert!(!documents.complete_round(&both, &followed(&[&one]), true), "the other needs a poll");
}

/// The published flags, as `project/name`.
fn qualified_flag_names(documents: &FetchedDocuments) -> Vec<String> {
    let document = merge(&documents.merge_input());
    let flags = document.features().iter();
    flags.map(|it| format!("{}/{}", it.project(), it.name())).collect()
}

#[test]
fn removal_is_deferred_until_another_token_reports_the_flag_or_time_expires() {
    let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
    let (now, gone) = (Instant::now(), [Arc::from("x")]);
    let later = now + Duration::from_secs(1);
    for (reported, expect) in [(Some("c/x"), "c/x"), (None, "nothing")] {
        let mut documents = FetchedDocuments::new(None, Instant::now());
        documents.insert_now(&one, None, document(&["a/x", "b/y"]), true);
        documents.insert_now(&two, None, document(&["b/y"]), true);
        assert!(documents.defer_removal(&one, &gone, later));
        assert!(!documents.defer_removal(&one, &[Arc::from("never")], later), "it was not there");
        documents.apply_stream_flags_now(&one, None, Some(document(&["b/y"])));
        documents.expire_removals(now);
        assert_eq!(
            (qualified_flag_names(&documents), documents.next_deadline()),
            (vec!["a/x".into(), "b/y".into()], Some(later))
        );
        if let Some(reported) = reported {
            documents.apply_stream_flags_now(&two, None, Some(document(&["b/y", reported])));
            assert_eq!(
                qualified_flag_names(&documents),
                [reported, "b/y"],
                "the reported flag wins"
            );
        }
        documents.mark_published();
        documents.expire_removals(later);
        assert!(documents.has_changes() && documents.next_deadline().is_none());
        assert_eq!(qualified_flag_names(&documents)[0] == expect, reported.is_some());
        assert!(qualified_flag_names(&documents).contains(&"b/y".to_owned()));
        assert!(!qualified_flag_names(&documents).contains(&"a/x".to_owned()));
    }
}

#[test]
fn removal_is_deferred_unless_another_token_reports_the_flag_in_another_project() {
    let (one, two) = (credential(&["a", "b"]), credential(&["b", "c"]));
    let gone = [Arc::from("x")];
    let is_deferred = |other: &str, first: &str| {
        let mut documents = FetchedDocuments::new(None, Instant::now());
        documents.insert_now(&one, None, document(&[first]), true);
        documents.insert_now(&two, None, document(&[other]), true);
        documents.defer_removal(&one, &gone, Instant::now())
    };
    assert!(!is_deferred("c/x", "a/x"), "it has moved");
    assert!(is_deferred("b/x", "b/x"), "both lose it, and either may report it again");
}

#[test]
fn deferred_removal_includes_segments_of_the_flag() {
    let text = r#"{"features":[{"name":"x","project":"a","strategies":[{"name":"default","segments":[2]}]}],"segments":[{"id":1},{"id":2}]}"#;
    let one = credential(&["a"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    let received = FetchedDocument::new(Document::parse(text.as_bytes()).unwrap());
    documents.insert_now(&one, None, received, true);
    assert!(documents.defer_removal(&one, &[Arc::from("x")], Instant::now()));
    documents.apply_stream_flags_now(&one, None, Some(document(&[])));
    let document = merge(&documents.merge_input());
    assert!(document.feature("x").is_some());
    assert!(document.segment(2).is_some() && document.segment(1).is_none());
}

#[test]
fn wider_projects_of_a_token_are_a_change() {
    let mut one = credential(&["a"]);
    let mut documents = FetchedDocuments::new(None, Instant::now());
    documents.begin_round();
    documents.insert_now(&one, None, document(&["a/x"]), true);
    documents.mark_published();
    one.projects = Projects::All;
    documents.confirm_now(&one);
    assert!(documents.has_changes());
}

#[test]
fn flags_of_earlier_run_stay_until_upstream_responds_to_every_token_in_use() {
    let (one, two) = (credential(&["a"]), credential(&["b"]));
    let both = [one.clone(), two.clone()];
    for projects in [Projects::All, Projects::from_list(["a", "c"])] {
        let scope = Scope { environment: Environment::new("dev"), projects: projects.clone() };
        let before = ServedSnapshot::build(scope, parsed(&["a/gone", "c/frozen"]), None);
        let mut documents = FetchedDocuments::new(Some(&before), Instant::now());
        assert!(!documents.complete_round(&[], NO_TOKENS, true), "no response yet");
        documents.begin_round();
        documents.insert_now(&one, None, document(&["a/x"]), true);
        assert!(!documents.complete_round(&both, NO_TOKENS, true));
        assert_eq!(flag_names(&documents), ["frozen", "x"]);
        assert!(documents.projects().covers(&projects));
        documents.insert_now(&two, None, document(&["b/y"]), true);
        assert!(
            !documents.complete_round(&both, NO_TOKENS, false),
            "other tokens may follow, and see project c"
        );
        assert_eq!(flag_names(&documents), ["frozen", "x", "y"]);
        assert!(documents.complete_round(&both, NO_TOKENS, true));
        assert_eq!(flag_names(&documents), ["x", "y"]);
        assert_eq!(documents.projects(), Projects::from_list(["a", "b"]));
    }
}

#[test]
fn first_response_older_than_served_flags_waits_until_confirmed() {
    let one = credential(&["a"]);
    let (start, sees) = (Instant::now(), |flag: &str, revision| {
        document(&[&format!("a/{flag}")]).with_revision(Some(revision))
    });
    let mut before = FetchedDocuments::new(None, start);
    before.insert(&one, None, sees("served", 7), true, start);
    let at = |seconds| start + Duration::from_secs(seconds);
    // Upstream's first response, and after how many seconds of repeating it is published.
    for (first, revision, expect) in [("newer", 8, 0), ("served", 8, 0), ("older", 6, 60)] {
        let mut documents = restarted(&before, start);
        documents.begin_round();
        documents.insert(&one, None, sees(first, revision), true, start);
        assert!(documents.complete_round(std::slice::from_ref(&one), NO_TOKENS, true));
        assert_eq!(flag_names(&documents), [if expect == 0 { first } else { "served" }]);
        assert_eq!(documents.next_recheck(), (expect > 0).then_some(at(expect)));
        for seconds in [expect.saturating_sub(1), expect] {
            documents.begin_round();
            documents.confirm(&one, at(seconds));
            documents.complete_round(std::slice::from_ref(&one), NO_TOKENS, true);
            documents.advance_time(at(seconds), []);
            assert_eq!(flag_names(&documents) == [first], seconds == expect, "{first}");
        }
        assert_eq!(
            (flag_names(&documents), documents.next_recheck()),
            (vec![first.to_owned()], None)
        );
    }
}

#[test]
fn flags_of_earlier_run_are_removed_at_once_if_tokens_in_use_see_all_their_projects() {
    let one = credential(&["a", "b"]);
    let projects = Projects::from_list(["a"]);
    let scope = Scope { environment: Environment::new("dev"), projects };
    let before = ServedSnapshot::build(scope, parsed(&["a/gone"]), None);
    let mut documents = FetchedDocuments::new(Some(&before), Instant::now());
    documents.begin_round();
    documents.insert_now(&one, None, document(&["a/x"]), true);
    assert!(documents.complete_round(std::slice::from_ref(&one), NO_TOKENS, false));
    assert_eq!((flag_names(&documents), documents.has_inherited()), (vec!["x".into()], false));
}
