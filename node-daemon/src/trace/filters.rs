//! Packet filters of others: those of Docker, firewalld, kube-proxy or whoever else has rules on this node. One refusal is final,
//! whatever Husk's own rules say.
//!
//! The daemon says where packets cross the node. Their rules, which may be many, are read and walked by `huskctl`.

use std::net::IpAddr;

use husk_overlay::marks::INTERFACE_PREFIX;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use husk_policy::object::Protocol;

use super::{Course, Evidence, hop, not_here, passes, unknown};
use crate::firewall::{Kind, Packet, Place, Ruleset, UDP, remedy};
use crate::report::{Carrier, Crossing, Fix, Hop, HopName, HopStanding, TraceReport};

const NAME: HopName = HopName::OtherFirewalls;

/// IANA protocol numbers of ICMP by family. A trace knows but one.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Other places that drop the same packets and are told, too.
const MORE: usize = 4;

/// The hop as far as the daemon knows it.
pub(super) fn other_firewalls(evidence: &Evidence) -> Hop {
    match (evidence.course(), &evidence.crossing) {
        (Course::Elsewhere, _) => not_here(NAME, "no packet of this connection crosses this node"),
        (_, None) if evidence.mapped_to.is_some() => {
            not_here(NAME, "its address becomes a pod's before they see it: trace that pod's port")
        }
        (_, None) => not_here(NAME, "it does not get that far"),
        (_, Some(_)) => unknown(NAME, "rules of others are not looked at by the daemon", Vec::new()),
    }
}

/// Rules of others, as far as they could be looked at.
pub(crate) struct Filters<'a> {
    /// What nftables has, iptables-nft's included; why not, where it could not be read.
    pub(crate) ruleset: Result<&'a Ruleset, &'a str>,
    /// Tables of iptables-legacy, which cannot be seen into.
    pub(crate) legacy: &'a [(Family, String)],
}

/// Adds to a report what rules of others do with the packets of the connection, and of the tunnel that carries them.
pub(crate) fn filtered(report: &mut TraceReport, filters: &Filters<'_>) {
    let Some(crossing) = report.crossing.clone() else { return };
    let judged = judge(report, &crossing, filters);
    if let Some(hop) = report.hops.iter_mut().find(|hop| hop.name == NAME && hop.standing != HopStanding::NotHere) {
        *hop = judged;
    }
    report.broken = super::first_broken(&report.hops);
}

/// A packet that has to pass, and what it is.
struct Passing {
    /// What it is for, where what lets it pass goes by that.
    kind: Option<Kind>,
    what: String,
    packet: Packet,
}

fn judge(report: &TraceReport, crossing: &Crossing, filters: &Filters<'_>) -> Hop {
    let ruleset = match filters.ruleset {
        Ok(ruleset) => ruleset,
        Err(reason) => return unknown(NAME, format!("rules of others could not be looked at: {reason}"), Vec::new()),
    };
    let passing = passing(report, crossing);
    let mut dropped: Vec<(Place, &Passing)> = Vec::new();
    for it in &passing {
        for place in ruleset.drops(&it.packet) {
            if !dropped.iter().any(|(known, _)| *known == place) {
                dropped.push((place, it));
            }
        }
    }
    // What drops for certain comes before what perhaps does.
    dropped.sort_by_key(|(place, _)| place.perhaps);
    if let Some((place, first)) = dropped.first() {
        let more = dropped.iter().skip(1).take(MORE).map(|(place, it)| place.cause(&it.what));
        let evidence = place.evidence(more);
        let cause = place.cause(&first.what);
        if place.perhaps {
            return unknown(NAME, cause, evidence);
        }
        let Fix { words, commands, .. } = fix(report, place, first, ruleset, crossing);
        return hop(NAME, HopStanding::Broken { cause, remedy: words, commands }, evidence);
    }
    let families = passing.iter().map(|it| if it.packet.ipv6 { Family::Ipv6 } else { Family::Ipv4 });
    let families: Vec<Family> = families.collect();
    let legacy = filters.legacy.iter().filter(|(family, _)| families.contains(family));
    let legacy: Vec<String> = legacy.map(|(family, table)| format!("{family} {table}")).collect();
    let seen = match ruleset.base_chains() {
        0 => "no chains of others".to_owned(),
        1 => "1 chain of others lets it pass".to_owned(),
        chains => format!("{chains} chains of others let it pass"),
    };
    if legacy.is_empty() {
        return passes(NAME, vec![seen]);
    }
    let why = format!(
        "iptables-legacy has tables that cannot be seen into ({}); iptables-legacy-save and ip6tables-legacy-save show them",
        legacy.join(", ")
    );
    unknown(NAME, why, vec![seen])
}

