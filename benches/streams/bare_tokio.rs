//! The baseline: a server that writes the same bytes to every connection when triggered.
//!
//! As minimal as tokio allows: a task for each connection, which waits for a number to change. It parses
//! no HTTP, and has no tokens, timers or limits. It runs in its own process: this executable with the
//! subcommand `bare`; each line on its input triggers a change.

use std::{
    io::BufRead,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::Result;
use bytes::Bytes;
use jiff::Timestamp;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::server_under_test::CHANGE_LOG_TEXT;

/// Serves the contents of two files: the first response, and each change.
pub(crate) fn serve(first: &Path, then: &Path, port: u16) -> Result<()> {
    let (first, then) = (Bytes::from(std::fs::read(first)?), Bytes::from(std::fs::read(then)?));
    let changes = watch::Sender::new(0_u64);
    let trigger = changes.clone();
    std::thread::spawn(move || {
        for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
            println!("{} {CHANGE_LOG_TEXT}", Timestamp::now());
            trigger.send_modify(|count| *count += 1);
        }
        // The process that started this one has exited.
        std::process::exit(0);
    });
    tokio::runtime::Builder::new_multi_thread().enable_io().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            // Errors of clients that disconnect are ignored.
            tokio::spawn(serve_stream(stream, first.clone(), then.clone(), changes.subscribe()));
        }
    })
}

async fn serve_stream(
    mut stream: TcpStream,
    first: Bytes,
    then: Bytes,
    mut changes: watch::Receiver<u64>,
) -> Result<()> {
    // The request is ignored; it fits into one read.
    if stream.read(&mut [0; 1024]).await? == 0 {
        return Ok(());
    }
    stream.write_all(&first).await?;
    drop(first);
    let mut ignored = [0; 16];
    loop {
        tokio::select! {
            changed = changes.changed() => changed?,
            read = stream.read(&mut ignored) => if read? == 0 {
                return Ok(());
            },
        }
        stream.write_all(&then).await?;
    }
}
