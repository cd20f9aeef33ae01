//! Reports by one client about itself and about flags use bounded memory, and do not displace reports by
//! other clients.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::{Client, StatusCode};
use serde_json::{Map, Value, json};
use sqlx::{AnyConnection, AssertSqlSafe, Connection as _};
use tempfile::NamedTempFile;
use tokio::task::JoinSet;

use crate::rig::{Parapet, Setup, wait_until};

/// The frontend token for project `web`, which all browsers have.
const FRONTEND_TOKEN: &str = "web:development.shares-public-0123456789";
/// Server tokens for the projects `shop` and `stock`.
const SHOP_TOKEN: &str = "shop:development.shares-shop-0123456789";
const STOCK_TOKEN: &str = "stock:development.shares-stock-0123456789";
const ADMIN_TOKEN: &str = "*:*.shares-admin-0123456789";

const FLAGS: &str = r#"{"features":[
    {"name":"web.banner","project":"web","enabled":true},
    {"name":"shop.cart","project":"shop","enabled":true},
    {"name":"stock.count","project":"stock","enabled":true}]}"#;

const FRONTEND_REGISTER: &str = "/api/frontend/client/register";
const FRONTEND_METRICS: &str = "/api/frontend/client/metrics";
const REGISTER: &str = "/api/client/register";
const METRICS: &str = "/api/client/metrics";
const EDGE_METRICS: &str = "/api/client/metrics/edge";

/// The number of concurrent requests.
const CONCURRENT_REQUESTS: usize = 8;

const MIB: u64 = 1024;

/// The flags, in a file that lasts as long as this.
fn flags() -> NamedTempFile {
    let flags = NamedTempFile::new().unwrap();
    std::fs::write(flags.path(), FLAGS).unwrap();
    flags
}

fn offline(flags: &NamedTempFile) -> Setup {
    Parapet::mode("offline")
        .flag("--bootstrap-file", flags.path())
        .flag("--frontend-tokens", FRONTEND_TOKEN)
        .flag("--client-tokens", format!("{SHOP_TOKEN},{STOCK_TOKEN}"))
}

fn standalone(flags: &NamedTempFile) -> Setup {
    Parapet::mode("standalone")
        .flag("--flags", flags.path())
        .env("INIT_ADMIN_API_TOKENS", ADMIN_TOKEN)
        .env("INIT_FRONTEND_API_TOKENS", FRONTEND_TOKEN)
        .env("INIT_CLIENT_API_TOKENS", format!("{SHOP_TOKEN},{STOCK_TOKEN}"))
}

/// A client of an attacker or a neighbour, which keeps its connections alive.
fn client() -> Client {
    crate::rig::http();
    Client::builder().no_proxy().build().unwrap()
}

/// Posts a body. Returns the status and the seconds of `Retry-After`.
async fn post(
    client: &Client,
    url: String,
    token: &str,
    body: String,
) -> (StatusCode, Option<u64>) {
    let request = client.post(url).header("authorization", token);
    let response = request.header("content-type", "application/json").body(body).send().await;
    let response = response.unwrap();
    let retry_after = response.headers().get("retry-after");
    (response.status(), retry_after.map(|it| it.to_str().unwrap().parse().unwrap()))
}

/// Posts `count` bodies, some concurrently. Returns the number of accepted ones, and of those rejected
/// at the limit.
async fn post_many(
    parapet: &Parapet,
    path: &str,
    token: &'static str,
    count: usize,
    body: impl Fn(usize) -> String,
) -> (usize, usize) {
    let (client, url) = (client(), parapet.url() + path);
    let (mut accepted, mut refused) = (0, 0);
    let mut count_one = |(status, retry_after): (StatusCode, Option<u64>)| match status {
        StatusCode::ACCEPTED => accepted += 1,
        StatusCode::TOO_MANY_REQUESTS => {
            assert!(retry_after.is_some_and(|seconds| seconds > 0));
            refused += 1;
        }
        other => panic!("{path}: {other}"),
    };
    let mut under_way = JoinSet::new();
    for nth in 0..count {
        if under_way.len() == CONCURRENT_REQUESTS {
            count_one(under_way.join_next().await.unwrap().unwrap());
        }
        let (client, url, body) = (client.clone(), url.clone(), body(nth));
        under_way.spawn(async move { post(&client, url, token, body).await });
    }
    under_way.join_all().await.into_iter().for_each(count_one);
    (accepted, refused)
}

