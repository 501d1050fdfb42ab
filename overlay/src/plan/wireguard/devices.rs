//! Devices, peers and routes of the generations held.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::super::Context;
use super::super::local::{route_key, router_on};
use super::super::peers::Peer;
use super::generations::Generations;
use super::offers::Offer;
use crate::issue::{Issue, IssueKind};
use crate::kernel::{Desired, Link, LinkKind, Route, RouteTarget, WireguardDevice, WireguardPeer};
use crate::marks;
use crate::name::NodeName;

/// Longest keepalive in seconds of a peer whose handshake is awaited: `REKEY_TIMEOUT` (WireGuard paper, section 6.1), within
/// which a device makes no second attempt anyway. A keepalive that is switched on makes a device send at once, and so start
/// the handshake (`set_peer` in drivers/net/wireguard/netlink.c); a device that has given up tries again with the next one.
const HANDSHAKE_KEEPALIVE: u16 = 5;

/// What the devices are made from.
pub(super) struct Devices<'a> {
    pub(super) context: &'a Context<'a>,
    pub(super) generations: &'a Generations<'a>,
    pub(super) userspace: bool,
    /// MTU in bytes of the devices.
    pub(super) mtu: u32,
}

impl Devices<'_> {
    pub(super) fn render(&self, peers: &mut BTreeMap<NodeName, Peer>, desired: &mut Desired, issues: &mut Vec<Issue>) {
        for generation in self.generations.held() {
            self.device(generation, peers, desired);
        }
        for (name, peer) in peers {
            if let Some(offer) = self.generations.offer(name) {
                self.route(offer, peer, desired, issues);
            }
        }
    }

    fn device(&self, generation: u64, peers: &BTreeMap<NodeName, Peer>, desired: &mut Desired) {
        let Some(own) = self.context.facts.wireguard_epochs.get(&generation) else { return };
        let interface = marks::wireguard_interface(generation);
        let kind = if self.userspace { LinkKind::WireguardUserspace } else { LinkKind::Wireguard };
        let threaded_napi = self.context.facts.threaded_napi && !self.userspace;
        desired.links.insert(interface.clone(), Link { kind, mtu: self.mtu, mac: None, threaded_napi });
        router_on(self.context, &interface, desired);
        if !self.userspace {
            // The device turns it off for all interfaces when it is set up (`wg_open` in drivers/net/wireguard/device.c) and
            // never on again: what is named here is remembered as it was found, and brought back by cleanup.
            desired.sysctls.insert("net/ipv4/conf/all/send_redirects".to_owned(), "0".to_owned());
        }
        if self.generations.held().count() > 1 {
            // A peer may send in one device and be sent to in the other: strict reverse path filtering (RFC 3704) would drop
            // its packets, and says nothing that the device's allowed-ips do not say.
            desired.sysctls.insert(format!("net/ipv4/conf/{interface}/rp_filter"), "2".to_owned());
        }
        let mut device = WireguardDevice {
            userspace: self.userspace,
            public_key: own.public_key,
            listen_port: self.context.config.wireguard.port_of(marks::wireguard_slot(generation)),
            peers: BTreeMap::new(),
        };
        for (name, peer) in peers {
            let offer = self.generations.offer(name);
            let published = offer.and_then(|offer| offer.get(&generation).map(|published| (offer, published)));
            let (Some((offer, published)), Some(address)) = (published, peer.plan.address) else { continue };
            let configuration = WireguardPeer {
                endpoint: Some(SocketAddr::new(address, published.port)),
                allowed_ips: peer.record.blocks.clone(),
                keepalive: self.keepalive(offer, generation),
            };
            device.peers.insert(published.public_key, configuration);
        }
        for key in self.generations.lingering(generation) {
            let configuration = WireguardPeer { endpoint: None, allowed_ips: BTreeSet::new(), keepalive: 0 };
            device.peers.insert(key, configuration);
        }
        desired.wireguard.insert(interface, device);
    }

    /// The configured keepalive in the generation that carries the traffic, one that starts the handshake in a newer one, and
    /// none in an older one, which shall fall quiet.
    fn keepalive(&self, offer: &Offer, generation: u64) -> u16 {
        let configured = self.context.config.wireguard.keepalive;
        match self.generations.reach(offer).map(|reach| reach.generation) {
            Some(carrier) if carrier < generation => match configured {
                0 => HANDSHAKE_KEEPALIVE,
                configured => configured.min(HANDSHAKE_KEEPALIVE),
            },
            Some(carrier) if carrier == generation => configured,
            _ => 0,
        }
    }

    fn route(&self, offer: &Offer, peer: &mut Peer, desired: &mut Desired, issues: &mut Vec<Issue>) {
        let used = self.generations.reach(offer).map(|reach| reach.generation);
        let Some((generation, published)) = used.and_then(|used| offer.get_key_value(&used)) else {
            let list = |numbers: Vec<u64>| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(" and ");
            let message = format!(
                "no WireGuard generation is common to both nodes: it publishes {}, this node has {}",
                list(offer.keys().copied().collect()),
                list(self.generations.held().collect()),
            );
            let remedy = "see that huskd runs on both nodes; the one that is behind follows within the grace period";
            peer.refuse(issues, IssueKind::IncompletePeer, message, remedy.into());
            return;
        };
        peer.plan.keys = self.generations.peer_keys(offer);
        peer.plan.public_key = Some(published.public_key);
        peer.plan.port = Some(published.port);
        let interface = marks::wireguard_interface(*generation);
        if self.userspace {
            peer.promise(self.context, padded_route_mtu(peer, self.mtu));
        }
        for block in &peer.record.blocks {
            let target = RouteTarget::Interface { interface: interface.clone(), via: None, onlink: false };
            let source = self.context.router.get(block.family());
            desired.routes.insert(route_key(*block), Route { target, source, mtu: peer.mtu() });
        }
    }
}

/// The userspace device pads packets to 16 bytes, but never to more than this or its own MTU; the kernel's never pads beyond
/// the MTU of the route (`calculate_skb_padding` in drivers/net/wireguard/send.c).
const USERSPACE_PADDING_LIMIT: u32 = 1280;

/// To a peer whose MTU lies within what a userspace device pads to, the route needs the value that holds with any padding.
fn padded_route_mtu(peer: &Peer, device_mtu: u32) -> Option<u32> {
    let exact = peer.plan.ledger.inner?;
    if exact < device_mtu.min(USERSPACE_PADDING_LIMIT) { peer.plan.ledger.padding_proof } else { Some(exact) }
}
