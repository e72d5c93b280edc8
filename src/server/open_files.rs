//! The limit on open files. Each connection, in or out, needs a file descriptor.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors for everything else: admin connections, standard error, the runtimes.
const RESERVED: usize = 200;

/// Raises the soft limit to the hard limit: the usual soft limit, 1,024, exists only for programs
/// that use `select`. Returns how many connections fit beside this many creates, each of which
/// may have a connection to the API.
pub(super) fn raise_limit(connections: usize, creates: usize) -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised); // the next call reads the result
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    let fit = connections.min(connections_that_fit(limit, creates));
    if fit < connections {
        tracing::warn!(
            limit,
            connections = fit,
            "the limit on open files is too low for --max-connections and --max-in-flight: fewer \
             connections are accepted. Raise the limit (ulimit -Hn), or lower these settings"
        );
    }
    fit
}

/// At least half of the limit, or no client could connect.
fn connections_that_fit(limit: usize, creates: usize) -> usize {
    let room = limit.saturating_sub(RESERVED);
    room.saturating_sub(creates).max(room / 2).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_creates() {
        for (limit, creates, expected) in [
            (usize::MAX, 1000, usize::MAX - 1200),
            (20_000, 1000, 18_800),
            (1024, 250, 574),
            (1024, 1000, 412),
            (100, 1000, 1),
        ] {
            assert_eq!(
                connections_that_fit(limit, creates),
                expected,
                "{limit} {creates}"
            );
        }
    }
}
