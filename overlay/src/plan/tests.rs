//! Table tests of the plan, and the property that order, split and repetition of what was found make no difference.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::endpoint::{AttachmentId, Endpoint, NetnsIdentity};
use crate::facts::{OwnEpoch, RouteLimit, UnderlayRoute, WireguardSupport};
use crate::kernel::{LinkKind, MatchValue, Route, RouteKey, RouteTarget, SetElement, Statement};
use crate::keys::PrivateKey;
use crate::name::{ContainerId, InstanceId, InterfaceName, NetworkName};
use crate::offload::{Finding, Offload, Setting, candidates};

pub(super) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

pub(super) fn node(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

pub(super) fn interface(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

pub(super) fn config(mode: Mode) -> Config {
    let mut config = Config::new(vec![prefix("10.42.0.0/16"), prefix("fd42::/48")]);
    config.mode = mode;
    config
}

pub(super) fn blocks(index: u8) -> BTreeSet<Prefix> {
    let four = prefix("10.42.0.0/16").subnet(26, index.into()).unwrap();
    let six = prefix("fd42::/48").subnet(122, index.into()).unwrap();
    BTreeSet::from([four, six])
}

pub(super) fn key(index: u8) -> PublicKey {
    PrivateKey::from_random([index + 1; 32]).unwrap().public()
}

pub(super) fn instance(index: u8) -> InstanceId {
    InstanceId::new(&format!("{index:032x}")).unwrap()
}

/// The record of node `host<index>`, complete for every mode.
pub(super) fn record(index: u8) -> NodeRecord {
    let name = node(&format!("host{index}"));
    NodeRecord {
        instance: instance(index),
        created: jiff::Timestamp::from_second(1_800_000_000 + i64::from(index)).unwrap(),
        addresses: [address(&format!("192.0.2.{}", index + 1)), address(&format!("2001:db8::{}", index + 1))]
            .into_iter()
            .collect(),
        underlay_mtu: 1500,
        blocks: blocks(index),
        router: router_addresses(&blocks(index)),
        vxlan_mac: Some(vxlan_mac(&name)),
        wireguard: vec![WireguardRecord { slot: 0, generation: 0, port: 51820, public_key: key(index) }],
        esp: None,
        name,
    }
}

pub(super) fn snapshot(count: u8) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for index in 0..count {
        let record = record(index);
        snapshot.blocks.extend(record.blocks.iter().map(|block| (*block, record.name.clone())));
        snapshot.nodes.insert(record.name.clone(), record);
    }
    snapshot
}

/// Facts of `host0` among so many nodes.
pub(super) fn facts(count: u8) -> Facts {
    let own = record(0);
    let route =
        || UnderlayRoute { interface: interface("eth0"), mtu: 1500, limited_by: RouteLimit::Interface, on_link: true };
    Facts {
        node: own.name.clone(),
        instance: own.instance.clone(),
        created: own.created,
        addresses: own.addresses,
        underlay_mtu: 1500,
        underlay_interface: Some(interface("eth0")),
        foreign_prefixes: BTreeSet::from([prefix("192.0.2.0/24"), prefix("2001:db8::/64")]),
        routes: (1..count)
            .flat_map(|index| record(index).addresses.iter().collect::<Vec<_>>())
            .map(|to| (to, route()))
            .collect(),
        wireguard: Some(WireguardSupport::Kernel),
        probed: BTreeMap::new(),
        silent: BTreeSet::new(),
        offload: crate::offload::Offload::default(),
        wireguard_epochs: BTreeMap::from([(0, OwnEpoch { public_key: key(0), spi_salt: 0, created: Duration::ZERO })]),
        sessions: BTreeMap::new(),
        esp: None,
        uptime: Duration::ZERO,
        rotation_requested: false,
        pod_interfaces: BTreeMap::new(),
        threaded_napi: true,
        ipv6: true,
        router_advertisements: BTreeSet::new(),
    }
}

fn endpoint(name: &str, addresses: &[&str]) -> Endpoint {
    let id = AttachmentId {
        network: NetworkName::new("husk").unwrap(),
        container_id: ContainerId::new(name).unwrap(),
        ifname: interface("eth0"),
    };
    Endpoint {
        addresses: addresses.iter().map(|text| address(text)).collect(),
        pod_mac: id.pod_mac(),
        host_interface: id.host_interface(),
        netns: NetnsIdentity { path: format!("/run/netns/{name}"), device: 4, inode: 1 },
        pod_namespace: None,
        pod_name: None,
        pod_uid: None,
        port_mappings: Vec::new(),
        bandwidth: None,
        id,
    }
}

pub(super) fn plan_of(config: &Config, snapshot: &Snapshot, facts: &Facts) -> Plan {
    plan(config, snapshot, facts, &Endpoints::new())
}

pub(super) fn kinds(plan: &Plan) -> BTreeSet<IssueKind> {
    plan.issues.iter().map(|issue| issue.kind).collect()
}

pub(super) fn route<'a>(plan: &'a Plan, destination: &str) -> Option<&'a Route> {
    let destination = prefix(destination);
    plan.desired.routes.iter().find(|(key, _)| key.destination == destination).map(|(_, route)| route)
}

