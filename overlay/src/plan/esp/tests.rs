//! Table tests of each rule, on one node whose kernel does what the plan says. How the rules work together is proven by the
//! simulation in `overlay/tests/rotation`.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::esp::{Aead, Association};
use crate::facts::{AssociationUse, Facts, OwnEpoch, RouteLimit, UnderlayRoute};
use crate::kernel::{XfrmPolicy, XfrmStateKey};
use crate::keys::PublicKey;
use crate::name::InstanceId;
use crate::plan::{Plan, plan, router_addresses, vxlan_mac};
use crate::record::{NodeRecord, Snapshot};
use crate::rotation::{Cause, KeyAction};

const GRACE: Duration = Duration::from_secs(30);

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn name(index: u8) -> NodeName {
    NodeName::new(&format!("host{index}")).unwrap()
}

fn address(index: u8) -> IpAddr {
    format!("192.0.2.{}", index + 1).parse().unwrap()
}

fn blocks(index: u8) -> BTreeSet<Prefix> {
    let four = prefix("10.42.0.0/16").subnet(26, index.into()).unwrap();
    let six = prefix("fd42::/48").subnet(122, index.into()).unwrap();
    BTreeSet::from([four, six])
}

fn key(node: u8, epoch: u64) -> PublicKey {
    let mut bytes = [node + 1; 32];
    bytes[..8].copy_from_slice(&epoch.to_le_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn epoch(node: u8, epoch: u64) -> EspEpochRecord {
    EspEpochRecord { epoch, public_key: key(node, epoch), spi_salt: epoch.wrapping_mul(7).wrapping_add(node.into()) }
}

fn record(index: u8, epochs: &[u64]) -> NodeRecord {
    let epochs = epochs.iter().map(|number| epoch(index, *number)).collect();
    NodeRecord {
        name: name(index),
        instance: InstanceId::new(&format!("{index:032x}")).unwrap(),
        created: jiff::Timestamp::from_second(1_800_000_000 + i64::from(index)).unwrap(),
        addresses: [address(index)].into_iter().collect(),
        underlay_mtu: 1500,
        blocks: blocks(index),
        router: router_addresses(&blocks(index)),
        vxlan_mac: Some(vxlan_mac(&name(index))),
        wireguard: Vec::new(),
        esp: Some(EspRecord { cipher: Aead::AesGcm128, udp_port: None, epochs }),
    }
}

/// `host0`, its kernel and the cluster.
struct Bed {
    config: Config,
    snapshot: Snapshot,
    facts: Facts,
}

impl Bed {
    /// With these epochs held and published, and as many peers, each of which publishes its epoch 1.
    fn new(mode: Mode, peers: u8, own: &[u64]) -> Self {
        let mut config = Config::new(vec![prefix("10.42.0.0/16"), prefix("fd42::/48")]);
        config.mode = mode;
        let mut snapshot = Snapshot::default();
        for index in 0..=peers {
            let record = record(index, if index == 0 { own } else { &[1] });
            snapshot.blocks.extend(record.blocks.iter().map(|block| (*block, record.name.clone())));
            snapshot.nodes.insert(record.name.clone(), record);
        }
        let route = UnderlayRoute {
            interface: InterfaceName::new("eth0").unwrap(),
            mtu: 1500,
            limited_by: RouteLimit::Interface,
            on_link: true,
        };
        let facts = Facts {
            node: name(0),
            instance: snapshot.nodes[&name(0)].instance.clone(),
            created: snapshot.nodes[&name(0)].created,
            addresses: [address(0)].into_iter().collect(),
            underlay_mtu: 1500,
            underlay_interface: None,
            foreign_prefixes: BTreeSet::new(),
            routes: (1..=peers).map(|index| (address(index), route.clone())).collect(),
            wireguard: None,
            probed: BTreeMap::new(),
            silent: BTreeSet::new(),
            offload: crate::offload::Offload::default(),
            wireguard_epochs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            esp: Some(EspFacts::default()),
            uptime: Duration::from_secs(1000),
            rotation_requested: false,
            pod_interfaces: BTreeMap::new(),
            threaded_napi: false,
            ipv6: true,
            router_advertisements: BTreeSet::new(),
        };
        let mut bed = Self { config, snapshot, facts };
        own.iter().for_each(|number| bed.hold(*number, true));
        bed
    }

    fn esp(&mut self) -> &mut EspFacts {
        self.facts.esp.as_mut().unwrap()
    }

    fn hold(&mut self, number: u64, published: bool) {
        let EspEpochRecord { public_key, spi_salt, .. } = epoch(0, number);
        let own = OwnEpoch { public_key, spi_salt, created: Duration::from_secs(900) };
        self.esp().epochs.insert(number, own);
        if published {
            self.esp().published.insert(number, Duration::from_secs(900));
        }
    }

    fn peer(&mut self, index: u8, epochs: &[u64]) {
        self.snapshot.nodes.insert(name(index), record(index, epochs));
    }

    fn plan(&self) -> Plan {
        plan(&self.config, &self.snapshot, &self.facts, &Endpoints::new())
    }

    /// Does with the kernel and the disk what the plan says, but nothing with the keys.
    fn carry_out(&mut self, plan: &Plan) {
        let esp = self.esp();
        esp.spent.extend(&plan.rotation.spend);
        esp.installed.retain(|key, _| plan.desired.xfrm_states.contains_key(key));
        for (key, state) in &plan.desired.xfrm_states {
            let source = state.parameters.source;
            let usage = AssociationUse { source, packets: 0, bytes: 0, undecryptable: 0, quiet: GRACE, age: GRACE };
            esp.installed.entry(*key).or_insert(usage);
        }
        for epoch in &plan.rotation.published {
            esp.published.entry(*epoch).or_insert(Duration::from_secs(1000));
        }
    }

    /// Passes until nothing changes any more.
    fn converge(&mut self) -> Plan {
        for _ in 0..5 {
            let plan = self.plan();
            self.carry_out(&plan);
        }
        self.plan()
    }

    /// Where an association is; sender and receiver as node and epoch.
    fn slot(&self, sender: (u8, u64), receiver: (u8, u64)) -> (XfrmStateKey, Association) {
        let end = |(node, number): (u8, u64)| crate::esp::EspEnd {
            node: name(node),
            epoch: number,
            address: address(node),
            public_key: key(node, number),
        };
        let association = Association { sender: end(sender), receiver: end(receiver), cipher: Aead::AesGcm128 };
        let salt = epoch(receiver.0, receiver.1).spi_salt;
        let spi = crate::esp::spi(&association, salt, self.config.ipsec.spi_bits);
        (XfrmStateKey { destination: address(receiver.0), spi }, association)
    }

    fn usage(&mut self, sender: (u8, u64), receiver: (u8, u64)) -> &mut AssociationUse {
        let key = self.slot(sender, receiver).0;
        self.esp().installed.get_mut(&key).expect("it is installed")
    }

    /// The peer has sent under this own epoch.
    fn hear(&mut self, from: (u8, u64), own: u64) {
        self.usage(from, (0, own)).packets = 1;
    }
}

/// What was written down of what has a place in the kernel.
fn stage(bed: &mut Bed, key: XfrmStateKey) -> Option<AssociationStage> {
    bed.esp().spent.values().find(|spent| spent.key == key).map(|spent| spent.stage)
}

/// What happens to a bed.
type Change = fn(&mut Bed);

/// What a node sends with and under which keys of its peer, as the SPI of the policies tells.
fn sends(plan: &Plan, bed: &Bed, peer: u8) -> Option<(u64, u64)> {
    let keys = plan.peers[&name(peer)].keys;
    let named = keys.own.zip(keys.peer)?;
    let (slot, _) = bed.slot((0, named.0), (peer, named.1));
    for block in blocks(peer) {
        let key = XfrmPolicyKey {
            direction: XfrmDirection::Out,
            source: Prefix::default_route(block.family()),
            destination: block,
            udp_port: None,
            if_id: marks::XFRM_IF_ID,
        };
        let template = template(&plan.desired.xfrm_policies[&key]);
        assert_eq!((template.destination, template.spi), (address(peer), Some(slot.spi)));
    }
    Some(named)
}

fn template(policy: &XfrmPolicy) -> XfrmTemplate {
    match policy.action {
        XfrmAction::Protect(template) => template,
        XfrmAction::Block => panic!("it blocks"),
    }
}

fn associations(plan: &Plan) -> BTreeSet<(String, u64, String, u64)> {
    let ends = |it: &XfrmState| {
        let (sender, receiver) = (&it.association.sender, &it.association.receiver);
        (sender.node.to_string(), sender.epoch, receiver.node.to_string(), receiver.epoch)
    };
    plan.desired.xfrm_states.values().map(ends).collect()
}

fn has(plan: &Plan, sender: (u8, u64), receiver: (u8, u64)) -> bool {
    let wanted = (name(sender.0).to_string(), sender.1, name(receiver.0).to_string(), receiver.1);
    associations(plan).contains(&wanted)
}

fn kinds(plan: &Plan) -> BTreeSet<IssueKind> {
    plan.issues.iter().map(|issue| issue.kind).collect()
}

fn routed(plan: &Plan, block: &Prefix) -> bool {
    plan.desired
        .routes
        .iter()
        .any(|(key, route)| key.destination == *block && matches!(route.target, RouteTarget::Interface { .. }))
}

fn published(plan: &Plan) -> Vec<u64> {
    plan.record.as_ref().unwrap().esp.as_ref().unwrap().epochs.iter().map(|epoch| epoch.epoch).collect()
}

#[test]
fn a_node_without_key_makes_one_and_says_which_cipher_it_uses() {
    let bed = Bed::new(Mode::Ipsec, 1, &[]);
    let plan = bed.plan();
    assert_eq!(plan.rotation.actions, [KeyAction::Begin { epoch: 1, cause: Cause::First }]);
    assert_eq!(published(&plan), [0; 0]);
    assert_eq!(plan.issues, []);
    assert!(plan.desired.xfrm_states.is_empty());
    assert!(blocks(1).iter().all(|block| !routed(&plan, block)));
}

#[test]
fn numbers_go_on_after_a_reboot() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[]);
    bed.snapshot.nodes.insert(name(0), record(0, &[4, 5]));
    assert_eq!(bed.plan().rotation.actions, [KeyAction::Begin { epoch: 6, cause: Cause::First }]);
    bed.snapshot.nodes.insert(name(0), record(0, &[u64::MAX]));
    assert_eq!(bed.plan().rotation.actions, [KeyAction::Begin { epoch: 1, cause: Cause::First }]);
}

