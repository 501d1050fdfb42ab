//! The node's nftables table, whatever the mode: antispoofing, the leak guard of tunnelled modes, the VTEP's guest list,
//! masquerading, MSS clamping, port mappings.
//!
//! ```text
//! prerouting  -300  IPv6 link-local talk of a pod              drop: its neighbours are permanent, nobody listens
//!                   pod with a foreign source address          drop, counter spoofed
//!                   pod to a loopback address                  drop: a port mapping lets these be routed
//!                   cluster CIDR seen outside the tunnel       drop, counter plaintext_in
//! prerouting  -300  VXLAN sent by a pod                        drop, counter pod_to_vtep: masqueraded, it would be ours
//! prerouting  -100  to a mapped port of the host               destination NAT, see [`port_mappings`]; so at output
//! input       -150  VXLAN that ESP should have protected       drop, counter plaintext_in
//!                   VXLAN from an address that is no node      drop, counter unknown_vtep
//! input       -150  a path MTU to a node below the floor       drop, counter path_mtu_below_floor
//! input       -150  a probe that came by a tunnel              counter probe_arrived
//!                   a probe or transfer that came by none      drop, counter probe_outside
//! output      -150  what WireGuard sends over IPv4             may not be cut on the way, see [`path_mtu`]
//! forward     -150  TCP SYN to or from the overlay             MSS clamped to the route's MTU
//! postrouting  100  into the tunnel from a foreign address     source NAT: the peer drops what is not this node's
//!                   pod to an address outside the cluster      masquerade random,fully-random
//! postrouting  300  on its way through ESP                     accept
//!                   VXLAN that ESP should protect              drop, counter plaintext_out
//!                   ICMP error that quotes VXLAN out of ESP    drop, counter plaintext_out
//!                   cluster CIDR about to leave untunnelled    drop, counter plaintext_out
//! ```
//! The last chain runs after every address translation (priority 100), so that it sees packets as the wire would. With one
//! exception: what IPsec transforms meets the hook before its transformation (net/ipv4/xfrm4_output.c), already bound for the
//! underlay's interface, and a second time as ESP between nodes. What ESP protected on its way here is known by its security
//! path; in tunnel mode it also comes out of the xfrm interface.

mod path_mtu;
pub(super) mod port_mappings;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use port_mappings::HostPorts;

use super::Context;
use super::local::leads_to;
use super::peers::Peer;
use crate::endpoint::{Endpoint, Endpoints};
use crate::issue::Issue;
use crate::kernel::{
    Chain, ChainKind, Desired, ElementType, Hook, Match, MatchKey, MatchOperator, MatchValue, NftTable, Rule, Set,
    SetElement, Statement,
};
use crate::marks;
use crate::mode::Mode;
use crate::name::NodeName;
use crate::prefix::{Family, Prefix};

/// Counter of packets a pod sent from an address that is not its own.
pub const SPOOFED: &str = "spoofed";
/// Counter of cluster packets that arrived outside the tunnel, or in a tunnel that was not encrypted though it has to be.
pub const PLAINTEXT_IN: &str = "plaintext_in";
/// Counter of cluster packets that were about to leave outside the tunnel, or in a tunnel that would not have been encrypted
/// though it has to be.
pub const PLAINTEXT_OUT: &str = "plaintext_out";
/// Counter of VXLAN packets from addresses that are no nodes.
pub const UNKNOWN_VTEP: &str = "unknown_vtep";

/// Counter of VXLAN packets that pods sent.
pub const POD_TO_VTEP: &str = "pod_to_vtep";

/// Set of the nodes' underlay addresses.
const NODES: &str = "nodes";

/// Counter of probes that came by no tunnel: from pods of this node, or from outside.
pub const PROBE_OUTSIDE: &str = "probe_outside";

/// Counter of probes, and of answers to them, that came through a tunnel. It counts no drops: what arrives here and in no socket was
/// dropped by somebody else's firewall.
pub const PROBE_ARRIVED: &str = "probe_arrived";

/// IANA protocol numbers.
const UDP: u32 = 17;
const TCP: u32 = 6;

