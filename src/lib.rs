//! Parapet: an open-source edge for Unleash feature flags.
//!
//! Parapet runs between SDKs and an Unleash server, or on its own without one. It validates client
//! tokens against an in-memory cache, serves flag configuration from an atomically swapped snapshot,
//! evaluates flags for frontend SDKs, and sends usage upstream in batches under its own credentials.
//!
//! # Tenets, in order
//!
//! 1. **Correct**: the same results as the official SDKs, proven by their specification and by real
//!    servers and SDKs.
//! 2. **Steady**: losing the upstream, a store or a neighbour never changes what is served, and never
//!    loses recorded usage.
//! 3. **Fast**: the common request is a hash lookup, an atomic load and a `Bytes` clone.
//! 4. **Plain**: one process, one crate, readable in an afternoon.
//!
//! # Layers
//!
//! Imports only point down, and a child module never imports its parent's public interface;
//! `tests/it/architecture.rs` enforces this.
//!
//! | layer | modules | contents |
//! |---|---|---|
//! | assembly | [`app`], [`config`], [`commands`], [`probe`] | the parts of each mode, the configuration, subcommands of the command line, the container health check |
//! | surface | [`http`] | routes, handlers and responses, the only place that chooses status codes |
//! | control plane and server | [`control_plane`], [`server`] | connections and TLS termination, which know no flags; accounts, tokens, sessions, the audit log and the usage of a standalone instance, in SQL |
//! | services | [`sync`], [`auth`], [`event_log`], [`evaluation`], [`changes`], [`fleet`] | background tasks with their state, and the functions that work on the state below |
//! | state | [`snapshot`], [`served`], [`usage`], [`upstream`], [`redis_client`], [`store`], [`background_writer`], [`tls`] | the flags being served with what requests need from them, the usage to be sent, the clients of the upstream server and of Redis, persistent records and writing them in the background, the listeners' certificates |
//! | pure core | [`engine`] | compiled flags and their evaluation; no IO, clock, randomness or logs |
//! | foundations | [`token`], [`protocol`], [`telemetry`], [`secret_file`], [`rate_limit`], [`backoff`], [`cache`], [`shutdown_signal`] | tokens and grants, Unleash's JSON, logs and readiness, secrets in files, rate limits, delays between tries, bounded caches, the end of thousands of tasks |
//!
//! # A mode is three choices
//!
//! A mode chooses the source of flags, the validator of tokens and the destination of usage. [`app`]
//! makes these choices once at the start; no other module depends on the mode.
//!
//! # Walkthroughs
//!
//! **A connection.** [`server`] admits it within its limits, and closes an idle connection to make room
//! if necessary. It reads the client's address from a load balancer (PROXY protocol), terminates TLS
//! with the certificates of [`tls`], and serves HTTP with hyper, through hyper's public API only. One
//! policy decides when a connection has lasted long enough; it reads counters and no clock. While the
//! instance drains, every response asks its client to reconnect, before any connection is closed.
//!
//! **An SDK's request.** [`http::sdk`] finds the route in the table of [`http::routes`].
//! [`http::authorizer`] has [`auth`] validate the token and loads the [snapshot](served::ServedSnapshot)
//! once: a cached token is a lookup by digest, and a first-seen token waits for a validation request that
//! it shares with others. Then the handler of the route's API makes the response. For server SDKs the
//! body is ready in every encoding. For frontend SDKs [`evaluation`] reads only those context fields that
//! affect the flags, and evaluates only combinations that are not cached; the hash of the outcomes is the
//! entity tag, so that a 304 needs no body. A response that is ready is returned synchronously; only one
//! that has to wait becomes a future. Nothing is cached by the bytes of a request, because behind an
//! ingress no two requests are equal.
//!
//! **A refresh.** [`sync`] fetches a document from [`upstream`] with a token that its `Credentials`
//! found or minted. It parses the document ([`protocol::features`]) without losing a byte of any flag,
//! merges the newest state of each project if several tokens see it, and compiles the result
//! ([`engine`]). It builds the bodies that were requested from the previous snapshot, prewarms the
//! evaluations of recent frontend requests ([`evaluation::prewarm()`]), swaps the snapshot, and queues
//! it for [`background_writer`]. Everything unchanged is shared: the text of flags, their compiled form,
//! their JSON, and whole bodies. A malformed flag is reported as a problem and never aborts the refresh.
//! If upstream offers a stream of changes, they are applied to the current document instead, and Parapet
//! does not poll while the stream works. Otherwise, with an admin token, [`event_log`] asks upstream at
//! each interval whether anything was changed, and only what was changed is requested.
//!
//! **A refresh in a fleet.** For each environment one instance leads; [`fleet`] keeps its lease in Redis. The
//! leader refreshes as above, and shares the document with a fencing number, so that a leader of the past
//! cannot overwrite it. A notice tells the other instances, which fetch the document from Redis, compile
//! it and swap it in; they request nothing from upstream. An instance without a leader, or without Redis,
//! synchronises with upstream by itself after a while. Upstream's lists of environments and tokens take the
//! same way, and [`auth`] shares the verdicts about first-seen tokens.
//!
//! **A change.** [`changes`] assigns an id to each new state and wakes the streams of its environment.
//! When its connection can send, each stream requests the changes since the state that it sent last.
//! They are encoded once for all streams with the same scope and the same previous state
//! ([`http::streaming`]). Flags of frontend streams are evaluated again, once for all contexts that the
//! flags do not distinguish, and each stream sends the flags that changed
//! ([`evaluation::subscription`]).
//!
//! **A usage report.** [`http::metrics_ingest`] parses it, and [`usage`] aggregates it per environment,
//! hour, application and flag. At each interval all aggregated counts move to the delivery queue, which
//! decides what to send and when. A [`usage::UsageSink`] sends it upstream, hands it over to the leader of
//! the fleet ([`fleet::FleetUsageSink`]), or stores it in the control plane's database. Counts that it does not accept are kept, aggregated further, and stored at
//! shutdown.
//!
//! **An operator's change.** The pages of [`http::console`] call the admin API, as `curl` does.
//! [`http::admin`] finds the operation in its table and authenticates the caller, by an admin token or
//! by a session, whose changes must come from the console's own pages. [`control_plane`] checks the
//! permission, changes the database and writes the audit event in one transaction, and passes the valid
//! tokens to [`auth`] before it answers. Other instances read the change from the database. An edge that
//! relays forwards the request to upstream, and notifies [`auth`] of the token that changed.
//!
//! **A reload.** On SIGHUP [`config`] reads and validates the whole configuration again; [`app`] applies
//! the settings that can change at runtime, and logs those that need a restart. The upstream admin token
//! is also read again when its file changes. [`upstream`] holds that token, and records when it is
//! rejected; [`app`] then closes the admin listener to it, and encrypts stored credentials again after a
//! replacement. [`tls`] watches the files of the listeners' certificates.
//!
//! **Shutdown.** Readiness is withdrawn first, and every response asks its client to reconnect. After
//! the drain delay the listeners stop, idle connections are closed and requests finish. Then the last
//! usage is delivered or stored, and the cached token validations are stored.
//!
//! # Deliberately absent
//!
//! * A failing upstream never empties a snapshot, regardless of the status code.
//! * Only a request with a first-seen token waits for upstream, and it has a timeout.
//! * Once the instance serves, no request and no flag waits for a disk.
//! * No plaintext token exists outside [`token::Token`]; stores hold digests, or data encrypted with a
//!   key derived from the admin token.
//! * Flag configuration has no typed round trip: its text is served as it was received.
//! * Flag configuration does not contain upstream's revision, which counts changes outside a token's
//!   scope and would change the body although nothing served has changed. `meta` contains a revision of
//!   our own: the time in seconds at which the state was first seen. It is not part of the entity tag,
//!   since instances behind one balancer see a state at different times: equal flags have equal tags. As
//!   far as the clocks of instances agree, an older state never has a higher revision than a newer one.

pub mod app;
pub mod auth;
pub mod background_writer;
pub mod backoff;
pub mod cache;
pub mod changes;
pub mod commands;
pub mod config;
pub mod control_plane;
pub mod engine;
pub mod evaluation;
pub mod event_log;
pub mod fleet;
pub mod http;
pub mod probe;
pub mod protocol;
pub mod rate_limit;
pub mod redis_client;
pub mod secret_file;
pub mod served;
pub mod server;
pub mod shutdown_signal;
pub mod snapshot;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod tls;
pub mod token;
pub mod upstream;
pub mod usage;
