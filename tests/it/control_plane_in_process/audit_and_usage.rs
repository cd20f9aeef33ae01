//! The audit log, stored usage, and the absence of secrets in both.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parapet::control_plane::{
    Actor, AuditEvent, Config, ControlPlane, EventKind, EventQuery, NewAccount, NewToken, Operator,
    RootRole, SignInAttempt, TokenBootstrapOutcome,
};
use parapet::protocol::features::Document;
use parapet::served::{ServedSnapshot, Snapshots};
use parapet::token::{Environment, Projects, Scope, TokenKind};
use parapet::usage::{BatchId, OutgoingBatch, SendOutcome, UsageSink as _};
use serde_json::{Value, json};

use super::fixture::{
    RunningInstance, SHELL, TestDatabase, actor_of_session, password, sign_in_actor,
    sign_in_attempt, sign_in_first_admin,
};
use crate::rig::wait_until;

super::on_both!(
    events_record_actor_action_time_and_address,
    usage_is_merged_by_hour_and_listed,
    usage_that_cannot_be_stored_is_refused,
    old_usage_and_events_are_deleted_after_retention,
    repeated_batch_is_counted_once,
    unknown_flags_and_variants_are_limited_to_ten_thousand_rows,
    rows_beyond_limit_are_deleted_newest_applications_first,
    long_lived_applications_outlast_made_up_ones,
    no_secret_is_stored,
);

async fn events_record_actor_action_time_and_address(db: TestDatabase) {
    let control = db.open().await;
    let ci = NewToken {
        name: "ci".to_owned(),
        kind: TokenKind::Admin,
        environment: Environment::new("*"),
        projects: Projects::All,
        expires_at: None,
    };
    let (ci, _) = control.create_token(&SHELL, ci).await.unwrap();
    let ann = Actor {
        operator: Operator::Token { name: "ci".to_owned(), digest: ci.digest() },
        address: Some("2001:db8::7".parse().unwrap()),
    };
    let all = EventQuery { limit: 1000, ..EventQuery::default() };
    let list_events =
        async |query: &EventQuery| control.events(&SHELL.operator, query).await.unwrap();
    // Times have milliseconds: the following events are later than those written when the database was
    // opened.
    let opened = list_events(&all).await.events[0].created_at;
    let since = wait_until("the clock advances", Duration::from_secs(10), async || {
        Some(Timestamp::now()).filter(|now| now.as_millisecond() > opened.as_millisecond())
    })
    .await;
    for (name, projects) in [("one", &["web"][..]), ("two", &["web", "app"]), ("all", &["*"])] {
        let new = NewToken {
            name: name.to_owned(),
            kind: TokenKind::Client,
            environment: Environment::new("production"),
            projects: Projects::from_list(projects.iter().copied()),
            expires_at: None,
        };
        let (_, token) = control.create_token(&ann, new).await.unwrap();
        control.update_token(&ann, &token.id, Some(Timestamp::MAX)).await.unwrap();
    }
    let page = list_events(&EventQuery { since: Some(since), ..all.clone() }).await;
    assert_eq!((page.total, page.events.len()), (6, 6));
    let last = &page.events[0];
    assert_eq!((last.kind.as_str(), last.created_by.as_str()), ("api-token-updated", "ci"));
    assert_eq!((last.created_by_user_id, last.ip.as_deref()), (None, Some("2001:db8::7")));
    assert_eq!(last.environment.as_deref(), Some("production"));
    let field = |value: &Option<Value>, name: &str| value.as_ref().unwrap()[name].clone();
    assert_eq!(field(&last.data, "tokenName"), "all");
    assert_eq!(field(&last.pre_data, "expiresAt"), Value::Null);
    assert_ne!(field(&last.data, "expiresAt"), Value::Null);
    assert!(page.events.is_sorted_by(|newer, older| newer.id > older.id));

    let count = async |query: EventQuery| list_events(&query).await.total;
    let kinds = vec![EventKind::TokenCreated, EventKind::UserCreated];
    let before = count(EventQuery { until: Some(since), ..all.clone() }).await;
    assert_eq!(count(EventQuery { kinds, ..all.clone() }).await, 3 + before);
    let named = |name: &str| Some(name.to_owned());
    assert_eq!(count(EventQuery { created_by: named("ci"), ..all.clone() }).await, 6);
    assert_eq!(count(EventQuery { created_by: named("c%"), ..all.clone() }).await, 0);
    assert_eq!(count(EventQuery { environment: named("production"), ..all.clone() }).await, 6);
    assert_eq!(count(EventQuery { project: named("web"), ..all.clone() }).await, 4);
    assert_eq!(count(EventQuery { project: named("app"), ..all.clone() }).await, 2);
    assert_eq!(count(EventQuery { project: named("we"), ..all.clone() }).await, 0);

    let query = EventQuery { limit: 2, offset: 1, since: Some(since), ..EventQuery::default() };
    let part = list_events(&query).await;
    assert_eq!((part.total, &part.events[..]), (6, &page.events[1..3]));
    let hers = password("eve's password");
    let eve = NewAccount {
        username: "eve".to_owned(),
        name: None,
        email: None,
        role: RootRole::Editor,
        password: hers.clone(),
    };
    control.create_account(&SHELL, eve).await.unwrap();
    let editor = sign_in_actor(&control, "eve", &hers).await;
    assert!(control.events(&editor.operator, &all).await.is_err());
}