pub(super) fn render(
    context: &Context<'_>,
    peers: &BTreeMap<NodeName, Peer>,
    endpoints: &Endpoints,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) {
    // A pod without a route, since it is not wired yet or its address is in doubt, gets no packet.
    let routed = |endpoint: &&Endpoint| endpoint.addresses.iter().all(|address| leads_to(desired, address, endpoint));
    let host_ports = HostPorts {
        families: context.families().collect(),
        router: context.router,
        tunnel_ports: context.config.tunnel_ports(),
    };
    let (mut table, clashes) = port_mappings::host_ports(&host_ports, endpoints.values().filter(routed));
    issues.extend(clashes);
    let guarded = context.config.mode != Mode::Direct;
    for cidr in &context.config.cluster_cidrs {
        let elements = BTreeSet::from([SetElement::Prefix(*cidr)]);
        let set = Set { element_type: ElementType::Prefix(cidr.family()), elements };
        table.sets.insert(cluster_set(cidr.family()), set);
    }
    let mut prerouting = antispoofing(context, &mut table);
    table.counters.insert(SPOOFED.into());
    if guarded {
        table.counters.extend([PLAINTEXT_IN.into(), PLAINTEXT_OUT.into()]);
        prerouting.extend(plaintext_rules(context, PLAINTEXT_IN));
        let mut postrouting = vec![
            rule("tunnelled", vec![output("husk*"), Statement::Accept]),
            rule("loopback", vec![output("lo"), Statement::Accept]),
        ];
        if context.config.mode.uses_esp() {
            postrouting.push(rule("encrypted", vec![present(MatchKey::Transformation), Statement::Accept]));
        }
        if context.config.mode == Mode::VxlanIpsec {
            let mut statements = to_vtep(context).to_vec();
            statements.extend([Statement::Counter(PLAINTEXT_OUT.into()), Statement::Drop]);
            postrouting.push(rule("plaintext_out-vxlan", statements));
            postrouting.push(quoting(context));
        }
        postrouting.extend(plaintext_rules(context, PLAINTEXT_OUT));
        insert(&mut table, "postrouting-guard", ChainKind::Filter, Hook::Postrouting, 300, postrouting);
        table.counters.extend([PROBE_OUTSIDE.into(), PROBE_ARRIVED.into()]);
        insert(&mut table, "input-probe", ChainKind::Filter, Hook::Input, -150, probe_guard());
    }
    if guarded {
        nodes(context, peers, &mut table);
        path_mtu::render(context, &mut table);
    }
    insert(&mut table, "prerouting-guard", ChainKind::Filter, Hook::Prerouting, -300, prerouting);
    if context.config.mode.uses_vxlan() {
        vtep(context, &mut table);
    }
    insert(&mut table, "forward-mss", ChainKind::Filter, Hook::Forward, -150, clamping());
    let mut translations = Vec::new();
    if guarded {
        translations.extend(context.router.iter().map(tunnel_source));
    }
    if context.config.masquerade {
        translations.extend(context.families().map(masquerade));
    }
    if !translations.is_empty() {
        insert(&mut table, "postrouting-masquerade", ChainKind::Nat, Hook::Postrouting, 100, translations);
    }
    desired.nft = Some(table);
}

fn insert(table: &mut NftTable, name: &str, kind: ChainKind, hook: Hook, priority: i32, rules: Vec<Rule>) {
    table.chains.insert(name.to_owned(), Chain { kind, hook, priority, rules });
}

fn cluster_set(family: Family) -> String {
    format!("cluster_{}", family.to_string().to_lowercase())
}

fn rule(name: impl Into<String>, statements: Vec<Statement>) -> Rule {
    Rule { name: name.into(), statements }
}

fn equal(key: MatchKey, value: MatchValue) -> Statement {
    Statement::Match(Match { key, operator: MatchOperator::Equal, value })
}

fn unequal(key: MatchKey, value: MatchValue) -> Statement {
    Statement::Match(Match { key, operator: MatchOperator::NotEqual, value })
}

fn present(key: MatchKey) -> Statement {
    equal(key, MatchValue::Present)
}

fn missing(key: MatchKey) -> Statement {
    equal(key, MatchValue::Missing)
}

fn input(interface: &str) -> Statement {
    equal(MatchKey::InputInterface, MatchValue::Text(interface.to_owned()))
}

fn output(interface: &str) -> Statement {
    equal(MatchKey::OutputInterface, MatchValue::Text(interface.to_owned()))
}

