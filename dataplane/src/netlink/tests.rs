use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::os::unix::net::UnixDatagram;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_CREATE, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_MULTIPART, NLMSG_DONE, NLMSG_ERROR,
    NetlinkSerializable as _,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::ack::tests::error_payload;
use super::batch::BATCH_MESSAGES;
use super::dump::DUMP_ATTEMPTS;
use super::frame::tests::message;
use super::frame::{Frame, frames};
use super::socket::RECEIVE_BUFFER;
use super::{Protocol, Request, Socket};
use crate::error::Error;
use crate::netns::Netns;

const PORT: u32 = 4711;

/// A kernel that answers each datagram with what `script` makes of it and of its number; it ends with the socket.
fn scripted(script: impl Fn(usize, Vec<Frame<'_>>) -> Vec<Vec<u8>> + Send + 'static) -> (Socket, JoinHandle<usize>) {
    let (ours, kernel) = UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        let mut count = 0;
        while let Ok(length @ 1..) = kernel.recv(&mut buffer) {
            let requests = frames(&buffer[..length]).map(Result::unwrap).collect();
            for datagram in script(count, requests) {
                kernel.send(&datagram).unwrap();
            }
            count += 1;
        }
        count
    });
    #[allow(unsafe_code)]
    // SAFETY: the descriptor was just given up by its owner.
    let socket = unsafe { netlink_sys::Socket::from_raw_fd(ours.into_raw_fd()) };
    (Socket::over(socket, Protocol::Route, PORT), thread)
}

fn finish(socket: Socket, thread: JoinHandle<usize>) -> usize {
    // An empty datagram tells the script to end: a datagram socket reports no end of its own.
    socket.socket.send(&[], 0).unwrap();
    drop(socket);
    thread.join().unwrap()
}

fn link(name: &str) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    link
}

/// A link as the kernel would send it in a dump.
fn link_bytes(name: &str, flags: u16, sequence: u32, port: u32) -> Vec<u8> {
    let inner = RouteNetlinkMessage::NewLink(link(name));
    let mut payload = vec![0; inner.buffer_len()];
    inner.serialize(&mut payload);
    message(16, flags | NLM_F_MULTIPART, sequence, port, &payload)
}

fn done(flags: u16, sequence: u32, code: i32) -> Vec<u8> {
    message(NLMSG_DONE, flags | NLM_F_MULTIPART, sequence, PORT, &code.to_ne_bytes())
}

fn dump_request() -> Request<RouteNetlinkMessage> {
    Request {
        operation: "read",
        object: "links".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetLink(LinkMessage::default()),
    }
}

fn change_request(name: &str) -> Request<RouteNetlinkMessage> {
    Request {
        operation: "create link",
        object: name.to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::NewLink(link(name)),
    }
}

fn names(messages: &[RouteNetlinkMessage]) -> Vec<&str> {
    let links = messages.iter().map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => crate::interfaces::name_of(link).unwrap(),
        other => panic!("{other:?}"),
    });
    links.collect()
}

#[test]
fn an_interrupted_dump_is_repeated_and_leaves_nothing_behind() {
    let (mut socket, kernel) = scripted(|attempt, requests| {
        let sequence = requests[0].sequence;
        // The flag comes with the first object the first time, with the end the second time.
        let (object, end) = [(NLM_F_DUMP_INTR, 0), (0, NLM_F_DUMP_INTR), (0, 0)][attempt];
        vec![link_bytes(&format!("eth{attempt}"), object, sequence, PORT), done(end, sequence, 0)]
    });
    assert_eq!(names(&socket.dump(dump_request()).unwrap()), ["eth2"]);
    assert_eq!(finish(socket, kernel), 3);
}

