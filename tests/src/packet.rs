//! One captured packet and what can be told from its headers.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::SystemTime;

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use nix::libc;

/// Ports of the WireGuard devices, one for each key generation.
const WIREGUARD_PORTS: RangeInclusive<u16> = 51820..=51821;

/// The port of VXLAN (RFC 7348).
const VXLAN_PORT: u16 = 4789;

/// The port of ESP in UDP (RFC 3948).
const ESP_PORT: u16 = 4500;

/// Length of a VXLAN header.
const VXLAN_HEADER: usize = 8;

/// What a packet is, as far as anybody on the wire can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Address resolution for IPv4.
    Arp,
    /// Address resolution and router discovery for IPv6.
    NeighbourDiscovery,
    /// Multicast listener reports, IGMP of IPv4 or MLD of IPv6.
    MulticastListener,
    /// A WireGuard message on a WireGuard port.
    Wireguard,
    /// VXLAN.
    Vxlan,
    /// ESP.
    Esp,
    /// ESP in UDP (RFC 3948).
    EspInUdp,
    /// Any other ICMP, of either version.
    Icmp,
    /// TCP.
    Tcp,
    /// Any other UDP.
    Udp,
    /// A fragment other than the first, which has no transport header.
    Fragment,
    /// Any other IP packet.
    OtherIp,
    /// No IP packet.
    Other,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Arp => "ARP",
            Self::NeighbourDiscovery => "IPv6 neighbour discovery",
            Self::MulticastListener => "multicast listener report",
            Self::Wireguard => "WireGuard",
            Self::Vxlan => "VXLAN",
            Self::Esp => "ESP",
            Self::EspInUdp => "ESP in UDP",
            Self::Icmp => "ICMP",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Fragment => "IP fragment",
            Self::OtherIp => "other IP",
            Self::Other => "no IP",
        })
    }
}

/// A captured packet.
#[derive(Debug, Clone)]
pub struct Packet {
    /// When it was read.
    pub at: SystemTime,
    /// True if the captured interface sent it.
    pub outgoing: bool,
    /// True if `bytes` begins with an Ethernet header, false if with an IP header.
    pub ethernet: bool,
    /// All of it.
    pub bytes: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Source and destination of the outermost IP header.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Source and destination port, if the outermost IP packet is TCP or UDP.
    pub ports: Option<(u16, u16)>,
    /// Length of the outermost IP packet as its header says; 0 if there is none.
    pub ip_length: usize,
    /// True if it is a fragment of an IP packet (IPv4: MF or an offset; IPv6: a fragment header), first or later.
    pub fragment: bool,
    /// True if it is an IPv4 packet that says of itself that no router may cut it (DF), outermost. None of IPv6 ever may be.
    pub dont_fragment: bool,
    /// Source and destination of the IP packet within VXLAN.
    pub inner_addresses: Option<(IpAddr, IpAddr)>,
    /// Where in `bytes` the ESP header begins, if there is one.
    pub esp_at: Option<usize>,
}

impl Packet {
    /// True if these bytes occur anywhere in it.
    #[must_use]
    pub fn contains(&self, bytes: &[u8]) -> bool {
        self.bytes.windows(bytes.len()).any(|window| window == bytes)
    }

    /// True if it was sent from one of these addresses to the other, outermost.
    #[must_use]
    pub fn is_between(&self, one: IpAddr, other: IpAddr) -> bool {
        self.addresses == Some((one, other)) || self.addresses == Some((other, one))
    }

    /// The addresses that anybody on the wire can read: those of the outermost IP header and those within VXLAN.
    pub fn readable(&self) -> impl Iterator<Item = IpAddr> {
        let pairs = self.addresses.into_iter().chain(self.inner_addresses);
        pairs.flat_map(|(source, destination)| [source, destination])
    }

