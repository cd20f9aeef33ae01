//! The rig: real Unleash servers on a private PostgreSQL, the official SDKs, the real `parapet` binary,
//! a proxy that breaks the connection between them, and one scripted upstream for responses that a real
//! one does not give.
//!
//! Everything listens on unused loopback ports, lives in temporary directories, and ends with the test
//! process, even if that is killed. The rig does not use Parapet's internals. `tests/run` installs what
//! it needs.

mod azure;
pub(crate) mod certificate_authority;
pub(crate) mod chaos;
mod clock;
mod delta_stream;
mod event_stream;
mod guarded_process;
mod hanging_disk;
mod json_lines_driver;
mod log_event;
mod net;
mod nginx_load_balancer;
mod parapet;
mod persistent_connection;
mod postgres;
mod postgres_proxy;
mod real_sdk;
mod real_unleash;
mod redis;
mod s3;
mod scripted_upstream;
pub(crate) mod secret_leak_check;
mod self_signed_certificate;
mod shell;
mod stalled_client;
mod tcp_proxy;

pub(crate) use azure::AzureServer;
pub(crate) use chaos::{ChaosProxy, Fault};
pub(crate) use clock::FakeWallClock;
pub(crate) use delta_stream::{DeltaStream, event_summary, summary};
pub(crate) use event_stream::EventStream;
pub(crate) use guarded_process::{node, tests_dir};
pub(crate) use hanging_disk::build_hanging_disk_library;
pub(crate) use json_lines_driver::Driver;
pub(crate) use log_event::{LogEvent, is_within};
pub(crate) use net::{
    BUSY_MACHINE_FACTOR, free_port, http, send_json, session_cookies, wait_until,
};
pub(crate) use nginx_load_balancer::Nginx;
pub(crate) use parapet::{FEATURES, Parapet, Setup, find_only, start_standalone_for_usage};
pub(crate) use persistent_connection::{PersistentConnection, Protocol, SendOutcome};
pub(crate) use postgres::Postgres;
pub(crate) use postgres_proxy::{PostgresProxy, SilencePoint};
pub(crate) use real_sdk::{Evaluation, Sdk};
pub(crate) use real_unleash::{HourlyUsage, STORE_TIMEOUT, TokenKind, Unleash, UnleashVersion};
pub(crate) use redis::{RedisCluster, RedisSentinels, RedisServer};
pub(crate) use s3::S3Server;
pub(crate) use scripted_upstream::{EntityTags, STREAM, ScriptedUpstream, event, feature};
pub(crate) use self_signed_certificate::SelfSignedCertificate;
pub(crate) use shell::{parapet_command, run_parapet, temp_file_with};
pub(crate) use stalled_client::{StallMode, StalledClient};
pub(crate) use tcp_proxy::TcpProxy;
