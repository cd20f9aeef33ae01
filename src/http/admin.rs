//! The admin listener: the console, the admin API, and all SDK endpoints, so that this one address is a
//! complete upstream for other edges.
//!
//! One table (`operation`) lists all operations. This module matches a request to its operation,
//! authenticates the caller and calls the handler, which stands in the module of its topic. Permissions
//! are checked by [`crate::control_plane`].

mod accounts;
mod audit;
mod authentication;
mod control_plane_error;
mod csrf;
mod explain;
mod flag_catalogue;
mod headers;
mod openapi;
mod operation;
mod relay;
mod request;
mod session;
mod status;
mod tokens;
mod usage;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName, http::request::Parts};
use serde_json::Value;
use tracing::Instrument as _;

use self::{
    authentication::{AuthenticatedCaller, Authentication},
    flag_catalogue::FlagCatalogue,
    operation::{
        Access, ControlPlaneOperation, InstanceOperation, MatchedOperation, NoMatch, Operation,
        OperationId, PathParams, PublicOperation,
    },
    relay::RelayContext,
    request::QueryParams,
    tokens::TokenFilter,
};
pub use self::{
    relay::Relay,
    status::{DataEndpoint, InstanceIdentity, InstanceStatus},
};
use super::{
    console,
    request_body::RequestBody,
    request_log,
    request_metrics::EndpointLabel,
    response::{self, HttpError, HttpResponse},
    routes::{OptionalEndpoint, normalise},
    sdk::SdkService,
};
use crate::{
    control_plane::ControlPlane,
    server::{ConnectionInfo, HttpService, ServiceResponse},
};

/// The OpenAPI document, which is the same for every instance.
static OPENAPI_DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| openapi::document().to_string().into());

/// The service of the admin listener.
#[derive(Debug)]
pub struct AdminService {
    /// The state of the instance.
    pub instance: InstanceStatus,
    /// Accounts, tokens and the audit log; `None` if upstream manages them.
    pub control_plane: Option<ControlPlane>,
    /// The upstream server whose admin API is relayed, if any.
    pub relay: Option<Relay>,
    /// The request header with the operator's token.
    pub token_header: HeaderName,
    /// Endpoints that return 404.
    pub disabled_endpoints: BTreeSet<OptionalEndpoint>,
    /// Whether this listener uses TLS. Its cookies are then `Secure`.
    pub is_tls: bool,
    /// The SDK endpoints.
    pub sdk: Arc<SdkService>,
}

impl HttpService for AdminService {
    fn call(
        self: &Arc<Self>,
        request: Request<Incoming>,
        connection: &Arc<ConnectionInfo>,
    ) -> ServiceResponse {
        if self.sdk.is_sdk_path(request.uri().path()) {
            return self.sdk.call(request, connection);
        }
        let (started, admin, peer) = (Instant::now(), Arc::clone(self), connection.peer);
        let span = request_log::request_span(request.headers());
        let response = async move { admin.handle(request, peer, started).await };
        ServiceResponse::deferred(response.instrument(span))
    }

    fn panic_response() -> HttpResponse {
        HttpError::Internal.into()
    }
}

/// The maximum body size of an unauthenticated request, such as a sign-in, in bytes.
const MAX_UNAUTHENTICATED_BODY_BYTES: usize = 16 << 10;

/// The path template of the console's files in metrics.
const CONSOLE_TEMPLATE: &str = "/console/{file}";

/// The path template of relayed requests in metrics.
const RELAYED_TEMPLATE: &str = "/api/admin/{relayed}";

/// The response to a request that timed out. Its operation may still complete.
const REQUEST_TIMED_OUT: HttpError =
    HttpError::Unavailable { what: "the request timed out", retry_after: Duration::from_secs(5) };

/// The path templates of all operations, for [`RequestMetrics`](super::request_metrics::RequestMetrics).
pub fn path_templates() -> impl Iterator<Item = &'static str> {
    let operations = operation::OPERATIONS.iter().map(|operation| operation.path);
    operations.chain([CONSOLE_TEMPLATE, RELAYED_TEMPLATE])
}

