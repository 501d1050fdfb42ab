//! The pass on a kernel that fails on demand: from any state, with any faults, it converges once they stop, it never touches
//! what is a stranger's, and it costs what changed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use husk_dataplane::fake::{Counters, FakeKernel, Fault};
use husk_dataplane::kernel::{Change, Kernel, Table, diff};
use husk_dataplane::links::LinkChange;
use husk_dataplane::reconcile::{Outcome, reconcile, reconcile_policy, survey};
use husk_dataplane::routes::{ActualRoute, RouteChange};
use husk_dataplane::wireguard::{self, KeyRing, WireguardAction};
use husk_dataplane::xfrm::{XfrmPolicyChange, XfrmStateChange};
use husk_dataplane::{Error, Sweep};
use husk_overlay::esp::{self, Aead, Association, EspEnd};
use husk_overlay::kernel::{
    Address, Chain, ChainKind, Desired, ElementType, FdbKey, Hook, Link, LinkKind, NeighbourKey, NftTable, Route,
    RouteKey, RouteTarget, Rule, Set, SetElement, Statement, WireguardDevice, WireguardPeer, XfrmAction, XfrmDirection,
    XfrmParameters, XfrmPolicy, XfrmPolicyKey, XfrmState, XfrmStateKey, XfrmTemplate,
};
use husk_overlay::keys::{PrivateKey, PublicKey};
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::{Family, Prefix};
use nix::errno::Errno;
use proptest::prelude::*;

const POD: &str = "husk0123456789a";

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

fn private_key(number: u8) -> PrivateKey {
    PrivateKey::from_random([number + 1; 32]).unwrap()
}

fn public_key(number: u8) -> PublicKey {
    private_key(number).public()
}

