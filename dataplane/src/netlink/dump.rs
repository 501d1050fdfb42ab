//! Whole tables: a dump that the kernel flags as interrupted (`NLM_F_DUMP_INTR`: the table changed meanwhile) or whose answers
//! were dropped (`ENOBUFS`) is repeated from the start, a bounded number of times; nothing partial is taken for whole.

use std::thread;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN,
    NetlinkDeserializable, NetlinkPayload, NetlinkSerializable,
};
use nix::errno::Errno;
use zeroize::Zeroizing;

use super::ack;
use super::frame::{BrokenFrame, frames};
use super::message::{Words, append, decode};
use super::socket::{Received, Request, Socket};
use crate::error::Error;

/// How often a dump is attempted before it counts as failed. Many pods that come at once change the links for a second or two,
/// and attempts that follow one another at once are over within a few milliseconds of that: so there are ever longer pauses
/// between them, about two seconds in all.
pub(super) const DUMP_ATTEMPTS: u32 = 24;

/// Pause before the first repetition and the longest one; each is twice the one before.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(120);

/// What to do with an answer that cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undecodable {
    Fails,
    IsForeign,
}

/// What was kept of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept<T> {
    /// Objects that were wanted, as many as there was room for.
    pub objects: Vec<T>,
    /// Others that were wanted.
    pub left_off: u64,
}

/// How one attempt at a dump ended.
enum Attempt<T> {
    Complete(Kept<T>),
    Repeat(Repeat),
}

/// Why a dump has to be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Interrupted,
    Overrun,
}

impl Socket {
    /// All objects of a table.
    ///
    /// # Errors
    /// [`Error::Interrupted`] or [`Error::Overrun`] when no attempt got the whole table, [`Error::Refused`] when the kernel
    /// does not know the table, [`Error::Malformed`] when an object cannot be decoded.
    pub fn dump<T>(&mut self, request: Request<T>) -> Result<Vec<T>, Error>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        Ok(self.dump_with(request, Undecodable::Fails, usize::MAX, Some)?.objects)
    }

    /// All objects of a table that others fill too, without those that cannot be decoded: they use features that Husk never
    /// does, and a stranger's exotic route or device must not make Husk blind.
    ///
    /// # Errors
    /// As [`Socket::dump`], without [`Error::Malformed`] for an object.
    pub fn dump_shared<T>(&mut self, request: Request<T>) -> Result<Vec<T>, Error>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        Ok(self.dump_with(request, Undecodable::IsForeign, usize::MAX, Some)?.objects)
    }

    /// What is wanted of a table that others fill without bound: no more than `most` objects, and one datagram of the others,
    /// are held at any time. `wanted` sees objects again where a dump has to be repeated.
    ///
    /// # Errors
    /// As [`Socket::dump_shared`].
    pub fn dump_some<T, R>(
        &mut self,
        request: Request<T>,
        most: usize,
        wanted: impl FnMut(T) -> Option<R>,
    ) -> Result<Kept<R>, Error>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.dump_with(request, Undecodable::IsForeign, most, wanted)
    }

    fn dump_with<T, R>(
        &mut self,
        request: Request<T>,
        undecodable: Undecodable,
        most: usize,
        mut wanted: impl FnMut(T) -> Option<R>,
    ) -> Result<Kept<R>, Error>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        let Request { operation, object, flags, message } = request;
        let words = Words { operation, object };
        let mut payload = NetlinkPayload::InnerMessage(message);
        let mut last = Repeat::Interrupted;
        for attempt in 0..DUMP_ATTEMPTS {
            if let Some(repetition) = attempt.checked_sub(1) {
                thread::sleep(SHORTEST_PAUSE.saturating_mul(2_u32.saturating_pow(repetition)).min(LONGEST_PAUSE));
            }
            let sequence = self.next_sequence();
            let mut datagram = Zeroizing::new(Vec::new());
            payload = append(&mut datagram, payload, flags | NLM_F_DUMP | NLM_F_REQUEST, sequence);
            self.send(&datagram)?;
            match self.collect(sequence, &words, undecodable, most, &mut wanted)? {
                Attempt::Complete(kept) => return Ok(kept),
                Attempt::Repeat(reason) => last = reason,
            }
        }
        Err(match last {
            Repeat::Interrupted => {
                words.error(|operation, object| Error::Interrupted { operation, object, attempts: DUMP_ATTEMPTS })
            }
            Repeat::Overrun => words.error(|operation, object| Error::Overrun { operation, object }),
        })
    }

    /// Reads a dump to its end, also when it is already known to be useless: the kernel refuses a second dump on a socket
    /// whose first is not finished.
    fn collect<T: NetlinkDeserializable, R>(
        &mut self,
        sequence: u32,
        words: &Words,
        undecodable: Undecodable,
        most: usize,
        wanted: &mut impl FnMut(T) -> Option<R>,
    ) -> Result<Attempt<R>, Error> {
        let mut kept = Kept { objects: Vec::new(), left_off: 0 };
        let mut interrupted = false;
        let mut broken = None;
        let (protocol, port) = (self.protocol, self.port);
        loop {
            let datagram = match self.receive(words)? {
                Received::Datagram(datagram) => datagram,
                Received::Overrun => {
                    self.drain();
                    return Ok(Attempt::Repeat(Repeat::Overrun));
                }
            };
            for frame in frames(datagram) {
                let frame = frame.map_err(|BrokenFrame| words.malformed("a message header is broken".to_owned()))?;
                if frame.sequence != sequence || frame.port != port {
                    continue;
                }
                interrupted |= frame.flags & NLM_F_DUMP_INTR != 0;
                let end = match frame.kind {
                    NLMSG_DONE => ack::read_done(&frame),
                    NLMSG_ERROR => match ack::read_error(&frame) {
                        Some(outcome) => outcome,
                        None => return Err(words.malformed("an error message is too short".to_owned())),
                    },
                    NLMSG_NOOP | NLMSG_OVERRUN => continue,
                    _ => {
                        match decode(&frame, protocol) {
                            Ok(object) => match wanted(object) {
                                Some(object) if kept.objects.len() < most => kept.objects.push(object),
                                Some(_) => kept.left_off += 1,
                                None => {}
                            },
                            Err(reason) if undecodable == Undecodable::IsForeign => {
                                tracing::debug!(words.operation, words.object, reason, "skipped a foreign object");
                            }
                            Err(reason) => broken = Some(reason),
                        }
                        continue;
                    }
                };
                return match (end, broken) {
                    (Err(failure), _) if failure.errno == Errno::EINTR => Ok(Attempt::Repeat(Repeat::Interrupted)),
                    (Err(failure), _) => Err(words.refused(failure)),
                    (Ok(()), _) if interrupted => Ok(Attempt::Repeat(Repeat::Interrupted)),
                    (Ok(()), Some(reason)) => Err(words.malformed(reason)),
                    (Ok(()), None) => Ok(Attempt::Complete(kept)),
                };
            }
        }
    }
}