/// Delivers a usage report to the control plane and returns the outcome.
async fn deliver_usage(control: &ControlPlane, body: &Value) -> SendOutcome {
    let batch = BatchId::parse(&format!("{:032x}", rand::random::<u128>())).unwrap();
    deliver_usage_batch(control, batch, body).await
}

/// Delivers it with a batch id.
async fn deliver_usage_batch(control: &ControlPlane, id: BatchId, body: &Value) -> SendOutcome {
    let (environment, body) = (Environment::new("dev"), body.to_string().into());
    let batch = OutgoingBatch { id, environment, body, may_be_parked: false };
    control.usage_sink(configured_flags()).send(batch).await
}

/// The flag `blue` of `dev`, with the variants `a` and `b`.
fn configured_flags() -> Snapshots {
    let document = json!({ "features": [{ "name": "blue", "enabled": true,
        "variants": [{ "name": "a", "weight": 500 }, { "name": "b", "weight": 500 }] }] });
    let document = Document::parse(document.to_string().as_bytes()).unwrap();
    let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
    let snapshots = Snapshots::default();
    snapshots.swap(ServedSnapshot::build(scope, document, None));
    snapshots
}

fn usage_report(hour: &str, yes: u64, variants: &Value) -> Value {
    json!({
        "applications": [{
            "appName": "shop", "instanceId": "shop-1", "environment": "dev", "interval": 15,
            "started": "2026-01-01T00:00:00Z", "strategies": ["default", "gradual"],
            "sdkVersion": "node:6.0.0",
        }],
        "metrics": [{
            "featureName": "blue", "appName": "shop", "environment": "dev", "timestamp": hour,
            "yes": yes, "no": 1, "variants": variants, "sdkVersion": "node:6.1.0",
        }],
    })
}

