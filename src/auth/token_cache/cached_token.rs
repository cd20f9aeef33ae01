//! A valid token, and what upstream has said about it.
//!
//! Upstream's statements are ordered by the start of their requests. The writers of the token cache
//! exclude each other; this module only keeps what they record.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{token_id::TokenId, token_listing::WholeToken};
use crate::token::{Grant, Token};

/// The start of a request to upstream. Its response counts as of this moment, whenever it arrives.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::auth) struct RequestStart {
    /// Its position in the order of all requests and revocations.
    pub(super) sequence: u64,
    /// `None` is never.
    pub(super) at: Option<Instant>,
    /// Wall clock, for display and for the expiry of listed tokens.
    pub(in crate::auth) wall: Timestamp,
}

impl RequestStart {
    /// Before every request of this process.
    pub(in crate::auth) const NEVER: Self =
        Self { sequence: 0, at: None, wall: Timestamp::UNIX_EPOCH };

    /// When the request was sent; `None` for [`Self::NEVER`].
    pub(in crate::auth) fn requested_at(self) -> Option<Instant> {
        self.at
    }
}

/// A valid token.
#[derive(Debug)]
pub struct CachedToken {
    grant: Arc<Grant>,
    masked: Arc<str>,
    id: TokenId,
    /// Set once the token has been presented to this process.
    plaintext: OnceLock<Token>,
    /// Requests that present the token do not lock it.
    status: Mutex<Status>,
}

/// The state of a valid token, as upstream has last described it.
#[derive(Clone, Copy, Debug, Default)]
struct Status {
    /// Whether upstream's token list has contained it, so that its absence there means revocation.
    is_listed: bool,
    /// The latest request that confirmed it.
    confirmed: RequestStart,
    /// The sequence number of the latest event that made it stale.
    stale_sequence: u64,
    /// The sequence number of the latest request that denied it.
    denied_sequence: u64,
    /// The time of its last revalidation, or the earliest time of the next one.
    recheck_after: Option<Instant>,
}

impl CachedToken {
    /// A token that upstream has called valid to an earlier process.
    pub(super) fn unconfirmed(
        grant: Arc<Grant>,
        masked: Arc<str>,
        id: TokenId,
        is_listed: bool,
    ) -> Self {
        let status = Mutex::new(Status { is_listed, ..Status::default() });
        Self { grant, masked, id, plaintext: OnceLock::new(), status }
    }

    /// A token that upstream calls valid.
    pub(super) fn confirmed(
        token: &WholeToken,
        id: TokenId,
        grant: Grant,
        start: RequestStart,
    ) -> Self {
        let cached = Self::unconfirmed(Arc::new(grant), Arc::clone(&token.masked), id, false);
        cached.status().confirmed = start;
        if let Some(plaintext) = &token.plaintext {
            cached.set_plaintext(plaintext.clone());
        }
        cached
    }

    /// The same token with another grant.
    pub(super) fn with_grant(&self, grant: Grant, start: RequestStart) -> Self {
        let status =
            Status { confirmed: start, denied_sequence: 0, recheck_after: None, ..*self.status() };
        Self {
            grant: Arc::new(grant),
            masked: Arc::clone(&self.masked),
            id: self.id.clone(),
            plaintext: self.plaintext.clone(),
            status: Mutex::new(status),
        }
    }

    /// Kind, environment and projects of the token.
    pub fn grant(&self) -> &Arc<Grant> {
        &self.grant
    }

    /// The token without its secret part, for display.
    pub fn masked(&self) -> &str {
        &self.masked
    }

    pub(super) fn id(&self) -> &TokenId {
        &self.id
    }

    /// The last confirmation by upstream, by the wall clock in whole seconds.
    pub fn confirmed_at(&self) -> Timestamp {
        let seconds = self.status().confirmed.wall.as_second();
        Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// The plaintext of a token that has been presented to this process.
    pub(super) fn plaintext(&self) -> Option<&Token> {
        self.plaintext.get()
    }

    /// Whether the token has not been presented to this process yet.
    pub(in crate::auth) fn is_missing_plaintext(&self) -> bool {
        self.plaintext.get().is_none()
    }

    /// Adds the plaintext of a token that was cached by its digest only.
    pub(in crate::auth) fn set_plaintext(&self, token: Token) {
        // A concurrent request may have set the same plaintext.
        let _ = self.plaintext.set(token);
    }

    pub(super) fn is_listed(&self) -> bool {
        self.status().is_listed
    }

    /// Records that upstream's list contains the token; true if no earlier list did.
    pub(super) fn mark_listed(&self) -> bool {
        !std::mem::replace(&mut self.status().is_listed, true)
    }

    /// Whether a request that began after `start` has confirmed the token.
    pub(super) fn is_confirmed_after(&self, start: RequestStart) -> bool {
        self.status().confirmed.sequence > start.sequence
    }

    pub(super) fn confirm(&self, start: RequestStart) {
        let mut status = self.status();
        if status.confirmed.sequence <= start.sequence {
            status.confirmed = start;
        }
    }

    /// Makes the token due for revalidation at any age, unless a request that began after `order` has
    /// confirmed it.
    pub(super) fn mark_stale(&self, order: u64) {
        let mut status = self.status();
        status.stale_sequence = status.stale_sequence.max(order);
    }

    /// Records a denial; true if an earlier request denied the token too and none has confirmed it
    /// since.
    pub(super) fn record_denial(&self, start: RequestStart) -> bool {
        let mut status = self.status();
        let before = std::mem::replace(&mut status.denied_sequence, start.sequence);
        before > status.confirmed.sequence
    }

    /// Whether the token can be revalidated at `now` and is stale, or was last confirmed before `limit`.
    pub(super) fn is_due(&self, now: Instant, limit: Option<Instant>) -> bool {
        let status = self.status();
        let Status { confirmed, stale_sequence, recheck_after, .. } = *status;
        let is_old = confirmed.at.is_none_or(|at| limit.is_some_and(|limit| at < limit));
        !self.is_missing_plaintext()
            && (is_old || stale_sequence > confirmed.sequence)
            && recheck_after.is_none_or(|after| after <= now)
    }

    /// The time of the last confirmation or revalidation.
    pub(super) fn last_checked(&self) -> Option<Instant> {
        let status = self.status();
        status.confirmed.at.max(status.recheck_after)
    }

    /// Excludes the token from revalidation before `time`.
    pub(super) fn postpone_recheck(&self, time: Instant) {
        let mut status = self.status();
        status.recheck_after = status.recheck_after.max(Some(time));
    }

    /// Ignores poisoning: a panic under this lock leaves plain values.
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
