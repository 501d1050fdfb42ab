use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;

use husk_overlay::kernel::{MapKeyType, MapValueType, NftTable};

use super::*;
use crate::netns::Netns;

const PORT: u16 = 5353;

fn addressee(protocol: TransportProtocol, address: Option<&str>) -> Addressee {
    Addressee { address: address.map(|text| text.parse().unwrap()), protocol, port: PORT }
}

fn leads_to(pod: &str) -> BTreeMap<Addressee, MapValue> {
    [(addressee(TransportProtocol::Udp, None), MapValue::Address(pod.parse().unwrap()))].into()
}

fn appeared(pod: &str) -> NftChange {
    NftChange::AddMappings { map: "m".into(), elements: leads_to(pod) }
}

fn went(pod: &str) -> NftChange {
    NftChange::DeleteMappings { map: "m".into(), elements: leads_to(pod) }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Connections of the namespace to the port, one line each.
fn connections() -> Vec<String> {
    let all = std::fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap();
    let port = format!("dport={PORT} ");
    all.lines().filter(|line| line.contains(&port)).map(str::to_owned).collect()
}

/// Ends what contradicts these changes.
fn forget(changes: &[NftChange]) -> Result<usize, Error> {
    let mut connections = Connections { unknown: false, moved: BTreeSet::new() };
    connections.note(changes);
    connections.settle(None)
}

/// What the kernel's mappings are when a new daemon looks for the first time: `port` leads to `holder`, if there is one.
fn found(holder: Option<&str>, pods: &[&str]) -> Mappings {
    let holders = holder.into_iter().map(|pod| {
        let pod: IpAddr = pod.parse().unwrap();
        ((Family::of(pod), addressee(TransportProtocol::Udp, None)), pod)
    });
    Mappings {
        holders: holders.collect(),
        blocks: ["127.0.0.8/29", "fd42::/64"].into_iter().map(|it| it.parse().unwrap()).collect(),
        pods: pods.iter().map(|it| it.parse().unwrap()).collect(),
    }
}

/// A datagram from a port of its own.
fn send(to: &str) {
    let to = SocketAddr::new(to.parse().unwrap(), PORT);
    let from = if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    UdpSocket::bind(from).unwrap().send_to(b"x", to).unwrap();
}

/// A namespace in which a datagram to 127.0.0.2 is translated to 127.0.0.9, and one to 127.0.0.3 is not, and others.
fn in_world(test: impl FnOnce() + Send) {
    let world = || {
        run("ip", &["link", "set", "lo", "up"]);
        run("nft", &["add table ip t; add chain ip t c { type nat hook output priority -100; }"]);
        run("nft", &["add rule ip t c ip daddr 127.0.0.2 dnat to 127.0.0.9"]);
        // Connections of a family are tracked from the first rule on that needs it.
        run("nft", &["add table ip6 t; add chain ip6 t c { type nat hook output priority -100; }"]);
        run("nft", &["add rule ip6 t c ip6 daddr fd42::9 dnat to ::1"]);
        ["127.0.0.2", "127.0.0.3", "::1"].into_iter().for_each(send);
        assert_eq!(connections().len(), 3, "{:?}", connections());
        test();
    };
    Netns::new_unnamed().unwrap().run_in(world).unwrap();
}

#[test]
fn a_connection_to_who_had_the_port_ends_with_the_mapping() {
    in_world(|| {
        assert_eq!(forget(&[went("127.0.0.8")]).unwrap(), 0, "another pod had it");
        assert_eq!(forget(&[went("127.0.0.9")]).unwrap(), 1);
        let left = connections();
        assert!(left.len() == 2 && !left.iter().any(|line| line.contains("127.0.0.9")), "{left:?}");
        assert_eq!(forget(&[went("127.0.0.9")]).unwrap(), 0);
    });
}

#[test]
fn a_connection_that_began_without_the_mapping_ends_when_it_appears() {
    in_world(|| {
        assert_eq!(forget(&[appeared("10.42.0.5")]).unwrap(), 1);
        let left = connections();
        assert!(left.len() == 2 && !left.iter().any(|line| line.contains("dst=127.0.0.3")), "{left:?}");
        assert_eq!(forget(&[appeared("fd42::5")]).unwrap(), 1, "the other family");
        assert_eq!(connections().len(), 1);
    });
}

/// A table that is made anew was missing for a while.
#[test]
fn what_stands_in_a_map_that_is_made_anew_counts_as_new() {
    let map =
        Map { key: MapKeyType::Port, value: MapValueType::Address(Family::Ipv4), elements: leads_to("10.42.0.5") };
    let table = NftTable { maps: [("m".to_owned(), map.clone())].into(), ..NftTable::default() };
    for change in [
        NftChange::CreateTable { table: table.clone() },
        NftChange::ReplaceTable { table, reason: String::new() },
        NftChange::AddMap { name: "m".into(), map: map.clone() },
        NftChange::ReplaceMap { name: "m".into(), map },
    ] {
        in_world(|| assert_eq!(forget(std::slice::from_ref(&change)).unwrap(), 1, "{change}"));
    }
}

/// For many ports at once, the kernel lists all connections.
#[test]
fn many_mappings_at_once_are_looked_through_in_one_go() {
    let mut elements = leads_to("127.0.0.9");
    for port in 1..200 {
        let key = Addressee { port, ..addressee(TransportProtocol::Udp, None) };
        elements.insert(key, MapValue::Address(Ipv4Addr::new(127, 0, 0, 9).into()));
    }
    in_world(|| {
        assert_eq!(forget(&[NftChange::DeleteMappings { map: "m".into(), elements: elements.clone() }]).unwrap(), 1);
        assert_eq!(connections().len(), 2);
    });
}

#[test]
fn only_what_the_mapping_is_about_is_touched() {
    let connection = |protocol: TransportProtocol, destination: &str, answers: &str| Connection {
        protocol: protocol.number(),
        destination: destination.parse().unwrap(),
        port: PORT,
        answers: answers.parse().unwrap(),
        tuple: Attributes::default(),
        id: None,
        zone: None,
    };
    let local = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
    let of = |protocol, address, from: Option<&str>| Moved {
        family: Family::Ipv4,
        addressee: addressee(protocol, address),
        from: from.map(|text| text.parse().unwrap()),
    };
    use TransportProtocol::{Tcp, Udp};
    let (node, pod) = ("192.0.2.1", "10.42.0.5");
    for (moved, connection, stale) in [
        (of(Tcp, None, Some(pod)), connection(Tcp, node, pod), true),
        (of(Tcp, None, Some(pod)), connection(Udp, node, pod), false),
        (of(Tcp, Some(node), Some(pod)), connection(Tcp, node, pod), true),
        (of(Tcp, Some("192.0.2.2"), Some(pod)), connection(Tcp, node, pod), false),
        // To the pod's own address, whose port happens to be the same.
        (of(Tcp, None, Some(pod)), connection(Tcp, pod, pod), false),
        (of(Udp, None, None), connection(Udp, node, node), true),
        // To somebody else, through this host.
        (of(Udp, None, None), connection(Udp, "198.51.100.1", "198.51.100.1"), false),
        // Translated by somebody else.
        (of(Udp, None, None), connection(Udp, node, "10.42.0.9"), false),
        // With a server of the host.
        (of(Tcp, None, None), connection(Tcp, node, node), false),
    ] {
        assert_eq!(connection.contradicts(&moved, &local), stale, "{moved:?} {connection:?}");
    }
}

/// The mappings are in the kernel, and what was to be done about their connections died with the daemon before.
#[test]
fn the_first_look_of_a_process_ends_what_an_earlier_one_left() {
    for (mappings, gone) in [
        // Its port is another pod's by now, and connections that began before that one had it go too.
        (found(Some("127.0.0.10"), &["127.0.0.9", "127.0.0.10"]), &["dst=127.0.0.2", "dst=127.0.0.3"][..]),
        // Nobody's, and its pod is gone.
        (found(None, &["127.0.0.10"]), &["dst=127.0.0.2"]),
        // Nobody's, and its pod is there: somebody else may have translated it.
        (found(None, &["127.0.0.9"]), &[]),
        // Translated to what is no pod of ours.
        (Mappings { blocks: BTreeSet::new(), ..found(None, &[]) }, &[]),
        (
            Mappings { blocks: BTreeSet::new(), ..found(Some("fd42::5"), &[]) },
            &["dst=0000:0000:0000:0000:0000:0000:0000:0001"],
        ),
        // As it is mapped.
        (found(Some("127.0.0.9"), &["127.0.0.9"]), &["dst=127.0.0.3"]),
    ] {
        in_world(|| {
            let mut connections = Connections::default();
            assert!(connections.are_unknown());
            assert_eq!(
                connections.settle(Some(&mappings)).unwrap(),
                gone.len(),
                "{mappings:?}: {:?}",
                self::connections()
            );
            let left = self::connections();
            assert_eq!(left.len(), 3 - gone.len());
            assert!(!left.iter().any(|line| gone.iter().any(|it| line.contains(it))), "{mappings:?}: {left:?}");
            assert!(!connections.are_unknown(), "once is enough");
            send("127.0.0.2");
            assert_eq!(connections.settle(None).unwrap(), 0);
        });
    }
}

/// Runs something without the privilege to ask the kernel about connections.
fn unprivileged<T>(run: impl FnOnce() -> T) -> T {
    let become_user = |user: nix::libc::uid_t| {
        #[expect(unsafe_code, reason = "the C library changes all threads")]
        // SAFETY: setresuid(2) takes three numbers. Called past the C library it changes the calling thread alone.
        let done = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1_i64, i64::from(user), -1_i64) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    become_user(65534);
    let outcome = run();
    become_user(0);
    outcome
}

#[test]
fn what_could_not_be_done_is_done_the_next_time() {
    in_world(|| {
        let mut connections = Connections::default();
        let mappings = found(None, &[]);
        let error = unprivileged(|| connections.settle(Some(&mappings))).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EPERM), "{error}");
        assert!(connections.are_unknown());
        assert_eq!(connections.settle(Some(&mappings)).unwrap(), 1);
        // The same of a change.
        send("127.0.0.2");
        connections.note(&[went("127.0.0.9")]);
        assert!(unprivileged(|| connections.settle(None)).is_err());
        // Another pass changes nothing.
        connections.note(&[]);
        assert_eq!(connections.settle(None).unwrap(), 1);
        // The pod has its port again before the clean-up succeeds: its connections are as they should be.
        send("127.0.0.2");
        connections.note(&[went("127.0.0.9")]);
        assert!(unprivileged(|| connections.settle(None)).is_err());
        connections.note(&[appeared("127.0.0.9")]);
        assert_eq!(connections.settle(None).unwrap(), 1, "only the one that was not translated");
        assert!(self::connections().iter().any(|line| line.contains("src=127.0.0.9")), "{:?}", self::connections());
        // Another pod has it: those of the first one are still to end.
        connections.note(&[went("127.0.0.9")]);
        connections.note(&[appeared("127.0.0.10")]);
        assert_eq!(connections.settle(None).unwrap(), 1);
    });
}