/// What lets it pass.
fn fix(report: &TraceReport, place: &Place, it: &Passing, ruleset: &Ruleset, crossing: &Crossing) -> Fix {
    let cidrs: Vec<String> = crossing.cluster_cidrs.iter().map(ToString::to_string).collect();
    match it.kind {
        Some(kind) => remedy(place, &[kind], ruleset, &cidrs),
        None => {
            let (from, to) = (report.source.address, report.destination.address);
            Fix::words(format!("have whoever keeps that firewall accept packets from {from} to {to}"))
        }
    }
}

fn passing(report: &TraceReport, crossing: &Crossing) -> Vec<Passing> {
    let connection = report.connection;
    let Crossing { input, output, carrier, .. } = crossing;
    let ipv6 = Family::of(connection.responder) == Family::Ipv6;
    let (hooks, kind) = match (input, output) {
        (Some(_), Some(_)) => (vec!["prerouting", "forward", "postrouting"], Kind::Pods),
        (None, Some(_)) => (vec!["output", "postrouting"], Kind::HostToPod),
        (Some(_), None) => (vec!["prerouting", "input"], Kind::PodToHost),
        // The host with itself.
        (None, None) => return Vec::new(),
    };
    // Rules that let our packets pass go by our interfaces.
    let is_ours = |interface: &InterfaceName| interface.as_str().starts_with(INTERFACE_PREFIX);
    let name =
        |interface: &Option<InterfaceName>| Some(interface.as_ref().map(ToString::to_string).unwrap_or_default());
    let inner = Packet {
        hooks,
        ipv6,
        input: name(input),
        output: name(output),
        source: Some(connection.originator),
        destination: Some(connection.responder),
        protocol: Some(if ipv6 && connection.protocol == ICMP { ICMPV6 } else { connection.protocol }),
        port: Protocol::of(connection.protocol).map(|_| connection.port),
    };
    let kind = [input, output].into_iter().flatten().any(is_ours).then_some(kind);
    let mut all = vec![Passing { kind, what: connection.to_string(), packet: inner }];
    all.extend(carrier.iter().flat_map(carrying));
    all
}

/// Packets of the tunnel, to the other node and from it.
fn carrying(carrier: &Carrier) -> [Passing; 2] {
    let Carrier { interface, own, peer, protocol, own_port, peer_port } = carrier;
    let interface = Some(interface.to_string());
    let passing = |hooks, source, destination, port: &Option<u16>, (input, output)| {
        let kind = match port {
            Some(port) if *protocol == UDP => Kind::Udp(*port),
            _ => Kind::Esp,
        };
        let packet = Packet {
            hooks,
            ipv6: matches!(peer, IpAddr::V6(_)),
            input,
            output,
            source,
            destination,
            protocol: Some(*protocol),
            port: *port,
        };
        Passing { kind: Some(kind), what: kind.words(), packet }
    };
    let nowhere = Some(String::new());
    [
        passing(vec!["output", "postrouting"], *own, Some(*peer), peer_port, (nowhere.clone(), interface.clone())),
        passing(vec!["prerouting", "input"], Some(*peer), *own, own_port, (interface, nowhere)),
    ]
}

#[cfg(test)]
#[path = "filters_tests.rs"]
mod tests;
