//! A server that sends back what it gets, over TCP and UDP, and remembers who asked.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::host::lock;
use crate::netns::Netns;
use crate::patience;

/// How often a thread looks whether it should stop.
const PATIENCE: Duration = Duration::from_millis(50);

/// How long a client may leave an echo unread.
const WRITE_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    peers: Mutex<Vec<SocketAddr>>,
    connections: Mutex<Vec<JoinHandle<()>>>,
}

/// A running echo server; it ends when it is dropped.
#[derive(Debug)]
pub struct EchoServer {
    port: u16,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl EchoServer {
    /// Serves on every address of a namespace, at a port that the kernel chooses.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn start(netns: &Netns) -> Result<Self> {
        // An IPv6 socket serves IPv4 too.
        Self::start_on(netns, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0))
    }

    /// Serves on one address; port 0 lets the kernel choose. A server with several addresses in its namespace needs
    /// this, or UDP answers come from the wrong one.
    ///
    /// # Errors
    /// When the sockets cannot be opened, for example since the port is taken.
    pub fn start_on(netns: &Netns, at: SocketAddr) -> Result<Self> {
        let (listener, datagrams) = netns
            .run(|| -> std::io::Result<_> {
                let listener = TcpListener::bind(at)?;
                let datagrams = UdpSocket::bind((at.ip(), listener.local_addr()?.port()))?;
                Ok((listener, datagrams))
            })?
            .with_context(|| format!("opening an echo server at {at} in {}", netns.name()))?;
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        datagrams.set_read_timeout(Some(PATIENCE))?;
        let shared = Arc::new(Shared::default());
        let threads = vec![
            thread::spawn({
                let shared = Arc::clone(&shared);
                move || accept(&listener, &shared)
            }),
            thread::spawn({
                let shared = Arc::clone(&shared);
                move || answer(&datagrams, &shared)
            }),
        ];
        Ok(Self { port, shared, threads })
    }

    /// The server's port, of TCP and UDP.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's address for a client, `ip` being one of its namespace's.
    #[must_use]
    pub fn at(&self, ip: IpAddr) -> SocketAddr {
        SocketAddr::new(ip, self.port)
    }

    /// Addresses of the clients, as the server saw them, in order and each once.
    #[must_use]
    pub fn peers(&self) -> Vec<SocketAddr> {
        lock(&self.shared.peers).clone()
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Not before: whoever accepts connections takes this lock, and may wait for it.
        for connection in lock(&self.shared.connections).drain(..) {
            let _ = connection.join();
        }
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn remember(&self, peer: SocketAddr) {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let mut peers = lock(&self.peers);
        if !peers.contains(&peer) {
            peers.push(peer);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.stopping() {
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut waiting, PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO));
        let Ok((stream, peer)) = listener.accept() else { continue };
        shared.remember(peer);
        let connection = thread::spawn({
            let shared = Arc::clone(shared);
            // A connection that breaks is the client's to report.
            move || drop(echo(stream, &shared))
        });
        lock(&shared.connections).push(connection);
    }
}

fn echo(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(patience(WRITE_LIMIT)))?;
    let mut buffer = vec![0; 64 << 10];
    while !shared.stopping() {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => stream.write_all(&buffer[..length])?,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn answer(socket: &UdpSocket, shared: &Shared) {
    let mut buffer = vec![0; 64 << 10];
    while !shared.stopping() {
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            shared.remember(peer);
            // What cannot be sent back is a datagram lost, and so the client sees it.
            let _ = socket.send_to(&buffer[..length], peer);
        }
    }
}
