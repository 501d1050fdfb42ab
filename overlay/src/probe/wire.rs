//! The payload of probes and their answers, UDP at [`crate::marks::PROBE_PORT`] on both sides.
//!
//! ```text
//! 0               4       5      6          8               12                                20
//! | magic "HUSK"  | version | kind | zero     | size (bytes)  | id                              | zeroes ...
//! ```
//! All numbers are big-endian. A probe is padded with zeroes until the IP packet has the size that stands in it: the
//! receiver compares, so that a packet that was cut short on its way is not taken for one that passed. An answer is not
//! padded, and carries size and id of the probe.

use crate::prefix::Family;

/// First bytes of every message.
const MAGIC: [u8; 4] = *b"HUSK";

/// Version of the format. Others are not answered.
const VERSION: u8 = 1;

/// Bytes of a message without padding.
pub const HEADER: usize = 20;

/// Bytes of a small probe as an IP packet: passes wherever anything does. The tunnel's own handshakes are larger (a
/// WireGuard initiation has 148 bytes of payload).
pub const SMALL: u32 = 128;

/// Bytes of the largest probe there is: what a length field of 16 bits can say in both families.
pub const LARGEST: u32 = 65535;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A question.
    Probe,
    /// Its answer.
    Answer,
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What it is.
    pub kind: Kind,
    /// Bytes of the probe as an IP packet, its header included.
    pub size: u32,
    /// What belongs together.
    pub id: u64,
}

/// Bytes that IP (RFC 791, without options; RFC 8200, without extensions) and UDP (RFC 768) take from a packet.
#[must_use]
pub fn headers(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 20 + 8,
        Family::Ipv6 => 40 + 8,
    }
}

/// Bytes of UDP payload of a probe of this size; at least [`HEADER`].
#[must_use]
pub fn payload(family: Family, size: u32) -> usize {
    usize::try_from(size.min(LARGEST).saturating_sub(headers(family))).map_or(HEADER, |payload| payload.max(HEADER))
}

/// The probe as UDP payload: as long as its size demands.
#[must_use]
pub fn probe(family: Family, size: u32, id: u64) -> Vec<u8> {
    let mut bytes = header(Message { kind: Kind::Probe, size, id }).to_vec();
    bytes.resize(payload(family, size), 0);
    bytes
}

/// The answer to a probe.
#[must_use]
pub fn answer(probe: Message) -> [u8; HEADER] {
    header(Message { kind: Kind::Answer, ..probe })
}

fn header(message: Message) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = VERSION;
    bytes[5] = match message.kind {
        Kind::Probe => 1,
        Kind::Answer => 2,
    };
    bytes[8..12].copy_from_slice(&message.size.to_be_bytes());
    bytes[12..].copy_from_slice(&message.id.to_be_bytes());
    bytes
}

/// Reads a UDP payload that came in a packet of this family. None for what is no message, of another version, or of another
/// length than it should have.
#[must_use]
pub fn read(family: Family, bytes: &[u8]) -> Option<Message> {
    let (header, padding) = bytes.split_first_chunk::<HEADER>()?;
    let (magic, rest) = header.split_first_chunk::<4>()?;
    let [VERSION, kind, 0, 0, rest @ ..] = rest else { return None };
    let (size, id) = rest.split_first_chunk::<4>()?;
    let (size, id) = (u32::from_be_bytes(*size), u64::from_be_bytes(*id.first_chunk()?));
    let (kind, length) = match kind {
        1 => (Kind::Probe, payload(family, size)),
        2 => (Kind::Answer, HEADER),
        _ => return None,
    };
    // The padding itself is not looked at: it costs more than it tells.
    (*magic == MAGIC && HEADER + padding.len() == length).then_some(Message { kind, size, id })
}
