//! The behaviour of real Unleash servers that Parapet relies on: if a release changes it, these tests
//! fail first.
//!
//! Parapet is not involved; the SDKs use Unleash directly. So these tests also prove the rig.

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::rig::{
    STORE_TIMEOUT, Sdk, TokenKind, Unleash, UnleashVersion, http, send_json, wait_until,
};

/// Sends a request as an edge or an SDK does: `Null` means no body, `""` no token.
async fn send_request(
    unleash: &Unleash,
    method: Method,
    path: &str,
    token: &str,
    body: &Value,
) -> (StatusCode, Value) {
    let request = http().request(method, unleash.url() + path);
    let request = if token.is_empty() { request } else { request.header("Authorization", token) };
    send_json(request, body).await
}

/// One application's usage of one flag in this hour, as an edge posts it.
fn bulk_metrics(flag: &str, app_name: &str, uses: &[(&str, u64)]) -> Value {
    let hour = jiff::Timestamp::now().to_string();
    let metrics: Vec<Value> = uses
        .iter()
        .map(|(environment, yes)| {
            json!({
                "featureName": flag, "appName": app_name, "environment": environment, "timestamp": hour,
                "yes": yes, "no": 0, "variants": {},
            })
        })
        .collect();
    json!({ "applications": [], "metrics": metrics })
}

/// The type of a backend token in lists and validation responses: v1 tokens keep the old name.
fn backend_token_type(unleash: &Unleash) -> &'static str {
    if unleash.version() == UnleashVersion::V8SecureTokens { "backend" } else { "client" }
}

/// The tokens that `/edge/validate` lists as valid.
async fn validate(unleash: &Unleash, tokens: &[&str]) -> Vec<Value> {
    let (status, mut response) =
        send_request(unleash, Method::POST, "/edge/validate", "", &json!({ "tokens": tokens }))
            .await;
    assert_eq!(status, StatusCode::OK);
    serde_json::from_value(response["tokens"].take()).unwrap()
}

