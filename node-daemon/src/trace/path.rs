//! What is on this node between the two ends: route, MTU, firewall, address translation.

use husk_dataplane::way::Way;
use husk_overlay::kernel::RouteTarget;
use husk_overlay::marks;
use husk_overlay::mtu::Ledger;
use husk_policy::object::Protocol;
use nix::errno::Errno;

use super::{Course, Evidence, PeerEvidence, RouteEvidence, broken, not_here, passes, unknown};
use crate::report::{Hop, HopName, Place};

pub(super) fn route(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Route;
    let Some(RouteEvidence { way, planned }) = &evidence.route else {
        return not_here(NAME, "no packet of this connection crosses this node");
    };
    let planned_interface = planned.as_ref().and_then(|(_, route)| match &route.target {
        RouteTarget::Interface { interface, .. } => Some(interface),
        RouteTarget::Unreachable => None,
    });
    let way = match way {
        Ok(way) => way,
        Err(reason) => return unknown(NAME, format!("the kernel could not be asked: {reason}"), Vec::new()),
    };
    match way {
        Way::Refused { errno } => {
            let (cause, remedy) = refusal(evidence, *errno, planned_interface.is_some());
            broken(NAME, cause, remedy, vec![format!("the kernel refuses the packet: {errno}")])
        }
        Way::Local => passes(NAME, vec!["it is for this node itself".into()]),
        Way::Leaves { interface, mtu, up, via, route, .. } => {
            let destination = route.as_ref().map_or_else(
                || evidence.destination.address.to_string(),
                |route| route.destination.map_or_else(|| "default".to_owned(), |prefix| prefix.to_string()),
            );
            let via = via.map(|via| format!(" via {via}")).unwrap_or_default();
            let whose = match route.as_ref().map(|route| route.protocol) {
                Some(marks::ROUTE_PROTOCOL) => ", Husk's".to_owned(),
                Some(protocol) => format!(", {}", maker(protocol)),
                None => String::new(),
            };
            let found = format!("{destination}{via} dev {interface} mtu {mtu}{whose}");
            let is_foreign = route.as_ref().is_some_and(|route| route.protocol != marks::ROUTE_PROTOCOL);
            match planned_interface {
                _ if !up => broken(
                    NAME,
                    format!("the packet leaves by {interface}, which is down"),
                    format!("ip link set {interface} up"),
                    vec![found],
                ),
                Some(planned) if planned != interface => broken(
                    NAME,
                    format!(
                        "a route of somebody else takes the packet to {interface}, where Husk wants it to go to {planned}"
                    ),
                    format!(
                        "find out who made it (ip route get {0}), and remove it: ip route del {destination} dev {interface}",
                        evidence.destination.address
                    ),
                    vec![found],
                ),
                None if evidence.is_in_cluster(evidence.destination.address)
                    && evidence.course() != Course::In
                    && is_foreign =>
                {
                    let (cause, remedy) = nobody(evidence);
                    broken(NAME, cause, remedy, vec![found, "no route of Husk's covers the address".into()])
                }
                _ => answered(evidence, found),
            }
        }
    }
}

/// Who made a route, by its routing protocol number (`RTPROT_*` in include/uapi/linux/rtnetlink.h).
fn maker(protocol: u8) -> String {
    match protocol {
        2 => "the kernel's".into(),
        3 => "made by hand".into(),
        4 => "static".into(),
        9 => "of a router advertisement".into(),
        16 => "of DHCP".into(),
        other => format!("of routing protocol {other}"),
    }
}

/// The byte ledger in one line.
fn ledger_line(ledger: &Ledger) -> String {
    let layers: Vec<String> =
        ledger.entries.iter().map(|entry| format!(" - {} {}", entry.layer, entry.bytes)).collect();
    let inner = ledger.inner.map_or_else(|| "nothing".to_owned(), |inner| inner.to_string());
    format!("underlay {}{} = {inner}", ledger.underlay_mtu, layers.concat())
}

/// The way there is as it should be; what of the way back.
fn answered(evidence: &Evidence, found: String) -> Hop {
    let Some((by, Ok(Way::Refused { errno }))) = &evidence.answers else {
        return passes(HopName::Route, vec![found]);
    };
    let source = evidence.source.address;
    broken(
        HopName::Route,
        format!("the kernel refuses what {} answers, which arrives by {by}: {errno}", evidence.destination.address),
        format!(
            "let {by} forward packets, and not filter them by their source: huskctl doctor says by which kernel parameter, else \
             see ip route get {source} from {} iif {by}",
            evidence.destination.address
        ),
        vec![format!("the way there: {found}")],
    )
}

/// Why there is no way, and what to do about it.
fn refusal(evidence: &Evidence, errno: Errno, planned: bool) -> (String, String) {
    let destination = evidence.destination.address;
    match errno {
        Errno::EXDEV | Errno::EINVAL if evidence.source.place == Place::PodHere => (
            format!("the kernel does not take packets from {} on that interface", evidence.source.address),
            "strict rp_filter drops it: sysctl net.ipv4.conf.all.rp_filter should be 0 or 2; see huskctl diff".into(),
        ),
        _ if planned => (
            format!("the kernel refuses packets to {destination}, though a route is planned"),
            "huskctl diff shows a route that is missing, huskctl doctor an interface that does not forward".into(),
        ),
        _ if evidence.is_in_cluster(evidence.destination.address) => nobody(evidence),
        Errno::ENETUNREACH => (
            format!("this node has no route to {destination}"),
            "give the host a route to it, or a default route".into(),
        ),
        _ => (
            format!("a route of this node refuses packets to {destination}"),
            format!("see ip route get {destination}"),
        ),
    }
}

