//! What operators see of the instance: its state, its flags, and the tokens it knows.
//!
//! Tokens are shown masked, always. Nothing is changed here.

use std::{fmt::Write as _, net::SocketAddr, sync::Arc};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::{
    auth::Authenticator,
    control::{ConnectionCount, DatabaseStatus},
    http::ops::Ops,
    snapshot::{Filter, Segments, Snapshot, Snapshots, body::Coding},
    tls,
    token::{Grant, Projects, Scope, TokenKind},
    upstream::{AdminToken, Upstream},
    usage::Usage,
};

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

/// Where SDKs go.
#[derive(Clone, Debug)]
pub struct Door {
    /// Where the data listener is bound.
    pub address: SocketAddr,
    /// What precedes every path: empty, or `/…` without a final slash.
    pub base_path: String,
    /// Whether its connections are encrypted.
    pub is_tls: bool,
}

impl Door {
    /// The address for SDKs, where this instance can know it: one that is bound to all of its
    /// machine's addresses cannot.
    fn url(&self) -> Option<String> {
        let Self { address, base_path, is_tls } = self;
        let scheme = if *is_tls { "https" } else { "http" };
        (!address.ip().is_unspecified()).then(|| format!("{scheme}://{address}{base_path}"))
    }
}

/// What there is to see.
#[derive(Debug)]
pub struct Insight {
    /// What the instance says of itself.
    pub identity: Identity,
    /// Where SDKs go.
    pub door: Door,
    /// Who judges tokens.
    pub auth: Authenticator,
    /// What is served.
    pub snapshots: Snapshots,
    /// What waits to be sent.
    pub usage: Usage,
    /// Where it is sent, if anywhere.
    pub upstream: Option<Upstream>,
    /// The admin token that is presented there, if there is one.
    pub admin_token: Option<AdminToken>,
    /// What probes and scrapes are told.
    pub ops: Ops,
    /// The listeners that speak TLS.
    pub tls: Vec<tls::Server>,
}

impl Insight {
    /// Everything that an operator needs to see at a glance.
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
            "dataUrl": self.door.url(),
            "dataPort": self.door.address.port(),
            "dataPath": self.door.base_path,
            "dataTls": self.door.is_tls,
            "environments": environments.iter().map(|it| environment(it)).collect::<Vec<_>>(),
            "upstream": self.upstream.as_ref().map(|it| upstream(it, self.admin_token.as_ref())),
            "tokens": {
                "valid": known_count(&self.auth),
                "refused": self.auth.refused_count(),
            },
            "certificates": certificates(&self.tls, Timestamp::now()),
        })
    }

    /// The flag configuration of each environment, as Unleash Edge shows it.
    pub fn features(&self) -> String {
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

    /// The known tokens for SDKs, in the shape that Unleash Edge shows them in.
    pub fn tokens(&self) -> Value {
        json!({
            "tokenRefreshes": [],
            "tokenValidationStatus": known(&self.auth),
            "invalidTokenCount": self.auth.refused_count(),
        })
    }

    /// This instance and the edges behind it, as Unleash Edge shows them.
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
            "connected_instances": self.usage.instances(),
        })
    }
}

/// The tokens for SDKs that are admitted: those of which upstream has said so, and those that are
/// given. Admin tokens are not for the eyes of everybody who may look here.
fn known(auth: &Authenticator) -> Vec<Value> {
    let judged = auth.verdicts().into_iter().map(|verdict| {
        let checked = Some(verdict.checked().to_string());
        (Arc::clone(verdict.grant()), verdict.masked().to_owned(), "Validated", checked)
    });
    let given = auth.given().into_iter().map(|grant| {
        let masked = masked(&grant.scope);
        (grant, masked, "Trusted", None)
    });
    let known = judged.chain(given).filter(|(grant, ..)| is_for_sdks(grant));
    let known = known.map(|(grant, masked, status, checked)| {
        json!({
            "token": masked,
            "type": grant.kind.as_str(),
            "environment": grant.scope.environment.as_str(),
            "projects": grant.scope.projects.to_list(),
            "status": status,
            "lastChecked": checked,
        })
    });
    known.collect()
}

