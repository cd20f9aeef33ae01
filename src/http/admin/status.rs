//! Operations that show the state of the instance: status, flags and valid tokens.
//!
//! Tokens are always masked. Nothing here changes state.

use std::{fmt::Write as _, net::SocketAddr, sync::Arc};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::{
    auth::Authenticator,
    control_plane::{ConnectionCount, DatabaseStatus},
    fleet::{Fence, Fleet, FleetStatus, TopicStatus},
    http::health::HealthEndpoints,
    served::{ServedSnapshot, Snapshots},
    snapshot::{Filter, SegmentFormat, prepared_body::ContentCoding},
    tls,
    token::{Grant, Projects, Scope, TokenKind},
    upstream::{AdminToken, Upstream},
    usage::Usage,
};

/// The identity of the instance.
#[derive(Clone, Debug)]
pub struct InstanceIdentity {
    /// The mode it runs in.
    pub mode: &'static str,
    /// The name shared by all instances of a deployment.
    pub app_name: String,
    /// The name of this instance.
    pub instance_id: String,
    /// The kind of hosting, in Unleash's terms.
    pub hosting: String,
    /// The region it runs in, if known.
    pub region: Option<String>,
    /// When it started.
    pub started: Timestamp,
}

/// The endpoint for SDKs.
#[derive(Clone, Debug)]
pub struct DataEndpoint {
    /// The address that the data listener is bound to.
    pub bound_address: SocketAddr,
    /// The prefix of every path: empty, or `/…` without a final slash.
    pub base_path: String,
    /// Whether it uses TLS.
    pub is_tls: bool,
}

impl DataEndpoint {
    /// The URL for SDKs. `None` if the listener is bound to all addresses of its machine, because the
    /// instance does not know which one SDKs use.
    fn url(&self) -> Option<String> {
        let Self { bound_address, base_path, is_tls } = self;
        let scheme = if *is_tls { "https" } else { "http" };
        (!bound_address.ip().is_unspecified())
            .then(|| format!("{scheme}://{bound_address}{base_path}"))
    }
}

/// The sources of the instance's state.
#[derive(Debug)]
pub struct InstanceStatus {
    /// The identity of the instance.
    pub identity: InstanceIdentity,
    /// The endpoint for SDKs.
    pub data_endpoint: DataEndpoint,
    /// Validates tokens.
    pub auth: Authenticator,
    /// The flags in use.
    pub snapshots: Snapshots,
    /// Usage data that is not sent yet.
    pub usage: Usage,
    /// The upstream server, if any.
    pub upstream: Option<Upstream>,
    /// The fleet, if the instance is in one.
    pub fleet: Option<Fleet>,
    /// The admin token for upstream, if any.
    pub admin_token: Option<AdminToken>,
    /// Health checks and metrics.
    pub ops: HealthEndpoints,
    /// TLS of the listeners that use it.
    pub tls: Vec<tls::TlsAcceptor>,
}

impl InstanceStatus {
    /// The overview for operators: environments, upstream, fleet, tokens and certificates.
    pub fn status(&self) -> Value {
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
            "dataUrl": self.data_endpoint.url(),
            "dataPort": self.data_endpoint.bound_address.port(),
            "dataPath": self.data_endpoint.base_path,
            "dataTls": self.data_endpoint.is_tls,
            "environments": environments.iter().map(|it| environment_status(it)).collect::<Vec<_>>(),
            "upstream": self.upstream.as_ref().map(|it| upstream_status(it, self.admin_token.as_ref())),
            "fleet": self.fleet.as_ref().map(|it| fleet_status(&it.status())),
            "tokens": {
                "valid": valid_token_count(&self.auth),
                "refused": self.auth.rejected_count(),
            },
            "certificates": certificate_status(&self.tls, Timestamp::now()),
        })
    }

    /// The flag configuration of each environment, in the format of Unleash Edge.
    pub fn features(&self) -> String {
        let snapshots = self.snapshots.all();
        let mut text = String::from("{");
        for (n, (environment, snapshot)) in snapshots.iter().enumerate() {
            let listing = snapshot.client_features(
                &Projects::All,
                Filter::default(),
                SegmentFormat::Separate,
            );
            let json =
                String::from_utf8_lossy(&listing.get_or_encode(ContentCoding::Identity).bytes)
                    .into_owned();
            let separator = if n > 0 { "," } else { "" };
            let name = Value::from(environment.as_str());
            write!(text, "{separator}{name}:{json}").expect("writing to a string cannot fail");
        }
        text.push('}');
        text
    }

    /// The valid SDK tokens, in the format of Unleash Edge.
    pub fn tokens(&self) -> Value {
        json!({
            "tokenRefreshes": [],
            "tokenValidationStatus": valid_tokens(&self.auth),
            "invalidTokenCount": self.auth.rejected_count(),
        })
    }

    /// This instance and the edges behind it, in the format of Unleash Edge.
    pub fn instance_data(&self) -> Value {
        json!({
            "this_instance": {
                "identifier": self.identity.instance_id,
                "appName": self.identity.app_name,
                "hosting": self.identity.hosting,
                "region": self.identity.region,
                "edgeVersion": env!("CARGO_PKG_VERSION"),
                "started": self.identity.started.to_string(),
            },
            "connected_instances": self.usage.downstream_edge_reports(),
        })
    }
}

