//! The wire format.

use super::wire::{self, Kind, Message};
use crate::prefix::Family;

#[test]
fn a_probe_fills_the_packet_and_its_answer_does_not() {
    for family in Family::ALL {
        for size in [wire::SMALL, 576, 1280, 1500, wire::LARGEST] {
            let bytes = wire::probe(family, size, 0x0123_4567_89ab_cdef);
            assert_eq!(bytes.len() + wire::headers(family) as usize, size as usize, "{family} {size}");
            let probe = Message { kind: Kind::Probe, size, id: 0x0123_4567_89ab_cdef };
            assert_eq!(wire::read(family, &bytes), Some(probe));
            let answer = wire::answer(probe);
            assert_eq!(answer.len(), wire::HEADER);
            assert_eq!(wire::read(family, &answer), Some(Message { kind: Kind::Answer, ..probe }));
        }
    }
}

#[test]
fn nothing_else_is_a_message() {
    let bytes = wire::probe(Family::Ipv4, 600, 7);
    for length in 0..bytes.len() {
        assert_eq!(wire::read(Family::Ipv4, &bytes[..length]), None, "{length} bytes: cut short");
    }
    assert_eq!(wire::read(Family::Ipv4, &[bytes.clone(), vec![0]].concat()), None, "too long");
    for position in 0..8 {
        let mut forged = bytes.clone();
        forged[position] ^= 4;
        assert_eq!(wire::read(Family::Ipv4, &forged), None, "byte {position}");
    }
    assert_eq!(wire::read(Family::Ipv6, &bytes), None, "the other family's header is longer");
    assert!(wire::read(Family::Ipv4, &bytes).is_some());
}
