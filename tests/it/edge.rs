//! An edge between real SDKs and a healthy Unleash: flags, usage, credentials and shutdown.
//!
//! `upstream_outage` covers an unavailable Unleash.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::rig::{
    Evaluation, Parapet, STORE_TIMEOUT, Sdk, TokenKind, Unleash, UnleashVersion, http, wait_until,
};

const ENVIRONMENTS: [&str; 2] = ["development", "production"];

/// Long enough for a change to reach an SDK on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The prefix of this test's flags; other tests create flags on the same servers.
const FLAG_PREFIX: &str = "edge.";

/// Created last: an SDK that sees it has all the others.
const LAST_FLAG: &str = "edge.zz-last";

#[derive(Debug, Clone, Copy)]
enum SdkKind {
    Node,
    Python,
    BrowserGet,
    BrowserPost,
}

impl SdkKind {
    const ALL: [Self; 4] = [Self::Node, Self::Python, Self::BrowserGet, Self::BrowserPost];

    fn kind(self) -> TokenKind {
        match self {
            Self::Node | Self::Python => TokenKind::Backend,
            Self::BrowserGet | Self::BrowserPost => TokenKind::Frontend,
        }
    }

    fn app_name(self, environment: &str) -> String {
        format!("edge-{self:?}-{environment}").to_lowercase()
    }

    async fn start(self, server: &str, token: &str, app_name: &str) -> Sdk {
        match self {
            Self::Node => Sdk::node(server, token, app_name).await,
            Self::Python => Sdk::python(server, token, app_name).await,
            Self::BrowserGet => Sdk::frontend(server, token, app_name).await,
            Self::BrowserPost => Sdk::frontend_post(server, token, app_name).await,
        }
    }
}

fn rollout(percent: u8, stickiness: &str) -> Value {
    let parameters =
        json!({ "rollout": percent.to_string(), "stickiness": stickiness, "groupId": "edge" });
    json!({ "name": "flexibleRollout", "parameters": parameters })
}

fn with_constraints(mut strategy: Value, constraints: Value) -> Value {
    strategy["constraints"] = constraints;
    strategy
}

fn variants() -> Value {
    let variant = |name: &str, payload: Value| {
        json!({
            "name": name, "weight": 500, "weightType": "variable", "stickiness": "default",
            "payload": payload,
        })
    };
    json!([
        variant("blue", json!({ "type": "json", "value": "{\"shade\": \"äöü \\\"light\\\"\"}" })),
        variant("green", json!({ "type": "string", "value": "plain" })),
    ])
}

/// Creates flags of every kind that the open-source server has, in both environments, with differences
/// between them.
async fn create_flags(unleash: &Unleash) {
    let constraint = json!({ "contextName": "userId", "operator": "IN", "values": ["7", "11"] });
    let segment = unleash.create_segment("edge-segment", &json!([constraint])).await;
    let european = json!([
        { "contextName": "region", "operator": "STR_STARTS_WITH", "values": ["EU-"], "caseInsensitive": true },
        { "contextName": "age", "operator": "NUM_GTE", "value": "18" },
    ]);
    let not_old = json!([
        { "contextName": "version", "operator": "SEMVER_LT", "value": "2.0.0", "inverted": true },
    ]);
    let mut segmented = rollout(100, "default");
    segmented["segments"] = json!([segment]);
    let mut with_variants = rollout(100, "default");
    with_variants["variants"] = variants();
    let flags = [
        ("edge.everybody", vec![rollout(100, "default")]),
        ("edge.constrained", vec![with_constraints(rollout(100, "default"), european)]),
        ("edge.inverted", vec![with_constraints(rollout(100, "default"), not_old)]),
        ("edge.segmented", vec![segmented]),
        ("edge.variants", vec![with_variants]),
        (
            "edge.addresses",
            vec![json!({ "name": "remoteAddress", "parameters": { "IPs": "127.0.0.0/8" } })],
        ),
        (
            "edge.one-of-two",
            vec![
                with_constraints(rollout(0, "default"), json!([])),
                with_constraints(rollout(60, "sessionId"), json!([])),
            ],
        ),
    ];
    for (flag, strategies) in flags {
        unleash.create_flag(flag).await;
        for environment in ENVIRONMENTS {
            for strategy in &strategies {
                unleash.add_strategy(flag, environment, strategy).await;
            }
            unleash.enable(flag, environment).await;
        }
    }
    for (flag, percent) in
        [("edge.gradual", [50, 20]), ("edge.child", [100, 100]), (LAST_FLAG, [100, 100])]
    {
        let new = json!({ "name": flag, "type": "experiment", "impressionData": true });
        unleash.admin_post("/api/admin/projects/default/features", &new).await;
        if flag == "edge.child" {
            let path = format!("/api/admin/projects/default/features/{flag}/dependencies");
            unleash.admin_post(&path, &json!({ "feature": "edge.gradual" })).await;
        }
        for (environment, percent) in ENVIRONMENTS.into_iter().zip(percent) {
            unleash.add_strategy(flag, environment, &rollout(percent, "userId")).await;
            unleash.enable(flag, environment).await;
        }
        if flag == "edge.gradual" {
            unleash.create_flag("edge.disabled").await;
            unleash.add_strategy("edge.disabled", "production", &rollout(100, "default")).await;
            unleash.create_enabled_flag("edge.production-only", "production", &[]).await;
        }
    }
}