#[test]
fn wireguard_has_a_peer_per_node_with_its_blocks_and_a_route_per_block() {
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &facts(3));
    assert_eq!(plan.issues, []);
    let (name, device) = plan.desired.wireguard.iter().next().unwrap();
    assert_eq!(name.as_str(), "husk-wg0");
    assert_eq!(device.public_key, key(0));
    assert_eq!(device.peers.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::from([key(1), key(2)]));
    assert_eq!(device.peers[&key(1)].allowed_ips, blocks(1));
    assert_eq!(device.peers[&key(1)].endpoint, Some("192.0.2.2:51820".parse().unwrap()));
    assert_eq!(plan.desired.links[name].mtu, 1440);
    assert_eq!(plan.pod_mtu, Some(1440));
    let to_peer = route(&plan, "10.42.0.64/26").unwrap();
    assert_eq!(to_peer.mtu, Some(1440));
    assert_eq!(to_peer.source, Some(address("10.42.0.0")));
    assert_eq!(route(&plan, "10.42.0.0/16").unwrap().target, RouteTarget::Unreachable);
    assert_eq!(route(&plan, "fd42::/48").unwrap().target, RouteTarget::Unreachable);
    assert!(route(&plan, "10.42.0.0/26").is_none(), "own block: unassigned addresses meet the unreachable route");
}

#[test]
fn an_ipv6_underlay_costs_twenty_bytes_more() {
    let mut config = config(Mode::Wireguard);
    config.underlay.family = Family::Ipv6;
    let plan = plan_of(&config, &snapshot(2), &facts(2));
    assert_eq!(plan.pod_mtu, Some(1420));
    let device = plan.desired.wireguard.values().next().unwrap();
    assert_eq!(device.peers[&key(1)].endpoint, Some("[2001:db8::2]:51820".parse().unwrap()));
}

#[test]
fn vxlan_has_three_static_entries_per_peer_and_family() {
    let plan = plan_of(&config(Mode::Vxlan), &snapshot(3), &facts(3));
    assert_eq!(plan.issues, []);
    let link = &plan.desired.links[&interface("husk-vx")];
    assert_eq!(link.kind, LinkKind::Vxlan { vni: 4242, port: 4789, local: address("192.0.2.1") });
    assert!(!link.threaded_napi, "the device would stop receiving under load");
    assert_eq!(link.mac, Some(vxlan_mac(&node("host0"))));
    assert_eq!(plan.desired.fdb.values().copied().collect::<Vec<_>>().len(), 2);
    assert_eq!(plan.desired.neighbours.len(), 4);
    let to_peer = route(&plan, "10.42.0.64/26").unwrap();
    let expected =
        RouteTarget::Interface { interface: interface("husk-vx"), via: Some(address("10.42.0.64")), onlink: true };
    assert_eq!((to_peer.target.clone(), to_peer.mtu), (expected, Some(1450)));
    let nodes = &plan.desired.nft.unwrap().sets["nodes"];
    let known = ["192.0.2.2", "192.0.2.3"].map(|text| SetElement::Address(address(text)));
    assert_eq!(nodes.elements, BTreeSet::from(known));
}

