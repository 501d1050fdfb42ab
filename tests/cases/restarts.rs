//! Daemons and tunnel processes that end, by request or by force, at any time: the data plane does not notice, and what was
//! interrupted converges.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::marks;
use husk_tests::kernel::{self, Part};
use husk_tests::probe::{Echo, EchoServer, Report, Stream, payload, tcp};
use husk_tests::steady::Tunnel;
use husk_tests::{Capture, Cluster, Family, Host, Kind, MODES, Mode, Pod, Signal, eventually, pace, patience};
use serde_json::Value;

/// Pings per second of each stream.
const RATE: u32 = 1200;

/// Bytes per second of each TCP stream.
const BYTES: u32 = 500_000;

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

fn two_hosts(mode: Mode) -> Result<(Pod, Pod, Cluster)> {
    let cluster = Cluster::builder().mode(mode).start()?;
    Ok((cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?, cluster))
}

fn reach_each_other(one: &Pod, other: &Pod) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        let server = EchoServer::start(to.netns())?;
        for family in Family::ALL {
            let address = to.address(family)?;
            let reach = Echo::to(address).packet_size(from.mtu()?).run(from.netns())?;
            ensure!(reach.arrived(), "{} to {} over {family}: {reach:?}", from.name(), to.name());
            tcp::transfer(from.netns(), server.at(address), 50_000)?;
        }
    }
    Ok(())
}

fn unchanged(host: &Host) -> Result<()> {
    let diff = host.huskctl(["diff"])?;
    ensure!(diff.status.code() == Some(0), "{} is not as it should be: {}{}", host.name(), diff.stdout, diff.stderr);
    Ok(())
}

#[test]
fn pods_live_and_die_without_a_daemon() -> Result<()> {
    for (mode, signal) in [
        (Mode::Direct, Signal::SIGTERM),
        (Mode::Vxlan, Signal::SIGKILL),
        (Mode::Wireguard, Signal::SIGTERM),
        (Mode::Wireguard, Signal::SIGKILL),
    ] {
        let what = format!("{mode} after {signal}");
        let (a, b, cluster) = two_hosts(mode)?;
        let host = cluster.host(1);
        let doomed = host.add_pod("doomed")?;
        let gone = doomed.addresses();
        host.stop_daemon(signal)?;

        reach_each_other(&a, &b).context(what.clone())?;
        let status = host.cni_status()?;
        assert_eq!(status.error_code(), Some(50), "{what}: {status:?}");
        assert!(status.stdout.contains("huskd is not running"), "{what}: {status:?}");

        let mut refused = host.sandbox("refused")?;
        let add = refused.add()?;
        assert_eq!(add.error_code(), Some(11), "{what}: {add:?}");
        assert!(add.stdout.contains("huskd is not running"), "{what}: {add:?}");
        assert!(
            add.elapsed < patience(Duration::from_secs(2)),
            "{what}: a missing daemon is known at once, not after {add:?}"
        );
        assert!(refused.mtu().is_err(), "{what}: an ADD that failed left an interface");

        let leases = host.leases()?.len();
        for attempt in ["DEL", "a second DEL"] {
            let del = doomed.del()?;
            assert!(del.success() && del.elapsed < patience(Duration::from_secs(2)), "{what}, {attempt}: {del:?}");
        }
        assert!(doomed.mtu().is_err(), "{what}: the pod still has its interface");
        assert_eq!(host.leases()?.len(), leases - 1, "{what}: leases");
        for address in &gone {
            let route = host.netns().ip_json([
                if address.is_ipv4() { "-4" } else { "-6" },
                "route",
                "show",
                &address.to_string(),
            ])?;
            assert_eq!(route, serde_json::json!([]), "{what}: routes");
        }

        host.start_daemon()?;
        host.wait_ready()?;
        assert!(refused.add()?.success(), "{what}: the same attachment, once the daemon is back");
        reach_each_other(&refused, &b).context(what.clone())?;
        reach_each_other(&a, &b).context(what.clone())?;
        let ipam = host.huskctl(["ipam", "check"])?;
        assert_eq!(ipam.status.code(), Some(0), "{what}: {}", ipam.stdout);
        unchanged(host)?;
    }
    Ok(())
}

