//! Packets between two nodes: what gets through, what does not, how large it may be, and that nothing is lost when keys
//! change.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_dataplane::netns::Netns;
use husk_dataplane::xfrm::{self, Xfrm};
use husk_overlay::kernel::{
    Address, Desired, FdbKey, Link, LinkKind, NeighbourKey, Route, RouteKey, RouteTarget, XfrmAction, XfrmDirection,
};
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use husk_overlay::mtu::{Cipher, EspMode, Layer, Stack, inner_mtu};
use husk_overlay::prefix::Family;

use crate::bed::{
    Node, Protection, VXLAN_PORT, ip, linux, name, nodes, pass, read, run, settle, transport, tunnel, with_esp,
};

const UNDERLAY_MTU: u32 = 1500;

/// How long anything may take on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node in its namespace.
struct Host {
    node: Node,
    netns: Netns,
}

impl Host {
    fn inside<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        self.netns.run_in(body).unwrap()
    }

    /// Makes its kernel as desired.
    fn settle(&self, desired: &Desired) {
        self.inside(|| drop(settle(&mut linux(), desired, &self.node.keys())));
    }

    /// True if a packet of so many bytes that must not be fragmented is answered.
    fn reaches(&self, peer: &Node, inner: Family, bytes: u32) -> Result<(), String> {
        let headers = if inner == Family::Ipv4 { 28 } else { 48 };
        let arguments = format!("-c 1 -W 10 -M do -s {} {}", bytes - headers, peer.router(inner));
        self.inside(|| ping(&arguments)).map(drop)
    }

    fn packets(&self, spi: u32) -> u64 {
        let states = self.inside(|| Xfrm::open().unwrap().states().unwrap());
        states.iter().find(|(key, _)| key.spi == spi).map_or(0, |(_, state)| state.packets)
    }

    /// Counters of dropped packets that are not zero.
    fn drops(&self) -> BTreeMap<String, u64> {
        self.inside(xfrm::statistics).into_iter().filter(|(_, count)| *count > 0).collect()
    }
}

/// What `ping` said, as an error if there was no answer.
fn ping(arguments: &str) -> Result<String, String> {
    let output = Command::new("ping").args(arguments.split_whitespace()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(text) } else { Err(text + &String::from_utf8_lossy(&output.stderr)) }
}

/// Two hosts with a wire between them.
fn wired(underlay: Family) -> (Host, Host) {
    let (a, b) = nodes(underlay);
    let host = |node| Host { node, netns: Netns::new_unnamed().unwrap() };
    let (a, b) = (host(a), host(b));
    let far = format!("/proc/{}/fd/{}", std::process::id(), b.netns.as_fd().as_raw_fd());
    a.inside(|| ip(&format!("link add eth0 mtu 1500 type veth peer name eth0 mtu 1500 netns {far}")));
    for host in [&a, &b] {
        let length = if underlay == Family::Ipv4 { "/24" } else { "/64 nodad" };
        host.inside(|| {
            ip("link set lo up");
            ip(&format!("address add {}{length} dev eth0", host.node.address));
            ip("link set eth0 up");
        });
    }
    (a, b)
}

fn address(interface: &str, address: std::net::IpAddr) -> Address {
    Address { interface: name(interface), address, length: Family::of(address).bits() }
}

fn route(own: &Node, peer: &Node, family: Family, target: RouteTarget, mtu: u32) -> (RouteKey, Route) {
    let metric = if family == Family::Ipv4 { 0 } else { 1024 };
    let key = RouteKey { table: 254, destination: peer.block(family), metric };
    (key, Route { target, source: Some(own.router(family)), mtu: Some(mtu) })
}