#[test]
fn offload_follows_the_self_test_and_a_finding_is_told() {
    let interface = interface("eth0");
    let of = |setting, finding| {
        let offload = Offload { setting, finding };
        let plan = plan_of(&config(Mode::Vxlan), &snapshot(3), &Facts { offload, ..facts(3) });
        (plan.desired.offload.values().copied().next(), plan.issues)
    };
    assert_eq!(of(Setting::Untouched, None), (None, vec![]));
    assert_eq!(of(Setting::On, None), (Some(true), vec![]));
    assert_eq!(of(Setting::Off, None), (Some(false), vec![]), "a test proves nothing as long as it goes on");
    let finding = Finding { peer: node("host1"), interface, at: Duration::from_secs(5), confirmed: true };
    let (offload, issues) = of(Setting::Off, Some(finding.clone()));
    assert_eq!(offload, Some(false));
    let [issue] = issues.as_slice() else { panic!("{issues:?}") };
    assert_eq!(
        (issue.severity, issue.kind, issue.subject.as_str()),
        (Severity::Warning, IssueKind::BrokenOffload, "husk-vx")
    );
    assert!(["host1", "eth0", "ethtool -k eth0"].iter().all(|it| issue.to_string().contains(it)), "{issue}");
    let offload = Offload { setting: Setting::Off, finding: Some(finding) };
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &Facts { offload, ..facts(3) });
    assert_eq!((plan.desired.offload.len(), plan.issues), (0, vec![]), "there is no such device");
}

#[test]
fn offload_is_tried_with_peers_that_the_vxlan_device_leads_to() {
    let facts = facts(3);
    let plan = plan_of(&config(Mode::Vxlan), &snapshot(3), &facts);
    let candidates = candidates(&plan, &facts);
    assert_eq!(candidates.keys().map(NodeName::as_str).collect::<Vec<_>>(), ["host1", "host2"]);
    let first = &candidates[&node("host1")];
    assert_eq!((first.own, first.address), (address("10.42.0.0"), address("10.42.0.64")));
    assert_eq!((first.mtu, &first.interface), (Some(1450), &facts.routes[&address("192.0.2.2")].interface));
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(3), &facts);
    assert_eq!(crate::offload::candidates(&plan, &facts), BTreeMap::new());
}

#[test]
fn direct_uses_the_peer_as_router_and_ipv6_next_hops_for_ipv4_where_it_must() {
    let plan = plan_of(&config(Mode::Direct), &snapshot(2), &facts(2));
    let via = |plan: &Plan, to: &str| match route(plan, to).unwrap().target.clone() {
        RouteTarget::Interface { via, .. } => via.unwrap(),
        RouteTarget::Unreachable => panic!("unreachable"),
    };
    assert_eq!(via(&plan, "10.42.0.64/26"), address("192.0.2.2"));
    assert_eq!(via(&plan, "fd42::40/122"), address("2001:db8::2"));
    let mut six = config(Mode::Direct);
    six.underlay.family = Family::Ipv6;
    assert_eq!(via(&plan_of(&six, &snapshot(2), &facts(2)), "10.42.0.64/26"), address("2001:db8::2"));
}

#[test]
fn direct_over_a_router_is_refused_with_the_reason() {
    let mut facts = facts(2);
    facts.routes.values_mut().for_each(|route| route.on_link = false);
    let plan = plan_of(&config(Mode::Direct), &snapshot(2), &facts);
    assert!(plan.peers[&node("host1")].refused.as_ref().unwrap().contains("behind a router"));
    assert!(route(&plan, "10.42.0.64/26").is_none());
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::NoRouteToPeer]));
}

