//! What has to change, as pure functions: every way in which an entry of a table can differ.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_dataplane::fdb::{self, FdbChange};
use husk_dataplane::kernel::{Actual, diff};
use husk_dataplane::links::{self, ActualKind, ActualLink, LinkChange, LinkTuning};
use husk_dataplane::napi;
use husk_dataplane::routes::{self, ActualRoute, RouteChange};
use husk_dataplane::{Sweep, addresses, neighbours};
use husk_overlay::kernel::{
    Address, Desired, FdbKey, Link, LinkKind, NeighbourKey, Route, RouteKey, RouteTarget, WireguardDevice,
    WireguardPeer,
};
use husk_overlay::keys::PublicKey;
use husk_overlay::mac::MacAddress;
use husk_overlay::name::InterfaceName;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn vxlan(vni: u32) -> LinkKind {
    LinkKind::Vxlan { vni, port: 8472, local: ip("192.168.7.1") }
}

fn wanted(kind: LinkKind) -> Link {
    let mac = matches!(kind, LinkKind::Vxlan { .. }).then_some(MAC);
    Link { kind, mtu: 1420, mac, threaded_napi: true }
}

fn link_changes(link: Option<&Link>, found: Option<ActualLink>, sweep: Sweep) -> Vec<LinkChange> {
    let interface = name("husk-vx");
    let desired: BTreeMap<_, _> = link.into_iter().map(|link| (interface.clone(), link.clone())).collect();
    let actual: BTreeMap<_, _> = found.into_iter().map(|found| (interface.clone(), found)).collect();
    links::diff(&desired, &actual, sweep)
}

#[test]
fn each_property_of_a_link_is_tuned_by_itself() {
    let link = wanted(vxlan(1));
    let tuned = |change: fn(&mut ActualLink)| {
        let mut found = ActualLink::made_of(&link);
        change(&mut found);
        match link_changes(Some(&link), Some(found), Sweep::Withheld).as_slice() {
            [] => None,
            [LinkChange::Tune { tuning, .. }] => Some(tuning.clone()),
            other => panic!("{other:?}"),
        }
    };
    let none = LinkTuning::default;
    assert_eq!(tuned(|_| {}), None);
    assert_eq!(tuned(|found| found.mtu = 1500), Some(LinkTuning { mtu: Some(1420), ..none() }));
    assert_eq!(tuned(|found| found.mac = None), Some(LinkTuning { mac: Some(MAC), ..none() }));
    assert_eq!(tuned(|found| found.up = false), Some(LinkTuning { up: true, ..none() }));
    assert_eq!(tuned(|found| found.link_local = true), Some(LinkTuning { no_link_local: true, ..none() }));
    assert_eq!(tuned(|found| found.fragmentable = true), Some(LinkTuning { dont_fragment: true, ..none() }));
}

#[test]
fn a_link_of_another_kind_is_made_anew_unless_a_process_holds_it() {
    let (one, two, kernel, process) =
        (wanted(vxlan(1)), wanted(vxlan(2)), wanted(LinkKind::Wireguard), wanted(LinkKind::WireguardUserspace));
    let other = ActualLink { kind: ActualKind::Other("bridge".to_owned()), ..ActualLink::made_of(&one) };
    let changes = |link: &Link, actual: Option<ActualLink>| link_changes(Some(link), actual, Sweep::Allowed);
    assert!(matches!(changes(&one, None)[..], [LinkChange::Create { .. }]));
    assert!(matches!(changes(&one, Some(ActualLink::made_of(&two)))[..], [LinkChange::Recreate { .. }]));
    assert!(matches!(changes(&one, Some(other.clone()))[..], [LinkChange::Recreate { .. }]));
    assert!(matches!(changes(&kernel, Some(ActualLink::made_of(&one)))[..], [LinkChange::Recreate { .. }]));
    assert!(matches!(changes(&kernel, Some(ActualLink::made_of(&process)))[..], [LinkChange::Create { .. }]));
    assert!(matches!(changes(&process, None)[..], [LinkChange::Await { .. }]));
    assert!(matches!(changes(&process, Some(ActualLink::made_of(&kernel)))[..], [LinkChange::Remove { .. }]));
    assert_eq!(changes(&process, Some(ActualLink::made_of(&process))), []);
}