#[test]
fn the_first_epoch_is_published_with_the_associations_under_it() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[]);
    bed.hold(1, false);
    let plan = bed.plan();
    assert_eq!((published(&plan), &plan.rotation.published), (vec![1], &BTreeSet::from([1])));
    assert!(has(&plan, (1, 1), (0, 1)));
}

#[test]
fn a_peer_is_received_from_first_then_sent_to_and_routed_to_once_that_is_installed() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    let block = *blocks(1).first().unwrap();
    let first = bed.plan();
    assert_eq!(associations(&first), BTreeSet::from([("host1".into(), 1, "host0".into(), 1)]));
    assert_eq!((sends(&first, &bed, 1), routed(&first, &block)), (None, false));
    assert_eq!(first.peers[&name(1)].refused, None, "it is only waited for");
    bed.carry_out(&first);
    let second = bed.plan();
    assert!(has(&second, (0, 1), (1, 1)));
    assert_eq!((sends(&second, &bed, 1), routed(&second, &block)), (None, false));
    bed.carry_out(&second);
    let third = bed.plan();
    assert_eq!((sends(&third, &bed, 1), routed(&third, &block)), (Some((1, 1)), true));
    assert_eq!(third.issues, []);
    assert_eq!(third.desired.links.keys().map(InterfaceName::as_str).collect::<Vec<_>>(), ["husk-ipsec"]);
    assert_eq!((third.ledger.inner, third.pod_mtu), (Some(1446), Some(1446)));
    assert_eq!(third.rotation.unconfirmed, BTreeMap::from([(1, BTreeSet::from([name(1)]))]));
    bed.hear((1, 1), 1);
    assert_eq!(bed.plan().rotation.unconfirmed, BTreeMap::new());
}

