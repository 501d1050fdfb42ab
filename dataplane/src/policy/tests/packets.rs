//! Real packets, between two hosts through a router that has the table.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Names of interfaces of pods.
const PODS: [&str; 2] = ["huskaaaaaaaaaaa", "huskbbbbbbbbbbb"];

/// A router between a client and a server.
struct World {
    router: Netns,
    hosts: [Netns; 2],
}

impl World {
    fn new(interfaces: [&str; 2]) -> Self {
        let namespace = || {
            let namespace = Netns::new_unnamed().unwrap();
            // Addresses can be used at once.
            let path = "/proc/sys/net/ipv6/conf/default/accept_dad";
            namespace.run_in(|| std::fs::write(path, "0").unwrap()).unwrap();
            namespace
        };
        let world = Self { router: namespace(), hosts: [(); 2].map(|()| namespace()) };
        world
            .router
            .run_in(|| {
                for (interface, host) in interfaces.iter().zip(&world.hosts) {
                    let namespace = format!("/proc/{}/fd/{}", std::process::id(), host.as_fd().as_raw_fd());
                    run("ip", &["link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", &namespace]);
                }
                for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
                    std::fs::write(format!("/proc/sys/{path}"), "1").unwrap();
                }
                for (interface, n) in interfaces.iter().zip(1..) {
                    up(interface, n, 1);
                }
            })
            .unwrap();
        for (host, n) in world.hosts.iter().zip(1..) {
            host.run_in(|| {
                up("eth0", n, 2);
                run("ip", &["route", "add", "default", "via", &format!("10.{n}.0.1")]);
                run("ip", &["-6", "route", "add", "default", "via", &format!("fd0{n}::1")]);
            })
            .unwrap();
        }
        // Links and neighbours are up when a question was answered.
        for family in Family::ALL {
            assert!((0..20).any(|_| world.talk(family, 9)), "{family}");
        }
        world
    }

    /// Makes the table what the router has.
    fn enforce(&self, table: &PolicyTable) {
        self.router.run_in(|| converge(table)).unwrap();
    }

    fn packets(&self, counter: &str) -> u64 {
        self.router.run_in(|| read_counters().unwrap()[counter].packets).unwrap()
    }

    fn socket(&self, host: usize, port: u16, family: Family) -> UdpSocket {
        let bind = || UdpSocket::bind(SocketAddr::new(address(host, family), port)).unwrap();
        let socket = self.hosts[host].run_in(bind).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket
    }

    /// Sends a datagram from the client to a server at that port; true if it arrives and the answer comes back.
    fn talk(&self, family: Family, port: u16) -> bool {
        let (client, server) = (self.socket(0, 0, family), self.socket(1, port, family));
        client.send_to(b"question", server.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 16];
        let Ok((_, from)) = server.recv_from(&mut buffer) else { return false };
        server.send_to(b"answer", from).unwrap();
        client.recv_from(&mut buffer).is_ok()
    }
}

fn up(interface: &str, n: u8, host: u8) {
    run("ip", &["address", "add", &format!("10.{n}.0.{host}/24"), "dev", interface]);
    run("ip", &["address", "add", &format!("fd0{n}::{host}/64"), "dev", interface, "nodad"]);
    run("ip", &["link", "set", interface, "up"]);
}

/// Address of the client (0) or the server (1).
fn address(host: usize, family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => format!("10.{}.0.2", host + 1),
        Family::Ipv6 => format!("fd0{}::2", host + 1),
    }
    .parse()
    .unwrap()
}

fn hosts(family: Family, host: usize) -> Arc<PolicySet> {
    set(PolicyKey::Address(family), &[&address(host, family).to_string()])
}

