//! Parapet: an open-source edge for Unleash feature flags.
//!
//! It stands in front of an Unleash server, and SDKs talk to it instead. It validates client tokens
//! against an in-memory cache, serves flag configuration from an atomically swapped snapshot,
//! evaluates flags for frontend SDKs, and sends usage upstream in batches under its own credentials.
//!
//! # Tenets, in order
//!
//! 1. **Correct**: the same answer the official SDKs give, proven by their specification and by real
//!    servers and SDKs.
//! 2. **Steady**: losing the upstream, a store or a neighbour never changes what is served, and never
//!    loses what was counted.
//! 3. **Fast**: the common request is a hash lookup, an atomic load and a `Bytes` clone.
//! 4. **Plain**: one process, one crate, readable in an afternoon.
//!
//! # The map
//!
//! Imports only point down, and a child never imports its parent's facade; a test holds the code to
//! it (`tests/it/house.rs`).
//!
//! | layer | modules | hold |
//! |---|---|---|
//! | assembly | [`app`], [`config`], [`command`], [`probe`] | what a mode is made of, what the operator says, what the command line tells by itself, what a container's health check asks |
//! | surface | [`http`] | listeners, routes, replies; the only place that chooses status codes |
//! | control | [`control`] | accounts, tokens, sessions, the audit log and the usage of an instance that stands on its own, over SQL |
//! | services | [`sync`], [`auth`], [`usage`], [`answers`], [`feed`] | what goes on by itself, each with its own task and state; and what only works on the state below |
//! | state | [`snapshot`], [`upstream`], [`store`], [`saver`], [`tls`] | what is served, the server in front of which we stand, what outlives a restart, and saving it in the background; the certificates of the listeners |
//! | pure core | [`engine`] | flags compiled to data, and evaluated; no IO, clock, chance or logs |
//! | words | [`token`], [`wire`], [`telemetry`], [`secret_file`], [`throttle`] | tokens and grants, Unleash's JSON, logs and readiness, secrets in files, how often may be tried |
//!
//! # Three questions make a mode
//!
//! Where do flags come from, who vouches for a token, and where does usage go? [`app`] answers them
//! once per mode; nothing else asks which mode this is.
//!
//! # Walkthroughs
//!
//! **A connection.** [`http::listener`] gives it a place, or one that an idle connection leaves; learns
//! from a load balancer whose it is (PROXY protocol) and from [`tls`] who speaks; and lets hyper serve it,
//! through hyper's public interfaces alone. One policy around that, which reads counters and no
//! clock, says when it has lasted long enough. Leaving is said before it is done: while the
//! instance drains, every answer tells its client to come back on another connection.
//!
//! **An SDK's request.** [`http::data`] parses the path to a
//! [`http::route::Route`] and has [`auth`] judge the token: a known one is a look-up by digest, a
//! first-seen one waits for one question that it shares with others. The handler loads the
//! [`snapshot`] once. For server SDKs the body is there, in every coding. For frontends [`answers`]
//! takes what of the context the flags can tell, and evaluates only what nobody was told before; the
//! hash of the outcome is the entity tag, so that a 304 needs no body. What is ready is answered in the call
//! itself; only what has to be waited for becomes a future. Nothing is cached by the bytes of a request:
//! behind an ingress no two are the same.
//!
//! **A refresh.** [`sync`] asks [`upstream`] with a token that its `Credentials` have found or
//! minted, reads the document ([`wire::features`]) without losing a byte of any flag, takes of each
//! project the newest state where several tokens see it, compiles it
//! ([`engine`]), builds the bodies that the previous snapshot had been asked for, answers what
//! frontends asked it before ([`answers::prepare`]), swaps, and has it saved by a task of its own. What did not change is shared:
//! the text of flags, their compiled form, their JSON, and whole bodies. A malformed flag is a reported problem and never an abort. Where upstream tells by a stream what
//! changes, that is applied to what is known instead, and nothing is polled as long as it tells.
//!
//! **A change.** [`feed`] numbers each new state and wakes those who follow its environment. Each
//! asks, when its connection has room, what has changed since the state that it was told last;
//! that is written once for all who see the same and come from the same state
//! ([`http::streaming`]). Frontends that follow are evaluated for anew, once for all whose contexts the
//! flags cannot tell apart, and told what came to something else ([`answers::followed`]).
//!
//! **A report.** [`http::report`] reads it, [`usage`] merges it per environment, hour, application
//! and flag; at the interval a whole generation moves to the outbox, which says what to send and
//! when. What upstream does not take is kept, merged further, and stored at the end.
//!
//! **An operator's change.** The pages of [`http::console`] ask the admin API, as `curl` does.
//! [`http::admin`] finds the row of its table, and who asks: by an admin token, or by a session that
//! changes things from its own pages only. [`control`] judges whether they may, changes the database
//! and writes the audit event in one transaction, and gives [`auth`] the tokens that are valid now
//! before it answers. Other instances learn of it from the database. At an edge that relays, upstream
//! does all this, and [`auth`] is told which token a change was of.
//!
//! **A reload.** SIGHUP has [`config`] read again and checked as a whole; [`app`] applies the settings
//! that can change while an instance runs, and logs those that need a restart. The upstream admin token
//! is also read again when its file changes. [`upstream`] holds it, and records when it is refused;
//! [`app`] then closes the admin listener to it, and seals stored credentials anew after a replacement.
//! [`tls`] follows the files of the listeners' certificates by itself.
//!
//! **The end.** Readiness goes first, and every answer tells its client to leave; after the drain delay
//! the listeners stop, idle connections are closed and requests finish; the last usage is flushed or
//! stored; the verdicts are stored.
//!
//! # What is deliberately absent
//!
//! * No snapshot is ever emptied by a failing upstream, whatever its status.
//! * No request waits for upstream but one with a first-seen token, and that with a deadline.
//! * No request and no flag waits for a disk once the instance serves.
//! * No plaintext token outside [`token::Token`]; stores hold digests, or what is sealed under a key
//!   derived from the admin token.
//! * No typed round trip of flag configuration: text that came is text that goes.
//! * No revision of upstream's in flag configuration: it counts changes outside a token's scope, and
//!   would change the body where nothing that is served has changed. `meta` names a revision of our
//!   own, the time in seconds at which the state was first seen. It is no part of the entity tag,
//!   since instances behind one balancer see a state at different times: equal flags have equal tags.
//!   As far as their clocks agree, an older state never has a higher revision than a newer one.

pub mod answers;
pub mod app;
pub mod auth;
pub mod command;
pub mod config;
pub mod control;
pub mod engine;
pub mod feed;
pub mod http;
pub mod probe;
pub mod saver;
pub mod secret_file;
pub mod snapshot;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod throttle;
pub mod tls;
pub mod token;
pub mod upstream;
pub mod usage;
pub mod wire;
