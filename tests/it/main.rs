//! The integration tests, one binary: each module tells one story about Parapet from outside.
<<<<<<< HEAD

/// Exit statuses, help and probes.
mod command_line;
=======
mod spec;
>>>>>>> 3890ce2 (engine: Compile flags to data and evaluate them)