#[test]
fn a_peer_reaches_the_services_of_its_class_with_answers_and_errors_and_no_others() {
    let world = World::new(PODS);
    for family in Family::ALL {
        let client = address(0, family);
        let peer = PolicyElement::AddressRange(client, client);
        let elements = [(peer, PolicyValue::Class(7))].into();
        let peers = PolicySet { key: PolicyKey::AddressRange(family), value: PolicyValueKind::Class, elements };
        let of = |class: PolicyClass| {
            let judge = PolicyAction::Judge { class, services: "services".into() };
            let services = [("7 . 17 . 5000-5001", "accept"), ("9 . 0-255 . 0-65535", "accept")];
            table(
                &["denied", "seen"],
                vec![("peers", Arc::new(peers.clone())), ("services", verdicts(PolicyKey::ClassAndService, &services))],
                vec![(
                    "forward",
                    chain(
                        Some((Hook::Forward, 0)),
                        vec![
                            rule(&[PolicyMatch::Family(if family == V4 { V6 } else { V4 })], act("return")),
                            counted("seen", rule(&[PolicyMatch::FromPod], PolicyAction::Continue)),
                            rule(&[], judge),
                            counted("denied", rule(&[], act("drop"))),
                        ],
                    ),
                )],
            )
        };
        let originator = || PolicyClass::Of(PolicyField::Originator(family), "peers".into());
        world.enforce(&of(originator()));
        assert!(world.talk(family, 5000), "{family}");
        assert_eq!((world.packets("seen"), world.packets("denied")), (2, 0), "{family}");
        assert!(!world.talk(family, 5002), "{family}");
        assert_eq!((world.packets("seen"), world.packets("denied")), (3, 1), "{family}");
        // Nobody listens: the error is about a connection that may be.
        let client = world.socket(0, 0, family);
        client.connect(SocketAddr::new(address(1, family), 5001)).unwrap();
        client.send(b"question").unwrap();
        let error = client.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{family}");
        assert_eq!(world.packets("denied"), 1, "{family}");
        // Who has no class, and classes that are given.
        world.enforce(&of(PolicyClass::Of(PolicyField::Responder(family), "peers".into())));
        assert!(!world.talk(family, 5000), "{family}");
        world.enforce(&of(PolicyClass::Always(9)));
        assert!(world.talk(family, 5002), "{family}");
        world.enforce(&of(PolicyClass::Always(7)));
        assert!(!world.talk(family, 5003) && world.talk(family, 5001), "{family}");
        world.router.run_in(|| nft("delete table inet husk-policy")).unwrap();
    }
}

/// A rule for each match, which counts: (name, match, packets of a question and an answer that it is to count).
fn matches(family: Family, tunnels: bool) -> Vec<(&'static str, PolicyMatch, u64)> {
    let other = if family == V4 { V6 } else { V4 };
    let not_in = |field, set: &str| PolicyMatch::NotIn(field, set.into());
    let through_pod = if tunnels { 1 } else { 2 };
    vec![
        ("from pod", PolicyMatch::FromPod, through_pod),
        ("to pod", PolicyMatch::ToPod, through_pod),
        ("family", PolicyMatch::Family(family), 2),
        ("other family", PolicyMatch::Family(other), 0),
        ("stateless", PolicyMatch::Stateless, 0),
        ("from client", is_in(PolicyField::Source(family), "client"), 1),
        ("to client", is_in(PolicyField::Destination(family), "client"), 1),
        ("client began", is_in(PolicyField::Originator(family), "client"), 2),
        ("server began", is_in(PolicyField::Originator(family), "server"), 0),
        ("client answers", is_in(PolicyField::Responder(family), "client"), 0),
        ("server answers", is_in(PolicyField::Responder(family), "server"), 2),
        ("both", is_in(PolicyField::OriginatorAndResponder(family), "both"), 2),
        ("both reversed", is_in(PolicyField::OriginatorAndResponder(family), "reversed"), 0),
        ("not from client", not_in(PolicyField::Source(family), "client"), 1),
        ("client began not", not_in(PolicyField::Originator(family), "client"), 0),
        ("server began not", not_in(PolicyField::Originator(family), "server"), 2),
        ("not from other", not_in(PolicyField::Source(other), "other"), 0),
        ("other began not", not_in(PolicyField::Originator(other), "other"), 0),
    ]
}

#[test]
fn every_match_matches_what_it_says_in_both_directions() {
    for interfaces in [PODS, ["huskaaaaaaaaaaa", "husk-vx"]] {
        let world = World::new(interfaces);
        for family in Family::ALL {
            let other = if family == V4 { V6 } else { V4 };
            let all = matches(family, interfaces != PODS);
            let name = |text: &str| text.replace(' ', "-");
            let names: Vec<String> = all.iter().map(|(text, ..)| name(text)).collect();
            let rules = all
                .iter()
                .map(|(text, it, _)| counted(&name(text), rule(std::slice::from_ref(it), PolicyAction::Continue)));
            let pair = |one, two| {
                let elements =
                    [(PolicyElement::AddressPair(address(one, family), address(two, family)), PolicyValue::None)];
                Arc::new(PolicySet {
                    key: PolicyKey::AddressPair(family),
                    value: PolicyValueKind::None,
                    elements: elements.into(),
                })
            };
            let client = address(0, family).to_string();
            let mut rules: Vec<_> = rules.collect();
            rules.push(rule(&[], PolicyAction::Lookup(PolicyField::Source(family), "led".into())));
            world.enforce(&table(
                &names.iter().map(String::as_str).chain(["led"]).collect::<Vec<_>>(),
                vec![
                    ("client", hosts(family, 0)),
                    ("server", hosts(family, 1)),
                    ("other", hosts(other, 0)),
                    ("both", pair(0, 1)),
                    ("reversed", pair(1, 0)),
                    ("led", verdicts(PolicyKey::Address(family), &[(client.as_str(), "goto led")])),
                ],
                vec![
                    ("forward", chain(Some((Hook::Forward, 0)), rules)),
                    ("led", chain(None, vec![counted("led", rule(&[], PolicyAction::Continue))])),
                ],
            ));
            assert!(world.talk(family, 5000), "{family} {interfaces:?}");
            for ((text, _, expected), name) in all.iter().zip(&names) {
                assert_eq!(world.packets(name), *expected, "{text} {family} {interfaces:?}");
            }
            assert_eq!(world.packets("led"), 1);
            // Packets that connection tracking does not know have no originator.
            let before = world.packets("server-began-not");
            let untracked = "add table inet raw; add chain inet raw c { type filter hook prerouting priority -300; }; \
                             add rule inet raw c notrack";
            world.router.run_in(|| nft(untracked)).unwrap();
            assert!(world.talk(family, 5000));
            assert_eq!((world.packets("stateless"), world.packets("server-began-not")), (2, before));
            world.router.run_in(|| nft("delete table inet raw; delete table inet husk-policy")).unwrap();
        }
    }
}

