//! The state of one environment's synchronisation, and its next action: poll, open a stream, publish or
//! wait.
//!
//! Nothing is polled while each token in use has a synced stream. States from streams are published like
//! states from polls. With several tokens, the removal of a flag is published only after the others had
//! time to report it: tokens without a synced stream are then polled immediately. `poll_schedule` decides
//! when to poll otherwise.
//!
//! Pure: times and random numbers are arguments. `environment_sync` performs the [`Action`]s and reports
//! results and events. This module sends no request, publishes nothing and logs nothing.

use std::{collections::BTreeSet, mem, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    fetched_documents::FetchedDocuments,
    merge::MergeInput,
    poll_schedule::{PollOutcome, PollSchedule},
    reconnect::{CloseReason, StreamUnavailable, UpstreamMode},
    stream_events::Applied,
    token_streams::TokenStreams,
};
use crate::{
    event_log::Observed,
    protocol::{
        delta::EventId,
        features::{Document, PreviousRun},
    },
    served::ServedSnapshot,
    token::{Projects, Token, TokenDigest},
    upstream::Credential,
};

/// How flags are synchronised.
#[derive(Clone, Debug)]
pub struct Config {
    /// The poll interval of an environment.
    pub interval: Duration,
    /// Whether to use upstream's event streams.
    pub mode: UpstreamMode,
}

/// How long to wait for other tokens to report a flag before removing it. Streams of two tokens deliver
/// the same change within milliseconds of each other.
const REMOVAL_GRACE: Duration = Duration::from_secs(1);

/// The next step of a synchronisation.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Action {
    /// Poll with every token without a synced stream.
    Poll,
    /// Publish what has changed because of the time.
    Publish,
    /// Open the stream of this token, resuming after this event.
    OpenStream(Token, Option<EventId>),
    /// Wait for an event, at most until this time.
    Wait(Option<Instant>),
}

/// A change of the served flags.
#[derive(Debug)]
pub(super) enum Publication {
    /// The served flags stay as they are.
    Nothing,
    /// The served flags were current at this time.
    Confirm(Instant),
    /// Other flags replace the served ones.
    Replace {
        input: MergeInput,
        /// The projects of which the input has every flag.
        projects: Projects,
        /// When the flags were last known to be current.
        confirmed_at: Option<Instant>,
        /// The state that the next run needs from this one.
        run: PreviousRun,
        /// Documents to drop on a blocking thread: dropping thousands of flags takes milliseconds.
        replaced: Vec<Arc<Document>>,
    },
}

/// The synchronisation of one environment.
#[derive(Debug)]
pub(super) struct EnvironmentState {
    documents: FetchedDocuments,
    streams: TokenStreams,
    /// When to poll, unless every token in use has a synced stream.
    schedule: PollSchedule,
    /// Poll now, even if every token in use has a synced stream: the tokens may have changed.
    is_poll_requested: bool,
    /// How long the removal of a flag is deferred while other tokens may report it.
    pub(super) removal_grace: Duration,
    /// Whether all expected tokens were available at the last check.
    has_all_tokens: bool,
}

impl EnvironmentState {
    /// Starts with the flags that are served, from an earlier run, and with a poll.
    pub(super) fn new(config: &Config, served: Option<&ServedSnapshot>, now: Instant) -> Self {
        Self {
            documents: FetchedDocuments::new(served, now),
            streams: TokenStreams::new(config.mode),
            schedule: PollSchedule::new(config.interval, now),
            is_poll_requested: false,
            removal_grace: REMOVAL_GRACE,
            has_all_tokens: false,
        }
    }

