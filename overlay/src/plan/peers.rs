//! Which peers are believed, and what of them. Two nodes that claim the same block, key or address cannot both have it:
//! the own node keeps its own, then the node that was there first keeps it; the loser's claim becomes an issue, and
//! nobody else is disturbed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Context, paths};
use crate::facts::OwnEpoch;
use crate::issue::{Issue, IssueKind, Severity};
use crate::keys::PublicKey;
use crate::mode::Mode;
use crate::mtu::{self, Ledger, ledger};
use crate::name::NodeName;
use crate::prefix::{Family, Prefix};
use crate::probe::{Limit, Target};
use crate::record::{DualStack, NodeRecord};
use crate::rotation::PeerKeys;

/// 2026-01-01T00:00:00Z: no node can have joined a cluster before.
const EARLIEST: jiff::Timestamp = jiff::Timestamp::constant(1_767_225_600, 0);

/// How a peer is reached, for people and reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerPlan {
    /// Underlay address packets to it are sent to.
    pub address: Option<IpAddr>,
    /// UDP port of its tunnel device, in modes that have one.
    pub port: Option<u16>,
    /// Its public key, in modes that have one.
    pub public_key: Option<PublicKey>,
    /// The keys in use, in encrypted modes.
    pub keys: PeerKeys,
    /// Blocks routed to it.
    pub blocks: BTreeSet<Prefix>,
    /// Its own addresses inside the overlay.
    pub router: DualStack,
    /// Byte ledger of the tunnel to it; its underlay MTU is the smaller of both sides and the route.
    pub ledger: Ledger,
    /// What is known to pass, in bytes inside the tunnel, where that is less than the ledger says. Never below what one of the
    /// cluster's families needs. In mode `direct` the least of all families.
    pub probed: Option<Limit>,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
    /// What to probe, by family.
    pub probe: BTreeMap<Family, Target>,
    /// Of these, the families in which nothing is answered.
    pub silent: BTreeSet<Family>,
    /// Why packets to it are refused, if they are.
    pub refused: Option<String>,
}

impl PeerPlan {
    /// Nothing that is sent to it is answered, in any family.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        !self.silent.is_empty() && self.silent.len() == self.probe.len()
    }

    /// True for its underlay address, and for its own addresses inside the overlay.
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        self.address == Some(address) || self.router.iter().any(|own| own == address)
    }
}

/// A believed peer: its record, cut down to what it may claim, and what became of it.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Its record; blocks that are not its own are gone.
    pub(super) record: NodeRecord,
    /// How it is reached.
    pub(super) plan: PeerPlan,
    /// MTU in bytes of the routes to it, if probing finds nothing else.
    pub(super) promised: Option<u32>,
}

impl Peer {
    /// MTU in bytes for packets to this peer.
    pub(super) fn mtu(&self) -> Option<u32> {
        self.plan.mtu
    }

    /// Sets that MTU, and limits it to what probing found.
    pub(super) fn promise(&mut self, context: &Context<'_>, promised: Option<u32>) {
        self.promised = promised;
        self.plan.probed = paths::probed(context, &self.record.name, promised);
        self.plan.mtu = self.plan.probed.map(|limit| limit.bytes).or(promised);
    }

    /// Leaves the peer without a route, and says why.
    pub(super) fn refuse(&mut self, issues: &mut Vec<Issue>, kind: IssueKind, message: String, remedy: String) {
        self.plan.refused = Some(message.clone());
        let subject = self.record.name.to_string();
        issues.push(Issue { severity: Severity::Error, kind, subject, message, remedy });
    }
}

/// Things only one node may have, with who has them.
struct Claims<T>(BTreeMap<T, NodeName>);

impl<T: Ord + Copy> Claims<T> {
    /// Takes all of these things, or none, and tells which of them another node has already.
    fn take(&mut self, things: &[T], node: &NodeName) -> Result<(), (T, NodeName)> {
        for thing in things {
            if let Some(other) = self.0.get(thing).filter(|other| *other != node) {
                return Err((*thing, other.clone()));
            }
        }
        self.0.extend(things.iter().map(|thing| (*thing, node.clone())));
        Ok(())
    }
}

/// Everything claimed so far.
struct Registry {
    addresses: Claims<IpAddr>,
    keys: Claims<PublicKey>,
    blocks: BTreeMap<Prefix, NodeName>,
}

impl Registry {
    fn of_own_node(context: &Context<'_>) -> Self {
        let node = &context.facts.node;
        Self {
            addresses: Claims(context.facts.addresses.iter().map(|address| (address, node.clone())).collect()),
            keys: Claims(own_epochs(context).map(|epoch| (epoch.public_key, node.clone())).collect()),
            blocks: context.own_blocks.iter().map(|block| (*block, node.clone())).collect(),
        }
    }
}

