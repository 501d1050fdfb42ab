//! Packet-too-big: from a router between the hosts and from a host to its pods, through policy and address translation, the
//! true and the forged.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::cluster::Router;
use husk_tests::forgery::{Forgery, dropped};
use husk_tests::paths::{await_exact, inner_mtu, is_exact, least_underlay_mtu, segments_offered};
use husk_tests::pod::Served;
use husk_tests::policy::scene::{Scene, Service};
use husk_tests::probe::{Datagram, Echo, EchoServer, Reach, Stream, path_mtu, tcp};
use husk_tests::{Cluster, Family, Kind, Mode, Packet, Signal, eventually, patience};
use serde_json::json;

/// How long what a kernel or a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a TCP connection may stand still after the path has changed: the packets under way are lost, and the first that is
/// sent again, after a fifth of a second or a little more, is told its size.
const RECOVERED: Duration = Duration::from_secs(3);

/// Bytes per second of the TCP connections that a change must not end.
const BYTES: u32 = 1_000_000;

/// Modes and underlays of which each packet is to say itself that it must not be cut.
const TUNNELS: [(Mode, Family); 4] = [
    (Mode::Vxlan, Family::Ipv4),
    (Mode::Vxlan, Family::Ipv6),
    (Mode::Wireguard, Family::Ipv4),
    (Mode::Wireguard, Family::Ipv6),
];

fn router(cluster: &Cluster) -> Result<Router<'_>> {
    cluster.router().context("the hosts are joined by a switch")
}

/// The path between the hosts takes so much, both ways.
fn limit(cluster: &Cluster, family: Family, mtu: Option<usize>) -> Result<()> {
    cluster.hosts().iter().try_for_each(|host| router(cluster)?.limit(host.address(family)?, mtu))
}

#[test]
fn a_router_that_tells_is_believed_and_pods_are_told_in_vxlan_mode() -> Result<()> {
    TUNNELS.into_iter().filter(|tunnel| tunnel.0 == Mode::Vxlan).try_for_each(told_by_a_router)
}

#[test]
fn a_router_that_tells_is_believed_and_pods_are_told_in_wireguard_mode() -> Result<()> {
    TUNNELS.into_iter().filter(|tunnel| tunnel.0 == Mode::Wireguard).try_for_each(told_by_a_router)
}

fn told_by_a_router((mode, underlay): (Mode, Family)) -> Result<()> {
    let what = format!("{mode} over {underlay}");
    let cluster = Cluster::builder().mode(mode).underlay(underlay).routed().start()?;
    let (a, b) = (Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?);
    let [full, left] = [1500, 1400].map(|mtu| inner_mtu(mode, underlay, mtu));
    for family in Family::ALL {
        ensure!(is_exact(a.pod.netns(), b.pod.address(family)?, full)?, "{what}: not exact to begin with");
    }
    let goodput = |time| tcp::throughput(a.pod.netns(), b.pod.netns(), b.pod.address(Family::Ipv4)?, patience(time));
    let before = goodput(Duration::from_secs(1))?;
    let flows: Vec<_> = Family::ALL
        .into_iter()
        .map(|family| tcp::Flow::start(a.pod.netns(), b.server.at(b.pod.address(family)?), BYTES))
        .collect::<Result<_>>()?;
    let small = Stream::udp(b.pod.netns(), a.pod.netns(), a.pod.address(Family::Ipv6)?, 200)?;
    let wire = cluster.capture()?;
    limit(&cluster, underlay, Some(1400))?;
    let since = Instant::now();
    for family in Family::ALL {
        for (from, to) in [(&a.pod, &b.pod), (&b.pod, &a.pod)] {
            let to = to.address(family)?;
            await_exact(from.netns(), to, full, left, PATIENCE).context(what.clone())?;
        }
    }
    let learned = since.elapsed();
    let trace = wire.stop()?;
    let after = goodput(Duration::from_secs(1))?;
    let mut stalls = Vec::new();
    for flow in flows {
        let flow = flow.stop().with_context(|| format!("{what}: an open TCP connection"))?;
        ensure!(flow.largest_stall <= patience(RECOVERED), "{what}: {flow:?}");
        stalls.push(flow.largest_stall);
    }
    let report = small.stop()?;
    ensure!(report.lossless(), "{what}: small packets were lost: {report}");
    let tunnelled = |packet: &&Packet| packet.kind == if mode == Mode::Vxlan { Kind::Vxlan } else { Kind::Wireguard };
    let (mut whole, mut cut) = (0, 0);
    for packet in trace.packets().iter().filter(tunnelled) {
        if underlay == Family::Ipv4 && !packet.dont_fragment {
            cut += 1;
        } else {
            whole += 1;
        }
    }
    eprintln!(
        "{what}: the path shrank from 1500 to 1400 with packet-too-big: exact after {learned:?}, TCP stood still for {stalls:?}, \
         {:.0} Mbit/s before and {:.0} after, {} fragments on the wire, {whole} packets with DF, {cut} without",
        before / 1e6,
        after / 1e6,
        trace.fragments(),
    );
    if mode == Mode::Vxlan {
        assert_eq!((trace.fragments(), cut), (0, 0), "{what}: routers may cut packets");
    }
    cluster.ensure_settled()
}