/// Every context has the fields that the flags depend on, so that no SDK chooses at random.
fn contexts() -> Vec<Value> {
    let context = |user: &str, more: Value| {
        let mut context = json!({ "userId": user, "sessionId": format!("session-{user}") });
        context.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        context
    };
    let properties = |region: &str, age: &str, version: &str| json!({ "properties": { "region": region, "age": age, "version": version } });
    let mut contexts = vec![
        context("7", json!({})),
        context("42", properties("eu-north", "18", "2.0.0")),
        context("äöü &=", properties("EU-west", "17.5", "1.9.9-beta")),
        context("11", json!({ "remoteAddress": "10.0.0.1" })),
    ];
    contexts.extend((100..106).map(|user| context(&user.to_string(), json!({}))));
    contexts
}

async fn own_evaluations(sdk: &mut Sdk, context: &Value) -> BTreeMap<String, Evaluation> {
    let mut flags = sdk.evaluate(context.clone()).await;
    flags.retain(|name, _| name.starts_with(FLAG_PREFIX));
    flags
}

/// One SDK sees the same through Parapet as from Unleash, and its usage through Parapet is counted.
async fn compare_and_use(
    unleash: &Unleash,
    parapet: &Parapet,
    flavour: SdkKind,
    environment: &str,
    token: &str,
) {
    let app_name = flavour.app_name(environment);
    let (direct, through) = (unleash.url(), parapet.url());
    let mut direct = flavour.start(&direct, token, "edge-direct").await;
    let mut through = flavour.start(&through, token, &app_name).await;
    let mut seen = Vec::new();
    for sdk in [&mut direct, &mut through] {
        wait_until(
            &format!("{app_name} sees the last flag of {:?}", unleash.version()),
            TIMEOUT,
            async || {
                let flags = sdk.evaluate(json!({ "userId": "1" })).await;
                flags.get(LAST_FLAG).is_some_and(|flag| flag.enabled).then_some(())
            },
        )
        .await;
    }
    for context in contexts() {
        let (expected, actual) = (
            own_evaluations(&mut direct, &context).await,
            own_evaluations(&mut through, &context).await,
        );
        assert_eq!(actual, expected, "{app_name} of {:?} sees for {context}", unleash.version());
        seen.push(expected);
    }
    assert!(seen.iter().any(|flags| flags != &seen[0]), "the contexts make a difference");
    direct.close().await;

    through.use_flag("edge.everybody", 3).await;
    through.use_flag("edge.disabled", 2).await;
    through.flush().await;
    through.use_variant("edge.variants", 4).await;
    through.flush().await;
    through.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn edge_with_admin_token_only_serves_every_sdk_and_delivers_usage() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        create_flags(&unleash).await;
        let counted = ["edge.everybody", "edge.variants", "edge.disabled"];
        let known =
            counted.iter().flat_map(|flag| ENVIRONMENTS.map(|environment| (flag, environment)));
        join_all(known.map(|(flag, environment)| unleash.wait_until_counted(flag, environment)))
            .await;

        let edge =
            Parapet::edge(&unleash.url()).admin_token(unleash.admin_token()).with_short_intervals();
        let parapet = edge.flag("--fleet-name", "edge-story").start().await;
        let each = ENVIRONMENTS.map(async |environment| {
            for flavour in SdkKind::ALL {
                let name = format!("edge-{flavour:?}");
                let token = unleash.create_token(flavour.kind(), environment, &["*"], &name).await;
                compare_and_use(&unleash, &parapet, flavour, environment, &token).await;
            }
        });
        join_all(each).await;
        assert!(parapet.terminate().await.success());

        for (environment, flavour) in
            ENVIRONMENTS.iter().flat_map(|it| SdkKind::ALL.map(|flavour| (it, flavour)))
        {
            let app_name = flavour.app_name(environment);
            unleash.wait_for_usage("edge.everybody", &app_name, environment, (3, 0)).await;
            unleash.wait_for_usage("edge.variants", &app_name, environment, (4, 0)).await;
            unleash.wait_for_usage("edge.disabled", &app_name, environment, (0, 2)).await;
            let stored = unleash.flag_usage("edge.variants").await;
            let of_app = stored.iter().filter(|hour| hour.app_name == app_name);
            assert_eq!(
                of_app.flat_map(|hour| hour.variants.values()).sum::<u64>(),
                4,
                "{app_name}"
            );
            wait_until(
                &format!("{app_name} has registered as what it is"),
                STORE_TIMEOUT,
                async || {
                    let path = format!("/api/admin/metrics/applications/{app_name}/overview");
                    let overview =
                        unleash.admin_request(reqwest::Method::GET, &path, &Value::Null).await.1;
                    let environments = overview["environments"].as_array()?;
                    let here = environments.iter().find(|it| it["name"] == *environment)?;
                    let has =
                        |list: &str| here[list].as_array().is_some_and(|sdks| !sdks.is_empty());
                    match flavour.kind() {
                        TokenKind::Backend => has("backendSdks") && !has("frontendSdks"),
                        TokenKind::Frontend => has("frontendSdks") && !has("backendSdks"),
                    }
                    .then_some(())
                },
            )
            .await;
        }

        // It has created one token for each environment, and finds them again after a restart or a
        // crash.
        assert_eq!(unleash.register_tokens_named("parapet-edge-story").await, ENVIRONMENTS);
        parapet.restart();
        parapet.wait_until_ready().await;
        parapet.kill();
        parapet.restart();
        parapet.wait_until_ready().await;
        assert_eq!(unleash.register_tokens_named("parapet-edge-story").await, ENVIRONMENTS);
    })
    .await;
}