#[test]
fn a_peer_may_send_only_from_its_own_blocks() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    let plan = bed.converge();
    for direction in [XfrmDirection::In, XfrmDirection::Forward] {
        let policies = plan.desired.xfrm_policies.iter().filter(|(key, _)| key.direction == direction);
        let sources: BTreeSet<Prefix> = policies.clone().map(|(key, _)| key.source).collect();
        assert_eq!(sources, blocks(1));
        for (key, policy) in policies {
            assert_eq!(key.destination, Prefix::default_route(key.source.family()));
            let expected =
                XfrmTemplate { source: address(1), destination: address(0), mode: EspMode::Tunnel, spi: None };
            assert_eq!(template(policy), expected);
        }
    }
}

#[test]
fn what_probing_found_limits_the_routes_to_that_peer() {
    for (mode, promised) in [(Mode::Ipsec, 1446), (Mode::VxlanIpsec, 1416)] {
        let mut bed = Bed::new(mode, 2, &[1]);
        let before = bed.converge();
        assert_eq!(before.peers[&name(1)].probe[&Family::Ipv4].promised, promised);
        let limit = crate::probe::Limit { bytes: 1333, found: true };
        bed.facts.probed.insert(name(1), Family::ALL.map(|family| (family, limit)).into());
        let plan = bed.converge();
        let mtus = |index| -> BTreeSet<Option<u32>> {
            let of_peer = |key: &crate::kernel::RouteKey| blocks(index).contains(&key.destination);
            plan.desired.routes.iter().filter(|(key, _)| of_peer(key)).map(|(_, route)| route.mtu).collect()
        };
        assert_eq!((mtus(1), mtus(2)), ([Some(1333)].into(), [Some(promised)].into()), "{mode}");
        assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::PathMtu]), "{mode}");
        assert_eq!(plan.probe_targets(), before.probe_targets(), "{mode}");
        // What is larger than the route gets through no xfrm interface: probes have routes of their own to find more with.
        for target in plan.peers[&name(1)].probe.values() {
            let key = super::super::local::route_key(crate::prefix::Prefix::host(target.address));
            let own = plan.desired.routes.get(&key).and_then(|route| route.mtu);
            assert_eq!(own, (mode == Mode::Ipsec).then_some(promised), "{mode}");
            assert!(!before.desired.routes.contains_key(&key), "{mode}: only while there is a limit");
        }
    }
    let bed = Bed::new(Mode::Ipsec, 1, &[1]);
    assert!(bed.plan().probe_targets().is_empty(), "nothing can be sent before the associations are there");
}

#[test]
fn udp_encapsulation_has_the_ports_of_both_sides() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.config.ipsec.udp_port = Some(4500);
    let theirs = bed.snapshot.nodes.get_mut(&name(1)).unwrap().esp.as_mut().unwrap();
    theirs.udp_port = Some(4501);
    let plan = bed.converge();
    let udp: BTreeSet<_> =
        plan.desired.xfrm_states.values().map(|it| (it.parameters.source, it.parameters.udp)).collect();
    assert_eq!(udp, BTreeSet::from([(address(0), Some((4500, 4501))), (address(1), Some((4501, 4500)))]));
    assert_eq!(plan.ledger.inner, Some(1438));
}

