//! The API of server SDKs: flag configuration as upstream sent it, restricted to what the token may see.

use std::collections::BTreeMap;
use std::io::Read as _;

use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::in_process_parapet::{
    CLIENT, ClientSpecHeader as _, FullResponse, InProcessParapet, WEB_CLIENT, send,
};

const FEATURES: &str = "/api/client/features";

/// Flags with fields that no version of Unleash has sent so far, oddly spaced: name and JSON text.
const FLAGS: [(&str, &str); 5] = [
    (
        "plain",
        r#"{"name":"plain","project":"default","enabled":true,"strategies":[{"name":"default"}]}"#,
    ),
    (
        "shop.one",
        r#"{"name":"shop.one","project":"shop","enabled":false,"strategies":[{"name":"default","segments":[2]}]}"#,
    ),
    (
        "web.one",
        r#"{ "future": {"deep": [1, 2.50, "\u00e9", null]}, "name":"web.one", "project":"web","enabled":true,
            "exact":12345678901234567890123.10, "strategies":[{"name":"default","segments":[1],"weather":"fine"}]}"#,
    ),
    (
        "web.operator",
        r#"{"name":"web.operator","project":"web","enabled":true,"strategies":[{"name":"flexibleRollout",
            "parameters":{"rollout":"100","new":"x"},"constraints":[{"contextName":"a","operator":"IS_WEEKDAY","mode":7}]}]}"#,
    ),
    (
        "web/a b?ö",
        r#"{"name":"web/a b?ö","project":"web","enabled":true,"strategies":[{"name":"default"}]}"#,
    ),
];

const SEGMENTS: &str = r#"[
    {"id":1,"name":"one","constraints":[{"contextName":"country","operator":"IN","values":["NO"]}]},
    {"id":2,"name":"two","constraints":[{"contextName":"country","operator":"IN","values":["SE"]}]},
    {"id":3,"name":"unused","constraints":[]}]"#;

