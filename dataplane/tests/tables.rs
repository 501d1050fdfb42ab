//! Every rtnetlink table against the real kernel, each test in a network namespace of its own that nothing else knows of:
//! what is applied is read back, what is read back needs no further change, and strangers are left alone.
//!
//! They need `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`, and iproute2 for the stranger's part.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::Command;

use husk_dataplane::Sweep;
use husk_dataplane::events::{Monitor, Subject};
use husk_dataplane::fdb::FdbChange;
use husk_dataplane::kernel::{Actual, Change, Kernel, Table, diff, diff_table};
use husk_dataplane::linux::Linux;
use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::netns::Netns;
use husk_dataplane::pod::host_interface_index;
use husk_dataplane::reconcile::{Outcome, reconcile};
use husk_dataplane::routes::RouteChange;
use husk_dataplane::underlay;
use husk_dataplane::wireguard::KeyRing;
use husk_overlay::facts::RouteLimit;
use husk_overlay::kernel::{Address, Desired, FdbKey, Link, LinkKind, NeighbourKey, Route, RouteKey, RouteTarget};
use husk_overlay::mac::MacAddress;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, sockopt,
};

/// The rtnetlink tables, and what a change to a link needs.
const TABLES: [Table; 7] =
    [Table::Links, Table::Offload, Table::Napi, Table::Addresses, Table::Neighbours, Table::Fdb, Table::Routes];

fn in_a_namespace(body: impl FnOnce() + Send) {
    let namespace = Netns::new_unnamed().unwrap();
    namespace
        .run_in(|| {
            ip("link set lo up");
            body();
        })
        .unwrap();
}

/// Runs `ip` in the namespace of the calling thread; its output.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The interface of a pod as it is when a plan is made.
fn known(pod: &InterfaceName) -> BTreeMap<InterfaceName, u32> {
    [(pod.clone(), host_interface_index(pod).unwrap().unwrap())].into()
}

fn bridge(arguments: &str) -> String {
    let output = Command::new("bridge").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "bridge {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// An underlay interface with an address of each family, and a veth peer that plays no part.
fn underlay_interface() {
    ip("link add eth0 type veth peer name peer0");
    // No link-local addresses, which would come whenever duplicate address detection is through. In one command with it, older
    // kernels would set the interface up first (net/core/rtnetlink.c, do_setlink).
    for interface in ["peer0", "eth0"] {
        ip(&format!("link set {interface} addrgenmode none"));
        ip(&format!("link set {interface} up"));
    }
    ip("addr add 192.168.7.1/24 dev eth0");
    ip("addr add fd00:7::1/64 dev eth0 nodad");
}

fn linux() -> Linux {
    Linux::open(Path::new("/nonexistent")).unwrap()
}

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, last])
}

fn vxlan(local: &str) -> Link {
    Link {
        kind: LinkKind::Vxlan { vni: 4096, port: 8472, local: address(local) },
        mtu: 1430,
        mac: Some(mac(1)),
        threaded_napi: true,
    }
}

fn with_vxlan() -> Desired {
    Desired { links: [(name("husk-vx"), vxlan("192.168.7.1"))].into(), ..Desired::default() }
}

fn key(destination: &str, metric: u32) -> RouteKey {
    RouteKey { table: 254, destination: destination.parse().unwrap(), metric }
}

fn over(interface: &str, via: Option<&str>, onlink: bool) -> Route {
    let target = RouteTarget::Interface { interface: name(interface), via: via.map(address), onlink };
    Route { target, source: None, mtu: None }
}

const UNREACHABLE: Route = Route { target: RouteTarget::Unreachable, source: None, mtu: None };

fn survey(linux: &mut Linux, desired: &Desired) -> Actual {
    let mut actual = Actual::default();
    for table in TABLES {
        linux.read(table, desired, &mut actual).unwrap();
    }
    actual
}

fn differences(linux: &mut Linux, desired: &Desired) -> Vec<Change> {
    let actual = survey(linux, desired);
    TABLES.into_iter().flat_map(|table| diff_table(table, desired, &actual, Sweep::Allowed)).collect()
}

fn pass(linux: &mut Linux, desired: &Desired) -> Outcome {
    let outcome = reconcile(linux, desired, &KeyRing::default(), Sweep::Allowed);
    assert!(outcome.is_clean(), "{:?}", outcome.failures);
    outcome
}

/// Makes the kernel as desired, and checks that it then is and that a second pass finds nothing to do.
fn settle(linux: &mut Linux, desired: &Desired) -> Outcome {
    let outcome = pass(linux, desired);
    assert_eq!(differences(linux, desired), []);
    assert_eq!(pass(linux, desired).changes(), 0);
    outcome
}

fn index(interface: &str) -> u32 {
    let text = ip(&format!("-o link show dev {interface}"));
    text.split(':').next().unwrap().parse().unwrap()
}

#[test]
fn links_round_trip_over_both_families() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link add stranger type vxlan id 7 dstport 4789 local 192.168.7.1");
        let stranger = ip("-d link show dev stranger");
        let mut linux = linux();
        for local in ["192.168.7.1", "fd00:7::1"] {
            let link = vxlan(local);
            let desired = Desired { links: [(name("husk-vx"), link.clone())].into(), ..Desired::default() };
            settle(&mut linux, &desired);
            let found = survey(&mut linux, &desired).links.remove(&name("husk-vx")).unwrap();
            assert_eq!((found.mtu, found.mac, found.up), (1430, Some(mac(1)), true));
            assert!(!ip("addr show dev husk-vx").contains("inet6"), "no link-local address");
            assert!(ip("-d link show dev husk-vx").contains("nolearning"));
            assert!(!survey(&mut linux, &desired).napi[&name("husk-vx")], "threaded NAPI would stop it under load");
        }
        let outcome = settle(&mut linux, &Desired::default());
        assert_eq!(outcome.applied, [(Table::Links, 1)].into());
        assert_eq!(ip("-d link show dev stranger"), stranger);
    });
}