async fn usage_is_merged_by_hour_and_listed(db: TestDatabase) {
    let control = db.open().await;
    let noon = "2026-05-05T12:20:00Z";
    assert_eq!(
        deliver_usage(&control, &usage_report(noon, 2, &json!({ "a": 2 }))).await,
        SendOutcome::Sent
    );
    let later = usage_report("2026-05-05T12:59:59Z", 3, &json!({ "a": 1, "b": 2 }));
    assert_eq!(deliver_usage(&control, &later).await, SendOutcome::Sent);
    let next = usage_report("2026-05-05T13:00:00Z", 0, &json!({}));
    assert_eq!(deliver_usage(&control, &next).await, SendOutcome::Sent);

    let since: Timestamp = "2026-05-05T12:30:00Z".parse().unwrap();
    let hours = control.flag_usage("blue", since).await.unwrap();
    let stored_hours: Vec<_> =
        hours.iter().map(|it| (it.hour.to_string(), it.yes, it.no)).collect();
    let expect = [("2026-05-05T13:00:00Z", 0, 1), ("2026-05-05T12:00:00Z", 5, 2)];
    assert_eq!(stored_hours, expect.map(|(hour, yes, no)| (hour.to_owned(), yes, no)));
    let variants = BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 2)]);
    assert_eq!((&hours[0].variants, &hours[1].variants), (&BTreeMap::new(), &variants));
    assert_eq!((hours[1].app_name.as_str(), hours[1].environment.as_str()), ("shop", "dev"));
    assert_eq!(control.flag_usage("green", since).await.unwrap(), []);
    let since = "2026-05-05T13:30:00Z".parse().unwrap();
    assert_eq!(control.flag_usage("blue", since).await.unwrap().len(), 1);

    let applications = control.applications().await.unwrap();
    assert_eq!(applications.len(), 1);
    let shop = &applications[0];
    assert_eq!((shop.name.as_str(), shop.instances), ("shop", 1));
    assert_eq!(shop.environments, ["dev"]);
    assert_eq!(shop.sdk_versions, ["node:6.0.0", "node:6.1.0"]);
    assert_eq!(shop.strategies, ["default", "gradual"]);
    assert!(shop.created_at <= shop.seen_at);
}

async fn usage_that_cannot_be_stored_is_refused(db: TestDatabase) {
    let control = db.open().await;
    assert_eq!(deliver_usage(&control, &json!("usage")).await, SendOutcome::Rejected);
    // Input that would fail on every retry is corrected: PostgreSQL stores no NUL and no number beyond
    // its range.
    let noon = "2026-05-05T12:00:00Z";
    let huge = usage_report(noon, u64::MAX, &json!({ "a": u64::MAX, "b\0": 1 }));
    assert_eq!(deliver_usage(&control, &huge).await, SendOutcome::Sent);
    assert_eq!(deliver_usage(&control, &huge).await, SendOutcome::Sent);
    let mut odd = usage_report(noon, 1, &json!({}));
    odd["metrics"][0]["featureName"] = "gr\0een".into();
    odd["metrics"][0]["appName"] = "x".repeat(5000).into();
    assert_eq!(deliver_usage(&control, &odd).await, SendOutcome::Sent);
    let hours = control.flag_usage("blue", Timestamp::UNIX_EPOCH).await.unwrap();
    assert!(hours[0].yes >= (1 << 53) - 1, "{hours:?}");
    assert_eq!(control.flag_usage("green", Timestamp::UNIX_EPOCH).await.unwrap()[0].yes, 1);
}

async fn old_usage_and_events_are_deleted_after_retention(db: TestDatabase) {
    let hour = Duration::from_hours(1);
    let control = db.open().await;
    let old = "INSERT INTO events (kind, created_by, created_at) VALUES ('user-created', 'x', 1)";
    db.execute(old).await;
    // The usage is old, but its application was seen just now.
    let long_ago = usage_report("2020-01-01T00:00:00Z", 1, &json!({ "a": 1 }));
    assert_eq!(deliver_usage(&control, &long_ago).await, SendOutcome::Sent);
    let has_old = async |control: &ControlPlane| {
        let query = EventQuery { created_by: Some("x".to_owned()), ..EventQuery::default() };
        control.events(&SHELL.operator, &query).await.unwrap().total == 1
    };
    let has_usage = async |control: &ControlPlane| {
        !control.flag_usage("blue", Timestamp::UNIX_EPOCH).await.unwrap().is_empty()
    };
    // Events are kept for ever by default.
    let instance = RunningInstance::start(&control);
    let usage_is_gone = async || (!has_usage(&control).await).then_some(());
    wait_until("old usage is forgotten", Duration::from_secs(10), usage_is_gone).await;
    assert!(has_old(&control).await);
    assert_eq!(control.applications().await.unwrap().len(), 1);
    drop(instance);
    let config = Config { event_retention: Some(hour), ..db.config() };
    let (control, _) = db.open_with(config).await;
    let _instance = RunningInstance::start(&control);
    let event_is_gone = async || (!has_old(&control).await).then_some(());
    wait_until("old events are forgotten", Duration::from_secs(10), event_is_gone).await;
    let all = EventQuery { limit: 1000, ..EventQuery::default() };
    assert!(control.events(&SHELL.operator, &all).await.unwrap().total > 1);
}

