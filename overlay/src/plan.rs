//! [`plan`]: the spine of Husk. From what people configured, what the cluster says and what the node found on itself to
//! what the node's kernel should hold, what the node should publish, and what is wrong.
//!
//! It is total: it cannot fail. Bad input becomes an [`Issue`] and a fail-closed rendering: what is in doubt gets no
//! route, and traffic to it meets the `unreachable` route of the whole cluster CIDR. It is also a function of *sets*: the
//! order in which nodes, blocks or endpoints were found makes no difference.

mod direct;
mod esp;
mod firewall;
mod local;
mod paths;
mod peers;
mod serviceable;
mod silence;
mod vxlan;
mod wireguard;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

pub use esp::PROTECT_PRIORITY;
pub use firewall::port_mappings::{HostPorts, are_mapped, host_ports, is_of_tunnel, loopback_parameter};
pub use firewall::{PLAINTEXT_IN, PLAINTEXT_OUT, POD_TO_VTEP, PROBE_ARRIVED, PROBE_OUTSIDE, SPOOFED, UNKNOWN_VTEP};
pub use peers::PeerPlan;

use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::facts::Facts;
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::Desired;
use crate::keys::PublicKey;
use crate::mac::MacAddress;
use crate::marks;
use crate::mode::Mode;
use crate::mtu::{Ledger, ledger};
use crate::name::NodeName;
use crate::prefix::{Family, Prefix};
use crate::probe::{Path, Target};
use crate::record::{DualStack, NodeRecord, Snapshot, WireguardRecord};
use crate::rotation::Rotation;

/// Routing table of all routes: `RT_TABLE_MAIN` (include/uapi/linux/rtnetlink.h).
pub const MAIN_TABLE: u32 = 254;

/// Metric of the routes under everything else: the `unreachable` routes of the cluster CIDRs.
pub const LAST_METRIC: u32 = 0xffff_fffe;

/// What follows from everything known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// What the kernel should hold.
    pub desired: Desired,
    /// What the node should publish; none while it has no address others could reach.
    pub record: Option<NodeRecord>,
    /// Byte ledger of the own tunnel.
    pub ledger: Ledger,
    /// MTU in bytes of pod interfaces; none while pods cannot be served.
    pub pod_mtu: Option<u32>,
    /// What is to be done with the own keys, and how far a rotation is.
    pub rotation: Rotation,
    /// Peers as they are reached, or why not.
    pub peers: BTreeMap<NodeName, PeerPlan>,
    /// What is wrong, sorted.
    pub issues: Vec<Issue>,
}

impl Plan {
    /// The issues that keep this node from serving pods.
    pub fn blocking(&self) -> impl Iterator<Item = &Issue> {
        self.issues.iter().filter(|issue| issue.severity == Severity::Blocking)
    }

    /// The peer that a person means: by its name, or by an address of it.
    #[must_use]
    pub fn peer_named(&self, text: &str) -> Option<(&NodeName, &PeerPlan)> {
        let address = text.parse().ok();
        self.peers
            .iter()
            .find(|(name, peer)| name.as_str() == text || address.is_some_and(|address| peer.has_address(address)))
    }

    /// What to probe.
    #[must_use]
    pub fn probe_targets(&self) -> BTreeMap<Path, Target> {
        let of_peer = |(name, peer): (&NodeName, &PeerPlan)| {
            let path = |family: &Family| Path { peer: name.clone(), family: *family };
            peer.probe.iter().map(|(family, target)| (path(family), target.clone())).collect::<Vec<_>>()
        };
        self.peers.iter().flat_map(of_peer).collect()
    }
}

/// Input of the plan and what its parts share.
struct Context<'a> {
    config: &'a Config,
    facts: &'a Facts,
    snapshot: &'a Snapshot,
    own_blocks: BTreeSet<Prefix>,
    router: DualStack,
    /// MTU in bytes of the own underlay, after configuration.
    underlay_mtu: u32,
    /// MTU in bytes inside the own tunnel.
    inner_mtu: Option<u32>,
}

impl Context<'_> {
    /// Own address that tunnels start from.
    fn own_underlay(&self) -> Option<std::net::IpAddr> {
        self.facts.addresses.get(self.config.underlay.family)
    }

    fn families(&self) -> impl Iterator<Item = Family> {
        self.config.families()
    }
}