/// What a device is said to do itself, of what it leaves to the device below.
fn offloads(interface: &str) -> Vec<(String, bool)> {
    let output = Command::new("ethtool").args(["-k", interface]).output().expect("ethtool is installed");
    assert!(output.status.success(), "ethtool -k {interface}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let state = |feature: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{feature}: ")));
        (feature.to_owned(), line.unwrap().starts_with("on"))
    };
    let features = ["tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation"];
    features.into_iter().map(state).collect()
}

#[test]
fn offload_is_turned_off_and_on_and_kept_so_where_that_is_wanted() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let mut desired = with_vxlan();
        settle(&mut linux, &desired);
        let all = |on: bool| offloads("husk-vx").into_iter().all(|(_, is)| is == on);
        assert!(all(true), "{:?}", offloads("husk-vx"));

        desired.offload.insert(name("husk-vx"), false);
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Offload, 1)].into());
        assert!(all(false), "{:?}", offloads("husk-vx"));
        assert!(offloads("eth0").iter().all(|(_, on)| *on), "{:?}", offloads("eth0"));

        // An outsider turns it on again, or makes the device anew.
        let set = Command::new("ethtool").args(["-K", "husk-vx", "tx-checksum-ip-generic", "on"]).status().unwrap();
        assert!(set.success());
        settle(&mut linux, &desired);
        assert!(all(false), "{:?}", offloads("husk-vx"));
        ip("link del husk-vx");
        settle(&mut linux, &desired);
        assert!(all(false), "{:?}", offloads("husk-vx"));

        // Without an opinion it stays as it is, whatever that is.
        desired.offload.clear();
        settle(&mut linux, &desired);
        assert!(all(false), "{:?}", offloads("husk-vx"));
        desired.offload.insert(name("husk-vx"), true);
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Offload, 1)].into());
        assert!(all(true), "{:?}", offloads("husk-vx"));

        // A device that is not there is no reason to fail.
        let mut actual = Actual::default();
        ip("link del husk-vx");
        linux.read(Table::Offload, &desired, &mut actual).unwrap();
        assert_eq!(actual.offload, [].into());
    });
}

#[test]
fn a_link_is_tuned_alive_and_recreated_only_when_it_must_be() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let mut desired = with_vxlan();
        desired.addresses.insert(Address { interface: name("husk-vx"), address: address("10.42.0.1"), length: 32 });
        desired.routes.insert(key("10.42.1.0/24", 0), over("husk-vx", None, false));
        settle(&mut linux, &desired);
        let first = index("husk-vx");

        let link = desired.links.get_mut(&name("husk-vx")).unwrap();
        link.mtu = 1300;
        link.mac = Some(mac(2));
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Links, 1)].into());
        assert_eq!(index("husk-vx"), first);

        // An outsider sets it down, which also takes its routes: one pass brings all back.
        ip("link set husk-vx down");
        let outcome = settle(&mut linux, &desired);
        assert_eq!(outcome.applied, [(Table::Links, 1), (Table::Routes, 1)].into());
        assert_eq!(index("husk-vx"), first);

        let link = desired.links.get_mut(&name("husk-vx")).unwrap();
        link.kind = LinkKind::Vxlan { vni: 4097, port: 8472, local: address("192.168.7.1") };
        let outcome = settle(&mut linux, &desired);
        assert_eq!(outcome.applied[&Table::Links], 1);
        assert_eq!((outcome.applied[&Table::Addresses], outcome.applied[&Table::Routes]), (1, 1));
        assert_ne!(index("husk-vx"), first);

        // What an outsider made under our name is not taken for ours.
        ip("link del husk-vx");
        ip("link add husk-vx type vxlan id 4097 dstport 8472 local 192.168.7.1 learning");
        settle(&mut linux, &desired);
        assert!(ip("-d link show dev husk-vx").contains("nolearning"));

        // Nor is what an outsider changed of what routers may do to its packets; that needs no new device.
        let before = index("husk-vx");
        assert!(ip("-d link show dev husk-vx").contains("df set"));
        ip("link set dev husk-vx type vxlan df unset");
        assert!(!ip("-d link show dev husk-vx").contains("df set"));
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Links, 1)].into());
        assert!(ip("-d link show dev husk-vx").contains("df set"));
        assert_eq!(index("husk-vx"), before);
    });
}

#[test]
fn the_device_of_a_userspace_process_is_awaited_tuned_and_never_removed() {
    in_a_namespace(|| {
        let mut linux = linux();
        let link = Link { kind: LinkKind::WireguardUserspace, mtu: 1420, mac: None, threaded_napi: true };
        let desired = Desired { links: [(name("husk-wg0"), link)].into(), ..Desired::default() };
        let outcome = reconcile(&mut linux, &desired, &KeyRing::default(), Sweep::Allowed);
        assert_eq!(outcome.failures.len(), 1);
        assert!(outcome.failures[0].to_string().contains("has not created the device yet"), "{:?}", outcome.failures);

        ip("tuntap add dev husk-wg0 mode tun");
        let before = index("husk-wg0");
        settle(&mut linux, &desired);
        assert!(ip("link show dev husk-wg0").contains("mtu 1420"));
        assert!(!ip("addr show dev husk-wg0").contains("inet6"));
        settle(&mut linux, &Desired::default());
        assert_eq!(index("husk-wg0"), before);
    });
}

