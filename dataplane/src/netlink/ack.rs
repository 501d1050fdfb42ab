//! Acknowledgements and errors, with the kernel's own words behind them.
//!
//! An `NLMSG_ERROR` message holds an error number, the header of the request, the rest of the request (unless
//! `NLM_F_CAPPED`), and, if `NLM_F_ACK_TLVS` is set, attributes that explain (include/uapi/linux/netlink.h `struct nlmsgerr`
//! and `enum nlmsgerr_attrs`; net/netlink/af_netlink.c `netlink_ack`). An `NLMSG_DONE` message holds a number and then the
//! attributes.

use netlink_packet_core::{NLM_F_ACK_TLVS, NLM_F_CAPPED};
use nix::errno::Errno;

use super::frame::{Frame, HEADER, u16_at, u32_at};

const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NLMSGERR_ATTR_MISS_TYPE: u16 = 5;

/// Attribute type without the flags `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// What a request came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// Error number.
    pub(super) errno: Errno,
    /// Extended acknowledgement.
    pub(super) explanation: Option<String>,
    /// Octet of the request at which the offending attribute begins.
    pub(super) offset: Option<u32>,
}

/// Reads an `NLMSG_ERROR` message: `Ok` is an acknowledgement. None when it is too short to be one.
pub(super) fn read_error(frame: &Frame<'_>) -> Option<Result<(), Failure>> {
    let code = read_code(frame)?;
    let request_length = usize::try_from(u32_at(frame.payload, 4)?).ok()?;
    let echoed = if frame.flags & NLM_F_CAPPED == 0 { request_length.max(HEADER) } else { HEADER };
    Some(outcome(code, frame, 4 + echoed.next_multiple_of(4)))
}

/// Reads an `NLMSG_DONE` message: the end of a dump, or why it was given up. A kernel older than 4.20 may leave the number
/// out.
pub(super) fn read_done(frame: &Frame<'_>) -> Result<(), Failure> {
    read_code(frame).map_or(Ok(()), |code| outcome(code, frame, 4))
}

fn read_code(frame: &Frame<'_>) -> Option<i32> {
    u32_at(frame.payload, 0).map(u32::cast_signed)
}

fn outcome(code: i32, frame: &Frame<'_>, attributes_at: usize) -> Result<(), Failure> {
    if code >= 0 {
        return Ok(());
    }
    let (explanation, offset) = if frame.flags & NLM_F_ACK_TLVS != 0 {
        explanation(frame.payload.get(attributes_at..).unwrap_or_default())
    } else {
        (None, None)
    };
    Err(Failure { errno: Errno::from_raw(code.saturating_neg()), explanation, offset })
}

/// What is wrong, and where.
fn explanation(mut attributes: &[u8]) -> (Option<String>, Option<u32>) {
    let (mut text, mut missing, mut offset) = (None, None, None);
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        let Some(value) = attributes.get(4..length) else { break };
        match kind & NLA_TYPE_MASK {
            NLMSGERR_ATTR_MSG => {
                let value = value.strip_suffix(&[0]).unwrap_or(value);
                text = Some(String::from_utf8_lossy(value).trim().to_owned());
            }
            NLMSGERR_ATTR_OFFS => offset = u32_at(value, 0),
            NLMSGERR_ATTR_MISS_TYPE => missing = u32_at(value, 0),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    let text = text
        .filter(|text| !text.is_empty())
        .or_else(|| missing.map(|number| format!("attribute number {number} of the request is missing")));
    (text, offset)
}

#[cfg(test)]
pub(super) mod tests {
    use netlink_packet_core::NLMSG_ERROR;
    use proptest::prelude::*;

    use super::*;
    use crate::netlink::frame::{frames, tests::message};

    /// Payload of an `NLMSG_ERROR` message; `request` follows the echoed header.
    pub(in crate::netlink) fn error_payload(errno: i32, request: &[u8], text: Option<&str>) -> Vec<u8> {
        let mut payload = (-errno).to_ne_bytes().to_vec();
        payload.extend(message(24, 1, 1, 1, request));
        if let Some(text) = text {
            let length = u16::try_from(4 + text.len() + 1).unwrap();
            payload.extend(length.to_ne_bytes());
            payload.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
            payload.extend(text.as_bytes());
            payload.push(0);
        }
        payload
    }

    fn read(flags: u16, payload: &[u8]) -> Option<Result<(), Failure>> {
        let datagram = message(NLMSG_ERROR, flags, 1, 1, payload);
        read_error(&frames(&datagram).next().unwrap().unwrap())
    }

    #[test]
    fn the_explanation_is_found_behind_whole_and_capped_requests() {
        let whole = error_payload(22, &[0xaa; 13], Some("Nexthop has invalid gateway"));
        let capped = error_payload(22, &[], Some("Nexthop has invalid gateway"));
        let expected =
            Failure { errno: Errno::EINVAL, explanation: Some("Nexthop has invalid gateway".to_owned()), offset: None };
        assert_eq!(read(NLM_F_ACK_TLVS, &whole), Some(Err(expected.clone())));
        assert_eq!(read(NLM_F_ACK_TLVS | NLM_F_CAPPED, &capped), Some(Err(expected)));
    }

    #[test]
    fn an_acknowledgement_and_a_bare_number() {
        assert_eq!(read(NLM_F_CAPPED, &error_payload(0, &[], None)), Some(Ok(())));
        let bare = Failure { errno: Errno::EEXIST, explanation: None, offset: None };
        assert_eq!(read(NLM_F_CAPPED, &error_payload(17, &[], None)), Some(Err(bare)));
        assert_eq!(read(0, &[1, 2]), None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(flags in any::<u16>(), payload in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = read(flags, &payload);
        }
    }
}
