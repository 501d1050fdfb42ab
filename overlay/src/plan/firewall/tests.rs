//! What becomes of packets: the rules are read as a kernel reads them.

use std::net::IpAddr;

use super::path_mtu::{FRAGMENTATION_NEEDED, PATH_MTU_BELOW_FLOOR};
use super::*;
use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::facts::{Facts, WireguardSupport};
use crate::mtu::{MINIMUM_IPV6, underlay_needed};
use crate::plan::plan;
use crate::record::Snapshot;

const ETHERNET: &str = "eth0";
const POD: &str = "husk0123456789a";
const VXLAN: Option<u16> = Some(4789);

/// A packet at a hook.
#[derive(Clone, Copy)]
struct Packet {
    input: &'static str,
    output: &'static str,
    source: &'static str,
    destination: &'static str,
    /// UDP port it is for; other packets have none.
    port: Option<u16>,
    /// UDP port it comes from.
    from: u16,
    /// Bytes, IP header included.
    length: u32,
    /// An ICMP error of this type, and the UDP port of the packet that it quotes.
    error: Option<(&'static str, u16)>,
    /// What an ICMP error says of a path.
    too_big: Option<TooBig>,
    decrypted: bool,
    transformation: bool,
}

/// An ICMP error about the size of a packet.
#[derive(Clone, Copy)]
struct TooBig {
    code: u32,
    mtu: u32,
    /// Between whom the connection is of which it quotes a packet; none if there is no such connection.
    connection: Option<(&'static str, &'static str)>,
    /// Protocol of the packet that it quotes.
    quotes: u32,
}

/// Between two underlay addresses; what is not said of the packet is as in plaintext.
const UNDERLAY: Packet = Packet {
    input: ETHERNET,
    output: ETHERNET,
    source: "192.0.2.1",
    destination: "192.0.2.2",
    port: None,
    from: 51820,
    length: 1500,
    error: None,
    too_big: None,
    decrypted: false,
    transformation: false,
};

/// Between two pods.
const INNER: Packet = Packet { source: "10.42.0.5", destination: "10.42.0.70", ..UNDERLAY };

/// Between two pods, IPv6.
const INNER_V6: Packet = Packet { source: "fd42::5", destination: "fd42::46", ..UNDERLAY };

/// From a node to a node.
const TUNNEL: Packet = Packet { port: VXLAN, ..UNDERLAY };

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Pass,
    /// With DF.
    Whole,
    Drop(Option<String>),
}

fn counted(counter: &str) -> Verdict {
    Verdict::Drop(Some(counter.to_owned()))
}

fn matches(table: &NftTable, packet: &Packet, it: &Match) -> bool {
    let address = |family: Family, text: &str| {
        let address: IpAddr = text.parse().unwrap();
        (Family::of(address) == family).then_some(address)
    };
    let name = |name: &str| match &it.value {
        MatchValue::Text(text) => match text.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == text,
        },
        other => panic!("an interface is compared with {other:?}"),
    };
    let within = |address: Option<IpAddr>| {
        // The other family has no such header, so that the rule ends there whatever the operator.
        let Some(address) = address else { return it.operator == MatchOperator::NotEqual };
        match &it.value {
            MatchValue::Set(set) => table.sets[set].elements.iter().any(|element| match element {
                SetElement::Address(one) => *one == address,
                SetElement::Prefix(prefix) => prefix.contains(address),
                SetElement::Pair(..) => panic!("an address is no pair"),
            }),
            MatchValue::Prefix(prefix) => prefix.contains(address),
            other => panic!("an address is compared with {other:?}"),
        }
    };
    let exists = |there: bool| match it.value {
        MatchValue::Present => there,
        MatchValue::Missing => !there,
        ref other => panic!("presence is compared with {other:?}"),
    };
    let holds = match it.key {
        MatchKey::InputInterface => name(packet.input),
        MatchKey::OutputInterface => name(packet.output),
        MatchKey::Source(family) => within(address(family, packet.source)),
        MatchKey::Destination(family) => within(address(family, packet.destination)),
        MatchKey::Protocol => packet.port.is_some() && it.value == MatchValue::Number(UDP),
        // The packets of these tests that have ports are UDP.
        MatchKey::TcpDestinationPort => false,
        MatchKey::UdpDestinationPort => packet.port.is_some_and(|port| it.value == MatchValue::Number(port.into())),
        MatchKey::IcmpType(family) => packet.error.is_some_and(|(name, _)| {
            let MatchValue::AnyOf(names) = &it.value else { panic!("a type is compared with {:?}", it.value) };
            address(family, packet.source).is_some() && names.iter().any(|it| it == name)
        }),
        MatchKey::IcmpCode => packet.too_big.is_some_and(|it_is| it.value == MatchValue::Number(it_is.code)),
        MatchKey::IcmpMtu(_) => {
            let (MatchOperator::Less, MatchValue::Number(number)) = (it.operator, &it.value) else { panic!("{it:?}") };
            return packet.too_big.is_some_and(|it_is| it_is.mtu < *number);
        }
        MatchKey::ConnectionState => {
            assert_eq!(it.value, MatchValue::Text("invalid".into()));
            packet.too_big.is_some_and(|it_is| it_is.connection.is_none())
        }
        MatchKey::ConnectionSource(family) => {
            within(connection(packet).and_then(|(source, _)| address(family, source)))
        }
        MatchKey::ConnectionDestination(family) => {
            within(connection(packet).and_then(|(_, destination)| address(family, destination)))
        }
        MatchKey::QuotedProtocol(_) => {
            it.value == MatchValue::Number(packet.too_big.map_or(UDP, |too_big| too_big.quotes))
        }
        MatchKey::UdpSourcePort => it.value == MatchValue::Number(packet.from.into()),
        MatchKey::Length => {
            let (MatchOperator::Greater, MatchValue::Number(number)) = (it.operator, &it.value) else {
                panic!("{it:?}")
            };
            return packet.length > *number;
        }
        MatchKey::QuotedUdpDestinationPort(_) => {
            packet.error.is_some_and(|(_, port)| it.value == MatchValue::Number(port.into()))
        }
        MatchKey::Decrypted => exists(packet.decrypted),
        MatchKey::Transformation => exists(packet.transformation),
        MatchKey::ReversePathInterface => exists(true),
        MatchKey::TcpSynRst => false,
        MatchKey::NetworkFamily | MatchKey::AddressPair(_) | MatchKey::DestinationKind => {
            panic!("no filter looks at it")
        }
    };
    holds == (it.operator == MatchOperator::Equal)
}

