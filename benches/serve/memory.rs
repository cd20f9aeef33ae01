//! Parapet's resident memory for flags, tokens, connections and contexts.

use std::{net::TcpStream, time::Duration};

use super::{
    bare, connect,
    contender::Server,
    exchange::Request,
    load::Over,
    measure::Session,
    numbers::to_f64,
    process,
    rows::{Ask, FLAGS},
};
use anyhow::Result;

const MANY_FLAGS: usize = 10_000;
const MANY_TOKENS: u64 = 100_000;
const MANY_CONNECTIONS: u64 = 10_000;
const MANY_CONTEXTS: f64 = 1e6;

/// The goal for an idle connection without TLS, in bytes.
const IDLE_GOAL: f64 = 14.0 * 1024.0;

/// Open files in addition to connections.
const OTHER_FILES: u64 = 100;

/// One measurement.
#[derive(Debug)]
pub(crate) struct Stated {
    pub(crate) what: String,
    pub(crate) bytes: f64,
    /// The baseline's memory for the same.
    pub(crate) bare: Option<f64>,
    pub(crate) goal: Option<f64>,
}

impl Stated {
    fn of(what: &str, bytes: f64) -> Self {
        Self { what: what.to_owned(), bytes, bare: None, goal: None }
    }
}

/// Runs all measurements, each in its own process.
pub(crate) fn run(session: &Session) -> Result<Vec<Stated>> {
    eprintln!("memory");
    let start = to_f64(asked(session, FLAGS, 0, Over::Tcp)?.process.resident()?);
    let what = format!("{FLAGS} flags, served in every coding");
    let mut stated = vec![Stated::of(&what, start)];

    let few = asked(session, 5, 0, Over::Tcp)?.process.resident()?;
    let many = asked(session, MANY_FLAGS, 0, Over::Tcp)?.process.resident()?;
    let each = (to_f64(many) - to_f64(few)) / to_f64(MANY_FLAGS as u64 - 5);
    stated.push(Stated::of("each 1,000 flags (of 10,000, served in every coding)", each * 1e3));

    let many = asked(session, FLAGS, MANY_TOKENS, Over::Tcp)?.process.resident()?;
    stated.push(Stated::of("100,000 tokens", to_f64(many) - start));

    let room = process::fd_limit();
    let count = room.saturating_sub(OTHER_FILES).min(MANY_CONNECTIONS);
    let shortage = if count < MANY_CONNECTIONS {
        format!(" ({room} files may be open)")
    } else {
        String::new()
    };
    for (over, name, goal) in [(Over::Tcp, "", Some(IDLE_GOAL)), (Over::Tls, " over TLS", None)] {
        let parapet = asked(session, FLAGS, 0, over)?;
        let case = Ask::FeaturesUnlessKnown.case(FLAGS);
        let (request, answer) = case.prepare(&parapet)?;
        let bytes = idle(&parapet, over, &request, count)?;
        let file = session.stable.folder().join("answer");
        bare::record(&answer, &file)?;
        let bare = Some(idle(&session.stable.bare(&file, over)?, over, &request, count)?);
        let what = format!("each of {count} idle connections{name}{shortage}");
        stated.push(Stated { what, bytes, bare, goal });
    }

    let server = asked(session, FLAGS, 0, Over::Tcp)?;
    let before = to_f64(server.process.resident()?);
    let case = Ask::FrontendNewUser.case(FLAGS);
    let (request, answer) = case.prepare(&server)?;
    let mut contexts = 0.0;
    while contexts < MANY_CONTEXTS {
        let (first, time) = (session.draw(), Duration::from_secs(5));
        contexts += session.load(&case, first, &server, (&request, &answer), time)?.0.requests;
        eprintln!("  {contexts} contexts");
    }
    let bytes = to_f64(server.process.resident()?) - before;
    stated.push(Stated::of("a million distinct contexts, afterwards", bytes));
    Ok(stated)
}

/// A Parapet that has served every kind of response once.
fn asked(session: &Session, flags: usize, tokens: u64, over: Over) -> Result<Server> {
    let server = session.stable.parapet(flags, tokens, over)?;
    let codings = [None, Some("gzip"), Some("br"), Some("zstd")].map(Ask::Features);
    for ask in codings.into_iter().chain([Ask::Frontend]) {
        ask.case(flags).prepare(&server)?;
    }
    Ok(server)
}

/// The memory of each of `count` connections that were used once and stay open.
fn idle(server: &Server, over: Over, request: &Request, count: u64) -> Result<f64> {
    let host = server.process.address;
    let before = server.process.settled_resident()?;
    let (mut plain, mut encrypted) = (Vec::new(), Vec::new());
    for number in 0..count {
        if over.is_encrypted() {
            let mut stream = connect::open(host)?;
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
