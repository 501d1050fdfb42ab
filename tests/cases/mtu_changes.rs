//! The underlay's MTU changes while pods run: everything follows, and nothing is restarted.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::paths::{inner_mtu, is_exact, least_underlay_mtu};
use husk_tests::pod::Served;
use husk_tests::probe::{Datagram, Echo, Reach, Stream, assert_exact, path_mtu, tcp};
use husk_tests::steady::Tunnel;
use husk_tests::{Cluster, Family, Host, Mode, Pod, Signal, eventually, patience};
use nix::unistd::Pid;
use serde_json::json;

/// How long a change may take to be everywhere on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it takes as a rule.
const FOLLOWED: Duration = Duration::from_secs(1);

/// Bytes per second of TCP connections.
const BYTES: u32 = 500_000;

/// Datagrams per second.
const DATAGRAMS: u32 = 200;

fn tunnel(mode: Mode) -> Option<&'static str> {
    match mode {
        Mode::Vxlan => Some("husk-vx"),
        Mode::Wireguard => Some("husk-wg0"),
        _ => None,
    }
}

/// Largest MTU that the kernel gives a route (net/ipv4/metrics.c `ip_metrics_convert`); an interface may have more.
const LARGEST_OF_ROUTE: usize = 65520;

/// The pods of a host. The kernel of a busy one is told of its paths while they change: within the moment in which its own interface
/// has grown and the route to the other host has not, it learns that little passes, and would keep to that for ten minutes.
struct Pods<'a> {
    quiet: &'a Pod,
    busy: Option<&'a Pod>,
}

/// What of a host is not as the underlay MTU, which is that of all hosts, makes it: its record, its tunnel device, its routes to
/// pods elsewhere, both ends of its pods, and what the kernel of a quiet pod has for the path to another.
fn mistuned(
    cluster: &Cluster,
    number: usize,
    pods: &Pods<'_>,
    remote: &Pod,
    underlay: usize,
) -> Result<Option<String>> {
    let host = cluster.host(number);
    // In direct mode there are two families, and neither costs anything.
    let inner = inner_mtu(cluster.mode(), cluster.families()[0], underlay);
    let mut found = vec![("its record".to_owned(), usize::try_from(cluster.record(number)?.underlay_mtu)?, underlay)];
    if let Some(tunnel) = tunnel(cluster.mode()) {
        found.push((tunnel.to_owned(), host.netns().mtu(tunnel)?, inner));
    }
    for to in remote.addresses() {
        found.push((format!("its path to {to}"), path_mtu(host.netns(), to)?, inner.min(LARGEST_OF_ROUTE)));
        found.push((format!("the path of a pod to {to}"), path_mtu(pods.quiet.netns(), to)?, inner));
    }
    for pod in [Some(pods.quiet), pods.busy].into_iter().flatten() {
        let name = pod.name();
        found.push((name.to_owned(), pod.mtu()?, inner));
        for own in pod.addresses() {
            found.push((format!("the host's end of {name} ({own})"), path_mtu(host.netns(), own)?, inner));
        }
    }
    let wrong = found.into_iter().find(|(_, actual, expected)| actual != expected);
    Ok(wrong.map(|(what, actual, expected)| format!("{}: {what} has {actual}, not {expected}", host.name())))
}

