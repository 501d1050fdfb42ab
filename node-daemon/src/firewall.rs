//! Firewalls of others: which of their rules drops a packet of ours, in whose words that is mended.
//!
//! Nothing of theirs is changed. The checks of [`crate::doctor`] try packets of every kind that the overlay needs; a trace
//! ([`crate::trace`]) those of one connection.

mod remedy;
mod ruleset;

use std::fs;
use std::io;

use husk_overlay::marks;
use husk_overlay::prefix::Family;

pub(crate) use remedy::remedy;
pub(crate) use ruleset::{Packet, Place, Ruleset};

/// IANA protocol numbers.
pub(crate) const UDP: u8 = 17;
pub(crate) const TCP: u8 = 6;
pub(crate) const ESP: u8 = 50;

/// What a packet of ours is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// UDP that carries a tunnel, at this port.
    Udp(u16),
    /// ESP.
    Esp,
    /// Packets of pods that the host forwards.
    Pods,
    /// The host and its pods.
    HostToPod,
    /// Pods and their host.
    PodToHost,
    /// Probes and transfers of the nodes through the tunnel.
    Probe,
}

impl Kind {
    /// A few words, to stand after "drops".
    pub(crate) fn words(self) -> String {
        match self {
            Self::Udp(port) => format!("the tunnels' packets (UDP port {port})"),
            Self::Esp => "the tunnels' packets (ESP)".into(),
            Self::Pods => "packets from or to pods".into(),
            Self::HostToPod => "packets of the host to its pods, such as the kubelet's probes".into(),
            Self::PodToHost => "packets of pods to this host".into(),
            Self::Probe => format!("the nodes' probes of each other (UDP port {})", marks::PROBE_PORT),
        }
    }
}

impl Place {
    /// One sentence: this drops, or may drop, these.
    pub(crate) fn cause(&self, what: &str) -> String {
        let Self { family, table, chain, hook, rule, perhaps } = self;
        let place = match rule {
            Some((handle, _)) => {
                format!("rule {handle} of chain {chain} (nftables table {family} {table}, hook {hook})")
            }
            None => format!("the policy of chain {chain} (nftables table {family} {table}, hook {hook})"),
        };
        let drops = if *perhaps { "may drop" } else { "drops" };
        format!("{place} {drops} {what}")
    }

    /// The rule as it stands there, what can be held against it, and how to see it. `ends` is told between.
    pub(crate) fn evidence(&self, ends: impl IntoIterator<Item = String>) -> Vec<String> {
        let Self { family, table, chain, rule, perhaps, .. } = self;
        let mut evidence = vec![match rule {
            Some((handle, text)) => format!("handle {handle}: {text}"),
            None => format!("chain {chain}: policy drop, and no rule before its end accepts them"),
        }];
        evidence.extend(ends);
        if *perhaps {
            evidence.push(
                "rules before it have matches that cannot be judged (extensions of iptables; addresses and interfaces that only \
                 the daemon tells), and may accept them"
                    .into(),
            );
        }
        evidence.push(format!("seen with: nft --handle list chain {family} {table} {chain}"));
        evidence
    }
}

/// Tables of iptables-legacy, in the calling thread's network namespace. They exist from when a program first asked for them.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn legacy_tables() -> io::Result<Vec<(Family, String)>> {
    let mut found = Vec::new();
    for (family, file) in [(Family::Ipv4, "ip_tables_names"), (Family::Ipv6, "ip6_tables_names")] {
        // `/proc/net` would be that of the first thread's namespace.
        match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(names) => found.extend(names.lines().map(|name| (family, name.trim().to_owned()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}