#[test]
fn a_restart_in_direct_mode_loses_nothing() -> Result<()> {
    restarts(Mode::Direct)
}

#[test]
fn a_restart_in_vxlan_mode_loses_nothing() -> Result<()> {
    restarts(Mode::Vxlan)
}

#[test]
fn a_restart_in_wireguard_mode_loses_nothing() -> Result<()> {
    restarts(Mode::Wireguard)
}

/// Restarts of both daemons, both ways, under a flood ping of each family and each direction and a TCP stream of each.
fn restarts(mode: Mode) -> Result<()> {
    let (a, b, cluster) = two_hosts(mode)?;
    reach_each_other(&a, &b)?;
    // The device, and the process that is the device where the kernel has no WireGuard.
    let tunnel = |host: &Host| (Tunnel::of(host).ok().map(|it| it.index), host.wireguard_process().map(|it| it.pid));
    let tunnels = || cluster.hosts().iter().map(tunnel).collect::<Vec<_>>();
    let before = tunnels();
    assert_eq!(before.iter().all(|(index, _)| index.is_some()), mode != Mode::Direct, "{before:?}");
    let servers = [EchoServer::start(a.netns())?, EchoServer::start(b.netns())?];
    let started = Instant::now();
    let pings = [
        Stream::ping(a.netns(), b.address(Family::Ipv4)?, RATE)?,
        Stream::ping(b.netns(), a.address(Family::Ipv6)?, RATE)?,
    ];
    let flows = [
        tcp::Flow::start(a.netns(), servers[1].at(b.address(Family::Ipv6)?), BYTES)?,
        tcp::Flow::start(b.netns(), servers[0].at(a.address(Family::Ipv4)?), BYTES)?,
    ];
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        for host in cluster.hosts() {
            let passes = host.daemon_log().lines().count();
            // Time without a daemon, in which something could run out.
            host.stop_daemon(signal)?;
            std::thread::sleep(Duration::from_millis(200));
            host.start_daemon()?;
            host.wait_ready()?;
            unchanged(host)?;
            let log = host.daemon_log();
            let since: Vec<_> = log.lines().skip(passes).filter(|line| line.contains("reconciled")).collect();
            assert!(since.is_empty(), "{mode}: a restart after {signal} changed the kernel: {since:#?}");
        }
    }
    let elapsed = started.elapsed();
    for stream in pings {
        let report = stream.stop()?;
        // A machine too busy to run the userspace device overflows its queue: that is told from a loss by the restart.
        assert!(report.lossless(), "{mode}: {report}; dropped by full queues: {:?}", full_queues(&cluster)?);
        assert!(
            report.sent as f64 >= f64::from(pace(1000)) * elapsed.as_secs_f64(),
            "{mode}: {report} in {elapsed:?} is no flood"
        );
    }
    for flow in flows {
        let flow = flow.stop()?;
        assert!(flow.bytes > 100_000, "{mode}: {flow:?}");
    }
    assert_eq!(before, tunnels(), "{mode}: the tunnel is none of a restarting daemon's business");
    Ok(())
}

/// Packets that each host's tunnel device dropped before anybody read them.
fn full_queues(cluster: &Cluster) -> Result<Vec<u64>> {
    let dropped = |host: &Host| -> Result<u64> {
        let links = host.netns().ip_json(["-s", "link", "show"])?;
        let tunnels = links.as_array().into_iter().flatten();
        let tunnels = tunnels.filter(|link| link["ifname"].as_str().is_some_and(marks::is_tunnel_interface));
        Ok(tunnels.filter_map(|link| link["stats64"]["tx"]["dropped"].as_u64()).sum())
    };
    cluster.hosts().iter().map(dropped).collect()
}

