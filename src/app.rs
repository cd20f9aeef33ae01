//! Puts the parts together, runs them, and ends them in order.
//!
//! A mode is a choice of where flags come from, who vouches for tokens and where usage goes; it is
//! made here, and nothing else in the program asks for the mode. Long-lived tasks are spawned here
//! and by the listeners only; one that dies of a panic is started again.

mod banner;
mod edge;
mod plan;

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use metrics::{counter, describe_counter};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use xxhash_rust::xxh3::xxh3_64;

pub use self::plan::Error;
use self::plan::{Plan, Source};
use crate::{
    auth::{Authenticator, Authority},
    config::{Config, Mode, Offline, Standalone},
    control::tokens::{self as registry, Opened, Registry, Seed},
    http::{
        admin::{Admin, Identity},
        cors::Cors,
        data::{Data, Settings},
        listener,
        meter::Meter,
        ops::Ops,
        payload,
    },
    snapshot::Snapshots,
    store::{Key, Store},
    sync::files::Files,
    telemetry::{self, Latch, Readiness},
    token::{Environment, TokenKind},
    usage::{Sink, Usage},
    wire::usage::ConnectVia,
};

/// How often verdicts and waiting usage are stored, where they changed.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// How often the registry of metrics is tidied up, as its library asks for.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// How long a task that panicked waits before it starts again.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// A Parapet that listens and is about to serve.
#[derive(Debug)]
pub struct App {
    data: (TcpListener, Arc<Data>),
    admin: (TcpListener, Arc<Admin>),
    limits: listener::Limits,
    drain_delay: Duration,
    grace: Duration,
    readiness: Readiness,
    registry: PrometheusHandle,
    plan: Plan,
    auth: Authenticator,
    usage: Usage,
    store: Store,
}

impl App {
    /// Builds everything that `config` asks for and binds both listeners; serves nothing yet.
    pub async fn start(config: Config) -> Result<Self, Error> {
        // Fails where a provider has been chosen already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let metrics = telemetry::start_metrics();
        let (readiness, latch) = Readiness::new();
        let snapshots = Snapshots::default();
        let data = bind(config.data.address)?;
        let admin = bind(config.admin.address)?;
        let addresses =
            (address(&data, config.data.address), address(&admin, config.admin.address));
        let ops = Ops::new(readiness.clone(), metrics.clone(), snapshots.clone());
        let mut plan = match config.mode {
            Mode::Edge(edge) => edge::plan(*edge, &config.auth, &snapshots, latch).await?,
            Mode::Offline(offline) => offline_plan(offline, &snapshots, latch).await?,
            Mode::Standalone(standalone) => {
                let base = &config.data.base_path;
                let announce = |generated: &_| banner::announce(generated, addresses, base);
                standalone_plan(standalone, &config.data_dir, &snapshots, latch, announce).await?
            }
        };
        let authority = std::mem::replace(&mut plan.authority, Authority::Nobody);
        let auth = Authenticator::new(config.auth.clone(), authority, plan.given.drain(..));
        let hop = ConnectVia {
            app_name: config.identity.app_name.as_str().into(),
            instance_id: config.identity.instance_id.as_str().into(),
        };
        let usage = Usage::new(&config.usage, hop);
        let store = plan.store.clone();
        restore(&store, &auth, &usage).await;
        let limits = config.data.limits.clone();
        let service = Data {
            settings: Settings {
                base_path: config.data.base_path,
                token_header: config.data.token_header.clone(),
                cors: Cors::new(config.data.cors),
                access: config.data.access,
                disabled: config.data.disabled.clone(),
                payload: payload::Limits { bytes: limits.body_bytes, time: limits.request_timeout },
                patience: config.auth.deadline,
                hostname: hostname(),
            },
            auth: auth.clone(),
            snapshots: snapshots.clone(),
            usage: usage.clone(),
            ops: ops.clone(),
            meter: Meter::default(),
        };
        let operators = Admin {
            identity: Identity {
                mode: plan.name,
                app_name: config.identity.app_name,
                instance_id: config.identity.instance_id,
                hosting: config.identity.hosting,
                region: config.identity.region,
                started: Timestamp::now(),
            },
            token_header: config.data.token_header,
            disabled: config.data.disabled,
            auth: auth.clone(),
            snapshots,
            usage: usage.clone(),
            upstream: plan.upstream.clone(),
            ops,
        };
        info!(
            mode = plan.name,
            data = %addresses.0,
            admin = %addresses.1,
            version = env!("CARGO_PKG_VERSION"),
            "Parapet listens"
        );
        Ok(Self {
            data: (data, Arc::new(service)),
            admin: (admin, Arc::new(operators)),
            limits,
            drain_delay: config.shutdown.drain_delay,
            grace: config.shutdown.timeout,
            readiness,
            registry: metrics,
            plan,
            auth,
            usage,
            store,
        })
    }

