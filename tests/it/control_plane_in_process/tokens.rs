//! API tokens: created, listed, changed, deleted, and effective at once.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use parapet::control_plane::{
    AccountChange, Actor, ControlPlane, Error, InitialTokens, NewAccount, NewToken, Operator,
    PermissionChange, RootRole, TokenBootstrapOutcome, TokenMetadata, TokenPermission,
};
use parapet::token::{Environment, Projects, Token, TokenKind};

use super::fixture::{
    RunningInstance, SHELL, TestDatabase, actor_of_session, event_kinds, password, sign_in_actor,
    sign_in_first_admin,
};

super::on_both!(
    token_is_created_listed_changed_and_deleted,
    token_is_valid_at_once_and_until_it_expires,
    invalid_token_is_rejected_with_its_field,
    permissions_are_enforced_and_denials_recorded,
    token_change_after_permission_revocation_is_denied,
    number_of_tokens_is_limited,
    initial_tokens_fill_empty_registry_once,
    empty_registry_without_initial_tokens_gets_one_token_of_each_kind,
);

fn new_token(name: &str, kind: TokenKind) -> NewToken {
    let environment = if kind == TokenKind::Admin { "*" } else { "development" };
    NewToken {
        name: name.to_owned(),
        kind,
        environment: Environment::new(environment),
        projects: Projects::All,
        expires_at: None,
    }
}

async fn create_token(control: &ControlPlane, kind: TokenKind) -> (Token, TokenMetadata) {
    control.create_token(&SHELL, new_token("made", kind)).await.unwrap()
}

fn in_a_second() -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(1)
}

async fn token_is_created_listed_changed_and_deleted(db: TestDatabase) {
    let control = db.open().await;
    let first = control.tokens(&SHELL.operator).len();
    let requested = NewToken {
        projects: Projects::from_list(["web", "app"]),
        ..new_token("billing", TokenKind::Client)
    };
    let (secret, made) = control.create_token(&SHELL, requested.clone()).await.unwrap();
    assert!(secret.expose().starts_with("[]:development.v2_"), "{secret:?}");
    assert_eq!(secret.selector(), Some(made.id.as_str()));
    assert_eq!((made.name.as_str(), made.kind), ("billing", TokenKind::Client));
    assert_eq!((&made.projects, made.created_by.as_str()), (&requested.projects, "command line"));
    assert_eq!((made.expires_at, made.seen_at), (None, None));
    assert_eq!(control.token_name(&secret.digest()).as_deref(), Some("billing"));
    let one = NewToken { projects: Projects::from_list(["web"]), ..requested };
    let (of_one, _) = control.create_token(&SHELL, one).await.unwrap();
    assert!(of_one.expose().starts_with("web:development.v2_"), "{of_one:?}");

    // Another instance, or this one after a restart, knows the same token.
    let again = db.open().await;
    assert_eq!(again.tokens(&SHELL.operator), control.tokens(&SHELL.operator));
    assert!(again.tokens(&SHELL.operator).contains(&made));

    let end = Timestamp::from_second(4_000_000_000).unwrap();
    let changed = control.update_token(&SHELL, &made.id, Some(end)).await.unwrap().unwrap();
    assert_eq!(changed, TokenMetadata { expires_at: Some(end), ..made.clone() });
    let changed = control.update_token(&SHELL, secret.expose(), None).await.unwrap().unwrap();
    assert_eq!(changed, made);

    assert_eq!(control.delete_token(&SHELL, secret.expose()).await.unwrap(), Some(made.clone()));
    assert_eq!(control.delete_token(&SHELL, &made.id).await.unwrap(), None);
    assert_eq!(control.update_token(&SHELL, &made.id, None).await.unwrap(), None);
    let by_id = control.delete_token(&SHELL, of_one.selector().unwrap()).await.unwrap();
    assert_eq!(by_id.map(|token| token.name).as_deref(), Some("billing"));
    assert_eq!(control.tokens(&SHELL.operator).len(), first);
    assert_eq!(control.token_name(&secret.digest()), None);
    let recorded = event_kinds(&control).await.split_off(1 + first);
    let expect = ["created", "created", "updated", "updated", "deleted", "deleted"];
    assert_eq!(recorded, expect.map(|what| format!("api-token-{what}")));
}

