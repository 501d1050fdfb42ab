//! Whether the addresses of pods are free: a network, a VPN or a left-over route of somebody else with the same addresses takes
//! packets away from the overlay, or is cut off by it.

use std::collections::BTreeMap;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::routes::foreign::{ForeignRoute, LOCAL_TABLE, MAIN_TABLE, overlapping, tables_before_main};
use husk_overlay::prefix::{Family, Prefix};

use super::issues::{self, Teller};
use super::words::MOST_FINDINGS;
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome};

/// The check.
pub(super) const CHECK: Check =
    Check { id: "address-overlap", title: "nobody else on this host uses addresses of the cluster CIDRs", look };

/// Tables that rules ask before the main one, with the rule's priority, by family.
type Before = BTreeMap<Family, BTreeMap<u32, u32>>;

fn look(evidence: &Evidence) -> Looked {
    let cidrs = &evidence.config()?.cluster_cidrs;
    let mut socket = Socket::open(Protocol::Route)?;
    let routes = overlapping(&mut socket, cidrs)?;
    let mut before = Before::new();
    for family in cidrs.iter().map(Prefix::family) {
        before.insert(family, tables_before_main(&mut socket, family)?);
    }
    let mut findings = judge(&routes, cidrs, &before);
    // Own networks are told above, with the route and its device; peers' are not.
    if let Ok(issues) = issues::findings(evidence, Teller::Overlap) {
        let is_told = |finding: &Finding| {
            findings.iter().any(|it| it.evidence.iter().any(|line| finding.cause.contains(destination_of(line))))
        };
        let untold: Vec<Finding> = issues.into_iter().filter(|finding| !is_told(finding)).collect();
        findings.extend(untold);
    }
    let told: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
    Ok(Outcome::of(findings, format!("no other route to {}", told.join(" or "))))
}

/// The destination in a line of `ip route`.
fn destination_of(line: &str) -> &str {
    line.split_whitespace().find(|word| word.contains('/')).unwrap_or("\0")
}

fn judge(routes: &[ForeignRoute], cidrs: &[Prefix], before: &Before) -> Vec<Finding> {
    routes.iter().filter_map(|route| finding(route, cidrs, before)).take(MOST_FINDINGS).collect()
}

fn finding(route: &ForeignRoute, cidrs: &[Prefix], before: &Before) -> Option<Finding> {
    let destination = route.destination;
    let family = destination.family();
    let cidr = cidrs.iter().find(|cidr| cidr.family() == family && cidr.overlaps(&destination))?;
    let by = route.interface.as_ref().map_or_else(|| format!("a {} route", route.kind), ToString::to_string);
    let evidence = vec![described(route)];
    let inside = cidr.covers(&destination);
    let rule = before.get(&family).and_then(|tables| tables.get(&route.table));
    match (route.table, rule) {
        (LOCAL_TABLE, _) if inside && route.kind == "local" => Some(Finding::error(
            format!(
                "this host itself has the address {destination} on {by}, which is one of the cluster CIDR {cidr}: no \
                 pod with it can be reached from here"
            ),
            evidence,
            Fix::by_hand(
                "give the interface another address, or choose clusterCIDRs that no network around the hosts uses",
                remove_address(route),
                "somebody gave the host this address",
            ),
        )),
        (LOCAL_TABLE, _) => None,
        (MAIN_TABLE, _) if inside => Some(Finding::error(
            format!(
                "{destination} is part of the cluster CIDR {cidr}, and leads to {by}: packets for pods there leave \
                 the overlay, or are lost"
            ),
            evidence,
            removal(route),
        )),
        (MAIN_TABLE, _) => Some(Finding::warning(
            format!(
                "{by} leads to {destination}, and the cluster CIDR {cidr} is part of that: whoever has such an \
                 address behind it cannot be reached from this host"
            ),
            evidence,
            removal(route),
        )),
        (table, Some(priority)) => Some(Finding::error(
            format!(
                "the table {table} is asked before Husk's routes and leads {destination} to {by}: packets for pods \
                 of {cidr} go there"
            ),
            [evidence, vec![format!("ip rule: {priority}: ... lookup {table}")]].concat(),
            removal(route),
        )),
        // Nobody asks it.
        (_, None) => None,
    }
}

