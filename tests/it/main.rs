//! The integration tests, one binary: each module tells one story about Parapet from outside.
