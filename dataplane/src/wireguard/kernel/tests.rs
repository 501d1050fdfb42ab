use std::net::SocketAddr;

use husk_overlay::kernel::WireguardDevice;
use husk_overlay::keys::PrivateKey;
use netlink_packet_wireguard::WireguardTimeSpec;

use super::super::{AllowedIpsUpdate, PeerUpdate, diff};
use super::*;

fn key(number: u32) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn prefix(number: u32) -> Prefix {
    Prefix::containing((0x0a00_0000 + (number << 8)).to_be_bytes().into(), 24).unwrap()
}

fn interface() -> InterfaceName {
    InterfaceName::new("husk-wg0").unwrap()
}

fn allowed(numbers: std::ops::Range<u32>) -> Vec<Prefix> {
    numbers.map(prefix).collect()
}

/// Bytes of a message behind the netlink header.
fn bytes(message: &Message) -> Vec<u8> {
    let mut buffer = vec![0; NetlinkSerializable::buffer_len(message)];
    message.serialize(&mut buffer);
    buffer
}

#[test]
fn records_split_over_messages_are_merged_by_key() {
    // What the kernel sends for three peers of which the second fills several messages: as in `get_peer`, a continued peer
    // has only its key and more allowed-ips.
    let time = WireguardTimeSpec { seconds: 1_700_000_000, nano_seconds: 5 };
    let first_of = |number, prefixes: &[Prefix]| {
        let attributes = vec![
            WireguardPeerAttribute::PresharedKey([u8::from(number == 3); 32]),
            WireguardPeerAttribute::LastHandshake(if number == 1 { time } else { WireguardTimeSpec::default() }),
            WireguardPeerAttribute::PersistentKeepalive(25),
            WireguardPeerAttribute::TxBytes(10),
            WireguardPeerAttribute::RxBytes(20),
            WireguardPeerAttribute::ProtocolVersion(1),
            WireguardPeerAttribute::Endpoint("[2001:db8::1]:51820".parse().unwrap()),
        ];
        record(&key(number), WireguardPeerFlags::empty(), attributes, prefixes)
    };
    let more_of = |number, prefixes: &[Prefix]| record(&key(number), WireguardPeerFlags::empty(), vec![], prefixes);
    let own = PrivateKey::from_random([3; 32]).unwrap().public();
    let messages = [
        vec![
            WireguardAttribute::ListenPort(51820),
            WireguardAttribute::Fwmark(0),
            WireguardAttribute::IfIndex(3),
            WireguardAttribute::IfName("husk-wg0".to_owned()),
            WireguardAttribute::PrivateKey([3; 32]),
            WireguardAttribute::PublicKey(*own.as_bytes()),
            WireguardAttribute::Peers(vec![first_of(1, &allowed(0..2)), first_of(2, &allowed(2..400))]),
        ],
        vec![
            WireguardAttribute::IfName("husk-wg0".to_owned()),
            WireguardAttribute::Peers(vec![more_of(2, &allowed(400..900))]),
        ],
        vec![
            WireguardAttribute::IfName("husk-wg0".to_owned()),
            WireguardAttribute::Peers(vec![more_of(2, &allowed(900..1000)), first_of(3, &[])]),
        ],
    ];
    // Through bytes and back, as from the kernel.
    let received: Vec<Message> = messages
        .into_iter()
        .map(|attributes| {
            let bytes = bytes(&Message::new(24, WireguardCmd::GetDevice, attributes));
            Message::deserialize(&NetlinkHeader::default(), &bytes).unwrap()
        })
        .collect();
    let state = merge(received.iter().flat_map(|message| message.0.payload.attributes.iter())).unwrap();
    assert_eq!((state.public_key, state.listen_port, state.firewall_mark), (Some(own), 51820, 0));
    assert_eq!(state.peers.len(), 3);
    assert_eq!(state.peers[&key(1)].allowed_ips, allowed(0..2).into_iter().collect());
    assert_eq!(state.peers[&key(2)].allowed_ips, allowed(2..1000).into_iter().collect());
    assert_eq!(state.peers[&key(2)].keepalive, 25);
    assert_eq!(state.preshared, [key(3)].into());
    let status = state.status[&key(1)];
    assert_eq!(status.last_handshake, Some(std::time::Duration::new(1_700_000_000, 5)));
    assert_eq!((status.sent_bytes, status.received_bytes), (10, 20));
    assert_eq!(state.status[&key(2)].last_handshake, None);
    assert_eq!(state.status[&key(2)].endpoint, Some("[2001:db8::1]:51820".parse().unwrap()));
}

