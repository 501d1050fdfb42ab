//! How long a command may take, whatever it has to wait for: a runtime that waits for us holds up the pod, and one that loses
//! patience kills us without a word of what was missing.
//!
//! Every wait (lock of the lease store, daemon, standard input) ends by itself and names what it waited for; the deadline
//! of the command ends their sum. What undoes an ADD is not part of it, but bounded too.

use std::time::{Duration, Instant};

use crate::invocation::Invocation;

/// When a command has to have its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    /// The deadline of a command that begins now.
    pub(crate) fn of(invocation: &Invocation) -> Self {
        let seconds = match invocation {
            // As long as a daemon may take to claim a block and then to admit the pod, and the lock of the lease store between.
            // The kubelet gives a sandbox, of which this is a part, two minutes (`runtimeRequestTimeout`).
            Invocation::Add(_) => 25,
            // Needs nobody but the lock; the runtime repeats it.
            Invocation::Del(_) => 10,
            Invocation::Check(_) | Invocation::Status | Invocation::Version => 15,
            Invocation::Gc => 25,
        };
        Self::after(Duration::from_secs(seconds))
    }

    /// A deadline that long from now.
    pub(crate) fn after(limit: Duration) -> Self {
        Self { started: Instant::now(), limit }
    }

    /// The deadline of a part that begins now and would take `longest` at most.
    pub(crate) fn within(self, longest: Duration) -> Self {
        Self::after(self.allow(longest))
    }

    /// How long one wait may take that would take `longest` at most.
    pub(crate) fn allow(self, longest: Duration) -> Duration {
        longest.min(self.limit.saturating_sub(self.started.elapsed()))
    }

    /// True when it is over.
    pub(crate) fn is_over(self) -> bool {
        self.allow(Duration::MAX).is_zero()
    }

    /// The whole time in seconds, for people.
    pub(crate) fn seconds(self) -> u64 {
        self.limit.as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_gets_what_is_left_and_no_more() {
        let long = Deadline::after(Duration::from_secs(3600));
        assert_eq!(long.allow(Duration::from_secs(5)), Duration::from_secs(5));
        assert!(!long.is_over());
        let over = Deadline::after(Duration::ZERO);
        assert_eq!(over.allow(Duration::from_secs(5)), Duration::ZERO);
        assert!(over.is_over());
    }

    #[test]
    fn a_part_ends_with_the_whole() {
        let patience = Duration::from_secs(10);
        assert_eq!(Deadline::after(Duration::from_secs(3600)).within(patience).limit, patience);
        assert!(Deadline::after(patience).within(Duration::from_secs(3600)).limit <= patience);
        assert!(Deadline::after(Duration::ZERO).within(patience).is_over());
    }
}
