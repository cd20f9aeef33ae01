//! Server-sent events: `text/event-stream` as the WHATWG HTML standard (section 9.2) defines it.
//!
//! Encodes events to text and decodes them from bytes. It performs no I/O and does not reconnect; the
//! `retry` field is left to the caller.

use std::{
    fmt::{Display, Write as _},
    time::Duration,
};

/// A comment that keeps proxies from closing an idle stream.
pub const KEEP_ALIVE_COMMENT: &[u8] = b": keep-alive\n\n";

/// A decoded event.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct DecodedEvent {
    /// The event type; `message` if the stream does not set it.
    pub name: String,
    /// The last id in the stream, of this event or an earlier one.
    pub id: String,
    /// The data lines, joined by line breaks.
    pub data: String,
}

/// Encodes one event. `name` and `id` must not contain line breaks; `data` may.
pub fn encode_event(name: &str, id: Option<&dyn Display>, data: &str) -> String {
    let mut text = String::with_capacity(data.len() + 64);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "event: {name}");
    if let Some(id) = id {
        let _ = writeln!(text, "id: {id}");
    }
    for line in data.split("\r\n").flat_map(|it| it.split(['\r', '\n'])) {
        let _ = writeln!(text, "data: {line}");
    }
    text.push('\n');
    text
}

/// Encodes an id without an event: it sets the client's last event id.
pub fn encode_id(id: &dyn Display) -> String {
    format!("id: {id}\n\n")
}

/// Encodes the time in milliseconds that a client waits before it reconnects.
pub fn encode_retry(milliseconds: u64) -> String {
    format!("retry: {milliseconds}\n\n")
}

/// An event, or a line of one, exceeds the limit of the [`Decoder`] in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("an event of the stream is longer than {0} bytes")]
pub struct EventTooLong(pub usize);

/// Decodes events from the chunks of a stream. Chunks may end anywhere.
#[derive(Debug)]
pub struct Decoder {
    /// The maximum size of an event, in bytes.
    limit: usize,
    /// The line received so far.
    partial_line: Vec<u8>,
    /// The last byte ended a line and was a carriage return.
    after_carriage_return: bool,
    is_first_line: bool,
    /// The event received so far. Its id is carried over to the next event.
    event: DecodedEvent,
    has_data: bool,
    retry_delay: Option<Duration>,
}