    /// The action that is due at this time.
    pub(super) fn next_action(&mut self, now: Instant) -> Action {
        let poll_at = (!self.is_streaming()).then_some(self.schedule.next());
        let publish_at = self.documents.next_deadline();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if self.is_poll_requested || is_due(poll_at) {
            return Action::Poll;
        }
        if is_due(publish_at) {
            return Action::Publish;
        }
        let last_event = |token: &TokenDigest| self.documents.event_id(token);
        if let Some((credential, last)) = self.streams.open_next(now, last_event) {
            return Action::OpenStream(credential.token.clone(), last);
        }
        let deadlines = [poll_at, publish_at, self.streams.next_opening()];
        Action::Wait(deadlines.into_iter().flatten().min())
    }

    /// Begins a poll. Returns the documents to apply its responses to, and the tokens with a synced
    /// stream, which are not polled.
    pub(super) fn begin_poll(
        &mut self,
        now: Instant,
    ) -> (&mut FetchedDocuments, BTreeSet<TokenDigest>) {
        self.is_poll_requested = false;
        self.schedule.begin(now);
        self.documents.begin_round();
        (&mut self.documents, self.streams.synced_tokens())
    }

    /// Ends a poll, and schedules the next one. `Err` is the `Retry-After` of a failed poll, if upstream
    /// sent one. `in_use` are the tokens from now on.
    pub(super) fn on_polled(
        &mut self,
        polled: Result<(), Option<Duration>>,
        in_use: Vec<Credential>,
        now: Instant,
        jitter: f64,
    ) {
        let Self { documents, streams, schedule, .. } = self;
        streams.set_tokens(in_use, |token| documents.document(token).is_some(), now);
        let outcome = match polled {
            Ok(()) => PollOutcome::Complete {
                is_confirmed: documents
                    .is_confirmed_in_round(streams.tokens_in_use(), &streams.synced_tokens()),
                // Another edge has its own revisions, and may be behind the log that it relays.
                is_from_unleash: documents.common_revision().is_some(),
                recheck: documents.next_recheck(),
            },
            Err(retry_after) => {
                PollOutcome::Failed { retry_after, is_partial: documents.has_response_in_round() }
            }
        };
        schedule.end(outcome, now, jitter);
    }

    /// Records what upstream's event log shows about the flags of the environment.
    pub(super) fn on_event_log_updated(&mut self, observed: Option<Observed>, now: Instant) {
        if let Some(confirmed_at) = self.schedule.observe(observed, now) {
            for credential in self.streams.tokens_in_use() {
                self.documents.confirm(credential, confirmed_at);
            }
        }
    }

    /// The number of consecutive polls that failed.
    pub(super) fn poll_failures(&self) -> u32 {
        self.schedule.failures()
    }

    /// Requests a poll as soon as possible.
    pub(super) fn request_poll(&mut self) {
        self.is_poll_requested = true;
    }

    /// Requests a poll if the tokens in use have changed, or if flags of an earlier run have become
    /// removable because all expected tokens are now available.
    pub(super) fn check_tokens(&mut self, in_use: &[Credential], has_all_tokens: bool) {
        let was_incomplete = !mem::replace(&mut self.has_all_tokens, has_all_tokens);
        let can_drop_inherited = has_all_tokens && was_incomplete && self.documents.has_inherited();
        self.is_poll_requested |= can_drop_inherited || in_use != self.streams.tokens_in_use();
    }

    /// The change of the served flags that follows from the documents. `has_all_tokens` is whether all
    /// expected tokens are `in_use`.
    ///
    /// The served flags are confirmed if upstream has responded to every token in use or streams to it:
    /// as of the oldest of these responses.
    pub(super) fn publication(
        &mut self,
        in_use: &[Credential],
        has_all_tokens: bool,
        served: Option<&ServedSnapshot>,
        now: Instant,
    ) -> Publication {
        let Self { documents, streams, .. } = self;
        self.has_all_tokens = has_all_tokens;
        let is_complete =
            documents.complete_round(in_use, &streams.synced_tokens(), has_all_tokens);
        documents.advance_time(now, streams.last_activity_by_token());
        let confirmed_at = if is_complete { documents.confirmed_at(in_use) } else { None };
        if documents.has_changes() || (is_complete && served.is_none()) {
            return Publication::Replace {
                input: documents.merge_input(),
                projects: documents.projects(),
                confirmed_at: confirmed_at.max(served.and_then(ServedSnapshot::confirmed_at)),
                run: PreviousRun {
                    upstream_revision: documents.common_revision(),
                    ..PreviousRun::default()
                },
                replaced: documents.take_replaced(),
            };
        }
        confirmed_at.map_or(Publication::Nothing, Publication::Confirm)
    }

