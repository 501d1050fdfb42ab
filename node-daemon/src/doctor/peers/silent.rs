//! A peer that does not answer probes: what kernel and network say about it, and what that means.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::{echo, neighbours, underlay};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::record::DualStack;

use super::EXAMINED;
use crate::doctor::words::age;
use crate::doctor::{Evidence, Unknown};
use crate::knock::knock;
use crate::report::PeerReport;
use crate::trace::Knock;

/// The port at which a host is knocked at on the underlay: the kubelet's (Kubernetes documentation, "Ports and Protocols"), which
/// firewalls of nodes let pass. A host without one refuses, which is an answer, too.
const KUBELET_PORT: u16 = 10_250;

/// A peer that does not answer, and what was found out about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Silent {
    pub(super) node: NodeName,
    pub(super) address: IpAddr,
    /// This host has a route to the address, and whether it leads there without a router.
    pub(super) route: Option<OnLink>,
    /// How it was asked.
    pub(super) by: Means,
    /// The address answers; none if it could not be asked.
    pub(super) host_answers: Option<bool>,
    /// Nobody on the link says that he has the address.
    pub(super) neighbour_failed: bool,
    /// An address of its inside the overlay answers.
    pub(super) tunnel_answers: bool,
}

type OnLink = bool;

/// How a host is asked whether it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// An ICMP echo.
    Ping,
    /// An attempt to connect to a TCP port, which the host's kernel accepts or refuses. It takes no privilege, and a firewall drops it
    /// more often than a ping.
    Knock,
}

/// What is wrong with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    NoRoute,
    HostDown,
    HostSilent,
    TunnelBlocked,
    DaemonSilent,
    /// All of it may be well: a rule of this host drops probes.
    ProbesDropped,
    /// Nothing could be sent that would tell.
    Undecided,
}

impl Silent {
    /// What is wrong with it, if a rule of this host drops the nodes' probes, or does not.
    pub(super) fn verdict(&self, mode: Mode, probes_dropped: impl FnOnce() -> bool) -> Verdict {
        match self.of_answers(mode) {
            Verdict::DaemonSilent if probes_dropped() => Verdict::ProbesDropped,
            verdict => verdict,
        }
    }

    fn of_answers(&self, mode: Mode) -> Verdict {
        match self {
            Self { tunnel_answers: true, .. } => Verdict::DaemonSilent,
            Self { route: None, .. } => Verdict::NoRoute,
            Self { host_answers: Some(true), .. } if mode.tunnelled() => Verdict::TunnelBlocked,
            // Without a tunnel the daemon is all that could be silent, or the port of probes is closed.
            Self { host_answers: Some(true), .. } => Verdict::DaemonSilent,
            Self { neighbour_failed: true, route: Some(true), .. } => Verdict::HostDown,
            Self { host_answers: Some(false), .. } => Verdict::HostSilent,
            Self { host_answers: None, .. } => Verdict::Undecided,
        }
    }
}

/// Asks kernel and network about peers that do not answer.
pub(super) fn examine(evidence: &Evidence, silent: &[PeerReport]) -> Result<Vec<Silent>, Unknown> {
    let addresses: BTreeMap<&NodeName, IpAddr> =
        evidence.mtu()?.iter().filter_map(|row| Some((&row.node, row.address?))).collect();
    let examined: Vec<(&PeerReport, IpAddr)> =
        silent.iter().filter_map(|peer| Some((peer, *addresses.get(&peer.node)?))).take(EXAMINED).collect();
    let hosts: BTreeSet<IpAddr> = examined.iter().map(|(_, address)| *address).collect();
    let inside: BTreeSet<IpAddr> = examined.iter().flat_map(|(peer, _)| peer.router.iter()).collect();
    let mut socket = Socket::open(Protocol::Route)?;
    let routes = underlay::routes(&mut socket, DualStack::default(), hosts.iter().copied())?;
    let all: BTreeSet<IpAddr> = hosts.union(&inside).copied().collect();
    let (by, answers) = match echo::answering(&all) {
        Ok(answered) => (Means::Ping, all.iter().map(|address| (*address, answered.contains(address))).collect()),
        // A container without CAP_NET_RAW, on a host whose ping_group_range leaves root out.
        Err(_) => {
            let on_underlay = hosts.iter().map(|address| SocketAddr::new(*address, KUBELET_PORT));
            // Husk itself drops what comes to this port from anywhere but the tunnel.
            let through_tunnel = inside.iter().map(|address| SocketAddr::new(*address, PROBE_PORT));
            (Means::Knock, knock_at_all(on_underlay.chain(through_tunnel)))
        }
    };
    // After that, which makes the kernel ask for neighbours.
    let failed = neighbours::failed(&mut socket)?;
    let answer_of = |address: &IpAddr| answers.get(address).copied();
    let silent = |(peer, address): (&PeerReport, IpAddr)| Silent {
        node: peer.node.clone(),
        address,
        route: routes.get(&address).map(|route| route.on_link),
        by,
        host_answers: answer_of(&address),
        neighbour_failed: failed.contains(&address),
        tunnel_answers: peer.router.iter().any(|inside| answer_of(&inside) == Some(true)),
    };
    Ok(examined.into_iter().map(silent).collect())
}

