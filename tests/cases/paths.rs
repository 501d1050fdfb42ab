//! A path that swallows big packets without a word is found, and is left alone when it does not: what is between two hosts is
//! what the receiving one does with packets of the sender before anything else sees them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_dataplane::probe::{ProbeSocket, Sent};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::probe::wire;
use husk_tests::firewall::{self, At};
use husk_tests::netns::Netns;
use husk_tests::paths::{await_verified, is_exact, issues, probed, routes_have, send_and_wait};
use husk_tests::pod::{Served, await_answers_among};
use husk_tests::probe::{Echo, Reach, Stream, tcp};
use husk_tests::{Cluster, Family, Mode, Pod, Signal, eventually, patience};

/// How long a path that swallows may go unnoticed.
const FOUND: Duration = Duration::from_secs(30);

/// How long it may be limited after it has recovered: a limited path is looked at every 18 seconds, after a doubt.
const RECOVERED: Duration = Duration::from_secs(60);

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long losses are looked at, and how often where that is only one of several troubles.
const LOSSY: Duration = Duration::from_secs(15);
const LOOKS: usize = 3;

/// One packet in twenty vanishes, whatever its size.
const LOSSES: &str = "numgen random mod 1000 < 50 drop";

/// Bytes of the connection that stalls.
const BYTES: usize = 100_000;

#[test]
fn a_vxlan_path_that_swallows_is_found_and_climbs_back() -> Result<()> {
    // 50 bytes of overhead.
    black_hole(Mode::Vxlan, 1450, Hole { underlay: 1401, passes: 1351 })
}

#[test]
fn a_direct_path_that_swallows_is_found_and_climbs_back() -> Result<()> {
    black_hole(Mode::Direct, 1500, Hole { underlay: 1400, passes: 1400 })
}

#[test]
fn a_wireguard_path_that_swallows_is_found_and_climbs_back() -> Result<()> {
    // 60 bytes of overhead. Senders pad to a multiple of 16, which 1328 is: it costs no more there.
    black_hole(Mode::Wireguard, 1440, Hole { underlay: 1388, passes: 1328 })
}

/// A path that carries less than its ends.
#[derive(Debug, Clone, Copy)]
struct Hole {
    /// Bytes of the largest underlay packet that passes.
    underlay: usize,
    /// Bytes of the largest packet of a pod that does.
    passes: usize,
}

/// Makes something happen to what the first host sends, as it arrives at the second: be it of the host, or in mode `direct` of its
/// pods.
fn disturb(cluster: &Cluster, rules: &[&str]) -> Result<()> {
    let links = cluster.host(1).netns().ip_json(["link", "show", "dev", "eth0"])?;
    let from = links[0]["address"].as_str().context("eth0 has no Ethernet address")?;
    let rules: Vec<_> = rules.iter().map(|rule| format!("iifname eth0 ether saddr {from} {rule}")).collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    firewall::raise(cluster.host(2).netns(), At::Path, &rules)
}

fn calm(cluster: &Cluster) -> Result<()> {
    firewall::lift(cluster.host(2).netns())
}