/// A pod may send only from addresses whose route leads back to its own interface, and may not speak for the node.
fn antispoofing(context: &Context<'_>, table: &mut NftTable) -> Vec<Rule> {
    let source = MatchKey::Source(Family::Ipv6);
    let mut rules = vec![
        rule("loopback", vec![input("lo"), Statement::Accept]),
        rule("tunnel", vec![input("husk-*"), Statement::Accept]),
        rule("link-local", vec![input("husk*"), equal(source, MatchValue::Prefix(link_local())), Statement::Drop]),
        rule(
            SPOOFED,
            vec![
                input("husk*"),
                missing(MatchKey::ReversePathInterface),
                Statement::Counter(SPOOFED.into()),
                Statement::Drop,
            ],
        ),
    ];
    if context.families().any(|family| family == Family::Ipv4) {
        // Where `route_localnet` is set, services that trust who can reach a loopback address would be open to the pod.
        let loopback = equal(MatchKey::Destination(Family::Ipv4), MatchValue::Prefix(port_mappings::loopback()));
        rules.push(rule("pod_to_loopback", vec![input("husk*"), loopback, Statement::Drop]));
    }
    if context.config.mode.uses_vxlan() {
        // To a peer it would come from this node's address, like what this node's own device sends.
        table.counters.insert(POD_TO_VTEP.into());
        let mut statements = vec![input("husk*")];
        statements.extend(to_vtep(context));
        let family = context.config.underlay.family;
        if context.families().any(|served| served == family) {
            // Between pods it stays inside the tunnel.
            statements.push(unequal(MatchKey::Destination(family), MatchValue::Set(cluster_set(family))));
        }
        statements.extend([Statement::Counter(POD_TO_VTEP.into()), Statement::Drop]);
        rules.push(rule(POD_TO_VTEP, statements));
    }
    if context.config.mode != Mode::Direct && context.families().any(|served| served == context.config.underlay.family)
    {
        rules.push(path_mtu::of_pod(context));
    }
    rules.push(rule("pod", vec![input("husk*"), Statement::Accept]));
    rules
}

/// Packets to the UDP port of VXLAN devices.
fn to_vtep(context: &Context<'_>) -> [Statement; 2] {
    [
        equal(MatchKey::Protocol, MatchValue::Number(UDP)),
        equal(MatchKey::UdpDestinationPort, MatchValue::Number(context.config.vxlan.port.into())),
    ]
}

/// What came out of ESP for a VXLAN device that is not there any more is answered by the kernel with an ICMP error, which no
/// policy of ours covers and which quotes the pods' packet in plaintext.
fn quoting(context: &Context<'_>) -> Rule {
    let family = context.config.underlay.family;
    let errors: &[&str] = match family {
        Family::Ipv4 => &["destination-unreachable", "time-exceeded", "parameter-problem"],
        Family::Ipv6 => &["destination-unreachable", "packet-too-big", "time-exceeded", "parameter-problem"],
    };
    let errors = errors.iter().map(|name| (*name).to_owned()).collect();
    rule(
        "plaintext_out-quoted",
        vec![
            equal(MatchKey::IcmpType(family), MatchValue::AnyOf(errors)),
            equal(MatchKey::QuotedProtocol(family), MatchValue::Number(UDP)),
            equal(MatchKey::QuotedUdpDestinationPort(family), MatchValue::Number(context.config.vxlan.port.into())),
            Statement::Counter(PLAINTEXT_OUT.into()),
            Statement::Drop,
        ],
    )
}

/// IPv6 link-local addresses (RFC 4291 section 2.4). Every pod's kernel sends listener reports and router solicitations from
/// one; counted as spoofed they would hide real spoofing.
fn link_local() -> Prefix {
    Prefix::containing(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10).expect("ten bits fit IPv6")
}

/// Drops what carries a cluster address; only packets outside the overlay get to these rules.
fn plaintext_rules(context: &Context<'_>, counter: &str) -> Vec<Rule> {
    let mut rules = Vec::new();
    for family in context.families() {
        for (side, key) in [("source", MatchKey::Source(family)), ("destination", MatchKey::Destination(family))] {
            let name = format!("{counter}-{side}-{}", family.to_string().to_lowercase());
            let from_cluster = equal(key, MatchValue::Set(cluster_set(family)));
            rules.push(rule(name, vec![from_cluster, Statement::Counter(counter.into()), Statement::Drop]));
        }
    }
    rules
}

