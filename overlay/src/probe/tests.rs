//! The wire format.

use std::time::Duration;

use super::wire::{self, Kind, Message};
use crate::prefix::Family;

#[test]
fn a_probe_fills_the_packet_and_its_answer_does_not() {
    for family in Family::ALL {
        for size in [wire::SMALL, 576, 1280, 1500, wire::LARGEST] {
            let bytes = wire::probe(family, size, 0x0123_4567_89ab_cdef);
            assert_eq!(bytes.len() + wire::headers(family) as usize, size as usize, "{family} {size}");
            let (id, time) = (0x0123_4567_89ab_cdef, Duration::from_micros(1_800_000_000_123_456));
            assert_eq!(wire::read(family, &bytes), Some(Message { kind: Kind::Probe { reads_time: true }, size, id }));
            let answer = wire::answer(true, size, id, time);
            assert_eq!(answer.len(), wire::HEADER + 8);
            let kind = Kind::Answer { time: Some(time) };
            assert_eq!(wire::read(family, &answer), Some(Message { kind, size, id }));
        }
    }
}

#[test]
fn who_knows_version_1_alone_is_understood_and_gets_what_it_understands() {
    // As such a node sends it: padding of zeroes.
    let mut bytes = wire::probe(Family::Ipv4, 600, 7);
    bytes[wire::HEADER] = 0;
    let probe = Message { kind: Kind::Probe { reads_time: false }, size: 600, id: 7 };
    assert_eq!(wire::read(Family::Ipv4, &bytes), Some(probe));
    let answer = wire::answer(false, 600, 7, Duration::from_secs(1_800_000_000));
    let expected = [b"HUSK\x01\x02\0\0".as_slice(), &600_u32.to_be_bytes(), &7_u64.to_be_bytes()].concat();
    assert_eq!(answer, expected);
    let kind = Kind::Answer { time: None };
    assert_eq!(wire::read(Family::Ipv4, &answer), Some(Message { kind, size: 600, id: 7 }));
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
    let answer = wire::answer(true, 600, 7, Duration::from_secs(1));
    for length in 0..answer.len() {
        assert_eq!(wire::read(Family::Ipv4, &answer[..length]), None, "{length} bytes of an answer");
    }
    assert_eq!(wire::read(Family::Ipv4, &[answer, vec![0]].concat()), None, "too long");
}
