//! An edge whose tokens each see one project, one of which may fail, and environments that appear and
//! disappear.
//!
//! The upstream is scripted, because a real open-source Unleash has only one project.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::rig::{Parapet, wait_until};

const TOKEN_A: &str = "a:development.of-project-a-0123456789abcdef012345";
const TOKEN_B: &str = "b:development.of-project-b-0123456789abcdef012345";

const FEATURES: &str = "/api/client/features";
const TIMEOUT: Duration = Duration::from_secs(30);

/// The responses of the scripted upstream.
#[derive(Default)]
struct State {
    /// The flag of each token's project.
    flags: BTreeMap<String, String>,
    /// The status of responses to a token, if not 200.
    failing: BTreeMap<String, StatusCode>,
    /// The number of requests for flags with each token.
    request_counts: BTreeMap<String, usize>,
    /// The environments, and whether they are enabled.
    environments: Vec<(&'static str, bool)>,
    /// Whether it responds to everything with 503.
    is_unavailable: bool,
}

#[derive(Clone, Default)]
struct Upstream(Arc<Mutex<State>>);

impl Upstream {
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let upstream = Self::default();
        let shared = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let upstream = shared.clone();
                let answer = service_fn(move |request| {
                    let upstream = upstream.clone();
                    async move { Ok::<_, Infallible>(upstream.respond(request).await) }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), answer));
            }
        });
        (upstream, format!("http://{address}"))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_flag(&self, token: &str, flag: &str) {
        self.state().flags.insert(token.to_owned(), flag.to_owned());
    }

    fn fail(&self, token: &str, status: StatusCode) {
        self.state().failing.insert(token.to_owned(), status);
    }

    fn clear_failures(&self) {
        self.state().failing.clear();
    }

    /// Waits for `more` further requests for flags with a token.
    async fn wait_for_requests(&self, token: &str, more: usize) {
        let asked = || self.state().request_counts.get(token).copied().unwrap_or_default();
        let enough = asked() + more;
        wait_until("flags are requested", TIMEOUT, async || (asked() >= enough).then_some(()))
            .await;
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let token = head.headers.get("authorization").map_or("", |it| it.to_str().unwrap());
        let known = head.headers.get("if-none-match").map_or("", |it| it.to_str().unwrap());
        let mut state = self.state();
        if state.is_unavailable {
            return empty_response(StatusCode::SERVICE_UNAVAILABLE);
        }
        match head.uri.path() {
            "/edge/validate" => {
                let question: Value = serde_json::from_slice(&body).unwrap();
                let tokens = question["tokens"].as_array().unwrap().iter();
                let valid = tokens.map(|token| {
                    let (project, rest) = token.as_str().unwrap().split_once(':').unwrap();
                    let (environment, _) = rest.split_once('.').unwrap();
                    json!({"token": token, "type": "client", "environment": environment, "projects": [project]})
                });
                ok_response(&json!({ "tokens": valid.collect::<Vec<_>>() }))
            }
            FEATURES => {
                *state.request_counts.entry(token.to_owned()).or_default() += 1;
                if let Some(failure) = state.failing.get(token) {
                    return empty_response(*failure);
                }
                let (project, _) = token.split_once(':').unwrap();
                let flag = state.flags.get(token).map_or("x", String::as_str);
                let etag = format!("\"{flag}\"");
                if known == etag {
                    return empty_response(StatusCode::NOT_MODIFIED);
                }
                let flags =
                    json!([{"name": flag, "project": project, "enabled": true, "strategies": []}]);
                let mut answer = ok_response(&json!({"version": 2, "features": flags}));
                answer.headers_mut().insert("etag", etag.parse().unwrap());
                answer
            }
            "/api/admin/environments" => {
                let listed = state.environments.iter();
                let listed =
                    listed.map(|(name, enabled)| json!({"name": name, "enabled": enabled}));
                ok_response(&json!({"version": 1, "environments": listed.collect::<Vec<_>>()}))
            }
            path if path.starts_with("/api/admin/api-tokens") && head.method == "POST" => {
                let new_token: Value = serde_json::from_slice(&body).unwrap();
                let environment = new_token["environment"].as_str().unwrap();
                let mut answer = ok_response(
                    &json!({"secret": format!("*:{environment}.minted-0123456789abcdef0123456789")}),
                );
                *answer.status_mut() = StatusCode::CREATED;
                answer
            }
            path if path.starts_with("/api/admin/api-tokens") => {
                ok_response(&json!({"tokens": []}))
            }
            _ => empty_response(StatusCode::NOT_FOUND),
        }
    }
}

fn ok_response(body: &Value) -> Response<Full<Bytes>> {
    Response::new(Full::from(body.to_string()))
}

fn empty_response(status: StatusCode) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

