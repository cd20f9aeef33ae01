//! Server-sent events as a client receives them.

use std::collections::VecDeque;
use std::time::Duration;

use parapet::protocol::sse::{DecodedEvent, Decoder};
use reqwest::{RequestBuilder, Response, StatusCode};

/// The timeout for the next event.
const EVENT_TIMEOUT: Duration = Duration::from_mins(1);

/// An open event stream.
#[derive(Debug)]
pub(crate) struct EventStream {
    response: Response,
    decoder: Decoder,
    buffered: VecDeque<DecodedEvent>,
}

impl EventStream {
    /// Opens a stream and panics if that fails. `last` is the id of the last event that the client has
    /// received.
    pub(crate) async fn open(request: RequestBuilder, last: Option<&str>) -> Self {
        let request = request.timeout(3 * EVENT_TIMEOUT);
        let request = last.into_iter().fold(request, |it, id| it.header("last-event-id", id));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, decoder: Decoder::new(1 << 20), buffered: VecDeque::new() }
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<DecodedEvent> {
        while self.buffered.is_empty() {
            let chunk = tokio::time::timeout(EVENT_TIMEOUT, self.response.chunk());
            let chunk = chunk.await.expect("an event arrives, or the stream ends");
            let Ok(Some(chunk)) = chunk else { return None };
            self.decoder.decode(&chunk, |event| self.buffered.push_back(event)).unwrap();
        }
        self.buffered.pop_front()
    }
}