async fn token_is_valid_at_once_and_until_it_expires(db: TestDatabase) {
    let control = db.open().await;
    let instance = RunningInstance::start(&control);
    let (secret, made) = create_token(&control, TokenKind::Frontend).await;
    // `run` may start a moment later; from then on no change is late.
    instance.wait_until(&secret, true).await;
    let (other, _) = create_token(&control, TokenKind::Client).await;
    assert!(instance.accepts(&other).await);
    control.delete_token(&SHELL, &made.id).await.unwrap();
    assert!(!instance.accepts(&secret).await);
    assert!(instance.accepts(&other).await);

    let brief =
        NewToken { expires_at: Some(in_a_second()), ..new_token("brief", TokenKind::Client) };
    let (brief, _) = control.create_token(&SHELL, brief).await.unwrap();
    instance.wait_until(&brief, false).await;
    assert_eq!(control.token_name(&brief.digest()), None);
    let grants = control.grants();
    assert!(grants.iter().all(|(digest, _)| *digest != brief.digest()));

    let (lasting, _) = create_token(&control, TokenKind::Client).await;
    control.update_token(&SHELL, lasting.expose(), Some(in_a_second())).await.unwrap();
    instance.wait_until(&lasting, false).await;
    control.update_token(&SHELL, lasting.expose(), None).await.unwrap();
    assert!(instance.accepts(&lasting).await);
}

async fn invalid_token_is_rejected_with_its_field(db: TestDatabase) {
    let control = db.open().await;
    let check = async |new: NewToken, expected: &str| match control.create_token(&SHELL, new).await
    {
        Err(Error::InvalidField { field, .. }) => assert_eq!(field, expected),
        other => panic!("{expected}: {other:?}"),
    };
    let client = || new_token("it", TokenKind::Client);
    let environment = |name| Environment::new(name);
    check(NewToken { name: " ".to_owned(), ..client() }, "tokenName").await;
    check(NewToken { name: "a\nb".to_owned(), ..client() }, "tokenName").await;
    check(NewToken { name: "x".repeat(1000), ..client() }, "tokenName").await;
    check(NewToken { environment: environment("*"), ..client() }, "environment").await;
    check(NewToken { environment: environment("a.b"), ..client() }, "environment").await;
    check(NewToken { environment: environment(""), ..client() }, "environment").await;
    check(NewToken { projects: Projects::from_list([]), ..client() }, "projects").await;
    check(NewToken { projects: Projects::from_list(["a b"]), ..client() }, "projects").await;
    let past = Timestamp::from_second(1_000_000_000).ok();
    check(NewToken { expires_at: past, ..client() }, "expiresAt").await;
    let admin = NewToken { kind: TokenKind::Admin, ..client() };
    check(admin, "environment").await;
}

/// A new account with this role and these permissions, as the actor of a change.
async fn account_with(
    control: &ControlPlane,
    username: &str,
    role: RootRole,
    permissions: BTreeSet<TokenPermission>,
) -> Actor {
    let password = password("a long password");
    let new = NewAccount {
        username: username.to_owned(),
        name: None,
        email: None,
        role,
        password: password.clone(),
    };
    let made = control.create_account(&SHELL, new).await.unwrap();
    control
        .update_permissions(&SHELL, made.id, PermissionChange::Replace(permissions))
        .await
        .unwrap()
        .unwrap();
    sign_in_actor(control, username, &password).await
}