/// How soon traffic flows again after the userspace device's process was killed; a busy machine may take this much longer.
const RECOVERY: Duration = Duration::from_secs(2);
const SLACK: Duration = Duration::from_secs(2);

/// In which direction pods ask while a host has lost its tunnel. Each alone has to bring it back: the peer has no reason to
/// doubt its session.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Asking {
    FromTheVictim,
    FromThePeer,
}

#[test]
fn a_killed_wireguard_process_is_back_within_two_seconds_in_secret() -> Result<()> {
    for underlay in Family::ALL {
        let cluster = Cluster::builder().underlay(underlay).userspace_wireguard().start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        reach_each_other(&a, &b)?;
        let host = cluster.host(1);
        let wire = cluster.capture()?;
        for asking in [Asking::FromTheVictim, Asking::FromThePeer] {
            let (from, to) = if asking == Asking::FromTheVictim { (&a, &b) } else { (&b, &a) };
            let streams = [
                Stream::ping(from.netns(), to.address(Family::Ipv4)?, 500)?,
                Stream::ping(from.netns(), to.address(Family::Ipv6)?, 500)?,
            ];
            eventually("the streams to flow", PATIENCE, || Ok(streams.iter().all(|it| it.so_far().received > 50)))?;
            let victim = host.wireguard_process().context("no userspace WireGuard process")?;
            let killed = Instant::now();
            victim.signal(Signal::SIGKILL)?;
            eventually("the process to end", PATIENCE, || {
                Ok(host.wireguard_process().is_none_or(|process| process.pid != victim.pid))
            })?;
            let answers = |stream: &Stream| stream.so_far().received;
            // What was under way may still arrive.
            std::thread::sleep(Duration::from_millis(50));
            let before: Vec<_> = streams.iter().map(answers).collect();
            let back = eventually("both streams to flow again", Duration::from_secs(30), || {
                Ok(streams.iter().zip(&before).all(|(stream, before)| answers(stream) > before + 20))
            });
            let outage = killed.elapsed();
            let what = format!("over {underlay}, asked {asking:?}");
            back.with_context(|| what.clone())?;
            eprintln!("{what}: back after {outage:?}");
            assert!(outage < patience(RECOVERY + SLACK), "{what}: back after {outage:?}");
            let process = host.wireguard_process().context("no userspace WireGuard process came back")?;
            assert_ne!(process.pid, victim.pid);
            let reports: Vec<Report> = streams.into_iter().map(Stream::stop).collect::<Result<_>>()?;
            assert!(reports.iter().all(|report| !report.lossless()), "nothing was killed: {reports:?}");
        }
        secret(wire, &cluster)?;
        let log = host.daemon_log();
        assert_eq!(log.matches("started the userspace WireGuard process").count(), 3, "one start and two ends: {log}");
        reach_each_other(&a, &b)?;
        eventually("the daemon to be content", PATIENCE, || {
            let status = host.huskctl_json(["status"])?;
            Ok(status["ready"] == true && status["issues"] == serde_json::json!([]))
        })?;
        unchanged(host)?;
    }
    Ok(())
}

/// Nothing of pods was to be seen on the underlay, and something of the tunnel was.
fn secret(wire: Capture, cluster: &Cluster) -> Result<()> {
    let trace = wire.stop()?;
    let kinds = trace.kinds();
    assert!(kinds.get(&Kind::Wireguard).is_some_and(|count| *count > 100), "{kinds:?}");
    assert_eq!((trace.containing(payload::MARKER), trace.readable(cluster.cluster_cidrs())), (0, 0), "{kinds:?}");
    let innocent = [Kind::Arp, Kind::NeighbourDiscovery, Kind::MulticastListener, Kind::Wireguard];
    // A host without its tunnel tells the peer so.
    let rest = trace.count(|packet| !innocent.contains(&packet.kind) && packet.kind != Kind::Icmp);
    assert_eq!(rest, 0, "{kinds:?}");
    Ok(())
}

