//! The admin listener: the console, what operators ask, and beside it all that SDKs and other edges
//! may ask, so that this one address is a whole upstream.
//!
//! One table (`operation`) says what can be asked; here it is decided who asks, and each call finds
//! its answer in the module of its topic. Who may do what is judged by [`crate::control`].

mod accounts;
mod body;
mod caller;
mod catalogue;
mod explain;
mod failure;
mod insight;
mod openapi;
mod operation;
mod origin;
mod records;
mod relay;
mod session;
mod tokens;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName, http::request::Parts};
use serde_json::Value;

use self::{
    body::Query,
    caller::{Caller, Gate},
    catalogue::Catalogue,
    operation::{
        Access, Arguments, Call, ControlCall, Found, InstanceCall, NotFound, OpenCall, Operation,
    },
    relay::Here,
    tokens::Wanted,
};
pub use self::{
    insight::{Door, Identity, Insight},
    relay::Relay,
};
use super::{
    console,
    data::Data,
    listener::{Answer, ConnectionInfo, Service},
    meter::Subject,
    payload::Arriving,
    reply::{self, Failure, Reply},
    route::{Endpoint, normalise},
};
use crate::control::Control;

/// The API's document, which is the same for every instance.
static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| openapi::document().to_string().into());

/// The admin listener's service.
#[derive(Debug)]
pub struct Admin {
    /// What there is to see of the instance.
    pub insight: Insight,
    /// Accounts, tokens and the audit log, where they are kept here.
    pub control: Option<Control>,
    /// The server that has them instead, where its admin API is passed on.
    pub relay: Option<Relay>,
    /// The header in which operators present their token.
    pub token_header: HeaderName,
    /// Endpoints that answer as if they did not exist.
    pub disabled: BTreeSet<Endpoint>,
    /// Whether this listener's connections are encrypted; its cookies are then `Secure`.
    pub is_tls: bool,
    /// What SDKs and other edges ask.
    pub data: Arc<Data>,
}

impl Service for Admin {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> Answer {
        if self.data.serves(request.uri().path()) {
            return self.data.call(request, connection);
        }
        let (started, admin, peer) = (Instant::now(), Arc::clone(self), connection.peer);
        Answer::later(async move { admin.answer(request, peer, started).await })
    }
}

/// The longest body of a request without an operator, as of a sign-in, in bytes.
const LONGEST_OPEN_BODY: usize = 16 << 10;

/// The template under which the console's files are counted.
const CONSOLE: &str = "/console/{file}";

/// The template under which all is counted that upstream answers.
const RELAYED: &str = "/api/admin/{relayed}";

/// What the client of a request is told whose time is over; what it asked for may be done still.
const TOOK_TOO_LONG: Failure = Failure::Unavailable {
    what: "the answer took longer than a request may",
    retry_after: Duration::from_secs(5),
};

/// The templates of all that operators can ask, for a [`Meter`](super::meter::Meter).
pub fn templates() -> impl Iterator<Item = &'static str> {
    let operations = operation::OPERATIONS.iter().map(|operation| operation.path);
    operations.chain([CONSOLE, RELAYED])
}

impl Admin {
    async fn answer(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
        started: Instant,
    ) -> Reply {
        let (head, body) = request.into_parts();
        let mut body = Arriving::new(body, started, self.data.settings.request_timeout);
        let access = &self.data.settings.access;
        let address = access.proxies.client(peer, &head.headers).verified;
        let (subject, reply) = match normalise(head.uri.path(), "") {
            _ if !access.serves(address) => (Subject::Unknown, Err(Failure::Blocked)),
            Some(path) => self.serve(&path, &head, &mut body, address, started).await,
            None => (Subject::Unknown, Err(Failure::NotFound)),
        };
        body.discard().await;
        let mut reply = reply::without_body(&head.method, reply.unwrap_or_else(Reply::from));
        reply::protect(&mut reply);
        self.data.meter.record(subject, &head.method, &reply, started.elapsed());
        reply
    }

    /// The answer, and what it is counted as.
    async fn serve(
        &self,
        path: &str,
        head: &Parts,
        body: &mut Arriving,
        address: IpAddr,
        started: Instant,
    ) -> (Subject<'static>, Result<Reply, Failure>) {
        if let Some(file) = self.console_file(&head.method, path, &head.headers).await {
            return (Subject::Operation(CONSOLE), Ok(file));
        }
        if let Some(relay) = self.relay.as_ref().filter(|_| relay::concerns(path)) {
            let reply = self.pass_on(relay, head, path, body, address);
            return (Subject::Operation(RELAYED), self.in_time(started, reply).await);
        }
        match self.find(&head.method, path) {
            Ok(found) => {
                let subject = Subject::Operation(found.operation.path);
                let reply = self.perform(&found, head, body, address);
                (subject, self.in_time(started, reply).await)
            }
            Err(failure) => (Subject::Unknown, Err(failure)),
        }
    }