/// A registration of 66 kB.
fn large_registration(instance: usize) -> String {
    let strategies: Vec<_> = (0..256).map(|nth| format!("{nth:0>255}")).collect();
    json!({ "appName": "large", "instanceId": instance.to_string(), "interval": 15,
            "started": Timestamp::now(), "strategies": strategies })
    .to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registrations_use_bounded_memory_and_neighbours_are_still_accepted() {
    const COUNT: usize = 1600;
    let flags = flags();
    let parapet = offline(&flags).start().await;
    let one = |nth: usize| large_registration(COUNT + nth);
    assert_eq!(post_many(&parapet, FRONTEND_REGISTER, FRONTEND_TOKEN, 1, one).await, (1, 0));

    // 100 MiB of strategies, which frontend SDKs do not have.
    let before = parapet.proc_status("VmRSS");
    let accepted =
        post_many(&parapet, FRONTEND_REGISTER, FRONTEND_TOKEN, COUNT, large_registration).await;
    assert_eq!(accepted, (COUNT, 0));
    let grown = parapet.proc_status("VmHWM").saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} KiB");

    // The same number from a server SDK, which has them.
    let (accepted, refused) =
        post_many(&parapet, REGISTER, SHOP_TOKEN, COUNT, large_registration).await;
    assert!(accepted > 100 && refused > COUNT / 2, "{accepted} accepted, {refused} refused");
    let grown = parapet.proc_status("VmHWM").saturating_sub(before);
    assert!(grown < 64 * MIB, "{grown} KiB");

    assert_eq!(post_many(&parapet, REGISTER, STOCK_TOKEN, 10, large_registration).await, (10, 0));
    assert_eq!(post_many(&parapet, REGISTER, SHOP_TOKEN, 1, |_| large_registration(0)).await.0, 1);
}

#[tokio::test]
async fn edges_of_one_token_do_not_displace_edges_of_another() {
    let flags = flags();
    let parapet = standalone(&flags).start().await;
    let edge =
        |nth: usize| json!({ "identifier": format!("edge-{nth}"), "traffic": {} }).to_string();
    let (accepted, refused) = post_many(&parapet, EDGE_METRICS, SHOP_TOKEN, 1200, edge).await;
    assert!(accepted > 500 && refused > 0, "{accepted} accepted, {refused} refused");
    // Edges of another token, under names that exist already, and the known ones.
    assert_eq!(post_many(&parapet, EDGE_METRICS, STOCK_TOKEN, 10, edge).await, (10, 0));
    assert_eq!(post_many(&parapet, EDGE_METRICS, SHOP_TOKEN, 10, edge).await, (10, 0));
    let instances = parapet.admin_get("/internal-backstage/instancedata").await.1;
    assert_eq!(instances["connected_instances"].as_array().unwrap().len(), accepted + 10);
}

/// A report by an application about evaluations some time ago: name and count of each flag.
fn usage_report<'a>(
    app: &str,
    ago: SignedDuration,
    counts: impl IntoIterator<Item = (&'a str, u64)>,
) -> String {
    let stop = Timestamp::now() - ago;
    let toggle = |(flag, yes): (&str, u64)| (flag.to_owned(), json!({ "yes": yes, "no": 0 }));
    let toggles: Map<String, Value> = counts.into_iter().map(toggle).collect();
    let bucket =
        json!({ "start": stop - SignedDuration::from_secs(60), "stop": stop, "toggles": toggles });
    json!({ "appName": app, "instanceId": "1", "bucket": bucket }).to_string()
}

/// A report about flags that do not exist, and about some that do.
fn made_up_report(wave: usize, count: usize, known: &[(&str, u64)]) -> String {
    let names: Vec<_> = (0..count).map(|nth| format!("made-up-{wave}-{nth}")).collect();
    let counts = names.iter().map(|name| (name.as_str(), 1)).chain(known.iter().copied());
    usage_report("flood", SignedDuration::ZERO, counts)
}

/// The stored number of `yes` for a flag, from the admin API.
async fn stored_usage(parapet: &Parapet, flag: &str) -> u64 {
    let path = format!("/api/admin/client-metrics/features/{flag}/raw");
    let (_, body) = parapet.admin_get(&path).await;
    let hours = body["data"].as_array().cloned().unwrap_or_default();
    hours.iter().map(|hour| hour["yes"].as_u64().unwrap()).sum()
}

/// The number that a query on a standalone's database returns.
async fn query_count(parapet: &Parapet, query: &str) -> i64 {
    sqlx::any::install_default_drivers();
    let url = format!("sqlite:{}", parapet.data_dir().join("parapet.db").display());
    let mut database = AnyConnection::connect(&url).await.unwrap();
    let query = sqlx::query_scalar(AssertSqlSafe(query.to_owned()));
    query.fetch_one(&mut database).await.unwrap()
}

