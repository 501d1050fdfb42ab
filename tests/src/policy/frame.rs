//! Packets as octets: whatever a pod could send, from its address or another's, without anybody who listens or answers.
//!
//! Every packet ends with the number of the probe that it belongs to.

use std::net::IpAddr;

use husk_overlay::mac::MacAddress;

use super::Flow;

/// Octets of an Ethernet header.
const ETHERNET: usize = 14;

/// EtherType for local experiments (IEEE 802): a frame that is no packet, which no policy knows.
const SENTINEL: u16 = 0x88b5;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// What a packet is to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The first one.
    Begin,
    /// The one that answers it.
    Answer,
}

/// A packet.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// Its connection.
    pub flow: Flow,
    /// Port of who began it.
    pub port: u16,
    /// Which of its packets.
    pub part: Part,
    /// Number.
    pub number: u32,
}

impl Probe {
    /// Source and destination of the packet.
    #[must_use]
    pub fn addresses(&self) -> (IpAddr, IpAddr) {
        match self.part {
            Part::Begin => (self.flow.from, self.flow.to),
            Part::Answer => (self.flow.to, self.flow.from),
        }
    }

    /// The frame that carries it from one Ethernet address to another.
    #[must_use]
    pub fn frame(&self, from: MacAddress, to: MacAddress) -> Vec<u8> {
        let addresses = self.addresses();
        let payload = self.transport(addresses);
        let length = u16::try_from(payload.len()).expect("packets are short");
        let protocol = self.flow.protocol;
        let (kind, header) = match addresses {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = (length + 20).to_be_bytes();
                let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, protocol, 0, 0];
                header.extend(source.octets().into_iter().chain(destination.octets()));
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                (IPV4, header)
            }
            (source, destination) => {
                let length = length.to_be_bytes();
                let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
                header.extend(octets(source).into_iter().chain(octets(destination)));
                (IPV6, header)
            }
        };
        let mut frame = ethernet(from, to, kind);
        frame.extend(header);
        frame.extend(payload);
        frame
    }

    fn transport(&self, addresses: (IpAddr, IpAddr)) -> Vec<u8> {
        let answer = self.part == Part::Answer;
        let (source, destination) = if answer { (self.flow.port, self.port) } else { (self.port, self.flow.port) };
        let mut all: Vec<u8> = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        let number = self.number.to_be_bytes();
        let checksum_at = match self.flow.protocol {
            6 => {
                // The peer's sequence number is that of its probe, with four octets of payload and SYN.
                let acknowledged = if answer { FIRST_SEQUENCE + 5 } else { 0 };
                all.extend([FIRST_SEQUENCE.to_be_bytes(), acknowledged.to_be_bytes()].concat());
                all.extend([0x50, if answer { 0x12 } else { 0x02 }, 0xff, 0xff, 0, 0, 0, 0]);
                Some(16)
            }
            17 => {
                all.extend([0, 12, 0, 0]);
                Some(6)
            }
            132 => return self.sctp(all),
            1 | 58 => {
                let kind = match (self.flow.protocol, answer) {
                    (1, false) => 8,
                    (1, true) => 0,
                    (_, false) => 128,
                    (_, true) => 129,
                };
                let identifier = self.port.to_be_bytes();
                all = vec![kind, 0, 0, 0, identifier[0], identifier[1], 0, 1];
                Some(2)
            }
            _ => {
                all.clear();
                None
            }
        };
        all.extend(number);
        if let Some(at) = checksum_at {
            let mut covered = all.clone();
            if self.flow.protocol != 1 {
                // The pseudo-header, in whatever order: addresses, length and protocol.
                covered.resize(covered.len().next_multiple_of(2), 0);
                covered.extend(octets(addresses.0).into_iter().chain(octets(addresses.1)));
                covered.extend(u16::try_from(all.len()).expect("packets are short").to_be_bytes());
                covered.extend([0, self.flow.protocol]);
            }
            let sum = checksum(&covered);
            all[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        all
    }

    /// INIT, or INIT ACK (RFC 9260, section 3.3): the last field of both is the initial TSN.
    fn sctp(&self, mut all: Vec<u8>) -> Vec<u8> {
        let answer = self.part == Part::Answer;
        let tag: u32 = if answer { FIRST_SEQUENCE } else { 0 };
        all.extend(tag.to_be_bytes());
        all.extend([0; 4]);
        all.extend([if answer { 2 } else { 1 }, 0, 0, 20]);
        all.extend(FIRST_SEQUENCE.to_be_bytes());
        all.extend([0, 1, 0, 0, 0, 1, 0, 1]);
        all.extend(self.number.to_be_bytes());
        let sum = crc32c(&all);
        all[8..12].copy_from_slice(&sum.to_le_bytes());
        all
    }
}

/// Sequence number, or verification tag, of whoever begins.
const FIRST_SEQUENCE: u32 = 1_000_000;

/// A frame that is no packet, with a number.
#[must_use]
pub fn sentinel(from: MacAddress, to: MacAddress, number: u32) -> Vec<u8> {
    let mut frame = ethernet(from, to, SENTINEL);
    frame.extend(number.to_be_bytes());
    frame
}

/// What arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// A packet, with its source, its destination and what may be the number of a probe.
    Packet(IpAddr, IpAddr, u32),
    /// A frame that is no packet, with its number.
    Sentinel(u32),
}

/// Reads a frame; none for one that nobody here sends.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Heard> {
    let body = frame.get(ETHERNET..)?;
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(body.get(at..at + 16)?).ok()?));
    let length = |at: usize| Some(usize::from(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?])));
    let number = |end: usize| Some(u32::from_be_bytes(body.get(end.checked_sub(4)?..end)?.try_into().ok()?));
    match u16::from_be_bytes([frame[12], frame[13]]) {
        SENTINEL => Some(Heard::Sentinel(number(4)?)),
        IPV4 => Some(Heard::Packet(v4(12)?, v4(16)?, number(length(2)?)?)),
        IPV6 => Some(Heard::Packet(v6(8)?, v6(24)?, number(length(4)? + 40)?)),
        _ => None,
    }
}

fn ethernet(from: MacAddress, to: MacAddress, kind: u16) -> Vec<u8> {
    to.0.into_iter().chain(from.0).chain(kind.to_be_bytes()).collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(it) => it.octets().to_vec(),
        IpAddr::V6(it) => it.octets().to_vec(),
    }
}

/// RFC 1071.
fn checksum(octets: &[u8]) -> u16 {
    let words = octets.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("it was folded")
}

/// RFC 9260, appendix A.
fn crc32c(octets: &[u8]) -> u32 {
    let step = |crc: u32, octet: &u8| {
        (0..8).fold(crc ^ u32::from(*octet), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    };
    !octets.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standards() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // Covered with its own sum, a header sums up to nothing.
        let mut header = vec![0x45, 0, 0, 0x54, 0, 0, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&header), 0);
    }

    #[test]
    fn what_is_sent_is_what_is_read() {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for protocol in [1, 6, 17, 58, 132, 253] {
                let flow = Flow { from, to, protocol, port: 80 };
                let probe = Probe { flow, port: 30_000, part: Part::Begin, number: 0x0102_0304 };
                assert_eq!(read(&probe.frame(mac, mac)), Some(Heard::Packet(from, to, probe.number)));
            }
        }
        assert_eq!(read(&sentinel(mac, mac, 7)), Some(Heard::Sentinel(7)));
    }
}
