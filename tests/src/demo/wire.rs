//! What the underlay's capture says, and what it has to say in each mode.
//!
//! A capture that sees no plaintext proves something only if it would have seen it. The control is in the same trace:
//! what pods send to the outside is masqueraded and leaves in the clear, with the same payload.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::mode::Mode;
use husk_overlay::mtu::Stack;
use husk_overlay::prefix::{Family, Prefix};
use serde::Serialize;

use super::report::Failure;
use crate::probe::payload::MARKER;
use crate::{Cluster, Kind, Packet, Trace};

/// What passed from before the first daemon started until the last question was answered.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Wire {
    pub(super) packets: usize,
    /// The length of the largest IP packet, in bytes.
    pub(super) largest_packet: usize,
    /// Packets that are fragments.
    pub(super) fragments: usize,
    /// By kind, the outside's excepted.
    pub(super) between_hosts: BTreeMap<String, Count>,
    /// Packets to and from addresses beyond the cluster.
    pub(super) outside: Count,
    /// The kinds that have no business on this mode's underlay.
    pub(super) unexpected: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Count {
    pub(super) packets: usize,
    /// Those that show addresses of pods.
    pub(super) readable: usize,
    /// Those that show what pods sent.
    pub(super) with_marker: usize,
}

impl Count {
    fn add(&mut self, packet: &Packet, cidrs: &[Prefix]) {
        let in_cluster = |address: IpAddr| cidrs.iter().any(|cidr| cidr.contains(address));
        self.packets += 1;
        self.readable += usize::from(packet.readable().any(in_cluster));
        self.with_marker += usize::from(packet.contains(MARKER));
    }

    fn plus(self, other: &Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            readable: self.readable + other.readable,
            with_marker: self.with_marker + other.with_marker,
        }
    }
}

/// Counts what a trace holds.
pub(super) fn summary(trace: &Trace, cluster: &Cluster, mode: Mode) -> Wire {
    let outside = Family::ALL.map(Cluster::outside_address);
    let mut wire = Wire {
        packets: trace.packets().len(),
        largest_packet: trace.largest(),
        fragments: trace.fragments(),
        ..Wire::default()
    };
    let mut unexpected = BTreeMap::new();
    for packet in trace.packets() {
        let is_outside = packet.addresses.is_some_and(|(from, to)| outside.contains(&from) || outside.contains(&to));
        if is_outside {
            wire.outside.add(packet, cluster.cluster_cidrs());
            continue;
        }
        wire.between_hosts.entry(packet.kind.to_string()).or_default().add(packet, cluster.cluster_cidrs());
        if !belongs(packet.kind, mode) {
            *unexpected.entry(packet.kind.to_string()).or_insert(0) += 1;
        }
    }
    wire.unexpected = unexpected.into_iter().map(|(kind, count)| format!("{count} of kind {kind}")).collect();
    wire
}

/// What a mode sends between hosts, with what any link needs.
fn belongs(kind: Kind, mode: Mode) -> bool {
    match kind {
        Kind::Arp | Kind::NeighbourDiscovery | Kind::MulticastListener => true,
        Kind::Wireguard => mode.uses_wireguard(),
        // Within ESP nobody sees it.
        Kind::Vxlan => mode == Mode::Vxlan,
        Kind::Esp => mode.uses_esp(),
        Kind::Icmp | Kind::Tcp | Kind::Udp => mode == Mode::Direct,
        Kind::EspInUdp | Kind::Fragment | Kind::OtherIp | Kind::Other => false,
    }
}

impl Wire {
    /// Everything between hosts.
    pub(super) fn total(&self) -> Count {
        self.between_hosts.values().fold(Count::default(), Count::plus)
    }