/// What `own` should have of `peer` in mode `ipsec`.
fn ipsec(protection: Protection, own: &Node, peer: &Node, mtu: u32) -> Desired {
    let mut desired = Desired::default();
    let kind = LinkKind::Xfrm { if_id: marks::XFRM_IF_ID };
    desired.links.insert(name(marks::XFRM_INTERFACE), Link { kind, mtu, mac: None, threaded_napi: false });
    for family in Family::ALL {
        desired.addresses.insert(address(marks::XFRM_INTERFACE, own.router(family)));
        let interface = name(marks::XFRM_INTERFACE);
        let target = RouteTarget::Interface { interface, via: None, onlink: false };
        desired.routes.extend([route(own, peer, family, target, mtu)]);
    }
    protection.add(&mut desired, own, peer);
    desired
}

/// What `own` should have of `peer` in mode `vxlan-ipsec`.
fn vxlan(protection: Protection, own: &Node, peer: &Node, mtu: u32) -> Desired {
    let mac = |node: &Node| MacAddress([2, 0, 0, 0, 0, node.number]);
    let interface = name(marks::VXLAN_INTERFACE);
    let mut desired = Desired::default();
    let kind = LinkKind::Vxlan { vni: 1, port: VXLAN_PORT, local: own.address };
    desired.links.insert(interface.clone(), Link { kind, mtu, mac: Some(mac(own)), threaded_napi: false });
    desired.fdb.insert(FdbKey { interface: interface.clone(), mac: mac(peer) }, peer.address);
    for family in Family::ALL {
        desired.addresses.insert(address(marks::VXLAN_INTERFACE, own.router(family)));
        let router = peer.router(family);
        desired.neighbours.insert(NeighbourKey { interface: interface.clone(), address: router }, mac(peer));
        let target = RouteTarget::Interface { interface: interface.clone(), via: Some(router), onlink: true };
        desired.routes.extend([route(own, peer, family, target, mtu)]);
    }
    protection.add(&mut desired, own, peer);
    desired
}

fn largest(protection: Protection, underlay: Family) -> u32 {
    let udp_encapsulation = protection.udp.is_some();
    let esp = Layer::Esp { mode: protection.mode, cipher: Cipher::AesGcm, udp_encapsulation };
    let layers = match protection.mode {
        EspMode::Tunnel => vec![esp],
        EspMode::Transport => vec![esp, Layer::Vxlan],
    };
    inner_mtu(&Stack(layers), underlay, UNDERLAY_MTU).unwrap()
}

/// Counts at all hooks how packets look to nftables.
const PROBE: &str = r#"table inet probe {
    chain output { type filter hook output priority 0
        oifname "husk-ipsec" counter comment "output: inner over husk-ipsec"
        oifname "eth0" meta l4proto { icmp, ipv6-icmp } rt ipsec exists counter comment "output: inner over eth0 with transform"
        oifname "eth0" meta l4proto esp rt ipsec missing counter comment "output: esp without transform"
        oifname "eth0" meta l4proto esp rt ipsec exists counter comment "output: esp with transform"
        udp dport 4789 rt ipsec exists counter comment "output: vxlan with transform"
        udp dport 4789 rt ipsec missing counter comment "output: vxlan without transform"
    }
    chain postrouting { type filter hook postrouting priority 0
        oifname "husk-ipsec" counter comment "post: inner over husk-ipsec"
        oifname "eth0" meta l4proto { icmp, ipv6-icmp } ip6 hoplimit != 255 rt ipsec missing counter comment "post: inner over eth0 without transform"
        oifname "eth0" ip protocol icmp rt ipsec missing counter comment "post: inner4 over eth0 without transform"
        oifname "eth0" meta l4proto { icmp, ipv6-icmp } rt ipsec exists counter comment "post: inner over eth0 with transform"
        oifname "eth0" meta l4proto esp rt ipsec missing counter comment "post: esp without transform"
        oifname "eth0" meta l4proto esp rt ipsec exists counter comment "post: esp with transform"
        oifname "eth0" udp dport 4500 rt ipsec missing counter comment "post: esp in udp without transform"
        udp dport 4789 rt ipsec exists counter comment "post: vxlan with transform"
        udp dport 4789 rt ipsec missing counter comment "post: vxlan without transform"
    }
    chain prerouting { type filter hook prerouting priority 0
        iifname "eth0" meta l4proto esp counter comment "pre: esp over eth0"
        iifname "husk-ipsec" meta ipsec exists counter comment "pre: inner over husk-ipsec decrypted"
        iifname "husk-ipsec" meta ipsec missing counter comment "pre: inner over husk-ipsec not decrypted"
        iifname "eth0" ip protocol icmp counter comment "pre: inner4 over eth0"
        udp dport 4789 meta ipsec exists counter comment "pre: vxlan decrypted"
        udp dport 4789 meta ipsec missing counter comment "pre: vxlan not decrypted"
    }
    chain input { type filter hook input priority 0
        iifname "husk-ipsec" meta ipsec exists counter comment "input: inner over husk-ipsec decrypted"
        iifname "husk-ipsec" meta ipsec missing counter comment "input: inner over husk-ipsec not decrypted"
        udp dport 4789 meta ipsec exists counter comment "input: vxlan decrypted"
        udp dport 4789 meta ipsec missing counter comment "input: vxlan not decrypted"
        udp dport 4500 counter comment "input: esp in udp"
    }
}"#;

