//! Tests of single validation results, token lists and revocations.

use super::*;
use crate::{
    protocol::tokens::{ListedToken, TokenList},
    token::{Projects, Scope},
};

const V2: &str = "*:dev.v2_AbCdEfGhIjKlMnOpQrStUv_0123456789_123456789-123456789_123456789ABC";

fn token(text: &str) -> Token {
    Token::parse(text).unwrap()
}

fn grant() -> Grant {
    let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
    Grant { kind: TokenKind::Client, scope }
}

fn listed(secret: ListedSecret) -> ListedToken {
    let Grant { kind, scope: Scope { environment, projects } } = grant();
    let (expires_at, created_at, seen_at) = (None, None, None);
    let name = "sdk".to_owned();
    ListedToken { name, kind, environment, projects, expires_at, created_at, seen_at, secret }
}

fn whole(token: &Token) -> ListedToken {
    listed(ListedSecret::Full(token.clone()))
}

fn selector(text: &str) -> ListedToken {
    listed(ListedSecret::Selector(text.to_owned()))
}

fn cache() -> TokenCache {
    TokenCache::new(100, Duration::from_secs(30))
}

const AN_HOUR: Duration = Duration::from_hours(1);

fn list_of(tokens: &[ListedToken]) -> TokenList {
    TokenList { tokens: tokens.to_vec(), unreadable: Vec::new() }
}

fn served() -> BTreeSet<Environment> {
    BTreeSet::from([Environment::new("dev")])
}

/// Applies a list of upstream.
fn apply(cache: &TokenCache, list: &TokenList, start: RequestStart) -> ListChanges {
    cache.apply_token_list(&TokenListing::new(list, start.wall), &served(), start)
}

/// Applies a list that was requested just now.
fn apply_list(cache: &TokenCache, tokens: &[ListedToken]) -> ListChanges {
    apply(cache, &list_of(tokens), cache.start_request())
}

fn unconfirmed(cache: &TokenCache, age: Duration) -> Vec<Token> {
    cache.take_due_for_revalidation(age, usize::MAX)
}

fn refuses(cache: &TokenCache, token: &Token) -> bool {
    matches!(cache.lookup(token), Some(Err(_)))
}

/// The list as another instance shares it.
fn shared(tokens: &[ListedToken], start: RequestStart) -> TokenListing {
    let listing = TokenListing::new(&list_of(tokens), start.wall);
    TokenListing::decode(&listing.encode()).unwrap()
}

#[test]
fn shared_list_admits_and_revokes_tokens_by_their_digests() {
    let cache = cache();
    let [a, b] = ["*:dev.a", "*:dev.b"].map(token);
    let start = cache.start_request();
    let both = shared(&[whole(&a), whole(&b)], start);
    let changes = cache.apply_token_list(&both, &served(), start);
    assert_eq!((changes.learned, changes.revoked), (2, 0));
    let cached = cache.valid(&a.digest()).expect("it is listed");
    assert!(cached.is_missing_plaintext() && cached.masked() == &*a.masked());
    let start = cache.start_request();
    let changes = cache.apply_token_list(&shared(&[whole(&b)], start), &served(), start);
    assert_eq!((changes.learned, changes.revoked), (0, 1));
    assert!(refuses(&cache, &a) && cache.valid(&b.digest()).is_some());
}

#[test]
fn shared_list_counts_as_of_the_request_of_the_other_instance() {
    let cache = cache();
    let a = token("*:dev.a");
    let requested_at = Instant::now();
    std::thread::sleep(Duration::from_millis(2));
    // It was deleted by this instance meanwhile.
    cache.revoke_token(&ListedSecret::Full(a.clone()));
    let start = cache.request_started_at(requested_at);
    cache.apply_token_list(&shared(&[whole(&a)], start), &served(), start);
    assert!(refuses(&cache, &a));
    let before = requested_at.checked_sub(Duration::from_mins(1)).unwrap();
    let before = cache.request_started_at(before).sequence;
    assert!(before < cache.start_request().sequence, "it was before this process");
    let start = cache.request_started_at(Instant::now());
    cache.apply_token_list(&shared(&[whole(&a)], start), &served(), start);
    assert!(!refuses(&cache, &a));
}