#[test]
fn addresses_round_trip() {
    in_a_namespace(|| {
        underlay_interface();
        let strangers = ip("addr show dev eth0");
        let mut linux = linux();
        let mut desired = with_vxlan();
        for (text, length) in [("10.42.0.1", 32), ("10.42.9.1", 24), ("fd42::1", 128), ("fd42:9::1", 64)] {
            desired.addresses.insert(Address { interface: name("husk-vx"), address: address(text), length });
        }
        settle(&mut linux, &desired);
        assert_eq!(survey(&mut linux, &desired).addresses, desired.addresses);
        // Usable at once: not tentative. No routes but ours.
        assert!(!ip("addr show dev husk-vx").contains("tentative"));
        assert_eq!(ip("route show dev husk-vx"), "");

        ip("addr add 10.99.0.1/32 dev husk-vx");
        ip("addr del 10.42.0.1/32 dev husk-vx");
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Addresses, 2)].into());
        desired.addresses.clear();
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Addresses, 4)].into());
        assert_eq!(ip("addr show dev eth0"), strangers);
    });
}

#[test]
fn neighbours_round_trip() {
    in_a_namespace(|| {
        underlay_interface();
        ip("neigh add 192.168.7.9 lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
        ip("link add husk0123456789a type veth peer name pod0");
        ip("link set husk0123456789a up");
        let mut linux = linux();
        let mut desired = with_vxlan();
        desired.known_pods = known(&name("husk0123456789a"));
        for (interface, text, last) in [
            ("husk-vx", "10.42.1.0", 3),
            ("husk-vx", "fd42:1::", 3),
            ("husk0123456789a", "10.42.0.5", 4),
            ("husk0123456789a", "fd42::5", 4),
        ] {
            let key = NeighbourKey { interface: name(interface), address: address(text) };
            desired.neighbours.insert(key, mac(last));
        }
        settle(&mut linux, &desired);
        assert_eq!(survey(&mut linux, &desired).neighbours, desired.neighbours);

        ip("neigh replace 10.42.1.0 lladdr 02:00:00:00:00:77 dev husk-vx nud permanent");
        ip("neigh del fd42::5 dev husk0123456789a");
        ip("neigh add 10.42.2.0 lladdr 02:00:00:00:00:78 dev husk-vx nud permanent");
        // What the kernel learned is not ours, whatever it is.
        ip("neigh add 10.42.3.0 lladdr 02:00:00:00:00:79 dev husk-vx nud reachable");
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Neighbours, 3)].into());
        desired.neighbours.clear();
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Neighbours, 4)].into());
        assert!(ip("neigh show dev eth0").contains("192.168.7.9 lladdr 02:00:00:00:00:99 PERMANENT"));
        assert!(ip("neigh show dev husk-vx").contains("10.42.3.0"));
    });
}

#[test]
fn forwarding_entries_round_trip() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link add stranger type vxlan id 7 dstport 4789 local 192.168.7.1");
        bridge("fdb add 02:00:00:00:00:55 dev stranger dst 192.168.7.55 self permanent");
        let strangers = bridge("fdb show dev stranger");
        let mut linux = linux();
        for (local, peers) in
            [("192.168.7.1", ["192.168.7.2", "192.168.7.3"]), ("fd00:7::1", ["fd00:7::2", "fd00:7::3"])]
        {
            let mut desired = Desired { links: [(name("husk-vx"), vxlan(local))].into(), ..Desired::default() };
            let entry = |last| FdbKey { interface: name("husk-vx"), mac: mac(last) };
            desired.fdb.insert(entry(10), address(peers[0]));
            desired.fdb.insert(entry(11), address(peers[1]));
            settle(&mut linux, &desired);

            // A peer that returns with another address, an entry that is flooding, one that went, one too many.
            bridge(&format!("fdb replace 02:00:00:00:00:0a dev husk-vx dst {} self permanent", peers[1]));
            bridge("fdb del 02:00:00:00:00:0b dev husk-vx self");
            bridge(&format!("fdb append 00:00:00:00:00:00 dev husk-vx dst {} self permanent", peers[0]));
            bridge(&format!("fdb append 00:00:00:00:00:00 dev husk-vx dst {} self permanent", peers[1]));
            bridge(&format!("fdb add 02:00:00:00:00:0c dev husk-vx dst {} self permanent", peers[0]));
            assert_eq!(settle(&mut linux, &desired).applied, [(Table::Fdb, 5)].into());
            let found = survey(&mut linux, &desired).fdb;
            let expected = desired.fdb.iter().map(|(key, destination)| (key.clone(), [*destination].into())).collect();
            assert_eq!(found, expected);
            desired.fdb.clear();
            assert_eq!(settle(&mut linux, &desired).applied, [(Table::Fdb, 2)].into());
        }
        assert_eq!(bridge("fdb show dev stranger"), strangers);
    });
}

/// A route of every form that Husk writes.
fn routes_of_every_form() -> Desired {
    let mut desired = with_vxlan();
    for text in ["10.42.0.1", "fd42::1"] {
        let length = if text.contains(':') { 128 } else { 32 };
        desired.addresses.insert(Address { interface: name("husk-vx"), address: address(text), length });
    }
    let with = |mut route: Route, source: Option<&str>, mtu| {
        route.source = source.map(address);
        route.mtu = mtu;
        route
    };
    desired.routes = [
        (key("10.42.0.0/16", 1000), UNREACHABLE),
        (key("fd42::/48", 2000), UNREACHABLE),
        (key("10.42.1.0/24", 0), with(over("husk-vx", Some("10.42.1.0"), true), Some("10.42.0.1"), Some(1400))),
        (key("fd42:0:0:1::/64", 1024), with(over("husk-vx", Some("fd42:0:0:1::"), true), Some("fd42::1"), Some(1400))),
        (key("10.42.2.0/24", 0), with(over("husk-vx", None, false), None, Some(1380))),
        (key("fd42:0:0:2::/64", 1024), with(over("husk-vx", None, false), None, Some(1380))),
        (key("10.42.3.0/24", 5), over("eth0", Some("192.168.7.3"), false)),
        (key("fd42:0:0:3::/64", 5), over("eth0", Some("fd00:7::3"), false)),
        (key("10.42.4.0/24", 0), over("eth0", Some("fd00:7::4"), false)),
        (key("10.42.0.7/32", 0), over("husk0123456789a", None, false)),
        (key("fd42::7/128", 1024), over("husk0123456789a", None, false)),
        (RouteKey { table: 7200, ..key("10.42.1.0/24", 0) }, over("husk-vx", None, false)),
        (RouteKey { table: 72, ..key("fd42:0:0:1::/64", 1024) }, UNREACHABLE),
    ]
    .into();
    desired
}

