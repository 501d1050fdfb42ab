//! Packet sockets against the real kernel: what a filter lets through, over a veth pair between two network namespaces and on a
//! TUN device, which has no link header.
//!
//! They need `CAP_SYS_ADMIN`, `CAP_NET_ADMIN` and `CAP_NET_RAW`, and iproute2.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_dataplane::capture::{CaptureSocket, Captured, Filter, Link, Test, WHOLE};
use husk_dataplane::netns::Netns;
use husk_overlay::name::InterfaceName;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a packet between two namespaces may take on a busy machine.
const PATIENCE: u16 = 10_000;

const LAST: u16 = 9999;

fn ip(netns: &Netns, arguments: &str) {
    let output = netns.run_in(|| Command::new("ip").args(arguments.split_whitespace()).output().unwrap()).unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two hosts on a link: .1 and .2, and ::1 and ::2. They know each other, so that no packet waits for its neighbour and is overtaken.
fn pair() -> (Netns, Netns) {
    let (here, there) = (Netns::new_unnamed().unwrap(), Netns::new_unnamed().unwrap());
    let file = File::from(there.as_fd().try_clone_to_owned().unwrap());
    let peer = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    ip(&here, &format!("link add eth0 type veth peer name eth0 netns {peer}"));
    for (number, netns) in [&here, &there].into_iter().enumerate() {
        let number = number + 1;
        ip(netns, &format!("link set eth0 addrgenmode none address 02:00:00:00:00:0{number} up"));
        ip(netns, &format!("addr add 192.0.2.{number}/24 dev eth0"));
        ip(netns, &format!("addr add 2001:db8::{number}/64 dev eth0 nodad"));
        let other = 3 - number;
        for address in ["192.0.2.", "2001:db8::"] {
            ip(netns, &format!("neigh add {address}{other} lladdr 02:00:00:00:00:0{other} dev eth0"));
        }
    }
    // The kernel drops what is sent before it has taken note of the carrier, which it does on its own time.
    let socket = there.run_in(|| UdpSocket::bind("192.0.2.2:1").unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let arrives = || {
        send(&here, "192.0.2.2", 1, b"");
        socket.recv(&mut []).is_ok()
    };
    assert!((0..PATIENCE / 20).any(|_| arrives()), "the link does not come up");
    (here, there)
}

fn interface(name: &str) -> InterfaceName {
    InterfaceName::new(name).unwrap()
}

fn send(netns: &Netns, to: &str, port: u16, payload: &[u8]) {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    netns.run_in(|| UdpSocket::bind(from).unwrap().send_to(payload, to).unwrap()).unwrap();
}

/// The UDP destination ports of what was captured until one was sent to [`LAST`].
fn ports(socket: &CaptureSocket) -> Vec<(u16, Captured)> {
    let mut seen = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let Some(captured) = socket.receive(&mut buffer).unwrap() else {
            let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            assert_ne!(poll(&mut waiting, PollTimeout::from(PATIENCE)).unwrap(), 0, "nothing more came after {seen:?}");
            continue;
        };
        let at_ip = if captured.link == Link::Ethernet { 14 } else { 0 };
        let packet = &buffer[at_ip..captured.kept];
        let at_udp = if packet[0] >> 4 == 4 { 20 } else { 40 };
        let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
        if protocol != 17 {
            continue;
        }
        let port = u16::from_be_bytes([packet[at_udp + 2], packet[at_udp + 3]]);
        if port == LAST {
            return seen;
        }
        seen.push((port, captured));
    }
}

fn address(text: &str) -> Test {
    Test::Address(text.parse().unwrap())
}

/// What a filter is for, its clauses, and the ports of what passes.
type Case = (&'static str, Vec<Vec<Test>>, &'static [u16]);

#[test]
fn the_kernel_filters_by_address_protocol_and_port() {
    let (here, there) = pair();
    let last = || Test::Port(LAST);
    let cases: [Case; 8] = [
        ("everything", vec![], &[1, 2, 3, 4]),
        ("an address of IPv4", vec![vec![address("192.0.2.2/32"), last()]], &[1, 2]),
        ("a prefix of IPv6", vec![vec![address("2001:db8::/36"), last()]], &[3, 4]),
        ("another prefix", vec![vec![address("198.51.100.0/24"), address("2001:db8:8000::/33"), last()]], &[]),
        ("a port", vec![vec![Test::Port(2), Test::Port(3), last()]], &[2, 3]),
        ("both", vec![vec![address("192.0.2.0/24"), last()], vec![Test::Port(2), Test::Port(3), last()]], &[2]),
        ("UDP", vec![vec![Test::Protocol(17)]], &[1, 2, 3, 4]),
        ("TCP, and what ends the case", vec![vec![Test::Protocol(6), last()]], &[]),
    ];
    for (what, clauses, expected) in cases {
        let filter = Filter { clauses };
        let open = || CaptureSocket::open(&interface("eth0"), &filter, WHOLE).unwrap();
        let sockets = [(&here, true), (&there, false)].map(|(netns, outgoing)| (netns.run_in(open).unwrap(), outgoing));
        for (to, port) in
            [("192.0.2.2", 1), ("192.0.2.2", 2), ("2001:db8::2", 3), ("2001:db8::2", 4), ("192.0.2.2", LAST)]
        {
            send(&here, to, port, b"payload");
        }
        for (mut socket, outgoing) in sockets {
            let seen = ports(&socket);
            assert_eq!(seen.iter().map(|(port, _)| *port).collect::<Vec<_>>(), expected, "{what}");
            for (_, captured) in seen {
                assert_eq!(
                    (captured.outgoing, captured.link, captured.kept),
                    (outgoing, Link::Ethernet, captured.length)
                );
                let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().abs_diff(captured.at);
                assert!(age < Duration::from_secs(60), "{captured:?}");
            }
            let counted = socket.statistics().unwrap();
            assert!(counted.passed > expected.len() as u64 && counted.lost == 0, "{what}: {counted:?}");
        }
    }
}

#[test]
fn a_device_without_a_link_header_is_filtered_alike() {
    let netns = Netns::new_unnamed().unwrap();
    ip(&netns, "tuntap add tun0 mode tun");
    ip(&netns, "link set tun0 addrgenmode none up");
    ip(&netns, "addr add 10.0.0.1/24 dev tun0");
    // A TUN device sends nothing before somebody has it open.
    let Ok(device) = netns.run_in(|| open_tun("tun0")).unwrap() else {
        panic!("/dev/net/tun is needed");
    };
    let filter = Filter { clauses: vec![vec![address("10.0.0.7/32")]] };
    let socket = netns.run_in(|| CaptureSocket::open(&interface("tun0"), &filter, 24).unwrap()).unwrap();
    assert_eq!(socket.link(), Link::None);
    send(&netns, "10.0.0.8", 1, b"payload");
    send(&netns, "10.0.0.7", 2, b"payload");
    send(&netns, "10.0.0.7", LAST, b"payload");
    let seen = ports(&socket);
    let lengths: Vec<_> = seen.iter().map(|(port, it)| (*port, it.kept, it.length)).collect();
    assert_eq!(lengths, [(2, 24, 20 + 8 + 7)], "what is cut is told with its whole length");
    drop(device);
}

/// Attaches to a TUN device that exists (`TUNSETIFF`, include/uapi/linux/if_tun.h).
#[allow(unsafe_code)]
fn open_tun(name: &str) -> std::io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    // IFF_TUN | IFF_NO_PI
    request[16..18].copy_from_slice(&0x1001_u16.to_ne_bytes());
    // SAFETY: the kernel reads and writes one `struct ifreq`, 40 bytes, which `request` is.
    let result = unsafe { nix::libc::ioctl(device.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(device) }
}

#[test]
fn what_is_not_read_in_time_is_counted() {
    let (here, _there) = pair();
    let open = || CaptureSocket::open(&interface("eth0"), &Filter::default(), WHOLE).unwrap();
    let mut socket = here.run_in(open).unwrap();
    let payload = vec![0; 60_000];
    // Twice what the queue holds, at 60 kB each.
    for _ in 0..2_400 {
        send(&here, "192.0.2.2", 1, &payload);
    }
    let counted = socket.statistics().unwrap();
    assert!(counted.lost > 0 && counted.passed > counted.lost, "{counted:?}");
    assert_eq!(socket.statistics().unwrap(), counted, "it is the sum since the socket was opened");
}

#[test]
fn there_has_to_be_such_an_interface() {
    let netns = Netns::new_unnamed().unwrap();
    let error =
        netns.run_in(|| CaptureSocket::open(&interface("eth7"), &Filter::default(), WHOLE).unwrap_err()).unwrap();
    assert!(error.to_string().contains("eth7") && error.remedy().contains("ip link"), "{error}");
}
