//! A stream on which upstream tells what changes of a token's flags.
//!
//! It puts events together, notices when nothing is to be expected any more, and bounds what it holds.
//! What the events mean, and when to open another, is the business of those who follow.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use reqwest::Response;
use tokio::time::{Instant, timeout_at};

use super::{error::Error, outcome::Pulse};
use crate::wire::sse::{Decoder, Event, TooLong};

/// After how long without a byte a stream is dead: those who tell one send a comment every 30 s.
const SILENCE: Duration = Duration::from_secs(90);

/// How many bytes that have arrived are read before their events are told.
const AT_ONCE: usize = 1 << 20;

/// An open stream; upstream sees it closed when this is dropped.
pub struct Stream {
    response: Response,
    decoder: Decoder,
    /// When the last bytes came.
    heard: Instant,
    /// How it ended, where that is yet to be told.
    end: Option<Result<(), Error>>,
    open: Open,
}

impl Stream {
    /// Reads events of up to `limit` bytes from an answer whose head is there.
    pub(super) fn new(response: Response, limit: usize, pulse: &Arc<Pulse>) -> Self {
        let (decoder, heard) = (Decoder::new(limit), Instant::now());
        Self { response, decoder, heard, end: None, open: Open::new(pulse) }
    }

    /// Waits for a sign of life, and gives the events that are complete with it: all that have
    /// arrived by then, none where it was a comment. `None` is the end of the stream.
    ///
    /// Fails when the stream breaks, when an event is too large, or after 90 s of silence; there is
    /// no more to read then. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Vec<Event>>, Error> {
        if let Some(end) = self.end.take() {
            return end.map(|()| None);
        }
        let chunk = match timeout_at(self.heard + SILENCE, self.response.chunk()).await {
            Ok(chunk) => chunk.map_err(Error::transport),
            Err(_) => Err(Error::Silent(SILENCE)),
        };
        // From here on nothing waits, so that no event is lost when this is dropped.
        let mut bytes = match chunk {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.missed(error)),
        };
        self.heard = Instant::now();
        self.open.0.beat();
        let (mut events, mut size) = (Vec::new(), 0);
        loop {
            size += bytes.len();
            if let Err(TooLong(limit)) = self.decoder.read(&bytes, |event| events.push(event)) {
                self.end = Some(Err(self.missed(Error::TooLarge { limit })));
                break;
            }
            if size > AT_ONCE {
                break;
            }
            match self.response.chunk().now_or_never() {
                Some(Ok(Some(more))) => bytes = more,
                Some(Ok(None)) => {
                    self.end = Some(Ok(()));
                    break;
                }
                Some(Err(error)) => {
                    self.end = Some(Err(self.missed(Error::transport(error))));
                    break;
                }
                None => break,
            }
        }
        Ok(Some(events))
    }

    /// How long upstream wants us to wait before we open another, where it said so.
    pub fn retry(&self) -> Option<Duration> {
        self.decoder.retry()
    }

    /// Takes note of a failure.
    fn missed(&self, error: Error) -> Error {
        self.open.0.miss(&error);
        error
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The answer shows the URL, which may hold a password.
        f.debug_struct("Stream").field("heard", &self.heard).finish_non_exhaustive()
    }
}

/// Counts as open until it is dropped.
struct Open(Arc<Pulse>);

