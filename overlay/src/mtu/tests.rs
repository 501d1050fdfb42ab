use super::*;
use crate::config::Config;
use crate::esp::Aead;
use crate::mode::Mode;

const V4: Family = Family::Ipv4;
const V6: Family = Family::Ipv6;

fn esp(mode: EspMode, cipher: Cipher, udp_encapsulation: bool) -> Layer {
    Layer::Esp { mode, cipher, udp_encapsulation }
}

fn inner(layers: &[Layer], outer: Family, mtu: u32) -> u32 {
    inner_mtu(&Stack(layers.to_vec()), outer, mtu).unwrap()
}

/// The truth table: every row was derived from the specifications by hand.
#[test]
fn what_is_left_of_1500_bytes() {
    let gcm = esp(EspMode::Tunnel, Cipher::AesGcm, false);
    let gcm_udp = esp(EspMode::Tunnel, Cipher::AesGcm, true);
    let cbc = esp(EspMode::Tunnel, Cipher::AesCbcSha256, false);
    let transport = esp(EspMode::Transport, Cipher::AesGcm, false);
    let table: [(&[Layer], u32, u32); 8] = [
        (&[], 1500, 1500),
        (&[Layer::Vxlan], 1450, 1430),
        (&[Layer::Wireguard], 1440, 1420),
        (&[gcm], 1446, 1426),
        (&[gcm_udp], 1438, 1418),
        (&[cbc], 1438, 1406),
        (&[transport, Layer::Vxlan], 1416, 1396),
        (&[Layer::Wireguard, Layer::Vxlan], 1390, 1350),
    ];
    for (layers, v4, v6) in table {
        let stack = Stack(layers.to_vec());
        assert_eq!((inner_mtu(&stack, V4, 1500), inner_mtu(&stack, V6, 1500)), (Ok(v4), Ok(v6)), "{stack}");
    }
    assert_eq!(wireguard_padding_proof(V4, 1500), Some(1440));
    assert_eq!(wireguard_padding_proof(V6, 1500), Some(1408));
}

/// Mode, UDP encapsulation, and what is left of 1500 bytes over IPv4 and IPv6.
const MODES: [(Mode, Option<u16>, u32, u32); 10] = [
    (Mode::Direct, None, 1500, 1500),
    (Mode::Direct, Some(4500), 1500, 1500),
    (Mode::Vxlan, None, 1450, 1430),
    (Mode::Vxlan, Some(4500), 1450, 1430),
    (Mode::Wireguard, None, 1440, 1420),
    (Mode::Wireguard, Some(4500), 1440, 1420),
    (Mode::Ipsec, None, 1446, 1426),
    (Mode::Ipsec, Some(4500), 1438, 1418),
    (Mode::VxlanIpsec, None, 1416, 1396),
    (Mode::VxlanIpsec, Some(4500), 1408, 1388),
];

#[test]
fn configured_modes_have_the_overhead_the_documentation_says() {
    for (mode, udp_port, v4, v6) in MODES {
        let mut config = Config::new(vec!["10.42.0.0/16".parse().unwrap()]);
        (config.mode, config.ipsec.udp_port) = (mode, udp_port);
        for cipher in Aead::ALL {
            // The length of the key is not on the wire.
            config.ipsec.cipher = cipher;
            let left = |family| inner_mtu(&config.stack(), family, 1500);
            assert_eq!((left(V4), left(V6)), (Ok(v4), Ok(v6)), "{mode} {udp_port:?} {cipher}");
        }
    }
}

#[test]
fn no_constant_is_right_for_esp() {
    let gcm = [esp(EspMode::Tunnel, Cipher::AesGcm, false)];
    for (mtu, overhead) in [(1500, 54), (9001, 55), (1450, 56)] {
        assert_eq!(mtu - inner(&gcm, V4, mtu), overhead, "{mtu}");
    }
}

