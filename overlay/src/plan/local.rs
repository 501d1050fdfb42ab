//! What a node holds whatever the mode: forwarding, the floor of `unreachable` routes, routes to its own pods.

use std::net::IpAddr;

use super::firewall::port_mappings::loopback_parameter;
use super::{Context, LAST_METRIC, MAIN_TABLE};
use crate::endpoint::{Endpoint, Endpoints};
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{Address, Desired, NeighbourKey, Route, RouteKey, RouteTarget};
use crate::mtu::MINIMUM_IPV6;
use crate::name::InterfaceName;
use crate::prefix::{Family, Prefix};

/// Metric of ordinary routes: the kernel shows an IPv6 route without one as 1024 (`IP6_RT_PRIO_USER`).
pub(super) fn metric(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 0,
        Family::Ipv6 => 1024,
    }
}

pub(super) fn route_key(destination: Prefix) -> RouteKey {
    RouteKey { table: MAIN_TABLE, destination, metric: metric(destination.family()) }
}

pub(super) fn render(context: &Context<'_>, endpoints: &Endpoints, desired: &mut Desired, issues: &mut Vec<Issue>) {
    sysctls(context, desired);
    desired.known_pods.clone_from(&context.facts.pod_interfaces);
    desired.own_blocks.clone_from(&context.own_blocks);
    for cidr in &context.config.cluster_cidrs {
        // A missing peer, block or tunnel must never fall through to the default route.
        let key = RouteKey { table: MAIN_TABLE, destination: *cidr, metric: LAST_METRIC };
        desired.routes.insert(key, Route { target: RouteTarget::Unreachable, source: None, mtu: None });
    }
    let mut sorted: Vec<&Endpoint> = endpoints.values().collect();
    sorted.sort_by(|a, b| a.id.cmp(&b.id));
    for endpoint in sorted {
        wire(context, endpoint, desired, issues);
    }
}

fn sysctls(context: &Context<'_>, desired: &mut Desired) {
    let mut set = |path: String, value: &str| desired.sysctls.insert(path, value.to_owned());
    set("net/ipv4/ip_forward".into(), "1");
    if context.facts.ipv6 && context.families().any(|family| family == Family::Ipv6) {
        set("net/ipv6/conf/all/forwarding".into(), "1");
        for interface in &context.facts.router_advertisements {
            // A forwarding host ignores router advertisements unless told otherwise, and would lose its default route.
            set(format!("net/ipv6/conf/{interface}/accept_ra"), "2");
        }
    }
}

/// The routes and neighbours the plugin made for a pod, so that they come back when somebody removes them.
fn wire(context: &Context<'_>, endpoint: &Endpoint, desired: &mut Desired, issues: &mut Vec<Issue>) {
    if !context.facts.pod_interfaces.contains_key(&endpoint.host_interface) {
        return;
    }
    if let Some(parameter) = loopback_parameter(endpoint) {
        desired.sysctls.insert(parameter, "1".to_owned());
    }
    for address in endpoint.addresses.iter() {
        let key = route_key(Prefix::host(address));
        let clash = desired.routes.contains_key(&key);
        if clash || context.router.iter().any(|own| own == address) {
            issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::BadLease,
                subject: endpoint.display_name(),
                message: format!("its address {address} is held by another pod or by the node itself"),
                remedy: "delete the pod, its replacement gets another address".into(),
            });
            continue;
        }
        if !context.own_blocks.iter().any(|block| block.contains(address)) {
            issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::BadLease,
                subject: endpoint.display_name(),
                message: format!("its address {address} is in no block of this node, other nodes cannot reach it"),
                remedy: "delete the pod, its replacement gets another address".into(),
            });
        }
        let interface = endpoint.host_interface.clone();
        let target = RouteTarget::Interface { interface: interface.clone(), via: None, onlink: false };
        desired.routes.insert(key, Route { target, source: None, mtu: None });
        desired.neighbours.insert(NeighbourKey { interface, address }, endpoint.pod_mac);
    }
}

/// True if the route to an address leads to the endpoint.
pub(super) fn leads_to(desired: &Desired, address: IpAddr, endpoint: &Endpoint) -> bool {
    desired.routes.get(&route_key(Prefix::host(address))).is_some_and(|route| match &route.target {
        RouteTarget::Interface { interface, .. } => *interface == endpoint.host_interface,
        RouteTarget::Unreachable => false,
    })
}

/// Puts the node's own overlay addresses on its tunnel device. One whose MTU is too small for IPv6 has none of it, its parameters
/// included, until it grows (net/ipv6/addrconf.c `addrconf_notify`).
pub(super) fn router_on(context: &Context<'_>, interface: &InterfaceName, desired: &mut Desired) {
    let has_ipv6 = context.inner_mtu.is_some_and(|mtu| mtu >= MINIMUM_IPV6);
    if context.router.ipv6.is_some() && context.facts.ipv6 && has_ipv6 {
        // Hosts whose `default/disable_ipv6` is 1 give new devices no IPv6.
        desired.sysctls.insert(format!("net/ipv6/conf/{interface}/disable_ipv6"), "0".to_owned());
    }
    for address in context.router.iter().filter(|address| address.is_ipv4() || has_ipv6) {
        let length = Family::of(address).bits();
        desired.addresses.insert(Address { interface: interface.clone(), address, length });
    }
}