#[test]
fn verdict_of_another_instance_is_superseded_by_a_later_list_without_the_token() {
    let cache = cache();
    let [listed, other] = ["*:dev.listed", "*:dev.other"].map(token);
    let before = cache.start_request();
    assert!(!cache.is_superseded_by_list(&other, before));
    apply_list(&cache, &[whole(&listed)]);
    assert!(cache.is_superseded_by_list(&other, before));
    assert!(!cache.is_superseded_by_list(&listed, before));
    assert!(!cache.is_superseded_by_list(&other, cache.start_request()));
}

/// Both were requested before this process started.
#[test]
fn earlier_verdict_is_superseded_by_an_earlier_list_without_the_token() {
    let (cache, now) = (cache(), Instant::now());
    let revoked = token("*:dev.revoked");
    let ago = |minutes| now.checked_sub(Duration::from_mins(minutes)).unwrap();
    let [verdict, list] = [50, 1].map(|minutes| cache.request_started_at(ago(minutes)));
    cache.apply_token_list(&shared(&[], list), &served(), list);
    assert!(cache.is_superseded_by_list(&revoked, verdict));
}

#[test]
fn a_token_that_left_the_list_is_refused_even_if_it_would_validate() {
    let cache = cache();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    apply_list(&cache, &[whole(&a), whole(&b)]);
    let changes = apply_list(&cache, &[whole(&b)]);
    assert_eq!(changes, ListChanges { learned: 0, revoked: 1, marked_stale: 0 });
    assert!(cache.valid(&a.digest()).is_none());
    assert!(refuses(&cache, &a));
    assert!(cache.valid(&b.digest()).is_some());
}

#[test]
fn an_expired_token_in_the_list_counts_as_missing() {
    let cache = cache();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    apply_list(&cache, &[whole(&a), whole(&b)]);
    let expired = ListedToken { expires_at: Some(Timestamp::now()), ..whole(&a) };
    assert_eq!(apply_list(&cache, &[expired, whole(&b)]).revoked, 1);
}

#[test]
fn a_token_that_was_never_listed_is_only_marked_stale() {
    let cache = cache();
    let (own, other) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    cache.record_valid(&own, grant(), cache.start_request());
    assert!(unconfirmed(&cache, AN_HOUR).is_empty());
    apply_list(&cache, &[whole(&other)]);
    assert!(cache.valid(&own.digest()).is_some());
    assert_eq!(unconfirmed(&cache, AN_HOUR), [own]);
}

#[test]
fn a_v2_token_is_revoked_when_its_selector_leaves_the_list() {
    let cache = cache();
    let secure = token(V2);
    cache.record_valid(&secure, grant(), cache.start_request());
    apply_list(&cache, &[selector(secure.selector().unwrap())]);
    assert!(cache.valid(&secure.digest()).is_some());
    apply_list(&cache, &[selector("another-selector-here_")]);
    assert!(refuses(&cache, &secure));
}

#[test]
fn a_revoked_token_stays_revoked_even_if_it_still_validates() {
    let cache = cache();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    apply_list(&cache, &[whole(&a), whole(&b)]);
    apply_list(&cache, &[whole(&b)]);
    assert_eq!(cache.record_valid(&a, grant(), cache.start_request()), InsertOutcome::Revoked);
    assert!(refuses(&cache, &a));
    let after_a_restart = self::cache();
    after_a_restart.restore(&cache.serialize_if_changed().unwrap()).unwrap();
    assert!(refuses(&after_a_restart, &a));
    apply_list(&cache, &[whole(&a), whole(&b)]);
    assert!(cache.valid(&a.digest()).is_some(), "the list has it again");
}

#[test]
fn the_listed_mark_survives_a_restart() {
    let (old, new) = (cache(), cache());
    let (secure, other) = (token(V2), token("*:dev.bbbb"));
    old.record_valid(&secure, grant(), old.start_request());
    old.serialize_if_changed().unwrap();
    apply_list(&old, &[selector(secure.selector().unwrap())]);
    new.restore(&old.serialize_if_changed().expect("it is listed now")).unwrap();
    assert_eq!(apply_list(&new, &[whole(&other)]).revoked, 1);
}

