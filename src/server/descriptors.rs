//! How many files may be open. A connection is one, whoever opened it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For all else: the admin listener's connections, standard error, what runtimes need.
const OTHERS: usize = 200;

/// Raises the limit to what is allowed, since the usual one, 1,024, is for programs that
/// know no better. Tells how many connections fit beside so many creates, each of which may
/// have one to the API.
pub(super) fn make_room(connections: usize, creates: usize) -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised); // what holds is asked next
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    let fit = connections.min(that_fit(limit, creates));
    if fit < connections {
        tracing::warn!(
            limit,
            connections = fit,
            "as many files may not be open as --max-connections and --max-in-flight can need: \
             there will be fewer connections. Raise the limit (ulimit -Hn), or lower these"
        );
    }
    fit
}

/// At least half of what there is, or nobody could call.
fn that_fit(limit: usize, creates: usize) -> usize {
    let room = limit.saturating_sub(OTHERS);
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
            assert_eq!(that_fit(limit, creates), expected, "{limit} {creates}");
        }
    }
}