/// Computes what this node should look like.
#[must_use]
pub fn plan(config: &Config, snapshot: &Snapshot, facts: &Facts, endpoints: &Endpoints) -> Plan {
    let mut issues = snapshot.issues.clone();
    let own_blocks = own_blocks(config, snapshot, facts);
    let underlay_mtu = underlay_mtu(config, facts, &mut issues);
    let ledger = ledger(&config.stack(), config.underlay.family, underlay_mtu);
    let context = Context {
        config,
        facts,
        snapshot,
        router: own_router(snapshot, facts, &own_blocks),
        own_blocks,
        underlay_mtu,
        inner_mtu: ledger.inner,
    };
    let serviceable = serviceable::check(&context, &ledger, &mut issues);
    let mut record = record(&context);
    let mut desired = Desired::default();
    let mut peers = BTreeMap::new();
    let mut rotation = Rotation::default();
    if !serviceable::underlay_is_inside_cluster(&context) {
        peers = peers::admit(&context, &mut issues);
        local::render(&context, endpoints, &mut desired, &mut issues);
        firewall::render(&context, &peers, endpoints, &mut desired, &mut issues);
        match config.mode {
            Mode::Direct => direct::render(&context, &mut peers, &mut desired, &mut issues),
            Mode::Vxlan => vxlan::render(&context, &mut peers, |_| true, &mut desired, &mut issues),
            Mode::Wireguard => {
                rotation = wireguard::render(&context, &mut peers, &mut desired, &mut issues);
                if let Some(record) = &mut record {
                    record.wireguard.retain(|it| rotation.published.contains(&it.generation));
                }
            }
            Mode::Ipsec | Mode::VxlanIpsec => {
                let (decided, published) = esp::render(&context, &mut peers, &mut desired, &mut issues);
                rotation = decided;
                if let Some(record) = &mut record {
                    record.esp = published;
                }
            }
        }
        paths::render(&context, &mut peers, &mut desired, &mut issues);
    }
    let peers = peers.into_iter().map(|(name, peer)| (name, peer.plan)).collect();
    issues.sort();
    issues.dedup();
    let pod_mtu = ledger.inner.filter(|_| serviceable && !has_blocking(&issues));
    Plan { desired, record, ledger, pod_mtu, rotation, peers, issues }
}

fn has_blocking(issues: &[Issue]) -> bool {
    issues.iter().any(|issue| issue.severity == Severity::Blocking)
}

/// Blocks the allocation lock says are ours; what lies outside the cluster CIDRs is left out.
fn own_blocks(config: &Config, snapshot: &Snapshot, facts: &Facts) -> BTreeSet<Prefix> {
    if name_taken(snapshot, facts) {
        return BTreeSet::new();
    }
    let ours = snapshot.blocks.iter().filter(|(_, owner)| **owner == facts.node).map(|(block, _)| *block);
    ours.filter(|block| config.cluster_cidrs.iter().any(|cidr| cidr.covers(block))).collect()
}

/// The node's own addresses inside the overlay: the published ones as long as their blocks are the node's, else the first of
/// the lowest block. Blocks that hold them are never released, and `ipam` never leases them.
fn own_router(snapshot: &Snapshot, facts: &Facts, own_blocks: &BTreeSet<Prefix>) -> DualStack {
    let published = snapshot.nodes.get(&facts.node).map(|own| own.router).unwrap_or_default();
    let mut router = router_addresses(own_blocks);
    for address in published.iter().filter(|address| own_blocks.iter().any(|block| block.address() == *address)) {
        router.set(address);
    }
    router
}

/// The first address of the lowest block of each family.
#[must_use]
pub fn router_addresses(blocks: &BTreeSet<Prefix>) -> DualStack {
    // Sets iterate in ascending order: with the highest block first, the lowest of each family is what remains.
    blocks.iter().rev().map(Prefix::address).collect()
}

/// True if another host has published itself under this node's name: its blocks and its record are not this host's.
#[must_use]
pub fn name_taken(snapshot: &Snapshot, facts: &Facts) -> bool {
    snapshot.nodes.get(&facts.node).is_some_and(|published| published.instance != facts.instance)
}

/// The MTU tunnels are computed from: the route's word, or a smaller configured value.
fn underlay_mtu(config: &Config, facts: &Facts, issues: &mut Vec<Issue>) -> u32 {
    match config.underlay.mtu {
        Some(configured) if configured <= facts.underlay_mtu => configured,
        Some(configured) => {
            issues.push(Issue {
                severity: Severity::Warning,
                kind: IssueKind::MtuTooLarge,
                subject: "underlay.mtu".into(),
                message: format!(
                    "{configured} bytes are configured, but the underlay carries {}; the smaller value is used",
                    facts.underlay_mtu
                ),
                remedy: "raise the interface's MTU or remove underlay.mtu from the configuration".into(),
            });
            facts.underlay_mtu
        }
        None => facts.underlay_mtu,
    }
}

/// What the node tells the others.
fn record(context: &Context<'_>) -> Option<NodeRecord> {
    context.own_underlay()?;
    if name_taken(context.snapshot, context.facts) {
        return None;
    }
    let wireguard = if context.config.mode == Mode::Wireguard {
        let keys = context.facts.wireguard_epochs.iter();
        keys.map(|(generation, key)| wireguard_record(context, *generation, key.public_key)).collect()
    } else {
        Vec::new()
    };
    Some(NodeRecord {
        name: context.facts.node.clone(),
        instance: context.facts.instance.clone(),
        created: context.facts.created,
        addresses: context.facts.addresses,
        underlay_mtu: context.underlay_mtu,
        blocks: context.own_blocks.clone(),
        router: context.router,
        vxlan_mac: context.config.mode.uses_vxlan().then(|| vxlan_mac(&context.facts.node)),
        wireguard,
        esp: None,
    })
}

fn wireguard_record(context: &Context<'_>, generation: u64, public_key: PublicKey) -> WireguardRecord {
    let slot = marks::wireguard_slot(generation);
    WireguardRecord { slot, generation, port: context.config.wireguard.port_of(slot), public_key }
}

/// Ethernet address of a node's VXLAN device: derived from its name, stored in its record, set explicitly on the device
///, so that no host tool's MAC policy changes it.
#[must_use]
pub fn vxlan_mac(node: &NodeName) -> MacAddress {
    MacAddress::derived(&["vxlan", node.as_str()])
}

#[cfg(test)]
mod tests;
