//! Associations byte for byte as iproute2 6.1 sends them, and as the kernel answers.

use super::*;
use husk_overlay::esp::Aead;

const SECRET: [u8; 20] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19];

/// `ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x12345678 reqid 0x6875736b mode tunnel replay-window 64
/// flag esn flag af-unspec aead "rfc4106(gcm(aes))" 0x000102…13 128 if_id 0x6875736b encap espinudp 4500 4501 0.0.0.0`.
const TUNNEL: &str = "\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
    c00002020000000000000000000000001234567832000000c0000201000000000000000000000000ffffffffffffffffffffffffffffffff\
    ffffffffffffffffffffffffffffffff00000000000000000000000000000000000000000000000000000000000000000000000000000000\
    000000000000000000000000000000000000000000000000000000000000000000000000000000006b73756802000100a000000000000000\
    60001200726663343130362867636d2861657329290000000000000000000000000000000000000000000000000000000000000000000000\
    000000000000000000000000a000000080000000000102030405060708090a0b0c0d0e0f101112131c000400020011941195000000000000\
    0000000000000000000000001c00170002000000000000000000000000000000000000004000000008001f006b737568";

/// `ip xfrm state add src 2001:db8::1 dst 2001:db8::2 proto esp spi 0x100 reqid 0x6875736b mode transport replay-window 32
/// flag esn aead "rfc4106(gcm(aes))" 0x000102…13 128`.
const TRANSPORT: &str = "\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
    20010db8000000000000000000000002000001003200000020010db8000000000000000000000001ffffffffffffffffffffffffffffffff\
    ffffffffffffffffffffffffffffffff00000000000000000000000000000000000000000000000000000000000000000000000000000000\
    000000000000000000000000000000000000000000000000000000000000000000000000000000006b7375680a0000008000000000000000\
    60001200726663343130362867636d2861657329290000000000000000000000000000000000000000000000000000000000000000000000\
    000000000000000000000000a000000080000000000102030405060708090a0b0c0d0e0f101112131c001700010000000000000000000000\
    000000000000000020000000";

/// `ip xfrm state delete dst 192.0.2.2 proto esp spi 0x12345678`.
const DELETE: &str = "\
    c00002020000000000000000000000001234567802003200";

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn bytes(message: &Message) -> Vec<u8> {
    let Message::Request { payload, .. } = message else { panic!("no request") };
    payload.to_vec()
}

fn tunnel() -> (XfrmStateKey, XfrmParameters) {
    let key = XfrmStateKey { destination: "192.0.2.2".parse().unwrap(), spi: 0x1234_5678 };
    let parameters = XfrmParameters {
        source: "192.0.2.1".parse().unwrap(),
        mode: EspMode::Tunnel,
        if_id: marks::XFRM_IF_ID,
        cipher: Aead::AesGcm128,
        replay_window: 64,
        udp: Some((4500, 4501)),
    };
    (key, parameters)
}

fn transport() -> (XfrmStateKey, XfrmParameters) {
    let key = XfrmStateKey { destination: "2001:db8::2".parse().unwrap(), spi: 256 };
    let source = "2001:db8::1".parse().unwrap();
    let parameters = XfrmParameters {
        source,
        mode: EspMode::Transport,
        if_id: 0,
        cipher: Aead::AesGcm128,
        replay_window: 32,
        udp: None,
    };
    (key, parameters)
}

/// What the kernel answers to a request of ours: the selector has the family where it was not left open, and something was
/// sent or received.
fn answer(request: &[u8], mode: EspMode, family: Family) -> Vec<u8> {
    let mut answer = request.to_vec();
    if mode == EspMode::Transport {
        answer[SELECTOR_FAMILY..SELECTOR_FAMILY + 2].copy_from_slice(&family_number(family).to_ne_bytes());
    }
    answer[CURRENT_BYTES..CURRENT_BYTES + 8].copy_from_slice(&840_u64.to_ne_bytes());
    answer[CURRENT_PACKETS..CURRENT_PACKETS + 8].copy_from_slice(&10_u64.to_ne_bytes());
    answer[UNDECRYPTABLE..UNDECRYPTABLE + 4].copy_from_slice(&3_u32.to_ne_bytes());
    answer
}

