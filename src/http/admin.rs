//! The admin listener: what operators ask.
//!
//! Everything that tells of flags, tokens or usage wants an admin token. Tokens are shown masked,
//! always.

use std::{collections::BTreeSet, fmt::Write as _, net::SocketAddr, time::Duration};

use hyper::{HeaderMap, Method, Request, body::Incoming, header::HeaderName};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    listener::Service,
    ops::Ops,
    reply::{self, Failure, Reply},
    route::{Endpoint, normalise},
};
use crate::{
    auth::Authenticator,
    snapshot::{Filter, Segments, Snapshot, Snapshots, body::Coding},
    token::{Projects, TokenKind},
    upstream::Upstream,
    usage::Usage,
};

/// What an operator can ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Route {
    Live,
    Ready,
    Metrics,
    Status,
    Features,
    Tokens,
    MetricsBatch,
    InstanceData,
}

impl Route {
    fn parse(path: &str) -> Option<Self> {
        Some(match path {
            "/live" | "/internal-backstage/health" => Self::Live,
            "/ready" | "/internal-backstage/ready" => Self::Ready,
            "/metrics" | "/internal-backstage/metrics" | "/internal-backstage/prometheus" => {
                Self::Metrics
            }
            "/status" => Self::Status,
            "/internal-backstage/features" => Self::Features,
            "/internal-backstage/tokens" => Self::Tokens,
            "/internal-backstage/metricsbatch" => Self::MetricsBatch,
            "/internal-backstage/instancedata" => Self::InstanceData,
            _ => return None,
        })
    }

    /// Whether probes and scrapes may ask without a token.
    fn is_open(self) -> bool {
        matches!(self, Self::Live | Self::Ready | Self::Metrics)
    }

    fn endpoint(self) -> Option<Endpoint> {
        match self {
            Self::Metrics => Some(Endpoint::Metrics),
            Self::Features => Some(Endpoint::Features),
            Self::Tokens => Some(Endpoint::Tokens),
            Self::MetricsBatch => Some(Endpoint::MetricsBatch),
            Self::InstanceData => Some(Endpoint::InstanceData),
            Self::Live | Self::Ready | Self::Status => None,
        }
    }
}

/// What the instance says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The mode that it runs in.
    pub mode: &'static str,
    /// The name that all instances of a deployment share.
    pub app_name: String,
    /// The name of this instance.
    pub instance_id: String,
    /// Who runs it, in Unleash's words.
    pub hosting: String,
    /// The region that it runs in, where known.
    pub region: Option<String>,
    /// When it started.
    pub started: Timestamp,
}

/// The admin listener's service.
#[derive(Debug)]
pub struct Admin {
    /// What the instance says of itself.
    pub identity: Identity,
    /// The header in which operators present their token.
    pub token_header: HeaderName,
    /// Endpoints that answer as if they did not exist.
    pub disabled: BTreeSet<Endpoint>,
    /// Who judges tokens.
    pub auth: Authenticator,
    /// What is served.
    pub snapshots: Snapshots,
    /// What waits to be sent.
    pub usage: Usage,
    /// Where it is sent, if anywhere.
    pub upstream: Option<Upstream>,
    /// What probes and scrapes are told.
    pub ops: Ops,
}

impl Service for Admin {
    async fn call(&self, request: Request<Incoming>, _peer: SocketAddr) -> Reply {
        let reply = self.answer(&request).await.unwrap_or_else(Reply::from);
        reply::without_body(request.method(), reply)
    }
}