#[test]
fn a_path_that_recovers_is_used_again_when_the_kernel_tries_it() -> Result<()> {
    for (mode, underlay) in TUNNELS.into_iter().filter(|tunnel| tunnel.0 == Mode::Vxlan) {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).routed().start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        let [full, left] = [1500, 1400].map(|mtu| inner_mtu(mode, underlay, mtu));
        // In everyday life it is ten minutes.
        for netns in [cluster.host(1).netns(), a.netns()] {
            netns.sysctl("net/ipv4/route/mtu_expires", "5")?;
            netns.sysctl("net/ipv6/route/mtu_expires", "5")?;
        }
        limit(&cluster, underlay, Some(1400))?;
        for family in Family::ALL {
            await_exact(a.netns(), b.address(family)?, full, left, PATIENCE)?;
        }
        limit(&cluster, underlay, None)?;
        for family in Family::ALL {
            let to = b.address(family)?;
            eventually(&format!("{mode} over {underlay} to use the whole path again"), 3 * PATIENCE, || {
                Ok(path_mtu(cluster.host(1).netns(), to)? == full && is_exact(a.netns(), to, full)?)
            })?;
        }
        cluster.ensure_settled()?;

        // A path that is too narrow for the overlay carries the hosts' own connections, if they are told of it.
        limit(&cluster, underlay, Some(1300))?;
        let own = SocketAddr::new(cluster.host(2).address(underlay)?, 0);
        let server = EchoServer::start_on(cluster.host(2).netns(), own)?;
        tcp::transfer(cluster.host(1).netns(), server.at(own.ip()), 200_000)
            .with_context(|| format!("{mode} over {underlay}: TCP between the hosts on a narrow path"))?;
    }
    Ok(())
}

#[test]
fn a_pod_is_told_of_a_narrow_path_to_the_outside_through_address_translation() -> Result<()> {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        let cluster = Cluster::builder().mode(mode).dual_stack().routed().start()?;
        let pod = cluster.host(1).add_pod("a")?;
        for family in Family::ALL {
            let what = format!("{mode}, {family}");
            let outside = Cluster::outside_address(family);
            let server = EchoServer::start_on(cluster.outside(), SocketAddr::new(outside, 0))?;
            router(&cluster)?.limit(outside, Some(1300))?;
            let datagram = |size| Datagram::to(server.at(outside)).packet_size(size).run(pod.netns());
            assert_eq!(datagram(pod.mtu()?)?, Reach::TooBig { path_mtu: 1300, local: false }, "{what}");
            assert!(datagram(1300)?.arrived(), "{what}");
            tcp::transfer(pod.netns(), server.at(outside), 200_000).context(what)?;
        }
    }
    Ok(())
}

