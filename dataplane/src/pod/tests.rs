//! Pods wired for real, hosts and pods being unnamed namespaces that end with the test.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;

mod bandwidth;
mod vacate;

const MTU: u32 = 1420;

fn name(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

fn spec(number: u8, addresses: &[&str]) -> PodSpec {
    PodSpec {
        host_interface: name(&format!("husk{number:011x}")),
        host_mac: MacAddress([2, 0, 0, 0, 1, number]),
        alias: format!("net/pod{number}/eth0"),
        pod_interface: name("eth0"),
        pod_mac: MacAddress([2, 0, 0, 0, 2, number]),
        addresses: addresses.iter().map(|it| it.parse::<IpAddr>().unwrap()).collect(),
        mtu: MTU,
        bandwidth: None,
        loopback: false,
    }
}

/// Runs a command line in a namespace; it must succeed.
fn run(netns: &Netns, line: &str) -> String {
    let output = netns
        .run_in(|| {
            let mut words = line.split_ascii_whitespace();
            Command::new(words.next().unwrap()).args(words).output().unwrap()
        })
        .unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

struct Host(Netns);

impl Host {
    fn new() -> Self {
        let host = Self(Netns::new_unnamed().unwrap());
        run(&host.0, "ip link set lo up");
        run(&host.0, "ip address add 192.0.2.1/32 dev lo");
        run(&host.0, "ip address add 2001:db8::1/128 dev lo nodad");
        run(&host.0, "sysctl -q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        host
    }

    fn attach(&self, spec: &PodSpec, pod: &Netns) -> Result<BTreeSet<Family>, Error> {
        self.0.run_in(|| attach(spec, pod)).unwrap()
    }

    fn detach(&self, spec: &PodSpec) -> bool {
        self.0.run_in(|| detach(&spec.host_interface)).unwrap().unwrap()
    }

    fn check(&self, spec: &PodSpec, pod: &Netns) -> Vec<String> {
        self.0.run_in(|| check(spec, pod, &PodMtu::OneOf(vec![spec.mtu]))).unwrap().unwrap()
    }

    fn interfaces(&self) -> Vec<HostInterface> {
        self.0.run_in(host_interfaces).unwrap().unwrap()
    }
}

/// Opens a TCP connection from one namespace to an address in another and sends a word; returns the client's address.
fn connects(from: &Netns, to: &Netns, address: &str) -> IpAddr {
    let address: IpAddr = address.parse().unwrap();
    let listener = to.run_in(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let mut client = from.run_in(|| TcpStream::connect_timeout(&target, Duration::from_secs(5)).unwrap()).unwrap();
    let (mut server, peer) = listener.accept().unwrap();
    client.write_all(b"husk").unwrap();
    let mut word = [0; 4];
    server.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"husk");
    peer.ip()
}

#[test]
fn a_pod_reaches_its_host_and_its_neighbour_at_once() {
    let (host, a, b) = (Host::new(), Netns::new_unnamed().unwrap(), Netns::new_unnamed().unwrap());
    let (spec_a, spec_b) = (spec(1, &["10.42.0.1", "fd42::1"]), spec(2, &["10.42.0.2", "fd42::2"]));
    host.attach(&spec_a, &a).unwrap();
    host.attach(&spec_b, &b).unwrap();
    assert_eq!(host.check(&spec_a, &a), [""; 0]);
    assert_eq!(host.check(&spec_b, &b), [""; 0]);
    for (address, own) in [("192.0.2.1", "10.42.0.1"), ("2001:db8::1", "fd42::1")] {
        assert_eq!(connects(&a, &host.0, address).to_string(), own);
    }
    for (address, own) in [("10.42.0.2", "10.42.0.1"), ("fd42::2", "fd42::1")] {
        assert_eq!(connects(&a, &b, address).to_string(), own);
    }
    for address in ["10.42.0.1", "fd42::1"] {
        connects(&host.0, &a, address);
        connects(&a, &a, address);
    }
}

#[test]
fn the_host_routes_carry_our_mark() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1", "fd42::1"]);
    host.attach(&spec, &pod).unwrap();
    assert_eq!(run(&host.0, "ip -4 route show proto 72").trim_end(), "10.42.0.1 dev husk00000000001 scope link");
    let ipv6 = run(&host.0, "ip -6 route show proto 72");
    assert!(ipv6.contains("fd42::1 dev husk00000000001 metric 1024"), "{ipv6}");
    let index = host.0.run_in(|| host_interface_index(&spec.host_interface)).unwrap().unwrap().unwrap();
    assert_eq!(
        host.interfaces(),
        [HostInterface { name: spec.host_interface.clone(), alias: "net/pod1/eth0".to_owned(), index }]
    );
    let ours = run(&host.0, "ip address show dev husk00000000001");
    assert!(!ours.contains("inet"), "the host end has an address: {ours}");
}

/// A plugin chained behind may have given the pod's end an MTU of its own; the host's end is not its business.
#[test]
fn the_pods_end_may_have_another_mtu_where_that_is_allowed() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1"]);
    host.attach(&spec, &pod).unwrap();
    run(&pod, "ip link set eth0 mtu 1300");
    let found = |mtu: PodMtu| host.0.run_in(|| check(&spec, &pod, &mtu)).unwrap().unwrap();
    assert_eq!(found(PodMtu::OneOf(vec![MTU, 1300])), [""; 0]);
    assert_eq!(found(PodMtu::AtMost(MTU)), [""; 0]);
    assert_eq!(found(PodMtu::Any), [""; 0]);
    let unknown = PodSpec { mtu: 0, ..spec.clone() };
    assert_eq!(host.0.run_in(|| check(&unknown, &pod, &PodMtu::Any)).unwrap().unwrap(), [""; 0]);
    for (mtu, expected) in [(PodMtu::OneOf(vec![MTU, 1301]), "1301"), (PodMtu::AtMost(1299), "at most 1299")] {
        let [deviation] = found(mtu).try_into().unwrap();
        assert!(deviation.contains("eth0 has the MTU 1300") && deviation.contains(expected), "{deviation}");
    }
    run(&host.0, "ip link set husk00000000001 mtu 1300");
    assert_eq!(found(PodMtu::AtMost(MTU)).len(), 1);
}

/// An ADD may be held up for as long as a runtime takes to delete its container and to add it again.
#[test]
fn what_is_wired_late_is_not_what_has_its_name_by_then() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let (first, second) = (spec(1, &["10.42.0.1"]), spec(1, &["10.42.0.2"]));
    let created = |spec: &PodSpec| {
        let made = || {
            let mut socket = Socket::open(Protocol::Route)?;
            create(&mut socket, spec, &pod)?;
            ends(&mut socket, &spec.host_interface)
        };
        host.0.run_in(made).unwrap().unwrap()
    };
    let old = created(&first);
    host.0.run_in(|| detach(&first.host_interface)).unwrap().unwrap();
    host.attach(&second, &pod).unwrap();
    let late = host.0.run_in(|| wire_pod(&first, &pod, old.peer)).unwrap();
    assert_eq!(late.err().and_then(|error| error.errno()), Some(Errno::ENODEV));
    let mut inside = pod.run_in(|| Socket::open(Protocol::Route)).unwrap().unwrap();
    assert!(wait_until_ready(&mut inside, &first, old.peer).is_err(), "it is another one that is ready");
    let addresses = run(&pod, "ip address show dev eth0");
    assert!(addresses.contains("10.42.0.2") && !addresses.contains("10.42.0.1"), "{addresses}");
    assert_eq!(host.check(&second, &pod), [""; 0]);
}

