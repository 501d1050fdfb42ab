//! Paths that lose, swallow, shrink, grow, differ and say so, truly or not, in the modes that need more of the kernel than every one
//! has. What any kernel can do, `paths`, `path_icmp` and `mtu_changes` ask in more detail.
//!
//! Each mode meets all of it on one cluster, whose hosts a router joins: an emulated processor takes its time to make one. It
//! has two hosts, one pair of unlike links at a time. What no virtual machine shows: what network cards make of jumbo frames, since
//! its links are pairs of virtual devices, and how long anything takes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::cluster::Router;
use husk_tests::forgery::{Forgery, dropped};
use husk_tests::kernel::{self, Part};
use husk_tests::paths::{
    await_exact, await_verified, inner_mtu, is_exact, issues, least_underlay_mtu, probed, routes_have,
    segments_offered, send_and_wait,
};
use husk_tests::pod::{Served, await_answers_among};
use husk_tests::probe::{Echo, path_mtu, tcp};
use husk_tests::{Cluster, Family, Host, Kind, Mode, Packet, Signal, eventually};

/// How long what a kernel or a daemon does by itself may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a path that swallows may go unnoticed, and how long one that has recovered.
const FOUND: Duration = Duration::from_secs(30);
const RECOVERED: Duration = Duration::from_secs(60);

/// MTU of the underlay, and of what becomes narrow.
const FULL: usize = 1500;
const NARROW: usize = 1400;

/// MTU of jumbo frames, and the largest that an interface can have.
const JUMBO: usize = 9001;
const LARGEST: usize = 65535;

/// Bytes of a connection that stalls, and bytes per second of one that is open all the time.
const STALLED: usize = 20_000;
const OPEN: u32 = 50_000;

/// How often somebody asks for the paths to be looked at while they lose packets.
const LOOKS: usize = 3;

#[test]
fn ipsec_over_ipv4() -> Result<()> {
    // 1400 is a multiple of four, as ESP wants what it encrypts: no byte is lost to padding.
    every_path(Mode::Ipsec, Family::Ipv4, 1346)
}

#[test]
fn ipsec_over_ipv6() -> Result<()> {
    every_path(Mode::Ipsec, Family::Ipv6, 1326)
}

#[test]
fn vxlan_in_ipsec_over_ipv4() -> Result<()> {
    every_path(Mode::VxlanIpsec, Family::Ipv4, 1316)
}

#[test]
fn vxlan_in_ipsec_over_ipv6() -> Result<()> {
    every_path(Mode::VxlanIpsec, Family::Ipv6, 1296)
}

#[test]
fn wireguard_of_the_kernel_over_ipv4() -> Result<()> {
    // The device pads to 16 what its own MTU has room for: 1328 and 60 are the most that 1400 take.
    every_path(Mode::Wireguard, Family::Ipv4, 1328)
}

/// Two hosts with a pod each, and what is open between the pods.
struct World {
    cluster: Cluster,
    pods: [Served; 2],
    what: String,
    mode: Mode,
    underlay: Family,
    full: usize,
    narrow: usize,
}

fn every_path(mode: Mode, underlay: Family, swallowed: usize) -> Result<()> {
    kernel::require(&[Part::Esp, Part::Wireguard])?;
    let mut builder = Cluster::builder().mode(mode).underlay(underlay).routed();
    if mode == Mode::Wireguard {
        builder = builder.set("wireguard.device", "kernel");
    }
    let cluster = builder.start()?;
    for host in cluster.hosts() {
        // In everyday life a kernel believes a router for ten minutes.
        host.netns().sysctl("net/ipv4/route/mtu_expires", "5")?;
        host.netns().sysctl("net/ipv6/route/mtu_expires", "5")?;
    }
    let pods = [Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?];
    let [full, narrow] = [FULL, NARROW].map(|mtu| inner_mtu(mode, underlay, mtu));
    let world = World { cluster, pods, what: format!("{mode} over {underlay}"), mode, underlay, full, narrow };
    let flow = world.connect(0)?;
    await_answers_among(&[&world.pods[0].pod, &world.pods[1].pod], PATIENCE)?;
    world.all_exact(full).context("to begin with")?;
    for (host, peer) in world.ends() {
        await_verified(host, peer, PATIENCE)?;
    }
    world.loses().context("5 % loss")?;
    world.swallows(swallowed).context("a black hole")?;
    world.changes(NARROW).context("the underlay shrinks")?;
    world.changes(JUMBO).context("the underlay grows")?;
    world.differs().context("one host's link is smaller")?;
    world.changes(LARGEST).context("the underlay grows to the largest that there is")?;
    world.changes(FULL).context("the underlay is as it was")?;
    world.tells().context("packet-too-big")?;
    let flow = flow.stop().context("the connection that was open all the time")?;
    ensure!(flow.bytes > 0, "{flow:?}");
    world.cluster.ensure_settled()?;
    if mode == Mode::Wireguard { world.may_be_cut_without_the_rule() } else { Ok(()) }
}

