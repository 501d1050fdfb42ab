//! `huskctl capture`: where the packets of somebody are to be seen, which the daemon knows.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_dataplane::capture::Filter;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::Stack;
use husk_overlay::name::{InterfaceName, NodeName};
use serde::{Deserialize, Serialize};

/// Where the packets of a pod, of another node or of this one are to be seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CaptureReport {
    /// Whose, in words.
    pub target: String,
    /// Encapsulation.
    pub mode: Mode,
    /// Where they are seen as pods see them.
    pub inner: Vec<Tap>,
    /// Where they are seen as the network between the nodes sees them.
    pub outer: Vec<Tap>,
    /// What has to be known of `outer`, one sentence; nothing where it is just what was asked for.
    pub outer_note: Option<String>,
    /// By which ports the tunnels' packets are known.
    pub ports: TunnelPorts,
    /// How it can be verified that packets to the other node are encrypted; only where another node was named.
    pub verify: Option<VerifyPath>,
    /// Who has an address: pods, nodes.
    pub names: BTreeMap<IpAddr, String>,
}

/// An interface, and which of its packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tap {
    /// The interface.
    pub interface: InterfaceName,
    /// The packets.
    pub filter: Filter,
}

/// UDP ports of tunnels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TunnelPorts {
    /// VXLAN.
    pub vxlan: Option<u16>,
    /// WireGuard, one for each generation of keys.
    pub wireguard: Vec<u16>,
    /// ESP in UDP.
    pub esp: Option<u16>,
}

/// A way through the tunnel to another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyPath {
    /// The node.
    pub node: NodeName,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its addresses inside the tunnel, each with the own address to send from.
    pub inside: BTreeMap<IpAddr, IpAddr>,
    /// What the tunnel puts around a packet.
    pub stack: Stack,
    /// MTU in bytes inside the tunnel.
    pub mtu: u32,
    /// Where its packets are on the underlay, in whichever form.
    pub tap: Tap,
}
