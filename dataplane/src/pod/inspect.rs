//! How a wired pod deviates from what was wired.

use std::fmt;
use std::net::IpAddr;

use husk_overlay::bandwidth::Limit;
use husk_overlay::mac::MacAddress;
use husk_overlay::marks::ROUTE_PROTOCOL;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol};
use netlink_packet_route::rule::RuleMessage;

use super::find::find;
use super::{PodSpec, bandwidth, by_source, request};
use crate::error::Error;
use crate::netlink::{Protocol, Request, Socket};

/// What MTU the pod's end may have, in bytes: a plugin chained behind may have given it one of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodMtu {
    /// One of these; the first is the expected one.
    OneOf(Vec<u32>),
    /// This one or any smaller.
    AtMost(u32),
    /// Whichever it is: what it should be is not known.
    Any,
}

impl PodMtu {
    fn allows(&self, mtu: u32) -> bool {
        match self {
            Self::OneOf(all) => all.contains(&mtu),
            Self::AtMost(largest) => mtu <= *largest,
            Self::Any => true,
        }
    }
}

impl fmt::Display for PodMtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneOf(all) => {
                let all: Vec<String> = all.iter().map(u32::to_string).collect();
                f.write_str(&all.join(" or "))
            }
            Self::AtMost(largest) => write!(f, "at most {largest}"),
            Self::Any => f.write_str("any"),
        }
    }
}

/// Deviations in the host's namespace.
pub(super) fn host(spec: &PodSpec, mtu: &PodMtu) -> Result<Vec<String>, Error> {
    let mut found = Inspection::open("on the host")?;
    let Some(index) = found.link(&spec.host_interface, mtu, spec.host_mac)? else { return Ok(found.deviations) };
    let (routes, neighbours) = (found.routes(index)?, found.neighbours(index)?);
    for address in spec.addresses.iter() {
        let destination = Prefix::host(address);
        let expected = |route: &Route| {
            route.destination == Some(destination) && route.gateway.is_none() && route.protocol == ROUTE_PROTOCOL
        };
        found.expect(routes.iter().any(expected), || {
            format!("the route {destination} dev {} is missing", spec.host_interface)
        });
        found.neighbour(&neighbours, &spec.host_interface, address, spec.pod_mac);
    }
    found.limit(index, &spec.host_interface, spec.ingress())?;
    Ok(found.deviations)
}

/// Deviations in the pod's namespace, which is the calling thread's.
pub(super) fn pod(spec: &PodSpec, mtu: &PodMtu) -> Result<Vec<String>, Error> {
    let mut found = Inspection::open("in the pod")?;
    let interface = &spec.pod_interface;
    let Some(index) = found.link(interface, mtu, spec.pod_mac)? else { return Ok(found.deviations) };
    let (addresses, routes, neighbours) = (found.addresses(index)?, found.routes(index)?, found.neighbours(index)?);
    for address in spec.addresses.iter() {
        found.expect(addresses.contains(&address), || format!("{interface} lacks the address {address}"));
    }
    for address in spec.addresses.iter() {
        let family = Family::of(address);
        let gateway = request::gateway(family);
        let expected = |route: &&Route| {
            route.family == Some(family)
                && route.destination.is_none_or(|it| it.length() == 0)
                && route.gateway == Some(gateway)
        };
        let tables: Vec<u32> = routes.iter().filter(expected).map(|route| route.table).collect();
        found.expect(!tables.is_empty(), || format!("the route default via {gateway} dev {interface} is missing"));
        let table = by_source::table(index);
        if tables.contains(&table) && !tables.contains(&RouteHeader::RT_TABLE_MAIN.into()) {
            let ruled = found.rules(family)?.iter().any(|rule| by_source::is_rule(rule, index, address));
            found.expect(ruled, || format!("the rule from {address} lookup {table} is missing"));
        }
        found.neighbour(&neighbours, interface, gateway, spec.host_mac);
    }
    found.limit(index, interface, spec.egress())?;
    Ok(found.deviations)
}

/// A route, as far as it is compared.
struct Route {
    family: Option<Family>,
    /// None for a default route.
    destination: Option<Prefix>,
    gateway: Option<IpAddr>,
    protocol: u8,
    table: u32,
}

/// A permanent neighbour.
type Neighbour = (IpAddr, Vec<u8>);

/// Reads one namespace and collects deviations.
struct Inspection {
    socket: Socket,
    place: &'static str,
    deviations: Vec<String>,
}

impl Inspection {
    fn open(place: &'static str) -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(Protocol::Route)?, place, deviations: Vec::new() })
    }