impl World {
    fn router(&self) -> Result<Router<'_>> {
        self.cluster.router().context("the hosts are joined by a switch")
    }

    /// Each host, and whom it sends to.
    fn ends(&self) -> [(&Host, &'static str); 2] {
        [(self.cluster.host(1), "host2"), (self.cluster.host(2), "host1")]
    }

    /// A connection from one pod to the other that is open from now on.
    fn connect(&self, from: usize) -> Result<tcp::Flow> {
        let to = &self.pods[1 - from];
        tcp::Flow::start(self.pods[from].pod.netns(), to.server.at(to.pod.address(Family::Ipv4)?), OPEN)
    }

    /// Between the pods, in both directions and families, exactly so much passes.
    fn all_exact(&self, mtu: usize) -> Result<()> {
        for (from, to) in [(0, 1), (1, 0)] {
            for family in Family::ALL {
                let (netns, to) = (self.pods[from].pod.netns(), self.pods[to].pod.address(family)?);
                let what = format!("{}: {mtu} bytes, and no more, to pass to {to}", self.what);
                eventually(&what, PATIENCE, || is_exact(netns, to, mtu))?;
            }
        }
        Ok(())
    }

    fn all_routes_have(&self, mtu: usize) -> Result<bool> {
        let [a, b] = &self.pods;
        Ok(routes_have(self.cluster.host(1), &b.pod, mtu)? && routes_have(self.cluster.host(2), &a.pod, mtu)?)
    }

    fn await_routes(&self, mtu: usize, limit: Duration) -> Result<()> {
        let awaited = eventually(&format!("{}: routes of {mtu} bytes", self.what), limit, || self.all_routes_have(mtu));
        awaited.with_context(|| self.ends().map(|(host, peer)| format!("{:?}", probed(host, peer))).join(" "))
    }

    /// One packet in twenty is lost, whatever its size.
    fn loses(&self) -> Result<()> {
        self.router()?.lose(50)?;
        for _ in 0..LOOKS {
            for (host, peer) in self.ends() {
                let probe = host.huskctl_json(["mtu", "probe", peer])?;
                ensure!(probe["finished"] == true, "{}: {probe}", self.what);
                ensure!(issues(host)?.is_empty(), "{}: {:?}", self.what, issues(host)?);
            }
        }
        ensure!(self.all_routes_have(self.full)?, "{}: routes were limited", self.what);
        self.router()?.carry_all()
    }

    /// Packets of more than [`NARROW`] bytes vanish without a word, both ways.
    fn swallows(&self, passes: usize) -> Result<()> {
        let [a, b] = &self.pods;
        let stream = tcp::connect(a.pod.netns(), b.server.at(b.pod.address(Family::Ipv6)?), PATIENCE)?;
        self.router()?.swallow(NARROW)?;
        let since = Instant::now();
        let stalled = thread::spawn(move || send_and_wait(&stream, STALLED));
        self.await_routes(passes, FOUND)?;
        let found = since.elapsed();
        let stood = stalled.join().map_err(|_| anyhow!("the connection's thread panicked"))?;
        let stood = stood.context("the connection that stalled")?;
        // The first packet that is too big teaches a pod.
        for (from, to) in [(a, b), (b, a)] {
            for family in Family::ALL {
                await_exact(from.pod.netns(), to.pod.address(family)?, self.full, passes, PATIENCE)?;
            }
        }
        for (host, peer) in self.ends() {
            let found = issues(host)?;
            ensure!(found.len() == 1 && found[0]["subject"] == peer, "{}: {found:?}", self.what);
        }
        self.router()?.carry_all()?;
        let since = Instant::now();
        self.await_routes(self.full, RECOVERED)?;
        let recovered = since.elapsed();
        self.all_exact(self.full)?;
        for (host, _) in self.ends() {
            eventually("the issue to go", PATIENCE, || Ok(issues(host)?.is_empty()))?;
        }
        eprintln!(
            "{}: {passes} of {} bytes found after {found:?}, {STALLED} bytes of TCP were there and back after {stood:?}, \
             recovered after {recovered:?}",
            self.what, self.full
        );
        Ok(())
    }

    /// The MTU of the whole underlay changes under the pods.
    fn changes(&self, underlay: usize) -> Result<()> {
        let inner = inner_mtu(self.mode, self.underlay, underlay);
        let since = Instant::now();
        self.cluster.set_underlay_mtu(underlay)?;
        self.await_routes(inner, PATIENCE)?;
        for (host, served) in self.cluster.hosts().iter().zip(&self.pods) {
            eventually(&format!("{}: both ends of a pod to have {inner} bytes", self.what), PATIENCE, || {
                let ends = served.pod.addresses().into_iter().map(|own| path_mtu(host.netns(), own));
                let ends = ends.collect::<Result<Vec<_>>>()?;
                Ok(served.pod.mtu()? == inner && ends.iter().all(|end| *end == inner))
            })?;
        }
        let followed = since.elapsed();
        self.all_exact(inner)?;
        for number in [1, 2] {
            ensure!(usize::try_from(self.cluster.record(number)?.underlay_mtu)? == underlay, "{}: record", self.what);
        }
        eprintln!("{}: followed its underlay to {underlay} in {followed:?}", self.what);
        Ok(())
    }

    /// Of hosts with jumbo frames the second goes back to [`FULL`]: to each other both send what that takes, segments of TCP from
    /// the first on, and the first keeps its own for others.
    fn differs(&self) -> Result<()> {
        let [a, b] = &self.pods;
        self.cluster.host(2).set_underlay_mtu(FULL)?;
        self.await_routes(self.full, PATIENCE)?;
        let own = inner_mtu(self.mode, self.underlay, JUMBO);
        eventually("the second host's pod to follow", PATIENCE, || Ok(b.pod.mtu()? == self.full))?;
        ensure!(a.pod.mtu()? == own, "{}: the first host's pod has {}, not {own}", self.what, a.pod.mtu()?);
        for (family, headers) in [(Family::Ipv4, 20 + 20), (Family::Ipv6, 40 + 20)] {
            // Nobody was told yet that a packet was too large: these are the hosts' words.
            let (offered, fits) = (segments_offered(&a.pod, b, family)?, u16::try_from(self.full - headers)?);
            ensure!(offered == [fits; 2], "{}, {family}: segments of {offered:?}, not {fits}", self.what);
            let (there, back) = (b.pod.address(family)?, a.pod.address(family)?);
            await_exact(a.pod.netns(), there, own, self.full, PATIENCE)?;
            await_exact(b.pod.netns(), back, self.full, self.full, PATIENCE)?;
        }
        Ok(())
    }

    /// The router takes [`NARROW`] bytes both ways, and says so; then it takes all again. What somebody else says in its name
    /// is not believed unless it could be true.
    fn tells(&self) -> Result<()> {
        let limit = |mtu| {
            let hosts = self.cluster.hosts().iter();
            hosts.map(|host| self.router()?.limit(host.address(self.underlay)?, mtu)).collect::<Result<Vec<_>>>()
        };
        let wire = self.cluster.host(1).capture()?;
        limit(Some(NARROW))?;
        let since = Instant::now();
        for (from, to) in [(0, 1), (1, 0)] {
            for family in Family::ALL {
                let to = self.pods[to].pod.address(family)?;
                await_exact(self.pods[from].pod.netns(), to, self.full, self.narrow, PATIENCE)
                    .with_context(|| self.what.clone())?;
            }
        }
        let learned = since.elapsed();
        let seen = wire.stop()?;
        self.ensure_nothing_may_be_cut(seen.packets())?;
        self.disbelieves(seen.packets()).context("forged errors")?;
        limit(None)?;
        let since = Instant::now();
        self.await_routes(self.full, RECOVERED)?;
        let recovered = since.elapsed();
        self.all_exact(self.full)?;
        eprintln!("{}: told and exact after {learned:?}, the whole path again after {recovered:?}", self.what);
        Ok(())
    }

    /// What the tunnels are on the wire.
    fn kind(&self) -> Kind {
        if self.mode == Mode::Wireguard { Kind::Wireguard } else { Kind::Esp }
    }

    /// Over IPv4 a router cuts what does not forbid it, and then tells nobody. The kernel's WireGuard forbids nothing by itself. Only
    /// what has to pass in any case may go without DF; what the host itself has cut already does.
    fn ensure_nothing_may_be_cut(&self, sent: &[Packet]) -> Result<()> {
        if self.mode != Mode::Wireguard {
            // ESP carries on what the packet within says, and answers to pings permit it.
            return Ok(());
        }
        let least = least_underlay_mtu(self.mode, self.underlay);
        let large = |packet: &&Packet| packet.outgoing && packet.kind == self.kind() && packet.ip_length > least;
        let (whole, cut): (Vec<_>, Vec<_>) =
            sent.iter().filter(large).filter(|packet| !packet.fragment).partition(|packet| packet.dont_fragment);
        let (whole, cut) = (whole.len(), cut.len());
        ensure!(
            whole > 0 && cut == 0,
            "{}: {whole} packets of more than {least} bytes with DF, {cut} without",
            self.what
        );
        eprintln!("{}: {whole} packets of more than {least} bytes, all with DF", self.what);
        Ok(())
    }

    /// It is the rule that forbids it: without, and with nobody who would bring it back, the device's packets may be cut.
    fn may_be_cut_without_the_rule(&self) -> Result<()> {
        let (one, [a, b]) = (self.cluster.host(1), &self.pods);
        one.stop_daemon(Signal::SIGKILL)?;
        one.program("nft").args(["flush", "chain", "inet", "husk", "output-dont-fragment"]).check()?;
        let wire = one.capture()?;
        let reach = Echo::to(b.pod.address(Family::Ipv4)?).packet_size(self.full).run(a.pod.netns())?;
        ensure!(reach.arrived(), "{}: {reach:?}", self.what);
        let sent = wire.stop()?;
        ensure!(self.ensure_nothing_may_be_cut(sent.packets()).is_err(), "{}: DF without the rule", self.what);
        Ok(())
    }

    /// Errors that quote what the first host sent, or what it could have sent.
    fn disbelieves(&self, sent: &[Packet]) -> Result<()> {
        let (one, peer) = (self.cluster.host(1), self.cluster.host(2).address(self.underlay)?);
        let forgeries = [Forgery::of(one, peer, self.kind(), sent)?, Forgery::of_an_echo(one, peer)?];
        let least = u16::try_from(least_underlay_mtu(self.mode, self.underlay))?;
        let before = dropped(one)?;
        for forgery in &forgeries {
            for mtu in [68, 1280, least - 1] {
                self.cluster.deliver(1, &forgery.frame(mtu)?)?;
            }
        }
        eventually("the forged errors to be dropped", PATIENCE, || Ok(dropped(one)? == before + 6))
            .with_context(|| format!("{}: {} of 6", self.what, dropped(one).unwrap_or(0) - before))?;
        let believed = path_mtu(one.netns(), peer)?;
        ensure!(believed >= NARROW, "{}: the kernel believes that {believed} bytes pass", self.what);
        for to in self.pods[1].pod.addresses() {
            let route = path_mtu(one.netns(), to)?;
            ensure!(route >= self.narrow, "{}: the tunnel shrank to {route} bytes to {to}", self.what);
        }
        // The very same with one byte more could be true.
        self.cluster.deliver(1, &forgeries[0].frame(least)?)?;
        eventually("the kernel to believe what could be true", PATIENCE, || {
            Ok(path_mtu(one.netns(), peer)? == usize::from(least))
        })
        .context(self.what.clone())
    }
}
