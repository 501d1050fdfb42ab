//! Sockets that are read until something ends it.

use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use husk_dataplane::Error;
use husk_dataplane::capture::{CaptureSocket, Captured, Filter, Link, Statistics};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Seen;
use crate::report::Tap;

/// Most packets of a socket that are taken before the others have their turn, and before what was taken is written.
const AT_ONCE: usize = 256;

/// Bytes of the largest packet, not segmented yet; of several segments Linux joins up to this (`GSO_MAX_SIZE`).
const LARGEST: usize = 1 << 18;

/// When to stop by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) count: Option<u64>,
    pub(super) time: Option<Duration>,
}

/// What ended a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Enough,
    Time,
    Interrupted,
    /// Nobody takes the packets any more.
    Unread,
    /// An interface is gone, or down.
    Gone,
}

/// Open sockets. From now on SIGINT and SIGTERM end a run, and not the program.
pub(super) struct Session {
    sockets: Vec<CaptureSocket>,
    signals: SignalFd,
    taken: u64,
    largest: usize,
    buffer: Vec<u8>,
}

impl Session {
    pub(super) fn open(taps: &[Tap], filter: &Filter, keep: u32) -> anyhow::Result<Self> {
        let open = |tap: &Tap| {
            let filter = tap.filter.clone().and(filter);
            CaptureSocket::open(&tap.interface, &filter, keep)
                .map_err(|error| anyhow::anyhow!("{error}; {}", error.remedy_once()))
        };
        let mask: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
        mask.thread_block().context("cannot hold signals back")?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context("cannot listen for signals")?;
        let sockets = taps.iter().map(open).collect::<anyhow::Result<_>>()?;
        Ok(Self { sockets, signals, taken: 0, largest: 0, buffer: vec![0; LARGEST] })
    }

    /// What the packets begin with.
    pub(super) fn link(&self) -> anyhow::Result<Link> {
        let first = self.sockets.first().map_or(Link::None, CaptureSocket::link);
        let other = self.sockets.iter().find(|socket| socket.link() != first);
        match other {
            None => Ok(first),
            Some(other) => anyhow::bail!(
                "packets of {} begin with another header than those of {}: one pcap file cannot hold both",
                other.interface(),
                self.sockets[0].interface()
            ),
        }
    }

    /// Packets so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Bytes of the largest so far.
    pub(super) fn largest(&self) -> usize {
        self.largest
    }

    /// What the kernel counted so far.
    pub(super) fn statistics(&mut self) -> anyhow::Result<Statistics> {
        let mut sum = Statistics::default();
        for socket in &mut self.sockets {
            let counted = socket.statistics()?;
            sum.passed += counted.passed;
            sum.lost += counted.lost;
        }
        Ok(sum)
    }

    /// Hands packets over as they come, and nothing whenever there is none for the moment, until `take` says false or fails, or
    /// something else ends it. What is queued when time is over is still taken.
    pub(super) fn run(
        &mut self,
        limits: &Limits,
        mut take: impl FnMut(Option<&Seen<'_>>) -> io::Result<bool>,
    ) -> anyhow::Result<End> {
        let end = self.until_end(limits, &mut take)?;
        Ok(if end != End::Unread && !take(None)? { End::Unread } else { end })
    }

    fn until_end(
        &mut self,
        limits: &Limits,
        take: &mut impl FnMut(Option<&Seen<'_>>) -> io::Result<bool>,
    ) -> anyhow::Result<End> {
        let deadline = limits.time.map(|time| Instant::now() + time);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let is_over = left.is_some_and(|left| left.is_zero());
            if self.wait(left)? {
                return Ok(End::Interrupted);
            }
            let (mut found, mut gone) = (false, false);
            for index in 0..self.sockets.len() {
                for _ in 0..AT_ONCE {
                    if limits.count.is_some_and(|count| self.taken >= count) {
                        return Ok(End::Enough);
                    }
                    match self.receive(index) {
                        Ok(None) => break,
                        Ok(Some(captured)) => {
                            found = true;
                            let bytes = &self.buffer[..captured.kept];
                            let seen = Seen { interface: self.sockets[index].interface().as_str(), captured, bytes };
                            if !take(Some(&seen))? {
                                return Ok(End::Unread);
                            }
                            self.taken += 1;
                            self.largest = self.largest.max(captured.length);
                        }
                        Err(error) if error.errno() == Some(Errno::ENETDOWN) => {
                            gone = true;
                            break;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            if found {
                continue;
            }
            if gone {
                return Ok(End::Gone);
            }
            if is_over {
                return Ok(End::Time);
            }
            if !take(None)? {
                return Ok(End::Unread);
            }
        }
    }

    fn receive(&mut self, index: usize) -> Result<Option<Captured>, Error> {
        self.sockets[index].receive(&mut self.buffer)
    }

    /// Waits for packets. True if a signal came.
    fn wait(&mut self, limit: Option<Duration>) -> anyhow::Result<bool> {
        // A millisecond more than is left: rather late than in a busy loop.
        let limit = limit.map(|left| if left.is_zero() { left } else { left + Duration::from_millis(1) });
        let limit = limit.map_or(PollTimeout::NONE, |left| PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        let sockets = self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        let mut waiting: Vec<_> = sockets.chain([PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)]).collect();
        match poll(&mut waiting, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for packets"),
        }
        Ok(self.signals.read_signal().context("cannot read signals")?.is_some())
    }
}