/// An address of the cluster to which nothing can be sent.
fn nobody(evidence: &Evidence) -> (String, String) {
    let destination = evidence.destination.address;
    match &evidence.peer {
        Some(PeerEvidence { name, refused: Some(reason), remedy, .. }) => (
            format!("nothing is sent to {name}: {reason}"),
            remedy.clone().unwrap_or_else(|| format!("see huskctl status here and on {name}")),
        ),
        Some(PeerEvidence { name, .. }) => (
            format!("there is no route to {name} yet: the keys that both sides need are not there, or the route was refused"),
            format!("see huskctl peers and huskctl status here, and huskd on {name}"),
        ),
        None => (
            format!("no node of the cluster owns {destination}, so that packets to it are refused and do not leak"),
            "see huskctl peers: the node that has the address has to publish its block, and huskd has to run there; or the pod is gone"
                .into(),
        ),
    }
}

pub(super) fn mtu(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Mtu;
    let Some(RouteEvidence { way: Ok(way), .. }) = &evidence.route else {
        return not_here(NAME, "there is no route whose MTU counted");
    };
    let of_route = match way {
        Way::Leaves { mtu, .. } => Some(*mtu),
        Way::Local => None,
        Way::Refused { .. } => return not_here(NAME, "there is no route whose MTU counted"),
    };
    let endpoints = [&evidence.source_endpoint, &evidence.destination_endpoint];
    let of_pods = endpoints.into_iter().flatten().filter_map(|endpoint| endpoint.mtu);
    // What comes from elsewhere was limited there.
    let to_peer = evidence.peer.as_ref().filter(|_| evidence.course() == Course::Out);
    let limits = of_route.into_iter().chain(of_pods).chain(to_peer.and_then(|peer| peer.mtu));
    let Some(largest) = limits.min() else {
        return passes(NAME, vec!["nothing but the host's loopback limits it".into()]);
    };
    let mut told = vec![format!("packets of up to {largest} bytes")];
    if let Some(peer) = to_peer {
        told.push(ledger_line(&peer.ledger));
        told.extend(peer.probed.map(|probed| format!("probing found that {probed} bytes pass")));
    }
    if evidence.connection.protocol == Protocol::Tcp.number() {
        told.push("TCP's segments are clamped to it".into());
    }
    if let Some((peer, promised)) =
        to_peer.and_then(|peer| Some((peer, peer.mtu?))).filter(|(_, promised)| of_route > Some(*promised))
    {
        let of_route = of_route.unwrap_or_default();
        return broken(
            NAME,
            format!(
                "the route lets packets of {of_route} bytes into the tunnel to {}, which carries {promised}",
                peer.name
            ),
            "huskctl diff shows the difference; huskd mends its routes by itself, so look at huskctl status for what keeps it from that",
            told,
        );
    }
    match evidence.size.filter(|size| *size > largest) {
        None => passes(NAME, told),
        Some(size) => broken(
            NAME,
            format!(
                "a packet of {size} bytes does not fit: it is refused with \"fragmentation needed\" if it carries DF, and cut else"
            ),
            format!(
                "send at most {largest} bytes, or raise the MTU of what lies below: huskctl mtu shows where the bytes go"
            ),
            told,
        ),
    }
}

pub(super) fn firewall(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Firewall;
    if evidence.course() == Course::Elsewhere {
        return not_here(NAME, "no packet of this connection crosses this node");
    }
    match &evidence.guard.deviations {
        Err(reason) => return unknown(NAME, format!("the table inet husk could not be read: {reason}"), Vec::new()),
        Ok(deviations) if !deviations.is_empty() => {
            return broken(
                NAME,
                format!("the table inet husk is not as planned: {}", deviations[0]),
                "huskd puts it right with its next pass; if it stays so, huskctl status tells what the kernel refuses",
                deviations.iter().skip(1).take(4).cloned().collect(),
            );
        }
        Ok(_) => {}
    }
    let own = "the table inet husk is as planned".to_owned();
    // Husk lets nobody outside the tunnel speak to a pod's own address.
    if evidence.source.place == Place::External
        && evidence.destination.place == Place::PodHere
        && evidence.mode.tunnelled()
    {
        let ports = evidence.host_ports.join(", ");
        let remedy = if ports.is_empty() {
            "address a Service (NodePort, LoadBalancer), or give the pod a host port".to_owned()
        } else {
            format!("address the node: its ports lead to the pod ({ports})")
        };
        let cause =
            "packets from outside of the cluster to a pod's own address are dropped (plaintext_in in huskctl status)";
        return broken(NAME, cause, remedy, vec![own]);
    }
    passes(NAME, vec![own])
}

pub(super) fn nat(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Nat;
    if let Some(pod) = &evidence.mapped_to {
        return passes(
            NAME,
            vec![format!("this port of the host leads to {pod}; trace that pod's port for the rest of the way")],
        );
    }
    let leaves = matches!(evidence.destination.place, Place::External | Place::OtherNode { .. });
    if evidence.source.place != Place::PodHere || !leaves || evidence.is_in_cluster(evidence.destination.address) {
        return not_here(NAME, "addresses stay as they are");
    }
    let interface = match &evidence.route {
        Some(RouteEvidence { way: Ok(Way::Leaves { interface, .. }), .. }) => interface,
        _ => return not_here(NAME, "it does not get that far"),
    };
    let told = if evidence.masquerade {
        format!("the source becomes the address of {interface} (masquerade)")
    } else {
        "the source stays the pod's address (masquerade is off): the other side needs a route back".to_owned()
    };
    passes(NAME, vec![told])
}
