//! Unleash JSON as it is on the network.

pub mod context;