#[test]
fn the_mtu_to_a_peer_is_the_smallest_of_own_peer_and_route() {
    let mut snapshot = snapshot(3);
    snapshot.nodes.get_mut(&node("host1")).unwrap().underlay_mtu = 1400;
    let mut facts = facts(3);
    facts.routes.get_mut(&address("192.0.2.3")).unwrap().mtu = 1380;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts);
    assert_eq!(route(&plan, "10.42.0.64/26").unwrap().mtu, Some(1340));
    assert_eq!(route(&plan, "10.42.0.128/26").unwrap().mtu, Some(1320));
    assert_eq!(plan.pod_mtu, Some(1440));
}

/// Another would come back from the kernel as something else than what was asked for, again and again.
#[test]
fn a_route_gets_no_larger_mtu_than_the_kernel_gives_one() {
    let mut snapshot = snapshot(2);
    snapshot.nodes.values_mut().for_each(|record| record.underlay_mtu = 65535);
    let mut facts = facts(2);
    facts.underlay_mtu = 65535;
    facts.routes.values_mut().for_each(|route| route.mtu = 65535);
    for mode in Mode::ALL {
        let plan = plan_of(&config(mode), &snapshot, &facts);
        let mtus: Vec<u32> = plan.desired.routes.values().filter_map(|route| route.mtu).collect();
        assert!(mtus.iter().all(|mtu| *mtu <= 65520), "{mode}: {mtus:?}");
        assert!(!mtus.is_empty() || mode.uses_esp() || mode.uses_wireguard(), "{mode}");
    }
}

#[test]
fn a_userspace_device_pads_small_packets_so_peers_with_a_tiny_mtu_get_a_padding_proof_route() {
    let mut snapshot = snapshot(3);
    snapshot.nodes.get_mut(&node("host1")).unwrap().underlay_mtu = 1305;
    snapshot.nodes.get_mut(&node("host2")).unwrap().underlay_mtu = 1405;
    let mut facts = facts(3);
    facts.wireguard = Some(WireguardSupport::Userspace);
    let mut config = config(Mode::Wireguard);
    config.cluster_cidrs.retain(|cidr| cidr.family() == Family::Ipv4);
    let plan = plan_of(&config, &snapshot, &facts);
    assert_eq!(plan.peers[&node("host1")].probe[&Family::Ipv4].promised, 1232, "what is probed is what is sent");
    assert_eq!(route(&plan, "10.42.0.64/26").unwrap().mtu, Some(1232), "1245 rounded down to 16");
    assert_eq!(route(&plan, "10.42.0.128/26").unwrap().mtu, Some(1345), "exact");
}

#[test]
fn ipv6_below_1280_blocks_and_is_never_clamped() {
    let mut facts = facts(2);
    facts.underlay_mtu = 1339;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(2), &facts);
    assert_eq!(plan.ledger.inner, Some(1279));
    assert_eq!(plan.pod_mtu, None);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::MtuTooSmall]));
    // The device has no IPv6 either: the kernel would refuse it every time.
    let of_ipv6 = |plan: &Plan| {
        let addresses = plan.desired.addresses.iter().filter(|it| it.address.is_ipv6()).count();
        let parameters = plan.desired.sysctls.keys().filter(|it| it.contains("ipv6/conf/husk-")).count();
        (addresses, parameters)
    };
    assert_eq!(of_ipv6(&plan), (0, 0));
    facts.underlay_mtu = 1340;
    assert_eq!(of_ipv6(&plan_of(&config(Mode::Wireguard), &snapshot(2), &facts)), (1, 1));
}

