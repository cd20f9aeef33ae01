//! The physical yardstick: a server that writes the same bytes to every connection when told.
//!
//! As lean as tokio allows: a task for each connection, which waits for a number to change. No HTTP
//! is read, there is no token, no timer, no limit. It runs as a process of its own, which is this
//! executable called as `streams bare`; each line on its input is a change.

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

use super::server::CHANGED;

/// Serves what the two files hold: what is said first, and at each change.
pub(crate) fn serve(first: &Path, then: &Path, port: u16) -> Result<()> {
    let (first, then) = (Bytes::from(std::fs::read(first)?), Bytes::from(std::fs::read(then)?));
    let changes = watch::Sender::new(0_u64);
    let told = changes.clone();
    std::thread::spawn(move || {
        for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
            println!("{} {CHANGED}", Timestamp::now());
            told.send_modify(|count| *count += 1);
        }
        // Whoever started this has gone.
        std::process::exit(0);
    });
    tokio::runtime::Builder::new_multi_thread().enable_io().build()?.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            // A client that leaves is none of the baseline's business.
            tokio::spawn(tell(stream, first.clone(), then.clone(), changes.subscribe()));
        }
    })
}

async fn tell(
    mut stream: TcpStream,
    first: Bytes,
    then: Bytes,
    mut changes: watch::Receiver<u64>,
) -> Result<()> {
    // Whatever it asks for; the request fits into one read.
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