#[test]
fn vxlan_in_esp_goes_only_where_an_association_leads_and_is_blocked_elsewhere() {
    let mut bed = Bed::new(Mode::VxlanIpsec, 2, &[1]);
    bed.snapshot.nodes.get_mut(&name(2)).unwrap().esp.as_mut().unwrap().epochs.clear();
    let plan = bed.converge();
    assert_eq!(plan.issues, []);
    assert_eq!(plan.desired.fdb.values().copied().collect::<Vec<_>>(), [address(1)]);
    assert!(blocks(1).iter().all(|block| routed(&plan, block)));
    assert!(blocks(2).iter().all(|block| !routed(&plan, block)), "nothing can be sent to it yet");
    assert!(
        plan.desired
            .xfrm_states
            .values()
            .all(|it| it.parameters.mode == EspMode::Transport && it.parameters.if_id == 0)
    );
    let any = Prefix::default_route(Family::Ipv4);
    for direction in [XfrmDirection::In, XfrmDirection::Out] {
        let policy = |source, destination| {
            let key = XfrmPolicyKey { direction, source, destination, udp_port: Some(4789), if_id: 0 };
            plan.desired.xfrm_policies.get(&key)
        };
        let blocks = policy(any, any).unwrap();
        assert_eq!((blocks.priority, &blocks.action), (marks::XFRM_BLOCK_PRIORITY, &XfrmAction::Block));
        let (here, there) = (Prefix::host(address(0)), Prefix::host(address(1)));
        let (from, to) = if direction == XfrmDirection::Out { (here, there) } else { (there, here) };
        assert!(policy(from, to).unwrap().priority < blocks.priority);
    }
    assert_eq!(plan.record.unwrap().vxlan_mac, Some(vxlan_mac(&name(0))));
    assert_eq!(plan.pod_mtu, Some(1416));
}

#[test]
fn a_kernel_without_esp_blocks_and_leaves_guard_and_floor() {
    for esp in [None, Some(EspFacts { unavailable: Some("no AES-GCM".into()), ..EspFacts::default() })] {
        let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
        bed.facts.esp = esp;
        let plan = bed.plan();
        assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::EncapsulationUnavailable]));
        assert_eq!((plan.pod_mtu, plan.rotation.actions.len()), (None, 0));
        assert!(plan.desired.links.is_empty() && plan.desired.xfrm_policies.is_empty() && plan.desired.nft.is_some());
        assert!(plan.desired.routes.values().all(|route| route.target == RouteTarget::Unreachable));
    }
}

#[test]
fn a_peer_that_disagrees_is_refused_with_both_values() {
    type Change = fn(&mut NodeRecord);
    let cases: [(Change, IssueKind, &str); 7] = [
        (|it| it.esp = None, IssueKind::IncompletePeer, "publishes no ESP keys"),
        (
            |it| it.esp.as_mut().unwrap().cipher = Aead::AesGcm256,
            IssueKind::IncompletePeer,
            "the cipher aes-gcm-256, this one aes-gcm-128",
        ),
        (
            |it| it.esp.as_mut().unwrap().udp_port = Some(4500),
            IssueKind::IncompletePeer,
            "with UDP encapsulation, this one without",
        ),
        (
            |it| it.esp.as_mut().unwrap().epochs = [1, 2, 3].map(|number| epoch(1, number)).to_vec(),
            IssueKind::IncompletePeer,
            "3 epochs",
        ),
        (
            |it| it.esp.as_mut().unwrap().epochs = [2, 1].map(|number| epoch(1, number)).to_vec(),
            IssueKind::IncompletePeer,
            "oldest first",
        ),
        (|it| it.esp.as_mut().unwrap().epochs[0].public_key = key(0, 1), IssueKind::DuplicateKey, "belongs to host0"),
        (
            |it| {
                let mut one = [0; 32];
                one[0] = 1;
                it.esp.as_mut().unwrap().epochs[0].public_key = PublicKey::from_bytes(one).unwrap();
            },
            IssueKind::IncompletePeer,
            "no secret",
        ),
    ];
    for (change, kind, message) in cases {
        let mut bed = Bed::new(Mode::Ipsec, 2, &[1]);
        change(bed.snapshot.nodes.get_mut(&name(1)).unwrap());
        let plan = bed.converge();
        assert_eq!(kinds(&plan), BTreeSet::from([kind]), "{message}");
        assert!(plan.issues[0].message.contains(message), "{}", plan.issues[0].message);
        assert!(plan.peers[&name(1)].refused.is_some());
        assert!(plan.desired.xfrm_states.values().all(|it| it.association.sender.node != name(1)));
        assert!(blocks(1).iter().all(|block| !routed(&plan, block)));
        assert_eq!(sends(&plan, &bed, 2), Some((1, 1)), "nobody else is disturbed: {message}");
    }
}

#[test]
fn of_two_peers_with_one_key_the_first_keeps_it() {
    let mut bed = Bed::new(Mode::Ipsec, 2, &[1]);
    bed.snapshot.nodes.get_mut(&name(2)).unwrap().esp.as_mut().unwrap().epochs[0].public_key = key(1, 1);
    let plan = bed.converge();
    assert_eq!(kinds(&plan), BTreeSet::from([IssueKind::DuplicateKey]));
    assert!(plan.peers[&name(1)].refused.is_none() && plan.peers[&name(2)].refused.is_some());
}