impl Decoder {
    /// Creates a decoder for events of up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        let (partial_line, event, retry_delay) = Default::default();
        Self {
            limit,
            partial_line,
            after_carriage_return: false,
            is_first_line: true,
            event,
            has_data: false,
            retry_delay,
        }
    }

    /// The time to wait before a reconnect, if the stream has set it.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.retry_delay
    }

    /// Decodes the next bytes, and passes each complete event to `on_event`.
    ///
    /// # Errors
    /// If an event is too long. The stream cannot be decoded further then.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        mut on_event: impl FnMut(DecodedEvent),
    ) -> Result<(), EventTooLong> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_carriage_return) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
            let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
            if self.partial_line.len() + self.event.data.len() + part.len() > self.limit {
                return Err(EventTooLong(self.limit));
            }
            self.partial_line.extend_from_slice(part);
            let Some((&ending, after)) = after.split_first() else { return Ok(()) };
            self.after_carriage_return = ending == b'\r';
            rest = after;
            if let Some(event) = self.process_line() {
                on_event(event);
            }
        }
        Ok(())
    }

    /// Processes a complete line. An empty line ends an event.
    fn process_line(&mut self) -> Option<DecodedEvent> {
        let line = std::mem::take(&mut self.partial_line);
        let line = String::from_utf8_lossy(&line);
        let is_first = std::mem::take(&mut self.is_first_line);
        let line = if is_first { line.strip_prefix('\u{feff}').unwrap_or(&line) } else { &line };
        if line.is_empty() {
            return self.dispatch();
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "id" if !value.contains('\0') => value.clone_into(&mut self.event.id),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            "retry" if value.bytes().all(|byte| byte.is_ascii_digit()) => {
                self.retry_delay =
                    value.parse().ok().map(Duration::from_millis).or(self.retry_delay);
            }
            // A comment starts with a colon and is parsed as a field without a name.
            _ => {}
        }
        None
    }

    fn dispatch(&mut self) -> Option<DecodedEvent> {
        let id = self.event.id.clone();
        let mut event =
            std::mem::replace(&mut self.event, DecodedEvent { id, ..DecodedEvent::default() });
        if !std::mem::take(&mut self.has_data) {
            return None;
        }
        if event.name.is_empty() {
            "message".clone_into(&mut event.name);
        }
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn decoded<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<DecodedEvent> {
        let mut decoder = Decoder::new(10_000);
        let mut events = vec![];
        for chunk in chunks {
            decoder.decode(chunk, |event| events.push(event)).unwrap();
        }
        events
    }

    fn chunks<'a>(mut text: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut chunks = vec![];
        for cut in cuts {
            let (chunk, rest) = text.split_at((*cut).min(text.len()));
            chunks.push(chunk);
            text = rest;
        }
        chunks.push(text);
        chunks
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_chunk_boundaries(
            stream in vec("(data|event|id|retry|other|\u{feff}data|): ?[a-zé:\0 ]{0,5}(\r|\n|\r\n|\n\n|\r\r|\r\n\r\n)|[^\n]{0,9}", 0..20),
            cuts in vec(0..7_usize, 0..60),
        ) {
            let stream = stream.concat();
            let whole = decoded([stream.as_bytes()]);
            prop_assert_eq!(&decoded(chunks(stream.as_bytes(), &cuts)), &whole);
            let bytes = stream.as_bytes().chunks(1);
            prop_assert_eq!(&decoded(bytes), &whole);
        }

        #[test]
        fn encoded_events_are_decoded(
            events in vec(("[a-z-]{1,9}", any::<u32>(), "[ -~é\r\n:]{0,40}"), 0..6),
            cuts in vec(0..9_usize, 0..60),
        ) {
            let mut text = encode_retry(100);
            let mut expect = vec![];
            for (name, id, data) in events {
                text += &encode_event(&name, Some(&id), &data);
                text += std::str::from_utf8(KEEP_ALIVE_COMMENT).unwrap();
                let data = data.replace("\r\n", "\n").replace('\r', "\n");
                expect.push(DecodedEvent { name, id: id.to_string(), data });
            }
            prop_assert_eq!(decoded(chunks(text.as_bytes(), &cuts)), expect);
        }

        #[test]
        fn buffer_is_bounded_by_limit(stream in vec(any::<u8>(), 0..300), limit in 0..50_usize) {
            let mut decoder = Decoder::new(limit);
            for byte in stream {
                if decoder.decode(&[byte], |_| {}).is_err() {
                    break;
                }
                prop_assert!(decoder.partial_line.len() <= limit);
                prop_assert!(decoder.event.data.len() <= 3 * limit + 1);
            }
        }
    }

    #[test]
    fn examples_of_the_standard_are_decoded() {
        let data = |stream: &str| {
            let events = decoded([stream.as_bytes()]);
            events.into_iter().map(|it| it.data).collect::<Vec<_>>()
        };
        assert_eq!(data("data: YHOO\ndata: +2\ndata: 10\n\n"), ["YHOO\n+2\n10"]);
        assert_eq!(data("data\n\ndata\ndata\n\ndata:"), ["", "\n"]);
        assert_eq!(data("data:test\n\ndata: test\n\n"), ["test", "test"]);
        let stream = ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n";
        let events = decoded([stream.as_bytes()]);
        let event = |id: &str, data: &str| DecodedEvent {
            name: "message".to_owned(),
            id: id.to_owned(),
            data: data.to_owned(),
        };
        assert_eq!(events, [event("1", "first event"), event("", "second event")]);
    }

    #[test]
    fn last_valid_retry_is_used() {
        let mut decoder = Decoder::new(100);
        let mut read = |text: &str| {
            decoder.decode(text.as_bytes(), |event| panic!("{event:?}")).unwrap();
            decoder.retry_delay()
        };
        assert_eq!(read("retry: soon\n\nretry:\n\nretry: -1\n\n"), None);
        let expected = Some(Duration::from_millis(700));
        assert_eq!(read("retry: 7000\n\nretry: 700\n"), expected);
        assert_eq!(read("retry: 99999999999999999999\nretry: 8s\n"), expected);
    }
}
