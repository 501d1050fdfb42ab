//! Requests into datagrams, objects out of them, and the words for what goes wrong.

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable};
use zeroize::Zeroizing;

use super::ack::Failure;
use super::frame::Frame;
use super::socket::Protocol;
use crate::error::{Error, Refusal};

/// Operation and object of a request that is on its way.
#[derive(Debug, Clone)]
pub(super) struct Words {
    pub(super) operation: &'static str,
    pub(super) object: String,
}

impl Words {
    pub(super) fn error(self, make: impl FnOnce(&'static str, String) -> Error) -> Error {
        make(self.operation, self.object)
    }

    pub(super) fn refused(&self, Failure { errno, explanation, .. }: Failure) -> Error {
        Error::Refused(Refusal { operation: self.operation, object: self.object.clone(), errno, explanation })
    }

    pub(super) fn malformed(&self, reason: String) -> Error {
        Error::Malformed { operation: self.operation, object: self.object.clone(), reason }
    }
}

/// Appends a message to a datagram; hands the payload back.
pub(super) fn append<T: NetlinkSerializable>(
    datagram: &mut Zeroizing<Vec<u8>>,
    payload: NetlinkPayload<T>,
    flags: u16,
    sequence: u32,
) -> NetlinkPayload<T> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let (start, length) = (datagram.len(), message.buffer_len());
    // A vector that grows leaves its old content in freed memory: move and wipe instead.
    if datagram.capacity() < start + length + 4 {
        let mut larger = Zeroizing::new(Vec::with_capacity((start + length + 4).max(2 * datagram.capacity())));
        larger.extend_from_slice(datagram);
        *datagram = larger;
    }
    datagram.resize(start + length.next_multiple_of(4), 0);
    message.serialize(&mut datagram[start..start + length]);
    message.payload
}

/// Decodes an object. A decoder's error quotes the bytes it stumbled over, and those of the generic families may be keys:
/// only rtnetlink's are repeated.
pub(super) fn decode<T: NetlinkDeserializable>(frame: &Frame<'_>, protocol: Protocol) -> Result<T, String> {
    match NetlinkMessage::<T>::deserialize(frame.bytes) {
        Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(object), .. }) => Ok(object),
        Ok(_) => Err(format!("a message of type {} is no object", frame.kind)),
        Err(error) if protocol == Protocol::Route => Err(error.to_string()),
        Err(_) => Err(format!("a message of type {} could not be decoded", frame.kind)),
    }
}
