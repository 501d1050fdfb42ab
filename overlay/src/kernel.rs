//! Kernel state as plain values: what `plan()` wants and what `dataplane` reads are the same types, so that
//! `apply(desired); read() == desired` can be checked for every table.
//!
//! No secrets live here: a WireGuard device and an IPsec association are described by *public* keys; `dataplane` gets the
//! private key from the daemon's key ring when it applies the description.

mod nft;
pub mod policy;
mod xfrm;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use nft::{
    Addressee, Chain, ChainKind, CounterName, ElementType, Hook, Map, MapKeyType, MapValue, MapValueType, Match,
    MatchKey, MatchOperator, MatchValue, NftTable, Rule, Set, SetElement, Statement,
};
pub use xfrm::{
    XfrmAction, XfrmDirection, XfrmParameters, XfrmPolicy, XfrmPolicyKey, XfrmState, XfrmStateKey, XfrmTemplate,
};

use crate::keys::PublicKey;
use crate::mac::MacAddress;
use crate::name::InterfaceName;
use crate::prefix::Prefix;

/// A tunnel device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Link {
    /// What kind of device it is, with what cannot be changed once it exists.
    pub kind: LinkKind,
    /// MTU in bytes.
    pub mtu: u32,
    /// Ethernet address; none for devices without one.
    pub mac: Option<MacAddress>,
    /// Threaded NAPI (`/sys/class/net/*/threaded`): packets of one device are decrypted on more than one core. For
    /// WireGuard only; a VXLAN device does not survive it.
    pub threaded_napi: bool,
}

/// Kind of a tunnel device. Another kind, or other values within the kind, means that the device is made anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LinkKind {
    /// VXLAN (RFC 7348), learning off.
    Vxlan {
        /// VXLAN network identifier, 24 bits.
        vni: u32,
        /// UDP destination port.
        port: u16,
        /// Source address of the outer packets; also decides the underlay's family.
        local: IpAddr,
    },
    /// WireGuard device of the kernel.
    Wireguard,
    /// TUN device that belongs to a userspace WireGuard process: never created or deleted over netlink, only tuned.
    WireguardUserspace,
    /// xfrm interface (net/xfrm/xfrm_interface_core.c): packets routed to it meet the policies of its id only, and packets
    /// that associations of its id decrypted come out of it.
    Xfrm {
        /// Interface id.
        if_id: u32,
    },
}

/// An address on an interface of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Address {
    /// Interface that carries it.
    pub interface: InterfaceName,
    /// The address.
    pub address: IpAddr,
    /// Prefix length in bits.
    pub length: u8,
}

/// What makes a route one route: the kernel accepts no second one with the same key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RouteKey {
    /// Routing table id; 254 is `main`.
    pub table: u32,
    /// Destination.
    pub destination: Prefix,
    /// Priority; lower wins. IPv6 shows 0 as 1024, so that desired IPv6 routes never use 0.
    pub metric: u32,
}

/// A route of ours; all carry [`crate::marks::ROUTE_PROTOCOL`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What happens with a packet.
    pub target: RouteTarget,
    /// Preferred source address of packets the host itself sends.
    pub source: Option<IpAddr>,
    /// `mtu` metric in bytes.
    pub mtu: Option<u32>,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteTarget {
    /// Out of an interface.
    Interface {
        /// The interface.
        interface: InterfaceName,
        /// Next hop; may be of the other family (IPv4 destination over an IPv6 next hop, RFC 5549).
        via: Option<IpAddr>,
        /// The next hop is on the link though no prefix says so.
        onlink: bool,
    },
    /// Refused with an ICMP unreachable error; never falls through to a less specific route.
    Unreachable,
}

/// Key of a permanent neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NeighbourKey {
    /// Interface of ours.
    pub interface: InterfaceName,
    /// Network-layer address.
    pub address: IpAddr,
}

/// Key of a static VXLAN forwarding entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FdbKey {
    /// VXLAN device.
    pub interface: InterfaceName,
    /// Inner destination Ethernet address.
    pub mac: MacAddress,
}

/// A WireGuard device's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WireguardDevice {
    /// Kernel or userspace: decides whom to talk to, not what to say.
    pub userspace: bool,
    /// Public half of the device's key.
    pub public_key: PublicKey,
    /// UDP port it listens on.
    pub listen_port: u16,
    /// Peers by public key.
    pub peers: BTreeMap<PublicKey, WireguardPeer>,
}

/// What is configured of a WireGuard peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WireguardPeer {
    /// Where to send; a device follows an authenticated peer that roams, and is left to as long as their session lives.
    pub endpoint: Option<SocketAddr>,
    /// Inner source addresses accepted from, and destinations sent to, this peer. Unique within a device.
    pub allowed_ips: BTreeSet<Prefix>,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: u16,
}

/// All that a node's kernel should hold of Husk, table by table. Whatever carries Husk's mark and is not in here goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Desired {
    /// Kernel parameters by path below `/proc/sys`, for example `net/ipv4/ip_forward`.
    pub sysctls: BTreeMap<String, String>,
    /// The nftables table `inet husk`; none means that there shall be none.
    pub nft: Option<NftTable>,
    /// The nftables table that enforces network policy; none means that there shall be none. Not part of the plan, which knows
    /// nothing of policy: the daemon adds it.
    #[serde(skip)]
    pub policy: Option<Arc<policy::PolicyTable>>,
    /// What policy says is not known: the table is only what has to be there at least, and one that is there stays.
    #[serde(skip)]
    pub policy_is_unknown: bool,
    /// Tunnel devices by name.
    pub links: BTreeMap<InterfaceName, Link>,
    /// Tunnel devices whose offload of checksums and segmentation has to be on or off. That of others is left as it is.
    pub offload: BTreeMap<InterfaceName, bool>,
    /// WireGuard configuration by device name.
    pub wireguard: BTreeMap<InterfaceName, WireguardDevice>,
    /// IPsec security associations. One that was installed and is gone is never desired again: its sequence numbers would
    /// start anew under the same key.
    #[serde(with = "entries")]
    pub xfrm_states: BTreeMap<XfrmStateKey, XfrmState>,
    /// IPsec policies.
    #[serde(with = "entries")]
    pub xfrm_policies: BTreeMap<XfrmPolicyKey, XfrmPolicy>,
    /// Addresses on tunnel devices.
    pub addresses: BTreeSet<Address>,
    /// Permanent neighbours on interfaces of ours.
    #[serde(with = "entries")]
    pub neighbours: BTreeMap<NeighbourKey, MacAddress>,
    /// Static forwarding entries on VXLAN devices: Ethernet address to node address.
    #[serde(with = "entries")]
    pub fdb: BTreeMap<FdbKey, IpAddr>,
    /// Routes.
    #[serde(with = "entries")]
    pub routes: BTreeMap<RouteKey, Route>,
    /// Host ends of pods that there were when the plan was made, with their indices. A pod interface that is not among them,
    /// or that has another index since it was made anew, is younger than the plan: its routes and neighbours are the plugin's
    /// work of this moment and are not swept.
    pub known_pods: BTreeMap<InterfaceName, u32>,
    /// Blocks that the addresses of this node's pods lie in.
    pub own_blocks: BTreeSet<Prefix>,
}

/// Maps whose keys are structures, as lists of pairs: JSON objects have text keys only.
pub(crate) mod entries {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub(crate) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?.into_iter().collect())
    }
}