#[test]
fn requests_are_those_of_iproute2() {
    let (key, parameters) = tunnel();
    assert_eq!(bytes(&add(&key, &parameters, &SECRET)), hex(TUNNEL));
    assert_eq!(bytes(&remove(&key)), hex(DELETE));
    let (key, parameters) = transport();
    assert_eq!(bytes(&add(&key, &parameters, &SECRET)), hex(TRANSPORT));
}

#[test]
fn what_was_written_is_read_back_with_counters_and_without_key() {
    for ((key, parameters), text) in [(tunnel(), TUNNEL), (transport(), TRANSPORT)] {
        let family = Family::of(key.destination);
        let (found_key, found) = parse(&answer(&hex(text), parameters.mode, family)).unwrap().unwrap();
        assert_eq!(found_key, key);
        let source = parameters.source;
        let parameters = Some(parameters);
        assert_eq!(found, ActualXfrmState { parameters, source, packets: 10, bytes: 840, undecryptable: 3 });
    }
}

#[test]
fn the_longer_key_is_another_cipher() {
    let (key, mut parameters) = transport();
    parameters.cipher = Aead::AesGcm256;
    let request = bytes(&add(&key, &parameters, &[7; 36]));
    let (_, found) = parse(&answer(&request, EspMode::Transport, Family::Ipv6)).unwrap().unwrap();
    assert_eq!(found.parameters, Some(parameters));
}

#[test]
fn what_is_not_ours_is_passed_over() {
    for (at, value) in [(REQID, 0), (ID_PROTOCOL, 51), (FAMILY, 9)] {
        let mut other = hex(TUNNEL);
        other[at] = value;
        assert_eq!(parse(&other), Some(None), "byte {at}");
    }
    let mut larval = hex(TUNNEL);
    larval[ID_SPI..ID_SPI + 4].fill(0);
    assert_eq!(parse(&larval), Some(None));
    assert_eq!(parse(&hex(TUNNEL)[..INFO - 1]), None);
}

#[test]
fn an_association_set_up_otherwise_has_no_parameters() {
    let selector_length = 42;
    let esn_window = INFO + 96 + 28 + 24;
    for (at, value) in [
        (selector_length, 24),
        (SELECTOR_FAMILY, 2),
        (LIFETIME, 1),
        (LIFETIME + 63, 1),
        (MODE, 4),
        (FLAGS, 0),
        (INFO + 4, b'x'),
        // A key of another length, a shorter ICV, another encapsulation, a window that does not fit its bitmap.
        (INFO + 4 + AEAD_NAME, 192),
        (INFO + 4 + AEAD_NAME + 4, 64),
        (INFO + 96 + 4, 7),
        (esn_window, 96),
    ] {
        let mut other = hex(TUNNEL);
        other[at] = value;
        let (_, found) = parse(&other).unwrap().unwrap();
        assert_eq!(found.parameters, None, "byte {at}");
    }
    let mut marked = hex(TUNNEL);
    marked.extend([12, 0, 21, 0, 1, 0, 0, 0, 255, 255, 255, 255]);
    assert_eq!(parse(&marked).unwrap().unwrap().1.parameters, None);
    let mut newer = hex(TUNNEL);
    newer.extend([8, 0, 200, 0, 1, 0, 0, 0]);
    assert!(parse(&newer).unwrap().unwrap().1.parameters.is_some(), "an attribute of a newer kernel");
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(mut tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), cut in 0..400_usize) {
        let mut payload = hex(TUNNEL);
        payload.truncate(cut);
        payload.append(&mut tail);
        let _ = parse(&payload);
    }
}
