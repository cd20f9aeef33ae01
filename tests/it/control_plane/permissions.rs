//! Roles and permissions, and the operations that they allow.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{DatabaseKind, Installation, OWNER, PASSWORD, Session, identifier, sign_in};

/// Each role and each permission, for each operation on each kind of token.
async fn permission_matrix(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    for kind in ["client", "frontend", "admin"] {
        owner.create_token(kind, &format!("a-{kind}")).await;
    }
    let grants = [
        "",
        "CREATE_CLIENT_API_TOKEN",
        "READ_CLIENT_API_TOKEN",
        "UPDATE_CLIENT_API_TOKEN",
        "DELETE_CLIENT_API_TOKEN",
        "CREATE_FRONTEND_API_TOKEN",
        "READ_FRONTEND_API_TOKEN",
        "UPDATE_FRONTEND_API_TOKEN",
        "DELETE_FRONTEND_API_TOKEN",
        "CREATE_API_TOKEN",
    ];
    let ids = [1, 2, 3].map(|role| (role, format!("user-{role}")));
    for (role, username) in ids {
        let id = owner.create_account(&username, role).await;
        let user = sign_in(&parapet, &username, PASSWORD).await.unwrap();
        for grant in grants {
            let granted: &[&str] = if grant.is_empty() { &[] } else { &[grant] };
            owner.grant(id, granted).await;
            let seen = user.token_names().await;
            for kind in ["client", "frontend", "admin"] {
                let what = format!("role {role}, granted {grant:?}, {kind}");
                let upper = kind.to_uppercase();
                let holds = |action: &str| {
                    role == 1
                        || (kind != "admin"
                            && (grant == format!("{action}_{upper}_API_TOKEN")
                                || (grant == "CREATE_API_TOKEN" && action == "CREATE")))
                };
                let sees = match kind {
                    "client" => true,
                    "frontend" => {
                        role < 3 || grant.contains("FRONTEND") || grant == "CREATE_API_TOKEN"
                    }
                    _ => role == 1,
                };
                assert_eq!(seen.contains(&format!("a-{kind}")), sees, "{what}");
                let expect =
                    |action, good| if holds(action) { good } else { StatusCode::FORBIDDEN };
                let (status, response) = user.create_token(kind, &format!("b-{kind}")).await;
                assert_eq!(status, expect("CREATE", StatusCode::CREATED), "{what}: {response}");
                if status == StatusCode::FORBIDDEN {
                    let missing = if kind == "admin" {
                        "ADMIN".to_owned()
                    } else {
                        format!("CREATE_{upper}_API_TOKEN")
                    };
                    assert_eq!(response["permissions"], json!([missing]), "{what}");
                    owner.create_token(kind, &format!("b-{kind}")).await;
                }
                let path = format!(
                    "/api/admin/api-tokens/{}",
                    identifier(&owner, &format!("b-{kind}")).await
                );
                let body = json!({ "expiresAt": "2099-01-01T00:00:00Z" });
                let status = user.call(Method::PUT, &path, &body).await.0;
                assert_eq!(status, expect("UPDATE", StatusCode::OK), "{what}");
                let status = user.call(Method::DELETE, &path, &Value::Null).await.0;
                assert_eq!(status, expect("DELETE", StatusCode::OK), "{what}");
                owner.call(Method::DELETE, &path, &Value::Null).await;
            }
            for path in ["/api/admin/user-admin", "/api/admin/events"] {
                let (status, response) = user.call(Method::GET, path, &Value::Null).await;
                let expect = if role == 1 { StatusCode::OK } else { StatusCode::FORBIDDEN };
                assert_eq!(status, expect, "role {role}, {path}: {response}");
            }
        }
    }
    let refused = owner.get("/api/admin/events?type=permission-denied&limit=1").await;
    assert!(refused["totalEvents"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn each_permission_requires_its_role_or_grant_on_sqlite() {
    permission_matrix(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn each_permission_requires_its_role_or_grant_on_postgresql() {
    permission_matrix(DatabaseKind::Postgres).await;
}

/// An expiry in the past counts as a deletion, and a later expiry for an expired token as a creation;
/// the update permission is not enough for either.
async fn update_permission_neither_ends_nor_revives_tokens(database_kind: DatabaseKind) {
    let place = Installation::new(database_kind).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let id = owner.create_account("ann", 3).await;
    let ann = sign_in(&parapet, "ann", PASSWORD).await.unwrap();
    for (kind, path) in [("client", "/api/client/features"), ("frontend", "/api/frontend")] {
        let (_, made) = owner.create_token(kind, &format!("of-{kind}")).await;
        let secret = made["secret"].as_str().unwrap();
        let works = async || parapet.get(path, secret).await.0 == StatusCode::OK;
        let token = identifier(&owner, &format!("of-{kind}")).await;
        let token = format!("/api/admin/api-tokens/{token}");
        let expire = async |session: &Session, at| {
            session.call(Method::PUT, &token, &json!({ "expiresAt": at })).await
        };
        let permission = |action: &str| format!("{action}_{}_API_TOKEN", kind.to_uppercase());
        let (create, update, delete) =
            (permission("CREATE"), permission("UPDATE"), permission("DELETE"));
        let (past, later) = (Some("2020-01-01T00:00:00Z"), Some("2099-01-01T00:00:00Z"));

        owner.grant(id, &[&create, &update]).await;
        assert_eq!(expire(&ann, later).await.0, StatusCode::OK);
        for end in [past, Some("1970-01-01T00:00:00Z")] {
            let (status, response) = expire(&ann, end).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{response}");
            assert_eq!(response["permissions"], json!([delete]));
            let expect =
                format!("you need the {delete} permission to end a token by an expiry in the past");
            assert_eq!(response["message"], expect);
        }
        assert!(works().await);

        owner.grant(id, &[&update, &delete]).await;
        assert_eq!(expire(&ann, past).await.0, StatusCode::OK);
        assert!(!works().await);
        assert_eq!(expire(&ann, past).await.0, StatusCode::OK, "it has ended already");
        for end in [later, None] {
            let (status, response) = expire(&ann, end).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{response}");
            assert_eq!(response["permissions"], json!([create]));
            let expect = format!("you need the {create} permission to revive an expired token");
            assert_eq!(response["message"], expect);
        }
        assert!(!works().await);

        owner.grant(id, &[&create, &update]).await;
        assert_eq!(expire(&ann, None).await.0, StatusCode::OK);
        assert!(works().await);
    }
}

#[tokio::test]
async fn update_permission_neither_ends_nor_revives_tokens_on_sqlite() {
    update_permission_neither_ends_nor_revives_tokens(DatabaseKind::Sqlite).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL"]
async fn update_permission_neither_ends_nor_revives_tokens_on_postgresql() {
    update_permission_neither_ends_nor_revives_tokens(DatabaseKind::Postgres).await;
}