#[test]
fn a_revoked_v2_token_that_is_listed_again_can_be_validated_again() {
    let cache = cache();
    let secure = token(V2);
    cache.revoke_token(&ListedSecret::Full(secure.clone()));
    apply_list(&cache, &[selector(secure.selector().unwrap())]);
    assert!(!refuses(&cache, &secure));
}

#[test]
fn a_refused_token_that_appears_on_the_list_is_no_longer_refused() {
    let cache = cache();
    let (plain, secure) = (token("*:dev.aaaa"), token(V2));
    cache.record_invalid(&plain, cache.start_request());
    cache.record_invalid(&secure, cache.start_request());
    let list = [whole(&plain), selector(secure.selector().unwrap())];
    apply_list(&cache, &list);
    assert!(cache.valid(&plain.digest()).is_some());
    assert!(!refuses(&cache, &secure), "it is validated when it is presented again");
}

#[test]
fn a_saved_cache_is_restored_without_plaintext() {
    let (old, new) = (cache(), cache());
    let secure = token(V2);
    old.record_valid(&secure, grant(), old.start_request());
    let saved = old.serialize_if_changed().expect("there is a new token");
    assert!(old.serialize_if_changed().is_none(), "nothing changed since");
    assert!(!String::from_utf8_lossy(&saved).contains(secure.expose()));
    assert_eq!(new.restore(&saved).unwrap(), 1);
    let cached = new.valid(&secure.digest()).unwrap();
    assert_eq!(**cached.grant(), grant());
    assert!(cached.is_missing_plaintext());
    assert!(unconfirmed(&new, AN_HOUR).is_empty(), "a token without plaintext cannot be validated");
    cached.set_plaintext(secure.clone());
    assert_eq!(unconfirmed(&new, AN_HOUR), [secure]);
}

