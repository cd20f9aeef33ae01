//! Delta events as a server SDK receives them.

use parapet::protocol::sse::DecodedEvent;
use serde_json::Value;

use super::event_stream::EventStream;
use super::net::http;
use super::scripted_upstream::STREAM;

/// A stream of delta events.
#[derive(Debug)]
pub(crate) struct DeltaStream(EventStream);

impl DeltaStream {
    /// Opens a stream and panics if that fails. `last` is the id of the last event that the client has
    /// received.
    pub(crate) async fn open(url: &str, token: &str, last: Option<&str>) -> Self {
        let request = http().get(format!("{url}{STREAM}"));
        Self(EventStream::open(request.header("authorization", token), last).await)
    }

    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next_event(&mut self) -> Option<DecodedEvent> {
        self.0.next().await
    }

    /// The next event's name and id, and a summary of its data.
    pub(crate) async fn next_update(&mut self) -> (String, String, Vec<(String, String)>) {
        let event = self.next_event().await.expect("the stream continues");
        let data = serde_json::from_str(&event.data).unwrap();
        (event.name, event.id, event_summary(&data))
    }
}

/// The type of each event, and the flag or segment that it names.
pub(crate) fn event_summary(events: &Value) -> Vec<(String, String)> {
    let name = |event: &Value| match event["type"].as_str().unwrap() {
        "hydration" => {
            let names = event["features"].as_array().unwrap().iter();
            names.map(|it| it["name"].as_str().unwrap()).collect::<Vec<_>>().join(",")
        }
        "feature-updated" => event["feature"]["name"].as_str().unwrap().to_owned(),
        "feature-removed" => event["featureName"].as_str().unwrap().to_owned(),
        "segment-updated" => event["segment"]["id"].to_string(),
        _ => event["segmentId"].to_string(),
    };
    let events = events["events"].as_array().unwrap().iter();
    events.map(|it| (it["type"].as_str().unwrap().to_owned(), name(it))).collect()
}

/// The summary of one event.
pub(crate) fn summary(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}
