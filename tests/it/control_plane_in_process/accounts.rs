//! Accounts, sessions, and attempts to guess passwords and cookies.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use parapet::control_plane::{
    Account, AccountChange, Activity, Actor, Config, ControlPlane, Error, InitialAccount,
    NewAccount, Password, PermissionChange, RootRole, Session, SignInAttempt, TokenPermission,
};

use sqlx::Executor as _;

use super::fixture::{
    self, PASSWORD, SHELL, TestDatabase, actor_of_session, event_kinds, password, sign_in_attempt,
    sign_in_first_admin,
};

super::on_both!(
    accounts_are_created_changed_and_deleted,
    last_admin_cannot_be_demoted_or_deleted,
    only_admins_manage_accounts,
    first_account_gets_configured_or_generated_password,
    session_starts_with_password_and_ends_at_sign_out,
    password_change_ends_other_sessions,
    password_reset_is_not_overwritten_by_own_change,
    account_change_after_permission_revocation_is_denied,
    request_of_ended_session_changes_nothing,
    queued_request_of_ended_session_changes_nothing,
    sessions_expire,
    session_in_use_does_not_expire,
    ten_thousand_wrong_passwords_do_not_lock_out_the_owner,
    ten_thousand_made_up_cookies_are_rejected,
);

const HOME_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

fn new_account(username: &str, role: RootRole) -> NewAccount {
    let username = username.to_owned();
    NewAccount { username, name: None, email: None, role, password: password("ann's password") }
}

/// Signs in to an account that was created by [`new_account`], and returns it as the actor of a change.
async fn sign_in_as(control: &ControlPlane, account: &Account) -> Actor {
    fixture::sign_in_actor(control, &account.username, &password("ann's password")).await
}

async fn accounts_are_created_changed_and_deleted(db: TestDatabase) {
    let control = db.open().await;
    let before = event_kinds(&control).await.len();
    let ann = NewAccount { name: Some(" Ann ".to_owned()), ..new_account("Ann", RootRole::Viewer) };
    let ann = control.create_account(&SHELL, ann).await.unwrap();
    assert_eq!((ann.username.as_str(), ann.name.as_deref()), ("Ann", Some("Ann")));
    let taken = control.create_account(&SHELL, new_account("aNN", RootRole::Editor)).await;
    assert!(matches!(taken, Err(Error::NameTaken("username"))), "{taken:?}");
    let odd = control.create_account(&SHELL, new_account("a b", RootRole::Editor)).await;
    assert!(matches!(odd, Err(Error::InvalidField { field: "username", .. })), "{odd:?}");

    let change = AccountChange {
        password: None,
        name: Some(None),
        email: Some(Some("ann@example.org".to_owned())),
        role: Some(RootRole::Editor),
    };
    let changed = control.update_account(&SHELL, ann.id, change).await.unwrap().unwrap();
    let email = Some("ann@example.org".to_owned());
    let expect = Account { name: None, email, role: RootRole::Editor, ..ann.clone() };
    assert_eq!(changed, expect);
    let granted: BTreeSet<_> =
        [TokenPermission::CreateClientApiToken, TokenPermission::DeleteFrontendApiToken].into();
    let changed = control
        .update_permissions(&SHELL, ann.id, PermissionChange::Replace(granted.clone()))
        .await
        .unwrap();
    let expect = Account { permissions: granted, ..expect };
    assert_eq!(changed.as_ref(), Some(&expect));
    assert_eq!(control.account(&SHELL, ann.id).await.unwrap(), Some(expect.clone()));
    let all = control.accounts(&SHELL.operator).await.unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!(all[1], expect);
    let none = control
        .update_permissions(&SHELL, ann.id, PermissionChange::Replace(BTreeSet::new()))
        .await
        .unwrap()
        .unwrap();
    assert!(none.permissions.is_empty());

    assert!(control.delete_account(&SHELL, ann.id).await.unwrap().is_some());
    assert_eq!(control.delete_account(&SHELL, ann.id).await.unwrap(), None);
    assert_eq!(control.account(&SHELL, ann.id).await.unwrap(), None);
    let expect = [
        "user-created",
        "user-updated",
        "user-permissions-changed",
        "user-permissions-changed",
        "user-deleted",
    ];
    assert_eq!(event_kinds(&control).await[before..], expect);

    for name in ["a", "b", "c", "d"] {
        control.create_account(&SHELL, new_account(name, RootRole::Viewer)).await.unwrap();
    }
    let all = control.accounts(&SHELL.operator).await.unwrap();
    let granted = PermissionChange::Replace([TokenPermission::CreateClientApiToken].into());
    let b = control.update_permissions(&SHELL, all[2].id, granted).await.unwrap().unwrap();
    let page = control.accounts_after(&SHELL.operator, all[1].id, 2).await.unwrap();
    assert_eq!(page, [b, all[3].clone()], "each page continues after the previous one");
    let end = control.accounts_after(&SHELL.operator, all[4].id, 2).await.unwrap();
    assert!(end.is_empty());
    let more = control.create_account(&SHELL, new_account("e", RootRole::Viewer)).await;
    assert!(matches!(more, Err(Error::LimitReached { limit: 5, .. })), "{more:?}");
}

