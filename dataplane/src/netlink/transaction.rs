//! Many requests that are carried out together or not at all: a batch of nfnetlink (include/uapi/linux/netfilter/nfnetlink.h,
//! net/netfilter/nfnetlink.c `nfnetlink_rcv_batch`).
//!
//! A batch is one datagram. The kernel works it off while it is being sent, so that all answers are there when that returns:
//! an error for each request that it refuses, in their order, and an acknowledgement of the last one, the only one that is
//! asked for: those of a hundred thousand would not fit into any buffer.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkPayload, NetlinkSerializable};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use zeroize::Zeroizing;

use super::ack::{self, Failure};
use super::frame::frames;
use super::message::{Words, append};
use super::socket::{Request, SOCKET_BUFFER, Socket};
use crate::error::Error;

/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// Begin and end of a batch for one subsystem, whose number is the resource id of `struct nfgenmsg`.
struct Bound {
    kind: u16,
    subsystem: u8,
}

impl NetlinkSerializable for Bound {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        4
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&[0, 0, 0, self.subsystem]);
    }
}

impl From<Bound> for NetlinkPayload<Bound> {
    fn from(bound: Bound) -> Self {
        Self::InnerMessage(bound)
    }
}

/// Why a transaction was refused.
#[derive(Debug)]
pub(crate) struct Rejection {
    /// The first error.
    pub(crate) error: Error,
    /// Which request it is about and at which octet of it, as far as the kernel tells.
    pub(crate) place: Option<(usize, usize)>,
}

impl From<Error> for Rejection {
    fn from(error: Error) -> Self {
        Self { error, place: None }
    }
}

impl Socket {
    /// Makes all changes in one transaction of an nfnetlink subsystem, or none; returns how many octets were sent. `whole` names
    /// what is changed, for errors that are about no single request.
    pub(crate) fn transaction<T: NetlinkSerializable>(
        &mut self,
        subsystem: u8,
        whole: (&'static str, String),
        requests: Vec<Request<T>>,
    ) -> Result<usize, Rejection> {
        let whole = Words { operation: whole.0, object: whole.1 };
        let Some(last) = requests.len().checked_sub(1) else { return Ok(0) };
        let begin = self.next_sequence();
        let mut datagram = Zeroizing::new(Vec::new());
        let bound = |kind| NetlinkPayload::InnerMessage(Bound { kind, subsystem });
        append(&mut datagram, bound(BATCH_BEGIN), NLM_F_REQUEST, begin);
        let mut all = Vec::with_capacity(requests.len());
        for (index, request) in requests.into_iter().enumerate() {
            let acknowledge = if index == last { NLM_F_ACK } else { 0 };
            let sequence = self.next_sequence();
            let payload = NetlinkPayload::InnerMessage(request.message);
            append(&mut datagram, payload, request.flags | acknowledge | NLM_F_REQUEST, sequence);
            all.push(Words { operation: request.operation, object: request.object });
        }
        append(&mut datagram, bound(BATCH_END), NLM_F_REQUEST, self.next_sequence());
        self.drain();
        self.send_large(&datagram, &whole)?;
        match self.verdict(begin, last, &whole)? {
            None => Ok(datagram.len()),
            Some((index, failure)) => {
                let words = index.and_then(|index| all.get(index)).unwrap_or(&whole);
                let place = index.zip(failure.offset.and_then(|offset| usize::try_from(offset).ok()));
                Err(Rejection { error: words.refused(failure), place })
            }
        }
    }

    /// The first error with the number of its request, none for success.
    fn verdict(&mut self, begin: u32, last: usize, whole: &Words) -> Result<Option<(Option<usize>, Failure)>, Error> {
        let mut first = None;
        let mut done = false;
        let mut overrun = false;
        let port = self.port;
        loop {
            let datagram = match self.receive_waiting() {
                Ok(Some(datagram)) => datagram,
                Ok(None) => {
                    overrun = true;
                    continue;
                }
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EINTR) => continue,
                    // What did fit is still in the queue, and the first errors came first.
                    Some(Errno::ENOBUFS) => {
                        overrun = true;
                        continue;
                    }
                    Some(Errno::EAGAIN) => break,
                    _ => {
                        let protocol = self.protocol.name();
                        return Err(Error::Socket { operation: "read from", protocol, source: error });
                    }
                },
            };
            for frame in frames(datagram).map_while(Result::ok) {
                if frame.port != port || frame.kind != NLMSG_ERROR {
                    continue;
                }
                // Errors of the batch as a whole carry the number of its begin.
                let index = usize::try_from(frame.sequence.wrapping_sub(begin)).unwrap_or(usize::MAX).checked_sub(1);
                match ack::read_error(&frame) {
                    Some(Ok(())) => done |= index == Some(last),
                    Some(Err(failure)) => {
                        first.get_or_insert((index, failure));
                    }
                    None => return Err(whole.malformed("an error message is too short".to_owned())),
                }
            }
        }
        match first {
            None if !done && overrun => {
                Err(whole.clone().error(|operation, object| Error::Overrun { operation, object }))
            }
            None if !done => Err(whole.malformed("the kernel neither confirms nor refuses it".to_owned())),
            first => Ok(first),
        }
    }

    /// Sends a datagram of any length. The kernel takes none that is longer than the send buffer.
    fn send_large(&mut self, datagram: &[u8], whole: &Words) -> Result<(), Error> {
        // The kernel doubles what it is told and keeps 32 octets of it (net/netlink/af_netlink.c `netlink_sendmsg`).
        let enlarged = datagram.len() > SOCKET_BUFFER;
        if enlarged && setsockopt(&self.socket, sockopt::SndBufForce, &datagram.len()).is_err() {
            let _ = setsockopt(&self.socket, sockopt::SndBuf, &datagram.len());
        }
        match self.send(datagram) {
            Err(error) if error.errno() == Some(Errno::EMSGSIZE) => Err(Error::Unsupported {
                operation: whole.operation,
                object: whole.object.clone(),
                reason: format!("a transaction of {} octets does not fit into the send buffer", datagram.len()),
                remedy: "raise net.core.wmem_max above the size of the transaction, or run Husk with the capability NET_ADMIN in the \
                         initial user namespace",
            }),
            other => other,
        }
    }
}
