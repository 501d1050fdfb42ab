//! What was looked at.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use husk_dataplane::way::{NeighbourStanding, Way};
use husk_overlay::kernel::Route;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::Ledger;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Prefix;
use husk_overlay::probe::Report;
use husk_policy::verdict::Connection;

use super::Course;
use crate::report::{Crossing, TraceEnd, TraceSide};

/// All that [`super::hops`] needs to know. What could not be looked at is an error in words.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// Encapsulation.
    pub mode: Mode,
    /// Where addresses of pods and nodes in the overlay lie.
    pub cluster_cidrs: Vec<Prefix>,
    /// The connection.
    pub connection: Connection,
    /// Bytes of a packet of it; none means any.
    pub size: Option<u32>,
    /// Who begins it.
    pub source: TraceEnd,
    /// Who answers.
    pub destination: TraceEnd,
    /// What policy says, egress and ingress.
    pub sides: Vec<TraceSide>,
    /// The source, if it is a pod of this node.
    pub source_endpoint: Option<EndpointEvidence>,
    /// The destination, if it is one.
    pub destination_endpoint: Option<EndpointEvidence>,
    /// Where packets to the source's address go: back to its own interface, or what it sends counts as spoofed.
    pub back: Option<Result<Way, String>>,
    /// The route that the packet meets on this node; none if it meets none.
    pub route: Option<RouteEvidence>,
    /// For a connection from here to another node's pods: by which interface what answers it arrives, and its way from there.
    pub answers: Option<(InterfaceName, Result<Way, String>)>,
    /// The own rules.
    pub guard: Guard,
    /// Where its packets cross this node; none if they do not, or do not get that far.
    pub crossing: Option<Crossing>,
    /// The other node, if another one of the cluster has a part in it and the overlay leads there.
    pub peer: Option<PeerEvidence>,
    /// What pods exchange with addresses outside the cluster leaves under the node's address.
    pub masquerade: bool,
    /// Ports of this host that lead to the destination, in words, for example "TCP 8080 -> 80".
    pub host_ports: Vec<String>,
    /// The port of this host that is asked for leads to this pod, in words.
    pub mapped_to: Option<String>,
}

impl Evidence {
    /// The address lies in a cluster CIDR.
    #[must_use]
    pub fn is_in_cluster(&self, address: IpAddr) -> bool {
        self.cluster_cidrs.iter().any(|cidr| cidr.contains(address))
    }

    /// Which part of the way is on this node.
    #[must_use]
    pub fn course(&self) -> Course {
        Course::between(&self.source.place, &self.destination.place)
    }
}

/// A pod of this node.
#[derive(Debug, Clone)]
pub struct EndpointEvidence {
    /// Its name.
    pub name: String,
    /// Its host interface.
    pub interface: InterfaceName,
    /// Its interface inside.
    pub inside: InterfaceName,
    /// MTU in bytes that it should have; none while pods cannot be served.
    pub mtu: Option<u32>,
    /// How the two ends deviate from what was wired.
    pub deviations: Result<Vec<String>, String>,
}

/// The route of a packet on this node.
#[derive(Debug, Clone)]
pub struct RouteEvidence {
    /// What the kernel says.
    pub way: Result<Way, String>,
    /// What the plan says, if it has a route for it.
    pub planned: Option<(Prefix, Route)>,
}

/// Rules of Husk's own packet filter.
#[derive(Debug, Clone)]
pub struct Guard {
    /// What the table `inet husk` lacks, or has too much.
    pub deviations: Result<Vec<String>, String>,
}

/// The other node.
#[derive(Debug, Clone)]
pub struct PeerEvidence {
    /// Its name.
    pub name: NodeName,
    /// Why nothing is sent to it, if so.
    pub refused: Option<String>,
    /// Remedy of that, where an issue has one.
    pub remedy: Option<String>,
    /// Byte ledger of the tunnel to it.
    pub ledger: Ledger,
    /// Bytes that probing found to pass, where that is less.
    pub probed: Option<u32>,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
    /// Its tunnel.
    pub tunnel: Tunnel,
    /// The way of the tunnel's own packets.
    pub underlay: Option<UnderlayEvidence>,
    /// What probing found, and how long ago it concluded; none where the path is not probed.
    pub probe: Option<(Report, Option<Duration>)>,
}

/// The way of the packets that carry the tunnel.
#[derive(Debug, Clone)]
pub struct UnderlayEvidence {
    /// Underlay address of the peer.
    pub address: IpAddr,
    /// What the kernel does with packets to it.
    pub way: Result<Way, String>,
    /// The next hop's Ethernet address; none where that was not looked for.
    pub neighbour: Option<NeighbourStanding>,
}

/// A tunnel device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name.
    pub name: InterfaceName,
    /// What is wrong with it, in words; none if it is there, up and set up as planned.
    pub wrong: Option<String>,
}

/// The tunnel to a peer.
#[derive(Debug, Clone)]
pub struct Tunnel {
    /// Devices; none in modes without.
    pub devices: Vec<Device>,
    /// What belongs to the peer.
    pub kind: Result<TunnelKind, String>,
}

/// What a tunnel is made of.
#[derive(Debug, Clone)]
pub enum TunnelKind {
    /// No tunnel: packets go as they are.
    Direct,
    /// VXLAN.
    Vxlan {
        /// VXLAN network identifier.
        vni: u32,
        /// UDP port.
        port: u16,
        /// Entries that lead to the peer, as planned and in the kernel.
        entries: Entries,
    },
    /// WireGuard.
    Wireguard {
        /// The device has the peer as planned.
        configured: bool,
        /// Generation of the keys in use.
        generation: Option<u64>,
        /// Where the peer is.
        endpoint: Option<SocketAddr>,
        /// How long ago the last handshake was.
        handshake: Option<Duration>,
        /// Bytes sent and received.
        bytes: (u64, u64),
    },
    /// ESP, in VXLAN too or not.
    Esp {
        /// Epochs in use for sending, own and the peer's; none while nothing can be sent.
        epochs: Option<(u64, u64)>,
        /// Seconds since the own key in use was made.
        key_age: Option<Duration>,
        /// Associations as planned and in the kernel, in both directions.
        associations: Entries,
        /// SPIs that are sent with.
        spis: Vec<u32>,
        /// Policies as planned and in the kernel.
        policies: Entries,
        /// Counters of packets that IPsec did not let through, in words; those that are zero are absent.
        errors: Vec<String>,
        /// In mode `vxlan-ipsec`: forwarding entries.
        forwarding: Option<Entries>,
    },
}

/// How many there should be, and how many of these there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entries {
    /// Planned.
    pub wanted: usize,
    /// Of these, in the kernel.
    pub found: usize,
}

impl Entries {
    /// All are there.
    #[must_use]
    pub fn complete(self) -> bool {
        self.wanted == self.found
    }
}
