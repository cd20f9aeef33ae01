//! Keeps snapshots current, from upstream or from files. Each environment is synchronised independently.
//!
//! A failing source changes nothing that is served: the last known flags stay, and fetches are retried
//! with exponential backoff. This module does not interpret flags (`engine` does) and does not decide
//! who may read them (`auth` does).

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

pub use self::{course::UpstreamMode, followed::Config};