async fn repeated_batch_is_counted_once(db: TestDatabase) {
    let control = db.open().await;
    let id = |n: u8| BatchId::parse(&format!("{n:032x}")).unwrap();
    let body = usage_report("2026-05-05T12:20:00Z", 2, &json!({ "a": 2 }));
    for batch in [1, 1, 2, 1, 2] {
        assert_eq!(deliver_usage_batch(&control, id(batch), &body).await, SendOutcome::Sent);
    }
    let hours = control.flag_usage("blue", Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!((hours[0].yes, hours[0].variants["a"]), (4, 4));
    // A batch that could not be stored is not remembered.
    assert_eq!(deliver_usage_batch(&control, id(3), &json!("usage")).await, SendOutcome::Rejected);
    assert_eq!(deliver_usage_batch(&control, id(3), &body).await, SendOutcome::Sent);
    let hours = control.flag_usage("blue", Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!(hours[0].yes, 6);
}

/// An SQL expression for rows with the numbers 1 to `count`.
fn sql_row_numbers(count: u32) -> String {
    format!(
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})"
    )
}

/// Waits until a running instance has deleted so much that a query counts this many rows.
async fn wait_until_pruned(db: &TestDatabase, control: &ControlPlane, query: &str, count: i64) {
    let _instance = RunningInstance::start(control);
    wait_until(&format!("{query} is {count}"), Duration::from_mins(1), async || {
        (db.count(query).await == count).then_some(())
    })
    .await;
}

async fn unknown_flags_and_variants_are_limited_to_ten_thousand_rows(db: TestDatabase) {
    let control = db.open().await;
    let now = Timestamp::now();
    let metric = |flag: &str, variants: Value| {
        json!({ "featureName": flag, "appName": "shop", "environment": "dev", "timestamp": now,
                "yes": 1, "no": 0, "variants": variants })
    };
    let body = json!({ "applications": [], "metrics": [
        metric("blue", json!({ "a": 1, "disabled": 1, "made-up": 1 })), metric("made-up", json!({})),
    ] });
    assert_eq!(deliver_usage(&control, &body).await, SendOutcome::Sent);
    assert_eq!(db.count("SELECT COUNT(*) FROM flag_usage WHERE known = 1").await, 1);
    assert_eq!(db.count("SELECT COUNT(*) FROM variant_usage WHERE known = 1").await, 2);

    let hour = now.as_millisecond() / 3_600_000 * 3_600_000;
    db.execute(&format!(
        "{} INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no, known) \
         SELECT 'flood ' || n, 'dev', 'shop', {hour}, 1, 0, 0 FROM numbers",
        sql_row_numbers(30_000)
    ))
    .await;
    db.execute(&format!(
        "{} INSERT INTO variant_usage (flag, environment, app_name, hour, variant, count, known) \
         SELECT 'blue', 'dev', 'shop', {hour}, 'flood ' || n, 1, 0 FROM numbers",
        sql_row_numbers(30_000)
    ))
    .await;
    // A flag that was new and is known by now is not made up.
    db.execute(&format!(
        "INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no, known) VALUES \
         ('new', 'dev', 'shop', {hour} - 3600000, 1, 0, 0), ('new', 'dev', 'shop', {hour}, 1, 0, 1)"
    ))
    .await;
    let flags = "SELECT COUNT(*) FROM flag_usage";
    wait_until_pruned(&db, &control, flags, 10_000 + 1 + 2).await;
    let variants = "SELECT COUNT(*) FROM variant_usage";
    assert_eq!(db.count(variants).await, 10_000 + 2);
    assert_eq!(control.flag_usage("blue", now).await.unwrap()[0].yes, 1);
    assert_eq!(control.flag_usage("new", Timestamp::UNIX_EPOCH).await.unwrap().len(), 2);
}