/// Packets by comment.
fn probed() -> BTreeMap<String, u64> {
    let text = run("nft", "list table inet probe");
    let rule = |line: &str| {
        let count = line.split("packets ").nth(1)?.split(' ').next()?.parse().ok()?;
        Some((line.split("comment \"").nth(1)?.trim_end_matches('"').to_owned(), count))
    };
    text.lines().filter_map(rule).collect()
}

fn install_probe() {
    let file = std::env::temp_dir().join(format!("husk-probe-{:?}", std::thread::current().id()));
    std::fs::write(&file, PROBE).unwrap();
    run("nft", &format!("-f {}", file.display()));
    std::fs::remove_file(file).unwrap();
}

/// What was seen at a hook, and how often.
fn seen(probes: &BTreeMap<String, u64>, expected: &[(&str, bool)]) {
    for (comment, some) in expected {
        assert_eq!(probes[*comment] > 0, *some, "{comment}: {probes:#?}");
    }
}

/// Every packet up to the MTU that the plan computes gets through and none larger, of either family in either family.
fn sizes(protection: Protection, make: fn(Protection, &Node, &Node, u32) -> Desired) {
    for underlay in Family::ALL {
        let (a, b) = wired(underlay);
        let largest = largest(protection, underlay);
        // First as the plan makes it, then with nothing in the way but what the kernel itself reckons.
        let mut sockets = Vec::new();
        for host in [&a, &b] {
            if let Some((_, port)) = protection.udp {
                let any = if underlay == Family::Ipv4 { "0.0.0.0" } else { "::" }.parse().unwrap();
                sockets.push(host.inside(|| xfrm::encapsulation_socket(std::net::SocketAddr::new(any, port)).unwrap()));
            }
        }
        a.settle(&make(protection, &a.node, &b.node, largest));
        b.settle(&make(protection, &b.node, &a.node, largest));
        for inner in Family::ALL {
            a.reaches(&b.node, inner, 100).unwrap_or_else(|error| {
                panic!("{inner} in {underlay} {protection:?}: {error}; {:?} {:?}", a.drops(), b.drops())
            });
            a.reaches(&b.node, inner, largest).unwrap();
            b.reaches(&a.node, inner, largest).unwrap();
            assert!(
                a.reaches(&b.node, inner, largest + 1).is_err(),
                "{inner} in {underlay}: beyond the interface's MTU"
            );
        }
        if protection.mode == EspMode::Tunnel {
            a.inside(|| drop(pass(&mut linux(), &make(protection, &a.node, &b.node, UNDERLAY_MTU), &a.node.keys())));
            b.inside(|| drop(pass(&mut linux(), &make(protection, &b.node, &a.node, UNDERLAY_MTU), &b.node.keys())));
            for inner in Family::ALL {
                a.reaches(&b.node, inner, largest).unwrap();
                let told = a.reaches(&b.node, inner, largest + 1).unwrap_err();
                assert!(
                    told.contains(&format!("mtu={largest}")) || told.contains(&format!("mtu = {largest}")),
                    "{told}"
                );
            }
        }
    }
}

