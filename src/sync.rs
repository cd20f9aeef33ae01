//! Keeps snapshots current: where flags come from, each environment on its own.
//!
//! A source that fails changes nothing that is served: the last known state stays, and is asked for
//! again with growing pauses. What a malformed flag means is the engine's matter, who may see it
//! `auth`'s.

pub mod files;
mod pace;
mod publish;
mod roll;
mod sources;
pub mod upstream;

pub use self::upstream::Config;
