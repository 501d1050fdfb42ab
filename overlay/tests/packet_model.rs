//! The MTU calculus against packets that were really built.
//!
//! The model below writes packets byte by byte, layer around layer, as a sender does: it knows header layouts from their
//! specifications and nothing of the calculus. What the calculus calls the inner MTU has to be the largest packet whose
//! wire form fits, and every smaller one has to fit too.

use husk_overlay::mtu::{Cipher, EspMode, Layer, Stack, inner_mtu, wireguard_padding_proof};
use husk_overlay::prefix::Family;
use proptest::prelude::*;

/// A packet on the wire.
type Packet = Vec<u8>;

/// The device a layer's packets leave a host by has an MTU of its own, which WireGuard's padding depends on.
#[derive(Clone, Copy)]
struct Device {
    mtu: usize,
}

fn checked_len(bytes: usize) -> [u8; 2] {
    // Lengths beyond 65535 do not fit a header; the model keeps the bytes, which is what counts.
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// RFC 791 and RFC 8200: the header, then the payload.
fn ip(outer: Family, protocol: u8, payload: &[u8]) -> Packet {
    let mut packet = match outer {
        Family::Ipv4 => {
            // version and header length, service, total length, id, fragment, TTL, protocol, checksum, two addresses
            let mut header = vec![0x45, 0];
            header.extend(checked_len(payload.len() + 20));
            header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            header.extend([192, 0, 2, 1]);
            header.extend([192, 0, 2, 2]);
            header
        }
        Family::Ipv6 => {
            // version, class, flow label, payload length, next header, hop limit, two addresses
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(checked_len(payload.len()));
            header.extend([protocol, 64]);
            for last in [1, 2] {
                header.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
            }
            header
        }
    };
    packet.extend(payload);
    packet
}

/// RFC 768: source port, destination port, length, checksum.
fn udp(port: u16, payload: &[u8]) -> Packet {
    let mut packet = Vec::new();
    packet.extend(49152_u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(checked_len(payload.len() + 8));
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// RFC 7348: flags and reserved, VNI and reserved, then the whole Ethernet frame.
fn vxlan(outer: Family, inner: &[u8]) -> Packet {
    let mut message = vec![0x08, 0, 0, 0, 0, 0x10, 0x92, 0];
    message.extend([0x02, 0, 0, 0, 0, 1]);
    message.extend([0x02, 0, 0, 0, 0, 2]);
    message.extend([0x08, 0x00]);
    message.extend(inner);
    ip(outer, 17, &udp(4789, &message))
}

/// WireGuard's transport data message. The plaintext is filled to the next multiple of 16, but not beyond the MTU of the
/// device the packet was sent to.
fn wireguard(outer: Family, device: Device, pads_regardless: bool, inner: &[u8]) -> Packet {
    let mut plaintext = inner.to_vec();
    let mut target = inner.len();
    while !target.is_multiple_of(16) {
        target += 1;
    }
    if !pads_regardless {
        target = target.min(device.mtu).max(inner.len());
    }
    plaintext.resize(target, 0);

    let mut message = vec![4, 0, 0, 0];
    message.extend(7_u32.to_le_bytes());
    message.extend(9_u64.to_le_bytes());
    message.extend(&plaintext);
    message.extend([0xaa; 16]);
    ip(outer, 17, &udp(51820, &message))
}

/// RFC 4303: SPI, sequence number, IV, then payload, padding 1, 2, 3…, pad length and next header, which are encrypted
/// together, then the ICV.
fn esp(cipher: Cipher, next_header: u8, payload: &[u8]) -> Packet {
    let (iv, icv, multiple) = match cipher {
        // RFC 4106: 8 bytes of IV, full tag; a stream, so that only the 32-bit alignment of ESP counts.
        Cipher::AesGcm => (vec![0x11; 8], vec![0x22; 16], 4),
        // RFC 3602: an IV of a block of 16; RFC 4868: the first 128 bits of the MAC.
        Cipher::AesCbcSha256 => (vec![0x11; 16], vec![0x22; 16], 16),
    };
    let mut encrypted = payload.to_vec();
    let mut pad = 0_u8;
    while !(encrypted.len() + 2).is_multiple_of(multiple) {
        pad += 1;
        encrypted.push(pad);
    }
    encrypted.extend([pad, next_header]);

    let mut packet = Vec::new();
    packet.extend(0xc0de_u32.to_be_bytes());
    packet.extend(1_u32.to_be_bytes());
    packet.extend(iv);
    packet.extend(encrypted);
    packet.extend(icv);
    packet
}

fn ip_with_esp(outer: Family, udp_encapsulation: bool, esp: Packet) -> Packet {
    if udp_encapsulation { ip(outer, 17, &udp(4500, &esp)) } else { ip(outer, 50, &esp) }
}

/// Where the transport header of a packet of the model begins: behind an IP header without options or extensions.
fn split_ip(packet: &[u8]) -> (u8, &[u8]) {
    match packet[0] >> 4 {
        4 => (packet[9], &packet[usize::from(packet[0] & 0x0f) * 4..]),
        6 => (packet[6], &packet[40..]),
        other => unreachable!("the model writes no IP version {other}"),
    }
}

/// The wire form of a pod's packet. Layers come outermost first, so that the last one acts first. `devices` has the MTU
/// of each layer's device, in the same order.
fn wire_form(stack: &Stack, outer: Family, devices: &[Device], pads_regardless: bool, pod: &[u8]) -> Packet {
    let mut packet = pod.to_vec();
    for (layer, device) in stack.0.iter().zip(devices).rev() {
        packet = match *layer {
            Layer::Vxlan => vxlan(outer, &packet),
            Layer::Wireguard => wireguard(outer, *device, pads_regardless, &packet),
            Layer::Esp { mode: EspMode::Tunnel, cipher, udp_encapsulation } => {
                ip_with_esp(outer, udp_encapsulation, esp(cipher, 4, &packet))
            }
            Layer::Esp { mode: EspMode::Transport, cipher, udp_encapsulation } => {
                let (protocol, payload) = split_ip(&packet);
                ip_with_esp(outer, udp_encapsulation, esp(cipher, protocol, payload))
            }
        };
    }
    packet
}

/// A pod's packet, or one the host sends itself where the stack begins with ESP transport mode.
fn pod_packet(outer: Family, length: usize) -> Packet {
    let mut packet = ip(outer, 17, &[]);
    packet.resize(length.max(packet.len()), 0x5a);
    packet
}

/// Every stack of up to two layers, and one of three.
fn stacks() -> Vec<Stack> {
    let mut layers = vec![Layer::Vxlan, Layer::Wireguard];
    for mode in [EspMode::Tunnel, EspMode::Transport] {
        for cipher in [Cipher::AesGcm, Cipher::AesCbcSha256] {
            for udp_encapsulation in [false, true] {
                layers.push(Layer::Esp { mode, cipher, udp_encapsulation });
            }
        }
    }
    let mut stacks = vec![Stack(vec![])];
    for outer in &layers {
        stacks.push(Stack(vec![*outer]));
        stacks.extend(layers.iter().map(|inner| Stack(vec![*outer, *inner])));
    }
    stacks.push(Stack(vec![layers[2], layers[1], layers[0]]));
    stacks
}

/// MTU of each layer's device when every device has exactly the MTU that the calculus gives it.
fn devices(stack: &Stack, outer: Family, mtu: u32) -> Vec<Device> {
    (1..=stack.0.len())
        .map(|depth| {
            let left = inner_mtu(&Stack(stack.0[..depth].to_vec()), outer, mtu).expect("576 bytes are enough");
            Device { mtu: left as usize }
        })
        .collect()
}

fn wire_length(stack: &Stack, outer: Family, devices: &[Device], length: usize) -> usize {
    wire_form(stack, outer, devices, false, &pod_packet(outer, length)).len()
}

/// The MTU is exact: full packets fit, one byte more does not.
fn check_exact(stack: &Stack, outer: Family, mtu: u32) {
    let inner = inner_mtu(stack, outer, mtu).expect("576 bytes are enough") as usize;
    let devices = devices(stack, outer, mtu);
    let context = || format!("{stack} over {outer}, underlay {mtu}, inner {inner}");
    assert!(wire_length(stack, outer, &devices, inner) <= mtu as usize, "{}: too large", context());
    assert!(wire_length(stack, outer, &devices, inner + 1) > mtu as usize, "{}: bytes are wasted", context());
}

/// No smaller packet is larger on the wire than the MTU, whatever its padding.
fn check_smaller(stack: &Stack, outer: Family, mtu: u32, length: usize) {
    let devices = devices(stack, outer, mtu);
    let wire = wire_length(stack, outer, &devices, length);
    assert!(wire <= mtu as usize, "{stack} over {outer}, underlay {mtu}: {length} bytes become {wire}");
}

#[test]
fn exact_at_every_common_underlay_mtu() {
    for stack in stacks() {
        for outer in Family::ALL {
            for mtu in [
                576, 1280, 1400, 1420, 1450, 1460, 1480, 1492, 1500, 1501, 1508, 1600, 4352, 8981, 9000, 9001, 9216,
                65535,
            ] {
                check_exact(&stack, outer, mtu);
            }
        }
    }
}

#[test]
fn every_residue_of_every_block_size_is_exact_and_covers_every_smaller_packet() {
    for stack in stacks() {
        for outer in Family::ALL {
            for mtu in 1480..1512 {
                check_exact(&stack, outer, mtu);
                let inner = inner_mtu(&stack, outer, mtu).expect("enough") as usize;
                for length in (inner - 40)..=inner {
                    check_smaller(&stack, outer, mtu, length);
                }
            }
        }
    }
}

#[test]
fn the_padding_proof_mtu_suits_senders_that_always_pad() {
    let stack = Stack(vec![Layer::Wireguard]);
    for outer in Family::ALL {
        for mtu in 576..3000 {
            let proof = wireguard_padding_proof(outer, mtu).expect("576 bytes are enough") as usize;
            let length = |inner| wire_form(&stack, outer, &[Device { mtu: 0 }], true, &pod_packet(outer, inner)).len();
            for inner in proof - 17..=proof {
                assert!(length(inner) <= mtu as usize, "{outer} {mtu} {inner}");
            }
            assert!(length(proof + 1) > mtu as usize, "{outer} {mtu}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_inner_mtu_is_the_largest_packet_that_fits(
        mtu in 576_u32..=65535,
        stack in prop::sample::select(stacks()),
        outer in prop::sample::select(Family::ALL.to_vec()),
        lengths in prop::collection::vec(any::<prop::sample::Index>(), 4),
    ) {
        check_exact(&stack, outer, mtu);
        let inner = inner_mtu(&stack, outer, mtu).expect("576 bytes are enough") as usize;
        let smallest = pod_packet(outer, 0).len();
        for length in lengths {
            check_smaller(&stack, outer, mtu, smallest + length.index(inner - smallest + 1));
        }
    }
}
