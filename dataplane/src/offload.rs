//! Whether a device hands packets on without their checksums, and many segments as one: what a device says it can do itself
//! and, being virtual, leaves to the device below.
//!
//! That is the feature `tx-checksum-ip-generic`. Without it a device has no segmentation offload either: the kernel takes
//! `tx-tcp-segmentation` and its like away with it (net/core/dev.c `netdev_fix_features`) and gives them back with it. Older kernels do
//! not count `tx-udp-segmentation` among them, which is therefore named. What was segmented by whoever sent it, such as a pod, is then
//! cut, and its checksums are filled in, before it enters the device (`validate_xmit_skb`, the same file).
//!
//! Features are read and set over the generic netlink family `ethtool`
//! (Documentation/networking/ethtool-netlink.rst, since Linux 5.6). Only devices of which something is wanted are looked at.

use std::collections::BTreeMap;
use std::fmt;

use husk_overlay::name::InterfaceName;
use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use nix::errno::Errno;
use serde::Serialize;

use crate::error::Error;
use crate::netlink::{Protocol, Request, Socket};

/// The features, by the kernel's names (net/ethtool/common.c `netdev_features_strings`). The first decides.
const FEATURES: [&str; 2] = ["tx-checksum-ip-generic", "tx-udp-segmentation"];

/// Numbers of include/uapi/linux/ethtool_netlink.h.
mod uapi {
    pub(super) const FAMILY: &str = "ethtool";
    pub(super) const VERSION: u8 = 1;
    pub(super) const FEATURES_GET: u8 = 11;
    pub(super) const FEATURES_SET: u8 = 12;
    pub(super) const FEATURES_HEADER: u16 = 1;
    pub(super) const FEATURES_WANTED: u16 = 3;
    pub(super) const FEATURES_ACTIVE: u16 = 4;
    pub(super) const HEADER_DEVICE_NAME: u16 = 2;
    pub(super) const HEADER_FLAGS: u16 = 3;
    /// The answer to a change is its acknowledgement alone.
    pub(super) const FLAG_OMIT_REPLY: u32 = 1 << 1;
    pub(super) const BITSET_BITS: u16 = 3;
    pub(super) const BITSET_BITS_BIT: u16 = 1;
    pub(super) const BIT_NAME: u16 = 2;
    pub(super) const BIT_VALUE: u16 = 3;
    /// `NLA_F_NESTED` (include/uapi/linux/netlink.h).
    pub(super) const NESTED: u16 = 1 << 15;
    /// Of an attribute's type, what is no flag (`NLA_TYPE_MASK`).
    pub(super) const TYPE: u16 = 0x3fff;
}

/// Turn the offload of a device on or off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OffloadChange {
    /// The device.
    pub interface: InterfaceName,
    /// On, not off.
    pub on: bool,
}

impl fmt::Display for OffloadChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.on { "on" } else { "off" };
        write!(f, "turn {state} checksum and segmentation offload of {}", self.interface)
    }
}

/// Devices whose offload is not as wanted. One that is absent in `actual` has no known state and is left alone.
#[must_use]
pub fn diff(desired: &BTreeMap<InterfaceName, bool>, actual: &BTreeMap<InterfaceName, bool>) -> Vec<OffloadChange> {
    let differs = |(interface, on): &(&InterfaceName, &bool)| actual.get(*interface).is_some_and(|found| found != *on);
    desired
        .iter()
        .filter(differs)
        .map(|(interface, on)| OffloadChange { interface: interface.clone(), on: *on })
        .collect()
}

/// Access to the features of devices, in one network namespace.
#[derive(Debug)]
pub struct Offloads {
    socket: Socket,
    /// Number of the generic netlink family, once it is known.
    family: Option<u16>,
}