#[test]
fn in_tunnel_mode_the_mtu_is_exact_and_either_family_goes_in_either() {
    with_esp(|_| {
        sizes(tunnel(1), ipsec);
        sizes(Protection { udp: Some((4500, 4500)), ..tunnel(1) }, ipsec);
    });
}

#[test]
fn in_transport_mode_the_mtu_is_exact_and_either_family_goes_in_either() {
    with_esp(|_| {
        sizes(transport(1), vxlan);
        sizes(Protection { udp: Some((4500, 4500)), ..transport(1) }, vxlan);
    });
}

/// What the firewall relies on: how packets in a tunnel look at each hook.
#[test]
fn hooks_see_inner_packets_with_their_transform_ahead_and_behind() {
    with_esp(|_| {
        let (a, b) = wired(Family::Ipv4);
        a.settle(&ipsec(tunnel(1), &a.node, &b.node, 1400));
        b.settle(&ipsec(tunnel(1), &b.node, &a.node, 1400));
        a.inside(install_probe);
        b.inside(install_probe);
        a.reaches(&b.node, Family::Ipv4, 100).unwrap();
        let (sent, received) = (a.inside(probed), b.inside(probed));
        seen(
            &sent,
            &[
                ("output: inner over husk-ipsec", true),
                ("post: inner over husk-ipsec", true),
                ("post: inner4 over eth0 without transform", false),
                ("post: inner over eth0 with transform", true),
                ("post: esp without transform", true),
                ("post: esp with transform", false),
            ],
        );
        seen(
            &received,
            &[
                ("pre: esp over eth0", true),
                ("pre: inner over husk-ipsec decrypted", true),
                ("pre: inner over husk-ipsec not decrypted", false),
                ("pre: inner4 over eth0", false),
                ("input: inner over husk-ipsec decrypted", true),
                ("input: inner over husk-ipsec not decrypted", false),
            ],
        );
    });
}

#[test]
fn hooks_see_vxlan_with_its_transform_ahead_and_behind_and_plaintext_is_blocked() {
    with_esp(|_| {
        let (a, b) = wired(Family::Ipv4);
        let mut wanted = vxlan(transport(1), &a.node, &b.node, 1400);
        a.settle(&wanted);
        b.settle(&vxlan(transport(1), &b.node, &a.node, 1400));
        a.inside(install_probe);
        b.inside(install_probe);
        a.reaches(&b.node, Family::Ipv4, 100).unwrap();
        let (sent, received) = (a.inside(probed), b.inside(probed));
        seen(
            &sent,
            &[
                ("post: vxlan with transform", true),
                ("post: vxlan without transform", false),
                ("post: esp without transform", true),
            ],
        );
        seen(&received, &[("input: vxlan decrypted", true), ("input: vxlan not decrypted", false)]);
        // Without its association the sender sends nothing at all.
        wanted.xfrm_states.clear();
        a.settle(&wanted);
        let refused = a.reaches(&b.node, Family::Ipv4, 100).unwrap_err();
        let without_state = a.drops();
        // Without its policy neither: the block is what is left.
        wanted.xfrm_policies.retain(|_, policy| policy.action == XfrmAction::Block);
        a.settle(&wanted);
        a.reaches(&b.node, Family::Ipv4, 100).unwrap_err();
        assert!(without_state["XfrmOutNoStates"] > 0, "{refused}: {without_state:?}");
        assert!(a.drops()["XfrmOutPolBlock"] > 0);
        // Who has no policies at all sends plaintext, which the receiver's kernel drops.
        wanted.xfrm_policies.clear();
        a.settle(&wanted);
        a.reaches(&b.node, Family::Ipv4, 100).unwrap_err();
        assert!(b.drops().contains_key("XfrmInTmplMismatch"), "{:?}", b.drops());
        seen(&a.inside(probed), &[("post: vxlan without transform", true)]);
        // nftables sees it before that, as what it is.
        seen(&b.inside(probed), &[("input: vxlan not decrypted", true)]);
    });
}

