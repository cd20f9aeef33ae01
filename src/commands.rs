//! One-shot commands of the command line, each of which returns a text to print.
//!
//! Serving is in `app`, the health check of a running instance in `probe`.

pub mod backup;
pub mod explain;
pub mod manage;
