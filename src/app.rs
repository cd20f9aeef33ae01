//! Puts the parts together, runs them, and ends them in order.
//!
//! A mode is a choice of where flags come from, who vouches for tokens and where usage goes; it is
//! made here, and nothing else in the program asks for the mode. Long-lived tasks are spawned here
//! and by the listeners only; one that dies of a panic is started again.

mod admin_token;
mod alone;
mod banner;
mod descriptors;
mod edge;
mod keep;
mod listen;
mod plan;
mod reload;
mod spools;
mod tasks;

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _};
use jiff::Timestamp;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use self::plan::Error;
use self::{
    admin_token::Rotation, banner::Bound, descriptors::Wanted, keep::Keeper, listen::Sockets,
    plan::Plan, reload::Reload, tasks::Tasks,
};
use crate::{
    auth::{self, Authenticator},
    config::{Config, Mistakes, Mode},
    feed::Feed,
    http::{
        admin::{self, Admin, Door, Identity, Insight, Relay},
        cors::Cors,
        data::{Data, Settings},
        guesses::Guesses,
        listener::{self, Drain, Limits, Service},
        meter::Meter,
        ofrep::{TicketKey, Tickets},
        ops::Ops,
        redirect::Redirect,
        streaming::Streams,
    },
    snapshot::Snapshots,
    telemetry::{self, Readiness},
    tls,
    upstream::Upstream,
    usage::{Ending, Usage},
    wire::usage::ConnectVia,
};

/// How often the registry of metrics is tidied up, as its library asks for.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// What the process is told to do while it runs.
#[derive(Debug)]
pub enum Signal {
    /// To end, once clients have had the time to leave (SIGTERM).
    Terminate,
    /// To end without that (SIGINT).
    Interrupt,
    /// To apply this configuration as far as a running instance can.
    Reload(Result<Box<Config>, Mistakes>),
}

/// A Parapet that listens and is about to serve.
#[derive(Debug)]
pub struct App {
    data: Listening<Data>,
    admin: Listening<Admin>,
    /// Sends those who come without TLS to where it is spoken.
    redirect: Option<Listening<Redirect>>,
    drain_delay: Duration,
    grace: Duration,
    readiness: Readiness,
    registry: PrometheusHandle,
    plan: Plan,
    keeper: Keeper,
    reload: Reload,
    rotation: Option<Rotation>,
}

/// A listener that is bound, and what it is to serve.
#[derive(Debug)]
struct Listening<S> {
    listener: TcpListener,
    service: Arc<S>,
    config: listener::Config,
}

impl<S: Service> Listening<S> {
    async fn serve(self, drain: Drain, grace: Duration) {
        listener::serve(self.listener, self.service, self.config, drain, grace).await;
    }
}