#[test]
fn a_pod_is_told_of_a_narrow_path_whatever_policy_says() -> Result<()> {
    let scene = Scene::start_on(Cluster::builder().mode(Mode::Vxlan).routed())?;
    // Nobody may send anything to it, and it may send datagrams to one port of one pod.
    let to =
        json!([{"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"protocol": "UDP", "port": 80}]}]);
    let far = json!({"matchLabels": {"role": "far"}});
    scene.policy(
        "default",
        "far",
        &json!({"podSelector": far, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": to}),
    )?;
    scene.assert("a pod with one way out", |it| {
        it.to != "far" && (it.from != "far" || it.to == "web" && it.service == Service::Udp(80))
    })?;
    limit(&scene.cluster, Family::Ipv4, Some(1400))?;
    for family in Family::ALL {
        let web = SocketAddr::new(scene.pod("web").address(family)?, 80);
        let datagram = |size| {
            let limit = Duration::from_millis(200);
            Datagram::to(web).packet_size(size).limit(limit).run(scene.pod("far").netns())
        };
        // The first that is too large tells the host, the next is told by the host.
        eventually("the pod to be told", PATIENCE, || {
            Ok(datagram(1450)? == Reach::TooBig { path_mtu: 1350, local: true })
        })
        .with_context(|| format!("over {family}"))?;
        assert!(datagram(1350)?.arrived(), "over {family}");
    }
    Ok(())
}

#[test]
fn forged_errors_do_not_shrink_a_tunnel_below_its_floor() -> Result<()> {
    for (mode, underlay) in TUNNELS {
        let what = format!("{mode} over {underlay}");
        let cluster = Cluster::builder().mode(mode).underlay(underlay).start()?;
        let (one, two) = (cluster.host(1), cluster.host(2));
        let (a, b) = (one.add_pod("a")?, two.add_pod("b")?);
        let wire = one.capture()?;
        a.await_answer_of(&b, PATIENCE)?;
        let trace = wire.stop()?;
        let peer = two.address(underlay)?;
        let kind = if mode == Mode::Vxlan { Kind::Vxlan } else { Kind::Wireguard };
        let forgeries = [Forgery::of(one, peer, kind, trace.packets())?, Forgery::of_an_echo(one, peer)?];
        // The least that leaves IPv6 what it needs.
        let floor = u16::try_from(least_underlay_mtu(mode, underlay))?;
        let before = dropped(one)?;
        for forgery in &forgeries {
            for mtu in [0, 68, 552, 1280, floor - 1] {
                cluster.deliver(1, &forgery.frame(mtu)?)?;
            }
        }
        eventually("the forged errors to be dropped", PATIENCE, || Ok(dropped(one)? == before + 10))
            .with_context(|| format!("{what}: {} of 10", dropped(one).unwrap_or(0) - before))?;
        assert_eq!(path_mtu(one.netns(), peer)?, 1500, "{what}: the kernel believed it");
        for family in Family::ALL {
            ensure!(
                is_exact(a.netns(), b.address(family)?, inner_mtu(mode, underlay, 1500))?,
                "{what}: the tunnel shrank"
            );
        }

        // What could be true is believed, and the smallest of it leaves IPv6 what it needs.
        cluster.deliver(1, &forgeries[0].frame(floor)?)?;
        eventually("the kernel to believe what could be true", PATIENCE, || {
            Ok(path_mtu(one.netns(), peer)? == usize::from(floor))
        })
        .context(what.clone())?;
        for family in Family::ALL {
            // The route follows.
            let to = b.address(family)?;
            eventually("the route to a peer to follow its path", PATIENCE, || Ok(path_mtu(one.netns(), to)? == 1280))?;
            let reach = Echo::to(to).packet_size(1280).run(a.netns())?;
            ensure!(reach.arrived(), "{what}, {family}: {reach:?}");
        }
        cluster.ensure_settled()?;

        // With nobody at the gate the same errors are believed: it is the gate that stops them.
        one.stop_daemon(Signal::SIGKILL)?;
        one.program("nft").args(["flush", "chain", "inet", "husk", "input-path-mtu"]).check()?;
        cluster.deliver(1, &forgeries[1].frame(1280)?)?;
        eventually("the kernel to believe what is forged", PATIENCE, || Ok(path_mtu(one.netns(), peer)? == 1280))
            .context(what)?;
    }
    Ok(())
}

#[test]
fn segments_are_clamped_to_the_route_of_each_peer() -> Result<()> {
    for (mode, underlay) in TUNNELS {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).hosts(3).mtu(9000).build()?;
        cluster.host(2).set_underlay_mtu(1400)?;
        cluster.start()?;
        let a = cluster.host(1).add_pod("a")?;
        let (small, large) = (Served::start(cluster.host(2), "b")?, Served::start(cluster.host(3), "c")?);
        for (family, headers) in [(Family::Ipv4, 40), (Family::Ipv6, 60)] {
            let what = format!("{mode} over {underlay}, {family}");
            // No packet was ever too large for anybody: the first that each says is right.
            let size = |mtu: usize| u16::try_from(inner_mtu(mode, underlay, mtu) - headers);
            assert_eq!(segments_offered(&a, &small, family)?, [size(1400)?; 2], "{what}");
            assert_eq!(segments_offered(&a, &large, family)?, [size(9000)?; 2], "{what}");
        }
    }
    Ok(())
}
