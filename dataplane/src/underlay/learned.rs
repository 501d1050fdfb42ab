//! Path MTUs that the kernel has learned from packet-too-big.
//!
//! The kernel keeps them as exceptions of the route, each for ten minutes (`net.ipv4.route.mtu_expires`), and says nothing when
//! it learns one. It holds what it sends itself to them, tunnel packets too; not what it forwards, since it trusts no router's
//! word for others (`ip_dst_mtu_maybe_forward`, include/net/ip.h). A pod's packet is therefore told its size by the MTU of the
//! route into the tunnel alone, and that has to follow.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::prefix::Family;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage};

use crate::error::Error;
use crate::netlink::{Request, Socket};
use crate::routes::{address_family, ip_address, mtu_of};

/// What the kernel has learned in bytes of the paths to addresses of a family. It is believed whatever it says: anybody can send
/// such an error, and the caller has to know what is too little to be true.
///
/// # Errors
/// Those of a dump.
pub fn path_mtus(socket: &mut Socket, family: Family) -> Result<BTreeMap<IpAddr, u32>, Error> {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    // Exceptions only, not the routes themselves (`ip_valid_fib_dump_req`, net/ipv4/fib_frontend.c).
    message.header.flags = RouteFlags::Cloned;
    let request = Request {
        operation: "read",
        object: format!("{family} path MTUs"),
        flags: 0,
        message: RouteNetlinkMessage::GetRoute(message),
    };
    let mut learned = BTreeMap::new();
    for message in socket.dump_shared(request)? {
        let RouteNetlinkMessage::NewRoute(route) = message else { continue };
        // Kernels that cannot filter send everything, and one without IPv6 answers for the families it has.
        if route.header.flags.contains(RouteFlags::Cloned)
            && route.header.address_family == address_family(family)
            && let Some((address, mtu)) = exception(&route)
        {
            learned.entry(address).and_modify(|known: &mut u32| *known = mtu.min(*known)).or_insert(mtu);
        }
    }
    Ok(learned)
}

fn exception(route: &RouteMessage) -> Option<(IpAddr, u32)> {
    let (mut destination, mut mtu) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_address(address),
            RouteAttribute::Metrics(metrics) => mtu = mtu_of(metrics),
            _ => {}
        }
    }
    destination.zip(mtu)
}