#[test]
fn what_hangs_on_a_pod_made_anew_since_the_plan_stays() {
    in_a_namespace(|| {
        let pod = name("husk0123456789a");
        let make = || {
            ip("link add husk0123456789a type veth peer name pod0");
            ip("link set husk0123456789a addrgenmode none up");
        };
        make();
        let plan = Desired { known_pods: known(&pod), ..Desired::default() };
        ip("link del husk0123456789a");
        make();
        ip("route add 10.42.0.5 dev husk0123456789a proto 72");
        ip("neigh add 10.42.0.5 lladdr 02:00:00:00:00:05 dev husk0123456789a nud permanent");
        let outcome = reconcile(&mut linux(), &plan, &KeyRing::default(), Sweep::Allowed);
        assert!(outcome.is_clean() && outcome.changes() == 0, "{outcome:?}");
        // A plan that knows this one, and of no pod, takes it away.
        let plan = Desired { known_pods: known(&pod), ..Desired::default() };
        let outcome = reconcile(&mut linux(), &plan, &KeyRing::default(), Sweep::Allowed);
        assert_eq!(outcome.applied, [(Table::Neighbours, 1), (Table::Routes, 1)].into());
    });
}

#[test]
fn routes_of_every_form_round_trip() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link add husk0123456789a type veth peer name pod0");
        ip("link set husk0123456789a addrgenmode none up");
        ip("route add 10.43.0.0/16 via 192.168.7.9 proto static");
        ip("route add 10.44.0.0/16 dev eth0 proto 99 table 7200");
        ip("-6 route add fd43::/48 via fd00:7::9 proto static");
        let strangers = || format!("{}{}", ip("route show table all"), ip("-6 route show table all"));
        let before = strangers();

        let mut linux = linux();
        let desired = routes_of_every_form();
        let count = desired.routes.len();
        assert_eq!(settle(&mut linux, &desired).applied[&Table::Routes], count);
        let shown = ip("route show 10.42.1.0/24");
        for word in ["via 10.42.1.0", "dev husk-vx", "proto 72", "src 10.42.0.1", "mtu 1400", "onlink"] {
            assert!(shown.contains(word), "{word} is missing in {shown}");
        }

        // Flushed by an outsider.
        ip("route flush proto 72 table all");
        ip("-6 route flush proto 72 table all");
        assert_eq!(settle(&mut linux, &desired).applied, [(Table::Routes, count)].into());

        // Not desired any more, but the cluster source has not delivered yet.
        let pods = known(&name("husk0123456789a"));
        let none = Desired {
            known_pods: pods,
            links: desired.links.clone(),
            addresses: desired.addresses.clone(),
            ..Desired::default()
        };
        let outcome = reconcile(&mut linux, &none, &KeyRing::default(), Sweep::Withheld);
        assert!(outcome.is_clean() && outcome.changes() == 0, "{outcome:?}");
        assert_eq!(settle(&mut linux, &none).applied, [(Table::Routes, count)].into());
        settle(&mut linux, &Desired::default());
        assert_eq!(strangers(), before);
    });
}

#[test]
fn a_route_that_differs_is_replaced_in_one_step() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let interface = || over("husk-vx", None, false);
        let variants = |gateway: &str| {
            [
                UNREACHABLE,
                interface(),
                over("eth0", Some(gateway), false),
                Route { mtu: Some(1333), ..over("eth0", Some(gateway), false) },
                Route { mtu: Some(1300), ..interface() },
                interface(),
                UNREACHABLE,
                over("eth0", Some(gateway), false),
            ]
        };
        let mut events = route_events();
        for (destination, metric, gateway) in
            [("10.42.1.0/24", 77, "192.168.7.3"), ("fd42:0:0:1::/64", 77, "fd00:7::3")]
        {
            for route in variants(gateway) {
                let mut desired = with_vxlan();
                // The route of the other family stays, so that nothing but replacing goes on.
                desired.routes = survey(&mut linux, &desired)
                    .routes
                    .into_iter()
                    .filter_map(|(key, route)| match route {
                        husk_dataplane::routes::ActualRoute::Plain(route) => Some((key, route)),
                        husk_dataplane::routes::ActualRoute::Other(_) => None,
                    })
                    .collect();
                desired.routes.insert(key(destination, metric), route);
                settle(&mut linux, &desired);
                let family = if destination.contains(':') { "-6" } else { "-4" };
                let shown = ip(&format!("{family} route show {destination}"));
                assert_eq!(shown.lines().count(), 1, "one route, not several: {shown}");
            }
        }
        let kinds = message_kinds(&mut events);
        assert!(kinds.contains(&RTM_NEWROUTE) && !kinds.contains(&RTM_DELROUTE), "never removed: {kinds:?}");
    });
}

/// include/uapi/linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;

