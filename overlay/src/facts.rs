//! Facts: what the daemon found out about its own node, as far as the plan depends on it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::keys::PublicKey;
use crate::name::{InstanceId, InterfaceName, NodeName};
use crate::prefix::Prefix;
use crate::record::DualStack;

/// How WireGuard can be had on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum WireguardSupport {
    /// The kernel has it.
    Kernel,
    /// The kernel lacks it; the bundled userspace device serves.
    Userspace,
    /// Neither works.
    Unavailable {
        /// Why, and what would help.
        reason: String,
    },
}

/// Where packets to an underlay address go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnderlayRoute {
    /// Outgoing interface.
    pub interface: InterfaceName,
    /// Bytes: the route's `mtu` metric, or the interface's MTU if that is smaller or the route has none.
    pub mtu: u32,
    /// The address is reached without a router.
    pub on_link: bool,
}

/// Facts about the own node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Own name.
    pub node: NodeName,
    /// Which host uses the name.
    pub instance: InstanceId,
    /// When this node first published itself.
    pub created: jiff::Timestamp,
    /// Own underlay addresses.
    pub addresses: DualStack,
    /// MTU in bytes of the interface that carries the underlay address of the configured family.
    pub underlay_mtu: u32,
    /// Interface that carries the underlay address of the configured family.
    pub underlay_interface: Option<InterfaceName>,
    /// Prefixes of all addresses on interfaces that are not Husk's, loopback left out.
    pub foreign_prefixes: BTreeSet<Prefix>,
    /// Routes to the underlay addresses of peers; an address without one is absent.
    pub routes: BTreeMap<IpAddr, UnderlayRoute>,
    /// How WireGuard can be had; only looked into when the mode needs it.
    pub wireguard: Option<WireguardSupport>,
    /// Public keys of the own WireGuard devices by slot.
    pub wireguard_keys: BTreeMap<u8, PublicKey>,
    /// Host ends of pod veth pairs that exist: a lease whose interface is gone gets no route.
    pub pod_interfaces: BTreeSet<InterfaceName>,
    /// The kernel knows threaded NAPI.
    pub threaded_napi: bool,
    /// The kernel has IPv6.
    pub ipv6: bool,
    /// Interfaces that take router advertisements only while the host does not forward (`accept_ra` is 1).
    pub router_advertisements: BTreeSet<InterfaceName>,
}