fn connection(packet: &Packet) -> Option<(&'static str, &'static str)> {
    packet.too_big.and_then(|it| it.connection)
}

fn verdict(table: &NftTable, chain: &str, packet: Packet) -> Verdict {
    for rule in &table.chains[chain].rules {
        let mut counter = None;
        for statement in &rule.statements {
            match statement {
                Statement::Match(it) if !matches(table, &packet, it) => break,
                Statement::Match(_) => {}
                Statement::Counter(name) => {
                    assert!(table.counters.contains(name), "{name} is no counter");
                    counter = Some(name.clone());
                }
                Statement::Accept => return Verdict::Pass,
                Statement::Drop => return Verdict::Drop(counter),
                Statement::DontFragment => return Verdict::Whole,
                Statement::Masquerade
                | Statement::TranslateSource(_)
                | Statement::TranslateDestination { .. }
                | Statement::ClampMss => {
                    panic!("{} is no filter", rule.name)
                }
            }
        }
    }
    Verdict::Pass
}

/// The table of a node without peers.
fn table(mode: Mode) -> NftTable {
    table_over(mode, Family::Ipv4)
}

/// The same with an underlay of this family.
fn table_over(mode: Mode, family: Family) -> NftTable {
    table_with(mode, family, None)
}

/// The same where WireGuard can be had so.
fn table_with(mode: Mode, family: Family, wireguard: Option<WireguardSupport>) -> NftTable {
    let mut config = Config::new(["10.42.0.0/16", "fd42::/48"].map(|cidr| cidr.parse().unwrap()).to_vec());
    config.mode = mode;
    config.underlay.family = family;
    let facts = Facts {
        node: "node-a".parse().unwrap(),
        instance: crate::name::InstanceId::new(&"0".repeat(32)).unwrap(),
        created: "2026-06-01T00:00:00Z".parse().unwrap(),
        addresses: ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap()).into_iter().collect(),
        underlay_mtu: 1500,
        underlay_interface: Some(ETHERNET.parse().unwrap()),
        foreign_prefixes: BTreeSet::new(),
        routes: BTreeMap::new(),
        wireguard,
        probed: BTreeMap::new(),
        silent: BTreeSet::new(),
        offload: crate::offload::Offload::default(),
        wireguard_epochs: BTreeMap::new(),
        sessions: BTreeMap::new(),
        esp: None,
        uptime: std::time::Duration::ZERO,
        rotation_requested: false,
        pod_interfaces: BTreeMap::new(),
        threaded_napi: true,
        ipv6: true,
        router_advertisements: BTreeSet::new(),
    };
    plan(&config, &Snapshot::default(), &facts, &Endpoints::new()).desired.nft.unwrap()
}

