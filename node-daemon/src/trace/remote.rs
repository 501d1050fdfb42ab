//! Between this node and the other one.

use std::time::Duration;

use husk_dataplane::way::{NeighbourStanding, Way};
use husk_overlay::probe::{Report, Standing};
use serde::{Deserialize, Serialize};

use super::{Entries, Evidence, PeerEvidence, Tunnel, TunnelKind, broken, not_here, passes, unknown};
use crate::report::{Hop, HopName, HopStanding, TracePeer, TraceReport};

/// Keys of a WireGuard session are refused after this (`REJECT_AFTER_TIME`, WireGuard paper section 6.1).
const SESSION: Duration = Duration::from_secs(180);

/// Probes come every ten seconds where a cluster is small; what is older says little.
const FRESH: Duration = Duration::from_secs(60);

pub(super) fn tunnel(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Tunnel;
    let Some(peer) = &evidence.peer else { return not_here(NAME, "the connection goes to no other node's pods") };
    if let Some(reason) = &peer.refused {
        let remedy = peer.remedy.clone().unwrap_or_else(|| format!("see huskctl status here and on {}", peer.name));
        return broken(NAME, format!("{} is refused: {reason}", peer.name), remedy, Vec::new());
    }
    let Tunnel { devices, kind } = &peer.tunnel;
    if let Some((device, wrong)) = devices.iter().find_map(|it| it.wrong.as_ref().map(|wrong| (&it.name, wrong))) {
        return broken(
            NAME,
            format!("{device} {wrong}"),
            "huskd makes its devices anew by itself; huskctl status tells what keeps it from that",
            Vec::new(),
        );
    }
    match kind {
        Err(reason) => unknown(NAME, format!("it could not be looked at: {reason}"), Vec::new()),
        Ok(TunnelKind::Direct) => not_here(NAME, "mode direct: packets go to the node as they are"),
        Ok(TunnelKind::Vxlan { vni, port, entries }) => {
            let said = format!("VXLAN {vni} to {}, UDP {port}", address(peer));
            entries_pass(peer, *entries, "forwarding and neighbour entries", said)
        }
        Ok(kind @ TunnelKind::Wireguard { .. }) => wireguard(peer, kind),
        Ok(kind @ TunnelKind::Esp { .. }) => esp(peer, kind),
    }
}

fn address(peer: &PeerEvidence) -> String {
    peer.underlay.as_ref().map_or_else(|| "an unknown address".to_owned(), |underlay| underlay.address.to_string())
}

fn entries_pass(peer: &PeerEvidence, entries: Entries, what: &str, said: String) -> Hop {
    let Entries { wanted, found } = entries;
    if entries.complete() && wanted > 0 {
        return passes(HopName::Tunnel, vec![said, format!("{found} of {wanted} {what} are in place")]);
    }
    broken(
        HopName::Tunnel,
        format!("of {wanted} {what} of {}, {found} are in the kernel", peer.name),
        "huskctl diff shows what is missing, huskctl status what keeps huskd from putting it back",
        vec![said],
    )
}

fn wireguard(peer: &PeerEvidence, kind: &TunnelKind) -> Hop {
    const NAME: HopName = HopName::Tunnel;
    let TunnelKind::Wireguard { configured, generation, endpoint, handshake, bytes } = kind else {
        return not_here(NAME, "not WireGuard");
    };
    let to = endpoint.map_or_else(|| address(peer), |endpoint| endpoint.to_string());
    let mut told = vec![format!("WireGuard to {to}")];
    told.extend(generation.map(|generation| format!("key generation {generation}")));
    if !configured {
        return broken(
            NAME,
            format!("the device does not have the peer {} as planned", peer.name),
            "huskctl diff shows the difference; huskctl status tells what keeps huskd from mending it",
            told,
        );
    }
    let (sent, received) = bytes;
    told.push(format!("{sent} bytes sent, {received} received"));
    match handshake {
        Some(age) if *age < SESSION => {
            told.insert(1, format!("last handshake {} ago", seconds(*age)));
            passes(NAME, told)
        }
        other => {
            let since = other.map_or_else(
                || "there was no handshake yet".to_owned(),
                |age| format!("the last handshake was {} ago", seconds(age)),
            );
            if is_unreachable(peer) {
                return broken(NAME, format!("{since}, and what is sent brings none about"), unanswered(peer), told);
            }
            unknown(NAME, format!("{since}: the next packet asks for one"), told)
        }
    }
}