#[test]
fn a_new_epoch_is_published_once_it_can_be_received_from_everybody() {
    let mut bed = Bed::new(Mode::Ipsec, 2, &[1]);
    bed.converge();
    bed.hold(2, false);
    let plan = bed.plan();
    assert_eq!(published(&plan), [1], "nothing is installed under it yet");
    assert!(has(&plan, (1, 1), (0, 2)) && has(&plan, (2, 1), (0, 2)));
    bed.carry_out(&plan);
    assert_eq!(published(&bed.plan()), [1, 2]);
    // A peer nothing was ever installed for keeps nobody waiting.
    let late = bed.slot((2, 1), (0, 2)).0;
    bed.esp().installed.remove(&late);
    bed.esp().spent.retain(|_, spent| spent.key != late);
    assert_eq!(published(&bed.plan()), [1]);
    for other in [bed.slot((2, 1), (0, 1)).0, bed.slot((0, 1), (2, 1)).0] {
        bed.esp().installed.remove(&other);
        bed.esp().spent.retain(|_, spent| spent.key != other);
    }
    assert_eq!(published(&bed.plan()), [1, 2]);
}

#[test]
fn what_was_published_is_not_taken_back() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1, 2]);
    bed.converge();
    let lost = bed.slot((1, 1), (0, 2)).0;
    bed.esp().installed.remove(&lost);
    bed.snapshot.nodes.insert(name(0), record(0, &[1]));
    assert_eq!(published(&bed.plan()), [1, 2]);
}

#[test]
fn a_node_sends_with_its_new_epoch_once_the_peer_does() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1, 2]);
    let plan = bed.converge();
    assert_eq!(sends(&plan, &bed, 1), Some((1, 1)));
    bed.hear((1, 1), 1);
    assert_eq!(sends(&bed.converge(), &bed, 1), Some((1, 1)));
    bed.hear((1, 1), 2);
    let plan = bed.plan();
    assert_eq!(sends(&plan, &bed, 1), Some((1, 1)), "until the new one is installed");
    assert!(has(&plan, (0, 2), (1, 1)));
    bed.carry_out(&plan);
    let plan = bed.plan();
    assert_eq!(sends(&plan, &bed, 1), Some((2, 1)));
    assert!(has(&plan, (0, 1), (1, 1)), "packets may be under way");
    assert_eq!(plan.peers[&name(1)].keys.confirmed, Some(2));
}

#[test]
fn a_node_sends_to_the_new_epoch_of_a_peer_once_it_can_receive_under_it() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.converge();
    bed.hear((1, 1), 1);
    bed.peer(1, &[1, 2]);
    let plan = bed.plan();
    assert!(has(&plan, (1, 2), (0, 1)) && !has(&plan, (0, 1), (1, 2)));
    bed.carry_out(&plan);
    let plan = bed.plan();
    assert!(has(&plan, (0, 1), (1, 2)));
    assert_eq!(sends(&plan, &bed, 1), Some((1, 1)));
    bed.carry_out(&plan);
    assert_eq!(sends(&bed.plan(), &bed, 1), Some((1, 2)));
    // The counters that told of the peer go with its old epoch; what they told stays true.
    bed.peer(1, &[2]);
    let plan = bed.converge();
    assert_eq!(sends(&plan, &bed, 1), Some((1, 2)));
    assert!(!has(&plan, (1, 1), (0, 1)) && !has(&plan, (0, 1), (1, 1)));
}

#[test]
fn a_new_own_epoch_does_not_drive_back_to_an_old_one_of_the_peer() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.peer(1, &[1, 2]);
    assert_eq!(sends(&bed.converge(), &bed, 1), Some((1, 2)));
    bed.hold(2, false);
    assert_eq!(sends(&bed.plan(), &bed, 1), Some((1, 2)));
}

/// Two epochs, the newer of which is in use by the peer.
fn rotated() -> Bed {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1, 2]);
    bed.converge();
    bed.hear((1, 1), 2);
    bed.converge();
    bed
}

#[test]
fn an_old_epoch_goes_when_nobody_has_used_it_for_the_grace_period() {
    let gone = [KeyAction::Retire { epoch: 1 }];
    assert_eq!(rotated().plan().rotation.actions, gone);
    let cases: [(&str, Change); 4] = [
        ("received", |bed| bed.usage((1, 1), (0, 1)).quiet = GRACE / 2),
        ("sent", |bed| bed.usage((0, 1), (1, 1)).quiet = GRACE / 2),
        ("confirmed just now", |bed| bed.usage((0, 2), (1, 1)).age = GRACE / 2),
        ("a peer does not use the new one", |bed| {
            let block = record(2, &[1]);
            bed.snapshot.blocks.extend(block.blocks.iter().map(|block| (*block, name(2))));
            bed.snapshot.nodes.insert(name(2), block);
        }),
    ];
    for (why, change) in cases {
        let mut bed = rotated();
        change(&mut bed);
        assert_eq!(bed.converge().rotation.actions, [], "{why}");
        bed.config.rotation.hard_lifetime = 100;
        assert_eq!(bed.plan().rotation.actions, gone, "the hard lifetime does not care: {why}");
    }
}

