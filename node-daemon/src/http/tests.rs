use std::sync::Mutex;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use super::*;

struct Echo;

impl Site for Echo {
    async fn get(&self, request: &Parts) -> Answer {
        text(StatusCode::OK, request.uri.path().to_owned())
    }
}

fn limits() -> Limits {
    Limits { head: Duration::from_millis(500), retry: Duration::from_millis(20), ..Limits::default() }
}

/// A server at a free port, and what it told of itself.
async fn server() -> (SocketAddr, watch::Receiver<Option<Issue>>) {
    server_with(limits()).await
}

async fn server_with(limits: Limits) -> (SocketAddr, watch::Receiver<Option<Issue>>) {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (issue, noticed) = watch::channel(None);
    tokio::spawn(serve(Listening { address: free, key: "metrics.listen", issue, limits }, Echo, || {}));
    (free, noticed)
}

/// A connection from an address of the loopback that says nothing more.
async fn silent(from: u8, address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, from], 0))).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    // It may have been closed already.
    let _ = stream.write_all(b"GET / HTTP").await;
    stream
}

async fn exchange(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    // A server that has heard enough may close before all is sent.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn only_reading_is_answered_and_a_connection_is_one_request() {
    let (address, _) = server().await;
    let twice = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n";
    let answer = exchange(address, twice).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\n/a"), "{answer}");
    assert!(answer.contains("cache-control: no-store") && answer.contains("connection: close"), "{answer}");
    let answer = exchange(address, b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.contains("content-length: 2") && answer.ends_with("\r\n\r\n"), "{answer}");
    let answer = exchange(address, b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc").await;
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"), "{answer}");
    assert!(exchange(address, b"\0\xff\r\n\r\n").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let (address, _) = server().await;
    let mut long = b"GET / HTTP/1.1\r\nX: ".to_vec();
    long.resize(64 << 10, b'a');
    let answer = exchange(address, &long).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    let many: String = (0..200).map(|number| format!("X{number}: a\r\n")).collect();
    let answer = exchange(address, format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn who_says_nothing_is_shown_out() {
    let (address, _) = server().await;
    let _ = exchange(address, b"").await;
    let mut all = Vec::new();
    for number in 0..CONNECTIONS {
        all.push(silent(u8::try_from(2 + number / FROM_ONE).unwrap(), address).await);
    }
    // All places are taken, for a while.
    let answer = exchange(address, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.ends_with("/a"), "{answer}");
}

#[tokio::test]
async fn who_says_nothing_does_not_take_the_places_of_others() {
    // So long that the test would not end if anybody had to be shown out.
    let forever = Duration::from_secs(3600);
    let (address, _) = server_with(Limits { head: forever, connection: forever, ..limits() }).await;
    assert!(exchange(address, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").await.ends_with("/a"));
    let (mut all, mut closed) = (Vec::new(), Vec::new());
    for number in 0..CONNECTIONS {
        let mut stream = silent(2, address).await;
        if number < FROM_ONE {
            all.push(stream);
            continue;
        }
        // Closed, with what it said unread or not.
        let _ = stream.read_to_end(&mut closed).await;
        assert!(closed.is_empty());
    }
    let answer = exchange(address, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.ends_with("/a"), "{answer}");
    // Whoever has gone makes room.
    drop(all);
    loop {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let _ = stream.write_all(b"GET /b HTTP/1.0\r\n\r\n").await;
        let mut answer = Vec::new();
        if stream.read_to_end(&mut answer).await.is_ok() && answer.ends_with(b"/b") {
            return;
        }
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_issue_and_tried_again() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let (issue, mut noticed) = watch::channel(None);
    let wakes = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&wakes);
    let listening = Listening { address, key: "metrics.listen", issue, limits: limits() };
    tokio::spawn(serve(listening, Echo, move || *counted.lock().unwrap() += 1));
    let told = noticed.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!((told.kind, told.severity), (IssueKind::ListenFailed, Severity::Warning));
    assert!(told.message.contains(&address.to_string()) && told.remedy.contains("ss -lntp"), "{told}");
    tokio::time::sleep(limits().retry * 5).await;
    assert_eq!(*wakes.lock().unwrap(), 1, "it is told once");
    drop(taken);
    noticed.wait_for(Option::is_none).await.unwrap();
    assert_eq!(exchange(address, b"GET /a HTTP/1.0\r\n\r\n").await.split("\r\n\r\n").nth(1), Some("/a"));
}
