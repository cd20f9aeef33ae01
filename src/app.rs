//! Builds the components of an instance, runs them, and shuts them down in order.
//!
//! A mode determines where flags come from, how tokens are validated and where usage goes. The decision
//! is made here, and no other module depends on the mode. Long-lived tasks are spawned only here and by
//! the listeners; a task that panics is restarted.

mod admin_token_watcher;
mod configured_tokens;
mod edge;
mod edge_sync;
mod file_descriptors;
mod first_start_announcement;
mod mode;
mod offline;
mod persistence;
mod reload;
mod sockets;
mod standalone;
mod store;
mod supervisor;
mod usage_files;

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _};
use jiff::Timestamp;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::{
    admin_token_watcher::AdminTokenWatcher, file_descriptors::RequestedConnections,
    first_start_announcement::ListenerAddress, mode::ModeParts, persistence::Persistence,
    reload::Reloader, sockets::Sockets, supervisor::Supervisor,
};
pub use self::{mode::Error, store::StoreError};
use crate::{
    auth::{self, Authenticator},
    changes::ChangeFeed,
    config::{Config, ConfigErrors, Mode},
    fleet::Topic,
    http::{
        admin::{self, AdminService, DataEndpoint, InstanceIdentity, InstanceStatus, Relay},
        authorizer::Authorizer,
        cors::Cors,
        failed_request_limiter::FailedRequestLimiter,
        health::HealthEndpoints,
        https_redirect::HttpsRedirect,
        ofrep::{StreamTicketKey, StreamTickets},
        request_metrics::RequestMetrics,
        sdk::{SdkService, Settings},
        streaming::Streams,
    },
    protocol::usage::ConnectVia,
    served::Snapshots,
    server::{self, ConnectionLimits, Drain, HttpService},
    telemetry::{self, Readiness},
    tls,
    upstream::Upstream,
    usage::{Shutdown, Usage},
};

/// Interval of the upkeep that the metrics library requires.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A request to the running process.
#[derive(Debug)]
pub enum Signal {
    /// Shut down after the drain delay, so that clients can leave (SIGTERM).
    Terminate,
    /// Shut down without the drain delay (SIGINT).
    Interrupt,
    /// Apply the options of this configuration that can change at run time.
    Reload(Result<Box<Config>, ConfigErrors>),
}

/// An instance that listens and is ready to serve.
#[derive(Debug)]
pub struct App {
    data: BoundListener<SdkService>,
    admin: BoundListener<AdminService>,
    /// Redirects requests without TLS to the TLS port.
    redirect: Option<BoundListener<HttpsRedirect>>,
    drain_delay: Duration,
    shutdown_timeout: Duration,
    readiness: Readiness,
    metrics_handle: PrometheusHandle,
    mode: ModeParts,
    persistence: Persistence,
    reloader: Reloader,
    admin_token_watcher: Option<AdminTokenWatcher>,
}

/// A bound listener and the service behind it.
#[derive(Debug)]
struct BoundListener<S> {
    listener: TcpListener,
    service: Arc<S>,
    config: server::Config,
}

impl<S: HttpService> BoundListener<S> {
    async fn serve(self, drain: Drain, grace: Duration) {
        server::serve(self.listener, self.service, self.config, drain, grace).await;
    }
}

