//! What a pod's kernel remembers of paths.
//!
//! A packet that is larger than the route to another node takes is sent back by the host with what the route takes, and the pod's
//! kernel keeps that for ten minutes (`net.ipv4.route.mtu_expires`, also in IPv6) as an exception of its default route. When the
//! host's route takes more again, the exception is wrong, and nothing tells the pod so: it goes on sending less than it could. Its
//! exceptions are therefore dropped; the first packet that really is too large brings back the one that still holds.
//!
//! IPv4 has a switch for that (`ipv4_sysctl_rtcache_flush`, net/ipv4/route.c). The one of IPv6 drops what has expired and no more
//! (`rt6_age_examine_exception`, net/ipv6/route.c), but exceptions go with the route that they hang on: it is replaced by itself, in
//! one step, so that there is no moment without. A route of IPv4 shares what is equal with the one that it replaces, exceptions
//! included, so that this does not help there.

use std::net::IpAddr;

use husk_overlay::marks::{POD_GATEWAY_V6, ROUTE_PROTOCOL};
use husk_overlay::prefix::Family;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol};

use super::find::index_of;
use super::{PodSpec, request};
use crate::error::Error;
use crate::netlink::{Protocol, Request, Socket};
use crate::netns::Netns;
use crate::routes::ip_address;
use crate::sysctl;

/// The kernel's switch: what is written to it does not matter.
const FLUSH_IPV4: &str = "net/ipv4/route/flush";

/// Has a pod's kernel forget what it was told of paths. No packet is lost.
///
/// # Errors
/// Those of the namespace, of netlink and of kernel parameters.
pub fn forget_paths(spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    netns.run_in(|| {
        if spec.addresses.ipv4.is_some() {
            sysctl::write(FLUSH_IPV4, "1")?;
        }
        if spec.addresses.ipv6.is_some() { renew_default_route(spec) } else { Ok(()) }
    })?
}

/// Replaces the pod's IPv6 default route by itself.
fn renew_default_route(spec: &PodSpec) -> Result<(), Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    let index = index_of(&mut socket, &spec.pod_interface)?;
    let mut all = RouteMessage::default();
    all.header.address_family = request::kernel_family(Family::Ipv6);
    let routes = socket.dump_shared(Request {
        operation: "list",
        object: "routes".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetRoute(all),
    })?;
    let defaults: Vec<RouteMessage> = routes.into_iter().filter_map(default_route).collect();
    let ours = defaults.iter().filter(|route| is_ours(route, index));
    // Of several with one priority in one table, the kernel replaces the first: it may be another network's.
    let alone = |route: &&RouteMessage| defaults.iter().filter(|other| place(other) == place(route)).count() == 1;
    let requests = ours.filter(alone).map(|route| {
        let mut route = route.clone();
        // What the kernel says of the old one's age.
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
        route.header.flags = RouteFlags::Onlink;
        Request {
            operation: "renew route",
            object: format!("default via {POD_GATEWAY_V6} dev {}", spec.pod_interface),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            message: RouteNetlinkMessage::NewRoute(route),
        }
    });
    let requests = requests.collect();
    socket.batch(requests).into_iter().collect()
}

fn default_route(message: RouteNetlinkMessage) -> Option<RouteMessage> {
    let RouteNetlinkMessage::NewRoute(route) = message else { return None };
    let is_default = route.header.destination_prefix_length == 0
        && route.header.source_prefix_length == 0
        && !route.header.flags.contains(RouteFlags::Cloned)
        && route.header.address_family == request::kernel_family(Family::Ipv6);
    is_default.then_some(route)
}

/// A route as pods are given it, in whatever table.
fn is_ours(route: &RouteMessage, index: u32) -> bool {
    let gateway = IpAddr::from(POD_GATEWAY_V6);
    let leads_here = route.attributes.iter().any(|it| matches!(it, RouteAttribute::Oif(oif) if *oif == index));
    let by_gateway = route
        .attributes
        .iter()
        .any(|it| matches!(it, RouteAttribute::Gateway(address) if ip_address(address) == Some(gateway)));
    route.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL) && leads_here && by_gateway
}

/// Table and priority.
fn place(route: &RouteMessage) -> (u32, u32) {
    let (mut table, mut priority) = (u32::from(route.header.table), 0);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => priority = *number,
            _ => {}
        }
    }
    (table, priority)
}
