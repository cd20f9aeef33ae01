//! One request and its response as raw bytes.
//!
//! There is no HTTP client in between, so that a baseline can repeat a response exactly. It supports
//! only what well-behaved servers on this machine send.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// The placeholder for a number that is chosen for each request.
pub(crate) const NUMBER: &str = "{n}";

/// The placeholder for a number that no two requests share.
pub(crate) const UNIQUE_NUMBER: &str = "{each}";

/// The placeholder for the remainder of that number by [`OCTETS`]: the last part of an address.
pub(crate) const OCTET: &str = "{byte}";
pub(crate) const OCTETS: u64 = 250;

/// The timeout for one response.
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// A GET that may contain [`NUMBER`], [`UNIQUE_NUMBER`] and [`OCTET`].
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn get(path: &str) -> Self {
        Self { path: path.to_owned(), headers: Vec::new() }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The request on the wire, with placeholders.
    pub(crate) fn text(&self, host: SocketAddr) -> String {
        let mut text = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", self.path);
        for (name, value) in &self.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        text + "\r\n"
    }

    /// Sends it on a new connection, with `n` as its number, and returns the response.
    pub(crate) fn send(&self, host: SocketAddr, n: u64) -> Result<RawResponse> {
        let mut stream = TcpStream::connect(host).context("no connection")?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        self.send_on(&mut stream, host, n)
    }

    /// Sends it on an open connection.
    pub(crate) fn send_on(
        &self,
        stream: &mut (impl Read + Write),
        host: SocketAddr,
        n: u64,
    ) -> Result<RawResponse> {
        stream.write_all(with_number(&self.text(host), n).as_bytes())?;
        RawResponse::read(&mut BufReader::new(stream))
            .with_context(|| format!("request for {}", self.path))
    }
}

/// Replaces the placeholders by `n`.
pub(crate) fn with_number(text: &str, n: u64) -> String {
    let (number, byte) = (n.to_string(), (n % OCTETS).to_string());
    text.replace(NUMBER, &number).replace(UNIQUE_NUMBER, &number).replace(OCTET, &byte)
}

/// A response, read to its end.
#[derive(Clone, Debug)]
pub(crate) struct RawResponse {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Its size on the wire, in bytes.
    pub(crate) length: usize,
}

impl RawResponse {
    fn read(stream: &mut impl BufRead) -> Result<Self> {
        let mut length = 0;
        let mut line = || -> Result<String> {
            let mut line = String::new();
            length += stream.read_line(&mut line)?;
            if line.is_empty() {
                bail!("the connection ended inside a response");
            }
            Ok(line.trim_end().to_owned())
        };
        let status = line()?;
        let status = status.split(' ').nth(1).and_then(|it| it.parse().ok());
        let status = status.context("no status line")?;
        let mut headers = Vec::new();
        loop {
            let line = line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut answer = Self { status, headers, body: Vec::new(), length };
        if status == 304 || status == 204 {
            return Ok(answer);
        }
        if let Some(size) = answer.header("content-length") {
            answer.body = vec![0; size.parse().context("content-length")?];
            stream.read_exact(&mut answer.body)?;
            answer.length += answer.body.len();
            return Ok(answer);
        }
        if answer.header("transfer-encoding") != Some("chunked") {
            bail!("a response without a length");
        }
        loop {
            let mut line = String::new();
            answer.length += stream.read_line(&mut line)?;
            let size = usize::from_str_radix(line.trim(), 16).context("the size of a chunk")?;
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk)?;
            answer.length += chunk.len();
            answer.body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return Ok(answer);
            }
        }
    }

    /// The value of a header, if it exists.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(it, _)| it == name).map(|(_, value)| value.as_str())
    }
}