impl Admin {
    async fn answer(&self, request: &Request<Incoming>) -> Result<Reply, Failure> {
        let path = normalise(request.uri().path(), "").ok_or(Failure::NotFound)?;
        let route = Route::parse(&path).ok_or(Failure::NotFound)?;
        if route.endpoint().is_some_and(|endpoint| self.disabled.contains(&endpoint)) {
            return Err(Failure::NotFound);
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Failure::Method("GET, HEAD"));
        }
        if !route.is_open() {
            self.admit(request.headers()).await?;
        }
        Ok(match route {
            Route::Live => self.ops.health(),
            Route::Ready => self.ops.ready(),
            Route::Metrics => self.ops.metrics(),
            Route::Status => reply::ok(self.status().to_string()),
            Route::Features => reply::ok(self.features()),
            Route::Tokens => reply::ok(self.tokens().to_string()),
            Route::MetricsBatch => reply::ok(self.usage.pending().to_string()),
            Route::InstanceData => reply::ok(self.instance_data().to_string()),
        })
    }

    async fn admit(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let header = headers.get(&self.token_header).and_then(|it| it.to_str().ok());
        let admission = self.auth.authenticate(header.ok_or(Failure::Unauthorized)?).await?;
        match admission.grant.kind {
            TokenKind::Admin => Ok(()),
            TokenKind::Client | TokenKind::Frontend => Err(Failure::WrongKind),
        }
    }

    /// Everything that an operator needs to see at a glance.
    fn status(&self) -> Value {
        let now = Timestamp::now();
        let snapshots = self.snapshots.all();
        let mut environments: Vec<_> = snapshots.values().collect();
        environments.sort_by_key(|snapshot| snapshot.environment());
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "mode": self.identity.mode,
            "appName": self.identity.app_name,
            "instanceId": self.identity.instance_id,
            "started": self.identity.started.to_string(),
            "ready": self.ops.is_ready(),
            "environments": environments.iter().map(|it| environment(it, now)).collect::<Vec<_>>(),
            "upstream": self.upstream.as_ref().map(upstream),
            "tokens": {
                "valid": self.auth.verdicts().len(),
                "refused": self.auth.refused_count(),
            },
        })
    }

    /// The flag configuration of each environment, as Unleash Edge shows it.
    fn features(&self) -> String {
        let snapshots = self.snapshots.all();
        let mut text = String::from("{");
        for (n, (environment, snapshot)) in snapshots.iter().enumerate() {
            let listing = snapshot.listing(&Projects::All, Filter::default(), Segments::Separate);
            let json = String::from_utf8_lossy(&listing.make(Coding::Identity).bytes).into_owned();
            let separator = if n > 0 { "," } else { "" };
            let name = Value::from(environment.as_str());
            write!(text, "{separator}{name}:{json}").expect("writing to a string cannot fail");
        }
        text.push('}');
        text
    }

    /// The known tokens, in the shape that Unleash Edge shows them in.
    fn tokens(&self) -> Value {
        let known = self.auth.verdicts().into_iter().map(|verdict| {
            let grant = verdict.grant();
            json!({
                "token": verdict.masked(),
                "type": grant.kind.as_str(),
                "environment": grant.scope.environment.as_str(),
                "projects": grant.scope.projects.to_list(),
                "status": "Validated",
                "lastChecked": verdict.checked().to_string(),
            })
        });
        json!({
            "tokenRefreshes": [],
            "tokenValidationStatus": known.collect::<Vec<_>>(),
            "invalidTokenCount": self.auth.refused_count(),
        })
    }

    fn instance_data(&self) -> Value {
        json!({
            "this_instance": {
                "identifier": self.identity.instance_id,
                "appName": self.identity.app_name,
                "hosting": self.identity.hosting,
                "region": self.identity.region,
                "edgeVersion": env!("CARGO_PKG_VERSION"),
                "started": self.identity.started.to_string(),
            },
            "connected_instances": self.usage.instances(),
        })
    }
}

fn environment(snapshot: &Snapshot, now: Timestamp) -> Value {
    let confirmed = snapshot.confirmed();
    let age = Duration::try_from(now.duration_since(confirmed)).unwrap_or_default();
    let problems = snapshot.problems().iter().map(ToString::to_string);
    let known = confirmed != Timestamp::UNIX_EPOCH;
    json!({
        "name": snapshot.environment().as_str(),
        "flags": snapshot.document().features().len(),
        "segments": snapshot.document().segments().len(),
        "revision": snapshot.document().revision(),
        "confirmed": known.then(|| confirmed.to_string()),
        "ageSeconds": known.then_some(age.as_secs()),
        "problems": problems.collect::<Vec<_>>(),
    })
}

fn upstream(upstream: &Upstream) -> Value {
    let health = upstream.health();
    let mut json = Map::new();
    json.insert("lastSuccess".to_owned(), json!(health.last_success.map(|at| at.to_string())));
    if let Some((at, error)) = health.last_error {
        json.insert("lastError".to_owned(), json!({"at": at.to_string(), "error": error}));
    }
    json.insert("consecutiveFailures".to_owned(), json!(health.consecutive_failures));
    Value::Object(json)
}