impl AdminService {
    async fn handle(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
        started: Instant,
    ) -> HttpResponse {
        let (head, body) = request.into_parts();
        let mut body = RequestBody::new(body, started, self.sdk.settings.request_timeout);
        let access = &self.sdk.settings.access;
        let address = access.proxies.client_addresses(peer, &head.headers).verified;
        let (label, reply) = match normalise(head.uri.path(), "") {
            _ if !access.is_allowed(address) => {
                (EndpointLabel::Unknown, Err(HttpError::AddressBlocked))
            }
            Some(path) => self.route(&path, &head, &mut body, address, started).await,
            None => (EndpointLabel::Unknown, Err(HttpError::NotFound)),
        };
        body.discard().await;
        let mut reply =
            response::drop_body_for_head(&head.method, reply.unwrap_or_else(HttpResponse::from));
        response::add_private_headers(&mut reply);
        let took = started.elapsed();
        self.sdk.request_metrics.record(label, &head.method, &reply, took);
        request_log::log_response(label, &head.method, &reply, took);
        reply
    }

    /// Routes a request. Returns its label in metrics and its response.
    async fn route(
        &self,
        path: &str,
        head: &Parts,
        body: &mut RequestBody,
        address: IpAddr,
        started: Instant,
    ) -> (EndpointLabel, Result<HttpResponse, HttpError>) {
        if let Some(file) = self.console_file(&head.method, path, &head.headers).await {
            return (EndpointLabel::AdminOperation(CONSOLE_TEMPLATE), Ok(file));
        }
        if let Some(relay) = self.relay.as_ref().filter(|_| relay::is_relayed(path)) {
            let reply = self.relay_request(relay, head, path, body, address);
            return (
                EndpointLabel::AdminOperation(RELAYED_TEMPLATE),
                self.with_timeout(started, reply).await,
            );
        }
        match self.find_operation(&head.method, path) {
            Ok(found) => {
                let label = EndpointLabel::AdminOperation(found.operation.path);
                let reply = self.dispatch(&found, head, body, address);
                (label, self.with_timeout(started, reply).await)
            }
            Err(failure) => (EndpointLabel::Unknown, Err(failure)),
        }
    }

    /// Awaits a response until the deadline of its request.
    async fn with_timeout(
        &self,
        started: Instant,
        reply: impl Future<Output = Result<HttpResponse, HttpError>>,
    ) -> Result<HttpResponse, HttpError> {
        let deadline = started + self.sdk.settings.request_timeout;
        let reply = tokio::time::timeout_at(deadline.into(), reply).await;
        reply.unwrap_or(Err(REQUEST_TIMED_OUT))
    }

    async fn relay_request(
        &self,
        relay: &Relay,
        head: &Parts,
        path: &str,
        body: &mut RequestBody,
        address: IpAddr,
    ) -> Result<HttpResponse, HttpError> {
        let body = body.read(&head.headers, self.sdk.settings.max_body_bytes).await?;
        let (token_header, auth) = (&self.token_header, &self.instance.auth);
        relay.forward(RelayContext { token_header, auth }, head, path, body, address).await
    }

