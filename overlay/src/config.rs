//! The configuration of a node's daemon: what people say.
//!
//! [`Config::parse`] reads YAML and reports everything that is wrong with it at once, each error naming the file, the
//! key, the value, the reason and a remedy. What it returns has been checked: no later step finds an impossible value.

mod error;
mod http;
mod logging;
mod parse;
pub(crate) mod reader;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use error::{ConfigError, ConfigErrors, Problem};
pub use http::{MetricsConfig, UiConfig};
pub use logging::{DecisionLogs, LogConfig, LogFormat, LogLevel, LogLimits};

use crate::esp::Aead;
use crate::marks;
use crate::mode::Mode;
use crate::mtu::{self, Stack};
use crate::name::{InterfaceName, NetworkName, NodeName};
use crate::prefix::{Family, Prefix};
use crate::record::DualStack;

/// A configuration that spells out the defaults, with comments: the documentation of the keys.
pub const EXAMPLE: &str = include_str!("config/example.yaml");

/// Configuration of a node's daemon. All nodes of a cluster share everything but `node_name` and `underlay`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// How pod packets travel between nodes.
    pub mode: Mode,
    /// All addresses pods can have: one or two, at most one per family, IPv4 first. Never empty.
    pub cluster_cidrs: Vec<Prefix>,
    /// Length of the blocks that nodes get out of the cluster CIDRs.
    pub block_lengths: BlockLengths,
    /// Own name; none means the host name.
    pub node_name: Option<NodeName>,
    /// What tunnels run over.
    pub underlay: UnderlayConfig,
    /// Where the cluster's state comes from.
    pub source: SourceConfig,
    /// VXLAN.
    pub vxlan: VxlanConfig,
    /// WireGuard.
    pub wireguard: WireguardConfig,
    /// IPsec.
    pub ipsec: IpsecConfig,
    /// Rotation of keys.
    pub rotation: RotationConfig,
    /// Packets from pods to addresses outside the cluster CIDRs leave with the node's address.
    pub masquerade: bool,
    /// Network policy.
    pub policy: PolicyConfig,
    /// Addresses of pods.
    pub ipam: IpamConfig,
    /// CNI installation.
    pub cni: CniConfig,
    /// Logging.
    pub log: LogConfig,
    /// The endpoint of metrics and health.
    pub metrics: MetricsConfig,
    /// The page.
    pub ui: UiConfig,
    /// Logs of flows and decisions.
    pub logs: DecisionLogs,
}

/// Length in bits of node blocks, per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLengths {
    /// IPv4; 26 means blocks of 64 addresses.
    pub ipv4: u8,
    /// IPv6; 122 means blocks of 64 addresses.
    pub ipv6: u8,
}

/// What tunnels run over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnderlayConfig {
    /// Family of the outer headers.
    pub family: Family,
    /// Interface whose addresses this node publishes; none means that of the default route.
    pub interface: Option<InterfaceName>,
    /// Addresses this node publishes instead of those found on the interface.
    pub addresses: DualStack,
    /// MTU in bytes, where the underlay's is smaller than the interface says; none means what the kernel says.
    pub mtu: Option<u32>,
}

/// Where the cluster's state comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceConfig {
    /// A directory of manifests, on each host or on shared storage.
    Directory {
        /// The directory; absolute.
        path: PathBuf,
    },
    /// The Kubernetes API.
    Kubernetes {
        /// How to reach and log on to the API server; absolute. None: as a pod does, by its service account.
        kubeconfig: Option<PathBuf>,
    },
}

/// Network policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyConfig {
    /// It is enforced; else every pod may talk with everybody.
    pub enabled: bool,
    /// Addresses with which a pod in quarantine may still talk, as far as policy lets it.
    pub quarantine_allowed: BTreeSet<Prefix>,
}

/// Where a node's blocks come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BlockOrigin {
    /// They are cut from the pools, by whoever comes first; a node takes more when it needs more.
    #[default]
    Pools,
    /// They are those of `Node.spec.podCIDRs`, which Kubernetes' controller manager allocates.
    NodeCidrs,
}

/// Addresses of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpamConfig {
    /// Where a node's blocks come from.
    pub blocks: BlockOrigin,
    /// Seconds an address rests after its pod is gone before another pod gets it.
    pub cool_down: u32,
    /// Seconds for which a node has to be gone, its `Node` object and its daemon both, before its blocks are given to others.
    pub release_after: u32,
}

/// VXLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanConfig {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

/// Which implementation of WireGuard to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WireguardChoice {
    /// The kernel's, else the bundled userspace device.
    #[default]
    Auto,
    /// The kernel's or none.
    Kernel,
    /// The bundled userspace device, whatever the kernel has.
    Userspace,
}

/// WireGuard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireguardConfig {
    /// UDP port of the first device. Never 65535: the second device has the next one.
    pub port: u16,
    /// Implementation.
    pub device: WireguardChoice,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: u16,
}

impl WireguardConfig {
    /// UDP port of a device, by index into [`crate::marks::WIREGUARD_INTERFACES`].
    #[must_use]
    pub fn port_of(&self, slot: u8) -> u16 {
        self.port.saturating_add(u16::from(slot))
    }
}

/// IPsec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpsecConfig {
    /// Cipher.
    pub cipher: Aead,
    /// UDP port for UDP encapsulation (RFC 3948), where the network drops ESP; none without it.
    pub udp_port: Option<u16>,
    /// Packets that may arrive late; a multiple of 32.
    pub replay_window: u32,
    /// File with a secret of the cluster that is mixed into every key; absolute.
    pub preshared_key_file: Option<PathBuf>,
    /// Packets sent under one key before it is replaced.
    pub max_packets: u64,
    /// Bytes sent under one key before it is replaced.
    pub max_bytes: u64,
    /// Bits of an SPI that are used: 32; fewer make collisions likely, for tests.
    pub spi_bits: u8,
}