/// A socket that hears of changes to routes.
fn route_events() -> netlink_sys::Socket {
    let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE).unwrap();
    socket.bind_auto().unwrap();
    socket.set_non_blocking(true).unwrap();
    for group in [7, 11] {
        socket.add_membership(group).unwrap();
    }
    socket
}

/// Types of the messages that wait. Events come one to a datagram.
fn message_kinds(socket: &mut netlink_sys::Socket) -> Vec<u16> {
    std::iter::from_fn(|| socket.recv_from_full().ok())
        .map(|(datagram, _)| u16::from_ne_bytes([datagram[4], datagram[5]]))
        .collect()
}

#[test]
fn an_onlink_gateway_within_its_destination_moves_to_another_device() {
    in_a_namespace(|| {
        underlay_interface();
        ip("tuntap add dev husk-wg0 mode tun");
        let mut linux = linux();
        let mut desired = with_vxlan();
        let link = Link { kind: LinkKind::WireguardUserspace, mtu: 1420, mac: None, threaded_napi: false };
        desired.links.insert(name("husk-wg0"), link);
        for device in ["husk-wg0", "husk-vx", "husk-wg0"] {
            for (destination, gateway) in [("10.42.1.0/24", "10.42.1.0"), ("fd42:0:0:1::/64", "fd42:0:0:1::")] {
                desired.routes.insert(key(destination, 1024), over(device, Some(gateway), true));
            }
            settle(&mut linux, &desired);
        }
    });
}

#[test]
fn a_strangers_route_with_our_key_stays_and_the_conflict_is_told() {
    in_a_namespace(|| {
        underlay_interface();
        ip("route add 10.42.1.0/24 via 192.168.7.9 proto static");
        ip("-6 route add fd42:0:0:1::/64 via fd00:7::9 proto static metric 1024");
        let mut linux = linux();
        let mut desired = with_vxlan();
        desired.routes.insert(key("10.42.1.0/24", 0), over("husk-vx", None, false));
        desired.routes.insert(key("10.42.2.0/24", 0), over("husk-vx", None, false));
        desired.routes.insert(key("fd42:0:0:1::/64", 1024), over("husk-vx", None, false));
        let outcome = reconcile(&mut linux, &desired, &KeyRing::default(), Sweep::Allowed);
        assert_eq!(outcome.applied[&Table::Routes], 1, "the one in the middle is made");
        let errors: Vec<_> = outcome.failures.iter().map(|failure| failure.error.errno()).collect();
        assert_eq!(errors, [Some(Errno::EEXIST); 2], "{:?}", outcome.failures);
        assert!(ip("route show 10.42.1.0/24").contains("192.168.7.9"));
        assert!(ip("-6 route show fd42:0:0:1::/64").contains("fd00:7::9"));
    });
}

#[test]
fn what_an_outsider_made_with_our_protocol_number_goes() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let mut desired = with_vxlan();
        desired.routes.insert(key("10.42.1.0/24", 0), over("husk-vx", None, false));
        desired.routes.insert(key("fd42:0:0:1::/64", 1024), over("husk-vx", None, false));
        ip("route add blackhole 10.42.8.0/24 proto 72");
        ip("route add 10.42.1.0/24 proto 72 nexthop via 192.168.7.2 dev eth0 nexthop via 192.168.7.3 dev eth0");
        ip("-6 route add fd42:0:0:1::/64 proto 72 nexthop via fd00:7::2 dev eth0 nexthop via fd00:7::3 dev eth0");
        ip("route add 10.42.9.0/24 tos 4 proto 72 dev eth0");
        settle(&mut linux, &desired);
        let left = ip("route show proto 72");
        assert!(left.contains("10.42.1.0/24 dev husk-vx"), "{left}");
        assert!(!left.contains("blackhole") && !left.contains("nexthop"), "{left}");
        assert!(left.contains("10.42.9.0/24 tos"), "its key is none that Husk could have: {left}");
    });
}

#[test]
fn the_kernels_own_words_are_in_the_error() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let mut desired = Desired::default();
        desired.routes.insert(key("10.42.1.0/24", 0), over("eth0", Some("10.99.0.1"), false));
        desired.routes.insert(key("10.42.2.0/24", 0), over("eth0", None, false));
        desired.routes.insert(key("10.42.3.0/24", 0), over("absent0", None, false));
        let outcome = reconcile(&mut linux, &desired, &KeyRing::default(), Sweep::Allowed);
        assert_eq!(outcome.applied[&Table::Routes], 1);
        let words: Vec<_> = outcome.failures.iter().map(ToString::to_string).collect();
        assert_eq!(words.len(), 2, "{words:?}");
        assert_eq!(outcome.failures[0].error.explanation(), Some("Nexthop has invalid gateway"), "{words:?}");
        assert!(words[0].starts_with("cannot add route 10.42.1.0/24 via 10.99.0.1 dev eth0"), "{words:?}");
        assert!(words[1].contains("there is no interface absent0"), "{words:?}");
    });
}

#[test]
fn an_interface_that_came_after_the_links_were_read_is_found() {
    in_a_namespace(|| {
        let mut linux = linux();
        pass(&mut linux, &Desired::default());
        ip("link add husk0123456789a type veth peer name pod0");
        ip("link set husk0123456789a up");
        let change = RouteChange::Add { key: key("10.42.0.7/32", 0), route: over("husk0123456789a", None, false) };
        linux.apply(&[Change::Route(change)], &KeyRing::default()).remove(0).unwrap();
    });
}