fn flags() -> String {
    let features = FLAGS.map(|(_, text)| text).join(",");
    format!(r#"{{"version":2,"features":[{features}],"segments":{SEGMENTS}}}"#)
}

/// A flag file whose responses are large enough to compress.
fn long_flags() -> String {
    let flag = |n| format!(r#"{{"name":"flag-{n:03}","enabled":true,"strategies":[]}}"#);
    format!(r#"{{"features":[{}]}}"#, (0..100).map(flag).collect::<Vec<_>>().join(","))
}

#[derive(Deserialize)]
struct Listing<'a> {
    #[serde(borrow)]
    features: Vec<&'a RawValue>,
    #[serde(default)]
    segments: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// The JSON text of each flag in a response.
fn raw_features(response: &FullResponse) -> BTreeMap<String, String> {
    assert_eq!(response.status, StatusCode::OK, "{}", response.text());
    let listing: Listing<'_> = serde_json::from_slice(&response.body).unwrap();
    let named = |text: &str| serde_json::from_str::<Named>(text).unwrap().name;
    listing.features.iter().map(|it| (named(it.get()), it.get().to_owned())).collect()
}

fn segment_ids(response: &FullResponse) -> Vec<u64> {
    let listing: Listing<'_> = serde_json::from_slice(&response.body).unwrap();
    listing.segments.iter().map(|segment| segment["id"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn unknown_fields_pass_through_unchanged() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let sent = FLAGS.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
    assert_eq!(raw_features(&parapet.get(FEATURES, CLIENT).await), sent);
    for (name, text) in FLAGS {
        let name = percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC);
        let one = parapet.get(&format!("{FEATURES}/{name}"), CLIENT).await;
        assert_eq!((one.status, one.text()), (StatusCode::OK, text));
    }
}

#[tokio::test]
async fn get_post_and_head_respond_alike() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let fetch = |method| {
        let request =
            parapet.request(method, FEATURES).header("authorization", CLIENT).with_client_spec();
        send(request)
    };
    let get = fetch(Method::GET).await;
    let post = fetch(Method::POST).await;
    assert_eq!((get.status, &get.body), (post.status, &post.body));
    let head = fetch(Method::HEAD).await;
    assert_eq!((head.status, head.text()), (StatusCode::OK, ""));
    for name in ["content-length", "etag", "content-type", "vary"] {
        assert_eq!(head.header(name), get.header(name), "{name}");
        assert_ne!(get.header(name), "", "{name}");
    }
    assert_eq!(get.header("content-type"), "application/json");
    let delete = fetch(Method::DELETE).await;
    assert_eq!(delete.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(delete.header("allow"), "GET, HEAD, POST");
}

#[tokio::test]
async fn token_and_query_restrict_visible_flags() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let check = async |token: &str, query: &str, expect: &[&str]| {
        let response = parapet.get(&format!("{FEATURES}{query}"), token).await;
        let names: Vec<_> = raw_features(&response).into_keys().collect();
        assert_eq!(names, expect, "{query}");
    };
    let web = ["web.one", "web.operator", "web/a b?ö"];
    check(CLIENT, "", &["plain", "shop.one", "web.one", "web.operator", "web/a b?ö"]).await;
    check(CLIENT, "?namePrefix=web", &web).await;
    check(CLIENT, "?namePrefix=web%2F", &web[2..]).await;
    check(CLIENT, "?namePrefix=", &["plain", "shop.one", web[0], web[1], web[2]]).await;
    check(CLIENT, "?project=shop", &["shop.one"]).await;
    check(CLIENT, "?project=shop&project=default", &["plain", "shop.one"]).await;
    check(CLIENT, "?project=shop&project=web&namePrefix=web.o", &web[..2]).await;
    check(CLIENT, "?project=*", &["plain", "shop.one", web[0], web[1], web[2]]).await;
    check(CLIENT, "?project=none", &[]).await;
    check(WEB_CLIENT, "", &web).await;
    check(WEB_CLIENT, "?project=shop&project=web", &web).await;
    check(WEB_CLIENT, "?project=shop", &[]).await;
    check(WEB_CLIENT, "?project=*", &web).await;
}

#[tokio::test]
async fn missing_or_hidden_flag_gets_404() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for (token, path) in [
        (CLIENT, "/api/client/features/none"),
        (CLIENT, "/api/client/features/a/b"),
        (WEB_CLIENT, "/api/client/features/shop.one"),
        (CLIENT, "/api/client/nothing"),
        (CLIENT, "/api/client"),
        (CLIENT, "/api/clientfeatures"),
    ] {
        let response = parapet.get(path, token).await;
        assert_eq!(response.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(response.json()["message"], "not found");
    }
    let garbled = parapet.get("/api/client/features/%ff", CLIENT).await;
    assert_eq!(garbled.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn only_segments_of_visible_flags_are_sent() {
    let parapet = InProcessParapet::offline(&flags()).await;
    let check = async |token: &str, query: &str, expect: &[u64]| {
        let response = parapet.get(&format!("{FEATURES}{query}"), token).await;
        assert_eq!(segment_ids(&response), expect, "{query}");
    };
    check(CLIENT, "", &[1, 2]).await;
    check(WEB_CLIENT, "", &[1]).await;
    check(CLIENT, "?project=shop", &[2]).await;
    check(CLIENT, "?namePrefix=plain", &[]).await;
}

#[tokio::test]
async fn segments_are_inlined_for_sdks_before_specification_4_2() {
    let parapet = InProcessParapet::offline(&flags()).await;
    for version in [None, Some("4.1.9"), Some("not a version")] {
        let request = parapet.request(Method::GET, "/api/client/features?namePrefix=web.one");
        let request = request.header("authorization", CLIENT);
        let request = match version {
            Some(version) => request.header("unleash-client-spec", version),
            None => request,
        };
        let old = send(request).await;
        assert!(segment_ids(&old).is_empty(), "{version:?}");
        let strategy = &old.json()["features"][0]["strategies"][0];
        assert_eq!(strategy["constraints"][0]["values"][0], "NO", "{version:?}");
        assert!(strategy.get("segments").is_none(), "{version:?}");
        assert_eq!(strategy["weather"], "fine", "what is unknown stays");
        assert_eq!(old.json()["features"][0]["future"]["deep"][1].to_string(), "2.5");
        assert!(old.text().contains("12345678901234567890123.10"), "{}", old.text());
    }
}

fn decoded(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    match coding {
        "gzip" => flate2::read::GzDecoder::new(bytes).read_to_end(&mut plain).unwrap(),
        "br" => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut plain).unwrap(),
        "zstd" => zstd::Decoder::new(bytes).unwrap().read_to_end(&mut plain).unwrap(),
        _ => panic!("an unknown coding: {coding}"),
    };
    plain
}

#[tokio::test]
async fn every_content_encoding_decodes_alike_and_has_its_own_strong_etag() {
    let parapet = InProcessParapet::offline(&long_flags()).await;
    let plain = parapet.get(FEATURES, CLIENT).await;
    assert_eq!((plain.header("content-encoding"), plain.header("vary")), ("", "accept-encoding"));
    let mut tags = vec![plain.header("etag").to_owned()];
    for coding in ["gzip", "br", "zstd"] {
        let request = parapet.request(Method::GET, FEATURES).header("authorization", CLIENT);
        let coded = send(request.header("accept-encoding", coding).with_client_spec()).await;
        assert_eq!(coded.header("content-encoding"), coding);
        assert_eq!(coded.header("vary"), "accept-encoding");
        assert_eq!(coded.header("content-length"), coded.body.len().to_string());
        assert!(coded.body.len() < plain.body.len());
        assert_eq!(decoded(coding, &coded.body), plain.body, "{coding}");
        tags.push(coded.header("etag").to_owned());
    }
    assert!(tags.iter().all(|tag| tag.starts_with('"') && tag.ends_with('"')), "{tags:?}");
    tags.dedup();
    assert_eq!(tags.len(), 4, "{tags:?}");
}

#[tokio::test]
async fn matching_if_none_match_gets_304_without_body() {
    let parapet = InProcessParapet::offline(&long_flags()).await;
    let tag = parapet.get(FEATURES, CLIENT).await.header("etag").to_owned();
    let fetch = async |method: &Method, path: &str, conditions: &[&str]| {
        let request = parapet.request(method.clone(), path).header("authorization", CLIENT);
        let request = request.header("accept-encoding", "gzip").with_client_spec();
        let request =
            conditions.iter().fold(request, |it, value| it.header("if-none-match", *value));
        send(request).await
    };
    let gzip_tag = fetch(&Method::GET, FEATURES, &[]).await.header("etag").to_owned();
    let (weak, list) = (format!("W/{tag}"), format!("\"x\", {tag},W/\"y\""));
    let know: [&[&str]; 7] =
        [&[&tag], &[&gzip_tag], &[&weak], &[&list], &["*"], &["\"x\"", &tag], &[" , ", &weak]];
    for conditions in know {
        for method in [Method::GET, Method::HEAD] {
            let response = fetch(&method, FEATURES, conditions).await;
            assert_eq!(response.status, StatusCode::NOT_MODIFIED, "{method} {conditions:?}");
            assert_eq!(response.text(), "");
            assert_eq!(response.header("vary"), "accept-encoding");
            assert!(response.header("etag").starts_with('"'));
            assert!(!response.headers.contains_key("content-encoding"));
        }
    }
    let almost = format!("{}x\"", tag.trim_end_matches('"'));
    let know_not: [&[&str]; 5] =
        [&["\"x\""], &[tag.trim_matches('"')], &[""], &[&almost], &["W/*"]];
    for conditions in know_not {
        let response = fetch(&Method::GET, FEATURES, conditions).await;
        assert_eq!(response.status, StatusCode::OK, "{conditions:?}");
    }
    let narrowed = fetch(&Method::GET, "/api/client/features?namePrefix=flag-00", &[&tag]).await;
    assert_eq!(narrowed.status, StatusCode::OK, "another listing has another tag");
    let single = "/api/client/features/flag-001";
    let tag = fetch(&Method::GET, single, &[]).await.header("etag").to_owned();
    assert_eq!(fetch(&Method::GET, single, &[&tag]).await.status, StatusCode::NOT_MODIFIED);
}

#[tokio::test]
async fn etag_changes_with_flags() {
    let parapet = InProcessParapet::offline(&long_flags()).await;
    let before = parapet.get(FEATURES, CLIENT).await;
    std::fs::write(parapet.flags_file(), long_flags().replace("flag-007", "flag-bond")).unwrap();
    let limit = std::time::Duration::from_secs(20);
    let after = crate::rig::wait_until("the file is read again", limit, async || {
        let response = parapet.get(FEATURES, CLIENT).await;
        response.text().contains("flag-bond").then_some(response)
    });
    assert_ne!(after.await.header("etag"), before.header("etag"));
}