#[test]
fn of_a_table_that_may_be_large_a_part_is_kept_also_when_it_has_to_be_read_again() {
    let (mut socket, kernel) = scripted(|attempt, requests| {
        let sequence = requests[0].sequence;
        let links = (0..100).map(|number| link_bytes(&format!("eth{number}"), 0, sequence, PORT));
        links.chain([done(if attempt == 0 { NLM_F_DUMP_INTR } else { 0 }, sequence, 0)]).collect()
    });
    let two_digits = |message| Some(names(&[message])[0].to_owned()).filter(|name| name.len() == 5);
    let kept = socket.dump_some(dump_request(), 3, two_digits).unwrap();
    assert_eq!((kept.objects, kept.left_off), (["eth10", "eth11", "eth12"].map(str::to_owned).into(), 87));
    assert_eq!(finish(socket, kernel), 2);
}

/// As while many pods come at once.
#[test]
fn a_table_that_changes_all_the_time_for_a_while_is_read_after_that() {
    let begun = Instant::now();
    let (mut socket, kernel) = scripted(move |_, requests| {
        let sequence = requests[0].sequence;
        let changing = begun.elapsed() < Duration::from_millis(400);
        let flags = if changing { NLM_F_DUMP_INTR } else { 0 };
        vec![link_bytes("eth0", flags, sequence, PORT), done(0, sequence, 0)]
    });
    assert_eq!(names(&socket.dump(dump_request()).unwrap()), ["eth0"]);
    finish(socket, kernel);
}

#[test]
fn a_dump_that_is_interrupted_every_time_is_an_error_not_a_partial_result() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let sequence = requests[0].sequence;
        vec![link_bytes("eth0", NLM_F_DUMP_INTR, sequence, PORT), done(0, sequence, 0)]
    });
    let error = socket.dump(dump_request()).unwrap_err();
    assert!(matches!(error, Error::Interrupted { attempts: DUMP_ATTEMPTS, .. }), "{error}");
    assert!(error.to_string().starts_with("cannot read links: it changed during each of 24 attempts"), "{error}");
    assert_eq!(finish(socket, kernel), DUMP_ATTEMPTS as usize);
}

#[test]
fn a_dump_that_the_kernel_gives_up_is_an_error_with_its_words() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let sequence = requests[0].sequence;
        let mut payload = (-22_i32).to_ne_bytes().to_vec();
        payload.extend(&error_payload(0, &[], Some("wrong filter"))[20..]);
        let end = message(NLMSG_DONE, NLM_F_MULTIPART | NLM_F_ACK_TLVS, sequence, PORT, &payload);
        vec![link_bytes("eth0", 0, sequence, PORT), end]
    });
    let error = socket.dump(dump_request()).unwrap_err();
    assert_eq!((error.errno(), error.explanation()), (Some(Errno::EINVAL), Some("wrong filter")));
    finish(socket, kernel);
}

#[test]
fn strays_are_no_answers() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let sequence = requests[0].sequence;
        let mut datagram = link_bytes("old", 0, sequence.wrapping_sub(1), PORT);
        datagram.extend(link_bytes("foreign", 0, sequence, PORT + 1));
        datagram.extend(link_bytes("eth0", 0, sequence, PORT));
        vec![done(0, sequence.wrapping_sub(1), 0), datagram, done(0, sequence, 0)]
    });
    assert_eq!(names(&socket.dump(dump_request()).unwrap()), ["eth0"]);
    finish(socket, kernel);
}

#[test]
fn an_undecodable_object_fails_a_dump_unless_it_may_be_foreign() {
    let script = |_, requests: Vec<Frame<'_>>| {
        let sequence = requests[0].sequence;
        let broken = message(16, NLM_F_MULTIPART, sequence, PORT, &[1, 2, 3]);
        vec![broken, link_bytes("eth0", 0, sequence, PORT), done(0, sequence, 0)]
    };
    let (mut socket, kernel) = scripted(script);
    assert!(matches!(socket.dump(dump_request()), Err(Error::Malformed { .. })));
    // The first dump was read to its end: the second one is not confused by it.
    assert_eq!(names(&socket.dump_shared(dump_request()).unwrap()), ["eth0"]);
    finish(socket, kernel);
}

