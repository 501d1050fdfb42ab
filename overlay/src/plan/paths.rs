//! Paths to peers: what to probe, and what follows from what probing found.
//!
//! The ledger says what has to pass if everybody on the way keeps the underlay's promise. Where probing found that less does,
//! the routes to that peer are limited to it, and an issue says so; no other peer is concerned.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Context;
use super::local::route_key;
use super::peers::Peer;
use super::silence;
use crate::facts::WireguardSupport;
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{Desired, Route, RouteTarget};
use crate::mode::Mode;
use crate::mtu::{MINIMUM_IPV4, minimum, underlay_needed};
use crate::name::NodeName;
use crate::prefix::{Family, Prefix};
use crate::probe::{Limit, Target};

/// What probing found for a peer, if that is less than promised: the least of all families, which one tunnel carries. Nothing is
/// believed that would leave too little for every family of the cluster.
pub(super) fn probed(context: &Context<'_>, peer: &NodeName, promised: Option<u32>) -> Option<Limit> {
    let limits = context.facts.probed.get(peer)?;
    // In mode `direct`, packets of one family may have a next hop of the other.
    let probed = |family: &Family| context.config.mode == Mode::Direct || context.families().any(|it| it == *family);
    let least = limits.iter().filter(|(family, _)| probed(family)).map(|(_, limit)| *limit);
    let least = least.min_by_key(|limit| (limit.bytes, !limit.found))?;
    let limit = Limit { bytes: least.bytes.max(floor(context)), ..least };
    promised.is_some_and(|promised| limit.bytes < promised).then_some(limit)
}

/// The same of the way by a next hop, for packets of this family.
pub(super) fn probed_by(context: &Context<'_>, peer: &NodeName, via: IpAddr, inner: Family) -> Option<u32> {
    let limit = context.facts.probed.get(peer)?.get(&Family::of(via))?;
    Some(limit.bytes.max(minimum(inner)))
}

/// Bytes that one family of pods works with at least.
fn floor(context: &Context<'_>) -> u32 {
    context.families().map(minimum).min().unwrap_or(MINIMUM_IPV4)
}

/// What to probe of the peers that packets can be sent to, and what is wrong with their paths.
pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) {
    for peer in peers.values_mut() {
        if peer.plan.refused.is_some() {
            (peer.plan.probed, peer.plan.mtu) = (None, None);
            continue;
        }
        let Some(promised) = peer.promised else { continue };
        let handshakes = context.config.mode.uses_wireguard();
        let tunnelled = context.config.mode != Mode::Direct;
        let target = |(own, address)| {
            // In mode `direct` this is a next hop, whose way may be narrower than that of the underlay's family.
            let promised = context.facts.routes.get(&address).map_or(promised, |route| promised.min(route.mtu));
            // Also where no more than the floor is promised: the peer's path to here may promise more, and its probes are
            // answered only by who probes it.
            let family = Family::of(address);
            let floor = minimum(family).min(promised);
            (family, Target { address, own, promised, floor, tunnelled, handshakes })
        };
        let ends: Vec<(IpAddr, IpAddr)> = match context.config.mode {
            Mode::Direct => next_hops(context, peer, desired),
            Mode::Vxlan | Mode::Wireguard | Mode::Ipsec | Mode::VxlanIpsec => routers(context, peer, desired),
        };
        if minds_route_mtu(context) && peer.plan.probed.is_some() {
            ends.iter().for_each(|(_, router)| route_around_limit(peer, *router, promised, desired));
        }
        peer.plan.probe = ends.into_iter().map(target).collect();
        peer.plan.silent = silence::of(context, peer);
        // What is not verified yet is no news; and of a peer that is silent, what it answered before says nothing of its path any
        // more, though its routes stay limited to that: it may come back behind the same path.
        let found = peer.plan.probed.filter(|limit| limit.found && !peer.plan.is_silent());
        issues.extend(found.map(|limit| issue(context, peer, limit.bytes, promised)));
    }
    issues.extend(silence::issue(context, peers));
}