/// The names of the flags that a token gets, or the status if it gets none.
async fn served_flags(parapet: &Parapet, token: &str) -> Result<Vec<String>, StatusCode> {
    match parapet.get(FEATURES, token).await {
        (StatusCode::OK, body) => {
            let flags = body["features"].as_array().unwrap().iter();
            Ok(flags.map(|flag| flag["name"].as_str().unwrap().to_owned()).collect())
        }
        (status, _) => Err(status),
    }
}

async fn wait_until_served(parapet: &Parapet, token: &str, flag: &str) {
    let expected = Ok(vec![flag.to_owned()]);
    let what = format!("{flag} is served");
    wait_until(&what, TIMEOUT, async || {
        (served_flags(parapet, token).await == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn change_is_served_when_another_token_fails_in_the_same_poll() {
    let (upstream, url) = Upstream::start().await;
    upstream.set_flag(TOKEN_A, "a1");
    upstream.set_flag(TOKEN_B, "b1");
    let setup = Parapet::edge(&url).env("TOKENS", format!("{TOKEN_A},{TOKEN_B}"));
    let parapet = setup.with_short_intervals().start().await;
    wait_until_served(&parapet, TOKEN_A, "a1").await;
    wait_until_served(&parapet, TOKEN_B, "b1").await;
    // Either token may be polled first: a change with one coincides with a failure of the other.
    for (sound, failing, flag) in [(TOKEN_A, TOKEN_B, "a2"), (TOKEN_B, TOKEN_A, "b2")] {
        upstream.fail(failing, StatusCode::INTERNAL_SERVER_ERROR);
        upstream.set_flag(sound, flag);
        upstream.wait_for_requests(sound, 2).await;
        upstream.clear_failures();
        wait_until_served(&parapet, sound, flag).await;
    }
}

#[tokio::test]
async fn flags_of_rejected_token_stay_and_it_is_retried() {
    let (upstream, url) = Upstream::start().await;
    upstream.set_flag(TOKEN_A, "a1");
    upstream.set_flag(TOKEN_B, "b1");
    let setup = Parapet::edge(&url).env("TOKENS", format!("{TOKEN_A},{TOKEN_B}"));
    let parapet = setup.with_short_intervals().start().await;
    wait_until_served(&parapet, TOKEN_A, "a1").await;
    wait_until_served(&parapet, TOKEN_B, "b1").await;
    for refusal in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN] {
        upstream.fail(TOKEN_A, refusal);
        upstream.set_flag(TOKEN_B, refusal.as_str());
        wait_until_served(&parapet, TOKEN_B, refusal.as_str()).await;
        upstream.wait_for_requests(TOKEN_A, 2).await;
        assert_eq!(served_flags(&parapet, TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    }
    upstream.clear_failures();
    upstream.set_flag(TOKEN_A, "a2");
    wait_until_served(&parapet, TOKEN_A, "a2").await;
}

#[tokio::test]
async fn flags_never_fetched_are_unavailable_instead_of_empty() {
    let (upstream, url) = Upstream::start().await;
    upstream.set_flag(TOKEN_A, "a1");
    upstream.set_flag(TOKEN_B, "b1");
    let parapet = Parapet::edge(&url).with_short_intervals().start_listening().await;
    assert_eq!(served_flags(&parapet, TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    assert_eq!(
        served_flags(&parapet, TOKEN_B).await,
        Ok(vec!["b1".to_owned()]),
        "it waits for them"
    );

    parapet.wait_until_stored("b1").await;
    parapet.terminate().await;
    upstream.set_flag(TOKEN_A, "a2");
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until_served(&parapet, TOKEN_A, "a2").await;
    parapet.wait_until_stored("a2").await;
    parapet.terminate().await;
    upstream.state().is_unavailable = true;
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(served_flags(&parapet, TOKEN_A).await, Ok(vec!["a2".to_owned()]));
    assert_eq!(
        served_flags(&parapet, TOKEN_B).await,
        Ok(vec!["b1".to_owned()]),
        "its token may be presented again, and no other flags were fetched since"
    );
}

#[tokio::test]
async fn flags_that_cannot_be_fetched_get_503() {
    let (upstream, url) = Upstream::start().await;
    upstream.set_flag(TOKEN_A, "a1");
    upstream.fail(TOKEN_B, StatusCode::INTERNAL_SERVER_ERROR);
    let parapet = Parapet::edge(&url).with_short_intervals().start_listening().await;
    assert_eq!(served_flags(&parapet, TOKEN_A).await, Ok(vec!["a1".to_owned()]));
    for _ in 0..2 {
        assert_eq!(served_flags(&parapet, TOKEN_B).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    }
    upstream.clear_failures();
    wait_until_served(&parapet, TOKEN_B, "x").await;
}

const ADMIN: &str = "*:*.admin-0123456789abcdef0123456789abcdef";
const DEVELOPMENT: &str = "*:development.client-0123456789abcdef0123456789";
const PRODUCTION: &str = "*:production.client-0123456789abcdef0123456789ab";

#[tokio::test]
async fn disabled_environment_is_not_served_from_the_store() {
    let (upstream, url) = Upstream::start().await;
    upstream.state().environments = vec![("development", true), ("production", true)];
    let parapet = Parapet::edge(&url).admin_token(ADMIN).with_short_intervals().start().await;
    assert!(served_flags(&parapet, DEVELOPMENT).await.is_ok());
    assert!(served_flags(&parapet, PRODUCTION).await.is_ok());
    parapet.terminate().await;
    upstream.state().environments = vec![("development", true), ("production", false)];
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until("production is not served", TIMEOUT, async || {
        (served_flags(&parapet, PRODUCTION).await == Err(StatusCode::FORBIDDEN)).then_some(())
    })
    .await;
    assert!(served_flags(&parapet, DEVELOPMENT).await.is_ok());
    let (_, status) = parapet.admin_get("/status").await;
    let environments = status["environments"].as_array().unwrap();
    assert_eq!(environments.len(), 1, "{status}");
    parapet.terminate().await;

    // An Unleash has at least one enabled environment; none is a fault.
    upstream.state().environments = vec![("development", false), ("production", false)];
    parapet.restart();
    parapet.wait_until_ready().await;
    assert!(served_flags(&parapet, DEVELOPMENT).await.is_ok());
}

#[tokio::test]
async fn edge_with_selected_environments_names_those_it_does_not_serve() {
    let (_, url) = Upstream::start().await;
    let setup = Parapet::edge(&url).admin_token(ADMIN).flag("--environments", "development");
    let parapet = setup.with_short_intervals().start().await;
    assert!(served_flags(&parapet, DEVELOPMENT).await.is_ok());
    let (status, body) = parapet.get(FEATURES, PRODUCTION).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(body["message"], "this instance does not serve the environment of this token");
}

#[tokio::test]
async fn unleash_edge_backup_serves_selected_environments_and_existing_projects_only() {
    let folder = tempfile::tempdir().unwrap();
    let flags =
        |name| json!({"version": 2, "features": [{"name": name, "project": "a", "enabled": true}]});
    let features = json!([["development", flags("dev")], ["production", flags("prod")]]);
    std::fs::write(folder.path().join("unleash_features.json"), features.to_string()).unwrap();
    let known = |token: &str, environment: &str, project: &str| {
        json!({"token": token, "type": "client", "environment": environment, "projects": [project],
            "status": "Validated"})
    };
    let tokens = json!([known(TOKEN_A, "development", "a"), known(PRODUCTION, "production", "*")]);
    std::fs::write(folder.path().join("unleash_tokens.json"), tokens.to_string()).unwrap();
    let (upstream, url) = Upstream::start().await;
    for token in [TOKEN_A, TOKEN_B, "*:development.minted-0123456789abcdef0123456789"] {
        upstream.fail(token, StatusCode::BAD_GATEWAY);
    }
    let folder = folder.path().to_str().unwrap();
    let setup = Parapet::edge(&url).admin_token(ADMIN).flag("--environments", "development");
    let parapet = setup.flag("--backup-folder", folder).with_short_intervals().start().await;
    assert_eq!(served_flags(&parapet, TOKEN_A).await, Ok(vec!["dev".to_owned()]));
    assert_eq!(served_flags(&parapet, TOKEN_B).await, Err(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(served_flags(&parapet, PRODUCTION).await, Err(StatusCode::FORBIDDEN));
}

#[tokio::test]
async fn token_from_unleash_edge_backup_fetches_current_flags() {
    let folder = tempfile::tempdir().unwrap();
    let old = json!({"version": 2, "features": [{"name": "old", "project": "a", "enabled": true}]});
    let features = json!([["development", old]]);
    std::fs::write(folder.path().join("unleash_features.json"), features.to_string()).unwrap();
    let tokens = json!([{"token": TOKEN_A, "type": "client", "environment": "development", "projects": ["a"],
        "status": "Validated"}]);
    std::fs::write(folder.path().join("unleash_tokens.json"), tokens.to_string()).unwrap();
    let (upstream, url) = Upstream::start().await;
    upstream.set_flag(TOKEN_A, "new");
    let setup = Parapet::edge(&url).flag("--tokens", TOKEN_A);
    let setup = setup.flag("--backup-folder", folder.path().to_str().unwrap());
    let parapet = setup.with_short_intervals().start().await;
    wait_until("the new flag is served", TIMEOUT, async || {
        (served_flags(&parapet, TOKEN_A).await == Ok(vec!["new".to_owned()])).then_some(())
    })
    .await;
}