impl App {
    /// Builds everything that `config` asks for and binds both listeners; serves nothing yet.
    pub async fn start(config: Config) -> Result<Self, Error> {
        // Fails where a provider has been chosen already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = telemetry::start_metrics();
        let (readiness, latch) = Readiness::new();
        let snapshots = Snapshots::default();
        let Sockets { data: (data, data_address), redirect, admin: (admin, admin_address) } =
            Sockets::bind(&config.data, &config.admin)?;
        let data_tls = config.data.tls.map(tls::Server::new).transpose()?;
        let admin_tls = config.admin.tls.map(tls::Server::new).transpose()?;
        let mut plan = match config.mode {
            Mode::Edge(edge) => edge::plan(*edge, &config.auth, &snapshots, latch).await?,
            Mode::Offline(offline) => alone::offline(offline, &snapshots, latch).await?,
            Mode::Standalone(standalone) => {
                let addresses = (
                    Bound { address: data_address, is_tls: data_tls.is_some() },
                    Bound { address: admin_address, is_tls: admin_tls.is_some() },
                );
                let (base, data_dir) = (&config.data.base_path, &config.data_dir);
                let announce = |opened: &_| {
                    banner::announce(opened, addresses, base, config.log.format, data_dir);
                };
                alone::standalone(standalone, data_dir, &snapshots, latch, announce).await?
            }
        };
        let identity = Identity {
            mode: plan.name,
            app_name: config.identity.app_name,
            instance_id: config.identity.instance_id,
            hosting: config.identity.hosting,
            region: config.identity.region,
            started: Timestamp::now(),
        };
        let mut limits = config.data.limits;
        let mut streams = config.data.streams;
        let connections = descriptors::divide(Wanted {
            connections: limits.connections,
            is_said: config.data.are_connections_given,
        });
        if connections.data < limits.connections {
            // Shares are of what there is; streams leave room for those who poll, and for probes.
            let share =
                |it: usize| it.saturating_mul(connections.data).div_ceil(limits.connections);
            limits.connections_per_address = limits.connections_per_address.map(share);
            streams.limit(connections.data - connections.data / 4);
        }
        // A first-seen token may wait for its verdict and then for flags; both fit into the time of
        // one request, so that the answer tells what is missing.
        let deadline = config.auth.deadline.min(config.data.request_timeout / 3);
        let settings = auth::Config { deadline, ..config.auth };
        let auth = Authenticator::new(settings, plan.take_authority(), plan.given.drain(..));
        let hop = ConnectVia {
            app_name: identity.app_name.as_str().into(),
            instance_id: identity.instance_id.as_str().into(),
        };
        let usage = Usage::new(&config.usage, hop);
        let keeper = Keeper::restore(plan.store.clone(), auth.clone(), usage.clone()).await;
        let meter = Arc::new(Meter::new(admin::templates()));
        let ops = Ops::new(
            readiness.clone(),
            registry.clone(),
            snapshots.clone(),
            usage.clone(),
            Arc::clone(&meter),
            plan.control.as_ref().map(|(control, _)| control.clone()),
        );
        let feed = Feed::new(snapshots.clone());
        let credentials = plan.admin.take();
        let admin_token = credentials.as_ref().map(|it| it.token.clone());
        let ticket_key = config.data.ticket_key.unwrap_or_else(|| match &admin_token {
            // All edges of a fleet know it.
            Some(token) => TicketKey::of(&token.current()),
            None => TicketKey::random(),
        });
        let service = Data {
            settings: Settings {
                base_path: config.data.base_path,
                token_header: config.data.token_header.clone(),
                cors: Cors::new(config.data.cors),
                access: config.data.access,
                disabled: config.data.disabled.clone(),
                body_bytes: config.data.body_bytes,
                request_timeout: config.data.request_timeout,
                patience: deadline,
                hostname: hostname().into(),
            },
            auth: auth.clone(),
            snapshots: snapshots.clone(),
            streams: Streams::new(streams, auth.clone()),
            feed,
            tickets: Tickets::new(ticket_key),
            usage: usage.clone(),
            ops: ops.clone(),
            meter,
            guesses: Guesses::default(),
        };
        info!(
            mode = plan.name,
            data = %data_address,
            admin = %admin_address,
            upstream = plan.upstream.as_ref().map(Upstream::origin),
            version = env!("CARGO_PKG_VERSION"),
            "Parapet listens"
        );
        let service = Arc::new(service);
        let door = Door {
            address: data_address,
            base_path: service.settings.base_path.clone(),
            is_tls: data_tls.is_some(),
        };
        let upstream = plan.upstream.clone();
        let rotation = credentials.map(|it| Rotation {
            admin: it.token,
            auth: auth.clone(),
            credentials: it.credentials,
            discovered: it.discovered,
            data: Arc::clone(&service),
        });
        let live = plan.live.take().expect("it is taken once");
        let reload = Reload::new(live, auth.clone(), config.effective, config.warnings);
        let tls: Vec<_> = [&data_tls, &admin_tls].into_iter().flatten().cloned().collect();
        let insight =
            Insight { identity, door, auth, snapshots, usage, upstream, admin_token, ops, tls };
        let operators = Admin {
            insight,
            control: plan.control.as_ref().map(|(control, _)| control.clone()),
            relay: plan.upstream.clone().filter(|_| plan.relays).map(|upstream| Relay { upstream }),
            token_header: config.data.token_header,
            disabled: config.data.disabled,
            is_tls: admin_tls.is_some(),
            data: Arc::clone(&service),
        };
        let of = |connections| Limits { connections, ..limits.clone() };
        let redirect = redirect.map(|(listener, _)| Listening {
            listener,
            service: Arc::new(Redirect::to_port(data_address.port())),
            config: listener::Config {
                limits: of(connections.admin),
                balancers: config.data.balancers.clone(),
                tls: None,
            },
        });
        let data = Listening {
            listener: data,
            service,
            config: listener::Config {
                limits: of(connections.data),
                balancers: config.data.balancers,
                tls: data_tls,
            },
        };
        let admin = Listening {
            listener: admin,
            service: Arc::new(operators),
            config: listener::Config {
                limits: of(connections.admin),
                balancers: config.admin.balancers,
                tls: admin_tls,
            },
        };
        Ok(Self {
            data,
            admin,
            redirect,
            drain_delay: config.shutdown.drain_delay,
            grace: config.shutdown.timeout,
            readiness,
            registry,
            plan,
            keeper,
            reload,
            rotation,
        })
    }

