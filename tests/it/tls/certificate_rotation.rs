//! Certificates are replaced under load: no request fails, and the last one is presented.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use reqwest::{StatusCode, Version, tls::TlsInfo};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::certificate_authority::{CertificateFiles, IssuedCertificate, TestAuthority};
use super::{CLIENT, FEATURES, TIMEOUT, TlsParapet, offline};
use crate::rig::{LogEvent, wait_until};

/// The number of replacements.
const REPLACEMENTS: u32 = 10;

/// The names of the certificates in plain files, and of those in mounted ones.
const CERTIFICATE_NAMES: [&[&str]; 2] = [&["localhost", "127.0.0.1"], &["mounted.test"]];

/// A Kubernetes secret as it is mounted: `tls.crt` and `tls.key` are links through `..data`, which is a
/// link to a directory that is replaced by another one.
struct MountedSecret {
    folder: PathBuf,
    swaps: u32,
}

impl MountedSecret {
    fn new(folder: PathBuf, issued: &IssuedCertificate) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let mut mount = Self { folder, swaps: 0 };
        mount.replace(issued);
        for name in ["tls.crt", "tls.key"] {
            let link = mount.folder.join(name);
            std::os::unix::fs::symlink(format!("..data/{name}"), link).unwrap();
        }
        mount
    }

    fn replace(&mut self, issued: &IssuedCertificate) {
        self.swaps += 1;
        let name = format!("..2026_{}", self.swaps);
        let contents = self.folder.join(&name);
        std::fs::create_dir(&contents).unwrap();
        std::fs::write(contents.join("tls.crt"), &issued.certificate).unwrap();
        std::fs::write(contents.join("tls.key"), &issued.key).unwrap();
        let [new, data] = ["..data_tmp", "..data"].map(|link| self.folder.join(link));
        let before = std::fs::read_link(&data);
        std::os::unix::fs::symlink(name, &new).unwrap();
        std::fs::rename(new, data).unwrap();
        if let Ok(before) = before {
            std::fs::remove_dir_all(self.folder.join(before)).unwrap();
        }
    }

    fn files(&self) -> CertificateFiles {
        CertificateFiles {
            certificate: self.folder.join("tls.crt"),
            key: self.folder.join("tls.key"),
        }
    }
}

/// Sends requests until stopped. Returns the failures, and the certificate of the last response.
async fn send_requests(
    client: reqwest::Client,
    url: String,
    version: Version,
    stops: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
) -> (Vec<String>, Vec<u8>) {
    let (mut failures, mut certificate) = (Vec::new(), Vec::new());
    let mut ticks = interval(Duration::from_millis(5));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stops.load(Ordering::Relaxed) {
        ticks.tick().await;
        let exchange = async {
            let response = client.get(&url).header("authorization", CLIENT).send().await?;
            let seen = (response.status(), response.version());
            if let Some(info) = response.extensions().get::<TlsInfo>() {
                certificate = info.peer_certificate().unwrap_or_default().to_vec();
            }
            response.bytes().await?;
            Ok::<_, reqwest::Error>(seen)
        };
        match exchange.await {
            Ok(seen) if seen == (StatusCode::OK, version) => {
                answered.fetch_add(1, Ordering::Relaxed);
            }
            other => failures.push(format!("{url}: {other:?}")),
        }
    }
    (failures, certificate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_replaced_under_load_without_a_failed_request() {
    let authority = TestAuthority::new();
    let issue = || CERTIFICATE_NAMES.map(|names| authority.server(names));
    let first = issue();
    let mut mount = MountedSecret::new(authority.path("mounted"), &first[1]);
    let files = [first[0].write_files(&authority, "tls"), mount.files()];
    let parapet = TlsParapet::start(offline(&authority, &files)).await;

    let (stops, mut load, mut kept) =
        (Arc::new(AtomicBool::new(false)), JoinSet::new(), JoinSet::new());
    let mut answered = Vec::new();
    for (index, name) in ["localhost", "mounted.test"].into_iter().enumerate() {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            let client = || {
                let client = authority.http_client().resolve(name, parapet.address).tls_info(true);
                // Without retries, so that every failure is visible.
                let client = client.retry(reqwest::retry::never());
                if version == Version::HTTP_11 { client.http1_only() } else { client }
            };
            let url = format!("https://{name}:{}{FEATURES}", parapet.address.port());
            let counts: [Arc<AtomicU64>; 2] = Default::default();
            let start_client = |client: reqwest::ClientBuilder, count: usize| {
                let client = client.build().unwrap();
                let answered = Arc::clone(&counts[count]);
                send_requests(client, url.clone(), version, Arc::clone(&stops), answered)
            };
            load.spawn(start_client(client(), 0));
            let kept_alive = start_client(client().pool_max_idle_per_host(1), 1);
            kept.spawn(async move { (index, kept_alive.await) });
            answered.extend(counts);
        }
    }

    let mut last = first.each_ref().map(|issued| issued.der().clone());
    let reloads = |outcome: &str| {
        format!("parapet_tls_reloads_total{{listener=\"data\",outcome=\"{outcome}\"}}")
    };
    for round in 1..=REPLACEMENTS {
        if round == REPLACEMENTS / 2 {
            // The key of another certificate.
            authority.write("tls.key", authority.server(CERTIFICATE_NAMES[0]).key);
            parapet.wait_for_metric(&reloads("refused"), 1).await;
            let event = LogEvent::warn("tls::watch").with("error");
            let line = parapet.parapet.wait_until_logged(event).await;
            assert!(line.contains("does not belong to"), "{line}");
            assert_eq!(parapet.presented_certificate(&authority, "localhost").await, last[0]);
        }
        let new = issue();
        new[0].write_files(&authority, "tls");
        mount.replace(&new[1]);
        last = new.each_ref().map(|issued| issued.der().clone());
        wait_until(&format!("certificates of round {round} are presented"), TIMEOUT, async || {
            for (name, expected) in ["localhost", "mounted.test"].into_iter().zip(&last) {
                if parapet.presented_certificate(&authority, name).await != *expected {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }
    let counted =
        [parapet.metric(&reloads("applied")).await, parapet.metric(&reloads("refused")).await];
    stops.store(true, Ordering::Relaxed);

    let mut failures = Vec::new();
    while let Some(ended) = load.join_next().await {
        failures.extend(ended.unwrap().0);
    }
    while let Some(ended) = kept.join_next().await {
        let (index, (failed, certificate)) = ended.unwrap();
        failures.extend(failed);
        // The connection from the start is still in use.
        assert_eq!(certificate, first[index].der().as_ref(), "a connection was lost");
    }
    assert_eq!(failures, [""; 0]);
    let answered: Vec<_> = answered.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    assert!(answered.iter().all(|&count| count >= u64::from(REPLACEMENTS)), "{answered:?}");
    assert_eq!(counted, [u64::from(REPLACEMENTS), 1]);
    for (name, expected) in ["localhost", "mounted.test"].into_iter().zip(&last) {
        assert_eq!(parapet.presented_certificate(&authority, name).await, *expected, "{name}");
    }
}
