//! Every mode over every underlay family: who reaches whom, with which packet sizes, and what the underlay saw.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::netns::Netns;
use husk_tests::pod::Served;
use husk_tests::probe::{Datagram, Echo, EchoServer, Reach, assert_exact, path_mtu, payload, tcp};
use husk_tests::{Cluster, ClusterBuilder, Family, Host, Kind, Mode, Pod, Trace, eventually};
use serde_json::json;

/// Bytes of one verified transfer: dozens of full segments each way.
const TRANSFER: u64 = 60_000;

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn direct_over_ipv4() -> Result<()> {
    every_pair(Mode::Direct, Family::Ipv4, 1500)
}

#[test]
fn direct_over_ipv6() -> Result<()> {
    every_pair(Mode::Direct, Family::Ipv6, 1500)
}

#[test]
fn vxlan_over_ipv4() -> Result<()> {
    every_pair(Mode::Vxlan, Family::Ipv4, 1450)
}

#[test]
fn vxlan_over_ipv6() -> Result<()> {
    every_pair(Mode::Vxlan, Family::Ipv6, 1430)
}

#[test]
fn wireguard_over_ipv4() -> Result<()> {
    every_pair(Mode::Wireguard, Family::Ipv4, 1440)
}

#[test]
fn wireguard_over_ipv6() -> Result<()> {
    every_pair(Mode::Wireguard, Family::Ipv6, 1420)
}

/// Transfers to a pod and returns the address that its server saw the client under.
fn seen_by(served: &Served, client: &Netns, family: Family) -> Result<IpAddr> {
    seen(&served.server, client, served.pod.address(family)?)
}

/// Transfers to a server and returns the address that it saw the client under.
fn seen(server: &EchoServer, client: &Netns, at: IpAddr) -> Result<IpAddr> {
    let known = server.peers();
    tcp::transfer(client, server.at(at), TRANSFER)?;
    let new: Vec<_> = server.peers().into_iter().filter(|peer| !known.contains(peer)).collect();
    ensure!(new.len() == 1, "one transfer made the server at {at} see {new:?}");
    Ok(new[0].ip())
}

/// What the mode's packets are on the wire.
fn kinds_of(mode: Mode) -> &'static [Kind] {
    match mode {
        Mode::Vxlan => &[Kind::Vxlan],
        Mode::Wireguard => &[Kind::Wireguard],
        // UDP: nodes probe each other at their underlay addresses.
        _ => &[Kind::Tcp, Kind::Icmp, Kind::Udp],
    }
}

/// The wire carried packets of up to exactly the underlay's MTU, none in fragments, nothing but what the mode makes and
/// the hosts' own neighbour business, and in encrypted modes nothing that tells of pods. In the others the same questions
/// have the opposite answer, which shows that they can.
fn assert_wire(trace: &Trace, cluster: &Cluster, mode: Mode, underlay: (Family, usize)) {
    let (family, mtu) = underlay;
    let kinds = trace.kinds();
    assert_eq!((trace.largest(), trace.fragments()), (mtu, 0), "{mode} over {family}: {kinds:?}");
    let housekeeping = [Kind::Arp, Kind::NeighbourDiscovery, Kind::MulticastListener];
    for kind in kinds.keys() {
        assert!(housekeeping.contains(kind) || kinds_of(mode).contains(kind), "{mode} over {family}: {kinds:?}");
    }
    if mode.tunnelled() {
        let other = |address: IpAddr| Family::of(address) != family;
        let strange = trace.count(|packet| {
            kinds_of(mode).contains(&packet.kind) && packet.addresses.is_none_or(|(from, to)| other(from) || other(to))
        });
        assert_eq!(strange, 0, "{mode}: tunnel packets over another family than {family}");
    }
    let telling = (trace.containing(payload::MARKER), trace.readable(cluster.cluster_cidrs()));
    if mode.encrypted() {
        assert_eq!(telling, (0, 0), "payload markers and cluster addresses in the clear: {kinds:?}");
    } else {
        assert!(telling.0 >= 8 && telling.1 >= 8, "{mode}: {telling:?} of {kinds:?}");
    }
}