/// The valid SDK tokens: those that upstream has confirmed, and those that are configured. Admin tokens
/// are left out, because not every operator may see them.
fn valid_tokens(auth: &Authenticator) -> Vec<Value> {
    let confirmed = auth.cached_tokens().into_iter().map(|verdict| {
        let checked = Some(verdict.confirmed_at().to_string());
        (Arc::clone(verdict.grant()), verdict.masked().to_owned(), "Validated", checked)
    });
    let configured = auth.static_grants().into_iter().map(|grant| {
        let masked = mask_scope(&grant.scope);
        (grant, masked, "Trusted", None)
    });
    let tokens = confirmed.chain(configured).filter(|(grant, ..)| is_sdk_token(grant));
    let tokens = tokens.map(|(grant, masked, status, checked)| {
        json!({
            "token": masked,
            "type": grant.kind.as_str(),
            "environment": grant.scope.environment.as_str(),
            "projects": grant.scope.projects.to_list(),
            "status": status,
            "lastChecked": checked,
        })
    });
    tokens.collect()
}

fn valid_token_count(auth: &Authenticator) -> usize {
    let confirmed =
        auth.cached_tokens().iter().filter(|verdict| is_sdk_token(verdict.grant())).count();
    confirmed + auth.static_grants().iter().filter(|grant| is_sdk_token(grant)).count()
}

fn is_sdk_token(grant: &Grant) -> bool {
    grant.kind != TokenKind::Admin
}

/// The masked form of a token of which only the digest and the scope are known.
fn mask_scope(scope: &Scope) -> String {
    let projects = match scope.projects.to_list()[..] {
        [project] => project,
        _ => "[]",
    };
    format!("{projects}:{}.****", scope.environment)
}

fn environment_status(snapshot: &ServedSnapshot) -> Value {
    let age = snapshot.age(Instant::now());
    // Wall-clock time is for display; ages do not depend on it.
    let confirmed = age.and_then(|age| Timestamp::now().checked_sub(age).ok());
    let problems = snapshot.problems().iter().map(ToString::to_string);
    json!({
        "name": snapshot.environment().as_str(),
        "flags": snapshot.document().features().len(),
        "segments": snapshot.document().segments().len(),
        "revision": snapshot.document().revision(),
        "confirmed": confirmed.map(|at| at.to_string()),
        "ageSeconds": age.map(|age| age.as_secs()),
        "problems": problems.collect::<Vec<_>>(),
    })
}

/// The certificates of the listeners, each with its warning, if any.
fn certificate_status(tls: &[tls::TlsAcceptor], now: Timestamp) -> Vec<Value> {
    let certificates = tls.iter().flat_map(|server| {
        server.certificates().into_iter().map(|certificate| {
            json!({
                "listener": server.listener(),
                "file": certificate.file().display().to_string(),
                "subject": certificate.subject(),
                "notAfter": certificate.not_after().to_string(),
                "expiresInSeconds": certificate.expires_in(now).as_secs(),
                "warning": certificate.warning(now),
            })
        })
    });
    certificates.collect()
}

/// The state of the control plane's database.
pub(super) fn database_status(database: &DatabaseStatus) -> Value {
    let ConnectionCount { busy, idle, limit } = database.connections;
    let last_error = database
        .last_error
        .as_ref()
        .map(|(at, error)| json!({"at": at.to_string(), "error": error}));
    json!({
        "location": database.location,
        "reachable": database.unreachable_since.is_none(),
        "awaySince": database.unreachable_since.map(|at| at.to_string()),
        "lastError": last_error,
        "registryAgeSeconds": database.registry_age.map(|age| age.as_secs()),
        "usageWaitsSince": database.usage_failing_since.map(|at| at.to_string()),
        "connections": {"busy": busy, "idle": idle, "limit": limit},
    })
}