/// The own keys of the technology in use.
fn own_epochs<'a>(context: &Context<'a>) -> impl Iterator<Item = &'a OwnEpoch> + use<'a> {
    let wireguard = context.config.mode.uses_wireguard().then_some(&context.facts.wireguard_epochs);
    let esp = context.facts.esp.as_ref().filter(|_| context.config.mode.uses_esp()).map(|esp| &esp.epochs);
    wireguard.into_iter().chain(esp).flat_map(|epochs| epochs.values())
}

/// All peers in the order of their names; a peer whose claims clash is there too, refused.
pub(super) fn admit(context: &Context<'_>, issues: &mut Vec<Issue>) -> BTreeMap<NodeName, Peer> {
    let mut others: Vec<&NodeRecord> =
        context.snapshot.nodes.values().filter(|record| record.name != context.facts.node).collect();
    others.sort_by_key(|record| seniority(record));
    let mut registry = Registry::of_own_node(context);
    let mut peers = BTreeMap::new();
    for record in others {
        let peer = admit_one(context, record, &mut registry, issues);
        peers.insert(record.name.clone(), peer);
    }
    peers
}

/// Who was there first comes first. A time before Husk existed comes from a clock that was not set yet, and is worth nothing.
fn seniority(record: &NodeRecord) -> (bool, jiff::Timestamp, &NodeName) {
    (record.created < EARLIEST, record.created, &record.name)
}

fn admit_one(context: &Context<'_>, record: &NodeRecord, registry: &mut Registry, issues: &mut Vec<Issue>) -> Peer {
    let family = context.config.underlay.family;
    let address = record.addresses.get(family);
    let route_mtu = address.and_then(|address| context.facts.routes.get(&address)).map(|route| route.mtu);
    let underlay_mtu = context.underlay_mtu.min(record.underlay_mtu).min(route_mtu.unwrap_or(u32::MAX));
    let plan = PeerPlan {
        address,
        port: None,
        public_key: None,
        keys: PeerKeys::default(),
        blocks: BTreeSet::new(),
        router: DualStack::default(),
        ledger: ledger(&context.config.stack(), family, underlay_mtu),
        probed: None,
        mtu: None,
        probe: BTreeMap::new(),
        silent: BTreeSet::new(),
        refused: None,
    };
    let mut peer = Peer { record: record.clone(), plan, promised: None };
    peer.promise(context, peer.plan.ledger.inner);
    claim_addresses(context, &mut peer, registry, issues);
    if peer.plan.refused.is_none() {
        claim_keys(context.config.mode, &mut peer, registry, issues);
    }
    if peer.plan.refused.is_some() {
        peer.record.blocks.clear();
        return peer;
    }
    peer.record.blocks.clear();
    for block in &record.blocks {
        if let Err(issue) = claim_block(context, *block, &record.name, registry) {
            issues.push(issue);
        } else {
            peer.record.blocks.insert(*block);
        }
    }
    refuse_families(context, &mut peer, issues);
    peer.plan.blocks.clone_from(&peer.record.blocks);
    let own = |address: &IpAddr| peer.record.blocks.iter().any(|block| block.contains(*address));
    peer.record.router = peer.record.router.iter().filter(own).collect();
    peer.plan.router = peer.record.router;
    if address.is_none() {
        peer.refuse(
            issues,
            IssueKind::IncompletePeer,
            format!("the node publishes no {family} underlay address"),
            format!("give it an {family} address, or choose the other underlay.family for all nodes"),
        );
    } else if context.config.mode != Mode::Direct && route_mtu.is_none() {
        // The tunnel stays configured: sessions survive a route that comes back.
        issues.push(Issue {
            severity: Severity::Warning,
            kind: IssueKind::NoRouteToPeer,
            subject: record.name.to_string(),
            message: format!("this host has no route to {}", address.map_or_else(String::new, |a| a.to_string())),
            remedy: "check the underlay's routes on this host".into(),
        });
    }
    peer
}