/// A strategy that is on for all users, with one variant.
fn blue_for_all() -> Value {
    json!({
        "name": "flexibleRollout",
        "parameters": { "rollout": "100", "stickiness": "default", "groupId": "blue" },
        "variants": [{ "name": "blue", "weight": 1000, "weightType": "variable", "stickiness": "default" }],
    })
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn every_sdk_sees_a_flag_and_its_usage_can_be_read_back() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "facts.seen-and-counted";
        unleash.create_enabled_flag(flag, "development", &[blue_for_all()]).await;
        unleash.wait_until_counted(flag, "development").await;
        let backend = unleash
            .create_token(TokenKind::Backend, "development", &["*"], "facts-seen-backend")
            .await;
        let frontend = unleash
            .create_token(TokenKind::Frontend, "development", &["*"], "facts-seen-frontend")
            .await;
        let url = unleash.url();
        let sdks = [
            ("facts-node", Sdk::node(&url, &backend, "facts-node").await),
            ("facts-python", Sdk::python(&url, &backend, "facts-python").await),
            ("facts-browser", Sdk::frontend(&url, &frontend, "facts-browser").await),
            ("facts-post", Sdk::frontend_post(&url, &frontend, "facts-post").await),
        ];
        let apps = sdks.each_ref().map(|(app_name, _)| *app_name);
        for (app_name, mut sdk) in sdks {
            let what = format!("{app_name} sees the flag at {url}");
            let blue = wait_until(&what, Duration::from_secs(30), async || {
                sdk.evaluate(json!({ "userId": "7" }))
                    .await
                    .remove(flag)
                    .filter(|flag| flag.enabled)
            })
            .await;
            assert_eq!(blue.variant["name"], "blue");
            assert_eq!(blue.variant["enabled"], true);

            sdk.use_flag(flag, 3).await;
            sdk.use_flag("facts.no-such-flag", 2).await;
            sdk.flush().await;
            sdk.use_variant(flag, 4).await;
            sdk.flush().await;
            sdk.close().await;
        }
        for app_name in apps {
            unleash.wait_for_usage(flag, app_name, "development", (7, 0)).await;
            // Variants are stored after the counts.
            wait_until("the variant is counted", STORE_TIMEOUT, async || {
                let usage = unleash.flag_usage(flag).await;
                let of_app = usage.iter().filter(|hour| hour.app_name == app_name);
                let blue: u64 = of_app.filter_map(|hour| hour.variants.get("blue")).sum();
                assert!(blue <= 4, "{app_name} at {:?}: {blue}", unleash.version());
                (blue == 4).then_some(())
            })
            .await;
        }
        // Registrations are stored every 20 s.
        wait_until("the backend SDKs have registered", STORE_TIMEOUT, async || {
            let stored = unleash.applications().await;
            ["facts-node", "facts-python"]
                .iter()
                .all(|name| stored.iter().any(|app| app == name))
                .then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn only_version_7_serves_flags_to_an_admin_token() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let admin = unleash.admin_token();
        let (status, response) =
            send_request(&unleash, Method::GET, "/api/client/features", admin, &Value::Null).await;
        if unleash.version() == UnleashVersion::V7 {
            assert_eq!(status, StatusCode::OK);
        } else {
            assert_eq!(status, StatusCode::FORBIDDEN);
            let message = "invalid token: expected a different token type for this endpoint";
            assert_eq!(response, json!({ "message": message }));
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_with_an_admin_token_is_rejected_or_dropped() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "facts.usage-under-admin-token";
        unleash.create_enabled_flag(flag, "development", &[]).await;
        unleash.wait_until_counted(flag, "development").await;
        let usage = bulk_metrics(flag, "facts-admin", &[("development", 5)]);
        let post = Method::POST;
        let (status, _) = send_request(
            &unleash,
            post.clone(),
            "/api/client/metrics/bulk",
            unleash.admin_token(),
            &usage,
        )
        .await;
        let expected = if unleash.version() == UnleashVersion::V7 {
            StatusCode::ACCEPTED
        } else {
            StatusCode::FORBIDDEN
        };
        assert_eq!(status, expected);

        // Usage sent later with a backend token arrives; by then the first batch would have arrived,
        // too.
        let token = unleash
            .create_token(TokenKind::Backend, "development", &["*"], "facts-usage-under-admin")
            .await;
        let later = bulk_metrics(flag, "facts-backend", &[("development", 2)]);
        let (status, _) =
            send_request(&unleash, post, "/api/client/metrics/bulk", &token, &later).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        unleash.wait_for_usage(flag, "facts-backend", "development", (2, 0)).await;
        assert!(unleash.flag_usage(flag).await.iter().all(|hour| hour.app_name == "facts-backend"));
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn usage_of_another_environment_is_accepted_but_dropped() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "facts.usage-of-another-environment";
        unleash.create_enabled_flag(flag, "development", &[]).await;
        unleash.wait_until_counted(flag, "development").await;
        let token = unleash
            .create_token(TokenKind::Backend, "production", &["*"], "facts-another-environment")
            .await;
        let usage = bulk_metrics(flag, "facts-two", &[("development", 5), ("production", 3)]);
        let (status, _) =
            send_request(&unleash, Method::POST, "/api/client/metrics/bulk", &token, &usage).await;
        assert_eq!(status, StatusCode::ACCEPTED);
        unleash.wait_for_usage(flag, "facts-two", "production", (3, 0)).await;
        assert!(unleash.flag_usage(flag).await.iter().all(|hour| hour.environment == "production"));
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn created_token_works_at_once_and_is_found_by_name() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let token =
            unleash.create_token(TokenKind::Backend, "production", &["*"], "facts-minted").await;
        let (status, _) =
            send_request(&unleash, Method::GET, "/api/client/features", &token, &Value::Null).await;
        assert_eq!(status, StatusCode::OK);

        let listed = unleash.tokens_named("facts-minted").await;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0]["environment"], "production");
        assert_eq!(listed[0]["type"], backend_token_type(&unleash));
        let secret = listed[0]["secret"].as_str().unwrap();
        if unleash.version() == UnleashVersion::V8SecureTokens {
            assert_eq!(listed[0]["secure"], true);
            assert_eq!(secret.len(), 22);
            assert!(
                token.starts_with(&format!("*:production.v2_{secret}_")),
                "the selector stands in the token"
            );
        } else {
            assert_eq!(secret, token);
        }

        // A name is not a key: a second token of the same name is a second token.
        unleash.create_token(TokenKind::Backend, "production", &["*"], "facts-minted").await;
        assert_eq!(unleash.tokens_named("facts-minted").await.len(), 2);
        assert!(unleash.tokens_named("facts-never-minted").await.is_empty());
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn validation_needs_no_authorization_and_lists_only_valid_tokens() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let backend = unleash
            .create_token(TokenKind::Backend, "development", &["default"], "facts-valid-b")
            .await;
        let frontend =
            unleash.create_token(TokenKind::Frontend, "production", &["*"], "facts-valid-f").await;
        let valid =
            validate(&unleash, &[&backend, "*:development.unknown", "gibberish", &frontend]).await;
        let find = |token: &str| valid.iter().find(|valid| valid["token"] == token).unwrap();
        assert_eq!(valid.len(), 2);
        assert_eq!(find(&backend)["type"], backend_token_type(&unleash));
        assert_eq!(find(&backend)["environment"], "development");
        assert_eq!(find(&backend)["projects"], json!(["default"]));
        assert_eq!(find(&frontend)["type"], "frontend");
        assert_eq!(find(&frontend)["environment"], "production");
        assert_eq!(find(&frontend)["projects"], json!(["*"]));
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn revoked_token_is_unlisted_at_once_rejected_later_and_still_validated() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let version = unleash.version();
        let token =
            unleash.create_token(TokenKind::Backend, "development", &["*"], "facts-revoked").await;
        let fetch = async || {
            send_request(&unleash, Method::GET, "/api/client/features", &token, &Value::Null)
                .await
                .0
        };
        assert_eq!(validate(&unleash, &[&token]).await.len(), 1);
        assert_eq!(fetch().await, StatusCode::OK);

        unleash.delete_token(&token).await;
        assert!(unleash.tokens_named("facts-revoked").await.is_empty());
        wait_until(
            &format!("{version:?} refuses the token"),
            Duration::from_secs(90),
            async || (fetch().await == StatusCode::UNAUTHORIZED).then_some(()),
        )
        .await;
        // So only a negative result of `/edge/validate` can be trusted.
        assert_eq!(validate(&unleash, &[&token]).await.len(), 1, "{version:?}");
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn token_created_after_its_first_rejection_is_listed_at_once_and_validated_last() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let version = unleash.version();
        let token = "*:development.facts-made-after-its-first-refusal-5a1c";
        let fetch = async || {
            send_request(&unleash, Method::GET, "/api/client/features", token, &Value::Null).await.0
        };
        assert!(validate(&unleash, &[token]).await.is_empty());
        assert_eq!(fetch().await, StatusCode::UNAUTHORIZED);

        unleash.insert_token(TokenKind::Backend, token, "facts-planted").await;
        assert_eq!(unleash.tokens_named("facts-planted").await[0]["secret"], token);
        wait_until(&format!("{version:?} takes the token"), Duration::from_secs(90), async || {
            (fetch().await == StatusCode::OK).then_some(())
        })
        .await;
        // `/edge/validate` caches its rejection for five minutes.
        assert!(validate(&unleash, &[token]).await.is_empty(), "{version:?}");
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn missing_or_unknown_token_gets_401_and_wrong_kind_403() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let missing = "This endpoint requires an API token. \
                       Please add an authorization header to your request with a valid token";
        for token in ["", "*:development.nobody-made-this"] {
            let response = send_request(&unleash, Method::GET, "/api/client/features", token, &Value::Null).await;
            assert_eq!(response, (StatusCode::UNAUTHORIZED, json!({ "message": missing })), "{:?}", unleash.version());
        }
        let token = unleash.create_token(TokenKind::Backend, "development", &["*"], "facts-wrong-kind").await;
        let wrong_kind = json!({ "message": "invalid token: expected a different token type for this endpoint" });
        let response = send_request(&unleash, Method::GET, "/api/frontend", &token, &Value::Null).await;
        assert_eq!(response, (StatusCode::FORBIDDEN, wrong_kind));
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn flags_have_a_strong_etag_and_exact_if_none_match_gets_304() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let token =
            unleash.create_token(TokenKind::Backend, "development", &["*"], "facts-etag").await;
        let fetch = async |etag: &str| {
            let url = unleash.url() + "/api/client/features";
            http()
                .get(url)
                .header("Authorization", &token)
                .header("If-None-Match", etag)
                .send()
                .await
                .unwrap()
        };
        // Other tests change flags meanwhile, so the pair of requests may have to be repeated.
        wait_until("a 304", Duration::from_secs(30), async || {
            let first = fetch("").await;
            assert_eq!(first.status(), StatusCode::OK);
            let etag = first.headers()["etag"].to_str().unwrap();
            assert!(etag.starts_with('"'), "{etag} is strong");
            (fetch(etag).await.status() == StatusCode::NOT_MODIFIED).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn segments_are_separate_for_spec_4_2_and_inlined_for_older_sdks() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "facts.segmented";
        let constraint = json!({ "contextName": "userId", "operator": "IN", "values": ["7"] });
        let segment = unleash.create_segment("facts-segment", &json!([constraint])).await;
        let strategy = json!({ "name": "default", "parameters": {}, "segments": [segment] });
        unleash.create_enabled_flag(flag, "production", &[strategy]).await;
        let token =
            unleash.create_token(TokenKind::Backend, "production", &["*"], "facts-segmented").await;
        let fetch = async |spec: &str| {
            let url = unleash.url() + "/api/client/features?namePrefix=facts.segmented";
            let request =
                http().get(url).header("Authorization", &token).header("Unleash-Client-Spec", spec);
            serde_json::from_slice::<Value>(&request.send().await.unwrap().bytes().await.unwrap())
                .unwrap()
        };
        let apart = wait_until("the flag is served", Duration::from_secs(30), async || {
            let flags = fetch("4.2.0").await;
            (flags["features"].as_array().unwrap().len() == 1).then_some(flags)
        })
        .await;
        let inlined = fetch("4.1.0").await;
        // Unleash sends all of its segments, including those of other tests.
        let sent = apart["segments"].as_array().unwrap();
        let sent = sent.iter().find(|it| it["id"] == segment).unwrap();
        assert_eq!(sent["constraints"][0]["values"], json!(["7"]));
        assert_eq!(apart["features"][0]["strategies"][0]["segments"], json!([segment]));
        assert_eq!(
            inlined["features"][0]["strategies"][0]["constraints"][0]["values"],
            json!(["7"])
        );
        assert_eq!(inlined["features"][0]["strategies"][0]["segments"], Value::Null);

        unleash.disable(flag, "production").await;
        wait_until("the flag is off", Duration::from_secs(30), async || {
            (fetch("4.2.0").await["features"][0]["enabled"] == false).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn environments_are_development_and_production_and_streaming_is_absent() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let listed = unleash.admin_get("/api/admin/environments").await;
        let environments: Vec<_> = listed["environments"].as_array().unwrap().iter().collect();
        let names: Vec<_> = environments.iter().map(|environment| &environment["name"]).collect();
        assert_eq!(names, ["development", "production"]);
        assert!(environments.iter().all(|environment| environment["enabled"] == true));

        let token = unleash
            .create_token(TokenKind::Backend, "development", &["*"], "facts-no-stream")
            .await;
        for path in ["/api/client/delta", "/api/client/streaming"] {
            let (status, _) = send_request(&unleash, Method::GET, path, &token, &Value::Null).await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{path}");
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn crashed_server_restarts_with_its_flags_and_tokens() {
    let unleash = Unleash::start(UnleashVersion::V7).await;
    unleash.create_enabled_flag("facts.survivor", "production", &[]).await;
    let token =
        unleash.create_token(TokenKind::Backend, "production", &["*"], "facts-survivor").await;
    unleash.kill();
    assert!(http().get(unleash.url() + "/health").send().await.is_err());
    unleash.restart().await;
    let (status, flags) =
        send_request(&unleash, Method::GET, "/api/client/features", &token, &Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(flags["features"][0]["name"], "facts.survivor");
    assert_eq!(flags["features"][0]["enabled"], true);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn client_token_for_all_environments_is_validated_and_gets_403_from_8() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let token = "*:*.facts-client-of-every-environment-5a1c";
        unleash.insert_token(TokenKind::Backend, token, "facts-every").await;
        let validated = validate(&unleash, &[token]).await;
        assert_eq!(
            (&validated[0]["type"], &validated[0]["environment"]),
            (&"client".into(), &"*".into())
        );
        for path in ["/api/client/features", "/api/client/features/no-such-flag"] {
            let (status, _) = send_request(&unleash, Method::GET, path, token, &Value::Null).await;
            if unleash.version() == UnleashVersion::V7 {
                assert_ne!(status, StatusCode::FORBIDDEN, "{path}");
            } else {
                assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
            }
        }
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn list_and_validation_agree_on_the_projects_of_a_token() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        for projects in [&["*"][..], &["default"]] {
            let name = format!("facts-projects-{}", projects[0]);
            let token =
                unleash.create_token(TokenKind::Backend, "production", projects, &name).await;
            let validated = validate(&unleash, &[&token]).await;
            let listed = unleash.admin_get("/api/admin/api-tokens").await;
            let listed = listed["tokens"].as_array().unwrap();
            let listed = listed.iter().find(|it| it["tokenName"] == *name).unwrap();
            for sent in [&validated[0], listed] {
                assert_eq!(sent["projects"], json!(projects), "{:?}", unleash.version());
            }
        }
    })
    .await;
}
