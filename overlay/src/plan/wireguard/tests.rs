//! Table tests of the rules of generations. That they suffice is proven by `tests/generations.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::offers::{LAST_GENERATION, LEAP};
use super::*;
use crate::config::Config;
use crate::endpoint::Endpoints;
use crate::facts::{Facts, OwnEpoch, RouteLimit, SessionUse, UnderlayRoute};
use crate::kernel::{Address, LinkKind, RouteTarget, WireguardDevice, WireguardPeer};
use crate::keys::PublicKey;
use crate::name::{InstanceId, InterfaceName};
use crate::plan::{Plan, plan};
use crate::prefix::Prefix;
use crate::record::{NodeRecord, Snapshot, WireguardRecord};
use crate::rotation::{Cause, KeyAction, PeerKeys};

const GRACE: u64 = 30;
const HARD: u64 = 86_400;

fn node(index: u8) -> NodeName {
    NodeName::new(&format!("host{index}")).unwrap()
}

fn underlay(index: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, index + 1).into()
}

fn block(index: u8) -> Prefix {
    "10.42.0.0/16".parse::<Prefix>().unwrap().subnet(26, index.into()).unwrap()
}

fn interface(name: &str) -> InterfaceName {
    InterfaceName::new(name).unwrap()
}

/// The key of a node in a generation; `copy` tells the keys of before and after a reboot apart.
fn key_of(index: u8, generation: u64, copy: u8) -> PublicKey {
    let mut bytes = [copy + 1; 32];
    bytes[0] = index;
    bytes[1..9].copy_from_slice(&generation.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn key(index: u8, generation: u64) -> PublicKey {
    key_of(index, generation, 0)
}

fn published(index: u8, generation: u64) -> WireguardRecord {
    let slot = crate::marks::wireguard_slot(generation);
    WireguardRecord { slot, generation, port: 51820 + u16::from(slot), public_key: key(index, generation) }
}

/// What node `host0` knows: a world to change before planning.
struct World {
    config: Config,
    snapshot: Snapshot,
    facts: Facts,
}

impl World {
    /// `host0` holds and has published these generations; each peer publishes those.
    fn new(held: &[u64], peers: &[&[u64]]) -> Self {
        let mut config = Config::new(vec!["10.42.0.0/16".parse().unwrap()]);
        config.rotation.interval = None;
        let mut world = Self {
            config,
            snapshot: Snapshot::default(),
            facts: Facts {
                node: node(0),
                instance: InstanceId::new(&format!("{:032x}", 0)).unwrap(),
                created: jiff::Timestamp::from_second(1_800_000_000).unwrap(),
                addresses: [underlay(0)].into_iter().collect(),
                underlay_mtu: 1500,
                underlay_interface: Some(interface("eth0")),
                foreign_prefixes: BTreeSet::new(),
                routes: BTreeMap::new(),
                wireguard: Some(WireguardSupport::Kernel),
                probed: BTreeMap::new(),
                silent: BTreeSet::new(),
                offload: crate::offload::Offload::default(),
                wireguard_epochs: BTreeMap::new(),
                sessions: BTreeMap::new(),
                esp: None,
                uptime: Duration::from_secs(1000),
                rotation_requested: false,
                pod_interfaces: BTreeMap::new(),
                threaded_napi: true,
                ipv6: false,
                router_advertisements: BTreeSet::new(),
            },
        };
        world.publish(0, held);
        for (index, generations) in (1..).zip(peers) {
            world.publish(index, generations);
            let route = UnderlayRoute {
                interface: interface("eth0"),
                mtu: 1500,
                limited_by: RouteLimit::Interface,
                on_link: true,
            };
            world.facts.routes.insert(underlay(index), route);
        }
        for generation in held {
            let epoch = OwnEpoch { public_key: key(0, *generation), spi_salt: 0, created: Duration::from_secs(900) };
            world.facts.wireguard_epochs.insert(*generation, epoch);
        }
        world
    }

    fn publish(&mut self, index: u8, generations: &[u64]) {
        let record = NodeRecord {
            name: node(index),
            instance: InstanceId::new(&format!("{index:032x}")).unwrap(),
            created: jiff::Timestamp::from_second(1_800_000_000 + i64::from(index)).unwrap(),
            addresses: [underlay(index)].into_iter().collect(),
            underlay_mtu: 1500,
            blocks: BTreeSet::from([block(index)]),
            router: [block(index).address()].into_iter().collect(),
            vxlan_mac: None,
            wireguard: generations.iter().map(|generation| published(index, *generation)).collect(),
            esp: None,
        };
        self.snapshot.blocks.insert(block(index), node(index));
        self.snapshot.nodes.insert(node(index), record);
    }

    /// A peer's session in a generation: done, and quiet for so many seconds.
    fn session(mut self, index: u8, generation: u64, quiet: u64) -> Self {
        let session = SessionUse { handshaken: true, quiet: Duration::from_secs(quiet) };
        self.facts.sessions.insert(key(index, generation), session);
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn requested(self) -> Self {
        self.with(|world| world.facts.rotation_requested = true)
    }

    /// So long there have been the keys.
    fn aged(self, seconds: u64) -> Self {
        self.with(|world| world.facts.uptime = Duration::from_secs(900 + seconds))
    }

    fn plan(&self) -> Plan {
        plan(&self.config, &self.snapshot, &self.facts, &Endpoints::new())
    }

    fn actions(&self) -> Vec<KeyAction> {
        self.plan().rotation.actions
    }

    fn published(&self) -> Vec<u64> {
        let record = self.plan().record.unwrap();
        let generations: Vec<u64> = record.wireguard.iter().map(|it| it.generation).collect();
        assert_eq!(generations.iter().copied().collect::<BTreeSet<_>>(), self.plan().rotation.published);
        generations
    }

    /// Device the route to a peer leads into.
    fn route(&self, index: u8) -> Option<String> {
        let plan = self.plan();
        let route = plan.desired.routes.iter().find(|(key, _)| key.destination == block(index));
        route.map(|(_, route)| match &route.target {
            RouteTarget::Interface { interface, .. } => interface.to_string(),
            RouteTarget::Unreachable => "unreachable".to_owned(),
        })
    }

    fn device(&self, name: &str) -> WireguardDevice {
        self.plan().desired.wireguard[&interface(name)].clone()
    }
}

fn begin(epoch: u64, cause: Cause) -> KeyAction {
    KeyAction::Begin { epoch, cause }
}

fn retire(epoch: u64) -> KeyAction {
    KeyAction::Retire { epoch }
}

#[test]
fn each_generation_has_a_device_with_the_peers_that_publish_it() {
    let world = World::new(&[4, 5], &[&[4, 5], &[4], &[5]]);
    let plan = world.plan();
    assert_eq!(plan.issues, []);
    for (name, generation, peers) in [("husk-wg0", 4, [1, 2]), ("husk-wg1", 5, [1, 3])] {
        let device = world.device(name);
        assert_eq!(device.public_key, key(0, generation));
        assert_eq!(device.listen_port, 51820 + u16::from(crate::marks::wireguard_slot(generation)));
        let expected: BTreeMap<PublicKey, BTreeSet<Prefix>> =
            peers.iter().map(|peer| (key(*peer, generation), BTreeSet::from([block(*peer)]))).collect();
        let found: BTreeMap<_, _> = device.peers.iter().map(|(key, peer)| (*key, peer.allowed_ips.clone())).collect();
        assert_eq!(found, expected, "{name}");
        for peer in peers {
            let endpoint = device.peers[&key(peer, generation)].endpoint.unwrap();
            assert_eq!((endpoint.ip(), endpoint.port()), (underlay(peer), device.listen_port));
        }
        assert_eq!(plan.desired.links[&interface(name)].kind, LinkKind::Wireguard);
        let address = Address { interface: interface(name), address: block(0).address(), length: 32 };
        assert!(plan.desired.addresses.contains(&address), "{name}");
        assert_eq!(plan.desired.sysctls[&format!("net/ipv4/conf/{name}/rp_filter")], "2");
    }
    assert_eq!(world.published(), [4, 5]);
    let single = World::new(&[5], &[&[5]]).plan();
    assert_eq!(single.desired.wireguard.keys().map(ToString::to_string).collect::<Vec<_>>(), ["husk-wg1"]);
    assert!(single.desired.sysctls.keys().all(|path| !path.contains("rp_filter")));
}

#[test]
fn userspace_devices_come_in_pairs_too() {
    let world = World::new(&[4, 5], &[&[4, 5]]).with(|it| it.facts.wireguard = Some(WireguardSupport::Userspace));
    let plan = world.plan();
    let kinds: Vec<_> = plan.desired.links.values().map(|link| (link.kind.clone(), link.threaded_napi)).collect();
    assert_eq!(kinds, [(LinkKind::WireguardUserspace, false), (LinkKind::WireguardUserspace, false)]);
    assert!(plan.desired.wireguard.values().all(|device| device.userspace));
}

#[test]
fn the_route_leads_into_the_newest_common_generation_whose_handshake_is_done() {
    // Held, the peer's, those whose handshake is done; the device.
    type Case = (&'static [u64], &'static [u64], &'static [u64], Option<u64>);
    let cases: [Case; 9] = [
        (&[4], &[4], &[], Some(4)),
        (&[4, 5], &[4], &[4], Some(4)),
        (&[4, 5], &[4, 5], &[], Some(4)),
        (&[4, 5], &[4, 5], &[4], Some(4)),
        (&[4, 5], &[4, 5], &[5], Some(5)),
        (&[4, 5], &[4, 5], &[4, 5], Some(5)),
        (&[4, 5], &[5], &[4], Some(5)),
        (&[4], &[4, 5], &[4, 5], Some(4)),
        (&[4], &[5], &[5], None),
    ];
    for (held, peer, done, expected) in cases {
        let mut world = World::new(held, &[peer]);
        for generation in done {
            world = world.session(1, *generation, 0);
        }
        let context = format!("{held:?} {peer:?} {done:?}");
        let device = expected.map(|generation| format!("husk-wg{}", crate::marks::wireguard_slot(generation)));
        assert_eq!(world.route(1), device, "{context}");
        let plan = &world.plan().peers[&node(1)];
        let confirmed = expected.filter(|generation| done.contains(generation));
        assert_eq!(plan.keys, PeerKeys { own: expected, peer: expected, confirmed }, "{context}");
        assert_eq!(plan.public_key, expected.map(|generation| key(1, generation)), "{context}");
        assert_eq!(
            plan.port,
            expected.map(|generation| 51820 + u16::from(crate::marks::wireguard_slot(generation))),
            "{context}"
        );
        assert_eq!(plan.refused.is_some(), expected.is_none(), "{context}");
    }
}

#[test]
fn a_key_that_was_replaced_leaves_no_session_behind() {
    let world = World::new(&[4, 5], &[&[4, 5]]).session(1, 4, 0).session(1, 5, 0);
    assert_eq!(world.route(1).as_deref(), Some("husk-wg1"));
    let rebooted = world.with(|world| {
        let record = world.snapshot.nodes.get_mut(&node(1)).unwrap();
        record.wireguard[1].public_key = key_of(1, 5, 1);
    });
    assert_eq!(rebooted.route(1).as_deref(), Some("husk-wg0"));
}

#[test]
fn a_keepalive_starts_the_handshake_where_there_is_none_and_ends_with_the_use_of_a_device() {
    // Configured, handshakes done; keepalive in the old and in the new device.
    let cases: [(u16, &[u64], u16, u16); 6] =
        [(0, &[], 0, 5), (0, &[4], 0, 5), (0, &[4, 5], 0, 0), (25, &[4], 25, 5), (25, &[4, 5], 0, 25), (3, &[4], 3, 3)];
    for (configured, done, old, new) in cases {
        let mut world = World::new(&[4, 5], &[&[4, 5]]);
        world.config.wireguard.keepalive = configured;
        for generation in done {
            world = world.session(1, *generation, 0);
        }
        let found = (
            world.device("husk-wg0").peers[&key(1, 4)].keepalive,
            world.device("husk-wg1").peers[&key(1, 5)].keepalive,
        );
        assert_eq!(found, (old, new), "{configured} {done:?}");
    }
    let alone = World::new(&[4], &[&[4]]).with(|world| world.config.wireguard.keepalive = 25);
    assert_eq!(alone.device("husk-wg0").peers[&key(1, 4)].keepalive, 25);
}

/// Two held, all peers in both and quiet in the old one.
fn ready() -> World {
    World::new(&[4, 5], &[&[4, 5], &[4, 5]]).session(1, 4, GRACE).session(2, 4, GRACE).session(1, 5, 0).session(2, 5, 0)
}

#[test]
fn the_old_generation_is_withdrawn_when_everybody_has_moved_and_it_is_quiet() {
    assert_eq!(ready().published(), [5]);
    assert_eq!(ready().actions(), [], "the device stays");
    assert!(ready().device("husk-wg0").peers.contains_key(&key(1, 4)));
    let not_yet = |change: fn(&mut World)| ready().with(change).published();
    assert_eq!(not_yet(|it| it.session_mut(2, 4).quiet = Duration::from_secs(GRACE - 1)), [4, 5], "in use");
    assert_eq!(not_yet(|it| it.session_mut(2, 5).handshaken = false), [4, 5], "no handshake");
    assert_eq!(not_yet(|it| it.publish(2, &[4])), [4, 5], "a daemon is dead, or slow");
    assert_eq!(not_yet(|it| it.publish(0, &[4])), [4, 5], "the new one is not published yet");
    assert_eq!(not_yet(|it| it.facts.sessions.retain(|session, _| *session != key(2, 4))), [4, 5], "nothing is known");
    let stale = |it: &mut World| it.snapshot.nodes.get_mut(&node(0)).unwrap().wireguard[1].public_key = key_of(0, 5, 1);
    assert_eq!(not_yet(stale), [4, 5], "what is published is the key of before a reboot");
    assert_eq!(not_yet(|it| it.publish(2, &[5])), [5], "who has withdrawn sends nothing");
    assert_eq!(World::new(&[4, 5], &[]).published(), [5], "alone");
}

#[test]
fn what_was_sent_to_who_has_withdrawn_has_to_arrive_first() {
    let world = |quiet: u64, age: u64| {
        let mut world = ready().aged(age);
        world.session_mut(2, 4).quiet = Duration::from_secs(quiet);
        world.publish(2, &[5]);
        world
    };
    let peers = |world: &World| world.device("husk-wg0").peers.keys().copied().collect::<Vec<_>>();
    let under_way = world(GRACE - 1, 100);
    assert_eq!(under_way.published(), [4, 5]);
    assert_eq!(under_way.route(2).as_deref(), Some("husk-wg1"), "nothing more is sent");
    assert_eq!(peers(&under_way), [key(1, 4), key(2, 4)]);
    let kept = under_way.device("husk-wg0").peers[&key(2, 4)].clone();
    assert_eq!(kept, WireguardPeer { endpoint: None, allowed_ips: BTreeSet::new(), keepalive: 0 });
    let in_use = under_way.with(|it| it.session_mut(1, 4).quiet = Duration::ZERO);
    assert_eq!((in_use.published(), peers(&in_use)), (vec![4, 5], vec![key(1, 4), key(2, 4)]));
    let arrived = in_use.with(|it| it.session_mut(2, 4).quiet = Duration::from_secs(GRACE));
    assert_eq!((arrived.published(), peers(&arrived)), (vec![4, 5], vec![key(1, 4)]), "it is not waited for again");
    for over in [world(GRACE, 100), world(0, HARD), world(0, 100).with(|it| it.publish(0, &[5]))] {
        assert_eq!((over.published(), peers(&over)), (vec![5], vec![key(1, 4)]));
    }
    // There is nothing to wait for while there is only one generation.
    let single = World::new(&[5], &[&[5]]).session(2, 5, 0);
    assert_eq!(single.device("husk-wg1").peers.keys().copied().collect::<Vec<_>>(), [key(1, 5)]);
}

#[test]
fn quiet_is_never_shorter_than_two_initiations_are_apart() {
    let quiet = |seconds: u64| {
        let mut world = ready().with(|world| world.config.rotation.grace = 1);
        world.session_mut(1, 4).quiet = Duration::from_secs(seconds);
        world.published()
    };
    assert_eq!((quiet(5), quiet(6)), (vec![4, 5], vec![5]));
}

impl World {
    fn session_mut(&mut self, index: u8, generation: u64) -> &mut SessionUse {
        self.facts.sessions.get_mut(&key(index, generation)).unwrap()
    }
}

#[test]
fn what_was_withdrawn_is_not_used_again() {
    let world = ready().with(|world| {
        world.publish(0, &[5]);
        world.session_mut(1, 4).quiet = Duration::ZERO;
        world.session_mut(1, 5).handshaken = false;
    });
    assert_eq!(world.published(), [5]);
    assert_eq!(world.route(1).as_deref(), Some("husk-wg1"));
    let old = world.device("husk-wg0");
    assert_eq!(old.peers.keys().copied().collect::<Vec<_>>(), [key(1, 4), key(2, 4)], "they may still send");
}

#[test]
fn the_old_generation_goes_when_nobody_publishes_it_any_more() {
    let withdrawn = || ready().with(|world| world.publish(0, &[5]));
    assert_eq!(withdrawn().actions(), []);
    assert_eq!(withdrawn().with(|it| it.publish(1, &[5])).actions(), []);
    let all = withdrawn().with(|it| {
        it.publish(1, &[5]);
        it.publish(2, &[5]);
    });
    assert_eq!(all.actions(), [retire(4)]);
    let unpublished = all.with(|it| it.publish(0, &[4, 5]));
    assert_eq!((unpublished.actions(), unpublished.published()), (vec![], vec![5]), "others do not know yet");
}

#[test]
fn a_dead_daemon_keeps_the_old_generation_until_the_hard_lifetime_and_no_longer() {
    let world = |age: u64, own: &[u64]| {
        let mut world =
            World::new(&[4, 5], &[&[4, 5], &[4]]).session(1, 4, 0).session(1, 5, 0).session(2, 4, 0).aged(age);
        world.publish(0, own);
        world
    };
    let before = world(HARD - 1, &[4, 5]);
    assert_eq!((before.published(), before.actions()), (vec![4, 5], vec![]));
    assert_eq!(before.route(2).as_deref(), Some("husk-wg0"));
    let after = world(HARD, &[4, 5]);
    assert_eq!((after.published(), after.actions()), (vec![5], vec![]));
    assert_eq!(after.route(2), None);
    assert!(after.device("husk-wg0").peers.contains_key(&key(2, 4)), "it is still heard");
    assert_eq!(world(HARD + GRACE - 1, &[5]).actions(), []);
    assert_eq!(world(HARD + GRACE, &[5]).actions(), [retire(4)]);
    assert_eq!(world(HARD + GRACE, &[4, 5]).actions(), [], "two steps");
    // The next rotation does not wait for it.
    let next = World::new(&[5], &[&[5], &[4]]).requested();
    assert_eq!(next.actions(), [begin(6, Cause::Request)]);
    let refused = next.plan().peers[&node(2)].refused.clone().unwrap();
    assert!(refused.contains("publishes 4") && refused.contains("has 5"), "{refused}");
}

#[test]
fn a_generation_begins_when_the_one_before_is_finished() {
    let asked = |held: &[u64], peers: &[&[u64]]| World::new(held, peers).requested();
    let first = asked(&[5], &[&[5], &[5]]);
    assert_eq!(first.actions(), [begin(6, Cause::Request)]);
    assert_eq!(first.plan().rotation.waiting, None);
    for (world, reason) in [
        (asked(&[5], &[&[5], &[4, 5]]), "host2 still uses the generation before 5"),
        (asked(&[5], &[&[4, 5], &[4, 5]]), "host1 and host2 still use the generation before 5"),
        (asked(&[4, 5], &[&[4, 5]]), "host1 still uses the generation before 5"),
        (asked(&[4, 5], &[&[5]]), "generation 4 is about to be retired"),
        (asked(&[5], &[&[5]]).with(|it| it.publish(0, &[4])), "generation 5 is not published yet"),
    ] {
        assert!(!world.actions().iter().any(|it| matches!(it, KeyAction::Begin { .. })), "{reason}");
        assert_eq!(world.plan().rotation.waiting.as_deref(), Some(reason));
    }
    // The daemon of host2 died before it withdrew.
    let dead = |age: u64| asked(&[5], &[&[5], &[4, 5]]).aged(age).actions();
    assert_eq!(dead(HARD + GRACE - 1), []);
    assert_eq!(dead(HARD + GRACE), [begin(6, Cause::Request)]);
    let idle = World::new(&[5], &[&[4, 5]]);
    assert_eq!((idle.actions(), idle.plan().rotation.waiting), (vec![], None));
}

#[test]
fn a_key_gets_between_half_the_interval_and_all_of_it_old() {
    let at = |seconds: u64| {
        World::new(&[5], &[&[5]]).aged(seconds).with(|world| world.config.rotation.interval = Some(1000)).actions()
    };
    assert_eq!(at(499), []);
    assert_eq!(at(1000), [begin(6, Cause::Age)]);
    let turn = |index: u8, generation: u64| {
        let begins = |seconds: &u64| {
            let mut world = World::new(&[generation], &[]).aged(*seconds);
            world.config.rotation.interval = Some(1000);
            world.facts.node = node(index);
            world.snapshot.nodes.clear();
            world.publish(index, &[generation]);
            world.snapshot.nodes.get_mut(&node(index)).unwrap().instance = world.facts.instance.clone();
            let own = key(index, generation);
            world.facts.wireguard_epochs.get_mut(&generation).unwrap().public_key = own;
            !world.actions().is_empty()
        };
        (500..=1000).find(begins).unwrap()
    };
    let turns: BTreeSet<u64> = [(0, 5), (0, 6), (1, 5), (2, 5)].into_iter().map(|(node, it)| turn(node, it)).collect();
    assert_eq!(turns.len(), 4, "{turns:?}");
    assert_eq!(World::new(&[5], &[&[5]]).aged(1 << 40).actions(), [], "only on demand");
}

#[test]
fn a_node_follows_whoever_is_ahead() {
    // Held, the peers', what it does.
    type Case = (&'static [u64], &'static [&'static [u64]], Vec<KeyAction>);
    let cases: [Case; 14] = [
        // Nothing held: the newest there is.
        (&[], &[], vec![begin(0, Cause::First)]),
        (&[], &[&[4], &[4, 5]], vec![begin(5, Cause::First)]),
        // One ahead: into the idle device.
        (&[4], &[&[4, 5], &[4]], vec![begin(5, Cause::Cluster)]),
        // The device still has the generation before, which somebody uses, or nobody.
        (&[4, 5], &[&[5, 6], &[4, 5]], vec![]),
        (&[4, 5], &[&[5, 6], &[5]], vec![retire(4), begin(6, Cause::Cluster)]),
        // A joining node publishes the newest only.
        (&[4], &[&[4], &[5]], vec![begin(5, Cause::Cluster)]),
        // Away for two rotations: nobody misses the old one.
        (&[4], &[&[6], &[6]], vec![retire(4), begin(6, Cause::Cluster)]),
        (&[4], &[&[6, 7], &[6, 7]], vec![begin(7, Cause::Cluster)]),
        (&[4, 5], &[&[7]], vec![retire(5), begin(7, Cause::Cluster)]),
        (&[4, 5], &[&[8]], vec![retire(4), begin(8, Cause::Cluster)]),
        // Away for two rotations with another one, which is still spoken with: both meet the others one further.
        (&[4], &[&[6], &[4]], vec![begin(7, Cause::Cluster)]),
        (&[4, 5], &[&[6], &[4, 5]], vec![]),
        // Who is behind is not followed.
        (&[6], &[&[4], &[6]], vec![]),
        (&[6], &[&[5, 6], &[6]], vec![]),
    ];
    for (held, peers, expected) in cases {
        assert_eq!(World::new(held, peers).actions(), expected, "{held:?} {peers:?}");
    }
    let asked = World::new(&[4], &[&[4, 5]]).requested();
    assert_eq!(asked.actions(), [begin(5, Cause::Cluster)], "one is as good as the other");
}

#[test]
fn who_has_not_confirmed_is_told_while_a_rotation_is_under_way() {
    let unconfirmed = |world: World| world.plan().rotation.unconfirmed;
    let world = World::new(&[4, 5], &[&[4, 5], &[4], &[4, 5], &[2], &[5]]).session(1, 5, 0).session(3, 4, 0);
    assert_eq!(unconfirmed(world), BTreeMap::from([(5, BTreeSet::from([node(2), node(3), node(5)]))]));
    assert_eq!(unconfirmed(ready()), BTreeMap::new());
    assert_eq!(unconfirmed(World::new(&[5], &[&[5], &[4, 5]])), BTreeMap::new());
}

#[test]
fn nonsense_of_one_node_moves_nobody() {
    for (garbage, followed) in
        [(u64::MAX, false), (LAST_GENERATION + 1, false), (4 + LEAP + 1, false), (4 + LEAP - 1, true)]
    {
        let world = World::new(&[4], &[&[4], &[4, garbage]]);
        assert_eq!(!world.actions().is_empty(), followed, "{garbage}");
        assert_eq!(world.plan().issues.len(), usize::from(!followed), "{garbage}");
        assert_eq!(world.route(2).as_deref(), Some("husk-wg0"), "{garbage}: what is right of it is used");
        let joining = World::new(&[], &[&[4], &[garbage]]);
        let first = if followed { garbage } else { 4 };
        assert_eq!(joining.actions(), [begin(first, Cause::First)], "{garbage}");
    }
    let world = World::new(&[4], &[&[4], &[u64::MAX]]);
    let plan = world.plan();
    let refused = plan.peers[&node(2)].refused.as_ref().unwrap();
    assert!(refused.contains(&u64::MAX.to_string()), "{refused}");
    assert_eq!(
        plan.issues.iter().map(|it| (it.kind, it.severity)).collect::<Vec<_>>(),
        [(IssueKind::IncompletePeer, Severity::Error)]
    );
    assert_eq!(world.route(1).as_deref(), Some("husk-wg0"));
    let last = World::new(&[LAST_GENERATION], &[&[LAST_GENERATION]]).requested();
    assert_eq!(last.actions(), []);
    assert!(last.plan().rotation.waiting.unwrap().contains("is the last one"));
}

#[test]
fn a_record_that_contradicts_itself_is_used_as_far_as_it_makes_sense() {
    let world = |change: fn(&mut Vec<WireguardRecord>)| {
        let mut world = World::new(&[4, 5], &[&[4, 5]]).session(1, 4, 0).session(1, 5, 0);
        change(&mut world.snapshot.nodes.get_mut(&node(1)).unwrap().wireguard);
        world
    };
    // What is wrong, the generation that is left.
    type Case = (fn(&mut Vec<WireguardRecord>), u64);
    let cases: [Case; 4] = [
        (|it| it[1].slot = 0, 4),
        (|it| it[0].slot = 7, 5),
        (|it| it[0].public_key = it[1].public_key, 5),
        (|it| it[1].generation = 6, 4),
    ];
    for (change, left) in cases {
        let world = world(change);
        let plan = world.plan();
        assert_eq!(plan.issues.len(), 1, "{left}");
        assert_eq!((plan.issues[0].kind, plan.issues[0].severity), (IssueKind::IncompletePeer, Severity::Warning));
        assert_eq!(world.route(1), Some(format!("husk-wg{}", crate::marks::wireguard_slot(left))));
        let peers = plan.desired.wireguard.values().flat_map(|device| &device.peers);
        let used: Vec<_> = peers.filter(|(_, peer)| !peer.allowed_ips.is_empty()).map(|(key, _)| *key).collect();
        assert_eq!(used, [key(1, left)]);
    }
    let twice = world(|it| it.push(published(1, 2)));
    assert_eq!((twice.plan().issues.len(), twice.route(1).as_deref()), (1, Some("husk-wg1")));
    assert!(twice.plan().issues[0].message.contains("generation 2"), "{}", twice.plan().issues[0]);
}

#[test]
fn a_refused_peer_neither_leads_nor_holds_up() {
    let thief = |world: &mut World| {
        world.publish(2, &[4, 6]);
        world.snapshot.nodes.get_mut(&node(2)).unwrap().addresses = [underlay(1)].into_iter().collect();
    };
    let world = World::new(&[5], &[&[5]]).with(thief).requested();
    assert_eq!(world.actions(), [begin(6, Cause::Request)]);
    assert!(World::new(&[5], &[&[5]]).with(thief).actions().is_empty());
}

#[test]
fn without_a_device_nothing_is_begun() {
    let reason = WireguardSupport::Unavailable { reason: "no module".into() };
    let world = World::new(&[4], &[&[5]]).requested().with(|world| world.facts.wireguard = Some(reason));
    assert_eq!((world.actions(), world.published()), (vec![], vec![4]));
}
