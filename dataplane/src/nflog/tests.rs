use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Instant;

use husk_overlay::marks::NFLOG_GROUP;
use proptest::prelude::*;

use super::*;
use crate::conntrack::{
    CTA_IP_V4_DST, CTA_IP_V4_SRC, CTA_PROTO_NUM, CTA_TUPLE_IP, CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_TUPLE_REPLY,
};
use crate::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_millis(300);
const LOG: &str = r#"limit rate 10000/second burst 10000 packets log prefix "husk-denied-egress" group 72 snaplen 256"#;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A namespace whose loopback interface drops and logs what is not for port 1; 127.0.0.2 and fd42::2 are translated to
/// 127.0.0.9 and fd42::9, port 53.
fn in_world(test: impl FnOnce(Log) + Send) {
    let world = || {
        run("ip", &["link", "set", "lo", "up"]);
        for address in ["fd42::2/128", "fd42::9/128"] {
            run("ip", &["address", "add", address, "dev", "lo", "nodad"]);
        }
        let log = Log::open(NFLOG_GROUP).unwrap();
        run("nft", &["add table inet t; add chain inet t nat { type nat hook output priority -100; }"]);
        run("nft", &["add rule inet t nat ip daddr 127.0.0.2 udp dport 5353 dnat ip to 127.0.0.9:53"]);
        run("nft", &["add rule inet t nat ip6 daddr fd42::2 tcp dport 5353 dnat ip6 to [fd42::9]:53"]);
        run("nft", &["add chain inet t c { type filter hook output priority 0; }"]);
        test(log);
    };
    Netns::new_unnamed().unwrap().run_in(world).unwrap();
}

fn deny(what: &str) {
    run("nft", &[&format!("add rule inet t c {what} {LOG} drop")]);
}

fn hear(log: &mut Log) -> Logged {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(logged) = log.next(MOMENT).unwrap() {
            return logged;
        }
    }
    panic!("nothing was told of");
}

fn address(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

fn connection(originator: &str, responder: &str, protocol: u8, port: u16) -> Connection {
    Connection { originator: address(originator), responder: address(responder), protocol, port }
}

#[test]
fn datagrams_streams_and_pings_of_both_families_are_told_of() {
    in_world(|mut log| {
        deny("udp dport { 53, 7 }");
        deny("tcp dport { 53, 80 }");
        deny("icmp type echo-request");
        deny("icmpv6 type echo-request");
        let socket = UdpSocket::bind("127.0.0.1:4000").unwrap();
        // The sender is told that it was dropped.
        let _ = socket.send_to(b"hello", "127.0.0.2:7");
        let heard = hear(&mut log);
        assert_eq!(heard.prefix, "husk-denied-egress");
        assert_eq!(heard.connection, connection("127.0.0.1", "127.0.0.2", 17, 7));
        assert_eq!(heard.packet.ports, Some((4000, 7)));
        assert_eq!((heard.packet.length, heard.input), (33, None));
        assert_eq!(heard.output, Some(1), "the loopback interface is the first");

        let to: SocketAddr = "[::1]:80".parse().unwrap();
        let _ = TcpStream::connect_timeout(&to, Duration::from_millis(100));
        let heard = hear(&mut log);
        assert_eq!(heard.connection, connection("::1", "::1", 6, 80));

        for (address, protocol, kind) in [("127.0.0.3", 1, 8), ("fd42::9", 58, 128)] {
            let _ = Command::new("ping").args(["-c1", "-W1", address]).output().unwrap();
            let mut heard = hear(&mut log);
            while heard.packet.protocol == 6 {
                // The stream is tried again and again.
                heard = hear(&mut log);
            }
            assert_eq!((heard.connection.protocol, heard.connection.port), (protocol, 0));
            assert_eq!(heard.packet.icmp, Some((kind, 0)));
            assert_eq!(heard.packet.destination, address.parse::<std::net::IpAddr>().unwrap());
        }
        assert_eq!(log.lost(), 0);
    });
}

#[test]
fn the_responder_is_who_answers_after_translation() {
    in_world(|mut log| {
        deny("udp dport 53");
        deny("tcp dport 53");
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let _ = socket.send_to(b"hello", "127.0.0.2:5353");
        assert_eq!(hear(&mut log).connection, connection("127.0.0.1", "127.0.0.9", 17, 53));
        let to: SocketAddr = "[fd42::2]:5353".parse().unwrap();
        let _ = TcpStream::connect_timeout(&to, Duration::from_millis(100));
        let heard = hear(&mut log).connection;
        assert_eq!((heard.responder, heard.port), (address("fd42::9"), 53));
    });
}

#[test]
fn an_answer_belongs_to_the_connection_of_who_asked() {
    in_world(|mut log| {
        let server = UdpSocket::bind("127.0.0.9:53").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"question", "127.0.0.9:53").unwrap();
        let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
        deny("udp sport 53");
        let _ = server.send_to(b"answer", from);
        let heard = hear(&mut log);
        assert_eq!(heard.connection, connection("127.0.0.1", "127.0.0.9", 17, 53));
        assert_eq!(heard.packet.ports.unwrap().0, 53, "the packet itself goes the other way");
    });
}

