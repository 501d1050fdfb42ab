//! What somebody removes or changes by hand is back within a second; what is not Husk's is never touched.

#[path = "healing/state.rs"]
mod state;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::pod::await_answers_among;
use husk_tests::probe::Echo;
use husk_tests::process::binary;
use husk_tests::{Cluster, Family, Host, Mode, Pod, Signal, eventually};
use serde_json::Value;

use state::State;

/// What is promised.
const PROMISE: Duration = Duration::from_secs(1);

/// What this machine may take longer than one that does nothing else: two cases run at once on two cores, and each look is
/// a process of its own.
const NOISE: Duration = Duration::from_millis(500);

/// Two hosts with a pod each.
struct Pair {
    a: Pod,
    b: Pod,
    cluster: Cluster,
}

impl Pair {
    fn start(mode: Mode) -> Result<Self> {
        let cluster = Cluster::builder().mode(mode).hosts(2).start()?;
        let pair = Self { a: cluster.host(1).add_pod("a")?, b: cluster.host(2).add_pod("b")?, cluster };
        pair.connected()?;
        in_sync(pair.one(), Duration::from_secs(3))?;
        Ok(pair)
    }

    fn one(&self) -> &Host {
        self.cluster.host(1)
    }

    fn connected(&self) -> Result<()> {
        await_answers_among(&[&self.a, &self.b], Duration::from_secs(4))
    }

    /// Does `harm` to the first host, sees that it took, and that all is back in time, to the last rule.
    fn heals(&self, what: &str, harm: impl FnOnce(&Host) -> Result<()>) -> Result<()> {
        self.heals_within(what, PROMISE, harm)
    }

    fn heals_within(&self, what: &str, limit: Duration, harm: impl FnOnce(&Host) -> Result<()>) -> Result<()> {
        let host = self.one();
        let before = State::of(host)?;
        let passes = changes_logged(host);
        let started = Instant::now();
        harm(host).with_context(|| format!("doing harm to {what}"))?;
        let mut last = State::default();
        let healed = eventually(what, limit + NOISE, || {
            last = State::of(host)?;
            // The harm may be undone before anybody can look: the daemon's log then tells that it was.
            Ok(last == before && changes_logged(host) > passes)
        });
        healed.with_context(|| format!("{what} is not back: {}", before.difference(&last)))?;
        eprintln!("{what}: back after {:?}", started.elapsed());
        self.connected().with_context(|| format!("after {what}"))
    }
}

/// Passes of the daemon that changed something.
fn changes_logged(host: &Host) -> usize {
    host.daemon_log().matches(" reconciled").count()
}

/// Waits until the daemon finds nothing to change.
fn in_sync(host: &Host, limit: Duration) -> Result<()> {
    let mut last = String::new();
    let waited = eventually("huskctl diff to be empty", limit, || {
        let diff = host.huskctl(["diff"])?;
        last = format!("{:?} {}{}", diff.status.code(), diff.stdout, diff.stderr);
        Ok(diff.status.code() == Some(0))
    });
    waited.with_context(|| format!("huskctl diff on {} says {last}", host.name()))
}

fn ip(arguments: &'static str) -> impl FnOnce(&Host) -> Result<()> {
    move |host| host.ip(arguments.split(' ')).map(drop)
}

fn run(program: &'static str, arguments: String) -> impl FnOnce(&Host) -> Result<()> {
    move |host| host.program(program).args(arguments.split(' ')).check().map(drop)
}

/// The host end of a pod's interface.
fn host_end(pod: &Pod) -> Result<String> {
    let interfaces = pod.result()["interfaces"].as_array().context("a result without interfaces")?;
    let outside = interfaces.iter().find(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty());
    Ok(outside.and_then(|interface| interface["name"].as_str()).context("no host interface")?.to_owned())
}

fn address(pod: &Pod, family: Family) -> Result<IpAddr> {
    pod.address(family)
}

/// A route of the host that leads to the peer.
fn peer_route(host: &Host, family: &str) -> Result<String> {
    let routes = host.ip([family, "route", "show", "proto", "72"])?;
    let route = routes.lines().find(|line| line.contains("dev husk-") || line.contains("dev eth0"));
    let route = route.with_context(|| format!("no route to the peer in {routes}"))?;
    Ok(route.split_whitespace().next().unwrap_or_default().to_owned())
}

