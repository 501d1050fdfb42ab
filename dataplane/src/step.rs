//! Changes as rtnetlink requests: a change may take several, and some of them may fail without harm.

use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use crate::error::Error;
use crate::netlink::{Request, Socket};

/// Which errors of a request are as good as success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tolerance {
    /// None.
    Nothing,
    /// Those that say that the object of a removal is not there.
    Absent,
    /// All: the request is a nicety.
    Anything,
}

impl Tolerance {
    fn forgives(self, error: &Error) -> bool {
        match self {
            Self::Nothing => false,
            Self::Absent => matches!(
                error.errno(),
                Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::ENXIO | Errno::EADDRNOTAVAIL)
            ),
            Self::Anything => true,
        }
    }
}

/// One request of a change.
#[derive(Clone)]
pub(crate) struct Step {
    pub(crate) request: Request<RouteNetlinkMessage>,
    pub(crate) tolerance: Tolerance,
}

impl Step {
    /// A request that has to succeed.
    pub(crate) fn strict(operation: &'static str, object: String, flags: u16, message: RouteNetlinkMessage) -> Self {
        Self { request: Request { operation, object, flags, message }, tolerance: Tolerance::Nothing }
    }

    /// A removal, which succeeds also when there is nothing to remove.
    pub(crate) fn removal(operation: &'static str, object: String, message: RouteNetlinkMessage) -> Self {
        Self { request: Request { operation, object, flags: 0, message }, tolerance: Tolerance::Absent }
    }
}

/// Makes changes, all their requests in as few datagrams as possible; a change succeeds when none of its requests fails in a
/// way that matters. A change that could not be put into requests passes its error on.
pub(crate) fn perform(socket: &mut Socket, changes: Vec<Result<Vec<Step>, Error>>) -> Vec<Result<(), Error>> {
    let (mut requests, mut tolerances) = (Vec::new(), Vec::new());
    let mut counts = Vec::with_capacity(changes.len());
    for change in changes {
        counts.push(change.map(|steps| {
            let count = steps.len();
            for step in steps {
                requests.push(step.request);
                tolerances.push(step.tolerance);
            }
            count
        }));
    }
    let mut results = socket.batch(requests).into_iter().zip(tolerances);
    let settle = |count: usize| {
        let mut outcome = Ok(());
        for (result, tolerance) in results.by_ref().take(count) {
            match result {
                Err(error) if tolerance.forgives(&error) => tracing::debug!(%error, "tolerated"),
                Err(error) if outcome.is_ok() => outcome = Err(error),
                _ => {}
            }
        }
        outcome
    };
    counts
        .into_iter()
        .map({
            let mut settle = settle;
            move |count| count.and_then(&mut settle)
        })
        .collect()
}