impl Open {
    fn new(pulse: &Arc<Pulse>) -> Self {
        pulse.opened();
        Self(Arc::clone(pulse))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed();
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use bytes::Bytes;
    use futures_util::stream;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use reqwest::Body;
    use tokio::sync::mpsc;

    use super::*;

    const CONNECTED: &str = "event: a\nid: 1\ndata: x\n\n";
    const UPDATED: &str = "event: b\nid: 2\ndata: y\n\n";

    /// The other end of a stream.
    type Teller = mpsc::UnboundedSender<io::Result<String>>;

    /// A stream with events of up to 100 bytes, and what stands at its other end.
    fn open(pulse: &Arc<Pulse>) -> (Teller, Stream) {
        let (teller, mut told) = mpsc::unbounded_channel::<io::Result<String>>();
        let frames = stream::poll_fn(move |context| {
            let piece = told.poll_recv(context);
            piece.map(|it| it.map(|it| it.map(|text| Frame::data(Bytes::from(text)))))
        });
        let answer = hyper::Response::new(Body::wrap(StreamBody::new(frames)));
        (teller, Stream::new(answer.into(), 100, pulse))
    }

    fn tell(teller: &Teller, text: &str) {
        teller.send(Ok(text.to_owned())).unwrap();
    }

    /// The names of the events that are told next; `None` at the end.
    async fn next(stream: &mut Stream) -> Option<Vec<String>> {
        let events = stream.next().await.unwrap();
        events.map(|events| events.into_iter().map(|event| event.name).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_dead_after_90_seconds_without_a_byte_and_not_before() {
        let pulse = Arc::default();
        let (teller, mut stream) = open(&pulse);
        let begin = Instant::now();
        let speak = async {
            for text in [":\n", CONNECTED, "e", ": keep-alive\n\n"] {
                tokio::time::sleep(Duration::from_secs(89)).await;
                tell(&teller, text);
            }
        };
        let listen = async {
            for names in [vec![], vec!["a"], vec![], vec![]] {
                assert_eq!(next(&mut stream).await.unwrap(), names);
            }
        };
        tokio::join!(speak, listen);
        let error = stream.next().await.expect_err("silence");
        assert!(matches!(error, Error::Silent(SILENCE)), "{error:?}");
        assert_eq!(begin.elapsed().as_secs(), 4 * 89 + 90);
        let health = pulse.health();
        assert_eq!((health.streams, health.consecutive_failures), (1, 1));
        assert!(health.last_success.is_some());
        drop(stream);
        assert_eq!(pulse.health().streams, 0);
        assert!(teller.is_closed(), "upstream notices");
    }

    #[tokio::test(start_paused = true)]
    async fn what_arrived_together_is_told_at_once_and_before_the_end() {
        let (teller, mut stream) = open(&Arc::default());
        assert_eq!(stream.next().now_or_never().map(|_| ()), None, "nothing is there");
        let (half, rest) = CONNECTED.split_at(11);
        tell(&teller, half);
        assert_eq!(next(&mut stream).await.unwrap(), [""; 0]);
        for text in [rest, UPDATED, "retry: 700\n\n", UPDATED] {
            tell(&teller, text);
        }
        assert_eq!(next(&mut stream).await.unwrap(), ["a", "b", "b"]);
        assert_eq!(stream.retry(), Some(Duration::from_millis(700)));
        tell(&teller, UPDATED);
        drop(teller);
        assert_eq!(next(&mut stream).await.unwrap(), ["b"]);
        for _ in 0..2 {
            assert_eq!(next(&mut stream).await, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_breaks_or_tells_too_much_fails_after_what_it_told() {
        let pulse = Arc::default();
        let (teller, mut stream) = open(&pulse);
        tell(&teller, CONNECTED);
        teller.send(Err(io::ErrorKind::ConnectionReset.into())).unwrap();
        assert_eq!(next(&mut stream).await.unwrap(), ["a"]);
        let error = stream.next().await.expect_err("a break");
        assert!(matches!(error, Error::Interrupted(_)), "{error:?}");

        let (teller, mut stream) = open(&pulse);
        tell(&teller, CONNECTED);
        tell(&teller, &"x".repeat(101));
        assert_eq!(next(&mut stream).await.unwrap(), ["a"]);
        let error = stream.next().await.expect_err("too much");
        assert!(matches!(error, Error::TooLarge { limit: 100 }), "{error:?}");
        assert_eq!(pulse.health().consecutive_failures, 1);
    }
}
