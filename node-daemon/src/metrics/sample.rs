//! How things stand: what the loop leaves for scrapes and for the page.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::Standing;

use crate::report::PeerState;

/// How things stood after a pass. Without a pass everything is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Underlay MTU in bytes; none before the first pass.
    pub underlay_mtu: Option<u32>,
    /// MTU in bytes of pod interfaces; none while pods cannot be served.
    pub pod_mtu: Option<u32>,
    /// Which WireGuard device serves: `kernel`, `userspace` or `none`.
    pub device: &'static str,
    /// The own keys; none in modes without.
    pub keys: Option<KeySample>,
    /// The cluster source.
    pub source: SourceSample,
    /// Pods of this node that have a lease.
    pub endpoints: usize,
    /// Address pools of the cluster.
    pub pools: Vec<PoolSample>,
    /// Addresses of this node.
    pub addresses: BTreeMap<Family, AddressSample>,
    /// The other nodes, by name.
    pub peers: Vec<PeerSample>,
}

/// The own keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeySample {
    /// Age of the newest; none before the first.
    pub age: Option<Duration>,
    /// How many are held.
    pub held: usize,
    /// A rotation is under way.
    pub rotating: bool,
}

/// The cluster source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceSample {
    /// It answered when it was last asked.
    pub up: bool,
    /// Since it last answered; none before the first time.
    pub age: Option<Duration>,
}

/// An address pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSample {
    /// Name.
    pub name: String,
    /// Blocks in all; saturates.
    pub blocks: u64,
    /// Blocks that belong to a node.
    pub used: u64,
}

/// Addresses of one family on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressSample {
    /// Blocks of the node.
    pub blocks: u64,
    /// Addresses for pods in them; saturates.
    pub total: u64,
    /// Addresses that pods have.
    pub leased: u64,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerSample {
    /// Name.
    pub node: NodeName,
    /// State.
    pub state: PeerState,
    /// Why it is refused, if it is.
    pub reason: Option<String>,
    /// Underlay address.
    pub address: Option<IpAddr>,
    /// Since the last handshake (WireGuard) or packet received (IPsec); none if there was none, and in modes without.
    pub heard: Option<Duration>,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
    /// What probing found.
    pub paths: Vec<PathSample>,
}

/// A path to another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathSample {
    /// Family of the packets inside the tunnel.
    pub family: Family,
    /// What is known of it.
    pub standing: Standing,
    /// Bytes that the plan says pass.
    pub promised: u32,
    /// Bytes of the largest packet known to pass.
    pub passes: Option<u32>,
    /// Round-trip time.
    pub rtt: Option<Duration>,
    /// Of a thousand exchanges, how many failed lately.
    pub loss_per_mille: Option<u16>,
}

impl PathSample {
    /// Part of the exchanges that failed lately.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        self.loss_per_mille.map(|loss| f64::from(loss) / 1000.0)
    }
}

/// A standing in a word.
#[must_use]
pub(crate) fn standing_name(standing: Standing) -> &'static str {
    match standing {
        Standing::Unknown => "unknown",
        Standing::Verified => "verified",
        Standing::Searching { .. } => "searching",
        Standing::Limited { .. } => "limited",
        Standing::Unreachable => "unreachable",
    }
}

/// All those words.
pub(super) const STANDINGS: [&str; 5] = ["verified", "limited", "searching", "unreachable", "unknown"];

/// A state in a word.
#[must_use]
pub(crate) fn state_name(state: PeerState) -> &'static str {
    match state {
        PeerState::Connected => "connected",
        PeerState::Idle => "idle",
        PeerState::Waiting => "waiting",
        PeerState::Configured => "configured",
        PeerState::Refused => "refused",
    }
}

/// All those words.
pub(super) const STATES: [&str; 5] = ["connected", "idle", "waiting", "configured", "refused"];
