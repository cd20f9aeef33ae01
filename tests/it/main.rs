//! The integration tests, one binary: each module tells one story about Parapet from outside.
#![allow(clippy::unwrap_used, reason = "what fails here fails a test, and says where")]
#![allow(clippy::disallowed_methods, reason = "the rules of the house are for the house")]

/// Lists of addresses.
mod addresses;
/// Tokens at the door.
mod attacks;
mod auth;
/// Text that begins with a byte order mark.
mod byte_order_mark;
/// Two edges, one behind the other.
mod chain;
/// The API of server SDKs.
mod client_api;
/// Exit statuses, help and probes.
mod command_line;
/// The console in a browser.
mod console;
/// Accounts, tokens and the audit log of a standalone.
mod control;
/// What SDKs count, on its way to an upstream that is healthy or refuses it.
mod counts;
/// The control plane in this process, on each of its databases.
mod database;
/// Dates in constraints and contexts.
mod dates;
/// A day with faults, and what is logged of it.
mod day;
/// How connections are kept, shared and ended.
mod door;
/// An edge in front of a healthy Unleash.
mod edge;
/// Flags from files.
mod flag_files;
/// A flood of made-up tokens.
mod flood;
/// An edge whose upstream tells changes on a stream, or fails at that.
mod follow;
/// Frontends that follow changes.
mod following;
/// An edge whose tokens overlap and lag, whose disk hangs, or that has nothing to serve yet.
mod freshness;
/// The API of frontend SDKs.
mod frontend_api;
/// What of a request becomes its context.
mod frontend_context;
/// The rules of the house.
mod house;
/// What one client may take and send.
mod limits;
/// Parapet in this process, for tests of its answers.
#[allow(dead_code, reason = "a kit like the rig: each story uses the parts it needs")]
mod local;
/// What flag configuration says of itself.
mod meta;
/// OpenFeature's providers.
mod ofrep;
/// The API's document.
mod openapi;
/// What operators configure and see.
mod ops;
/// An edge whose upstream is away.
mod outage;
/// An edge whose tokens see a part each, and whose environments come and go.
mod parts;
/// Upstream through a proxy, and past it.
mod proxy;
/// An edge and what lies between it and its upstream.
mod reach;
/// An edge that passes upstream's admin API on.
mod relay;
/// Secrets and settings that change while an instance runs.
mod reload;
/// Tokens that are made and revoked while an edge runs.
mod revocation;
/// Real servers, real SDKs and a network that can be made to fail.
#[allow(dead_code, unused_imports, reason = "the rig is a kit: stories use the parts they need")]
mod rig;
/// What must not show anywhere.
mod secrecy;
/// What one client may take from others by what it reports.
mod shares;
/// The official client specification.
mod spec;
/// A server of its own, as its owner meets it.
mod standalone;
/// Server SDKs that follow changes.
mod streaming;
/// TLS on the listeners and towards upstream.
mod tls;
/// What real Unleash servers do, as far as Parapet relies on it.
mod upstream_facts;
/// Our engine beside the reference engine, on random flags.
mod yggdrasil;
