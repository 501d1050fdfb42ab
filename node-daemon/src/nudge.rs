//! Waking a thread that waits for sockets: a byte over a pair of sockets, one of which it waits for as well.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::Duration;

use husk_ipam::lease::since_boot;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The side that wakes. The thread finds out when the last of these is gone.
#[derive(Debug, Clone)]
pub(crate) struct Nudge(Arc<UnixStream>);

/// Wakes like a [`Nudge`], but keeps no thread from ending.
#[derive(Debug, Clone)]
pub(crate) struct WeakNudge(Weak<UnixStream>);

/// The thread's side.
#[derive(Debug)]
pub(crate) struct Nudged(UnixStream);

/// Both sides.
///
/// # Errors
/// When there is no socket to be had.
pub(crate) fn pair() -> io::Result<(Nudge, Nudged)> {
    let (nudge, nudged) = UnixStream::pair()?;
    nudge.set_nonblocking(true)?;
    nudged.set_nonblocking(true)?;
    Ok((Nudge(Arc::new(nudge)), Nudged(nudged)))
}

impl Nudge {
    /// Wakes the thread.
    pub(crate) fn wake(&self) {
        // Where there is no room, enough nudges wait already.
        let _ = (&*self.0).write(&[0]);
    }

    pub(crate) fn downgrade(&self) -> WeakNudge {
        WeakNudge(Arc::downgrade(&self.0))
    }
}

impl WeakNudge {
    /// Wakes the thread, if it has not ended.
    pub(crate) fn wake(&self) {
        if let Some(nudge) = self.0.upgrade() {
            Nudge(nudge).wake();
        }
    }
}

impl Nudged {
    /// Waits until one of these can be read, it is `due` as time since boot, or somebody wakes the thread.
    ///
    /// # Errors
    /// When the kernel does not let it wait.
    pub(crate) fn wait<'a>(
        &'a self,
        sockets: impl Iterator<Item = BorrowedFd<'a>>,
        due: Option<Duration>,
    ) -> io::Result<()> {
        let timeout = due.map_or(PollTimeout::NONE, |at| {
            // Rounded up: a wait of less than a millisecond must not become a busy loop.
            let left = at.saturating_sub(since_boot()) + Duration::from_micros(999);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let all = sockets.chain([self.0.as_fd()]);
        let mut waiting: Vec<PollFd<'_>> = all.map(|socket| PollFd::new(socket, PollFlags::POLLIN)).collect();
        match poll(&mut waiting, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes all nudges. False when nobody is left to nudge.
    pub(crate) fn drain(&mut self) -> bool {
        let mut bytes = [0; 64];
        loop {
            match self.0.read(&mut bytes) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}