#[test]
fn a_configured_mtu_lowers_but_never_raises() {
    let mut config = config(Mode::Wireguard);
    config.underlay.mtu = Some(1400);
    assert_eq!(plan_of(&config, &snapshot(2), &facts(2)).pod_mtu, Some(1340));
    config.underlay.mtu = Some(9000);
    let plan = plan_of(&config, &snapshot(2), &facts(2));
    assert_eq!(plan.pod_mtu, Some(1440));
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::MtuTooLarge]));
}

#[test]
fn a_thief_of_a_block_key_or_address_gets_an_issue_and_nobody_else_is_disturbed() {
    let before = plan_of(&config(Mode::Wireguard), &snapshot(3), &facts(4));
    type Theft = (IssueKind, fn(&mut NodeRecord));
    let steal: [Theft; 3] = [
        (IssueKind::DuplicateBlock, |thief| thief.blocks = blocks(1)),
        (IssueKind::DuplicateKey, |thief| thief.wireguard[0].public_key = key(1)),
        (IssueKind::DuplicateAddress, |thief| thief.addresses = record(1).addresses),
    ];
    for (kind, steal) in steal {
        let mut snapshot = snapshot(3);
        let mut thief = record(3);
        steal(&mut thief);
        snapshot.nodes.insert(thief.name.clone(), thief);
        let after = plan_of(&config(Mode::Wireguard), &snapshot, &facts(4));
        assert_eq!(kinds(&after), BTreeSet::from([kind]), "{kind:?}");
        assert!(after.issues.iter().all(|issue| issue.subject == "host3"), "{kind:?}: {:?}", after.issues);
        assert_eq!(after.desired.routes, before.desired.routes, "{kind:?}");
        let device = |plan: &Plan| plan.desired.wireguard.values().next().unwrap().peers.clone();
        let (mut had, mut has) = (device(&before), device(&after));
        has.retain(|key, _| had.contains_key(key));
        assert_eq!(std::mem::take(&mut had), has, "{kind:?}");
    }
}

#[test]
fn the_own_node_keeps_what_an_older_node_claims() {
    let mut snapshot = snapshot(2);
    let thief = snapshot.nodes.get_mut(&node("host1")).unwrap();
    thief.created = jiff::Timestamp::from_second(1_790_000_000).unwrap();
    thief.wireguard[0].public_key = key(0);
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(2));
    assert!(plan.desired.wireguard.values().next().unwrap().peers.is_empty());
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::DuplicateKey]));
}

#[test]
fn a_clock_that_was_not_set_makes_nobody_senior() {
    let mut snapshot = snapshot(2);
    let mut thief = record(2);
    thief.created = jiff::Timestamp::UNIX_EPOCH;
    thief.wireguard[0].public_key = key(1);
    snapshot.nodes.insert(thief.name.clone(), thief);
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(3));
    assert!(plan.peers[&node("host1")].refused.is_none());
    assert!(plan.peers[&node("host2")].refused.is_some());
}

#[test]
fn a_refused_peer_takes_nothing_with_it() {
    let mut snapshot = snapshot(3);
    // host1 claims an address of host0's, and before that one that is host2's; host2 must not suffer.
    let theirs: DualStack = [address("192.0.2.3"), address("2001:db8::1")].into_iter().collect();
    snapshot.nodes.get_mut(&node("host1")).unwrap().addresses = theirs;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(3));
    assert!(plan.peers[&node("host1")].refused.is_some());
    assert!(plan.peers[&node("host2")].refused.is_none());
}

#[test]
fn a_host_that_uses_anothers_name_stays_out() {
    let mut facts = facts(2);
    facts.instance = instance(77);
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(2), &facts);
    assert_eq!(plan.record, None);
    assert_eq!(plan.pod_mtu, None);
    assert!(plan.desired.addresses.is_empty());
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::DuplicateNode]));
}

#[test]
fn a_kernel_without_ipv6_blocks_a_cluster_with_ipv6() {
    let mut facts = facts(1);
    facts.ipv6 = false;
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(1), &facts);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::FamilyUnavailable]));
    let mut four = config(Mode::Wireguard);
    four.cluster_cidrs.pop();
    assert_eq!(plan_of(&four, &Snapshot::default(), &facts).issues, []);
}

