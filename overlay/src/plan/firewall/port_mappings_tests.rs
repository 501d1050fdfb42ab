//! Which ports lead where, and which do not.

use std::num::NonZeroU16;

use super::*;
use crate::endpoint::{AttachmentId, NetnsIdentity};
use crate::kernel::MatchOperator;
use crate::port_mapping::{PortMapping, TransportProtocol};

const BOTH: [Family; 2] = Family::ALL;

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn mapping(protocol: TransportProtocol, host_port: u16, host_ip: &str, container_port: u16) -> PortMapping {
    let host_ip = (!host_ip.is_empty()).then(|| host_ip.parse().unwrap());
    PortMapping { protocol, host_port: port(host_port), host_ip, container_port: port(container_port) }
}

fn endpoint(name: &str, addresses: &[&str], port_mappings: Vec<PortMapping>) -> Endpoint {
    let id = AttachmentId {
        network: "husk".parse().unwrap(),
        container_id: name.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    };
    Endpoint {
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        pod_mac: id.pod_mac(),
        host_interface: id.host_interface(),
        netns: NetnsIdentity { path: format!("/run/netns/{name}"), device: 4, inode: 1 },
        pod_namespace: Some("default".into()),
        pod_name: Some(name.into()),
        pod_uid: None,
        port_mappings,
        bandwidth: None,
        id,
    }
}

fn router() -> DualStack {
    ["10.42.0.0", "fd42::"].map(|text| text.parse().unwrap()).into_iter().collect()
}

fn table(families: &[Family], endpoints: &[Endpoint]) -> (NftTable, Vec<Issue>) {
    let families = families.iter().copied().collect();
    host_ports(&HostPorts { families, router: router(), tunnel_ports: [4789].into() }, endpoints)
}

/// Elements as `map: key : value`, the empty maps left out.
fn elements(table: &NftTable) -> Vec<String> {
    let text = |(key, value): (&Addressee, &MapValue)| {
        let address = key.address.map(|address| format!("{address} . ")).unwrap_or_default();
        let value = match value {
            MapValue::Address(address) => address.to_string(),
            MapValue::Port(port) => port.to_string(),
        };
        format!("{address}{} . {} : {value}", key.protocol, key.port)
    };
    let all = |(name, map): (&String, &Map)| -> Vec<String> {
        map.elements.iter().map(|it| format!("{name}: {}", text(it))).collect()
    };
    table.maps.iter().flat_map(all).collect()
}

#[test]
fn a_mapping_leads_to_the_pod_in_the_families_that_it_is_about() {
    use TransportProtocol::{Sctp, Tcp, Udp};
    let web = endpoint(
        "web",
        &["10.42.0.5", "fd42::5"],
        vec![
            mapping(Tcp, 8080, "", 80),
            mapping(Udp, 53, "192.0.2.1", 5353),
            mapping(Udp, 53, "::", 5354),
            mapping(Sctp, 9, "0.0.0.0", 99),
            mapping(Tcp, 443, "2001:db8::1", 8443),
        ],
    );
    let (both, issues) = table(&BOTH, std::slice::from_ref(&web));
    assert_eq!(issues, []);
    let expected = [
        "host_addresses_ipv4_to_address: 192.0.2.1 . udp . 53 : 10.42.0.5",
        "host_addresses_ipv4_to_port: 192.0.2.1 . udp . 53 : 5353",
        "host_addresses_ipv6_to_address: 2001:db8::1 . tcp . 443 : fd42::5",
        "host_addresses_ipv6_to_port: 2001:db8::1 . tcp . 443 : 8443",
        "host_ports_ipv4_to_address: tcp . 8080 : 10.42.0.5",
        "host_ports_ipv4_to_address: sctp . 9 : 10.42.0.5",
        "host_ports_ipv4_to_port: tcp . 8080 : 80",
        "host_ports_ipv4_to_port: sctp . 9 : 99",
        "host_ports_ipv6_to_address: tcp . 8080 : fd42::5",
        "host_ports_ipv6_to_address: udp . 53 : fd42::5",
        "host_ports_ipv6_to_port: tcp . 8080 : 80",
        "host_ports_ipv6_to_port: udp . 53 : 5354",
    ];
    assert_eq!(elements(&both), expected);
    assert!(are_mapped(&web, &both.maps));
    let own = |text: &str| SetElement::Pair(text.parse().unwrap(), text.parse().unwrap());
    assert_eq!(both.sets["hairpin_ipv4"].elements, [own("10.42.0.5")].into());
    assert_eq!(both.sets["hairpin_ipv6"].elements, [own("fd42::5")].into());

    let (four, _) = table(&[Family::Ipv4], &[web]);
    let of_four: Vec<&str> = expected.into_iter().filter(|text| text.contains("ipv4")).collect();
    assert_eq!(elements(&four), of_four);
}

