//! One request and its answer, byte by byte: what a contender is asked, and what it says.
//!
//! No HTTP client stands between, so that a baseline can repeat an answer exactly. It reads what
//! well-behaved servers on this machine send, and nothing more.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// What stands for a number that is drawn for each request.
pub(crate) const DRAWN: &str = "{n}";

/// What stands for a number that no two requests have in common.
pub(crate) const EACH: &str = "{each}";

/// What stands for the remainder of that number by [`BYTES`]: a part of an address.
pub(crate) const BYTE: &str = "{byte}";
pub(crate) const BYTES: u64 = 250;

/// How long a contender may take for one answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A GET, in which [`DRAWN`], [`EACH`] and [`BYTE`] may occur.
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

    /// As it goes over the wire, with what stands for numbers.
    pub(crate) fn text(&self, host: SocketAddr) -> String {
        let mut text = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n", self.path);
        for (name, value) in &self.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        text + "\r\n"
    }

    /// What comes back when `n` is drawn.
    pub(crate) fn ask(&self, host: SocketAddr, n: u64) -> Result<Answer> {
        let mut stream = TcpStream::connect(host).context("no connection")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        self.ask_on(&mut stream, host, n)
    }

    /// The same, on a connection that there is.
    pub(crate) fn ask_on(
        &self,
        stream: &mut (impl Read + Write),
        host: SocketAddr,
        n: u64,
    ) -> Result<Answer> {
        stream.write_all(numbered(&self.text(host), n).as_bytes())?;
        Answer::read(&mut BufReader::new(stream)).with_context(|| format!("asking {}", self.path))
    }
}

/// The text with `n` in the place of what stands for numbers.
pub(crate) fn numbered(text: &str, n: u64) -> String {
    let (number, byte) = (n.to_string(), (n % BYTES).to_string());
    text.replace(DRAWN, &number).replace(EACH, &number).replace(BYTE, &byte)
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// Bytes of all of it on the wire.
    pub(crate) length: usize,
}

impl Answer {
    fn read(stream: &mut impl BufRead) -> Result<Self> {
        let mut length = 0;
        let mut line = || -> Result<String> {
            let mut line = String::new();
            length += stream.read_line(&mut line)?;
            if line.is_empty() {
                bail!("the connection ended inside an answer");
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
            bail!("an answer without a length");
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

    /// The value of a header, if it is there.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(it, _)| it == name).map(|(_, value)| value.as_str())
    }
}