impl App {
    /// Builds all components that `config` requires and binds the listeners; serves nothing yet.
    pub async fn start(config: Config) -> Result<Self, Error> {
        // Fails if a provider is already installed, which also works.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let metrics_handle = telemetry::start_metrics();
        let (readiness, ready_when) = Readiness::new();
        let snapshots = Snapshots::default();
        let Sockets { data: (data, data_address), redirect, admin: (admin, admin_address) } =
            Sockets::bind(&config.data, &config.admin)?;
        let data_tls = config.data.tls.map(tls::TlsAcceptor::new).transpose()?;
        let admin_tls = config.admin.tls.map(tls::TlsAcceptor::new).transpose()?;
        let mut mode = match config.mode {
            Mode::Edge(edge) => {
                edge::build(*edge, &config.auth, &config.usage, &snapshots, ready_when).await?
            }
            Mode::Offline(offline) => offline::build(offline, &snapshots, ready_when).await?,
            Mode::Standalone(standalone) => {
                let addresses = (
                    ListenerAddress { address: data_address, is_tls: data_tls.is_some() },
                    ListenerAddress { address: admin_address, is_tls: admin_tls.is_some() },
                );
                let (base_path, data_dir) = (&config.data.base_path, &config.data_dir);
                let announce = |opened: &_| {
                    first_start_announcement::announce_initial_credentials(
                        opened,
                        addresses,
                        base_path,
                        config.log.format,
                        data_dir,
                    );
                };
                standalone::build(*standalone, &snapshots, ready_when, announce).await?
            }
        };
        let identity = InstanceIdentity {
            mode: mode.name,
            app_name: config.identity.app_name,
            instance_id: config.identity.instance_id,
            hosting: config.identity.hosting,
            region: config.identity.region,
            started: Timestamp::now(),
        };
        let mut limits = config.data.connection_limits;
        let mut streams = config.data.streams;
        let connections = file_descriptors::allocate(RequestedConnections {
            connections: limits.max_connections,
            is_explicit: config.data.has_explicit_max_connections,
        });
        if connections.data < limits.max_connections {
            // Limits scale with the available descriptors; streams leave room for polling clients and
            // probes.
            let share =
                |it: usize| it.saturating_mul(connections.data).div_ceil(limits.max_connections);
            limits.max_connections_per_address = limits.max_connections_per_address.map(share);
            streams.cap_streams(connections.data - connections.data / 4);
        }
        // A new token may wait for validation and then for flags. Both must fit into one request's
        // timeout, so that the response can say which one is missing.
        let deadline = config.auth.deadline.min(config.data.request_timeout / 3);
        let settings = auth::Config { deadline, ..config.auth };
        let auth = Authenticator::new(settings, mode.take_validator(), mode.local_tokens.drain(..));
        let hop = ConnectVia {
            app_name: identity.app_name.as_str().into(),
            instance_id: identity.instance_id.as_str().into(),
        };
        let usage = Usage::new(&config.usage, hop);
        let persistence =
            Persistence::restore(Arc::clone(&mode.store), auth.clone(), usage.clone()).await;
        let request_metrics = Arc::new(RequestMetrics::new(admin::path_templates()));
        let ops = HealthEndpoints::new(
            readiness.clone(),
            metrics_handle.clone(),
            snapshots.clone(),
            usage.clone(),
            Arc::clone(&request_metrics),
            mode.control_plane.clone(),
        );
        let feed = ChangeFeed::new(snapshots.clone());
        let credentials = mode.admin_token.take();
        let admin_token = credentials.as_ref().map(|it| it.token.clone());
        let ticket_key = config.data.stream_ticket_key.unwrap_or_else(|| match &admin_token {
            // All edges of a fleet know this token.
            Some(token) => StreamTicketKey::from_token(&token.current()),
            None => StreamTicketKey::random(),
        });
        let service = SdkService {
            settings: Settings {
                base_path: config.data.base_path,
                cors: Cors::new(config.data.cors),
                access: config.data.access,
                disabled_endpoints: config.data.disabled_endpoints.clone(),
                max_body_bytes: config.data.max_body_bytes,
                request_timeout: config.data.request_timeout,
                hostname: hostname().into(),
            },
            authorizer: Authorizer {
                auth: auth.clone(),
                snapshots: snapshots.clone(),
                token_header: config.data.token_header.clone(),
                first_fetch_timeout: deadline,
            },
            streams: Streams::new(streams, auth.clone()),
            feed,
            stream_tickets: StreamTickets::new(ticket_key),
            usage: usage.clone(),
            health: ops.clone(),
            request_metrics,
            failed_attempts: FailedRequestLimiter::default(),
        };
        info!(
            mode = mode.name,
            data = %data_address,
            admin = %admin_address,
            upstream = mode.upstream.as_ref().map(Upstream::origin),
            version = env!("CARGO_PKG_VERSION"),
            "Parapet listens"
        );
        let service = Arc::new(service);
        let data_endpoint = DataEndpoint {
            bound_address: data_address,
            base_path: service.settings.base_path.clone(),
            is_tls: data_tls.is_some(),
        };
        let upstream = mode.upstream.clone();
        let watcher = credentials.map(|it| AdminTokenWatcher {
            admin: it.token,
            auth: auth.clone(),
            credentials: it.credentials,
            token_added: it.token_added,
            data: Arc::clone(&service),
        });
        let reloadable = mode.reloadable.take().expect("taken only once");
        let reloader =
            Reloader::new(reloadable, auth.clone(), config.settings_digests, config.warnings);
        let tls: Vec<_> = [&data_tls, &admin_tls].into_iter().flatten().cloned().collect();
        let instance = InstanceStatus {
            identity,
            data_endpoint,
            auth,
            snapshots,
            usage,
            upstream,
            fleet: mode.fleet.clone(),
            admin_token,
            ops,
            tls,
        };
        let operators = AdminService {
            instance,
            control_plane: mode.control_plane.clone(),
            relay: mode
                .upstream
                .clone()
                .filter(|_| mode.relays_admin_api)
                .map(|upstream| Relay { upstream }),
            token_header: config.data.token_header,
            disabled_endpoints: config.data.disabled_endpoints,
            is_tls: admin_tls.is_some(),
            sdk: Arc::clone(&service),
        };
        let of = |max_connections| ConnectionLimits { max_connections, ..limits.clone() };
        let redirect = redirect.map(|(listener, _)| BoundListener {
            listener,
            service: Arc::new(HttpsRedirect::to_port(data_address.port())),
            config: server::Config {
                limits: of(connections.admin),
                load_balancers: config.data.load_balancers.clone(),
                tls: None,
            },
        });
        let data = BoundListener {
            listener: data,
            service,
            config: server::Config {
                limits: of(connections.data),
                load_balancers: config.data.load_balancers,
                tls: data_tls,
            },
        };
        let admin = BoundListener {
            listener: admin,
            service: Arc::new(operators),
            config: server::Config {
                limits: of(connections.admin),
                load_balancers: config.admin.load_balancers,
                tls: admin_tls,
            },
        };
        Ok(Self {
            data,
            admin,
            redirect,
            drain_delay: config.shutdown.drain_delay,
            shutdown_timeout: config.shutdown.timeout,
            readiness,
            metrics_handle,
            mode,
            persistence,
            reloader,
            admin_token_watcher: watcher,
        })
    }

