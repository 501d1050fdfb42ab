//! Policy while things change: connections that exist, pods that start, manifests that come and go, rules that somebody flushes.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::policy::scene::{Scene, Service, answers};
use husk_tests::probe::Stream;
use husk_tests::{Family, Mode, Netns, Pod, eventually, patience};
use serde_json::{Value, json};

const IN_FORCE: Duration = Duration::from_secs(10);

/// How long an answer may be under way.
const ANSWER: Duration = Duration::from_millis(300);

fn web() -> Value {
    json!({"matchLabels": {"app": "web"}})
}

/// Allows these pods to talk with the pod `web`, and nobody else.
fn allow(scene: &Scene, from: &Value) -> Result<()> {
    scene.policy("default", "web", &json!({"podSelector": web(), "ingress": [{"from": [{"podSelector": from}]}]}))
}

/// A socket in a namespace, connected both ways.
fn connected(netns: &Netns, own: SocketAddr, other: SocketAddr) -> Result<UdpSocket> {
    let socket = netns.run(|| -> std::io::Result<_> {
        let socket = UdpSocket::bind(own)?;
        socket.connect(other)?;
        Ok(socket)
    })??;
    socket.set_read_timeout(Some(patience(ANSWER)))?;
    Ok(socket)
}

/// True if a datagram sent by one arrives at the other; what was under way before does not count.
fn passes(from: &UdpSocket, to: &UdpSocket) -> Result<bool> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    // An error that an earlier datagram brought back is not this one's.
    if from.send(&number).is_err() {
        from.send(&number)?;
    }
    let mut buffer = [0; 64];
    let deadline = Instant::now() + patience(ANSWER);
    while Instant::now() < deadline {
        match to.recv(&mut buffer) {
            Ok(length) if buffer[..length] == number => return Ok(true),
            Ok(_) => {}
            Err(_) => return Ok(false),
        }
    }
    Ok(false)
}

/// A connection that policy does not allow any more ends at once, in both directions, and goes on when it is allowed again. Were
/// it only forgotten by connection tracking, the answers of the server would make it a connection of the server's.
#[test]
fn a_connection_ends_with_its_permission_and_goes_on_with_it() -> Result<()> {
    let scene = Scene::start(Mode::Vxlan)?;
    for family in Family::ALL {
        for client in ["near", "far"] {
            let ends = [(client, 4000), ("web", 4001)];
            let ends = ends.map(|(pod, port)| Ok(SocketAddr::new(scene.pod(pod).address(family)?, port)));
            let [own, server]: [Result<SocketAddr>; 2] = ends;
            let (own, server) = (own?, server?);
            let asking = connected(scene.pod(client).netns(), own, server)?;
            let answering = connected(scene.pod("web").netns(), server, own)?;
            let what = |text: &str| format!("{client}, {family}: {text}");
            ensure!(passes(&asking, &answering)? && passes(&answering, &asking)?, what("it begins"));
            allow(&scene, &json!({"matchLabels": {"app": "nobody"}}))?;
            eventually(&what("it ends"), IN_FORCE, || Ok(!passes(&asking, &answering)?))?;
            for _ in 0..3 {
                ensure!(!passes(&answering, &asking)?, what("the server cannot keep it alive"));
                ensure!(!passes(&asking, &answering)?, what("nor can the client"));
            }
            allow(&scene, &json!({"matchLabels": {"app": "client"}}))?;
            eventually(&what("it goes on"), IN_FORCE, || passes(&asking, &answering))?;
            ensure!(passes(&answering, &asking)?, what("with its answers"));
            scene.clear()?;
        }
    }
    // TCP: the same connection, not a new one, goes on where it stood.
    let at = SocketAddr::new(scene.pod("web").address(Family::Ipv4)?, 80);
    let flow = husk_tests::probe::tcp::Flow::start(scene.pod("far").netns(), at, 10_000)?;
    allow(&scene, &json!({"matchLabels": {"app": "nobody"}}))?;
    eventually("new connections are denied", IN_FORCE, || {
        Ok(!answers(scene.pod("far").netns(), Service::Tcp(80), at.ip())?)
    })?;
    thread::sleep(Duration::from_millis(1500));
    scene.clear()?;
    eventually("new connections are allowed", IN_FORCE, || {
        answers(scene.pod("far").netns(), Service::Tcp(80), at.ip())
    })?;
    let transfer = flow.stop()?;
    ensure!(transfer.largest_stall >= Duration::from_millis(1000), "it stood still meanwhile: {transfer:?}");
    scene.cluster.ensure_settled()
}

/// Datagrams from a pod that has not been added yet, in a tight loop.
struct Racer {
    stop: AtomicBool,
    /// Datagrams that the pod's kernel took.
    sent: AtomicU64,
}