/// One pod more changes elements only, so that neither rules nor other pods are touched.
#[test]
fn rules_are_the_same_for_any_number_of_pods() {
    let pod = |number: u16| {
        let address = format!("10.42.0.{number}");
        endpoint(&format!("pod{number}"), &[&address], vec![mapping(TransportProtocol::Tcp, 8000 + number, "", 80)])
    };
    let (none, _) = table(&BOTH, &[]);
    let (one, _) = table(&BOTH, &[pod(1)]);
    let (many, issues) = table(&BOTH, &(1..200).map(pod).collect::<Vec<_>>());
    assert_eq!(issues, []);
    assert_eq!((&none.chains, &one.chains), (&one.chains, &many.chains));
    assert!(none.maps.keys().eq(many.maps.keys()) && none.sets.keys().eq(many.sets.keys()));
    assert!(!are_mapped(&pod(1), &none.maps) && are_mapped(&pod(1), &many.maps));
    let mut other = pod(1);
    other.addresses = ["10.42.0.77".parse().unwrap()].into_iter().collect();
    assert!(!are_mapped(&other, &many.maps), "the port leads to another pod");
}

#[test]
fn of_two_pods_with_one_port_the_first_has_it() {
    let pods = ["a", "b"].map(|name| {
        let address = if name == "a" { "10.42.0.5" } else { "10.42.0.6" };
        endpoint(name, &[address], vec![mapping(TransportProtocol::Tcp, 80, "", 80)])
    });
    let (table, issues) = table(&BOTH, &pods);
    assert!(are_mapped(&pods[0], &table.maps) && !are_mapped(&pods[1], &table.maps));
    assert_eq!(issues.len(), 1);
    assert_eq!((issues[0].subject.as_str(), issues[0].kind), ("default/b", IssueKind::BadLease));
    assert!(issues[0].message.contains("tcp 80") && issues[0].message.contains("10.42.0.5"), "{}", issues[0]);
    assert_eq!(table.sets["hairpin_ipv4"].elements.len(), 1);
}

/// A mapping that takes the tunnels' packets would cut the node off.
#[test]
fn tunnels_keep_their_ports() {
    use TransportProtocol::{Tcp, Udp};
    let greedy =
        endpoint("greedy", &["10.42.0.5"], vec![mapping(Udp, 4789, "", 80), mapping(Tcp, 4789, "192.0.2.1", 80)]);
    let (table, issues) = table(&BOTH, &[greedy]);
    assert_eq!(
        elements(&table),
        [
            "host_addresses_ipv4_to_address: 192.0.2.1 . tcp . 4789 : 10.42.0.5",
            "host_addresses_ipv4_to_port: 192.0.2.1 . tcp . 4789 : 80",
        ]
    );
    assert!(issues.len() == 1 && issues[0].message.contains("udp 4789 belongs to a tunnel"), "{issues:?}");
}

/// Nothing but what is addressed to the host is translated, and never what is for `::1`; one address goes before all.
#[test]
fn rules_ask_for_a_local_address() {
    let (table, _) = table(&BOTH, &[]);
    for (chain, hook) in [(PREROUTING, Hook::Prerouting), (OUTPUT, Hook::Output)] {
        let chain = &table.chains[chain];
        assert_eq!((chain.kind, chain.hook, chain.priority), (ChainKind::Nat, hook, -100));
        let names: Vec<&str> = chain.rules.iter().map(|rule| rule.name.as_str()).collect();
        assert_eq!(names, ["host-address-ipv4", "host-port-ipv4", "host-address-ipv6", "host-port-ipv6"]);
        for rule in &chain.rules {
            let local = equal(MatchKey::DestinationKind, MatchValue::Text("local".into()));
            assert!(rule.statements.contains(&local), "{rule:?}");
            let [matches @ .., Statement::TranslateDestination { family, .. }] = rule.statements.as_slice() else {
                panic!("{rule:?}")
            };
            let loopback = |it: &Statement| {
                matches!(it, Statement::Match(it) if it.operator == MatchOperator::NotEqual
                    && it.value == MatchValue::Prefix("::1/128".parse().unwrap()))
            };
            assert_eq!(matches.iter().any(loopback), *family == Family::Ipv6, "{rule:?}");
        }
    }
}

#[test]
fn loopback_addresses_are_routed_only_where_a_mapping_needs_it() {
    let of = |addresses: &[&str], host_ip: &str| {
        loopback_parameter(&endpoint("a", addresses, vec![mapping(TransportProtocol::Tcp, 80, host_ip, 80)]))
    };
    let both = ["10.42.0.5", "fd42::5"];
    let parameter = of(&both, "").unwrap();
    assert!(parameter.starts_with("net/ipv4/conf/husk") && parameter.ends_with("/route_localnet"), "{parameter}");
    assert!(crate::marks::is_pod_parameter(&parameter));
    for (addresses, host_ip, needed) in [
        (&both[..], "0.0.0.0", true),
        (&both, "127.0.0.1", true),
        (&both, "192.0.2.1", false),
        (&both, "::", false),
        (&both[1..], "", false),
    ] {
        assert_eq!(of(addresses, host_ip).is_some(), needed, "{addresses:?} {host_ip}");
    }
    assert_eq!(loopback_parameter(&endpoint("a", &both, Vec::new())), None);
}