/// The underlay addresses of the known nodes.
fn nodes(context: &Context<'_>, peers: &BTreeMap<NodeName, Peer>, table: &mut NftTable) {
    let known = peers.values().filter(|peer| peer.plan.refused.is_none());
    let elements: BTreeSet<SetElement> = known.filter_map(|peer| peer.plan.address).map(SetElement::Address).collect();
    let set = Set { element_type: ElementType::Address(context.config.underlay.family), elements };
    table.sets.insert(NODES.into(), set);
}

/// The VTEP takes packets from known nodes only, and where ESP protects them only those it has protected.
fn vtep(context: &Context<'_>, table: &mut NftTable) {
    let family = context.config.underlay.family;
    table.counters.insert(UNKNOWN_VTEP.into());
    let mut statements = to_vtep(context).to_vec();
    statements.extend([
        unequal(MatchKey::Source(family), MatchValue::Set(NODES.into())),
        Statement::Counter(UNKNOWN_VTEP.into()),
        Statement::Drop,
    ]);
    let mut rules = Vec::new();
    if context.config.mode == Mode::VxlanIpsec {
        let mut statements = to_vtep(context).to_vec();
        statements.extend([missing(MatchKey::Decrypted), Statement::Counter(PLAINTEXT_IN.into()), Statement::Drop]);
        rules.push(rule("plaintext_in-vxlan", statements));
    }
    rules.push(rule(UNKNOWN_VTEP, statements));
    insert(table, "input-vtep", ChainKind::Filter, Hook::Input, -150, rules);
}

/// Probes, and the transfers of the offload's test, are answered to whom the tunnel has let in, and to nobody else.
fn probe_guard() -> Vec<Rule> {
    let guard = |name: String, protocol, port| {
        let statements = vec![
            unequal(MatchKey::InputInterface, MatchValue::Text("husk-*".to_owned())),
            equal(MatchKey::Protocol, MatchValue::Number(protocol)),
            equal(port, MatchValue::Number(marks::PROBE_PORT.into())),
            Statement::Counter(PROBE_OUTSIDE.into()),
            Statement::Drop,
        ];
        rule(name, statements)
    };
    let arrived = vec![
        input("husk-*"),
        equal(MatchKey::Protocol, MatchValue::Number(UDP)),
        equal(MatchKey::UdpDestinationPort, MatchValue::Number(marks::PROBE_PORT.into())),
        Statement::Counter(PROBE_ARRIVED.into()),
    ];
    vec![
        rule(PROBE_ARRIVED, arrived),
        guard(PROBE_OUTSIDE.to_owned(), UDP, MatchKey::UdpDestinationPort),
        guard(format!("{PROBE_OUTSIDE}-transfer"), TCP, MatchKey::TcpDestinationPort),
    ]
}

fn clamping() -> Vec<Rule> {
    [("mss-in", input("husk*")), ("mss-out", output("husk*"))]
        .into_iter()
        .map(|(name, side)| {
            rule(name, vec![side, equal(MatchKey::TcpSynRst, MatchValue::Text("syn".into())), Statement::ClampMss])
        })
        .collect()
}

/// What the host forwards, or sends from an address chosen before the route was known (a service address translated to a
/// pod's), enters the tunnel with the node's overlay address: the peer accepts no other from this node, and its answer comes
/// back through the tunnel. It is the node's own choice rather than masquerading's, so that connections go on when a key
/// rotation moves a route to the other WireGuard device.
fn tunnel_source(router: IpAddr) -> Rule {
    let family = Family::of(router);
    rule(
        format!("tunnel-source-{}", family.to_string().to_lowercase()),
        vec![
            output("husk-*"),
            unequal(MatchKey::Source(family), MatchValue::Set(cluster_set(family))),
            Statement::TranslateSource(router),
        ],
    )
}

fn masquerade(family: Family) -> Rule {
    let cluster = || MatchValue::Set(cluster_set(family));
    rule(
        format!("masquerade-{}", family.to_string().to_lowercase()),
        vec![
            equal(MatchKey::Source(family), cluster()),
            unequal(MatchKey::Destination(family), cluster()),
            unequal(MatchKey::OutputInterface, MatchValue::Text("husk*".into())),
            Statement::Masquerade,
        ],
    )
}

#[cfg(test)]
mod tests;