/// What is the same in every mode.
fn common_tables_heal(pair: &Pair) -> Result<()> {
    for family in ["-4", "-6"] {
        let route = peer_route(pair.one(), family)?;
        pair.heals(
            &format!("the {family} route to the peer"),
            run("ip", format!("{family} route del {route} proto 72")),
        )?;
        pair.heals(
            "a route that leads elsewhere",
            run("ip", format!("{family} route replace blackhole {route} proto 72")),
        )?;
    }
    pair.heals("all routes", |host| {
        run("ip", "-4 route flush proto 72".to_owned())(host)?;
        run("ip", "-6 route flush proto 72".to_owned())(host)
    })?;
    pair.heals(
        "the floor of unreachable routes",
        run("ip", "route del unreachable 10.42.0.0/16 metric 4294967294".to_owned()),
    )?;
    let (interface, v4, v6) = (host_end(&pair.a)?, address(&pair.a, Family::Ipv4)?, address(&pair.a, Family::Ipv6)?);
    pair.heals("the pod's own route", run("ip", format!("route del {v4} dev {interface}")))?;
    pair.heals("the pod's own IPv6 route", run("ip", format!("-6 route del {v6} dev {interface}")))?;
    pair.heals("the pod's neighbour", run("ip", format!("neigh del {v4} dev {interface}")))?;
    pair.heals("the pod's IPv6 neighbour", run("ip", format!("neigh del {v6} dev {interface}")))?;
    pair.heals(
        "a neighbour with another address",
        run("ip", format!("neigh replace {v4} lladdr 02:00:00:00:00:01 dev {interface} nud permanent")),
    )?;
    pair.heals("the nft table", run("nft", "delete table inet husk".to_owned()))?;
    pair.heals("a set's elements", run("nft", "flush set inet husk cluster_ipv4".to_owned()))?;
    pair.heals("a stranger in a set", run("nft", "add element inet husk cluster_ipv4 { 198.18.0.0/15 }".to_owned()))?;
    pair.heals("a chain's rules", run("nft", "flush chain inet husk prerouting-guard".to_owned()))?;
    pair.heals("one rule", |host| {
        let chain = host.program("nft").args("-a list chain inet husk prerouting-guard".split(' ')).check()?;
        let rule = chain.lines().find(|line| line.contains("spoofed") && line.contains("handle"));
        let handle = rule.and_then(|line| line.rsplit(' ').next()).with_context(|| format!("no rule in {chain}"))?;
        run("nft", format!("delete rule inet husk prerouting-guard handle {handle}"))(host)
    })?;
    pair.heals("a stranger's rule in front", run("nft", "insert rule inet husk prerouting-guard accept".to_owned()))?;
    pair.heals("IPv4 forwarding", |host| host.netns().sysctl("net/ipv4/ip_forward", "0"))?;
    pair.heals("IPv6 forwarding", |host| host.netns().sysctl("net/ipv6/conf/all/forwarding", "0"))?;
    Ok(())
}

#[test]
fn a_wireguard_node_heals_within_a_second() -> Result<()> {
    let pair = Pair::start(Mode::Wireguard)?;
    common_tables_heal(&pair)?;
    let peer = pair.one().program("wg").args(["show", "husk-wg0", "peers"]).check()?.trim().to_owned();
    let of_device = |command: &str| run("wg", format!("set husk-wg0 {command}"));
    pair.heals("the WireGuard peer", of_device(&format!("peer {peer} remove")))?;
    pair.heals("the peer's allowed-ips", of_device(&format!("peer {peer} allowed-ips 10.42.99.0/24")))?;
    // While a session lives the device follows its peer wherever it speaks from, and is let: the first packet brings it back.
    of_device(&format!("peer {peer} endpoint 192.0.2.77:1"))(pair.one())?;
    let echo = Echo::to(pair.a.address(Family::Ipv4)?).limit(Duration::from_secs(1));
    assert!(echo.run(pair.b.netns())?.arrived(), "the device does not follow its peer");
    let endpoints = pair.one().program("wg").args(["show", "husk-wg0", "endpoints"]).check()?;
    assert!(!endpoints.contains("192.0.2.77"), "{endpoints}");
    pair.heals(
        "a stranger among the peers",
        of_device("peer AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE= allowed-ips 10.42.98.0/24"),
    )?;
    pair.heals("the router's address", |host| {
        let addresses = host.ip(["-o", "-4", "addr", "show", "dev", "husk-wg0"])?;
        let own = addresses.split_whitespace().nth(3).context("no router address")?.to_owned();
        run("ip", format!("addr del {own} dev husk-wg0"))(host)
    })?;
    pair.heals("the device's MTU", ip("link set husk-wg0 mtu 1300"))?;
    pair.heals("a device that was set down", ip("link set husk-wg0 down"))?;
    // The device's process ends with its device, and another has to start.
    pair.heals_within("the device", Duration::from_secs(2), ip("link del husk-wg0"))?;
    in_sync(pair.one(), PROMISE + NOISE)
}

