//! Metrics of streams.

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use super::event_source::ChunkKind;

/// Handles of the metrics, registered once.
#[derive(Debug)]
pub(super) struct StreamMetrics {
    pub(super) open: Gauge,
    pub(super) refused: Counter,
    pub(super) bytes: Counter,
    pub(super) keep_alives: Counter,
    pub(super) revoked: Counter,
    pub(super) expired: Counter,
    pub(super) environment_removed: Counter,
    pub(super) context_incomplete: Counter,
    pub(super) shutdown: Counter,
    hydrations: Counter,
    replays: Counter,
    changes: Counter,
    resyncs: Counter,
    fetch_modes: Counter,
    propagation_delay: Histogram,
}

impl StreamMetrics {
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
            keep_alives: frames("comment"),
            revoked: ended("token"),
            expired: ended("age"),
            environment_removed: ended("environment"),
            context_incomplete: ended("context"),
            shutdown: ended("shutdown"),
            hydrations: frames("hydration"),
            replays: frames("replay"),
            changes: frames("changes"),
            resyncs: frames("overtaken"),
            fetch_modes: frames("directions"),
            propagation_delay: histogram!(DELAY),
        }
    }

    pub(super) fn record(&self, kind: ChunkKind) {
        match kind {
            ChunkKind::Hydration => self.hydrations.increment(1),
            ChunkKind::Replay => self.replays.increment(1),
            ChunkKind::Resync => self.resyncs.increment(1),
            ChunkKind::FetchMode => self.fetch_modes.increment(1),
            ChunkKind::Changes(at) => {
                self.changes.increment(1);
                self.propagation_delay.record(at.elapsed());
            }
        }
    }
}
