//! File descriptors: how many there are, and who gets how many.
//!
//! A connection takes one. Those that files, the database, upstream and the operators' listener need are
//! set aside, so that however many clients come, probes are answered and usage is stored.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// How many are set aside for files, the database and upstream.
const OWN: usize = 96;

/// The most connections of operators that some are set aside for.
const OPERATORS: usize = 256;

/// How many connections each listener may have.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Connections {
    pub(super) data: usize,
    /// That of operators, and as many again the one that redirects.
    pub(super) admin: usize,
}

/// How many connections an operator wants on each listener.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Wanted {
    /// So many.
    pub(super) connections: usize,
    /// Whether somebody has said so; else some less will do.
    pub(super) is_said: bool,
}

/// Raises the limit of this process to the most that the system allows it, and divides what there is.
pub(super) fn divide(wanted: Wanted) -> Connections {
    let limit = raise();
    let connections = share(limit, wanted.connections);
    let enough = if wanted.is_said { wanted.connections } else { wanted.connections / 2 };
    if connections.data < enough {
        warn!(
            descriptors = limit,
            wanted = wanted.connections,
            connections = connections.data,
            "There are too few file descriptors for --max-connections; raise the limit (ulimit -n, \
             LimitNOFILE=)"
        );
    }
    connections
}

/// The limit on descriptors, raised as far as it can be.
fn raise() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// How many of `limit` descriptors each listener gets; both at least one, with however few.
fn share(limit: usize, asked: usize) -> Connections {
    let own = OWN.min(limit / 2);
    let admin = asked.min(OPERATORS).min(limit / 16).max(1);
    let data = limit.saturating_sub(own).saturating_sub(2 * admin).min(asked).max(1);
    Connections { data, admin }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_what_the_rest_leaves() {
        let check = |limit, asked, data, admin| {
            assert_eq!(share(limit, asked), Connections { data, admin }, "{limit} for {asked}");
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
    fn the_limit_is_raised_to_what_the_system_allows() {
        let limit = raise();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        assert_eq!(current.map_or(usize::MAX, |it| usize::try_from(it).unwrap()), limit);
    }
}
