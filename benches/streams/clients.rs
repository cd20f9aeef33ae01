//! Thousands of streaming clients at little cost: one thread, one buffer, and no HTTP library.
//!
//! They support only what well-behaved servers on this machine send, and record the time of each event.
//! The kind of an event follows from its beginning.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Poll, ready},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use memchr::memmem;
use tokio::{
    io::{AsyncRead, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
    runtime::Runtime,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

/// The timeout for anything that is waited for.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The interval of polling while waiting: rare enough to use no relevant processor time.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The number of clients that may be connecting at a time.
const MAX_CONNECTING: usize = 64;

/// The end of each event or comment: a blank line, and the end of the chunk.
const EVENT_END: &[u8] = b"\n\n\r\n";

thread_local! {
    /// The read buffer of all clients of a thread.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 << 10]);
}

/// A set of streaming clients.
#[derive(Debug)]
pub(crate) struct StreamClients {
    received: Arc<Received>,
    clients: JoinSet<()>,
    // Dropped last.
    runtime: Runtime,
}

/// The events that all clients together have received.
#[derive(Debug, Default)]
struct Received {
    hydrations: AtomicU64,
    comments: AtomicU64,
    /// The arrival time of each update since [`StreamClients::clear_updates`].
    update_times: Mutex<Vec<Timestamp>>,
    /// Why clients have ended, with the number of clients for each reason.
    failures: Mutex<BTreeMap<String, u64>>,
}

impl StreamClients {
    /// Without clients.
    pub(crate) fn new() -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { received: Arc::default(), clients: JoinSet::new(), runtime })
    }

    /// Connects `count` clients, and waits until each has received the hydration event.
    pub(crate) fn connect(&mut self, count: u64, host: SocketAddr, request: &str) -> Result<()> {
        let room = Arc::new(Semaphore::new(MAX_CONNECTING));
        let request: Arc<str> = request.into();
        let before = self.received.hydrations.load(Ordering::Relaxed);
        for _ in 0..count {
            let (received, room, request) =
                (Arc::clone(&self.received), Arc::clone(&room), Arc::clone(&request));
            let client = async move {
                let permit = room.acquire_owned().await.expect("the semaphore is never closed");
                let Err(error) = read_stream(host, &request, &received, permit).await;
                *lock(&received.failures).entry(format!("{error:#}")).or_default() += 1;
            };
            self.clients.spawn_on(client, self.runtime.handle());
        }
        self.wait("not all clients have a stream", |received| {
            received.hydrations.load(Ordering::Relaxed) - before >= count
        })
    }

    /// The number of comments so far.
    pub(crate) fn comments(&self) -> u64 {
        self.received.comments.load(Ordering::Relaxed)
    }

    /// Waits until there have been this many comments.
    pub(crate) fn wait_for_comments(&self, count: u64) -> Result<()> {
        self.wait("there are no comments", |received| {
            received.comments.load(Ordering::Relaxed) >= count
        })
    }

    /// Forgets the updates so far.
    pub(crate) fn clear_updates(&self) {
        lock(&self.received.update_times).clear();
    }

    /// The arrival times of updates since [`StreamClients::clear_updates`], earliest first; waits for
    /// this many.
    pub(crate) fn wait_for_updates(&self, count: u64) -> Result<Vec<Timestamp>> {
        let count = usize::try_from(count)?;
        self.wait("not all clients got the update", |received| {
            lock(&received.update_times).len() >= count
        })?;
        let mut frames = std::mem::take(&mut *lock(&self.received.update_times));
        ensure!(frames.len() == count, "{} frames for {count} clients", frames.len());
        frames.sort();
        Ok(frames)
    }

    /// Disconnects all clients.
    pub(crate) fn disconnect(&mut self) {
        self.runtime.block_on(self.clients.shutdown());
    }

    fn wait(&self, failure: &'static str, is_there: impl Fn(&Received) -> bool) -> Result<()> {
        let began = Instant::now();
        while !is_there(&self.received) {
            let gone = lock(&self.received.failures);
            ensure!(gone.is_empty(), "clients have ended: {gone:?}");
            drop(gone);
            ensure!(began.elapsed() < TIMEOUT, failure);
            sleep(POLL_INTERVAL);
        }
        Ok(())
    }
}