impl Racer {
    fn run(&self, netns: &Netns, targets: &[SocketAddr]) -> Result<()> {
        netns.run(|| {
            while !self.stop.load(Ordering::Relaxed) {
                for target in targets {
                    let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
                    // Before it is wired there is no way, and no address to send from.
                    if UdpSocket::bind(any).and_then(|socket| socket.send_to(b"husk-race", target)).is_ok() {
                        self.sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        })
    }
}

/// Remembers who sent something to some addresses.
struct Sink {
    sockets: Vec<UdpSocket>,
}

impl Sink {
    fn open(pod: &Pod, port: u16) -> Result<Self> {
        let open = |family: &Family| -> Result<UdpSocket> {
            let at = SocketAddr::new(pod.address(*family)?, port);
            let socket = pod.netns().run(|| UdpSocket::bind(at))??;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        Ok(Self { sockets: Family::ALL.iter().map(open).collect::<Result<_>>()? })
    }

    fn senders(&self) -> Vec<IpAddr> {
        let mut buffer = [0; 64];
        let mut all = Vec::new();
        for socket in &self.sockets {
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                all.push(from.ip());
            }
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Where racers send to.
const RACE_PORT: u16 = 4100;

fn racing(scene: &Scene, name: &str, after: impl FnOnce(&Pod) -> Result<()>) -> Result<u64> {
    let targets = ["web", "far"].iter().flat_map(|pod| Family::ALL.map(|family| (*pod, family)));
    let targets: Vec<SocketAddr> = targets
        .map(|(pod, family)| Ok(SocketAddr::new(scene.pod(pod).address(family)?, RACE_PORT)))
        .collect::<Result<_>>()?;
    let mut pod = scene.cluster.host(1).sandbox(name)?;
    let racer = Racer { stop: AtomicBool::new(false), sent: AtomicU64::new(0) };
    let netns = pod.netns().handle()?;
    let result = thread::scope(|scope| {
        let running = scope.spawn(|| racer.run(&netns, &targets));
        let added = pod.add().and_then(|outcome| outcome.into_result().map(drop)).context("ADD");
        let result = added.and_then(|()| after(&pod));
        racer.stop.store(true, Ordering::Relaxed);
        running.join().map_err(|_| anyhow::anyhow!("the racer panicked"))??;
        result
    });
    result?;
    pod.del()?.into_result()?;
    Ok(racer.sent.load(Ordering::Relaxed))
}

/// A pod whose first act is to send, from before it is added: not one datagram passes that policy denies.
#[test]
fn nothing_that_is_denied_passes_while_pods_start() -> Result<()> {
    const PODS: usize = 200;
    let scene = Scene::start(Mode::Vxlan)?;
    let sinks = [Sink::open(scene.pod("web"), RACE_PORT)?, Sink::open(scene.pod("far"), RACE_PORT)?];
    let racers = json!({"matchLabels": {"app": "racer"}});
    scene.policy("default", "racers", &json!({"podSelector": racers, "policyTypes": ["Egress"]}))?;
    let described = |number: usize| -> Result<String> {
        let name = format!("racer{number}");
        scene.write(&json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": name, "labels": {"app": "racer"}}}))?;
        Ok(name)
    };
    let mut sent = 0;
    for number in 0..PODS {
        let name = described(number)?;
        // Some time to send after it was let onto the network: until the answer of its own host comes.
        sent += racing(&scene, &name, |pod| {
            let host = scene.cluster.host(1).address(Family::Ipv4)?;
            eventually("the pod reaches its own host", IN_FORCE, || answers(pod.netns(), Service::Ping, host))
        })?;
        let passed: Vec<Vec<IpAddr>> = sinks.iter().map(Sink::senders).collect();
        ensure!(passed.iter().all(Vec::is_empty), "pod {number}: datagrams of {passed:?} have passed");
    }
    ensure!(sent > 10 * PODS as u64, "the pods did try: {sent} datagrams");
    eprintln!("{PODS} pods tried {sent} datagrams, and none passed");
    Ok(())
}

/// What is allowed works from the first attempt after ADD, on this host and to another.
#[test]
fn what_is_allowed_passes_from_the_first_attempt() -> Result<()> {
    const PODS: usize = 50;
    let scene = Scene::start(Mode::Vxlan)?;
    let racers = json!({"matchLabels": {"app": "racer"}});
    let to = json!([{"to": [{"podSelector": {}}], "ports": [{"protocol": "UDP", "port": 80}]}]);
    scene.policy("default", "racers", &json!({"podSelector": racers, "policyTypes": ["Egress"], "egress": to}))?;
    for number in 0..PODS {
        let name = format!("racer{number}");
        scene.write(&json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": name, "labels": {"app": "racer"}}}))?;
        racing(&scene, &name, |pod| {
            for (to, family) in ["web", "far"].iter().flat_map(|to| Family::ALL.map(|family| (*to, family))) {
                let address = scene.pod(to).address(family)?;
                ensure!(answers(pod.netns(), Service::Udp(80), address)?, "{to}, {family}: the first attempt fails");
                // What will not come takes its time.
                if number % 10 == 0 {
                    ensure!(!answers(pod.netns(), Service::Udp(8080), address)?, "{to}, {family}: another port");
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A thousand changes a minute: nothing that is allowed is lost, nothing that is denied passes.
#[test]
fn changes_neither_lose_nor_leak() -> Result<()> {
    const CHANGES: u32 = 340;
    const EVERY: Duration = Duration::from_millis(60);
    let scene = Scene::start(Mode::Vxlan)?;
    allow(&scene, &json!({"matchExpressions": [{"key": "role", "operator": "Exists"}]}))?;
    scene.assert("one may", |it| it.to != "web" || it.from == "far")?;
    let to = scene.pod("web");
    let streams = |from: &str| -> Result<Vec<Stream>> {
        let of = |family: &Family| Stream::udp(scene.pod(from).netns(), to.netns(), to.address(*family)?, 500);
        Family::ALL.iter().map(of).collect()
    };
    let (allowed, denied) = (streams("far")?, streams("near")?);
    let started = Instant::now();
    for number in 0..CHANGES {
        let odd = number % 2 == 1;
        match number % 4 {
            0 | 1 => {
                // Labels of a pod that streams, and of many that do not.
                let pod = if odd { "far" } else { "near" };
                let labels = if odd {
                    json!({"app": "client", "role": format!("r{number}")})
                } else {
                    json!({"app": format!("a{number}")})
                };
                scene.describe(scene.pod(pod), labels, &[])?;
            }
            2 => scene.policy(
                "default",
                "other",
                &json!({"podSelector": {"matchLabels": {"app": format!("a{number}")}},
                "ingress": [{"from": [{"ipBlock": {"cidr": format!("10.{}.0.0/16", number % 256)}}]}]}),
            )?,
            _ => scene.policy(
                "default",
                "more",
                &json!({"podSelector": web(), "ingress": [{"from":
                [{"ipBlock": {"cidr": format!("192.0.2.{}/32", number % 256)}}], "ports": [{"port": 1000 + number}]}]}),
            )?,
        }
        // Paced against the clock, so that the changes come as often as they are said to.
        thread::sleep((started + EVERY * (number + 1)).saturating_duration_since(Instant::now()));
    }
    let took = started.elapsed();
    for stream in allowed {
        let report = stream.stop()?;
        ensure!(report.lossless(), "allowed: {report:?}");
    }
    for stream in denied {
        let report = stream.stop()?;
        ensure!(report.received == 0 && report.sent > 0, "denied: {report:?}");
    }
    eprintln!("{CHANGES} changes in {took:?}");
    scene.clear()?;
    scene.assert("without any policy, in the end", |_| true)?;
    scene.cluster.ensure_settled()
}

/// Somebody flushes all rules, again and again: where the table belongs to the daemon nothing that is denied passes; elsewhere only
/// for as long as it takes to put the table back, and what began meanwhile does not go on.
#[test]
fn rules_that_others_flush_hold_or_are_back_at_once() -> Result<()> {
    const FLUSHES: u32 = 10;
    let scene = Scene::start(Mode::Vxlan)?;
    allow(&scene, &json!({"matchLabels": {"app": "nobody"}}))?;
    scene.assert("nobody reaches it", |it| it.to != "web")?;
    let to = scene.pod("web");
    let stream = |from: &str| Stream::udp(scene.pod(from).netns(), to.netns(), to.address(Family::Ipv4)?, 500);
    let (near, far) = (stream("near")?, stream("far")?);
    let passed = || near.so_far().received + far.so_far().received;
    let owned = scene.cluster.host(1).program("nft").args(["list", "tables"]).check()?.contains("husk-policy");
    ensure!(owned, "there is a table");
    let mut largest = Duration::ZERO;
    for _ in 0..FLUSHES {
        let flushed = Instant::now();
        scene.cluster.host(1).program("nft").args(["flush", "ruleset"]).check()?;
        eventually("both tables to be there", Duration::from_secs(1), || {
            let tables = scene.cluster.host(1).program("nft").args(["list", "tables"]).check()?;
            Ok(tables.lines().filter(|line| line.starts_with("table inet husk")).count() == 2)
        })?;
        largest = largest.max(flushed.elapsed());
    }
    // What began in a gap, if there was any, has ended with it.
    let after = passed();
    ensure!(!answers(scene.pod("near").netns(), Service::Udp(80), to.address(Family::Ipv4)?)?, "it is denied again");
    ensure!(passed() == after, "a connection that began in a gap goes on");
    eprintln!("{FLUSHES} flushes: everything back within {largest:?}, {after} datagrams passed that are denied");
    if husk_tests::kernel::release()? >= (6, 9) {
        ensure!(after == 0, "the table belongs to the daemon, and {after} datagrams passed");
    }
    drop((near, far));
    scene.clear()?;
    scene.assert("without any policy, in the end", |_| true)?;
    scene.cluster.ensure_settled()
}
