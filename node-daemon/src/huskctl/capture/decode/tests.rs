use std::time::Duration;

use etherparse::PacketBuilder;

use super::*;

fn ports() -> TunnelPorts {
    TunnelPorts { vxlan: Some(4789), wireguard: vec![51820, 51821], esp: Some(4500) }
}

fn content(link: Link, bytes: &[u8]) -> Content {
    let names = [("10.42.0.2".parse().unwrap(), "default/a".to_owned())].into();
    let ports = ports();
    Decoder { side: "inner", ports: &ports, names: &names }.content(link, bytes, true)
}

/// A UDP packet between the pods, or the hosts.
fn udp(ethernet: bool, (source, destination): ([u8; 4], [u8; 4]), ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if ethernet {
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(source, destination, 64).udp(ports.0, ports.1);
        builder.write(&mut bytes, payload).unwrap();
    } else {
        PacketBuilder::ipv4(source, destination, 64).udp(ports.0, ports.1).write(&mut bytes, payload).unwrap();
    }
    bytes
}

const PODS: ([u8; 4], [u8; 4]) = ([10, 42, 0, 2], [10, 42, 1, 2]);
const HOSTS: ([u8; 4], [u8; 4]) = ([172, 16, 0, 1], [172, 16, 0, 2]);

fn outer(port: u16, payload: &[u8]) -> String {
    content(Link::Ethernet, &udp(true, HOSTS, (40_000, port), payload)).to_string()
}

#[test]
fn packets_of_pods_are_told_with_their_names() {
    let plain = udp(false, PODS, (4000, 53), b"x");
    assert_eq!(content(Link::None, &plain).to_string(), "UDP 10.42.0.2:4000 (default/a) > 10.42.1.2:53");
    let mut tcp = Vec::new();
    let builder = PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64).tcp(4000, 80, 1, 9).syn();
    builder.write(&mut tcp, &[]).unwrap();
    let told = content(Link::None, &tcp).to_string();
    assert!(told.starts_with("TCP [fdfd:") && told.ends_with("]:80, SYN"), "{told}");
    let mut echo = Vec::new();
    PacketBuilder::ipv4(PODS.0, PODS.1, 64).icmpv4_echo_request(1, 2).write(&mut echo, &[]).unwrap();
    let told = content(Link::None, &echo).to_string();
    assert_eq!(told, "ICMP 10.42.0.2 (default/a) > 10.42.1.2, type 8 code 0, echo request");
}

#[test]
fn packets_of_tunnels_are_told_apart() {
    let hosts = "172.16.0.1:40000 > 172.16.0.2";
    let message = |kind: u8, length: usize| {
        let mut message = vec![kind, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
        message.resize(length, 0);
        message
    };
    for (payload, told) in [
        (message(1, 148), "WireGuard handshake initiation {}:51820, from session 0x00000007"),
        (message(2, 92), "WireGuard handshake response {}:51820, for session 0x00000009"),
        (message(4, 128), "WireGuard data {}:51820, for session 0x00000007, counter 9"),
        (message(4, 32), "WireGuard keepalive {}:51820, for session 0x00000007, counter 9"),
        (message(9, 32), "UDP at the port of WireGuard, but none of its messages {}:51820"),
    ] {
        assert_eq!(outer(51820, &payload), told.replace("{}", hosts));
    }
    let vxlan = [&[8, 0, 0, 0, 0, 0x10, 0x92, 0][..], &udp(true, PODS, (4000, 53), b"x")].concat();
    let told = outer(4789, &vxlan);
    assert_eq!(told, format!("VXLAN 4242 {hosts}:4789 [UDP 10.42.0.2:4000 (default/a) > 10.42.1.2:53]"));
    let esp = [0, 0, 1, 0, 0, 0, 0, 5, 1, 2, 3, 4];
    assert_eq!(outer(4500, &esp), format!("ESP in UDP {hosts}:4500, SPI 0x00000100, sequence 5"));
    let mut bare = Vec::new();
    PacketBuilder::ipv4(HOSTS.0, HOSTS.1, 64).write(&mut bare, IpNumber::ENCAPSULATING_SECURITY_PAYLOAD, &esp).unwrap();
    let read = content(Link::None, &bare);
    assert_eq!(read.to_string(), "ESP 172.16.0.1 > 172.16.0.2, SPI 0x00000100, sequence 5");
    assert!(read.is_encrypted());
}

#[test]
fn whatever_the_bytes_they_are_one_line() {
    let whole = [&[8, 0, 0, 0, 0, 0x10, 0x92, 0][..], &udp(true, PODS, (4000, 53), b"x")].concat();
    let whole = udp(true, HOSTS, (40_000, 4789), &whole);
    for length in 0..whole.len() {
        for link in [Link::Ethernet, Link::None] {
            assert!(!content(link, &whole[..length]).to_string().contains('\n'));
        }
    }
}

#[test]
fn a_tunnel_in_a_tunnel_is_not_looked_into() {
    let vxlan = |inner: &[u8]| udp(true, HOSTS, (40_000, 4789), &[&[8, 0, 0, 0, 0, 0x10, 0x92, 0][..], inner].concat());
    let nested = (0..1000).fold(udp(true, PODS, (4000, 53), b"x"), |inner, _| vxlan(&inner));
    let inside = content(Link::Ethernet, &nested).inside.unwrap();
    assert!(inside.protocol.starts_with("VXLAN") && inside.inside.is_none());
}

#[test]
fn a_line_has_time_side_and_interface() {
    let names = BTreeMap::new();
    let ports = ports();
    let decoder = Decoder { side: "inner", ports: &ports, names: &names };
    let bytes = udp(false, PODS, (4000, 53), b"x");
    let captured = Captured {
        at: Duration::new(1_796_000_000, 123_456_789),
        outgoing: true,
        link: Link::None,
        kept: bytes.len(),
        length: bytes.len(),
    };
    let line = decoder.decode("husk-wg0", &captured, &bytes).to_string();
    assert!(line.contains(".123456 inner -> husk-wg0     UDP 10.42.0.2:4000 > 10.42.1.2:53, 29 bytes"), "{line}");
    let json = serde_json::to_value(decoder.decode("husk-wg0", &captured, &bytes)).unwrap();
    assert_eq!(json["source"], serde_json::json!({"address": "10.42.0.2", "port": 4000}));
}

#[test]
fn what_is_not_looked_into_has_the_name_of_its_protocol() {
    let mut bytes = udp(false, PODS, (4000, 53), b"x");
    // A fragment that is not the first has no header of its protocol (RFC 791, section 3.1).
    bytes[7] = 1;
    for (number, name) in [(1, "ICMP"), (132, "SCTP"), (47, "IP protocol 47")] {
        bytes[9] = number;
        assert_eq!(content(Link::None, &bytes).protocol, name);
    }
}