/// A unit test covers the whole permission table; this one checks that operations apply it.
async fn permissions_are_enforced_and_denials_recorded(db: TestDatabase) {
    let control = db.open().await;
    let actor = async |username, role, permissions: &[TokenPermission]| {
        let permissions = permissions.iter().copied().collect();
        account_with(&control, username, role, permissions).await
    };
    let missing = |outcome: Result<(), Error>| match outcome {
        Err(Error::MissingPermission(missing)) => missing.permission(),
        other => panic!("{other:?}"),
    };
    let viewer = actor("viewer", RootRole::Viewer, &[]).await;
    let creator = [TokenPermission::CreateClientApiToken];
    let creator = actor("ann", RootRole::Viewer, &creator).await;
    for (kind, permission) in [
        (TokenKind::Client, "CREATE_CLIENT_API_TOKEN"),
        (TokenKind::Frontend, "CREATE_FRONTEND_API_TOKEN"),
        (TokenKind::Admin, "ADMIN"),
    ] {
        let made = control.create_token(&viewer, new_token("it", kind)).await;
        assert_eq!(missing(made.map(drop)), permission);
    }
    let (secret, made) =
        control.create_token(&creator, new_token("hers", TokenKind::Client)).await.unwrap();
    assert_eq!(made.created_by, "ann");
    let changed = control.update_token(&creator, secret.expose(), Some(in_a_second())).await;
    assert_eq!(missing(changed.map(drop)), "UPDATE_CLIENT_API_TOKEN");
    let ended = control.delete_token(&creator, &made.id).await;
    assert_eq!(missing(ended.map(drop)), "DELETE_CLIENT_API_TOKEN");
    let deleter = [TokenPermission::DeleteClientApiToken];
    let deleter = actor("deleter", RootRole::Editor, &deleter).await;
    assert!(control.delete_token(&deleter, &made.id).await.unwrap().is_some());

    let kinds_seen = |actor: &Actor| {
        let tokens = control.tokens(&actor.operator);
        tokens.into_iter().map(|token| token.kind).collect::<BTreeSet<_>>()
    };
    assert_eq!(kinds_seen(&viewer), [TokenKind::Client].into());
    assert_eq!(
        kinds_seen(&actor("editor", RootRole::Editor, &[]).await),
        [TokenKind::Client, TokenKind::Frontend].into()
    );
    assert_eq!(kinds_seen(&SHELL).len(), 3);

    let recorded = event_kinds(&control).await;
    assert_eq!(
        recorded.iter().filter(|kind| *kind == "permission-denied").count(),
        5,
        "{recorded:?}"
    );
}

/// The permission is revoked between the authentication of a request and its effect.
async fn token_change_after_permission_revocation_is_denied(db: TestDatabase) {
    let control = db.open().await;
    let (secret, kept) = create_token(&control, TokenKind::Client).await;
    let demoted = account_with(&control, "demoted", RootRole::Admin, [].into()).await;
    let demote = AccountChange { role: Some(RootRole::Viewer), ..AccountChange::default() };
    let id = demoted.operator.account_id().unwrap();
    control.update_account(&SHELL, id, demote).await.unwrap().unwrap();
    let lost = TokenPermission::ALL.into_iter().collect();
    let lost = account_with(&control, "lost", RootRole::Viewer, lost).await;
    let none = PermissionChange::Replace(BTreeSet::new());
    control
        .update_permissions(&SHELL, lost.operator.account_id().unwrap(), none)
        .await
        .unwrap()
        .unwrap();
    let deleted = account_with(&control, "deleted", RootRole::Admin, [].into()).await;
    control.delete_account(&SHELL, deleted.operator.account_id().unwrap()).await.unwrap().unwrap();
    let first = sign_in_first_admin(&control).await.session;
    let signed_out = actor_of_session(&control, &first).await;
    control.sign_out(first.expose(), [192, 0, 2, 1].into()).await.unwrap();
    let (admin, _) = create_token(&control, TokenKind::Admin).await;
    let operator = Operator::Token { name: "made".to_owned(), digest: admin.digest() };
    let ended = Actor { operator, address: None };
    control.update_token(&ended, &kept.id, None).await.unwrap().unwrap();
    control.delete_token(&SHELL, admin.expose()).await.unwrap().unwrap();

    let before = control.tokens(&SHELL.operator);
    let is_refused =
        |error: &Error| matches!(error, Error::MissingPermission(_) | Error::SessionEnded);
    for actor in [&demoted, &lost, &deleted, &ended, &signed_out] {
        for kind in [TokenKind::Admin, TokenKind::Client, TokenKind::Frontend] {
            let made = control.create_token(actor, new_token("stale", kind)).await;
            assert!(made.as_ref().is_err_and(is_refused), "{actor:?}: {made:?}");
        }
        let changed = control.update_token(actor, &kept.id, Some(in_a_second())).await;
        assert!(changed.as_ref().is_err_and(is_refused), "{actor:?}: {changed:?}");
        let ended = control.delete_token(actor, secret.expose()).await;
        assert!(ended.as_ref().is_err_and(is_refused), "{actor:?}: {ended:?}");
    }
    assert_eq!(control.tokens(&SHELL.operator), before);
}