/// What was seen of it, a line.
pub(super) fn evidence_of(one: &Silent, report: Option<&PeerReport>) -> String {
    let how = match one.by {
        Means::Ping => "a ping",
        Means::Knock => "an attempt to connect",
    };
    let mut told = vec![match one.host_answers {
        Some(true) => format!("answers {how}"),
        Some(false) if one.neighbour_failed => format!("does not answer {how}, and nobody on the link has the address"),
        Some(false) => format!("does not answer {how}"),
        None => "could not be asked".to_owned(),
    }];
    if one.tunnel_answers {
        told.push("and so does its address inside the overlay".into());
    }
    if one.by == Means::Knock {
        told.push("pings may not be sent from here (net.ipv4.ping_group_range, CAP_NET_RAW)".into());
    }
    if let Some(report) = report {
        let since = report.handshake_age.map(|seconds| format!("last handshake {} ago", age(seconds)));
        told.extend(since);
        if let (Some(sent), Some(received)) = (report.sent, report.received) {
            told.push(format!("{sent} bytes sent, {received} received"));
        }
        let probes = report.paths.values().fold((0, 0), |sum, it| (sum.0 + it.sent, sum.1 + it.answered));
        told.push(format!("{} of {} probes answered", probes.1, probes.0));
    }
    format!("{} ({}): {}", one.node, one.address, told.join(", "))
}

/// Which of these addresses answer an attempt to connect, asked all at once; without those that could not be asked.
fn knock_at_all(addresses: impl Iterator<Item = SocketAddr>) -> BTreeMap<IpAddr, bool> {
    let knocking =
        addresses.map(|at| (at.ip(), thread::Builder::new().name("knock".into()).spawn(move || knock(at)).ok()));
    // All are under way before the first is waited for.
    let knocking: Vec<_> = knocking.collect();
    let found = knocking.into_iter().filter_map(|(address, knock)| Some((address, knock?.join().ok().flatten()?)));
    found.map(|(address, knock)| (address, knock == Knock::Answered)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Silent {
        Silent {
            node: NodeName::new("beta").unwrap(),
            address: "192.0.2.2".parse().unwrap(),
            route: Some(true),
            by: Means::Ping,
            host_answers: Some(false),
            neighbour_failed: false,
            tunnel_answers: false,
        }
    }

    #[test]
    fn what_answers_tells_what_does_not() {
        let up = Silent { host_answers: Some(true), ..silent() };
        assert_eq!(up.verdict(Mode::Wireguard, || false), Verdict::TunnelBlocked);
        assert_eq!(
            up.verdict(Mode::Direct, || false),
            Verdict::DaemonSilent,
            "there is no tunnel that could be blocked"
        );
        let through = Silent { tunnel_answers: true, ..up.clone() };
        assert_eq!(through.verdict(Mode::Wireguard, || false), Verdict::DaemonSilent);
        // It is this host that does not let them ask each other.
        assert_eq!(through.verdict(Mode::Wireguard, || true), Verdict::ProbesDropped);
        assert_eq!(up.verdict(Mode::Wireguard, || true), Verdict::TunnelBlocked);
        assert_eq!(Silent { neighbour_failed: true, ..silent() }.verdict(Mode::Vxlan, || false), Verdict::HostDown);
        assert_eq!(
            Silent { neighbour_failed: true, route: Some(false), ..silent() }.verdict(Mode::Vxlan, || false),
            Verdict::HostSilent
        );
        assert_eq!(silent().verdict(Mode::Vxlan, || false), Verdict::HostSilent);
        assert_eq!(Silent { route: None, ..silent() }.verdict(Mode::Vxlan, || false), Verdict::NoRoute);
        assert_eq!(Silent { host_answers: None, ..silent() }.verdict(Mode::Vxlan, || false), Verdict::Undecided);
    }

    #[test]
    fn who_may_not_ping_knocks_and_says_so() {
        let up = Silent { by: Means::Knock, host_answers: Some(true), ..silent() };
        let told = evidence_of(&up, None);
        assert!(told.starts_with("beta (192.0.2.2): answers an attempt to connect, pings may not be sent"), "{told}");
        // A closed port is an answer.
        let local = SocketAddr::from(([127, 0, 0, 1], 1));
        assert_eq!(knock_at_all([local].into_iter()).get(&local.ip()), Some(&true));
    }
}
