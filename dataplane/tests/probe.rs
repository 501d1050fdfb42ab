//! The socket of probes against the real kernel, over a veth pair between two network namespaces that nothing else knows of.
//!
//! They need `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`, and iproute2.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;

use husk_dataplane::netns::Netns;
use husk_dataplane::probe::{ProbeSocket, Received, Sent};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PORT: u16 = 4875;

/// How long a packet between two namespaces may take on a busy machine.
const PATIENCE: u16 = 10_000;

/// Addresses of both ends, and the bytes that IP and UDP take.
const FAMILIES: [(&str, &str, usize); 2] = [("192.0.2.1", "192.0.2.2", 28), ("2001:db8::1", "2001:db8::2", 48)];

struct Pair {
    here: Netns,
    there: Netns,
}

fn ip(netns: &Netns, arguments: &str) {
    let output = netns.run_in(|| Command::new("ip").args(arguments.split_whitespace()).output().unwrap()).unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Pair {
    /// Two hosts on a link with this MTU.
    fn new(mtu: usize) -> Self {
        let pair = Self { here: Netns::new_unnamed().unwrap(), there: Netns::new_unnamed().unwrap() };
        let there = File::from(pair.there.as_fd().try_clone_to_owned().unwrap());
        let peer = format!("/proc/{}/fd/{}", std::process::id(), there.as_raw_fd());
        ip(&pair.here, &format!("link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {peer}"));
        for (number, netns) in [&pair.here, &pair.there].into_iter().enumerate() {
            for (interface, option) in [("lo", ""), ("eth0", "addrgenmode none")] {
                if !option.is_empty() {
                    ip(netns, &format!("link set {interface} {option}"));
                }
                ip(netns, &format!("link set {interface} up"));
            }
            for ((own, peer, headers), length) in FAMILIES.iter().zip([24, 64]) {
                let address = [own, peer][number];
                let option = if *headers == 48 { "nodad" } else { "" };
                ip(netns, &format!("addr add {address}/{length} dev eth0 {option}"));
            }
        }
        pair
    }

    fn sockets(&self, own: &str, peer: &str) -> (ProbeSocket, ProbeSocket) {
        (bound(&self.here, own).unwrap(), bound(&self.there, peer).unwrap())
    }
}

fn bound(netns: &Netns, address: &str) -> Result<ProbeSocket, husk_dataplane::Error> {
    netns.run_in(|| ProbeSocket::bind(address.parse().unwrap(), PORT)).unwrap()
}

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), PORT)
}

/// The next packet that comes.
fn received(socket: &ProbeSocket) -> Received {
    let mut buffer = vec![0; 1 << 16];
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut waiting, PollTimeout::from(PATIENCE)), Ok(1), "nothing came to {}", socket.own());
    socket.receive(&mut buffer).unwrap().expect("poll says that there is something")
}

#[test]
fn what_fits_the_device_arrives_whole_and_one_byte_more_is_refused_here() {
    for mtu in [1280, 1500, 9001] {
        let pair = Pair::new(mtu);
        for (own, peer, headers) in FAMILIES {
            let (here, there) = pair.sockets(own, peer);
            let full = vec![0; mtu - headers];
            assert_eq!(here.send(at(peer), &full), Sent::Sent, "{own}");
            assert_eq!(received(&there), Received { length: full.len(), from: at(own) });
            assert_eq!(here.send(at(peer), &vec![0; full.len() + 1]), Sent::TooBig, "{own}: {} bytes", mtu + 1);
            // What was refused came neither whole nor in fragments, and the answer goes the same way back.
            assert_eq!(there.send(at(own), b"answer"), Sent::Sent);
            assert_eq!(received(&here), Received { length: 6, from: at(peer) });
            assert_eq!(there.receive(&mut [0; 16]).unwrap(), None);
        }
    }
}