#[test]
fn nothing_left_is_an_error_that_says_what_is_needed() {
    let stack = Stack(vec![Layer::Wireguard, Layer::Vxlan]);
    assert_eq!(inner_mtu(&stack, V4, 111), Ok(1));
    let error = inner_mtu(&stack, V4, 110).unwrap_err();
    assert_eq!(error, MtuError::NothingLeft { stack: stack.clone(), outer: V4, underlay_mtu: 110, overhead: 110 });
    assert_eq!(
        error.to_string(),
        "VXLAN in WireGuard over IPv4 leaves no byte of an underlay MTU of 110 for pods: it needs more than 110 bytes \
         for itself"
    );
    for mtu in [0, 1, 20, 59, 60, 110] {
        assert!(inner_mtu(&stack, V4, mtu).is_err(), "{mtu}");
        assert_eq!(ledger(&stack, V4, mtu).inner, None, "{mtu}");
    }
    assert_eq!(wireguard_padding_proof(V4, 75), None);
    assert_eq!(wireguard_padding_proof(V4, 76), Some(16));
}

#[test]
fn too_small_is_a_reason_and_never_clamped() {
    assert_eq!(check(V6, 1280), Ok(()));
    assert_eq!(check(V6, 1279), Err(MtuError::TooSmallForIpv6 { mtu: 1279, missing: 1 }));
    assert_eq!(check(V4, 576), Ok(()));
    assert_eq!(check(V4, 516), Err(MtuError::TooSmallForIpv4 { mtu: 516, missing: 60 }));
    assert_eq!(inner(&[Layer::Wireguard], V6, 1300), 1220);
    assert!(check(V6, 1220).unwrap_err().to_string().contains("60 bytes are missing"));
}

#[test]
fn what_an_inner_mtu_needs_is_the_least_that_yields_it() {
    let stacks = [
        Stack(vec![]),
        Mode::Vxlan.stack(false),
        Mode::Wireguard.stack(false),
        Mode::Ipsec.stack(false),
        Mode::VxlanIpsec.stack(false),
        Stack(vec![esp(EspMode::Tunnel, Cipher::AesCbcSha256, true)]),
        Stack(vec![Layer::Wireguard, esp(EspMode::Transport, Cipher::AesCbcSha256, false), Layer::Vxlan]),
    ];
    for stack in &stacks {
        for outer in Family::ALL {
            for wanted in (1..200).chain(1260..1520).chain(8900..9100) {
                let needed = underlay_needed(stack, outer, wanted);
                assert!(inner_mtu(stack, outer, needed).unwrap() >= wanted, "{stack} {outer} {wanted}");
                let less = inner_mtu(stack, outer, needed - 1).unwrap_or(0);
                assert!(less < wanted, "{stack} {outer} {wanted}: {needed} is not the least");
            }
        }
    }
    assert_eq!(underlay_needed(&Mode::Wireguard.stack(false), V6, 1280), 1360);
}

#[test]
fn the_ledger_accounts_for_every_byte() {
    let stacks = [
        Stack(vec![]),
        Mode::Vxlan.stack(false),
        Mode::Wireguard.stack(false),
        Mode::Ipsec.stack(false),
        Mode::VxlanIpsec.stack(false),
        Stack(vec![esp(EspMode::Transport, Cipher::AesCbcSha256, true), Layer::Vxlan]),
        Stack(vec![Layer::Wireguard, esp(EspMode::Tunnel, Cipher::AesCbcSha256, true), Layer::Vxlan]),
    ];
    for stack in &stacks {
        for outer in Family::ALL {
            for mtu in (576..=1600).chain([9000, 9001, 65535]) {
                let ledger = ledger(stack, outer, mtu);
                assert_eq!(ledger.inner, inner_mtu(stack, outer, mtu).ok(), "{stack} {outer} {mtu}");
                assert_eq!(ledger.entries.len(), stack.0.len());
                let mut left = mtu;
                for entry in &ledger.entries {
                    assert_eq!(entry.bytes, entry.parts.iter().map(|part| part.bytes).sum::<u32>());
                    left -= entry.bytes;
                    assert_eq!(entry.mtu, Some(left), "{stack} {outer} {mtu} {}", entry.layer);
                }
                assert_eq!(ledger.inner, Some(left));
                assert_eq!(ledger.overhead(), Some(mtu - left));
                assert_eq!(ledger.inner_mtu(), Ok(left));
            }
        }
    }
}

