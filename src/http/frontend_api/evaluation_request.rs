//! A frontend's evaluation request: one that is answered once, or one that a stream repeats.

use std::{collections::HashSet, io::Write as _, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    engine::{Context, ContextSchema, EvaluationInputs, FieldId, Relevance},
    evaluation::session_id::{self, GeneratedSessionId},
    protocol::context::FrontendContext,
    served::ServedSnapshot,
    snapshot::FrontendView,
    token::Scope,
};

/// The inputs of an evaluation: a context, a snapshot and the token's scope.
#[derive(Clone, Copy, Debug)]
pub struct EvaluationRequest<'a> {
    /// The context as the client sent it.
    pub context: &'a FrontendContext<'a>,
    /// The client's address, for a context without one.
    pub client_address: IpAddr,
    /// This machine's host name, for the `applicationHostname` strategy.
    pub hostname: &'a str,
    /// The flags to evaluate.
    pub snapshot: &'a ServedSnapshot,
    /// The token's scope.
    pub scope: &'a Scope,
    /// The random seed, if it is fixed; otherwise each evaluation draws a new one.
    pub random_seed: Option<u64>,
}

impl EvaluationRequest<'_> {
    /// Completes the context with the fields that the flags of `view` read, and passes it to `evaluate`.
    ///
    /// A missing address is the client's. A missing `sessionId` is random, as in Unleash's frontend API.
    /// The environment stays as the client sent it: Unleash, its SDKs and Unleash Edge do not copy the
    /// token's environment to the context either.
    pub fn with_context<T>(
        &self,
        view: &FrontendView,
        evaluate: impl FnOnce(&Context<'_>) -> T,
    ) -> T {
        let Self { context: sent, client_address, hostname, random_seed, .. } = *self;
        let reads = view.inputs();
        let random_seed = match random_seed {
            Some(draw) => draw,
            None if reads.can_be_random() => rand::random(),
            None => 0,
        };
        let random_session;
        let (session_id, session_is_generated) = match sent.session_id.as_deref() {
            Some(id) if !id.is_empty() => (Some(id), false),
            _ => match reads
                .relevance(FieldId::SESSION_ID, |field| is_missing_or_empty(sent, field))
            {
                Relevance::None => (None, false),
                Relevance::Membership => (Some(session_id::PLACEHOLDER), false),
                Relevance::Text => {
                    random_session = GeneratedSessionId::new(random_seed);
                    (Some(random_session.as_str()), true)
                }
            },
        };
        let lacks_identifier = |field| {
            is_missing_or_empty(sent, field)
                && (field != FieldId::SESSION_ID || session_id.is_none())
        };
        let mut address = [0; MAX_ADDRESS_LEN];
        let remote_address = match sent.remote_address.as_deref().filter(|it| !it.is_empty()) {
            // Few flags read it if the user is known.
            None => match reads.relevance(FieldId::REMOTE_ADDRESS, lacks_identifier) {
                Relevance::None => None,
                Relevance::Membership | Relevance::Text => {
                    Some(format_address(client_address, &mut address))
                }
            },
            address => address,
        };
        let properties: SmallVec<[_; 16]> =
            sent.properties.iter().map(|(name, value)| (&**name, &**value)).collect();
        evaluate(&Context {
            user_id: sent.user_id.as_deref(),
            session_id,
            session_is_generated,
            environment: sent.environment.as_deref(),
            app_name: sent.app_name.as_deref(),
            current_time: sent.current_time.as_deref(),
            remote_address,
            properties: &properties,
            hostname: Some(hostname),
            now: if reads.is_time_dependent() { Timestamp::now() } else { Timestamp::UNIX_EPOCH },
            random_seed,
        })
    }
}

/// Whether an identifying field is missing or empty. Any other field counts as missing.
fn is_missing_or_empty(sent: &FrontendContext<'_>, field: FieldId) -> bool {
    let value = match field {
        FieldId::USER_ID => &sent.user_id,
        FieldId::SESSION_ID => &sent.session_id,
        _ => &None,
    };
    value.as_deref().is_none_or(str::is_empty)
}

/// The length of `ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255`, the longest form of an address.
const MAX_ADDRESS_LEN: usize = 45;

/// Formats an address without allocating.
fn format_address(address: IpAddr, buffer: &mut [u8; MAX_ADDRESS_LEN]) -> &str {
    let mut rest = &mut buffer[..];
    write!(rest, "{address}").expect("the buffer holds any address");
    let length = MAX_ADDRESS_LEN - rest.len();
    std::str::from_utf8(&buffer[..length]).expect("addresses are written in ASCII")
}

