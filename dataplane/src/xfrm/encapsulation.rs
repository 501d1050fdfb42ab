//! ESP in UDP (RFC 3948): the kernel takes such packets from a UDP socket that somebody keeps open.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt};

use super::states::ESP_IN_UDP;
use crate::error::Error;

/// Words for an error's "cannot … a … socket".
const PROTOCOL: &str = "UDP";

/// A socket of the calling thread's network namespace at which ESP in UDP arrives, for as long as it is open: the kernel
/// decrypts what is for an association and leaves the rest to be read. Sending needs no socket. An address of one family
/// takes packets of that family only; IPv6 needs Linux 5.8.
///
/// # Errors
/// [`Error::Socket`], for example when the port is taken.
pub fn encapsulation_socket(local: SocketAddr) -> Result<UdpSocket, Error> {
    let failed = |operation| {
        move |errno: nix::errno::Errno| Error::Socket { operation, protocol: PROTOCOL, source: errno.into() }
    };
    let family = if local.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Datagram, flags, None).map_err(failed("open"))?;
    if local.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true).map_err(failed("set IPV6_V6ONLY on"))?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local)).map_err(failed("bind"))?;
    take_esp(&socket).map_err(|source| Error::Socket { operation: "set UDP_ENCAP on", protocol: PROTOCOL, source })?;
    Ok(UdpSocket::from(socket))
}

/// Sets `UDP_ENCAP`, which nix has no function for, to `UDP_ENCAP_ESPINUDP` (include/uapi/linux/udp.h).
#[allow(unsafe_code)]
fn take_esp(socket: &std::os::fd::OwnedFd) -> std::io::Result<()> {
    const UDP_ENCAP: libc::c_int = 100;
    let value = libc::c_int::from(ESP_IN_UDP);
    let length = libc::socklen_t::try_from(size_of_val(&value)).expect("an int has a few bytes");
    // SAFETY: the descriptor is open for the duration of the call, and the kernel reads `length` bytes from `value`, which is
    // an int on the stack of exactly that size; it writes nothing.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_UDP, UDP_ENCAP, (&raw const value).cast(), length)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