#[test]
fn a_limit_lets_as_many_packets_through_as_it_says() {
    let world = World::new(PODS);
    let below = rule(&[PolicyMatch::Below { rate: 1, burst: 3 }], PolicyAction::Continue);
    world.enforce(&table(
        &["below"],
        vec![],
        vec![("forward", chain(Some((Hook::Forward, 0)), vec![counted("below", below)]))],
    ));
    let client = world.socket(0, 0, V4);
    for _ in 0..20 {
        client.send_to(b"question", (address(1, V4), 5000)).unwrap();
    }
    // The first one may wait for the address of the server to be resolved.
    thread::sleep(Duration::from_millis(200));
    let count = world.packets("below");
    assert!((3..6).contains(&count), "{count}");
}

#[test]
fn packets_meet_the_old_rules_or_the_new_ones() {
    const CHANGES: u8 = 200;
    let world = World::new(PODS);
    // The client's range stays, its neighbours come and go and grow; every tenth time the chain is rebuilt and a set replaced.
    let at = |n: u8| {
        let mut elements = vec![("10.1.0.2-10.1.0.2", PolicyValue::Class(7))];
        if n.is_multiple_of(2) {
            elements.push(("10.1.0.3-10.1.0.9", PolicyValue::Class(8)));
        }
        if n.is_multiple_of(3) {
            elements.push(("0.0.0.0-10.1.0.1", PolicyValue::Class(9)));
        } else {
            elements.push(("10.0.0.0-10.1.0.0", PolicyValue::Class(9)));
        }
        let peers = set_of(PolicyKey::AddressRange(V4), PolicyValueKind::Class, &elements);
        let services = verdicts(PolicyKey::ClassAndService, &[("7 . 17 . 5000", "accept")]);
        let class = PolicyClass::Of(PolicyField::Originator(V4), "peers".into());
        let judge = rule(&[], PolicyAction::Judge { class, services: "services".into() });
        let mut rules = vec![judge, counted("denied", rule(&[], act("drop")))];
        if n / 10 % 2 == 1 {
            rules
                .insert(0, rule(&[PolicyMatch::NotIn(PolicyField::Source(V4), "kind".into())], PolicyAction::Continue));
        }
        let kind = if n / 20 % 2 == 1 { PolicyKey::AddressRange(V4) } else { PolicyKey::Address(V4) };
        table(
            &["denied"],
            vec![("peers", peers), ("services", services), ("kind", set(kind, &["192.0.2.1"]))],
            vec![("forward", chain(Some((Hook::Forward, 0)), rules))],
        )
    };
    world.enforce(&at(0));
    let (client, server) = (world.socket(0, 0, V4), world.socket(1, 5000, V4));
    let done = AtomicBool::new(false);
    let (sent, received) = thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let to = server.local_addr().unwrap();
            let mut sent = 0_u64;
            while !done.load(Ordering::Relaxed) {
                client.send_to(b"question", to).unwrap();
                sent += 1;
                thread::sleep(Duration::from_micros(50));
            }
            sent
        });
        let count = scope.spawn(|| {
            let mut received = 0_u64;
            while server.recv_from(&mut [0; 16]).is_ok() {
                received += 1;
            }
            received
        });
        let start = Instant::now();
        world
            .router
            .run_in(|| {
                let mut live = Live::default();
                for n in 1..=CHANGES {
                    let table = at(n);
                    let changes = diff(Some(&table), live.read().unwrap().as_deref());
                    assert!(!live.apply(&changes, Some(&table)).unwrap().replaced, "{changes:?}");
                    thread::sleep(Duration::from_millis(2));
                }
            })
            .unwrap();
        println!("{CHANGES} changes in {:?}", start.elapsed());
        done.store(true, Ordering::Relaxed);
        (flood.join().unwrap(), count.join().unwrap())
    });
    println!("{sent} packets");
    assert!(sent > 500, "{sent}");
    assert_eq!((received, world.packets("denied")), (sent, 0));
}