/// While the source cannot be written, the old epoch is the only one that anybody knows.
#[test]
fn the_hard_lifetime_does_not_begin_before_the_source_has_the_new_epoch() {
    let mut bed = rotated();
    bed.usage((1, 1), (0, 1)).quiet = GRACE / 2;
    bed.config.rotation.hard_lifetime = 100;
    bed.facts.uptime = Duration::from_secs(900 + 10 * 86400);
    bed.snapshot.nodes.insert(name(0), record(0, &[1]));
    let rotation = bed.plan().rotation;
    assert_eq!(rotation.actions, []);
    assert_eq!(rotation.waiting.as_deref(), Some("epoch 2 could not be published yet"));
    bed.snapshot.nodes.insert(name(0), record(0, &[1, 2]));
    assert!(bed.plan().rotation.actions.contains(&KeyAction::Retire { epoch: 1 }));
}

#[test]
fn begin_has_a_cause() {
    let quiet = || {
        let mut bed = Bed::new(Mode::Ipsec, 1, &[3]);
        bed.converge();
        bed
    };
    assert_eq!(quiet().plan().rotation.actions, []);
    let cases: [(Cause, Change); 6] = [
        (Cause::Request, |bed| bed.facts.rotation_requested = true),
        (Cause::Age, |bed| bed.facts.uptime = Duration::from_secs(900 + 86400)),
        (Cause::Volume, |bed| bed.usage((0, 3), (1, 1)).packets = 1 << 36),
        (Cause::Volume, |bed| bed.usage((0, 3), (1, 1)).bytes = 1 << 46),
        (Cause::Lost, |bed| {
            let key = bed.slot((0, 3), (1, 1)).0;
            bed.esp().installed.remove(&key);
        }),
        (Cause::Lost, |bed| {
            let key = bed.slot((1, 1), (0, 3)).0;
            bed.esp().installed.remove(&key);
        }),
    ];
    for (cause, change) in cases {
        let mut bed = quiet();
        change(&mut bed);
        assert_eq!(bed.plan().rotation.actions, [KeyAction::Begin { epoch: 4, cause }]);
        assert_eq!(bed.plan().rotation.waiting, None);
    }
}

#[test]
fn nodes_do_not_rotate_at_the_same_time() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[3]);
    bed.config.rotation.interval = Some(1000);
    bed.facts.uptime = Duration::from_secs(900 + 499);
    bed.converge();
    assert_eq!(bed.plan().rotation.actions, []);
    let lifetimes: BTreeSet<Duration> = (0..50).map(|index| super::epochs::lifetime(&name(index), 3, 1000)).collect();
    assert!(lifetimes.len() > 40);
    assert!(*lifetimes.first().unwrap() >= Duration::from_secs(500));
    assert!(*lifetimes.last().unwrap() <= Duration::from_secs(1000));
    assert!(*lifetimes.last().unwrap() - *lifetimes.first().unwrap() > Duration::from_secs(400), "well spread");
}

#[test]
fn a_request_waits_while_two_epochs_are_in_use_and_says_for_whom() {
    let mut bed = Bed::new(Mode::Ipsec, 2, &[1, 2]);
    bed.converge();
    bed.hear((1, 1), 2);
    bed.facts.rotation_requested = true;
    let plan = bed.plan();
    assert_eq!(plan.rotation.actions, []);
    assert_eq!(plan.rotation.waiting.as_deref(), Some("epoch 2 is not in use yet by host2"));
}

#[test]
fn what_was_installed_and_is_gone_never_comes_back() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.converge();
    bed.esp().installed.clear();
    let plan = bed.plan();
    assert_eq!(associations(&plan), BTreeSet::new());
    assert_eq!(sends(&plan, &bed, 1), None);
    assert_eq!(plan.rotation.actions, [KeyAction::Begin { epoch: 2, cause: Cause::Lost }]);
    // The next epoch has to wait a moment, so that a kernel that keeps losing does not make one after another.
    bed.hold(2, false);
    bed.esp().epochs.get_mut(&2).unwrap().created = Duration::from_secs(999);
    let plan = bed.converge();
    assert_eq!(published(&plan), [1, 2]);
    assert!(has(&plan, (1, 1), (0, 2)) && !has(&plan, (0, 2), (1, 1)), "the peer may still send under the old one");
    assert_eq!(plan.rotation.actions, [KeyAction::Retire { epoch: 1 }], "nothing is left of it");
    bed.hear((1, 1), 2);
    assert_eq!(sends(&bed.converge(), &bed, 1), Some((2, 1)));
}

#[test]
fn an_association_for_sending_that_no_policy_named_can_be_installed_again() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    for _ in 0..2 {
        let plan = bed.plan();
        bed.carry_out(&plan);
    }
    let key = bed.slot((0, 1), (1, 1)).0;
    assert_eq!(stage(&mut bed, key), Some(AssociationStage::Unused));
    bed.esp().installed.remove(&key);
    assert!(has(&bed.plan(), (0, 1), (1, 1)), "the daemon was killed before it was installed");
    let plan = bed.converge();
    assert!(stage(&mut bed, key) == Some(AssociationStage::Used) && sends(&plan, &bed, 1).is_some());
}