fn every_pair(mode: Mode, family: Family, pod_mtu: usize) -> Result<()> {
    let cluster = Cluster::builder().mode(mode).underlay(family).hosts(3).start()?;
    let mut pods = Vec::new();
    for host in cluster.hosts() {
        for name in ["a", "b"] {
            let served = Served::start(host, name)?;
            assert_eq!(served.pod.mtu()?, pod_mtu, "{mode} over {family}");
            pods.push(served);
        }
    }
    let addresses: BTreeSet<_> = pods.iter().flat_map(|served| served.pod.addresses()).collect();
    assert_eq!(addresses.len(), 2 * pods.len(), "{addresses:?}");
    let pairs = || pods.iter().flat_map(|from| pods.iter().map(move |to| (from, to)));
    let pairs = || pairs().flat_map(|pair| Family::ALL.map(|family| (pair, family)));

    let wire = cluster.capture()?;
    for ((from, to), inner) in pairs().filter(|((from, to), _)| !std::ptr::eq(*from, *to)) {
        let client = seen_by(to, from.pod.netns(), inner)?;
        assert_eq!(client, from.pod.address(inner)?, "{mode}: pods see each other's own addresses");
    }
    assert_wire(&wire.stop()?, &cluster, mode, (family, 1500));

    let wire = cluster.capture()?;
    for ((from, to), inner) in pairs().filter(|((from, to), _)| !std::ptr::eq(*from, *to)) {
        assert_exact(from.pod.netns(), to.pod.address(inner)?, pod_mtu)?;
    }
    assert_wire(&wire.stop()?, &cluster, mode, (family, 1500));

    if mode.tunnelled() {
        // What a pod lets the kernel fragment is fragmented inside the tunnel, never around it.
        let wire = cluster.capture()?;
        for inner in Family::ALL {
            let reach =
                Echo::to(pods[5].pod.address(inner)?).packet_size(4000).may_fragment().run(pods[0].pod.netns())?;
            assert!(matches!(reach, Reach::Answered { packet_size: 4000, .. }), "{reach:?}");
        }
        let trace = wire.stop()?;
        assert!(trace.largest() > 1400 && trace.largest() <= 1500 && trace.fragments() == 0, "{}", trace.largest());
    }
    cluster.ensure_settled()
}

#[test]
fn hosts_and_the_outside_in_direct_mode() -> Result<()> {
    around(Mode::Direct)
}

#[test]
fn hosts_and_the_outside_in_vxlan_mode() -> Result<()> {
    around(Mode::Vxlan)
}

#[test]
fn hosts_and_the_outside_in_wireguard_mode() -> Result<()> {
    around(Mode::Wireguard)
}

fn around(mode: Mode) -> Result<()> {
    for underlay in Family::ALL {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).dual_stack().start()?;
        let (one, two) = (cluster.host(1), cluster.host(2));
        let (a, b) = (Served::start(one, "a")?, Served::start(two, "b")?);
        let pod = a.pod.netns();
        let (at_one, at_two) = (EchoServer::start(one.netns())?, EchoServer::start(two.netns())?);
        let wire = cluster.capture()?;
        for family in Family::ALL {
            let what = format!("{mode} over {underlay}, {family}");
            let own = a.pod.address(family)?;
            assert_eq!(seen(&at_one, pod, one.address(family)?)?, own, "{what}: a pod to its own host");
            assert!(Echo::to(own).run(one.netns())?.arrived(), "{what}: a host to its own pod");
            seen_by(&a, one.netns(), family).with_context(|| format!("{what}: a host to its own pod"))?;

            let host_at_pod =
                seen_by(&b, one.netns(), family).with_context(|| format!("{what}: a host to a remote pod"))?;
            if mode.tunnelled() {
                assert_eq!(seen(&at_one, pod, one.router(family)?)?, own, "{what}: a pod to its own router");
                assert_eq!(seen(&at_two, pod, two.router(family)?)?, own, "{what}: a pod to another router");
                assert_eq!(host_at_pod, one.router(family)?, "{what}: a host to a remote pod");
                assert_eq!(seen(&at_two, one.netns(), two.router(family)?)?, host_at_pod, "{what}: host to host");
            } else {
                assert_eq!(host_at_pod, one.address(family)?, "{what}: a host to a remote pod");
            }
            assert_exact(one.netns(), b.pod.address(family)?, b.pod.mtu()?)?;
        }
        assert_wire(&wire.stop()?, &cluster, mode, (underlay, 1500));

        let world = EchoServer::start(cluster.outside())?;
        for family in Family::ALL {
            let what = format!("{mode} over {underlay}, {family}");
            let node = one.address(family)?;
            let outside = Cluster::outside_address(family);
            assert_eq!(seen(&world, pod, outside)?, node, "{what}: what leaves the cluster is masqueraded");
            assert_eq!(seen(&at_two, pod, two.address(family)?)?, node, "{what}: other nodes are no part of it");
            assert!(Echo::to(outside).run(pod)?.arrived(), "{what}");
            let at = std::net::SocketAddr::new(outside, 0);
            let datagrams = EchoServer::start_on(cluster.outside(), at)?;
            let reach = Datagram::to(datagrams.at(outside)).packet_size(a.pod.mtu()?).run(pod)?;
            assert!(reach.arrived(), "{what}: a datagram to the outside: {reach:?}");
            let clients: BTreeSet<_> = datagrams.peers().iter().map(std::net::SocketAddr::ip).collect();
            assert_eq!(clients, BTreeSet::from([node]), "{what}");
        }
        cluster.ensure_settled()?;
    }
    Ok(())
}

