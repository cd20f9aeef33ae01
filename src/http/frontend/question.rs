//! What frontends ask, once or as long as they follow a stream.

use std::{collections::HashSet, io::Write as _, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    answers::session::{self, MadeUpSession},
    engine::{Context, FieldId, Fields, Reads, Relevance},
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

/// Up to how much memory a context is kept whole, in bytes, so that few streams must begin anew when flags come
/// to read more of it: about fifteen properties.
const KEPT_WHOLE: usize = 2 << 10;

/// Somebody who asks the same again and again, of one snapshot after the other.
///
/// Lots are drawn once for all of it: that somebody is told of a change means that one was made. Of a large
/// context only what flags read is kept, because thousands may ask with contexts of 64 KiB.
#[derive(Debug)]
pub struct Asker {
    told: FrontendContext<'static>,
    /// Hashes of the names of the fields that were left out, in their order.
    left_out: Box<[u64]>,
    client: IpAddr,
    hostname: Arc<str>,
    scope: Scope,
    draw: u64,
}

impl Asker {
    /// Somebody at the address `client` whose token sees `scope`; `draw` are their lots, and `hostname` is
    /// this machine's name. Of much that they say of their user, what the flags of this snapshot read is kept.
    pub fn new(
        mut told: FrontendContext<'_>,
        client: IpAddr,
        hostname: Arc<str>,
        scope: Scope,
        draw: u64,
        snapshot: &Snapshot,
    ) -> Self {
        let mut left_out = Vec::new();
        if told.memory() > KEPT_WHOLE {
            let view = snapshot.view(&scope.projects);
            let fields: HashSet<_> =
                read_fields(view.reads(), snapshot.engine().fields()).collect();
            told.retain(|name| {
                let is_read = fields.contains(name);
                if !is_read {
                    left_out.push(xxh3_64(name.as_bytes()));
                }
                is_read
            });
            left_out.sort_unstable();
        }
        Self { told: told.into_owned(), left_out: left_out.into(), client, hostname, scope, draw }
    }

    /// What their token sees.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// What they ask of this snapshot; `None` if its flags, as `view` shows them, read what was left out:
    /// they must say it again.
    pub fn question<'a>(&'a self, snapshot: &'a Snapshot, view: &View) -> Option<Question<'a>> {
        let Self { told, left_out, client, hostname, scope, draw } = self;
        let mut fields = read_fields(view.reads(), snapshot.engine().fields());
        let is_left_out = |name: &str| left_out.binary_search(&xxh3_64(name.as_bytes())).is_ok();
        if !left_out.is_empty() && fields.any(is_left_out) {
            return None;
        }
        Some(Question { told, client: *client, hostname, snapshot, scope, draw: Some(*draw) })
    }
}

/// The names of the context fields whose values matter.
fn read_fields<'a>(reads: &Reads, fields: &'a Fields) -> impl Iterator<Item = &'a str> {
    let time = reads.is_timed().then_some(FieldId::CURRENT_TIME);
    reads.fields().chain(time).map(|field| &*fields.names()[field.index()])
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::json;

    use super::*;
    use crate::{
        token::{Environment, Projects},
        wire::features::Document,
    };

    #[test]
    fn context_of_many_small_properties_is_kept_as_far_as_flags_read_it() {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let plan = json!({ "contextName": "plan", "operator": "IN", "values": ["gold"] });
        let strategies = json!([{ "name": "default", "constraints": [plan] }]);
        let document =
            json!({ "features": [{ "name": "a", "enabled": true, "strategies": strategies }] });
        let document = Document::parse(document.to_string().as_bytes()).unwrap();
        let snapshot = Snapshot::build(scope.clone(), document, None);
        let kept = |others: usize| {
            let others = (0..others).map(|n| (format!("{n:x}"), json!(n % 10)));
            let properties: serde_json::Map<_, _> =
                others.chain([("plan".to_owned(), json!("gold"))]).collect();
            let body = json!({ "properties": properties }).to_string();
            let told = FrontendContext::from_json(body.as_bytes()).unwrap();
            let client = Ipv4Addr::LOCALHOST.into();
            let asker = Asker::new(told, client, "here".into(), scope.clone(), 7, &snapshot);
            asker.told.properties
        };
        assert_eq!(kept(10).len(), 11);
        let of_many = kept(255);
        assert_eq!((of_many.len(), of_many.capacity()), (1, 1));
    }
}