#[test]
fn the_spi_of_an_association_that_is_gone_can_be_used_again_but_the_association_cannot() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    // All SPIs are one.
    bed.config.ipsec.spi_bits = 0;
    bed.converge();
    bed.hear((1, 1), 1);
    assert_eq!(sends(&bed.converge(), &bed, 1), Some((1, 1)));
    let first = bed.slot((0, 1), (1, 1)).1.id();
    bed.peer(1, &[2]);
    assert!(!has(&bed.plan(), (0, 1), (1, 2)), "the other one is in its place");
    let plan = bed.converge();
    assert_eq!(sends(&plan, &bed, 1), Some((1, 2)));
    assert_eq!(plan.rotation.actions, []);
    assert_eq!(bed.esp().spent[&first].stage, AssociationStage::Ended);
    // The record of old, from wherever it comes.
    bed.peer(1, &[1]);
    let plan = bed.converge();
    assert!(!has(&plan, (0, 1), (1, 1)) && !has(&plan, (1, 1), (0, 1)) && sends(&plan, &bed, 1).is_none());
}

#[test]
fn an_epoch_nobody_knows_is_replaced_when_it_is_broken() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.converge();
    bed.hold(2, false);
    let plan = bed.plan();
    bed.carry_out(&plan);
    let lost = bed.slot((1, 1), (0, 2)).0;
    bed.esp().installed.remove(&lost);
    bed.esp().published.remove(&2);
    let plan = bed.plan();
    let replaced = [KeyAction::Retire { epoch: 2 }, KeyAction::Begin { epoch: 3, cause: Cause::Lost }];
    assert_eq!((plan.rotation.actions.as_slice(), published(&plan)), (replaced.as_slice(), vec![1]));
}

#[test]
fn of_two_associations_with_one_spi_one_gets_it_and_a_new_epoch_begins() {
    let mut bed = Bed::new(Mode::Ipsec, 4, &[1]);
    bed.config.ipsec.spi_bits = 0;
    let plan = bed.plan();
    assert_eq!(associations(&plan), BTreeSet::from([("host1".into(), 1, "host0".into(), 1)]));
    assert_eq!(plan.rotation.actions, [KeyAction::Begin { epoch: 2, cause: Cause::Collision }]);
    // The one that is installed keeps it, whatever its name; and no other is taken for it when it is gone.
    bed.snapshot.nodes.remove(&name(1));
    bed.carry_out(&bed.plan());
    assert!(has(&bed.plan(), (2, 1), (0, 1)));
    bed.peer(1, &[1]);
    let plan = bed.plan();
    assert!(has(&plan, (2, 1), (0, 1)) && !has(&plan, (1, 1), (0, 1)));
    bed.snapshot.nodes.remove(&name(2));
    let plan = bed.plan();
    assert!(!has(&plan, (1, 1), (0, 1)), "the SPI belongs to what was installed first");
    assert_eq!(sends(&plan, &bed, 1), None);
}

#[test]
fn what_nobody_knows_is_swept_before_its_spi_is_used() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    let key = bed.slot((1, 1), (0, 1)).0;
    let usage = AssociationUse { source: address(1), packets: 9, bytes: 9, undecryptable: 0, quiet: GRACE, age: GRACE };
    bed.esp().installed.insert(key, usage);
    let plan = bed.plan();
    assert!(plan.desired.xfrm_states.is_empty());
    assert_eq!(plan.rotation.actions, []);
    assert_eq!(plan.peers[&name(1)].keys, crate::rotation::PeerKeys::default(), "its counters mean nothing");
    bed.carry_out(&plan);
    assert!(has(&bed.plan(), (1, 1), (0, 1)));
}

#[test]
fn another_address_makes_other_associations() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    let before: BTreeSet<XfrmStateKey> = bed.converge().desired.xfrm_states.into_keys().collect();
    bed.facts.addresses = [address(100)].into_iter().collect();
    let plan = bed.converge();
    assert_eq!(plan.peers[&name(1)].keys.own, Some(1));
    assert!(plan.desired.xfrm_states.keys().all(|key| !before.contains(key)));
    assert_eq!(plan.rotation.actions, []);
}

#[test]
fn a_salt_that_changes_does_not_bring_a_key_back() {
    let mut bed = Bed::new(Mode::Ipsec, 1, &[1]);
    bed.converge();
    let theirs = bed.snapshot.nodes.get_mut(&name(1)).unwrap().esp.as_mut().unwrap();
    theirs.epochs[0].spi_salt += 1;
    let plan = bed.plan();
    assert!(!has(&plan, (0, 1), (1, 1)), "the same key would get another SPI");
}

/// Plans stay cheap with many peers that all rotate: work grows with the number of peers, not with its square.
#[test]
fn thousands_of_peers_that_rotate_are_planned() {
    let mut bed = Bed::new(Mode::Ipsec, 0, &[1, 2]);
    for index in 1..3000_u32 {
        let mut it = record(1, &[1, 2]);
        it.name = NodeName::new(&format!("node{index}")).unwrap();
        it.addresses = [IpAddr::V4((0x6440_0000 + index).into())].into_iter().collect();
        for epoch in &mut it.esp.as_mut().unwrap().epochs {
            let mut bytes = *epoch.public_key.as_bytes();
            bytes[8..12].copy_from_slice(&index.to_be_bytes());
            epoch.public_key = PublicKey::from_bytes(bytes).unwrap();
        }
        it.blocks.clear();
        bed.snapshot.nodes.insert(it.name.clone(), it);
    }
    let plan = bed.converge();
    assert_eq!(plan.desired.xfrm_states.len(), 5 * 2999);
}

