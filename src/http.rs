//! The HTTP surface: listeners, routes and replies.

pub mod access;
pub mod cors;