async fn rows_beyond_limit_are_deleted_newest_applications_first(db: TestDatabase) {
    const MOST: i64 = 1_000_000;
    let control = db.open().await;
    let now = Timestamp::now().as_millisecond();
    let (hour, month_ago) = (now / 3_600_000 * 3_600_000, now - 30 * 86_400_000);
    db.execute(&format!(
        "INSERT INTO applications (app_name, created_at, seen_at) VALUES \
         ('shop', {month_ago}, {now}), ('flood', {now}, {now})"
    ))
    .await;
    // Rows as an earlier version stored them: whether the flags were made up is unknown.
    for app in ["shop", "flood"] {
        let count = if app == "shop" { 20 } else { 1_000_300 };
        db.execute(&format!(
            "{} INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no) \
             SELECT '{app} ' || n, 'dev', '{app}', {hour} - CASE WHEN n <= 10 THEN 3600000 ELSE 0 END, \
             1, 0 FROM numbers",
            sql_row_numbers(count)
        ))
        .await;
    }
    let query = "SELECT COUNT(*) FROM flag_usage";
    wait_until_pruned(&db, &control, query, MOST).await;
    let of = async |condition: &str| db.count(&format!("{query} WHERE {condition}")).await;
    assert_eq!(of("app_name = 'shop'").await, 20);
    assert_eq!(of(&format!("app_name = 'flood' AND hour < {hour}")).await, 0);
}

async fn long_lived_applications_outlast_made_up_ones(db: TestDatabase) {
    let control = db.open().await;
    let now = Timestamp::now().as_millisecond();
    let day = 86_400_000;
    db.execute(&format!(
        "{} INSERT INTO applications (app_name, created_at, seen_at) \
         SELECT 'app ' || n, CASE WHEN n <= 100 THEN {now} - 9 * {day} ELSE {now} END, \
         CASE WHEN n <= 100 THEN {now} - {day} / 2 ELSE {now} END FROM numbers",
        sql_row_numbers(6000)
    ))
    .await;
    let query = "SELECT COUNT(*) FROM applications";
    wait_until_pruned(&db, &control, query, 5000).await;
    let old = format!("{query} WHERE created_at < {now}");
    assert_eq!(db.count(&old).await, 100);
}

async fn no_secret_is_stored(db: TestDatabase) {
    let (control, opened) = db.open_with(db.config()).await;
    let TokenBootstrapOutcome::Generated(generated) = opened.tokens else { panic!("{opened:?}") };
    let mut secrets = vec![crate::control_plane_in_process::fixture::PASSWORD.to_owned()];
    let tokens = [&generated.admin, &generated.client, &generated.frontend];
    secrets.extend(tokens.map(|token| token.expose().to_owned()));
    let new = NewToken {
        name: "made".to_owned(),
        kind: TokenKind::Frontend,
        environment: Environment::new("dev"),
        projects: Projects::All,
        expires_at: None,
    };
    let (token, _) = control.create_token(&SHELL, new).await.unwrap();
    secrets.push(token.expose().to_owned());
    control.delete_token(&SHELL, token.expose()).await.unwrap();

    let (old, hers) = (password("ann's first secret"), password("ann's second secret"));
    let new = NewAccount {
        username: "ann".to_owned(),
        name: None,
        email: None,
        role: RootRole::Viewer,
        password: old.clone(),
    };
    control.create_account(&SHELL, new).await.unwrap();
    let signed_in = control.sign_in(sign_in_attempt("ann", &old)).await.unwrap();
    let ann = actor_of_session(&control, &signed_in.session).await;
    control.change_own_password(&ann, &old, hers.clone()).await.unwrap();
    secrets.extend([old.expose().to_owned(), hers.expose().to_owned()]);
    secrets.extend([signed_in.session, signed_in.device].map(|it| it.expose().to_owned()));
    // A password in the wrong field, and a wrong password.
    let typed = password("a password typed as a name");
    let slip = SignInAttempt { username: typed.expose(), ..sign_in_attempt("", &typed) };
    control.sign_in(slip).await.unwrap_err();
    control.sign_in(sign_in_attempt("ann", &typed)).await.unwrap_err();
    secrets.push(typed.expose().to_owned());
    sign_in_first_admin(&control).await;

    let dump = db.dump().await;
    let keeps = |text: &str| dump.windows(text.len()).any(|part| part == text.as_bytes());
    assert!(keeps("ann") && keeps("api-token-created") && keeps("$argon2id$"));
    for secret in &secrets {
        assert!(!keeps(secret), "the database contains {secret}");
        // The proof is the last part of a token and of a cookie; it must not be stored either.
        let proof = &secret[secret.len().saturating_sub(43)..];
        assert!(!keeps(proof), "the database contains {proof}, of {secret}");
    }
}

