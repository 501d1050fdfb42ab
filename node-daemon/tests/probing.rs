//! The thread that probes and answers, against the real kernel: two network namespaces that nothing else knows of, joined by a
//! veth pair, each with a prober.
//!
//! They need `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`, iproute2 and nft.

// clippy.toml allows this in test functions; what they call belongs to the test as well.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use husk_dataplane::netns::Netns;
use husk_dataplane::probe::{ProbeSocket, Sent};
use husk_node_daemon::probing::Probing;
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Limit, Limits, Path, Report, Standing, Target, wire};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Addresses of the two nodes.
const FAMILIES: [(Family, [&str; 2]); 2] =
    [(Family::Ipv4, ["192.0.2.1", "192.0.2.2"]), (Family::Ipv6, ["2001:db8::1", "2001:db8::2"])];

fn run(netns: &Netns, program: &str, arguments: &str) {
    let run = || Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    let output = netns.run_in(run).unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn peer() -> NodeName {
    NodeName::new("peer").unwrap()
}

fn eventually(what: &str, mut question: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !question() {
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Node {
    netns: Netns,
    probing: Probing,
    /// The run directory.
    folder: tempfile::TempDir,
    changes: Arc<AtomicUsize>,
}

impl Node {
    fn start(netns: Netns) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let changes = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&changes);
        let changed = move || {
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let probing = netns.run_in(|| Probing::start(folder.path(), "boot", changed).unwrap()).unwrap();
        Self { netns, probing, folder, changes }
    }

    fn reports(&self) -> BTreeMap<Path, Report> {
        self.probing.reports()
    }

    /// Waits until what was concluded after `since` is this for both families.
    fn await_standing(&self, wanted: Standing, since: Duration) {
        let mut last = BTreeMap::new();
        let deadline = Instant::now() + PATIENCE;
        loop {
            last.clone_from(&self.reports());
            let is = |it: &Report| it.standing == wanted && it.concluded.is_some_and(|at| at > since);
            if last.len() == 2 && last.values().all(is) {
                return;
            }
            assert!(Instant::now() < deadline, "not {wanted:?}: {last:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Two nodes on a link with this MTU, that do not know each other yet.
fn pair(mtu: u32) -> [Node; 2] {
    let namespaces = [(); 2].map(|()| Netns::new_unnamed().unwrap());
    let far = format!("/proc/{}/fd/{}", std::process::id(), namespaces[1].as_fd().as_raw_fd());
    run(&namespaces[0], "ip", &format!("link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {far}"));
    for (number, netns) in namespaces.iter().enumerate() {
        for interface in ["lo", "eth0"] {
            run(netns, "ip", &format!("link set {interface} up"));
        }
        run(netns, "ip", &format!("addr add {}/24 dev eth0", FAMILIES[0].1[number]));
        run(netns, "ip", &format!("addr add {}/64 dev eth0 nodad", FAMILIES[1].1[number]));
    }
    namespaces.map(Node::start)
}

/// What the node `number` has to probe.
fn targets(number: usize, promised: u32) -> BTreeMap<Path, Target> {
    let target = |(family, addresses): (Family, [&str; 2])| {
        let (own, to) = (address(addresses[number]), address(addresses[1 - number]));
        (
            Path { peer: peer(), family },
            Target { address: to, own, promised, floor: 1280, tunnelled: true, handshakes: false },
        )
    };
    FAMILIES.map(target).into()
}

#[test]
fn what_passes_is_found_to_the_byte_and_so_is_that_it_passes_again() {
    let [one, two] = pair(1500);
    one.probing.set_targets(&targets(0, 1500));
    two.probing.set_targets(&targets(1, 1500));
    for node in [&one, &two] {
        node.await_standing(Standing::Verified, Duration::ZERO);
        let reports = node.reports();
        assert!(reports.values().all(|it| it.passes == Some(1500) && it.rtt.is_some()), "{reports:?}");
        let agrees = |it: &Report| it.clock_skew.is_some_and(|skew| skew.at_least() == 0);
        assert!(reports.values().all(agrees), "one host has one clock: {reports:?}");
        assert!(node.probing.limits().is_empty());
    }
    // What is too large for something on the way vanishes without a word.
    let table = "table inet hole { chain in { type filter hook prerouting priority -400; meta length > 1372 drop; }; }";
    run_nft(&two.netns, table);
    let begun = one.probing.demand(&peer());
    one.await_standing(Standing::Limited { passes: 1372 }, begun);
    let limit = Limit { bytes: 1372, found: true };
    let limits = Limits::from([(peer(), Family::ALL.map(|family| (family, limit)).into())]);
    assert_eq!(one.probing.limits(), limits);
    eventually("the loop to be told", || one.changes.load(Ordering::Relaxed) >= 1);
    eventually("another daemon to know", || {
        Probing::start(one.folder.path(), "boot", || ()).unwrap().limits() == limits
    });
    // The other way is another path.
    let begun = two.probing.demand(&peer());
    two.await_standing(Standing::Verified, begun);
    assert!(two.probing.limits().is_empty());

    run_nft(&two.netns, "delete table inet hole");
    let begun = one.probing.demand(&peer());
    one.await_standing(Standing::Verified, begun);
    eventually("the limit to go", || one.probing.limits().is_empty());
    // It is told at most once a second.
    eventually("the loop to be told again", || one.changes.load(Ordering::Relaxed) >= 2);
}

fn run_nft(netns: &Netns, command: &str) {
    let output = netns.run_in(|| Command::new("nft").arg(command).output().unwrap()).unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_size_that_the_own_kernel_refuses_limits_nothing() {
    let [one, two] = pair(1500);
    two.probing.set_targets(&targets(1, 1500));
    // More than the device takes: a plan that is about to be carried out.
    one.probing.set_targets(&targets(0, 1600));
    two.await_standing(Standing::Verified, Duration::ZERO);
    for _ in 0..3 {
        let _ = one.probing.demand(&peer());
        let begun = two.probing.demand(&peer());
        two.await_standing(Standing::Verified, begun);
    }
    // What was not sent is not counted either.
    let reports = one.reports();
    assert!(
        reports.values().all(|it| it.answered == 0 && !matches!(it.standing, Standing::Limited { .. })),
        "{reports:?}"
    );
    assert!(one.probing.limits().is_empty());
    one.probing.set_targets(&targets(0, 1500));
    one.await_standing(Standing::Verified, Duration::ZERO);
    assert!(one.probing.limits().is_empty(), "{:?}", one.reports());
}

#[test]
fn a_peer_that_does_not_answer_at_all_is_unreachable_and_limits_nothing() {
    let [one, two] = pair(1500);
    one.probing.set_targets(&targets(0, 1500));
    // It runs, and does not know who asks.
    one.await_standing(Standing::Unreachable, Duration::ZERO);
    assert!(one.probing.limits().is_empty());
    two.probing.set_targets(&targets(1, 1500));
    // Known on both sides.
    let begun = one.probing.demand(&peer());
    one.await_standing(Standing::Verified, begun);
    // An address that comes later is bound then.
    run(&one.netns, "ip", "addr add 192.0.2.3/24 dev eth0");
    run(&two.netns, "ip", "addr add 192.0.2.4/24 dev eth0");
    let mut moved = targets(0, 1500);
    let path = Path { peer: peer(), family: Family::Ipv4 };
    moved.get_mut(&path).unwrap().address = address("192.0.2.4");
    one.probing.set_targets(&moved);
    eventually("no answer from an address that nobody probes from", || {
        one.reports()[&path].standing == Standing::Unreachable
    });
    let mut from = targets(1, 1500);
    from.get_mut(&path).unwrap().own = address("192.0.2.4");
    two.probing.set_targets(&from);
    let begun = one.probing.demand(&peer());
    one.await_standing(Standing::Verified, begun);
}

/// What a socket at this address gets for a question from its port.
fn is_answered(netns: &Netns, own: &str, port: u16, to: &str) -> bool {
    let socket = netns.run_in(|| ProbeSocket::bind(address(own), port).unwrap()).unwrap();
    let family = Family::of(address(own));
    let question = wire::probe(family, 200, 7);
    let mut buffer = [0; 256];
    for _ in 0..10 {
        assert_eq!(socket.send(SocketAddr::new(address(to), PROBE_PORT), &question), Sent::Sent);
        std::thread::sleep(Duration::from_millis(20));
        if let Some(received) = socket.receive(&mut buffer).unwrap() {
            let answer = wire::read(family, &buffer[..received.length]).unwrap();
            assert!(matches!(answer.kind, wire::Kind::Answer { time: Some(_) }), "{answer:?}");
            assert_eq!((answer.id, answer.size), (7, 200));
            return true;
        }
    }
    false
}

#[test]
fn nobody_but_a_known_peer_at_the_known_port_is_answered() {
    let [one, two] = pair(1500);
    drop(two.probing);
    one.probing.set_targets(&targets(0, 1500));
    run(&two.netns, "ip", "addr add 192.0.2.9/24 dev eth0");
    // The other prober's port is free as soon as its thread has ended.
    eventually("a peer to be answered", || {
        let free = two.netns.run_in(|| ProbeSocket::bind(address("192.0.2.2"), PROBE_PORT).is_ok()).unwrap();
        free && is_answered(&two.netns, "192.0.2.2", PROBE_PORT, "192.0.2.1")
    });
    assert!(is_answered(&two.netns, "2001:db8::2", PROBE_PORT, "2001:db8::1"));
    assert!(!is_answered(&two.netns, "192.0.2.9", PROBE_PORT, "192.0.2.1"), "an address that is no peer's");
    assert!(!is_answered(&two.netns, "192.0.2.2", 40_000, "192.0.2.1"), "a port that anybody may have");
}

#[test]
fn the_next_daemon_gets_the_port_of_the_one_before() {
    let [one, two] = pair(1500);
    two.probing.set_targets(&targets(1, 1500));
    one.probing.set_targets(&targets(0, 1500));
    one.await_standing(Standing::Verified, Duration::ZERO);
    let Node { netns, probing, .. } = one;
    let next = Node::start(netns);
    next.probing.set_targets(&targets(0, 1500));
    eventually("the next one to try", || !next.reports().is_empty());
    drop(probing);
    next.await_standing(Standing::Verified, Duration::ZERO);
}