/// Most tunnels do not care for the MTU of the route that a packet goes by. An xfrm interface takes no packet larger than the route
/// that led to it (`xfrm_init_pmtu`, net/xfrm/xfrm_policy.c; `xfrmi_xmit2`, net/xfrm/xfrm_interface_core.c), and drops it without a
/// word. The kernel's WireGuard device pads to 16 bytes, within that MTU or multiples of it (`calculate_skb_padding`,
/// drivers/net/wireguard/send.c): what is larger than the route may become larger than the path, though it fits.
fn minds_route_mtu(context: &Context<'_>) -> bool {
    match context.config.mode {
        Mode::Ipsec => true,
        Mode::Wireguard => context.facts.wireguard == Some(WireguardSupport::Kernel),
        Mode::Direct | Mode::Vxlan | Mode::VxlanIpsec => false,
    }
}

/// Whether a limited path has recovered is tried with packets above its limit. Their socket does not care for the MTU of the route
/// that they go by; where the tunnel does, what probes are sent to has a route of its own, without the limit. Nobody else has
/// business there.
fn route_around_limit(peer: &Peer, router: IpAddr, promised: u32, desired: &mut Desired) {
    let block = peer.record.blocks.iter().find(|block| block.contains(router));
    let Some(route) = block.and_then(|block| desired.routes.get(&route_key(*block))) else { return };
    let route = Route { mtu: Some(promised), ..route.clone() };
    // A block of one address has its route.
    desired.routes.entry(route_key(Prefix::host(router))).or_insert(route);
}

/// Own and peer's address inside the overlay, in every family in which there is a route to the peer.
fn routers(context: &Context<'_>, peer: &Peer, desired: &Desired) -> Vec<(IpAddr, IpAddr)> {
    let routed = |address: &IpAddr| {
        let block = peer.record.blocks.iter().find(|block| block.contains(*address));
        block.is_some_and(|block| desired.routes.contains_key(&route_key(*block)))
    };
    let ends = |family| Some((context.router.get(family)?, peer.record.router.get(family).filter(routed)?));
    context.families().filter_map(ends).collect()
}

/// In mode `direct` router addresses are on no interface, but the underlay's packets are the pods' packets: what passes
/// between the underlay addresses passes between pods.
fn next_hops(context: &Context<'_>, peer: &Peer, desired: &Desired) -> Vec<(IpAddr, IpAddr)> {
    let via = |block: &Prefix| match &desired.routes.get(&route_key(*block))?.target {
        RouteTarget::Interface { via, .. } => *via,
        RouteTarget::Unreachable => None,
    };
    let ends = |address: IpAddr| Some((context.facts.addresses.get(Family::of(address))?, address));
    peer.record.blocks.iter().filter_map(via).filter_map(ends).collect()
}

fn issue(context: &Context<'_>, peer: &Peer, passes: u32, promised: u32) -> Issue {
    let outside = |inside| underlay_needed(&context.config.stack(), context.config.underlay.family, inside);
    let (carried, expected) = (outside(passes), peer.plan.ledger.underlay_mtu);
    let to = peer.plan.address.map_or_else(|| "its address".to_owned(), |address| address.to_string());
    let (severity, or_less) = if passes > floor(context) {
        (Severity::Warning, "")
    } else {
        (Severity::Error, ", the least that the cluster works with, and perhaps not even those pass")
    };
    Issue {
        severity,
        kind: IssueKind::PathMtu,
        subject: peer.record.name.to_string(),
        message: format!(
            "packets of more than {passes} bytes vanish on the way to the node, though the underlay promises room for \
             {promised}: its path carries {carried} bytes instead of {expected}; the routes to it are limited to \
             {passes}{or_less}"
        ),
        remedy: format!(
            "let everything on the way to {to} carry {expected} bytes, or let its routers say what they carry \
             (ICMP \"fragmentation needed\", ICMPv6 \"packet too big\"); or set underlay.mtu to {carried} on the node"
        ),
    }
}

#[cfg(test)]
mod tests;
