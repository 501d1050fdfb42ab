//! Static forwarding entries of VXLAN devices: inner Ethernet address to node address.
//!
//! They are neighbour messages of family `AF_BRIDGE` with `NTF_SELF`, which addresses the device itself rather than a bridge
//! it might be a port of (drivers/net/vxlan/vxlan_core.c `vxlan_fdb_add`). The kernel holds one destination per unicast
//! address and a list for the all-zero and multicast addresses, which mean flooding; Husk floods nothing by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use husk_overlay::kernel::FdbKey;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::Serialize;

use crate::error::Error;
use crate::interfaces::Interfaces;
use crate::neighbours::link_layer_address;
use crate::netlink::{Request, Socket};
use crate::step::Step;
use crate::sweep::Sweep;

/// Destinations by entry, as the kernel has them.
pub type ActualFdb = BTreeMap<FdbKey, BTreeSet<IpAddr>>;

/// A change to a forwarding entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FdbChange {
    /// Add it, or send it elsewhere.
    Set {
        /// Entry.
        key: FdbKey,
        /// Node address that frames go to.
        destination: IpAddr,
    },
    /// Remove it.
    Remove {
        /// Entry.
        key: FdbKey,
        /// Node address that frames went to.
        destination: IpAddr,
    },
}

impl FdbChange {
    /// The entry it is about.
    #[must_use]
    pub fn key(&self) -> &FdbKey {
        match self {
            Self::Set { key, .. } | Self::Remove { key, .. } => key,
        }
    }

    fn destination(&self) -> IpAddr {
        match self {
            Self::Set { destination, .. } | Self::Remove { destination, .. } => *destination,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Set { .. } => "set forwarding entry",
            Self::Remove { .. } => "remove forwarding entry",
        }
    }

    fn object(&self) -> String {
        let FdbKey { interface, mac } = self.key();
        format!("{mac} dst {} dev {interface}", self.destination())
    }
}

impl fmt::Display for FdbChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation(), self.object())
    }
}

/// What has to change for the forwarding entries to be as desired.
#[must_use]
pub fn diff(desired: &BTreeMap<FdbKey, IpAddr>, actual: &ActualFdb, sweep: Sweep) -> Vec<FdbChange> {
    let set = desired
        .iter()
        .filter(|(key, destination)| !actual.get(key).is_some_and(|all| all.contains(*destination)))
        .map(|(key, destination)| FdbChange::Set { key: key.clone(), destination: *destination });
    let found = actual.iter().flat_map(|(key, all)| all.iter().map(move |destination| (key, *destination)));
    let swept = found.filter(|(key, destination)| {
        let surplus = match desired.get(key) {
            // Setting a unicast entry replaces its destination; only flooding entries keep what was there before.
            Some(wanted) => wanted != destination && !key.mac.is_unicast(),
            None => true,
        };
        sweep == Sweep::Allowed && surplus
    });
    set.chain(swept.map(|(key, destination)| FdbChange::Remove { key: key.clone(), destination })).collect()
}

/// Permanent entries on tunnel devices.
pub(crate) fn read(socket: &mut Socket, interfaces: &Interfaces) -> Result<ActualFdb, Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    let request = Request {
        operation: "read",
        object: "forwarding entries".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetNeighbour(message),
    };
    let mut all = ActualFdb::new();
    for message in socket.dump_shared(request)? {
        let RouteNetlinkMessage::NewNeighbour(entry) = message else { continue };
        let permanent = u16::from(entry.header.state) & u16::from(NeighbourState::Permanent) != 0;
        let Some(interface) = interfaces.tunnel(entry.header.ifindex).filter(|_| permanent) else { continue };
        let (Some(mac), Some(destination)) = (link_layer_address(&entry), destination_of(&entry)) else { continue };
        all.entry(FdbKey { interface: interface.clone(), mac }).or_default().insert(destination);
    }
    Ok(all)
}

fn destination_of(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        // The decoder goes by the message's family, which is AF_BRIDGE: the address comes as plain bytes.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => <[u8; 4]>::try_from(bytes.as_slice())
            .map(IpAddr::from)
            .or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
            .ok(),
        _ => None,
    })
}

/// The requests that make a change.
pub(crate) fn steps(change: &FdbChange, interfaces: &Interfaces) -> Result<Vec<Step>, Error> {
    let (operation, object) = (change.operation(), change.object());
    let FdbKey { interface, mac } = change.key();
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        NeighbourAttribute::Destination(change.destination().into()),
    ];
    Ok(match change {
        FdbChange::Set { .. } => {
            message.header.ifindex = interfaces.index(interface, operation, &object)?;
            let how = if mac.is_unicast() { NLM_F_REPLACE } else { NLM_F_APPEND };
            let message = RouteNetlinkMessage::NewNeighbour(message);
            vec![Step::strict(operation, object, NLM_F_CREATE | how, message)]
        }
        FdbChange::Remove { .. } => match interfaces.find(interface) {
            Some(index) => {
                message.header.ifindex = index;
                vec![Step::removal(operation, object, RouteNetlinkMessage::DelNeighbour(message))]
            }
            None => Vec::new(),
        },
    })
}