/// What a starting daemon leaves behind it, in order: killed once the first of these is there, then the next.
fn milestones(userspace: bool) -> Vec<&'static str> {
    let tunnel: &[&str] = if userspace { &["/run/husk/wireguard", "/run/wireguard/husk-wg0.sock"] } else { &[] };
    let first = ["/run/husk/daemon.lock", "/run/husk/daemon.sock"];
    let last = ["/var/lib/husk/sysctls.json", "/run/husk/node.json", "/etc/cni/net.d/05-husk.conflist"];
    first.iter().chain(tunnel).chain(&last).copied().collect()
}

#[test]
fn a_daemon_killed_while_it_starts_converges_at_the_next_start() -> Result<()> {
    for mode in MODES {
        let mut cluster = Cluster::builder().mode(mode).hosts(1).start()?;
        let pod = cluster.host(1).add_pod("a")?;
        let userspace = mode == Mode::Wireguard && !kernel::has(Part::Wireguard)?;
        // Every point is met by a host of its own, which nothing of Husk was on before.
        for milestone in milestones(userspace) {
            let number = cluster.add_host()?;
            let host = cluster.host(number);
            host.start()?;
            await_file(&host.file(milestone)).with_context(|| format!("{mode}: {milestone}"))?;
            host.stop_daemon(Signal::SIGKILL)?;
        }
        for milliseconds in [1, 4, 8, 12, 16, 20, 25, 30, 40] {
            let number = cluster.add_host()?;
            let host = cluster.host(number);
            host.install_plugin()?;
            // Twice: from nothing, and from whatever the first left.
            for _ in 0..2 {
                host.start_daemon()?;
                std::thread::sleep(patience(Duration::from_millis(milliseconds)));
                host.stop_daemon(Signal::SIGKILL)?;
            }
        }
        for host in &cluster.hosts()[1..] {
            host.start_daemon()?;
        }
        cluster.wait_ready()?;
        cluster.wait_meshed()?;
        let mut blocks = BTreeSet::new();
        for host in cluster.hosts() {
            unchanged(host).with_context(|| format!("{mode}"))?;
            host.await_answers().with_context(|| format!("{mode}"))?;
            let status = host.huskctl_json(["status"])?;
            assert_eq!(status["issues"], serde_json::json!([]), "{mode}, {}", host.name());
            let own: Vec<Value> = status["blocks"].as_array().cloned().unwrap_or_default();
            assert_eq!(own.len(), 2, "{mode}, {}: {own:?}", host.name());
            for block in own {
                assert!(blocks.insert(block.to_string()), "{mode}: {block} belongs to two nodes");
            }
            let tunnels = host.processes().iter().filter(|it| it.command.contains("wireguard-userspace")).count();
            assert_eq!(tunnels, usize::from(userspace), "{mode}, {}: {:?}", host.name(), host.processes());
            let links = host.netns().ip_json(["link", "show"])?;
            let names = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
            let devices = names.filter(|name| marks::is_tunnel_interface(name)).count();
            assert_eq!(devices, usize::from(mode.tunnelled()), "{mode}, {}", host.name());
        }
        let manifests =
            std::fs::read_dir(cluster.manifests().join("blocks")).context("listing the blocks' manifests")?;
        // The half of a write that a killed daemon left is hidden, and nobody's block.
        let names = manifests.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let manifests: BTreeSet<_> = names.filter(|name| !name.starts_with('.')).collect();
        assert_eq!(manifests.len(), blocks.len(), "{mode}: a killed daemon's blocks serve the next: {manifests:?}");
        for host in &cluster.hosts()[1..] {
            let other = host.add_pod("b")?;
            reach_each_other(&pod, &other).with_context(|| format!("{mode}, {}", host.name()))?;
        }
    }
    Ok(())
}

/// Waits for a file without a pause: what comes right after it should not have happened yet.
fn await_file(path: &Path) -> Result<()> {
    let deadline = Instant::now() + patience(PATIENCE);
    while !path.exists() {
        ensure!(Instant::now() < deadline, "{} does not appear", path.display());
    }
    Ok(())
}
