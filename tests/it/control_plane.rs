//! A standalone as a control plane: accounts, tokens, permissions and the audit log over HTTP, on both
//! databases.

mod backup;
mod command_line;
mod database_outage;
mod fixture;
mod invalid_and_denied_requests;
mod permissions;
mod secret_leaks;
mod sessions;
mod tokens;

use reqwest::{Method, StatusCode};
use serde_json::json;

use self::fixture::{
    DatabaseKind, FLAGS, Installation, NEW_PASSWORD, OWNER, PASSWORD, Session, identifier,
    run_on_database, sign_in, sign_in_with,
};

#[tokio::test]
async fn openapi_document_and_flag_explanation_are_served() {
    let place = Installation::new(DatabaseKind::Sqlite).await;
    let parapet = place.start().await;
    let owner = sign_in(&parapet, OWNER, PASSWORD).await.unwrap();
    let document = owner.get("/docs/openapi.json").await;
    assert!(document["paths"]["/api/admin/api-tokens"]["post"].is_object());
    // Every operation in the document is routed.
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let path = path.replace("{id}", "999").replace("{project}", "default");
            let path = path.replace(['{', '}'], "");
            if path.contains("logout") || path == "/api/admin/api-tokens/token" {
                continue;
            }
            let (status, response) = owner.call(method.clone(), &path, &json!({})).await;
            assert!(
                status.as_u16() < 500 && status != StatusCode::METHOD_NOT_ALLOWED,
                "{method} {path}: {status} {response}"
            );
        }
    }
    let request =
        json!({ "environment": "development", "flag": "first", "context": { "userId": "7" } });
    let (status, why) = owner.call(Method::POST, "/api/admin/explain", &request).await;
    assert_eq!((status, &why["enabled"]), (StatusCode::OK, &json!(true)), "{why}");
    let flags = owner.get("/api/admin/flags?environment=development").await;
    assert_eq!(flags["flags"][1]["project"], "web");
}
