//! What becomes of single answers, lists and withdrawals.

use super::*;
use crate::token::{Projects, Scope};

const V2: &str = "*:dev.v2_AbCdEfGhIjKlMnOpQrStUv_0123456789_123456789-123456789_123456789ABC";

fn token(text: &str) -> Token {
    Token::parse(text).unwrap()
}

fn grant() -> Grant {
    let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
    Grant { kind: TokenKind::Client, scope }
}

fn listed(secret: ListedSecret) -> Listed {
    let Grant { kind, scope: Scope { environment, projects } } = grant();
    let (expires_at, created_at, seen_at) = (None, None, None);
    let name = "sdk".to_owned();
    Listed { name, kind, environment, projects, expires_at, created_at, seen_at, secret }
}

fn whole(token: &Token) -> Listed {
    listed(ListedSecret::Full(token.clone()))
}

fn selector(text: &str) -> Listed {
    listed(ListedSecret::Selector(text.to_owned()))
}

fn verdicts() -> Verdicts {
    Verdicts::new(100, Duration::from_secs(30))
}

const AN_HOUR: Duration = Duration::from_hours(1);

fn list_of(tokens: &[Listed]) -> TokenList {
    TokenList { tokens: tokens.to_vec(), unreadable: Vec::new() }
}

fn served() -> BTreeSet<Environment> {
    BTreeSet::from([Environment::new("dev")])
}

/// Takes a list that was requested just now.
fn take(verdicts: &Verdicts, tokens: &[Listed]) -> Changes {
    verdicts.take_list(&list_of(tokens), &served(), verdicts.start_request())
}

fn unconfirmed(verdicts: &Verdicts, age: Duration) -> Vec<Token> {
    verdicts.take_unconfirmed_for(age, usize::MAX)
}

fn refuses(verdicts: &Verdicts, token: &Token) -> bool {
    matches!(verdicts.known(token), Some(Err(_)))
}

#[test]
fn a_token_that_left_the_list_is_refused_even_if_it_would_validate() {
    let verdicts = verdicts();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    take(&verdicts, &[whole(&a), whole(&b)]);
    let changes = take(&verdicts, &[whole(&b)]);
    assert_eq!(changes, Changes { learned: 0, revoked: 1, suspected: 0 });
    assert!(verdicts.valid(&a.digest()).is_none());
    assert!(refuses(&verdicts, &a));
    assert!(verdicts.valid(&b.digest()).is_some());
}

#[test]
fn a_listed_token_past_its_end_is_as_good_as_gone() {
    let verdicts = verdicts();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    take(&verdicts, &[whole(&a), whole(&b)]);
    let expired = Listed { expires_at: Some(Timestamp::now()), ..whole(&a) };
    assert_eq!(take(&verdicts, &[expired, whole(&b)]).revoked, 1);
}

#[test]
fn a_token_that_was_never_listed_is_only_suspected() {
    let verdicts = verdicts();
    let (own, other) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    verdicts.accept(&own, grant(), verdicts.start_request());
    assert!(unconfirmed(&verdicts, AN_HOUR).is_empty());
    take(&verdicts, &[whole(&other)]);
    assert!(verdicts.valid(&own.digest()).is_some());
    assert_eq!(unconfirmed(&verdicts, AN_HOUR), [own]);
}

#[test]
fn a_v2_token_stands_and_falls_with_its_selector() {
    let verdicts = verdicts();
    let secure = token(V2);
    verdicts.accept(&secure, grant(), verdicts.start_request());
    take(&verdicts, &[selector(secure.selector().unwrap())]);
    assert!(verdicts.valid(&secure.digest()).is_some());
    take(&verdicts, &[selector("another-selector-here_")]);
    assert!(refuses(&verdicts, &secure));
}

#[test]
fn a_revoked_token_stays_revoked_whatever_is_still_said_of_it() {
    let verdicts = verdicts();
    let (a, b) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    take(&verdicts, &[whole(&a), whole(&b)]);
    take(&verdicts, &[whole(&b)]);
    assert_eq!(verdicts.accept(&a, grant(), verdicts.start_request()), Accepted::Revoked);
    assert!(refuses(&verdicts, &a));
    let after_a_restart = self::verdicts();
    after_a_restart.restore(&verdicts.save().unwrap()).unwrap();
    assert!(refuses(&after_a_restart, &a));
    take(&verdicts, &[whole(&a), whole(&b)]);
    assert!(verdicts.valid(&a.digest()).is_some(), "the list has it again");
}