async fn last_admin_cannot_be_demoted_or_deleted(db: TestDatabase) {
    let control = db.open().await;
    let first = sign_in_first_admin(&control).await.account;
    let demote = AccountChange { role: Some(RootRole::Editor), ..AccountChange::default() };
    let demoted = control.update_account(&SHELL, first.id, demote.clone()).await;
    assert!(matches!(demoted, Err(Error::LastAdmin)), "{demoted:?}");
    let deleted = control.delete_account(&SHELL, first.id).await;
    assert!(matches!(deleted, Err(Error::LastAdmin)), "{deleted:?}");
    let second =
        control.create_account(&SHELL, new_account("second", RootRole::Admin)).await.unwrap();
    let second_admin = sign_in_as(&control, &second).await;
    control.update_account(&second_admin, first.id, demote).await.unwrap().unwrap();
    let deleted = control.delete_account(&SHELL, second.id).await;
    assert!(matches!(deleted, Err(Error::LastAdmin)), "{deleted:?}");
}

async fn only_admins_manage_accounts(db: TestDatabase) {
    let control = db.open().await;
    let granted = TokenPermission::ALL.into_iter().collect();
    let ann = control.create_account(&SHELL, new_account("ann", RootRole::Editor)).await.unwrap();
    let ann = control
        .update_permissions(&SHELL, ann.id, PermissionChange::Replace(granted))
        .await
        .unwrap()
        .unwrap();
    let (ann, id) = (sign_in_as(&control, &ann).await, ann.id);
    let refused = |outcome: Result<(), Error>| {
        let Err(Error::MissingPermission(missing)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(missing.permission(), "ADMIN");
    };
    let mallory = new_account("mallory", RootRole::Admin);
    refused(control.create_account(&ann, mallory).await.map(drop));
    let promote = AccountChange { role: Some(RootRole::Admin), ..AccountChange::default() };
    refused(control.update_account(&ann, id, promote).await.map(drop));
    refused(
        control
            .update_permissions(&ann, id, PermissionChange::Replace(BTreeSet::new()))
            .await
            .map(drop),
    );
    refused(control.set_password(&ann, 1, password("mallory's own")).await.map(drop));
    refused(control.delete_account(&ann, 1).await.map(drop));
    refused(control.accounts(&ann.operator).await.map(drop));
    refused(control.account(&ann, id + 1).await.map(drop));
    assert!(control.account(&ann, id).await.unwrap().is_some(), "her own she sees");
}

async fn first_account_gets_configured_or_generated_password(db: TestDatabase) {
    let initial_account = InitialAccount { username: "root".to_owned(), password: None };
    let config = Config { initial_account, ..db.config() };
    let (control, opened) = db.open_with(config.clone()).await;
    let made = opened.account.unwrap();
    let generated = made.generated_password.unwrap();
    let signed_in = control.sign_in(sign_in_attempt(&made.username, &generated)).await.unwrap();
    assert_eq!(signed_in.account.role, RootRole::Admin);
    let (_, again) = db.open_with(config).await;
    assert!(again.account.is_none());
}

async fn session_starts_with_password_and_ends_at_sign_out(db: TestDatabase) {
    let control = db.open().await;
    let wrong = control.sign_in(sign_in_attempt("admin", &password("not the password"))).await;
    assert!(matches!(wrong, Err(Error::WrongPassword)), "{wrong:?}");
    let nobody = control.sign_in(sign_in_attempt("nobody", &password(PASSWORD))).await;
    assert!(matches!(nobody, Err(Error::WrongPassword)), "{nobody:?}");
    let signed_in = control.sign_in(sign_in_attempt(" ADMIN ", &password(PASSWORD))).await.unwrap();
    let cookie = signed_in.session.expose();
    let account = control
        .session(cookie, HOME_ADDRESS, Activity::Interactive)
        .await
        .unwrap()
        .unwrap()
        .account;
    assert_eq!(account, signed_in.account);
    assert!(account.seen_at.is_some());
    // Every instance accepts the session, and notices its end.
    let other = db.open().await;
    assert!(other.session(cookie, HOME_ADDRESS, Activity::Interactive).await.unwrap().is_some());
    let device = signed_in.device.expose();
    assert!(
        control.session(device, HOME_ADDRESS, Activity::Interactive).await.unwrap().is_none(),
        "another cookie's value"
    );
    other.sign_out(cookie, HOME_ADDRESS).await.unwrap();
    assert!(control.session(cookie, HOME_ADDRESS, Activity::Interactive).await.unwrap().is_none());
    control.sign_out(cookie, HOME_ADDRESS).await.unwrap();
    let recorded = event_kinds(&control).await;
    let expect = ["sign-in-refused", "sign-in-refused", "user-signed-in", "user-signed-out"];
    assert_eq!(recorded[recorded.len() - 4..], expect);
}

async fn password_change_ends_other_sessions(db: TestDatabase) {
    let control = db.open().await;
    let ann = control.create_account(&SHELL, new_account("ann", RootRole::Viewer)).await.unwrap();
    let old = password("ann's password");
    let is_open = async |session: &parapet::control_plane::CookieToken| {
        control
            .session(session.expose(), HOME_ADDRESS, Activity::Interactive)
            .await
            .unwrap()
            .is_some()
    };
    let one = control.sign_in(sign_in_attempt("ann", &old)).await.unwrap().session;
    let other = control.sign_in(sign_in_attempt("ann", &old)).await.unwrap().session;
    let hers = actor_of_session(&control, &one).await;
    let guess = password("perhaps this one");
    let guessed = control.change_own_password(&hers, &guess, guess.clone()).await;
    assert!(matches!(guessed, Err(Error::WrongPassword)), "{guessed:?}");
    assert!(is_open(&one).await && is_open(&other).await);

    let second = password("ann's second one");
    control.change_own_password(&hers, &old, second.clone()).await.unwrap();
    assert!(is_open(&one).await && !is_open(&other).await);
    assert!(control.sign_in(sign_in_attempt("ann", &old)).await.is_err());

    control.set_password(&SHELL, ann.id, password("ann's third one")).await.unwrap().unwrap();
    assert!(!is_open(&one).await);
    assert!(control.sign_in(sign_in_attempt("ann", &second)).await.is_err());
    let third = password("ann's third one");
    let last = control.sign_in(sign_in_attempt("ann", &third)).await.unwrap().session;
    control.delete_account(&SHELL, ann.id).await.unwrap();
    assert!(!is_open(&last).await);

    // A stolen session does not allow guessing the password without limit.
    let mut throttled = false;
    for _ in 0..50 {
        let guessed = control.change_own_password(&hers, &guess, guess.clone()).await;
        throttled |= matches!(guessed, Err(Error::RateLimited(_)));
    }
    assert!(throttled);
}

/// The order of the two does not matter: the reset replaces the password that the other change compares
/// with, so the reset wins.
async fn password_reset_is_not_overwritten_by_own_change(db: TestDatabase) {
    let control = db.open().await;
    let ann = control.create_account(&SHELL, new_account("ann", RootRole::Viewer)).await.unwrap();
    let stolen = password("ann's password");
    let thief = control.sign_in(sign_in_attempt("ann", &stolen)).await.unwrap();
    let (chosen, reset) = (password("what the thief wants"), password("what the admin sets"));
    let theirs = actor_of_session(&control, &thief.session).await;
    let (_, set) = tokio::join!(
        control.change_own_password(&theirs, &stolen, chosen.clone()),
        control.set_password(&SHELL, ann.id, reset.clone()),
    );
    set.unwrap().unwrap();
    assert!(control.sign_in(sign_in_attempt("ann", &chosen)).await.is_err());
    control.sign_in(sign_in_attempt("ann", &reset)).await.unwrap();
    let open =
        control.session(thief.session.expose(), HOME_ADDRESS, Activity::Interactive).await.unwrap();
    assert!(open.is_none());
}

/// A request is authenticated before it waits for a password hash or for the database. The permissions
/// at the time of its effect decide.
async fn account_change_after_permission_revocation_is_denied(db: TestDatabase) {
    let control = db.open().await;
    let demoted =
        control.create_account(&SHELL, new_account("demoted", RootRole::Admin)).await.unwrap();
    let deleted =
        control.create_account(&SHELL, new_account("deleted", RootRole::Admin)).await.unwrap();
    let ann = control.create_account(&SHELL, new_account("ann", RootRole::Viewer)).await.unwrap();
    let admins = [sign_in_as(&control, &demoted).await, sign_in_as(&control, &deleted).await];
    let demote = AccountChange { role: Some(RootRole::Editor), ..AccountChange::default() };
    control.update_account(&SHELL, demoted.id, demote).await.unwrap().unwrap();
    control.delete_account(&SHELL, deleted.id).await.unwrap().unwrap();

    let refused = |outcome: Result<(), Error>| match outcome {
        Err(Error::MissingPermission(missing)) => assert_eq!(missing.permission(), "ADMIN"),
        Err(Error::SessionEnded) => {}
        other => panic!("{other:?}"),
    };
    for admin in &admins {
        let promote = AccountChange { role: Some(RootRole::Admin), ..AccountChange::default() };
        let mallory = new_account("mallory", RootRole::Admin);
        refused(control.create_account(admin, mallory).await.map(drop));
        refused(control.update_account(admin, ann.id, promote).await.map(drop));
        let all = PermissionChange::Replace(TokenPermission::ALL.into_iter().collect());
        refused(control.update_permissions(admin, ann.id, all).await.map(drop));
        refused(control.set_password(admin, ann.id, password("mallory's own")).await.map(drop));
        refused(control.delete_account(admin, ann.id).await.map(drop));
    }
    assert_eq!(control.account(&SHELL, ann.id).await.unwrap(), Some(ann.clone()));
    control.sign_in(sign_in_attempt("ann", &password("ann's password"))).await.unwrap();
    let denied = event_kinds(&control).await.into_iter().filter(|kind| kind == "permission-denied");
    assert_eq!(denied.count(), 10);
}

/// A request was authenticated in a session that ended before its effect: by signing out, by a password
/// reset, by too many newer sessions, with its account, or by expiry.
async fn request_of_ended_session_changes_nothing(db: TestDatabase) {
    let control = db.open().await;
    let create = async |name: &str| {
        control.create_account(&SHELL, new_account(name, RootRole::Admin)).await.unwrap()
    };
    let ann = create("ann").await;
    let initial = password("ann's password");
    let begin = async |account: &Account| {
        let attempt = sign_in_attempt(&account.username, &initial);
        let session = control.sign_in(attempt).await.unwrap().session;
        (actor_of_session(&control, &session).await, session)
    };
    let (signed_out, session) = begin(&ann).await;
    control.sign_out(session.expose(), HOME_ADDRESS).await.unwrap();
    let (expired, _) = begin(&ann).await;
    db.execute("UPDATE sessions SET created_at = created_at - 90000000").await;
    let (idle, _) = begin(&ann).await;
    db.execute("UPDATE sessions SET seen_at = seen_at - 30000000").await;
    let (displaced, _) = begin(&ann).await;
    for _ in 0..20 {
        begin(&ann).await;
    }
    let bob = create("bob").await;
    let (reset, _) = begin(&bob).await;
    control.set_password(&SHELL, bob.id, password("what the admin sets")).await.unwrap().unwrap();
    let eve = create("eve").await;
    let (deleted, _) = begin(&eve).await;
    control.delete_account(&SHELL, eve.id).await.unwrap().unwrap();

    let before = control.accounts(&SHELL.operator).await.unwrap();
    let refused = |outcome: Result<(), Error>| {
        assert!(matches!(outcome, Err(Error::SessionEnded)), "{outcome:?}");
    };
    for actor in [&signed_out, &expired, &idle, &displaced, &reset, &deleted] {
        let mallory = new_account("mallory", RootRole::Admin);
        refused(control.create_account(actor, mallory).await.map(drop));
        let demote = AccountChange { role: Some(RootRole::Viewer), ..AccountChange::default() };
        refused(control.update_account(actor, ann.id, demote).await.map(drop));
        let all = PermissionChange::Replace(TokenPermission::ALL.into_iter().collect());
        refused(control.update_permissions(actor, ann.id, all).await.map(drop));
        refused(control.set_password(actor, ann.id, password("mallory's own")).await.map(drop));
        refused(control.delete_account(actor, ann.id).await.map(drop));
    }
    for actor in [&signed_out, &expired, &idle, &displaced] {
        let own = control.change_own_password(actor, &initial, password("mallory's own"));
        refused(own.await);
    }
    assert_eq!(control.accounts(&SHELL.operator).await.unwrap(), before);
    let (open, _) = begin(&ann).await;
    control.change_own_password(&open, &initial, password("ann's second one")).await.unwrap();
    let delete = control.delete_account(&open, bob.id).await;
    assert_eq!(delete.unwrap().map(|it| it.id), Some(bob.id), "an open session does");
}

/// Another writer, for which the authenticated request waits, ends its session.
async fn queued_request_of_ended_session_changes_nothing(db: TestDatabase) {
    let control = db.open().await;
    let owner = sign_in_first_admin(&control).await;
    let actor = actor_of_session(&control, &owner.session).await;
    let mut writer = db.lock().await;
    let end = async {
        writer.execute("DELETE FROM sessions").await.unwrap();
        writer.execute("COMMIT").await.unwrap();
    };
    let mallory = new_account("mallory", RootRole::Admin);
    let (made, ()) = tokio::join!(control.create_account(&actor, mallory), end);
    assert!(matches!(made, Err(Error::SessionEnded)), "{made:?}");
    assert_eq!(control.accounts(&SHELL.operator).await.unwrap().len(), 1);
}

async fn sessions_expire(db: TestDatabase) {
    let control = db.open().await;
    let is_open = async |session: &parapet::control_plane::CookieToken| {
        control
            .session(session.expose(), HOME_ADDRESS, Activity::Interactive)
            .await
            .unwrap()
            .is_some()
    };
    // Moves the sessions in the database into the past: idle ones end after 8 h, all after 24 h.
    let pass = async |time: &str, hours: u32| {
        let millis = u64::from(hours) * 3_600_000;
        db.execute(&format!("UPDATE sessions SET {time} = {time} - {millis}")).await;
    };
    let session = sign_in_first_admin(&control).await.session;
    pass("seen_at", 7).await;
    assert!(is_open(&session).await);
    pass("seen_at", 9).await;
    assert!(!is_open(&session).await);
    let session = sign_in_first_admin(&control).await.session;
    pass("created_at", 23).await;
    assert!(is_open(&session).await);
    pass("created_at", 2).await;
    assert!(!is_open(&session).await, "although it was used just now");
}

async fn session_in_use_does_not_expire(db: TestDatabase) {
    let minute = Duration::from_mins(1);
    let (control, _) = db.open_with(Config { session_idle_timeout: minute, ..db.config() }).await;
    let session = sign_in_first_admin(&control).await.session;
    let later = async || db.execute("UPDATE sessions SET seen_at = seen_at - 40000").await;
    for _ in 0..3 {
        later().await;
        assert!(
            control
                .session(session.expose(), HOME_ADDRESS, Activity::Interactive)
                .await
                .unwrap()
                .is_some()
        );
    }
    later().await;
    let by_itself = control.session(session.expose(), HOME_ADDRESS, Activity::Background).await;
    assert!(by_itself.unwrap().is_some());
    later().await;
    assert!(
        control
            .session(session.expose(), HOME_ADDRESS, Activity::Interactive)
            .await
            .unwrap()
            .is_none()
    );
}

async fn ten_thousand_wrong_passwords_do_not_lock_out_the_owner(db: TestDatabase) {
    let control = db.open().await;
    let right = password(PASSWORD);
    let device = sign_in_first_admin(&control).await.device;
    let attacker = [198, 51, 100, 7].into();
    let (mut judged, mut throttled) = (0, 0);
    for number in 0..10_000 {
        let wrong = Password::for_sign_in(&format!("guess {number}")).unwrap();
        let username = if number % 2 == 0 { "admin" } else { "nobody" };
        let guess = SignInAttempt { username, password: &wrong, address: attacker, device: None };
        match control.sign_in(guess).await {
            Err(Error::WrongPassword) => judged += 1,
            Err(Error::RateLimited(_)) => throttled += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(judged + throttled, 10_000);
    assert!(judged < 500, "{judged} hashes were computed");
    // Even with the right password, from that address.
    let guess = SignInAttempt { address: attacker, ..sign_in_attempt("admin", &right) };
    assert!(matches!(control.sign_in(guess).await, Err(Error::RateLimited(_))));
    // The owner signs in from another address, and from the same address with a known browser.
    control.sign_in(sign_in_attempt("admin", &right)).await.unwrap();
    let known = SignInAttempt { device: Some(device.expose()), ..guess };
    control.sign_in(known).await.unwrap();
    let recorded = event_kinds(&control).await.len();
    assert!(recorded < 1000, "{recorded} events were written");

    // During an attack from many addresses only a known browser can sign in.
    for number in 0..1000_u16 {
        let [high, low] = number.to_be_bytes();
        let wrong = password("another guess");
        let address = [203, 0, high, low].into();
        let guess = SignInAttempt { username: "admin", password: &wrong, address, device: None };
        assert!(control.sign_in(guess).await.is_err());
    }
    let stranger = sign_in_attempt("admin", &right);
    assert!(is_rate_limited(&control, stranger).await);
    let known = SignInAttempt { device: Some(device.expose()), ..stranger };
    control.sign_in(known).await.unwrap();
    // The device cookie of another account does not count for this one.
    control.create_account(&SHELL, new_account("ann", RootRole::Viewer)).await.unwrap();
    let hers = password("ann's password");
    let hers = control.sign_in(sign_in_attempt("ann", &hers)).await.unwrap().device;
    let guess = SignInAttempt { device: Some(hers.expose()), ..stranger };
    assert!(is_rate_limited(&control, guess).await);
}

/// Whether the limit of the account applies. A slow machine may let it admit an attempt or two; a known
/// browser is admitted more often than this.
async fn is_rate_limited(control: &ControlPlane, attempt: SignInAttempt<'_>) -> bool {
    for _ in 0..5 {
        if matches!(control.sign_in(attempt).await, Err(Error::RateLimited(_))) {
            return true;
        }
    }
    false
}

async fn ten_thousand_made_up_cookies_are_rejected(db: TestDatabase) {
    let control = db.open().await;
    let session = sign_in_first_admin(&control).await.session;
    let mut throttled = 0;
    for number in 0..10_000 {
        let made_up = format!("{number:022}.{number:043}");
        match control.session(&made_up, HOME_ADDRESS, Activity::Interactive).await {
            Ok(None) => {}
            Err(Error::RateLimited(_)) => throttled += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(throttled > 5000, "{throttled}");
    assert!(
        control
            .session(session.expose(), HOME_ADDRESS, Activity::Interactive)
            .await
            .unwrap()
            .is_some()
    );
    let again = sign_in_first_admin(&control).await.session;
    assert!(
        control
            .session(again.expose(), HOME_ADDRESS, Activity::Interactive)
            .await
            .unwrap()
            .is_some()
    );
    _ = check_is_send(&control);
}

/// Requests are served on many threads.
fn check_is_send(
    control: &ControlPlane,
) -> impl Future<Output = Result<Option<Session>, Error>> + Send {
    control.session("", HOME_ADDRESS, Activity::Interactive)
}