/// The file format of the first release.
#[test]
fn format_version_1_can_be_restored() {
    let saved = br#"{"version":1,"verdicts":[{"digest":
        "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0","kind":"frontend",
        "environment":"dev","projects":["web"],"masked":"web:dev.****","listed":true}]}"#;
    let cache = cache();
    assert_eq!(cache.restore(saved).unwrap(), 1);
    let cached = cache.valid(&TokenDigest::of("aaaa")).map(|v| v.masked().to_owned());
    assert_eq!(cached, None);
    assert!(cache.restore(br#"{"version":2,"verdicts":[]}"#).is_err());
}

#[test]
fn made_up_tokens_evict_no_valid_one() {
    let cache = cache();
    let real = token("*:dev.aaaa");
    cache.record_valid(&real, grant(), cache.start_request());
    for i in 0..10_000 {
        cache.record_invalid(&token(&format!("*:dev.made-up-{i}")), cache.start_request());
    }
    cache.rejected.run_pending_tasks();
    assert!(cache.valid(&real.digest()).is_some());
    assert!(cache.rejected_count() <= 100);
}

#[test]
fn a_list_requested_before_a_revocation_does_not_undo_it() {
    let cache = cache();
    let (plain, secure) = (token("*:dev.aaaa"), token(V2));
    let list = [whole(&plain), selector(secure.selector().unwrap())];
    apply_list(&cache, &list);
    cache.record_valid(&secure, grant(), cache.start_request());
    let in_flight = cache.start_request();
    for named in [&list[0].secret, &list[1].secret] {
        cache.revoke_token(named);
    }
    apply(&cache, &list_of(&list), in_flight);
    assert!(refuses(&cache, &plain) && refuses(&cache, &secure));
    apply_list(&cache, &list);
    assert!(cache.valid(&plain.digest()).is_some(), "upstream lists it again");
    assert!(cache.lookup(&secure).is_none(), "it can be validated again");
}

#[test]
fn a_v2_token_revoked_before_it_was_presented_stays_revoked_after_a_restart() {
    let (old, new) = (cache(), cache());
    let secure = token(V2);
    let before = old.start_request();
    old.revoke_token(&ListedSecret::Selector(secure.selector().unwrap().to_owned()));
    for start in [before, old.start_request()] {
        assert_eq!(old.record_valid(&secure, grant(), start), InsertOutcome::Revoked);
    }
    new.restore(&old.serialize_if_changed().expect("a revocation")).unwrap();
    assert!(refuses(&new, &secure));
    apply_list(&new, &[selector(secure.selector().unwrap())]);
    assert!(new.lookup(&secure).is_none());
}

#[test]
fn a_v2_token_that_left_the_list_is_refused_whether_or_not_it_was_presented_before() {
    let secure = token(V2);
    let on_list = [selector(secure.selector().unwrap())];
    let other = [selector("anotherSelector_012345")];
    for is_presented_before in [true, false] {
        let cache = cache();
        let accept = || cache.record_valid(&secure, grant(), cache.start_request());
        apply_list(&cache, &on_list);
        if is_presented_before {
            assert_eq!(accept(), InsertOutcome::New);
        }
        apply_list(&cache, &other);
        assert!(refuses(&cache, &secure));
        assert_eq!(accept(), InsertOutcome::Revoked);
    }
}

#[test]
fn revocations_of_unseen_tokens_are_bounded() {
    let cache = cache();
    let selector = |n: usize| ListedSecret::Selector(format!("{n:022}"));
    for n in 0..10_000 {
        cache.revoke_token(&selector(n));
    }
    cache.revoked.run_pending_tasks();
    assert!(cache.rejected_count() <= 200);
    assert!(
        cache.revoked.contains_key(&TokenId::of_listed(&selector(9_999))),
        "the latest revocations stay"
    );
}

#[test]
fn a_listed_v2_token_has_the_projects_of_the_list() {
    let cache = cache();
    let secure = token(V2);
    cache.record_valid(&secure, grant(), cache.start_request());
    let of = |ids: &[&str]| ListedToken {
        projects: Projects::from_list(ids.iter().copied()),
        ..selector(secure.selector().unwrap())
    };
    let projects = || {
        let cached = cache.valid(&secure.digest()).unwrap();
        assert!(!cached.is_missing_plaintext() && cached.is_listed());
        cached.grant().scope.projects.clone()
    };
    for ids in [&["one"][..], &["one", "two"], &["*"]] {
        assert_eq!(apply_list(&cache, &[of(ids)]).learned, 1);
        assert_eq!(projects(), Projects::from_list(ids.iter().copied()));
    }
    let in_flight = cache.start_request();
    apply_list(&cache, &[of(&["one"])]);
    cache.record_valid(&secure, grant(), in_flight);
    assert_eq!(projects(), Projects::from_list(["one"]), "the list is newer");
}

#[test]
fn a_denial_requested_before_a_list_does_not_overrule_it() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    let in_flight = cache.start_request();
    apply_list(&cache, &[whole(&a)]);
    assert_eq!(cache.record_invalid(&a, in_flight), RejectOutcome::Outdated);
    assert_eq!(cache.record_denial(&a, in_flight), RejectOutcome::Outdated);
    assert!(!refuses(&cache, &a));
    assert_eq!(cache.record_invalid(&a, cache.start_request()), RejectOutcome::Rejected);
    assert!(refuses(&cache, &a));
}

#[test]
fn a_validation_requested_before_a_denial_does_not_overrule_it() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    let in_flight = cache.start_request();
    cache.record_invalid(&a, cache.start_request());
    assert_eq!(cache.record_valid(&a, grant(), in_flight), InsertOutcome::Outdated);
    apply(&cache, &list_of(&[whole(&a)]), in_flight);
    assert!(refuses(&cache, &a));
}

#[test]
fn a_cached_token_is_rejected_at_the_second_denial() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    let deny = || cache.record_denial(&a, cache.start_request());
    let accept = || cache.record_valid(&a, grant(), cache.start_request());
    accept();
    assert_eq!(deny(), RejectOutcome::NeedsRecheck);
    accept();
    assert_eq!(deny(), RejectOutcome::NeedsRecheck);
    assert_eq!(deny(), RejectOutcome::Rejected);
    assert!(refuses(&cache, &a));
}

#[test]
fn a_stale_mark_survives_the_response_to_an_earlier_request() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    let accept = |start| cache.record_valid(&a, grant(), start);
    accept(cache.start_request());
    let in_flight = cache.start_request();
    cache.mark_stale(&ListedSecret::Full(a.clone()));
    accept(in_flight);
    assert_eq!(unconfirmed(&cache, AN_HOUR), std::slice::from_ref(&a));
    accept(cache.start_request());
    assert!(unconfirmed(&cache, AN_HOUR).is_empty());
}