/// Epochs as a confused or hostile node might publish them.
fn arbitrary_esp() -> impl Strategy<Value = Option<EspRecord>> {
    let number = prop_oneof![Just(0_u64), Just(1), Just(2), Just(u64::MAX - 1), Just(u64::MAX)];
    let epoch = (number, 0_u8..4, 0_u64..3, 0_u64..3).prop_map(|(number, node, of, spi_salt)| EspEpochRecord {
        epoch: number,
        public_key: key(node, of),
        spi_salt,
    });
    let epochs = proptest::collection::vec(epoch, 0..4);
    let esp = (epochs, any::<bool>(), prop_oneof![4 => Just(None), 1 => Just(Some(4500))]).prop_map(
        |(epochs, strong, udp_port)| EspRecord {
            cipher: if strong { Aead::AesGcm128 } else { Aead::AesGcm256 },
            udp_port,
            epochs,
        },
    );
    proptest::option::weighted(0.9, esp)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever others publish, in whatever order they came, whatever somebody did to the own files: no panic, nothing
    /// installed twice, a policy for sending only with an association that is installed, no route without one.
    #[test]
    fn whatever_others_publish_nothing_is_sent_without_an_association(
        records in proptest::collection::vec((arbitrary_esp(), 0_u8..4), 3),
        own in proptest::collection::btree_set(prop_oneof![Just(0_u64), Just(1), Just(5), Just(u64::MAX)], 0..4),
        offered in any::<u8>(),
        bits in 0_u8..=32,
        vxlan in any::<bool>(),
        removed in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        uptime in prop_oneof![Just(0_u64), Just(1000), Just(u64::MAX)],
    ) {
        let mut bed = Bed::new(if vxlan { Mode::VxlanIpsec } else { Mode::Ipsec }, 3, &[]);
        bed.config.ipsec.spi_bits = bits;
        bed.facts.uptime = Duration::from_secs(uptime);
        for (position, number) in own.iter().enumerate() {
            bed.hold(*number, offered >> position & 1 == 1);
        }
        for (index, (esp, claimed)) in (1_u8..).zip(records) {
            let it = bed.snapshot.nodes.get_mut(&name(index)).unwrap();
            it.esp = esp;
            if claimed == 0 {
                it.addresses = [address(0)].into_iter().collect();
            }
        }
        for round in 0..4 {
            let plan = bed.plan();
            for (key, state) in &plan.desired.xfrm_states {
                let known = bed.esp().spent.get(&state.association.id()).copied();
                let there = bed.esp().installed.contains_key(key);
                let stage = |spent: SpentAssociation| match spent.stage {
                    AssociationStage::Unused => true,
                    AssociationStage::Used => there,
                    AssociationStage::Ended => false,
                };
                prop_assert!(known.is_none_or(|spent| spent.key == *key && stage(spent)));
                let holds = |spent: &SpentAssociation| spent.key == *key && spent.stage != AssociationStage::Ended;
                let holders = bed.esp().spent.iter().filter(|(id, spent)| holds(spent) && **id != state.association.id());
                let ended = |id| plan.rotation.spend.get(id).is_some_and(|it| it.stage == AssociationStage::Ended);
                prop_assert!(holders.map(|(id, _)| id).all(ended));
            }
            let protects = |policy: &XfrmPolicy| match &policy.action {
                XfrmAction::Protect(template) => template.spi.map(|spi| XfrmStateKey { destination: template.destination, spi }),
                XfrmAction::Block => None,
            };
            for (key, policy) in plan.desired.xfrm_policies.iter().filter(|(key, _)| key.direction == XfrmDirection::Out) {
                let named = protects(policy);
                prop_assert_eq!(named.is_none(), policy.action == XfrmAction::Block);
                prop_assert!(named.is_none_or(|named| bed.esp().installed.contains_key(&named)));
                prop_assert!(blocks(0).iter().all(|own| *own != key.destination));
            }
            for (name, peer) in &plan.peers {
                let routed = peer.blocks.iter().any(|block| routed(&plan, block));
                prop_assert!(!routed || (peer.keys.own.is_some() && peer.refused.is_none()), "{}", name);
            }
            prop_assert!(plan.record.unwrap().esp.is_none_or(|esp| esp.epochs.len() <= 2));
            let held = bed.esp().epochs.len();
            let begun = plan.rotation.actions.iter().filter(|it| matches!(it, KeyAction::Begin { .. })).count();
            prop_assert!(begun == 0 || held + begun <= 2 + (plan.rotation.actions.len() - begun));
            let plan = bed.plan();
            bed.carry_out(&plan);
            if round == 2 {
                let keys: Vec<XfrmStateKey> = bed.esp().installed.keys().copied().collect();
                for index in removed.iter().filter(|_| !keys.is_empty()) {
                    bed.esp().installed.remove(&keys[index.index(keys.len())]);
                }
            }
        }
    }
}
