use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as Client;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use husk_ipam::lease::LeaseStore;
use husk_overlay::ipc::{self, MAX_MESSAGE};
use proptest::prelude::*;

use super::*;
use crate::engine::{Message, State, channel};

/// A server whose loop answers every question with the same report.
struct Served {
    directory: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    _state: tokio::sync::watch::Sender<State>,
}

impl Served {
    fn start(report: serde_json::Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ready = State { ready: true, ..State::default() };
        let (sender, state) = tokio::sync::watch::channel(ready);
        let (handle, inbox) = channel(state, LeaseStore::new(directory.path().join("leases"), Duration::from_secs(1)));
        std::thread::spawn(move || answer_all(&inbox, &report));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let path = directory.path().join(ipc::SOCKET_FILE);
        runtime.spawn(async move { serve(listen(&path).unwrap(), handle).await });
        let served = Self { directory, _runtime: runtime, _state: sender };
        let started = Instant::now();
        while Client::connect(served.path()).is_err() {
            assert!(started.elapsed() < Duration::from_secs(5), "the server listens");
            std::thread::yield_now();
        }
        served
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(ipc::SOCKET_FILE)
    }

    fn connect(&self) -> Client {
        let client = Client::connect(self.path()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    /// Sends bytes, says that there will be no more, and reads the answer.
    fn tell(&self, bytes: &[u8]) -> Response {
        let mut client = self.connect();
        // The server may answer and close before it has read everything.
        let _ = client.write_all(bytes);
        let _ = client.shutdown(std::net::Shutdown::Write);
        ipc::read_message(&mut client).unwrap()
    }

    fn ask(&self, request: &Request) -> Response {
        let mut client = self.connect();
        ipc::write_message(&mut client, request).unwrap();
        ipc::read_message(&mut client).unwrap()
    }
}

fn answer_all(inbox: &Receiver<Message>, report: &serde_json::Value) {
    while let Ok(message) = inbox.recv() {
        if let Message::Ask(ask) = message {
            let _ = ask.answer.send(Response::Report { report: report.clone() });
        }
    }
}

fn refusal(response: Response) -> String {
    let Response::Refused { reason } = response else { panic!("{response:?}") };
    reason
}

#[test]
fn requests_are_answered_and_only_the_owner_may_ask() {
    let served = Served::start(serde_json::json!({ "a": 1 }));
    let mode = served.path().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(served.ask(&Request::Ready), Response::Done);
    assert_eq!(served.ask(&Request::Status), Response::Report { report: serde_json::json!({ "a": 1 }) });
}

#[test]
fn a_socket_left_by_an_earlier_daemon_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("daemon.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(Client::connect(&path).is_err());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _runtime = runtime.enter();
    let _listener = listen(&path).unwrap();
    Client::connect(&path).unwrap();
    assert!(listen(Path::new("/nonexistent/daemon.sock")).is_err());
}

#[test]
fn what_is_no_request_is_refused_with_a_reason() {
    let served = Served::start(serde_json::Value::Null);
    let framed = |body: &[u8]| [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat();
    for (bytes, reason) in [
        (vec![], "closed before"),
        (vec![0, 0], "closed before"),
        (vec![0, 0, 0, 9, b'{'], "1 of 9 bytes"),
        (framed(b""), "not understood"),
        (framed(b"[]"), "not understood"),
        (framed(b"{\"request\":\"status\"}{}"), "not understood"),
        (framed(b"{\"request\":\"launch\"}"), "launch"),
        (framed(&[0xff; 40]), "not understood"),
        (MAX_MESSAGE.to_be_bytes().to_vec(), "too large"),
        (u32::MAX.to_be_bytes().to_vec(), "too large"),
        (framed(&vec![b' '; 1 << 20]), "too large"),
    ] {
        let told = refusal(served.tell(&bytes));
        assert!(told.contains(reason), "{reason}: {told}");
    }
    assert_eq!(served.ask(&Request::Ready), Response::Done);
}

#[test]
fn clients_that_say_nothing_or_take_nothing_hold_up_nobody() {
    // Larger than what socket buffers take.
    let served = Served::start("x".repeat(8 << 20).into());
    let silent: Vec<Client> = (0..100).map(|_| served.connect()).collect();
    let deaf: Vec<Client> = (0..100)
        .map(|_| {
            let mut client = served.connect();
            ipc::write_message(&mut client, &Request::Status).unwrap();
            client
        })
        .collect();
    let mut halting = served.connect();
    halting.write_all(&[0, 0]).unwrap();
    let started = Instant::now();
    assert_eq!(served.ask(&Request::Ready), Response::Done);
    assert!(started.elapsed() < Duration::from_secs(3));
    drop(silent);
    // Clients that never take their answer are given up: the server hangs up on them.
    let mut client = deaf.into_iter().next().unwrap();
    let mut hang_up = [nix::poll::PollFd::new(client.as_fd(), nix::poll::PollFlags::empty())];
    assert_eq!(nix::poll::poll(&mut hang_up, 15_000_u16).unwrap(), 1);
    let mut taken = Vec::new();
    let _ = client.read_to_end(&mut taken);
    assert!(taken.len() < 8 << 20, "{} bytes", taken.len());
}

#[test]
fn an_answer_that_is_too_large_is_a_refusal_that_says_so() {
    let response = Response::Report { report: "x".repeat(MAX_MESSAGE as usize).into() };
    let message = framed(&response).unwrap();
    assert!(refusal(ipc::read_message(&mut message.as_slice()).unwrap()).contains("exceeds"));
}

#[test]
fn a_message_is_read_as_it_was_written() {
    let families = [husk_overlay::prefix::Family::Ipv4, husk_overlay::prefix::Family::Ipv6].into();
    for request in [Request::Released, Request::Blocks { families }, Request::Diff] {
        let mut bytes = Vec::new();
        ipc::write_message(&mut bytes, &request).unwrap();
        assert_eq!(ipc::read_message::<Request>(&mut bytes.as_slice()).unwrap(), request);
        for end in 0..bytes.len() {
            assert!(ipc::read_message::<Request>(&mut &bytes[..end]).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_bytes_panic_or_stop_the_server(bytes in proptest::collection::vec(any::<u8>(), 0..300), frame in any::<bool>()) {
        thread_local!(static SERVED: Served = Served::start(serde_json::Value::Null));
        let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
        let sent = if frame { [&length[..], &bytes].concat() } else { bytes };
        SERVED.with(|served| {
            let refused = matches!(served.tell(&sent), Response::Refused { .. });
            prop_assert!(refused);
            prop_assert_eq!(served.ask(&Request::Ready), Response::Done);
            Ok(())
        })?;
    }

    #[test]
    fn no_bytes_panic_a_reader(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = ipc::read_message::<Request>(&mut bytes.as_slice());
        let _ = ipc::read_message::<Response>(&mut bytes.as_slice());
        let framed = [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat();
        prop_assert!(ipc::read_message::<Request>(&mut framed.as_slice()).is_err());
    }

    #[test]
    fn no_json_panics_a_reader(text in "\\{\"(request|response)\":\"[a-zA-Z]{0,8}\"(,\"[a-z]{1,8}\":[0-9\\[\\]{}\"]{0,6}){0,3}\\}") {
        let _ = serde_json::from_str::<Request>(&text);
        let _ = serde_json::from_str::<Response>(&text);
    }
}

#[test]
fn the_network_namespace_is_told_without_the_loop() {
    let served = Served::start(serde_json::json!("not what was asked for"));
    let own = Netns::current().unwrap().identity().unwrap();
    assert_eq!(served.ask(&Request::NetworkNamespace), answer(&own));
}
