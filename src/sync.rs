//! Keeps snapshots current: where flags come from, each environment on its own.
//!
//! A source that fails changes nothing that is served: the last known state stays, and is asked for
//! again with growing pauses. What a malformed flag means is the engine's matter, who may see it
//! `auth`'s.

mod course;
pub mod files;
mod followed;
mod lines;
mod pace;
mod precedence;
mod publish;
mod roll;
mod round;
mod sources;
mod told;
pub mod upstream;

pub use self::{course::Mode, followed::Config};