/// A change as the kernel gets it, decoded again: attributes per message without the name.
fn sent(action: &WireguardAction) -> Vec<WireguardAttribute> {
    let keys: KeyRing = [PrivateKey::from_random([3; 32]).unwrap()].into_iter().collect();
    let all = messages(action, &interface(), &keys).unwrap();
    all.into_iter()
        .map(|attribute| {
            let message = Message::set(24, &interface(), attribute);
            let decoded = Message::deserialize(&NetlinkHeader::default(), &bytes(&message)).unwrap();
            assert_eq!(decoded.0.payload.cmd, WireguardCmd::SetDevice);
            assert_eq!(decoded.0.payload.attributes[0], WireguardAttribute::IfName("husk-wg0".to_owned()));
            assert_eq!(decoded.0.payload.attributes.len(), 2);
            decoded.0.payload.attributes[1].clone()
        })
        .collect()
}

fn peers(attribute: &WireguardAttribute) -> &[PeerRecord] {
    match attribute {
        WireguardAttribute::Peers(peers) => peers,
        _ => panic!("no peers"),
    }
}

/// Public key, flags and number of allowed-ips of a record.
fn summary(record: &PeerRecord) -> (PublicKey, u32, usize) {
    let (mut key, mut flags, mut count) = (None, 0, 0);
    for attribute in &record.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(PublicKey::from_bytes(*bytes).unwrap()),
            WireguardPeerAttribute::Flags(it) => flags = it.bits(),
            WireguardPeerAttribute::AllowedIps(all) => count += all.len(),
            _ => {}
        }
    }
    (key.unwrap(), flags, count)
}

const REMOVE_ME: u32 = 1;
const REPLACE_ALLOWEDIPS: u32 = 2;
const UPDATE_ONLY: u32 = 4;

#[test]
fn a_new_peer_is_one_record_without_replacing_anything() {
    let peer = WireguardPeer {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 1], 51820))),
        allowed_ips: [prefix(1), "fd42::/64".parse().unwrap()].into(),
        keepalive: 0,
    };
    let sent = sent(&WireguardAction::AddPeer { public_key: key(1), peer });
    assert_eq!(sent.len(), 1);
    assert_eq!(peers(&sent[0]).iter().map(summary).collect::<Vec<_>>(), [(key(1), 0, 2)]);
}

#[test]
fn many_allowed_ips_go_in_several_messages_each_within_the_limit_of_an_attribute() {
    let allowed_ips = (0..5000_u32).map(|number| {
        Prefix::containing(std::net::Ipv6Addr::from((0xfd42_u128 << 112) + (u128::from(number) << 64)).into(), 64)
            .unwrap()
    });
    let peer = WireguardPeer { endpoint: None, allowed_ips: allowed_ips.collect(), keepalive: 0 };
    let action = WireguardAction::AddPeer { public_key: key(1), peer };
    let sent = sent(&action);
    let summaries: Vec<_> = sent.iter().flat_map(peers).map(summary).collect();
    assert_eq!(summaries[0], (key(1), 0, 1000));
    assert!(summaries[1..].iter().all(|it| *it == (key(1), UPDATE_ONLY, 1000)), "{summaries:?}");
    assert_eq!(summaries.len(), 5);
    for attribute in sent {
        assert!(bytes(&Message::set(24, &interface(), attribute)).len() < usize::from(u16::MAX));
    }
}

#[test]
fn an_update_adds_without_replacing_and_removes_through_a_peer_that_nobody_is() {
    let update = PeerUpdate {
        allowed_ips: Some(AllowedIpsUpdate {
            add: [prefix(1)].into(),
            remove: [prefix(2), prefix(3)].into(),
            moved: [prefix(4)].into(),
            result: [prefix(1)].into(),
        }),
        ..PeerUpdate::default()
    };
    let sent = sent(&WireguardAction::UpdatePeer { public_key: key(1), update });
    let summaries: Vec<Vec<_>> = sent.iter().map(|attribute| peers(attribute).iter().map(summary).collect()).collect();
    assert_eq!(
        summaries,
        [vec![(key(1), UPDATE_ONLY, 1)], vec![(nobody(), 0, 2), (nobody(), REMOVE_ME, 0)]],
        "no record may have flag {REPLACE_ALLOWEDIPS}"
    );
}

