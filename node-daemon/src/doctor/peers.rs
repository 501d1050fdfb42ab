//! Peers that do not answer: whether the host is down, its daemon, or something between the two drops the tunnel's packets.
//!
//! Probes go through the tunnel to the peer's daemon. Where they are not answered, two pings tell more: one to the peer's underlay
//! address, outside of the tunnel, and one to its address inside the overlay, which the peer's kernel answers without the daemon.
//!
//! | underlay answers | tunnel answers | what it is |
//! |---|---|---|
//! | yes | yes | the daemon of the peer does not run |
//! | yes | no | the tunnel's packets are dropped |
//! | no | – | the host is down, or cut off |

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::{echo, neighbours, underlay};
use husk_overlay::config::Config;
use husk_overlay::ipc::Request;
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::probe::Standing;
use husk_overlay::record::DualStack;

use super::issues::{self, Teller};
use super::words::{age, several};
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};
use crate::report::{PeerReport, PeerState, ProbeStarted};

/// The check.
pub(super) const CHECK: Check =
    Check { id: "peers", title: "every peer answers, and nothing drops the tunnel's packets on the way", look };

/// Peers that are looked at one by one: where more do not answer, the first of them tell why.
const EXAMINED: usize = 16;

/// How long an answer to a probe may take.
const ANSWER: Duration = Duration::from_secs(1);

/// A peer that does not answer, and what was found out about it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Silent {
    node: NodeName,
    address: IpAddr,
    /// This host has a route to the address, and whether it leads there without a router.
    route: Option<OnLink>,
    /// The address answers a ping; none if none could be sent.
    host_answers: Option<bool>,
    /// Nobody on the link says that he has the address.
    neighbour_failed: bool,
    /// An address of its inside the overlay answers a ping.
    tunnel_answers: bool,
}

type OnLink = bool;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    NoRoute,
    HostDown,
    HostSilent,
    TunnelBlocked,
    DaemonSilent,
    /// Nothing could be sent that would tell.
    Undecided,
}

