//! The rig: real Unleash servers on a private PostgreSQL, the official SDKs, the real `parapet` binary,
//! and a proxy that breaks the connection between them.
//!
//! Everything listens on unused loopback ports, lives in temporary directories, and ends with the test
//! process, even if that is killed. The rig does not use Parapet's internals. `tests/run` installs what
//! it needs.

mod certificate;
pub(crate) mod chaos;
mod clock;
mod driver;
mod event_stream;
mod hanging_disk;
pub(crate) mod leak_check;
mod net;
mod nginx;
mod parapet;
mod persistent_connection;
mod postgres;
mod postgres_proxy;
mod process;
mod real_unleash;
mod sdk;
mod stalled_client;

pub(crate) use certificate::SelfSignedCertificate;
pub(crate) use chaos::{ChaosProxy, Fault};
pub(crate) use clock::FakeWallClock;
pub(crate) use driver::Driver;
pub(crate) use event_stream::EventStream;
pub(crate) use hanging_disk::build_hanging_disk_library;
pub(crate) use net::{http, wait_until};
pub(crate) use nginx::Nginx;
pub(crate) use parapet::{Parapet, Setup};
pub(crate) use persistent_connection::{PersistentConnection, Protocol, SendOutcome};
pub(crate) use postgres::Postgres;
pub(crate) use postgres_proxy::{PostgresProxy, SilencePoint};
pub(crate) use process::{node, tests_dir};
pub(crate) use real_unleash::{HourlyUsage, STORE_TIMEOUT, TokenKind, Unleash, UnleashVersion};
pub(crate) use sdk::{Evaluation, Sdk};
pub(crate) use stalled_client::{StallMode, StalledClient};
