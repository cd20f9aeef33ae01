//! `meta` of flag configuration: in Unleash's format, with Parapet's own revision.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::in_process_parapet::{CLIENT, InProcessParapet, WEB_CLIENT};
use crate::rig::{FEATURES, Parapet, TokenKind, Unleash, http, wait_until};

fn flags(web: &str, shop: &str, revision: u64) -> String {
    let flag = |name: &str, project: &str| json!({ "name": name, "project": project, "enabled": true, "strategies": [] });
    json!({
        "features": [flag(web, "web"), flag(shop, "shop")],
        "meta": { "revisionId": revision, "etag": "\"of-the-source\"", "queryHash": "1234abcd" },
    })
    .to_string()
}

#[tokio::test]
async fn meta_contains_the_etag_and_changes_only_with_visible_flags() {
    let parapet = InProcessParapet::offline(&flags("a", "b", 5)).await;
    let web = parapet.get(FEATURES, WEB_CLIENT).await;
    let all = parapet.get(FEATURES, CLIENT).await;
    let meta = |response: &crate::in_process_parapet::FullResponse| response.json()["meta"].clone();
    for response in [&web, &all] {
        let meta = meta(response);
        assert_eq!(meta["etag"], response.header("etag"), "{meta}");
        assert!(meta["revisionId"].as_u64().is_some_and(|it| (1..1 << 31).contains(&it)), "{meta}");
        let hash = meta["queryHash"].as_str().unwrap();
        assert!(hash.len() == 8 && hash.bytes().all(|it| it.is_ascii_hexdigit()), "{meta}");
        assert_eq!(meta.as_object().unwrap().len(), 3, "{meta}");
    }
    assert_ne!(meta(&web)["queryHash"], meta(&all)["queryHash"]);

    // A flag of another project changes, and the revision of the source.
    std::fs::write(parapet.flags_file(), flags("a", "c", 6)).unwrap();
    wait_until("the change is served", Duration::from_secs(10), async || {
        (parapet.get(FEATURES, CLIENT).await.body != all.body).then_some(())
    })
    .await;
    let later = parapet.get(FEATURES, CLIENT).await;
    assert_ne!(meta(&later)["etag"], meta(&all)["etag"]);
    assert!(meta(&later)["revisionId"].as_u64() > meta(&all)["revisionId"].as_u64());
    assert_eq!(meta(&later)["queryHash"], meta(&all)["queryHash"]);
    assert_eq!(parapet.get(FEATURES, WEB_CLIENT).await.body, web.body);
}

#[tokio::test]
async fn equal_flags_have_equal_entity_tags_on_every_instance() {
    let (one, other) = (
        InProcessParapet::offline(&flags("a", "b", 5)).await,
        InProcessParapet::offline(&flags("a", "b", 7)).await,
    );
    let (one, other) = (one.get(FEATURES, CLIENT).await, other.get(FEATURES, CLIENT).await);
    assert_eq!(one.header("etag"), other.header("etag"));
    assert_eq!(one.json()["meta"]["etag"], other.json()["meta"]["etag"]);
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn meta_has_the_fields_that_unleash_sends() {
    const HERE: &str = "development";
    Unleash::on_every_version(async |unleash| {
        let token = unleash.create_token(TokenKind::Backend, HERE, &["*"], "meta").await;
        let edge =
            Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.flag("--fleet-name", "meta").start().await;
        let meta = async |server: String| -> (Value, String) {
            let request = http().get(server + FEATURES).header("authorization", &token);
            let response = request.send().await.unwrap();
            if response.status() != StatusCode::OK {
                return (Value::Null, String::new());
            }
            let tag = response.headers()["etag"].to_str().unwrap().to_owned();
            let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
            (body["meta"].clone(), tag)
        };
        let kinds = |meta: &Value| -> Vec<(String, bool, bool)> {
            let fields = meta.as_object().unwrap().iter();
            fields.map(|(name, it)| (name.clone(), it.is_string(), it.is_number())).collect()
        };
        let (theirs, tag) = meta(unleash.url()).await;
        assert_eq!(theirs["etag"], tag, "{theirs}");
        wait_until("the edge has validated the token", Duration::from_secs(30), async || {
            meta(parapet.url()).await.0.is_object().then_some(())
        })
        .await;
        let (ours, tag) = meta(parapet.url()).await;
        assert_eq!(ours["etag"], tag, "{ours}");
        assert_eq!(kinds(&ours), kinds(&theirs));
    })
    .await;
}
