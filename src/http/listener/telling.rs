//! Tells a stream on a connection of its own, without buffers.
//!
//! The next piece is asked for when the last is sent, so that a client which reads slowly holds one
//! piece and nothing else. What clients send is of no interest, and that they leave is noticed. Neither
//! the clock is watched here nor the sign to stop: whose stream this is ends it, also while a piece is
//! not sent; then the connection ends without the rest.

use std::{
    future::Future,
    io::{self, IoSlice, Write as _},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{gather, handover::Framing};
use crate::http::reply::Live;

/// How long a client may take nothing of what it is sent.
const PATIENCE: Duration = Duration::from_mins(1);

/// The most that a chunk begins with: 16 digits, and the end of the line.
const HEAD: usize = 18;

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// A stream that is told on `io`.
pub(super) struct Telling<I> {
    io: I,
    live: Live,
    framing: Framing,
    /// What is being sent.
    piece: Option<Piece>,
    is_last: bool,
    /// Since when nothing of what is to be sent was taken.
    stalled: Option<Stalled>,
}

/// At which byte of a piece sending stopped, and since when.
#[derive(Clone, Copy)]
struct Stalled {
    sent: usize,
    since: Instant,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Telling<I> {
    /// Tells what `live` does, after a head that was sent.
    pub(super) fn new(io: I, live: Live, framing: Framing) -> Self {
        Self { io, live, framing, piece: None, is_last: false, stalled: None }
    }

    /// Ready when the client has left.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ignored = [0; 64];
            let mut ignored = ReadBuf::new(&mut ignored);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut ignored))?;
            if ignored.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Ready when everything is told, or will not be.
    fn poll_told(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let Poll::Ready(sent) = self.poll_sent(cx) else { return self.poll_given_up(cx) };
            sent?;
            (self.piece, self.stalled) = (None, None);
            if self.is_last {
                return Poll::Ready(Ok(()));
            }
            let bytes = ready!(self.live.as_mut().poll_next(cx));
            self.is_last = bytes.is_none();
            self.piece = match (bytes, self.framing) {
                (Some(bytes), Framing::Chunked) => Piece::chunk(bytes),
                (Some(bytes), Framing::Plain) => Some(Piece::plain(bytes)),
                (None, Framing::Chunked) => Some(Piece::plain(Bytes::from_static(LAST_CHUNK))),
                (None, Framing::Plain) => None,
            };
        }
    }

    /// Ready when what there is to send is sent.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(piece) = &mut self.piece {
            ready!(piece.poll_send(Pin::new(&mut self.io), cx))?;
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        }
        if self.is_last { Pin::new(&mut self.io).poll_shutdown(cx) } else { Poll::Ready(Ok(())) }
    }

    /// Ready when nobody waits any longer for the client to take what it is sent.
    fn poll_given_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = self.piece.as_ref().map_or(0, |piece| piece.sent);
        let stalled = self.stalled.filter(|it| it.sent == sent);
        let Stalled { since, .. } = *self
            .stalled
            .insert(stalled.unwrap_or_else(|| Stalled { sent, since: Instant::now() }));
        ready!(self.live.as_mut().poll_over(cx, since + PATIENCE));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Future for Telling<I> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.poll_left(cx) {
            Poll::Pending => self.poll_told(cx),
            left @ Poll::Ready(_) => left,
        }
    }
}

/// Bytes to be sent.
struct Piece {
    /// How long the chunk is.
    head: ([u8; HEAD], usize),
    bytes: Bytes,
    tail: &'static [u8],
    sent: usize,
}

impl Piece {
    /// A chunk of these bytes; none of no bytes would be the last.
    fn chunk(bytes: Bytes) -> Option<Self> {
        let mut head = [0; HEAD];
        let mut room = &mut head[..];
        write!(room, "{:x}\r\n", bytes.len()).expect("there is room for any length");
        let length = HEAD - room.len();
        (!bytes.is_empty()).then_some(Self { head: (head, length), bytes, tail: b"\r\n", sent: 0 })
    }

    /// The bytes as they are.
    fn plain(bytes: Bytes) -> Self {
        Self { head: ([0; HEAD], 0), bytes, tail: b"", sent: 0 }
    }

    fn poll_send<W: AsyncWrite>(
        &mut self,
        mut io: Pin<&mut W>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        let (head, length) = &self.head;
        let parts = [&head[..*length], &self.bytes, self.tail];
        let whole: usize = parts.iter().map(|part| part.len()).sum();
        while self.sent < whole {
            let mut before = self.sent;
            let rest = parts.map(|part| {
                let skipped = before.min(part.len());
                before -= skipped;
                &part[skipped..]
            });
            let sent = gather::poll_write(io.as_mut(), cx, &rest.map(IoSlice::new));
            self.sent += match ready!(sent)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => sent,
            };
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures_util::{Stream, StreamExt as _, stream};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

    use super::*;
    use crate::http::reply::Flow;

    pin_project_lite::pin_project! {
        /// Pieces that are over when somebody says so, or when it is late.
        struct Told<S> {
            #[pin]
            pieces: S,
            #[pin]
            over: WaitForCancellationFutureOwned,
            #[pin]
            late: tokio::time::Sleep,
        }
    }

    impl<S: Stream<Item = Bytes> + Send + 'static> Told<S> {
        fn live(pieces: S, over: &CancellationToken) -> Live {
            let (over, late) = (over.clone().cancelled_owned(), tokio::time::sleep(Duration::ZERO));
            Box::pin(Self { pieces, over, late })
        }
    }