#[test]
fn a_vxlan_node_heals_within_a_second() -> Result<()> {
    let pair = Pair::start(Mode::Vxlan)?;
    common_tables_heal(&pair)?;
    let entry = |host: &Host, program: &str, what: &str| -> Result<String> {
        let listed = host.program(program).args(what.split(' ')).check()?;
        Ok(listed.lines().next().with_context(|| format!("no {what}"))?.to_owned())
    };
    pair.heals("the forwarding entry", |host| {
        let found = entry(host, "bridge", "fdb show dev husk-vx")?;
        let mac = found.split(' ').next().unwrap_or_default().to_owned();
        run("bridge", format!("fdb del {mac} dev husk-vx"))(host)
    })?;
    pair.heals("a forwarding entry that leads elsewhere", |host| {
        let found = entry(host, "bridge", "fdb show dev husk-vx")?;
        let mac = found.split(' ').next().unwrap_or_default().to_owned();
        run("bridge", format!("fdb replace {mac} dev husk-vx dst 192.0.2.77 self permanent"))(host)
    })?;
    pair.heals(
        "a flooding entry",
        run("bridge", "fdb append 00:00:00:00:00:00 dev husk-vx dst 192.0.2.77 self permanent".to_owned()),
    )?;
    pair.heals("the peer's neighbour", |host| {
        let found = entry(host, "ip", "-4 neigh show dev husk-vx")?;
        let router = found.split(' ').next().unwrap_or_default().to_owned();
        run("ip", format!("neigh del {router} dev husk-vx"))(host)
    })?;
    pair.heals("the list of nodes", run("nft", "flush set inet husk nodes".to_owned()))?;
    pair.heals("the device's address", ip("link set husk-vx address 02:00:00:00:00:01"))?;
    pair.heals("a device that was set down", ip("link set husk-vx down"))?;
    pair.heals("the device", ip("link del husk-vx"))?;
    pair.heals("a device made otherwise", |host| {
        // A daemon that runs makes its own device again before anybody can make another.
        let daemon = host.processes().into_iter().find(|process| process.command.contains("huskd run"));
        let daemon = daemon.context("no daemon runs")?;
        daemon.signal(Signal::SIGSTOP)?;
        let made = host
            .netns()
            .ip_batch("link del husk-vx\nlink add husk-vx type vxlan id 77 dstport 4789 local 192.0.2.1 learning");
        daemon.signal(Signal::SIGCONT)?;
        made
    })?;
    in_sync(pair.one(), PROMISE + NOISE)
}

#[test]
fn a_direct_node_heals_within_a_second() -> Result<()> {
    let pair = Pair::start(Mode::Direct)?;
    common_tables_heal(&pair)?;
    in_sync(pair.one(), PROMISE + NOISE)
}

/// What looks like Husk's and is not, as an administrator or another product has it.
const FOREIGN: &str = "link add husky0 type veth peer name husk\n\
    link add husk-wg2 type veth peer name husk-wg0x\n\
    link add huskffff type veth peer name wg0\n\
    link add vxlan99 type vxlan id 99 dstport 8472 local 192.0.2.1\n\
    link set husky0 up\nlink set husk up\nlink set husk-wg2 up\nlink set wg0 up\nlink set vxlan99 up\n\
    addr add 203.0.113.1/24 dev husky0\naddr add 203.0.114.1/24 dev husk-wg2\n\
    route add 10.42.250.0/24 dev husky0 proto 73\nroute add 10.42.251.0/24 dev husky0 proto static\n\
    route add unreachable 10.42.252.0/24 proto bird\nroute add 203.0.115.0/24 dev husk-wg2\n\
    route add fd42:0:0:fa::/64 dev husky0 proto static\n\
    route add 10.42.249.0/24 dev husky0 proto boot table 99\n\
    rule add from 203.0.113.0/24 lookup 99\n\
    neigh add 203.0.113.7 lladdr 02:00:00:00:00:07 dev husky0 nud permanent\n\
    neigh add 203.0.114.7 lladdr 02:00:00:00:00:08 dev husk-wg2 nud permanent\n";