/// A panic under these locks leaves valid data.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a stream until it fails. Releases the permit when the hydration event has arrived.
async fn read_stream(
    host: SocketAddr,
    request: &str,
    received: &Received,
    permit: OwnedSemaphorePermit,
) -> Result<std::convert::Infallible> {
    let mut stream = TcpStream::connect(host).await.context("no connection")?;
    stream.write_all(request.as_bytes()).await?;
    let (mut pieces, mut permit) = (EventSplitter::default(), Some(permit));
    loop {
        let length = poll_fn(|cx| {
            BUFFER.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                ready!(Pin::new(&mut stream).poll_read(cx, &mut buffer))?;
                let bytes = buffer.filled();
                pieces.push(bytes, |piece| {
                    match EventKind::parse(piece)? {
                        EventKind::Hydration => {
                            permit = None;
                            received.hydrations.fetch_add(1, Ordering::Relaxed);
                        }
                        EventKind::Update => lock(&received.update_times).push(Timestamp::now()),
                        EventKind::Comment => {
                            received.comments.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Ok(())
                })?;
                Poll::Ready(Ok::<_, anyhow::Error>(bytes.len()))
            })
        });
        ensure!(length.await? > 0, "the stream has ended");
    }
}

/// The kind of an event.
enum EventKind {
    Hydration,
    Update,
    Comment,
}

impl EventKind {
    fn parse(piece: &[u8]) -> Result<Self> {
        // The first event follows the response's head, the others the length of their chunk.
        let start = &piece[..piece.len().min(1000)];
        let begins = |text: &str| memmem::find(start, text.as_bytes()).is_some();
        Ok(match () {
            () if begins("event: unleash-connected\n") => Self::Hydration,
            () if begins("event: unleash-updated\n") => Self::Update,
            () if begins("\r\n: ") => Self::Comment,
            () => bail!("unexpected event in a stream: {:?}", String::from_utf8_lossy(start)),
        })
    }
}

/// Splits what is read into whole events.
#[derive(Debug, Default)]
struct EventSplitter {
    /// The beginning of an incomplete event.
    partial: Vec<u8>,
}

impl EventSplitter {
    /// Passes each event that is complete now to `handle`.
    fn push(&mut self, bytes: &[u8], mut handle: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut begun = std::mem::take(&mut self.partial);
        let mut rest = if begun.is_empty() {
            bytes
        } else {
            begun.extend_from_slice(bytes);
            &begun
        };
        while let Some(at) = memmem::find(rest, EVENT_END) {
            let (piece, others) = rest.split_at(at + EVENT_END.len());
            handle(piece)?;
            rest = others;
        }
        self.partial = rest.to_vec();
        Ok(())
    }
}

/// The events that one client receives: the hydration with the response's head, and then the update
/// after `cause` has changed a flag.
pub(crate) fn record_events(
    host: SocketAddr,
    request: &str,
    cause: impl FnOnce() -> Result<()>,
) -> Result<(Vec<u8>, Vec<u8>)> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(host)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut next = || {
        let (mut text, mut bytes) = (Vec::new(), [0; 4096]);
        while !text.ends_with(EVENT_END) {
            let length = stream.read(&mut bytes)?;
            ensure!(length > 0, "the stream has ended");
            text.extend_from_slice(&bytes[..length]);
        }
        Ok(text)
    };
    let everything = next()?;
    cause()?;
    let change = next()?;
    ensure!(
        matches!(EventKind::parse(&everything)?, EventKind::Hydration),
        "the first event is not a hydration"
    );
    ensure!(
        matches!(EventKind::parse(&change)?, EventKind::Update),
        "the second event is not an update"
    );
    Ok((everything, change))
}
