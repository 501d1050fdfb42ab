//! What the kernel sends by itself, to a socket that has asked to be told.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::socket::Socket;
use crate::error::Error;

/// What was heard.
pub(crate) enum Heard<'a> {
    /// A datagram.
    Datagram(&'a [u8]),
    /// Datagrams were lost: they came faster than they were read, or one was larger than any before.
    Overrun,
    /// Nothing for as long as was waited.
    Silence,
}

impl Socket {
    /// Asks to be told what the kernel says to a multicast group.
    pub(crate) fn join(&mut self, group: u32) -> Result<(), Error> {
        let protocol = self.protocol.name();
        let failed = |source| Error::Socket { operation: "subscribe to events of", protocol, source };
        self.socket.add_membership(group).map_err(failed)
    }

    /// Datagrams that the kernel could not deliver for want of buffer space since the socket was opened.
    pub(crate) fn dropped(&self) -> Result<u32, Error> {
        let protocol = self.protocol.name();
        dropped(self.as_fd()).map_err(|source| Error::Socket { operation: "ask for the losses of", protocol, source })
    }

    /// The next datagram; waits for it at most this long.
    pub(crate) fn listen(&mut self, patience: Duration) -> Result<Heard<'_>, Error> {
        let protocol = self.protocol.name();
        let broken = |source: io::Error| Error::Socket { operation: "read from", protocol, source };
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(Heard::Silence),
            Ok(_) => {}
            Err(errno) => return Err(broken(errno.into())),
        }
        match self.receive_waiting() {
            Ok(Some(datagram)) => Ok(Heard::Datagram(datagram)),
            Ok(None) => Ok(Heard::Overrun),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOBUFS) => Ok(Heard::Overrun),
                Some(Errno::EINTR | Errno::EAGAIN) => Ok(Heard::Silence),
                _ => Err(broken(error)),
            },
        }
    }
}

/// `SK_MEMINFO_DROPS` and `SK_MEMINFO_VARS` (include/uapi/linux/sock_diag.h).
const DROPS: usize = 8;
const VARS: usize = 9;

#[allow(unsafe_code)]
fn dropped(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut values = [0_u32; VARS];
    let mut length = libc::socklen_t::try_from(size_of_val(&values)).expect("36 bytes");
    // SAFETY: the descriptor is open; the kernel writes at most `length` bytes into `values`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            std::ptr::from_mut(&mut length),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(values[DROPS]) }
}