    /// The bound addresses of the data listener and the admin listener.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.data.listener.local_addr()?, self.admin.listener.local_addr()?))
    }

    /// Serves until the first signal to terminate, then shuts down in order: readiness first,
    /// connections next, usage last. After a second signal it no longer waits for requests, but still
    /// stores usage.
    ///
    /// If a listener stops, the rest shuts down in the same order and an error is returned.
    pub async fn run(self, signals: impl Stream<Item = Signal>) -> Result<(), Error> {
        let mut signals = pin!(signals);
        let Self {
            data,
            admin,
            redirect,
            drain_delay,
            shutdown_timeout,
            readiness,
            metrics_handle,
            ..
        } = self;
        let Self { mode, persistence, mut reloader, admin_token_watcher: watcher, .. } = self;
        let service = Arc::clone(&data.service);
        let (feed, streams) = (service.feed.clone(), service.streams.clone());
        let tls = [data.config.tls.clone(), admin.config.tls.clone()];
        let (drain, stop_working) = (Drain::default(), CancellationToken::new());
        let force = CancellationToken::new();

        let mut listeners = JoinSet::new();
        listeners.spawn(data.serve(drain.clone(), shutdown_timeout));
        listeners.spawn(admin.serve(drain.clone(), shutdown_timeout));
        if let Some(redirect) = redirect {
            listeners.spawn(redirect.serve(drain.clone(), shutdown_timeout));
        }

        let mut workers = Supervisor::default();
        let writer = mode.flag_source.background_writer();
        mode.flag_source.spawn_updates(&mut workers, &persistence.auth);
        workers.spawn("auth", persistence.auth.clone(), |auth| async move { auth.run().await });
        workers.spawn("feed", feed, |feed| async move { feed.run().await });
        workers.spawn("streams", streams.clone(), |streams| async move {
            streams.close_revoked().await;
        });
        workers.spawn("metrics", metrics_handle, run_metrics_upkeep);
        for server in tls.into_iter().flatten() {
            workers.spawn("tls", server, |server| async move { server.watch_files().await });
        }
        if let Some(watcher) = watcher {
            let run = |watcher: AdminTokenWatcher| async move { watcher.run().await };
            workers.spawn("admin token", watcher, run);
        }

        let fleet = mode.fleet;
        if let Some(fleet) = fleet.clone() {
            workers.spawn("fleet", fleet, |fleet| async move { fleet.run().await });
        }

        if let Some(control) = mode.control_plane {
            if mode.saves_registry_copies {
                let parts = (control.clone(), Arc::clone(&mode.store));
                workers.spawn("registry copy", parts, |(control, store)| async move {
                    standalone::save_registry_copies(&control, &*store).await;
                });
            }
            let parts = (control, persistence.auth.clone());
            workers.spawn("control", parts, |(control, auth)| async move {
                control.run(&auth).await;
            });
        }

        // These tasks return after their final work.
        let mut flushers = Supervisor::default();
        let shutdown = Shutdown {
            requested: stop_working.clone(),
            grace: shutdown_timeout,
            forced: force.clone(),
        };
        let is_flushed = CancellationToken::new();
        if let Some((leader, fleet)) = mode.usage_leader.zip(fleet.clone()) {
            let parts = (leader, fleet, is_flushed.clone(), shutdown.clone());
            flushers.spawn("usage of the fleet", parts, |parts| async move {
                let (leader, fleet, is_flushed, shutdown) = parts;
                leader.run(fleet.join(Topic::Usage), &is_flushed, &shutdown).await;
            });
        }
        let parts = (persistence.usage.clone(), mode.usage_sink, shutdown, is_flushed);
        flushers.spawn("usage", parts, |(usage, sink, shutdown, is_flushed)| async move {
            usage.run(sink.as_deref(), &shutdown).await;
            is_flushed.cancel();
        });
        if let Some(writer) = writer {
            let parts = (writer, stop_working.clone());
            flushers.spawn("saver", parts, |(writer, stop)| async move { writer.run(&stop).await });
        }
        let parts = (persistence.clone(), stop_working.clone());
        flushers.spawn(
            "save",
            parts,
            |(persistence, stop)| async move { persistence.run(&stop).await },
        );

        let (outcome, drain_delay) = loop {
            tokio::select! {
                Some(signal) = signals.next() => match signal {
                    Signal::Reload(loaded) => reloader.apply(loaded, &service),
                    Signal::Terminate => {
                        info!(?drain_delay, "Shutdown requested; readiness withdrawn");
                        break (Ok(()), drain_delay);
                    }
                    Signal::Interrupt => {
                        info!("Shutdown requested by SIGINT; no drain delay");
                        break (Ok(()), Duration::ZERO);
                    }
                },
                _ = listeners.join_next() => {
                    error!("A listener stopped unexpectedly; shutting down");
                    break (Err(Error::ListenerStopped), Duration::ZERO);
                }
            }
        };
        drop(service);
        let mut shutdown = pin!(async {
            readiness.drain();
            drain.begin_draining();
            tokio::select! {
                () = sleep(drain_delay) => {}
                () = force.cancelled() => {}
            }
            drain.begin_closing();
            streams.close_all(shutdown_timeout);
            let served = async { while listeners.join_next().await.is_some() {} };
            tokio::select! {
                () = served => {}
                () = force.cancelled() => {}
            }
            listeners.shutdown().await;
            workers.abort_all().await;
            stop_working.cancel();
            flushers.join_all().await;
            // Usage needs its lease until the end.
            if let Some(fleet) = fleet {
                fleet.leave().await;
            }
            persistence.save_final().await;
        });
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(signal) = signals.next(), if !force.is_cancelled() => match signal {
                    Signal::Reload(_) => info!("Reload ignored: shutdown is in progress"),
                    Signal::Terminate | Signal::Interrupt => {
                        warn!("Second shutdown signal; no longer waiting for requests");
                        force.cancel();
                    }
                }
            }
        }
        info!("Shutdown complete");
        outcome
    }
}

