//! `POST /api/admin/explain`: why a flag comes out as it does for somebody.
//!
//! Who may ask is decided before; the answer tells everything about the flag.

use jiff::Timestamp;

use crate::{
    answers::explained::{self, Missing},
    http::reply::{self, Failure, Reply},
    snapshot::Snapshots,
    token::Environment,
    wire::explain::Question,
};

/// Answers a request's body with an [`Explanation`](crate::engine::explanation::Explanation).
pub(super) fn explain(snapshots: &Snapshots, body: &[u8]) -> Result<Reply, Failure> {
    let question = Question::parse(body).map_err(|error| Failure::Malformed(error.to_string()))?;
    let Some(snapshot) = snapshots.load(&Environment::new(&question.environment)) else {
        let names = snapshots.environments();
        let names: Vec<_> = names.iter().map(Environment::as_str).collect();
        return Err(Failure::Missing(format!(
            "there is no such environment; there are: {}",
            names.join(", ")
        )));
    };
    let (now, draw) = (Timestamp::now(), rand::random());
    match explained::explain(&snapshot, &question.flag, &question.context, now, draw) {
        Ok(explanation) => Ok(reply::document(&explanation)),
        Err(Missing { alike }) if alike.is_empty() => {
            Err(Failure::Missing("there is no such flag in this environment".to_owned()))
        }
        Err(Missing { alike }) => Err(Failure::Missing(format!(
            "there is no such flag in this environment; similar ones are: {}",
            alike.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        snapshot::Snapshot,
        token::{Projects, Scope},
        wire::features::Document,
    };

    async fn check(body: &Value, status: u16, field: &str, expect: &str) {
        let snapshots = Snapshots::default();
        let flags = json!({ "features": [{ "name": "cart", "enabled": true, "strategies": [] }] });
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(flags.to_string().as_bytes()).unwrap();
        snapshots.swap(Snapshot::build(scope, document, None));
        let reply = explain(&snapshots, body.to_string().as_bytes()).unwrap_or_else(Reply::from);
        assert_eq!(reply.status().as_u16(), status, "{body}");
        let text = reply.into_body().collect().await.unwrap().to_bytes();
        let told: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(told[field], expect, "{body}");
    }

    #[tokio::test]
    async fn a_flag_is_explained_or_it_is_said_what_is_wrong() {
        let summary = "`cart` is on: it has no strategies, so it is on for everybody";
        check(&json!({ "environment": "dev", "flag": "cart" }), 200, "summary", summary).await;
        check(
            &json!({ "environment": "prod", "flag": "cart" }),
            404,
            "message",
            "there is no such environment; there are: dev",
        )
        .await;
        check(
            &json!({ "environment": "dev", "flag": "Cart2" }),
            404,
            "message",
            "there is no such flag in this environment; similar ones are: cart",
        )
        .await;
        check(
            &json!({ "environment": "dev", "flag": "x" }),
            404,
            "message",
            "there is no such flag in this environment",
        )
        .await;
        check(&json!({ "environment": "dev" }), 400, "message", "`flag` must be a name").await;
    }
}