    /// Where the data listener and the admin listener were bound.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.data.listener.local_addr()?, self.admin.listener.local_addr()?))
    }

    /// Serves until the first of `signals` to terminate, then ends in order: readiness first,
    /// connections next, usage last. At the second it waits for nobody any more, but still stores usage.
    ///
    /// A listener that dies ends the rest in the same order, and is an error.
    pub async fn run(self, signals: impl Stream<Item = Signal>) -> Result<(), Error> {
        let mut signals = pin!(signals);
        let Self { data, admin, redirect, drain_delay, grace, readiness, registry, .. } = self;
        let Self { plan, keeper, mut reload, rotation, .. } = self;
        let service = Arc::clone(&data.service);
        let (feed, streams) = (service.feed.clone(), service.streams.clone());
        let tls = [data.config.tls.clone(), admin.config.tls.clone()];
        let (drain, stop_working) = (Drain::default(), CancellationToken::new());
        let hurry = CancellationToken::new();

        let mut listeners = JoinSet::new();
        listeners.spawn(data.serve(drain.clone(), grace));
        listeners.spawn(admin.serve(drain.clone(), grace));
        if let Some(redirect) = redirect {
            listeners.spawn(redirect.serve(drain.clone(), grace));
        }

        let mut workers = Tasks::default();
        let saver = plan.source.saver();
        plan.source.spawn(&mut workers, &keeper.auth);
        workers.spawn("auth", keeper.auth.clone(), |auth| async move { auth.run().await });
        workers.spawn("feed", feed, |feed| async move { feed.run().await });
        workers.spawn("streams", streams.clone(), |streams| async move { streams.run().await });
        workers.spawn("metrics", registry, upkeep);
        for server in tls.into_iter().flatten() {
            workers.spawn("tls", server, |server| async move { server.run().await });
        }
        if let Some(rotation) = rotation {
            let follow = |rotation: Rotation| async move { rotation.run().await };
            workers.spawn("admin token", rotation, follow);
        }

        // Outlives all who deliver to it, and is not waited for when they have ended: a database may
        // never answer.
        let mut registry_keeper = Tasks::default();
        if let Some((control, deliveries)) = plan.control {
            if plan.copies_registry {
                let parts = (control.clone(), plan.store.clone());
                workers.spawn("registry copy", parts, |(control, store)| async move {
                    alone::keep_copy(&control, &store).await;
                });
            }
            let parts = (control.clone(), keeper.auth.clone());
            workers.spawn("control", parts, |(control, auth)| async move {
                control.run(&auth).await;
            });
            let parts = (control, service.snapshots.clone(), deliveries);
            registry_keeper.spawn(
                "registry",
                parts,
                |(control, snapshots, deliveries)| async move {
                    control.run_usage(&snapshots, &mut *deliveries.lock().await).await;
                },
            );
        }

        // These end by themselves, when they have done the last of their work.
        let mut closers = Tasks::default();
        let ending = Ending { begins: stop_working.clone(), grace, hurries: hurry.clone() };
        let parts = (keeper.usage.clone(), plan.sink, ending);
        closers.spawn("usage", parts, |(usage, sink, ending)| async move {
            usage.run(sink, ending).await;
        });
        if let Some(saver) = saver {
            let parts = (saver, stop_working.clone());
            closers.spawn("saver", parts, |(saver, stop)| async move { saver.run(&stop).await });
        }
        let parts = (keeper.clone(), stop_working.clone());
        closers.spawn("save", parts, |(keeper, stop)| async move { keeper.run(&stop).await });

        let (outcome, drain_delay) = loop {
            tokio::select! {
                Some(signal) = signals.next() => match signal {
                    Signal::Reload(loaded) => reload.apply(loaded, &service),
                    Signal::Terminate => {
                        info!(?drain_delay, "Parapet is told to end; it is not ready any more");
                        break (Ok(()), drain_delay);
                    }
                    Signal::Interrupt => {
                        info!("Parapet is interrupted and ends");
                        break (Ok(()), Duration::ZERO);
                    }
                },
                _ = listeners.join_next() => {
                    error!("A listener ended on its own, and Parapet ends");
                    break (Err(Error::Listener), Duration::ZERO);
                }
            }
        };
        drop(service);
        let mut end = pin!(async {
            readiness.drain();
            drain.begin();
            tokio::select! {
                () = sleep(drain_delay) => {}
                () = hurry.cancelled() => {}
            }
            drain.close();
            streams.end(grace);
            let served = async { while listeners.join_next().await.is_some() {} };
            tokio::select! {
                () = served => {}
                () = hurry.cancelled() => {}
            }
            listeners.shutdown().await;
            workers.end().await;
            stop_working.cancel();
            closers.join().await;
            registry_keeper.end().await;
            keeper.finish().await;
        });
        loop {
            tokio::select! {
                () = &mut end => break,
                Some(signal) = signals.next(), if !hurry.is_cancelled() => match signal {
                    Signal::Reload(_) => info!("Parapet is about to end and reloads nothing"),
                    Signal::Terminate | Signal::Interrupt => {
                        warn!("Parapet is told to end once more, and waits for nobody");
                        hurry.cancel();
                    }
                }
            }
        }
        info!("Parapet ends");
        outcome
    }
}

