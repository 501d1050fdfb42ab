//! What the kernel would do with a packet: its own answer, for one look-up, without a packet.
//!
//! `RTM_GETROUTE` with an input interface goes the way of a packet that arrives there, validation of its source address
//! (`rp_filter`) and forwarding included (`inet_rtm_getroute` in net/ipv4/route.c, `inet6_rtm_getroute` in net/ipv6/route.c);
//! without one, that of a packet of the host's own. It is asked twice: what becomes of the packet, and which route says so
//! (`RTM_F_FIB_MATCH`). Between the two the routes may change; then the second answer is of the newer ones.

use std::net::IpAddr;

use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use nix::errno::Errno;

use crate::error::{Error, Refusal};
use crate::netlink::{Request, Socket};
use crate::routes::{Parts, address_family, route_address};
use crate::underlay::{self, Interface};

/// A packet, as far as routing looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Source address; none leaves the choice to the kernel, for packets of the host's own.
    pub source: Option<IpAddr>,
    /// Destination address.
    pub destination: IpAddr,
    /// Interface that it arrives by; none for packets of the host's own.
    pub input: Option<InterfaceName>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// It leaves by an interface.
    Leaves {
        /// The interface.
        interface: InterfaceName,
        /// MTU in bytes: the route's `mtu`, or the interface's if that is smaller or the route has none.
        mtu: u32,
        /// The interface is administratively up.
        up: bool,
        /// Next hop, where there is one.
        via: Option<IpAddr>,
        /// Source address that the kernel chooses for packets of the host's own.
        source: Option<IpAddr>,
        /// The route that says so; none where the kernel does not tell.
        route: Option<MatchedRoute>,
    },
    /// It is for the host itself.
    Local,
    /// The kernel refuses it.
    Refused {
        /// `EHOSTUNREACH` by an unreachable route, or since nothing is forwarded; `ENETUNREACH` without a route; `EXDEV` and
        /// `EINVAL` for a source address that may not come from there.
        errno: Errno,
    },
}

/// A route that a packet meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatchedRoute {
    /// Destination; none for a default route.
    pub destination: Option<Prefix>,
    /// Routing protocol number: who made it ([`husk_overlay::marks::ROUTE_PROTOCOL`] is Husk).
    pub protocol: u8,
}

/// What the kernel knows of a neighbour's Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourStanding {
    /// Nobody asked for it yet.
    Unknown,
    /// It has one that was confirmed, is about to be, or needs no confirmation.
    Known,
    /// It was asked for, and there is no answer yet.
    Asked,
    /// It does not answer.
    Silent,
}

/// Looks up what becomes of a packet.
///
/// # Errors
/// Those of a broken exchange, and when there is no such input interface; a refusal is an answer.
pub fn of(socket: &mut Socket, packet: &Packet) -> Result<Way, Error> {
    let interfaces = underlay::interfaces(socket)?;
    let input = match &packet.input {
        None => None,
        Some(name) => Some(interfaces.iter().find(|it| it.name == *name).map(|it| it.index).ok_or_else(|| {
            Error::Refused(Refusal {
                operation: OPERATION,
                object: object(packet),
                errno: Errno::ENODEV,
                explanation: Some(format!("there is no interface {name}")),
            })
        })?),
    };
    let found = match socket.get(request(packet, input, RouteFlags::empty())) {
        Ok(RouteNetlinkMessage::NewRoute(route)) => route,
        Ok(_) => return Ok(Way::Refused { errno: Errno::ENETUNREACH }),
        Err(Error::Refused(refusal)) => return Ok(Way::Refused { errno: refusal.errno }),
        Err(error) => return Err(error),
    };
    let matched = match socket.get(request(packet, input, RouteFlags::FibMatch)) {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Some(route),
        // Some kernels know the flag for one family only; then which route it was is not told.
        Ok(_) | Err(Error::Refused(_)) => None,
        Err(error) => return Err(error),
    };
    Ok(way(packet, &found, matched.as_ref(), &interfaces))
}

const OPERATION: &str = "look up the way to";

fn object(packet: &Packet) -> String {
    let from = packet.source.map(|it| format!(" from {it}")).unwrap_or_default();
    let input = packet.input.as_ref().map(|it| format!(" iif {it}")).unwrap_or_default();
    format!("{}{from}{input}", packet.destination)
}

fn request(packet: &Packet, input: Option<u32>, flags: RouteFlags) -> Request<RouteNetlinkMessage> {
    let family = Family::of(packet.destination);
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.destination_prefix_length = family.bits();
    message.header.flags = flags;
    message.attributes.push(RouteAttribute::Destination(route_address(packet.destination)));
    if let Some(source) = packet.source {
        message.header.source_prefix_length = family.bits();
        message.attributes.push(RouteAttribute::Source(route_address(source)));
    }
    message.attributes.extend(input.map(RouteAttribute::Iif));
    Request { operation: OPERATION, object: object(packet), flags: 0, message: RouteNetlinkMessage::GetRoute(message) }
}

fn way(packet: &Packet, found: &RouteMessage, matched: Option<&RouteMessage>, interfaces: &[Interface]) -> Way {
    match found.header.kind {
        RouteType::Local => return Way::Local,
        RouteType::BlackHole => return Way::Refused { errno: Errno::EINVAL },
        RouteType::Unreachable => return Way::Refused { errno: Errno::EHOSTUNREACH },
        RouteType::Prohibit => return Way::Refused { errno: Errno::EACCES },
        _ => {}
    }
    let parts = Parts::of(&found.attributes);
    let Some(interface) = interfaces.iter().find(|it| Some(it.index) == parts.output) else {
        return Way::Refused { errno: Errno::ENETUNREACH };
    };
    let of_match = matched.map(|matched| Parts::of(&matched.attributes)).unwrap_or_default();
    let device = interface.mtu_for(Family::of(packet.destination));
    let metric = parts.mtu.or(of_match.mtu);
    let route = matched.map(|route| MatchedRoute {
        destination: of_match
            .destination
            .and_then(|it| Prefix::containing(it, route.header.destination_prefix_length).ok()),
        protocol: route.header.protocol.into(),
    });
    Way::Leaves {
        interface: interface.name.clone(),
        mtu: metric.map_or(device, |metric| metric.min(device)),
        up: interface.up,
        via: parts.via,
        source: parts.source,
        route,
    }
}

/// What the kernel knows of a neighbour.
///
/// # Errors
/// Those of a broken exchange.
pub fn neighbour(socket: &mut Socket, interface: &InterfaceName, address: IpAddr) -> Result<NeighbourStanding, Error> {
    let interfaces = underlay::interfaces(socket)?;
    let Some(index) = interfaces.iter().find(|it| it.name == *interface).map(|it| it.index) else {
        return Ok(NeighbourStanding::Unknown);
    };
    let mut message = NeighbourMessage::default();
    message.header.family = address_family(Family::of(address));
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    let request = Request {
        operation: "look up neighbour",
        object: format!("{address} dev {interface}"),
        flags: 0,
        message: RouteNetlinkMessage::GetNeighbour(message),
    };
    Ok(match socket.get(request) {
        Ok(RouteNetlinkMessage::NewNeighbour(entry)) => match entry.header.state {
            NeighbourState::Failed => NeighbourStanding::Silent,
            NeighbourState::Incomplete => NeighbourStanding::Asked,
            NeighbourState::None => NeighbourStanding::Unknown,
            _ => NeighbourStanding::Known,
        },
        Ok(_) | Err(Error::Refused(_)) => NeighbourStanding::Unknown,
        Err(error) => return Err(error),
    })
}
