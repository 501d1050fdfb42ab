use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::netns::Netns;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/netfilter/{name}"), value).unwrap();
}

/// Runs in a namespace whose connections are tracked.
fn in_namespace(work: impl FnOnce() + Send) {
    let world = || {
        run("ip", &["link", "set", "lo", "up"]);
        let rules = "table inet t { chain nat { type nat hook output priority -100; ip daddr 127.0.9.9 tcp dport 80 dnat ip to 127.0.0.2:8080; }; \
                     chain in { type filter hook input priority 0; ct state invalid counter; }; }";
        run("nft", &[rules]);
        work();
    };
    Netns::new_unnamed().unwrap().run_in(world).unwrap();
}

/// The news up to the first that is wanted.
fn await_news(listener: &mut Listener, wanted: impl Fn(&News) -> bool) -> News {
    let begun = Instant::now();
    let mut all = Vec::new();
    while begun.elapsed() < Duration::from_secs(60) {
        match listener.next(Duration::from_millis(200)).unwrap() {
            Some(news) if wanted(&news) => return news,
            Some(news) => all.push(news),
            None => {}
        }
    }
    panic!("not among the news: {all:?}");
}

#[test]
fn a_connection_is_told_when_it_begins_and_when_it_ends_with_what_it_carried() {
    in_namespace(|| {
        sysctl("nf_conntrack_acct", "1");
        sysctl("nf_conntrack_timestamp", "1");
        // Closed connections are kept this many seconds.
        sysctl("nf_conntrack_tcp_timeout_time_wait", "1");
        sysctl("nf_conntrack_tcp_timeout_close", "1");
        let mut listener = Listener::open().unwrap();
        let server = TcpListener::bind("127.0.0.2:8080").unwrap();
        let mut client = TcpStream::connect("127.0.9.9:80").unwrap();
        let (mut served, from) = server.accept().unwrap();
        let News::Began(began) = await_news(&mut listener, |news| matches!(news, News::Began(_))) else {
            unreachable!()
        };
        assert_eq!(began.original.destination.to_string(), "127.0.9.9", "whom the client addressed");
        assert_eq!(began.original.ports, Some((from.port(), 80)));
        assert_eq!(
            (began.answer.source.to_string(), began.answer.ports),
            ("127.0.0.2".into(), Some((8080, from.port())))
        );
        assert_eq!((began.original.protocol, began.original.icmp), (6, None));
        let listed = list(usize::MAX, |_| true).unwrap().connections;
        assert!(listed.iter().any(|it| it.original == began.original && it.answer == began.answer), "{listed:?}");

        client.write_all(&[7; 1000]).unwrap();
        drop(client);
        let mut all_of_it = Vec::new();
        served.read_to_end(&mut all_of_it).unwrap();
        drop(served);
        let ended = await_news(&mut listener, |news| matches!(news, News::Ended(it) if it.original == began.original));
        let News::Ended(ended) = ended else { unreachable!() };
        let (sent, received) = ended.counts.expect("the kernel counts");
        assert!(sent.bytes > 1000 && sent.packets >= 4 && received.packets >= 2, "{ended:?}");
        assert!(ended.began.is_some(), "{ended:?}");
    });
}

#[test]
fn an_echo_request_has_type_and_code_and_nothing_is_counted_unless_asked_for() {
    in_namespace(|| {
        let mut listener = Listener::open().unwrap();
        run("ping", &["-c1", "-W5", "127.0.0.3"]);
        let News::Began(began) = await_news(&mut listener, |_| true) else { panic!("the ping began something") };
        assert_eq!((began.original.protocol, began.original.icmp, began.original.ports), (1, Some((8, 0)), None));
        assert_eq!(began.counts, None);
    });
}

#[test]
fn a_kernel_that_was_told_to_tell_nothing_is_not_listened_to_in_vain() {
    in_namespace(|| {
        sysctl("nf_conntrack_events", "0");
        let error = Listener::open().unwrap_err();
        assert!(
            error.remedy().contains("sysctl -w net.netfilter.nf_conntrack_events=2"),
            "{error}: {}",
            error.remedy()
        );
        // What the remedy says helps.
        sysctl("nf_conntrack_events", "2");
        let mut listener = Listener::open().unwrap();
        run("ping", &["-c1", "-W5", "127.0.0.3"]);
        assert!(matches!(await_news(&mut listener, |_| true), News::Began(_)));
    });
}

#[test]
fn what_was_lost_is_counted() {
    in_namespace(|| {
        let mut listener = Listener::open().unwrap();
        // As small as the kernel lets it be.
        nix::sys::socket::setsockopt(&listener.socket.as_fd(), nix::sys::socket::sockopt::RcvBuf, &0).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for port in 2000..2200 {
            socket.send_to(b"x", ("127.0.0.5", port)).unwrap();
        }
        let (mut began, mut lost) = (0, 0);
        while began + lost < 200 {
            match listener.next(Duration::from_secs(20)).unwrap() {
                Some(News::Began(it)) => began += u64::from(it.original.protocol == 17),
                Some(News::Lost(count)) => lost += count,
                Some(News::Ended(_)) => {}
                None => panic!("{began} of 200 were told, {lost} lost"),
            }
        }
        assert!(lost > 0 && began + lost == 200, "{began} told, {lost} lost");
    });
}

#[test]
fn of_many_connections_no_more_are_kept_than_there_is_room_for() {
    in_namespace(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for port in 2000..2500 {
            socket.send_to(b"x", ("127.0.0.5", port)).unwrap();
        }
        let is_even = |it: &Tracked| it.original.ports.is_some_and(|(_, port)| port % 2 == 0 && port >= 2000);
        let listed = list(7, is_even).unwrap();
        assert_eq!((listed.connections.len(), listed.left_off), (7, 243));
        assert!(listed.connections.capacity() < 16 && listed.connections.iter().all(is_even), "{listed:?}");
        let listed = list(250, is_even).unwrap();
        assert_eq!((listed.connections.len(), listed.left_off), (250, 0));
    });
}

proptest! {
    #[test]
    fn garbage_is_no_news(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = news(&datagram).count();
    }

    #[test]
    fn garbage_in_a_message_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..120)) {
        let length = u32::try_from(16 + payload.len()).unwrap();
        for kind in [NEW, DELETE] {
            let header = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &CREATE.to_ne_bytes(), &[0; 8]].concat();
            let _ = news(&[header, payload.clone()].concat()).count();
        }
    }
}
