//! Permanent neighbour entries on tunnel and pod interfaces.
//!
//! Only permanent entries are ours; what the kernel learns by itself comes and goes, and turns permanent when it is desired.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use husk_overlay::kernel::NeighbourKey;
use husk_overlay::mac::MacAddress;
use husk_overlay::marks;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::Serialize;

use crate::error::Error;
use crate::interfaces::Interfaces;
use crate::netlink::{Request, Socket};
use crate::step::Step;
use crate::sweep::Sweep;

/// A change to a neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum NeighbourChange {
    /// Add it, or give it another Ethernet address.
    Set {
        /// Entry.
        key: NeighbourKey,
        /// Its Ethernet address.
        mac: MacAddress,
    },
    /// Remove it.
    Remove {
        /// Entry.
        key: NeighbourKey,
    },
}

impl NeighbourChange {
    /// The entry it is about.
    #[must_use]
    pub fn key(&self) -> &NeighbourKey {
        match self {
            Self::Set { key, .. } | Self::Remove { key } => key,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Set { .. } => "set neighbour",
            Self::Remove { .. } => "remove neighbour",
        }
    }

    fn object(&self) -> String {
        let NeighbourKey { interface, address } = self.key();
        match self {
            Self::Set { mac, .. } => format!("{address} lladdr {mac} dev {interface}"),
            Self::Remove { .. } => format!("{address} dev {interface}"),
        }
    }
}

impl fmt::Display for NeighbourChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation(), self.object())
    }
}

/// What has to change for the neighbour entries to be as desired.
#[must_use]
pub fn diff(
    desired: &BTreeMap<NeighbourKey, MacAddress>,
    actual: &BTreeMap<NeighbourKey, MacAddress>,
    sweep: Sweep,
) -> Vec<NeighbourChange> {
    let set = desired
        .iter()
        .filter(|(key, mac)| actual.get(key) != Some(mac))
        .map(|(key, mac)| NeighbourChange::Set { key: key.clone(), mac: *mac });
    let swept = actual.keys().filter(|key| sweep == Sweep::Allowed && !desired.contains_key(key));
    set.chain(swept.map(|key| NeighbourChange::Remove { key: key.clone() })).collect()
}

/// Permanent entries on interfaces of ours.
pub(crate) fn read(socket: &mut Socket, interfaces: &Interfaces) -> Result<BTreeMap<NeighbourKey, MacAddress>, Error> {
    let request = Request {
        operation: "read",
        object: "neighbours".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
    };
    let entries = socket.dump_shared(request)?.into_iter().filter_map(|message| {
        let RouteNetlinkMessage::NewNeighbour(entry) = message else { return None };
        let interface = interfaces.own(entry.header.ifindex)?.clone();
        let proxy = entry.header.flags.contains(NeighbourFlags::Proxy);
        if entry.header.state != NeighbourState::Permanent || proxy {
            return None;
        }
        let address = destination(&entry)?;
        // An entry without an Ethernet address differs from every desired one.
        let mac = link_layer_address(&entry).unwrap_or(MacAddress([0; 6]));
        Some((NeighbourKey { interface, address }, mac))
    });
    Ok(entries.collect())
}

/// Addresses for which nobody answered when the kernel asked on the link who has them.
///
/// # Errors
/// Those of a dump.
pub fn failed(socket: &mut Socket) -> Result<BTreeSet<IpAddr>, Error> {
    let request = Request {
        operation: "read",
        object: "neighbours".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
    };
    let failed = |state| matches!(state, NeighbourState::Failed | NeighbourState::Incomplete);
    let entries = socket.dump_shared(request)?.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewNeighbour(entry) if failed(entry.header.state) => destination(&entry),
        _ => None,
    });
    Ok(entries.collect())
}

fn destination(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })
}

/// The Ethernet address in a neighbour or forwarding entry.
pub(crate) fn link_layer_address(entry: &NeighbourMessage) -> Option<MacAddress> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress),
        _ => None,
    })
}

/// The requests that make a change.
pub(crate) fn steps(change: &NeighbourChange, interfaces: &Interfaces) -> Result<Vec<Step>, Error> {
    let (operation, object) = (change.operation(), change.object());
    let NeighbourKey { interface, address } = change.key();
    let mut message = NeighbourMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.attributes.push(NeighbourAttribute::Destination((*address).into()));
    Ok(match change {
        NeighbourChange::Set { mac, .. } => {
            message.header.ifindex = interfaces.index(interface, operation, &object)?;
            message.header.state = NeighbourState::Permanent;
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
            message.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(marks::ROUTE_PROTOCOL)));
            let message = RouteNetlinkMessage::NewNeighbour(message);
            vec![Step::strict(operation, object, NLM_F_CREATE | NLM_F_REPLACE, message)]
        }
        NeighbourChange::Remove { .. } => match interfaces.find(interface) {
            Some(index) => {
                message.header.ifindex = index;
                vec![Step::removal(operation, object, RouteNetlinkMessage::DelNeighbour(message))]
            }
            None => Vec::new(),
        },
    })
}