#[tokio::test]
async fn made_up_flags_of_one_token_do_not_displace_other_tokens_or_existing_flags() {
    const LARGE: usize = 60_000;
    const SMALL: usize = 500;
    let flags = flags();
    let parapet = standalone(&flags).start().await;
    let client = client();
    let post = async |path: &str, token: &str, body: String| {
        post(&client, parapet.url() + path, token, body).await
    };
    let now = SignedDuration::ZERO;
    let accepted = (StatusCode::ACCEPTED, None);
    let refused = (StatusCode::TOO_MANY_REQUESTS, Some(60));

    // Nothing of a rejected report is counted; only reports without a known flag are rejected.
    for wave in 0..2 {
        assert_eq!(
            post(FRONTEND_METRICS, FRONTEND_TOKEN, made_up_report(wave, LARGE, &[])).await,
            refused
        );
    }
    let mut taken = 0;
    while post(FRONTEND_METRICS, FRONTEND_TOKEN, made_up_report(taken, SMALL, &[])).await
        == accepted
    {
        taken += 1;
        assert!(taken < 100);
    }
    assert!(taken >= 2, "{taken}");
    let known = usage_report("web", now, [("web.banner", 7)]);
    assert_eq!(post(FRONTEND_METRICS, FRONTEND_TOKEN, known).await, accepted);
    // A flag that the file does not contain yet is reported together with one that it contains.
    let newer = usage_report("web", now, [("web.banner", 11), ("web.new", 13)]);
    for _ in 0..2 {
        let flood = made_up_report(taken, LARGE, &[("web.banner", 100)]);
        assert_eq!(post(FRONTEND_METRICS, FRONTEND_TOKEN, flood).await, accepted);
        assert_eq!(post(FRONTEND_METRICS, FRONTEND_TOKEN, newer.clone()).await, accepted);
    }
    // Counters that exist already need no additional memory.
    let again = made_up_report(0, SMALL, &[("web.banner", 5)]);
    assert_eq!(post(FRONTEND_METRICS, FRONTEND_TOKEN, again).await, accepted);
    // Usage of another project: one of its flags, and one that is newer than the file.
    let shop = usage_report("shop", now, [("shop.cart", 1000), ("shop.new", 3)]);
    assert_eq!(post(METRICS, SHOP_TOKEN, shop).await, accepted);
    let page = parapet.metrics().await;
    assert!(page.contains(r#"parapet_usage_reports_refused_total{endpoint="metrics"}"#), "{page}");

    assert!(parapet.terminate().await.success());
    parapet.restart();
    parapet.wait_until_ready().await;
    assert_eq!(stored_usage(&parapet, "shop.cart").await, 1000);
    assert_eq!(stored_usage(&parapet, "shop.new").await, 3);
    assert_eq!(stored_usage(&parapet, "web.banner").await, 7 + 5 + 2 * (100 + 11));
    // All acknowledged usage is stored, though some of it under a merged name.
    let made_up = SMALL * (taken + 1) + 2 * LARGE;
    let unknown = query_count(&parapet, "SELECT SUM(yes) FROM flag_usage WHERE known = 0").await;
    assert_eq!(usize::try_from(unknown).unwrap(), made_up + 2 * 13 + 3);
    assert!(stored_usage(&parapet, "parapet-merged").await > 100_000);
    let rows = query_count(&parapet, "SELECT COUNT(*) FROM flag_usage").await;
    assert!(rows < 4000, "{rows}");
}

#[tokio::test]
async fn waves_of_made_up_flags_leave_few_rows_and_all_genuine_usage() {
    const HOURS: i64 = 24;
    const WAVE: usize = 2000;
    let flags = flags();
    let parapet = standalone(&flags).flag("--metrics-interval-seconds", "0.5").start().await;
    let client = client();
    let post = async |path: &str, token: &str, body: String| {
        post(&client, parapet.url() + path, token, body).await.0
    };
    for ago in 0..HOURS {
        let body = usage_report("shop", SignedDuration::from_hours(ago), [("shop.cart", 1)]);
        assert_eq!(post(METRICS, SHOP_TOKEN, body).await, StatusCode::ACCEPTED);
    }
    // Each wave has the hour of the newest genuine usage, and most waves exceed the limit.
    let unknown = "SELECT COUNT(*) FROM flag_usage WHERE known = 0";
    let mut wave = 0;
    wait_until(
        "more made-up flags are stored than the limit",
        Duration::from_mins(2),
        async || {
            let status =
                post(FRONTEND_METRICS, FRONTEND_TOKEN, made_up_report(wave, WAVE, &[])).await;
            assert!(status == StatusCode::ACCEPTED || status == StatusCode::TOO_MANY_REQUESTS);
            wave += 1;
            (query_count(&parapet, unknown).await > 10_000).then_some(())
        },
    )
    .await;
    assert!(parapet.terminate().await.success());
    // Deletion starts at once.
    parapet.restart();
    parapet.wait_until_ready().await;
    wait_until("most made-up flags are forgotten", Duration::from_mins(1), async || {
        (query_count(&parapet, unknown).await <= 10_000).then_some(())
    })
    .await;
    assert_eq!(stored_usage(&parapet, "shop.cart").await, u64::try_from(HOURS).unwrap());
}