async fn run_metrics_upkeep(metrics: PrometheusHandle) {
    loop {
        sleep(UPKEEP_INTERVAL).await;
        metrics.run_upkeep();
    }
}

/// The hostname; empty if it cannot be determined.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use serde_json::json;

    use super::*;
    use crate::{
        config::{Command, ConfigError},
        protocol::usage::ClientMetrics,
        token::{Environment, Projects, Scope, TokenDigest},
        usage::{ReportingClient, SdkKind},
    };

    #[tokio::test]
    async fn second_shutdown_signal_ends_waiting_and_usage_is_stored() {
        let folder = tempfile::tempdir().expect("folder");
        let data_dir = format!("--data-dir={}", folder.path().display());
        let line = [
            "parapet edge --upstream-url=http://127.0.0.1:1 --port=0 --admin-port=0",
            "--interface=127.0.0.1 --drain-delay-seconds=3600 --shutdown-timeout-seconds=3600",
            &data_dir,
        ];
        let args = line.iter().flat_map(|it| it.split(' ')).map(Into::into);
        let command = Command::parse(args, &|_| None).expect("sound");
        let Command::Run(config) = command else { panic!("{command:?}") };
        let app = App::start(*config).await.expect("starts");

        let scope = Scope { environment: Environment::new("dev"), projects: Projects::All };
        let now = Timestamp::now();
        let bucket = json!({"start": now, "stop": now, "toggles": {"f": {"yes": 7, "no": 0}}});
        let report = json!({"appName": "a", "instanceId": "i", "bucket": bucket}).to_string();
        let report = ClientMetrics::parse(report.as_bytes()).expect("report");
        let token = &TokenDigest::of("token");
        let reporter =
            ReportingClient { token, sdk_kind: SdkKind::Backend, scope: &scope, snapshot: None };
        app.persistence.usage.record_metrics(&reporter, report, now).expect("there is room");

        let mistake =
            ConfigError { location: "PORT".to_owned(), reason: "of no interest".to_owned() };
        let reload = || Signal::Reload(Err(mistake.clone().into()));
        let signals = [reload(), Signal::Terminate, reload(), Signal::Terminate, reload()];
        let signals = stream::iter(signals).chain(stream::pending());
        let end = tokio::time::timeout(Duration::from_mins(1), app.run(signals));
        end.await.expect("shutdown without the drain delay").expect("no error");
        let record = folder.path().join("backup/usage.parapet");
        let record = std::fs::read_to_string(record).expect("usage is stored");
        assert!(record.contains(r#""yes":7"#), "{record}");
    }
}