#[test]
fn removals_of_what_is_gone_already_are_no_failures() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        pass(&mut linux, &with_vxlan());
        let interface = name("husk-vx");
        let changes = [
            Change::Route(RouteChange::Remove { key: key("10.42.1.0/24", 0) }),
            Change::Route(RouteChange::Remove { key: key("fd42::/64", 1024) }),
            Change::Fdb(FdbChange::Remove {
                key: FdbKey { interface: interface.clone(), mac: mac(9) },
                destination: address("192.168.7.9"),
            }),
            Change::Neighbour(husk_dataplane::neighbours::NeighbourChange::Remove {
                key: NeighbourKey { interface: interface.clone(), address: address("10.42.1.0") },
            }),
            Change::Address(husk_dataplane::addresses::AddressChange::Remove(Address {
                interface,
                address: address("10.42.0.1"),
                length: 32,
            })),
            Change::Link(husk_dataplane::links::LinkChange::Remove { interface: name("husk-wg1") }),
        ];
        for result in linux.apply(&changes, &KeyRing::default()) {
            result.unwrap();
        }
    });
}

#[test]
fn five_thousand_peers_are_made_and_one_more_costs_one_more() {
    in_a_namespace(|| {
        underlay_interface();
        let mut linux = linux();
        let mut desired = with_vxlan();
        let add_peer = |desired: &mut Desired, number: u32| {
            let [_, _, high, low] = number.to_be_bytes();
            let block = IpAddr::from([10, 42 + (high >> 4), (high << 4) | (low >> 4), (low & 15) << 4]);
            let interface = name("husk-vx");
            let mac = MacAddress([2, 1, 0, 0, high, low]);
            desired.neighbours.insert(NeighbourKey { interface: interface.clone(), address: block }, mac);
            desired.fdb.insert(FdbKey { interface, mac }, IpAddr::from([192, 168, high, low]));
            let route = Route { mtu: Some(1400), ..over("husk-vx", Some(&block.to_string()), true) };
            desired.routes.insert(key(&format!("{block}/28"), 0), route);
        };
        (0..5000).for_each(|number| add_peer(&mut desired, number));
        assert_eq!(settle(&mut linux, &desired).changes(), 15_001);
        add_peer(&mut desired, 5000);
        let outcome = pass(&mut linux, &desired);
        assert_eq!(outcome.applied, [(Table::Neighbours, 1), (Table::Fdb, 1), (Table::Routes, 1)].into());
    });
}

#[test]
fn the_underlay_is_described_as_it_is() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link set eth0 mtu 1400");
        ip("addr add fd00:7::dead/64 dev eth0 nodad preferred_lft 0");
        ip("route add default via 192.168.7.254");
        ip("-6 route add default via fd00:7::fe src fd00:7::1");
        ip("route add 10.9.0.0/16 via 192.168.7.254 mtu 1300");
        ip("route add unreachable 10.8.0.0/16");
        ip("route add 10.7.0.0/16 nexthop via 192.168.7.3 nexthop via 192.168.7.4");
        ip("link add husk0123456789a type veth peer name pod0");
        let mut socket = Socket::open(Protocol::Route).unwrap();

        let interfaces = underlay::interfaces(&mut socket).unwrap();
        let find = |wanted: &str| interfaces.iter().find(|it| it.name.as_str() == wanted).unwrap();
        assert!(find("lo").loopback && find("lo").kind.is_none());
        assert_eq!((find("eth0").kind.as_deref(), find("eth0").mtu, find("eth0").up), (Some("veth"), 1400, true));
        assert!(find("husk0123456789a").is_husk() && !find("eth0").is_husk());

        let addresses = underlay::addresses(&mut socket).unwrap();
        let lasting: Vec<_> =
            addresses.iter().filter(|it| it.lasting).map(|it| (it.interface.as_str(), it.address, it.length)).collect();
        let expected = [("eth0", address("192.168.7.1"), 24), ("eth0", address("fd00:7::1"), 64)];
        assert_eq!(lasting, expected, "{addresses:?}");
        assert!(addresses.iter().any(|it| it.address == address("fd00:7::dead")), "listed, but not lasting");

        for (family, source) in [(Family::Ipv4, "192.168.7.1"), (Family::Ipv6, "fd00:7::1")] {
            let route = underlay::default_route(&mut socket, family).unwrap().unwrap();
            assert_eq!((route.interface.as_str(), route.source), ("eth0", address(source)));
        }

        let wanted = ["192.168.7.2", "192.0.2.9", "10.9.1.1", "10.8.1.1", "10.7.1.1", "fd00:7::2", "2001:db8::9"];
        let routes = underlay::routes(&mut socket, DualStack::default(), wanted.map(address)).unwrap();
        let shape = |text: &str| routes.get(&address(text)).map(|it| (it.interface.as_str(), it.mtu, it.on_link));
        let limit = |text: &str| routes[&address(text)].limited_by;
        assert_eq!((limit("10.9.1.1"), limit("192.0.2.9")), (RouteLimit::Attribute, RouteLimit::Interface));
        assert_eq!(shape("192.168.7.2"), Some(("eth0", 1400, true)));
        assert_eq!(shape("192.0.2.9"), Some(("eth0", 1400, false)));
        assert_eq!(shape("10.9.1.1"), Some(("eth0", 1300, false)));
        assert_eq!(shape("10.8.1.1"), None);
        assert_eq!(shape("10.7.1.1"), Some(("eth0", 1400, false)));
        assert_eq!(shape("fd00:7::2"), Some(("eth0", 1400, true)));
        assert_eq!(shape("2001:db8::9"), Some(("eth0", 1400, false)));

        ip("route del default");
        assert_eq!(underlay::default_route(&mut socket, Family::Ipv4).unwrap(), None);
        assert!(underlay::routes(&mut socket, DualStack::default(), [address("192.0.2.9")]).unwrap().is_empty());
    });
}

