//! The API of frontend SDKs: flags evaluated for a context.
//!
//! A context field that the client sends is used as sent. What it leaves out is completed here: the
//! environment from its token, the address from its connection.

use std::{io::Write as _, net::IpAddr, sync::Arc};

use hyper::{HeaderMap, header::IF_NONE_MATCH};
use jiff::Timestamp;
use smallvec::SmallVec;

use super::{
    client::decoded,
    conditional,
    reply::{self, Failure, Freshness, Reply},
};
use crate::{
    answers::{self, Answer, Shown},
    engine::{Context, FieldId},
    snapshot::{Snapshot, View},
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
    /// Completes the context as far as the flags of `view` read it, and answers by it.
    pub fn answer<T>(&self, view: &View, answer: impl FnOnce(&Context<'_>) -> T) -> T {
        let Self { told, client, hostname, scope, .. } = *self;
        let reads = view.reads();
        let mut address = [0; LONGEST_ADDRESS];
        let remote_address = match told.remote_address.as_deref() {
            None if reads.contains(FieldId::REMOTE_ADDRESS) => Some(written(client, &mut address)),
            told => told,
        };
        let properties: SmallVec<[_; 16]> =
            told.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        answer(&Context {
            user_id: told.user_id.as_deref(),
            session_id: told.session_id.as_deref(),
            environment: Some(told.environment.as_deref().unwrap_or(scope.environment.as_str())),
            app_name: told.app_name.as_deref(),
            current_time: told.current_time.as_deref(),
            remote_address,
            properties: &properties,
            hostname: Some(hostname),
            now: if reads.is_timed() { Timestamp::now() } else { Timestamp::UNIX_EPOCH },
            draw: if reads.may_be_random() { rand::random() } else { 0 },
        })
    }
}

/// The length of `ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255`; no address is written longer.
const LONGEST_ADDRESS: usize = 45;

/// An address as text.
fn written(address: IpAddr, buffer: &mut [u8; LONGEST_ADDRESS]) -> &str {
    let mut rest = &mut buffer[..];
    write!(rest, "{address}").expect("the buffer holds any address");
    let length = LONGEST_ADDRESS - rest.len();
    std::str::from_utf8(&buffer[..length]).expect("addresses are written in ASCII")
}

impl From<context::Error> for Failure {
    fn from(error: context::Error) -> Self {
        Self::Context(error.to_string())
    }
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