#[test]
fn that_a_token_is_listed_outlives_a_restart() {
    let (old, new) = (verdicts(), verdicts());
    let (secure, other) = (token(V2), token("*:dev.bbbb"));
    old.accept(&secure, grant(), old.start_request());
    old.save().unwrap();
    take(&old, &[selector(secure.selector().unwrap())]);
    new.restore(&old.save().expect("it is listed now")).unwrap();
    assert_eq!(take(&new, &[whole(&other)]).revoked, 1);
}

#[test]
fn a_revoked_v2_token_that_is_listed_again_is_asked_for_again() {
    let verdicts = verdicts();
    let secure = token(V2);
    verdicts.withdraw(&ListedSecret::Full(secure.clone()));
    take(&verdicts, &[selector(secure.selector().unwrap())]);
    assert!(!refuses(&verdicts, &secure));
}

#[test]
fn a_refused_token_that_appears_on_the_list_is_no_longer_refused() {
    let verdicts = verdicts();
    let (plain, secure) = (token("*:dev.aaaa"), token(V2));
    verdicts.refuse(&plain, verdicts.start_request());
    verdicts.refuse(&secure, verdicts.start_request());
    let list = [whole(&plain), selector(secure.selector().unwrap())];
    take(&verdicts, &list);
    assert!(verdicts.valid(&plain.digest()).is_some());
    assert!(!refuses(&verdicts, &secure), "it is asked for when it comes again");
}

#[test]
fn saved_verdicts_come_back_without_any_plaintext() {
    let (old, new) = (verdicts(), verdicts());
    let secure = token(V2);
    old.accept(&secure, grant(), old.start_request());
    let saved = old.save().expect("there is a new verdict");
    assert!(old.save().is_none(), "nothing changed since");
    assert!(!String::from_utf8_lossy(&saved).contains(secure.expose()));
    assert_eq!(new.restore(&saved).unwrap(), 1);
    let verdict = new.valid(&secure.digest()).unwrap();
    assert_eq!(**verdict.grant(), grant());
    assert!(verdict.wants_plaintext());
    assert!(unconfirmed(&new, AN_HOUR).is_empty(), "nobody can be asked without plaintext");
    verdict.learn(secure.clone());
    assert_eq!(unconfirmed(&new, AN_HOUR), [secure]);
}

