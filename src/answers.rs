//! Evaluated flags for frontends: what a context comes to, remembered.
//!
//! An answer is a function of a snapshot, the projects that are seen, and a context. Three facts make
//! it cheap.
//!
//! * Few fields matter. What the seen flags can tell of a context ([`Reads`](crate::engine::Reads))
//!   is the key under which the outcome is remembered; where they depend on the time, the stretch
//!   between two of their dates is part of it. Flags that read nothing were decided when the snapshot
//!   was built.
//! * Few outcomes exist. The hash of what every flag came to is the entity tag, so that a client which
//!   has the answer is told so without a body; and equal outcomes share one body with all its codings.
//! * The JSON of each flag is there for each outcome; a new body strings it together.
//!
//! Where lots are drawn, or flags read a `sessionId` that the request lacks and that is made up for it,
//! the outcomes are good for one request: those flags are evaluated for each, the outcomes of all others
//! and the body come from the cache. There is no state here: all that is
//! remembered belongs to the snapshot and vanishes with it.

mod ahead;
mod answer;
pub mod explained;
pub mod followed;
pub mod session;

pub use self::{
    ahead::prepare,
    answer::{Answer, one, reworded},
};