#[test]
fn links_are_swept_when_allowed_but_never_those_of_a_process() {
    let (kernel, process) = (wanted(LinkKind::Wireguard), wanted(LinkKind::WireguardUserspace));
    assert!(matches!(
        link_changes(None, Some(ActualLink::made_of(&kernel)), Sweep::Allowed)[..],
        [LinkChange::Remove { .. }]
    ));
    assert_eq!(link_changes(None, Some(ActualLink::made_of(&kernel)), Sweep::Withheld), []);
    assert_eq!(link_changes(None, Some(ActualLink::made_of(&process)), Sweep::Allowed), []);
}

#[test]
fn threaded_napi_is_turned_on_where_it_is_known_to_be_off_and_can_be() {
    let mut desired = Desired::default();
    for (interface, kind) in [("husk-vx", vxlan(1)), ("husk-wg0", LinkKind::Wireguard)] {
        desired.links.insert(name(interface), wanted(kind));
    }
    let mut device = WireguardDevice {
        userspace: false,
        public_key: PublicKey::from_bytes([1; 32]).unwrap(),
        listen_port: 1,
        peers: BTreeMap::new(),
    };
    desired.wireguard.insert(name("husk-wg0"), device.clone());
    let off: BTreeMap<_, _> = ["husk-vx", "husk-wg0"].map(|it| (name(it), false)).into();
    let changed = |desired: &Desired, actual: &BTreeMap<InterfaceName, bool>| {
        napi::diff(desired, actual).into_iter().map(|change| change.interface.to_string()).collect::<Vec<_>>()
    };
    assert!(changed(&desired, &off).is_empty(), "WireGuard has no NAPI before its first peer");
    assert!(changed(&desired, &BTreeMap::new()).is_empty(), "unknown is left alone");
    let peer = WireguardPeer { endpoint: None, allowed_ips: BTreeSet::new(), keepalive: 0 };
    device.peers.insert(PublicKey::from_bytes([2; 32]).unwrap(), peer);
    desired.wireguard.insert(name("husk-wg0"), device);
    assert_eq!(changed(&desired, &off), ["husk-wg0"], "a VXLAN device would stop receiving under load");
    let on = off.keys().map(|interface| (interface.clone(), true)).collect();
    assert!(changed(&desired, &on).is_empty());
    desired.links.values_mut().for_each(|link| link.threaded_napi = false);
    assert!(changed(&desired, &on).is_empty(), "never turned off");
}

#[test]
fn forwarding_entries() {
    let unicast = FdbKey { interface: name("husk-vx"), mac: MAC };
    let flood = FdbKey { interface: name("husk-vx"), mac: MacAddress([0; 6]) };
    let (here, there) = (ip("192.168.7.2"), ip("192.168.7.3"));
    let changes = |desired: &[(&FdbKey, IpAddr)], actual: &[(&FdbKey, &[IpAddr])], sweep| {
        let desired = desired.iter().map(|(key, destination)| ((*key).clone(), *destination)).collect();
        let actual =
            actual.iter().map(|(key, all)| ((*key).clone(), all.iter().copied().collect::<BTreeSet<_>>())).collect();
        fdb::diff(&desired, &actual, sweep)
    };
    let set = |key: &FdbKey, destination| FdbChange::Set { key: key.clone(), destination };
    let remove = |key: &FdbKey, destination| FdbChange::Remove { key: key.clone(), destination };
    let allowed = Sweep::Allowed;
    assert_eq!(changes(&[(&unicast, here)], &[], allowed), [set(&unicast, here)]);
    assert_eq!(changes(&[(&unicast, here)], &[(&unicast, &[here])], allowed), []);
    // One message replaces it; nothing is left to remove.
    assert_eq!(changes(&[(&unicast, here)], &[(&unicast, &[there])], allowed), [set(&unicast, here)]);
    let both = [here, there];
    assert_eq!(changes(&[(&flood, here)], &[(&flood, &both)], allowed), [remove(&flood, there)]);
    assert_eq!(changes(&[], &[(&flood, &both)], allowed), [remove(&flood, here), remove(&flood, there)]);
    assert_eq!(changes(&[], &[(&unicast, &[here])], Sweep::Withheld), []);
}

