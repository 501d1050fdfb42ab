//! Many requests to a datagram. The kernel works them off in order and answers each, also when one before it failed; answers
//! are matched by sequence number.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkDeserializable, NetlinkPayload, NetlinkSerializable,
};
use zeroize::Zeroizing;

use super::ack::{self, Failure};
use super::frame::{Frame, frames};
use super::message::{Words, append, decode};
use super::socket::{Protocol, Received, Request, Socket};
use crate::error::Error;

/// Most requests in one datagram: with an unprivileged receive buffer of 208 KiB, the acknowledgements of this many
/// still fit.
pub(super) const BATCH_MESSAGES: usize = 128;

/// Most requests with an answer in one datagram; each answer takes a page or two of the receive buffer.
const BATCH_ANSWERS: usize = 24;

/// Bytes of a datagram beyond which no further request is put into it.
const BATCH_BYTES: usize = 64 << 10;

impl Socket {
    /// Asks for one object.
    ///
    /// # Errors
    /// [`Error::Refused`] when the kernel has none, and the errors of a broken exchange.
    pub fn get<T>(&mut self, request: Request<T>) -> Result<T, Error>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.get_batch(vec![request]).pop().expect("there is one result per request")
    }

    /// Asks for one object per request, many requests to a datagram; results are in the order of the requests.
    pub fn get_batch<T>(&mut self, requests: Vec<Request<T>>) -> Vec<Result<T, Error>>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        self.exchange(requests, 0, BATCH_ANSWERS, |frame, protocol| match frame.kind {
            NLMSG_ERROR => match ack::read_error(frame) {
                Some(Err(failure)) => Answer::Refused(failure),
                Some(Ok(())) => Answer::Broken("an acknowledgement came where an object was asked for".to_owned()),
                None => Answer::Broken("an error message is too short".to_owned()),
            },
            _ => match decode(frame, protocol) {
                Ok(object) => Answer::Done(object),
                Err(reason) => Answer::Broken(reason),
            },
        })
    }

    /// Makes one change.
    ///
    /// # Errors
    /// [`Error::Refused`], and the errors of a broken exchange, after which the outcome is unknown.
    pub fn request<T: NetlinkSerializable>(&mut self, request: Request<T>) -> Result<(), Error> {
        self.batch(vec![request]).pop().expect("there is one result per request")
    }

    /// Makes many changes, many to a datagram; one that fails does not stop the others. Results are in the order of the
    /// requests.
    pub fn batch<T: NetlinkSerializable>(&mut self, requests: Vec<Request<T>>) -> Vec<Result<(), Error>> {
        self.exchange(requests, NLM_F_ACK, BATCH_MESSAGES, |frame, _| match frame.kind {
            NLMSG_ERROR => match ack::read_error(frame) {
                Some(Ok(())) => Answer::Done(()),
                Some(Err(failure)) => Answer::Refused(failure),
                None => Answer::Broken("an error message is too short".to_owned()),
            },
            // An echo of the object; the acknowledgement follows.
            _ => Answer::NotYet,
        })
    }

    /// Sends requests, several to a datagram, and matches one answer to each.
    fn exchange<T: NetlinkSerializable, R>(
        &mut self,
        requests: Vec<Request<T>>,
        flags: u16,
        most: usize,
        read: impl Fn(&Frame<'_>, Protocol) -> Answer<R>,
    ) -> Vec<Result<R, Error>> {
        let mut results = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let mut datagram = Zeroizing::new(Vec::new());
            let mut waiting = Waiting { first: self.sequence.wrapping_add(1), all: Vec::new(), open: 0 };
            while waiting.all.len() < most
                && (datagram.is_empty() || datagram.len() < BATCH_BYTES)
                && let Some(request) = requests.next()
            {
                let sequence = self.next_sequence();
                let payload = NetlinkPayload::InnerMessage(request.message);
                append(&mut datagram, payload, request.flags | flags | NLM_F_REQUEST, sequence);
                waiting.add(Words { operation: request.operation, object: request.object });
            }
            self.settle(&datagram, &mut waiting, &read);
            results.extend(waiting.all.into_iter().map(|(words, result)| {
                result.unwrap_or_else(|| Err(words.error(|operation, object| Error::Overrun { operation, object })))
            }));
        }
        results
    }

    fn settle<R>(
        &mut self,
        datagram: &[u8],
        waiting: &mut Waiting<R>,
        read: &impl Fn(&Frame<'_>, Protocol) -> Answer<R>,
    ) {
        if let Err(error) = self.send(datagram) {
            return waiting.fail_rest(error);
        }
        let (protocol, port) = (self.protocol, self.port);
        let take = |waiting: &mut Waiting<R>, datagram: &[u8]| {
            for frame in frames(datagram).map_while(Result::ok).filter(|frame| frame.port == port) {
                waiting.settle(frame.sequence, read(&frame, protocol));
            }
        };
        while waiting.open > 0 {
            let words = waiting.first_open();
            match self.receive(&words) {
                Ok(Received::Datagram(datagram)) => take(waiting, datagram),
                Ok(Received::Overrun) => {
                    // The answers that did fit are still in the queue; those that did not never come.
                    while let Ok(Some(datagram)) = self.receive_waiting() {
                        take(waiting, datagram);
                    }
                    return;
                }
                Err(error) => return waiting.fail_rest(error),
            }
        }
    }
}

/// What a message means for the request with its sequence number.
enum Answer<R> {
    Done(R),
    Refused(Failure),
    Broken(String),
    NotYet,
}

/// Requests of one datagram that wait for their answers; sequence numbers are consecutive.
struct Waiting<R> {
    first: u32,
    all: Vec<(Words, Option<Result<R, Error>>)>,
    open: usize,
}

impl<R> Waiting<R> {
    fn add(&mut self, words: Words) {
        self.all.push((words, None));
        self.open += 1;
    }

    fn settle(&mut self, sequence: u32, answer: Answer<R>) {
        let index = usize::try_from(sequence.wrapping_sub(self.first)).unwrap_or(usize::MAX);
        let Some((words, result @ None)) = self.all.get_mut(index) else { return };
        *result = Some(match answer {
            Answer::Done(object) => Ok(object),
            Answer::Refused(failure) => Err(words.refused(failure)),
            Answer::Broken(reason) => Err(words.malformed(reason)),
            Answer::NotYet => return,
        });
        self.open -= 1;
    }

    fn first_open(&self) -> Words {
        let open = self.all.iter().find(|(_, result)| result.is_none());
        open.expect("asked only while a request is open").0.clone()
    }

    /// Gives the error to the first open request; the outcome of the others is as unknown.
    fn fail_rest(&mut self, error: Error) {
        let mut error = Some(error);
        for (words, result) in self.all.iter_mut().filter(|(_, result)| result.is_none()) {
            *result = Some(Err(error
                .take()
                .unwrap_or_else(|| words.clone().error(|operation, object| Error::Overrun { operation, object }))));
        }
        self.open = 0;
    }
}
