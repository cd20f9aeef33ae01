//! Server-sent events as a client receives them.

use std::collections::VecDeque;
use std::time::Duration;

use parapet::wire::sse::{Decoder, Event};
use reqwest::{RequestBuilder, Response, StatusCode};

/// The timeout for the next event.
const PATIENCE: Duration = Duration::from_mins(1);

/// An open event stream.
#[derive(Debug)]
pub(crate) struct Events {
    response: Response,
    decoder: Decoder,
    ready: VecDeque<Event>,
}

impl Events {
    /// Opens a stream and panics if that fails. `last` is the id of the last event that the client has
    /// received.
    pub(crate) async fn open(request: RequestBuilder, last: Option<&str>) -> Self {
        let request = request.timeout(3 * PATIENCE);
        let request = last.into_iter().fold(request, |it, id| it.header("last-event-id", id));
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, decoder: Decoder::new(1 << 20), ready: VecDeque::new() }
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() {
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk());
            let chunk = chunk.await.expect("an event arrives, or the stream ends");
            let Ok(Some(chunk)) = chunk else { return None };
            self.decoder.decode(&chunk, |event| self.ready.push_back(event)).unwrap();
        }
        self.ready.pop_front()
    }
}