impl Silent {
    fn verdict(&self, mode: Mode) -> Verdict {
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

fn look(evidence: &Evidence) -> Looked {
    let peers = evidence.peers()?;
    if peers.is_empty() {
        return Ok(Outcome::does_not_apply("this node is alone in its cluster"));
    }
    let mut findings = issues::findings(evidence, Teller::Peers)?;
    findings.extend(without_keys(peers));
    let silent = still_silent(evidence, peers.iter().filter(|peer| is_silent(peer)).collect())?;
    if !silent.is_empty() {
        findings.extend(of_silent(evidence, &silent)?);
    }
    findings.extend(half_silent(peers));
    let answering = peers.iter().filter(|peer| peer.paths.values().any(|it| it.answered > 0)).count();
    Ok(Outcome::of(findings, format!("{answering} of {} peers have answered", peers.len())))
}

fn is_unreachable(standing: Standing) -> bool {
    standing == Standing::Unreachable
}

/// Nothing that is sent to it is answered.
fn is_silent(peer: &PeerReport) -> bool {
    !peer.paths.is_empty() && peer.paths.values().all(|it| is_unreachable(it.standing))
}

/// Those that do not answer now either: what is known of them may be as old as the time between two checks of a path.
fn still_silent(evidence: &Evidence, silent: Vec<&PeerReport>) -> Result<Vec<PeerReport>, Unknown> {
    if silent.is_empty() {
        return Ok(Vec::new());
    }
    let names: BTreeSet<&NodeName> = silent.iter().map(|peer| &peer.node).collect();
    for peer in names.iter().take(EXAMINED) {
        // One that is not probed any more is not there any more, either.
        let _ = evidence.ask::<ProbeStarted>(&Request::ProbePeer { peer: peer.to_string() });
    }
    thread::sleep(ANSWER);
    let now: Vec<PeerReport> = evidence.ask(&Request::Peers)?;
    Ok(now.into_iter().filter(|peer| names.contains(&peer.node) && is_silent(peer)).collect())
}

fn of_silent(evidence: &Evidence, silent: &[PeerReport]) -> Result<Vec<Finding>, Unknown> {
    let examined = examine(evidence, silent)?;
    let config = evidence.config()?;
    let mode = evidence.status()?.mode;
    let mut by_verdict: BTreeMap<Verdict, Vec<&Silent>> = BTreeMap::new();
    for one in &examined {
        by_verdict.entry(one.verdict(mode)).or_default().push(one);
    }
    let more = silent.len().saturating_sub(examined.len());
    let own = evidence.status()?.addresses.get(config.underlay.family);
    let reports: BTreeMap<&NodeName, &PeerReport> = silent.iter().map(|peer| (&peer.node, peer)).collect();
    let finding = |(verdict, of): (Verdict, Vec<&Silent>)| {
        let mut told: Vec<String> = of.iter().map(|one| evidence_of(one, reports.get(&one.node).copied())).collect();
        if more > 0 {
            told.push(format!("{more} more peers do not answer (huskctl peers), which were not looked at"));
        }
        finding(verdict, &of, told, &Carrier { mode, config, own })
    };
    Ok(by_verdict.into_iter().map(finding).collect())
}

/// Asks kernel and network about peers that do not answer.
fn examine(evidence: &Evidence, silent: &[PeerReport]) -> Result<Vec<Silent>, Unknown> {
    let addresses: BTreeMap<&NodeName, IpAddr> =
        evidence.mtu()?.iter().filter_map(|row| Some((&row.node, row.address?))).collect();
    let examined: Vec<(&PeerReport, IpAddr)> =
        silent.iter().filter_map(|peer| Some((peer, *addresses.get(&peer.node)?))).take(EXAMINED).collect();
    let hosts: BTreeSet<IpAddr> = examined.iter().map(|(_, address)| *address).collect();
    let inside: BTreeSet<IpAddr> = examined.iter().flat_map(|(peer, _)| peer.router.iter()).collect();
    let mut socket = Socket::open(Protocol::Route)?;
    let routes = underlay::routes(&mut socket, DualStack::default(), hosts.iter().copied())?;
    let answers = echo::answering(&hosts.union(&inside).copied().collect());
    // After the pings, which make the kernel ask for neighbours.
    let failed = neighbours::failed(&mut socket)?;
    let answers_ping = |address: &IpAddr| answers.as_ref().is_ok_and(|answers| answers.contains(address));
    let silent = |(peer, address): (&PeerReport, IpAddr)| Silent {
        node: peer.node.clone(),
        address,
        route: routes.get(&address).map(|route| route.on_link),
        host_answers: answers.is_ok().then(|| answers_ping(&address)),
        neighbour_failed: failed.contains(&address),
        tunnel_answers: peer.router.iter().any(|inside| answers_ping(&inside)),
    };
    Ok(examined.into_iter().map(silent).collect())
}

fn evidence_of(one: &Silent, report: Option<&PeerReport>) -> String {
    let mut told = vec![match one.host_answers {
        Some(true) => "answers a ping".to_owned(),
        Some(false) if one.neighbour_failed => {
            "does not answer a ping, and nobody on the link has the address".to_owned()
        }
        Some(false) => "does not answer a ping".to_owned(),
        None => "could not be pinged (neither ping_group_range nor CAP_NET_RAW allows it)".to_owned(),
    }];
    if one.host_answers.is_some() && one.tunnel_answers {
        told.push("and so does its address inside the overlay".into());
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

/// What the tunnel's packets look like on the way.
struct Carrier<'a> {
    mode: Mode,
    config: &'a Config,
    own: Option<IpAddr>,
}

impl Carrier<'_> {
    fn port(&self) -> Option<String> {
        match self.mode {
            Mode::Direct => Some(PROBE_PORT.to_string()),
            Mode::Vxlan => Some(self.config.vxlan.port.to_string()),
            Mode::Wireguard => {
                Some(format!("{}-{}", self.config.wireguard.port_of(0), self.config.wireguard.port_of(1)))
            }
            Mode::Ipsec | Mode::VxlanIpsec => self.config.ipsec.udp_port.map(|port| port.to_string()),
        }
    }

    fn name(&self) -> String {
        match self.port() {
            Some(port) if port.contains('-') => format!("UDP ports {} (both)", port.replace('-', " and ")),
            Some(port) => format!("UDP port {port}"),
            None => "ESP (IP protocol 50)".into(),
        }
    }

    /// A filter of tcpdump.
    fn filter(&self, peer: IpAddr) -> String {
        match self.port() {
            Some(port) if port.contains('-') => format!("udp portrange {port} and host {peer}"),
            Some(port) => format!("udp port {port} and host {peer}"),
            None => format!("esp and host {peer}"),
        }
    }
}

fn finding(verdict: Verdict, of: &[&Silent], told: Vec<String>, carrier: &Carrier<'_>) -> Finding {
    let names: Vec<&NodeName> = of.iter().map(|one| &one.node).collect();
    let names = several(&names);
    let first = of.first().map_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), |one| one.address);
    let watch = |filter: String| Action::run("tcpdump", ["-n", "-i", "any", "-c", "10", &filter]);
    match verdict {
        Verdict::TunnelBlocked => {
            let what = carrier.name();
            let own = carrier.own.map_or_else(|| "this host".to_owned(), |own| own.to_string());
            Finding::error(
                format!(
                    "{what} is blocked between this host and {names}: the hosts answer, and nothing comes through the tunnel"
                ),
                told,
                Fix::by_hand(
                    format!(
                        "allow {what} from {own} to {first} and back, in the firewalls of both hosts (`huskctl \
                         doctor` on each names a rule that drops it), in \
                         those between, and in the cloud's security groups; on both hosts this shows what is sent and what arrives:"
                    ),
                    [watch(carrier.filter(first))],
                    "which firewall it is, and what it is for, this host cannot know",
                ),
            )
        }
        Verdict::DaemonSilent => {
            let cause = if carrier.mode.tunnelled() {
                format!(
                    "the daemon of {names} does not answer, though its host does, through the tunnel too: its pods \
                     go on, and it does not follow what changes"
                )
            } else {
                format!(
                    "{names} does not answer at UDP port {PROBE_PORT}, though its host does: its daemon does not \
                     run, or the port is blocked"
                )
            };
            let fix = Fix::by_hand(
                "start it there, and look at its log; `huskctl doctor` on that host tells more",
                [Action::run_on_host("systemctl", ["status", "huskd"])],
                "it is another host",
            );
            Finding::error(cause, told, fix)
        }
        Verdict::HostDown => Finding::error(
            format!("{names} is down or unplugged: nobody on the link answers for its address"),
            told,
            Fix::words(
                "start the host or plug it in; if it is gone for good, remove it from the cluster: its Node object, \
                 or its record in the source's directory",
            ),
        ),
        Verdict::HostSilent => Finding::error(
            format!(
                "{names} does not answer at all, not even a ping: it is down, its address is another now, or a \
                 firewall drops everything"
            ),
            told,
            Fix::by_hand(
                "look whether the host runs and has this address; how far packets come this shows:",
                [Action::run("tracepath", ["-n", &first.to_string()])],
                "it is another host",
            ),
        ),
        Verdict::NoRoute => Finding::error(
            format!("this host has no route to {names}"),
            told,
            Fix::by_hand(
                "give this host a route to the address: the underlay's network is configured outside of Husk",
                [Action::run("ip", ["route", "get", &first.to_string()])],
                "where it leads only you know",
            ),
        ),
        Verdict::Undecided => Finding::error(
            format!("{names} does not answer, and this process may not ping it"),
            told,
            Fix::by_hand(
                format!("ping it yourself; if it answers, see that {} passes both ways", carrier.name()),
                [Action::run("ping", ["-c", "3", &first.to_string()])],
                "which of the two it is cannot be told from here",
            ),
        ),
    }
}

