//! Routes of others that share addresses with a prefix, and whether their table is asked before the main one.

use std::collections::BTreeMap;

use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::message::{OURS, address_family, ip_address};
use crate::error::Error;
use crate::interfaces::{Interfaces, dump_links};
use crate::netlink::{Request, Socket};

/// The main table (`RT_TABLE_MAIN`, include/uapi/linux/rtnetlink.h).
pub const MAIN_TABLE: u32 = 254;

/// The table of own addresses (`RT_TABLE_LOCAL`).
pub const LOCAL_TABLE: u32 = 255;

/// A route that is not Husk's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRoute {
    /// Table it is in.
    pub table: u32,
    /// Where to.
    pub destination: Prefix,
    /// What becomes of packets, as `ip route` names it: `unicast`, `blackhole`, `local`...
    pub kind: &'static str,
    /// Interface it leads to; none for those that lead nowhere, or several ways.
    pub interface: Option<InterfaceName>,
}

/// Routes of others that share addresses with one of these prefixes, except default routes, broadcast and multicast, and what
/// leads to devices of Husk's.
///
/// # Errors
/// Those of a dump.
pub fn overlapping(socket: &mut Socket, prefixes: &[Prefix]) -> Result<Vec<ForeignRoute>, Error> {
    let names = Interfaces::of(&dump_links(socket)?);
    let mut found = Vec::new();
    for family in Family::ALL.into_iter().filter(|family| prefixes.iter().any(|prefix| prefix.family() == *family)) {
        let mut message = RouteMessage::default();
        message.header.address_family = address_family(family);
        let request = Request {
            operation: "read",
            object: format!("{family} routes"),
            flags: 0,
            message: RouteNetlinkMessage::GetRoute(message),
        };
        for message in socket.dump_shared(request)? {
            let RouteNetlinkMessage::NewRoute(route) = message else { continue };
            found.extend(foreign(&route, &names).filter(|route| overlaps(route, prefixes)));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn overlaps(route: &ForeignRoute, prefixes: &[Prefix]) -> bool {
    prefixes.iter().any(|prefix| prefix.family() == route.destination.family() && prefix.overlaps(&route.destination))
}

fn foreign(message: &RouteMessage, names: &Interfaces) -> Option<ForeignRoute> {
    let header = &message.header;
    let kind = match header.kind {
        RouteType::Unicast => "unicast",
        RouteType::Local => "local",
        RouteType::BlackHole => "blackhole",
        RouteType::Unreachable => "unreachable",
        RouteType::Prohibit => "prohibit",
        _ => return None,
    };
    let is_ours = header.protocol == OURS || header.flags.contains(RouteFlags::Cloned);
    if is_ours || header.destination_prefix_length == 0 {
        return None;
    }
    let (mut table, mut destination, mut output) = (u32::from(header.table), None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(wide) => table = *wide,
            RouteAttribute::Destination(address) => destination = ip_address(address),
            RouteAttribute::Oif(index) => output = Some(*index),
            _ => {}
        }
    }
    let interface = output.map(|index| names.name(index));
    let husk =
        |name: &InterfaceName| marks::is_tunnel_interface(name.as_str()) || marks::is_pod_interface(name.as_str());
    if interface.as_ref().is_some_and(husk) {
        return None;
    }
    let destination = Prefix::containing(destination?, header.destination_prefix_length).ok()?;
    Some(ForeignRoute { table, destination, kind, interface })
}

/// Tables that rules have asked before the main one, with the priority of the first such rule.
///
/// # Errors
/// Those of a dump.
pub fn tables_before_main(socket: &mut Socket, family: Family) -> Result<BTreeMap<u32, u32>, Error> {
    let mut message = RuleMessage::default();
    message.header.family = match family {
        Family::Ipv4 => AddressFamily::Inet,
        Family::Ipv6 => AddressFamily::Inet6,
    };
    let request = Request {
        operation: "read",
        object: format!("{family} rules"),
        flags: 0,
        message: RouteNetlinkMessage::GetRule(message),
    };
    let mut tables: BTreeMap<u32, u32> = BTreeMap::new();
    for message in socket.dump_shared(request)? {
        let RouteNetlinkMessage::NewRule(rule) = message else { continue };
        if rule.header.action != RuleAction::ToTable {
            continue;
        }
        let (mut table, mut priority) = (u32::from(rule.header.table), 0);
        for attribute in &rule.attributes {
            match attribute {
                RuleAttribute::Table(wide) => table = *wide,
                RuleAttribute::Priority(number) => priority = *number,
                _ => {}
            }
        }
        // A rule that asks the main table for all but its default route, as VPNs have, finds our routes too.
        tables.entry(table).and_modify(|first| *first = (*first).min(priority)).or_insert(priority);
    }
    let main = tables.get(&MAIN_TABLE).copied().unwrap_or(u32::MAX);
    tables.retain(|table, priority| *priority < main && *table != LOCAL_TABLE);
    Ok(tables)
}