async fn upkeep(registry: PrometheusHandle) {
    loop {
        sleep(UPKEEP_EVERY).await;
        registry.run_upkeep();
    }
}

/// This machine's name; empty where the system does not tell it.
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
        config::{Command, Mistake},
        token::{Environment, Projects, Scope, TokenDigest},
        usage::{Reporter, SdkKind},
        wire::usage::ClientMetrics,
    };

    #[tokio::test]
    async fn told_to_end_twice_it_waits_for_nobody_and_keeps_what_was_counted() {
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
        let reporter = Reporter { token, kind: SdkKind::Backend, scope: &scope, snapshot: None };
        app.keeper.usage.record_metrics(&reporter, report, now).expect("there is room");

        let mistake = Mistake { place: "PORT".to_owned(), reason: "of no interest".to_owned() };
        let reload = || Signal::Reload(Err(mistake.clone().into()));
        let signals = [reload(), Signal::Terminate, reload(), Signal::Terminate, reload()];
        let signals = stream::iter(signals).chain(stream::pending());
        let end = tokio::time::timeout(Duration::from_mins(1), app.run(signals));
        end.await.expect("it does not wait for an hour").expect("no error");
        let record = folder.path().join("backup/usage.parapet");
        let record = std::fs::read_to_string(record).expect("usage is stored");
        assert!(record.contains(r#""yes":7"#), "{record}");
    }
}