#[test]
fn of_several_ways_the_narrowest_counts_in_any_order() {
    in_a_namespace(|| {
        underlay_interface();
        for (number, mtu) in [(1, 1500), (2, 1400), (3, 1450)] {
            ip(&format!("link add way{number} mtu {mtu} type veth peer name far{number}"));
            ip(&format!("link set far{number} up"));
            ip(&format!("link set way{number} up"));
            ip(&format!("addr add 192.0.2.{number}/32 peer 192.0.2.10{number} dev way{number}"));
            ip(&format!("addr add fd00:{number}::1/64 dev way{number} nodad"));
        }
        for (order, third) in [([1, 2, 3], 1), ([2, 3, 1], 2), ([3, 1, 2], 3)] {
            let hops = |via: fn(i32) -> String| order.map(|it| format!(" nexthop via {}", via(it))).concat();
            ip(&format!("route add 10.{third}.0.0/16{}", hops(|it| format!("192.0.2.10{it}"))));
            ip(&format!("-6 route add fd01:{third}::/64{}", hops(|it| format!("fd00:{it}::9"))));
        }
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let all = [1, 2, 3].into_iter().flat_map(|it| [format!("10.{it}.0.9"), format!("fd01:{it}::9")]);
        let routes = underlay::routes(&mut socket, DualStack::default(), all.map(|it| address(&it))).unwrap();
        assert_eq!(routes.len(), 6);
        for (to, route) in routes {
            assert_eq!((route.interface.as_str(), route.mtu, route.on_link), ("way2", 1400, false), "{to}");
        }
    });
}

#[test]
fn rules_for_the_own_address_are_followed() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link add narrow mtu 1400 type veth peer name far0");
        ip("link set far0 up");
        ip("link set narrow up");
        ip("addr add 192.168.7.7/24 dev eth0");
        ip("addr add fd00:7::7/64 dev eth0 nodad");
        ip("rule add from 192.168.7.7 table 100");
        ip("-6 rule add from fd00:7::7 table 100");
        ip("route add 192.168.7.0/24 dev narrow table 100");
        ip("-6 route add fd00:7::/64 dev narrow table 100");
        let mut socket = Socket::open(Protocol::Route).unwrap();
        for (own, expected) in [(["192.168.7.1", "fd00:7::1"], 1500), (["192.168.7.7", "fd00:7::7"], 1400)] {
            let sources: DualStack = own.map(address).into_iter().collect();
            let to = ["192.168.7.2", "fd00:7::2"].map(address);
            let routes = underlay::routes(&mut socket, sources, to).unwrap();
            let mtus: Vec<u32> = routes.values().map(|route| route.mtu).collect();
            assert_eq!(mtus, [expected; 2], "from {own:?}");
        }
    });
}

/// Sends a router advertisement (RFC 4861, section 4.2) that names an MTU out of an interface.
fn advertise(interface: &str, mtu: u32) {
    let flags = SockFlag::empty();
    let router = nix::sys::socket::socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6).unwrap();
    // What came through a router is no neighbour's word (section 6.1.2).
    setsockopt(&router, sockopt::Ipv6MulticastHops, &255).unwrap();
    let advertisement = [&[134, 0, 0, 0, 64, 0, 0, 0][..], &[0; 8], &[5, 1, 0, 0], &mtu.to_be_bytes()].concat();
    let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let to = SockaddrIn6::from(SocketAddrV6::new(everybody, 0, 0, nix::net::if_::if_nametoindex(interface).unwrap()));
    sendto(router.as_raw_fd(), &advertisement, &to, MsgFlags::empty()).unwrap();
}

#[test]
fn what_a_router_says_of_ipv6s_mtu_is_noticed_and_counts_for_ipv6() {
    in_a_namespace(|| {
        underlay_interface();
        std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "1").unwrap();
        // A router speaks from its link-local address.
        ip("addr add fe80::1/64 dev peer0 nodad");
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let mut mtus = || {
            let interfaces = underlay::interfaces(&mut socket).unwrap();
            let eth0 = interfaces.iter().find(|it| it.name.as_str() == "eth0").unwrap();
            let to = ["192.168.7.2", "fd00:7::2"].map(address);
            let routes = underlay::routes(&mut socket, DualStack::default(), to).unwrap();
            let by_route: Vec<u32> = routes.values().map(|route| route.mtu).collect();
            assert_eq!(by_route, Family::ALL.map(|family| eth0.mtu_for(family)));
            by_route
        };
        assert_eq!(mtus(), [1500, 1500]);
        let monitor = Monitor::open(Subject::Network).unwrap();
        let readable = |timeout: u16| {
            let mut descriptor = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
            poll(&mut descriptor, PollTimeout::from(timeout)).unwrap() == 1
        };
        while readable(1200) {
            monitor.drain().unwrap();
        }
        advertise("peer0", 1400);
        assert!(readable(5000) && monitor.drain().unwrap(), "nobody was told");
        assert_eq!(mtus(), [1500, 1400]);
        // Who writes it himself wakes nobody.
        std::fs::write("/proc/sys/net/ipv6/conf/eth0/mtu", "1300").unwrap();
        assert_eq!(mtus(), [1500, 1300]);
    });
}

#[test]
fn many_routes_are_looked_up_at_once() {
    in_a_namespace(|| {
        underlay_interface();
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let all: Vec<_> = (0..2000_u32).map(|number| IpAddr::V4((0xc0a8_0700 + number).into())).collect();
        let routes = underlay::routes(&mut socket, DualStack::default(), all).unwrap();
        // One /24 is on the link, its last address being for broadcast; nothing leads to the others.
        assert_eq!(routes.len(), 255);
    });
}

