//! Sockets that never fragment and say why a packet did not go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{self, GetStruct, SetStruct};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, getsockopt, recv, send,
    setsockopt, socket,
};

use super::Reach;
use crate::netns::Netns;

/// The discard port: nothing is ever sent there, a route look-up needs some port.
const DISCARD: u16 = 9;

/// Bytes the kernel may queue for a receiver, so that the harness itself loses nothing.
const QUEUE: usize = 16 << 20;

macro_rules! integer_option {
    ($name:ident, $level:expr, $option:path) => {
        #[derive(Clone, Copy, Debug)]
        struct $name;
        nix::setsockopt_impl!($name, $level, $option, i32, SetStruct<'_, i32>);
    };
}
integer_option!(MtuDiscoverV4, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER);
integer_option!(MtuDiscoverV6, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER);

#[derive(Clone, Copy, Debug)]
struct MtuV6;
nix::getsockopt_impl!(MtuV6, libc::IPPROTO_IPV6, libc::IPV6_MTU, i32, GetStruct<i32>);

/// Length of the IP header that the kernel puts in front.
pub(super) fn header(family: Family) -> usize {
    match family {
        Family::Ipv4 => 20,
        Family::Ipv6 => 40,
    }
}

/// What a probe's socket carries.
#[derive(Debug, Clone, Copy)]
pub(super) enum Protocol {
    /// Raw ICMP of the destination's family.
    Icmp,
    /// UDP to this port.
    Udp(u16),
}

/// A socket connected to its destination.
#[derive(Debug)]
pub(super) struct Probe {
    socket: OwnedFd,
}

impl Probe {
    /// Opens the socket in a namespace; the inner error is the kernel's word that there is no way to the destination.
    pub(super) fn open(
        netns: &Netns,
        protocol: Protocol,
        to: IpAddr,
        from: Option<IpAddr>,
        dont_fragment: bool,
    ) -> Result<std::result::Result<Self, Errno>> {
        let opened = netns.run(|| open(protocol, to, from, dont_fragment))?;
        let opened = opened.with_context(|| format!("opening a probe to {to} in {}", netns.name()))?;
        Ok(opened.map(|socket| Self { socket }))
    }

    /// Sends one packet.
    pub(super) fn send(&self, payload: &[u8]) -> nix::Result<()> {
        send(self.socket.as_raw_fd(), payload, MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// Receives one packet; none when the deadline passes.
    pub(super) fn receive(&self, buffer: &mut [u8], deadline: Instant) -> nix::Result<Option<usize>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: a wait of less than a millisecond must not become a busy loop.
            let milliseconds = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
            let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut waiting, PollTimeout::from(milliseconds)) {
                Ok(0) if Instant::now() >= deadline => return Ok(None),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error),
            }
            match recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => return Ok(Some(length)),
                Err(Errno::EAGAIN | Errno::EINTR) => {
                    // The details of an error wait in a queue of their own; unread they would keep poll from waiting.
                    let _ = recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_ERRQUEUE);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// One question and its answer: sends `payload` and waits for a packet that `matches` recognises.
pub(super) struct Exchange<'a> {
    pub(super) netns: &'a Netns,
    pub(super) protocol: Protocol,
    pub(super) to: IpAddr,
    pub(super) from: Option<IpAddr>,
    pub(super) dont_fragment: bool,
    pub(super) limit: Duration,
}

impl Exchange<'_> {
    /// Runs it; `matches` returns the IP packet's length if the received bytes are the answer.
    pub(super) fn run(&self, payload: &[u8], matches: impl Fn(&[u8]) -> Option<usize>) -> Result<Reach> {
        let probe = match Probe::open(self.netns, self.protocol, self.to, self.from, self.dont_fragment)? {
            Ok(probe) => probe,
            Err(errno) => return Ok(Reach::Refused(errno)),
        };
        let started = Instant::now();
        if let Err(errno) = probe.send(payload) {
            return self.failed(errno, true);
        }
        let mut buffer = vec![0; 1 << 16];
        loop {
            match probe.receive(&mut buffer, started + self.limit) {
                Ok(None) => return Ok(Reach::Silent),
                Ok(Some(length)) => {
                    if let Some(packet_size) = matches(&buffer[..length]) {
                        return Ok(Reach::Answered { after: started.elapsed(), packet_size });
                    }
                }
                Err(errno) => return self.failed(errno, false),
            }
        }
    }

    fn failed(&self, errno: Errno, local: bool) -> Result<Reach> {
        if errno == Errno::EMSGSIZE {
            Ok(Reach::TooBig { path_mtu: path_mtu(self.netns, self.to)?, local })
        } else {
            Ok(Reach::Refused(errno))
        }
    }
}

/// The MTU that the namespace's kernel has for the path to an address.
///
/// # Errors
/// When there is no route to it.
pub fn path_mtu(netns: &Netns, to: IpAddr) -> Result<usize> {
    let mtu = netns.run(|| -> Result<i32> {
        let any: IpAddr = match Family::of(to) {
            Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((to, DISCARD))?;
        Ok(if to.is_ipv4() { getsockopt(&socket, sockopt::IpMtu)? } else { getsockopt(&socket, MtuV6)? })
    })?;
    let mtu = mtu.with_context(|| format!("asking {} for the path MTU to {to}", netns.name()))?;
    usize::try_from(mtu).context("a negative MTU")
}

/// Enlarges the queue of a receiving socket.
pub(super) fn enlarge_queue(socket: &impl AsFd) -> Result<()> {
    setsockopt(socket, sockopt::RcvBufForce, &QUEUE).context("enlarging the queue")
}

fn open(
    protocol: Protocol,
    to: IpAddr,
    from: Option<IpAddr>,
    dont_fragment: bool,
) -> Result<std::result::Result<OwnedFd, Errno>> {
    let family = Family::of(to);
    let domain = if family == Family::Ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let (kind, number, port) = match (protocol, family) {
        (Protocol::Icmp, Family::Ipv4) => (SockType::Raw, SockProtocol::Icmp, 0),
        (Protocol::Icmp, Family::Ipv6) => (SockType::Raw, SockProtocol::IcmpV6, 0),
        (Protocol::Udp(port), _) => (SockType::Datagram, SockProtocol::Udp, port),
    };
    let socket = socket(domain, kind, SockFlag::SOCK_CLOEXEC, number).context("opening a socket")?;
    match family {
        Family::Ipv4 => {
            let discover = if dont_fragment { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
            setsockopt(&socket, MtuDiscoverV4, &discover).context("setting DF")?;
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true).context("asking for ICMP errors")?;
        }
        Family::Ipv6 => {
            let discover = if dont_fragment { libc::IPV6_PMTUDISC_DO } else { libc::IPV6_PMTUDISC_WANT };
            setsockopt(&socket, MtuDiscoverV6, &discover).context("setting path MTU discovery")?;
            setsockopt(&socket, sockopt::Ipv6DontFrag, &dont_fragment).context("setting DONTFRAG")?;
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true).context("asking for ICMP errors")?;
        }
    }
    enlarge_queue(&socket)?;
    if let Some(from) = from {
        bind(socket.as_raw_fd(), &address(from, 0)).with_context(|| format!("binding to {from}"))?;
    }
    Ok(connect(socket.as_raw_fd(), &address(to, port)).map(|()| socket))
}

fn address(ip: IpAddr, port: u16) -> SockaddrStorage {
    SockaddrStorage::from(SocketAddr::new(ip, port))
}