#[test]
fn a_configured_address_that_is_not_there_is_named() {
    let mut facts = facts(1);
    facts.addresses = DualStack::default();
    facts.underlay_mtu = 0;
    let mut config = config(Mode::Wireguard);
    config.underlay.addresses = [address("192.0.2.200")].into_iter().collect();
    let plan = plan_of(&config, &snapshot(1), &facts);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::NoUnderlayAddress]));
    assert!(plan.issues[0].message.contains("192.0.2.200"), "{}", plan.issues[0]);
}

#[test]
fn pods_do_not_speak_vxlan_for_the_node() {
    let nft = plan_of(&config(Mode::Vxlan), &snapshot(2), &facts(2)).desired.nft.unwrap();
    let rules = &nft.chains["prerouting-guard"].rules;
    let position = |name: &str| rules.iter().position(|rule| rule.name == name).unwrap();
    assert!(position(POD_TO_VTEP) < position("pod"));
    assert_eq!(rules[position(POD_TO_VTEP)].statements.last(), Some(&Statement::Drop));
}

#[test]
fn blocks_nobody_allocated_or_outside_the_cluster_are_not_routed() {
    for foreign in ["10.42.9.0/26", "10.43.0.0/26", "0.0.0.0/0"] {
        let mut snapshot = snapshot(2);
        snapshot.nodes.get_mut(&node("host1")).unwrap().blocks.insert(prefix(foreign));
        let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(2));
        assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::ForeignBlock]), "{foreign}");
        assert_eq!(plan.desired.wireguard.values().next().unwrap().peers[&key(1)].allowed_ips, blocks(1), "{foreign}");
        assert!(route(&plan, foreign).is_none(), "{foreign}");
    }
}

#[test]
fn overlapping_blocks_of_any_length_are_found() {
    for (mine, theirs) in
        [("10.42.0.128/26", "10.42.0.128/25"), ("10.42.0.128/25", "10.42.0.192/26"), ("10.42.1.0/24", "10.42.1.7/32")]
    {
        let mut snapshot = snapshot(3);
        for (name, block) in [("host1", mine), ("host2", theirs)] {
            snapshot.blocks.insert(prefix(block), node(name));
            snapshot.nodes.get_mut(&node(name)).unwrap().blocks.insert(prefix(block));
        }
        let plan = plan_of(&config(Mode::Wireguard), &snapshot, &facts(3));
        assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::DuplicateBlock]), "{mine} {theirs}");
        assert!(route(&plan, mine).is_some() && route(&plan, theirs).is_none(), "{mine} {theirs}");
    }
}

#[test]
fn the_published_router_address_stays_while_its_block_does() {
    let mut snapshot = snapshot(1);
    snapshot.blocks.insert(prefix("10.42.0.64/26"), node("host0"));
    snapshot.nodes.get_mut(&node("host0")).unwrap().router.set(address("10.42.0.64"));
    let router = |snapshot: &Snapshot| plan_of(&config(Mode::Wireguard), snapshot, &facts(1)).record.unwrap().router;
    assert_eq!(router(&snapshot).get(Family::Ipv4), Some(address("10.42.0.64")));
    snapshot.blocks.remove(&prefix("10.42.0.64/26"));
    assert_eq!(router(&snapshot).get(Family::Ipv4), Some(address("10.42.0.0")));
}

#[test]
fn without_wireguard_there_is_a_guard_and_no_tunnel_and_no_pod() {
    let mut facts = facts(2);
    facts.wireguard = Some(WireguardSupport::Unavailable { reason: "no module, no /dev/net/tun".into() });
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(2), &facts);
    assert_eq!(plan.pod_mtu, None);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::EncapsulationUnavailable]));
    assert!(plan.desired.links.is_empty());
    assert!(plan.desired.routes.values().all(|route| route.target == RouteTarget::Unreachable));
    assert!(plan.desired.nft.unwrap().chains.contains_key("postrouting-guard"));
}

