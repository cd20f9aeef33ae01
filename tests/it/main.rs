//! The integration tests, one binary: each module tells one story about Parapet from outside.

/// Exit statuses, help and probes.
mod command_line;
mod spec;