    /// The packet that this one gives back, if it is an ICMP error that tells of a closed port (RFC 792: type 3, code 3;
    /// RFC 4443 section 3.1: type 1, code 4).
    #[must_use]
    pub fn of_closed_port(&self) -> Option<Self> {
        let sliced = if self.ethernet {
            LaxSlicedPacket::from_ethernet(&self.bytes).ok()?
        } else {
            LaxSlicedPacket::from_ip(&self.bytes).ok()?
        };
        let quoted = match &sliced.transport {
            Some(TransportSlice::Icmpv4(icmp)) if icmp.slice().starts_with(&[3, 3]) => icmp.payload(),
            Some(TransportSlice::Icmpv6(icmp)) if icmp.slice().starts_with(&[1, 4]) => icmp.payload(),
            _ => return None,
        };
        Some(parse(self.at, libc::ARPHRD_NONE, self.outgoing, quoted))
    }

    /// A WireGuard packet without content, by its length: that of its header and authenticator (WireGuard paper, section
    /// 5.4.6), in UDP.
    #[must_use]
    pub fn is_keepalive(&self) -> bool {
        let header = if self.addresses.is_some_and(|(source, _)| source.is_ipv6()) { 40 } else { 20 };
        self.kind == Kind::Wireguard && self.ip_length == header + 8 + 32
    }

    /// The SPI, if it is an ESP packet.
    #[must_use]
    pub fn spi(&self) -> Option<u32> {
        let spi = self.bytes.get(self.esp_at?..)?.first_chunk()?;
        Some(u32::from_be_bytes(*spi))
    }
}

/// Reads the headers of a packet; what cannot be read is of the kind `Other`.
pub(crate) fn parse(at: SystemTime, hardware: u16, outgoing: bool, bytes: &[u8]) -> Packet {
    let ethernet = matches!(hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK);
    let mut packet = Packet {
        at,
        outgoing,
        ethernet,
        bytes: bytes.to_owned(),
        kind: Kind::Other,
        addresses: None,
        ports: None,
        ip_length: 0,
        fragment: false,
        dont_fragment: false,
        inner_addresses: None,
        esp_at: None,
    };
    let sliced =
        if ethernet { LaxSlicedPacket::from_ethernet(bytes).ok() } else { LaxSlicedPacket::from_ip(bytes).ok() };
    let Some(sliced) = sliced else { return packet };
    packet.addresses = sliced.net.as_ref().and_then(addresses);
    let protocol = match &sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            packet.ip_length = ip.header().total_len().into();
            packet.fragment = ip.header().is_fragmenting_payload();
            packet.dont_fragment = ip.header().dont_fragment();
            ip.payload_ip_number()
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            packet.ip_length = 40 + usize::from(ip.header().payload_length());
            // An atomic fragment (no offset, no more to come) fragments nothing.
            packet.fragment = ip.is_payload_fragmented();
            ip.payload().ip_number
        }
        Some(LaxNetSlice::Arp(_)) => {
            packet.kind = Kind::Arp;
            return packet;
        }
        None => return packet,
    };
    packet.kind = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            packet.ports = Some((tcp.source_port(), tcp.destination_port()));
            Kind::Tcp
        }
        Some(TransportSlice::Udp(udp)) => {
            let ports = (udp.source_port(), udp.destination_port());
            packet.ports = Some(ports);
            udp_kind(ports, udp.payload())
        }
        Some(TransportSlice::Icmpv6(icmp)) => match icmp.slice().first() {
            Some(133..=137) => Kind::NeighbourDiscovery,
            Some(130..=132 | 143) => Kind::MulticastListener,
            _ => Kind::Icmp,
        },
        Some(TransportSlice::Icmpv4(_)) => Kind::Icmp,
        Some(TransportSlice::Igmp(_)) => Kind::MulticastListener,
        None if protocol == IpNumber::ENCAPSULATING_SECURITY_PAYLOAD => Kind::Esp,
        None if packet.fragment => Kind::Fragment,
        None => Kind::OtherIp,
    };
    packet.esp_at = match (packet.kind, &sliced.net, &sliced.transport) {
        (Kind::EspInUdp, _, Some(TransportSlice::Udp(udp))) => offset(bytes, udp.payload()),
        (Kind::Esp, Some(LaxNetSlice::Ipv4(ip)), _) => offset(bytes, ip.payload().payload),
        (Kind::Esp, Some(LaxNetSlice::Ipv6(ip)), _) => offset(bytes, ip.payload().payload),
        _ => None,
    };
    if let (Kind::Vxlan, Some(TransportSlice::Udp(udp))) = (packet.kind, &sliced.transport) {
        let inner = udp.payload().get(VXLAN_HEADER..).and_then(|inner| LaxSlicedPacket::from_ethernet(inner).ok());
        packet.inner_addresses = inner.and_then(|inner| inner.net.as_ref().and_then(addresses));
    }
    packet
}

