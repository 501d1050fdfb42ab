//! The rtnetlink requests of pod wiring (rtnetlink(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};

use husk_overlay::mac::MacAddress;
use husk_overlay::marks::{POD_GATEWAY_V4, POD_GATEWAY_V6, ROUTE_PROTOCOL};
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::PodSpec;
use crate::netlink::Request;
use crate::netns::Netns;

/// Priority of IPv6 routes: the kernel's default, which it also substitutes for 0 (`IP6_RT_PRIO_USER` in
/// include/net/ip6_route.h), so that the daemon finds the value it wants.
pub(super) const IPV6_ROUTE_METRIC: u32 = 1024;

/// The gateway of every pod.
pub(super) fn gateway(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => POD_GATEWAY_V4.into(),
        Family::Ipv6 => POD_GATEWAY_V6.into(),
    }
}

/// Creates both ends, the pod's in its namespace. They are down.
pub(super) fn create_pair(spec: &PodSpec, netns: &Netns) -> Request<RouteNetlinkMessage> {
    let mut peer = named(&spec.pod_interface);
    peer.attributes.extend([
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.pod_mac.0.to_vec()),
        LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
    ]);
    let mut host = named(&spec.host_interface);
    host.attributes.extend([
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.host_mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ]);
    Request {
        operation: "create",
        object: format!("{} with its peer {} in {}", spec.host_interface, spec.pod_interface, netns.path()),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewLink(host),
    }
}

/// Deletes an interface by name.
pub(super) fn delete(interface: &InterfaceName) -> Request<RouteNetlinkMessage> {
    Request {
        operation: "delete",
        object: interface.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::DelLink(named(interface)),
    }
}

/// Deletes an interface by index, whatever it is called by now; the name is for people.
pub(super) fn delete_index(index: u32, interface: &InterfaceName) -> Request<RouteNetlinkMessage> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    Request {
        operation: "delete",
        object: interface.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::DelLink(link),
    }
}

/// Asks for an interface by name.
pub(super) fn get(interface: &InterfaceName) -> Request<RouteNetlinkMessage> {
    Request {
        operation: "find",
        object: interface.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::GetLink(named(interface)),
    }
}

/// Sets an interface up, and its alias if there is one.
pub(super) fn set_up(index: u32, interface: &InterfaceName, alias: Option<String>) -> Request<RouteNetlinkMessage> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.extend(alias.map(LinkAttribute::IfAlias));
    Request {
        operation: "set up",
        object: interface.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::SetLink(link),
    }
}

/// Sets an interface's MTU.
pub(super) fn set_mtu(index: u32, interface: &InterfaceName, mtu: u32) -> Request<RouteNetlinkMessage> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes.push(LinkAttribute::Mtu(mtu));
    Request {
        operation: "set the MTU of",
        object: format!("{interface} to {mtu}"),
        flags: 0,
        message: RouteNetlinkMessage::SetLink(link),
    }
}

/// Adds a pod's address, without duplicate address detection.
pub(super) fn add_address(index: u32, interface: &InterfaceName, address: IpAddr) -> Request<RouteNetlinkMessage> {
    let (family, length) = (Family::of(address), Family::of(address).bits());
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family: kernel_family(family),
        prefix_len: length,
        flags: AddressHeaderFlags::empty(),
        scope: AddressScope::Universe,
        index,
    };
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    if family == Family::Ipv6 {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request {
        operation: "add address",
        object: format!("{address}/{length} dev {interface}"),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewAddress(message),
    }
}

/// Adds a permanent neighbour.
pub(super) fn add_neighbour(
    index: u32,
    interface: &InterfaceName,
    address: IpAddr,
    mac: MacAddress,
) -> Request<RouteNetlinkMessage> {
    let mut message = NeighbourMessage::default();
    message.header.family = kernel_family(Family::of(address));
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match address {
            IpAddr::V4(it) => NeighbourAddress::Inet(it),
            IpAddr::V6(it) => NeighbourAddress::Inet6(it),
        }),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        // The news that it is gone name no state that tells it from a learned one: this does (see `events`).
        NeighbourAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    Request {
        operation: "add neighbour",
        object: format!("{address} lladdr {mac} dev {interface}"),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewNeighbour(message),
    }
}

/// Adds the pod's default route.
pub(super) fn add_default_route(
    index: u32,
    interface: &InterfaceName,
    gateway: IpAddr,
) -> Request<RouteNetlinkMessage> {
    let any: IpAddr = match gateway {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut message = route(index, any, 0);
    message.header.flags = RouteFlags::Onlink;
    message.attributes.push(RouteAttribute::Gateway(route_address(gateway)));
    Request {
        operation: "add route",
        object: format!("default via {gateway} dev {interface}"),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewRoute(message),
    }
}

/// Adds the host's route to a pod.
pub(super) fn add_host_route(index: u32, interface: &InterfaceName, address: IpAddr) -> Request<RouteNetlinkMessage> {
    let length = Family::of(address).bits();
    let mut message = route(index, address, length);
    message.attributes.push(RouteAttribute::Destination(route_address(address)));
    if address.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    Request {
        operation: "add route",
        object: format!("{address}/{length} dev {interface}"),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewRoute(message),
    }
}

/// Asks where a packet to an address would go.
pub(super) fn look_up(address: IpAddr) -> Request<RouteNetlinkMessage> {
    let family = Family::of(address);
    let mut message = RouteMessage::default();
    message.header.address_family = kernel_family(family);
    message.header.destination_prefix_length = family.bits();
    message.attributes.push(RouteAttribute::Destination(route_address(address)));
    Request {
        operation: "look up route to",
        object: address.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::GetRoute(message),
    }
}

fn route(index: u32, destination: IpAddr, length: u8) -> RouteMessage {
    let family = Family::of(destination);
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: kernel_family(family),
        destination_prefix_length: length,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::from(ROUTE_PROTOCOL),
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Oif(index)];
    if family == Family::Ipv6 {
        message.attributes.push(RouteAttribute::Priority(IPV6_ROUTE_METRIC));
    }
    message
}

fn named(interface: &InterfaceName) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(interface.to_string()));
    link
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(it) => RouteAddress::Inet(it),
        IpAddr::V6(it) => RouteAddress::Inet6(it),
    }
}

pub(super) fn kernel_family(family: Family) -> AddressFamily {
    match family {
        Family::Ipv4 => AddressFamily::Inet,
        Family::Ipv6 => AddressFamily::Inet6,
    }
}