    /// Where the data listener and the admin listener were bound.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.data.0.local_addr()?, self.admin.0.local_addr()?))
    }

    /// Serves until `shutdown`, then ends in order: readiness first, connections next, usage last.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { limits, grace, auth, usage, store, readiness, .. } = self;
        let (stop_serving, stop_working) = (CancellationToken::new(), CancellationToken::new());
        let mut listeners = JoinSet::new();
        let serve = listener::serve;
        let (socket, service) = self.data;
        let (for_data, for_admin) = (limits.clone(), limits);
        let stop = stop_serving.clone();
        listeners.spawn(async move { serve(socket, service, &for_data, stop, grace).await });
        let (socket, service) = self.admin;
        let stop = stop_serving.clone();
        listeners
            .spawn(async move { listener::serve(socket, service, &for_admin, stop, grace).await });

        let mut workers = JoinSet::new();
        describe_counter!(
            "parapet_task_restarts_total",
            "Tasks that panicked and were started again"
        );
        match self.plan.source {
            Source::Files(running) => {
                workers.spawn(running.run());
            }
            Source::Upstream(edge) => {
                let auth = auth.clone();
                workers.spawn(async move { edge.run(&auth).await });
            }
        }
        let judge = auth.clone();
        workers.spawn(supervised("auth", move || {
            let auth = judge.clone();
            async move { auth.run().await }
        }));
        let (verdicts, backlog, place) = (auth.clone(), usage.clone(), store.clone());
        workers.spawn(supervised("save", move || {
            keep_saving(verdicts.clone(), backlog.clone(), place.clone())
        }));
        let registry = self.registry;
        workers.spawn(supervised("metrics", move || upkeep(registry.clone())));
        let (sender, stop) = (usage.clone(), stop_working.clone());
        let sink = self.plan.sink;
        let sender = tokio::spawn(async move { sender.run(sink, stop, grace).await });

        shutdown.await;
        info!(drain_delay = ?self.drain_delay, "Parapet is told to end; it is not ready any more");
        readiness.drain();
        sleep(self.drain_delay).await;
        stop_serving.cancel();
        while listeners.join_next().await.is_some() {}
        workers.shutdown().await;
        stop_working.cancel();
        if let Err(error) = sender.await {
            error!(%error, "Sending usage ended early");
        }
        save(&store, &auth, &usage).await;
        info!("Parapet ends");
    }
}