fn known_count(auth: &Authenticator) -> usize {
    let judged = auth.verdicts().iter().filter(|verdict| is_for_sdks(verdict.grant())).count();
    judged + auth.given().iter().filter(|grant| is_for_sdks(grant)).count()
}

fn is_for_sdks(grant: &Grant) -> bool {
    grant.kind != TokenKind::Admin
}

/// How tokens of a scope are written, as far as that is known of one that is kept as a digest.
fn masked(scope: &Scope) -> String {
    let projects = match scope.projects.to_list()[..] {
        [project] => project,
        _ => "[]",
    };
    format!("{projects}:{}.****", scope.environment)
}

fn environment(snapshot: &Snapshot) -> Value {
    let age = snapshot.age(Instant::now());
    // A time of the clock is for people to read; ages do not depend on it.
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

/// The certificates of the listeners, each with what there is to be warned of.
fn certificates(tls: &[tls::Server], now: Timestamp) -> Vec<Value> {
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

/// The control plane's database.
pub(super) fn database(database: &DatabaseStatus) -> Value {
    let ConnectionCount { busy, idle, limit } = database.connections;
    let last_error = database
        .last_error
        .as_ref()
        .map(|(at, error)| json!({"at": at.to_string(), "error": error}));
    json!({
        "location": database.location,
        "reachable": database.away_since.is_none(),
        "awaySince": database.away_since.map(|at| at.to_string()),
        "lastError": last_error,
        "registryAgeSeconds": database.registry_age.map(|age| age.as_secs()),
        "usageWaitsSince": database.usage_waits_since.map(|at| at.to_string()),
        "connections": {"busy": busy, "idle": idle, "limit": limit},
    })
}

fn upstream(upstream: &Upstream, admin_token: Option<&AdminToken>) -> Value {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        auth::{self, Authority},
        token::{Environment, TokenDigest},
    };

    #[test]
    fn certificates_are_shown_with_their_expiry() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("made");
        let folder = tempfile::tempdir().expect("folder");
        let [certificate_file, key_file] = ["tls.crt", "tls.key"].map(|it| folder.path().join(it));
        std::fs::write(&certificate_file, made.cert.pem()).expect("written");
        std::fs::write(&key_file, made.signing_key.serialize_pem()).expect("written");
        let file = certificate_file.display().to_string();
        let server = tls::Server::new(tls::Config {
            listener: "data",
            pairs: vec![tls::Pair { certificate_file, key_file }],
            min_version: tls::Version::Tls12,
            clients: None,
            handshake_timeout: Duration::from_secs(10),
            max_handshakes: 256,
        });
        let server = server.expect("sound");
        let not_after = server.certificates()[0].not_after();
        let shown = |now| certificates(std::slice::from_ref(&server), now);
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
    fn given_tokens_are_known_and_admin_tokens_not_shown() {
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
        let given = kinds.map(|(kind, projects)| {
            let scope = Scope { environment: Environment::new("dev"), projects };
            (TokenDigest::of(kind.as_str()), Grant { kind, scope })
        });
        let auth = Authenticator::new(config, Authority::Nobody, given);
        let mut known = known(&auth);
        assert_eq!(known.len(), known_count(&auth));
        known.sort_by_key(|token| token["type"].to_string());
        let shown = known.iter().map(|token| (token["token"].as_str(), token["status"].as_str()));
        let trusted = Some("Trusted");
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [(Some("*:dev.****"), trusted), (Some("[]:dev.****"), trusted)]
        );
        assert_eq!(known[1]["projects"], json!(["shop", "web"]));
        assert_eq!(known[1]["lastChecked"], Value::Null);
    }
}