fn removal(route: &ForeignRoute) -> Fix {
    let words = "if it is a left-over, remove it; if it is a network in use (a VPN, a cloud's subnet), choose \
                 clusterCIDRs that it does \
                 not contain, the same on all nodes";
    let mut arguments: Vec<String> = family_option(route.destination);
    arguments.extend(["route".into(), "del".into()]);
    if route.kind != "unicast" {
        arguments.push(route.kind.into());
    }
    arguments.push(route.destination.to_string());
    if let Some(interface) = &route.interface {
        arguments.extend(["dev".into(), interface.to_string()]);
    }
    if route.table != MAIN_TABLE {
        arguments.extend(["table".into(), route.table.to_string()]);
    }
    Fix::by_hand(words, [Action::run("ip", arguments)], "somebody made the route, and may need it")
}

fn remove_address(route: &ForeignRoute) -> Option<Action> {
    let interface = route.interface.as_ref()?.to_string();
    let mut arguments = family_option(route.destination);
    arguments.extend(["addr".into(), "del".into(), route.destination.to_string(), "dev".into(), interface]);
    Some(Action::run("ip", arguments))
}

fn family_option(prefix: Prefix) -> Vec<String> {
    if prefix.family() == Family::Ipv6 { vec!["-6".into()] } else { Vec::new() }
}

/// As `ip route show` has it.
fn described(route: &ForeignRoute) -> String {
    let mut text = String::from("ip route: ");
    if route.kind != "unicast" {
        text.push_str(route.kind);
        text.push(' ');
    }
    text += &route.destination.to_string();
    if let Some(interface) = &route.interface {
        text += &format!(" dev {interface}");
    }
    if route.table != MAIN_TABLE {
        text +=
            &format!(" table {}", if route.table == LOCAL_TABLE { "local".into() } else { route.table.to_string() });
    }
    text
}

#[cfg(test)]
mod tests {
    use husk_overlay::issue::Severity;
    use husk_overlay::name::InterfaceName;

    use super::*;

    fn route(table: u32, destination: &str, interface: &str) -> ForeignRoute {
        let interface = (!interface.is_empty()).then(|| InterfaceName::new(interface).unwrap());
        let kind = if interface.is_some() { "unicast" } else { "blackhole" };
        ForeignRoute { table, destination: destination.parse().unwrap(), kind, interface }
    }

    fn judged(route: &ForeignRoute, before: &Before) -> Option<Finding> {
        let cidrs = ["10.42.0.0/16", "fd42::/48"].map(|cidr| cidr.parse().unwrap());
        judge(std::slice::from_ref(route), &cidrs, before).pop()
    }

    #[test]
    fn the_device_and_the_prefix_are_named_and_the_command_is_exact() {
        let none = Before::new();
        let inside = judged(&route(MAIN_TABLE, "10.42.128.0/20", "tun0"), &none).unwrap();
        assert_eq!(inside.severity, Severity::Error);
        assert!(inside.cause.contains("10.42.128.0/20") && inside.cause.contains("tun0"), "{}", inside.cause);
        assert_eq!(inside.fix.commands, ["ip route del 10.42.128.0/20 dev tun0"]);
        assert!(!inside.fix.is_safe());
        let around = judged(&route(MAIN_TABLE, "10.0.0.0/8", "tun0"), &none).unwrap();
        assert_eq!(around.severity, Severity::Warning);
        let hole = judged(&route(MAIN_TABLE, "fd42::/64", ""), &none).unwrap();
        assert_eq!(hole.fix.commands, ["ip -6 route del blackhole fd42::/64"]);
    }

    #[test]
    fn another_table_counts_if_a_rule_has_it_asked_first() {
        let vpn = route(52, "10.0.0.0/8", "tailscale0");
        assert_eq!(judged(&vpn, &Before::new()), None);
        let before = [(Family::Ipv4, [(52, 5270)].into())].into();
        let found = judged(&vpn, &before).unwrap();
        assert_eq!(found.severity, Severity::Error);
        assert!(found.evidence.iter().any(|line| line.contains("5270")), "{found:?}");
        assert_eq!(found.fix.commands, ["ip route del 10.0.0.0/8 dev tailscale0 table 52"]);
    }

    #[test]
    fn an_own_address_inside_is_named() {
        let local = ForeignRoute { kind: "local", ..route(LOCAL_TABLE, "10.42.3.3/32", "eth1") };
        let found = judged(&local, &Before::new()).unwrap();
        assert_eq!(found.fix.commands, ["ip addr del 10.42.3.3/32 dev eth1"]);
    }
}
