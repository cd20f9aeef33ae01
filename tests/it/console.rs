//! The console in a real browser, and real SDKs with the tokens that were created in it.

mod driver;
mod edges;
mod flags;
mod pages;
mod sessions;
mod tokens;
