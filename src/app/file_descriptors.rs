//! Divides the available file descriptors among the listeners.
//!
//! A connection takes one. Descriptors for files, the database, upstream and the admin listener are
//! reserved, so that probes are answered and usage is stored no matter how many clients connect.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Descriptors reserved for files, the database and upstream.
const RESERVED_INTERNAL: usize = 96;

/// The largest number of descriptors reserved for connections of operators.
const MAX_RESERVED_ADMIN: usize = 256;

/// The number of connections that each listener may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct ConnectionBudget {
    pub(super) data: usize,
    /// For the admin listener, and again for the redirecting listener.
    pub(super) admin: usize,
}

/// The number of connections that the configuration requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct RequestedConnections {
    /// Connections on the data listener.
    pub(super) connections: usize,
    /// Whether the number is configured; otherwise half of it is enough without a warning.
    pub(super) is_explicit: bool,
}

/// Raises this process's limit to the system's maximum and divides it.
pub(super) fn allocate(requested: RequestedConnections) -> ConnectionBudget {
    let limit = raise_limit();
    let connections = split(limit, requested.connections);
    let enough =
        if requested.is_explicit { requested.connections } else { requested.connections / 2 };
    if connections.data < enough {
        warn!(
            descriptors = limit,
            wanted = requested.connections,
            connections = connections.data,
            "Too few file descriptors for --max-connections; raise the limit (ulimit -n, LimitNOFILE=)"
        );
    }
    connections
}

/// Raises the descriptor limit as far as possible and returns it.
fn raise_limit() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// Divides `limit` descriptors. Each listener gets at least one, however few there are.
fn split(limit: usize, requested: usize) -> ConnectionBudget {
    let internal = RESERVED_INTERNAL.min(limit / 2);
    let admin = requested.min(MAX_RESERVED_ADMIN).min(limit / 16).max(1);
    let data = limit.saturating_sub(internal).saturating_sub(2 * admin).min(requested).max(1);
    ConnectionBudget { data, admin }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_listener_gets_what_reservations_leave() {
        let check = |limit, requested, data, admin| {
            assert_eq!(
                split(limit, requested),
                ConnectionBudget { data, admin },
                "{limit} for {requested}"
            );
        };
        check(usize::MAX, 20_000, 20_000, 256);
        check(20_480, 20_000, 19_872, 256);
        check(1024, 20_000, 800, 64);
        check(256, 20_000, 128, 16);
        check(16, 20_000, 6, 1);
        check(1024, 2, 2, 2);
        check(0, 1, 1, 1);
    }

    #[test]
    fn limit_is_raised_to_the_system_maximum() {
        let limit = raise_limit();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        assert_eq!(current.map_or(usize::MAX, |it| usize::try_from(it).unwrap()), limit);
    }
}