/// With the interface, so that nobody has to wait until a daemon does it.
#[test]
fn loopback_addresses_are_routed_to_a_pod_that_is_reached_through_them() {
    for (loopback, value) in [(true, "1"), (false, "0")] {
        let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
        let spec = PodSpec { loopback, ..spec(1, &["10.42.0.1"]) };
        host.attach(&spec, &pod).unwrap();
        let set = run(&host.0, "sysctl -n net.ipv4.conf.husk00000000001.route_localnet");
        assert_eq!(set.trim_end(), value);
    }
}

#[test]
fn one_family_alone() {
    for addresses in [["10.42.0.1"], ["fd42::1"]] {
        let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
        let spec = spec(1, &addresses);
        host.attach(&spec, &pod).unwrap();
        assert_eq!(host.check(&spec, &pod), [""; 0]);
    }
}

#[test]
fn ipv6_works_where_the_runtime_switched_it_off() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    run(&pod, "sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    run(&host.0, "sysctl -q -w net.ipv6.conf.default.disable_ipv6=1");
    host.attach(&spec(1, &["fd42::1"]), &pod).unwrap();
    connects(&pod, &host.0, "2001:db8::1");
    connects(&pod, &pod, "fd42::1");
}

#[test]
fn detach_needs_no_namespace_and_can_be_repeated() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1", "fd42::1"]);
    assert!(!host.detach(&spec));
    host.attach(&spec, &pod).unwrap();
    assert!(host.detach(&spec));
    assert!(!pod.run_in(|| interface_exists(&Netns::current().unwrap(), &name("eth0"))).unwrap().unwrap());
    assert_eq!(run(&host.0, "ip route show table all proto 72"), "");
    assert!(!host.detach(&spec));
}

