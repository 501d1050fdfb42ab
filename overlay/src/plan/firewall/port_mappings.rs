//! Ports of the host that lead to pods.
//!
//! ```text
//! prerouting  -100  to a local address and a mapped port       destination NAT to the pod
//! output      -100  the same, from the host itself             destination NAT to the pod
//! postrouting  100  from a loopback address to a pod           source NAT to the node's overlay address
//!                   from a pod to itself                       source NAT to the node's overlay address
//! ```
//! What is mapped stands in maps, so that the rules are the same for any number of pods: a pod that comes or goes changes its
//! elements and nothing else, and what a new connection costs does not depend on their number. A mapping for one address of
//! the host goes before one for all of them.
//!
//! A client is known to the pod by its own address, with two exceptions, whose answers would else not come back through this
//! host: a pod's own, which its kernel does not accept from outside, and loopback addresses, which no kernel does. Sending
//! from 127.0.0.0/8 to a pod, and taking the answer, needs `route_localnet` on the pod's host end
//! (Documentation/networking/ip-sysctl.rst); the guard keeps pods from using it the other way. There is nothing like it for
//! `::1`, to which the mappings therefore do not apply.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{equal, insert, output, rule, unequal};
use crate::endpoint::Endpoint;
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{
    Addressee, ChainKind, ElementType, Hook, Map, MapKeyType, MapValue, MapValueType, MatchKey, MatchValue, NftTable,
    Rule, Set, SetElement, Statement,
};
use crate::marks;
use crate::port_mapping::TransportProtocol;
use crate::prefix::{Family, Prefix};
use crate::record::DualStack;

/// The chain that translates what arrives.
const PREROUTING: &str = "prerouting-host-ports";
/// The chain that translates what the host itself sends.
const OUTPUT: &str = "output-host-ports";
/// The chain that makes answers come back.
const POSTROUTING: &str = "postrouting-host-ports";

/// Priority of destination NAT (`NF_IP_PRI_NAT_DST` in include/uapi/linux/netfilter_ipv4.h): where kube-proxy and others
/// translate too. Whoever is first decides about a connection.
const DESTINATION_NAT: i32 = -100;

/// Priority of source NAT (`NF_IP_PRI_NAT_SRC`).
const SOURCE_NAT: i32 = 100;

/// What the rules depend on beside the endpoints.
#[derive(Debug, Clone)]
pub struct HostPorts {
    /// Families of the cluster.
    pub families: BTreeSet<Family>,
    /// The node's addresses in the overlay.
    pub router: DualStack,
    /// UDP ports at which the node's tunnels listen.
    pub tunnel_ports: BTreeSet<u16>,
}

/// Whether a port of the host is one at which the node's own tunnels, or what travels in them, arrive: the UDP ports of tunnels,
/// and that of probes and transfers between nodes in either protocol.
#[must_use]
pub fn is_of_tunnel(protocol: TransportProtocol, port: u16, tunnel_ports: &BTreeSet<u16>) -> bool {
    match protocol {
        TransportProtocol::Udp => tunnel_ports.contains(&port),
        TransportProtocol::Tcp => port == marks::PROBE_PORT && tunnel_ports.contains(&port),
        TransportProtocol::Sctp => false,
    }
}

/// What the node's table holds for port mappings: the chains, sets and maps that are there in any case, and the elements of
/// the endpoints.
///
/// Of two mappings that clash the first one counts, and of a pod and a tunnel the tunnel; the others are issues. The lease
/// store gives no such leases.
#[must_use]
pub fn host_ports<'a>(
    HostPorts { families, router, tunnel_ports }: &HostPorts,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> (NftTable, Vec<Issue>) {
    let mut table = NftTable::default();
    for family in families {
        for names in [Names::of_any(*family), Names::of_one(*family)] {
            let map = |value| Map { key: names.key, value, elements: BTreeMap::new() };
            table.maps.insert(names.ports.clone(), map(MapValueType::Port));
            table.maps.insert(names.addresses, map(MapValueType::Address(*family)));
        }
        let set = Set { element_type: ElementType::Pair(*family), elements: BTreeSet::new() };
        table.sets.insert(hairpin_set(*family), set);
    }
    let mut issues = Vec::new();
    for endpoint in endpoints {
        for claim in claims(endpoint).filter(|claim| families.contains(&claim.family())) {
            let taken = if is_of_tunnel(claim.from.protocol, claim.from.port, tunnel_ports) {
                Some("belongs to a tunnel of this node".to_owned())
            } else {
                claim.enter(&mut table).err().map(|holder| format!("leads to the pod with the address {holder}"))
            };
            issues.extend(taken.map(|taken| Issue {
                severity: Severity::Error,
                kind: IssueKind::BadLease,
                subject: endpoint.display_name(),
                message: format!("its host port {} {taken}", claim.describe()),
                remedy: "delete the pod, and give it another host port".into(),
            }));
        }
    }
    let translations: Vec<Rule> = families.iter().flat_map(|family| destination_rules(*family)).collect();
    for (name, hook) in [(PREROUTING, Hook::Prerouting), (OUTPUT, Hook::Output)] {
        insert(&mut table, name, ChainKind::Nat, hook, DESTINATION_NAT, translations.clone());
    }
    let served = router.iter().filter(|address| families.contains(&Family::of(*address)));
    let sources = served.flat_map(source_rules).collect();
    insert(&mut table, POSTROUTING, ChainKind::Nat, Hook::Postrouting, SOURCE_NAT, sources);
    (table, issues)
}