#[test]
fn a_route_that_was_lowered_does_not_keep_a_larger_size_from_being_tried() {
    let pair = Pair::new(1500);
    for (own, peer, headers) in FAMILIES {
        let length = if headers == 48 { 128 } else { 32 };
        ip(&pair.here, &format!("route add {peer}/{length} dev eth0 mtu 1300"));
        let (here, there) = pair.sockets(own, peer);
        assert_eq!(here.send(at(peer), &vec![0; 1500 - headers]), Sent::Sent, "{own}");
        assert_eq!(received(&there).length, 1500 - headers, "{own}");
        // An ordinary socket is held to the route: it sends fragments, or refuses.
        assert_eq!(here.send(at(peer), &vec![0; 1501 - headers]), Sent::TooBig, "{own}");
    }
}

#[test]
fn a_smaller_link_further_on_gets_no_fragments() {
    // The far end takes 1300 bytes: what is larger is dropped by a router that may not fragment (DF).
    let pair = Pair::new(1500);
    ip(&pair.there, "link add next mtu 1300 type veth peer name sink mtu 1300");
    for interface in ["next", "sink"] {
        ip(&pair.there, &format!("link set {interface} up"));
    }
    pair.there.run_in(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap()).unwrap();
    ip(&pair.there, "addr add 198.51.100.1/24 dev next");
    ip(&pair.there, "neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev next nud permanent");
    ip(&pair.here, "route add 198.51.100.0/24 via 192.0.2.2");
    let here = bound(&pair.here, "192.0.2.1").unwrap();
    let counter = || -> (u64, u64) {
        let text = pair.there.run_in(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap()).unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
        let names: Vec<_> = lines.next().unwrap().split_whitespace().collect();
        let values: Vec<_> = lines.next().unwrap().split_whitespace().collect();
        let of = |name| values[names.iter().position(|it| *it == name).unwrap()].parse().unwrap();
        (of("FragFails"), of("FragCreates"))
    };
    assert_eq!(here.send(at("198.51.100.2"), &vec![0; 1500 - 28]), Sent::Sent);
    // Over a veth pair a packet is received before the call that sends it returns, or soon after.
    let deadline = std::time::Instant::now() + std::time::Duration::from_millis(PATIENCE.into());
    while counter().0 == 0 {
        assert!(std::time::Instant::now() < deadline, "{:?}", counter());
        std::thread::yield_now();
    }
    assert_eq!(counter(), (1, 0), "refused, since it may not be fragmented");
    // The router's word that it is too big does not end up on the socket, nor does it limit the next one.
    assert_eq!(here.receive(&mut [0; 16]).unwrap(), None);
    assert_eq!(here.send(at("198.51.100.2"), &vec![0; 1500 - 28]), Sent::Sent);
}

#[test]
fn no_address_no_way_and_a_taken_port_are_told_apart() {
    let pair = Pair::new(1500);
    let missing = bound(&pair.here, "198.51.100.7").unwrap_err();
    assert_eq!(missing.errno(), Some(Errno::EADDRNOTAVAIL));
    assert!(missing.to_string().contains("cannot bind the UDP socket of probes at 198.51.100.7:4875"), "{missing}");
    for (own, peer, _) in FAMILIES {
        let (here, there) = pair.sockets(own, peer);
        let taken = bound(&pair.here, own).unwrap_err();
        assert_eq!(taken.errno(), Some(Errno::EADDRINUSE));
        assert!(taken.remedy().contains("ss -ulnp"));
        let nowhere = if own.contains(':') { "2001:db8:1::1" } else { "198.51.100.9" };
        assert_eq!(here.send(at(nowhere), b"x"), Sent::NoWay(Errno::ENETUNREACH), "{own}");
        // Nobody listens there any more: the ICMP error that comes back is not for this socket to tell.
        drop(there);
        assert_eq!(here.send(at(peer), b"x"), Sent::Sent);
        assert_eq!(here.send(at(peer), b"x"), Sent::Sent);
        assert_eq!(here.receive(&mut [0; 16]).unwrap(), None);
    }
}
