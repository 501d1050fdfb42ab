//! Mode `direct`: no tunnel; every node is a router on the same link.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::local::route_key;
use super::peers::Peer;
use super::{Context, paths};
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{Desired, Route, RouteTarget};
use crate::mtu::{self, LARGEST_OF_ROUTE, MtuError};
use crate::name::NodeName;
use crate::prefix::Family;

pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) {
    for peer in peers.values_mut().filter(|peer| peer.plan.refused.is_none()) {
        for block in peer.record.blocks.clone() {
            let Some(via) = next_hop(context, peer, block.family(), issues) else { continue };
            let Some(route) = context.facts.routes.get(&via) else {
                let message = format!("this host has no route to {via}");
                peer.refuse(issues, IssueKind::NoRouteToPeer, message, "check the underlay's routes".into());
                break;
            };
            if !route.on_link {
                let message = format!("{via} is behind a router; mode direct needs all nodes on one link");
                peer.refuse(issues, IssueKind::NoRouteToPeer, message, "use mode wireguard or vxlan".into());
                break;
            }
            let target = RouteTarget::Interface { interface: route.interface.clone(), via: Some(via), onlink: false };
            // The other family's way to the peer may be narrower than the one that the peer's ledger is about.
            let probed = paths::probed_by(context, &peer.record.name, via, block.family()).unwrap_or(u32::MAX);
            let mtu = peer.promised.map(|mtu| mtu.min(route.mtu).min(probed).min(LARGEST_OF_ROUTE));
            if let Some(error) = mtu.and_then(|mtu| mtu::check(block.family(), mtu).err()) {
                issues.push(too_narrow(peer, block.family(), via, &error));
                continue;
            }
            desired.routes.insert(route_key(block), Route { target, source: None, mtu });
        }
    }
}

/// The peer's address as next hop: of the same family, or IPv6 for an IPv4 block (RFC 5549); Linux knows no IPv6 route
/// with an IPv4 next hop.
fn next_hop(context: &Context<'_>, peer: &mut Peer, family: Family, issues: &mut Vec<Issue>) -> Option<IpAddr> {
    let same = peer.record.addresses.get(family);
    let reachable = |address: &IpAddr| context.facts.routes.contains_key(address);
    let found = match family {
        Family::Ipv4 if context.config.underlay.family == Family::Ipv6 => peer.record.addresses.get(Family::Ipv6),
        Family::Ipv4 => same.filter(reachable).or(peer.record.addresses.get(Family::Ipv6)).or(same),
        Family::Ipv6 => same,
    };
    if found.is_none() {
        let message = format!("the node has no underlay address that could be the next hop of its {family} blocks");
        let remedy = "give the nodes IPv6 underlay addresses, or use mode wireguard or vxlan".to_owned();
        peer.refuse(issues, IssueKind::IncompletePeer, message, remedy);
    }
    found
}

fn too_narrow(peer: &Peer, family: Family, via: IpAddr, error: &MtuError) -> Issue {
    Issue {
        severity: Severity::Error,
        kind: IssueKind::MtuTooSmall,
        subject: peer.record.name.to_string(),
        message: format!(
            "no {family} packets are sent to the node, since the route to {via} takes too little: {error}"
        ),
        remedy: format!("see that the route to {via} and what is behind it take {} bytes", mtu::minimum(family)),
    }
}