    /// What does not hold and should in this mode; `full` is the length of the largest packet that fits the underlay's MTU.
    pub(super) fn problems(&self, mode: Mode, full: usize) -> Vec<Failure> {
        let total = self.total();
        let mut problems = Vec::new();
        let mut demand = |holds: bool, what: &str, expected: String, got: String| {
            if !holds {
                let what = format!("the capture on the underlay: {what}");
                problems.push(Failure { what, expected, got });
            }
        };
        demand(self.fragments == 0, "fragments", "none".into(), self.fragments.to_string());
        demand(
            self.largest_packet == full,
            "largest packet",
            format!("{full} bytes: the underlay's MTU is used to the byte and never exceeded"),
            format!("{} bytes", self.largest_packet),
        );
        demand(self.unexpected.is_empty(), "kinds of packets", only(mode), self.unexpected.join(", "));
        demand(
            self.outside.readable == 0,
            "packets to the outside with a pod's address",
            "none, they are masqueraded".into(),
            self.outside.readable.to_string(),
        );
        demand(
            self.outside.with_marker > 0,
            "the control",
            "the payload marker in what goes to the outside; without it the capture proves nothing".into(),
            "it was never seen".into(),
        );
        if mode.encrypted() {
            demand(total.readable == 0, "readable pod packets", "none".into(), total.readable.to_string());
            demand(total.with_marker == 0, "the payload marker", "never".into(), seen(total.with_marker));
        } else {
            demand(
                total.with_marker > 0,
                "the payload marker",
                format!("seen, since mode {mode} does not encrypt"),
                seen(total.with_marker),
            );
        }
        problems
    }
}

fn only(mode: Mode) -> String {
    match mode {
        Mode::Direct => "pod packets and what a link needs".to_owned(),
        // Of more than one layer a capture sees the outermost.
        _ => {
            let outermost = mode.stack(false).0.into_iter().take(1).collect();
            format!("{} and what a link needs", Stack(outermost))
        }
    }
}

fn seen(packets: usize) -> String {
    format!("seen in {packets} packets")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(kind: Kind, with_marker: usize) -> Wire {
        let count = Count { packets: 9, readable: with_marker, with_marker };
        Wire {
            packets: 12,
            largest_packet: 1500,
            between_hosts: BTreeMap::from([(kind.to_string(), count)]),
            outside: Count { packets: 3, readable: 0, with_marker: 3 },
            ..Wire::default()
        }
    }

    #[test]
    fn each_mode_has_its_own_truth() {
        assert!(wire(Kind::Wireguard, 0).problems(Mode::Wireguard, 1500).is_empty());
        assert!(wire(Kind::Esp, 0).problems(Mode::VxlanIpsec, 1500).is_empty());
        assert!(wire(Kind::Vxlan, 5).problems(Mode::Vxlan, 1500).is_empty());
        assert_eq!(wire(Kind::Wireguard, 1).problems(Mode::Wireguard, 1500).len(), 2);
        assert_eq!(wire(Kind::Vxlan, 0).problems(Mode::Vxlan, 1500).len(), 1);
    }

    #[test]
    fn fragments_wasted_bytes_leaks_and_a_blind_capture_are_problems() {
        let sound = wire(Kind::Wireguard, 0);
        for broken in [
            Wire { fragments: 1, ..sound.clone() },
            Wire { largest_packet: 1499, ..sound.clone() },
            Wire { largest_packet: 1501, ..sound.clone() },
            Wire { unexpected: vec!["1 of kind TCP".into()], ..sound.clone() },
            Wire { outside: Count { packets: 3, readable: 1, with_marker: 3 }, ..sound.clone() },
            Wire { outside: Count::default(), ..sound.clone() },
        ] {
            assert_eq!(broken.problems(Mode::Wireguard, 1500).len(), 1, "{broken:?}");
        }
    }

    #[test]
    fn plaintext_belongs_on_the_wire_of_direct_mode_only() {
        for kind in [Kind::Tcp, Kind::Udp, Kind::Icmp] {
            assert!(belongs(kind, Mode::Direct) && !belongs(kind, Mode::Wireguard) && !belongs(kind, Mode::Vxlan));
        }
        assert!(belongs(Kind::Wireguard, Mode::Wireguard) && !belongs(Kind::Vxlan, Mode::Wireguard));
        assert!(belongs(Kind::Esp, Mode::Ipsec) && !belongs(Kind::Esp, Mode::Wireguard));
        assert!(belongs(Kind::Esp, Mode::VxlanIpsec) && !belongs(Kind::Vxlan, Mode::VxlanIpsec));
    }
}
