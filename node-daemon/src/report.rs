//! What the daemon tells `huskctl`: the stable JSON of `--output json` and the source of every table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::endpoint::Endpoint;
use husk_overlay::issue::Issue;
use husk_overlay::keys::PublicKey;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::Ledger;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{DualStack, Pool};
use serde::{Deserialize, Serialize};

/// `huskctl status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What is wrong.
    pub issues: Vec<Issue>,
}

/// One pass of the reconcile loop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// How a peer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PeerState {
    /// A handshake within the last three minutes (WireGuard gives a session up after 180 s: `REJECT_AFTER_TIME`).
    Connected,
    /// Configured; no traffic has needed a handshake yet, or the last session expired.
    Idle,
    /// Configured, in a mode without handshakes.
    Configured,
    /// Not configured: see the reason.
    Refused,
}

/// A row of `huskctl peers`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// Node name.
    pub node: NodeName,
    /// State.
    pub state: PeerState,
    /// Why it is refused.
    pub reason: Option<String>,
    /// Underlay address and port packets go to.
    pub endpoint: Option<String>,
    /// Public key, in modes that have one.
    pub public_key: Option<PublicKey>,
    /// Seconds since the last handshake.
    pub handshake_age: Option<u64>,
    /// Bytes received from it through the tunnel.
    pub received: Option<u64>,
    /// Bytes sent to it through the tunnel.
    pub sent: Option<u64>,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
    /// Blocks routed to it.
    pub blocks: BTreeSet<Prefix>,
}

/// A row of `huskctl mtu`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MtuReport {
    /// Peer, or the own node for what pods get.
    pub node: NodeName,
    /// True for the own node.
    pub own: bool,
    /// Underlay address.
    pub address: Option<IpAddr>,
    /// Where the bytes go.
    pub ledger: Ledger,
}

/// A line of `huskctl diff`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiffReport {
    /// What the next pass would change, in the order it would.
    pub changes: Vec<String>,
}

/// `huskctl ipam show`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpamReport {
    /// Pools with the number of blocks cut from each.
    pub pools: Vec<PoolReport>,
    /// Own blocks.
    pub blocks: Vec<BlockReport>,
    /// Leases on this node.
    pub leases: Vec<Endpoint>,
    /// What `huskctl ipam check` found.
    pub findings: Vec<String>,
}

/// A pool and its fill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolReport {
    /// The pool.
    pub pool: Pool,
    /// Blocks owned by any node.
    pub used_blocks: u64,
    /// Blocks in all; saturates.
    pub total_blocks: u64,
}

/// A block and its fill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlockReport {
    /// The block.
    pub block: Prefix,
    /// Addresses leased.
    pub leased: u64,
    /// Addresses pods can have in all.
    pub total: u64,
}
