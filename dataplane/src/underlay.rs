//! The network that carries the tunnels, as the daemon needs to know it: interfaces, addresses, and where packets to other
//! nodes go.

mod learned;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_overlay::facts::{RouteLimit, UnderlayRoute};
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType, RouteVia};
use nix::errno::Errno;

use crate::addresses;
use crate::error::Error;
use crate::interfaces::{Interfaces, dump_links, name_of};
use crate::netlink::{Request, Socket};
use crate::routes::{address_family, ip_address, mtu_of, route_address};

pub use learned::path_mtus;

/// An interface of the host, ours or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: InterfaceName,
    /// Kind as rtnetlink names it, for example `veth`; none for physical devices and loopback.
    pub kind: Option<String>,
    /// Ethernet address, if it has one.
    pub mac: Option<MacAddress>,
    /// MTU in bytes.
    pub mtu: u32,
    /// MTU in bytes for IPv6, which a router advertisement may lower; none without IPv6.
    pub mtu_ipv6: Option<u32>,
    /// Administratively up.
    pub up: bool,
    /// The loopback device.
    pub loopback: bool,
}

impl Interface {
    /// True for a tunnel device or the host end of a pod's veth pair.
    #[must_use]
    pub fn is_husk(&self) -> bool {
        marks::is_tunnel_interface(self.name.as_str()) || marks::is_pod_interface(self.name.as_str())
    }

    /// MTU in bytes for packets of a family.
    #[must_use]
    pub fn mtu_for(&self, family: Family) -> u32 {
        match family {
            Family::Ipv4 => self.mtu,
            Family::Ipv6 => self.mtu_ipv6.map_or(self.mtu, |mtu| mtu.min(self.mtu)),
        }
    }
}

/// An address of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostAddress {
    /// Interface that carries it.
    pub interface: InterfaceName,
    /// The address.
    pub address: IpAddr,
    /// Prefix length in bits.
    pub length: u8,
    /// It may serve as the node's address: not link-local or loopback, and neither tentative, a duplicate, deprecated nor
    /// temporary (RFC 4862, RFC 8981), which will be gone while peers still send to it.
    pub lasting: bool,
}

/// How packets that nothing more specific claims leave the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Outgoing interface.
    pub interface: InterfaceName,
    /// Source address that the kernel would choose.
    pub source: IpAddr,
}

/// All interfaces, by index.
///
/// # Errors
/// Those of a dump.
pub fn interfaces(socket: &mut Socket) -> Result<Vec<Interface>, Error> {
    let mut all: Vec<_> = dump_links(socket)?.iter().filter_map(interface).collect();
    all.sort_by_key(|interface| interface.index);
    Ok(all)
}

fn interface(message: &LinkMessage) -> Option<Interface> {
    let mut found = Interface {
        index: message.header.index,
        name: InterfaceName::new(name_of(message)?).ok()?,
        kind: None,
        mac: None,
        mtu: 0,
        mtu_ipv6: None,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Address(bytes) => {
                found.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress);
            }
            LinkAttribute::LinkInfo(infos) => {
                found.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(InfoKind::to_string(kind)),
                    _ => None,
                });
            }
            LinkAttribute::AfSpecUnspec(families) => found.mtu_ipv6 = mtu_ipv6(families),
            _ => {}
        }
    }
    Some(found)
}

fn mtu_ipv6(families: &[AfSpecUnspec]) -> Option<u32> {
    families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(attributes) => attributes.iter().find_map(|attribute| match attribute {
            AfSpecInet6::DevConf(configuration) => u32::try_from(configuration.mtu6).ok(),
            _ => None,
        }),
        _ => None,
    })
}

/// All addresses, sorted by interface and address.
///
/// # Errors
/// Those of a dump.
pub fn addresses(socket: &mut Socket) -> Result<Vec<HostAddress>, Error> {
    let names = Interfaces::of(&dump_links(socket)?);
    let mut all: Vec<_> = addresses::dump(socket)?.iter().filter_map(|message| host_address(message, &names)).collect();
    all.sort();
    Ok(all)
}

fn host_address(message: &AddressMessage, names: &Interfaces) -> Option<HostAddress> {
    let address = addresses::local_address(message)?;
    let wide = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = wide.unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()));
    let mut passing = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    if address.is_ipv6() {
        // The same bit means "secondary" for IPv4 and "temporary" for IPv6 (include/uapi/linux/if_addr.h).
        passing |= AddressFlags::from_bits_retain(AddressHeaderFlags::Secondary.bits().into());
    }
    let local = match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    };
    Some(HostAddress {
        interface: names.name(message.header.index),
        address,
        length: message.header.prefix_len,
        lasting: !local && !flags.intersects(passing),
    })
}