/// Rotation of WireGuard and IPsec keys. Times are in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotationConfig {
    /// Longest life of a key before it is replaced; every key gets a random part of the second half off. None: only on
    /// demand.
    pub interval: Option<u32>,
    /// How long an old key stays after it was last used.
    pub grace: u32,
    /// How long an old key stays at most, for peers that do not take notice of the new one.
    pub hard_lifetime: u32,
}

/// CNI installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// Where the plugin's binary belongs; absolute.
    pub bin_directory: PathBuf,
    /// Where the network configuration list belongs; absolute.
    pub config_directory: PathBuf,
    /// Name of the network in it.
    pub network: NetworkName,
}

impl Default for BlockLengths {
    fn default() -> Self {
        Self { ipv4: 26, ipv6: 122 }
    }
}

impl BlockLengths {
    /// The length for a family.
    #[must_use]
    pub fn get(&self, family: Family) -> u8 {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }
}

impl Default for UnderlayConfig {
    fn default() -> Self {
        Self { family: Family::Ipv4, interface: None, addresses: DualStack::default(), mtu: None }
    }
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self::Directory { path: PathBuf::from("/etc/husk/cluster") }
    }
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self { enabled: true, quarantine_allowed: BTreeSet::new() }
    }
}

impl Default for IpamConfig {
    fn default() -> Self {
        Self { blocks: BlockOrigin::default(), cool_down: 30, release_after: 300 }
    }
}

impl Default for VxlanConfig {
    /// The port IANA assigned to VXLAN (RFC 7348, section 8).
    fn default() -> Self {
        Self { vni: 4242, port: 4789 }
    }
}

impl Default for WireguardConfig {
    fn default() -> Self {
        Self { port: 51820, device: WireguardChoice::Auto, keepalive: 0 }
    }
}

impl Default for IpsecConfig {
    /// The limits keep the advantage of whoever tries to tell AES-GCM's output from noise below 2^-40 (2^42 blocks under one
    /// key: birthday bound 2^84 / 2^129). A replay window of 4096 covers 30 ms of reordering at line rate of 1.5 Gbit/s.
    fn default() -> Self {
        Self {
            cipher: Aead::default(),
            udp_port: None,
            replay_window: 4096,
            preshared_key_file: None,
            max_packets: 1 << 36,
            max_bytes: 1 << 46,
            spi_bits: 32,
        }
    }
}

impl Default for RotationConfig {
    fn default() -> Self {
        Self { interval: Some(24 * 60 * 60), grace: 30, hard_lifetime: 24 * 60 * 60 }
    }
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            bin_directory: PathBuf::from("/opt/cni/bin"),
            config_directory: PathBuf::from("/etc/cni/net.d"),
            network: NetworkName::new("husk").expect("letters make a network name"),
        }
    }
}

impl Config {
    /// The defaults, for these cluster CIDRs.
    #[must_use]
    pub fn new(mut cluster_cidrs: Vec<Prefix>) -> Self {
        cluster_cidrs.sort();
        Self {
            mode: Mode::default(),
            cluster_cidrs,
            block_lengths: BlockLengths::default(),
            node_name: None,
            underlay: UnderlayConfig::default(),
            source: SourceConfig::default(),
            vxlan: VxlanConfig::default(),
            wireguard: WireguardConfig::default(),
            ipsec: IpsecConfig::default(),
            rotation: RotationConfig::default(),
            masquerade: true,
            policy: PolicyConfig::default(),
            ipam: IpamConfig::default(),
            cni: CniConfig::default(),
            log: LogConfig::default(),
            metrics: MetricsConfig::default(),
            ui: UiConfig::default(),
            logs: DecisionLogs::default(),
        }
    }

    /// Reads a configuration. `file_name` is what errors call it.
    ///
    /// # Errors
    /// Everything that is wrong with the text, in the order of the keys.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, ConfigErrors> {
        parse::parse(file_name, text)
    }

    /// What the mode puts around a pod's packet.
    #[must_use]
    pub fn stack(&self) -> Stack {
        self.mode.stack(self.ipsec.udp_port.is_some())
    }

    /// The cluster CIDR of a family.
    #[must_use]
    pub fn cluster_cidr(&self, family: Family) -> Option<Prefix> {
        self.cluster_cidrs.iter().copied().find(|cidr| cidr.family() == family)
    }

    /// Families pods have addresses of, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.cluster_cidrs.iter().map(Prefix::family)
    }

    /// Smallest MTU in bytes inside the overlay that all families of pods work with.
    #[must_use]
    pub fn least_inner_mtu(&self) -> u32 {
        self.families().map(mtu::minimum).max().unwrap_or(mtu::MINIMUM_IPV4)
    }

    /// The least MTU in bytes of an underlay that leaves so much.
    #[must_use]
    pub fn least_underlay_mtu(&self) -> u32 {
        mtu::underlay_needed(&self.stack(), self.underlay.family, self.least_inner_mtu())
    }

    /// UDP ports at which this node's tunnels and its probes' answers listen: no pod can have them on the host.
    #[must_use]
    pub fn tunnel_ports(&self) -> BTreeSet<u16> {
        let mut ports = BTreeSet::from([marks::PROBE_PORT]);
        if self.mode.uses_vxlan() {
            ports.insert(self.vxlan.port);
        }
        if self.mode.uses_wireguard() {
            ports.extend([0, 1].map(|slot| self.wireguard.port_of(slot)));
        }
        if self.mode.uses_esp() {
            ports.extend(self.ipsec.udp_port);
        }
        ports
    }
}

#[cfg(test)]
mod tests;