fn black_hole(mode: Mode, promised: usize, hole: Hole) -> Result<()> {
    let cluster = Cluster::builder().mode(mode).hosts(3).start()?;
    let (one, two, three) = (cluster.host(1), cluster.host(2), cluster.host(3));
    let a = one.add_pod("a")?;
    let (b, c) = (Served::start(two, "b")?, Served::start(three, "c")?);
    await_answers_among(&[&a, &b.pod, &c.pod], PATIENCE)?;
    for (host, peer) in [(one, "host2"), (one, "host3"), (two, "host1")] {
        await_verified(host, peer, PATIENCE)?;
    }
    ensure!(issues(one)?.is_empty() && routes_have(one, &b.pod, promised)?);
    let connections = Family::ALL.map(|family| tcp::connect(a.netns(), b.server.at(b.pod.address(family)?), PATIENCE));
    let to = b.pod.address(Family::Ipv4)?;
    let goodput = || tcp::throughput(a.netns(), b.pod.netns(), to, patience(Duration::from_secs(1)));
    let before = goodput()?;
    // What is small passes all the time, whatever becomes of routes.
    let small = Stream::udp(a.netns(), b.pod.netns(), b.pod.address(Family::Ipv6)?, 100)?;

    let (ipv4, ipv6) = (hole.underlay, hole.underlay - 40);
    disturb(&cluster, &[&format!("ip length > {ipv4} drop"), &format!("ip6 length > {ipv6} drop")])?;
    let started = Instant::now();
    let stalled =
        connections.into_iter().map(|connection| connection.map(|it| thread::spawn(move || send_and_wait(&it, BYTES))));
    let stalled = stalled.collect::<Result<Vec<_>>>()?;
    let found = eventually("the routes to the host to be limited", FOUND, || routes_have(one, &b.pod, hole.passes));
    found.with_context(|| format!("{mode}: {}", probed(one, "host2").unwrap_or_default()))?;
    eprintln!("{mode}: found {} of {promised} bytes after {:?}", hole.passes, started.elapsed());
    for (family, connection) in Family::ALL.into_iter().zip(stalled) {
        let took = connection.join().map_err(|_| anyhow!("the connection's thread panicked"))?;
        let took = took.with_context(|| format!("{mode}: the connection over {family} that stalled"))?;
        eprintln!("{mode}: {BYTES} bytes of TCP over {family} were there and back after {took:?}");
    }
    limited(&cluster, &a, [&b.pod, &c.pod], promised, hole)?;
    let narrow = goodput()?;
    // A daemon that starts anew does not open the hole again to find it once more.
    one.stop_daemon(Signal::SIGKILL)?;
    one.start()?;
    one.wait_ready()?;
    ensure!(routes_have(one, &b.pod, hole.passes)?, "{mode}: a restart has raised the routes");

    calm(&cluster)?;
    let started = Instant::now();
    eventually("the routes to climb back", RECOVERED, || routes_have(one, &b.pod, promised))
        .with_context(|| format!("{mode}: {}", probed(one, "host2").unwrap_or_default()))?;
    eprintln!("{mode}: back at {promised} bytes after {:?}", started.elapsed());
    eventually("the issue to go", PATIENCE, || Ok(issues(one)?.is_empty()))?;
    for family in Family::ALL {
        // Its kernel would remember for ten minutes what it was told.
        let to = b.pod.address(family)?;
        eventually("the pod to use the whole path again", PATIENCE, || is_exact(a.netns(), to, promised))
            .with_context(|| format!("{mode}, {family}"))?;
    }
    let small = small.stop()?;
    ensure!(small.lossless(), "{mode}: small packets were lost: {small}");
    let [before, narrow, after] = [before, narrow, goodput()?].map(|bits| bits / 1e6);
    disturb(&cluster, &[LOSSES])?;
    for _ in 0..LOOKS {
        nothing_limited(&cluster, &b.pod, promised).context("5 % loss")?;
    }
    calm(&cluster)?;
    await_verified(one, "host2", FOUND)?;
    eprintln!("{mode}: {before:.0} Mbit/s before, {narrow:.0} through what passes, {after:.0} after");
    let probe = one.huskctl(["mtu", "probe", "host2"])?;
    ensure!(probe.status.code() == Some(0), "{probe:?}");
    ensure!(one.huskctl(["mtu"])?.status.code() == Some(0));
    cluster.ensure_settled()
}

