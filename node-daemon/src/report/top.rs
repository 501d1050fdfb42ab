//! `huskctl top`: traffic of peers and pods.

use std::time::Duration;

use husk_overlay::mode::Mode;
use husk_overlay::name::{InterfaceName, NodeName};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PeerState;

/// What was counted so far, as the daemon tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Counted {
    /// Node name.
    pub node: NodeName,
    /// Encapsulation.
    pub mode: Mode,
    /// When it was counted, as time since boot.
    pub at: Duration,
    /// Tunnel devices.
    pub tunnels: Vec<CountedLink>,
    /// Peers.
    pub peers: Vec<CountedPeer>,
    /// Pods.
    pub pods: Vec<CountedPod>,
}

/// Bytes, packets and drops so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Packets received.
    pub received_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets dropped in either direction.
    pub dropped: u64,
}

/// A tunnel device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedLink {
    /// Its name.
    pub interface: InterfaceName,
    /// Counters.
    #[serde(flatten)]
    pub totals: Totals,
}

/// A peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedPeer {
    /// Node name.
    pub node: NodeName,
    /// State.
    pub state: PeerState,
    /// Bytes received from it; none in modes that do not count by peer.
    pub received: Option<u64>,
    /// Bytes sent to it, likewise.
    pub sent: Option<u64>,
    /// Round-trip time of probes, the longer one of two families.
    pub rtt: Option<Duration>,
    /// Of a thousand exchanges with probes, how many failed lately.
    pub loss_per_mille: Option<u16>,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedPod {
    /// Namespace and name.
    pub pod: String,
    /// Host interface.
    pub interface: InterfaceName,
    /// Counters, as the pod sees them; none without an interface.
    pub totals: Option<Totals>,
}

/// `huskctl top`: one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Top {
    /// When (RFC 3339).
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Node name.
    pub node: NodeName,
    /// Encapsulation.
    pub mode: Mode,
    /// Seconds that rates are those of.
    pub seconds: f64,
    /// Tunnel devices.
    pub tunnels: Vec<TopLink>,
    /// Peers that are shown, in the order asked for.
    pub peers: Vec<TopPeer>,
    /// All peers, shown or not.
    pub peer_count: usize,
    /// Pods that are shown, in the order asked for.
    pub pods: Vec<TopPod>,
    /// All pods of this node, shown or not.
    pub pod_count: usize,
}

/// Per second, over the last interval. None where a counter is missing or began anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Bytes received.
    pub received_per_second: Option<u64>,
    /// Bytes sent.
    pub sent_per_second: Option<u64>,
    /// Packets received and sent; none where only bytes are counted.
    pub packets_per_second: Option<u64>,
    /// Packets dropped, likewise.
    pub dropped_per_second: Option<u64>,
}

/// A tunnel device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TopLink {
    /// What was counted so far.
    #[serde(flatten)]
    pub counted: CountedLink,
    /// Per second.
    #[serde(flatten)]
    pub rates: Rates,
}

/// A peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TopPeer {
    /// What was counted so far.
    #[serde(flatten)]
    pub counted: CountedPeer,
    /// Per second.
    #[serde(flatten)]
    pub rates: Rates,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TopPod {
    /// What was counted so far.
    #[serde(flatten)]
    pub counted: CountedPod,
    /// Per second.
    #[serde(flatten)]
    pub rates: Rates,
}