const TUNNELLED: [Mode; 4] = [Mode::Vxlan, Mode::Wireguard, Mode::Ipsec, Mode::VxlanIpsec];

#[test]
fn pod_packets_leave_in_a_tunnel_or_not_at_all() {
    for mode in TUNNELLED {
        let table = table(mode);
        let out = |packet| verdict(&table, "postrouting-guard", packet);
        for inner in [INNER, INNER_V6] {
            assert_eq!(out(inner), counted(PLAINTEXT_OUT), "{mode}");
            assert_eq!(out(Packet { source: UNDERLAY.source, ..INNER }), counted(PLAINTEXT_OUT), "{mode}");
            assert_eq!(out(Packet { destination: "198.51.100.1", ..INNER }), counted(PLAINTEXT_OUT), "{mode}");
            for tunnel in ["husk-vx", "husk-wg0", "husk-ipsec", POD, "lo"] {
                assert_eq!(out(Packet { output: tunnel, ..inner }), Verdict::Pass, "{mode} {tunnel}");
            }
            // The packet meets the hook once more on its way into ESP, bound for the underlay's interface.
            let transformed = Packet { transformation: true, ..inner };
            let expected = if mode.uses_esp() { Verdict::Pass } else { counted(PLAINTEXT_OUT) };
            assert_eq!(out(transformed), expected, "{mode}");
        }
        assert_eq!(out(UNDERLAY), Verdict::Pass, "{mode}");
    }
}

#[test]
fn pod_packets_arrive_in_a_tunnel_or_not_at_all() {
    for mode in TUNNELLED {
        let table = table(mode);
        let arrived = |packet| verdict(&table, "prerouting-guard", packet);
        for inner in [INNER, INNER_V6] {
            // Also what ESP protected has to come out of the tunnel's own device, which checks whose association it was.
            for decrypted in [false, true] {
                assert_eq!(arrived(Packet { decrypted, ..inner }), counted(PLAINTEXT_IN), "{mode}");
            }
            for tunnel in ["husk-vx", "husk-wg1", "husk-ipsec"] {
                assert_eq!(arrived(Packet { input: tunnel, ..inner }), Verdict::Pass, "{mode} {tunnel}");
            }
        }
        assert_eq!(arrived(UNDERLAY), Verdict::Pass, "{mode}");
    }
}

#[test]
fn vxlan_in_esp_leaves_and_arrives_encrypted_or_not_at_all() {
    let table = table(Mode::VxlanIpsec);
    let six = |packet| Packet { source: "2001:db8::1", destination: "2001:db8::2", ..packet };
    for plain in [TUNNEL, six(TUNNEL)] {
        let out = |packet| verdict(&table, "postrouting-guard", packet);
        assert_eq!(out(plain), counted(PLAINTEXT_OUT));
        assert_eq!(out(Packet { transformation: true, ..plain }), Verdict::Pass);
        assert_eq!(out(Packet { port: Some(4790), ..plain }), Verdict::Pass);
        // Pods may speak VXLAN among themselves; that travels inside the tunnel.
        assert_eq!(out(Packet { output: "husk-vx", ..plain }), Verdict::Pass);
        assert_eq!(verdict(&table, "input-vtep", plain), counted(PLAINTEXT_IN));
        assert_eq!(verdict(&table, "input-vtep", Packet { port: Some(4790), ..plain }), Verdict::Pass);
    }
    // Decrypted, but from nobody who is a node.
    let stranger = Packet { decrypted: true, ..TUNNEL };
    assert_eq!(verdict(&table, "input-vtep", stranger), counted(UNKNOWN_VTEP));
    let mut known = table.clone();
    known.sets.get_mut("nodes").unwrap().elements.insert(SetElement::Address(TUNNEL.source.parse().unwrap()));
    assert_eq!(verdict(&known, "input-vtep", stranger), Verdict::Pass);
    assert_eq!(verdict(&known, "input-vtep", TUNNEL), counted(PLAINTEXT_IN));
}

#[test]
fn what_came_out_of_esp_is_not_quoted_in_plaintext() {
    for (family, [source, destination]) in
        [(Family::Ipv4, ["192.0.2.1", "192.0.2.2"]), (Family::Ipv6, ["2001:db8::1", "2001:db8::2"])]
    {
        let to_node = Packet { source, destination, ..UNDERLAY };
        for mode in TUNNELLED {
            let table = table_over(mode, family);
            let out = |error| verdict(&table, "postrouting-guard", Packet { error: Some(error), ..to_node });
            let expected = if mode == Mode::VxlanIpsec { counted(PLAINTEXT_OUT) } else { Verdict::Pass };
            for error in ["destination-unreachable", "time-exceeded", "parameter-problem"] {
                assert_eq!(out((error, 4789)), expected, "{mode}, {family}");
            }
            assert_eq!(out(("destination-unreachable", 53)), Verdict::Pass, "{mode}, {family}");
            assert_eq!(out(("echo-reply", 4789)), Verdict::Pass, "{mode}, {family}");
        }
    }
}

