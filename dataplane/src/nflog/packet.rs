//! Headers of a packet: who it is from and for, and what it is.
//!
//! IPv4 (RFC 791), IPv6 with its extension headers (RFC 8200), and the first octets of what they carry: ports of TCP, UDP and
//! SCTP, type and code of ICMP. Only the beginning of a packet is needed, and what is missing is left out.

use std::net::IpAddr;

const HOP_BY_HOP: u8 = 0;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;
const SCTP: u8 = 132;

/// Most extension headers that are passed over; no honest packet has as many.
const MOST_EXTENSIONS: usize = 16;

/// A packet, as far as its headers tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IANA protocol number of what it carries.
    pub protocol: u8,
    /// Source and destination port, where the protocol has ports and the packet is no later fragment.
    pub ports: Option<(u16, u16)>,
    /// Type and code of an ICMP message.
    pub icmp: Option<(u8, u8)>,
    /// Octets, with those that were not handed out.
    pub length: u32,
}

impl Packet {
    /// Reads headers; none if it is no IP packet or ends within its first header.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::read_v4(bytes),
            6 => Self::read_v6(bytes),
            _ => None,
        }
    }

    fn read_v4(bytes: &[u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 0x0f) * 4;
        let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
        let offset = u16_at(bytes, 6)? & 0x1fff;
        let payload = if header < 20 || offset != 0 { None } else { bytes.get(header..) };
        let length = u16_at(bytes, 2)?.into();
        Some(Self::new((address(12)?, address(16)?), *bytes.get(9)?, payload, length))
    }

    fn read_v6(bytes: &[u8]) -> Option<Self> {
        let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
        let (source, destination) = (address(8)?, address(24)?);
        let length = u32::from(u16_at(bytes, 4)?) + 40;
        let (protocol, payload) = after_extensions(*bytes.get(6)?, bytes.get(40..));
        Some(Self::new((source, destination), protocol, payload, length))
    }

    fn new((source, destination): (IpAddr, IpAddr), protocol: u8, payload: Option<&[u8]>, length: u32) -> Self {
        let payload = payload.unwrap_or_default();
        let ports = match protocol {
            TCP | UDP | SCTP => u16_at(payload, 0).zip(u16_at(payload, 2)),
            _ => None,
        };
        let icmp = match protocol {
            ICMP | ICMPV6 => payload.first().copied().zip(payload.get(1).copied()),
            _ => None,
        };
        Self { source, destination, protocol, ports, icmp, length }
    }
}

/// What the last extension header is followed by; no payload where that is not in the packet.
fn after_extensions(mut protocol: u8, mut rest: Option<&[u8]>) -> (u8, Option<&[u8]>) {
    for _ in 0..MOST_EXTENSIONS {
        let Some((bytes, next)) = rest.and_then(|bytes| Some((bytes, *bytes.first()?))) else { break };
        let units = |bytes: &[u8]| bytes.get(1).copied().map(usize::from);
        let length = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => units(bytes).map(|units| (units + 1) * 8),
            AUTHENTICATION => units(bytes).map(|units| (units + 2) * 4),
            FRAGMENT => match u16_at(bytes, 2) {
                Some(offset) if offset & 0xfff8 == 0 => Some(8),
                // Of a later fragment the protocol is known, and nothing more.
                _ => return (next, None),
            },
            _ => break,
        };
        rest = length.and_then(|length| bytes.get(length..));
        protocol = next;
    }
    (protocol, rest)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(protocol: u8, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x46, 0, 0, 200, 0, 0];
        bytes.extend(flags.to_be_bytes());
        bytes.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1]);
        bytes.extend(payload);
        bytes
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 100, next, 64];
        for last in [1, 2] {
            bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn ports_stand_behind_the_options_of_ipv4() {
        let packet = Packet::read(&v4(TCP, 0x4000, &[0x30, 0x39, 0, 80])).unwrap();
        assert_eq!((packet.ports, packet.icmp, packet.length), (Some((12345, 80)), None, 200));
        assert_eq!((packet.source, packet.destination), ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()));
        let ping = Packet::read(&v4(ICMP, 0, &[8, 0, 1, 2])).unwrap();
        assert_eq!((ping.protocol, ping.ports, ping.icmp), (ICMP, None, Some((8, 0))));
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let packet = Packet::read(&v4(UDP, 0x2001, &[0x30, 0x39, 0, 80])).unwrap();
        assert_eq!((packet.protocol, packet.ports), (UDP, None));
        let packet = Packet::read(&v6(FRAGMENT, &[UDP, 0, 0, 8, 0, 0, 0, 1, 0x30, 0x39, 0, 80])).unwrap();
        assert_eq!((packet.protocol, packet.ports), (UDP, None));
        let first = Packet::read(&v6(FRAGMENT, &[UDP, 0, 0, 1, 0, 0, 0, 1, 0x30, 0x39, 0, 80])).unwrap();
        assert_eq!(first.ports, Some((12345, 80)));
    }

    #[test]
    fn extension_headers_of_ipv6_are_passed_over() {
        let options = [[DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0], [UDP, 0, 1, 4, 0, 0, 0, 0]].concat();
        let packet = Packet::read(&v6(HOP_BY_HOP, &[&options[..], &[0x30, 0x39, 0, 53]].concat())).unwrap();
        assert_eq!((packet.protocol, packet.ports, packet.length), (UDP, Some((12345, 53)), 140));
        let ping = Packet::read(&v6(ICMPV6, &[128, 0])).unwrap();
        assert_eq!(ping.icmp, Some((128, 0)));
        let cut = Packet::read(&v6(HOP_BY_HOP, &[])).unwrap();
        assert_eq!(cut.ports, None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(version in 0..16_u8, mut bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 0xf;
            }
            let _ = Packet::read(&bytes);
        }

        #[test]
        fn extensions_never_lead_out(kinds in proptest::collection::vec(0..64_u8, 0..200)) {
            let _ = Packet::read(&v6(HOP_BY_HOP, &kinds));
        }
    }
}