/// Waits until both hosts are tuned, and returns how long that took.
fn follows(cluster: &Cluster, pods: &[Pods<'_>; 2], underlay: usize, since: Instant) -> Result<Duration> {
    let mut wrong = None;
    let followed = eventually(&format!("{} to follow its underlay to {underlay}", cluster.mode()), PATIENCE, || {
        wrong = mistuned(cluster, 1, &pods[0], pods[1].quiet, underlay)?;
        if wrong.is_none() {
            wrong = mistuned(cluster, 2, &pods[1], pods[0].quiet, underlay)?;
        }
        Ok(wrong.is_none())
    });
    followed.with_context(|| wrong.unwrap_or_default())?;
    Ok(since.elapsed())
}

/// Waits until the kernels of busy pods have forgotten what does not hold any more, a few seconds after the routes have followed.
fn busy_pods_follow(cluster: &Cluster, pods: &[Pods<'_>; 2], underlay: usize) -> Result<()> {
    let inner = inner_mtu(cluster.mode(), cluster.families()[0], underlay);
    for (here, there) in [(0, 1), (1, 0)] {
        let Some(busy) = pods[here].busy else { continue };
        for to in pods[there].quiet.addresses().into_iter().chain(pods[there].busy.iter().flat_map(|it| it.addresses()))
        {
            let what = format!("{} to send {inner} bytes to {to}", busy.name());
            eventually(&what, PATIENCE, || Ok(path_mtu(busy.netns(), to)? == inner))?;
        }
    }
    Ok(())
}

#[test]
fn pods_and_peers_follow_in_direct_mode() -> Result<()> {
    Family::ALL.into_iter().try_for_each(|underlay| everything_follows(Mode::Direct, underlay))
}

#[test]
fn pods_and_peers_follow_in_vxlan_mode() -> Result<()> {
    Family::ALL.into_iter().try_for_each(|underlay| everything_follows(Mode::Vxlan, underlay))
}

#[test]
fn pods_and_peers_follow_in_wireguard_mode() -> Result<()> {
    Family::ALL.into_iter().try_for_each(|underlay| everything_follows(Mode::Wireguard, underlay))
}

/// What must outlive every change: a device, the processes, a TCP connection.
struct Lasting {
    tunnels: Vec<Tunnel>,
    processes: Vec<Vec<Pid>>,
    flow: tcp::Flow,
}

impl Lasting {
    fn of(cluster: &Cluster, from: &Pod, to: &Served) -> Result<Self> {
        let flow = tcp::Flow::start(from.netns(), to.server.at(to.pod.address(Family::Ipv4)?), BYTES)?;
        // A child has its parent's command until it executes another.
        let mut last = Vec::new();
        eventually("no process to begin or end", PATIENCE, || {
            let before = std::mem::replace(&mut last, processes(cluster));
            Ok(last == before)
        })?;
        Ok(Self { tunnels: tunnels(cluster)?, processes: last, flow })
    }

    fn ensure(self, cluster: &Cluster) -> Result<()> {
        let flow = self.flow.stop().context("the TCP connection that was open all the time")?;
        ensure!(flow.bytes > 0, "{flow:?}");
        ensure!(indices(&self.tunnels) == indices(&tunnels(cluster)?), "a tunnel device was made anew");
        eventually("the processes to be those of before", PATIENCE, || Ok(self.processes == processes(cluster)))
    }
}

fn tunnels(cluster: &Cluster) -> Result<Vec<Tunnel>> {
    if cluster.mode().tunnelled() { cluster.hosts().iter().map(Tunnel::of).collect() } else { Ok(Vec::new()) }
}

fn indices(tunnels: &[Tunnel]) -> Vec<u64> {
    tunnels.iter().map(|tunnel| tunnel.index).collect()
}

/// The daemons and what belongs to them; what is run on the host to look at it comes and goes.
fn processes(cluster: &Cluster) -> Vec<Vec<Pid>> {
    let of_husk = |host: &Host| {
        let all = host.processes().into_iter();
        let mut ids: Vec<_> = all.filter(|it| it.command.contains("huskd")).map(|it| it.pid).collect();
        ids.sort_unstable();
        ids
    };
    cluster.hosts().iter().map(of_husk).collect()
}

fn everything_follows(mode: Mode, underlay: Family) -> Result<()> {
    let cluster = Cluster::builder().mode(mode).underlay(underlay).start()?;
    let (a, b) = (Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?);
    let quiet = cluster.add_pods("quiet")?;
    let pods = [Pods { quiet: &quiet[0], busy: Some(&a.pod) }, Pods { quiet: &quiet[1], busy: Some(&b.pod) }];
    let lasting = Lasting::of(&cluster, &a.pod, &b)?;
    let what = format!("{mode} over {underlay}");
    let mut late = Vec::new();
    let mut took = Vec::new();
    let mut before = 1500;
    for mtu in [9000, 1400, 1500] {
        let what = format!("{what}, {before} to {mtu}");
        let grows = mtu > before;
        // Full packets of before, in both families and directions: growing costs none of them.
        let full = inner_mtu(mode, underlay, before);
        let streams = [(&a.pod, &b.pod, Family::Ipv4), (&b.pod, &a.pod, Family::Ipv6)].map(|(from, to, family)| {
            Stream::udp_of_size(from.netns(), to.netns(), to.address(family)?, DATAGRAMS, full)
        });
        let pings = Stream::ping(quiet[0].netns(), b.pod.address(Family::Ipv6)?, DATAGRAMS)?;
        // A pod that is being made meanwhile.
        let (created, followed) = thread::scope(|scope| -> Result<_> {
            let adding = scope.spawn(|| cluster.host(1).add_pod(&format!("late-{mtu}")));
            let since = Instant::now();
            cluster.set_underlay_mtu(mtu)?;
            let followed = follows(&cluster, &pods, mtu, since).context(what.clone())?;
            Ok((adding.join().map_err(|_| anyhow!("adding a pod panicked"))??, followed))
        })?;
        took.push(followed);
        busy_pods_follow(&cluster, &pods, mtu).context(what.clone())?;
        let inner = inner_mtu(mode, underlay, mtu);
        eventually("a pod that was made meanwhile to be tuned", PATIENCE, || Ok(created.mtu()? == inner))?;
        for stream in streams {
            let report = stream?.stop()?;
            // When it shrinks, what is larger is refused.
            ensure!(
                !grows || (report.lossless() && report.received > 0),
                "{what}: a packet was lost, though the MTU grew: {report}"
            );
        }
        let report = pings.stop()?;
        ensure!(report.lossless(), "{what}: small packets were lost: {report}");
        for family in Family::ALL {
            for pod in [&quiet[0], &created] {
                assert_exact(pod.netns(), quiet[1].address(family)?, inner).context(what.clone())?;
            }
            assert_exact(cluster.host(2).netns(), quiet[0].address(family)?, inner).context(what.clone())?;
        }
        late.push(created);
        before = mtu;
    }
    eprintln!("{what}: followed 1500 to 9000, to 1400, to 1500 in {took:?}");
    took.sort();
    ensure!(took[1] <= patience(FOLLOWED), "{what}: as a rule it takes longer than {FOLLOWED:?}: {took:?}");
    lasting.ensure(&cluster)?;
    cluster.ensure_settled()
}

#[test]
fn the_mtu_of_a_route_counts_like_that_of_its_link() -> Result<()> {
    // Without a tunnel each family has a way of its own, and that of the underlay's family is not the narrow one.
    for (mode, underlay, narrow) in [
        (Mode::Vxlan, Family::Ipv4, Family::Ipv4),
        (Mode::Wireguard, Family::Ipv6, Family::Ipv6),
        (Mode::Direct, Family::Ipv4, Family::Ipv6),
    ] {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        let full = inner_mtu(mode, underlay, 1500);
        for mtu in [Some(1400), Some(1450), None] {
            set_route_mtu(cluster.host(1), narrow, mtu)?;
            for family in Family::ALL {
                let concerned = mode.tunnelled() || family == narrow;
                let inner = inner_mtu(mode, underlay, mtu.filter(|_| concerned).unwrap_or(1500));
                let what = format!("{mode} over {underlay}: the route to follow the underlay's to {mtu:?}, {family}");
                let (to, back) = (b.address(family)?, a.address(family)?);
                eventually(&what, PATIENCE, || Ok(path_mtu(cluster.host(1).netns(), to)? == inner))?;
                assert_exact(cluster.host(1).netns(), to, inner)?;
                // The other side's way is another, and neither link has changed.
                assert_eq!(path_mtu(cluster.host(2).netns(), back)?, full, "{what}");
                assert_eq!((a.mtu()?, b.mtu()?), (full, full), "{what}");
            }
        }
        let what = format!("{mode} over {underlay}");
        if mode.tunnelled() {
            more_is_configured_than_carried(&cluster, [&a, &b]).context(what.clone())?;
            too_little_is_left(&cluster, [&a, &b]).context(what)?;
        }
        cluster.ensure_settled()?;
    }
    Ok(())
}

/// Of a configured MTU that exceeds the underlay's the second host tells, uses what the underlay carries, and loses no packet of
/// that size.
fn more_is_configured_than_carried(cluster: &Cluster, [a, b]: [&Pod; 2]) -> Result<()> {
    let (host, full) = (cluster.host(2), inner_mtu(cluster.mode(), cluster.families()[0], 1500));
    let streams = [(a, b, Family::Ipv4), (b, a, Family::Ipv6)]
        .map(|(from, to, family)| Stream::udp_of_size(from.netns(), to.netns(), to.address(family)?, DATAGRAMS, full));
    host.configure(|config| config["underlay"]["mtu"] = json!(9000))?;
    host.restart_daemon(Signal::SIGTERM)?;
    eventually("the host to tell", PATIENCE, || Ok(!host.issues("MtuTooLarge")?.is_empty()))?;
    let told = host.issues("MtuTooLarge")?;
    let message = told[0]["message"].as_str().unwrap_or_default();
    ensure!(told[0]["severity"] == "warning" && ["9000", "1500"].iter().all(|it| message.contains(it)), "{told:?}");
    let table = host.huskctl(["mtu"])?;
    ensure!(table.status.code() == Some(0) && table.stdout.contains("warning 9000 bytes are configured"), "{table:?}");
    ensure!(cluster.record(2)?.underlay_mtu == 1500, "{:?}", cluster.record(2)?);
    for (from, to) in [(a, b), (b, a)] {
        ensure!(from.mtu()? == full, "{} has {}", from.name(), from.mtu()?);
        Family::ALL.into_iter().try_for_each(|family| assert_exact(from.netns(), to.address(family)?, full))?;
    }
    for stream in streams {
        let report = stream?.stop()?;
        ensure!(report.lossless() && report.received > 0, "packets were lost: {report}");
    }
    host.configure(|config| config["underlay"]["mtu"] = json!(null))?;
    host.restart_daemon(Signal::SIGTERM)?;
    eventually("the issue to go", PATIENCE, || Ok(host.issues("MtuTooLarge")?.is_empty()))
}

/// Where the second host's link leaves too little for a family, that is refused there and towards it with every byte accounted for,
/// and no pod is cut down to it; as soon as enough is left all is as before.
fn too_little_is_left(cluster: &Cluster, [a, b]: [&Pod; 2]) -> Result<()> {
    let (mode, underlay) = (cluster.mode(), cluster.families()[0]);
    let (one, two) = (cluster.host(1), cluster.host(2));
    let full = inner_mtu(mode, underlay, 1500);
    // The least for IPv6 (RFC 8200, section 5) and for IPv4 (RFC 791), and one byte less than what leaves it.
    let mut steps = vec![(least_underlay_mtu(mode, underlay) - 1, 1279, vec![Family::Ipv6])];
    if underlay == Family::Ipv4 {
        // A link as small as this has no IPv6 addresses any more to build tunnels from.
        steps.push((1500 - full + 575, 575, Family::ALL.to_vec()));
    }
    for (mtu, left, refused) in steps {
        two.set_underlay_mtu(mtu)?;
        let what = format!("{refused:?} to be refused with an underlay of {mtu} bytes");
        let subjects: Vec<_> = refused.iter().map(|family| format!("{family} in mode {mode}")).collect();
        let mut told = Vec::new();
        eventually(&what, PATIENCE, || {
            told = two.issues("MtuTooSmall")?;
            // The others are about the way to the first host.
            told.retain(|issue| issue["severity"] == "blocking");
            Ok(told.len() == subjects.len()
                && subjects.iter().all(|it| told.iter().any(|issue| issue["subject"] == **it)))
        })
        .with_context(|| format!("{told:?}"))?;
        for issue in &told {
            let message = issue["message"].as_str().unwrap_or_default();
            let ledger = [mtu, left].iter().all(|bytes| message.contains(&bytes.to_string()));
            ensure!(ledger, "{issue}");
        }
        let status = two.cni_status()?;
        ensure!(!status.success() && status.stdout.contains(&left.to_string()), "{status:?}");
        let table = two.huskctl(["mtu"])?;
        ensure!(table.status.code() == Some(1) && table.stdout.contains("BLOCKS an underlay MTU of"), "{table:?}");
        // What there can be no IPv6 for is not tried for ever.
        ensure!(two.issues("ApplyFailed")?.is_empty(), "{:?}", two.issues("ApplyFailed")?);
        let mut towards = Vec::new();
        eventually(&format!("the other host, {what}"), PATIENCE, || {
            towards = one.issues("MtuTooSmall")?;
            Ok(towards.len() == refused.len() && towards.iter().all(|issue| issue["subject"] == "host2"))
        })
        .with_context(|| format!("{towards:?}"))?;
        ensure!(towards.iter().all(|it| it["message"].to_string().contains(&left.to_string())), "{towards:?}");
        ensure!((a.mtu()?, b.mtu()?) == (full, full), "pods were cut down to {} and {}", a.mtu()?, b.mtu()?);
        for family in refused {
            let reach = Echo::to(b.address(family)?).limit(Duration::from_millis(300)).run(a.netns())?;
            ensure!(!reach.arrived(), "{family}: {reach:?}");
        }
    }
    two.set_underlay_mtu(1500)?;
    for host in cluster.hosts() {
        eventually("the issues to go", PATIENCE, || Ok(host.issues("MtuTooSmall")?.is_empty()))?;
    }
    for (from, to) in [(a, b), (b, a)] {
        for family in Family::ALL {
            let to = to.address(family)?;
            eventually(&format!("{} to send {full} bytes to {to} again", from.name()), PATIENCE, || {
                is_exact(from.netns(), to, full)
            })?;
        }
    }
    Ok(())
}

/// Gives the host's route to the others an MTU, or takes it away.
fn set_route_mtu(host: &Host, family: Family, mtu: Option<usize>) -> Result<()> {
    let own = host.address(family)?.to_string();
    let (flag, prefix) = if family == Family::Ipv4 { ("-4", "192.0.2.0/24") } else { ("-6", "2001:db8::/64") };
    let mut command = vec![flag, "route", "replace", prefix, "dev", "eth0", "proto", "kernel"];
    if family == Family::Ipv4 {
        command.extend(["scope", "link", "src", &own]);
    } else {
        command.extend(["metric", "256"]);
    }
    let mtu = mtu.map(|mtu| mtu.to_string());
    command.extend(mtu.iter().flat_map(|mtu| ["mtu", mtu]));
    host.ip(command).map(drop)
}

/// Modes, and the family that carries them.
const WAYS: [(Mode, Family); 5] = [
    (Mode::Direct, Family::Ipv4),
    (Mode::Vxlan, Family::Ipv4),
    (Mode::Vxlan, Family::Ipv6),
    (Mode::Wireguard, Family::Ipv4),
    (Mode::Wireguard, Family::Ipv6),
];

#[test]
fn every_pair_of_a_mixed_cluster_has_its_own_exact_mtu() -> Result<()> {
    let underlays = [9001, 1500, 1400];
    for (mode, underlay) in WAYS {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).hosts(3).mtu(9001).build()?;
        for (host, mtu) in cluster.hosts().iter().zip(underlays) {
            host.set_underlay_mtu(mtu)?;
        }
        cluster.start()?;
        let pods = cluster.add_pods("a")?;
        for (from, to) in (0..3).flat_map(|from| (0..3).map(move |to| (from, to))).filter(|(from, to)| from != to) {
            let what = format!("{mode} over {underlay}, {} to {}", underlays[from], underlays[to]);
            let mtu = inner_mtu(mode, underlay, underlays[from].min(underlays[to]));
            for family in Family::ALL {
                let address = pods[to].address(family)?;
                assert_exact(cluster.hosts()[from].netns(), address, mtu).context(what.clone())?;
                // The pod's own interface takes more; its host tells it the first time.
                let own = pods[from].mtu()?;
                assert_eq!(own, inner_mtu(mode, underlay, underlays[from]), "{what}");
                if own > mtu {
                    let first = Echo::to(address).packet_size(mtu + 1).run(pods[from].netns())?;
                    assert_eq!(first, Reach::TooBig { path_mtu: mtu, local: false }, "{what}, {family}");
                }
                assert_exact(pods[from].netns(), address, mtu).context(what.clone())?;
            }
        }
        cluster.ensure_settled()?;
    }
    Ok(())
}

#[test]
fn jumbo_frames_are_used_to_the_byte() -> Result<()> {
    for (mode, underlay) in WAYS {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).mtu(9001).start()?;
        let (a, b) = (Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?);
        // The largest that an interface can have.
        for mtu in [9001, 65535] {
            cluster.set_underlay_mtu(mtu)?;
            let pods = [&a, &b].map(|served| Pods { quiet: &served.pod, busy: None });
            follows(&cluster, &pods, mtu, Instant::now())?;
            let own = inner_mtu(mode, underlay, mtu);
            let inner = own.min(LARGEST_OF_ROUTE);
            for family in Family::ALL {
                let to = b.pod.address(family)?;
                if inner < own {
                    let first = Echo::to(to).packet_size(own).run(a.pod.netns())?;
                    assert_eq!(
                        first,
                        Reach::TooBig { path_mtu: inner, local: false },
                        "{mode} over {underlay} of {mtu}"
                    );
                }
                assert_exact(a.pod.netns(), to, inner).with_context(|| format!("{mode} over {underlay} of {mtu}"))?;
                let reach = Datagram::to(b.server.at(to)).packet_size(inner).run(a.pod.netns())?;
                assert!(reach.arrived(), "{mode} over {underlay} of {mtu}: a datagram of {inner} bytes: {reach:?}");
            }
            cluster.ensure_settled()?;
        }
    }
    Ok(())
}

