//! Messages within a datagram (netlink(7), include/uapi/linux/netlink.h `struct nlmsghdr`).

/// Bytes of a message header.
pub(super) const HEADER: usize = 16;

/// One message of a datagram, not yet decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    /// Message type.
    pub(crate) kind: u16,
    /// `NLM_F_*` flags.
    pub(crate) flags: u16,
    /// Sequence number of the request it answers.
    pub(super) sequence: u32,
    /// Port of the socket it answers.
    pub(super) port: u32,
    /// What follows the header.
    pub(crate) payload: &'a [u8],
    /// Header and payload, as a decoder wants it.
    pub(super) bytes: &'a [u8],
}

/// A datagram that is not a sequence of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BrokenFrame;

/// Splits a datagram into its messages.
pub(crate) fn frames(datagram: &[u8]) -> impl Iterator<Item = Result<Frame<'_>, BrokenFrame>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let frame = first(rest);
        rest = match &frame {
            // Messages start at multiples of NLMSG_ALIGNTO; the last one may lack its padding.
            Ok(frame) => rest.get(frame.bytes.len().next_multiple_of(4)..).unwrap_or_default(),
            Err(BrokenFrame) => &[],
        };
        Some(frame)
    })
}

fn first(bytes: &[u8]) -> Result<Frame<'_>, BrokenFrame> {
    let length = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok()).ok_or(BrokenFrame)?;
    if length < HEADER {
        return Err(BrokenFrame);
    }
    let bytes = bytes.get(..length).ok_or(BrokenFrame)?;
    let field16 = |at| u16_at(bytes, at).ok_or(BrokenFrame);
    let field32 = |at| u32_at(bytes, at).ok_or(BrokenFrame);
    Ok(Frame {
        kind: field16(4)?,
        flags: field16(6)?,
        sequence: field32(8)?,
        port: field32(12)?,
        payload: &bytes[HEADER..],
        bytes,
    })
}

/// The native-endian number at an offset.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The native-endian number at an offset.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message as the kernel would write it, padded.
    pub(in crate::netlink) fn message(kind: u16, flags: u16, sequence: u32, port: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(port.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_datagram_is_split_at_aligned_boundaries() {
        let mut datagram = message(2, 0, 7, 9, &[1, 2, 3]);
        datagram.extend(message(3, 0x100, 8, 9, &[]));
        let all: Vec<_> = frames(&datagram).map(Result::unwrap).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].sequence, all[0].port, all[0].payload), (2, 7, 9, &[1, 2, 3][..]));
        assert_eq!((all[1].kind, all[1].flags, all[1].payload), (3, 0x100, &[][..]));
    }

    proptest! {
        #[test]
        fn garbage_ends_in_an_error_or_in_frames_that_fit(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            let total: usize = frames(&datagram).filter_map(Result::ok).map(|frame| frame.bytes.len()).sum();
            prop_assert!(total <= datagram.len());
        }
    }
}