#[test]
fn the_ledger_shows_what_the_bytes_are() {
    let parts = |stack: &Stack, outer, mtu| -> Vec<(Component, u32)> {
        let ledger = ledger(stack, outer, mtu);
        ledger.entries.iter().flat_map(|entry| &entry.parts).map(|part| (part.component, part.bytes)).collect()
    };
    use Component::*;
    assert_eq!(
        parts(&Mode::Vxlan.stack(false), V6, 1500),
        [(OuterIpHeader, 40), (UdpHeader, 8), (VxlanHeader, 8), (InnerEthernetHeader, 14)]
    );
    assert_eq!(
        parts(&Mode::Wireguard.stack(false), V4, 1500),
        [(OuterIpHeader, 20), (UdpHeader, 8), (WireguardHeader, 16), (Padding, 0), (WireguardTag, 16)]
    );
    assert_eq!(
        parts(&Mode::VxlanIpsec.stack(false), V4, 1501),
        [
            (EspHeader, 8),
            (EspIv, 8),
            (Padding, 0),
            (EspTrailer, 2),
            (EspIcv, 16),
            (BlockRemainder, 1),
            (OuterIpHeader, 20),
            (UdpHeader, 8),
            (VxlanHeader, 8),
            (InnerEthernetHeader, 14),
        ]
    );
    // The UDP header of UDP encapsulation stands between the IP header, which in transport mode is the inner layer's, and
    // ESP.
    let esp = |remainder| {
        [(EspHeader, 8), (EspIv, 8), (Padding, 0), (EspTrailer, 2), (EspIcv, 16), (BlockRemainder, remainder)]
    };
    let tunnel = [vec![(OuterIpHeader, 40), (UdpHeader, 8)], esp(0).to_vec()].concat();
    assert_eq!(parts(&Mode::Ipsec.stack(true), V6, 1500), tunnel);
    let vxlan = vec![(OuterIpHeader, 20), (UdpHeader, 8), (VxlanHeader, 8), (InnerEthernetHeader, 14)];
    let transport = [vec![(UdpHeader, 8)], esp(0).to_vec(), vxlan].concat();
    assert_eq!(parts(&Mode::VxlanIpsec.stack(true), V4, 1500), transport);
}

#[test]
fn the_ledger_is_readable_by_scripts_and_back() {
    let ledger = ledger(&Mode::Wireguard.stack(false), V6, 1500);
    let json = serde_json::to_value(&ledger).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "stack": [{"layer": "wireguard"}],
            "outer": "ipv6",
            "underlayMtu": 1500,
            "entries": [{
                "layer": "WireGuard",
                "bytes": 80,
                "parts": [
                    {"component": "outerIpHeader", "bytes": 40},
                    {"component": "udpHeader", "bytes": 8},
                    {"component": "wireguardHeader", "bytes": 16},
                    {"component": "padding", "bytes": 0},
                    {"component": "wireguardTag", "bytes": 16},
                ],
                "mtu": 1420,
            }],
            "inner": 1420,
            "paddingProof": 1408,
        })
    );
    assert_eq!(serde_json::from_value::<Ledger>(json).unwrap(), ledger);
}

#[test]
fn a_stack_reads_as_people_say_it() {
    assert_eq!(Mode::VxlanIpsec.stack(false).to_string(), "VXLAN in ESP transport AES-GCM");
    assert_eq!(Mode::Direct.stack(false).to_string(), "no encapsulation");
    assert_eq!(Mode::VxlanIpsec.stack(true).to_string(), "VXLAN in ESP transport AES-GCM in UDP");
    assert_eq!(Mode::Ipsec.stack(true).to_string(), "ESP tunnel AES-GCM in UDP");
    let udp = Stack(vec![esp(EspMode::Tunnel, Cipher::AesCbcSha256, true)]);
    assert_eq!(udp.to_string(), "ESP tunnel AES-CBC-SHA256 in UDP");
}
