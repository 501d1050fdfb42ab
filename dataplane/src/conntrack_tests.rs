use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;

use husk_overlay::kernel::{MapKeyType, MapValueType, NftTable};

use super::*;
use crate::netns::Netns;

const PORT: u16 = 5353;

fn addressee(protocol: TransportProtocol, address: Option<&str>) -> Addressee {
    Addressee { address: address.map(|text| text.parse().unwrap()), protocol, port: PORT }
}

fn leads_to(pod: &str) -> BTreeMap<Addressee, MapValue> {
    [(addressee(TransportProtocol::Udp, None), MapValue::Address(pod.parse().unwrap()))].into()
}

fn appeared(pod: &str) -> NftChange {
    NftChange::AddMappings { map: "m".into(), elements: leads_to(pod) }
}

fn went(pod: &str) -> NftChange {
    NftChange::DeleteMappings { map: "m".into(), elements: leads_to(pod) }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Connections of the namespace to the port, one line each.
fn connections() -> Vec<String> {
    let all = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
    let port = format!("dport={PORT} ");
    all.lines().filter(|line| line.contains(&port)).map(str::to_owned).collect()
}

/// A datagram from a port of its own.
fn send(to: &str) {
    let to = SocketAddr::new(to.parse().unwrap(), PORT);
    let from = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    UdpSocket::bind(from).unwrap().send_to(b"x", to).unwrap();
}

/// A namespace in which a datagram to 127.0.0.2 is translated to 127.0.0.9, and one to 127.0.0.3 is not, and others.
fn in_world(test: impl FnOnce() + Send) {
    let world = || {
        run("ip", &["link", "set", "lo", "up"]);
        run("nft", &["add table ip t; add chain ip t c { type nat hook output priority -100; }"]);
        run("nft", &["add rule ip t c ip daddr 127.0.0.2 dnat to 127.0.0.9"]);
        // Connections of a family are tracked from the first rule on that needs it.
        run("nft", &["add table ip6 t; add chain ip6 t c { type nat hook output priority -100; }"]);
        run("nft", &["add rule ip6 t c ip6 daddr fd42::9 dnat to ::1"]);
        ["127.0.0.2", "127.0.0.3", "::1"].into_iter().for_each(send);
        assert_eq!(connections().len(), 3, "{:?}", connections());
        test();
    };
    Netns::new_unnamed().unwrap().run_in(world).unwrap();
}

#[test]
fn a_connection_to_who_had_the_port_ends_with_the_mapping() {
    in_world(|| {
        assert_eq!(forget(&[went("127.0.0.8")]).unwrap(), 0, "another pod had it");
        assert_eq!(forget(&[went("127.0.0.9")]).unwrap(), 1);
        let left = connections();
        assert!(left.len() == 2 && !left.iter().any(|line| line.contains("127.0.0.9")), "{left:?}");
        assert_eq!(forget(&[went("127.0.0.9")]).unwrap(), 0);
    });
}

#[test]
fn a_connection_that_began_without_the_mapping_ends_when_it_appears() {
    in_world(|| {
        assert_eq!(forget(&[appeared("10.42.0.5")]).unwrap(), 1);
        let left = connections();
        assert!(left.len() == 2 && !left.iter().any(|line| line.contains("dst=127.0.0.3")), "{left:?}");
        assert_eq!(forget(&[appeared("fd42::5")]).unwrap(), 1, "the other family");
        assert_eq!(connections().len(), 1);
    });
}

/// A table that is made anew was missing for a while.
#[test]
fn what_stands_in_a_map_that_is_made_anew_counts_as_new() {
    let map =
        Map { key: MapKeyType::Port, value: MapValueType::Address(Family::Ipv4), elements: leads_to("10.42.0.5") };
    let table = NftTable { maps: [("m".to_owned(), map.clone())].into(), ..NftTable::default() };
    for change in [
        NftChange::CreateTable { table: table.clone() },
        NftChange::ReplaceTable { table, reason: String::new() },
        NftChange::AddMap { name: "m".into(), map: map.clone() },
        NftChange::ReplaceMap { name: "m".into(), map },
    ] {
        in_world(|| assert_eq!(forget(std::slice::from_ref(&change)).unwrap(), 1, "{change}"));
    }
}

/// For many ports at once, the kernel lists all connections.
#[test]
fn many_mappings_at_once_are_looked_through_in_one_go() {
    let mut elements = leads_to("127.0.0.9");
    for port in 1..200 {
        let key = Addressee { port, ..addressee(TransportProtocol::Udp, None) };
        elements.insert(key, MapValue::Address(Ipv4Addr::new(127, 0, 0, 9).into()));
    }
    in_world(|| {
        assert_eq!(forget(&[NftChange::DeleteMappings { map: "m".into(), elements: elements.clone() }]).unwrap(), 1);
        assert_eq!(connections().len(), 2);
    });
}

#[test]
fn only_what_the_mapping_is_about_is_touched() {
    let connection = |protocol: TransportProtocol, destination: &str, answers: &str| Connection {
        protocol: protocol.number(),
        destination: destination.parse().unwrap(),
        port: PORT,
        answers: answers.parse().unwrap(),
        tuple: Attributes::default(),
        id: None,
        zone: None,
    };
    let local = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
    let of = |protocol, address, from: Option<&str>| Moved {
        family: Family::Ipv4,
        addressee: addressee(protocol, address),
        from: from.map(|text| text.parse().unwrap()),
    };
    use TransportProtocol::{Tcp, Udp};
    let (node, pod) = ("192.0.2.1", "10.42.0.5");
    for (moved, connection, stale) in [
        (of(Tcp, None, Some(pod)), connection(Tcp, node, pod), true),
        (of(Tcp, None, Some(pod)), connection(Udp, node, pod), false),
        (of(Tcp, Some(node), Some(pod)), connection(Tcp, node, pod), true),
        (of(Tcp, Some("192.0.2.2"), Some(pod)), connection(Tcp, node, pod), false),
        // To the pod's own address, whose port happens to be the same.
        (of(Tcp, None, Some(pod)), connection(Tcp, pod, pod), false),
        (of(Udp, None, None), connection(Udp, node, node), true),
        // To somebody else, through this host.
        (of(Udp, None, None), connection(Udp, "198.51.100.1", "198.51.100.1"), false),
        // Translated by somebody else.
        (of(Udp, None, None), connection(Udp, node, "10.42.0.9"), false),
        // With a server of the host.
        (of(Tcp, None, None), connection(Tcp, node, node), false),
    ] {
        assert_eq!(connection.contradicts(&moved, &local), stale, "{moved:?} {connection:?}");
    }
}