#[test]
fn an_unreadable_list_item_revokes_no_token() {
    let cache = cache();
    let (a, b, secure) = (token("*:dev.aaaa"), token("*:dev.bbbb"), token(V2));
    let text = secure.selector().unwrap();
    cache.record_valid(&secure, grant(), cache.start_request());
    apply_list(&cache, &[whole(&a), whole(&b), selector(text)]);
    let named = [ListedSecret::Full(a.clone()), ListedSecret::Selector(text.to_owned())];
    let unreadable = named.map(Some).to_vec();
    let list = TokenList { tokens: vec![whole(&b)], unreadable };
    let changes = apply(&cache, &list, cache.start_request());
    assert_eq!(changes, ListChanges { learned: 0, revoked: 0, marked_stale: 2 });
    // An item without a name may stand for any token.
    let list = TokenList { tokens: vec![whole(&a)], unreadable: vec![None] };
    let changes = apply(&cache, &list, cache.start_request());
    assert_eq!(changes, ListChanges { learned: 0, revoked: 0, marked_stale: 2 });
    let due = unconfirmed(&cache, AN_HOUR);
    assert!(due.len() == 2 && due.contains(&b) && due.contains(&secure), "they are revalidated");
}

#[tokio::test(start_paused = true)]
async fn ages_do_not_follow_the_wall_clock() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    let in_two_days = Timestamp::now() + jiff::SignedDuration::from_hours(48);
    let start = RequestStart { wall: in_two_days, ..cache.start_request() };
    cache.record_valid(&a, grant(), start);
    assert_eq!(
        cache.valid(&a.digest()).unwrap().confirmed_at().as_second(),
        in_two_days.as_second()
    );
    assert!(unconfirmed(&cache, AN_HOUR).is_empty());
    tokio::time::advance(AN_HOUR + Duration::from_secs(1)).await;
    assert_eq!(unconfirmed(&cache, AN_HOUR), [a]);
}

