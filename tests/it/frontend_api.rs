//! The API of frontend SDKs: flags evaluated for the context of a request.

use std::collections::BTreeSet;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::in_process_parapet::{FRONTEND, FullResponse, InProcessParapet, WEB_FRONTEND, send};

/// A flag of the project `web` that is on if this constraint holds.
fn constrained_flag(name: &str, field: &str, value: &str) -> Value {
    let constraint = json!({"contextName": field, "operator": "IN", "values": [value]});
    json!({
        "name": name, "project": "web", "enabled": true, "impressionData": true,
        "strategies": [{"name": "default", "constraints": [constraint]}],
    })
}

fn flags() -> String {
    let from = |name: &str, address: &str| {
        json!({
            "name": name, "enabled": true, "project": "default",
            "strategies": [{"name": "remoteAddress", "parameters": {"IPs": address}}],
        })
    };
    json!({"features": [
        constrained_flag("for-ada", "userId", "ada"),
        constrained_flag("in-session", "sessionId", "s1"),
        constrained_flag("in-app", "appName", "shop"),
        constrained_flag("in-development", "environment", "development"),
        constrained_flag("in-space", "environment", "space"),
        constrained_flag("premium", "plan", "premium & more"),
        constrained_flag("seven", "number", "7"),
        constrained_flag("true", "yes", "true"),
        from("at-home", "127.0.0.1"),
        from("elsewhere", "203.0.113.7"),
        {"name": "always", "project": "default", "enabled": true, "strategies": [{"name": "default"}],
         "variants": [{"name": "green", "weight": 1000, "payload": {"type": "string", "value": "é"}}]},
        {"name": "never", "project": "default", "enabled": false, "strategies": []},
    ]})
    .to_string()
}

/// Flags that are on for every request.
const ALWAYS_ON: [&str; 2] = ["always", "at-home"];

#[track_caller]
fn enabled_flags(response: &FullResponse) -> BTreeSet<String> {
    assert_eq!(response.status, StatusCode::OK, "{}", response.text());
    let json = response.json();
    let toggles = json["toggles"].as_array().unwrap().iter();
    let on = toggles.filter(|toggle| toggle["enabled"] == true);
    on.map(|toggle| toggle["name"].as_str().unwrap().to_owned()).collect()
}

#[track_caller]
fn assert_enabled(response: &FullResponse, besides: &[&str], regardless: &[&str], how: &str) {
    let expect = besides.iter().chain(regardless).map(|&name| name.to_owned()).collect();
    assert_eq!(enabled_flags(response), expect, "{how}");
}

#[tokio::test]
async fn context_is_read_from_the_query() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let check = async |query: &str, besides: &[&str]| {
        let response = parapet.get(&format!("/api/frontend?{query}"), FRONTEND).await;
        assert_enabled(&response, besides, &ALWAYS_ON, query);
    };
    check("", &[]).await;
    check("userId=ada", &["for-ada"]).await;
    check("userId=ada&sessionId=s1&appName=shop", &["for-ada", "in-session", "in-app"]).await;
    check("properties[plan]=premium%20%26+more", &["premium"]).await;
    check("properties%5Bplan%5D=premium+%26+more", &["premium"]).await;
    check("plan=premium+%26+more", &["premium"]).await;
    check("properties[userId]=ada", &["for-ada"]).await;
    check("userId=bob&properties[userId]=ada", &[]).await;
    check("properties[number]=7&properties[yes]=true", &["seven", "true"]).await;
    check("properties[a][b]=1&&=&properties[]=x&properties[=%ff", &[]).await;
}

#[tokio::test]
async fn context_is_read_from_a_flat_or_wrapped_body() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let check = async |context: Value, besides: &[&str]| {
        let flat = parapet.post("/api/frontend", FRONTEND, &context).await;
        assert_enabled(&flat, besides, &ALWAYS_ON, &format!("{context}"));
        let wrapped = json!({"context": context, "userId": "not looked at"});
        let wrapped = parapet.post("/api/frontend", FRONTEND, &wrapped).await;
        assert_eq!(wrapped.text(), flat.text(), "{context}");
    };
    check(json!({}), &[]).await;
    check(json!({"userId": "ada", "appName": "shop"}), &["for-ada", "in-app"]).await;
    check(json!({"properties": {"plan": "premium & more"}}), &["premium"]).await;
    check(json!({"properties": {"number": 7, "yes": true}}), &["seven", "true"]).await;
    check(json!({"number": 7, "yes": true}), &["seven", "true"]).await;
    check(json!({"properties": {"userId": "ada"}}), &["for-ada"]).await;
    check(json!({"userId": null, "properties": null, "sessionId": {"s1": 1}}), &[]).await;
    check(json!({"sessionId": ["s1"]}), &["in-session"]).await;
    let empty = parapet.request(Method::POST, "/api/frontend").header("authorization", FRONTEND);
    assert_enabled(&send(empty).await, &[], &ALWAYS_ON, "no body");
}