#[test]
fn tunnelled_modes_drop_what_leaves_outside_the_tunnel_after_every_translation() {
    for mode in [Mode::Wireguard, Mode::Vxlan] {
        let nft = plan_of(&config(mode), &snapshot(2), &facts(2)).desired.nft.unwrap();
        let guard = &nft.chains["postrouting-guard"];
        assert!(guard.priority > nft.chains["postrouting-masquerade"].priority);
        let drops = guard.rules.iter().filter(|rule| rule.statements.last() == Some(&Statement::Drop));
        assert_eq!(drops.count(), 4, "source and destination of both families");
        assert_eq!(nft.sets["cluster_ipv4"].elements, BTreeSet::from([SetElement::Prefix(prefix("10.42.0.0/16"))]));
    }
    let direct = plan_of(&config(Mode::Direct), &snapshot(2), &facts(2)).desired.nft.unwrap();
    assert!(!direct.chains.contains_key("postrouting-guard"));
    let spoofed = direct.chains["prerouting-guard"].rules.iter().find(|rule| rule.name == SPOOFED).unwrap();
    assert!(spoofed.statements.iter().any(|it| matches!(it, Statement::Match(m) if m.value == MatchValue::Missing)));
}

#[test]
fn an_underlay_address_inside_the_cluster_blocks_without_cutting_the_node_off() {
    let mut facts = facts(2);
    facts.addresses.set(address("10.42.200.1"));
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(2), &facts);
    assert_eq!(plan.pod_mtu, None);
    assert!(kinds(&plan).contains(&IssueKind::UnderlayOverlap));
    assert_eq!(plan.desired, Desired::default());
}

#[test]
fn pods_get_routes_and_neighbours_while_their_interface_exists() {
    let here = endpoint("a", &["10.42.0.5", "fd42::5"]);
    let gone = endpoint("b", &["10.42.0.6"]);
    let mut facts = facts(1);
    facts.pod_interfaces.insert(here.host_interface.clone(), 7);
    let endpoints: Endpoints = [here.clone(), gone].into_iter().map(|it| (it.id.clone(), it)).collect();
    let plan = plan(&config(Mode::Wireguard), &snapshot(1), &facts, &endpoints);
    assert_eq!(plan.issues, []);
    assert_eq!(plan.desired.neighbours.values().collect::<Vec<_>>(), [&here.pod_mac, &here.pod_mac]);
    let key = |text: &str, metric| RouteKey { table: MAIN_TABLE, destination: prefix(text), metric };
    assert!(plan.desired.routes.contains_key(&key("10.42.0.5/32", 0)));
    assert!(plan.desired.routes.contains_key(&key("fd42::5/128", 1024)));
    assert!(route(&plan, "10.42.0.6/32").is_none());
}

#[test]
fn two_pods_with_one_address_are_an_issue_and_the_first_keeps_it() {
    let (one, two) = (endpoint("a", &["10.42.0.5"]), endpoint("b", &["10.42.0.5"]));
    let mut facts = facts(1);
    facts.pod_interfaces.extend([(one.host_interface.clone(), 7), (two.host_interface.clone(), 8)]);
    let endpoints: Endpoints = [two, one.clone()].into_iter().map(|it| (it.id.clone(), it)).collect();
    let plan = plan(&config(Mode::Wireguard), &snapshot(1), &facts, &endpoints);
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::BadLease]));
    let RouteTarget::Interface { interface, .. } = &route(&plan, "10.42.0.5/32").unwrap().target else { panic!() };
    assert_eq!(*interface, one.host_interface);
}