/// True if the maps hold everything that the endpoint's mappings ask for.
#[must_use]
pub fn are_mapped(endpoint: &Endpoint, maps: &BTreeMap<String, Map>) -> bool {
    claims(endpoint).all(|claim| {
        let names = claim.names();
        let holds = |map: &str, value| maps.get(map).and_then(|map| map.elements.get(&claim.from)) == Some(&value);
        holds(&names.addresses, MapValue::Address(claim.address)) && holds(&names.ports, MapValue::Port(claim.port))
    })
}

/// The kernel parameter, by its path below `/proc/sys`, that has to be 1 for the host to reach the endpoint through a loopback
/// address of its own; none if no mapping leads from there.
#[must_use]
pub fn loopback_parameter(endpoint: &Endpoint) -> Option<String> {
    let may_be_loopback = |claim: &Claim| claim.from.address.is_none_or(|address| address.is_loopback());
    let concerned = claims(endpoint).any(|claim| claim.family() == Family::Ipv4 && may_be_loopback(&claim));
    concerned.then(|| format!("net/ipv4/conf/{}/route_localnet", endpoint.host_interface))
}

/// A mapping in one family.
struct Claim {
    from: Addressee,
    address: IpAddr,
    port: u16,
}

fn claims(endpoint: &Endpoint) -> impl Iterator<Item = Claim> {
    endpoint.port_mappings.iter().flat_map(|mapping| {
        let addresses = endpoint.addresses.iter().filter(|address| mapping.serves(Family::of(*address)));
        addresses.map(|address| Claim {
            from: Addressee { address: mapping.address(), protocol: mapping.protocol, port: mapping.host_port.get() },
            address,
            port: mapping.container_port.get(),
        })
    })
}

impl Claim {
    fn family(&self) -> Family {
        Family::of(self.address)
    }

    fn names(&self) -> Names {
        match self.from.address {
            None => Names::of_any(self.family()),
            Some(_) => Names::of_one(self.family()),
        }
    }

    /// Adds what is claimed, or returns who has it.
    fn enter(&self, table: &mut NftTable) -> Result<(), IpAddr> {
        let names = self.names();
        let taken = table.maps.get(&names.addresses).and_then(|map| map.elements.get(&self.from));
        if let Some(MapValue::Address(holder)) = taken {
            return Err(*holder);
        }
        for (map, value) in
            [(names.addresses, MapValue::Address(self.address)), (names.ports, MapValue::Port(self.port))]
        {
            if let Some(map) = table.maps.get_mut(&map) {
                map.elements.insert(self.from, value);
            }
        }
        if let Some(set) = table.sets.get_mut(&hairpin_set(self.family())) {
            set.elements.insert(SetElement::Pair(self.address, self.address));
        }
        Ok(())
    }

    fn describe(&self) -> String {
        let Addressee { address, protocol, port } = self.from;
        address.map_or_else(|| format!("{protocol} {port}"), |address| format!("{protocol} {port} of {address}"))
    }
}

/// Names of the two maps that belong together.
struct Names {
    key: MapKeyType,
    addresses: String,
    ports: String,
}

impl Names {
    /// For mappings of all local addresses.
    fn of_any(family: Family) -> Self {
        Self::new(MapKeyType::Port, "host_ports", family)
    }

    /// For mappings of one local address.
    fn of_one(family: Family) -> Self {
        Self::new(MapKeyType::AddressAndPort(family), "host_addresses", family)
    }

    fn new(key: MapKeyType, name: &str, family: Family) -> Self {
        let family = lower(family);
        Self { key, addresses: format!("{name}_{family}_to_address"), ports: format!("{name}_{family}_to_port") }
    }
}

fn hairpin_set(family: Family) -> String {
    format!("hairpin_{}", lower(family))
}

fn lower(family: Family) -> String {
    family.to_string().to_lowercase()
}

fn destination_rules(family: Family) -> [Rule; 2] {
    [("host-address", Names::of_one(family)), ("host-port", Names::of_any(family))].map(|(name, names)| {
        let mut statements = vec![
            equal(MatchKey::NetworkFamily, MatchValue::Family(family)),
            equal(MatchKey::DestinationKind, MatchValue::Text("local".into())),
        ];
        if family == Family::Ipv6 {
            let loopback = Prefix::host(Ipv6Addr::LOCALHOST.into());
            statements.push(unequal(MatchKey::Destination(family), MatchValue::Prefix(loopback)));
        }
        let Names { key, addresses, ports } = names;
        statements.push(Statement::TranslateDestination { family, key, addresses, ports });
        rule(format!("{name}-{}", lower(family)), statements)
    })
}

fn source_rules(router: IpAddr) -> Vec<Rule> {
    let family = Family::of(router);
    let mut rules = Vec::new();
    if family == Family::Ipv4 {
        rules.push(rule(
            "loopback-source",
            vec![
                output("husk*"),
                equal(MatchKey::Source(family), MatchValue::Prefix(loopback())),
                Statement::TranslateSource(router),
            ],
        ));
    }
    let itself = equal(MatchKey::AddressPair(family), MatchValue::Set(hairpin_set(family)));
    rules.push(rule(format!("hairpin-{}", lower(family)), vec![itself, Statement::TranslateSource(router)]));
    rules
}

/// Loopback addresses of IPv4 (RFC 1122, section 3.2.1.3).
pub(super) fn loopback() -> Prefix {
    Prefix::containing(Ipv4Addr::LOCALHOST.into(), 8).expect("eight bits fit IPv4")
}

#[cfg(test)]
#[path = "port_mappings_tests.rs"]
mod tests;