fn pair(builder: ClusterBuilder) -> Result<(Served, Served, Cluster)> {
    let cluster = builder.start()?;
    Ok((Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?, cluster))
}

/// Underlay MTUs off the beaten track, the smallest included that leave 1280 for IPv6, and what they leave for pods.
const ODD: [(Mode, Family, usize, usize); 14] = [
    (Mode::Direct, Family::Ipv4, 9000, 9000),
    (Mode::Direct, Family::Ipv6, 1280, 1280),
    (Mode::Vxlan, Family::Ipv4, 9000, 8950),
    (Mode::Vxlan, Family::Ipv6, 9000, 8930),
    (Mode::Vxlan, Family::Ipv4, 1405, 1355),
    (Mode::Vxlan, Family::Ipv6, 1405, 1335),
    (Mode::Vxlan, Family::Ipv4, 1330, 1280),
    (Mode::Vxlan, Family::Ipv6, 1350, 1280),
    (Mode::Wireguard, Family::Ipv4, 9000, 8940),
    (Mode::Wireguard, Family::Ipv6, 9000, 8920),
    (Mode::Wireguard, Family::Ipv4, 1405, 1345),
    (Mode::Wireguard, Family::Ipv6, 1405, 1325),
    (Mode::Wireguard, Family::Ipv4, 1340, 1280),
    (Mode::Wireguard, Family::Ipv6, 1360, 1280),
];

#[test]
fn odd_underlays_are_used_to_the_byte() -> Result<()> {
    for (mode, family, underlay_mtu, pod_mtu) in ODD {
        let (a, b, cluster) = pair(Cluster::builder().mode(mode).underlay(family).mtu(underlay_mtu))?;
        let wire = cluster.capture()?;
        for (from, to) in [(&a, &b), (&b, &a)] {
            assert_eq!(from.pod.mtu()?, pod_mtu, "{mode} over {family} of {underlay_mtu}");
            for inner in Family::ALL {
                assert_exact(from.pod.netns(), to.pod.address(inner)?, pod_mtu)
                    .with_context(|| format!("{mode} over {family} of {underlay_mtu}"))?;
                seen_by(to, from.pod.netns(), inner)?;
            }
        }
        assert_wire(&wire.stop()?, &cluster, mode, (family, underlay_mtu));
    }
    Ok(())
}

/// One byte less than IPv6 needs.
const TOO_SMALL: [(Mode, Family, usize); 4] = [
    (Mode::Vxlan, Family::Ipv4, 1329),
    (Mode::Vxlan, Family::Ipv6, 1349),
    (Mode::Wireguard, Family::Ipv4, 1339),
    (Mode::Wireguard, Family::Ipv6, 1359),
];

#[test]
fn an_underlay_too_small_for_ipv6_gets_no_pod_and_a_reason() -> Result<()> {
    for (mode, family, mtu) in TOO_SMALL {
        let what = format!("{mode} over {family} of {mtu}");
        let cluster = Cluster::builder().mode(mode).underlay(family).hosts(1).mtu(mtu).build()?;
        let host = cluster.host(1);
        host.start()?;
        eventually("the daemon's verdict", PATIENCE, || {
            Ok(host.cni_with("STATUS", None, bare_config())?.stdout.contains("1280"))
        })?;
        assert_refused(host, None, "1280").context(what.clone())?;
        assert!(!host.file("/run/husk/node.json").exists(), "{what}");

        // One byte more and it works, live; one byte less and the word is taken back.
        cluster.set_underlay_mtu(mtu + 1)?;
        host.wait_ready().context(what.clone())?;
        let pod = host.add_pod("served")?;
        assert_eq!(pod.mtu()?, 1280, "{what}");
        cluster.set_underlay_mtu(mtu)?;
        eventually("readiness to be taken back, with the reason", PATIENCE, || {
            Ok(host.cni_with("STATUS", None, bare_config())?.stdout.contains("1280"))
        })?;
        assert_refused(host, Some(&pod), "1280").context(what)?;
    }
    Ok(())
}

