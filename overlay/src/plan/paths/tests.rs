//! What probing found, and the floors, in every mode.

use std::collections::{BTreeMap, BTreeSet};

use super::super::Plan;
use super::super::tests::*;
use super::*;
use crate::config::Config;
use crate::facts::{Facts, WireguardSupport};

/// Modes whose facts need no keys of ESP; the others are with ESP's own tests.
const MODES: [Mode; 3] = [Mode::Direct, Mode::Vxlan, Mode::Wireguard];

/// Blocks of `host1` and `host2`.
const FIRST: [&str; 2] = ["10.42.0.64/26", "fd42::40/122"];
const SECOND: [&str; 2] = ["10.42.0.128/26", "fd42::80/122"];

/// The facts of `host0`, to whose `host1` so many bytes pass.
fn probed(bytes: u32) -> Facts {
    let mut facts = facts(3);
    facts.probed.insert(node("host1"), both(bytes));
    facts
}

fn both(bytes: u32) -> BTreeMap<Family, Limit> {
    Family::ALL.map(|family| (family, Limit { bytes, found: true })).into()
}

fn mtus(plan: &Plan, blocks: [&str; 2]) -> BTreeSet<Option<u32>> {
    blocks.into_iter().map(|block| route(plan, block).expect("the block is routed").mtu).collect()
}

fn only_ipv4(mode: Mode) -> Config {
    let mut config = config(mode);
    config.cluster_cidrs.retain(|cidr| cidr.family() == Family::Ipv4);
    config
}

fn path_issue(plan: &Plan) -> &Issue {
    plan.issues.iter().find(|issue| issue.kind == IssueKind::PathMtu).expect("the path is limited")
}

#[test]
fn a_limit_lowers_the_routes_to_that_peer_and_nothing_else() {
    for mode in MODES {
        let before = plan_of(&config(mode), &snapshot(3), &facts(3));
        let mut after = plan_of(&config(mode), &snapshot(3), &probed(1399));
        assert_eq!(mtus(&after, FIRST), BTreeSet::from([Some(1399)]), "{mode}");
        assert_eq!(mtus(&after, SECOND), mtus(&before, SECOND), "{mode}");
        assert_eq!((after.pod_mtu, &after.record, &after.ledger), (before.pod_mtu, &before.record, &before.ledger));
        let peer = &after.peers[&node("host1")];
        assert_eq!((peer.probed, peer.mtu), (Some(Limit { bytes: 1399, found: true }), Some(1399)), "{mode}");
        assert_eq!(peer.ledger, before.peers[&node("host1")].ledger, "what was promised stays known");
        assert_eq!(peer.probe, before.peers[&node("host1")].probe, "{mode}: else the limit would confirm itself");
        // What only probes go by is tested below.
        after.desired.routes.retain(|key, _| before.desired.routes.contains_key(key));
        for (key, route) in &mut after.desired.routes {
            route.mtu = before.desired.routes[key].mtu;
        }
        assert_eq!(after.desired, before.desired, "{mode}");
    }
}

#[test]
fn the_issue_names_the_peer_what_passes_and_what_was_promised() {
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &probed(1400));
    let [issue] = &plan.issues[..] else { panic!("{:?}", plan.issues) };
    assert_eq!((issue.severity, issue.kind, issue.subject.as_str()), (Severity::Warning, IssueKind::PathMtu, "host1"));
    let message = "packets of more than 1400 bytes vanish on the way to the node, though the underlay promises room for \
                   1440: its path carries 1460 bytes instead of 1500; the routes to it are limited to 1400";
    assert_eq!(issue.message, message);
    let remedy = "let everything on the way to 192.0.2.2 carry 1500 bytes, or let its routers say what they carry (ICMP \
                  \"fragmentation needed\", ICMPv6 \"packet too big\"); or set underlay.mtu to 1460 on the node";
    assert_eq!(issue.remedy, remedy);
}

#[test]
fn no_route_is_limited_below_what_the_cluster_works_with() {
    let mut only_ipv6 = config(Mode::Vxlan);
    only_ipv6.cluster_cidrs.retain(|cidr| cidr.family() == Family::Ipv6);
    for (config, floor, block) in [(only_ipv6, 1280, FIRST[1]), (only_ipv4(Mode::Vxlan), 576, FIRST[0])] {
        for bytes in [0, 128, floor - 1, floor] {
            let plan = plan_of(&config, &snapshot(3), &probed(bytes));
            assert_eq!(route(&plan, block).unwrap().mtu, Some(floor), "{bytes}");
            let issue = path_issue(&plan);
            assert_eq!((issue.severity, issue.subject.as_str()), (Severity::Error, "host1"));
            assert!(issue.message.contains("perhaps not even those pass"), "{issue}");
        }
        let plan = plan_of(&config, &snapshot(3), &probed(floor + 1));
        assert_eq!(path_issue(&plan).severity, Severity::Warning);
    }
}

