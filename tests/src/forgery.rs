//! Packet-too-big that nobody had reason to send: anybody can, in a router's name.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use etherparse::icmpv4::DestUnreachableHeader;
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder};
use husk_overlay::mac::MacAddress;
use husk_overlay::prefix::Family;

use crate::host::{Host, UNDERLAY_INTERFACE};
use crate::packet::{Kind, Packet};

/// An error as a host would believe it: a packet of its own was too large for the path to a peer.
#[derive(Debug)]
pub struct Forgery {
    to: [u8; 6],
    own: IpAddr,
    /// The packet that is quoted, from its IP header on.
    quoted: Vec<u8>,
}

impl Forgery {
    /// Quotes a packet of a host to a peer that was on the wire.
    ///
    /// # Errors
    /// When there was none of that kind.
    pub fn of(host: &Host, peer: IpAddr, kind: Kind, trace: &[Packet]) -> Result<Self> {
        let own = host.address(Family::of(peer))?;
        let sent = trace.iter().find(|packet| packet.kind == kind && packet.addresses == Some((own, peer)));
        let sent = sent.with_context(|| format!("{} sent no {kind} packet to {peer}", host.name()))?;
        // As much as a router quotes at least of what it got, and more than the kernel asks for.
        let quoted = sent.bytes[14..].iter().copied().take(120).collect();
        Ok(Self { to: mac(host)?, own, quoted })
    }

    /// Quotes the answer to a ping that nobody ever sent: the kernel answers by itself, so that no socket can tell.
    ///
    /// # Errors
    /// When the two addresses are of two families.
    pub fn of_an_echo(host: &Host, peer: IpAddr) -> Result<Self> {
        let own = host.address(Family::of(peer))?;
        let mut quoted = Vec::new();
        match (own, peer) {
            (IpAddr::V4(own), IpAddr::V4(peer)) => PacketBuilder::ipv4(own.octets(), peer.octets(), 64)
                .icmpv4_echo_reply(7, 7)
                .write(&mut quoted, &[0; 64])?,
            (IpAddr::V6(own), IpAddr::V6(peer)) => PacketBuilder::ipv6(own.octets(), peer.octets(), 64)
                .icmpv6_echo_reply(7, 7)
                .write(&mut quoted, &[0; 64])?,
            _ => bail!("{own} and {peer} are of two families"),
        }
        Ok(Self { to: mac(host)?, own, quoted })
    }

    /// The frame to be delivered to the host, in the name of somebody who is no part of the cluster.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub fn frame(&self, mtu: u16) -> Result<Vec<u8>> {
        let (from, mut frame) = ([2, 0, 0, 0, 0, 9], Vec::new());
        let ethernet = PacketBuilder::ethernet2(from, self.to);
        match self.own {
            IpAddr::V4(own) => {
                let needed = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
                ethernet
                    .ipv4([198, 51, 100, 66], own.octets(), 64)
                    .icmpv4(Icmpv4Type::DestinationUnreachable(needed))
                    .write(&mut frame, &self.quoted)?;
            }
            IpAddr::V6(own) => {
                let stranger = [0x20, 0x01, 0x0d, 0xb8, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x66];
                ethernet
                    .ipv6(stranger, own.octets(), 64)
                    .icmpv6(Icmpv6Type::PacketTooBig { mtu: mtu.into() })
                    .write(&mut frame, &self.quoted)?;
            }
        }
        Ok(frame)
    }
}

fn mac(host: &Host) -> Result<[u8; 6]> {
    let links = host.netns().ip_json(["link", "show", "dev", UNDERLAY_INTERFACE])?;
    let text = links[0]["address"].as_str().with_context(|| format!("{UNDERLAY_INTERFACE} has no Ethernet address"))?;
    let mac: MacAddress = text.parse().with_context(|| format!("{text} is no Ethernet address"))?;
    Ok(mac.0)
}

/// Errors that a host has dropped since it would have to believe that less passes than Husk works with.
///
/// # Errors
/// When its daemon does not answer, or counts none.
pub fn dropped(host: &Host) -> Result<u64> {
    let status = host.huskctl_json(["status"])?;
    status["counters"]["path_mtu_below_floor"]["packets"].as_u64().with_context(|| format!("no counter: {status:#}"))
}
