//! What a trace looks at on this node.

use std::net::IpAddr;

use husk_dataplane::Sweep;
use husk_dataplane::kernel::{Actual, Kernel, Table, diff_table};
use husk_dataplane::way::{Packet, Way};
use husk_overlay::endpoint::{Endpoint, owner_of};
use husk_overlay::kernel::{Route, RouteTarget};
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::name::InterfaceName;
use husk_overlay::port_mapping::PortMapping;
use husk_overlay::prefix::{Family, Prefix};

use crate::engine::{Engine, Node, Pass};
use crate::firewall::{ESP, UDP};
use crate::report::{Carrier, Crossing, Place, TraceEnd, TraceReport};
use crate::source::ClusterSource;
use crate::trace::{Course, EndpointEvidence, Evidence, Guard, PeerEvidence, RouteEvidence, UnderlayEvidence};

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    pub(super) fn gather(&mut self, report: &TraceReport, size: Option<u32>, last: &Pass) -> Evidence {
        let connection = report.connection;
        let (source, destination) = (&report.source, &report.destination);
        let course = Course::between(&source.place, &destination.place);
        let peer = match course {
            Course::Out => self.peer_of(destination, last),
            Course::In => self.peer_of(source, last),
            Course::Within | Course::Elsewhere => None,
        };
        let source_lease = self.lease_of(source);
        let input = match course {
            Course::Within | Course::Out => source_lease.as_ref().map(|lease| lease.host_interface.clone()),
            Course::In => arrives_by(peer.as_ref(), last),
            Course::Elsewhere => None,
        };
        let protocol = |mapping: &PortMapping| mapping.protocol.number() == connection.protocol;
        let to_port = |mapping: &PortMapping| protocol(mapping) && mapping.host_port.get() == connection.port;
        let destination_lease = self.lease_of(destination);
        let mapped = self
            .leases
            .endpoints
            .values()
            .filter(|_| destination.place == Place::ThisNode)
            .find_map(|lease| lease.port_mappings.iter().find(|it| to_port(it)).map(|mapping| (lease, mapping)));
        let mapped_to =
            mapped.map(|(lease, mapping)| format!("{} port {}", lease.display_name(), mapping.container_port));
        let host_ports = destination_lease.iter().flat_map(|lease| &lease.port_mappings);
        let host_ports =
            host_ports.map(|it| format!("{} {} -> {}", it.protocol, it.host_port, it.container_port)).collect();
        let back = source_lease.is_some().then(|| {
            let packet = Packet { source: None, destination: source.address, input: None };
            self.parts.node.way(&packet).map_err(in_words)
        });
        let route = (course != Course::Elsewhere).then(|| {
            let packet =
                Packet { source: Some(source.address), destination: destination.address, input: input.clone() };
            let way = self.parts.node.way(&packet).map_err(in_words);
            RouteEvidence { way, planned: planned(destination.address, last) }
        });
        let answers = arrives_by(peer.as_ref(), last).filter(|_| course == Course::Out).map(|by| {
            let packet =
                Packet { source: Some(destination.address), destination: source.address, input: Some(by.clone()) };
            (by, self.parts.node.way(&packet).map_err(in_words))
        });
        // A pod that has no interface sends nothing, and where a port of the host leads is another connection.
        let is_sent = source.place == Place::ThisNode || input.is_some();
        let crossing = route
            .as_ref()
            .filter(|_| is_sent && mapped_to.is_none())
            .and_then(|route| self.crossing(input.clone(), route, peer.as_ref(), last));
        Evidence {
            mode: self.parts.config.mode,
            cluster_cidrs: self.parts.config.cluster_cidrs.clone(),
            connection,
            size,
            source: source.clone(),
            destination: destination.clone(),
            sides: report.sides.clone(),
            source_endpoint: source_lease.map(|lease| self.endpoint(&lease, last)),
            destination_endpoint: destination_lease.map(|lease| self.endpoint(&lease, last)),
            back,
            route,
            answers,
            guard: self.guard(last),
            crossing,
            peer,
            masquerade: self.parts.config.masquerade,
            host_ports,
            mapped_to,
        }
    }

    pub(super) fn is_in_cluster(&self, address: IpAddr) -> bool {
        self.parts.config.cluster_cidrs.iter().any(|cidr| cidr.contains(address))
    }

    fn lease_of(&self, end: &TraceEnd) -> Option<Endpoint> {
        owner_of(&self.leases.endpoints, end.address).filter(|_| end.place == Place::PodHere).cloned()
    }

    fn endpoint(&mut self, lease: &Endpoint, last: &Pass) -> EndpointEvidence {
        // While pods cannot be served no MTU is wrong.
        let mtu = last.plan.pod_mtu;
        EndpointEvidence {
            name: lease.display_name(),
            interface: lease.host_interface.clone(),
            inside: lease.id.ifname.clone(),
            mtu,
            deviations: self.parts.node.deviations(lease, mtu).map_err(in_words),
        }
    }

    fn guard(&mut self, last: &Pass) -> Guard {
        let desired = &last.plan.desired;
        let mut actual = Actual::default();
        let read = self.parts.kernel.read(Table::Nft, desired, &mut actual);
        let deviations = read.map_err(|error| error.to_string()).map(|()| {
            diff_table(Table::Nft, desired, &actual, Sweep::Allowed).iter().map(ToString::to_string).collect()
        });
        Guard { deviations }
    }

    /// Where packets cross this node; none if the kernel has no way for them.
    fn crossing(
        &self,
        input: Option<InterfaceName>,
        route: &RouteEvidence,
        peer: Option<&PeerEvidence>,
        last: &Pass,
    ) -> Option<Crossing> {
        let output = match &route.way {
            Ok(Way::Leaves { interface, .. }) => Some(interface.clone()),
            Ok(Way::Local) => None,
            Ok(Way::Refused { .. }) | Err(_) => return None,
        };
        let carrier = peer.filter(|peer| peer.refused.is_none()).and_then(|peer| self.carrier(peer, last));
        let cluster_cidrs = self.parts.config.cluster_cidrs.clone();
        Some(Crossing { input, output, carrier, cluster_cidrs })
    }

    /// The packets of the tunnel to a peer.
    fn carrier(&self, peer: &PeerEvidence, last: &Pass) -> Option<Carrier> {
        let UnderlayEvidence { address, way: Ok(Way::Leaves { interface, .. }), .. } = peer.underlay.as_ref()? else {
            return None;
        };
        let config = &self.parts.config;
        let plan = last.plan.peers.get(&peer.name)?;
        let (protocol, own_port, peer_port) = match config.mode {
            Mode::Direct => return None,
            Mode::Vxlan => (UDP, Some(config.vxlan.port), Some(config.vxlan.port)),
            Mode::Wireguard => {
                let generation = plan.keys.own?;
                (UDP, Some(config.wireguard.port_of(marks::wireguard_slot(generation))), Some(plan.port?))
            }
            Mode::Ipsec | Mode::VxlanIpsec => match config.ipsec.udp_port {
                Some(port) => (UDP, Some(port), Some(port)),
                None => (ESP, None, None),
            },
        };
        let own = last.facts.addresses.get(Family::of(*address));
        Some(Carrier { interface: interface.clone(), own, peer: *address, protocol, own_port, peer_port })
    }
}

