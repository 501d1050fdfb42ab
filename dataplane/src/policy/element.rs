//! Sets and their elements in the form of the kernel.
//!
//! An interval of addresses is two elements: one that begins it and one that ends it, which is the first address behind it; an
//! interval that reaches the last address of its family has no end. An interval of a concatenation is one element with two keys,
//! both of which belong to it.

use std::net::IpAddr;

use husk_overlay::kernel::policy::{PolicyElement, PolicyKey, PolicySet, PolicyValue, PolicyValueKind};
use husk_overlay::prefix::Family;

use super::rule::verdict;
use super::uapi::*;
use crate::netfilter::Attributes;

/// What makes up the type of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// `NFT_SET_*`.
    pub(super) flags: u32,
    /// Type of its keys, as `nft` numbers them.
    pub(super) key_type: u32,
    /// Octets of a key.
    pub(super) key_length: u32,
    /// Type of its values, none for a set.
    pub(super) data_type: Option<u32>,
}

impl Form {
    pub(super) fn of(key: PolicyKey, value: PolicyValueKind) -> Self {
        let (flags, key_type, key_length) = match key {
            PolicyKey::Address(family) => (0, address_type(family), octets(family)),
            PolicyKey::AddressRange(family) => (NFT_SET_INTERVAL, address_type(family), octets(family)),
            PolicyKey::AddressPair(family) => {
                let one = address_type(family);
                (0, one << TYPE_BITS | one, 2 * octets(family))
            }
            PolicyKey::ClassAndService => {
                let types = (TYPE_MARK << TYPE_BITS | TYPE_INET_PROTOCOL) << TYPE_BITS | TYPE_INET_SERVICE;
                (NFT_SET_INTERVAL | NFT_SET_CONCAT, types, 12)
            }
        };
        let data_type = match value {
            PolicyValueKind::None => None,
            PolicyValueKind::Class => Some(TYPE_MARK),
            PolicyValueKind::Verdict => Some(NFT_DATA_VERDICT),
        };
        let flags = if data_type.is_some() { flags | NFT_SET_MAP } else { flags };
        Self { flags, key_type, key_length, data_type }
    }

    /// What Husk makes of this type; none for a type that it never gives a set.
    pub(super) fn kind(self) -> Option<(PolicyKey, PolicyValueKind)> {
        let of_family =
            |family| [PolicyKey::Address(family), PolicyKey::AddressRange(family), PolicyKey::AddressPair(family)];
        let keys = Family::ALL.into_iter().flat_map(of_family).chain([PolicyKey::ClassAndService]);
        let values = [PolicyValueKind::None, PolicyValueKind::Class, PolicyValueKind::Verdict];
        keys.flat_map(|key| values.map(|value| (key, value))).find(|(key, value)| Self::of(*key, *value) == self)
    }
}

fn address_type(family: Family) -> u32 {
    match family {
        Family::Ipv4 => TYPE_IPADDR,
        Family::Ipv6 => TYPE_IP6ADDR,
    }
}

fn octets(family: Family) -> u32 {
    u32::from(family.bits()) / 8
}

/// An element as the kernel has it, once or twice. None if it is none of a set of that type.
pub(super) fn encode(set: &PolicySet, element: &PolicyElement, value: &PolicyValue) -> Option<Vec<Attributes>> {
    let (first, second) = keys(set.key, element)?;
    let mut begin = Attributes::default().nest(NFTA_SET_ELEM_KEY, &of_value(&first));
    if let (PolicyKey::ClassAndService, Some(end)) = (set.key, &second) {
        begin = begin.nest(NFTA_SET_ELEM_KEY_END, &of_value(end));
    }
    begin = match (set.value, value) {
        (PolicyValueKind::None, PolicyValue::None) => begin,
        (PolicyValueKind::Class, PolicyValue::Class(class)) => {
            begin.nest(NFTA_SET_ELEM_DATA, &of_value(&class.to_ne_bytes()))
        }
        (PolicyValueKind::Verdict, PolicyValue::Verdict(it)) => begin.nest(NFTA_SET_ELEM_DATA, &verdict(it)),
        _ => return None,
    };
    let mut all = vec![begin];
    if let (PolicyKey::AddressRange(_), Some(end)) = (set.key, &second) {
        all.push(interval_end(end));
    }
    Some(all)
}

/// The element that ends an interval of addresses.
fn interval_end(key: &[u8]) -> Attributes {
    Attributes::default()
        .with(NFTA_SET_ELEM_FLAGS, &NFT_SET_ELEM_INTERVAL_END.to_be_bytes())
        .nest(NFTA_SET_ELEM_KEY, &of_value(key))
}

pub(super) fn of_value(bytes: &[u8]) -> Attributes {
    Attributes::default().with(NFTA_DATA_VALUE, bytes)
}

/// The first key and, where an element has two, the second.
pub(super) fn keys(key: PolicyKey, element: &PolicyElement) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    match (key, *element) {
        (PolicyKey::Address(family), PolicyElement::Address(address)) => Some((bytes(family, address)?, None)),
        (PolicyKey::AddressRange(family), PolicyElement::AddressRange(first, last)) if first <= last => {
            let begin = bytes(family, first)?;
            bytes(family, last)?;
            Some((begin, next(last).and_then(|end| bytes(family, end))))
        }
        (PolicyKey::AddressPair(family), PolicyElement::AddressPair(one, other)) => {
            Some(([bytes(family, one)?, bytes(family, other)?].concat(), None))
        }
        (PolicyKey::ClassAndService, PolicyElement::ClassAndService { class, protocols, ports })
            if protocols.0 <= protocols.1 && ports.0 <= ports.1 =>
        {
            let end = class_and_service(class, protocols.1, ports.1);
            Some((class_and_service(class, protocols.0, ports.0), Some(end)))
        }
        _ => None,
    }
}

/// Fields of a concatenation begin at multiples of four octets.
fn class_and_service(class: u32, protocol: u8, port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    [class.to_ne_bytes(), [protocol, 0, 0, 0], [high, low, 0, 0]].concat()
}

pub(super) fn bytes(family: Family, address: IpAddr) -> Option<Vec<u8>> {
    match (family, address) {
        (Family::Ipv4, IpAddr::V4(address)) => Some(address.octets().to_vec()),
        (Family::Ipv6, IpAddr::V6(address)) => Some(address.octets().to_vec()),
        _ => None,
    }
}

/// An address as a number.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// The address of a family with a number, the last one for a number beyond.
pub(super) fn numbered(family: Family, number: u128) -> IpAddr {
    match family {
        Family::Ipv4 => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        Family::Ipv6 => IpAddr::V6(number.into()),
    }
}

/// The last address of a family.
pub(super) fn last(family: Family) -> IpAddr {
    numbered(family, u128::MAX)
}

/// The address behind another; none behind the last one of its family.
fn next(address: IpAddr) -> Option<IpAddr> {
    let family = Family::of(address);
    (address != last(family)).then(|| numbered(family, number(address) + 1))
}

/// The address before another; none before the first one of its family.
pub(super) fn previous(address: IpAddr) -> Option<IpAddr> {
    number(address).checked_sub(1).map(|number| numbered(Family::of(address), number))
}
