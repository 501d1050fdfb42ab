//! What a path is asked at the moment, and when it wants to ask.

use std::collections::VecDeque;
use std::time::Duration;

use super::chance::Chance;
use super::search::Search;
use super::suspicion::Suspicion;

/// Time between two tries whether a limited path passes more, as a multiple in tenths of the longest time between two checks.
const RECHECK: u32 = 18;

/// When a path wants to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Not before an outcome is known.
    Never,
    /// As a matter of course, from this time on.
    Routine(Duration),
    /// To settle a doubt, or for somebody who waits.
    Urgent(Duration),
}

/// What the paths of a node share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) chance: Chance,
    /// Longest time between two checks of a path.
    pub(super) interval: Duration,
    /// What passed on the path that was found limited last.
    pub(super) guess: Option<u32>,
    /// A path turned out not to pass what is promised, or to pass it again.
    pub(super) alarm: bool,
    /// What was found to pass, if that is less than promised and the peer's other family goes the same way.
    pub(super) limited: Option<u32>,
}

impl Shared {
    pub(super) fn recheck(&self) -> Duration {
        self.interval / 10 * RECHECK
    }
}

/// What an outcome belongs to: those of an earlier phase mean nothing to a later one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fired {
    pub(super) size: u32,
    pub(super) sent: Duration,
    pub(super) phase: u64,
    /// In a doubt: the pair, and whether it is its small one.
    pub(super) pair: (usize, bool),
}

#[derive(Debug)]
pub(super) enum Phase {
    Waiting,
    Checking(Check),
    Doubting(Suspicion, Aim),
    Searching(Search),
}

/// Why a size is doubted.
#[derive(Debug)]
pub(super) enum Aim {
    /// It passed so far, or is promised to.
    Promise,
    /// It is the end of a search.
    Byte(Search),
}

/// Probes at regular times.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) queue: VecDeque<u32>,
    pub(super) open: usize,
    /// Largest size that was answered; 0 if none was.
    pub(super) best: u32,
    /// Somebody waits.
    pub(super) urgent: bool,
}