#[test]
fn a_path_that_is_enough_for_ipv4_alone_carries_that_and_ipv6_is_refused_with_the_ledger() {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        // IPv6 knows no more than that its least does not pass.
        let mut facts = probed(1250);
        facts.probed.get_mut(&node("host1")).unwrap().get_mut(&Family::Ipv6).unwrap().bytes = 1280;
        let plan = plan_of(&config(mode), &snapshot(3), &facts);
        assert_eq!(route(&plan, FIRST[0]).unwrap().mtu, Some(1250), "{mode}");
        assert!(route(&plan, FIRST[1]).is_none(), "{mode}: it meets the unreachable route");
        assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::PathMtu, IssueKind::MtuTooSmall]));
        let issue = plan.issues.iter().find(|issue| issue.kind == IssueKind::MtuTooSmall).unwrap();
        let told = ["no IPv6 packets are sent to the node", "1250", "30 bytes are missing", "1500 bytes"];
        assert!(told.iter().all(|text| issue.message.contains(text)), "{issue}");
        // What passes is looked for in IPv4 alone, and IPv6 comes back with it.
        let probe = &plan.peers[&node("host1")].probe;
        assert_eq!(probe.keys().collect::<Vec<_>>(), [&Family::Ipv4], "{mode}");
        assert!(probe[&Family::Ipv4].promised > 1280 && probe[&Family::Ipv4].floor == 576);
    }
    // Without a tunnel what passes in one family says nothing of the other.
    let mut facts = probed(1250);
    facts.probed.get_mut(&node("host1")).unwrap().remove(&Family::Ipv6);
    let plan = plan_of(&config(Mode::Direct), &snapshot(3), &facts);
    let mtus = FIRST.map(|block| route(&plan, block).unwrap().mtu);
    assert_eq!(mtus, [Some(1250), Some(1500)]);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::PathMtu]));
}

#[test]
fn what_is_not_verified_yet_is_not_used_and_is_no_news() {
    for mode in MODES {
        let mut facts = probed(1400);
        let limits = facts.probed.get_mut(&node("host1")).unwrap();
        limits.values_mut().for_each(|limit| limit.found = false);
        let plan = plan_of(&config(mode), &snapshot(3), &facts);
        assert_eq!(mtus(&plan, FIRST), BTreeSet::from([Some(1400)]), "{mode}");
        assert!(plan.issues.is_empty(), "{mode}: {:?}", plan.issues);
    }
}

#[test]
fn what_is_no_limit_any_more_and_who_is_no_peer_change_nothing() {
    for mode in MODES {
        let before = plan_of(&config(mode), &snapshot(3), &facts(3));
        let promised = before.peers[&node("host1")].mtu.unwrap();
        for bytes in [promised, promised + 1, u32::MAX] {
            assert_eq!(plan_of(&config(mode), &snapshot(3), &probed(bytes)), before, "{mode} {bytes}");
        }
        let mut facts = facts(3);
        facts.probed.extend([(node("host0"), both(1300)), (node("gone"), both(1300))]);
        assert_eq!(plan_of(&config(mode), &snapshot(3), &facts), before, "{mode}");
    }
}

#[test]
fn router_addresses_are_probed_through_tunnels_and_underlay_addresses_where_there_is_none() {
    let target = |plan: &Plan, family| plan.peers[&node("host1")].probe[&family].clone();
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        let plan = plan_of(&config(mode), &snapshot(3), &facts(3));
        let promised = plan.pod_mtu.unwrap();
        for (family, own, there) in [(Family::Ipv4, "10.42.0.0", "10.42.0.64"), (Family::Ipv6, "fd42::", "fd42::40")] {
            let handshakes = mode == Mode::Wireguard;
            let floor = if family == Family::Ipv4 { 576 } else { 1280 };
            let (address, own) = (address(there), address(own));
            let expected = Target { address, own, promised, floor, tunnelled: true, handshakes };
            assert_eq!(target(&plan, family), expected, "{mode}");
        }
        assert_eq!(plan.probe_targets().len(), 4, "{mode}: two peers, two families");
    }
    let plan = plan_of(&config(Mode::Direct), &snapshot(3), &facts(3));
    let expected = Target {
        address: address("192.0.2.2"),
        own: address("192.0.2.1"),
        promised: 1500,
        floor: 576,
        tunnelled: false,
        handshakes: false,
    };
    assert_eq!(target(&plan, Family::Ipv4), expected);
    assert_eq!(target(&plan, Family::Ipv6).address, address("2001:db8::2"));
    let plan = plan_of(&only_ipv4(Mode::Direct), &snapshot(3), &facts(3));
    assert_eq!(target(&plan, Family::Ipv4).floor, 576);
    assert!(!plan.peers[&node("host1")].probe.contains_key(&Family::Ipv6), "nothing is sent there");
}