    fn find_operation<'a>(
        &self,
        method: &Method,
        path: &'a str,
    ) -> Result<MatchedOperation<'a>, HttpError> {
        let found = operation::find(method, path).map_err(|missing| match missing {
            NoMatch::UnknownPath => HttpError::NotFound,
            NoMatch::MethodNotAllowed(known) => HttpError::MethodNotAllowed(known.into()),
        })?;
        let is_off = |endpoint| self.disabled_endpoints.contains(&endpoint);
        if found.operation.disabled_by.is_some_and(is_off) {
            Err(HttpError::NotFound)
        } else {
            Ok(found)
        }
    }

    async fn dispatch(
        &self,
        found: &MatchedOperation<'_>,
        head: &Parts,
        body: &mut RequestBody,
        address: IpAddr,
    ) -> Result<HttpResponse, HttpError> {
        let MatchedOperation { operation, path_params } = found;
        match operation.id {
            OperationId::Open(call) => {
                let body = self.read_body(operation, head, body).await?;
                self.dispatch_public(call, head, address, &body).await
            }
            OperationId::Instance(call) => {
                let (caller, body) =
                    self.authorize_and_read_body(found, head, body, address).await?;
                self.dispatch_instance(call, &caller, path_params, head, &body)
            }
            OperationId::Control(call) => {
                let (caller, body) =
                    self.authorize_and_read_body(found, head, body, address).await?;
                self.dispatch_control_plane(call, &caller, path_params, head, &body).await
            }
        }
    }

    /// Authorizes the caller and reads the body.
    ///
    /// Authorization happens before the body is read, so that an unauthorized caller sees no errors of
    /// its body. It happens again afterwards, because a client may take seconds to send a body, and its
    /// account or token may be deleted meanwhile.
    async fn authorize_and_read_body(
        &self,
        found: &MatchedOperation<'_>,
        head: &Parts,
        body: &mut RequestBody,
        address: IpAddr,
    ) -> Result<(AuthenticatedCaller, Bytes), HttpError> {
        let caller = self.authorize(found, head, address).await?;
        if found.operation.body.is_none() {
            return Ok((caller, Bytes::new()));
        }
        let body = self.read_body(found.operation, head, body).await?;
        Ok((self.authorize(found, head, address).await?, body))
    }

    async fn authorize(
        &self,
        found: &MatchedOperation<'_>,
        head: &Parts,
        address: IpAddr,
    ) -> Result<AuthenticatedCaller, HttpError> {
        let operation = found.operation;
        let caller = self
            .authentication()
            .authenticate(head, address, operation.method.is_mutation())
            .await?;
        if let (Access::Admin, Some(control)) = (operation.access, &self.control_plane) {
            let path = match found.path_params[0].parse::<i64>() {
                Ok(id) => operation.path.replace("{id}", &id.to_string()),
                Err(_) => operation.path.to_owned(),
            };
            let what = format!("{} {path}", operation.method.as_str());
            control.require_admin(&caller.actor, &what).await?;
        }
        Ok(caller)
    }

    async fn read_body(
        &self,
        operation: &Operation,
        head: &Parts,
        body: &mut RequestBody,
    ) -> Result<Bytes, HttpError> {
        match operation.body {
            Some(_) => {
                let limit = match operation.id {
                    // The request is not authenticated.
                    OperationId::Open(_) => {
                        MAX_UNAUTHENTICATED_BODY_BYTES.min(self.sdk.settings.max_body_bytes)
                    }
                    OperationId::Instance(_) | OperationId::Control(_) => {
                        self.sdk.settings.max_body_bytes
                    }
                };
                body.read(&head.headers, limit).await
            }
            None => Ok(Bytes::new()),
        }
    }

    fn status(&self) -> Value {
        let mut status = self.instance.status();
        status["consoleFor"] = match (&self.control_plane, &self.relay) {
            (Some(_), _) => "parapet".into(),
            (None, Some(_)) => "unleash".into(),
            (None, None) => Value::Null,
        };
        let database = self.control_plane.as_ref().map(ControlPlane::database_status);
        status["database"] = database.as_ref().map_or(Value::Null, status::database_status);
        status
    }

    /// A file of the console. `None` without accounts and relay: there is no sign-in.
    async fn console_file(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<HttpResponse> {
        let has_no_sign_in = self.control_plane.is_none() && self.relay.is_none();
        if has_no_sign_in || !matches!(*method, Method::GET | Method::HEAD) {
            return None;
        }
        console::file(path, headers).await
    }

    fn authentication(&self) -> Authentication<'_> {
        let (token_header, auth) = (&self.token_header, &self.instance.auth);
        let (control_plane, relay) = (self.control_plane.as_ref(), self.relay.as_ref());
        Authentication { token_header, auth, control_plane, relay, is_tls: self.is_tls }
    }

    /// The control plane, or the error that this instance has none.
    fn require_control_plane(&self) -> Result<&ControlPlane, HttpError> {
        self.control_plane.as_ref().ok_or_else(|| {
            HttpError::ResourceNotFound(
                "this instance manages no accounts and tokens; use those of its upstream"
                    .to_owned(),
            )
        })
    }

    /// Handles an operation that needs no authentication.
    async fn dispatch_public(
        &self,
        call: PublicOperation,
        head: &Parts,
        address: IpAddr,
        body: &Bytes,
    ) -> Result<HttpResponse, HttpError> {
        let ops = &self.instance.ops;
        match call {
            PublicOperation::Live => Ok(ops.liveness()),
            PublicOperation::Ready => Ok(ops.ready()),
            PublicOperation::Metrics => Ok(ops.prometheus()),
            PublicOperation::Document => Ok(response::json_text(OPENAPI_DOCUMENT.clone())),
            PublicOperation::SignIn => {
                let control = self.require_control_plane()?;
                session::sign_in(control, &head.headers, self.is_tls, address, body).await
            }
            PublicOperation::SignOut => {
                let control = self.require_control_plane()?;
                session::sign_out(control, &head.headers, self.is_tls, address).await
            }
        }
    }

    /// Handles an operation on the state of this instance, which is in memory and open to all operators.
    fn dispatch_instance(
        &self,
        call: InstanceOperation,
        caller: &AuthenticatedCaller,
        [name, _]: &PathParams<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Result<HttpResponse, HttpError> {
        let insight = &self.instance;
        let environment = || QueryParams::new(head.uri.query()).required("environment");
        let catalogue = || FlagCatalogue::from_snapshots(&insight.snapshots);
        match call {
            InstanceOperation::Status => Ok(response::json_text(self.status().to_string())),
            InstanceOperation::Features => Ok(response::json_text(insight.features())),
            InstanceOperation::KnownTokens => Ok(response::json_text(insight.tokens().to_string())),
            InstanceOperation::MetricsBatch => {
                Ok(response::json_text(insight.usage.pending().to_string()))
            }
            InstanceOperation::InstanceData => {
                Ok(response::json_text(insight.instance_data().to_string()))
            }
            InstanceOperation::Me => Ok(session::current_user(caller)),
            InstanceOperation::Environments => Ok(catalogue().list_environments()),
            InstanceOperation::Projects => Ok(catalogue().list_projects()),
            InstanceOperation::Flags => catalogue().list_flags(&environment()?),
            InstanceOperation::Flag => catalogue().get_flag(&environment()?, name),
            InstanceOperation::Explain => explain::explain(&insight.snapshots, body),
        }
    }

    /// Handles an operation of the control plane.
    async fn dispatch_control_plane(
        &self,
        call: ControlPlaneOperation,
        caller: &AuthenticatedCaller,
        [first, second]: &PathParams<'_>,
        head: &Parts,
        body: &Bytes,
    ) -> Result<HttpResponse, HttpError> {
        let control = self.require_control_plane()?;
        let (actor, operator) = (&caller.actor, &caller.actor.operator);
        let query = QueryParams::new(head.uri.query());
        let catalogue = || FlagCatalogue::from_snapshots(&self.instance.snapshots);
        match call {
            ControlPlaneOperation::ChangeOwnPassword => {
                session::change_password(control, caller, body).await
            }
            ControlPlaneOperation::Tokens => Ok(tokens::list(control, actor, TokenFilter::All)),
            ControlPlaneOperation::TokensNamed => {
                Ok(tokens::list(control, actor, TokenFilter::Named(first)))
            }
            ControlPlaneOperation::CreateToken => {
                tokens::create(control, actor, &catalogue(), None, body).await
            }
            ControlPlaneOperation::UpdateToken => tokens::update(control, actor, first, body).await,
            ControlPlaneOperation::DeleteToken => tokens::delete(control, actor, first).await,
            ControlPlaneOperation::ProjectTokens => {
                catalogue().require_project(first)?;
                Ok(tokens::list(control, actor, TokenFilter::InProject(first)))
            }
            ControlPlaneOperation::CreateProjectToken => {
                let catalogue = catalogue();
                catalogue.require_project(first)?;
                tokens::create(control, actor, &catalogue, Some(first), body).await
            }
            ControlPlaneOperation::DeleteProjectToken => {
                tokens::delete_from_project(control, actor, first, second).await
            }
            ControlPlaneOperation::Users => accounts::list(control, operator, &query).await,
            ControlPlaneOperation::CreateUser => accounts::create(control, actor, body).await,
            ControlPlaneOperation::User => accounts::get(control, actor, first).await,
            ControlPlaneOperation::UpdateUser => {
                accounts::update(control, actor, first, body).await
            }
            ControlPlaneOperation::DeleteUser => accounts::delete(control, actor, first).await,
            ControlPlaneOperation::SetPermissions => {
                accounts::set_permissions(control, actor, first, body).await
            }
            ControlPlaneOperation::ResetPassword => {
                accounts::reset_password(control, actor, first, body).await
            }
            ControlPlaneOperation::Events => audit::list_events(control, operator, &query).await,
            ControlPlaneOperation::Applications => usage::list_applications(control).await,
            ControlPlaneOperation::FlagUsage => usage::flag_usage(control, first, &query).await,
        }
    }
}
