//! The HTTP surface: listeners, routes and replies.

pub mod access;
pub mod coding;
pub mod conditional;
pub mod cors;
pub mod reply;
pub mod route;
