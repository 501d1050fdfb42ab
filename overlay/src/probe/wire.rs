//! The payload of probes and their answers, UDP at [`crate::marks::PROBE_PORT`] on both sides.
//!
//! ```text
//! 0               4       5      6          8               12                                20
//! | magic "HUSK"  | version | kind | zero     | size (bytes)  | id                              | zeroes ...
//! ```
//! All numbers are big-endian. A probe is padded until the IP packet has the size that stands in it: the receiver compares, so
//! that a packet that was cut short on its way is not taken for one that passed. An answer is not padded, and carries size and
//! id of the probe.
//!
//! An answer of version 2 ends with the wall clock of who answers: microseconds since 1970, 64 bits. Only probes whose padding
//! begins with a 1 get it. A node that knows version 1 alone neither looks at padding nor understands such an answer, so that
//! nodes of both sorts answer each other while a cluster is upgraded.

use std::time::Duration;

use crate::prefix::Family;

/// First bytes of every message.
const MAGIC: [u8; 4] = *b"HUSK";

/// Version of the format. Others are not answered.
const VERSION: u8 = 1;

/// Version of answers that tell the time.
const TIMED: u8 = 2;

/// First byte of the padding of a probe whose sender understands [`TIMED`].
const READS_TIME: u8 = 1;

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
    Probe {
        /// Who asks understands an answer that tells the time.
        reads_time: bool,
    },
    /// Its answer.
    Answer {
        /// Wall clock of who answers, as time since 1970; none of one that knows version 1 alone.
        time: Option<Duration>,
    },
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
    let mut bytes = header(VERSION, 1, size, id).to_vec();
    bytes.resize(payload(family, size), 0);
    if let Some(padding) = bytes.get_mut(HEADER) {
        *padding = READS_TIME;
    }
    bytes
}

/// The answer to a probe that came from somebody whose padding says that he reads the time, or not. `time` is the own wall
/// clock, as time since 1970.
#[must_use]
pub fn answer(reads_time: bool, size: u32, id: u64, time: Duration) -> Vec<u8> {
    if !reads_time {
        return header(VERSION, 2, size, id).to_vec();
    }
    let microseconds = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    [header(TIMED, 2, size, id).as_slice(), &microseconds.to_be_bytes()].concat()
}

fn header(version: u8, kind: u8, size: u32, id: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = version;
    bytes[5] = kind;
    bytes[8..12].copy_from_slice(&size.to_be_bytes());
    bytes[12..].copy_from_slice(&id.to_be_bytes());
    bytes
}

/// Reads a UDP payload that came in a packet of this family. None for what is no message, of another version, or of another
/// length than it should have.
#[must_use]
pub fn read(family: Family, bytes: &[u8]) -> Option<Message> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let (magic, numbers) = header.split_first_chunk::<4>()?;
    let [version, kind, 0, 0, numbers @ ..] = numbers else { return None };
    let (size, id) = numbers.split_first_chunk::<4>()?;
    let (size, id) = (u32::from_be_bytes(*size), u64::from_be_bytes(*id.first_chunk()?));
    let kind = match (*version, *kind, rest) {
        // The rest of the padding is not looked at: it costs more than it tells.
        (VERSION, 1, padding) if bytes.len() == payload(family, size) => {
            Kind::Probe { reads_time: padding.first() == Some(&READS_TIME) }
        }
        (VERSION, 2, []) => Kind::Answer { time: None },
        (TIMED, 2, time) => {
            let microseconds = u64::from_be_bytes(time.try_into().ok()?);
            Kind::Answer { time: Some(Duration::from_micros(microseconds)) }
        }
        _ => return None,
    };
    (*magic == MAGIC).then_some(Message { kind, size, id })
}
