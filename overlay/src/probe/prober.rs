//! The state machine of probing.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Path, Report, Shot, Target};
use crate::name::NodeName;

/// Decides what to send, and what answers mean.
#[derive(Debug)]
pub struct Prober {
    reports: BTreeMap<Path, Report>,
}

impl Prober {
    /// Knows no path yet. `seed` is random: ids of probes, and when what is sent, come from it.
    #[must_use]
    pub fn new(_seed: u64) -> Self {
        Self { reports: BTreeMap::new() }
    }

    /// What there is to be probed from now on.
    pub fn set_targets(&mut self, _targets: &BTreeMap<Path, Target>, _now: Duration) {}

    /// What to send now. Answers that have arrived are to be told of before, or they count as missing.
    pub fn due(&mut self, _now: Duration) -> Vec<Shot> {
        Vec::new()
    }

    /// When to call [`Prober::due`] again, as time since boot; none while there is nothing to probe.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        None
    }

    /// A probe was answered.
    pub fn answered(&mut self, _id: u64, _now: Duration) {}

    /// This host's own kernel refused to send a probe, which says nothing about the path.
    pub fn refused(&mut self, _id: u64, _now: Duration) {}

    /// Somebody wants to know at once: what is promised is verified, and a limit looked for anew.
    pub fn demand(&mut self, _peer: &NodeName, _now: Duration) {}

    /// All paths.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<Path, Report> {
        self.reports.clone()
    }

    /// Peers to which less passes than is promised, with the bytes of the largest packet that passes in every family; not
    /// below the floor.
    #[must_use]
    pub fn limits(&self) -> BTreeMap<NodeName, u32> {
        BTreeMap::new()
    }
}