/// Nothing leaves without a policy, nothing comes from addresses that are not the peer's, and nothing comes in the clear.
#[test]
fn the_interface_fails_closed() {
    with_esp(|_| {
        let (a, b) = wired(Family::Ipv4);
        a.settle(&ipsec(tunnel(1), &a.node, &b.node, 1400));
        b.settle(&ipsec(tunnel(1), &b.node, &a.node, 1400));
        a.reaches(&b.node, Family::Ipv4, 100).unwrap();
        assert_eq!((a.drops(), b.drops()), (BTreeMap::new(), BTreeMap::new()));
        // A source outside the sender's own blocks.
        a.inside(|| ip("address add 10.99.0.1/32 dev husk-ipsec"));
        a.inside(|| ping("-c 1 -W 2 -I 10.99.0.1 10.42.2.1")).unwrap_err();
        assert!(b.drops().get("XfrmInNoPols").is_some_and(|count| *count > 0), "{:?}", b.drops());
        // A destination without a policy.
        a.inside(|| ip("route add 10.77.0.0/16 dev husk-ipsec"));
        let refused = a.inside(|| ping("-c 1 -W 2 10.77.0.1")).unwrap_err();
        assert!(refused.contains("Destination Host Unreachable"), "{refused}");
        // In the clear, over the underlay: policies with an interface id say nothing of it. To keep it out is the firewall's
        // task.
        a.inside(|| ip("route replace 10.42.2.0/24 via 192.168.7.2 src 10.42.1.1"));
        let before = b.drops();
        a.inside(|| ping("-c 1 -W 10 10.42.2.1")).unwrap();
        assert_eq!(b.drops(), before);
    });
}

/// The policy names the association that is used, whatever others there are.
#[test]
fn what_is_sent_uses_the_association_that_the_policy_names() {
    with_esp(|_| {
        let (a, b) = wired(Family::Ipv6);
        let mut wanted = ipsec(tunnel(1), &a.node, &b.node, 1300);
        let mut far = ipsec(tunnel(1), &b.node, &a.node, 1300);
        for epoch in 2..4 {
            wanted.xfrm_states.extend([tunnel(epoch).state(&a.node, &b.node)]);
            far.xfrm_states.extend([tunnel(epoch).state(&a.node, &b.node)]);
        }
        b.settle(&far);
        for epoch in [2, 1, 3] {
            let spi = tunnel(epoch).state(&a.node, &b.node).0.spi;
            send_with(&mut wanted, spi);
            a.settle(&wanted);
            let before = (a.packets(spi), b.packets(spi));
            a.reaches(&b.node, Family::Ipv4, 100).unwrap();
            a.reaches(&b.node, Family::Ipv6, 100).unwrap();
            // Neighbour discovery and reports of group membership may add to it.
            assert!(a.packets(spi) >= before.0 + 2 && b.packets(spi) >= before.1 + 2, "epoch {epoch}");
            let others =
                (1..4).filter(|other| *other != epoch).map(|other| tunnel(other).state(&a.node, &b.node).0.spi);
            let idle: Vec<_> = others.map(|spi| (spi, a.packets(spi))).collect();
            a.reaches(&b.node, Family::Ipv4, 100).unwrap();
            assert!(idle.iter().all(|(spi, packets)| a.packets(*spi) == *packets), "epoch {epoch}");
        }
    });
}