fn udp_kind((source, destination): (u16, u16), payload: &[u8]) -> Kind {
    let uses = |port: u16| source == port || destination == port;
    // Type 1 to 4 and three reserved bytes: anything else on this port is not WireGuard's.
    let message = matches!(payload, [1..=4, 0, 0, 0, ..]);
    if message && (WIREGUARD_PORTS.contains(&source) || WIREGUARD_PORTS.contains(&destination)) {
        Kind::Wireguard
    } else if uses(VXLAN_PORT) {
        Kind::Vxlan
    } else if uses(ESP_PORT) && !matches!(payload, [0, 0, 0, 0, ..]) && payload.len() > 8 {
        // Four zeros in the place of the SPI mark IKE, a single byte a keep-alive.
        Kind::EspInUdp
    } else {
        Kind::Udp
    }
}

fn addresses(net: &LaxNetSlice<'_>) -> Option<(IpAddr, IpAddr)> {
    match net {
        LaxNetSlice::Ipv4(ip) => Some((ip.header().source_addr().into(), ip.header().destination_addr().into())),
        LaxNetSlice::Ipv6(ip) => Some((ip.header().source_addr().into(), ip.header().destination_addr().into())),
        LaxNetSlice::Arp(_) => None,
    }
}

/// Where `part`, a slice of `whole`, begins within it.
pub(crate) fn offset(whole: &[u8], part: &[u8]) -> Option<usize> {
    // Behind the IP packet there may be padding of the Ethernet frame: the end does not tell.
    let at = part.as_ptr().addr().checked_sub(whole.as_ptr().addr())?;
    (at < whole.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4, icmpv6};

    use super::*;

    fn read(bytes: &[u8]) -> Packet {
        parse(SystemTime::UNIX_EPOCH, libc::ARPHRD_NONE, false, bytes)
    }

    /// A WireGuard packet of a length, and the answer of a host that has nothing at its port.
    fn refused(length: usize) -> [(Vec<u8>, Packet); 2] {
        let mut message = vec![0; length];
        message[0] = 4;
        let (mut sent, mut answer) = (Vec::new(), Vec::new());
        let (one, other) = ([192, 0, 2, 1], [192, 0, 2, 2]);
        PacketBuilder::ipv4(one, other, 64).udp(51820, 51821).write(&mut sent, &message).expect("a packet");
        let unreachable = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
        PacketBuilder::ipv4(other, one, 64).icmpv4(unreachable).write(&mut answer, &sent).expect("a packet");
        let over_ipv4 = (sent, read(&answer));

        let (mut sent, mut answer) = (Vec::new(), Vec::new());
        let (one, other) = ([1; 16], [2; 16]);
        PacketBuilder::ipv6(one, other, 64).udp(51820, 51821).write(&mut sent, &message).expect("a packet");
        let unreachable = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
        PacketBuilder::ipv6(other, one, 64).icmpv6(unreachable).write(&mut answer, &sent).expect("a packet");
        [over_ipv4, (sent, read(&answer))]
    }

    #[test]
    fn a_closed_port_gives_back_what_came() {
        for (sent, answer) in refused(32).into_iter().chain(refused(48)) {
            assert_eq!(answer.kind, Kind::Icmp);
            let quoted = answer.of_closed_port().expect("what was sent");
            assert_eq!((&quoted.bytes, quoted.kind), (&sent, Kind::Wireguard));
            assert!(read(&sent).of_closed_port().is_none());
        }
    }

    #[test]
    fn only_a_packet_without_content_is_a_keepalive() {
        let keepalive =
            |length| refused(length).map(|(sent, answer)| (read(&sent).is_keepalive(), answer.is_keepalive()));
        assert_eq!(keepalive(32), [(true, false); 2]);
        assert_eq!(keepalive(48), [(false, false); 2]);
    }
}