impl Offloads {
    /// In the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(Protocol::Generic)?, family: None })
    }

    /// Whether a device has offload; none if there is no such device, or the kernel cannot tell.
    ///
    /// # Errors
    /// When the kernel does not answer, or not in a way that is understood.
    pub fn read(&mut self, interface: &InterfaceName) -> Result<Option<bool>, Error> {
        let Some(family) = self.family()? else { return Ok(None) };
        let (operation, object) = ("read", format!("features of {interface}"));
        let header = nested(uapi::FEATURES_HEADER, &name(uapi::HEADER_DEVICE_NAME, interface.as_str()));
        let message = Message::new(family, uapi::FEATURES_GET, &header);
        match self.socket.get(Request { operation, object: object.clone(), flags: 0, message }) {
            Ok(answer) => {
                let malformed = || Error::Malformed { operation, object, reason: "it lists no features".to_owned() };
                Ok(Some(has_offload(answer.attributes()).ok_or_else(malformed)?))
            }
            Err(error) if matches!(error.errno(), Some(Errno::ENODEV | Errno::EOPNOTSUPP)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a change.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn apply(&mut self, change: &OffloadChange) -> Result<(), Error> {
        let (operation, object) = ("set", format!("features of {} ({change})", change.interface));
        let Some(family) = self.family()? else {
            return Err(Error::Unsupported {
                operation,
                object,
                reason: "the kernel has no netlink interface for them".to_owned(),
                remedy: "use a kernel of version 5.6 or later with CONFIG_ETHTOOL_NETLINK, or set them with ethtool -K",
            });
        };
        let mut header = name(uapi::HEADER_DEVICE_NAME, change.interface.as_str());
        header.extend(attribute(uapi::HEADER_FLAGS, &uapi::FLAG_OMIT_REPLY.to_ne_bytes()));
        let bit = |feature: &&str| {
            let mut bit = name(uapi::BIT_NAME, feature);
            if change.on {
                bit.extend(attribute(uapi::BIT_VALUE, &[]));
            }
            nested(uapi::BITSET_BITS_BIT, &bit)
        };
        let bits: Vec<u8> = FEATURES.iter().flat_map(bit).collect();
        let mut all = nested(uapi::FEATURES_HEADER, &header);
        all.extend(nested(uapi::FEATURES_WANTED, &nested(uapi::BITSET_BITS, &bits)));
        let message = Message::new(family, uapi::FEATURES_SET, &all);
        self.socket.request(Request { operation, object, flags: 0, message })
    }

    /// Number of the family `ethtool`; none where the kernel has none.
    fn family(&mut self) -> Result<Option<u16>, Error> {
        if self.family.is_some() {
            return Ok(self.family);
        }
        let attributes = vec![GenlCtrlAttrs::FamilyName(uapi::FAMILY.to_owned())];
        let message = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: attributes });
        let request = Request { operation: "find", object: "the kernel's ethtool".to_owned(), flags: 0, message };
        let answer: GenlMessage<GenlCtrl> = match self.socket.get(request) {
            Ok(answer) => answer,
            Err(error) if error.errno() == Some(Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.family = answer.payload.nlas.iter().find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        Ok(self.family)
    }
}

/// One attribute, padded.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("names of features and devices are short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
    attribute(kind | uapi::NESTED, content)
}

fn name(kind: u16, name: &str) -> Vec<u8> {
    attribute(kind, &[name.as_bytes(), &[0]].concat())
}

/// The attributes in a message or in another attribute; ends where it is no longer well-formed.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[a, b, c, d, ..] = bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & uapi::TYPE, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Whether one of the features is active: the kernel lists those that are. None if it lists nothing.
fn has_offload(message: &[u8]) -> Option<bool> {
    let bits = find(find(message, uapi::FEATURES_ACTIVE)?, uapi::BITSET_BITS)?;
    let named = |(_, bit)| find(bit, uapi::BIT_NAME).and_then(|name| name.strip_suffix(&[0]));
    Some(attributes(bits).filter_map(named).any(|name| FEATURES.iter().any(|feature| feature.as_bytes() == name)))
}

/// A message of the family: `struct genlmsghdr` and attributes.
#[derive(Debug)]
struct Message {
    family: u16,
    bytes: Vec<u8>,
}

impl Message {
    fn new(family: u16, command: u8, attributes: &[u8]) -> Self {
        Self { family, bytes: [&[command, uapi::VERSION, 0, 0], attributes].concat() }
    }

    fn attributes(&self) -> &[u8] {
        self.bytes.get(4..).unwrap_or_default()
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        self.bytes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..self.bytes.len()].copy_from_slice(&self.bytes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { family: header.message_type, bytes: payload.to_vec() })
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn device() -> InterfaceName {
        InterfaceName::new("husk-vx").unwrap()
    }

    #[test]
    fn only_what_is_known_to_be_otherwise_is_changed() {
        let state = |on| BTreeMap::from([(device(), on)]);
        let change = |on| vec![OffloadChange { interface: device(), on }];
        assert_eq!(diff(&state(false), &state(true)), change(false));
        assert_eq!(diff(&state(true), &state(false)), change(true));
        assert_eq!(diff(&state(true), &state(true)), []);
        assert_eq!(diff(&state(false), &state(false)), []);
        assert_eq!(diff(&BTreeMap::new(), &state(false)), [], "no opinion");
        assert_eq!(diff(&state(false), &BTreeMap::new()), [], "no such device, or a kernel that does not tell");
    }

    #[test]
    fn active_features_are_found_whatever_else_is_listed_and_damage_does_no_harm() {
        let bits = |names: &[&str]| -> Vec<u8> {
            names.iter().flat_map(|it| nested(uapi::BITSET_BITS_BIT, &name(uapi::BIT_NAME, it))).collect()
        };
        let message = |names: &[&str]| {
            let mut message = nested(uapi::FEATURES_WANTED, &nested(uapi::BITSET_BITS, &bits(&FEATURES)));
            message.extend(nested(uapi::FEATURES_ACTIVE, &nested(uapi::BITSET_BITS, &bits(names))));
            message
        };
        assert_eq!(has_offload(&message(&["tx-scatter-gather", "tx-checksum-ip-generic"])), Some(true));
        assert_eq!(has_offload(&message(&["tx-scatter-gather", "tx-checksum-ip-generic-not"])), Some(false));
        assert_eq!(has_offload(&message(&[])), Some(false));
        assert_eq!(has_offload(&[]), None);
        let whole = message(&["tx-udp-segmentation"]);
        assert_eq!(has_offload(&whole), Some(true));
        for length in 0..whole.len() {
            has_offload(&whole[..length]);
        }
    }
}
