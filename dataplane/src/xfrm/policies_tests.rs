//! Policies byte for byte as iproute2 6.1 sends them, and as the kernel answers.

use super::*;
use crate::xfrm::message::{XFRM_MSG_NEWPOLICY, XFRM_MSG_UPDPOLICY};

/// `ip xfrm policy update dir out src 0.0.0.0/0 dst 10.42.1.0/24 priority 100 if_id 0x6875736b tmpl src 192.0.2.1 dst
/// 192.0.2.2 proto esp spi 0x12345678 reqid 0x6875736b mode tunnel`.
const PROTECT: &str = "\
    0a2a010000000000000000000000000000000000000000000000000000000000000000000000000002001800000000000000000000000000\
    ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff000000000000000000000000000000000000000000000000\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000064000000000000000100000000000000\
    44000500c0000202000000000000000000000000123456783200000002000000c00002010000000000000000000000006b73756801000000\
    ffffffffffffffffffffffff08001f006b737568";

/// `ip xfrm policy add dir in src 2001:db8::2/128 dst 2001:db8::1/128 proto udp dport 4789 priority 100 tmpl src 2001:db8::2
/// dst 2001:db8::1 proto esp reqid 0x6875736b mode transport`.
const TRANSPORT: &str = "\
    20010db800000000000000000000000120010db800000000000000000000000212b5ffff000000000a008080110000000000000000000000\
    ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff000000000000000000000000000000000000000000000000\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000064000000000000000000000000000000\
    4400050020010db800000000000000000000000100000000320000000a00000020010db80000000000000000000000026b73756800000000\
    ffffffffffffffffffffffff";

/// `ip xfrm policy add dir out src 0.0.0.0/0 dst 0.0.0.0/0 proto udp dport 4789 priority 0x6875736b action block`.
const BLOCK: &str = "\
    000000000000000000000000000000000000000000000000000000000000000012b5ffff0000000002000000110000000000000000000000\
    ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff000000000000000000000000000000000000000000000000\
    000000000000000000000000000000000000000000000000000000000000000000000000000000006b737568000000000101000000000000";

/// `ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.42.1.0/24 if_id 0x6875736b`.
const DELETE: &str = "\
    0a2a010000000000000000000000000000000000000000000000000000000000000000000000000002001800000000000000000000000000\
    000000000100000008001f006b737568";

fn hex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn bytes(message: &Message) -> (u16, Vec<u8>) {
    let Message::Request { kind, payload } = message else { panic!("no request") };
    (*kind, payload.to_vec())
}

fn protect() -> (XfrmPolicyKey, XfrmPolicy) {
    let key = XfrmPolicyKey {
        direction: XfrmDirection::Out,
        source: "0.0.0.0/0".parse().unwrap(),
        destination: "10.42.1.0/24".parse().unwrap(),
        udp_port: None,
        if_id: marks::XFRM_IF_ID,
    };
    let template = XfrmTemplate {
        source: "192.0.2.1".parse().unwrap(),
        destination: "192.0.2.2".parse().unwrap(),
        mode: EspMode::Tunnel,
        spi: Some(0x1234_5678),
    };
    (key, XfrmPolicy { priority: 100, action: XfrmAction::Protect(template) })
}

fn transport() -> (XfrmPolicyKey, XfrmPolicy) {
    let key = XfrmPolicyKey {
        direction: XfrmDirection::In,
        source: "2001:db8::2/128".parse().unwrap(),
        destination: "2001:db8::1/128".parse().unwrap(),
        udp_port: Some(4789),
        if_id: 0,
    };
    let template = XfrmTemplate {
        source: "2001:db8::2".parse().unwrap(),
        destination: "2001:db8::1".parse().unwrap(),
        mode: EspMode::Transport,
        spi: None,
    };
    (key, XfrmPolicy { priority: 100, action: XfrmAction::Protect(template) })
}

fn block() -> (XfrmPolicyKey, XfrmPolicy) {
    let key = XfrmPolicyKey {
        direction: XfrmDirection::Out,
        source: "0.0.0.0/0".parse().unwrap(),
        destination: "0.0.0.0/0".parse().unwrap(),
        udp_port: Some(4789),
        if_id: 0,
    };
    (key, XfrmPolicy { priority: marks::XFRM_BLOCK_PRIORITY, action: XfrmAction::Block })
}

#[test]
fn requests_are_those_of_iproute2() {
    for ((key, policy), kind, text) in [
        (protect(), XFRM_MSG_UPDPOLICY, PROTECT),
        (transport(), XFRM_MSG_NEWPOLICY, TRANSPORT),
        (block(), XFRM_MSG_NEWPOLICY, BLOCK),
    ] {
        assert_eq!(bytes(&set(kind, &key, &policy)), (kind, hex(text)));
    }
    assert_eq!(bytes(&remove(&protect().0)), (XFRM_MSG_DELPOLICY, hex(DELETE)));
}

#[test]
fn what_was_written_is_read_back() {
    for ((key, policy), text) in [(protect(), PROTECT), (transport(), TRANSPORT), (block(), BLOCK)] {
        assert_eq!(parse(&hex(text)), Some(Some((key, Some(policy)))));
    }
}

#[test]
fn a_strangers_policy_is_passed_over() {
    let reqid = INFO + 4 + TEMPLATE_REQID;
    for (text, at) in [(PROTECT, reqid), (TRANSPORT, reqid), (BLOCK, PRIORITY)] {
        let mut other = hex(text);
        other[at] ^= 1;
        assert_eq!(parse(&other), Some(None), "byte {at}");
    }
    // One that allows with the priority of those that block.
    let mut allows = hex(BLOCK);
    allows[ACTION] = XFRM_POLICY_ALLOW;
    assert_eq!(parse(&allows), Some(None));
    assert_eq!(parse(&hex(BLOCK)[..INFO - 1]), None);
}

#[test]
fn our_policy_set_up_otherwise_is_ours_and_not_as_desired() {
    let optional = INFO + 4 + 50;
    let algorithms = INFO + 4 + TEMPLATE_ALGORITHMS;
    for at in [optional, algorithms, FLAGS, LIFETIME, LIFETIME + 40, INFO + 4 + TEMPLATE_PROTOCOL] {
        let mut other = hex(PROTECT);
        other[at] ^= 1;
        assert_eq!(parse(&other), Some(Some((protect().0, None))), "byte {at}");
    }
    let mut twice = hex(PROTECT)[..INFO + 68].to_vec();
    twice[INFO] += 64;
    twice.extend_from_within(INFO + 4..);
    twice.extend([8, 0, 31, 0, 0x6b, 0x73, 0x75, 0x68]);
    assert_eq!(parse(&twice), Some(Some((protect().0, None))));
}

#[test]
fn a_choice_of_packets_that_husk_never_makes_is_left_alone() {
    for at in [SOURCE_PORT, DESTINATION_PORT_MASK, PROTOCOL, INTERFACE, DESTINATION + 3] {
        let mut other = hex(PROTECT);
        other[at] = 6;
        assert_eq!(parse(&other), Some(None), "byte {at}");
    }
    let mut marked = hex(PROTECT);
    marked.extend([12, 0, 21, 0, 1, 0, 0, 0, 255, 255, 255, 255]);
    assert_eq!(parse(&marked), Some(None));
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(mut tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), cut in 0..260_usize) {
        let mut payload = hex(PROTECT);
        payload.truncate(cut);
        payload.append(&mut tail);
        let _ = parse(&payload);
    }
}
