//! What a scrape asks of the kernel and of the daemon's other parts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use husk_dataplane::nft::CounterValue;
use husk_dataplane::{nft, policy, xfrm};
use husk_overlay::issue::Issue;
use tokio::sync::watch;

use super::families::{Fixed, Inputs};
use super::{Live, Process};
use crate::engine::State;
use crate::flows::Flows;
use crate::report::Counter;

/// Where everything is to be had.
#[derive(Debug, Clone)]
pub struct Gathering {
    /// What does not change while the daemon runs.
    pub fixed: Arc<Fixed>,
    /// What is counted where it happens.
    pub live: Live,
    /// What the last pass left.
    pub states: watch::Receiver<State>,
    /// What is wrong with the configuration.
    pub configuration: watch::Receiver<Option<Issue>>,
    /// What is recorded of flows.
    pub flows: Flows,
}

impl Gathering {
    /// Issues of the last pass, and that of the configuration.
    #[must_use]
    pub fn issues(&self) -> Vec<Issue> {
        let mut issues = self.states.borrow().issues.clone();
        issues.extend(self.configuration.borrow().clone());
        issues
    }

    /// Gathers; asks the kernel, so that the thread may wait.
    #[must_use]
    pub fn gather(&self) -> Inputs {
        let (sample, sample_age) = self.live.sample();
        let fixed = Arc::clone(&self.fixed);
        let esp = fixed.mode.uses_esp();
        Inputs {
            live: self.live.clone(),
            ready: self.states.borrow().ready,
            issues: self.issues(),
            sample,
            sample_age,
            flows: self.flows.totals(),
            guard: counters(nft::read_counters(), "counters of drops"),
            policy: if fixed.policy {
                counters(policy::read_counters(), "counters of policy")
            } else {
                BTreeMap::new()
            },
            xfrm: if esp { xfrm::statistics() } else { BTreeMap::new() },
            process: Process::read(),
            now: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            fixed,
        }
    }
}

/// Without a table there are none: the first pass makes it.
fn counters(
    read: Result<BTreeMap<String, CounterValue>, husk_dataplane::Error>,
    what: &str,
) -> BTreeMap<String, Counter> {
    match read {
        Ok(counters) => counters
            .into_iter()
            .map(|(name, value)| (name, Counter { packets: value.packets, bytes: value.bytes }))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "{what} cannot be read");
            BTreeMap::new()
        }
    }
}