#[test]
fn a_monitor_wakes_for_every_kind_of_change_and_only_then() {
    in_a_namespace(|| {
        underlay_interface();
        let monitor = Monitor::open(Subject::Network).unwrap();
        let readable = |timeout: u16| {
            let mut descriptor = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
            poll(&mut descriptor, PollTimeout::from(timeout)).unwrap() == 1
        };
        for change in [
            "link set eth0 mtu 1400",
            "addr add 10.1.0.1/32 dev eth0",
            "addr add fd01::1/128 dev eth0 nodad",
            "route add 10.2.0.0/16 dev eth0",
            "-6 route add fd02::/64 dev eth0",
            "neigh add 10.3.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
            "route del 10.2.0.0/16",
            "rule add from 10.1.0.1 table 100",
            "-6 rule add from fd01::1 table 100",
        ] {
            // Changes of before may still have echoes; wait for silence first.
            while readable(50) {
                monitor.drain().unwrap();
            }
            assert!(!monitor.drain().unwrap());
            ip(change);
            assert!(readable(5000), "{change}");
            assert!(monitor.drain().unwrap(), "{change}");
        }
    });
}

#[test]
fn neighbours_of_the_underlay_come_and_go_without_waking_anybody() {
    in_a_namespace(|| {
        underlay_interface();
        ip("neigh add 192.168.7.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent protocol 72");
        let monitor = Monitor::open(Subject::Network).unwrap();
        // The interfaces' carriers are still being announced, by a kernel that does so once a second at most
        // (net/core/link_watch.c, linkwatch_nextevent); that comes to rest.
        let mut descriptor = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
        while poll(&mut descriptor, PollTimeout::from(1200_u16)).unwrap() == 1 {
            monitor.drain().unwrap();
        }
        for round in 0..50 {
            ip(&format!("neigh replace 192.168.7.9 lladdr 02:00:00:00:01:{round:02x} dev eth0 nud reachable"));
            ip("neigh replace 192.168.7.9 dev eth0 nud stale");
        }
        ip("neigh del 192.168.7.9 dev eth0");
        assert!(!monitor.drain().unwrap());
        for change in [
            "neigh change 192.168.7.2 lladdr 02:00:00:00:00:02 dev eth0 nud reachable",
            "neigh change 192.168.7.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
            "neigh del 192.168.7.2 dev eth0",
        ] {
            ip(change);
            assert!(monitor.drain().unwrap(), "{change}");
        }
    });
}

#[test]
fn a_forwarding_entry_that_goes_wakes() {
    in_a_namespace(|| {
        underlay_interface();
        let (mut linux, mut desired) = (linux(), with_vxlan());
        desired.fdb.insert(FdbKey { interface: name("husk-vx"), mac: mac(10) }, address("192.168.7.2"));
        desired.neighbours.insert(NeighbourKey { interface: name("husk-vx"), address: address("10.42.1.0") }, mac(10));
        settle(&mut linux, &desired);
        let monitor = Monitor::open(Subject::Network).unwrap();
        ip("neigh del 10.42.1.0 dev husk-vx");
        assert!(monitor.drain().unwrap());
        bridge("fdb del 02:00:00:00:00:0a dev husk-vx dst 192.168.7.2");
        assert!(monitor.drain().unwrap());
    });
}

#[test]
fn a_monitor_that_was_not_listened_to_still_wakes() {
    in_a_namespace(|| {
        underlay_interface();
        let monitor = Monitor::open(Subject::Network).unwrap();
        let mut linux = linux();
        let mut desired = with_vxlan();
        for number in 0..3000_u32 {
            let destination = format!("10.{}.{}.0/24", number >> 8, number & 255);
            desired.routes.insert(key(&destination, 9), over("husk-vx", None, false));
        }
        pass(&mut linux, &desired);
        assert!(monitor.drain().unwrap(), "the buffer overran: news all the same");
        assert!(!monitor.drain().unwrap());
    });
}

#[test]
fn an_nftables_change_wakes() {
    in_a_namespace(|| {
        let monitor = Monitor::open(Subject::Nftables).unwrap();
        assert!(!monitor.drain().unwrap());
        let status = Command::new("nft").args(["add", "table", "inet", "stranger"]).status().expect("nft is installed");
        assert!(status.success());
        assert!(monitor.drain().unwrap());
    });
}

#[test]
fn interfaces_are_deleted_by_name_many_at_once() {
    in_a_namespace(|| {
        for number in 0..5 {
            ip(&format!("link add husk0000000000{number} type veth peer name p{number}"));
        }
        let names: Vec<_> = (0..7).map(|number| name(&format!("husk0000000000{number}"))).collect();
        for result in linux().delete_interfaces(&names) {
            result.unwrap();
        }
        assert!(!ip("link show").contains("husk"));
    });
}

#[test]
fn a_pass_over_everything_at_once_and_its_end() {
    in_a_namespace(|| {
        underlay_interface();
        ip("link add husk0123456789a type veth peer name pod0");
        ip("link set husk0123456789a up");
        let mut linux = linux();
        let mut desired = routes_of_every_form();
        let key = NeighbourKey { interface: name("husk-vx"), address: address("10.42.1.0") };
        desired.neighbours.insert(key, mac(10));
        desired.fdb.insert(FdbKey { interface: name("husk-vx"), mac: mac(10) }, address("192.168.7.2"));
        settle(&mut linux, &desired);
        // The device and all it carries is gone: one pass brings it back.
        ip("link del husk-vx");
        settle(&mut linux, &desired);
        // With the device go its addresses and entries; routes elsewhere are removed one by one.
        settle(&mut linux, &Desired::default());
        let mut actual = survey(&mut linux, &Desired::default());
        actual.unread.clear();
        assert_eq!(diff(&Desired::default(), &actual, Sweep::Allowed), []);
    });
}