#[test]
fn an_interface_of_that_name_is_left_alone() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    run(&pod, "ip link add eth0 type bridge");
    let error = host.attach(&spec(1, &["10.42.0.1"]), &pod).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EEXIST));
    assert!(error.to_string().contains("eth0"), "{error}");
    assert!(run(&pod, "ip -d link show eth0").contains("bridge"));
    assert_eq!(host.interfaces(), []);
}

#[test]
fn residue_of_the_same_attachment_is_replaced() {
    let (host, old, pod) = (Host::new(), Netns::new_unnamed().unwrap(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1"]);
    host.attach(&spec, &old).unwrap();
    host.attach(&spec, &pod).unwrap();
    assert_eq!(host.check(&spec, &pod), [""; 0]);
    assert!(!pod.run_in(|| interface_exists(&old, &name("eth0"))).unwrap().unwrap());
}

/// A default route of somebody else in the main table and in those that would be an interface's own.
fn take_every_default_route(pod: &Netns) {
    run(pod, "ip link add other type bridge");
    run(pod, "ip link set other up");
    run(pod, "ip route add default dev other");
    for index in 2..9 {
        run(pod, &format!("ip route add default dev other table {}", by_source::table(index)));
    }
}

#[test]
fn a_second_interface_leaves_the_default_route_to_the_first_and_answers_by_itself() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let first = spec(1, &["10.42.0.1", "fd42::1"]);
    let second = PodSpec { pod_interface: name("net1"), ..spec(2, &["10.42.0.2", "fd42::2"]) };
    assert_eq!(host.attach(&first, &pod).unwrap(), Family::ALL.into_iter().collect());
    assert_eq!(host.attach(&second, &pod).unwrap(), BTreeSet::new());
    for ip in ["ip -4", "ip -6"] {
        let defaults = run(&pod, &format!("{ip} route show default"));
        assert!(defaults.contains("dev eth0") && !defaults.contains("dev net1"), "{defaults}");
    }
    for spec in [&first, &second] {
        assert_eq!(host.check(spec, &pod), [""; 0]);
    }
    for address in ["10.42.0.1", "10.42.0.2", "fd42::1", "fd42::2"] {
        connects(&host.0, &pod, address);
    }
    run(&pod, "ip rule del from 10.42.0.2");
    let deviations = host.check(&second, &pod);
    assert!(matches!(&deviations[..], [one] if one.contains("the rule from 10.42.0.2 lookup")), "{deviations:?}");
    run(&pod, "ip -6 route flush table all default dev net1");
    let deviations = host.check(&second, &pod);
    assert!(deviations.iter().any(|it| it.contains("default via fe80::1 dev net1")), "{deviations:?}");

    // A rule of the attachment before this one is no obstacle.
    host.detach(&second);
    assert_eq!(host.attach(&second, &pod).unwrap(), BTreeSet::new());
    assert_eq!(host.check(&second, &pod), [""; 0]);
}

#[test]
fn a_failure_in_the_pod_leaves_nothing() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    take_every_default_route(&pod);
    let error = host.attach(&spec(1, &["10.42.0.1", "fd42::1"]), &pod).unwrap_err();
    assert!(error.to_string().contains("default via 169.254.1.1"), "{error}");
    assert_eq!(host.interfaces(), []);
    assert!(!run(&pod, "ip -br link").contains("eth0"));
}

#[test]
fn a_failure_on_the_host_leaves_nothing_and_foreign_routes_stay() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    run(&host.0, "ip route add unreachable 10.42.0.1/32");
    let error = host.attach(&spec(1, &["10.42.0.1"]), &pod).unwrap_err();
    assert!(error.to_string().contains("10.42.0.1/32 dev husk00000000001"), "{error}");
    assert_eq!(host.interfaces(), []);
    assert!(!run(&pod, "ip -br link").contains("eth0"));
    assert!(run(&host.0, "ip route show type unreachable").contains("10.42.0.1"));
}

