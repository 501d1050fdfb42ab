//! What is wrong with peers that do not answer, in words, and what mends it.

use std::net::IpAddr;

use husk_overlay::config::Config;
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;

use super::silent::{Silent, Verdict};
use crate::doctor::words::several;
use crate::doctor::{Action, Finding, Fix, restart};

/// What the tunnel's packets look like on the way.
pub(super) struct Carrier<'a> {
    pub(super) mode: Mode,
    pub(super) config: &'a Config,
    pub(super) own: Option<IpAddr>,
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

/// What is wrong with some peers, and what mends it.
pub(super) fn finding(verdict: Verdict, of: &[&Silent], told: Vec<String>, carrier: &Carrier<'_>) -> Finding {
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
                of.first().map(|one| restart::state_of_node(carrier.config, &one.node)),
                "it is another host",
            );
            Finding::error(cause, told, fix)
        }
        Verdict::ProbesDropped => Finding::error(
            format!(
                "whether {names} can be reached is not known: a rule of this host drops the nodes' probes of each other"
            ),
            told,
            Fix::words("mend what the check foreign-firewall found; the daemons then tell within seconds"),
        ),
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
                "{names} does not answer at all: it is down, its address is another now, or a firewall drops everything"
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
            format!("{names} does not answer, and nothing can be sent from here that would tell why"),
            told,
            Fix::by_hand(
                format!("ping it yourself; if it answers, see that {} passes both ways", carrier.name()),
                [Action::run("ping", ["-c", "3", &first.to_string()])],
                "which of the two it is cannot be told from here",
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
