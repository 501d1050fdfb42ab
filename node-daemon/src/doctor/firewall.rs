//! Firewalls of others: the rule that drops our packets, and two kinds of iptables in one kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::config::Config;
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;

use super::{Check, Evidence, Finding, Fix, Looked, Outcome};
use crate::firewall::{ESP, Kind, Packet, Place, Ruleset, TCP, UDP, legacy_tables, remedy};
use crate::report::{PeerReport, Status};

/// Rules that drop what the overlay needs.
pub(super) const RULES: Check =
    Check { id: "foreign-firewall", title: "no rule of another firewall drops our packets", look: rules };

/// iptables-legacy and nftables side by side.
pub(super) const BACKENDS: Check =
    Check { id: "iptables-backends", title: "iptables rules are of one kind, legacy or nftables", look: backends };

/// Peers whose packets are tried; rules that name single peers are rare, and rules are many.
const MOST_PEERS: usize = 64;

/// Findings that are told; a firewall that closes everything has one per chain.
const MOST_FINDINGS: usize = 12;

/// A pod's interface, where the node has none yet: the rules are the same for all.
const SOME_POD: &str = "husk00000000000";

fn rules(evidence: &Evidence) -> Looked {
    let (config, ruleset) = (evidence.config()?, evidence.ruleset()?);
    Ok(judge(config, ruleset, evidence.status().ok(), evidence.peers().unwrap_or_default()))
}

/// A rule of this host is sure to drop probes that the nodes send each other: that they are not answered says nothing about peers.
pub(super) fn drops_probes(evidence: &Evidence) -> bool {
    let (Ok(config), Ok(ruleset)) = (evidence.config(), evidence.ruleset()) else { return false };
    let packets = packets(config, evidence.status().ok(), evidence.peers().unwrap_or_default());
    let mut probes = packets.iter().filter(|(kind, _)| *kind == Kind::Probe);
    probes.any(|(_, packet)| ruleset.drops(packet).iter().any(|place| !place.perhaps))
}

fn judge(config: &Config, ruleset: &Ruleset, status: Option<&Status>, peers: &[PeerReport]) -> Outcome {
    let packets = packets(config, status, peers);
    let mut dropped: BTreeMap<Place, BTreeMap<Kind, BTreeSet<String>>> = BTreeMap::new();
    for (kind, packet) in &packets {
        for place in ruleset.drops(packet) {
            let ends = dropped.entry(place).or_default().entry(*kind).or_default();
            // Whose they are is worth telling where the rule asks for addresses.
            ends.extend(packet.source.filter(|_| packet.hooks.contains(&"input")).map(|it| it.to_string()));
        }
    }
    let cidrs: Vec<String> = config.cluster_cidrs.iter().map(ToString::to_string).collect();
    let findings = dropped.iter().take(MOST_FINDINGS).map(|(place, kinds)| finding(place, kinds, ruleset, &cidrs));
    let seen = match ruleset.base_chains() {
        0 => "no chains of others".to_owned(),
        chains => format!("{chains} chains of others let our packets pass"),
    };
    Outcome::of(findings.collect(), seen)
}

fn finding(place: &Place, kinds: &BTreeMap<Kind, BTreeSet<String>>, ruleset: &Ruleset, cidrs: &[String]) -> Finding {
    let all: Vec<String> = kinds.keys().map(|kind| kind.words()).collect();
    let ends = kinds.iter().filter(|(_, ends)| !ends.is_empty()).map(|(kind, ends)| {
        let few: Vec<&str> = ends.iter().take(4).map(String::as_str).collect();
        let more = if ends.len() > few.len() { format!(" and {} more", ends.len() - few.len()) } else { String::new() };
        format!("{}: of {}{more}", kind.words(), few.join(", "))
    });
    let evidence = place.evidence(ends);
    let kinds: Vec<Kind> = kinds.keys().copied().collect();
    let cause = place.cause(&all.join(", and "));
    let fix = remedy(place, &kinds, ruleset, cidrs);
    if place.perhaps { Finding::warning(cause, evidence, fix) } else { Finding::error(cause, evidence, fix) }
}