    /// Records that a [`Publication::Replace`] is served.
    pub(super) fn on_published(&mut self) {
        self.documents.mark_published();
    }

    /// Whether every token in use has a synced stream.
    pub(super) fn is_streaming(&self) -> bool {
        self.streams.is_synced_for_all_tokens()
    }

    /// Whether a token has a stream that is open or about to be.
    pub(super) fn is_connected(&self, token: &TokenDigest) -> bool {
        self.streams.is_connected(token)
    }

    /// Whether the states of several tokens are compared.
    pub(super) fn has_several_tokens(&self) -> bool {
        self.streams.tokens_in_use().len() > 1
    }

    /// The document that events of a token's stream are applied to, and whether deltas continue it.
    pub(super) fn event_base(&self, token: &TokenDigest) -> (Option<Arc<Document>>, bool) {
        let continues = self.streams.can_apply_deltas(token, self.documents.event_id(token));
        (self.documents.document(token).cloned(), continues)
    }

    /// Upstream hints at streaming in its response to a poll.
    pub(super) fn on_streaming_hint(&mut self) {
        self.streams.expedite_declined();
    }

    /// Upstream has accepted the request for a token's stream, or has sent something on it.
    pub(super) fn on_stream_activity(&mut self, token: &TokenDigest, now: Instant) {
        self.streams.on_activity(token, now);
    }

    /// A token's stream could not be opened.
    pub(super) fn on_stream_unavailable(
        &mut self,
        token: &TokenDigest,
        refusal: StreamUnavailable,
        now: Instant,
        jitter: f64,
    ) {
        if self.streams.on_unavailable(token, refusal, now, jitter).poll_now {
            self.schedule.poll_now(now);
        }
    }

    /// A token's stream has delivered its state. Returns false, and changes nothing, if that is older than
    /// the known one: the stream is then closed as [`CloseReason::Stale`].
    pub(super) fn on_stream_flags_received(
        &mut self,
        token: &TokenDigest,
        Applied { event_id, changed, removed_flags }: Applied,
        now: Instant,
    ) -> bool {
        if changed.is_some() && self.documents.is_stale_event(token, event_id, now) {
            return false;
        }
        let credential = self.streams.credential(token);
        // While polls fail, or upstream has sent `Retry-After`, no extra poll is made.
        if self.has_several_tokens()
            && self.documents.defer_removal(credential, &removed_flags, now + self.removal_grace)
            && self.schedule.failures() == 0
        {
            self.schedule.poll_now(now);
        }
        self.documents.apply_stream_flags(credential, event_id, changed, now);
        self.streams.mark_synced(token);
        if self.is_streaming() {
            // Earlier poll failures no longer matter.
            self.schedule.reset_failures();
        }
        true
    }

    /// A token's stream was closed. Returns the reason: a stream that ended before it delivered its state
    /// counts as broken.
    pub(super) fn on_stream_closed(
        &mut self,
        token: &TokenDigest,
        reason: CloseReason,
        now: Instant,
        jitter: f64,
    ) -> CloseReason {
        let was_streaming = self.is_streaming();
        let (reason, next) = self.streams.on_closed(token, reason, now, jitter);
        if reason == CloseReason::Unreadable {
            // The next stream starts with a full state.
            self.documents.clear_event_id(token);
        }
        if next.poll_now {
            self.schedule.poll_now(now);
        } else if was_streaming {
            self.schedule.poll_after_interval(now, jitter);
        }
        reason
    }
}

#[cfg(test)]
mod tests;