#[test]
fn every_request_of_a_batch_gets_its_own_result_whatever_the_order_of_answers() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let answer = |frame: &Frame<'_>, errno, text| {
            let flags = NLM_F_CAPPED | NLM_F_ACK_TLVS;
            message(NLMSG_ERROR, flags, frame.sequence, PORT, &error_payload(errno, &[], text))
        };
        let mut answers: Vec<_> = requests.iter().map(|frame| answer(frame, 0, None)).collect();
        answers[1] = answer(&requests[1], 17, Some("already there"));
        answers.reverse();
        answers
    });
    let results = socket.batch(["a", "b", "c"].map(change_request).into());
    assert!(results[0].is_ok() && results[2].is_ok());
    let error = results[1].as_ref().unwrap_err();
    assert_eq!(error.to_string(), "the kernel refused to create link b: already there (File exists)");
    assert_eq!(finish(socket, kernel), 1, "one datagram for all");
}

#[test]
fn a_large_batch_is_split_and_an_answer_that_never_comes_is_told() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let ack =
            |frame: Frame<'_>| message(NLMSG_ERROR, NLM_F_CAPPED, frame.sequence, PORT, &error_payload(0, &[], None));
        requests.into_iter().map(ack).collect()
    });
    let results = socket.batch((0..1000).map(|number| change_request(&format!("if{number}"))).collect());
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1000);
    assert_eq!(finish(socket, kernel), 1000_usize.div_ceil(BATCH_MESSAGES));

    let (mut socket, kernel) = scripted(|_, _| Vec::new());
    let short = TimeVal::new(0, 1000);
    setsockopt(&socket.socket, sockopt::ReceiveTimeout, &short).unwrap();
    let results = socket.batch(["a", "b"].map(change_request).into());
    assert!(matches!(results[0], Err(Error::TimedOut { .. })), "{results:?}");
    assert!(matches!(results[1], Err(Error::Overrun { .. })), "{results:?}");
    finish(socket, kernel);
}

#[test]
fn a_datagram_larger_than_the_buffer_is_asked_for_again() {
    let (mut socket, kernel) = scripted(|_, requests| {
        let sequence = requests[0].sequence;
        // No interface has so long a name, but the decoder does not know.
        let mut datagram = link_bytes(&"x".repeat(1400), 0, sequence, PORT).repeat(RECEIVE_BUFFER / 1400);
        datagram.extend(done(0, sequence, 0));
        vec![datagram]
    });
    assert_eq!(names(&socket.dump(dump_request()).unwrap()).len(), RECEIVE_BUFFER / 1400);
    assert_eq!(finish(socket, kernel), 2);
}

#[test]
fn a_socket_stays_in_the_namespace_it_was_opened_in() {
    let namespace = Netns::new_unnamed().unwrap();
    let mut socket = Socket::open_in(Protocol::Route, &namespace).unwrap();
    let links = socket.dump(dump_request()).unwrap();
    assert!(names(&links).contains(&"lo"));
    let request = |name: &str| {
        let mut request = change_request(name);
        request.flags = NLM_F_CREATE | NLM_F_EXCL;
        let RouteNetlinkMessage::NewLink(link) = &mut request.message else { unreachable!() };
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        request
    };
    // More than fit into one datagram, with one in the middle that fails: the others are made.
    let mut requests: Vec<_> = (0..300).map(|number| request(&format!("br{number}"))).collect();
    requests[150] = request("br0");
    let results = socket.batch(requests);
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 299);
    assert_eq!(results[150].as_ref().unwrap_err().errno(), Some(Errno::EEXIST));
    let links = socket.dump(dump_request()).unwrap();
    assert_eq!(names(&links).iter().filter(|name| name.starts_with("br")).count(), 299);
    let mut here = Socket::open(Protocol::Route).unwrap();
    assert!(!names(&here.dump(dump_request()).unwrap()).contains(&"br17"));
}
