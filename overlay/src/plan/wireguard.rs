//! Mode `wireguard`: one device holds all peers; a peer's allowed-ips are its blocks, so that the device itself drops
//! whatever a peer sends from addresses that are not its own.
//!
//! The device of slot 0 carries the mesh. The second slot is for key rotation: allowed-ips are unique within a device, so
//! that one device could not accept a peer's old and new key at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::Context;
use super::local::{route_key, router_on};
use super::peers::Peer;
use crate::config::WireguardChoice;
use crate::facts::WireguardSupport;
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{Desired, Link, LinkKind, Route, RouteTarget, WireguardDevice, WireguardPeer};
use crate::marks;
use crate::name::{InterfaceName, NodeName};

/// The slot in use.
const ACTIVE_SLOT: u8 = 0;

pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) {
    let Some(userspace) = device_choice(context, issues) else { return };
    let (Some(public_key), Some(mtu)) = (context.facts.wireguard_keys.get(&ACTIVE_SLOT), context.inner_mtu) else {
        return;
    };
    let interface = InterfaceName::new(marks::WIREGUARD_INTERFACES[usize::from(ACTIVE_SLOT)])
        .expect("a constant of eight letters and digits");
    let kind = if userspace { LinkKind::WireguardUserspace } else { LinkKind::Wireguard };
    let threaded_napi = context.facts.threaded_napi && !userspace;
    desired.links.insert(interface.clone(), Link { kind, mtu, mac: None, threaded_napi });
    router_on(context, &interface, desired);
    let mut device = WireguardDevice {
        userspace,
        public_key: *public_key,
        listen_port: context.config.wireguard.port_of(ACTIVE_SLOT),
        peers: BTreeMap::new(),
    };
    for peer in peers.values_mut().filter(|peer| peer.plan.refused.is_none()) {
        let published = peer.record.wireguard.iter().find(|published| published.slot == ACTIVE_SLOT).cloned();
        let (Some(address), Some(published)) = (peer.plan.address, published) else {
            let message = "the node publishes no WireGuard key".to_owned();
            peer.refuse(issues, IssueKind::IncompletePeer, message, "use the same mode on all nodes".into());
            continue;
        };
        peer.plan.public_key = Some(published.public_key);
        peer.plan.port = Some(published.port);
        let configuration = WireguardPeer {
            endpoint: Some(SocketAddr::new(address, published.port)),
            allowed_ips: peer.record.blocks.iter().copied().collect::<BTreeSet<_>>(),
            keepalive: context.config.wireguard.keepalive,
        };
        device.peers.insert(published.public_key, configuration);
        for block in &peer.record.blocks {
            let target = RouteTarget::Interface { interface: interface.clone(), via: None, onlink: false };
            let source = context.router.get(block.family());
            let route_mtu = if userspace { padded_route_mtu(peer, mtu) } else { peer.mtu() };
            desired.routes.insert(route_key(*block), Route { target, source, mtu: route_mtu });
        }
    }
    desired.wireguard.insert(interface, device);
}

/// The userspace device pads packets to 16 bytes, but never to more than this or its own MTU; the kernel's never pads beyond
/// the MTU of the route (`calculate_skb_padding` in drivers/net/wireguard/send.c).
const USERSPACE_PADDING_LIMIT: u32 = 1280;

/// To a peer whose MTU lies within what a userspace device pads to, the route needs the value that holds with any padding.
fn padded_route_mtu(peer: &Peer, device_mtu: u32) -> Option<u32> {
    let exact = peer.mtu()?;
    if exact < device_mtu.min(USERSPACE_PADDING_LIMIT) { peer.plan.ledger.padding_proof } else { Some(exact) }
}

/// Whether the device is a userspace one; none, with an issue, if none can be had. There is no plaintext in its place.
fn device_choice(context: &Context<'_>, issues: &mut Vec<Issue>) -> Option<bool> {
    let mut blocked = |message: String, remedy: &str| {
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::EncapsulationUnavailable,
            subject: "mode wireguard".into(),
            message,
            remedy: remedy.to_owned(),
        });
        None
    };
    match (context.config.wireguard.device, &context.facts.wireguard) {
        (WireguardChoice::Userspace, _) | (WireguardChoice::Auto, Some(WireguardSupport::Userspace)) => Some(true),
        (WireguardChoice::Kernel | WireguardChoice::Auto, Some(WireguardSupport::Kernel)) => Some(false),
        (WireguardChoice::Kernel, _) => blocked(
            "the kernel has no WireGuard, and wireguard.device is kernel".into(),
            "load the module wireguard, or set wireguard.device to auto",
        ),
        (WireguardChoice::Auto, Some(WireguardSupport::Unavailable { reason })) => blocked(
            format!("no WireGuard device can be had: {reason}"),
            "load the module wireguard or provide /dev/net/tun",
        ),
        (WireguardChoice::Auto, None) => {
            blocked("it is not known yet how WireGuard can be had".into(), "wait for the daemon's next pass")
        }
    }
}
