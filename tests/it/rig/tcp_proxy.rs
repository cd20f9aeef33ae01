//! A proxy for any protocol over TCP that can cut all connections.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::net::free_port;

/// A running proxy. It ends with the runtime of the test.
#[derive(Debug)]
pub(crate) struct TcpProxy {
    port: u16,
    is_open: watch::Sender<bool>,
    /// Whether the proxy listens at the moment; lags behind `is_open`.
    listens: watch::Receiver<bool>,
}

impl TcpProxy {
    /// Starts a proxy for the server on this loopback port.
    pub(crate) async fn start(upstream: u16) -> Self {
        let port = free_port();
        let (is_open, mut open) = watch::channel(true);
        let (listens_sender, listens) = watch::channel(false);
        tokio::spawn(async move {
            while open.wait_for(|is_open| *is_open).await.is_ok() {
                let socket = TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
                let listener = socket.listen(1024).unwrap();
                listens_sender.send_replace(true);
                let mut connections = JoinSet::new();
                tokio::select! {
                    _ = open.wait_for(|is_open| !is_open) => {}
                    () = forward(&listener, (Ipv4Addr::LOCALHOST, upstream).into(), &mut connections) => {}
                }
                connections.shutdown().await;
                drop(listener);
                listens_sender.send_replace(false);
            }
        });
        let proxy = Self { port, is_open, listens };
        proxy.open().await;
        proxy
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Breaks all connections and refuses new ones.
    pub(crate) async fn close(&self) {
        self.set_open(false).await;
    }

    /// Accepts new connections again.
    pub(crate) async fn open(&self) {
        self.set_open(true).await;
    }

    async fn set_open(&self, is_open: bool) {
        self.is_open.send_replace(is_open);
        let mut listens = self.listens.clone();
        listens.wait_for(|listens| *listens == is_open).await.expect("the proxy runs");
    }
}

async fn forward(listener: &TcpListener, upstream: SocketAddr, connections: &mut JoinSet<()>) {
    loop {
        let Ok((mut client, _)) = listener.accept().await else { continue };
        connections.spawn(async move {
            let Ok(mut server) = TcpStream::connect(upstream).await else { return };
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
    }
}