const FOREIGN_RULES: &str = "
table inet husky {
    chain c {
        type filter hook forward priority 0
        counter accept
    }
}
table ip husk {
    set cluster_ipv4 {
        type ipv4_addr
        elements = { 203.0.113.9 }
    }
}
";

/// All that is in a namespace and none of Husk's.
fn foreign(host: &Host) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for command in ["-o link show", "-o addr show", "rule show", "neigh show nud permanent"] {
        found.push(host.ip(command.split(' '))?);
    }
    for command in ["-4 route show table all", "-6 route show table all"] {
        let routes = host.ip(command.split(' '))?;
        // A router gets the anycast addresses of its subnets (RFC 4291, section 2.6.1) from the kernel.
        let kept = routes.lines().filter(|line| !line.contains("proto 72") && !line.starts_with("anycast "));
        found.extend(kept.map(str::to_owned));
    }
    found.push(host.program("nft").args(["--stateless", "list", "table", "inet", "husky"]).check()?);
    found.push(host.program("nft").args(["--stateless", "list", "table", "ip", "husk"]).check()?);
    let ours = ["husk-wg0:", "husk-wg0 ", "husk-vx"];
    let lines = found.iter().flat_map(|text| text.lines()).map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.filter(|line| !ours.iter().any(|name| line.contains(name))).map(str::to_owned).collect())
}

#[test]
fn what_is_not_ours_is_never_touched() -> Result<()> {
    for mode in [Mode::Wireguard, Mode::Vxlan] {
        let cluster = Cluster::builder().mode(mode).hosts(2).build()?;
        let host = cluster.host(1);
        host.netns().ip_batch(FOREIGN)?;
        host.program("nft").args(["-f", "-"]).stdin(FOREIGN_RULES).check()?;
        // What IPv6 does to the new interfaces by itself takes a moment.
        let mut before = foreign(host)?;
        eventually("the interfaces to settle", Duration::from_secs(5), || {
            let last = std::mem::replace(&mut before, foreign(host)?);
            std::thread::sleep(Duration::from_millis(100));
            Ok(last == before && !before.iter().any(|line| line.contains("tentative")))
        })?;
        let unchanged = |when: &str| -> Result<()> {
            let after = foreign(host)?;
            let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
            let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
            ensure!(lost.is_empty() && new.is_empty(), "{mode}, {when}: lost {lost:#?}, new {new:#?}");
            Ok(())
        };
        cluster.hosts().iter().try_for_each(Host::start)?;
        cluster.wait_ready()?;
        in_sync(host, Duration::from_secs(3))?;
        unchanged("with the daemon running")?;
        // Our own leftovers go in the same sweep that spares the others.
        host.netns().ip_batch("route add 10.42.253.0/24 dev eth0 proto 72")?;
        eventually("the sweep", PROMISE + NOISE, || Ok(host.ip(["route", "show", "10.42.253.0/24"])?.is_empty()))?;
        unchanged("after a sweep")?;
        host.restart_daemon(Signal::SIGKILL)?;
        in_sync(host, Duration::from_secs(3))?;
        unchanged("after a restart")?;
        host.stop_daemon(Signal::SIGTERM)?;
        host.program(binary("huskd")?).args(["cleanup"]).check()?;
        assert!(!host.ip(["route", "show", "table", "all"])?.contains("proto 72"));
        unchanged("after cleanup")?;
    }
    Ok(())
}

#[test]
fn diff_tells_what_the_daemon_would_change() -> Result<()> {
    let pair = Pair::start(Mode::Vxlan)?;
    let host = pair.one();
    let diff = host.huskctl(["diff"])?;
    assert_eq!(diff.status.code(), Some(0), "{}{}", diff.stdout, diff.stderr);
    let changes = host.huskctl_json(["diff"])?["changes"].clone();
    assert_eq!(changes, Value::Array(Vec::new()), "{}", diff.stdout);

    host.stop_daemon(Signal::SIGTERM)?;
    let route = peer_route(host, "-4")?;
    host.ip(["route", "del", route.as_str(), "proto", "72"])?;
    let diff = host.huskctl(["diff"])?;
    assert_eq!((diff.status.code(), diff.stdout.as_str()), (Some(3), ""));
    assert!(diff.stderr.contains("is huskd running?") && diff.stderr.contains("huskd run"), "{}", diff.stderr);
    assert!(host.ip(["route", "show", route.as_str()])?.is_empty());
    host.start_daemon()?;
    host.wait_ready()?;
    in_sync(host, Duration::from_secs(3))?;
    pair.connected()
}
