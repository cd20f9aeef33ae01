//! The API of frontend SDKs: flags evaluated for a context.
//!
//! A context field that the client sends is used as sent. What it leaves out is completed here: the
//! environment from its token, the address from its connection.

use std::{net::IpAddr, sync::Arc};

use hyper::HeaderMap;
use jiff::Timestamp;

use super::{
    client::decoded,
    conditional,
    reply::{self, Failure, Freshness, Reply},
};
use crate::{
    answers::{self, Answer, Shown},
    engine::Context,
    snapshot::Snapshot,
    token::Scope,
    wire::context::{self, FrontendContext},
};

/// What is asked: a context, of the flags that a scope sees.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// What the request itself says of its user.
    pub told: &'a FrontendContext<'a>,
    /// The client's address.
    pub client: IpAddr,
    /// This machine's name, for the `applicationHostname` strategy.
    pub hostname: &'a str,
    /// The flags.
    pub snapshot: &'a Snapshot,
    /// What the token sees of them.
    pub scope: &'a Scope,
}

impl Question<'_> {
    /// Completes the context and answers by it.
    fn answer<T>(&self, answer: impl FnOnce(&Context<'_>) -> T) -> T {
        let Self { told, client, hostname, scope, .. } = *self;
        let told_address = told.remote_address.as_deref();
        let remote_address = told_address.map_or_else(|| client.to_string(), str::to_owned);
        let properties: Vec<_> =
            told.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        answer(&Context {
            user_id: told.user_id.as_deref(),
            session_id: told.session_id.as_deref(),
            environment: Some(told.environment.as_deref().unwrap_or(scope.environment.as_str())),
            app_name: told.app_name.as_deref(),
            current_time: told.current_time.as_deref(),
            remote_address: Some(&remote_address),
            properties: &properties,
            hostname: Some(hostname),
            now: Timestamp::now(),
            draw: rand::random(),
        })
    }
}

impl From<context::Error> for Failure {
    fn from(error: context::Error) -> Self {
        Self::Malformed(format!("the context cannot be read: {error}"))
    }
}

/// `/api/frontend` and `/api/frontend/all`.
pub async fn flags(headers: &HeaderMap, shown: Shown, question: Question<'_>) -> Reply {
    let projects = &question.scope.projects;
    let body = question.answer(|context| {
        let answer = Answer::of(question.snapshot, projects, context, shown);
        let etag = answer.etag();
        // Decided by the outcome alone: an unchanged answer needs no body.
        if conditional::none_match_names(headers, &etag) { Err(etag) } else { Ok(answer.body()) }
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
    let body = question
        .answer(|context| answers::one(question.snapshot, projects, context, &name))
        .ok_or(Failure::NotFound)?;
    Ok(reply::body(headers, &Arc::new(body), Freshness::Revalidate).await)
}
