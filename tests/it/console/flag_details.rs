//! Flags as the console describes and explains them.

use serde_json::json;

use super::browser::{Console, OWNER, PASSWORD, standalone, standalone_with, text_of};

#[tokio::test]
async fn flag_is_described_and_explained_for_a_user() {
    let parapet = standalone().await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    console.open_section("Flags").await;
    console.call("open_flag", json!({ "flag": "demo.gradual-rollout" })).await;
    let displayed = console.text().await;
    assert!(displayed.contains("25 %") && displayed.contains("Not used yet"), "{displayed}");
    let context_form = json!({ "fields": { "User ID": "7" } });
    let explained = console.call("explain", context_form).await;
    // The bucket from the Python SDK's hash of `demo.gradual-rollout:7`: modulo 100, plus 1.
    let displayed = text_of(&explained["text"]);
    assert!(displayed.contains("30"), "{displayed}");
    console.assert_accessible("a flag, explained").await;
    console.screenshot("flag").await;
    console.close().await;
}

/// Malformed parts of flags, and what the console says about them.
const MALFORMED_PARTS: [(&str, &str); 7] = [
    (r#""strategies":"x","variants":{"a":1}"#, "a strategy here cannot be read"),
    (r#""strategies":[null,{"name":"default","parameters":"x"}]"#, "The first strategy that"),
    (r#""strategies":[{"name":"default","segments":"x","variants":[null]}]"#, "A segment cannot"),
    (r#""strategies":[{"name":"default","constraints":[{"values":"abc"}]}]"#, "it never holds"),
    (r#""strategies":[],"dependencies":[{"feature":"a","variants":null},"x"]"#, "it never holds"),
    (r#""strategies":[],"description":{"onclick":"x"},"type":["x"]"#, "Everyone"),
    (r#""strategies":[],"variants":[{"name":"v","weight":1,"overrides":[{}]}]"#, "100 %"),
];

#[tokio::test]
async fn malformed_flag_is_shown_as_far_as_possible() {
    let named = MALFORMED_PARTS
        .iter()
        .enumerate()
        .map(|(at, (flag, _))| format!(r#"{{"name":"flag-{at}","enabled":true,{flag}}}"#));
    // No URL can contain these names.
    let steps = [".", ".."];
    let step = |name: &str| format!(r#"{{"name":"{name}","enabled":true,"strategies":[]}}"#);
    let flags: Vec<_> = named.chain(steps.map(step)).collect();
    let document = format!(r#"{{"features":[{}]}}"#, flags.join(","));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flags.json");
    std::fs::write(&file, document).unwrap();
    let parapet = standalone_with(&file).await;
    let mut console = Console::open(&parapet.admin_url()).await;
    console.sign_in(OWNER, PASSWORD).await;
    let odd =
        MALFORMED_PARTS.iter().enumerate().map(|(at, (_, text))| (format!("flag-{at}"), *text));
    for (name, text) in odd.chain(steps.map(|name| (name.to_owned(), "Everyone"))) {
        console.open_section("Flags").await;
        console.call("open_flag", json!({ "flag": name })).await;
        console.call("says", json!({ "text": text })).await;
        let explained = console.call("explain", json!({ "fields": {} })).await;
        assert!(text_of(&explained["text"]).contains(&format!("{name} is o")), "{explained}");
    }
    console.close().await;
}
