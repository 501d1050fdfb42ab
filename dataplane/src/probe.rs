//! The socket of probes: packets of exactly the size that was asked for, never fragmented, whatever the routes say.
//!
//! `PMTUDISC_PROBE` sets DF and takes the MTU of the outgoing *device* for the limit, not that of the route or what an ICMP
//! error has said of the path (`ip_setup_cork` in net/ipv4/ip_output.c, `ip6_setup_cork` in net/ipv6/ip6_output.c; the names in
//! include/uapi/linux/in.h and in6.h). So a size that a route was lowered from can be tried again. What exceeds the device is
//! refused here and says nothing of the path.
//!
//! The socket is not connected: errors that come back as ICMP are not reported on it (`__udp4_lib_err` in net/ipv4/udp.c), which
//! anybody on the path could forge. What is not answered has not passed.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::setsockopt;

use crate::error::Error;

macro_rules! integer_option {
    ($name:ident, $level:expr, $option:path) => {
        #[derive(Clone, Copy, Debug)]
        struct $name;
        nix::setsockopt_impl!($name, $level, $option, i32, nix::sys::socket::sockopt::SetStruct<'_, i32>);
    };
}
integer_option!(MtuDiscoverV4, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
integer_option!(MtuDiscoverV6, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);

/// What became of a packet that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Sent,
    /// The own kernel refused the size: it exceeds the MTU of the device that the route leads to.
    TooBig,
    /// The own kernel had no room for it just now.
    Busy,
    /// The own kernel knows no way, or may not send.
    NoWay(Errno),
}

/// A packet that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes of its UDP payload.
    pub length: usize,
    /// From where.
    pub from: SocketAddr,
}

/// A socket at one own address.
#[derive(Debug)]
pub struct ProbeSocket {
    socket: UdpSocket,
    own: SocketAddr,
}

impl ProbeSocket {
    /// Binds to an own address and a port, in the calling thread's network namespace. Port 0 takes any.
    ///
    /// # Errors
    /// [`Error::ProbeSocket`] when no interface has the address, the port is taken, or the kernel lacks an option.
    pub fn bind(own: IpAddr, port: u16) -> Result<Self, Error> {
        let address = SocketAddr::new(own, port);
        let failed = |operation| move |source| Error::ProbeSocket { operation, address, source };
        let socket = UdpSocket::bind(address).map_err(failed("bind"))?;
        let own = socket.local_addr().map_err(failed("examine"))?;
        socket.set_nonblocking(true).map_err(failed("set up"))?;
        let set = match own {
            SocketAddr::V4(_) => setsockopt(&socket, MtuDiscoverV4, &libc::IP_PMTUDISC_PROBE),
            SocketAddr::V6(_) => setsockopt(&socket, MtuDiscoverV6, &libc::IPV6_PMTUDISC_PROBE),
        };
        set.map_err(io::Error::from).map_err(failed("set up"))?;
        Ok(Self { socket, own })
    }

    /// The own address and port.
    #[must_use]
    pub fn own(&self) -> SocketAddr {
        self.own
    }

    /// Sends one packet with this payload. Does not wait.
    #[must_use]
    pub fn send(&self, to: SocketAddr, payload: &[u8]) -> Sent {
        match self.socket.send_to(payload, to) {
            Ok(_) => Sent::Sent,
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EMSGSIZE) => Sent::TooBig,
                Some(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => Sent::Busy,
                Some(errno) => Sent::NoWay(errno),
                None => Sent::NoWay(Errno::UnknownErrno),
            },
        }
    }

    /// Receives one packet, if one has come; of one that is longer than the buffer, only so much. Does not wait.
    ///
    /// # Errors
    /// [`Error::ProbeSocket`] when the socket is of no use any more.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, Error> {
        match self.socket.recv_from(buffer) {
            Ok((length, from)) => Ok(Some(Received { length, from })),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(source) => Err(Error::ProbeSocket { operation: "read", address: self.own, source }),
        }
    }
}

impl AsFd for ProbeSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
