//! Whether the underlay told of pods: a capture of everything every host puts on it, from before the first daemon starts
//! until after the last one is gone, in which each packet is searched.
//!
//! A search that finds nothing proves something only if it would have found it. So a watch ends with a control: a packet
//! with the payload's marker that a host sends to the outside as it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_overlay::mode::Mode;

use crate::capture::{Capture, Trace};
use crate::cluster::Cluster;
use crate::packet::{Kind, Packet};
use crate::probe::{Echo, payload};

/// How soon the capture has to show the control.
const CONTROL_LIMIT: Duration = Duration::from_secs(5);

/// A running watch over an underlay.
#[derive(Debug)]
pub struct Leak {
    capture: Capture,
    what: Watched,
}

/// What it looks for.
#[derive(Debug, Clone)]
struct Watched {
    mode: Mode,
    cluster_cidrs: Vec<husk_overlay::prefix::Prefix>,
    outside: Vec<IpAddr>,
}

impl Watched {
    /// What anybody on the wire can read of pods.
    fn offends(&self, packet: &Packet) -> bool {
        let ours = |address| self.cluster_cidrs.iter().any(|cidr| cidr.contains(address));
        (packet.contains(payload::MARKER) && !self.is_control(packet)) || packet.readable().any(ours)
    }

    /// Between hosts and the outside, with nobody's address but theirs.
    fn is_control(&self, packet: &Packet) -> bool {
        packet.addresses.is_some_and(|(from, to)| self.outside.contains(&from) || self.outside.contains(&to))
    }

    fn belongs(&self, packet: &Packet) -> bool {
        self.is_control(packet)
            || match packet.kind {
                Kind::Arp | Kind::NeighbourDiscovery | Kind::MulticastListener => true,
                Kind::Wireguard => self.mode.uses_wireguard(),
                Kind::Esp | Kind::EspInUdp => self.mode.uses_esp(),
                Kind::Vxlan => self.mode == Mode::Vxlan,
                // A device owes a keepalive, 10 s later, to a peer it has received from and has nothing to send to. It may
                // find that the peer's older device is gone, which tells nobody anything. With content it would be a loss.
                Kind::Icmp => self.mode.uses_wireguard() && packet.of_closed_port().is_some_and(|it| it.is_keepalive()),
                _ => false,
            }
    }
}

/// What a watch saw; nothing in it told of pods.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Number of packets of each kind.
    pub kinds: BTreeMap<Kind, usize>,
    /// Packets of kinds that have no business on this mode's underlay.
    pub strange: Vec<Packet>,
    /// Number of fragments.
    pub fragments: usize,
    /// The greatest length of an IP packet, header included.
    pub largest: usize,
    /// All of it.
    pub trace: Trace,
}

impl Leak {
    /// Begins to watch, for a cluster of an encrypted mode whose daemons have not been started.
    ///
    /// # Errors
    /// When the capture cannot be started.
    pub fn watch(cluster: &Cluster) -> Result<Self> {
        let mode = cluster.mode();
        ensure!(mode.encrypted(), "mode {mode} hides nothing");
        let outside = cluster.families().into_iter().map(Cluster::outside_address).collect();
        let what = Watched { mode, cluster_cidrs: cluster.cluster_cidrs().to_vec(), outside };
        Ok(Self { capture: cluster.capture()?, what })
    }

    /// What was seen so far, told of pods or not; for cases that look for more.
    ///
    /// # Errors
    /// When packets were lost.
    pub fn so_far(&self) -> Result<Trace> {
        self.capture.so_far()
    }

    /// Waits until a packet was seen that `question` affirms.
    ///
    /// # Errors
    /// When none was seen within `limit`.
    pub fn wait_for(&self, what: &str, limit: Duration, question: impl Fn(&Packet) -> bool) -> Result<()> {
        self.capture.wait_for(what, limit, question)
    }

    /// Sends the control and ends the watch.
    ///
    /// # Errors
    /// When a packet told of pods, with a capture of all of them in a file, or the control was not seen.
    pub fn finish(self, cluster: &Cluster) -> Result<Seen> {
        let sender = cluster.host(1).netns();
        for to in &self.what.outside {
            Echo::to(*to).run(sender).context("sending the control")?;
        }
        let control = |packet: &Packet| self.what.is_control(packet) && packet.contains(payload::MARKER);
        self.capture.wait_for("the control", CONTROL_LIMIT, control)?;
        let trace = self.capture.stop()?;
        let offenders: Vec<_> = trace.packets().iter().filter(|packet| self.what.offends(packet)).collect();
        if let Some(first) = offenders.first() {
            let dump = std::env::temp_dir().join(format!("husk-leak-{}.pcap", std::process::id()));
            trace.write_pcap(&dump)?;
            bail!("{} packets told of pods, the first {first:?}; all are in {}", offenders.len(), dump.display());
        }
        let strange = trace.packets().iter().filter(|packet| !self.what.belongs(packet)).cloned().collect();
        Ok(Seen { kinds: trace.kinds(), strange, fragments: trace.fragments(), largest: trace.largest(), trace })
    }
}

impl Seen {
    /// Makes sure that there was nothing but what this mode puts on an underlay.
    ///
    /// # Errors
    /// When there was, with those packets.
    pub fn nothing_strange(&self) -> Result<()> {
        ensure!(
            self.strange.is_empty(),
            "{} packets that have no business there: {:?}",
            self.strange.len(),
            self.strange
        );
        Ok(())
    }

    /// Makes sure that the tunnel carried this many packets at least: an underlay on which nothing happens hides everything.
    ///
    /// # Errors
    /// When it did not.
    pub fn with_tunnelled(self, least: usize) -> Result<Self> {
        let tunnelled = |kind: &Kind| matches!(kind, Kind::Wireguard | Kind::Esp | Kind::EspInUdp);
        let seen: usize = self.kinds.iter().filter(|(kind, _)| tunnelled(kind)).map(|(_, count)| count).sum();
        ensure!(seen >= least, "the tunnel carried {seen} packets, so that nothing is proven: {:?}", self.kinds);
        Ok(self)
    }
}