/// The file format of the first release, as it was written then.
#[test]
fn version_1_of_the_saved_form_is_read() {
    let saved = br#"{"version":1,"verdicts":[{"digest":
        "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0","kind":"frontend",
        "environment":"dev","projects":["web"],"masked":"web:dev.****","listed":true}]}"#;
    let verdicts = verdicts();
    assert_eq!(verdicts.restore(saved).unwrap(), 1);
    let verdict = verdicts.valid(&TokenDigest::of("aaaa")).map(|v| v.masked().to_owned());
    assert_eq!(verdict, None);
    assert!(verdicts.restore(br#"{"version":2,"verdicts":[]}"#).is_err());
}

#[test]
fn made_up_tokens_push_out_no_valid_one() {
    let verdicts = verdicts();
    let real = token("*:dev.aaaa");
    verdicts.accept(&real, grant(), verdicts.start_request());
    for i in 0..10_000 {
        verdicts.refuse(&token(&format!("*:dev.made-up-{i}")), verdicts.start_request());
    }
    verdicts.refused.run_pending_tasks();
    assert!(verdicts.valid(&real.digest()).is_some());
    assert!(verdicts.refused_count() <= 100);
}

#[test]
fn a_list_requested_before_a_withdrawal_does_not_undo_it() {
    let verdicts = verdicts();
    let (plain, secure) = (token("*:dev.aaaa"), token(V2));
    let list = [whole(&plain), selector(secure.selector().unwrap())];
    take(&verdicts, &list);
    verdicts.accept(&secure, grant(), verdicts.start_request());
    let in_flight = verdicts.start_request();
    for named in [&list[0].secret, &list[1].secret] {
        verdicts.withdraw(named);
    }
    verdicts.take_list(&list_of(&list), &served(), in_flight);
    assert!(refuses(&verdicts, &plain) && refuses(&verdicts, &secure));
    take(&verdicts, &list);
    assert!(verdicts.valid(&plain.digest()).is_some(), "upstream has it again");
    assert!(verdicts.known(&secure).is_none(), "it can be asked for again");
}

#[test]
fn a_v2_token_withdrawn_before_it_was_presented_stays_withdrawn_over_a_restart() {
    let (old, new) = (verdicts(), verdicts());
    let secure = token(V2);
    let before = old.start_request();
    old.withdraw(&ListedSecret::Selector(secure.selector().unwrap().to_owned()));
    for start in [before, old.start_request()] {
        assert_eq!(old.accept(&secure, grant(), start), Accepted::Revoked);
    }
    new.restore(&old.save().expect("a withdrawal")).unwrap();
    assert!(refuses(&new, &secure));
    take(&new, &[selector(secure.selector().unwrap())]);
    assert!(new.known(&secure).is_none());
}

#[test]
fn a_v2_token_that_left_the_list_is_refused_however_late_it_was_presented() {
    let secure = token(V2);
    let on_list = [selector(secure.selector().unwrap())];
    let other = [selector("anotherSelector_012345")];
    for is_presented_before in [true, false] {
        let verdicts = verdicts();
        let accept = || verdicts.accept(&secure, grant(), verdicts.start_request());
        take(&verdicts, &on_list);
        if is_presented_before {
            assert_eq!(accept(), Accepted::New);
        }
        take(&verdicts, &other);
        assert!(refuses(&verdicts, &secure));
        assert_eq!(accept(), Accepted::Revoked);
    }
}

#[test]
fn withdrawals_of_unseen_tokens_take_a_bounded_space() {
    let verdicts = verdicts();
    let selector = |n: usize| ListedSecret::Selector(format!("{n:022}"));
    for n in 0..10_000 {
        verdicts.withdraw(&selector(n));
    }
    verdicts.revoked_selectors.run_pending_tasks();
    assert!(verdicts.refused_count() <= 100);
    assert!(verdicts.revoked_selectors.contains_key(selector(9_999).expose()), "the latest stay");
}

#[test]
fn a_listed_v2_token_has_the_projects_that_the_list_tells() {
    let verdicts = verdicts();
    let secure = token(V2);
    verdicts.accept(&secure, grant(), verdicts.start_request());
    let of = |ids: &[&str]| Listed {
        projects: Projects::from_list(ids.iter().copied()),
        ..selector(secure.selector().unwrap())
    };
    let projects = || {
        let verdict = verdicts.valid(&secure.digest()).unwrap();
        assert!(!verdict.wants_plaintext() && verdict.is_listed());
        verdict.grant().scope.projects.clone()
    };
    for ids in [&["one"][..], &["one", "two"], &["*"]] {
        assert_eq!(take(&verdicts, &[of(ids)]).learned, 1);
        assert_eq!(projects(), Projects::from_list(ids.iter().copied()));
    }
    let in_flight = verdicts.start_request();
    take(&verdicts, &[of(&["one"])]);
    verdicts.accept(&secure, grant(), in_flight);
    assert_eq!(projects(), Projects::from_list(["one"]), "the list is newer");
}

#[test]
fn a_denial_requested_before_a_list_does_not_overrule_it() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    let in_flight = verdicts.start_request();
    take(&verdicts, &[whole(&a)]);
    assert_eq!(verdicts.refuse(&a, in_flight), Rejected::Outdated);
    assert_eq!(verdicts.deny(&a, in_flight), Rejected::Outdated);
    assert!(!refuses(&verdicts, &a));
    assert_eq!(verdicts.refuse(&a, verdicts.start_request()), Rejected::Refused);
    assert!(refuses(&verdicts, &a));
}

#[test]
fn an_admission_requested_before_a_denial_does_not_overrule_it() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    let in_flight = verdicts.start_request();
    verdicts.refuse(&a, verdicts.start_request());
    assert_eq!(verdicts.accept(&a, grant(), in_flight), Accepted::Outdated);
    verdicts.take_list(&list_of(&[whole(&a)]), &served(), in_flight);
    assert!(refuses(&verdicts, &a));
}