/// Peers whose keys, or to whom the own ones, are not there yet.
fn without_keys(peers: &[PeerReport]) -> Option<Finding> {
    let waiting: Vec<&NodeName> =
        peers.iter().filter(|peer| peer.state == PeerState::Waiting).map(|peer| &peer.node).collect();
    let first = waiting.first()?;
    Some(Finding::error(
        format!(
            "nothing can be sent to {}: the keys that both sides need are not published or not installed",
            several(&waiting)
        ),
        vec!["huskctl peers: waiting".into()],
        Fix::words(format!(
            "it takes some seconds after a node has joined; if it stays, look at `huskctl keys status` here and on \
             {first}, whose daemon may not run"
        )),
    ))
}

/// Peers that answer in one family and not in the other.
fn half_silent(peers: &[PeerReport]) -> Option<Finding> {
    let half = peers.iter().filter(|peer| !is_silent(peer)).flat_map(|peer| {
        let dead = peer.paths.iter().filter(|(_, it)| is_unreachable(it.standing));
        dead.map(|(family, _)| format!("{} ({family})", peer.node))
    });
    let half: Vec<String> = half.collect();
    if half.is_empty() {
        return None;
    }
    Some(Finding::error(
        "some peers answer in one family of addresses and not in the other, through one tunnel",
        vec![format!("probes not answered by {}", several(&half))],
        Fix::words(
            "run `huskctl doctor` on that peer: a rule of its firewall may drop this family, or its kernel parameter \
             disable_ipv6 is set",
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Silent {
        Silent {
            node: NodeName::new("beta").unwrap(),
            address: "192.0.2.2".parse().unwrap(),
            route: Some(true),
            host_answers: Some(false),
            neighbour_failed: false,
            tunnel_answers: false,
        }
    }

    #[test]
    fn what_answers_tells_what_does_not() {
        let up = Silent { host_answers: Some(true), ..silent() };
        assert_eq!(up.verdict(Mode::Wireguard), Verdict::TunnelBlocked);
        assert_eq!(up.verdict(Mode::Direct), Verdict::DaemonSilent, "there is no tunnel that could be blocked");
        let through = Silent { tunnel_answers: true, ..up.clone() };
        assert_eq!(through.verdict(Mode::Wireguard), Verdict::DaemonSilent);
        assert_eq!(Silent { neighbour_failed: true, ..silent() }.verdict(Mode::Vxlan), Verdict::HostDown);
        assert_eq!(
            Silent { neighbour_failed: true, route: Some(false), ..silent() }.verdict(Mode::Vxlan),
            Verdict::HostSilent
        );
        assert_eq!(silent().verdict(Mode::Vxlan), Verdict::HostSilent);
        assert_eq!(Silent { route: None, ..silent() }.verdict(Mode::Vxlan), Verdict::NoRoute);
        assert_eq!(Silent { host_answers: None, ..silent() }.verdict(Mode::Vxlan), Verdict::Undecided);
    }

    #[test]
    fn the_port_and_protocol_are_those_of_the_mode() {
        let config = Config::new(vec!["10.42.0.0/16".parse().unwrap()]);
        let peer = "192.0.2.2".parse().unwrap();
        let carrier = |mode| Carrier { mode, config: &config, own: None };
        let told = |mode| (carrier(mode).name(), carrier(mode).filter(peer));
        assert_eq!(told(Mode::Vxlan), ("UDP port 4789".into(), "udp port 4789 and host 192.0.2.2".into()));
        let both = ("UDP ports 51820 and 51821 (both)".into(), "udp portrange 51820-51821 and host 192.0.2.2".into());
        assert_eq!(told(Mode::Wireguard), both);
        assert_eq!(told(Mode::Ipsec), ("ESP (IP protocol 50)".into(), "esp and host 192.0.2.2".into()));
        let mut config = config.clone();
        config.ipsec.udp_port = Some(4500);
        assert_eq!(Carrier { mode: Mode::VxlanIpsec, config: &config, own: None }.name(), "UDP port 4500");
    }
}