#[test]
fn routes_are_added_replaced_rebuilt_and_removed() {
    let key = |text: &str| RouteKey { table: 254, destination: text.parse().unwrap(), metric: 1024 };
    let over = |interface: &str, via: Option<&str>| {
        let target = RouteTarget::Interface { interface: name(interface), via: via.map(ip), onlink: via.is_some() };
        Route { target, source: None, mtu: None }
    };
    let unreachable = Route { target: RouteTarget::Unreachable, source: None, mtu: None };
    let change = |key: &RouteKey, wanted: Option<&Route>, found: Option<ActualRoute>| {
        let desired = wanted.map(|route| (key.clone(), route.clone())).into_iter().collect();
        let actual = found.map(|route| (key.clone(), route)).into_iter().collect();
        let mut changes = routes::diff(&desired, &actual, Sweep::Allowed);
        assert!(changes.len() <= 1);
        changes.pop()
    };
    let plain = |route: &Route| Some(ActualRoute::Plain(route.clone()));
    let (v4, v6) = (key("10.42.1.0/24"), key("fd42:0:0:1::/64"));
    let (vx, wg) = (over("husk-vx", Some("fd42:0:0:1::")), over("husk-wg0", None));
    assert!(matches!(change(&v4, Some(&wg), None), Some(RouteChange::Add { .. })));
    assert_eq!(change(&v4, Some(&wg), plain(&wg)), None);
    assert!(matches!(change(&v4, Some(&wg), plain(&unreachable)), Some(RouteChange::Replace { .. })));
    let with_mtu = Route { mtu: Some(1400), ..wg.clone() };
    assert!(matches!(change(&v6, Some(&with_mtu), plain(&wg)), Some(RouteChange::Replace { .. })));
    assert!(matches!(change(&v6, Some(&wg), plain(&vx)), Some(RouteChange::Replace { .. })));
    assert!(matches!(change(&v6, Some(&vx), plain(&wg)), Some(RouteChange::Rebuild { .. })));
    let multipath = Some(ActualRoute::Other("a multipath route".to_owned()));
    assert!(matches!(change(&v6, Some(&wg), multipath.clone()), Some(RouteChange::Rebuild { .. })));
    assert!(matches!(change(&v4, None, multipath), Some(RouteChange::Remove { .. })));
    let withheld = routes::diff(&BTreeMap::new(), &[(v4, ActualRoute::Plain(wg))].into(), Sweep::Withheld);
    assert_eq!(withheld, []);
}

#[test]
fn addresses_and_neighbours() {
    let own = |text: &str| Address { interface: name("husk-vx"), address: ip(text), length: 32 };
    let (one, two) = ([own("10.42.0.1")].into(), [own("10.42.0.2")].into());
    let text = |sweep| addresses::diff(&one, &two, sweep).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text(Sweep::Withheld), ["add address 10.42.0.1/32 dev husk-vx"]);
    assert_eq!(
        text(Sweep::Allowed),
        ["add address 10.42.0.1/32 dev husk-vx", "remove address 10.42.0.2/32 dev husk-vx"]
    );

    let key = |text: &str| NeighbourKey { interface: name("husk-vx"), address: ip(text) };
    let desired = [(key("10.42.1.0"), MAC), (key("10.42.2.0"), MAC)].into();
    let actual = [(key("10.42.1.0"), MacAddress([2; 6])), (key("10.42.2.0"), MAC), (key("10.42.3.0"), MAC)].into();
    let text = |sweep| neighbours::diff(&desired, &actual, sweep).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text(Sweep::Withheld), ["set neighbour 10.42.1.0 lladdr 02:00:00:00:00:01 dev husk-vx"]);
    assert_eq!(text(Sweep::Allowed).last().unwrap(), "remove neighbour 10.42.3.0 dev husk-vx");
}

#[test]
fn a_pod_that_is_younger_than_the_plan_keeps_its_route_and_neighbour() {
    let pod = name("husk0123456789a");
    let key = RouteKey { table: 254, destination: "10.42.0.5/32".parse().unwrap(), metric: 0 };
    let target = RouteTarget::Interface { interface: pod.clone(), via: None, onlink: false };
    let neighbour = NeighbourKey { interface: pod.clone(), address: ip("10.42.0.5") };
    let actual = Actual {
        routes: [(key, ActualRoute::Plain(Route { target, source: None, mtu: None }))].into(),
        neighbours: [(neighbour, MAC)].into(),
        ..Actual::default()
    };
    let younger = Desired::default();
    assert_eq!(diff(&younger, &actual, Sweep::Allowed), []);
    let older = Desired { known_pods: [(pod, 7)].into(), ..Desired::default() };
    assert_eq!(diff(&older, &actual, Sweep::Allowed).len(), 2, "a pod that was known and has no lease is gone");
}
