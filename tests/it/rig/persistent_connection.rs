//! A client that keeps its connection alive as long as HTTP allows, and tells apart requests that failed
//! and requests that were never processed.
//!
//! A response with `Connection: close` is the last on its connection, and so are those before a GOAWAY.
//! A request goes over another connection if it was not sent because its connection had ended, or if a
//! GOAWAY excludes it, so that the server has not processed it (RFC 9113, section 6.8).

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::header::CONNECTION;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

type Body = Full<Bytes>;

/// The HTTP version of a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// Its ALPN name.
    pub(crate) fn alpn_name(self) -> &'static str {
        match self {
            Self::Http1 => "http/1.1",
            Self::Http2 => "h2",
        }
    }
}

/// A connection. With HTTP/2, a clone sends requests concurrently over the same connection.
#[derive(Debug)]
pub(crate) enum PersistentConnection {
    Http1 { sender: http1::SendRequest<Body>, is_closed: bool },
    Http2(http2::SendRequest<Body>),
}

/// The outcome of a request.
#[derive(Debug)]
pub(crate) enum SendOutcome {
    Response(StatusCode, Bytes),
    /// It was not sent, or certainly not processed: its connection had ended.
    NotSent,
    /// It may have been sent, and there is no response.
    Failed(String),
}

/// The timeout for a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_mins(1);

impl PersistentConnection {
    /// Connects to `127.0.0.1:<port>`, over TLS if `tls` is given. Errors if nothing listens there.
    pub(crate) async fn connect(
        address: &str,
        protocol: Protocol,
        tls: Option<Arc<ClientConfig>>,
    ) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = tls else { return Self::handshake(stream, protocol).await };
        let name = "localhost".try_into().expect("it is a name");
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, stream).await?;
        Self::handshake(stream, protocol).await
    }

    async fn handshake<I>(io: I, protocol: Protocol) -> std::io::Result<Self>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let io = TokioIo::new(io);
        match protocol {
            Protocol::Http1 => {
                let (sender, connection) =
                    http1::handshake(io).await.map_err(std::io::Error::other)?;
                tokio::spawn(connection);
                Ok(Self::Http1 { sender, is_closed: false })
            }
            Protocol::Http2 => {
                let executor = TokioExecutor::new();
                let (sender, connection) =
                    http2::handshake(executor, io).await.map_err(std::io::Error::other)?;
                tokio::spawn(connection);
                Ok(Self::Http2(sender))
            }
        }
    }

    /// Another client of the same connection, if its protocol allows concurrent requests.
    pub(crate) fn try_clone(&self) -> Option<Self> {
        match self {
            Self::Http1 { .. } => None,
            Self::Http2(sender) => Some(Self::Http2(sender.clone())),
        }
    }

    /// Whether another request can be sent on it, once the pending ones are answered.
    pub(crate) async fn is_usable(&mut self) -> bool {
        match self {
            Self::Http1 { sender, is_closed } => !*is_closed && sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// Sends a request, whose URI is a path, and reads the whole response.
    pub(crate) async fn send(&mut self, mut request: Request<Body>) -> SendOutcome {
        let host = "http://localhost".to_owned();
        let is_http2 = matches!(self, Self::Http2(_));
        if is_http2 {
            let url = host + request.uri().path();
            *request.uri_mut() = url.parse().expect("it is an address");
        } else {
            request.headers_mut().insert("host", "localhost".parse().expect("it is a header"));
        }
        let exchange = async {
            let sent = match self {
                Self::Http1 { sender, .. } => sender.try_send_request(request).await,
                Self::Http2(sender) => sender.try_send_request(request).await,
            };
            let response = match sent {
                Ok(response) => response,
                Err(error) => return classify_send_error(error),
            };
            let closes = response.headers().get(CONNECTION).is_some_and(|it| it == "close");
            if let Self::Http1 { is_closed, .. } = self {
                *is_closed |= closes;
            }
            let status = response.status();
            match response.into_body().collect().await {
                Ok(body) => SendOutcome::Response(status, body.to_bytes()),
                Err(error) => SendOutcome::Failed(format!("after its head: {error:?}")),
            }
        };
        match tokio::time::timeout(RESPONSE_TIMEOUT, exchange).await {
            Ok(outcome) => outcome,
            Err(_) => SendOutcome::Failed("it took too long".to_owned()),
        }
    }
}

fn classify_send_error(mut error: TrySendError<Request<Body>>) -> SendOutcome {
    if error.take_message().is_some() {
        return SendOutcome::NotSent;
    }
    let error = error.into_error();
    let by_protocol = error.source().and_then(|it| it.downcast_ref::<h2::Error>());
    let is_excluded = by_protocol.is_some_and(|error| {
        error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
    });
    if is_excluded { SendOutcome::NotSent } else { SendOutcome::Failed(format!("{error:?}")) }
}
