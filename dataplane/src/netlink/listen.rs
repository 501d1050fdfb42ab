//! What the kernel sends by itself, to a socket that has asked to be told.

use std::io;
use std::os::fd::AsFd as _;
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