#[test]
fn check_names_every_deviation() {
    let spec = spec(1, &["10.42.0.1", "fd42::1"]);
    let cases = [
        ("host", "ip route del 10.42.0.1 proto 72", "the route 10.42.0.1/32 dev husk"),
        ("host", "ip route del fd42::1 proto 72", "the route fd42::1/128 dev husk"),
        ("host", "ip neigh del 10.42.0.1 dev husk00000000001", "neighbour 10.42.0.1"),
        ("host", "ip neigh replace fd42::1 lladdr 02:00:00:00:09:09 dev husk00000000001", "neighbour fd42::1"),
        ("host", "ip link set husk00000000001 mtu 1300", "MTU 1300 instead of 1420"),
        ("host", "ip link set husk00000000001 down", "husk00000000001 is down"),
        ("pod", "ip link set eth0 mtu 1300", "MTU 1300 instead of 1420"),
        ("pod", "ip link set eth0 address 02:00:00:00:09:09", "Ethernet address"),
        ("pod", "ip route del default", "default via 169.254.1.1"),
        ("pod", "ip -6 route del default", "default via fe80::1"),
        ("pod", "ip neigh del fe80::1 dev eth0", "neighbour fe80::1"),
        ("pod", "ip address del 10.42.0.1/32 dev eth0", "lacks the address 10.42.0.1"),
        ("pod", "ip address del fd42::1/128 dev eth0", "lacks the address fd42::1"),
        ("pod", "ip link set eth0 down", "eth0 is down"),
        ("pod", "ip link del eth0", "eth0 is missing"),
    ];
    for (place, damage, expected) in cases {
        let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
        host.attach(&spec, &pod).unwrap();
        run(if place == "host" { &host.0 } else { &pod }, damage);
        let deviations = host.check(&spec, &pod);
        assert!(deviations.iter().any(|it| it.contains(expected)), "{damage}: {deviations:?}");
    }
}

#[test]
fn the_mtu_changes_while_the_pod_lives() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let wired = spec(1, &["10.42.0.1", "fd42::1"]);
    host.attach(&wired, &pod).unwrap();
    for mtu in [1280, 8000, MTU] {
        let tuned = PodSpec { mtu, ..wired.clone() };
        host.0.run_in(|| set_mtu(&tuned, &pod)).unwrap().unwrap();
        assert_eq!(host.check(&tuned, &pod), [""; 0]);
    }
    host.detach(&wired);
    let error = host.0.run_in(|| set_mtu(&wired, &pod)).unwrap().unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENODEV));
}

/// The daemon follows the underlay while a pod is being wired.
/// A pod whose kernel was told that little passes to another.
fn told(host: &Host, pod: &Netns) {
    host.attach(&spec(1, &["10.42.0.1", "fd42::1"]), pod).unwrap();
    let other = Netns::new_unnamed().unwrap();
    host.attach(&spec(2, &["10.42.0.2", "fd42::2"]), &other).unwrap();
    // A host forwards by a route's MTU only if that is locked.
    run(&host.0, "ip route change 10.42.0.2 dev husk00000000002 proto 72 scope link mtu lock 1300");
    run(&host.0, "ip -6 route change fd42::2 dev husk00000000002 proto 72 metric 1024 mtu lock 1300");
    for (from, to) in [("10.42.0.1", "10.42.0.2"), ("fd42::1", "fd42::2")] {
        let sent = pod.run_in(|| UdpSocket::bind((from, 0)).unwrap().send_to(&[0; 1372], (to, 9))).unwrap();
        sent.unwrap();
    }
    let known = remembered(pod);
    assert!(known.iter().all(|route| route.contains("mtu 1300")), "{known:?}");
}

/// What a pod's kernel says of its ways to the other pod.
fn remembered(pod: &Netns) -> [String; 2] {
    ["ip route get 10.42.0.2", "ip -6 route get fd42::2"].map(|line| run(pod, line))
}

#[test]
fn what_a_pod_was_told_of_paths_is_forgotten_and_its_routes_stay() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    told(&host, &pod);
    let routes = || ["ip route show", "ip -6 route show"].map(|line| run(&pod, line));
    let before = routes();
    host.0.run_in(|| forget_paths(&spec(1, &["10.42.0.1", "fd42::1"]), &pod)).unwrap().unwrap();
    let known = remembered(&pod);
    assert!(known.iter().all(|route| !route.contains("mtu")), "{known:?}");
    assert_eq!(routes(), before);
    assert_eq!(host.check(&spec(1, &["10.42.0.1", "fd42::1"]), &pod), [""; 0]);
    connects(&pod, &host.0, "2001:db8::1");
}

