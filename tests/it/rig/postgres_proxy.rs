//! A proxy in front of PostgreSQL that can go silent: it stops forwarding a connection and closes
//! neither end, as when a machine loses power or a firewall drops its state. It parses the protocol, to
//! do so at a chosen statement.

use std::collections::{BTreeSet, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::net::{free_port, wait_until};

/// When a connection goes silent: at a statement of its client that contains this text.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SilencePoint {
    /// The server does not receive the statement.
    BeforeStatement(&'static str),
    /// The server receives the statement, but its response is lost.
    AfterStatement(&'static str),
}

/// A running proxy; a cheap handle. It ends with the runtime of the test.
#[derive(Debug, Clone)]
pub(crate) struct PostgresProxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    is_open: watch::Sender<bool>,
    /// Whether the proxy listens at the moment; lags behind `is_open`.
    listens: watch::Sender<bool>,
    armed: Mutex<Option<SilencePoint>>,
    /// The number of connections that have reached a [`SilencePoint`].
    silenced_count: watch::Sender<usize>,
    connections: Mutex<Vec<Arc<ProxiedConnection>>>,
}

/// A proxied connection.
#[derive(Debug)]
struct ProxiedConnection {
    /// The distinct statements of its client.
    statements: Mutex<BTreeSet<String>>,
    is_silent: watch::Sender<bool>,
}

impl PostgresProxy {
    /// Starts a proxy for the server on this loopback port.
    pub(crate) async fn start(upstream: u16) -> Self {
        let shared = Arc::new(Shared {
            upstream: (Ipv4Addr::LOCALHOST, upstream).into(),
            is_open: watch::Sender::new(true),
            listens: watch::Sender::new(false),
            armed: Mutex::default(),
            silenced_count: watch::Sender::new(0),
            connections: Mutex::default(),
        });
        let port = free_port();
        tokio::spawn(Arc::clone(&shared).run(port));
        let proxy = Self { port, shared };
        proxy.wait_until_listens(true).await;
        proxy
    }

    /// Its loopback port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Makes the next connection that reaches `moment` go silent, and only that one.
    pub(crate) fn silence_next_at(&self, moment: SilencePoint) {
        *lock(&self.shared.armed) = Some(moment);
    }

    /// Waits until this many connections have reached a [`SilencePoint`].
    pub(crate) async fn wait_until_silenced(&self, count: usize) {
        let mut caught = self.shared.silenced_count.subscribe();
        let wait = caught.wait_for(|caught| *caught >= count);
        let caught = tokio::time::timeout(Duration::from_secs(150), wait).await;
        caught.expect("no connection went silent in time").expect("the proxy runs");
    }

    /// Makes the open connections go silent whose clients have sent a statement that contains `text`.
    /// New connections work.
    pub(crate) fn silence_connections(&self, text: &str) {
        for line in self.connections_that_sent(text) {
            line.is_silent.send_replace(true);
        }
    }

    /// Waits until this many connections, open or closed, have sent a statement that contains `text`.
    pub(crate) async fn wait_until_statement_seen(&self, text: &str, count: usize) {
        wait_until(
            &format!("{count} connections have sent {text}"),
            Duration::from_secs(10),
            async || (self.connections_that_sent(text).len() >= count).then_some(()),
        )
        .await;
    }

    /// The number of connections, open or closed, that have sent a statement that contains `text`.
    pub(crate) fn connection_count(&self, text: &str) -> usize {
        self.connections_that_sent(text).len()
    }

    /// Breaks all connections and refuses new ones.
    pub(crate) async fn refuse(&self) {
        self.shared.is_open.send_replace(false);
        self.wait_until_listens(false).await;
    }

    /// Accepts new connections again, and clears the armed [`SilencePoint`].
    pub(crate) async fn restore(&self) {
        *lock(&self.shared.armed) = None;
        self.shared.is_open.send_replace(true);
        self.wait_until_listens(true).await;
    }

    fn connections_that_sent(&self, text: &str) -> Vec<Arc<ProxiedConnection>> {
        let has_sent = |line: &&Arc<ProxiedConnection>| {
            text.is_empty()
                || lock(&line.statements).iter().any(|statement| statement.contains(text))
        };
        lock(&self.shared.connections).iter().filter(has_sent).cloned().collect()
    }

    async fn wait_until_listens(&self, expected: bool) {
        let mut listens = self.shared.listens.subscribe();
        listens.wait_for(|listens| *listens == expected).await.expect("the proxy runs");
    }
}

impl Shared {
    async fn run(self: Arc<Self>, port: u16) {
        let mut open = self.is_open.subscribe();
        loop {
            if open.wait_for(|is_open| *is_open).await.is_err() {
                return;
            }
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
            let listener = socket.listen(1024).unwrap();
            self.listens.send_replace(true);
            // Dropping these two closes the port and every connection.
            let mut connections = JoinSet::new();
            tokio::select! {
                _ = open.wait_for(|is_open| !is_open) => {}
                () = self.accept(&listener, &mut connections) => {}
            }
            connections.shutdown().await;
            drop(listener);
            self.listens.send_replace(false);
        }
    }

    async fn accept(self: &Arc<Self>, listener: &TcpListener, connections: &mut JoinSet<()>) {
        loop {
            let Ok((client, _)) = listener.accept().await else { continue };
            let line = Arc::new(ProxiedConnection {
                statements: Mutex::default(),
                is_silent: watch::Sender::new(false),
            });
            lock(&self.connections).push(Arc::clone(&line));
            let shared = Arc::clone(self);
            connections.spawn(async move {
                let Ok(server) = TcpStream::connect(shared.upstream).await else { return };
                // Messages are forwarded one by one, without waiting for the acknowledgement of earlier
                // ones.
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                // If one side closes, so does the other, unless the connection is silent: then both ends
                // stay open.
                tokio::select! {
                    () = shared.forward_client(&line, from_client, to_server) => {}
                    () = forward_server(&line, from_server, to_client) => {}
                }
            });
        }
    }

    /// Forwards the client's messages one by one.
    async fn forward_client(
        &self,
        line: &ProxiedConnection,
        mut client: OwnedReadHalf,
        mut server: OwnedWriteHalf,
    ) {
        /// Requests TLS; the startup message follows.
        const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();
        let mut statements = HashMap::new();
        let mut is_started = false;
        loop {
            let Some(message) = read_message(&mut client, is_started).await else { break };
            is_started = is_started || message[4..8] != SSL_REQUEST;
            if let Some(text) = executed_statement(&message, &mut statements) {
                lock(&line.statements).insert(text.clone());
                match self.take_armed(&text) {
                    Some(SilencePoint::BeforeStatement(_)) => self.mark_silent(line),
                    Some(SilencePoint::AfterStatement(_)) => {
                        line.is_silent.send_replace(true);
                        // An extended statement is run by the messages that follow; forward those that
                        // have arrived.
                        let mut rest = vec![0; 1 << 16];
                        let read = client.try_read(&mut rest).unwrap_or(0);
                        let sent = server.write_all(&[&message, &rest[..read]].concat()).await;
                        sent.expect("the server takes the statement");
                        self.mark_silent(line);
                    }
                    None => {}
                }
            }
            if *line.is_silent.borrow() {
                std::future::pending::<()>().await;
            }
            if server.write_all(&message).await.is_err() {
                break;
            }
        }
        if *line.is_silent.borrow() {
            std::future::pending::<()>().await;
        }
    }

    fn mark_silent(&self, line: &ProxiedConnection) {
        line.is_silent.send_replace(true);
        self.silenced_count.send_modify(|caught| *caught += 1);
    }

    /// Takes the armed [`SilencePoint`] if `text` matches it.
    fn take_armed(&self, text: &str) -> Option<SilencePoint> {
        let mut trap = lock(&self.armed);
        let is_caught = matches!(&*trap, Some(SilencePoint::BeforeStatement(it) | SilencePoint::AfterStatement(it)) if text.contains(it));
        if is_caught { trap.take() } else { None }
    }
}

/// Forwards the server's bytes until the connection goes silent.
async fn forward_server(
    line: &ProxiedConnection,
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
) {
    let mut silence = line.is_silent.subscribe();
    let mut bytes = vec![0; 1 << 16];
    loop {
        let read = tokio::select! {
            biased;
            _ = silence.wait_for(|is_silent| *is_silent) => break,
            read = server.read(&mut bytes) => read,
        };
        match read {
            Ok(read @ 1..) if !*line.is_silent.borrow() => {
                if client.write_all(&bytes[..read]).await.is_err() {
                    break;
                }
            }
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
    }
    if *line.is_silent.borrow() {
        std::future::pending::<()>().await;
    }
}

/// The next message; `None` at the end. The first messages have no type byte.
async fn read_message(client: &mut OwnedReadHalf, is_started: bool) -> Option<Vec<u8>> {
    let mut message = vec![0; if is_started { 5 } else { 4 }];
    client.read_exact(&mut message).await.ok()?;
    let length = message[message.len() - 4..].try_into().unwrap();
    let begin = message.len();
    message.resize(begin + usize::try_from(u32::from_be_bytes(length)).unwrap() - 4, 0);
    client.read_exact(&mut message[begin..]).await.ok()?;
    Some(message)
}

/// The statement that a message executes, if any. Records prepared statements.
fn executed_statement(message: &[u8], prepared: &mut HashMap<Vec<u8>, String>) -> Option<String> {
    let kind = message[0];
    let mut texts = message.get(5..)?.split(|byte| *byte == 0);
    match kind {
        b'Q' => Some(String::from_utf8_lossy(texts.next()?).into_owned()),
        b'P' => {
            let (name, text) = (texts.next()?, texts.next()?);
            prepared.insert(name.to_owned(), String::from_utf8_lossy(text).into_owned());
            None
        }
        b'B' => prepared.get(texts.nth(1)?).cloned(),
        _ => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
