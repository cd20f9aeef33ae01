//! On what terms an answer may be given again to the same request.

use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use jiff::Timestamp;

use crate::{
    answers::Holds,
    auth::Authenticator,
    http::meter::{Meter, SeriesId},
    snapshot::{Snapshot, Snapshots},
    token::{Grant, TokenDigest},
};

/// What an answer rests on, besides the bytes that asked for it, and what it is counted as.
#[derive(Debug)]
pub struct Terms {
    pub(super) basis: Basis,
    pub(super) series: SeriesId,
    /// Of its body, in bytes.
    pub(super) size: u64,
}

/// What an answer rests on: a token, the flags, and the time.
#[derive(Debug)]
pub(super) struct Basis {
    pub(super) digest: TokenDigest,
    pub(super) grant: Arc<Grant>,
    /// Its memory is free to go when others take its place.
    pub(super) snapshot: Weak<Snapshot>,
    pub(super) holds: Holds,
}

impl Basis {
    /// Whether the same would be answered now; that counts as the token's use.
    fn is_same(&self, auth: &Authenticator, snapshots: &Snapshots) -> bool {
        self.holds.at(Timestamp::now)
            && snapshots.is_current(&self.grant.scope.environment, &self.snapshot)
            && auth.still_admits(&self.digest, &self.grant)
    }
}

impl Terms {
    /// Whether the same would be answered now, which is counted then.
    pub(super) fn hold(
        &self,
        auth: &Authenticator,
        snapshots: &Snapshots,
        meter: &Meter,
        started: Instant,
    ) -> bool {
        let is_same = self.basis.is_same(auth, snapshots);
        if is_same {
            meter.count(self.series, self.size, started.elapsed());
        }
        is_same
    }
}
