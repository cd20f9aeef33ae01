//! An event stream from upstream with the changes of a token's flags.
//!
//! It assembles events, detects a dead stream by an idle timeout, and bounds its buffers. It does not
//! interpret events and does not reconnect: the caller does.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use reqwest::Response;
use tokio::time::{Instant, timeout_at};

use super::{error::Error, health::HealthTracker};
use crate::protocol::sse::{DecodedEvent, Decoder, EventTooLong};

/// A stream without data for this long is dead: servers send a comment every 30 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// The largest number of buffered bytes read before their events are returned.
const MAX_READ_AHEAD: usize = 1 << 20;

/// An open event stream. Dropping it closes the connection.
pub struct UpstreamEventStream {
    response: Response,
    decoder: Decoder,
    /// When data last arrived.
    last_activity: Instant,
    /// The end of the stream, to be returned by the next call.
    pending_end: Option<Result<(), Error>>,
    open_guard: OpenStreamGuard,
}

impl UpstreamEventStream {
    /// Reads events of up to `limit` bytes from a response whose head has been read.
    pub(super) fn new(
        response: Response,
        limit: usize,
        health_tracker: &Arc<HealthTracker>,
    ) -> Self {
        let (decoder, last_activity) = (Decoder::new(limit), Instant::now());
        Self {
            response,
            decoder,
            last_activity,
            pending_end: None,
            open_guard: OpenStreamGuard::new(health_tracker),
        }
    }

    /// Waits for data and returns all events that are complete by then; none if only a comment arrived.
    /// `None` is the end of the stream. Cancel-safe.
    ///
    /// # Errors
    /// If the stream breaks, an event is too large, or no data arrives for 90 s. The stream then ends.
    pub async fn next_events(&mut self) -> Result<Option<Vec<DecodedEvent>>, Error> {
        if let Some(end) = self.pending_end.take() {
            return end.map(|()| None);
        }
        let chunk = match timeout_at(self.last_activity + IDLE_TIMEOUT, self.response.chunk()).await
        {
            Ok(chunk) => chunk.map_err(Error::from_transport),
            Err(_) => Err(Error::StreamTimeout(IDLE_TIMEOUT)),
        };
        // No await below this line: a dropped future must lose no event.
        let mut bytes = match chunk {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) => return Err(self.record_failure(error)),
        };
        self.last_activity = Instant::now();
        self.open_guard.0.record_success();
        let (mut events, mut size) = (Vec::new(), 0);
        loop {
            size += bytes.len();
            if let Err(EventTooLong(limit)) =
                self.decoder.decode(&bytes, |event| events.push(event))
            {
                self.pending_end = Some(Err(self.record_failure(Error::TooLarge { limit })));
                break;
            }
            if size > MAX_READ_AHEAD {
                break;
            }
            match self.response.chunk().now_or_never() {
                Some(Ok(Some(more))) => bytes = more,
                Some(Ok(None)) => {
                    self.pending_end = Some(Ok(()));
                    break;
                }
                Some(Err(error)) => {
                    self.pending_end = Some(Err(self.record_failure(Error::from_transport(error))));
                    break;
                }
                None => break,
            }
        }
        Ok(Some(events))
    }

    /// The reconnect delay that upstream sent (`retry:`), if any.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.decoder.retry_delay()
    }

    /// Records a failure in upstream's health.
    fn record_failure(&self, error: Error) -> Error {
        self.open_guard.0.record_failure(&error);
        error
    }
}

impl fmt::Debug for UpstreamEventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Omits the response: its URL may contain a password.
        f.debug_struct("SseStream")
            .field("last_activity", &self.last_activity)
            .finish_non_exhaustive()
    }
}

/// Counts the stream as open until dropped.
struct OpenStreamGuard(Arc<HealthTracker>);

impl OpenStreamGuard {
    fn new(health_tracker: &Arc<HealthTracker>) -> Self {
        health_tracker.stream_opened();
        Self(Arc::clone(health_tracker))
    }
}

