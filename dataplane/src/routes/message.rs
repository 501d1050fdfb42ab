//! Routes as rtnetlink messages (rtnetlink(7), include/uapi/linux/rtnetlink.h `struct rtmsg`), both ways.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_overlay::kernel::{Route, RouteKey, RouteTarget};
use husk_overlay::marks;
use husk_overlay::prefix::{Family, Prefix};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{ActualRoute, Described, RouteChange};
use crate::error::Error;
use crate::interfaces::Interfaces;
use crate::netlink::{Request, Socket};
use crate::step::{Step, Tolerance};

/// Routes of ours.
pub(crate) fn read(socket: &mut Socket, interfaces: &Interfaces) -> Result<BTreeMap<RouteKey, ActualRoute>, Error> {
    let mut routes = BTreeMap::new();
    for family in Family::ALL {
        for message in dump(socket, family)? {
            let Some((key, route)) = parse(&message, interfaces) else { continue };
            routes
                .entry(key)
                .and_modify(|found| *found = ActualRoute::Other("several routes with one key".to_owned()))
                .or_insert(route);
        }
    }
    Ok(routes)
}

fn dump(socket: &mut Socket, family: Family) -> Result<Vec<RouteMessage>, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.protocol = OURS;
    let request = Request {
        operation: "read",
        object: format!("{family} routes"),
        flags: 0,
        message: RouteNetlinkMessage::GetRoute(message),
    };
    let routes = socket.dump_shared(request)?.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    // Kernels that cannot filter send everything; one without IPv6 answers for the families it has.
    Ok(routes
        .filter(|route| {
            route.header.protocol == OURS
                && route.header.address_family == address_family(family)
                && !route.header.flags.contains(RouteFlags::Cloned)
        })
        .collect())
}

pub(super) const OURS: RouteProtocol = RouteProtocol::Other(marks::ROUTE_PROTOCOL);

pub(crate) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::Ipv4 => AddressFamily::Inet,
        Family::Ipv6 => AddressFamily::Inet6,
    }
}

pub(crate) fn ip_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// What the attributes of a route message say, as far as Husk uses it.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    table: Option<u32>,
    pub(crate) destination: Option<IpAddr>,
    metric: u32,
    pub(crate) output: Option<u32>,
    pub(crate) via: Option<IpAddr>,
    pub(crate) source: Option<IpAddr>,
    pub(crate) mtu: Option<u32>,
    foreign: Option<&'static str>,
}

impl Parts {
    pub(crate) fn of(attributes: &[RouteAttribute]) -> Self {
        let mut parts = Self::default();
        for attribute in attributes {
            match attribute {
                RouteAttribute::Table(table) => parts.table = Some(*table),
                RouteAttribute::Destination(address) => parts.destination = ip_address(address),
                RouteAttribute::Priority(metric) => parts.metric = *metric,
                RouteAttribute::Oif(index) => parts.output = Some(*index),
                RouteAttribute::Gateway(address) => parts.via = ip_address(address),
                RouteAttribute::Via(RouteVia::Inet(address)) => parts.via = Some(IpAddr::V4(*address)),
                RouteAttribute::Via(RouteVia::Inet6(address)) => parts.via = Some(IpAddr::V6(*address)),
                RouteAttribute::PrefSource(address) => parts.source = ip_address(address),
                RouteAttribute::Metrics(metrics) => parts.mtu = mtu_of(metrics),
                RouteAttribute::MultiPath(_) => parts.foreign = Some("a multipath route"),
                RouteAttribute::NhId(_) => parts.foreign = Some("a route over a nexthop object"),
                RouteAttribute::Encap(_) => parts.foreign = Some("a route with encapsulation"),
                _ => {}
            }
        }
        parts
    }
}