#[test]
fn a_denial_of_a_known_token_counts_when_it_is_repeated() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    let deny = || verdicts.deny(&a, verdicts.start_request());
    let accept = || verdicts.accept(&a, grant(), verdicts.start_request());
    accept();
    assert_eq!(deny(), Rejected::Doubted);
    accept();
    assert_eq!(deny(), Rejected::Doubted);
    assert_eq!(deny(), Rejected::Refused);
    assert!(refuses(&verdicts, &a));
}

#[test]
fn a_doubt_outlives_the_answer_to_an_earlier_request() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    let accept = |start| verdicts.accept(&a, grant(), start);
    accept(verdicts.start_request());
    let in_flight = verdicts.start_request();
    verdicts.suspect(&ListedSecret::Full(a.clone()));
    accept(in_flight);
    assert_eq!(unconfirmed(&verdicts, AN_HOUR), std::slice::from_ref(&a));
    accept(verdicts.start_request());
    assert!(unconfirmed(&verdicts, AN_HOUR).is_empty());
}

#[test]
fn an_item_that_cannot_be_read_revokes_no_token() {
    let verdicts = verdicts();
    let (a, b, secure) = (token("*:dev.aaaa"), token("*:dev.bbbb"), token(V2));
    let text = secure.selector().unwrap();
    verdicts.accept(&secure, grant(), verdicts.start_request());
    take(&verdicts, &[whole(&a), whole(&b), selector(text)]);
    let named = [ListedSecret::Full(a.clone()), ListedSecret::Selector(text.to_owned())];
    let unreadable = named.map(Some).to_vec();
    let list = TokenList { tokens: vec![whole(&b)], unreadable };
    let changes = verdicts.take_list(&list, &served(), verdicts.start_request());
    assert_eq!(changes, Changes { learned: 0, revoked: 0, suspected: 2 });
    // Where none is named, it may be any.
    let list = TokenList { tokens: vec![whole(&a)], unreadable: vec![None] };
    let changes = verdicts.take_list(&list, &served(), verdicts.start_request());
    assert_eq!(changes, Changes { learned: 0, revoked: 0, suspected: 2 });
    let due = unconfirmed(&verdicts, AN_HOUR);
    assert!(due.len() == 2 && due.contains(&b) && due.contains(&secure), "they are asked for");
}

#[tokio::test(start_paused = true)]
async fn ages_do_not_follow_the_wall_clock() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    let in_two_days = Timestamp::now() + jiff::SignedDuration::from_hours(48);
    let start = RequestStart { wall: in_two_days, ..verdicts.start_request() };
    verdicts.accept(&a, grant(), start);
    assert_eq!(verdicts.valid(&a.digest()).unwrap().checked().as_second(), in_two_days.as_second());
    assert!(unconfirmed(&verdicts, AN_HOUR).is_empty());
    tokio::time::advance(AN_HOUR + Duration::from_secs(1)).await;
    assert_eq!(unconfirmed(&verdicts, AN_HOUR), [a]);
}

