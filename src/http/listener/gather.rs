//! Writing several pieces at once: as one where they are small, as a list where they are not.
//!
//! What is not taken at once is left to the caller.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use smallvec::SmallVec;
use tokio::io::AsyncWrite;

/// Up to how many bytes are copied to be written at once, which costs less than what the kernel does
/// for a list: one flag's change, mostly, or the flags of a small set.
pub(super) const SMALL: usize = 4096;

/// Writes what it can of `pieces`, in their order, and tells how many bytes that was.
pub(super) fn poll_write<W: AsyncWrite>(
    io: Pin<&mut W>,
    cx: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [only] = pieces {
        return io.poll_write(cx, only);
    }
    let whole: usize = pieces.iter().map(|piece| piece.len()).sum();
    if whole > SMALL {
        return io.poll_write_vectored(cx, pieces);
    }
    let mut copy = SmallVec::<[u8; SMALL]>::new();
    for piece in pieces {
        copy.extend_from_slice(piece);
    }
    io.poll_write(cx, &copy)
}
