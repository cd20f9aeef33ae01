//! HTTP/2 clients that do not read their responses.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::client::{Connection, ResponseFuture, SendRequest};
use hyper::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A connection whose client may stop reading.
#[derive(Debug)]
struct StallableStream {
    stream: TcpStream,
    is_reading: bool,
}

/// How a client stalls.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum StallMode {
    /// It reads heads and pings, but its window allows no byte of a body.
    ZeroWindow,
    /// Its window allows everything, but it never reads from its connection.
    NoReads,
}

/// The requests of one connection, which stay open until this is dropped.
#[derive(Debug)]
pub(crate) struct StalledClient {
    connection: JoinHandle<()>,
    /// The pending responses.
    pub(crate) responses: Vec<ResponseFuture>,
}

impl StalledClient {
    /// Sends a GET for each path at once, even beyond the number of streams that the server allows.
    pub(crate) async fn send(
        address: &str,
        how: StallMode,
        token: &str,
        paths: impl IntoIterator<Item = String>,
    ) -> Self {
        /// More than any test sends.
        const STREAMS: usize = 10_000;
        let stream = TcpStream::connect(address).await.unwrap();
        let wire = StallableStream { stream, is_reading: how == StallMode::ZeroWindow };
        let window = if how == StallMode::ZeroWindow { 0 } else { (1 << 31) - 1 };
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).initial_max_send_streams(STREAMS);
        let built = builder.handshake::<_, Bytes>(wire).await;
        let (mut sender, connection): (SendRequest<Bytes>, Connection<StallableStream, Bytes>) =
            built.unwrap();
        let requests = paths.into_iter().map(|path| {
            let request = Request::get(format!("http://{address}{path}"));
            request.header("authorization", token).body(()).unwrap()
        });
        // Sent before the connection runs, so that the server's limits arrive too late.
        let responses = requests.map(|it| sender.send_request(it, true).unwrap().0).collect();
        let connection = tokio::spawn(async move {
            let _ = connection.await;
            drop(sender);
        });
        Self { connection, responses }
    }
}

impl Drop for StalledClient {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl AsyncRead for StallableStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_reading {
            Pin::new(&mut self.stream).poll_read(cx, buffer)
        } else {
            Poll::Pending
        }
    }
}

impl AsyncWrite for StallableStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