impl Drop for OpenStreamGuard {
    fn drop(&mut self) {
        self.0.stream_closed();
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

    /// The server's end of a stream.
    type EventSender = mpsc::UnboundedSender<io::Result<String>>;

    /// A stream with events of up to 100 bytes, and the server's end of it.
    fn open_stream(health_tracker: &Arc<HealthTracker>) -> (EventSender, UpstreamEventStream) {
        let (sender, mut receiver) = mpsc::unbounded_channel::<io::Result<String>>();
        let frames = stream::poll_fn(move |context| {
            let chunk = receiver.poll_recv(context);
            chunk.map(|it| it.map(|it| it.map(|text| Frame::data(Bytes::from(text)))))
        });
        let response = hyper::Response::new(Body::wrap(StreamBody::new(frames)));
        (sender, UpstreamEventStream::new(response.into(), 100, health_tracker))
    }

    fn send(sender: &EventSender, text: &str) {
        sender.send(Ok(text.to_owned())).unwrap();
    }

    /// The names of the next events; `None` at the end.
    async fn next_names(stream: &mut UpstreamEventStream) -> Option<Vec<String>> {
        let events = stream.next_events().await.unwrap();
        events.map(|events| events.into_iter().map(|event| event.name).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn stream_times_out_after_90_s_without_data() {
        let health_tracker = Arc::default();
        let (sender, mut stream) = open_stream(&health_tracker);
        let begin = Instant::now();
        let server = async {
            for text in [":\n", CONNECTED, "e", ": keep-alive\n\n"] {
                tokio::time::sleep(Duration::from_secs(89)).await;
                send(&sender, text);
            }
        };
        let client = async {
            for names in [vec![], vec!["a"], vec![], vec![]] {
                assert_eq!(next_names(&mut stream).await.unwrap(), names);
            }
        };
        tokio::join!(server, client);
        let error = stream.next_events().await.expect_err("silence");
        assert!(matches!(error, Error::StreamTimeout(IDLE_TIMEOUT)), "{error:?}");
        assert_eq!(begin.elapsed().as_secs(), 4 * 89 + 90);
        let health = health_tracker.health();
        assert_eq!((health.streams, health.consecutive_failures), (1, 1));
        assert!(health.last_success.is_some());
        drop(stream);
        assert_eq!(health_tracker.health().streams, 0);
        assert!(sender.is_closed(), "upstream notices");
    }

    #[tokio::test(start_paused = true)]
    async fn buffered_events_are_returned_together_and_before_the_end() {
        let (sender, mut stream) = open_stream(&Arc::default());
        assert_eq!(stream.next_events().now_or_never().map(|_| ()), None, "nothing is there");
        let (half, rest) = CONNECTED.split_at(11);
        send(&sender, half);
        assert_eq!(next_names(&mut stream).await.unwrap(), [""; 0]);
        for text in [rest, UPDATED, "retry: 700\n\n", UPDATED] {
            send(&sender, text);
        }
        assert_eq!(next_names(&mut stream).await.unwrap(), ["a", "b", "b"]);
        assert_eq!(stream.retry_delay(), Some(Duration::from_millis(700)));
        send(&sender, UPDATED);
        drop(sender);
        assert_eq!(next_names(&mut stream).await.unwrap(), ["b"]);
        for _ in 0..2 {
            assert_eq!(next_names(&mut stream).await, None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn broken_stream_or_too_large_event_fails_after_earlier_events() {
        let health_tracker = Arc::default();
        let (sender, mut stream) = open_stream(&health_tracker);
        send(&sender, CONNECTED);
        sender.send(Err(io::ErrorKind::ConnectionReset.into())).unwrap();
        assert_eq!(next_names(&mut stream).await.unwrap(), ["a"]);
        let error = stream.next_events().await.expect_err("a break");
        assert!(matches!(error, Error::Interrupted(_)), "{error:?}");

        let (sender, mut stream) = open_stream(&health_tracker);
        send(&sender, CONNECTED);
        send(&sender, &"x".repeat(101));
        assert_eq!(next_names(&mut stream).await.unwrap(), ["a"]);
        let error = stream.next_events().await.expect_err("too much");
        assert!(matches!(error, Error::TooLarge { limit: 100 }), "{error:?}");
        assert_eq!(health_tracker.health().consecutive_failures, 1);
    }
}