#[tokio::test]
async fn context_environment_is_taken_from_the_request_not_the_token() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for (query, besides) in [
        ("", &[][..]),
        ("?environment=space", &["in-space"]),
        ("?environment=development", &["in-development"]),
    ] {
        let response = parapet.get(&format!("/api/frontend{query}"), FRONTEND).await;
        assert_enabled(&response, besides, &ALWAYS_ON, query);
    }
}

#[tokio::test]
async fn all_endpoint_lists_disabled_flags_of_the_tokens_projects() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let all = parapet.get("/api/frontend/all", FRONTEND).await;
    assert_enabled(&all, &[], &ALWAYS_ON, "all");
    let toggles = all.json()["toggles"].clone();
    assert_eq!(toggles.as_array().unwrap().len(), 12);
    let names: Vec<_> = toggles.as_array().unwrap().iter().map(|it| it["name"].as_str()).collect();
    assert!(names.is_sorted(), "{names:?}");
    let web = parapet.get("/api/frontend/all", WEB_FRONTEND).await;
    assert_eq!(web.json()["toggles"].as_array().unwrap().len(), 8);
    assert_enabled(&web, &[], &[], "web");
}

#[tokio::test]
async fn flag_has_variant_and_both_spellings_of_impression_data() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let always = parapet.get("/api/frontend/features/always", FRONTEND).await;
    assert_eq!(
        always.json(),
        json!({
            "name": "always", "enabled": true, "impression_data": false, "impressionData": false,
            "variant": {
                "name": "green", "enabled": true, "feature_enabled": true, "featureEnabled": true,
                "payload": {"type": "string", "value": "é"},
            },
        })
    );
    let path = "/api/frontend/features/for-ada";
    let off = json!({
        "name": "for-ada", "enabled": false, "impression_data": true, "impressionData": true,
        "variant": {
            "name": "disabled", "enabled": false, "feature_enabled": false, "featureEnabled": false,
        },
    });
    assert_eq!(parapet.get(path, FRONTEND).await.json(), off);
    let on = parapet.get(&format!("{path}?userId=ada"), FRONTEND).await.json();
    assert_eq!((&on["enabled"], &on["variant"]["feature_enabled"]), (&true.into(), &true.into()));
    assert_eq!(parapet.post(path, FRONTEND, &json!({"userId": "ada"})).await.json(), on);
    let listed = parapet.get("/api/frontend/all?userId=ada", FRONTEND).await.json();
    assert!(listed["toggles"].as_array().unwrap().contains(&on));
}

#[tokio::test]
async fn missing_or_hidden_flag_gets_404() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for (token, path) in [
        (FRONTEND, "/api/frontend/features/none"),
        (FRONTEND, "/api/frontend/features/"),
        (FRONTEND, "/api/proxy/features/always"),
        (FRONTEND, "/api/frontend/nothing"),
        (WEB_FRONTEND, "/api/frontend/features/always"),
    ] {
        let response = parapet.get(path, token).await;
        assert_eq!(response.status, StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test]
async fn proxy_path_is_an_alias_of_frontend() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for rest in ["?userId=ada", "/all?userId=ada"] {
        let one = parapet.get(&format!("/api/frontend{rest}"), FRONTEND).await;
        let other = parapet.get(&format!("/api/proxy{rest}"), FRONTEND).await;
        assert_eq!((other.status, other.text()), (StatusCode::OK, one.text()));
        assert_eq!(other.header("etag"), one.header("etag"));
    }
    let registration =
        json!({"appName": "a", "interval": 1, "started": "2026-01-01T00:00:00Z", "strategies": []});
    let report = json!({"appName": "a", "instanceId": "i", "bucket": {
        "start": "2026-01-01T00:00:00Z", "stop": "2026-01-01T00:01:00Z",
        "toggles": {"always": {"yes": 1, "no": 0, "variants": {"green": 1}}}}});
    for base in ["/api/frontend", "/api/frontend/all", "/api/proxy", "/api/proxy/all"] {
        for (path, body) in [("/client/register", &registration), ("/client/metrics", &report)] {
            let response = parapet.post(&format!("{base}{path}"), FRONTEND, body).await;
            assert_eq!(response.status, StatusCode::ACCEPTED, "{base}{path}: {}", response.text());
        }
    }
}