/// Contexts up to this size, in bytes, are stored in full (about fifteen properties), so that few
/// streams have to reconnect when a changed flag reads another field.
const MAX_FULL_CONTEXT_BYTES: usize = 2 << 10;

/// The client of an event stream, whose context is evaluated against each new snapshot.
///
/// The random seed is drawn once, so that outcomes change only when flags do. Of a large context only
/// the fields that flags read are stored: thousands of clients may send contexts of 64 KiB.
#[derive(Debug)]
pub struct Subscriber {
    context: FrontendContext<'static>,
    /// Hashes of the names of the omitted fields, sorted.
    omitted_fields: Box<[u64]>,
    client_address: IpAddr,
    hostname: Arc<str>,
    scope: Scope,
    random_seed: u64,
}

impl Subscriber {
    /// A subscriber at the address `client` with the token's `scope` and a fixed random seed, `draw`. Of
    /// a large context, only the fields that the flags of `snapshot` read are stored.
    pub fn new(
        mut sent: FrontendContext<'_>,
        client_address: IpAddr,
        hostname: Arc<str>,
        scope: Scope,
        random_seed: u64,
        snapshot: &ServedSnapshot,
    ) -> Self {
        let mut omitted = Vec::new();
        if sent.estimated_memory() > MAX_FULL_CONTEXT_BYTES {
            let view = snapshot.frontend_view(&scope.projects);
            let fields: HashSet<_> =
                used_fields(view.inputs(), snapshot.engine().schema()).collect();
            sent.retain(|name| {
                let is_read = fields.contains(name);
                if !is_read {
                    omitted.push(xxh3_64(name.as_bytes()));
                }
                is_read
            });
            omitted.sort_unstable();
        }
        Self {
            context: sent.into_owned(),
            omitted_fields: omitted.into(),
            client_address,
            hostname,
            scope,
            random_seed,
        }
    }

    /// The token's scope.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The request to evaluate against this snapshot. `None` if the flags of `view` read an omitted
    /// field: the client must reconnect with its full context.
    pub fn evaluation_request<'a>(
        &'a self,
        snapshot: &'a ServedSnapshot,
        view: &FrontendView,
    ) -> Option<EvaluationRequest<'a>> {
        let Self { context, omitted_fields, client_address, hostname, scope, random_seed } = self;
        let mut fields = used_fields(view.inputs(), snapshot.engine().schema());
        let is_left_out =
            |name: &str| omitted_fields.binary_search(&xxh3_64(name.as_bytes())).is_ok();
        if !omitted_fields.is_empty() && fields.any(is_left_out) {
            return None;
        }
        Some(EvaluationRequest {
            context,
            client_address: *client_address,
            hostname,
            snapshot,
            scope,
            random_seed: Some(*random_seed),
        })
    }
}

/// The names of the context fields that the flags read.
fn used_fields<'a>(
    reads: &EvaluationInputs,
    fields: &'a ContextSchema,
) -> impl Iterator<Item = &'a str> {
    let time = reads.is_time_dependent().then_some(FieldId::CURRENT_TIME);
    reads.fields().chain(time).map(|field| &*fields.names()[field.index()])
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use serde_json::json;

    use super::*;
    use crate::{
        protocol::features::Document,
        token::{Environment, Projects},
    };

    #[test]
    fn only_fields_that_flags_read_are_stored_of_a_large_context() {
        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let plan = json!({ "contextName": "plan", "operator": "IN", "values": ["gold"] });
        let strategies = json!([{ "name": "default", "constraints": [plan] }]);
        let document =
            json!({ "features": [{ "name": "a", "enabled": true, "strategies": strategies }] });
        let document = Document::parse(document.to_string().as_bytes()).unwrap();
        let snapshot = ServedSnapshot::build(scope.clone(), document, None);
        let stored = |others: usize| {
            let others = (0..others).map(|n| (format!("{n:x}"), json!(n % 10)));
            let properties: serde_json::Map<_, _> =
                others.chain([("plan".to_owned(), json!("gold"))]).collect();
            let body = json!({ "properties": properties }).to_string();
            let sent = FrontendContext::from_json(body.as_bytes()).unwrap();
            let client = Ipv4Addr::LOCALHOST.into();
            let subscriber =
                Subscriber::new(sent, client, "here".into(), scope.clone(), 7, &snapshot);
            subscriber.context.properties
        };
        assert_eq!(stored(10).len(), 11);
        let of_many = stored(255);
        assert_eq!((of_many.len(), of_many.capacity()), (1, 1));
    }
}
