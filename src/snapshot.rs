//! What is served: immutable state per environment, swapped whole.

pub mod body;
