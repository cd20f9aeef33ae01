//! Metrics of streams.

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use super::teller::Told;

/// Handles of the metrics, registered once.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) open: Gauge,
    pub(super) refused: Counter,
    pub(super) bytes: Counter,
    pub(super) comments: Counter,
    pub(super) revoked: Counter,
    pub(super) aged: Counter,
    pub(super) gone: Counter,
    pub(super) incomplete: Counter,
    pub(super) shut: Counter,
    hydrations: Counter,
    replays: Counter,
    changes: Counter,
    overtaken: Counter,
    directions: Counter,
    delay: Histogram,
}

impl Tally {
    pub(super) fn new() -> Self {
        const OPEN: &str = "parapet_streams";
        const REFUSED: &str = "parapet_streams_refused_total";
        const ENDED: &str = "parapet_streams_ended_total";
        const FRAMES: &str = "parapet_stream_frames_total";
        const BYTES: &str = "parapet_stream_bytes_total";
        const DELAY: &str = "parapet_propagation_delay_seconds";
        describe_gauge!(OPEN, "Open streams");
        describe_counter!(REFUSED, "Streams rejected because a limit was reached");
        describe_counter!(ENDED, "Streams closed by Parapet, by reason");
        describe_counter!(FRAMES, "Chunks sent on streams, by kind");
        describe_counter!(BYTES, "Bytes sent on streams");
        describe_histogram!(
            DELAY,
            "Time from receiving a change from the source to sending it to a client"
        );
        let frames = |kind: &'static str| counter!(FRAMES, "told" => kind);
        let ended = |reason: &'static str| counter!(ENDED, "why" => reason);
        Self {
            open: gauge!(OPEN),
            refused: counter!(REFUSED),
            bytes: counter!(BYTES),
            comments: frames("comment"),
            revoked: ended("token"),
            aged: ended("age"),
            gone: ended("environment"),
            incomplete: ended("context"),
            shut: ended("shutdown"),
            hydrations: frames("hydration"),
            replays: frames("replay"),
            changes: frames("changes"),
            overtaken: frames("overtaken"),
            directions: frames("directions"),
            delay: histogram!(DELAY),
        }
    }

    pub(super) fn count(&self, kind: Told) {
        match kind {
            Told::Whole => self.hydrations.increment(1),
            Told::Missed => self.replays.increment(1),
            Told::Overtaken => self.overtaken.increment(1),
            Told::Directions => self.directions.increment(1),
            Told::Changed(at) => {
                self.changes.increment(1);
                self.delay.record(at.elapsed());
            }
        }
    }
}
