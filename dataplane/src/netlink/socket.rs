//! The socket: opened and set up, datagrams out and in.
//!
//! It is connected to the kernel, so that no other process can put messages into it; answers to requests that were given up
//! are known by their sequence number and skipped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::SocketAddr;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use zeroize::{Zeroize as _, Zeroizing};

use super::message::Words;
use crate::error::Error;
use crate::netns::Netns;

/// How long the kernel may take to answer. Only a stuck RTNL lock takes longer than a fraction of a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Socket buffers in bytes, as far as privilege allows: room for the answers to a full datagram of requests.
pub(super) const SOCKET_BUFFER: usize = 4 << 20;

/// Receive buffer in bytes. The kernel fills at most 32 KiB per datagram of a dump (net/netlink/af_netlink.c
/// `netlink_recvmsg`), more only for single larger objects.
pub(super) const RECEIVE_BUFFER: usize = 128 << 10;

/// A netlink protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours (rtnetlink(7)).
    Route,
    /// Generic netlink: families such as `wireguard` and `netdev`.
    Generic,
    /// nftables and conntrack.
    Netfilter,
    /// IPsec associations and policies.
    Xfrm,
}

impl Protocol {
    /// The constant's name in linux/netlink.h.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Route => "NETLINK_ROUTE",
            Self::Generic => "NETLINK_GENERIC",
            Self::Netfilter => "NETLINK_NETFILTER",
            Self::Xfrm => "NETLINK_XFRM",
        }
    }

    pub(crate) fn number(self) -> isize {
        match self {
            Self::Route => netlink_sys::protocols::NETLINK_ROUTE,
            Self::Generic => netlink_sys::protocols::NETLINK_GENERIC,
            Self::Netfilter => netlink_sys::protocols::NETLINK_NETFILTER,
            Self::Xfrm => netlink_sys::protocols::NETLINK_XFRM,
        }
    }
}

/// One request, with words for the error it may come to.
#[derive(Clone)]
pub struct Request<T> {
    /// Operation as a verb phrase, for example "add route".
    pub operation: &'static str,
    /// Object, for example "10.42.1.0/24 dev husk-vx"; never holds a secret.
    pub object: String,
    /// `NLM_F_*` flags besides `NLM_F_REQUEST`, `NLM_F_ACK` and `NLM_F_DUMP`, which the socket adds itself.
    pub flags: u16,
    /// The message.
    pub message: T,
}

/// A blocking netlink socket in one network namespace.
pub struct Socket {
    pub(super) socket: netlink_sys::Socket,
    pub(super) protocol: Protocol,
    pub(super) port: u32,
    pub(super) sequence: u32,
    /// Holds whatever the kernel said last, private keys of WireGuard devices and keys of associations included.
    received: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("protocol", &self.protocol).field("port", &self.port).finish_non_exhaustive()
    }
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open(protocol: Protocol) -> Result<Self, Error> {
        let failed = |operation| move |source| Error::Socket { operation, protocol: protocol.name(), source };
        let mut socket = netlink_sys::Socket::new(protocol.number()).map_err(failed("open"))?;
        let port = socket.bind_auto().map_err(failed("bind"))?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect"))?;
        socket.set_ext_ack(true).map_err(failed("set NETLINK_EXT_ACK on"))?;
        socket.set_cap_ack(true).map_err(failed("set NETLINK_CAP_ACK on"))?;
        if socket.set_netlink_get_strict_chk(true).is_err() {
            // Kernels before 4.20 lack it; then dumps are filtered here alone.
            tracing::debug!("the kernel has no NETLINK_GET_STRICT_CHK");
        }
        let timeout = TimeVal::new(ANSWER_TIMEOUT.as_secs().cast_signed(), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)
            .map_err(|errno| failed("set SO_RCVTIMEO on")(errno.into()))?;
        enlarge_buffers(&socket);
        Ok(Self::over(socket, protocol, port))
    }

    /// The address that the kernel knows the socket by.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Opens a socket in another network namespace; it stays there.
    ///
    /// # Errors
    /// [`Error::Namespace`] and [`Error::Socket`].
    pub fn open_in(protocol: Protocol, namespace: &Netns) -> Result<Self, Error> {
        namespace.run_in(|| Self::open(protocol))?
    }

    pub(super) fn over(socket: netlink_sys::Socket, protocol: Protocol, port: u32) -> Self {
        Self { socket, protocol, port, sequence: 0, received: Zeroizing::new(Vec::with_capacity(RECEIVE_BUFFER)) }
    }

    pub(super) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    pub(super) fn send(&self, datagram: &[u8]) -> Result<(), Error> {
        loop {
            match self.socket.send(datagram, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Socket { operation: "write to", protocol: self.protocol.name(), source });
                }
            }
        }
    }

    pub(super) fn receive(&mut self, words: &Words) -> Result<Received<'_>, Error> {
        loop {
            match self.receive_once(0) {
                Ok(true) => return Ok(Received::Datagram(&self.received)),
                Ok(false) => return Ok(Received::Overrun),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EINTR) => {}
                    Some(Errno::ENOBUFS) => return Ok(Received::Overrun),
                    Some(Errno::EAGAIN) => {
                        return Err(words.clone().error(|operation, object| Error::TimedOut {
                            operation,
                            object,
                            seconds: ANSWER_TIMEOUT.as_secs(),
                        }));
                    }
                    _ => {
                        return Err(Error::Socket {
                            operation: "read from",
                            protocol: self.protocol.name(),
                            source: error,
                        });
                    }
                },
            }
        }
    }

    pub(super) fn receive_waiting(&mut self) -> io::Result<Option<&[u8]>> {
        Ok(if self.receive_once(libc::MSG_DONTWAIT)? { Some(&self.received) } else { None })
    }

    /// Receives a datagram into the buffer; false when it did not fit, after which the buffer is larger.
    fn receive_once(&mut self, flags: libc::c_int) -> io::Result<bool> {
        self.received.clear();
        let length = self.socket.recv(&mut *self.received, flags | libc::MSG_TRUNC)?;
        if length > self.received.len() {
            self.received = Zeroizing::new(Vec::with_capacity(length.next_power_of_two()));
            return Ok(false);
        }
        Ok(true)
    }

    /// Forgets what the kernel said last. All datagrams of a dump went through the same buffer.
    pub(crate) fn wipe(&mut self) {
        self.received.zeroize();
    }

    /// Empties the receive queue, so that old answers do not crowd out new ones.
    pub(super) fn drain(&mut self) {
        // Bounded: each round takes one datagram of a queue that nobody fills without a request of ours.
        while self.receive_once(libc::MSG_DONTWAIT).is_ok() {}
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A datagram, or news that some were lost.
pub(super) enum Received<'a> {
    Datagram(&'a [u8]),
    Overrun,
}

fn enlarge_buffers(socket: &netlink_sys::Socket) {
    // The forcing options need CAP_NET_ADMIN in the initial user namespace; the plain ones stop at the system's limit.
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err()
        && let Err(error) = setsockopt(socket, sockopt::RcvBuf, &SOCKET_BUFFER)
    {
        tracing::debug!(%error, "the receive buffer keeps its default size");
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err()
        && let Err(error) = setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER)
    {
        tracing::debug!(%error, "the send buffer keeps its default size");
    }
}
