//! Clients that follow streams, thousands of them at the price of a few: one thread, one buffer, and
//! no HTTP library.
//!
//! They read what well-behaved servers on this machine send, and note when. What it means is known by
//! how it begins.

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

/// The longest that anything may take that is waited for.
const PATIENCE: Duration = Duration::from_mins(1);

/// How often it is looked whether that has come; seldom enough to take no processor time that counts.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How many clients may be about to connect at once.
const ARRIVING: usize = 64;

/// What ends each event or comment: a blank line, and the chunk.
const END: &[u8] = b"\n\n\r\n";

thread_local! {
    /// What all clients of a thread read into.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 256 << 10]);
}

/// Clients that follow.
#[derive(Debug)]
pub(crate) struct Audience {
    heard: Arc<Heard>,
    clients: JoinSet<()>,
    // Dropped last.
    runtime: Runtime,
}

/// What was heard, by all clients together.
#[derive(Debug, Default)]
struct Heard {
    hydrations: AtomicU64,
    comments: AtomicU64,
    /// When each frame had arrived since [`Audience::forget`].
    frames: Mutex<Vec<Timestamp>>,
    /// Why clients are gone, with how many there are of each kind.
    gone: Mutex<BTreeMap<String, u64>>,
}

impl Audience {
    /// Nobody yet.
    pub(crate) fn new() -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { heard: Arc::default(), clients: JoinSet::new(), runtime })
    }

    /// Lets `count` clients connect and ask, and waits until each has the whole state.
    pub(crate) fn open(&mut self, count: u64, host: SocketAddr, request: &str) -> Result<()> {
        let room = Arc::new(Semaphore::new(ARRIVING));
        let request: Arc<str> = request.into();
        let before = self.heard.hydrations.load(Ordering::Relaxed);
        for _ in 0..count {
            let (heard, room, request) =
                (Arc::clone(&self.heard), Arc::clone(&room), Arc::clone(&request));
            let client = async move {
                let seat = room.acquire_owned().await.expect("the semaphore is never closed");
                let Err(error) = follow(host, &request, &heard, seat).await;
                *lock(&heard.gone).entry(format!("{error:#}")).or_default() += 1;
            };
            self.clients.spawn_on(client, self.runtime.handle());
        }
        self.wait("not all clients have a stream", |heard| {
            heard.hydrations.load(Ordering::Relaxed) - before >= count
        })
    }

    /// How many comments have come so far.
    pub(crate) fn comments(&self) -> u64 {
        self.heard.comments.load(Ordering::Relaxed)
    }

    /// Waits until there were so many comments.
    pub(crate) fn await_comments(&self, count: u64) -> Result<()> {
        self.wait("there are no comments", |heard| heard.comments.load(Ordering::Relaxed) >= count)
    }

    /// Forgets the frames so far.
    pub(crate) fn forget(&self) {
        lock(&self.heard.frames).clear();
    }

    /// When the frames since [`Audience::forget`] had arrived, the earliest first; waits for so many.
    pub(crate) fn await_frames(&self, count: u64) -> Result<Vec<Timestamp>> {
        let count = usize::try_from(count)?;
        self.wait("not all clients were told", |heard| lock(&heard.frames).len() >= count)?;
        let mut frames = std::mem::take(&mut *lock(&self.heard.frames));
        ensure!(frames.len() == count, "{} frames for {count} clients", frames.len());
        frames.sort();
        Ok(frames)
    }

    /// Lets all clients go.
    pub(crate) fn leave(&mut self) {
        self.runtime.block_on(self.clients.shutdown());
    }

    fn wait(&self, failure: &'static str, is_there: impl Fn(&Heard) -> bool) -> Result<()> {
        let began = Instant::now();
        while !is_there(&self.heard) {
            let gone = lock(&self.heard.gone);
            ensure!(gone.is_empty(), "clients are gone: {gone:?}");
            drop(gone);
            ensure!(began.elapsed() < PATIENCE, failure);
            sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

/// A panic under these locks leaves what can be read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows a stream until that fails; the seat is free again when the whole state has come.
async fn follow(
    host: SocketAddr,
    request: &str,
    heard: &Heard,
    seat: OwnedSemaphorePermit,
) -> Result<std::convert::Infallible> {
    let mut stream = TcpStream::connect(host).await.context("no connection")?;
    stream.write_all(request.as_bytes()).await?;
    let (mut pieces, mut seat) = (Pieces::default(), Some(seat));
    loop {
        let length = poll_fn(|cx| {
            BUFFER.with_borrow_mut(|buffer| {
                let mut buffer = ReadBuf::new(buffer);
                ready!(Pin::new(&mut stream).poll_read(cx, &mut buffer))?;
                let bytes = buffer.filled();
                pieces.read(bytes, |piece| {
                    match Said::of(piece)? {
                        Said::Everything => {
                            seat = None;
                            heard.hydrations.fetch_add(1, Ordering::Relaxed);
                        }
                        Said::Change => lock(&heard.frames).push(Timestamp::now()),
                        Said::Nothing => {
                            heard.comments.fetch_add(1, Ordering::Relaxed);
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

/// What one piece of a stream says.
enum Said {
    Everything,
    Change,
    Nothing,
}

impl Said {
    fn of(piece: &[u8]) -> Result<Self> {
        // The first piece comes after the response's head, others after their chunk's length.
        let start = &piece[..piece.len().min(1000)];
        let begins = |text: &str| memmem::find(start, text.as_bytes()).is_some();
        Ok(match () {
            () if begins("event: unleash-connected\n") => Self::Everything,
            () if begins("event: unleash-updated\n") => Self::Change,
            () if begins("\r\n: ") => Self::Nothing,
            () => bail!("a stream says {:?}", String::from_utf8_lossy(start)),
        })
    }
}

/// Pieces of a stream, put together from what a read brings.
#[derive(Debug, Default)]
struct Pieces {
    /// The beginning of one.
    begun: Vec<u8>,
}

impl Pieces {
    /// Gives the pieces that are whole now to `hear`.
    fn read(&mut self, bytes: &[u8], mut hear: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut begun = std::mem::take(&mut self.begun);
        let mut rest = if begun.is_empty() {
            bytes
        } else {
            begun.extend_from_slice(bytes);
            &begun
        };
        while let Some(at) = memmem::find(rest, END) {
            let (piece, others) = rest.split_at(at + END.len());
            hear(piece)?;
            rest = others;
        }
        self.begun = rest.to_vec();
        Ok(())
    }
}

/// What one client is sent: everything with the response's head, and then the next change, which
/// `cause` brings about.
pub(crate) fn record(
    host: SocketAddr,
    request: &str,
    cause: impl FnOnce() -> Result<()>,
) -> Result<(Vec<u8>, Vec<u8>)> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(host)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut next = || {
        let (mut text, mut bytes) = (Vec::new(), [0; 4096]);
        while !text.ends_with(END) {
            let length = stream.read(&mut bytes)?;
            ensure!(length > 0, "the stream has ended");
            text.extend_from_slice(&bytes[..length]);
        }
        Ok(text)
    };
    let everything = next()?;
    cause()?;
    let change = next()?;
    ensure!(matches!(Said::of(&everything)?, Said::Everything), "a stream begins otherwise");
    ensure!(matches!(Said::of(&change)?, Said::Change), "a stream goes on otherwise");
    Ok((everything, change))
}
