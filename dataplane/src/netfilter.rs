//! Messages of nfnetlink (include/uapi/linux/netfilter/nfnetlink.h), which nftables and connection tracking share.

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable, NlasIterator,
};

/// `struct nfgenmsg`: family, version `NFNETLINK_V0`, resource id 0.
const HEADER: usize = 4;

/// `NLA_F_NESTED`: the attribute has attributes in it.
const NESTED: u16 = 1 << 15;

/// `NLA_TYPE_MASK`: without the flags of an attribute's type.
const TYPE: u16 = 0x3fff;

/// A question or an answer: its type (the number of a subsystem, shifted left by 8, and that of a message within it), the
/// family it is about, and its attributes as they are.
#[derive(Debug)]
pub(crate) struct Message {
    kind: u16,
    family: u8,
    pub(crate) attributes: Attributes,
}

impl Message {
    pub(crate) fn new(kind: u16, family: u8) -> Self {
        Self { kind, family, attributes: Attributes::default() }
    }

    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes = self.attributes.with(kind, value);
        self
    }

    pub(crate) fn nest(mut self, kind: u16, attributes: &Attributes) -> Self {
        self.attributes = self.attributes.nest(kind, attributes);
        self
    }
}

/// A list of attributes in the form of the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// A list as it came over the wire.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).expect("names, numbers and addresses are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn nest(self, kind: u16, attributes: &Self) -> Self {
        self.with(kind | NESTED, &attributes.0)
    }

    pub(crate) fn get(&self, kind: u16) -> Option<&[u8]> {
        attributes(&self.0).find(|(it, _)| *it == kind).map(|(_, value)| value)
    }

    /// The list as it goes over the wire.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn nested(&self, kind: u16) -> Option<Self> {
        self.get(kind).map(|bytes| Self(bytes.to_vec()))
    }

    /// A number in network byte order, as most of netfilter's are.
    pub(crate) fn number(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A name, with or without its final zero.
    pub(crate) fn text(&self, kind: u16) -> Option<&str> {
        let bytes = self.get(kind)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).ok()
    }
}

/// The attributes of a list, or of what is nested in an attribute: types without flags, and values.
pub(crate) fn attributes(list: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(list).map_while(Result::ok).filter_map(|attribute| {
        let (kind, length) = (attribute.kind() & TYPE, usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(4..length)?))
    })
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[self.family, 0, 0, 0]);
        buffer[HEADER..].copy_from_slice(&self.attributes.0);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        let (start, attributes) = payload.split_at_checked(HEADER).ok_or("shorter than its header")?;
        Ok(Self { kind: header.message_type, family: start[0], attributes: Attributes(attributes.to_vec()) })
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}
