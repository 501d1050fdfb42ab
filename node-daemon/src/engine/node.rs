//! The node as the loop sees it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_dataplane::Error;
use husk_dataplane::nft::ForeignChain;
use husk_dataplane::wireguard::KeyRing;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::facts::Facts;
use husk_overlay::kernel::Desired;
use husk_overlay::name::InterfaceName;
use husk_overlay::record::Snapshot;

use crate::report::Counter;

/// What the loop asks of the node besides the kernel tables; a seam for tests, which have no node.
pub trait Node {
    /// Facts about the own node, with routes to the underlay addresses of the snapshot's nodes.
    ///
    /// # Errors
    /// When the kernel does not answer.
    fn facts(&mut self, snapshot: &Snapshot, created: jiff::Timestamp) -> anyhow::Result<Facts>;

    /// Makes sure that the process behind a userspace WireGuard device runs; returns once the device is there.
    ///
    /// # Errors
    /// When it does not start.
    fn ensure_userspace_device(&mut self, interface: &InterfaceName) -> anyhow::Result<()>;

    /// Ends the process behind a userspace WireGuard device, if there is one; returns once the device is gone with it.
    ///
    /// # Errors
    /// When it does not end.
    fn stop_userspace_device(&mut self, interface: &InterfaceName) -> anyhow::Result<()>;

    /// MTU in bytes of the host interface of every pod there is.
    ///
    /// # Errors
    /// When the kernel does not answer.
    fn pod_interfaces(&mut self) -> anyhow::Result<BTreeMap<InterfaceName, u32>>;

    /// Brings the MTU of both ends of a pod to this many bytes.
    ///
    /// # Errors
    /// When the pod's network namespace is not to be had, or is another by now; when the kernel refuses.
    fn set_pod_mtu(&mut self, endpoint: &Endpoint, mtu: u32) -> Result<(), Error>;

    /// Chains of other firewalls that may keep pods' packets from being forwarded; may be half a minute old.
    fn foreign_chains(&mut self) -> Vec<ForeignChain>;

    /// Private keys of the own devices, for the kernel.
    ///
    /// # Errors
    /// When a key can neither be read nor made.
    fn key_ring(&mut self) -> anyhow::Result<KeyRing>;

    /// Packets dropped by the node's own rules.
    fn counters(&mut self) -> BTreeMap<String, Counter>;

    /// Keeps the values of kernel parameters as they are before Husk changes them for the first time.
    fn remember(&mut self, desired: &Desired);

    /// Sends a packet to each of these addresses of other nodes, through the tunnels; nobody waits for an answer.
    fn greet(&mut self, _routers: &[IpAddr]) {}
}
