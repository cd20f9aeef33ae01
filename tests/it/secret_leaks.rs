//! Tokens never appear where they must not, not even after malformed requests.
//!
//! The rig searches logs, files, metrics and pages whenever an instance ends. This test adds error
//! bodies, and logs at their most detailed level.

use std::sync::Arc;

use reqwest::{Method, StatusCode};

use crate::rig::{Parapet, Sdk, TokenKind, Unleash, http, secret_leak_check};

const ENVIRONMENT: &str = "development";

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn no_token_appears_in_errors_logs_files_or_pages() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let backend =
            unleash.create_token(TokenKind::Backend, ENVIRONMENT, &["*"], "secrecy").await;
        let frontend =
            unleash.create_token(TokenKind::Frontend, ENVIRONMENT, &["*"], "secrecy").await;
        let unknown = format!("*:{ENVIRONMENT}.secrecy-0f1e2d3c4b5a69788796a5b4c3d2e1f0");
        let malformed = "secrecy-without-a-dot-0f1e2d3c4b5a6978";
        secret_leak_check::register(&unknown);
        secret_leak_check::register(malformed);
        let edge =
            Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let edge = edge.flag("--fleet-name", "secrecy").flag("--log", "debug,parapet=trace");
        let parapet = edge.start().await;
        unleash.register_tokens_named("parapet-secrecy").await;
        Sdk::node(&parapet.url(), &backend, "secrecy-node").await.close().await;
        Sdk::frontend(&parapet.url(), &frontend, "secrecy-browser").await.close().await;

        let tokens = [&backend, &frontend, &unknown, malformed, unleash.admin_token()];
        let mut errors = 0;
        for token in tokens {
            let requests = [
                (Method::GET, "/api/client/features".to_owned(), String::new()),
                (Method::GET, format!("/api/client/features/{token}"), String::new()),
                (Method::GET, "/api/frontend".to_owned(), String::new()),
                (Method::GET, format!("/api/frontend/features/{token}"), String::new()),
                (Method::GET, format!("/{token}?token={token}"), String::new()),
                (Method::PUT, "/api/client/features".to_owned(), token.to_owned()),
                (Method::POST, "/api/client/register".to_owned(), format!("{{\"appName\":{token}")),
                (Method::POST, "/api/client/metrics".to_owned(), format!("[\"{token}\"]")),
                (Method::POST, "/api/frontend".to_owned(), format!("\"{token}\"")),
                (Method::POST, "/edge/validate".to_owned(), format!("{{\"tokens\":\"{token}\"}}")),
            ];
            for (method, path, body) in requests {
                for base in [parapet.url(), parapet.admin_url()] {
                    let request = http().request(method.clone(), base + &path).body(body.clone());
                    let request = request.header("Content-Type", "application/json");
                    let response = request.header("Authorization", token).send().await.unwrap();
                    let (status, headers) =
                        (response.status(), format!("{:?}", response.headers()));
                    let body = response.text().await.unwrap();
                    let leaks =
                        secret_leak_check::leaked_secrets(format!("{headers}\n{body}").as_bytes());
                    assert!(leaks.is_empty(), "{method} {path}: {status} {headers} {body}");
                    errors += u32::from(status.is_client_error());
                }
            }
        }
        assert!(errors > 50, "{errors} errors");
        for path in ["/status", "/internal-backstage/tokens", "/internal-backstage/features"] {
            assert_eq!(parapet.admin_get(path).await.0, StatusCode::OK);
        }
        // Ending it searches the rest.
        assert!(parapet.terminate().await.success());
        assert!(parapet.log().contains("DEBUG"), "the log is talkative");
    })
    .await;
}