#[tokio::test(start_paused = true)]
async fn tokens_that_have_waited_longest_are_asked_for_first() {
    let verdicts = verdicts();
    let tokens: Vec<_> = (0..9).map(|n| token(&format!("*:dev.secret-{n}"))).collect();
    for token in &tokens {
        verdicts.accept(token, grant(), verdicts.start_request());
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(unconfirmed(&verdicts, Duration::from_secs(2)), tokens[..7]);
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_never_confirmed_delay_no_others() {
    let verdicts = verdicts();
    let mut waiting: Vec<_> = (0..9).map(|n| token(&format!("*:dev.secret-{n}"))).collect();
    for token in &waiting {
        verdicts.accept(token, grant(), RequestStart::NEVER);
    }
    for _ in 0..3 {
        tokio::time::advance(Duration::from_secs(1)).await;
        let taken = verdicts.take_unconfirmed_for(AN_HOUR, 3);
        assert_eq!(taken.len(), 3);
        waiting.retain(|token| !taken.contains(token));
    }
    assert_eq!(waiting, [], "each has been taken");
}

#[tokio::test(start_paused = true)]
async fn a_postponed_token_is_taken_when_its_time_has_come() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    verdicts.accept(&a, grant(), RequestStart::NEVER);
    verdicts.postpone(&a.digest(), Duration::from_secs(15));
    tokio::time::advance(Duration::from_secs(14)).await;
    assert_eq!(unconfirmed(&verdicts, AN_HOUR), []);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(unconfirmed(&verdicts, AN_HOUR), [a]);
}

#[test]
fn a_forbidden_token_is_refused_as_such_and_one_in_use_is_not() {
    let verdicts = verdicts();
    let (new, used) = (token("*:dev.aaaa"), token("*:dev.bbbb"));
    verdicts.accept(&used, grant(), verdicts.start_request());
    for token in [&new, &used] {
        verdicts.forbid(token, grant(), verdicts.start_request());
    }
    assert_eq!(verdicts.known(&new), Some(Err(Denied::Forbidden)));
    assert_eq!(verdicts.refusal(&new.digest()), Some(Denied::Forbidden));
    assert_eq!(verdicts.forbidden(&new.digest()).as_deref(), Some(&grant()));
    assert!(verdicts.valid(&used.digest()).is_some());
    verdicts.withdraw(&ListedSecret::Full(new.clone()));
    assert_eq!(verdicts.known(&new), Some(Err(Denied::Unknown)));
}

#[test]
fn a_listed_token_whose_use_is_forbidden_stays_forbidden_until_it_is_given_another_grant() {
    let verdicts = verdicts();
    let a = token("*:dev.aaaa");
    verdicts.forbid(&a, grant(), verdicts.start_request());
    take(&verdicts, &[whole(&a)]);
    assert_eq!(verdicts.known(&a), Some(Err(Denied::Forbidden)));
    take(&verdicts, &[Listed { projects: Projects::from_list(["one"]), ..whole(&a) }]);
    assert!(verdicts.valid(&a.digest()).is_some());
}

#[test]
fn a_listed_token_of_an_environment_that_is_not_served_is_asked_about_when_it_is_presented() {
    let verdicts = verdicts();
    for environment in ["*", "other"] {
        let of = |text| Listed {
            environment: Environment::new(environment),
            ..whole(&token(&format!("*:{environment}.{text}")))
        };
        let (new, refused, used) = (of("new"), of("refused"), of("used"));
        let texts = ["new", "refused", "used"].map(|it| token(&format!("*:{environment}.{it}")));
        verdicts.refuse(&texts[1], verdicts.start_request());
        verdicts.accept(&texts[2], used.grant(), verdicts.start_request());
        take(&verdicts, &[new, refused, used]);
        assert!(verdicts.known(&texts[0]).is_none() && verdicts.known(&texts[1]).is_none());
        assert!(verdicts.valid(&texts[2].digest()).is_some(), "it is in use");
        let changes = take(&verdicts, &[whole(&token("*:dev.aaaa"))]);
        assert_eq!(changes.revoked, 1);
        assert!(texts.iter().all(|it| refuses(&verdicts, it)), "they have left the list");
    }
    let admin = Listed { kind: TokenKind::Admin, ..whole(&token("*:*.admin")) };
    take(&verdicts, &[admin]);
    assert!(verdicts.valid(&TokenDigest::of("*:*.admin")).is_some());
}

/// Random interleavings of lists, validations, denials and withdrawals, against a simple model: it
/// keeps all that was heard, and looks for the newest of it each time.
mod interleavings {
    use proptest::prelude::*;

    use super::*;

    /// Tokens 0 and 1 are listed whole; 2 and 3 are v2 tokens, listed by their selector.
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

    /// What upstream has: for each token the project that it sees.
    type Upstream = [Option<u8>; TOKENS];

    #[derive(Clone, Debug)]
    enum Step {
        /// Somebody makes, changes or deletes a token at upstream.
        Change { token: usize, to: Option<u8> },
        /// Somebody deletes a token at upstream by way of this edge.
        Withdraw { token: usize },
        /// The edge begins to read the list, unless it is doing so.
        StartList,
        /// The edge begins to validate a token.
        StartValidation { token: usize },
        /// Upstream answers what it was asked, the answer being under way from then on. A validation is
        /// `stale` where upstream vouches for all that it ever had.
        Answer { request: usize, stale: bool },
        /// An answer arrives.
        Arrive { request: usize },
        /// An answer is lost.
        Lose { request: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let (token, request) = (0..TOKENS, 0..4_usize);
        let project = prop_oneof![1 => Just(None), 2 => (0..2_u8).prop_map(Some)];
        let step = prop_oneof![
            3 => (token.clone(), project).prop_map(|(token, to)| Step::Change { token, to }),
            1 => token.clone().prop_map(|token| Step::Withdraw { token }),
            3 => Just(Step::StartList),
            4 => token.prop_map(|token| Step::StartValidation { token }),
            6 => (request.clone(), any::<bool>())
                .prop_map(|(request, stale)| Step::Answer { request, stale }),
            6 => request.clone().prop_map(|request| Step::Arrive { request }),
            1 => request.prop_map(|request| Step::Lose { request }),
        ];
        prop::collection::vec(step, 1..80)
    }

    enum Asked {
        List(Option<Upstream>),
        Validation(usize, Option<Reply>),
    }

    /// What `/edge/validate` says of a token.
    #[derive(Clone, Copy)]
    enum Reply {
        Valid(u8),
        Invalid,
    }

    /// What was heard of one token, and when it was asked for.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    enum Heard {
        /// The project is told of a token that is known, or is listed whole.
        Listed(Option<u8>),
        Unlisted,
        Valid(u8),
        Invalid,
        Withdrawn,
    }

    /// All that was heard of one token, by the order of the requests.
    struct Model {
        is_listed_whole: bool,
        heard: Vec<(u64, Heard)>,
    }

    impl Model {
        fn hear(&mut self, order: u64, heard: Heard) {
            // What upstream's caches say of a token that has been taken back counts for nothing.
            if !(matches!(heard, Heard::Valid(_)) && self.is_taken_back()) {
                self.heard.push((order, heard));
                self.heard.sort_by_key(|(order, _)| *order);
            }
        }

        /// Whether it was withdrawn, or is missing on the list that followed one that showed it, and no
        /// list that was requested later has shown it again.
        fn is_taken_back(&self) -> bool {
            self.revocation().is_some_and(|revoked| !self.is_shown_since(revoked))
        }

        /// The order of the latest revocation.
        fn revocation(&self) -> Option<u64> {
            let (mut listed, mut revocation) = (false, None);
            for (order, heard) in &self.heard {
                match heard {
                    Heard::Listed(_) => listed = true,
                    Heard::Unlisted if listed => (listed, revocation) = (false, Some(*order)),
                    Heard::Withdrawn => revocation = Some(*order),
                    Heard::Valid(_) | Heard::Invalid | Heard::Unlisted => {}
                }
            }
            revocation
        }

        /// The newest of what says whether it is valid: a list that never had it says nothing. One
        /// that shows a selector proves no token, but that a token exists which was denied or taken
        /// back before: it is asked for again.
        fn newest(&self) -> Option<Heard> {
            let revoked = self.revocation().filter(|_| !self.is_listed_whole);
            let says = |(order, heard): &&(u64, Heard)| match heard {
                Heard::Unlisted | Heard::Listed(None) => false,
                Heard::Withdrawn => self.is_listed_whole,
                Heard::Listed(Some(_)) | Heard::Valid(_) | Heard::Invalid => {
                    revoked.is_none_or(|revoked| *order > revoked)
                }
            };
            let (order, newest) = self.heard.iter().rev().find(says)?;
            let is_shown_since = self.is_shown_since(*order) && !self.is_listed_whole;
            (*newest != Heard::Invalid || !is_shown_since).then_some(*newest)
        }

        /// Whether a list that was requested after `order` shows it.
        fn is_shown_since(&self, order: u64) -> bool {
            let mut later = self.heard.iter().filter(|(it, _)| *it > order);
            later.any(|(_, heard)| matches!(heard, Heard::Listed(_)))
        }

        /// The project that was told last.
        fn project(&self) -> Option<u8> {
            self.heard.iter().rev().find_map(|(_, heard)| match heard {
                Heard::Listed(project) => *project,
                Heard::Valid(project) => Some(*project),
                _ => None,
            })
        }
    }

    fn check(verdicts: &Verdicts, models: &[Model; TOKENS]) -> Result<(), TestCaseError> {
        for (n, model) in models.iter().enumerate() {
            let known = verdicts.known(&token_of(n));
            let told = format!("token {n}: {known:?} after {:?}", model.heard);
            let admitted = match &known {
                Some(Ok(grant)) => Some(grant),
                _ => None,
            };
            if model.is_taken_back() {
                prop_assert!(matches!(known, Some(Err(_))), "taken back: {}", told);
                continue;
            }
            match model.newest() {
                Some(Heard::Invalid) => prop_assert!(admitted.is_none(), "denied: {}", told),
                Some(Heard::Listed(_) | Heard::Valid(_)) => {
                    let grant = model.project().map(|project| Arc::new(grant_of(project)));
                    prop_assert_eq!(admitted, grant.as_ref(), "valid: {}", told);
                }
                // What a list shows by its selector may be admitted, if upstream vouches for it.
                _ if model.is_shown_since(0) => {}
                _ => prop_assert!(admitted.is_none(), "never valid: {}", told),
            }
        }
        Ok(())
    }

    fn run(steps: &[Step]) -> Result<(), TestCaseError> {
        let verdicts = verdicts();
        let mut upstream: Upstream = [None; TOKENS];
        let mut ever_had: Upstream = [None; TOKENS];
        let mut models: [Model; TOKENS] = std::array::from_fn(|n| {
            let is_listed_whole = matches!(named(n), ListedSecret::Full(_));
            Model { is_listed_whole, heard: Vec::new() }
        });
        let mut requests: Vec<(RequestStart, Asked)> = Vec::new();
        for step in steps {
            match *step {
                Step::Change { token, to } => {
                    upstream[token] = to;
                    ever_had[token] = to.or(ever_had[token]);
                }
                Step::Withdraw { token } => {
                    upstream[token] = None;
                    verdicts.withdraw(&named(token));
                    models[token].hear(verdicts.start_request().order, Heard::Withdrawn);
                }
                Step::StartList => {
                    if !requests.iter().any(|(_, asked)| matches!(asked, Asked::List(_))) {
                        requests.push((verdicts.start_request(), Asked::List(None)));
                    }
                }
                Step::StartValidation { token } => {
                    requests.push((verdicts.start_request(), Asked::Validation(token, None)));
                }
                Step::Answer { request, stale } => match requests.get_mut(request) {
                    Some((_, Asked::List(answer @ None))) => *answer = Some(upstream),
                    Some((_, Asked::Validation(token, answer @ None))) => {
                        let vouched_for = if stale { ever_had } else { upstream };
                        *answer = Some(vouched_for[*token].map_or(Reply::Invalid, Reply::Valid));
                    }
                    _ => {}
                },
                Step::Arrive { request } => {
                    let has_answer = requests.get(request).is_some_and(|(_, asked)| {
                        matches!(asked, Asked::List(Some(_)) | Asked::Validation(_, Some(_)))
                    });
                    if has_answer {
                        let (start, asked) = requests.remove(request);
                        arrive(&verdicts, &mut models, start, &asked);
                    }
                }
                Step::Lose { request } => {
                    if request < requests.len() {
                        requests.remove(request);
                    }
                }
            }
            check(&verdicts, &models)?;
        }
        Ok(())
    }

    fn arrive(
        verdicts: &Verdicts,
        models: &mut [Model; TOKENS],
        start: RequestStart,
        asked: &Asked,
    ) {
        match asked {
            Asked::List(Some(tokens)) => {
                let entries = tokens.iter().enumerate().filter_map(|(n, project)| {
                    let scope = grant_of((*project)?).scope;
                    Some(Listed { projects: scope.projects, ..listed(named(n)) })
                });
                let entries: Vec<_> = entries.collect();
                let tells_project = |n: usize| {
                    let token = token_of(n);
                    token.selector().is_none() || verdicts.valid(&token.digest()).is_some()
                };
                let tells_project: Vec<_> = (0..TOKENS).map(tells_project).collect();
                verdicts.take_list(&list_of(&entries), &served(), start);
                for ((model, project), tells) in models.iter_mut().zip(tokens).zip(tells_project) {
                    let listed = |project| Heard::Listed(Some(project).filter(|_| tells));
                    model.hear(start.order, project.map_or(Heard::Unlisted, listed));
                }
            }
            &Asked::Validation(n, Some(Reply::Valid(project))) => {
                verdicts.accept(&token_of(n), grant_of(project), start);
                models[n].hear(start.order, Heard::Valid(project));
            }
            &Asked::Validation(n, Some(Reply::Invalid)) => {
                verdicts.refuse(&token_of(n), start);
                models[n].hear(start.order, Heard::Invalid);
            }
            Asked::List(None) | Asked::Validation(_, None) => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn no_older_answer_overrules_a_newer_one(steps in steps()) {
            run(&steps)?;
        }
    }
}
