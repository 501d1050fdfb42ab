//! `huskctl status`

use std::collections::{BTreeMap, BTreeSet};

use husk_overlay::esp::Aead;
use husk_overlay::issue::Issue;
use husk_overlay::mode::Mode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Prefix;
use husk_overlay::record::DualStack;
use serde::{Deserialize, Serialize};

/// `huskctl status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Node name.
    pub node: NodeName,
    /// Version of the daemon.
    pub version: String,
    /// Encapsulation.
    pub mode: Mode,
    /// True if pod traffic between nodes is encrypted.
    pub encrypted: bool,
    /// Which WireGuard device serves: `kernel` or `userspace`; none in other modes.
    pub wireguard_device: Option<String>,
    /// Cipher of IPsec associations; none in other modes.
    pub cipher: Option<Aead>,
    /// UDP port of UDP encapsulation; none without it.
    pub udp_encapsulation: Option<u16>,
    /// The own keys in short; none in modes without keys.
    pub keys: Option<KeysSummary>,
    /// True if pods can be added.
    pub ready: bool,
    /// Why not, if not.
    pub reason: Option<String>,
    /// Own underlay addresses.
    pub addresses: DualStack,
    /// Underlay interface.
    pub underlay_interface: Option<InterfaceName>,
    /// Underlay MTU in bytes.
    pub underlay_mtu: u32,
    /// Pod MTU in bytes.
    pub pod_mtu: Option<u32>,
    /// Own blocks.
    pub blocks: BTreeSet<Prefix>,
    /// Own addresses inside the overlay.
    pub router: DualStack,
    /// Pods on this node.
    pub endpoints: usize,
    /// Peers that have a route, and all peers.
    pub peers: (usize, usize),
    /// Where the cluster's state comes from.
    pub source: String,
    /// Passes since the daemon started.
    pub passes: u64,
    /// What the last pass changed and could not change.
    pub last_pass: LastPass,
    /// Packets dropped by the node's own rules, by counter.
    pub counters: BTreeMap<String, Counter>,
    /// Packets that IPsec did not let through, by the kernel's name of the reason
    /// (Documentation/networking/xfrm_proc.rst); reasons that never occurred are absent.
    pub xfrm_errors: BTreeMap<String, u64>,
    /// What is wrong.
    pub issues: Vec<Issue>,
}

/// The own keys, in `huskctl status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeysSummary {
    /// Newest epoch, for WireGuard the generation; none before the first key.
    pub newest: Option<u64>,
    /// Seconds since its key was made.
    pub age: Option<u64>,
    /// A rotation is under way.
    pub rotating: bool,
}

/// One pass of the reconcile loop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastPass {
    /// Microseconds it took.
    pub microseconds: u64,
    /// Changes made.
    pub changes: usize,
    /// Changes refused by the kernel.
    pub failures: usize,
}

/// A packet counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}