fn upstream_status(upstream: &Upstream, admin_token: Option<&AdminToken>) -> Value {
    let health = upstream.health();
    let mut json = Map::new();
    json.insert("url".to_owned(), json!(upstream.origin()));
    json.insert("lastSuccess".to_owned(), json!(health.last_success.map(|at| at.to_string())));
    if let Some((at, error)) = health.last_error {
        json.insert("lastError".to_owned(), json!({"at": at.to_string(), "error": error}));
    }
    json.insert("consecutiveFailures".to_owned(), json!(health.consecutive_failures));
    json.insert("streams".to_owned(), json!(health.streams));
    if let Some(token) = admin_token {
        let file = token.file().map(|file| file.display().to_string());
        let refused_since = token.refused_since().map(|at| at.to_string());
        let shown = json!({"file": file, "refusedSince": refused_since});
        json.insert("adminToken".to_owned(), shown);
    }
    Value::Object(json)
}

/// The fleet as this instance sees it.
fn fleet_status(status: &FleetStatus) -> Value {
    json!({
        "name": status.name,
        "redis": {"url": status.redis, "lastError": status.redis_error},
        "instances": {"count": status.instance_count, "names": status.instances},
        "lastNoticeSeconds": status.last_notice_age.map(|age| age.as_secs()),
        "topics": status.topics.iter().map(topic_status).collect::<Vec<_>>(),
    })
}

fn topic_status(topic: &TopicStatus) -> Value {
    // Wall-clock time is for display only.
    let since = topic.leader_since.filter(|_| topic.leader.is_some());
    let since = since.and_then(|at| Timestamp::now().checked_sub(at.elapsed()).ok());
    json!({
        "topic": topic.topic,
        "role": topic.role.as_str(),
        "leader": topic.leader,
        "leaderSince": since.map(|at| at.to_string()),
        "fence": topic.fence.map(Fence::get),
        "document": topic.version.map(|it| json!({"fence": it.fence.get(), "sequence": it.sequence})),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        auth::{self, Validator},
        token::{Environment, TokenDigest},
    };

    #[test]
    fn certificate_status_contains_the_expiry() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("made");
        let folder = tempfile::tempdir().expect("folder");
        let [certificate_file, key_file] = ["tls.crt", "tls.key"].map(|it| folder.path().join(it));
        std::fs::write(&certificate_file, made.cert.pem()).expect("written");
        std::fs::write(&key_file, made.signing_key.serialize_pem()).expect("written");
        let file = certificate_file.display().to_string();
        let server = tls::TlsAcceptor::new(tls::Config {
            listener: "data",
            key_pairs: vec![tls::KeyPairFiles { certificate_file, key_file }],
            min_version: tls::Version::Tls12,
            client_verification: None,
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 256,
        });
        let server = server.expect("sound");
        let not_after = server.certificates()[0].not_after();
        let shown = |now| certificate_status(std::slice::from_ref(&server), now);
        let expected = json!([{
            "listener": "data",
            "file": file,
            "subject": "CN=rcgen self signed cert",
            "notAfter": not_after.to_string(),
            "expiresInSeconds": 30 * 24 * 60 * 60,
            "warning": null,
        }]);
        assert_eq!(json!(shown(not_after - Duration::from_hours(30 * 24))), expected);
        let soon = shown(not_after - Duration::from_hours(24));
        assert_eq!(soon[0]["warning"], format!("the certificate in {file} expires at {not_after}"));
    }

    #[test]
    fn configured_sdk_tokens_are_listed_and_admin_tokens_are_not() {
        let config = auth::Config {
            revalidate_after: Duration::from_mins(1),
            forget_invalid_after: Duration::from_mins(1),
            list_interval: Duration::from_mins(1),
            deadline: Duration::from_secs(1),
            capacity: 10,
        };
        let kinds = [
            (TokenKind::Client, Projects::All),
            (TokenKind::Frontend, Projects::from_list(["web", "shop"])),
            (TokenKind::Admin, Projects::All),
        ];
        let configured = kinds.map(|(kind, projects)| {
            let scope = Scope { environment: Environment::new("dev"), projects };
            (TokenDigest::of(kind.as_str()), Grant { kind, scope })
        });
        let auth = Authenticator::new(config, Validator::StaticOnly, configured);
        let mut tokens = valid_tokens(&auth);
        assert_eq!(tokens.len(), valid_token_count(&auth));
        tokens.sort_by_key(|token| token["type"].to_string());
        let shown = tokens.iter().map(|token| (token["token"].as_str(), token["status"].as_str()));
        let trusted = Some("Trusted");
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [(Some("*:dev.****"), trusted), (Some("[]:dev.****"), trusted)]
        );
        assert_eq!(tokens[1]["projects"], json!(["shop", "web"]));
        assert_eq!(tokens[1]["lastChecked"], Value::Null);
    }
}
