//! The integration tests, in one binary. Each module tests one subject of Parapet from outside.
#![allow(clippy::unwrap_used, reason = "a panic fails the test and names the line")]
#![allow(clippy::disallowed_methods, reason = "these rules are for the crate itself")]

/// An edge that relays the admin API of its upstream.
mod admin_relay;
/// Rules about the source code: layers, imports and forbidden calls.
mod architecture;
/// Which tokens are accepted on which routes.
mod auth;
/// JSON bodies and files that begin with a byte order mark.
mod byte_order_mark;
/// The API of server SDKs.
mod client_api;
/// The official client specification.
mod client_specification;
/// Streaming and delta events for server SDKs.
mod client_streaming;
/// Exit codes, help texts and probes.
mod command_line;
/// How connections are kept alive, shared, limited and closed.
mod connections;
/// The console in a browser.
mod console;
/// Accounts, tokens and the audit log of a standalone.
mod control_plane;
/// The control plane in this process, on SQLite and on PostgreSQL.
mod control_plane_in_process;
/// Dates in constraints and contexts.
mod dates;
/// Cheap attacks without a valid token, or with a public one.
mod denial_of_service;
/// An edge with a healthy Unleash as its upstream.
mod edge;
/// An edge that uses another edge as its upstream.
mod edge_behind_edge;
mod event_log;
/// The `meta` object of feature responses.
mod features_meta;
/// Flags that are read from files.
mod flag_files;
/// Instances that share a Redis: leases and shared documents.
mod fleet;
/// The processes of a fleet during faults.
mod fleet_processes;
/// Edges that share a Redis: their flags, and their polls.
mod fleet_sync;
/// The usage of a fleet, read back from upstream.
mod fleet_usage;
/// The usage of a fleet, with a scripted upstream.
mod fleet_usage_in_process;
/// The usage of a fleet in Redis.
mod fleet_usage_log;
/// An edge with overlapping tokens, stale replicas, a hanging disk, or no flags yet.
mod freshness;
/// The API of frontend SDKs.
mod frontend_api;
/// Which parts of a frontend request become its evaluation context.
mod frontend_context;
/// Streaming for frontend clients.
mod frontend_streaming;
/// Parapet in this process, for tests of its responses.
#[allow(dead_code, reason = "a toolkit: each test uses parts of it")]
mod in_process_parapet;
/// Limits on bodies, contexts and connections of one client.
mod invalid_and_oversized_requests;
/// How lists of IP addresses match.
mod ip_address_lists;
/// The log of a standalone and an edge during many faults.
mod log_audit;
/// An edge whose tokens each see one project, and whose environments appear and disappear.
mod multi_token_sync;
/// OpenFeature: the official providers and the protocol.
mod ofrep;
/// The OpenAPI document against the responses.
mod openapi;
/// Settings, probes, metrics and the admin listener.
mod operator_settings;
/// Secrets and settings that change at run time.
mod reload;
/// Real servers, real SDKs and proxies that inject faults.
#[allow(dead_code, unused_imports, reason = "a toolkit: each test uses parts of it")]
mod rig;
/// Tokens never appear in errors, logs, files or pages.
mod secret_leaks;
/// A standalone server.
mod standalone_lifecycle;
/// Stores on real servers.
mod store;
/// TLS on the listeners and towards upstream.
mod tls;
/// 100,000 made-up tokens.
mod token_flood;
/// Tokens that are created and revoked at run time.
mod token_list_and_revocation;
/// The behaviour of real Unleash servers that Parapet relies on.
mod unleash_assumptions;
/// Connections to upstream through an HTTP proxy.
mod upstream_http_proxy;
/// Redirects, certificates and other obstacles between an edge and its upstream.
mod upstream_misconfiguration;
/// An edge whose upstream is unavailable.
mod upstream_outage;
/// An edge that streams changes from its upstream.
mod upstream_streaming;
/// Usage and registrations on their way to an upstream that accepts or rejects them.
mod usage_delivery;
/// Quotas that keep one client's reports from displacing another's.
mod usage_quotas;
/// The engine against yggdrasil, Unleash's own engine, on random flags.
mod yggdrasil;