/// Packets that have to pass, one of each kind and of each peer's.
fn packets(config: &Config, status: Option<&Status>, peers: &[PeerReport]) -> Vec<(Kind, Packet)> {
    let mut packets = outer(config, status, peers);
    let underlay = status.and_then(|status| status.underlay_interface.as_ref()).map(ToString::to_string);
    let pod = || Some(SOME_POD.to_owned());
    let tunnel = tunnel_device(config);
    for cidr in &config.cluster_cidrs {
        let ipv6 = cidr.family() == Family::Ipv6;
        let own = status.and_then(|status| status.blocks.iter().find(|block| block.family() == cidr.family()));
        let peer = peers.iter().flat_map(|peer| &peer.blocks).find(|block| block.family() == cidr.family());
        // Of an address inside the block: rules that name a cluster CIDR see it there.
        let (own, peer) = (own.and_then(|block| block.nth(1)), peer.and_then(|block| block.nth(1)));
        let host = status.and_then(|status| status.addresses.get(cidr.family()));
        let router = status.and_then(|status| status.router.get(cidr.family()));
        let peer_router = peers.iter().find_map(|peer| peer.router.get(cidr.family()));
        let forward = |input, output, source, destination| Packet {
            hooks: vec!["prerouting", "forward", "postrouting"],
            ipv6,
            input,
            output,
            source,
            destination,
            ..Packet::default()
        };
        let away = tunnel.map(str::to_owned).or_else(|| underlay.clone());
        packets.push((Kind::Pods, forward(pod(), away.clone(), own, peer)));
        packets.push((Kind::Pods, forward(away, pod(), peer, own)));
        packets.push((Kind::Pods, forward(pod(), pod(), own, own)));
        if underlay.is_some() {
            packets.push((Kind::Pods, forward(pod(), underlay.clone(), own, None)));
        }
        let to_pod = Packet {
            hooks: vec!["output", "postrouting"],
            ipv6,
            input: Some(String::new()),
            output: pod(),
            source: host,
            destination: own,
            ..Packet::default()
        };
        packets.push((Kind::HostToPod, to_pod));
        if let Some(tunnel) = tunnel {
            for protocol in [UDP, TCP] {
                let arriving = Packet {
                    hooks: vec!["prerouting", "input"],
                    ipv6,
                    input: Some(tunnel.to_owned()),
                    output: Some(String::new()),
                    source: peer_router,
                    destination: router,
                    protocol: Some(protocol),
                    port: Some(marks::PROBE_PORT),
                };
                let leaving = Packet {
                    hooks: vec!["output", "postrouting"],
                    input: Some(String::new()),
                    output: Some(tunnel.to_owned()),
                    // A packet of known source goes anywhere if its destination is not known, and this one does not.
                    source: router.filter(|_| peer_router.is_some()),
                    destination: peer_router,
                    ..arriving.clone()
                };
                packets.extend([(Kind::Probe, arriving), (Kind::Probe, leaving)]);
            }
        }
    }
    packets
}

/// What tunnels look like on the underlay, to and from each peer.
fn outer(config: &Config, status: Option<&Status>, peers: &[PeerReport]) -> Vec<(Kind, Packet)> {
    let mut kinds = Vec::new();
    match config.mode {
        Mode::Direct => {}
        Mode::Vxlan => kinds.push(Kind::Udp(config.vxlan.port)),
        Mode::Wireguard => kinds.extend([0, 1].map(|slot| Kind::Udp(config.wireguard.port_of(slot)))),
        Mode::Ipsec | Mode::VxlanIpsec => kinds.push(config.ipsec.udp_port.map_or(Kind::Esp, Kind::Udp)),
    }
    let family = config.underlay.family;
    let own = status.and_then(|status| status.addresses.get(family));
    let interface = status.and_then(|status| status.underlay_interface.as_ref()).map(ToString::to_string);
    let endpoints = peers.iter().filter_map(|peer| peer.endpoint.as_deref()).filter_map(address_of);
    let mut peers: Vec<Option<IpAddr>> = endpoints.take(MOST_PEERS).map(Some).collect();
    if peers.is_empty() {
        peers.push(None);
    }
    let mut packets = Vec::new();
    for (kind, peer) in kinds.iter().flat_map(|kind| peers.iter().map(move |peer| (*kind, *peer))) {
        let (protocol, port) = match kind {
            Kind::Udp(port) => (UDP, Some(port)),
            _ => (ESP, None),
        };
        let ipv6 = family == Family::Ipv6;
        let template = Packet { ipv6, protocol: Some(protocol), port, ..Packet::default() };
        let arriving = Packet {
            hooks: vec!["prerouting", "input"],
            input: interface.clone(),
            output: Some(String::new()),
            source: peer,
            destination: own,
            ..template.clone()
        };
        let leaving = Packet {
            hooks: vec!["output", "postrouting"],
            input: Some(String::new()),
            output: interface.clone(),
            source: own.filter(|_| peer.is_some()),
            destination: peer,
            ..template
        };
        packets.extend([(kind, arriving), (kind, leaving)]);
    }
    packets
}

