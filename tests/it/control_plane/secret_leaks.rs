//! Creates, uses, mistypes and ends every kind of secret, and checks that none of them is stored or
//! shown.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{
    DatabaseKind, Installation, NEW_PASSWORD, OWNER, PASSWORD, Session, identifier,
    run_on_database, sign_in,
};
use crate::rig::{LogEvent, Parapet, Postgres, http, secret_leak_check};

/// A password that belongs to no account.
const MISTYPED_PASSWORD: &str = "a slip of the tongue";
/// A password that is too short to be accepted.
const SHORT_PASSWORD: &str = "sh0rt-pw!";
/// A password that its owner chooses.
const OWN_PASSWORD: &str = "chosen by its owner";

/// Reads a page and panics if it contains a secret.
async fn assert_no_secret_in(session: &Session, path: &str) -> String {
    let shown = session.get(path).await.to_string();
    assert_eq!(secret_leak_check::leaked_secrets(shown.as_bytes()), [""; 0], "{path}: {shown}");
    shown
}

/// Wrong requests that contain a secret; no response repeats it.
async fn send_mistakes_with_secrets(parapet: &Parapet, owner: &Session, secret: &str) {
    for (method, path, body) in [
        (Method::DELETE, format!("/api/admin/api-tokens/{secret}x"), String::new()),
        (Method::GET, format!("/api/admin/api-tokens/{secret}"), String::new()),
        (Method::GET, format!("/api/admin/{secret}?token={secret}"), String::new()),
        (Method::GET, format!("/api/admin/events?createdBy={secret}&type={secret}"), String::new()),
        (Method::GET, format!("/api/admin/flags/{secret}?environment={secret}"), String::new()),
        (Method::POST, "/api/admin/api-tokens".to_owned(), secret.to_owned()),
        (Method::POST, "/api/admin/api-tokens".to_owned(), json!({ "type": secret }).to_string()),
        (Method::POST, "/api/admin/explain".to_owned(), json!({ "flag": secret }).to_string()),
        (
            Method::POST,
            "/api/admin/user-admin".to_owned(),
            json!({ "username": "eve", "rootRole": MISTYPED_PASSWORD, "password": SHORT_PASSWORD })
                .to_string(),
        ),
    ] {
        let request = http().request(method.clone(), format!("{}{path}", parapet.admin_url()));
        let request = request.header("cookie", &owner.cookies).header("origin", &owner.url);
        let request = request.header("content-type", "application/json").body(body);
        let response = request.send().await.unwrap();
        let shown = format!("{:?}\n{}", response.headers().clone(), response.text().await.unwrap());
        assert_eq!(
            secret_leak_check::leaked_secrets(shown.as_bytes()),
            [""; 0],
            "{method} {path}: {shown}"
        );
    }
}