#[test]
fn a_path_mtu_under_which_the_overlay_could_not_work_is_not_believed() {
    for (family, [own, node, other], error, code) in [
        (Family::Ipv4, ["192.0.2.1", "192.0.2.2", "198.51.100.1"], "destination-unreachable", FRAGMENTATION_NEEDED),
        (Family::Ipv6, ["2001:db8::1", "2001:db8::2", "2001:db8:ffff::1"], "packet-too-big", 0),
    ] {
        for mode in TUNNELLED {
            let mut table = table_over(mode, family);
            table.sets.get_mut(NODES).unwrap().elements.insert(SetElement::Address(node.parse().unwrap()));
            let mut config = Config::new(Vec::new());
            config.mode = mode;
            let floor = underlay_needed(&config.stack(), family, MINIMUM_IPV6);
            let about = |mtu, code, connection, quotes| {
                // From any router on the way.
                let too_big = Some(TooBig { code, mtu, connection, quotes });
                let packet =
                    Packet { source: other, destination: own, error: Some((error, 4789)), too_big, ..UNDERLAY };
                verdict(&table, "input-path-mtu", packet)
            };
            let told = |mtu, code, connection| about(mtu, code, connection, UDP);
            for connection in [Some((own, node)), Some((node, own)), None] {
                let what = format!("{mode} over {family}, {connection:?}");
                for mtu in [0, 552, floor - 1] {
                    assert_eq!(told(mtu, code, connection), counted(PATH_MTU_BELOW_FLOOR), "{what}, {mtu}");
                }
                assert_eq!(told(floor, code, connection), Verdict::Pass, "{what}");
            }
            // The host's own business elsewhere is none of Husk's.
            assert_eq!(told(floor - 1, code, Some((own, other))), Verdict::Pass, "{mode} over {family}");
            // Nor is its TCP: the kernel asks the connection whether it is true.
            for connection in [Some((own, node)), Some((node, own)), None] {
                assert_eq!(about(floor - 1, code, connection, TCP), Verdict::Pass, "{mode} over {family}");
            }
            // A pod knows of its own connections what the kernel asks for.
            let pod = if family == Family::Ipv4 { INNER } else { INNER_V6 };
            for (mtu, destination, expected) in [
                (floor - 1, node, counted(PATH_MTU_BELOW_FLOOR)),
                (floor, node, Verdict::Pass),
                (floor - 1, other, Verdict::Pass),
            ] {
                let too_big = Some(TooBig { code, mtu, connection: None, quotes: TCP });
                let packet = Packet { input: POD, destination, error: Some((error, 4789)), too_big, ..pod };
                assert_eq!(verdict(&table, "prerouting-guard", packet), expected, "{mode} over {family}, {mtu}");
            }
            if family == Family::Ipv4 {
                assert_eq!(told(0, code - 1, Some((own, node))), Verdict::Pass, "{mode}: no word of a size");
            }
        }
    }
    assert!(!table(Mode::Direct).chains.contains_key("input-path-mtu"));
}

#[test]
fn what_the_kernel_lets_be_cut_on_the_way_to_nodes_may_not_be() {
    let kernel = Some(WireguardSupport::Kernel);
    let mut table = table_with(Mode::Wireguard, Family::Ipv4, kernel.clone());
    table.sets.get_mut(NODES).unwrap().elements.insert(SetElement::Address(TUNNEL.destination.parse().unwrap()));
    let out = |packet| verdict(&table, "output-dont-fragment", packet);
    // 1280 bytes for a pod, and 60 of the tunnel's.
    let large = Packet { length: 1341, ..TUNNEL };
    assert_eq!(out(large), Verdict::Whole);
    assert_eq!(out(Packet { from: 51821, ..large }), Verdict::Whole, "the other device");
    assert_eq!(out(Packet { length: 1340, ..large }), Verdict::Pass, "what has to pass in any case may be cut");
    assert_eq!(out(Packet { from: 53, ..large }), Verdict::Pass, "not of the tunnel");
    assert_eq!(out(Packet { destination: "198.51.100.1", ..large }), Verdict::Pass, "of another tunnel");
    // Everything else does that by itself.
    for (mode, family, wireguard) in [
        (Mode::Wireguard, Family::Ipv6, kernel),
        (Mode::Wireguard, Family::Ipv4, Some(WireguardSupport::Userspace)),
        (Mode::Vxlan, Family::Ipv4, None),
        (Mode::Ipsec, Family::Ipv4, None),
    ] {
        assert!(
            !table_with(mode, family, wireguard).chains.contains_key("output-dont-fragment"),
            "{mode} over {family}"
        );
    }
}

