//! Packet sockets: what an interface sends and receives, as far as a filter in the kernel lets it through.
//!
//! A packet is seen as the device sees it: on a device that leaves segmentation to a card (GSO), or that was handed several
//! segments in one (GRO), packets of up to 64 KiB are seen that never are on the wire. A device of the tunnels has no link
//! header, and its packets begin with IP; those of veth pairs and network cards begin with Ethernet.
//!
//! The socket hears nothing before its filter is attached and it is bound to its interface: the order matters, as what came
//! before the filter would stay in the queue (packet(7)).

mod filter;

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use husk_overlay::name::InterfaceName;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike as _, UnknownCmsg, bind,
    recvmsg, setsockopt, socket, sockopt,
};

pub use filter::{Filter, Test, WHOLE};

use crate::error::Error;

/// Bytes that the kernel may queue until they are read: at 10 Gbit/s some 25 ms.
const QUEUE: usize = 32 << 20;

/// `ARPHRD_ETHER` (include/uapi/linux/if_arp.h): what else there is here has no link header.
const ETHERNET: u16 = 1;

/// `ARPHRD_LOOPBACK`, whose packets have an Ethernet header too.
const LOOPBACK: u16 = 772;

/// What the bytes of a packet begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// An Ethernet header.
    Ethernet,
    /// An IP header.
    None,
}

/// A packet that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Captured {
    /// When, as time since the Unix epoch.
    pub at: Duration,
    /// The interface sent it; else it received it.
    pub outgoing: bool,
    /// What it begins with.
    pub link: Link,
    /// Bytes of it that are in the buffer.
    pub kept: usize,
    /// Bytes of it as it passed, however few were kept.
    pub length: usize,
}

/// What the kernel counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets that the filter let through.
    pub passed: u64,
    /// Of these, those that were lost since they were not read in time.
    pub lost: u64,
}

/// A packet socket on one interface.
#[derive(Debug)]
pub struct CaptureSocket {
    socket: OwnedFd,
    interface: InterfaceName,
    link: Link,
    counted: Statistics,
}

impl CaptureSocket {
    /// Hears what an interface of the calling thread's network namespace sends and receives from now on. Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    /// [`Error::Capture`] when there is no such interface or the kernel refuses, [`Error::Unsupported`] for a filter that is too
    /// long.
    pub fn open(interface: &InterfaceName, filter: &Filter, keep: u32) -> Result<Self, Error> {
        let failed = |operation| {
            move |errno: Errno| Error::Capture { operation, interface: interface.to_string(), source: errno.into() }
        };
        let program = filter.program(keep)?;
        let index = nix::net::if_::if_nametoindex(interface.as_str()).map_err(failed("find"))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // Protocol 0: nothing is heard yet.
        let socket =
            socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(failed("open a packet socket for"))?;
        attach(&socket, &program).map_err(failed("filter packets of"))?;
        if setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &QUEUE).map_err(failed("make room for packets of"))?;
        }
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).map_err(failed("take the time of packets of"))?;
        tell_lengths(&socket).map_err(failed("take the length of packets of"))?;
        let hears = address(index).ok_or(Errno::EINVAL).map_err(failed("address"))?;
        bind(socket.as_raw_fd(), &hears).map_err(failed("listen on"))?;
        let kind = hardware(&socket).map_err(failed("examine"))?;
        let link = if [ETHERNET, LOOPBACK].contains(&kind) { Link::Ethernet } else { Link::None };
        Ok(Self { socket, interface: interface.clone(), link, counted: Statistics::default() })
    }

    /// The interface.
    #[must_use]
    pub fn interface(&self) -> &InterfaceName {
        &self.interface
    }

    /// What packets begin with.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link
    }

    /// Takes one packet, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`Error::Capture`] when the interface is gone or down, which says nothing about packets that were queued before.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<Captured>, Error> {
        let room = buffer.len();
        let mut parts = [IoSliceMut::new(buffer)];
        let mut control = nix::cmsg_space!(libc::timespec, libc::tpacket_auxdata);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let message = match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(self.failed("read from", errno.into())),
        };
        // The filter has cut the packet already, so that what the kernel hands over is not all of it.
        let (mut at, mut length) = (Duration::ZERO, message.bytes);
        for told in message.cmsgs().into_iter().flatten() {
            match told {
                ControlMessageOwned::ScmTimestampns(time) => at = time.into(),
                ControlMessageOwned::Unknown(other) => length = length_before_cut(&other).unwrap_or(length),
                _ => {}
            }
        }
        let outgoing = message.address.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING);
        Ok(Some(Captured { at, outgoing, link: self.link, kept: message.bytes.min(room), length }))
    }

    /// What was counted since the socket was opened.
    ///
    /// # Errors
    /// [`Error::Capture`] when the kernel does not say.
    pub fn statistics(&mut self) -> Result<Statistics, Error> {
        // The kernel starts anew each time it is asked (`packet_getsockopt`, net/packet/af_packet.c).
        let counted = count(&self.socket).map_err(|source| self.failed("count packets of", source))?;
        self.counted.passed += u64::from(counted.tp_packets);
        self.counted.lost += u64::from(counted.tp_drops);
        Ok(self.counted)
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> Error {
        Error::Capture { operation, interface: self.interface.to_string(), source }
    }
}