    fn expect(&mut self, holds: bool, deviation: impl FnOnce() -> String) {
        if !holds {
            self.deviations.push(format!("{}, {}", self.place, deviation()));
        }
    }

    /// Compares a link and returns its index; none if it is missing.
    fn link(&mut self, interface: &InterfaceName, mtu: &PodMtu, mac: MacAddress) -> Result<Option<u32>, Error> {
        let Some(link) = find(&mut self.socket, interface)? else {
            self.expect(false, || format!("the interface {interface} is missing"));
            return Ok(None);
        };
        let LinkMessage { header, attributes, .. } = link;
        self.expect(header.flags.contains(LinkFlags::Up), || format!("the interface {interface} is down"));
        for attribute in &attributes {
            match attribute {
                LinkAttribute::Mtu(actual) => {
                    self.expect(mtu.allows(*actual), || format!("{interface} has the MTU {actual} instead of {mtu}"));
                }
                LinkAttribute::Address(actual) => {
                    self.expect(actual[..] == mac.0, || format!("{interface} has another Ethernet address than {mac}"));
                }
                _ => {}
            }
        }
        Ok(Some(header.index))
    }

    fn neighbour(&mut self, all: &[Neighbour], interface: &InterfaceName, address: IpAddr, mac: MacAddress) {
        let present = all.iter().any(|(it, lladdr)| *it == address && lladdr[..] == mac.0);
        self.expect(present, || format!("the permanent neighbour {address} lladdr {mac} dev {interface} is missing"));
    }

    fn limit(&mut self, index: u32, interface: &InterfaceName, limit: Option<Limit>) -> Result<(), Error> {
        let Some(limit) = limit else { return Ok(()) };
        let all = self.dump("queueing disciplines", bandwidth::list())?;
        let deviation = bandwidth::deviation(&all, index, interface, limit);
        self.expect(deviation.is_none(), || deviation.unwrap_or_default());
        Ok(())
    }

    fn dump(&mut self, table: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        self.socket.dump_shared(Request { operation: "list", object: table.to_owned(), flags: 0, message })
    }

    fn addresses(&mut self, index: u32) -> Result<Vec<IpAddr>, Error> {
        let all = self.dump("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        let own = all.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) if address.header.index == index => Some(address.attributes),
            _ => None,
        });
        // IPv4 has both attributes, of which the second is the peer on a point-to-point link; IPv6 has just the second.
        let address = |attribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(address),
            _ => None,
        };
        Ok(own.flatten().filter_map(address).collect())
    }

    fn routes(&mut self, index: u32) -> Result<Vec<Route>, Error> {
        let all = self.dump("routes", RouteNetlinkMessage::GetRoute(RouteMessage::default()))?;
        Ok(all.into_iter().filter_map(|message| parse_route(message, index)).collect())
    }

    fn rules(&mut self, family: Family) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let mut message = RuleMessage::default();
        message.header.family = request::kernel_family(family);
        self.dump("rules", RouteNetlinkMessage::GetRule(message))
    }

    fn neighbours(&mut self, index: u32) -> Result<Vec<Neighbour>, Error> {
        let all = self.dump("neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
        Ok(all.into_iter().filter_map(|message| parse_neighbour(message, index)).collect())
    }
}

fn parse_route(message: RouteNetlinkMessage, index: u32) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    let mut route = Route {
        family: None,
        destination: None,
        gateway: None,
        protocol: match message.header.protocol {
            RouteProtocol::Other(number) => number,
            known => known.into(),
        },
        table: message.header.table.into(),
    };
    route.family = match message.header.address_family {
        netlink_packet_route::AddressFamily::Inet => Some(Family::Ipv4),
        netlink_packet_route::AddressFamily::Inet6 => Some(Family::Ipv6),
        _ => None,
    };
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(it) => ours = *it == index,
            RouteAttribute::Table(it) => route.table = *it,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::Destination(address) => {
                route.destination =
                    ip(address).and_then(|it| Prefix::containing(it, message.header.destination_prefix_length).ok());
            }
            _ => {}
        }
    }
    ours.then_some(route)
}

fn parse_neighbour(message: RouteNetlinkMessage, index: u32) -> Option<Neighbour> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(it)) => Some(IpAddr::from(*it)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(it)) => Some(IpAddr::from(*it)),
        _ => None,
    })?;
    let lladdr = message.attributes.into_iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(it) => Some(it),
        _ => None,
    })?;
    Some((address, lladdr))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(it) => Some((*it).into()),
        RouteAddress::Inet6(it) => Some((*it).into()),
        _ => None,
    }
}
