//! Sizes by which datagrams are recognised once they are encrypted.
//!
//! What a tunnel makes of a packet cannot be read, but it can be measured: each datagram has a size of its own that no other packet
//! to the node had just before, and they are looked for in the order in which they were sent. The sizes of the packets inside are
//! multiples of 16, to which WireGuard pads (WireGuard paper, section 5.4.6), so that the size outside follows from the layers.

use std::collections::BTreeSet;

use anyhow::Context as _;
use husk_dataplane::capture::Link;
use husk_overlay::mtu::{self, Stack};
use husk_overlay::prefix::Family;

/// Bytes of the smallest packet inside: larger than the answer to a probe, a keepalive or a TCP acknowledgement.
const SMALLEST: u32 = 320;

/// To this WireGuard pads what it encrypts.
const STEP: usize = 16;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// The size of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// Bytes of the packet inside, its IP header included.
    pub(super) inside: u32,
    /// Bytes of the packet around it on the wire, its IP header included.
    pub(super) outside: u32,
}

/// As many sizes as are wanted, all different, in no order that could be foreseen, of packets up to an MTU inside the tunnel whose
/// size outside is none of those taken.
///
/// # Errors
/// When there are not so many, or there is no randomness.
pub(super) fn choose(
    count: usize,
    (stack, outer): (&Stack, Family),
    mtu: u32,
    taken: &BTreeSet<u32>,
) -> anyhow::Result<Vec<Size>> {
    let sizes = (SMALLEST..=mtu).step_by(STEP);
    let sizes = sizes.map(|inside| Size { inside, outside: mtu::underlay_needed(stack, outer, inside) });
    let mut free = Vec::new();
    for size in sizes.filter(|size| !taken.contains(&size.outside)) {
        let mut key = [0; 8];
        getrandom::fill(&mut key).map_err(|error| anyhow::anyhow!("there is no randomness: {error}"))?;
        free.push((key, size));
    }
    free.sort_by_key(|(key, _)| *key);
    let free: Vec<Size> = free.into_iter().map(|(_, size)| size).collect();
    let chosen = free.get(..count).context(
        "packets of nearly every size go to that node, so that none of the own could be recognised: nothing is proven; try again \
         when less is sent",
    )?;
    Ok(chosen.to_vec())
}

/// Bytes of a packet as its IP header tells them; none where it begins with no IP header.
pub(super) fn of_packet(link: Link, bytes: &[u8]) -> Option<u32> {
    let packet = match link {
        Link::Ethernet => bytes.get(ETHERNET..)?,
        Link::None => bytes,
    };
    let number = |at: usize| packet.get(at..)?.first_chunk().map(|it| u32::from(u16::from_be_bytes(*it)));
    match packet.first()? >> 4 {
        // Total length (RFC 791, section 3.1).
        4 => number(2),
        // Payload length, without the header's 40 bytes (RFC 8200, section 3).
        6 => Some(number(4)? + 40),
        _ => None,
    }
}

/// Which datagrams came by, in the order in which they were sent.
#[derive(Debug)]
pub(super) struct Recognition {
    sizes: Vec<Size>,
    seen: usize,
}

impl Recognition {
    pub(super) fn of(sizes: Vec<Size>) -> Self {
        Self { sizes, seen: 0 }
    }

    /// An encrypted packet of this size came by.
    pub(super) fn saw(&mut self, outside: u32) {
        self.seen += usize::from(self.sizes.get(self.seen).is_some_and(|next| next.outside == outside));
    }

    /// How many were recognised.
    pub(super) fn seen(&self) -> u64 {
        self.seen as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wireguard() -> Stack {
        husk_overlay::mode::Mode::Wireguard.stack(false)
    }

    #[test]
    fn sizes_are_those_the_layers_make_of_what_is_inside() {
        let none = BTreeSet::new();
        let chosen = choose(10, (&wireguard(), Family::Ipv4), 1440, &none).unwrap();
        // IP 20, UDP 8, WireGuard's header and tag 32.
        assert!(chosen.iter().all(|size| size.outside == size.inside + 60 && size.inside % 16 == 0), "{chosen:?}");
        assert!(chosen.iter().all(|size| (320..=1440).contains(&size.inside)));
        assert_eq!(chosen.iter().map(|size| size.outside).collect::<BTreeSet<_>>().len(), 10);
        assert_ne!(chosen, choose(10, (&wireguard(), Family::Ipv4), 1440, &none).unwrap(), "they can be foreseen");
        // ESP in tunnel mode: IP 40, ESP 8 + 8, trailer 2 that is padded with the packet to 4, tag 16.
        let ipsec = husk_overlay::mode::Mode::Ipsec.stack(false);
        let [size] = choose(1, (&ipsec, Family::Ipv6), 335, &none).unwrap()[..] else { panic!("one") };
        assert_eq!(size, Size { inside: 320, outside: 320 + 40 + 16 + 4 + 16 });
    }

    #[test]
    fn a_size_that_others_have_is_not_taken() {
        // Of the 17 sizes up to 576, seven are free.
        let taken: BTreeSet<u32> = (320..480).step_by(16).map(|inside| inside + 60).collect();
        let chosen = choose(7, (&wireguard(), Family::Ipv4), 576, &taken).unwrap();
        assert!(chosen.iter().all(|size| size.inside >= 480), "{chosen:?}");
        let crowded = choose(8, (&wireguard(), Family::Ipv4), 576, &taken).unwrap_err();
        assert!(crowded.to_string().contains("nearly every size"), "{crowded}");
    }

    #[test]
    fn only_all_of_them_in_their_order_are_recognised() {
        let sizes: Vec<Size> =
            [400, 336, 528].map(|inside| Size { inside, outside: inside + 60 }).into_iter().collect();
        let seen = |outside: &[u32]| {
            let mut recognition = Recognition::of(sizes.clone());
            outside.iter().for_each(|it| recognition.saw(*it));
            recognition.seen()
        };
        assert_eq!(seen(&[460, 128, 396, 1500, 588]), 3);
        assert_eq!(seen(&[588, 588, 588, 588]), 0);
        assert_eq!(seen(&[460, 588]), 1);
    }

    #[test]
    fn the_size_of_a_packet_is_what_its_header_says() {
        let ipv4 = [&[0x45, 0, 0x01, 0xb8][..], &[0; 16]].concat();
        assert_eq!(of_packet(Link::None, &ipv4), Some(440));
        assert_eq!(of_packet(Link::Ethernet, &[&[0; 14], &ipv4[..]].concat()), Some(440));
        let ipv6 = [&[0x60, 0, 0, 0, 0x01, 0x90][..], &[0; 34]].concat();
        assert_eq!(of_packet(Link::None, &ipv6), Some(440));
        for unread in [&[][..], &[0x45, 0, 1], &[0x15, 0, 0, 0, 0, 0]] {
            assert_eq!(of_packet(Link::None, unread), None);
        }
    }
}