async fn number_of_tokens_is_limited(db: TestDatabase) {
    let control = db.open().await;
    for _ in control.tokens(&SHELL.operator).len()..20 {
        create_token(&control, TokenKind::Client).await;
    }
    let more = control.create_token(&SHELL, new_token("one more", TokenKind::Client)).await;
    assert!(matches!(more, Err(Error::LimitReached { limit: 20, .. })), "{more:?}");
}

async fn initial_tokens_fill_empty_registry_once(db: TestDatabase) {
    let token = |text| Token::parse(text).unwrap();
    let old = format!("*:*.{}", "a0".repeat(28));
    let client = [token("web:production.some-secret"), token("web:production.some-secret")];
    let initial_tokens = InitialTokens {
        admin: vec![token(&old)],
        client: client.to_vec(),
        frontend: vec![token("[]:development.some-other-secret")],
    };
    let (control, opened) =
        db.open_with(parapet::control_plane::Config { initial_tokens, ..db.config() }).await;
    assert!(matches!(opened.tokens, TokenBootstrapOutcome::Seeded), "{opened:?}");
    let tokens = control.tokens(&SHELL.operator);
    assert_eq!(tokens.len(), 3);
    let web = tokens.iter().find(|token| token.environment.as_str() == "production").unwrap();
    assert_eq!((web.kind, &web.projects), (TokenKind::Client, &Projects::from_list(["web"])));
    assert!(tokens.iter().all(|token| token.id.len() == 22), "{tokens:?}");
    assert_eq!(control.token_name(&token(&old).digest()).as_deref(), Some(&*tokens[0].name));

    let initial_tokens =
        InitialTokens { client: vec![token("*:staging.later")], ..InitialTokens::default() };
    let (control, opened) =
        db.open_with(parapet::control_plane::Config { initial_tokens, ..db.config() }).await;
    assert!(matches!(opened.tokens, TokenBootstrapOutcome::Existing), "{opened:?}");
    assert_eq!(control.tokens(&SHELL.operator), tokens);
}

async fn empty_registry_without_initial_tokens_gets_one_token_of_each_kind(db: TestDatabase) {
    let (control, opened) = db.open_with(db.config()).await;
    let TokenBootstrapOutcome::Generated(generated) = opened.tokens else { panic!("{opened:?}") };
    let instance = RunningInstance::start(&control);
    for token in [&generated.admin, &generated.client, &generated.frontend] {
        instance.wait_until(token, true).await;
    }
    let (_, opened) = db.open_with(db.config()).await;
    assert!(matches!(opened.tokens, TokenBootstrapOutcome::Existing));
    assert!(opened.account.is_none());
}
