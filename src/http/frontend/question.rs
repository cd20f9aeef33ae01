//! What frontends ask, once or as long as they follow a stream.

use std::{io::Write as _, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use smallvec::SmallVec;

use crate::{
    answers::session::{self, MadeUpSession},
    engine::{Context, FieldId, Relevance},
    snapshot::{Snapshot, View},
    token::Scope,
    wire::context::FrontendContext,
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
    /// The lots, where they have been drawn before; else they are drawn for each answer.
    pub draw: Option<u64>,
}

impl Question<'_> {
    /// Completes the context as far as the flags of `view` read it, and answers by it.
    ///
    /// The address is the client's. A `sessionId` is made up, as Unleash's frontend API does for each
    /// request that has none. The environment stays as the client sent it: what a token's environment
    /// is does not make it a part of the context, in Unleash, its SDKs and Unleash Edge alike.
    pub fn answer<T>(&self, view: &View, answer: impl FnOnce(&Context<'_>) -> T) -> T {
        let Self { told, client, hostname, draw, .. } = *self;
        let reads = view.reads();
        let draw = match draw {
            Some(draw) => draw,
            None if reads.may_be_random() => rand::random(),
            None => 0,
        };
        let made_up;
        let (session_id, session_is_made_up) = match told.session_id.as_deref() {
            Some(told) if !told.is_empty() => (Some(told), false),
            _ => match reads.relevance(FieldId::SESSION_ID, |field| lacks(told, field)) {
                Relevance::None => (None, false),
                Relevance::Membership => (Some(session::ANY), false),
                Relevance::Text => {
                    made_up = MadeUpSession::new(draw);
                    (Some(made_up.as_str()), true)
                }
            },
        };
        let lacks_identifier =
            |field| lacks(told, field) && (field != FieldId::SESSION_ID || session_id.is_none());
        let mut address = [0; LONGEST_ADDRESS];
        let remote_address = match told.remote_address.as_deref().filter(|it| !it.is_empty()) {
            // Few flags read it where the user is known.
            None => match reads.relevance(FieldId::REMOTE_ADDRESS, lacks_identifier) {
                Relevance::None => None,
                Relevance::Membership | Relevance::Text => Some(written(client, &mut address)),
            },
            told => told,
        };
        let properties: SmallVec<[_; 16]> =
            told.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        answer(&Context {
            user_id: told.user_id.as_deref(),
            session_id,
            session_is_made_up,
            environment: told.environment.as_deref(),
            app_name: told.app_name.as_deref(),
            current_time: told.current_time.as_deref(),
            remote_address,
            properties: &properties,
            hostname: Some(hostname),
            now: if reads.is_timed() { Timestamp::now() } else { Timestamp::UNIX_EPOCH },
            draw,
        })
    }
}

/// Whether a field is missing or empty that identifies a user; others are taken for missing.
fn lacks(told: &FrontendContext<'_>, field: FieldId) -> bool {
    let value = match field {
        FieldId::USER_ID => &told.user_id,
        FieldId::SESSION_ID => &told.session_id,
        _ => &None,
    };
    value.as_deref().is_none_or(str::is_empty)
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

/// Somebody who asks the same again and again, of one snapshot after the other.
///
/// Lots are drawn once for all of it: that somebody is told of a change means that one was made.
#[derive(Debug)]
pub struct Asker {
    /// What they say of their user.
    pub told: FrontendContext<'static>,
    /// Their address.
    pub client: IpAddr,
    /// This machine's name.
    pub hostname: Arc<str>,
    /// What their token sees.
    pub scope: Scope,
    /// The lots.
    pub draw: u64,
}

impl Asker {
    /// What they ask of this snapshot.
    pub fn question<'a>(&'a self, snapshot: &'a Snapshot) -> Question<'a> {
        let Self { told, client, hostname, scope, draw } = self;
        Question { told, client: *client, hostname, snapshot, scope, draw: Some(*draw) }
    }
}
