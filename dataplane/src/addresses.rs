//! Addresses on tunnel devices.
//!
//! They are added without duplicate address detection (nobody else can have them: blocks are locked) and without a prefix
//! route (routes are a table of their own).

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use husk_overlay::kernel::Address;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::Serialize;

use crate::error::Error;
use crate::interfaces::Interfaces;
use crate::netlink::{Request, Socket};
use crate::step::Step;
use crate::sweep::Sweep;

/// A change to an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum AddressChange {
    /// Add it.
    Add(Address),
    /// Remove it.
    Remove(Address),
}

impl AddressChange {
    /// The address it is about.
    #[must_use]
    pub fn address(&self) -> &Address {
        match self {
            Self::Add(address) | Self::Remove(address) => address,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Add(_) => "add address",
            Self::Remove(_) => "remove address",
        }
    }
}

impl fmt::Display for AddressChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation(), object(self.address()))
    }
}

fn object(Address { interface, address, length }: &Address) -> String {
    format!("{address}/{length} dev {interface}")
}

/// What has to change for the addresses to be as desired.
#[must_use]
pub fn diff(desired: &BTreeSet<Address>, actual: &BTreeSet<Address>, sweep: Sweep) -> Vec<AddressChange> {
    let added = desired.difference(actual).cloned().map(AddressChange::Add);
    let swept = actual.difference(desired).filter(|_| sweep == Sweep::Allowed).cloned();
    added.chain(swept.map(AddressChange::Remove)).collect()
}

/// Addresses on tunnel devices.
pub(crate) fn read(socket: &mut Socket, interfaces: &Interfaces) -> Result<BTreeSet<Address>, Error> {
    let messages = dump(socket)?;
    let ours = messages.iter().filter_map(|message| {
        let interface = interfaces.tunnel(message.header.index)?.clone();
        Some(Address { interface, address: local_address(message)?, length: message.header.prefix_len })
    });
    Ok(ours.collect())
}

/// All addresses of the namespace.
pub(crate) fn dump(socket: &mut Socket) -> Result<Vec<AddressMessage>, Error> {
    let request = Request {
        operation: "read",
        object: "addresses".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetAddress(AddressMessage::default()),
    };
    let messages = socket.dump_shared(request)?.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(address) => Some(address),
        _ => None,
    });
    Ok(messages.collect())
}

/// The address itself: `IFA_LOCAL` where there is one, since `IFA_ADDRESS` is the peer's on a point-to-point address
/// (include/uapi/linux/if_addr.h).
pub(crate) fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// The requests that make a change.
pub(crate) fn steps(change: &AddressChange, interfaces: &Interfaces) -> Result<Vec<Step>, Error> {
    let operation = change.operation();
    let object = object(change.address());
    let interface = &change.address().interface;
    Ok(match change {
        AddressChange::Add(address) => {
            let mut message = message(address, interfaces.index(interface, operation, &object)?);
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
            let message = RouteNetlinkMessage::NewAddress(message);
            vec![Step::strict(operation, object, NLM_F_CREATE | NLM_F_REPLACE, message)]
        }
        AddressChange::Remove(address) => match interfaces.find(interface) {
            Some(index) => {
                vec![Step::removal(operation, object, RouteNetlinkMessage::DelAddress(message(address, index)))]
            }
            None => Vec::new(),
        },
    })
}

fn message(Address { address, length, .. }: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = *length;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(*address), AddressAttribute::Address(*address)];
    message
}