/// The path from the first host to the second is limited, to the byte, and no other; people are told.
fn limited(cluster: &Cluster, a: &Pod, [b, c]: [&Pod; 2], promised: usize, hole: Hole) -> Result<()> {
    let (one, mode) = (cluster.host(1), cluster.mode());
    for family in Family::ALL {
        let what = format!("{mode}, {family}");
        let exact = Echo::to(b.address(family)?).packet_size(hole.passes);
        // The first packet that is too big teaches the pod.
        let _ = Echo::to(b.address(family)?).packet_size(hole.passes + 1).run(a.netns())?;
        let reach = exact.run(a.netns())?;
        ensure!(reach.arrived(), "{what}: {reach:?}");
        let reach = Echo::to(b.address(family)?).packet_size(hole.passes + 1).run(a.netns())?;
        ensure!(reach == Reach::TooBig { path_mtu: hole.passes, local: true }, "{what}: {reach:?}");
        let elsewhere = Echo::to(c.address(family)?).packet_size(promised).run(a.netns())?;
        ensure!(elsewhere.arrived(), "{what}: to another host: {elsewhere:?}");
        let back = Echo::to(c.address(family)?).packet_size(promised).run(b.netns())?;
        ensure!(back.arrived(), "{what}: from the second host to the third: {back:?}");
    }
    let found = issues(one)?;
    ensure!(found.len() == 1 && found[0]["subject"] == "host2", "{found:?}");
    let message = found[0]["message"].as_str().unwrap_or_default();
    let told = [hole.passes, promised].iter().all(|bytes| message.contains(&bytes.to_string()));
    ensure!(told && message.contains("1500"), "{message}");
    for host in [cluster.host(2), cluster.host(3)] {
        ensure!(issues(host)?.is_empty(), "{}: {:?}", host.name(), issues(host)?);
    }

    let table = one.huskctl(["mtu"])?;
    let number = format!("set underlay.mtu to {} on the node", hole.underlay);
    let told = table.stdout.contains("  warning packets of more than") && table.stdout.contains(&number);
    ensure!(told && table.status.code() == Some(0), "with lower routes traffic flows: {table:?}");
    let probe = one.huskctl_json(["mtu", "probe", "host2"])?;
    ensure!(probe["finished"] == true && probe["underlay"] == hole.underlay, "{probe}");
    for path in probe["paths"].as_array().into_iter().flatten() {
        ensure!(path["standing"]["state"] == "limited" && path["passes"] == hole.passes, "{path}");
    }
    ensure!(one.huskctl(["mtu", "probe", "host2"])?.status.code() == Some(1));
    let unknown = one.huskctl(["mtu", "probe", "host9"])?;
    ensure!(unknown.status.code() == Some(3) && unknown.stderr.contains("huskctl peers"), "{unknown:?}");
    Ok(())
}

#[test]
fn random_losses_are_no_black_hole() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(2).start()?;
    let (one, b) = (cluster.host(1), cluster.host(2).add_pod("b")?);
    await_verified(one, "host2", PATIENCE)?;
    disturb(&cluster, &[LOSSES])?;
    let started = Instant::now();
    let mut looks = 0;
    while started.elapsed() < LOSSY {
        nothing_limited(&cluster, &b, 1450)?;
        looks += 1;
    }
    eprintln!("5 % loss for {LOSSY:?}: nothing limited in {looks} looks, {}", probed(one, "host2")?["ipv4"]);
    Ok(())
}

/// The first host looks at the paths to the second, and finds nothing wrong with them. Every answer that is asked for is one more
/// chance to be misled.
fn nothing_limited(cluster: &Cluster, to: &Pod, promised: usize) -> Result<()> {
    let (one, mode) = (cluster.host(1), cluster.mode());
    let probe = one.huskctl(["mtu", "probe", "host2"])?;
    ensure!(probe.status.code() == Some(0), "{mode}: {probe:?}");
    ensure!(issues(one)?.is_empty() && routes_have(one, to, promised)?, "{mode}: {:?}", issues(one)?);
    Ok(())
}

