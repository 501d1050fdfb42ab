//! Mode `vxlan` (RFC 7348) without learning and without multicast: for every peer one forwarding entry (its Ethernet
//! address to its underlay address), one permanent neighbour per family (its router address to its Ethernet address), and
//! one route per block with the router address as on-link next hop. Three static entries; nothing is ever resolved on the
//! wire.

use std::collections::BTreeMap;

use super::local::{route_key, router_on};
use super::peers::{Peer, router_of};
use super::{Context, vxlan_mac};
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{Desired, FdbKey, Link, LinkKind, NeighbourKey, Route, RouteTarget};
use crate::marks;
use crate::name::{InterfaceName, NodeName};
use crate::offload::Setting;

/// Device, entries and routes. Peers that cannot be sent to yet get no entries and no routes; what they claim counts.
pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    can_send: impl Fn(&Peer) -> bool,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) {
    let (Some(local), Some(mtu)) = (context.own_underlay(), context.inner_mtu) else { return };
    let interface = InterfaceName::new(marks::VXLAN_INTERFACE).expect("a constant of eight letters");
    let own_mac = vxlan_mac(&context.facts.node);
    let vxlan = &context.config.vxlan;
    let link = Link {
        kind: LinkKind::Vxlan { vni: vxlan.vni, port: vxlan.port, local },
        mtu,
        mac: Some(own_mac),
        // Never: a VXLAN device queues per CPU and without a lock (net/core/gro_cells.c), as whoever fills a queue also
        // empties it. A NAPI thread runs on any CPU; the queue's length then goes wrong and reception stops for good.
        threaded_napi: false,
    };
    desired.links.insert(interface.clone(), link);
    offload(context, &interface, desired, issues);
    router_on(context, &interface, desired);
    let mut macs = BTreeMap::from([(own_mac, context.facts.node.clone())]);
    for peer in peers.values_mut().filter(|peer| peer.plan.refused.is_none()) {
        peer.plan.port = Some(vxlan.port);
        let (Some(address), Some(mac)) = (peer.plan.address, peer.record.vxlan_mac) else {
            let message = "the node publishes no VXLAN Ethernet address".to_owned();
            peer.refuse(issues, IssueKind::IncompletePeer, message, "use the same mode on all nodes".into());
            continue;
        };
        if let Some(other) = macs.insert(mac, peer.record.name.clone()) {
            macs.insert(mac, other.clone());
            let message = format!("the node publishes the Ethernet address {mac}, which belongs to {other}");
            peer.refuse(issues, IssueKind::DuplicateKey, message, "restart the node's daemon".into());
            continue;
        }
        if !can_send(peer) {
            continue;
        }
        desired.fdb.insert(FdbKey { interface: interface.clone(), mac }, address);
        for block in peer.record.blocks.clone() {
            let Some(via) = router_of(peer, block.family()) else {
                let message = format!("the node publishes no router address for its {} blocks", block.family());
                peer.refuse(issues, IssueKind::IncompletePeer, message, "restart the node's daemon".into());
                continue;
            };
            desired.neighbours.insert(NeighbourKey { interface: interface.clone(), address: via }, mac);
            let target = RouteTarget::Interface { interface: interface.clone(), via: Some(via), onlink: true };
            let source = context.router.get(block.family());
            desired.routes.insert(route_key(block), Route { target, source, mtu: peer.mtu() });
        }
    }
}

/// Offload as the self-test ([`crate::offload`]) wants it.
fn offload(context: &Context<'_>, device: &InterfaceName, desired: &mut Desired, issues: &mut Vec<Issue>) {
    let on = match context.facts.offload.setting {
        Setting::Untouched => None,
        Setting::Off => Some(false),
        Setting::On => Some(true),
    };
    desired.offload.extend(on.map(|on| (device.clone(), on)));
    issues.extend(context.facts.offload.finding.as_ref().map(|finding| Issue {
        severity: Severity::Warning,
        kind: IssueKind::BrokenOffload,
        subject: device.to_string(),
        message: format!(
            "packets whose checksum and segmentation are left to {} do not arrive: TCP to {} stood still, and passed at once \
             with both done by the kernel; checksum and segmentation offload of {device} is off, which costs processor time",
            finding.interface, finding.peer
        ),
        remedy: format!(
            "update the kernel or the driver of {0} here and on {1}, or turn off what it gets wrong of tunnels (ethtool -k {0}: \
             tx-udp_tnl-segmentation, tx-udp_tnl-csum-segmentation, tx-checksum-ip-generic); it is tested again once a day \
             and after a reboot",
            finding.interface, finding.peer
        ),
    }));
}
