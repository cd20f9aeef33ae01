//! Parapet's resident memory for flags, tokens, connections and contexts.

use std::{net::TcpStream, time::Duration};

use super::{
    bare_hyper,
    contender::Server,
    exchange::Request,
    handshake_load,
    load::Transport,
    measure::Session,
    numbers::to_f64,
    sdk_requests::{FLAGS, RequestKind},
    server_process,
};
use anyhow::Result;

const MANY_FLAGS: usize = 10_000;
const MANY_TOKENS: u64 = 100_000;
const MANY_CONNECTIONS: u64 = 10_000;
const MANY_CONTEXTS: f64 = 1e6;

/// The goal for an idle connection without TLS, in bytes.
const IDLE_CONNECTION_GOAL: f64 = 14.0 * 1024.0;

/// Open files in addition to connections.
const RESERVED_FILES: u64 = 100;

/// One measurement.
#[derive(Debug)]
pub(crate) struct MemoryMeasurement {
    pub(crate) subject: String,
    pub(crate) bytes: f64,
    /// The baseline's memory for the same.
    pub(crate) bare: Option<f64>,
    pub(crate) goal: Option<f64>,
}

impl MemoryMeasurement {
    fn new(what: &str, bytes: f64) -> Self {
        Self { subject: what.to_owned(), bytes, bare: None, goal: None }
    }
}

/// Runs all measurements, each in its own process.
pub(crate) fn run(session: &Session) -> Result<Vec<MemoryMeasurement>> {
    eprintln!("memory");
    let start = to_f64(warmed_up_server(session, FLAGS, 0, Transport::Tcp)?.process.resident()?);
    let what = format!("{FLAGS} flags, served in every coding");
    let mut stated = vec![MemoryMeasurement::new(&what, start)];

    let few = warmed_up_server(session, 5, 0, Transport::Tcp)?.process.resident()?;
    let many = warmed_up_server(session, MANY_FLAGS, 0, Transport::Tcp)?.process.resident()?;
    let each = (to_f64(many) - to_f64(few)) / to_f64(MANY_FLAGS as u64 - 5);
    stated.push(MemoryMeasurement::new(
        "each 1,000 flags (of 10,000, served in every coding)",
        each * 1e3,
    ));

    let many = warmed_up_server(session, FLAGS, MANY_TOKENS, Transport::Tcp)?.process.resident()?;
    stated.push(MemoryMeasurement::new("100,000 tokens", to_f64(many) - start));

    let room = server_process::fd_limit();
    let count = room.saturating_sub(RESERVED_FILES).min(MANY_CONNECTIONS);
    let shortage = if count < MANY_CONNECTIONS {
        format!(" ({room} files may be open)")
    } else {
        String::new()
    };
    for (over, name, goal) in
        [(Transport::Tcp, "", Some(IDLE_CONNECTION_GOAL)), (Transport::Tls, " over TLS", None)]
    {
        let parapet = warmed_up_server(session, FLAGS, 0, over)?;
        let case = RequestKind::FeaturesNotModified.case(FLAGS);
        let (request, answer) = case.prepare(&parapet)?;
        let bytes = idle_connection_bytes(&parapet, over, &request, count)?;
        let file = session.contenders.folder().join("answer");
        bare_hyper::write_response(&answer, &file)?;
        let bare = Some(idle_connection_bytes(
            &session.contenders.bare(&file, over)?,
            over,
            &request,
            count,
        )?);
        let subject = format!("each of {count} idle connections{name}{shortage}");
        stated.push(MemoryMeasurement { subject, bytes, bare, goal });
    }

    let server = warmed_up_server(session, FLAGS, 0, Transport::Tcp)?;
    let before = to_f64(server.process.resident()?);
    let case = RequestKind::FrontendNewUser.case(FLAGS);
    let (request, answer) = case.prepare(&server)?;
    let mut contexts = 0.0;
    while contexts < MANY_CONTEXTS {
        let (first, time) = (session.reserve_numbers(), Duration::from_secs(5));
        contexts += session.load(&case, first, &server, (&request, &answer), time)?.0.requests;
        eprintln!("  {contexts} contexts");
    }
    let bytes = to_f64(server.process.resident()?) - before;
    stated.push(MemoryMeasurement::new("a million distinct contexts, afterwards", bytes));
    Ok(stated)
}

/// A Parapet that has served every kind of response once.
fn warmed_up_server(
    session: &Session,
    flags: usize,
    tokens: u64,
    over: Transport,
) -> Result<Server> {
    let server = session.contenders.parapet(flags, tokens, over)?;
    let codings = [None, Some("gzip"), Some("br"), Some("zstd")].map(RequestKind::Features);
    for ask in codings.into_iter().chain([RequestKind::Frontend]) {
        ask.case(flags).prepare(&server)?;
    }
    Ok(server)
}

/// The memory of each of `count` connections that were used once and stay open.
fn idle_connection_bytes(
    server: &Server,
    over: Transport,
    request: &Request,
    count: u64,
) -> Result<f64> {
    let host = server.process.address;
    let before = server.process.settled_resident()?;
    let (mut plain, mut encrypted) = (Vec::new(), Vec::new());
    for number in 0..count {
        if over.is_encrypted() {
            let mut stream = handshake_load::connect_tls(host)?;
            request.send_on(&mut stream, host, number)?;
            encrypted.push(stream);
        } else {
            let mut stream = TcpStream::connect(host)?;
            request.send_on(&mut stream, host, number)?;
            plain.push(stream);
        }
    }
    let bytes = to_f64(server.process.settled_resident()?) - to_f64(before);
    eprintln!("  {:.0} bytes an idle connection", bytes / to_f64(count));
    drop((plain, encrypted));
    Ok(bytes / to_f64(count))
}