#[test]
fn a_default_route_of_somebody_else_is_not_replaced() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    told(&host, &pod);
    run(&pod, "ip link add net1 type veth peer name peer1");
    run(&pod, "ip link set net1 up");
    // The kernel takes the two for one route with two next hops, or the other for the first.
    run(&pod, "ip -6 route prepend default via fe80::9 dev net1 metric 1024");
    let before = run(&pod, "ip -6 route show default");
    host.0.run_in(|| forget_paths(&spec(1, &["10.42.0.1", "fd42::1"]), &pod)).unwrap().unwrap();
    assert_eq!(run(&pod, "ip -6 route show default"), before);
}

#[test]
fn what_the_daemon_was_faster_with_is_wanted_whatever_mtu_it_knew_of() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.5", "fd42::5"]);
    host.attach(&spec, &pod).unwrap();
    let index = host.0.run_in(|| nix::net::if_::if_nametoindex(spec.host_interface.as_str())).unwrap().unwrap();
    let wire_again = || host.0.run_in(|| wire_host(&mut Socket::open(Protocol::Route)?, index, &spec)).unwrap();
    wire_again().unwrap();
    run(&host.0, &format!("ip link set {} mtu 8950", spec.host_interface));
    wire_again().unwrap();
    // What somebody else put there is not.
    run(&host.0, &format!("ip neigh replace 10.42.0.5 lladdr 02:00:00:00:00:99 dev {}", spec.host_interface));
    assert_eq!(wire_again().unwrap_err().errno(), Some(Errno::EEXIST));
}

#[test]
fn a_spoofing_pod_is_stopped_before_any_rule_exists() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    host.attach(&spec(1, &["10.42.0.1"]), &pod).unwrap();
    run(&pod, "ip address add 10.42.0.9/32 dev eth0");
    let before = dropped_by_reverse_path(&host.0);
    let source: SocketAddr = "10.42.0.9:0".parse().unwrap();
    let socket = pod.run_in(|| std::net::UdpSocket::bind(source).unwrap()).unwrap();
    socket.send_to(b"x", "192.0.2.1:9").unwrap();
    assert_eq!(dropped_by_reverse_path(&host.0), before + 1);
}

fn dropped_by_reverse_path(host: &Netns) -> u64 {
    let text = run(host, "cat /proc/thread-self/net/netstat");
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_ascii_whitespace);
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    names.zip(values).find(|(name, _)| *name == "IPReversePathFilter").unwrap().1.parse().unwrap()
}

#[test]
fn an_alias_is_cut_between_letters() {
    let alias = PodSpec { alias: "ä".repeat(200), ..spec(1, &[]) }.alias();
    assert_eq!(alias.len(), 254);
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    host.attach(&PodSpec { alias: "x".repeat(300), ..spec(1, &["10.42.0.1"]) }, &pod).unwrap();
    assert_eq!(host.interfaces()[0].alias.len(), 254);
}

/// Sends a datagram from one namespace to an address in another; true if it arrives.
fn datagram_arrives(from: &Netns, to: &Netns, address: &str) -> bool {
    let address: IpAddr = address.parse().unwrap();
    let inbox = to.run_in(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    inbox.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let target = inbox.local_addr().unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    from.run_in(|| UdpSocket::bind(any).unwrap().send_to(b"husk", target).unwrap()).unwrap();
    inbox.recv(&mut [0; 4]).is_ok()
}

#[test]
fn the_first_packets_of_a_pod_are_not_lost() {
    let host = Host::new();
    // Others who come and go keep the kernel from doing at once what it does in the background.
    let crowd = Netns::new_unnamed().unwrap();
    let stop = AtomicBool::new(false);
    let end = Instant::now() + Duration::from_secs(30);
    let lost = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                run(&crowd, "ip link add one type veth peer name two");
                run(&crowd, "ip link set one up");
                run(&crowd, "ip link set two up");
                run(&crowd, "ip link delete one");
            }
        });
        let lost = (1..=20).find_map(|number| {
            let pod = Netns::new_unnamed().unwrap();
            let (v4, v6) = (format!("10.42.0.{number}"), format!("fd42::{number}"));
            host.attach(&spec(number, &[&v4, &v6]), &pod).unwrap();
            let tries = [
                (&host.0, &pod, v6.as_str()),
                (&pod, &host.0, "192.0.2.1"),
                (&host.0, &pod, &v4),
                (&pod, &host.0, "2001:db8::1"),
            ];
            tries.into_iter().find(|(from, to, address)| !datagram_arrives(from, to, address)).map(|it| it.2.to_owned())
        });
        stop.store(true, Ordering::Relaxed);
        lost
    });
    assert_eq!(lost, None, "the first packet to this address was lost");
}