/// Adds this many events of one day in the past, without the control plane's knowledge.
async fn add_events(db: &TestDatabase, count: u32) {
    let add = format!(
        "INSERT INTO events (kind, created_by, created_at, environment, project) \
         WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) \
         SELECT CASE i % 3 WHEN 0 THEN 'api-token-created' ELSE 'user-signed-in' END, \
         'somebody ' || i % 7, 1700000000000 + i, 'development', \
         CASE i WHEN 1000 THEN 'web,rare' ELSE 'web,app' END FROM n"
    );
    db.execute(&add).await;
}

/// Operators page through a log of several years.
#[tokio::test]
async fn page_of_long_event_log_is_as_fast_as_of_short_log() {
    let db = TestDatabase::sqlite();
    let control = db.open().await;
    let kinds = vec![EventKind::TokenCreated];
    let (created_by, before) = (Some("somebody 3".to_owned()), Some(150_000));
    let queries = [
        EventQuery::default(),
        EventQuery { before, ..EventQuery::default() },
        EventQuery { kinds, before, ..EventQuery::default() },
        EventQuery { created_by, ..EventQuery::default() },
        EventQuery { project: Some("rare".to_owned()), ..EventQuery::default() },
        EventQuery { project: Some("web".to_owned()), before, ..EventQuery::default() },
    ];
    // The fastest of several runs, so that other load on the machine matters little.
    let fastest = async || {
        let mut all = Vec::new();
        for query in &queries {
            let mut fastest = Duration::MAX;
            for _ in 0..10 {
                let begun = Instant::now();
                let query = EventQuery { limit: 50, ..query.clone() };
                control.events(&SHELL.operator, &query).await.unwrap();
                fastest = fastest.min(begun.elapsed());
            }
            all.push(fastest);
        }
        all
    };
    let short = fastest().await;
    add_events(&db, 300_000).await;
    let long = fastest().await;
    println!("{short:?} before, {long:?} now");
    for ((short, long), query) in short.iter().zip(&long).zip(&queries) {
        assert!(*long < *short * 50, "{query:?}: {short:?} before, {long:?} now");
    }

    // Each page continues where the previous one ended, even if events are added meanwhile.
    let page = async |before| {
        let query = EventQuery { before, limit: 3, ..EventQuery::default() };
        control.events(&SHELL.operator, &query).await.unwrap()
    };
    let first = page(None).await;
    assert_eq!(first.total, 10_000, "it is counted no further");
    let ids = |events: &[AuditEvent]| events.iter().map(|event| event.id).collect::<Vec<_>>();
    let last = first.events[2].id;
    assert_eq!(ids(&first.events), [last + 2, last + 1, last]);
    sign_in_first_admin(&control).await;
    assert_eq!(ids(&page(Some(last)).await.events), [last - 1, last - 2, last - 3]);
}

/// Deleting events frees space in the file.
#[tokio::test]
async fn sqlite_file_shrinks_after_event_retention() {
    let db = TestDatabase::sqlite();
    let event_retention = Some(Duration::from_hours(24));
    let (control, _) = db.open_with(Config { event_retention, ..db.config() }).await;
    add_events(&db, 30_000).await;
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").await;
    let TestDatabase::Sqlite(directory) = &db else { panic!("it is SQLite") };
    let size = || std::fs::metadata(directory.path().join("control.db")).unwrap().len();
    let large = size();
    let _instance = RunningInstance::start(&control);
    wait_until("the file is small", Duration::from_mins(1), async || {
        // Committed pages stay in the write-ahead log until the next checkpoint.
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").await;
        (size() < large / 10).then_some(())
    })
    .await;
}