    /// The answer, or that it has taken longer than one may.
    async fn in_time(
        &self,
        started: Instant,
        reply: impl Future<Output = Result<Reply, Failure>>,
    ) -> Result<Reply, Failure> {
        let deadline = started + self.data.settings.request_timeout;
        let reply = tokio::time::timeout_at(deadline.into(), reply).await;
        reply.unwrap_or(Err(TOOK_TOO_LONG))
    }

    async fn pass_on(
        &self,
        relay: &Relay,
        head: &Parts,
        path: &str,
        body: &mut Arriving,
        address: IpAddr,
    ) -> Result<Reply, Failure> {
        let body = body.read(&head.headers, self.data.settings.body_bytes).await?;
        let (token_header, auth) = (&self.token_header, &self.insight.auth);
        relay.pass(Here { token_header, auth }, head, path, body, address).await
    }

    fn find<'a>(&self, method: &Method, path: &'a str) -> Result<Found<'a>, Failure> {
        let found = operation::find(method, path).map_err(|missing| match missing {
            NotFound::Path => Failure::NotFound,
            NotFound::Method(known) => Failure::Method(known.into()),
        })?;
        let is_off = |endpoint| self.disabled.contains(&endpoint);
        if found.operation.endpoint.is_some_and(is_off) {
            Err(Failure::NotFound)
        } else {
            Ok(found)
        }
    }

    async fn perform(
        &self,
        found: &Found<'_>,
        head: &Parts,
        body: &mut Arriving,
        address: IpAddr,
    ) -> Result<Reply, Failure> {
        let Found { operation, arguments } = found;
        match operation.call {
            Call::Open(call) => {
                let body = self.body(operation, head, body).await?;
                self.open(call, head, address, &body).await
            }
            Call::Instance(call) => {
                let (caller, body) = self.admit_with(found, head, body, address).await?;
                self.of_instance(call, &caller, arguments, head, &body)
            }
            Call::Control(call) => {
                let (caller, body) = self.admit_with(found, head, body, address).await?;
                self.of_control(call, &caller, arguments, head, &body).await
            }
        }
    }

    /// Who asks, if they may at all, and with which body.
    ///
    /// That is judged before anything is read, whose mistakes would be told first; and again when all
    /// has come, for which a client may take seconds: its account or its token may be gone by then.
    async fn admit_with(
        &self,
        found: &Found<'_>,
        head: &Parts,
        body: &mut Arriving,
        address: IpAddr,
    ) -> Result<(Caller, Bytes), Failure> {
        let caller = self.admit(found, head, address).await?;
        if found.operation.body.is_none() {
            return Ok((caller, Bytes::new()));
        }
        let body = self.body(found.operation, head, body).await?;
        Ok((self.admit(found, head, address).await?, body))
    }

    async fn admit(
        &self,
        found: &Found<'_>,
        head: &Parts,
        address: IpAddr,
    ) -> Result<Caller, Failure> {
        let operation = found.operation;
        let caller = self.gate().admit(head, address, operation.method.changes()).await?;
        if let (Access::Admin, Some(control)) = (operation.access, &self.control) {
            let path = match found.arguments[0].parse::<i64>() {
                Ok(id) => operation.path.replace("{id}", &id.to_string()),
                Err(_) => operation.path.to_owned(),
            };
            let what = format!("{} {path}", operation.method.as_str());
            control.require_admin(&caller.actor, &what).await?;
        }
        Ok(caller)
    }

    async fn body(
        &self,
        operation: &Operation,
        head: &Parts,
        body: &mut Arriving,
    ) -> Result<Bytes, Failure> {
        match operation.body {
            Some(_) => {
                let limit = match operation.call {
                    // Anybody may send it.
                    Call::Open(_) => LONGEST_OPEN_BODY.min(self.data.settings.body_bytes),
                    Call::Instance(_) | Call::Control(_) => self.data.settings.body_bytes,
                };
                body.read(&head.headers, limit).await
            }
            None => Ok(Bytes::new()),
        }
    }

    fn status(&self) -> Value {
        let mut status = self.insight.status();
        status["consoleFor"] = match (&self.control, &self.relay) {
            (Some(_), _) => "parapet".into(),
            (None, Some(_)) => "unleash".into(),
            (None, None) => Value::Null,
        };
        let database = self.control.as_ref().map(Control::database);
        status["database"] = database.as_ref().map_or(Value::Null, insight::database);
        status
    }

    /// A file of the console, where there is something to sign in to.
    async fn console_file(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<Reply> {
        let nobody_signs_in = self.control.is_none() && self.relay.is_none();
        if nobody_signs_in || !matches!(*method, Method::GET | Method::HEAD) {
            return None;
        }
        console::file(path, headers).await
    }

    fn gate(&self) -> Gate<'_> {
        let (token_header, auth) = (&self.token_header, &self.insight.auth);
        let (control, relay) = (self.control.as_ref(), self.relay.as_ref());
        Gate { token_header, auth, control, relay, is_tls: self.is_tls }
    }

    /// What is kept here, or why that is not so.
    fn control(&self) -> Result<&Control, Failure> {
        self.control.as_ref().ok_or_else(|| {
            Failure::Missing(
                "this instance has no accounts and tokens of its own; those of its upstream count"
                    .to_owned(),
            )
        })
    }

    /// What everybody may ask.
    async fn open(
        &self,
        call: OpenCall,
        head: &Parts,
        address: IpAddr,
        body: &Bytes,
    ) -> Result<Reply, Failure> {
        let ops = &self.insight.ops;
        match call {
            OpenCall::Live => Ok(ops.health()),
            OpenCall::Ready => Ok(ops.ready()),
            OpenCall::Metrics => Ok(ops.metrics()),
            OpenCall::Document => Ok(reply::ok(DOCUMENT.clone())),
            OpenCall::SignIn => {
                session::sign_in(self.control()?, &head.headers, self.is_tls, address, body).await
            }
            OpenCall::SignOut => {
                session::sign_out(self.control()?, &head.headers, self.is_tls, address).await
            }
        }
    }

    /// What is told from memory, to every operator alike.
    fn of_instance(
        &self,
        call: InstanceCall,
        caller: &Caller,
        [name, _]: &Arguments<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Result<Reply, Failure> {
        let insight = &self.insight;
        let environment = || Query::of(head.uri.query()).required("environment");
        let catalogue = || Catalogue::of(&insight.snapshots);
        match call {
            InstanceCall::Status => Ok(reply::ok(self.status().to_string())),
            InstanceCall::Features => Ok(reply::ok(insight.features())),
            InstanceCall::KnownTokens => Ok(reply::ok(insight.tokens().to_string())),
            InstanceCall::MetricsBatch => Ok(reply::ok(insight.usage.pending().to_string())),
            InstanceCall::InstanceData => Ok(reply::ok(insight.instance_data().to_string())),
            InstanceCall::Me => Ok(session::me(caller)),
            InstanceCall::Environments => Ok(catalogue().environments()),
            InstanceCall::Projects => Ok(catalogue().projects()),
            InstanceCall::Flags => catalogue().flags(&environment()?),
            InstanceCall::Flag => catalogue().flag(&environment()?, name),
            InstanceCall::Explain => explain::explain(&insight.snapshots, body),
        }
    }

    /// What the control plane has a say in.
    async fn of_control(
        &self,
        call: ControlCall,
        caller: &Caller,
        [first, second]: &Arguments<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Result<Reply, Failure> {
        let control = self.control()?;
        let (actor, operator) = (&caller.actor, &caller.actor.operator);
        let query = Query::of(head.uri.query());
        let catalogue = || Catalogue::of(&self.insight.snapshots);
        match call {
            ControlCall::ChangeOwnPassword => session::change_password(control, caller, body).await,
            ControlCall::Tokens => Ok(tokens::list(control, actor, Wanted::All)),
            ControlCall::TokensNamed => Ok(tokens::list(control, actor, Wanted::Named(first))),
            ControlCall::CreateToken => {
                tokens::create(control, actor, &catalogue(), None, body).await
            }
            ControlCall::UpdateToken => tokens::update(control, actor, first, body).await,
            ControlCall::DeleteToken => tokens::delete(control, actor, first).await,
            ControlCall::ProjectTokens => {
                catalogue().require_project(first)?;
                Ok(tokens::list(control, actor, Wanted::Of(first)))
            }
            ControlCall::CreateProjectToken => {
                let catalogue = catalogue();
                catalogue.require_project(first)?;
                tokens::create(control, actor, &catalogue, Some(first), body).await
            }
            ControlCall::DeleteProjectToken => {
                tokens::delete_of_project(control, actor, first, second).await
            }
            ControlCall::Users => accounts::list(control, operator, &query).await,
            ControlCall::CreateUser => accounts::create(control, actor, body).await,
            ControlCall::User => accounts::show(control, actor, first).await,
            ControlCall::UpdateUser => accounts::update(control, actor, first, body).await,
            ControlCall::DeleteUser => accounts::delete(control, actor, first).await,
            ControlCall::SetPermissions => {
                accounts::set_permissions(control, actor, first, body).await
            }
            ControlCall::ResetPassword => {
                accounts::reset_password(control, actor, first, body).await
            }
            ControlCall::Events => records::events(control, operator, &query).await,
            ControlCall::Applications => records::applications(control).await,
            ControlCall::FlagUsage => records::usage(control, first, &query).await,
        }
    }
}
