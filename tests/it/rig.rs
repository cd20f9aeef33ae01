//! The rig: real Unleash servers on a private PostgreSQL, the official SDKs, the real `parapet` binary,
//! and a proxy that breaks the connection between them.
//!
//! Everything listens on unused loopback ports, lives in temporary directories, and ends with the test
//! process, even if that is killed. The rig does not use Parapet's internals. `tests/run` installs what
//! it needs.

mod certificate;
pub(crate) mod chaos;
mod clock;
mod deaf;
mod disk;
mod driver;
mod events;
mod kept;
mod net;
mod nginx;
mod parapet;
mod postgres;
mod postgres_proxy;
mod process;
mod sdk;
pub(crate) mod secrets;
mod unleash;

pub(crate) use certificate::Certificate;
pub(crate) use chaos::{ChaosProxy, Fault};
pub(crate) use clock::WallClock;
pub(crate) use deaf::{Deaf, Deafness};
pub(crate) use disk::hanging_disk;
pub(crate) use driver::Driver;
pub(crate) use events::Events;
pub(crate) use kept::{Kept, Outcome, Protocol};
pub(crate) use net::{http, until};
pub(crate) use nginx::Nginx;
pub(crate) use parapet::{Parapet, Setup};
pub(crate) use postgres::Postgres;
pub(crate) use postgres_proxy::{Moment, PostgresProxy};
pub(crate) use process::{node, tests_dir};
pub(crate) use sdk::{Evaluation, Sdk};
pub(crate) use unleash::{Kind, STORED_WITHIN, Unleash, Usage, Version};
