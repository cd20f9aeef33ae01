//! The integration tests, in one binary. Each module tests one subject of Parapet from outside.
#![allow(clippy::unwrap_used, reason = "a panic fails the test and names the line")]
#![allow(clippy::disallowed_methods, reason = "these rules are for the crate itself")]

/// How lists of IP addresses match.
mod addresses;
/// Cheap attacks without a valid token, or with a public one.
mod attacks;
mod auth;
/// JSON bodies and files that begin with a byte order mark.
mod byte_order_mark;
/// An edge that uses another edge as its upstream.
mod chain;
/// The API of server SDKs.
mod client_api;
/// Exit codes, help texts and probes.
mod command_line;
/// The console in a browser.
mod console;
/// Accounts, tokens and the audit log of a standalone.
mod control;
/// Usage and registrations on their way to an upstream that accepts or rejects them.
mod counts;
/// The control plane in this process, on SQLite and on PostgreSQL.
mod database;
/// Dates in constraints and contexts.
mod dates;
/// The log of a standalone and an edge during many faults.
mod day;
/// How connections are kept alive, shared, limited and closed.
mod door;
/// An edge with a healthy Unleash as its upstream.
mod edge;
/// Flags that are read from files.
mod flag_files;
/// 100,000 made-up tokens.
mod flood;
/// An edge that streams changes from its upstream.
mod follow;
/// Streaming for frontend clients.
mod following;
/// An edge with overlapping tokens, stale replicas, a hanging disk, or no flags yet.
mod freshness;
/// The API of frontend SDKs.
mod frontend_api;
/// Which parts of a frontend request become its evaluation context.
mod frontend_context;
/// Rules about the source code: layers, imports and forbidden calls.
mod house;
/// Limits on bodies, contexts and connections of one client.
mod limits;
/// Parapet in this process, for tests of its responses.
#[allow(dead_code, reason = "a toolkit: each test uses parts of it")]
mod local;
/// The `meta` object of feature responses.
mod meta;
/// OpenFeature: the official providers and the protocol.
mod ofrep;
/// The OpenAPI document against the responses.
mod openapi;
/// Settings, probes, metrics and the admin listener.
mod ops;
/// An edge whose upstream is unavailable.
mod outage;
/// An edge whose tokens each see one project, and whose environments appear and disappear.
mod parts;
/// Connections to upstream through an HTTP proxy.
mod proxy;
/// Redirects, certificates and other obstacles between an edge and its upstream.
mod reach;
/// An edge that relays the admin API of its upstream.
mod relay;
/// Secrets and settings that change at run time.
mod reload;
/// Tokens that are created and revoked at run time.
mod revocation;
/// Real servers, real SDKs and proxies that inject faults.
#[allow(dead_code, unused_imports, reason = "a toolkit: each test uses parts of it")]
mod rig;
/// Tokens never appear in errors, logs, files or pages.
mod secrecy;
/// Quotas that keep one client's reports from displacing another's.
mod shares;
/// The official client specification.
mod spec;
/// A standalone server.
mod standalone;
/// Streaming and delta events for server SDKs.
mod streaming;
/// TLS on the listeners and towards upstream.
mod tls;
/// The behaviour of real Unleash servers that Parapet relies on.
mod upstream_facts;
/// The engine against yggdrasil, Unleash's own engine, on random flags.
mod yggdrasil;