#[tokio::test(start_paused = true)]
async fn longest_waiting_tokens_are_revalidated_first() {
    let cache = cache();
    let tokens: Vec<_> = (0..9).map(|n| token(&format!("*:dev.secret-{n}"))).collect();
    for token in &tokens {
        cache.record_valid(token, grant(), cache.start_request());
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(unconfirmed(&cache, Duration::from_secs(2)), tokens[..7]);
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_never_confirmed_delay_no_others() {
    let cache = cache();
    let mut waiting: Vec<_> = (0..9).map(|n| token(&format!("*:dev.secret-{n}"))).collect();
    for token in &waiting {
        cache.record_valid(token, grant(), RequestStart::NEVER);
    }
    for _ in 0..3 {
        tokio::time::advance(Duration::from_secs(1)).await;
        let taken = cache.take_due_for_revalidation(AN_HOUR, 3);
        assert_eq!(taken.len(), 3);
        waiting.retain(|token| !taken.contains(token));
    }
    assert_eq!(waiting, [], "each has been taken once");
}

#[tokio::test(start_paused = true)]
async fn a_postponed_token_is_taken_after_its_pause() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    cache.record_valid(&a, grant(), RequestStart::NEVER);
    cache.postpone_revalidation(&a.digest(), Duration::from_secs(15));
    tokio::time::advance(Duration::from_secs(14)).await;
    assert_eq!(unconfirmed(&cache, AN_HOUR), []);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(unconfirmed(&cache, AN_HOUR), [a]);
}

#[test]
fn a_forbidden_token_is_rejected_as_forbidden_unless_it_is_cached_as_valid() {
    let cache = cache();
    let (new, used) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    cache.record_valid(&used, grant(), cache.start_request());
    for token in [&new, &used] {
        cache.record_forbidden(token, grant(), cache.start_request());
    }
    assert_eq!(cache.lookup(&new), Some(Err(AuthError::Forbidden)));
    assert_eq!(cache.rejection(&new.digest()), Some(AuthError::Forbidden));
    assert_eq!(cache.forbidden_grant(&new.digest()).as_deref(), Some(&grant()));
    assert!(cache.valid(&used.digest()).is_some());
    cache.revoke_token(&ListedSecret::Full(new.clone()));
    assert_eq!(cache.lookup(&new), Some(Err(AuthError::Unknown)));
}

#[test]
fn a_listed_forbidden_token_stays_forbidden_until_its_grant_changes() {
    let cache = cache();
    let a = token("*:dev.aaaa");
    cache.record_forbidden(&a, grant(), cache.start_request());
    apply_list(&cache, &[whole(&a)]);
    assert_eq!(cache.lookup(&a), Some(Err(AuthError::Forbidden)));
    apply_list(&cache, &[ListedToken { projects: Projects::from_list(["one"]), ..whole(&a) }]);
    assert!(cache.valid(&a.digest()).is_some());
}

#[test]
fn a_listed_token_of_an_unserved_environment_is_validated_when_it_is_presented() {
    let cache = cache();
    for environment in ["*", "other"] {
        let of = |text| ListedToken {
            environment: Environment::new(environment),
            ..whole(&token(&format!("*:{environment}.{text}")))
        };
        let (new, refused, used) = (of("new"), of("refused"), of("used"));
        let texts = ["new", "refused", "used"].map(|it| token(&format!("*:{environment}.{it}")));
        cache.record_invalid(&texts[1], cache.start_request());
        cache.record_valid(&texts[2], used.grant(), cache.start_request());
        apply_list(&cache, &[new, refused, used]);
        assert!(cache.lookup(&texts[0]).is_none() && cache.lookup(&texts[1]).is_none());
        assert!(cache.valid(&texts[2].digest()).is_some(), "it is cached as valid");
        let changes = apply_list(&cache, &[whole(&token("*:dev.aaaa"))]);
        assert_eq!(changes.revoked, 1);
        assert!(texts.iter().all(|it| refuses(&cache, it)), "they have left the list");
    }
    let admin = ListedToken { kind: TokenKind::Admin, ..whole(&token("*:*.admin")) };
    apply_list(&cache, &[admin]);
    assert!(cache.valid(&TokenDigest::of("*:*.admin")).is_some());
}

/// Random interleavings of lists, validations, denials and revocations, against a simple model that
/// records every response and derives the state from the newest one.
mod interleavings {
    use proptest::prelude::*;

    use super::*;

    /// Tokens 0 and 1 are listed in plaintext; 2 and 3 are v2 tokens, listed by their selector.
    const TOKENS: usize = 4;

    fn token_of(n: usize) -> Token {
        match n {
            0 | 1 => token(&format!("*:dev.secret-{n}")),
            _ => token(&V2.replace("AbCd", &format!("Ab{n}d"))),
        }
    }

    fn named(n: usize) -> ListedSecret {
        let token = token_of(n);
        match token.selector() {
            Some(selector) => ListedSecret::Selector(selector.to_owned()),
            None => ListedSecret::Full(token),
        }
    }

    fn grant_of(project: u8) -> Grant {
        let mut grant = grant();
        grant.scope.projects = Projects::from_list([&*format!("p{project}")]);
        grant
    }

    /// Upstream's state: the project of each token that exists.
    type Upstream = [Option<u8>; TOKENS];

    #[derive(Clone, Debug)]
    enum Step {
        /// A token is created, changed or deleted at upstream.
        Change { token: usize, to: Option<u8> },
        /// A token is deleted at upstream through this edge.
        Revoke { token: usize },
        /// The edge requests the list, unless such a request is in flight.
        StartList,
        /// The edge requests the validation of a token.
        StartValidation { token: usize },
        /// Upstream responds to a request; the response is in flight from then on. In a `stale`
        /// validation upstream accepts every token that ever existed.
        Respond { request: usize, stale: bool },
        /// A response arrives.
        Receive { request: usize },
        /// A response is lost.
        Lose { request: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let (token, request) = (0..TOKENS, 0..4_usize);
        let project = prop_oneof![1 => Just(None), 2 => (0..2_u8).prop_map(Some)];
        let step = prop_oneof![
            3 => (token.clone(), project).prop_map(|(token, to)| Step::Change { token, to }),
            1 => token.clone().prop_map(|token| Step::Revoke { token }),
            3 => Just(Step::StartList),
            4 => token.prop_map(|token| Step::StartValidation { token }),
            6 => (request.clone(), any::<bool>())
                .prop_map(|(request, stale)| Step::Respond { request, stale }),
            6 => request.clone().prop_map(|request| Step::Receive { request }),
            1 => request.prop_map(|request| Step::Lose { request }),
        ];
        prop::collection::vec(step, 1..80)
    }

    enum Request {
        List(Option<Upstream>),
        Validation(usize, Option<Reply>),
    }

    /// The response of `/edge/validate` for a token.
    #[derive(Clone, Copy)]
    enum Reply {
        Valid(u8),
        Invalid,
    }

    /// An event that concerns one token.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    enum TokenEvent {
        /// The project is `None` unless the token is cached or listed in plaintext.
        Listed(Option<u8>),
        Unlisted,
        Valid(u8),
        Invalid,
        Revoked,
    }

    /// The events of one token in the order of their requests.
    struct Model {
        is_listed_in_plaintext: bool,
        events: Vec<(u64, TokenEvent)>,
    }

    impl Model {
        fn record(&mut self, order: u64, event: TokenEvent) {
            // A validation result from upstream's caches does not restore a revoked token.
            if !(matches!(event, TokenEvent::Valid(_)) && self.is_revoked()) {
                self.events.push((order, event));
                self.events.sort_by_key(|(order, _)| *order);
            }
        }

        /// Whether the token was revoked, or was missing in the list after one that contained it, and no
        /// list that was requested later has contained it again.
        fn is_revoked(&self) -> bool {
            self.revocation().is_some_and(|revoked| !self.is_listed_since(revoked))
        }

        /// The sequence number of the latest revocation.
        fn revocation(&self) -> Option<u64> {
            let (mut listed, mut revocation) = (false, None);
            for (order, event) in &self.events {
                match event {
                    TokenEvent::Listed(_) => listed = true,
                    TokenEvent::Unlisted if listed => (listed, revocation) = (false, Some(*order)),
                    TokenEvent::Revoked => revocation = Some(*order),
                    TokenEvent::Valid(_) | TokenEvent::Invalid | TokenEvent::Unlisted => {}
                }
            }
            revocation
        }

        /// The newest event that determines whether the token is valid. A list that never contained the
        /// token determines nothing. A listed selector does not make a token valid; it only makes a
        /// token that was denied or revoked before eligible for validation again.
        fn newest(&self) -> Option<TokenEvent> {
            let revoked = self.revocation().filter(|_| !self.is_listed_in_plaintext);
            let determines = |(order, event): &&(u64, TokenEvent)| match event {
                TokenEvent::Unlisted | TokenEvent::Listed(None) => false,
                TokenEvent::Revoked => self.is_listed_in_plaintext,
                TokenEvent::Listed(Some(_)) | TokenEvent::Valid(_) | TokenEvent::Invalid => {
                    revoked.is_none_or(|revoked| *order > revoked)
                }
            };
            let (order, newest) = self.events.iter().rev().find(determines)?;
            let is_listed_since = self.is_listed_since(*order) && !self.is_listed_in_plaintext;
            (*newest != TokenEvent::Invalid || !is_listed_since).then_some(*newest)
        }

        /// Whether a list that was requested after `order` contains the token.
        fn is_listed_since(&self, order: u64) -> bool {
            let mut later = self.events.iter().filter(|(it, _)| *it > order);
            later.any(|(_, event)| matches!(event, TokenEvent::Listed(_)))
        }

        /// The project of the newest event that has one.
        fn project(&self) -> Option<u8> {
            self.events.iter().rev().find_map(|(_, event)| match event {
                TokenEvent::Listed(project) => *project,
                TokenEvent::Valid(project) => Some(*project),
                _ => None,
            })
        }
    }

    fn check(cache: &TokenCache, models: &[Model; TOKENS]) -> Result<(), TestCaseError> {
        for (n, model) in models.iter().enumerate() {
            let known = cache.lookup(&token_of(n));
            let context = format!("token {n}: {known:?} after {:?}", model.events);
            let admitted = match &known {
                Some(Ok(grant)) => Some(grant),
                _ => None,
            };
            if model.is_revoked() {
                prop_assert!(matches!(known, Some(Err(_))), "revoked: {}", context);
                continue;
            }
            match model.newest() {
                Some(TokenEvent::Invalid) => {
                    prop_assert!(admitted.is_none(), "denied: {}", context);
                }
                Some(TokenEvent::Listed(_) | TokenEvent::Valid(_)) => {
                    let grant = model.project().map(|project| Arc::new(grant_of(project)));
                    prop_assert_eq!(admitted, grant.as_ref(), "valid: {}", context);
                }
                // A token listed by its selector may be accepted if it validates.
                _ if model.is_listed_since(0) => {}
                _ => prop_assert!(admitted.is_none(), "never valid: {}", context),
            }
        }
        Ok(())
    }

    fn run(steps: &[Step]) -> Result<(), TestCaseError> {
        let cache = cache();
        let mut upstream: Upstream = [None; TOKENS];
        let mut ever_had: Upstream = [None; TOKENS];
        let mut models: [Model; TOKENS] = std::array::from_fn(|n| {
            let is_listed_in_plaintext = matches!(named(n), ListedSecret::Full(_));
            Model { is_listed_in_plaintext, events: Vec::new() }
        });
        let mut requests: Vec<(RequestStart, Request)> = Vec::new();
        for step in steps {
            match *step {
                Step::Change { token, to } => {
                    upstream[token] = to;
                    ever_had[token] = to.or(ever_had[token]);
                }
                Step::Revoke { token } => {
                    upstream[token] = None;
                    cache.revoke_token(&named(token));
                    models[token].record(cache.start_request().sequence, TokenEvent::Revoked);
                }
                Step::StartList => {
                    if !requests.iter().any(|(_, request)| matches!(request, Request::List(_))) {
                        requests.push((cache.start_request(), Request::List(None)));
                    }
                }
                Step::StartValidation { token } => {
                    requests.push((cache.start_request(), Request::Validation(token, None)));
                }
                Step::Respond { request, stale } => match requests.get_mut(request) {
                    Some((_, Request::List(response @ None))) => *response = Some(upstream),
                    Some((_, Request::Validation(token, response @ None))) => {
                        let valid = if stale { ever_had } else { upstream };
                        *response = Some(valid[*token].map_or(Reply::Invalid, Reply::Valid));
                    }
                    _ => {}
                },
                Step::Receive { request } => {
                    let has_response = requests.get(request).is_some_and(|(_, sent)| {
                        matches!(sent, Request::List(Some(_)) | Request::Validation(_, Some(_)))
                    });
                    if has_response {
                        let (start, sent) = requests.remove(request);
                        receive(&cache, &mut models, start, &sent);
                    }
                }
                Step::Lose { request } => {
                    if request < requests.len() {
                        requests.remove(request);
                    }
                }
            }
            check(&cache, &models)?;
        }
        Ok(())
    }

    fn receive(
        cache: &TokenCache,
        models: &mut [Model; TOKENS],
        start: RequestStart,
        request: &Request,
    ) {
        match request {
            Request::List(Some(tokens)) => {
                let entries = tokens.iter().enumerate().filter_map(|(n, project)| {
                    let scope = grant_of((*project)?).scope;
                    Some(ListedToken { projects: scope.projects, ..listed(named(n)) })
                });
                let entries: Vec<_> = entries.collect();
                let has_project = |n: usize| {
                    let token = token_of(n);
                    token.selector().is_none() || cache.valid(&token.digest()).is_some()
                };
                let has_project: Vec<_> = (0..TOKENS).map(has_project).collect();
                apply(cache, &list_of(&entries), start);
                for ((model, project), has_project) in
                    models.iter_mut().zip(tokens).zip(has_project)
                {
                    let listed =
                        |project| TokenEvent::Listed(Some(project).filter(|_| has_project));
                    model.record(start.sequence, project.map_or(TokenEvent::Unlisted, listed));
                }
            }
            &Request::Validation(n, Some(Reply::Valid(project))) => {
                cache.record_valid(&token_of(n), grant_of(project), start);
                models[n].record(start.sequence, TokenEvent::Valid(project));
            }
            &Request::Validation(n, Some(Reply::Invalid)) => {
                cache.record_invalid(&token_of(n), start);
                models[n].record(start.sequence, TokenEvent::Invalid);
            }
            Request::List(None) | Request::Validation(_, None) => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn an_older_response_never_overrules_a_newer_one(steps in steps()) {
            run(&steps)?;
        }
    }
}
