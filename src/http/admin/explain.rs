//! `POST /api/admin/explain`: explains the evaluation of a flag for a context.
//!
//! The response reveals the whole configuration of the flag. The caller is authenticated before.

use jiff::Timestamp;

use crate::{
    evaluation::explain::{self, UnknownFlag},
    http::response::{self, HttpError, HttpResponse},
    protocol::explain::ExplainRequest,
    served::Snapshots,
    token::Environment,
};

/// Parses a request body and returns an [`Explanation`](crate::engine::explanation::Explanation).
pub(super) fn explain(snapshots: &Snapshots, body: &[u8]) -> Result<HttpResponse, HttpError> {
    let request =
        ExplainRequest::parse(body).map_err(|error| HttpError::Malformed(error.to_string()))?;
    let Some(snapshot) = snapshots.load(&Environment::new(&request.environment)) else {
        let names = snapshots.environments();
        let names: Vec<_> = names.iter().map(Environment::as_str).collect();
        return Err(HttpError::ResourceNotFound(format!(
            "there is no such environment; there are: {}",
            names.join(", ")
        )));
    };
    let (now, draw) = (Timestamp::now(), rand::random());
    match explain::explain(&snapshot, &request.flag, &request.context, now, draw) {
        Ok(explanation) => Ok(response::json_document(&explanation)),
        Err(UnknownFlag { similar_names }) if similar_names.is_empty() => {
            Err(HttpError::ResourceNotFound("there is no such flag in this environment".to_owned()))
        }
        Err(UnknownFlag { similar_names }) => Err(HttpError::ResourceNotFound(format!(
            "there is no such flag in this environment; similar ones are: {}",
            similar_names.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        protocol::features::Document,
        served::ServedSnapshot,
        token::{Projects, Scope},
    };

    async fn assert_response(body: &Value, status: u16, field: &str, expect: &str) {
        let snapshots = Snapshots::default();
        let flags = json!({ "features": [{ "name": "cart", "enabled": true, "strategies": [] }] });
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let document = Document::parse(flags.to_string().as_bytes()).unwrap();
        snapshots.swap(ServedSnapshot::build(scope, document, None));
        let reply =
            explain(&snapshots, body.to_string().as_bytes()).unwrap_or_else(HttpResponse::from);
        assert_eq!(reply.status().as_u16(), status, "{body}");
        let text = reply.into_body().collect().await.unwrap().to_bytes();
        let document: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(document[field], expect, "{body}");
    }

    #[tokio::test]
    async fn flag_is_explained_and_unknown_names_get_suggestions() {
        let summary = "`cart` is on: it has no strategies, so it is on for everybody";
        assert_response(&json!({ "environment": "dev", "flag": "cart" }), 200, "summary", summary)
            .await;
        assert_response(
            &json!({ "environment": "prod", "flag": "cart" }),
            404,
            "message",
            "there is no such environment; there are: dev",
        )
        .await;
        assert_response(
            &json!({ "environment": "dev", "flag": "Cart2" }),
            404,
            "message",
            "there is no such flag in this environment; similar ones are: cart",
        )
        .await;
        assert_response(
            &json!({ "environment": "dev", "flag": "x" }),
            404,
            "message",
            "there is no such flag in this environment",
        )
        .await;
        assert_response(&json!({ "environment": "dev" }), 400, "message", "`flag` must be a name")
            .await;
    }
}