#[test]
fn router_advertisements_survive_forwarding() {
    let mut facts = facts(1);
    facts.router_advertisements = BTreeSet::from([interface("eth0"), interface("eth1")]);
    let plan = plan_of(&config(Mode::Wireguard), &snapshot(1), &facts);
    assert_eq!(plan.desired.sysctls["net/ipv6/conf/eth0/accept_ra"], "2");
    assert_eq!(plan.desired.sysctls["net/ipv6/conf/eth1/accept_ra"], "2");
    assert_eq!(plan.desired.sysctls["net/ipv4/ip_forward"], "1");
}

/// A record as a confused or hostile node might publish it.
fn arbitrary_record(index: u8) -> impl Strategy<Value = NodeRecord> {
    (0_i64..4, 0_u8..4, 0_u8..4, 0_u8..4, prop_oneof![Just(1500_u32), Just(1300), Just(0), Just(u32::MAX)], any::<u8>())
        .prop_map(move |(created, own_address, own_key, own_blocks, mtu, holes)| {
            let mut it = record(index);
            it.created = jiff::Timestamp::from_second(1_800_000_000 + created).unwrap();
            it.addresses = record(own_address).addresses;
            it.wireguard[0].public_key = key(own_key);
            it.blocks = blocks(own_blocks);
            it.underlay_mtu = mtu;
            if holes & 1 != 0 {
                it.addresses = DualStack::default();
            }
            if holes & 2 != 0 {
                it.wireguard.clear();
            }
            if holes & 4 != 0 {
                it.router = DualStack::default();
            }
            if holes & 8 != 0 {
                it.blocks.insert(prefix("10.42.0.0/24"));
            }
            if holes & 16 != 0 {
                it.vxlan_mac = None;
            }
            it
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the others publish: no panic, no two peers with one allowed-ip, no route outside the cluster, nothing of the
    /// own node given away, and the unreachable floor stays.
    #[test]
    fn whatever_others_publish_nothing_is_shared_and_nothing_leaks(
        records in (arbitrary_record(1), arbitrary_record(2), arbitrary_record(3)),
        mode in prop_oneof![Just(Mode::Direct), Just(Mode::Vxlan), Just(Mode::Wireguard)],
    ) {
        let mut snapshot = snapshot(4);
        for record in [records.0, records.1, records.2] {
            snapshot.nodes.insert(record.name.clone(), record);
        }
        let plan = plan_of(&config(mode), &snapshot, &facts(4));
        let mut seen = BTreeSet::new();
        for device in plan.desired.wireguard.values() {
            for allowed in device.peers.values().flat_map(|peer| &peer.allowed_ips) {
                prop_assert!(seen.insert(*allowed), "{allowed} twice");
                prop_assert!(blocks(0).iter().all(|own| !own.overlaps(allowed)));
            }
        }
        for (key, route) in &plan.desired.routes {
            prop_assert!(config(mode).cluster_cidrs.iter().any(|cidr| cidr.covers(&key.destination)));
            prop_assert!(route.target == RouteTarget::Unreachable || blocks(0).iter().all(|own| !own.overlaps(&key.destination)));
        }
        prop_assert_eq!(route(&plan, "10.42.0.0/16").map(|route| route.target.clone()), Some(RouteTarget::Unreachable));
    }

    /// Events in any order, split and repeated, lead to the same snapshot and so to the same plan.
    #[test]
    fn order_and_repetition_of_events_make_no_difference(
        order in Just((0_u8..6).collect::<Vec<_>>()).prop_shuffle(),
        again in proptest::collection::vec(0_u8..6, 0..6),
    ) {
        let full = snapshot(6);
        let mut grown = Snapshot::default();
        for index in order.into_iter().chain(again) {
            let record = record(index);
            grown.blocks.extend(record.blocks.iter().map(|block| (*block, record.name.clone())));
            grown.nodes.insert(record.name.clone(), record);
            // Every intermediate state has to be plannable too.
            let _ = plan_of(&config(Mode::Wireguard), &grown, &facts(6));
        }
        prop_assert_eq!(plan_of(&config(Mode::Wireguard), &grown, &facts(6)), plan_of(&config(Mode::Wireguard), &full, &facts(6)));
    }
}
