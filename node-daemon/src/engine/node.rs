//! The node as the loop sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use husk_dataplane::Error;
use husk_dataplane::link_counters::LinkCounters;
use husk_dataplane::nft::ForeignChain;
use husk_dataplane::way::{NeighbourStanding, Packet, Way};
use husk_dataplane::wireguard::KeyRing;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::esp::AssociationId;
use husk_overlay::facts::{Facts, SpentAssociation};
use husk_overlay::issue::Issue;
use husk_overlay::kernel::policy::{PolicyElement, PolicyValue};
use husk_overlay::kernel::{Desired, XfrmStateKey};
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::offload::Candidate;
use husk_overlay::probe::{Limits, Path, Report, Target};
use husk_overlay::record::Snapshot;

use crate::report::Counter;

/// What the loop asks of the node besides the kernel tables; a seam for tests, which have no node.
pub trait Node {
    /// Facts about the own node, with routes to the underlay addresses of the snapshot's nodes.
    ///
    /// # Errors
    /// When the kernel does not answer.
    fn facts(&mut self, snapshot: &Snapshot, created: jiff::Timestamp) -> anyhow::Result<Facts>;

    /// Whether the kernel has learned something of the paths to the peers, or forgotten it, since the facts were collected: it
    /// reports no event of that.
    fn paths_changed(&mut self) -> bool {
        false
    }

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

    /// Makes sure that the process runs that keeps the sockets of UDP encapsulation open at this port, and none at another.
    ///
    /// # Errors
    /// When it does not start, for example because the port is taken.
    fn ensure_udp_encapsulation(&mut self, port: u16) -> anyhow::Result<()>;

    /// Ends that process, if there is one.
    ///
    /// # Errors
    /// When it does not end.
    fn stop_udp_encapsulation(&mut self) -> anyhow::Result<()>;

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

    /// Has the kernel of a pod forget what it was told of paths, which may be less than they take by now.
    ///
    /// # Errors
    /// As for [`Self::set_pod_mtu`].
    fn forget_paths(&mut self, _endpoint: &Endpoint) -> Result<(), Error> {
        Ok(())
    }

    /// Chains of other firewalls that may keep pods' packets from being forwarded; may be half a minute old.
    fn foreign_chains(&mut self) -> Vec<ForeignChain>;

    /// What is wrong with other parts of the daemon, as far as the loop does not find it out by itself.
    fn noticed(&mut self) -> Vec<Issue> {
        Vec::new()
    }

    /// Time since boot, suspended time included.
    fn uptime(&mut self) -> Duration;

    /// The own private keys, for the kernel.
    ///
    /// # Errors
    /// When a key cannot be read.
    fn key_ring(&mut self) -> anyhow::Result<KeyRing>;

    /// Makes a key for an epoch.
    ///
    /// # Errors
    /// When it cannot be made or kept; then there is no such epoch.
    fn begin_epoch(&mut self, epoch: u64) -> anyhow::Result<()>;

    /// Destroys the key of an epoch.
    ///
    /// # Errors
    /// When it cannot be destroyed; then it is still there.
    fn retire_epoch(&mut self, epoch: u64) -> anyhow::Result<()>;

    /// Writes down associations before they are installed, or before a policy names them.
    ///
    /// # Errors
    /// When they could not all be written down: then nothing may be done with any of them.
    fn spend(&mut self, associations: &BTreeMap<AssociationId, SpentAssociation>) -> anyhow::Result<()>;

    /// Takes that back for associations that were provably never installed.
    ///
    /// # Errors
    /// When that could not be written; then they stay spent.
    fn take_back(&mut self, associations: &BTreeSet<XfrmStateKey>) -> anyhow::Result<()>;

    /// Writes down that epochs are about to be published, where that is new.
    ///
    /// # Errors
    /// When it could not be written down; then they may not be published.
    fn note_published(&mut self, epochs: &BTreeSet<u64>) -> anyhow::Result<()>;

    /// Packets dropped by the node's own rules.
    fn counters(&mut self) -> BTreeMap<String, Counter>;

    /// Packets that policy denied or passed, by counter.
    fn policy_counters(&mut self) -> BTreeMap<String, Counter>;

    /// What a set of the policy table in the kernel holds for a key; nothing if there is no such set.
    ///
    /// # Errors
    /// When it cannot be read.
    fn policy_element(&mut self, set: &str, key: &PolicyElement) -> anyhow::Result<Option<PolicyValue>>;

    /// What the kernel counts of our interfaces; nothing where it does not say.
    fn link_counters(&mut self) -> BTreeMap<InterfaceName, LinkCounters> {
        BTreeMap::new()
    }

    /// Packets that IPsec did not let through, by the kernel's name of the reason.
    fn xfrm_errors(&mut self) -> BTreeMap<String, u64>;

    /// Keeps the values of kernel parameters as they are before Husk changes them for the first time.
    fn remember(&mut self, desired: &Desired);

    /// Sends a packet to each of these addresses of other nodes, through the tunnels, after some time; nobody waits for it, nor
    /// for an answer.
    fn greet(&mut self, _routers: &[IpAddr], _after: Duration) {}

    /// With whom the offload of the VXLAN device can be tried from now on; what is found out of it comes with the facts.
    fn test_offload(&mut self, _candidates: BTreeMap<NodeName, Candidate>) {}

    /// A plan was carried out, and this is what there is to be probed from now on; what is found out of it comes with the facts.
    fn probe(&mut self, _targets: &BTreeMap<Path, Target>) {}

    /// What the facts will tell of limits when a plan that promises this was carried out; none where nothing is probed. What is
    /// promised beyond what was verified is not to be used before it is.
    fn limits_under(&mut self, _targets: &BTreeMap<Path, Target>) -> Option<Limits> {
        None
    }

    /// What probing found so far.
    fn probes(&mut self) -> BTreeMap<Path, Report> {
        BTreeMap::new()
    }

    /// The same of one peer.
    fn probes_of(&mut self, peer: &NodeName) -> BTreeMap<Path, Report> {
        let mut probes = self.probes();
        probes.retain(|path, _| path.peer == *peer);
        probes
    }

    /// Probes of others arrive through tunnels, and a firewall of this host drops all of them.
    fn is_deaf(&mut self) -> bool {
        false
    }

    /// Threads that should go on and have ended, by their names.
    fn ended(&mut self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Probes the paths to a peer at once. When that began, as time since boot; none where nothing is probed.
    fn demand_probe(&mut self, _peer: &NodeName) -> Option<Duration> {
        None
    }

    /// What the kernel would do with a packet.
    ///
    /// # Errors
    /// When it does not say.
    fn way(&mut self, _packet: &Packet) -> anyhow::Result<Way> {
        anyhow::bail!("this daemon does not ask the kernel")
    }

    /// What the kernel knows of a neighbour's Ethernet address; none where it does not say.
    fn neighbour(&mut self, _interface: &InterfaceName, _address: IpAddr) -> Option<NeighbourStanding> {
        None
    }

    /// How a pod deviates from what was wired, on the host and inside; see [`husk_dataplane::pod::check`]. Without an MTU
    /// in bytes that it should have, any is well.
    ///
    /// # Errors
    /// When its network namespace is not to be had.
    fn deviations(&mut self, _endpoint: &Endpoint, _mtu: Option<u32>) -> anyhow::Result<Vec<String>> {
        anyhow::bail!("this daemon does not look into pods")
    }
}