/// What a daemon that was never ready has not written yet.
fn bare_config() -> serde_json::Value {
    json!({"cniVersion": "1.1.0", "name": "husk", "type": "husk"})
}

/// STATUS says 50 and ADD 11, both with the reason, and nothing of an interface is left.
fn assert_refused(host: &Host, reason_is_known_to: Option<&Pod>, reason: &str) -> Result<()> {
    let status = host.cni_with("STATUS", None, bare_config())?;
    assert_eq!(status.error_code(), Some(50), "{status:?}");
    assert!(status.stdout.contains(reason), "{status:?}");
    let sandbox = host.sandbox("refused")?;
    let add = host.cni_with("ADD", Some(sandbox.spec()), bare_config())?;
    assert_eq!(add.error_code(), Some(11), "{add:?}");
    assert!(add.stdout.contains(reason), "{add:?}");
    assert!(sandbox.mtu().is_err(), "a refused pod has an interface");
    if let Some(pod) = reason_is_known_to {
        // What was there stays there.
        assert!(Echo::to(pod.address(Family::Ipv4)?).run(host.netns())?.arrived());
    }
    Ok(())
}

#[test]
fn a_host_with_a_smaller_underlay_gets_packets_of_its_own_size() -> Result<()> {
    for (mode, family, larger, smaller) in [
        (Mode::Direct, Family::Ipv4, 1500, 1400),
        (Mode::Vxlan, Family::Ipv4, 1450, 1350),
        (Mode::Vxlan, Family::Ipv6, 1430, 1330),
        (Mode::Wireguard, Family::Ipv4, 1440, 1340),
        (Mode::Wireguard, Family::Ipv6, 1420, 1320),
    ] {
        let what = format!("{mode} over {family}");
        let cluster = Cluster::builder().mode(mode).underlay(family).hosts(3).build()?;
        cluster.host(2).set_underlay_mtu(1400)?;
        cluster.start()?;
        let pods: Vec<_> = cluster.hosts().iter().map(|host| Served::start(host, "a")).collect::<Result<_>>()?;
        let mtus: Vec<_> = pods.iter().map(|served| served.pod.mtu()).collect::<Result<_>>()?;
        assert_eq!(mtus, [larger, smaller, larger], "{what}");
        let wire = cluster.capture()?;
        for inner in Family::ALL {
            let to: Vec<_> = pods.iter().map(|served| served.pod.address(inner)).collect::<Result<_>>()?;
            // The host knows, and tells the pod the first time.
            assert_eq!(path_mtu(cluster.host(1).netns(), to[1])?, smaller, "{what}");
            assert_exact(cluster.host(1).netns(), to[1], smaller)?;
            let first = Echo::to(to[1]).packet_size(larger).run(pods[0].pod.netns())?;
            assert_eq!(first, Reach::TooBig { path_mtu: smaller, local: false }, "{what}, {inner}");
            assert_exact(pods[0].pod.netns(), to[1], smaller)?;
            assert_exact(pods[1].pod.netns(), to[0], smaller)?;
            assert_exact(pods[2].pod.netns(), to[0], larger)?;
            // TCP is told by its peer's segment size, also where no packet was ever refused.
            seen_by(&pods[1], pods[2].pod.netns(), inner)?;
        }
        let trace = wire.stop()?;
        assert_eq!((trace.largest(), trace.fragments()), (1500, 0), "{what}");
        let small = cluster.host(2).address(family)?;
        let concerns =
            |packet: &&husk_tests::Packet| packet.addresses.is_some_and(|(from, to)| from == small || to == small);
        if mode.tunnelled() {
            let largest = trace.packets().iter().filter(concerns).map(|packet| packet.ip_length).max();
            assert_eq!(largest, Some(1400), "{what}");
        }
        cluster.ensure_settled()?;

        // The other hosts follow while everything runs.
        cluster.host(2).set_underlay_mtu(1450)?;
        for inner in Family::ALL {
            let to = pods[1].pod.address(inner)?;
            eventually("the route to follow the underlay", PATIENCE, || {
                Ok(path_mtu(cluster.host(1).netns(), to)? == smaller + 50)
            })
            .with_context(|| format!("{what}, {inner}"))?;
        }
        let late = cluster.host(2).add_pod("late")?;
        assert_eq!(late.mtu()?, smaller + 50, "{what}");
        assert_exact(late.netns(), pods[0].pod.address(Family::Ipv6)?, smaller + 50)?;
    }
    Ok(())
}