#[test]
fn vxlan_alone_is_not_expected_to_be_encrypted() {
    let mut table = table(Mode::Vxlan);
    assert_eq!(verdict(&table, "postrouting-guard", TUNNEL), Verdict::Pass);
    assert_eq!(verdict(&table, "input-vtep", TUNNEL), counted(UNKNOWN_VTEP));
    table.sets.get_mut("nodes").unwrap().elements.insert(SetElement::Address(TUNNEL.source.parse().unwrap()));
    assert_eq!(verdict(&table, "input-vtep", TUNNEL), Verdict::Pass);
}

#[test]
fn pods_do_not_speak_vxlan_for_the_node_in_any_mode_that_has_it() {
    for mode in Mode::ALL {
        let table = table(mode);
        let sent = Packet { input: POD, source: INNER.source, ..TUNNEL };
        let expected = if mode.uses_vxlan() { counted(POD_TO_VTEP) } else { Verdict::Pass };
        assert_eq!(verdict(&table, "prerouting-guard", sent), expected, "{mode}");
        let between_pods = Packet { destination: INNER.destination, ..sent };
        assert_eq!(verdict(&table, "prerouting-guard", between_pods), Verdict::Pass, "{mode}");
    }
}

/// Where a port mapping lets loopback addresses be routed, pods must not reach what listens there.
#[test]
fn pods_do_not_reach_loopback_addresses_of_the_host() {
    for mode in Mode::ALL {
        let table = table(mode);
        let sent = Packet { input: POD, source: INNER.source, destination: "127.0.0.1", ..UNDERLAY };
        assert_eq!(verdict(&table, "prerouting-guard", sent), Verdict::Drop(None), "{mode}");
        let own = Packet { input: "lo", source: "127.0.0.1", ..sent };
        assert_eq!(verdict(&table, "prerouting-guard", own), Verdict::Pass, "{mode}");
    }
}

/// Kernels without IPsec refuse these keys, and have no use for them in other modes.
#[test]
fn ipsec_is_looked_at_in_ipsec_modes_only() {
    for mode in Mode::ALL {
        let table = table(mode);
        let hooks: BTreeSet<(&str, String)> = table
            .chains
            .iter()
            .flat_map(|(name, chain)| chain.rules.iter().map(move |rule| (name, rule)))
            .flat_map(|(name, rule)| rule.statements.iter().map(move |statement| (name, statement)))
            .filter_map(|(name, statement)| match statement {
                Statement::Match(Match { key: MatchKey::Transformation, .. }) => Some(("route", name.clone())),
                Statement::Match(Match { key: MatchKey::Decrypted, .. }) => Some(("packet", name.clone())),
                _ => None,
            })
            .collect();
        let expected: &[(&str, &str)] = match mode {
            Mode::Direct | Mode::Vxlan | Mode::Wireguard => &[],
            Mode::Ipsec => &[("route", "postrouting-guard")],
            Mode::VxlanIpsec => &[("packet", "input-vtep"), ("route", "postrouting-guard")],
        };
        assert_eq!(hooks, expected.iter().map(|(key, chain)| (*key, (*chain).to_owned())).collect(), "{mode}");
    }
}

#[test]
fn probes_are_answered_only_to_whom_a_tunnel_lets_in() {
    let probe = |input| Packet { input, port: Some(marks::PROBE_PORT), ..INNER };
    for mode in [Mode::Vxlan, Mode::Wireguard, Mode::Ipsec, Mode::VxlanIpsec] {
        let table = table(mode);
        for outside in [ETHERNET, POD, "lo"] {
            assert_eq!(verdict(&table, "input-probe", probe(outside)), counted(PROBE_OUTSIDE), "{mode} {outside}");
            let other = Packet { port: Some(53), ..probe(outside) };
            assert_eq!(verdict(&table, "input-probe", other), Verdict::Pass, "{mode} {outside}");
        }
        for tunnel in ["husk-vx", "husk-wg1", "husk-ipsec"] {
            assert_eq!(verdict(&table, "input-probe", probe(tunnel)), Verdict::Pass, "{mode} {tunnel}");
        }
    }
    assert!(!table(Mode::Direct).chains.contains_key("input-probe"), "they come from the underlay there");
}
