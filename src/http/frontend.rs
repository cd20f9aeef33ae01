//! The API of frontend SDKs: flags evaluated for a context.
//!
//! A context field that the client sends is used as sent. What it leaves out is completed here: the
//! environment from its token, the address from its connection.

mod changes;
mod question;

use std::sync::Arc;

use hyper::{
    HeaderMap,
    header::{HeaderValue, IF_NONE_MATCH},
};

pub use self::{
    changes::{Changes, Wake},
    question::{Asker, Question},
};
use super::{
    client::decoded,
    conditional,
    reply::{self, Failure, Freshness, Reply},
};
use crate::{
    answers::{self, Answer, Shown, followed},
    wire::context,
};

impl From<context::Error> for Failure {
    fn from(error: context::Error) -> Self {
        Self::Context(error.to_string())
    }
}

/// The hash of the answer that a client which follows says it has.
pub fn answer_of(last_event_id: Option<&HeaderValue>) -> Option<u128> {
    followed::parse_id(last_event_id?.to_str().ok()?.trim())
}

/// `/api/frontend` and `/api/frontend/all`.
pub async fn flags(headers: &HeaderMap, shown: Shown, question: Question<'_>) -> Reply {
    let view = question.snapshot.view(&question.scope.projects);
    let body = question.answer(&view, |context| {
        let answer = Answer::of(question.snapshot, &view, context, shown);
        if headers.contains_key(IF_NONE_MATCH) {
            let etag = answer.etag();
            // Decided by the outcome alone: an unchanged answer needs no body.
            if conditional::none_match_names(headers, &etag) {
                return Err(etag);
            }
        }
        Ok(answer.body())
    });
    match body {
        Ok(body) => reply::body(headers, &body, Freshness::Revalidate).await,
        Err(etag) => reply::not_modified(&etag, Freshness::Revalidate),
    }
}

/// `/api/frontend/features/{name}`.
pub async fn flag(
    headers: &HeaderMap,
    name: &str,
    question: Question<'_>,
) -> Result<Reply, Failure> {
    let name = decoded(name)?;
    let projects = &question.scope.projects;
    let view = question.snapshot.view(projects);
    let body = question
        .answer(&view, |context| answers::one(question.snapshot, projects, context, &name))
        .ok_or(Failure::NotFound)?;
    Ok(reply::body(headers, &Arc::new(body), Freshness::Revalidate).await)
}