/// The `mtu` metric in bytes.
pub(crate) fn mtu_of(metrics: &[RouteMetric]) -> Option<u32> {
    metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// Takes a route apart; none for one whose key has more parts than [`RouteKey`]: it gets in the way of none of ours, and could
/// not be removed by such a key.
fn parse(message: &RouteMessage, interfaces: &Interfaces) -> Option<(RouteKey, ActualRoute)> {
    let header = &message.header;
    if header.tos != 0 || header.source_prefix_length != 0 {
        return None;
    }
    let parts = Parts::of(&message.attributes);
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let key = RouteKey {
        table: parts.table.unwrap_or_else(|| u32::from(header.table)),
        destination: Prefix::containing(parts.destination.unwrap_or(any), header.destination_prefix_length).ok()?,
        metric: parts.metric,
    };
    let target = match (header.kind, parts.output) {
        _ if parts.foreign.is_some() => Err(parts.foreign.unwrap_or_default().to_owned()),
        (RouteType::Unreachable, _) => Ok(RouteTarget::Unreachable),
        (RouteType::Unicast, Some(index)) => Ok(RouteTarget::Interface {
            interface: interfaces.name(index),
            via: parts.via,
            onlink: header.flags.contains(RouteFlags::Onlink),
        }),
        (kind, _) => Err(format!("a route of type number {}", u8::from(kind))),
    };
    let route = match target {
        Ok(target) => ActualRoute::Plain(Route { target, source: parts.source, mtu: parts.mtu }),
        Err(words) => ActualRoute::Other(words),
    };
    Some((key, route))
}

/// The requests that make a change.
pub(crate) fn steps(change: &RouteChange, interfaces: &Interfaces) -> Result<Vec<Step>, Error> {
    let (operation, object) = (change.operation(), change.object());
    let set = |route: &Route, flags| {
        let message = RouteNetlinkMessage::NewRoute(message(change, route, interfaces)?);
        Ok(Step::strict(operation, object.clone(), NLM_F_CREATE | flags, message))
    };
    Ok(match change {
        RouteChange::Add { route, .. } => vec![set(route, NLM_F_EXCL)?],
        RouteChange::Replace { route, .. } => vec![set(route, NLM_F_REPLACE)?],
        RouteChange::Rebuild { key, route, .. } => vec![removal(key), set(route, NLM_F_EXCL)?],
        RouteChange::Remove { key } => vec![removal(key)],
    })
}

/// Removes by key and protocol alone, whatever the route leads to; nothing to remove is fine.
fn removal(key: &RouteKey) -> Step {
    let mut message = keyed(key);
    // Any scope and any type match (net/ipv4/fib_trie.c `fib_table_delete`); IPv6 looks at neither.
    message.header.scope = RouteScope::NoWhere;
    let request = Request {
        operation: "remove route",
        object: Described { key, route: None }.to_string(),
        flags: 0,
        message: RouteNetlinkMessage::DelRoute(message),
    };
    Step { request, tolerance: Tolerance::Absent }
}

fn message(change: &RouteChange, route: &Route, interfaces: &Interfaces) -> Result<RouteMessage, Error> {
    let key = change.key();
    let mut message = keyed(key);
    match &route.target {
        RouteTarget::Unreachable => message.header.kind = RouteType::Unreachable,
        RouteTarget::Interface { interface, via, onlink } => {
            message.header.kind = RouteType::Unicast;
            // A destination on the link itself has link scope, one behind a router any (ip-route(8)).
            if via.is_none() && key.destination.family() == Family::Ipv4 {
                message.header.scope = RouteScope::Link;
            }
            if *onlink {
                message.header.flags |= RouteFlags::Onlink;
            }
            let index = interfaces.index(interface, change.operation(), &change.object())?;
            message.attributes.push(RouteAttribute::Oif(index));
            message.attributes.extend(via.map(|via| {
                if Family::of(via) == key.destination.family() {
                    RouteAttribute::Gateway(route_address(via))
                } else {
                    RouteAttribute::Via(via.into())
                }
            }));
        }
    }
    message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(route_address(source))));
    message.attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    Ok(message)
}

fn keyed(RouteKey { table, destination, metric }: &RouteKey) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(destination.family());
    message.header.destination_prefix_length = destination.length();
    message.header.protocol = OURS;
    // RT_TABLE_UNSPEC in the header makes the attribute decide.
    message.header.table = u8::try_from(*table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RouteAttribute::Destination(route_address(destination.address())));
    message.attributes.push(RouteAttribute::Table(*table));
    if *metric != 0 {
        message.attributes.push(RouteAttribute::Priority(*metric));
    }
    message
}

pub(crate) fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}