fn esp(peer: &PeerEvidence, kind: &TunnelKind) -> Hop {
    const NAME: HopName = HopName::Tunnel;
    let TunnelKind::Esp { epochs, key_age, associations, spis, policies, errors, forwarding } = kind else {
        return not_here(NAME, "not ESP");
    };
    let Some((own, theirs)) = epochs else {
        return broken(
            NAME,
            format!(
                "nothing can be sent to {} yet: the keys that both sides need are not published or not installed",
                peer.name
            ),
            format!("is huskd running on {}? See huskctl keys status here and there", peer.name),
            Vec::new(),
        );
    };
    let spis: Vec<String> = spis.iter().map(|spi| format!("{spi:#010x}")).collect();
    let mut told = vec![
        format!("ESP to {}, SPI {}", address(peer), spis.join(" or ")),
        format!("own epoch {own}, the peer's {theirs}"),
    ];
    told.extend(key_age.map(|age| format!("key {} old", seconds(age))));
    told.extend(errors.iter().cloned());
    for (what, entries) in [
        ("associations", Some(*associations)),
        ("policies", Some(*policies)),
        ("forwarding and neighbour entries", *forwarding),
    ] {
        let Some(entries) = entries else { continue };
        if !entries.complete() {
            return Hop { evidence: told, ..entries_pass(peer, entries, what, String::new()) };
        }
        told.push(format!("{} {what}", entries.found));
    }
    passes(NAME, told)
}

pub(super) fn underlay(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Underlay;
    let Some(peer) = &evidence.peer else { return not_here(NAME, "the connection goes through no tunnel") };
    if peer.refused.is_some() {
        return not_here(NAME, "nothing is sent to the peer");
    }
    let Some(underlay) = &peer.underlay else {
        return broken(
            NAME,
            format!("{} has published no underlay address", peer.name),
            format!("see huskctl status on {}", peer.name),
            Vec::new(),
        );
    };
    let (to, name) = (underlay.address, &peer.name);
    match &underlay.way {
        Err(reason) => unknown(NAME, format!("the kernel could not be asked: {reason}"), Vec::new()),
        Ok(Way::Local) => broken(
            NAME,
            format!("{to}, the address of {name}, is one of this host"),
            "give each node an address of its own",
            Vec::new(),
        ),
        Ok(Way::Refused { errno }) => broken(
            NAME,
            format!("this host has no route to {to}, the address of {name}: {errno}"),
            "is the underlay's interface up, with its address? ip addr, ip route; then give the host a route to it",
            Vec::new(),
        ),
        Ok(Way::Leaves { interface, mtu, up, via, .. }) => {
            let next = via.map_or(to, |via| via);
            let told = vec![match via {
                Some(via) => format!("{to} via {via} dev {interface}, MTU {mtu}"),
                None => format!("{to} dev {interface}, MTU {mtu}"),
            }];
            if super::local::is_of_pod(interface)
                || interface.as_str().starts_with(husk_overlay::marks::INTERFACE_PREFIX)
            {
                return broken(
                    NAME,
                    format!("the way to {to}, the address of {name}, leads into the overlay itself ({interface})"),
                    "the underlay's addresses may not lie in a cluster CIDR, nor be routed there",
                    told,
                );
            }
            if !up {
                return broken(NAME, format!("{interface} is down"), format!("ip link set {interface} up"), told);
            }
            // The kernel asks again and again as long as somebody sends; what stays unanswered is no matter of waiting.
            let neighbour = match underlay.neighbour {
                Some(NeighbourStanding::Asked) if is_unreachable(peer) => Some(NeighbourStanding::Silent),
                neighbour => neighbour,
            };
            match neighbour {
                Some(NeighbourStanding::Silent) => broken(
                    NAME,
                    format!("{next} does not answer on {interface}: nobody tells its Ethernet address"),
                    if via.is_some() {
                        format!("is the router {next} up, and {interface} on the right network?")
                    } else {
                        format!("is {name} up, and its underlay interface? Is {interface} on the same network?")
                    },
                    told,
                ),
                Some(NeighbourStanding::Asked) => {
                    unknown(NAME, format!("{next} was asked for its Ethernet address, and has not answered yet"), told)
                }
                Some(NeighbourStanding::Known) => {
                    passes(NAME, told.into_iter().chain([format!("the Ethernet address of {next} is known")]).collect())
                }
                Some(NeighbourStanding::Unknown) | None => passes(NAME, told),
            }
        }
    }
}

