//! What the node's kernel may learn of the paths to other nodes: what routers say has to get there, and be believable.

use super::{NODES, TCP, UDP, equal, input, insert, rule, unequal};
use crate::facts::WireguardSupport;
use crate::kernel::{ChainKind, Hook, Match, MatchKey, MatchOperator, MatchValue, NftTable, Rule, Statement};
use crate::plan::Context;
use crate::prefix::Family;

/// Counter of ICMP errors that named an MTU for the path to a node under which the overlay could not work.
pub(super) const PATH_MTU_BELOW_FLOOR: &str = "path_mtu_below_floor";

/// Code of "fragmentation needed" among the ICMP errors of type "destination unreachable" (RFC 792).
pub(super) const FRAGMENTATION_NEEDED: u32 = 4;

/// Adds the chains; the set of nodes is there.
pub(super) fn render(context: &Context<'_>, table: &mut NftTable) {
    table.counters.insert(PATH_MTU_BELOW_FLOOR.into());
    insert(table, "input-path-mtu", ChainKind::Filter, Hook::Input, -150, floor(context));
    let uncut = dont_fragment(context);
    if !uncut.is_empty() {
        insert(table, "output-dont-fragment", ChainKind::Filter, Hook::Output, -150, uncut);
    }
}

/// Anybody can send an ICMP error in a router's name, and the kernel believes it: it cannot tell whether the packet that is
/// quoted was ever sent, and asks no socket where the answer to a ping is quoted (net/ipv4/icmp.c `icmp_err`). For ten minutes it then
/// sends what goes to that node in packets of the size named, if that is 552 bytes at least (`net.ipv4.route.min_pmtu`; over
/// IPv6 1280), and a tunnel that takes less than IPv6 needs takes no IPv6 at all. What names less than the least that Husk
/// works with is not believed: a path like that could not be used anyway.
///
/// The connection is the one of the packet quoted; either side may have begun it. To whom a packet of no known connection went
/// cannot be looked up in a set: nft has no type for what it reads at an offset (seen with 1.0.6). Such errors are taken to be
/// about a node.
///
/// Errors that quote TCP are let through. No tunnel is TCP, so that they are about the host's own connections to other nodes,
/// which would stand still on a path as narrow as that if their errors were taken from them; and the kernel believes them only
/// if they name a sequence number that is under way (`tcp_v4_err`, net/ipv4/tcp_ipv4.c; `tcp_v6_err`), which who takes no part
/// in the connection does not know. A pod may take part, with its node's address as its own: see [`of_pod`].
fn floor(context: &Context<'_>) -> Vec<Rule> {
    let family = context.config.underlay.family;
    let nodes = || MatchValue::Set(NODES.into());
    [
        ("unknown", equal(MatchKey::ConnectionState, MatchValue::Text("invalid".into()))),
        ("to-node", equal(MatchKey::ConnectionDestination(family), nodes())),
        ("from-node", equal(MatchKey::ConnectionSource(family), nodes())),
    ]
    .into_iter()
    .map(|(name, connection)| {
        let mut statements = below_floor(context);
        statements.push(connection);
        statements.push(unequal(MatchKey::QuotedProtocol(family), MatchValue::Number(TCP)));
        statements.extend([Statement::Counter(PATH_MTU_BELOW_FLOOR.into()), Statement::Drop]);
        rule(format!("{PATH_MTU_BELOW_FLOOR}-{name}"), statements)
    })
    .collect()
}

/// A pod is no router on the way between nodes, and knows the sequence numbers of its own connections to them.
pub(super) fn of_pod(context: &Context<'_>) -> Rule {
    let mut statements = vec![input("husk*")];
    statements.extend(below_floor(context));
    statements.push(equal(MatchKey::Destination(context.config.underlay.family), MatchValue::Set(NODES.into())));
    statements.extend([Statement::Counter(PATH_MTU_BELOW_FLOOR.into()), Statement::Drop]);
    rule(format!("{PATH_MTU_BELOW_FLOOR}-of-pod"), statements)
}

/// An error that names an MTU under which the overlay could not work.
fn below_floor(context: &Context<'_>) -> Vec<Statement> {
    let family = context.config.underlay.family;
    let error = match family {
        Family::Ipv4 => "destination-unreachable",
        Family::Ipv6 => "packet-too-big",
    };
    let mut statements = vec![equal(MatchKey::IcmpType(family), MatchValue::AnyOf(vec![error.to_owned()]))];
    if family == Family::Ipv4 {
        statements.push(equal(MatchKey::IcmpCode, MatchValue::Number(FRAGMENTATION_NEEDED)));
    }
    statements.push(Statement::Match(Match {
        key: MatchKey::IcmpMtu(family),
        operator: MatchOperator::Less,
        value: MatchValue::Number(context.config.least_underlay_mtu()),
    }));
    statements
}

/// The kernel's WireGuard device lets routers cut its IPv4 packets (`send4`, drivers/net/wireguard/socket.c), so that the kernel
/// never learns the path's MTU, and what passes does so in pieces. With DF it learns, as it does of every other tunnel. Packets
/// that fit the least that Husk works with go without: a path on which not even those pass whole is not to be believed (see
/// [`floor`]), and is better off with pieces than with nothing.
///
/// The kernel still cuts by itself what it knows to be too large, before it has told a pod: the device's packets permit that
/// (`ignore_df`), and the pieces go without DF.
fn dont_fragment(context: &Context<'_>) -> Vec<Rule> {
    let family = context.config.underlay.family;
    let cut = family == Family::Ipv4
        && context.config.mode.uses_wireguard()
        && context.facts.wireguard == Some(WireguardSupport::Kernel);
    let slots: &[u8] = if cut { &[0, 1] } else { &[] };
    let of_slot = |slot: &u8| {
        let port = context.config.wireguard.port_of(*slot);
        let larger = Match {
            key: MatchKey::Length,
            operator: MatchOperator::Greater,
            value: MatchValue::Number(context.config.least_underlay_mtu()),
        };
        let statements = vec![
            equal(MatchKey::Destination(family), MatchValue::Set(NODES.into())),
            equal(MatchKey::Protocol, MatchValue::Number(UDP)),
            equal(MatchKey::UdpSourcePort, MatchValue::Number(port.into())),
            Statement::Match(larger),
            Statement::DontFragment,
        ];
        rule(format!("dont-fragment-{port}"), statements)
    };
    slots.iter().map(of_slot).collect()
}