/// The response to a token's first request, once upstream has validated the token. Until then the
/// response is 503; on a busy machine validation may take longer than the request timeout.
async fn first_response(parapet: &Parapet, path: &str, token: &str) -> Value {
    wait_until("upstream has judged the token", Duration::from_mins(1), async || {
        let (status, body) = parapet.get(path, token).await;
        assert!([StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE].contains(&status), "{status}");
        (status == StatusCode::OK).then_some(body)
    })
    .await
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn edge_without_admin_token_uses_configured_tokens() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "given.flag";
        unleash.create_enabled_flag(flag, "production", &[]).await;
        unleash.wait_until_counted(flag, "production").await;
        let configured =
            unleash.create_token(TokenKind::Backend, "production", &["*"], "given").await;
        let other =
            unleash.create_token(TokenKind::Backend, "production", &["*"], "given-other").await;
        let frontend =
            unleash.create_token(TokenKind::Frontend, "production", &["*"], "given-frontend").await;

        let parapet = Parapet::edge(&unleash.url())
            .with_short_intervals()
            .env("TOKENS", &configured)
            .start()
            .await;
        // It is ready, so it has flags for every token of that environment.
        for token in [&configured, &other] {
            let flags = first_response(&parapet, "/api/client/features", token).await;
            let names = flags["features"].as_array().unwrap().iter().map(|flag| &flag["name"]);
            assert!(names.into_iter().any(|name| name == flag), "{flags}");
        }
        first_response(&parapet, "/api/frontend", &frontend).await;

        let mut sdk = Sdk::node(&parapet.url(), &other, "given-node").await;
        sdk.use_flag(flag, 5).await;
        sdk.flush().await;
        sdk.close().await;
        unleash.wait_for_usage(flag, "given-node", "production", (5, 0)).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn edge_without_tokens_fetches_flags_with_the_first_sdk_token() {
    Unleash::on_every_version(async |unleash: Arc<Unleash>| {
        let flag = "brought.flag";
        unleash.create_enabled_flag(flag, "development", &[]).await;
        unleash.wait_until_counted(flag, "development").await;
        let frontend = unleash
            .create_token(TokenKind::Frontend, "development", &["*"], "brought-frontend")
            .await;
        let backend =
            unleash.create_token(TokenKind::Backend, "development", &["*"], "brought").await;

        let parapet = Parapet::edge(&unleash.url())
            .with_short_intervals()
            .flag("--edge-request-timeout", "9")
            .start_listening()
            .await;
        // A frontend token is valid, but cannot fetch flags.
        let (status, _) = parapet.get("/api/frontend", &frontend).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        let flags = first_response(&parapet, "/api/client/features", &backend).await;
        let names = flags["features"].as_array().unwrap().iter().map(|flag| &flag["name"]);
        assert!(names.into_iter().any(|name| name == flag), "{flags}");

        let mut sdk = Sdk::frontend(&parapet.url(), &frontend, "brought-browser").await;
        assert!(sdk.evaluate(json!({})).await[flag].enabled);
        sdk.use_flag(flag, 2).await;
        sdk.flush().await;
        sdk.close().await;
        unleash.wait_for_usage(flag, "brought-browser", "development", (2, 0)).await;
    })
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL and the npm packages, see tests/run"]
async fn terminated_edge_serves_during_drain_delay_and_sends_its_usage() {
    let unleash = Unleash::shared(UnleashVersion::V8).await;
    let flag = "drain.flag";
    unleash.create_enabled_flag(flag, "development", &[]).await;
    unleash.wait_until_counted(flag, "development").await;
    let token = unleash.create_token(TokenKind::Backend, "development", &["*"], "drain").await;
    // The metrics interval is so long that usage is sent only at the end.
    let edge = Parapet::edge(&unleash.url()).admin_token(unleash.admin_token());
    let edge = edge.flag("--fleet-name", "drain").flag("--metrics-interval-seconds", "3600");
    let parapet = edge.flag("--drain-delay-seconds", "20").start().await;
    let mut before = Sdk::node(&parapet.url(), &token, "drain-before").await;
    before.use_flag(flag, 3).await;
    before.flush().await;

    let ready = parapet.url() + "/internal-backstage/ready";
    let ready = async || http().get(&ready).send().await.unwrap().status();
    assert_eq!(ready().await, StatusCode::OK);
    let meanwhile = async {
        wait_until("it is no longer ready", Duration::from_secs(4), async || {
            (ready().await == StatusCode::SERVICE_UNAVAILABLE).then_some(())
        })
        .await;
        assert_eq!(parapet.get("/internal-backstage/health", "").await.0, StatusCode::OK);
        assert_eq!(parapet.features_status(&token).await, StatusCode::OK);
        let mut late = Sdk::node(&parapet.url(), &token, "drain-late").await;
        late.use_flag(flag, 2).await;
        late.flush().await;
        before.use_flag(flag, 1).await;
        before.flush().await;
        assert_eq!(ready().await, StatusCode::SERVICE_UNAVAILABLE);
    };
    let (status, ()) = tokio::join!(parapet.terminate(), meanwhile);
    assert_eq!(status.code(), Some(0), "{}", parapet.log());
    unleash.wait_for_usage(flag, "drain-before", "development", (4, 0)).await;
    unleash.wait_for_usage(flag, "drain-late", "development", (2, 0)).await;
}