async fn use_every_secret(database_kind: DatabaseKind) {
    for secret in [NEW_PASSWORD, OWN_PASSWORD, MISTYPED_PASSWORD, SHORT_PASSWORD] {
        secret_leak_check::register(secret);
        assert!(
            !secret_leak_check::leaked_secrets(secret.as_bytes()).is_empty(),
            "a leak would be found"
        );
    }
    let place = Installation::new(database_kind).await;
    let parapet = place.start_with(&["--log", "debug,parapet=trace"]).await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();

    // A user types a password into the name field, and a wrong one into the password field.
    assert!(sign_in(&parapet, MISTYPED_PASSWORD, PASSWORD).await.is_err());
    assert!(sign_in(&parapet, OWNER, MISTYPED_PASSWORD).await.is_err());

    // An account, and every way to change its password.
    let id = owner.create_account("ann", 3).await;
    let path = format!("/api/admin/user-admin/{id}");
    let change = async |session: &Session, method, path: &str, body: Value| {
        let (status, response) = session.call(method, path, &body).await;
        assert_eq!(status, StatusCode::OK, "{response}");
    };
    change(&owner, Method::PUT, &path, json!({ "password": NEW_PASSWORD })).await;
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    let own = "/api/admin/user/change-password";
    let wrong = json!({ "oldPassword": MISTYPED_PASSWORD, "password": OWN_PASSWORD });
    assert_eq!(ann.call(Method::POST, own, &wrong).await.0, StatusCode::UNAUTHORIZED);
    change(
        &ann,
        Method::POST,
        own,
        json!({ "oldPassword": NEW_PASSWORD, "password": OWN_PASSWORD }),
    )
    .await;
    let reset = format!("{path}/change-password");
    change(&owner, Method::POST, &reset, json!({ "password": NEW_PASSWORD })).await;
    let ann = sign_in(&parapet, "ann", NEW_PASSWORD).await.unwrap();
    assert_eq!(ann.create_token("client", "hers").await.0, StatusCode::FORBIDDEN);
    owner.grant(id, &["CREATE_API_TOKEN"]).await;
    assert_eq!(ann.create_token("client", "hers").await.0, StatusCode::CREATED);

    // Tokens of each kind, used, changed, and deleted by their secret or their identifier.
    for kind in ["client", "frontend", "admin"] {
        let (_, made) = owner.create_token(kind, &format!("of-{kind}")).await;
        let secret = made["secret"].as_str().unwrap();
        parapet.features_status(secret).await;
        let by_token = Session { url: owner.url.clone(), cookies: String::new() };
        let header = [("authorization", secret)];
        let listed = by_token.call_as(Method::GET, "/api/admin/api-tokens", &Value::Null, &header);
        assert_eq!(listed.await.0.is_success(), kind == "admin");
        let found = identifier(&owner, &format!("of-{kind}")).await;
        let found = format!("/api/admin/api-tokens/{found}");
        change(&owner, Method::PUT, &found, json!({ "expiresAt": "2099-01-01T00:00:00Z" })).await;
        send_mistakes_with_secrets(&parapet, &owner, secret).await;
        if kind != "frontend" {
            change(&owner, Method::DELETE, &format!("/api/admin/api-tokens/{secret}"), Value::Null)
                .await;
        }
    }
    if place.database.is_none() {
        let made =
            run_on_database(&parapet, &["token", "create", "--name", "by shell"], "").unwrap();
        secret_leak_check::register(made.trim());
        run_on_database(&parapet, &["token", "revoke", "-"], made.trim()).unwrap();
        run_on_database(
            &parapet,
            &["account", "password", "ann", "--password-file", "-"],
            OWN_PASSWORD,
        )
        .unwrap();
    }

    // Everything that the instance shows.
    let log = assert_no_secret_in(&owner, "/api/admin/events?limit=1000").await;
    for kind in [
        "api-token-created",
        "api-token-updated",
        "api-token-deleted",
        "user-password-changed",
        "user-permissions-changed",
        "sign-in-refused",
        "permission-denied",
    ] {
        assert!(log.contains(kind), "{kind} is missing in {log}");
    }
    for page in [
        "/api/admin/api-tokens",
        "/api/admin/user-admin",
        "/api/admin/user",
        "/status",
        "/internal-backstage/tokens",
        "/internal-backstage/metricsbatch",
        "/internal-backstage/instancedata",
        "/internal-backstage/features",
    ] {
        assert_no_secret_in(&owner, page).await;
    }
    assert_eq!(ann.call(Method::POST, "/logout", &Value::Null).await.0, StatusCode::NO_CONTENT);

    // Everything that it stores. Ending it searches its log and its files, including the database.
    assert!(parapet.terminate().await.success());
    assert!(!parapet.logged(LogEvent::LISTENING).is_empty(), "it has a log");
    if let Some(url) = &place.database {
        let name = url.rsplit('/').next().unwrap();
        let dump = Postgres::shared().await.dump(name).await;
        assert!(dump.contains("of-frontend") && dump.contains("$argon2id$"));
        secret_leak_check::assert_none_in(
            "the database",
            &[("its dump".to_owned(), dump.into_bytes())],
        );
    } else {
        let files = secret_leak_check::read_files(&parapet.data_dir());
        let text =
            files.iter().map(|(_, bytes)| String::from_utf8_lossy(bytes)).collect::<String>();
        assert!(text.contains("of-frontend") && text.contains("$argon2id$"));
        secret_leak_check::assert_none_in("the data dir", &files);
    }
}

#[tokio::test]
async fn no_secret_is_stored_or_shown_on_sqlite() {
    use_every_secret(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn no_secret_is_stored_or_shown_on_postgresql() {
    use_every_secret(DatabaseKind::Postgres).await;
}