#[test]
fn peers_of_a_host_whose_link_shrinks_send_it_less() -> Result<()> {
    for (mode, underlay) in [(Mode::Vxlan, Family::Ipv4), (Mode::Wireguard, Family::Ipv4)] {
        let cluster = Cluster::builder().mode(mode).underlay(underlay).hosts(3).start()?;
        let pods = cluster.add_pods("a")?;
        let served = Served::start(cluster.host(2), "served")?;
        // Over the whole time, and to the host that shrinks.
        let flow = tcp::Flow::start(pods[0].netns(), served.server.at(served.pod.address(Family::Ipv4)?), BYTES)?;
        let others = Stream::udp_of_size(
            pods[0].netns(),
            pods[2].netns(),
            pods[2].address(Family::Ipv6)?,
            DATAGRAMS,
            inner_mtu(mode, underlay, 1500),
        )?;
        cluster.host(2).set_underlay_mtu(1400)?;
        let inner = inner_mtu(mode, underlay, 1400);
        for number in [1, 3] {
            eventually("peers to lower their routes", PATIENCE, || {
                Ok(path_mtu(cluster.host(number).netns(), pods[1].address(Family::Ipv4)?)? == inner)
            })?;
        }
        for family in Family::ALL {
            assert_exact(cluster.host(1).netns(), pods[1].address(family)?, inner)?;
        }
        // Among the others nothing has changed, and no packet was lost.
        let report = others.stop()?;
        ensure!(report.lossless(), "{mode}: the others were disturbed: {report}");
        let flow = flow.stop().with_context(|| format!("{mode}: the connection to the host that shrank"))?;
        ensure!(flow.bytes > 0, "{mode}: {flow:?}");
        cluster.ensure_settled()?;
    }
    Ok(())
}