#[test]
fn a_removed_peer_and_a_removed_preshared_key() {
    let removed = sent(&WireguardAction::RemovePeer { public_key: key(1) });
    assert_eq!(summary(&peers(&removed[0])[0]), (key(1), REMOVE_ME, 0));
    let update = PeerUpdate { clear_preshared_key: true, ..PeerUpdate::default() };
    let updated = sent(&WireguardAction::UpdatePeer { public_key: key(1), update });
    assert!(peers(&updated[0])[0].0.contains(&WireguardPeerAttribute::PresharedKey([0; 32])));
}

#[test]
fn bytes_are_those_of_the_header_file() {
    // WGDEVICE_A_IFNAME "husk-wg0", WGDEVICE_A_PEERS { 0 { WGPEER_A_PUBLIC_KEY, WGPEER_A_FLAGS, WGPEER_A_ENDPOINT,
    // WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, WGPEER_A_ALLOWEDIPS { 0 { FAMILY, IPADDR, CIDR_MASK } } } } by the numbers of
    // include/uapi/linux/wireguard.h, in the host's byte order, ports and addresses in the network's.
    let attribute = |kind: u16, value: &[u8]| {
        let length = u16::try_from(value.len() + 4).unwrap();
        let mut all = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        all.extend_from_slice(value);
        all.resize(all.len().next_multiple_of(4), 0);
        all
    };
    const NESTED: u16 = 0x8000;
    let allowed_ip = [attribute(1, &2_u16.to_ne_bytes()), attribute(2, &[10, 0, 7, 0]), attribute(3, &[24])].concat();
    let endpoint = [&2_u16.to_ne_bytes()[..], &51820_u16.to_be_bytes(), &[192, 0, 2, 1], &[0; 8]].concat();
    let peer = [
        attribute(1, key(1).as_bytes()),
        attribute(3, &UPDATE_ONLY.to_ne_bytes()),
        attribute(4, &endpoint),
        attribute(5, &25_u16.to_ne_bytes()),
        attribute(9 | NESTED, &attribute(NESTED, &allowed_ip)),
    ]
    .concat();
    let expected = [
        // struct genlmsghdr: WG_CMD_SET_DEVICE, version 1.
        vec![1, 1, 0, 0],
        attribute(2, b"husk-wg0\0"),
        attribute(8 | NESTED, &attribute(NESTED, &peer)),
    ]
    .concat();
    let update = PeerUpdate {
        endpoint: Some(SocketAddr::from(([192, 0, 2, 1], 51820))),
        keepalive: Some(25),
        allowed_ips: Some(AllowedIpsUpdate { add: [prefix(7)].into(), ..AllowedIpsUpdate::default() }),
        ..PeerUpdate::default()
    };
    let action = WireguardAction::UpdatePeer { public_key: key(1), update };
    let all = messages(&action, &interface(), &KeyRing::default()).unwrap();
    let message = Message::set(24, &interface(), all.into_iter().next().unwrap());
    assert_eq!(message.message_type(), 24);
    assert_eq!(bytes(&message), expected);
}

#[test]
fn a_key_that_is_not_in_the_ring_is_an_error_and_no_key_is_shown() {
    let action = WireguardAction::SetPrivateKey { public_key: key(1) };
    assert!(matches!(messages(&action, &interface(), &KeyRing::default()), Err(Error::NoPrivateKey { .. })));
    let message = Message::set(24, &interface(), WireguardAttribute::PrivateKey([3; 32]));
    assert_eq!(format!("{message:?}"), "WireGuard message");
}

/// This kernel may have WireGuard or not; either way the answer is clear, and a device that is missing is none.
#[test]
fn support_is_told_and_a_missing_device_is_none() {
    crate::netns::Netns::new_unnamed()
        .unwrap()
        .run_in(|| {
            let mut devices = KernelDevices::open().unwrap();
            match devices.family() {
                Ok(family) => assert!(family > 0x10, "{family}"),
                Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error}"),
            }
            assert_eq!(devices.read(&interface()).unwrap(), None);
            let desired = WireguardDevice {
                userspace: false,
                public_key: key(1),
                listen_port: 1,
                peers: [(key(2), WireguardPeer { endpoint: None, allowed_ips: [].into(), keepalive: 0 })].into(),
            };
            let changes = diff(&interface(), &desired, None);
            let actions: Vec<_> = changes.iter().map(|change| &change.action).collect();
            let results = devices.apply(&interface(), &actions, &KeyRing::default());
            assert_eq!(results.len(), 3);
            assert!(results.iter().all(Result::is_err));
        })
        .unwrap();
}