/// Leaves the families without a route that the MTU is too small for: pods would lose exactly their full packets. The peer is
/// refused where no family remains.
fn refuse_families(context: &Context<'_>, peer: &mut Peer, issues: &mut Vec<Issue>) {
    let ledger = &peer.plan.ledger;
    // Of a tunnel's path one family learns what passes, and the others go by it. It never leaves too little for all.
    let passes = peer.plan.probed.filter(|_| context.config.mode != Mode::Direct).map(|limit| limit.bytes);
    let (mut refused, mut served) = (Vec::new(), 0);
    for family in context.families() {
        let promised = ledger.inner_mtu().and_then(|inner| mtu::check(family, inner));
        let passing = passes.map_or(Ok(()), |passes| mtu::check(family, passes));
        match (promised, passing) {
            (Ok(()), Ok(())) => served += 1,
            (Err(error), _) => refused.push((family, "since the underlay's MTU is too small", error)),
            (_, Err(error)) => {
                refused.push((family, "since larger ones than it could do with vanish on the way", error));
            }
        }
    }
    let remedy = |family| {
        let needed = mtu::underlay_needed(&ledger.stack, ledger.outer, mtu::minimum(family));
        format!("see that the underlay carries {needed} bytes between the nodes, on both of them")
    };
    let message = |(family, why, error): &(Family, &str, mtu::MtuError)| {
        format!("no {family} packets are sent to the node, {why}: {error} ({ledger})")
    };
    let told: Vec<(String, String)> = refused.iter().map(|it| (message(it), remedy(it.0))).collect();
    peer.record.blocks.retain(|block| !refused.iter().any(|(family, ..)| *family == block.family()));
    for (message, remedy) in told {
        if served == 0 {
            peer.refuse(issues, IssueKind::MtuTooSmall, message, remedy);
        } else {
            let subject = peer.record.name.to_string();
            issues.push(Issue { severity: Severity::Error, kind: IssueKind::MtuTooSmall, subject, message, remedy });
        }
    }
}

fn claim_addresses(context: &Context<'_>, peer: &mut Peer, registry: &mut Registry, issues: &mut Vec<Issue>) {
    let addresses: Vec<IpAddr> = peer.record.addresses.iter().collect();
    let inside = |address: &&IpAddr| context.config.cluster_cidrs.iter().any(|cidr| cidr.contains(**address));
    if let Some(address) = addresses.iter().find(inside) {
        let message = format!("the node's underlay address {address} lies inside the cluster CIDR");
        peer.refuse(issues, IssueKind::UnderlayOverlap, message, "choose other clusterCIDRs".into());
    } else if let Err((address, other)) = registry.addresses.take(&addresses, &peer.record.name) {
        let message = format!("the node claims the underlay address {address}, which belongs to {other}");
        let remedy = "give the node an address of its own, or remove its stale record".into();
        peer.refuse(issues, IssueKind::DuplicateAddress, message, remedy);
    }
}

fn claim_keys(mode: Mode, peer: &mut Peer, registry: &mut Registry, issues: &mut Vec<Issue>) {
    let wireguard = peer.record.wireguard.iter().filter(|_| mode.uses_wireguard()).map(|device| device.public_key);
    let esp = peer.record.esp.iter().filter(|_| mode.uses_esp()).flat_map(|esp| &esp.epochs);
    let keys: Vec<PublicKey> = wireguard.chain(esp.map(|epoch| epoch.public_key)).collect();
    if let Err((key, other)) = registry.keys.take(&keys, &peer.record.name) {
        let message = format!("the node publishes the public key {key}, which belongs to {other}");
        let remedy = "remove the copied key file on that node and restart its daemon".into();
        peer.refuse(issues, IssueKind::DuplicateKey, message, remedy);
    }
}

fn claim_block(context: &Context<'_>, block: Prefix, node: &NodeName, registry: &mut Registry) -> Result<(), Issue> {
    let issue = |kind, message: String, remedy: &str| Issue {
        severity: Severity::Error,
        kind,
        subject: node.to_string(),
        message,
        remedy: remedy.to_owned(),
    };
    if !context.config.cluster_cidrs.iter().any(|cidr| cidr.covers(&block)) {
        let message = format!("the node claims block {block}, which lies outside the cluster CIDRs");
        return Err(issue(IssueKind::ForeignBlock, message, "use the same clusterCIDRs on all nodes"));
    }
    match context.snapshot.blocks.get(&block) {
        Some(owner) if owner == node => {}
        Some(owner) => {
            let message = format!("the node claims block {block}, which is allocated to {owner}");
            return Err(issue(IssueKind::DuplicateBlock, message, "restart the node's daemon; it will take its own"));
        }
        None => {
            let message = format!("the node claims block {block}, which was never allocated");
            return Err(issue(IssueKind::ForeignBlock, message, "restart the node's daemon; it will allocate one"));
        }
    }
    if let Some((taken, other)) = overlapping(&registry.blocks, block) {
        let message = format!("the node's block {block} overlaps with {taken} of {other}");
        return Err(issue(IssueKind::DuplicateBlock, message, "remove one of the two AddressBlock manifests"));
    }
    registry.blocks.insert(block, node.clone());
    Ok(())
}

/// The block among disjoint ones that shares an address with this one: the nearest at or before its first address, or the
/// first behind that.
fn overlapping(taken: &BTreeMap<Prefix, NodeName>, block: Prefix) -> Option<(&Prefix, &NodeName)> {
    let before = taken.range(..=block).next_back();
    let behind = taken.range(block..).next();
    before.into_iter().chain(behind).find(|(other, _)| other.overlaps(&block))
}

/// The peer's router address of a family; without it tunnels that need a next hop have none.
pub(super) fn router_of(peer: &Peer, family: Family) -> Option<IpAddr> {
    peer.record.router.get(family)
}
