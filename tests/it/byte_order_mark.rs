//! A byte order mark in front of JSON, as some .NET programs send it, and in front of files, as editors
//! on Windows save them.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, FRONTEND, InProcessParapet, send};
use crate::rig::{Parapet, http, parapet_command, wait_until};

const BYTE_ORDER_MARK: &str = "\u{feff}";

const FLAGS: &str =
    r#"{"features":[{"name":"first","enabled":true,"strategies":[{"name":"default"}]}]}"#;

#[tokio::test]
async fn json_body_with_byte_order_mark_is_accepted() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let usage = json!({ "appName": "app", "instanceId": "i", "bucket": {
        "start": "2026-01-01T00:00:00Z", "stop": "2026-01-01T00:01:00Z", "toggles": { "first": { "yes": 1, "no": 0 } },
    }});
    let registration = json!({ "appName": "app", "instanceId": "i", "strategies": ["default"],
        "started": "2026-01-01T00:00:00Z", "interval": 10 });
    let context = json!({ "userId": "7" });
    let check = async |path: &str, token: &str, body: &Value| {
        for body in [body.to_string(), format!("{BYTE_ORDER_MARK}{body}")] {
            let request = parapet.request(Method::POST, path).header("authorization", token);
            let request = request.header("content-type", "application/json").body(body.clone());
            let response = send(request).await;
            let accepted = [StatusCode::OK, StatusCode::ACCEPTED].contains(&response.status);
            assert!(accepted, "{path}, {body}: {response:?}");
        }
    };
    check("/api/client/register", CLIENT, &registration).await;
    check("/api/client/metrics", CLIENT, &usage).await;
    check("/api/client/metrics/bulk", CLIENT, &json!({ "applications": [], "metrics": [] })).await;
    check("/api/frontend", FRONTEND, &context).await;
    check("/api/frontend/all", FRONTEND, &context).await;
    check("/api/frontend/features/first", FRONTEND, &context).await;
    check("/api/frontend/client/register", FRONTEND, &registration).await;
    check("/api/frontend/client/metrics", FRONTEND, &usage).await;
    check("/api/proxy", FRONTEND, &context).await;
    let of_ofrep = json!({ "context": { "targetingKey": "7" } });
    check("/ofrep/v1/evaluate/flags", FRONTEND, &of_ofrep).await;
    check("/ofrep/v1/evaluate/flags/first", FRONTEND, &of_ofrep).await;
    check("/edge/validate", CLIENT, &json!({ "tokens": [CLIENT] })).await;
}

#[tokio::test]
async fn compressed_body_with_byte_order_mark_is_accepted() {
    let parapet = InProcessParapet::offline(FLAGS).await;
    let body = zstd::bulk::compress(format!("{BYTE_ORDER_MARK}{{}}").as_bytes(), 1).unwrap();
    let request = parapet.request(Method::POST, "/api/frontend").header("authorization", FRONTEND);
    let request = request.header("content-type", "application/json");
    let response = send(request.header("content-encoding", "zstd").body(body)).await;
    assert_eq!(response.status, StatusCode::OK, "{}", response.text());
}

const ADMIN: &str = "*:*.byte-order-mark-0123456789abcdef0123456789abcdef";

#[tokio::test]
async fn admin_api_accepts_body_with_byte_order_mark() {
    let parapet =
        InProcessParapet::standalone(FLAGS, &[], &[("INIT_ADMIN_API_TOKENS", ADMIN)]).await;
    let post = async |path: &str, body: Value| {
        let request = parapet.admin_request(Method::POST, path).header("authorization", ADMIN);
        let request = request.header("content-type", "application/json");
        send(request.body(format!("{BYTE_ORDER_MARK}{body}"))).await
    };
    let token = json!({ "tokenName": "x", "type": "client", "environment": "development" });
    assert_eq!(post("/api/admin/api-tokens", token).await.status, StatusCode::CREATED);
    let explain = json!({ "flag": "first", "environment": "development", "context": {} });
    assert_eq!(post("/api/admin/explain", explain).await.status, StatusCode::OK);
}

#[tokio::test]
async fn files_with_byte_order_mark_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{BYTE_ORDER_MARK}{text}")).unwrap();
        path
    };
    let flags = save("flags.json", FLAGS);
    let config = save("parapet.toml", "log = \"debug\"\n");
    let standalone = Parapet::mode("standalone").flag("--flags", &flags).flag("--config", &config);
    let upstream = standalone
        .env("INIT_ADMIN_API_TOKENS", ADMIN)
        .env("INIT_CLIENT_API_TOKENS", CLIENT)
        .start()
        .await;
    let (status, body) = upstream.get("/api/client/features", CLIENT).await;
    assert_eq!((status, &body["features"][0]["name"]), (StatusCode::OK, &json!("first")));
    save("flags.json", &FLAGS.replace("first", "second"));
    wait_until("the file is read again", Duration::from_secs(10), async || {
        let (_, body) = upstream.get("/api/client/features", CLIENT).await;
        (body["features"][0]["name"] == "second").then_some(())
    })
    .await;

    let token = save("admin-token", ADMIN);
    let backup = folder.path().join("backup");
    std::fs::create_dir(&backup).unwrap();
    save("backup/unleash_tokens.json", "[]");
    save("backup/unleash_features.json", "[]");
    let edge = Parapet::edge(&upstream.admin_url()).flag("--upstream-admin-token-file", token);
    let edge = edge.flag("--backup-folder", backup).start().await;
    wait_until("the edge has the flags", Duration::from_secs(30), async || {
        let request = http().get(edge.url() + "/api/client/features");
        let response = request.header("authorization", CLIENT).send().await.ok()?;
        (response.status() == StatusCode::OK).then_some(())
    })
    .await;
    assert!(!edge.log().contains("WARN"), "{}", edge.log());
}

#[test]
fn explain_reads_flag_file_with_byte_order_mark() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flags.json");
    std::fs::write(&path, format!("{BYTE_ORDER_MARK}{FLAGS}")).unwrap();
    let mut command = parapet_command(&folder);
    let output = command.args(["explain", "--flag", "first", "--flags"]).arg(&path).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
}