#[tokio::test]
async fn matching_if_none_match_gets_304() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for path in ["/api/frontend", "/api/frontend/all", "/api/frontend/features/for-ada"] {
        let fetch = async |query: &str, tag: &str| {
            let request = parapet.request(Method::GET, &format!("{path}{query}"));
            let request = request.header("authorization", FRONTEND).header("if-none-match", tag);
            send(request).await
        };
        let fresh = fetch("?userId=bob", "\"none\"").await;
        assert_eq!((fresh.status, fresh.header("cache-control")), (StatusCode::OK, "no-cache"));
        let tag = fresh.header("etag");
        assert!(tag.starts_with('"'), "{tag}");
        for condition in [tag, "*", &format!("W/{tag}"), &format!("\"a\", {tag}")] {
            let same = fetch("?userId=bob", condition).await;
            assert_eq!((same.status, same.text()), (StatusCode::NOT_MODIFIED, ""), "{path}");
            assert_eq!((same.header("etag"), same.header("cache-control")), (tag, "no-cache"));
        }
        let same_outcome = fetch("?userId=carol", tag).await;
        assert_eq!(same_outcome.status, StatusCode::NOT_MODIFIED, "nothing differs for her");
        assert_eq!(fetch("?userId=ada", tag).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn invalid_body_is_rejected_with_the_reason() {
    let parapet = InProcessParapet::offline_with(&flags(), &["--body-limit-bytes", "1000"]).await;
    let check = async |kind: &str, body: String, expect: StatusCode| {
        for path in ["/api/frontend", "/api/proxy/all", "/api/frontend/features/always"] {
            let request = parapet.request(Method::POST, path).header("authorization", FRONTEND);
            let response = send(request.header("content-type", kind).body(body.clone())).await;
            assert_eq!(response.status, expect, "{kind} {body}");
            assert_eq!(response.json()["message"].is_string(), expect != StatusCode::OK);
        }
    };
    let json = "application/json";
    for body in ["{", "[]", "7", "null", "\"a\"", "{\"context\":}", "{} {}", "\u{0}"] {
        check(json, body.to_owned(), StatusCode::BAD_REQUEST).await;
    }
    check("text/plain", "{}".to_owned(), StatusCode::UNSUPPORTED_MEDIA_TYPE).await;
    check("application/x-www-form-urlencoded", "a=b".into(), StatusCode::UNSUPPORTED_MEDIA_TYPE)
        .await;
    check("application/json; charset=utf-8", "{}".to_owned(), StatusCode::OK).await;
    let fits = format!("{{\"userId\":\"{}\"}}", "x".repeat(1000 - 13));
    check(json, fits.clone(), StatusCode::OK).await;
    check(json, fits + " ", StatusCode::PAYLOAD_TOO_LARGE).await;
}

#[tokio::test]
async fn remote_address_is_the_peers_or_from_a_trusted_proxy() {
    let (here, there) = (["at-home"], ["elsewhere"]);
    let regardless = ["always"];
    let check = async |args: &[&str], headers: &[(&str, &str)], query: &str, on: &[&str]| {
        let parapet = InProcessParapet::offline_with(&flags(), args).await;
        let path = format!("/api/frontend{query}");
        let request = parapet.request(Method::GET, &path).header("authorization", FRONTEND);
        let request = headers.iter().fold(request, |it, (name, value)| it.header(*name, *value));
        assert_enabled(
            &send(request).await,
            on,
            &regardless,
            &format!("{args:?} {headers:?} {query}"),
        );
    };
    let forwarded = [("x-forwarded-for", "203.0.113.7")];
    check(&[], &[], "", &here).await;
    check(&[], &forwarded, "", &here).await;
    check(&["--trust-proxy"], &forwarded, "", &there).await;
    check(&["--trust-proxy"], &[("forwarded", "for=203.0.113.7;proto=https")], "", &there).await;
    let only = |network| ["--trust-proxy", "--proxy-trusted-servers", network];
    check(&only("10.0.0.0/8"), &forwarded, "", &here).await;
    check(&only("127.0.0.0/8"), &forwarded, "", &there).await;
    let spoofed = [("x-forwarded-for", "127.0.0.1, 203.0.113.7")];
    check(&only("127.0.0.1"), &spoofed, "", &there).await;
    check(&["--trust-proxy"], &forwarded, "?remoteAddress=127.0.0.1", &here).await;
    check(&[], &[], "?remoteAddress=203.0.113.7", &there).await;
}