impl AsFd for CaptureSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Address of all packets of an interface.
#[allow(unsafe_code)]
fn address(index: u32) -> Option<LinkAddr> {
    let hears = libc::sockaddr_ll {
        sll_family: u16::try_from(libc::AF_PACKET).ok()?,
        sll_protocol: u16::try_from(libc::ETH_P_ALL).ok()?.to_be(),
        sll_ifindex: i32::try_from(index).ok()?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&hears)).ok()?;
    // SAFETY: the pointer is to a whole `sockaddr_ll`, whose family and length are right.
    unsafe { LinkAddr::from_raw((&raw const hears).cast(), Some(length)) }
}

/// Kind of the device that a socket is bound to (`ARPHRD_*`). What the kernel says of its address is shorter than a whole
/// `sockaddr_ll` (`packet_getname`, net/packet/af_packet.c), which nix does not take.
#[allow(unsafe_code)]
fn hardware(socket: &OwnedFd) -> nix::Result<u16> {
    let mut own = libc::sockaddr_ll {
        sll_family: 0,
        sll_protocol: 0,
        sll_ifindex: 0,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&own)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `own`.
    let result = unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut own).cast(), &raw mut size) };
    Errno::result(result)?;
    Ok(own.sll_hatype)
}

/// Attaches a filter.
#[allow(unsafe_code)]
fn attach(socket: &OwnedFd, program: &[libc::sock_filter]) -> nix::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let attached = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let size = libc::socklen_t::try_from(size_of_val(&attached)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel copies the program of `len` instructions before it returns and does not write to it
    // (`sk_attach_filter`, net/core/filter.c); `attached` lives as long as the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const attached).cast(),
            size,
        )
    };
    Errno::result(result).map(drop)
}

/// `PACKET_AUXDATA` (include/uapi/linux/if_packet.h), which libc knows for one target only. The message that comes with each packet
/// has the same number.
const PACKET_AUXDATA: libc::c_int = 8;

/// Asks for a `tpacket_auxdata` with each packet.
#[allow(unsafe_code)]
fn tell_lengths(socket: &OwnedFd) -> nix::Result<()> {
    let on: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of_val(&on)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel reads `size` bytes, which is the size of `on`.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_AUXDATA, (&raw const on).cast(), size) };
    Errno::result(result).map(drop)
}

/// Bytes that a packet had before the filter cut it, if this message tells them (`tp_len`, packet(7)).
fn length_before_cut(message: &UnknownCmsg) -> Option<usize> {
    let header = &message.cmsg_header;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, PACKET_AUXDATA) {
        return None;
    }
    let at = std::mem::offset_of!(libc::tpacket_auxdata, tp_len);
    let length = message.data_bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_ne_bytes(length)).ok()
}

/// Reads what was counted since it was read last.
#[allow(unsafe_code)]
fn count(socket: &OwnedFd) -> io::Result<libc::tpacket_stats> {
    let mut counted = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut size = libc::socklen_t::try_from(size_of_val(&counted)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `size` bytes, which is the size of `counted`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut counted).cast(),
            &raw mut size,
        )
    };
    Errno::result(result)?;
    Ok(counted)
}