#[test]
fn a_group_has_one_listener() {
    in_world(|_log| {
        let error = Log::open(NFLOG_GROUP).unwrap_err();
        assert!(matches!(error.errno(), Some(Errno::EBUSY | Errno::EPERM)), "{error}");
    });
}

#[test]
fn what_is_lost_for_want_of_buffer_space_is_counted() {
    in_world(|mut log| {
        deny("udp dport 7");
        // The smallest there is.
        nix::sys::socket::setsockopt(&log.socket, nix::sys::socket::sockopt::RcvBuf, &1).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let send = |count: u32| (0..count).for_each(|_| drop(socket.send_to(&[0; 200], "127.0.0.2:7")));
        send(500);
        std::thread::sleep(MOMENT);
        let (mut heard, mut silent) = (0_u64, 0);
        while silent < 3 {
            let news = log.next(MOMENT).unwrap().is_some();
            (heard, silent) = if news { (heard + 1, 0) } else { (heard, silent + 1) };
        }
        assert!(heard < 500, "{heard}");
        nix::sys::socket::setsockopt(&log.socket, nix::sys::socket::sockopt::RcvBuf, &(1 << 18)).unwrap();
        send(1);
        hear(&mut log);
        assert_eq!(heard + 1 + log.lost(), 501, "{heard} were heard of");
    });
}

fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).unwrap();
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], payload].concat()
}

/// A packet of a kernel that tells of connections; this one need not.
#[test]
fn a_connection_that_the_kernel_tells_is_taken() {
    let addresses = |source: [u8; 4], destination: [u8; 4]| {
        Attributes::default().with(CTA_IP_V4_SRC, &source).with(CTA_IP_V4_DST, &destination)
    };
    let transport =
        |source: u16| Attributes::default().with(CTA_PROTO_NUM, &[6]).with(2, &source.to_be_bytes()).with(3, &[0, 9]);
    let tuple = |addresses: Attributes, transport: Attributes| {
        Attributes::default().nest(CTA_TUPLE_IP, &addresses).nest(CTA_TUPLE_PROTO, &transport)
    };
    let entry = Attributes::default()
        .nest(CTA_TUPLE_ORIG, &tuple(addresses([10, 0, 0, 1], [10, 96, 0, 1]), transport(40000)))
        .nest(CTA_TUPLE_REPLY, &tuple(addresses([10, 0, 0, 2], [10, 0, 0, 1]), transport(8080)));
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    packet.extend([0x1f, 0x90, 0x9c, 0x40]);
    let time = [1_800_000_000_u64.to_be_bytes(), 250_000_u64.to_be_bytes()].concat();
    let fields = Attributes::default()
        .with(NFULA_PREFIX, b"husk-denied-ingress\0")
        .with(NFULA_TIMESTAMP, &time)
        .with(NFULA_IFINDEX_INDEV, &7_u32.to_be_bytes())
        .with(NFULA_SEQ, &41_u32.to_be_bytes())
        .nest(NFULA_CT, &entry)
        .with(NFULA_PAYLOAD, &packet);
    let payload = [&[2, 0, 0, 72][..], fields.bytes()].concat();
    let datagram = [message(PACKET, &payload), message(3, &[0; 4])].concat();
    let mut records: Vec<Record> = records(&datagram).collect();
    assert_eq!(records.len(), 1);
    let Record { number, logged } = records.remove(0);
    let (logged, tracked) = logged.unwrap();
    assert_eq!((number, tracked, logged.input, logged.output), (Some(41), true, Some(7), None));
    assert_eq!(logged.connection, connection("10.0.0.1", "10.0.0.2", 6, 8080));
    assert_eq!((logged.packet.source, logged.packet.ports), (address("10.0.0.2"), Some((8080, 40000))));
    assert_eq!(logged.time, Some(Duration::from_millis(1_800_000_000_250)));
}

#[test]
fn gaps_in_the_numbers_are_counted_and_what_goes_back_is_not() {
    let mut expected = 0;
    let seen = [5, 6, 9, 10, 2, u32::MAX, 1].map(|number| missed(&mut expected, number));
    assert_eq!(seen, [5, 0, 2, 0, 0, 0, 1]);
}

proptest! {
    #[test]
    fn garbage_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = records(&payload).count();
        let _ = records(&message(PACKET, &payload)).count();
    }

    /// Attributes of the right types with content of any kind.
    #[test]
    fn garbled_attributes_never_panic(
        all in proptest::collection::vec((0..24_u16, proptest::collection::vec(any::<u8>(), 0..60)), 0..10),
    ) {
        let fields = all.iter().fold(Attributes::default(), |fields, (kind, value)| fields.with(*kind, value));
        let datagram = message(PACKET, &[&[2, 0, 0, 72][..], fields.bytes()].concat());
        for record in records(&datagram) {
            prop_assert!(record.logged.is_none_or(|(logged, _)| logged.prefix.len() < 60));
        }
    }
}