/// How a packet to somewhere on the Internet would leave; none without such a route.
///
/// # Errors
/// Those of a dump and of a broken exchange.
pub fn default_route(socket: &mut Socket, family: Family) -> Result<Option<DefaultRoute>, Error> {
    // Addresses for documentation (RFC 5737, RFC 3849): nobody routes them specially, and a look-up sends nothing.
    let somewhere = match family {
        Family::Ipv4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    };
    let names = Interfaces::of(&dump_links(socket)?);
    let route = match socket.get(lookup(None, somewhere, RouteFlags::empty())) {
        Ok(RouteNetlinkMessage::NewRoute(route)) if route.header.kind == RouteType::Unicast => route,
        Err(error) if !is_no_route(&error) => return Err(error),
        Ok(_) | Err(_) => return Ok(None),
    };
    let (mut output, mut source) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::PrefSource(address) => source = ip_address(address),
            _ => {}
        }
    }
    Ok(output.zip(source).map(|(index, source)| DefaultRoute { interface: names.name(index), source }))
}

/// Routes to many destinations, looked up in as few messages as possible; a destination without a route is absent.
///
/// The routes themselves are asked for (`RTM_F_FIB_MATCH`), not what the kernel makes of them for one packet: the latter
/// includes path MTUs learned from ICMP errors, which anyone on the path can send and which expire ([`path_mtus`]).
///
/// `sources` are the own addresses that packets to these destinations have, where that is known: rules may send them another
/// way than the others (`ip rule add from`).
///
/// # Errors
/// Those of a dump and of a broken exchange.
pub fn routes(
    socket: &mut Socket,
    sources: DualStack,
    destinations: impl IntoIterator<Item = IpAddr>,
) -> Result<BTreeMap<IpAddr, UnderlayRoute>, Error> {
    let interfaces: BTreeMap<u32, Interface> =
        interfaces(socket)?.into_iter().map(|interface| (interface.index, interface)).collect();
    let destinations: Vec<IpAddr> = destinations.into_iter().collect();
    let from = |address: &IpAddr| sources.get(Family::of(*address));
    let requests = destinations.iter().map(|address| lookup(from(address), *address, RouteFlags::FibMatch)).collect();
    let mut found = BTreeMap::new();
    for (destination, result) in destinations.into_iter().zip(socket.get_batch(requests)) {
        match result {
            Ok(RouteNetlinkMessage::NewRoute(route)) => {
                if let Some(route) = underlay_route(destination, &route, &interfaces) {
                    found.insert(destination, route);
                }
            }
            Err(error) if !is_no_route(&error) => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(found)
}

fn lookup(source: Option<IpAddr>, destination: IpAddr, flags: RouteFlags) -> Request<RouteNetlinkMessage> {
    let family = Family::of(destination);
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.destination_prefix_length = family.bits();
    message.header.flags = flags;
    message.attributes.push(RouteAttribute::Destination(route_address(destination)));
    if let Some(source) = source {
        message.header.source_prefix_length = family.bits();
        message.attributes.push(RouteAttribute::Source(route_address(source)));
    }
    Request {
        operation: "look up route to",
        object: destination.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::GetRoute(message),
    }
}

fn underlay_route(
    destination: IpAddr,
    route: &RouteMessage,
    interfaces: &BTreeMap<u32, Interface>,
) -> Option<UnderlayRoute> {
    if !matches!(route.header.kind, RouteType::Unicast | RouteType::Local) {
        return None;
    }
    let (mut hops, mut gateway, mut metric) = (Vec::new(), false, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hops.push(*index),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(RouteVia::Inet(_) | RouteVia::Inet6(_)) => gateway = true,
            RouteAttribute::Metrics(metrics) => metric = mtu_of(metrics),
            // Which of them a flow takes is decided by a hash.
            RouteAttribute::MultiPath(several) => {
                let via = |it: &RouteAttribute| matches!(it, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
                gateway = gateway || several.iter().any(|hop| hop.attributes.iter().any(via));
                hops.extend(several.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let mtu_by = |interface: &&Interface| interface.mtu_for(Family::of(destination));
    let interface = hops.iter().filter_map(|index| interfaces.get(index)).min_by_key(mtu_by)?;
    let mtu = mtu_by(&interface);
    let attribute = metric.filter(|metric| *metric < mtu);
    Some(UnderlayRoute {
        interface: interface.name.clone(),
        mtu: attribute.unwrap_or(mtu),
        limited_by: attribute.map_or(RouteLimit::Interface, |_| RouteLimit::Attribute),
        on_link: !gateway,
    })
}

/// What the kernel says for a destination that no route leads to, or one that refuses.
fn is_no_route(error: &Error) -> bool {
    matches!(
        error.errno(),
        Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL | Errno::EAGAIN)
    )
}