    impl<S: Stream<Item = Bytes>> Stream for Told<S> {
        type Item = Bytes;

        fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
            self.project().pieces.poll_next(cx)
        }
    }

    impl<S: Stream<Item = Bytes>> Flow for Told<S> {
        fn poll_over(self: Pin<&mut Self>, cx: &mut Context<'_>, late: Instant) -> Poll<()> {
            let mut this = self.project();
            if this.over.poll(cx).is_ready() {
                return Poll::Ready(());
            }
            this.late.as_mut().reset(late);
            this.late.poll(cx)
        }
    }

    /// More than is copied to be sent.
    const LARGE: usize = 3 * gather::SMALL;

    /// Bytes that are small, none, and many.
    fn pieces() -> [Bytes; 4] {
        [Bytes::from("small"), Bytes::new(), vec![b'x'; LARGE].into(), Bytes::from("last")]
    }

    /// What a client reads that takes so many bytes at once.
    async fn told(framing: Framing, at_once: usize) -> Vec<u8> {
        let (io, mut client) = tokio::io::duplex(at_once);
        let live = Told::live(stream::iter(pieces()), &CancellationToken::new());
        let telling = Telling::new(io, live, framing);
        let mut bytes = Vec::new();
        let (told, read) = tokio::join!(telling, client.read_to_end(&mut bytes));
        told.unwrap();
        read.unwrap();
        bytes
    }

    #[tokio::test]
    async fn every_piece_arrives_however_little_a_client_takes_at_once() {
        let whole = pieces().concat();
        let many = &whole[5..5 + LARGE];
        let chunks = [b"5\r\nsmall\r\n3000\r\n", many, b"\r\n4\r\nlast\r\n0\r\n\r\n"].concat();
        for at_once in [1, 7, 1 << 20] {
            assert_eq!(told(Framing::Plain, at_once).await, whole);
            assert_eq!(told(Framing::Chunked, at_once).await, chunks);
        }
    }

    /// A stream without end, with how many pieces it was asked for.
    fn endless(piece: &'static [u8], over: &CancellationToken) -> (Live, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let live = stream::repeat_with(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Bytes::from_static(piece)
        });
        (Told::live(live, over), asked)
    }

    fn tell(live: Live) -> (Telling<DuplexStream>, DuplexStream) {
        let (io, client) = tokio::io::duplex(8);
        (Telling::new(io, live, Framing::Chunked), client)
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_holds_one_piece_and_one_that_leaves_ends_its_stream() {
        let (live, asked) = endless(&[b'x'; 100], &CancellationToken::new());
        let (telling, mut client) = tell(live);
        let telling = tokio::spawn(telling);
        let mut read = [0; 8];
        client.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"64\r\nxxxx");
        client.write_all(b"whatever").await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(asked.load(Ordering::Relaxed), 1, "the first piece is not sent yet");
        drop(client);
        let _ = telling.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_is_left_when_its_stream_is_over() {
        let over = CancellationToken::new();
        let (live, asked) = endless(&[b'x'; 100], &over);
        let (mut telling, _client) = tell(live);
        assert!(futures_util::poll!(&mut telling).is_pending());
        over.cancel();
        assert_eq!(telling.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_for_a_minute_is_left_and_one_that_is_slow_is_not() {
        let (live, _) = endless(&[b'x'; 100], &CancellationToken::new());
        let (mut telling, mut client) = tell(live);
        let begun = Instant::now();
        for _ in 0..10 {
            assert!(tokio::time::timeout(PATIENCE / 2, &mut telling).await.is_err());
            client.read_exact(&mut [0; 8]).await.unwrap();
        }
        assert!(begun.elapsed() > 2 * PATIENCE);
        let (slow, error) = (Instant::now(), telling.await.unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(slow.elapsed() >= PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_with_nothing_to_read_is_not_taken_for_one_that_does_not_read() {
        let pieces = stream::iter([Bytes::from_static(b"x")]).chain(stream::pending());
        let (mut telling, mut client) = tell(Told::live(pieces, &CancellationToken::new()));
        assert!(tokio::time::timeout(10 * PATIENCE, &mut telling).await.is_err());
        client.read_exact(&mut [0; 6]).await.unwrap();
        drop(client);
        telling.await.unwrap();
    }
}