#[test]
fn in_mode_direct_each_family_has_the_mtu_of_its_own_way() {
    let plan_with = |bytes| {
        let mut facts = facts(3);
        facts.routes.get_mut(&address("2001:db8::2")).unwrap().mtu = bytes;
        plan_of(&config(Mode::Direct), &snapshot(3), &facts)
    };
    let plan = plan_with(1400);
    let mtus = |block| route(&plan, block).unwrap().mtu;
    assert_eq!((mtus(FIRST[0]), mtus(FIRST[1])), (Some(1500), Some(1400)));
    assert_eq!((mtus(SECOND[0]), mtus(SECOND[1])), (Some(1500), Some(1500)), "others have another way");
    let promised = |family| plan.peers[&node("host1")].probe[&family].promised;
    assert_eq!((promised(Family::Ipv4), promised(Family::Ipv6)), (1500, 1400), "what is probed is what is sent");
    assert!(plan.issues.is_empty(), "{:?}", plan.issues);

    let plan = plan_with(1279);
    assert!(route(&plan, FIRST[1]).is_none() && route(&plan, FIRST[0]).is_some());
    let [issue] = &plan.issues[..] else { panic!("{:?}", plan.issues) };
    assert_eq!((issue.kind, issue.subject.as_str()), (IssueKind::MtuTooSmall, "host1"));
    assert!(issue.message.contains("2001:db8::2 takes too little: an MTU of 1279"), "{issue}");
}

#[test]
fn who_gets_no_packets_is_not_probed() {
    let mut snapshot = snapshot(3);
    snapshot.nodes.get_mut(&node("host1")).unwrap().wireguard.clear();
    snapshot.nodes.get_mut(&node("host2")).unwrap().addresses = record(0).addresses;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &probed(1300));
    assert!(plan.peers.values().all(|peer| peer.refused.is_some()));
    assert!(plan.probe_targets().is_empty());
    assert!(!kinds(&plan).contains(&IssueKind::PathMtu));
    assert!(plan.peers.values().all(|peer| (peer.probed, peer.mtu) == (None, None)));
}

#[test]
fn a_peer_with_too_little_for_a_family_gets_none_of_its_packets_and_the_ledger_says_why() {
    let mut snapshot = snapshot(3);
    snapshot.nodes.get_mut(&node("host1")).unwrap().underlay_mtu = 1339;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(3));
    assert_eq!(route(&plan, FIRST[0]).unwrap().mtu, Some(1279));
    assert!(route(&plan, FIRST[1]).is_none(), "it meets the unreachable route");
    assert_eq!(mtus(&plan, SECOND), BTreeSet::from([Some(1440)]));
    let device = plan.desired.wireguard.values().next().unwrap();
    assert_eq!(device.peers[&key(1)].allowed_ips, BTreeSet::from([prefix(FIRST[0])]));
    let [issue] = &plan.issues[..] else { panic!("{:?}", plan.issues) };
    assert_eq!((issue.severity, issue.kind), (Severity::Error, IssueKind::MtuTooSmall));
    let message = "no IPv6 packets are sent to the node, since the underlay's MTU is too small: an MTU of 1279 is left for \
                   pods, and IPv6 needs 1280 on every link (RFC 8200, section 5): 1 bytes are missing (1339 bytes - \
                   WireGuard 60 (outer IP header 20, UDP header 8, WireGuard header 16, WireGuard tag 16) = 1279)";
    assert_eq!(issue.message, message);
    assert_eq!(issue.remedy, "see that the underlay carries 1340 bytes between the nodes, on both of them");
    assert_eq!(plan.pod_mtu, Some(1440), "others are served");
}

#[test]
fn a_peer_with_too_little_for_all_families_is_refused() {
    for mode in MODES {
        for bytes in [0, 1, 500] {
            let mut snapshot = snapshot(3);
            snapshot.nodes.get_mut(&node("host1")).unwrap().underlay_mtu = bytes;
            let plan = plan_of(&config(mode), &snapshot, &facts(3));
            assert!(plan.peers[&node("host1")].refused.is_some(), "{mode} {bytes}");
            assert!(FIRST.into_iter().all(|block| route(&plan, block).is_none()));
            assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::MtuTooSmall]), "{mode} {bytes}");
            assert!(plan.issues.iter().all(|issue| issue.subject == "host1"));
        }
    }
}

#[test]
fn a_userspace_device_is_limited_too() {
    let mut facts = probed(1399);
    facts.wireguard = Some(WireguardSupport::Userspace);
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &facts);
    assert_eq!(mtus(&plan, FIRST), BTreeSet::from([Some(1399)]));
}

/// What the device pads must not make a packet that fits larger than the path, as long as only the route is smaller.
#[test]
fn probes_through_the_kernels_device_have_a_route_without_the_limit() {
    let own_routes = |support, limited: bool| {
        let mut facts = if limited { probed(1399) } else { facts(3) };
        facts.wireguard = Some(support);
        let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &facts);
        let addresses: Vec<IpAddr> = plan.peers[&node("host1")].probe.values().map(|target| target.address).collect();
        assert_eq!(addresses.len(), 2);
        let of = |address| plan.desired.routes.get(&route_key(Prefix::host(address))).map(|route| route.mtu);
        addresses.into_iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(own_routes(WireguardSupport::Kernel, true), [Some(Some(1440)); 2]);
    assert_eq!(own_routes(WireguardSupport::Kernel, false), [None; 2], "only while there is a limit");
    assert_eq!(own_routes(WireguardSupport::Userspace, true), [None; 2], "its packets of this size are not padded");
}
