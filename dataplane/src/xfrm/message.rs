//! Messages of the xfrm protocol, both ways (include/uapi/linux/xfrm.h, net/xfrm/xfrm_user.c).
//!
//! They are structures of fixed length, in the host's byte order but for addresses, ports and SPIs, with attributes behind.
//! Requests are built as bytes that are wiped when they are done with, and of what a dump says of a key only its length is
//! looked at: no type here ever holds one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use husk_overlay::kernel::{XfrmPolicyKey, XfrmStateKey};
use husk_overlay::prefix::Family;
use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use zeroize::Zeroizing;

use super::model::{ActualXfrmPolicy, ActualXfrmState};
use super::{policies, states};

pub(super) const XFRM_MSG_NEWSA: u16 = 0x10;
pub(super) const XFRM_MSG_DELSA: u16 = 0x11;
pub(super) const XFRM_MSG_GETSA: u16 = 0x12;
pub(super) const XFRM_MSG_NEWPOLICY: u16 = 0x13;
pub(super) const XFRM_MSG_DELPOLICY: u16 = 0x14;
pub(super) const XFRM_MSG_GETPOLICY: u16 = 0x15;
pub(super) const XFRM_MSG_UPDPOLICY: u16 = 0x19;

/// `IPPROTO_ESP`.
pub(super) const ESP: u8 = 50;

/// Length of `struct xfrm_selector`.
pub(super) const SELECTOR: usize = 56;

/// No limit (`XFRM_INF`).
const XFRM_INF: u64 = u64::MAX;

/// A request or an answer.
pub(super) enum Message {
    /// A request.
    Request {
        /// Message type.
        kind: u16,
        /// Structure and attributes; may hold a key.
        payload: Zeroizing<Vec<u8>>,
    },
    /// An association; none if it is not ours.
    State(Option<(XfrmStateKey, ActualXfrmState)>),
    /// A policy; none if it is not ours.
    Policy(Option<(XfrmPolicyKey, ActualXfrmPolicy)>),
}

impl Message {
    /// The request for a whole table, which has no structure.
    pub(super) fn dump(kind: u16) -> Self {
        Self::Request { kind, payload: Zeroizing::default() }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Self::Request { kind, .. } => *kind,
            Self::State(_) => XFRM_MSG_NEWSA,
            Self::Policy(_) => XFRM_MSG_NEWPOLICY,
        }
    }

    fn buffer_len(&self) -> usize {
        match self {
            Self::Request { payload, .. } => payload.len(),
            Self::State(_) | Self::Policy(_) => 0,
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        if let Self::Request { payload, .. } = self {
            buffer.copy_from_slice(payload);
        }
    }
}

/// An answer that is shorter than the structure it should hold, or of another type. Does not quote it, for the keys in it.
#[derive(Debug, thiserror::Error)]
#[error("a message of type {0} is too short or not one of this protocol's objects")]
pub(super) struct Undecodable(u16);

impl NetlinkDeserializable for Message {
    type Error = Undecodable;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Undecodable> {
        let message = match header.message_type {
            XFRM_MSG_NEWSA => states::parse(payload).map(Self::State),
            XFRM_MSG_NEWPOLICY => policies::parse(payload).map(Self::Policy),
            _ => None,
        };
        message.ok_or(Undecodable(header.message_type))
    }
}

/// A request under construction. The buffer is as large as any request becomes, so that no copy of a key is left behind
/// where it would have grown.
pub(super) struct Builder(Zeroizing<Vec<u8>>);

/// More than the longest request: `struct xfrm_usersa_info`, a key, and the largest replay window.
const LONGEST: usize = 1024;

impl Builder {
    /// A request whose structure has the given length, zeroed.
    pub(super) fn new(length: usize) -> Self {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LONGEST));
        bytes.resize(length, 0);
        Self(bytes)
    }

    /// Writes bytes into the structure.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Writes an address, `xfrm_address_t`: 16 bytes, of which an IPv4 address takes the first four.
    pub(super) fn put_address(&mut self, at: usize, address: IpAddr) -> &mut Self {
        self.put(at, &address_bytes(address))
    }

    /// Writes `struct xfrm_lifetime_cfg` without limits: four limits, and four times of which 0 means never.
    pub(super) fn put_unlimited(&mut self, at: usize) -> &mut Self {
        for limit in 0..4 {
            self.put(at + 8 * limit, &XFRM_INF.to_ne_bytes());
        }
        self
    }

    /// Appends an attribute whose value is made of parts.
    pub(super) fn attribute(&mut self, kind: u16, parts: &[&[u8]]) -> &mut Self {
        let length: usize = 4 + parts.iter().map(|part| part.len()).sum::<usize>();
        debug_assert!(self.0.len() + length + 4 <= LONGEST, "the buffer would grow");
        let stated = u16::try_from(length).expect("attributes here are shorter than the buffer");
        self.0.extend_from_slice(&stated.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
        let aligned = self.0.len().next_multiple_of(4);
        self.0.resize(aligned, 0);
        self
    }

    /// The request.
    pub(super) fn finish(self, kind: u16) -> Message {
        Message::Request { kind, payload: self.0 }
    }
}

/// True if `struct xfrm_lifetime_cfg` has no limits.
pub(super) fn is_unlimited(structure: &[u8], at: usize) -> Option<bool> {
    let mut limits = (0..4).map(|index| u64_at(structure, at + 8 * index));
    let mut times = (4..8).map(|index| u64_at(structure, at + 8 * index));
    Some(limits.all(|limit| limit == Some(XFRM_INF)) && times.all(|time| time == Some(0)))
}

/// Attributes behind a structure, by type and value.
pub(super) fn attributes(payload: &[u8], structure: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = payload.get(structure..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)?;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            bytes
        }
        IpAddr::V6(address) => address.octets(),
    }
}

pub(super) fn address_at(bytes: &[u8], at: usize, family: Family) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(match family {
        Family::Ipv4 => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::from(octets)),
    })
}

/// `AF_INET` or `AF_INET6`.
pub(super) fn family_number(family: Family) -> u16 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

pub(super) fn family_of(number: u16) -> Option<Family> {
    match number {
        2 => Some(Family::Ipv4),
        10 => Some(Family::Ipv6),
        _ => None,
    }
}

pub(super) fn u8_at(bytes: &[u8], at: usize) -> Option<u8> {
    bytes.get(at).copied()
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn be16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn be32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
