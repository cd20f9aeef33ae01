//! What memory Parapet takes for flags, tokens, connections and contexts, as the system counts it.

use std::{net::TcpStream, time::Duration};

use anyhow::Result;

use super::{
    measure::Session,
    numbers::to_f64,
    process::{self, Process},
    rows::{Ask, FLAGS},
};

const MANY_FLAGS: usize = 10_000;
const MANY_TOKENS: u64 = 100_000;
const MANY_CONNECTIONS: u64 = 10_000;
const MANY_CONTEXTS: f64 = 1e6;

/// Open files that are needed besides connections.
const OTHER_FILES: u64 = 100;

/// One statement.
#[derive(Debug)]
pub(crate) struct Stated {
    pub(crate) what: String,
    pub(crate) bytes: f64,
}

/// Measures all of them, each in a process of its own.
pub(crate) fn run(session: &Session) -> Result<Vec<Stated>> {
    eprintln!("memory");
    let usual = asked(session, FLAGS, 0)?;
    let start = to_f64(usual.resident()?);
    let mut stated =
        vec![Stated { what: format!("{FLAGS} flags, served in every coding"), bytes: start }];

    let few = asked(session, 5, 0)?.resident()?;
    let many = asked(session, MANY_FLAGS, 0)?.resident()?;
    stated.push(Stated {
        what: "each 1,000 flags (of 10,000, served in every coding)".to_owned(),
        bytes: (to_f64(many) - to_f64(few)) / to_f64(MANY_FLAGS as u64 - 5) * 1e3,
    });

    let many = asked(session, FLAGS, MANY_TOKENS)?.resident()?;
    stated.push(Stated { what: "100,000 tokens".to_owned(), bytes: to_f64(many) - start });

    let room = process::room();
    let count = room.saturating_sub(OTHER_FILES).min(MANY_CONNECTIONS);
    let idle = connect(&usual, count)?;
    let (what, each) = ("10,000 idle connections", to_f64(MANY_CONNECTIONS) / to_f64(count));
    let shortage = if count < MANY_CONNECTIONS {
        format!(" (from {count}: {room} files may be open)")
    } else {
        String::new()
    };
    let bytes = (to_f64(usual.resident()?) - start) * each;
    stated.push(Stated { what: format!("{what}{shortage}"), bytes });
    drop(idle);
    drop(usual);

    let process = asked(session, FLAGS, 0)?;
    let before = to_f64(process.resident()?);
    let case = Ask::FrontendNewUser.case(FLAGS);
    let (request, answer) = case.prepare(&process)?;
    let mut contexts = 0.0;
    while contexts < MANY_CONTEXTS {
        let time = Duration::from_secs(5);
        contexts += session.load(&case, &process, &request, &answer, time)?.0.requests;
        eprintln!("  {contexts} contexts");
    }
    let bytes = to_f64(process.resident()?) - before;
    stated.push(Stated { what: "a million distinct contexts, afterwards".to_owned(), bytes });
    Ok(stated)
}

/// A Parapet that has been asked for everything once.
fn asked(session: &Session, flags: usize, tokens: u64) -> Result<Process> {
    let process = session.stable.parapet(flags, tokens)?;
    let codings = [None, Some("gzip"), Some("br"), Some("zstd")].map(Ask::Features);
    for ask in codings.into_iter().chain([Ask::Frontend]) {
        ask.case(flags).prepare(&process)?;
    }
    Ok(process)
}

/// Connections that have been used once and stay open.
fn connect(process: &Process, count: u64) -> Result<Vec<TcpStream>> {
    let case = Ask::FeaturesUnlessKnown.case(FLAGS);
    let (request, _) = case.prepare(process)?;
    let connections = (0..count).map(|_| {
        let stream = TcpStream::connect(process.address)?;
        request.ask_on(&stream, process.address, 0)?;
        Ok(stream)
    });
    connections.collect()
}
