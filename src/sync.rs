//! Keeps snapshots current, from upstream or from files. Each environment is synchronised independently.
//!
//! A failing source changes nothing that is served: the last known flags stay, and fetches are retried
//! with exponential backoff. This module does not interpret flags (`engine` does) and does not decide
//! who may read them (`auth` does).

mod document_parts;
pub mod environment_manager;
mod environment_state;
mod environment_sync;
mod environment_tracker;
mod fetched_documents;
pub mod file_source;
mod fleet_sync;
mod merge;
mod part_precedence;
mod poll_once;
mod poll_schedule;
mod publish;
mod reconnect;
mod shared_environments;
mod stream_events;
mod stream_pool;
mod token_precedence;
mod token_streams;

pub use self::{environment_state::Config, reconnect::UpstreamMode};