pub(super) fn in_words(error: anyhow::Error) -> String {
    format!("{error:#}")
}

/// The interface by which packets of the other end arrive.
fn arrives_by(peer: Option<&PeerEvidence>, last: &Pass) -> Option<InterfaceName> {
    let underlay = last.facts.underlay_interface.clone();
    let Some(peer) = peer else { return underlay };
    let blocks = last.plan.peers.get(&peer.name).map(|plan| &plan.blocks)?;
    let to_peer = last.plan.desired.routes.iter().find(|(key, _)| blocks.contains(&key.destination));
    match to_peer.map(|(_, route)| &route.target) {
        Some(RouteTarget::Interface { interface, .. }) if marks::is_tunnel_interface(interface.as_str()) => {
            Some(interface.clone())
        }
        _ => underlay,
    }
}

/// The planned route that a packet to an address meets: of those that cover it the longest, of these the one with the lowest
/// metric.
fn planned(address: IpAddr, last: &Pass) -> Option<(Prefix, Route)> {
    let covering = last.plan.desired.routes.iter().filter(|(key, _)| key.destination.contains(address));
    let best = covering.max_by_key(|(key, _)| (key.destination.length(), std::cmp::Reverse(key.metric)));
    best.map(|(key, route)| (key.destination, route.clone()))
}