/// Listens on an address. The unspecified IPv6 address means IPv4 too, and stands for the
/// unspecified IPv4 address where the machine has no IPv6.
fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = match listen(address) {
        Err(_) if address.is_ipv6() && address.ip().is_unspecified() => {
            listen(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        bound => bound,
    };
    bound.map_err(|error| Error::Listen(address, error))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    /// Connections that wait to be accepted; more than that many new ones at once are rare.
    const BACKLOG: i32 = 4096;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn address(listener: &TcpListener, wished: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(wished)
}

/// Flags of a file, tokens of the command line.
async fn offline_plan(
    offline: Offline,
    snapshots: &Snapshots,
    latch: Latch,
) -> Result<Plan, Error> {
    let fallback = Environment::new("development");
    let of = |kind, tokens: &[crate::token::Token]| {
        let grant = |token| registry::grant_of(kind, token, &fallback);
        tokens.iter().map(|token| (token.digest(), grant(token))).collect::<Vec<_>>()
    };
    let mut given = of(TokenKind::Client, &offline.client_tokens);
    given.extend(of(TokenKind::Frontend, &offline.frontend_tokens));
    let environments = environments(&given);
    let path = offline.bootstrap_file;
    let files = Files::new(path, environments, snapshots.clone(), offline.reload_interval);
    let source = Source::Files(files.start().await?);
    latch.release();
    Ok(Plan {
        name: "offline",
        source,
        authority: Authority::Nobody,
        given,
        sink: Sink::None,
        upstream: None,
        store: Store::memory(),
    })
}

/// A server of its own.
async fn standalone_plan(
    standalone: Standalone,
    data_dir: &std::path::Path,
    snapshots: &Snapshots,
    latch: Latch,
    announce: impl FnOnce(&registry::Generated),
) -> Result<Plan, Error> {
    let store = Store::directory(data_dir)?;
    let seed = &standalone.seed;
    let given = Seed { admin: &seed.admin, client: &seed.client, frontend: &seed.frontend };
    let (registry, opened) = Registry::open(&store, given).await?;
    let given: Vec<_> = registry.grants().collect();
    let environments = environments(&given);
    let files = Files::new(standalone.flags, environments, snapshots.clone(), None);
    let source = Source::Files(files.start().await?);
    match opened {
        Opened::Existing if !seed.is_empty() => {
            warn!("INIT_*_API_TOKENS are ignored: the registry has tokens already");
        }
        Opened::Existing | Opened::Seeded => {}
        Opened::Generated(generated) => announce(&generated),
    }
    latch.release();
    Ok(Plan {
        name: "standalone",
        source,
        authority: Authority::Nobody,
        given,
        sink: Sink::None,
        upstream: None,
        store,
    })
}

/// The environments that tokens for SDKs name.
fn environments(
    given: &[(crate::token::TokenDigest, crate::token::Grant)],
) -> BTreeSet<Environment> {
    let sdk = given.iter().filter(|(_, grant)| grant.kind != TokenKind::Admin);
    sdk.map(|(_, grant)| grant.scope.environment.clone()).collect()
}

/// Takes over what an earlier process left; what cannot be read is left out.
async fn restore(store: &Store, auth: &Authenticator, usage: &Usage) {
    match store.load(&Key::Verdicts).await {
        Ok(Some(saved)) => match auth.restore(&saved) {
            Ok(count) => info!(count, "Tokens known from an earlier run"),
            Err(error) => warn!(%error, "Stored verdicts on tokens are not used"),
        },
        Ok(None) => {}
        Err(error) => warn!(%error, "Stored verdicts on tokens are not used"),
    }
    match store.load(&Key::Usage).await {
        Ok(Some(saved)) if saved.is_empty() => {}
        Ok(Some(saved)) => match usage.restore(&saved) {
            Ok(()) => info!("Usage of an earlier run waits to be sent"),
            Err(error) => warn!(%error, "Stored usage is lost"),
        },
        Ok(None) => {}
        Err(error) => warn!(%error, "Stored usage is lost"),
    }
}

/// Stores what changes while Parapet runs, so that a crash loses little.
///
/// Usage is stored as long as upstream does not take it, and the record is emptied when it did: a
/// crash within [`SAVE_EVERY`] of that counts twice, a later one does not.
async fn keep_saving(auth: Authenticator, usage: Usage, store: Store) {
    // What an earlier run left was restored, and is the first to be replaced.
    let mut stored = None;
    loop {
        sleep(SAVE_EVERY).await;
        store_verdicts(&auth, &store).await;
        let backlog = usage.backlog().unwrap_or_default();
        let hash = xxh3_64(&backlog);
        if stored != Some(hash) {
            match store.save(&Key::Usage, &backlog).await {
                Ok(()) => stored = Some(hash),
                Err(error) => warn!(%error, "Usage that waits for upstream cannot be stored"),
            }
        }
    }
}

async fn store_verdicts(auth: &Authenticator, store: &Store) {
    let Some(verdicts) = auth.save() else { return };
    if let Err(error) = store.save(&Key::Verdicts, &verdicts).await {
        auth.not_saved();
        warn!(%error, "Verdicts on tokens cannot be stored");
    }
}

async fn save(store: &Store, auth: &Authenticator, usage: &Usage) {
    store_verdicts(auth, store).await;
    // Nothing left is stored too: the next start must not send what has been sent.
    let left = usage.save().unwrap_or_default();
    if let Err(error) = store.save(&Key::Usage, &left).await {
        error!(%error, "Usage that was not sent is lost");
    }
}

async fn upkeep(registry: PrometheusHandle) {
    loop {
        sleep(UPKEEP_EVERY).await;
        registry.run_upkeep();
    }
}

/// Runs a task for as long as the process lives, again after each panic.
async fn supervised<F>(name: &'static str, task: impl Fn() -> F + Send + 'static)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        // Owned by this future, so that aborting it aborts the task.
        let mut running = JoinSet::new();
        running.spawn(task());
        if let Some(Err(panic)) = running.join_next().await {
            error!(task = name, %panic, "A task panicked and is started again");
            counter!("parapet_task_restarts_total", "task" => name).increment(1);
        }
        sleep(RESTART_AFTER).await;
    }
}

/// This machine's name; empty where the system does not tell it.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