pub(super) fn probe(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Probe;
    let Some(peer) = &evidence.peer else { return not_here(NAME, "only the ways between nodes are probed") };
    if peer.refused.is_some() {
        return not_here(NAME, "a peer that is refused is not probed");
    }
    let Some((report, ago)) = &peer.probe else {
        return unknown(NAME, "this path is not probed (huskctl peers)", Vec::new());
    };
    let mut told: Vec<String> = ago.map(|ago| format!("probed {} ago", seconds(ago))).into_iter().collect();
    told.extend(report.rtt.map(|rtt| format!("round trip {}", milliseconds(rtt))));
    told.extend(report.loss_per_mille.map(|loss| format!("loss {}.{} %", loss / 10, loss % 10)));
    match report.standing {
        Standing::Verified | Standing::Limited { .. } if ago.is_some_and(|ago| ago > FRESH) => {
            unknown(NAME, "what was found is old; --probe probes now", told)
        }
        Standing::Verified => passes(NAME, lead(format!("{} bytes pass", report.promised), told)),
        Standing::Limited { passes: bytes } => passes(
            NAME,
            lead(format!("{bytes} bytes pass, where {} were promised: the routes were lowered", report.promised), told),
        ),
        Standing::Searching { passes: 0, .. } => {
            unknown(NAME, "large packets vanish, and whether any pass is not known yet; --probe waits for it", told)
        }
        Standing::Searching { passes: bytes, .. } => {
            unknown(NAME, format!("large packets vanish, at least {bytes} bytes pass; the search goes on"), told)
        }
        Standing::Unknown => unknown(NAME, "nothing was found yet; --probe probes now", told),
        Standing::Unreachable => broken(NAME, no_answer(peer, report), unanswered(peer), told),
    }
}

fn lead(first: String, rest: Vec<String>) -> Vec<String> {
    std::iter::once(first).chain(rest).collect()
}

fn is_unreachable(peer: &PeerEvidence) -> bool {
    peer.probe.as_ref().is_some_and(|(report, _)| report.standing == Standing::Unreachable)
}

fn no_answer(peer: &PeerEvidence, report: &Report) -> String {
    let before = if report.answered > 0 { ", which answered before" } else { "" };
    format!("no probe is answered by {}{before}", peer.name)
}

/// What to do about a peer that does not answer.
fn unanswered(peer: &PeerEvidence) -> String {
    let name = &peer.name;
    match &peer.tunnel.kind {
        Ok(TunnelKind::Vxlan { port, .. }) => {
            format!(
                "let UDP {port} pass between the nodes, both ways and in both nodes' firewalls; is {name} up, with huskd?"
            )
        }
        Ok(TunnelKind::Wireguard { endpoint, .. }) => {
            let port = endpoint.map_or_else(|| "of WireGuard".to_owned(), |endpoint| endpoint.port().to_string());
            format!(
                "let UDP {port} pass between the nodes, both ways and in both nodes' firewalls; is {name} up, with huskd?"
            )
        }
        Ok(TunnelKind::Esp { .. }) => {
            format!(
                "let ESP (IP protocol 50, or its UDP port) pass between the nodes, both ways; is {name} up, with huskd?"
            )
        }
        _ => format!("is {name} up, with huskd? Do firewalls between let the pods' packets pass?"),
    }
}

pub(super) fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(10) {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{} s", duration.as_secs())
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

/// What became of an attempt to connect to a port that need not be open: the other host's kernel answers, not its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Knock {
    /// The host answered, by accepting or refusing.
    Answered,
    /// Nothing came back in time.
    Silent,
    /// The own kernel knew no way.
    NoWay,
}

/// Attempts to reach the other host, when probes are not answered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Knocks {
    /// Through the tunnel.
    pub inside: Option<Knock>,
    /// On the underlay.
    pub underlay: Option<Knock>,
}

/// Adds to a report what knocking at the other host found: a host that answers through the tunnel has a path that works, and
/// only its daemon is silent; one that answers on the underlay alone has its tunnel's packets filtered.
pub fn knocked(report: &mut TraceReport, peer: &TracePeer, knocks: Knocks) {
    let node = &peer.node;
    let Some(hop) = report.hops.iter_mut().find(|hop| hop.name == HopName::Probe) else { return };
    let HopStanding::Broken { cause, remedy, .. } = &mut hop.standing else { return };
    match (knocks.inside, knocks.underlay) {
        (Some(Knock::Answered), _) => {
            hop.standing = HopStanding::Passes;
            let told = format!("{node} answers through the tunnel (TCP), its daemon does not: is huskd running there?");
            hop.evidence.insert(0, told);
        }
        (_, Some(Knock::Answered)) => {
            *cause += ", though the host itself answers on the underlay: packets of the tunnel are filtered on the way";
        }
        (_, Some(Knock::Silent | Knock::NoWay)) => {
            *cause +=
                ", and the host does not answer on the underlay either: it is down, cut off, or silent to strangers";
            let address = peer.underlay.map_or_else(String::new, |address| format!(" ({address})"));
            *remedy = format!("is {node}{address} up, and its underlay interface? If it is: {remedy}");
        }
        _ => {}
    }
    report.broken = super::first_broken(&report.hops);
}