fn peer_key(number: u16) -> PublicKey {
    let mut bytes = [7; 32];
    bytes[..2].copy_from_slice(&number.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn keys() -> KeyRing {
    (0..2).map(private_key).collect()
}

/// What a state is built from; every field is a knob that a property test turns.
#[derive(Debug, Clone)]
struct Knobs {
    mode: Mode,
    peers: Vec<u16>,
    pods: u8,
    mtu: u32,
    local: u8,
    key: u8,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Nothing,
    Direct,
    Vxlan,
    Wireguard,
    Ipsec,
    VxlanIpsec,
}

fn knobs() -> impl Strategy<Value = Knobs> {
    let mode = proptest::sample::select(vec![
        Mode::Nothing,
        Mode::Direct,
        Mode::Vxlan,
        Mode::Wireguard,
        Mode::Ipsec,
        Mode::VxlanIpsec,
    ]);
    let peers = proptest::collection::btree_set(0..40_u16, 0..12);
    (mode, peers, 0..4_u8, 1280..1500_u32, 1..4_u8, 0..2_u8).prop_map(|(mode, peers, pods, mtu, local, key)| Knobs {
        mode,
        peers: peers.into_iter().collect(),
        pods,
        mtu,
        local,
        key,
    })
}

/// A state such as the plan makes.
fn desired(knobs: &Knobs) -> Desired {
    let mut desired = Desired { known_pods: [(name(POD), 7)].into(), ..Desired::default() };
    if knobs.mode == Mode::Nothing {
        return desired;
    }
    desired.sysctls.insert("net/ipv4/ip_forward".to_owned(), "1".to_owned());
    desired.nft = Some(nft_table(knobs));
    desired.routes.insert(route_key("10.0.0.0/8".parse().unwrap(), 1000), UNREACHABLE);
    for pod in 0..knobs.pods {
        let address = IpAddr::from([10, 0, 0, pod]);
        let key = NeighbourKey { interface: name(POD), address };
        desired.neighbours.insert(key, MacAddress([2, 9, 0, 0, 0, pod]));
        desired.routes.insert(route_key(Prefix::host(address), 0), over(POD, None, None));
    }
    match knobs.mode {
        Mode::Nothing => {}
        Mode::Direct => knobs.peers.iter().for_each(|peer| {
            desired.routes.insert(route_key(block(*peer), 0), over("eth0", Some(node(*peer)), None));
        }),
        Mode::Vxlan => add_vxlan(&mut desired, knobs),
        Mode::Wireguard => add_wireguard(&mut desired, knobs),
        Mode::Ipsec => add_ipsec(&mut desired, knobs),
        Mode::VxlanIpsec => {
            add_vxlan(&mut desired, knobs);
            add_esp_around_vxlan(&mut desired, knobs);
        }
    }
    desired
}

const UNREACHABLE: Route = Route { target: RouteTarget::Unreachable, source: None, mtu: None };

fn route_key(destination: Prefix, metric: u32) -> RouteKey {
    RouteKey { table: 254, destination, metric }
}

fn over(interface: &str, via: Option<IpAddr>, mtu: Option<u32>) -> Route {
    let onlink = via.is_some() && interface != "eth0";
    Route { target: RouteTarget::Interface { interface: name(interface), via, onlink }, source: None, mtu }
}

fn node(peer: u16) -> IpAddr {
    let [high, low] = peer.to_be_bytes();
    IpAddr::from([192, 168, high, low])
}

fn block(peer: u16) -> Prefix {
    Prefix::containing(IpAddr::V4(Ipv4Addr::from((10 << 24) | (1 << 23) | (u32::from(peer) << 6))), 26).unwrap()
}

fn nft_table(knobs: &Knobs) -> NftTable {
    let elements = knobs.peers.iter().map(|peer| SetElement::Address(node(*peer))).collect();
    let rule = Rule { name: format!("mtu-{}", knobs.mtu), statements: vec![Statement::ClampMss] };
    let chain = Chain { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0, rules: vec![rule] };
    NftTable {
        counters: ["dropped".to_owned()].into(),
        sets: [("nodes".to_owned(), Set { element_type: ElementType::Address(Family::Ipv4), elements })].into(),
        chains: [("forward".to_owned(), chain)].into(),
        ..NftTable::default()
    }
}

fn add_vxlan(desired: &mut Desired, knobs: &Knobs) {
    let interface = name("husk-vx");
    let kind = LinkKind::Vxlan { vni: 1, port: 8472, local: IpAddr::from([192, 168, 255, knobs.local]) };
    let link = Link { kind, mtu: knobs.mtu, mac: Some(MacAddress([2, 0, 0, 0, 0, 1])), threaded_napi: true };
    desired.links.insert(interface.clone(), link);
    let own = Address { interface: interface.clone(), address: IpAddr::from([10, 0, 0, 255]), length: 32 };
    desired.addresses.insert(own);
    for peer in &knobs.peers {
        let [high, low] = peer.to_be_bytes();
        let mac = MacAddress([2, 1, 0, 0, high, low]);
        let router = block(*peer).address();
        desired.neighbours.insert(NeighbourKey { interface: interface.clone(), address: router }, mac);
        desired.fdb.insert(FdbKey { interface: interface.clone(), mac }, node(*peer));
        let route = over("husk-vx", Some(router), Some(knobs.mtu));
        desired.routes.insert(route_key(block(*peer), 0), route);
    }
}

fn add_wireguard(desired: &mut Desired, knobs: &Knobs) {
    let interface = name("husk-wg0");
    let link = Link { kind: LinkKind::Wireguard, mtu: knobs.mtu, mac: None, threaded_napi: true };
    desired.links.insert(interface.clone(), link);
    let own = Address { interface: interface.clone(), address: IpAddr::from([10, 0, 0, 255]), length: 32 };
    desired.addresses.insert(own);
    let peer = |number: u16| {
        let endpoint = Some((node(number), 51820).into());
        (peer_key(number), WireguardPeer { endpoint, allowed_ips: [block(number)].into(), keepalive: 25 })
    };
    let device = WireguardDevice {
        userspace: false,
        public_key: public_key(knobs.key),
        listen_port: 51820,
        peers: knobs.peers.iter().map(|number| peer(*number)).collect(),
    };
    desired.wireguard.insert(interface, device);
    for peer in &knobs.peers {
        desired.routes.insert(route_key(block(*peer), 0), over("husk-wg0", None, Some(knobs.mtu)));
    }
}

fn add_ipsec(desired: &mut Desired, knobs: &Knobs) {
    let interface = name("husk-ipsec");
    let kind = LinkKind::Xfrm { if_id: marks::XFRM_IF_ID };
    let link = Link { kind, mtu: knobs.mtu, mac: None, threaded_napi: false };
    desired.links.insert(interface.clone(), link);
    desired.addresses.insert(Address { interface, address: IpAddr::from([10, 0, 0, 255]), length: 32 });
    let own = own_address(knobs);
    for peer in &knobs.peers {
        let sent = add_association(desired, knobs, (EspMode::Tunnel, marks::XFRM_IF_ID), (own, node(*peer)), *peer);
        add_association(desired, knobs, (EspMode::Tunnel, marks::XFRM_IF_ID), (node(*peer), own), *peer);
        let any = "0.0.0.0/0".parse().unwrap();
        let key = |direction, source, destination| XfrmPolicyKey {
            direction,
            source,
            destination,
            udp_port: None,
            if_id: marks::XFRM_IF_ID,
        };
        let out = protect(EspMode::Tunnel, own, node(*peer), Some(sent));
        let back = protect(EspMode::Tunnel, node(*peer), own, None);
        desired.xfrm_policies.insert(key(XfrmDirection::Out, any, block(*peer)), out);
        desired.xfrm_policies.insert(key(XfrmDirection::In, block(*peer), any), back.clone());
        desired.xfrm_policies.insert(key(XfrmDirection::Forward, block(*peer), any), back);
        desired.routes.insert(route_key(block(*peer), 0), over("husk-ipsec", None, Some(knobs.mtu)));
    }
}

fn add_esp_around_vxlan(desired: &mut Desired, knobs: &Knobs) {
    let own = own_address(knobs);
    let key = |direction, source, destination| XfrmPolicyKey {
        direction,
        source,
        destination,
        udp_port: Some(8472),
        if_id: 0,
    };
    for peer in &knobs.peers {
        let sent = add_association(desired, knobs, (EspMode::Transport, 0), (own, node(*peer)), *peer);
        add_association(desired, knobs, (EspMode::Transport, 0), (node(*peer), own), *peer);
        let out = key(XfrmDirection::Out, Prefix::host(own), Prefix::host(node(*peer)));
        let back = key(XfrmDirection::In, Prefix::host(node(*peer)), Prefix::host(own));
        desired.xfrm_policies.insert(out, protect(EspMode::Transport, own, node(*peer), Some(sent)));
        desired.xfrm_policies.insert(back, protect(EspMode::Transport, node(*peer), own, None));
    }
    let any = "0.0.0.0/0".parse().unwrap();
    let blocks = XfrmPolicy { priority: marks::XFRM_BLOCK_PRIORITY, action: XfrmAction::Block };
    for direction in [XfrmDirection::In, XfrmDirection::Out] {
        desired.xfrm_policies.insert(key(direction, any, any), blocks.clone());
    }
}

fn own_address(knobs: &Knobs) -> IpAddr {
    IpAddr::from([192, 168, 255, knobs.local])
}

/// Adds an association between two addresses; its SPI.
fn add_association(
    desired: &mut Desired,
    knobs: &Knobs,
    (mode, if_id): (EspMode, u32),
    (source, destination): (IpAddr, IpAddr),
    peer: u16,
) -> u32 {
    let end = |address: IpAddr| EspEnd {
        node: NodeName::new(&format!("node-{}", address.to_string().replace('.', "-"))).unwrap(),
        // What makes other associations of the same keys, which no key may ever be used for, makes other epochs.
        epoch: if mode == EspMode::Tunnel { 1 } else { 2 },
        address,
        public_key: if address == own_address(knobs) { public_key(knobs.key) } else { peer_key(peer) },
    };
    let cipher = Aead::AesGcm128;
    let association = Association { sender: end(source), receiver: end(destination), cipher };
    let parameters = XfrmParameters { source, mode, if_id, cipher, replay_window: 64, udp: None };
    let spi = esp::spi(&association, 0, 32);
    desired.xfrm_states.insert(XfrmStateKey { destination, spi }, XfrmState { parameters, association, fresh: true });
    spi
}

fn protect(mode: EspMode, source: IpAddr, destination: IpAddr, spi: Option<u32>) -> XfrmPolicy {
    let template = XfrmTemplate { source, destination, mode, spi };
    XfrmPolicy { priority: 100, action: XfrmAction::Protect(template) }
}

fn strangers_route() -> (RouteKey, Route) {
    (route_key("172.16.0.0/12".parse().unwrap(), 0), over("eth0", Some(node(9)), None))
}

fn fake() -> FakeKernel {
    let kernel = FakeKernel::with_interfaces(["lo", "eth0", POD]);
    let (key, route) = strangers_route();
    kernel.state().foreign_routes.insert(key, route);
    kernel
}

fn pass(kernel: &FakeKernel, desired: &Desired) -> Outcome {
    reconcile(&mut kernel.clone(), desired, &keys(), Sweep::Allowed)
}

fn is_as_desired(kernel: &FakeKernel, desired: &Desired) {
    let (actual, failures) = survey(&mut kernel.clone(), desired);
    assert!(failures.is_empty());
    assert_eq!(diff(desired, &actual, Sweep::Allowed), []);
    let plain: BTreeMap<_, _> =
        desired.routes.iter().map(|(key, route)| (key.clone(), ActualRoute::Plain(route.clone()))).collect();
    assert_eq!(kernel.state().own.routes, plain);
    assert_eq!(kernel.state().own.addresses, desired.addresses);
    assert_eq!(kernel.state().own.neighbours, desired.neighbours);
    assert!(kernel.state().own.links.keys().eq(desired.links.keys()));
    assert!(kernel.state().own.xfrm_states.keys().eq(desired.xfrm_states.keys()));
    assert!(kernel.state().own.xfrm_policies.keys().eq(desired.xfrm_policies.keys()));
}

fn strangers_are_untouched(kernel: &FakeKernel) {
    let state = kernel.state();
    assert_eq!(state.foreign_routes, [strangers_route()].into());
    assert_eq!(state.interfaces, ["lo", "eth0", POD].map(name).into());
}

fn faults() -> impl Strategy<Value = Vec<(Fault, Errno)>> {
    let table = || proptest::sample::select(Table::ALL.to_vec());
    let fault = prop_oneof![
        table().prop_map(Fault::Change),
        table().prop_map(Fault::Read),
        (0..60_u64).prop_map(Fault::NthChange),
        (0..20_u64).prop_map(Fault::NthRead),
    ];
    let errno = proptest::sample::select(vec![Errno::EBUSY, Errno::ENOMEM, Errno::EINTR, Errno::EPERM]);
    proptest::collection::vec((fault, errno), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn one_pass_converges_from_any_state_whatever_went_wrong_before(
        states in proptest::collection::vec((knobs(), faults()), 1..4),
        flushed in proptest::collection::vec(proptest::sample::select(Table::ALL.to_vec()), 0..3),
        last in knobs(),
    ) {
        let kernel = fake();
        for (knobs, faults) in states {
            for (fault, errno) in faults {
                kernel.inject(fault, errno);
            }
            pass(&kernel, &desired(&knobs));
            strangers_are_untouched(&kernel);
        }
        kernel.heal();
        flushed.into_iter().for_each(|table| kernel.flush(table));
        let desired = desired(&last);
        let outcome = pass(&kernel, &desired);
        prop_assert!(outcome.is_clean(), "{:?}", outcome.failures);
        is_as_desired(&kernel, &desired);
        strangers_are_untouched(&kernel);
        let again = pass(&kernel, &desired);
        prop_assert!(again.is_clean() && again.changes() == 0, "{again:?}");
    }

    #[test]
    fn every_fault_is_told_and_stops_nothing_of_another_table(knobs in knobs(), table in proptest::sample::select(Table::ALL.to_vec())) {
        let kernel = fake();
        kernel.inject(Fault::Change(table), Errno::EBUSY);
        let desired = desired(&knobs);
        let outcome = pass(&kernel, &desired);
        let refused = outcome.failures.iter().filter(|failure| failure.table == table).count();
        let (actual, _) = survey(&mut kernel.clone(), &desired);
        let left = diff(&desired, &actual, Sweep::Allowed);
        // What is missing was told.
        prop_assert!(left.is_empty() || refused > 0, "{left:?}");
        // What is missing depends on what was refused: devices carry the rest, and what opens waits for what protects.
        let follows = |change: &Change| change.table() == table || protects(table) && change.opens();
        prop_assert!(table == Table::Links || left.iter().all(follows), "{left:?}");
    }

    #[test]
    fn nothing_is_removed_before_the_source_has_delivered(before in knobs(), after in knobs()) {
        let kernel = fake();
        pass(&kernel, &desired(&before));
        let keys_before: Vec<_> = kernel.state().own.routes.keys().cloned().collect();
        let peers_before: usize = kernel.state().own.wireguard.values().map(|device| device.peers.len()).sum();
        let links_before: Vec<_> = kernel.state().own.links.keys().cloned().collect();
        reconcile(&mut kernel.clone(), &desired(&after), &keys(), Sweep::Withheld);
        let state = kernel.state();
        let vxlan = |knobs: &Knobs| matches!(knobs.mode, Mode::Vxlan | Mode::VxlanIpsec);
        let recreated = vxlan(&before) && vxlan(&after) && before.local != after.local;
        prop_assert!(links_before.iter().all(|link| state.own.links.contains_key(link)));
        if !recreated {
            prop_assert!(keys_before.iter().all(|key| state.own.routes.contains_key(key)));
        }
        let peers: usize = state.own.wireguard.values().map(|device| device.peers.len()).sum();
        prop_assert!(peers >= peers_before);
    }
}

fn protects(table: Table) -> bool {
    matches!(table, Table::Nft | Table::XfrmPolicies | Table::Routes)
}

fn forwards(kernel: &FakeKernel) -> bool {
    kernel.state().own.sysctls.get("net/ipv4/ip_forward").is_some_and(|value| value == "1")
}

/// Routes that lead somewhere.
fn leading(kernel: &FakeKernel) -> BTreeMap<RouteKey, Route> {
    let all = kernel.state().own.routes.clone();
    let plain = all.into_iter().filter_map(|(key, route)| match route {
        ActualRoute::Plain(route) if route != UNREACHABLE => Some((key, route)),
        _ => None,
    });
    plain.collect()
}

fn withheld(outcome: &Outcome) -> Vec<(Table, String)> {
    let withheld = outcome.failures.iter().filter(|failure| matches!(failure.error, Error::Withheld { .. }));
    withheld.map(|failure| (failure.table, failure.to_string())).collect()
}

proptest! {
    #[test]
    fn without_guard_or_floor_nothing_begins_to_forward_and_nothing_that_did_stops(
        before in knobs(),
        after in knobs(),
        fault in proptest::sample::select(vec![
            Fault::Change(Table::Nft), Fault::Read(Table::Nft), Fault::Change(Table::Routes), Fault::Read(Table::Routes),
        ]),
        fresh in any::<bool>(),
    ) {
        let kernel = fake();
        if !fresh {
            pass(&kernel, &desired(&before));
            // Of the table something is missing, and the whole floor.
            kernel.flush(Table::Nft);
            kernel.state().own.routes.retain(|_, route| *route != ActualRoute::Plain(UNREACHABLE));
        }
        let (forwarded, led) = (forwards(&kernel), leading(&kernel));
        kernel.inject(fault, Errno::EPERM);
        let desired = desired(&after);
        let outcome = pass(&kernel, &desired);
        if desired.nft.is_none() {
            return Ok(());
        }
        prop_assert_eq!(forwards(&kernel), forwarded);
        for (key, route) in leading(&kernel) {
            prop_assert_eq!(led.get(&key), Some(&route), "{:?}", key);
        }
        prop_assert!(forwarded || withheld(&outcome).iter().any(|(table, _)| *table == Table::Sysctls));
        if matches!(fault, Fault::Change(Table::Routes) | Fault::Read(Table::Routes)) {
            prop_assert_eq!(leading(&kernel), led, "a packet without its route would find the default route");
        }
        kernel.heal();
        prop_assert!(pass(&kernel, &desired).is_clean());
        is_as_desired(&kernel, &desired);
    }
}

#[test]
fn what_is_withheld_is_told_with_the_reason_once_for_each_table() {
    let kernel = fake();
    kernel.inject(Fault::Change(Table::Nft), Errno::EPERM);
    let outcome = pass(&kernel, &desired(&some(Mode::Direct, 3)));
    let told = withheld(&outcome);
    assert_eq!(told.iter().map(|(table, _)| *table).collect::<Vec<_>>(), [Table::Sysctls, Table::Routes], "{told:?}");
    let start = "\"set net/ipv4/ip_forward to \"1\" (the kernel has no such parameter)\" is withheld, since the guard (nftables table \
                 inet husk) is not in place: the kernel refused to make the change";
    assert!(told[0].1.starts_with(start), "{}", told[0].1);
    assert!(told[1].1.contains("and 4 more changes are withheld"), "{}", told[1].1);
    assert!(
        kernel.state().own.routes.contains_key(&route_key("10.0.0.0/8".parse().unwrap(), 1000)),
        "the floor is there"
    );
}

#[test]
fn a_node_that_runs_keeps_running_without_its_guard() {
    let kernel = fake();
    let desired = desired(&some(Mode::Wireguard, 3));
    pass(&kernel, &desired);
    kernel.inject(Fault::Read(Table::Nft), Errno::EPERM);
    let outcome = pass(&kernel, &desired);
    assert_eq!(outcome.failures.len(), 1, "{:?}", outcome.failures);
    is_as_desired_but_for_faults(&kernel, &desired);
}

fn is_as_desired_but_for_faults(kernel: &FakeKernel, desired: &Desired) {
    kernel.heal();
    is_as_desired(kernel, desired);
}

#[test]
fn an_endpoint_is_left_to_a_peer_with_a_session_and_can_be_forced() {
    let kernel = fake();
    let desired = desired(&some(Mode::Wireguard, 1));
    pass(&kernel, &desired);
    let interface = name("husk-wg0");
    let elsewhere = (IpAddr::from([198, 51, 100, 1]), 1024).into();
    let session = kernel.state().now + Duration::from_secs(1_700_000_000);
    {
        let mut state = kernel.state();
        state.now = session + Duration::from_secs(100);
        let device = state.own.wireguard.get_mut(&interface).unwrap();
        device.peers.get_mut(&peer_key(0)).unwrap().endpoint = Some(elsewhere);
        device.status.get_mut(&peer_key(0)).unwrap().last_handshake = Some(session);
    }
    let endpoint = || kernel.state().own.wireguard[&interface].peers[&peer_key(0)].endpoint;
    assert_eq!(pass(&kernel, &desired).changes(), 0);
    assert_eq!(endpoint(), Some(elsewhere));
    let published = (node(7), 51820).into();
    let forced = Change::Wireguard(wireguard::set_endpoint(&interface, false, peer_key(0), published));
    kernel.clone().apply(&[forced], &KeyRing::default()).remove(0).unwrap();
    assert_eq!(endpoint(), Some(published));
    kernel.state().now = session + Duration::from_secs(200);
    assert_eq!(pass(&kernel, &desired).changes(), 1);
    assert_eq!(endpoint(), Some((node(0), 51820).into()));
}

/// The kernel as seen by a pass, writing down what it is asked to do.
struct Recorder {
    kernel: FakeKernel,
    changes: Vec<Change>,
}

impl Kernel for Recorder {
    fn read(
        &mut self,
        table: Table,
        desired: &Desired,
        actual: &mut husk_dataplane::kernel::Actual,
    ) -> Result<(), Error> {
        self.kernel.read(table, desired, actual)
    }

    fn apply(&mut self, changes: &[Change], keys: &KeyRing) -> Vec<Result<(), Error>> {
        self.changes.extend_from_slice(changes);
        self.kernel.apply(changes, keys)
    }

    fn settle_connections(&mut self, desired: &Desired, sweep: Sweep) -> Result<(), Error> {
        self.kernel.settle_connections(desired, sweep)
    }
}

fn recorded(kernel: &FakeKernel, desired: &Desired) -> Vec<Change> {
    let mut recorder = Recorder { kernel: kernel.clone(), changes: Vec::new() };
    let outcome = reconcile(&mut recorder, desired, &keys(), Sweep::Allowed);
    assert!(outcome.is_clean(), "{:?}", outcome.failures);
    recorder.changes
}

fn some(mode: Mode, peers: u16) -> Knobs {
    Knobs { mode, peers: (0..peers).collect(), pods: 2, mtu: 1420, local: 1, key: 0 }
}

#[test]
fn what_protects_comes_first_and_what_uses_comes_last() {
    let changes = recorded(&fake(), &desired(&some(Mode::Wireguard, 2)));
    let position = |wanted: &dyn Fn(&Change) -> bool| changes.iter().position(wanted).unwrap();
    let nft = position(&|change| change.table() == Table::Nft);
    let unreachable = position(&Change::makes_unreachable);
    let link = position(&|change| change.table() == Table::Links);
    let forwarding = position(&|change| change.table() == Table::Sysctls);
    let peers = position(&|change| change.table() == Table::Wireguard);
    let route = position(&|change| change.table() == Table::Routes && !change.makes_unreachable());
    assert!(nft < unreachable && unreachable < link && link < forwarding && forwarding < peers && peers < route);
}

#[test]
fn a_change_of_mode_makes_before_it_breaks() {
    let kernel = fake();
    pass(&kernel, &desired(&some(Mode::Vxlan, 3)));
    let changes = recorded(&kernel, &desired(&some(Mode::Wireguard, 3)));
    let removed = |change: &Change| matches!(change, Change::Link(LinkChange::Remove { .. }));
    assert!(removed(changes.last().unwrap()), "the old device goes last: {changes:?}");
    let first_removal = changes.iter().position(Change::is_removal).unwrap();
    assert!(changes[first_removal..].iter().all(Change::is_removal));
    let replaced = |change: &&Change| matches!(change, Change::Route(RouteChange::Replace { .. }));
    assert_eq!(changes.iter().filter(replaced).count(), 3, "routes move to the new device in one step: {changes:?}");
    // What the old device carries goes with it: one change, not one for each entry.
    assert_eq!(changes[first_removal..].len(), 1, "{changes:?}");
}

#[test]
fn a_peer_that_leaves_loses_its_route_before_its_key() {
    let kernel = fake();
    pass(&kernel, &desired(&some(Mode::Wireguard, 3)));
    let changes = recorded(&kernel, &desired(&some(Mode::Wireguard, 2)));
    let route = changes.iter().position(|change| matches!(change, Change::Route(RouteChange::Remove { .. })));
    let peer = changes.iter().position(|change| {
        matches!(change, Change::Wireguard(change) if matches!(change.action, WireguardAction::RemovePeer { .. }))
    });
    assert!(route.unwrap() < peer.unwrap(), "{changes:?}");
}

#[test]
fn policies_that_block_come_before_devices_and_associations_before_what_names_them() {
    let changes = recorded(&fake(), &desired(&some(Mode::VxlanIpsec, 2)));
    let last = |wanted: &dyn Fn(&Change) -> bool| changes.iter().rposition(wanted).unwrap();
    let first = |wanted: &dyn Fn(&Change) -> bool| changes.iter().position(wanted).unwrap();
    let of = |table: Table| move |change: &Change| change.table() == table;
    assert!(last(&Change::blocks) < first(&of(Table::Links)), "{changes:?}");
    assert!(last(&Change::blocks) < first(&Change::opens));
    let protects = |change: &Change| change.table() == Table::XfrmPolicies && !change.blocks();
    assert!(last(&of(Table::XfrmStates)) < first(&protects));
    assert!(last(&protects) < first(&|change: &Change| change.table() == Table::Routes && change.opens()));
}

#[test]
fn a_peer_that_leaves_loses_its_policies_before_its_associations() {
    let kernel = fake();
    pass(&kernel, &desired(&some(Mode::Ipsec, 3)));
    let changes = recorded(&kernel, &desired(&some(Mode::Ipsec, 2)));
    let tables: Vec<_> = changes.iter().map(Change::table).collect();
    let mut expected = vec![Table::Nft, Table::Routes];
    expected.extend([Table::XfrmPolicies; 3]);
    expected.extend([Table::XfrmStates; 2]);
    assert_eq!(tables, expected, "{changes:?}");
}

#[test]
fn without_the_block_of_plaintext_nothing_begins_to_forward() {
    let wanted = desired(&some(Mode::VxlanIpsec, 2));
    for fault in [Fault::Change(Table::XfrmPolicies), Fault::Read(Table::XfrmPolicies)] {
        let kernel = fake();
        kernel.inject(fault, Errno::EPERM);
        let outcome = pass(&kernel, &wanted);
        assert!(!forwards(&kernel) && leading(&kernel).is_empty(), "{fault:?}");
        let told = withheld(&outcome);
        assert_eq!(told.iter().map(|(table, _)| *table).collect::<Vec<_>>(), [Table::Sysctls, Table::Routes]);
        let missing = "since the block of plaintext (IPsec policies) is not in place: the kernel refused to";
        assert!(told.iter().all(|(_, text)| text.contains(missing)), "{told:?}");
        assert!(kernel.state().own.routes.values().any(|route| *route == ActualRoute::Plain(UNREACHABLE)));
        kernel.heal();
        assert!(pass(&kernel, &wanted).is_clean());
        is_as_desired(&kernel, &wanted);
    }
    // One that protects is its peer's business alone.
    let kernel = fake();
    let ipsec = desired(&some(Mode::Ipsec, 2));
    kernel.inject(Fault::Change(Table::XfrmPolicies), Errno::EPERM);
    assert!(withheld(&pass(&kernel, &ipsec)).is_empty());
    assert!(forwards(&kernel));
}

#[test]
fn an_association_that_was_tampered_with_goes_and_is_not_installed_again_by_the_same_pass() {
    let kernel = fake();
    let wanted = desired(&some(Mode::Ipsec, 1));
    pass(&kernel, &wanted);
    let installed = kernel.state().installed_associations.clone();
    assert_eq!(installed.len(), 2);
    kernel.state().own.xfrm_states.get_mut(&installed[0]).unwrap().parameters = None;
    let changes = recorded(&kernel, &wanted);
    assert_eq!(changes, [Change::XfrmState(XfrmStateChange::Remove { key: installed[0] })]);
    assert_eq!(kernel.state().installed_associations, installed);
}

#[test]
fn what_is_sent_moves_to_another_association_in_one_step() {
    let kernel = fake();
    let mut wanted = desired(&some(Mode::Ipsec, 1));
    pass(&kernel, &wanted);
    let (key, policy) = wanted.xfrm_policies.iter_mut().find(|(key, _)| key.direction == XfrmDirection::Out).unwrap();
    let XfrmAction::Protect(template) = &mut policy.action else { panic!("{policy:?}") };
    template.spi = Some(4711);
    let change = XfrmPolicyChange::Replace { key: *key, policy: policy.clone() };
    assert_eq!(recorded(&kernel, &wanted), [Change::XfrmPolicy(change)]);
}

#[test]
fn a_missing_key_is_told_by_association_and_without_the_secret() {
    let kernel = fake();
    let wanted = desired(&some(Mode::Ipsec, 1));
    let outcome = reconcile(&mut kernel.clone(), &wanted, &KeyRing::default(), Sweep::Allowed);
    let told: Vec<_> = outcome.failures.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told.iter().all(|text| text.contains("(epoch 1, 192.168.") && text.contains("not in the key ring")));
    assert_eq!(kernel.state().own.xfrm_states.len(), 0);
}

#[test]
fn a_device_that_vanished_is_back_with_all_it_carried_after_one_pass() {
    for mode in [Mode::Vxlan, Mode::Wireguard, Mode::Ipsec] {
        let kernel = fake();
        let desired = desired(&some(mode, 5));
        pass(&kernel, &desired);
        let interface = desired.links.keys().next().unwrap();
        kernel.state().remove_link(interface);
        assert!(pass(&kernel, &desired).is_clean());
        is_as_desired(&kernel, &desired);
    }
}

#[test]
fn cost_grows_with_what_changed_not_with_the_cluster() {
    for (mode, made, tables) in [
        (Mode::Vxlan, 4, 4),
        (Mode::Wireguard, 3, 3),
        (Mode::Direct, 2, 2),
        // Two associations; a policy for each direction and one for what is forwarded.
        (Mode::Ipsec, 7, 4),
        (Mode::VxlanIpsec, 8, 6),
    ] {
        let kernel = fake();
        pass(&kernel, &desired(&some(mode, 5000)));
        let before = kernel.state().counters;
        assert!(pass(&kernel, &desired(&some(mode, 5001))).is_clean());
        let Counters { reads, changes, batches } = kernel.state().counters;
        assert_eq!(changes - before.changes, made, "what the peer takes");
        assert_eq!(batches - before.batches, tables, "one for each table that the peer appears in");
        assert_eq!(reads - before.reads, u64::try_from(Table::ALL.len()).unwrap(), "every table once");
    }
}

#[test]
fn a_strangers_route_in_the_way_is_told_and_left() {
    let kernel = fake();
    let desired = desired(&some(Mode::Direct, 3));
    let key = route_key(block(1), 0);
    kernel.state().foreign_routes.insert(key.clone(), over("eth0", None, None));
    let outcome = pass(&kernel, &desired);
    assert_eq!(outcome.failures.len(), 1);
    assert_eq!(outcome.failures[0].error.errno(), Some(Errno::EEXIST));
    assert!(outcome.failures[0].to_string().contains("add route 10.128.0.64/26 via 192.168.0.1 dev eth0"));
    assert_eq!(kernel.state().foreign_routes[&key], over("eth0", None, None));
}

#[test]
fn a_missing_private_key_is_told_by_device() {
    let kernel = fake();
    let desired = desired(&some(Mode::Wireguard, 1));
    let outcome = reconcile(&mut kernel.clone(), &desired, &KeyRing::default(), Sweep::Allowed);
    assert!(
        outcome
            .failures
            .iter()
            .any(|failure| matches!(&failure.error, Error::NoPrivateKey { interface } if interface == "husk-wg0"))
    );
}

#[test]
fn forwarding_is_turned_on_after_everything_that_it_would_upset() {
    let kernel = fake();
    let mut desired = desired(&some(Mode::Direct, 0));
    for (path, value) in [("net/ipv6/conf/all/forwarding", "1"), ("net/ipv6/conf/eth0/accept_ra", "2")] {
        desired.sysctls.insert(path.to_owned(), value.to_owned());
    }
    let paths: Vec<_> = recorded(&kernel, &desired)
        .into_iter()
        .filter_map(|change| match change {
            Change::Sysctl(change) => Some(change.path),
            _ => None,
        })
        .collect();
    assert_eq!(paths[0], "net/ipv6/conf/eth0/accept_ra");
}

#[test]
fn changes_are_shown_in_the_words_of_ip_and_as_json() {
    let kernel = fake();
    let changes = recorded(&kernel, &desired(&some(Mode::Vxlan, 1)));
    let text: Vec<_> = changes.iter().map(ToString::to_string).collect();
    for line in [
        "add route unreachable 10.0.0.0/8 metric 1000",
        "create link husk-vx vxlan id 1 dstport 8472 local 192.168.255.1 mtu 1420 address 02:00:00:00:00:01",
        "add address 10.0.0.255/32 dev husk-vx",
        "set neighbour 10.128.0.0 lladdr 02:01:00:00:00:00 dev husk-vx",
        "set forwarding entry 02:01:00:00:00:00 dst 192.168.0.0 dev husk-vx",
        "add route 10.128.0.0/26 via 10.128.0.0 dev husk-vx onlink mtu 1420",
    ] {
        assert!(text.iter().any(|it| it == line), "{line} is not in {text:#?}");
    }
    let json = serde_json::to_value(&changes).unwrap();
    assert_eq!(json.as_array().unwrap().len(), changes.len());
}

#[test]
fn without_network_policy_nothing_begins_to_forward_and_its_fast_path_touches_nothing_else() {
    for fault in [Fault::Change(Table::Policy), Fault::Read(Table::Policy)] {
        let kernel = fake();
        let mut wanted = desired(&some(Mode::Direct, 3));
        wanted.policy = Some(Arc::default());
        kernel.inject(fault, Errno::EPERM);
        let outcome = pass(&kernel, &wanted);
        assert!(!forwards(&kernel) && leading(&kernel).is_empty(), "{fault:?}");
        let told = withheld(&outcome);
        assert_eq!(told.iter().map(|(table, _)| *table).collect::<Vec<_>>(), [Table::Sysctls, Table::Routes]);
        let missing = "since network policy (nftables table inet husk-policy) is not in place: the kernel refused to";
        assert!(told.iter().all(|(_, text)| text.contains(missing)), "{told:?}");
        assert!(kernel.state().own.nft.is_some(), "the guard is there");
        kernel.heal();
        assert!(pass(&kernel, &wanted).is_clean());
        is_as_desired(&kernel, &wanted);
        let own = kernel.state().own.clone();
        kernel.flush(Table::Policy);
        kernel.flush(Table::Routes);
        let outcome = reconcile_policy(&mut kernel.clone(), &wanted);
        assert_eq!((outcome.changes(), outcome.is_clean()), (1, true));
        assert_eq!(kernel.state().own.policy, own.policy);
        assert!(kernel.state().own.routes.is_empty());
        wanted.policy = None;
        reconcile_policy(&mut kernel.clone(), &wanted);
        assert_eq!(kernel.state().own.policy, None);
    }
}