#[test]
fn a_firewall_of_the_hosts_own_that_drops_probes_is_told_with_its_remedy() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(2).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    await_verified(one, "host2", PATIENCE)?;
    let deaf = || one.issues("ProbesDropped");
    // A peer whose daemon is dead does not answer either, which is not the firewall's fault.
    two.stop_daemon(Signal::SIGKILL)?;
    let silent = || Ok(probed(one, "host2")?["ipv4"]["standing"]["state"] == "unreachable");
    eventually("the peer to be out of reach", FOUND, silent)?;
    ensure!(deaf()?.is_empty(), "{:?}", deaf()?);
    two.start()?;
    await_verified(one, "host2", FOUND)?;

    firewall::raise(one.netns(), At::Input, &["iifname \"husk-*\" udp dport 4875 drop"])?;
    let started = Instant::now();
    eventually("the firewall to be told of", 2 * FOUND, || Ok(!deaf()?.is_empty()))
        .with_context(|| format!("{:?}", probed(one, "host2")))?;
    eprintln!("told of a firewall that drops probes after {:?}", started.elapsed());
    let told = deaf()?;
    ensure!(told[0]["severity"] == "warning" && told[0]["remedy"].to_string().contains("4875"), "{told:?}");
    firewall::lift(one.netns())?;
    await_verified(one, "host2", FOUND)?;
    eventually("the issue to go", PATIENCE, || Ok(deaf()?.is_empty()))
}

/// Whether somebody who sends a probe from an address and a port gets an answer.
fn is_answered(netns: &Netns, own: SocketAddr, to: IpAddr) -> Result<bool> {
    let socket = netns.run(|| ProbeSocket::bind(own.ip(), own.port()))??;
    let question = wire::probe(Family::of(to), 200, 7);
    let mut buffer = [0; 256];
    for _ in 0..10 {
        let sent = socket.send(SocketAddr::new(to, PROBE_PORT), &question);
        ensure!(sent == Sent::Sent, "{own} to {to}: {sent:?}");
        thread::sleep(Duration::from_millis(20));
        if socket.receive(&mut buffer)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn nobody_but_nodes_gets_an_answer() -> Result<()> {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        let cluster = Cluster::builder().mode(mode).hosts(2).start()?;
        let (one, two) = (cluster.host(1), cluster.host(2));
        let (a, b) = (one.add_pod("a")?, two.add_pod("b")?);
        await_answers_among(&[&a, &b], PATIENCE)?;
        await_verified(one, "host2", PATIENCE)?;
        for family in Family::ALL {
            let router = one.router(family)?;
            for (pod, what) in [(&a, "a pod of the host"), (&b, "a pod of another host")] {
                let own = SocketAddr::new(pod.address(family)?, PROBE_PORT);
                ensure!(!is_answered(pod.netns(), own, router)?, "{mode}, {family}: {what}");
            }
        }
        // Somebody outside pretends to be the other node.
        let outside = cluster.outside();
        let routers =
            BTreeMap::from([(Family::Ipv4, two.router(Family::Ipv4)?), (Family::Ipv6, two.router(Family::Ipv6)?)]);
        let (own, router) = (routers[&Family::Ipv4], one.router(Family::Ipv4)?);
        outside.command("ip", ["addr", "add", &format!("{own}/32"), "dev", "lo"])?;
        let (to, via) = (router.to_string(), one.address(Family::Ipv4)?.to_string());
        outside.command("ip", ["route", "add", &to, "via", &via])?;
        ensure!(!is_answered(outside, SocketAddr::new(own, PROBE_PORT), router)?, "{mode}: from outside");
        let counters = one.huskctl_json(["status"])?["counters"].clone();
        let dropped = ["plaintext_in", "probe_outside"].map(|name| counters[name]["packets"].as_u64().unwrap_or(0));
        ensure!(dropped.iter().sum::<u64>() >= 10, "{mode}: {counters}");
        // The other node itself goes on being answered, also by the question that the others asked in vain: there is somebody who
        // hears it.
        let probe = two.huskctl(["mtu", "probe", "host1"])?;
        ensure!(probe.status.code() == Some(0), "{mode}: {probe:?}");
        two.stop_daemon(Signal::SIGKILL)?;
        for family in Family::ALL {
            let own = SocketAddr::new(routers[&family], PROBE_PORT);
            ensure!(is_answered(two.netns(), own, one.router(family)?)?, "{mode}, {family}: the other node");
        }
    }
    Ok(())
}
