//! Facts: what the daemon found out about its own node, as far as the plan depends on it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::esp::AssociationId;
use crate::kernel::XfrmStateKey;
use crate::keys::PublicKey;
use crate::name::{InstanceId, InterfaceName, NodeName};
use crate::offload::Offload;
use crate::prefix::Prefix;
use crate::probe::{Limits, Path};
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

/// A key of the own node, and since when it has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OwnEpoch {
    /// Public half.
    pub public_key: PublicKey,
    /// What the SPIs of associations towards this node are made with; of no use to WireGuard.
    pub spi_salt: u64,
    /// When it was made, as time since boot: a clock that is set does not make keys older or younger.
    pub created: Duration,
}

/// What a WireGuard device says of a peer's key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionUse {
    /// A handshake was completed at some time, as far as this node can know on both sides: the peer can receive.
    pub handshaken: bool,
    /// How long nothing was received and nothing was sent: both counters of bytes stood still.
    pub quiet: Duration,
}

/// ESP on this node; only looked into when the mode needs it.
///
/// What the daemon has to read, write and do, pass after pass:
///
/// 1. Read `epochs`, `published` and `spent` from the run directory, and `installed` from the kernel, *at the start of the
///    pass*: the counters have to be at least as old as the decisions made with them.
/// 2. Call the plan. Write [`crate::rotation::Rotation::spend`] and [`crate::rotation::Rotation::published`] down, before
///    anything else; if that fails, change nothing of xfrm in this pass and do not publish.
/// 3. Reconcile: add associations, set policies, remove associations, in this order. What the kernel *refused* to add was
///    never installed: take it out of `spent` again, or the plan takes it for lost.
/// 4. Publish the record, then execute [`crate::rotation::Rotation::actions`] in their order.
/// 5. If an association was added, an action executed or an epoch first published, pass again at once: what was desired only
///    counts once it was read back. Else a pass every few seconds carries a rotation on, as soon as a counter begins to
///    move carries it on faster.
///
/// Snapshots must never go back in time: the one a plan was made from has to be on disk before the plan is carried out, if a
/// daemon that restarts begins with what is on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EspFacts {
    /// Why the kernel cannot do what the mode needs, if so.
    pub unavailable: Option<String>,
    /// Epochs whose private keys the node holds, published or not.
    pub epochs: BTreeMap<u64, OwnEpoch>,
    /// Epochs that were ever handed to the cluster source, and when for the first time, as time since boot. The own record in
    /// the snapshot is no substitute: it may be old, and an epoch that peers may know must not be taken back.
    pub published: BTreeMap<u64, Duration>,
    /// Associations with our mark in the kernel, in both directions.
    #[serde(with = "crate::kernel::entries")]
    pub installed: BTreeMap<XfrmStateKey, AssociationUse>,
    /// What was written down of associations under the epochs held, see [`SpentAssociation`]. The entries of an epoch go with
    /// its key.
    pub spent: BTreeMap<AssociationId, SpentAssociation>,
}

/// What is written down of an association before it is installed.
///
/// None is ever installed a second time, since its sequence numbers (RFC 4303, section 2.2), and with them the nonces of
/// AES-GCM, and its replay window would start anew. And only this tells which association an entry of the kernel is: two of
/// them can have one SPI, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpentAssociation {
    /// Own epoch it belongs to.
    pub epoch: u64,
    /// Where it is in the kernel, or was.
    pub key: XfrmStateKey,
    /// What was done with it.
    pub stage: AssociationStage,
}

/// How far an association has come. It never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AssociationStage {
    /// It may have been installed, for sending, but no policy named it, so that no packet was protected by it: it can be
    /// installed again, and a daemon killed just before the first time leaves nothing behind.
    Unused,
    /// A packet may have been protected by it: it was installed for receiving, or a policy named it.
    Used,
    /// It is gone from the kernel, and another one has its SPI.
    Ended,
}

/// An association as the kernel has it, and the use that was made of it. Durations are of what this daemon has watched: they
/// start at zero when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AssociationUse {
    /// Underlay address of the sender.
    pub source: IpAddr,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    /// Packets that came with its SPI and failed its integrity check; they count nowhere else.
    pub undecryptable: u32,
    /// How long the packets have been as many as now.
    pub quiet: Duration,
    /// How long it has been installed.
    pub age: Duration,
}

/// What an underlay route's MTU is that of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteLimit {
    /// The outgoing interface.
    Interface,
    /// The route itself: its `mtu` attribute.
    Attribute,
    /// A router on the way, which said so (packet too big).
    Router,
}

/// Where packets to an underlay address go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UnderlayRoute {
    /// Outgoing interface.
    pub interface: InterfaceName,
    /// Bytes: the route's `mtu` metric, or the interface's MTU if that is smaller or the route has none.
    pub mtu: u32,
    /// Whose that is.
    pub limited_by: RouteLimit,
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
    /// What probing found: paths on which less passes than the plan says, or is known to
    /// ([`crate::probe::Prober::limits`]).
    pub probed: Limits,
    /// Paths on which nothing is answered ([`crate::probe::Prober::silent`]); none where this host would not hear the answers.
    pub silent: BTreeSet<Path>,
    /// What is to be done with the offload of the VXLAN device, and why ([`crate::offload::Tester::offload`]).
    pub offload: Offload,
    /// Keys of the own WireGuard devices by generation, at most two; the parity of a generation is the slot of its device.
    pub wireguard_epochs: BTreeMap<u64, OwnEpoch>,
    /// What the own WireGuard devices say of peers, by the peers' public keys.
    pub sessions: BTreeMap<PublicKey, SessionUse>,
    /// ESP; only looked into when the mode needs it.
    pub esp: Option<EspFacts>,
    /// Time since boot, suspended time included.
    pub uptime: Duration,
    /// Somebody asked for new keys.
    pub rotation_requested: bool,
    /// Host ends of pod veth pairs that exist, with their indices: a lease whose interface is gone gets no route. To be read
    /// before the leases, which the plugin makes first.
    pub pod_interfaces: BTreeMap<InterfaceName, u32>,
    /// The kernel knows threaded NAPI.
    pub threaded_napi: bool,
    /// The kernel has IPv6.
    pub ipv6: bool,
    /// Interfaces that take router advertisements only while the host does not forward (`accept_ra` is 1).
    pub router_advertisements: BTreeSet<InterfaceName>,
}