fn send_with(desired: &mut Desired, spi: u32) {
    for (key, policy) in &mut desired.xfrm_policies {
        if let (XfrmDirection::Out, XfrmAction::Protect(template)) = (key.direction, &mut policy.action) {
            template.spi = Some(spi);
        }
    }
}

/// Packets from one host to another and back, several on their way at any time, until it is stopped.
struct Flood {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<(u64, u64)>,
}

impl Flood {
    /// Packets on their way at a time.
    const BURST: u64 = 8;

    fn start(a: &Host, b: &Host) -> Self {
        let local = |host: &Host| std::net::SocketAddr::new(host.node.router(Family::Ipv4), 7000);
        let (from, to) = (local(a), local(b));
        let echo = b.inside(|| UdpSocket::bind(to).unwrap());
        let socket = a.inside(|| UdpSocket::bind(from).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        for socket in [&echo, &socket] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        std::thread::spawn(move || {
            let mut buffer = [0; 8];
            while let Ok((length, back)) = echo.recv_from(&mut buffer) {
                echo.send_to(&buffer[..length], back).unwrap();
            }
        });
        let stopped = Arc::clone(&stop);
        let sender = std::thread::spawn(move || {
            let (mut sent, mut answered) = (0, 0);
            let mut buffer = [0; 8];
            while !stopped.load(Ordering::Relaxed) {
                for number in sent..sent + Self::BURST {
                    socket.send_to(&number.to_be_bytes(), to).unwrap();
                }
                sent += Self::BURST;
                answered += (0..Self::BURST).take_while(|_| socket.recv(&mut buffer).is_ok()).count() as u64;
            }
            (sent, sent - answered)
        });
        Self { stop, sender }
    }

    /// How many packets were sent, and how many of them were not answered.
    fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap()
    }
}

/// Six rotations under a flood of packets, each answered.
fn rotate(protection: fn(u64) -> Protection, make: fn(Protection, &Node, &Node, u32) -> Desired) {
    let (a, b) = wired(Family::Ipv4);
    let mut wanted = make(protection(1), &a.node, &b.node, 1300);
    let mut far = make(protection(1), &b.node, &a.node, 1300);
    a.settle(&wanted);
    b.settle(&far);
    a.reaches(&b.node, Family::Ipv4, 100).unwrap();
    let flood = Flood::start(&a, &b);
    for epoch in 2..8 {
        let (key, state) = protection(epoch).state(&a.node, &b.node);
        far.xfrm_states.insert(key, state.clone());
        b.settle(&far);
        wanted.xfrm_states.insert(key, state);
        a.settle(&wanted);
        send_with(&mut wanted, key.spi);
        a.settle(&wanted);
        let start = Instant::now();
        while b.packets(key.spi) < 50 {
            assert!(start.elapsed() < PATIENCE, "nothing arrives in epoch {epoch}: {:?} {:?}", a.drops(), b.drops());
            std::thread::sleep(Duration::from_millis(5));
        }
        // What is received confirms that nothing is sent under the old key any more.
        let old = protection(epoch - 1).state(&a.node, &b.node).0;
        wanted.xfrm_states.remove(&old);
        a.settle(&wanted);
        far.xfrm_states.remove(&old);
        b.settle(&far);
    }
    let (sent, lost) = flood.stop();
    assert!(sent > 300, "{sent} packets: it was no flood");
    assert_eq!(lost, 0, "of {sent}: {:?} {:?}", a.drops(), b.drops());
    assert_eq!((a.drops(), b.drops()), (BTreeMap::new(), BTreeMap::new()));
    let left = a.inside(|| read(&mut linux(), &wanted).xfrm_states.len());
    assert_eq!(left, 2, "one for each direction");
}

#[test]
fn nothing_is_lost_when_keys_change_in_tunnel_mode() {
    with_esp(|_| rotate(tunnel, ipsec));
}

#[test]
fn nothing_is_lost_when_keys_change_in_transport_mode() {
    with_esp(|_| rotate(transport, vxlan));
}
