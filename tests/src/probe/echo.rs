//! ICMP echo with an exact packet size.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Result;
use husk_overlay::prefix::Family;

use super::Reach;
use super::question::Question;
use super::socket::{Protocol, header};
use crate::netns::Netns;

/// Length of an ICMP echo header, in both versions.
pub(super) const ICMP_HEADER: usize = 8;

/// An echo request; it must not be fragmented unless told otherwise.
pub type Echo = Question<IpAddr>;

impl Echo {
    /// A request in an IP packet of 100 bytes.
    #[must_use]
    pub fn to(to: IpAddr) -> Self {
        Self::new(to)
    }

    /// Lets the packet be fragmented.
    #[must_use]
    pub fn may_fragment(mut self) -> Self {
        self.dont_fragment = false;
        self
    }

    /// Sends the request from a namespace and waits for the reply.
    ///
    /// # Errors
    /// When the harness fails; whatever becomes of the packet is an answer.
    pub fn run(&self, netns: &Netns) -> Result<Reach> {
        let family = Family::of(self.to);
        let id = next_id();
        let request = request(family, id, 1, &self.payload(header(family) + ICMP_HEADER)?);
        self.exchange(netns, Protocol::Icmp, self.to).run(&request, |packet| {
            let (size, body) = reply(family, id, packet)?;
            (body == &request[ICMP_HEADER..]).then_some(size)
        })
    }
}

/// An identifier that no other probe of this process uses at the time.
pub(super) fn next_id() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// An echo request; the kernel fills in ICMPv6's checksum, and we ICMP's.
pub(super) fn request(family: Family, id: u16, sequence: u16, body: &[u8]) -> Vec<u8> {
    let kind = if family == Family::Ipv4 { 8 } else { 128 };
    let mut message = vec![kind, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend(body);
    if family == Family::Ipv4 {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    message
}

/// Length of the IP packet and body of the echo reply with this identifier, if the received bytes are one.
pub(super) fn reply(family: Family, id: u16, received: &[u8]) -> Option<(usize, &[u8])> {
    // A raw IPv4 socket delivers the IP header, an IPv6 one does not.
    let (size, message, kind) = match family {
        Family::Ipv4 => {
            let length = usize::from(received.first()? & 0x0f) * 4;
            (received.len(), received.get(length..)?, 0)
        }
        Family::Ipv6 => (received.len() + header(family), received, 129),
    };
    let body = message.get(ICMP_HEADER..)?;
    (message[0] == kind && message[4..6] == id.to_be_bytes()).then_some((size, body))
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