fn tunnel_device(config: &Config) -> Option<&'static str> {
    match config.mode {
        Mode::Direct => None,
        Mode::Vxlan | Mode::VxlanIpsec => Some(marks::VXLAN_INTERFACE),
        Mode::Wireguard => Some(marks::WIREGUARD_INTERFACES[0]),
        Mode::Ipsec => Some(marks::XFRM_INTERFACE),
    }
}

/// The address of an endpoint, with or without a port.
pub(super) fn address_of(endpoint: &str) -> Option<IpAddr> {
    let with_port = endpoint.parse::<std::net::SocketAddr>().map(|it| it.ip());
    with_port.ok().or_else(|| endpoint.parse().ok())
}

/// Tables that iptables has made, by both of its kinds.
fn backends(evidence: &Evidence) -> Looked {
    let legacy: Vec<String> = legacy_tables()?.iter().map(|(family, table)| format!("{family} {table}")).collect();
    let ruleset = evidence.ruleset()?;
    let translated: BTreeSet<(&str, &str)> = ruleset
        .tables()
        .filter(|(family, table)| matches!(*family, "ip" | "ip6") && IPTABLES.contains(table))
        .collect();
    if legacy.is_empty() {
        return Ok(Outcome::well("no iptables-legacy tables"));
    }
    if translated.is_empty() {
        return Ok(Outcome::well(format!("iptables-legacy alone: {}", legacy.join(", "))));
    }
    let translated: Vec<String> = translated.iter().map(|(family, table)| format!("{family} {table}")).collect();
    let evidence = vec![
        format!("iptables-legacy: {}", legacy.join(", ")),
        format!("iptables-nft: table {}", translated.join(", table ")),
        "see them with: iptables-legacy-save; iptables-nft-save".into(),
    ];
    let fix = Fix::by_hand(
        "let all programs use one kind (update-alternatives --set iptables, or what their documentation says), then empty the \
         other kind's tables; a table that is empty does no harm, and goes with a reboot",
        [],
        "only you know which programs made which rules",
    );
    let cause = "iptables-legacy and iptables-nft both have rules, and every packet has to pass both: what one lets pass or \
                 translates the other may drop, and each program shows its own half only";
    Ok(Outcome::of(vec![Finding::warning(cause, evidence, fix)], ""))
}

/// Names that iptables gives to its tables.
const IPTABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

#[cfg(test)]
#[path = "firewall/recorded_tests.rs"]
mod recorded_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_addresses() {
        for (endpoint, address) in [("192.0.2.1:4789", "192.0.2.1"), ("[2001:db8::1]:1", "2001:db8::1"), ("::1", "::1")]
        {
            assert_eq!(address_of(endpoint), Some(address.parse().unwrap()), "{endpoint}");
        }
        assert_eq!(address_of("nowhere"), None);
    }

    #[test]
    fn every_mode_has_the_packets_it_cannot_do_without() {
        let cidr = "10.42.0.0/16".parse().unwrap();
        for (mode, kind) in [
            (Mode::Vxlan, Some(Kind::Udp(4789))),
            (Mode::Wireguard, Some(Kind::Udp(51821))),
            (Mode::Ipsec, Some(Kind::Esp)),
            (Mode::VxlanIpsec, Some(Kind::Esp)),
            (Mode::Direct, None),
        ] {
            let config = Config { mode, ..Config::new(vec![cidr]) };
            let kinds: BTreeSet<Kind> = packets(&config, None, &[]).into_iter().map(|(kind, _)| kind).collect();
            assert!(kind.is_none_or(|kind| kinds.contains(&kind)), "{mode}: {kinds:?}");
            assert!(kinds.contains(&Kind::Pods) && kinds.contains(&Kind::HostToPod));
            assert_eq!(kinds.contains(&Kind::Probe), mode != Mode::Direct);
        }
    }
}
