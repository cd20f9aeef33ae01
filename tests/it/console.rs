//! The console in a real browser, and real SDKs with the tokens that were created in it.

mod browser;
mod edge_console;
mod flag_details;
mod keyboard_and_layout;
mod permissions_and_sessions;
mod tokens;
