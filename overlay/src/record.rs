//! What nodes tell each other: one record per node, and who owns which address block.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::esp::Aead;
use crate::keys::PublicKey;
use crate::mac::MacAddress;
use crate::name::{InstanceId, NodeName};
use crate::prefix::{Family, Prefix};

/// At most one address per family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DualStack {
    /// IPv4
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
}

impl DualStack {
    /// The address of a family.
    #[must_use]
    pub fn get(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::Ipv4 => self.ipv4.map(IpAddr::V4),
            Family::Ipv6 => self.ipv6.map(IpAddr::V6),
        }
    }

    /// Puts an address in the place of its family.
    pub fn set(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(it) => self.ipv4 = Some(it),
            IpAddr::V6(it) => self.ipv6 = Some(it),
        }
    }

    /// The addresses there are, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }
}

impl FromIterator<IpAddr> for DualStack {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let mut all = Self::default();
        for address in addresses {
            all.set(address);
        }
        all
    }
}

/// A WireGuard device as its node publishes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WireguardRecord {
    /// Which of the two devices: index into [`crate::marks::WIREGUARD_INTERFACES`].
    pub slot: u8,
    /// Rotation generation the key belongs to; its parity is the slot.
    pub generation: u64,
    /// UDP port.
    pub port: u16,
    /// Public key.
    pub public_key: PublicKey,
}

/// What a peer needs to send ESP packets to a node, and to receive from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EspRecord {
    /// Cipher, which both sides have to agree on.
    pub cipher: Aead,
    /// UDP port of UDP encapsulation; none without it. Both sides have to agree on whether there is any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp_port: Option<u16>,
    /// Epochs the node can receive under, oldest first; at most two.
    pub epochs: Vec<EspEpochRecord>,
}

/// An epoch of a node: the life of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EspEpochRecord {
    /// Number; higher is newer.
    pub epoch: u64,
    /// Public key.
    pub public_key: PublicKey,
    /// What the SPIs of associations towards the node are made with.
    pub spi_salt: u64,
}

/// What a node publishes of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeRecord {
    /// Node name.
    pub name: NodeName,
    /// Which host it is that uses the name.
    pub instance: InstanceId,
    /// When the node was first seen in this cluster; decides between two nodes that claim the same thing.
    pub created: jiff::Timestamp,
    /// Underlay addresses.
    pub addresses: DualStack,
    /// MTU in bytes of the underlay interface.
    pub underlay_mtu: u32,
    /// Blocks this node owns and routes.
    pub blocks: BTreeSet<Prefix>,
    /// The node's own address inside the overlay, one per family, out of its blocks.
    pub router: DualStack,
    /// Ethernet address of the VXLAN device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_mac: Option<MacAddress>,
    /// WireGuard devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wireguard: Vec<WireguardRecord>,
    /// ESP, in modes that use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub esp: Option<EspRecord>,
}

/// An address pool: what blocks are cut from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pool {
    /// Name, for messages.
    pub name: String,
    /// All addresses of the pool.
    pub cidr: Prefix,
    /// Length in bits of the blocks cut from it.
    pub block_length: u8,
    /// No new blocks are cut from a disabled pool; existing ones stay.
    #[serde(default)]
    pub disabled: bool,
}

/// The cluster as a source delivered it. Everything in it is keyed and ordered, so that the order in which a source
/// found things cannot matter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Records of all nodes, the own one included once it is published.
    pub nodes: BTreeMap<NodeName, NodeRecord>,
    /// Pools that manifests define; empty means the pools of the configuration.
    pub pools: BTreeMap<String, Pool>,
    /// Who owns which block: the allocation lock's word, which a node's own claim cannot override.
    pub blocks: BTreeMap<Prefix, NodeName>,
    /// What the source could not read.
    pub issues: Vec<crate::issue::Issue>,
}
