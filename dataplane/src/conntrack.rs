//! Connections that a change of port mappings leaves behind.
//!
//! The kernel translates the packets of a connection as it did the first one, whatever the rules say by now. For UDP, a
//! connection is whatever goes between two ports without a long pause: a client that sends on and on would send to a pod that
//! is gone, or to another one that got its address; and one that began before its port was mapped would never reach the pod.
//! So entries that contradict the mappings are deleted, and the next packet is translated anew.
//!
//! Messages of nfnetlink's subsystem for connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::collections::BTreeSet;
use std::net::IpAddr;

use husk_overlay::kernel::{Addressee, Map, MapValue};
use husk_overlay::port_mapping::TransportProtocol;
use husk_overlay::prefix::Family;
use nix::errno::Errno;

use crate::error::Error;
use crate::netfilter::{Attributes, Message};
use crate::netlink::{Protocol, Request, Socket};
use crate::nft::NftChange;
use crate::underlay;

/// `NFNL_SUBSYS_CTNETLINK << 8`, to which `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` are added.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;

const CTA_FILTER_ORIG_FLAGS: u16 = 1;

/// `CTA_FILTER_F_CTA_PROTO_NUM | CTA_FILTER_F_CTA_PROTO_DST_PORT` (net/netfilter/nf_internals.h): what of the original tuple
/// has to be equal. Kernels before 5.8 know no filter and list everything.
const FILTER_PROTOCOL_AND_PORT: u32 = 1 << 3 | 1 << 5;

/// Addressees that are asked for one by one; for more, the whole table is listed once.
const FEW: usize = 8;

/// A change of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moved {
    family: Family,
    addressee: Addressee,
    /// Who had it; none for a mapping that is new.
    from: Option<IpAddr>,
}

/// Deletes the connections that contradict port mappings after these changes, in the calling thread's network namespace.
/// Returns how many there were.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel does not tell about connections, and the errors of a broken netlink exchange.
pub fn forget(changes: &[NftChange]) -> Result<usize, Error> {
    let moved = moved(changes);
    if moved.is_empty() {
        return Ok(0);
    }
    let local = if moved.iter().any(|it| it.from.is_none()) { local_addresses()? } else { BTreeSet::new() };
    let mut socket = Socket::open(Protocol::Netfilter).map_err(explained)?;
    let mut stale = Vec::new();
    for family in Family::ALL {
        let moved: Vec<&Moved> = moved.iter().filter(|it| it.family == family).collect();
        for question in questions(family, &moved) {
            let request = Request { operation: "list", object: object(), flags: 0, message: question };
            for answer in socket.dump_shared(request).map_err(explained)? {
                let Some(connection) = Connection::read(&answer.attributes) else { continue };
                if moved.iter().any(|it| connection.contradicts(it, &local)) {
                    stale.push(connection.delete(family));
                }
            }
        }
    }
    let count = stale.len();
    let requests =
        stale.into_iter().map(|message| Request { operation: "delete", object: object(), flags: 0, message });
    for result in socket.batch(requests.collect()) {
        match result {
            // It has ended by itself.
            Err(error) if error.errno() == Some(Errno::ENOENT) => {}
            other => other?,
        }
    }
    Ok(count)
}

fn object() -> String {
    "connections to mapped ports".to_owned()
}

fn explained(error: Error) -> Error {
    match error.errno() {
        Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Error::Unsupported {
            operation: "list",
            object: object(),
            reason: "the kernel does not tell about connections".to_owned(),
            remedy: "load the module nf_conntrack_netlink, or use a kernel built with it",
        },
        _ => error,
    }
}

/// The mappings that came, went, or lead elsewhere. Those of a map that is made anew count as new: while it was missing,
/// connections have begun without it.
fn moved(changes: &[NftChange]) -> BTreeSet<Moved> {
    let mut moved = BTreeSet::new();
    let mut add = |elements: &mut dyn Iterator<Item = (&Addressee, &MapValue)>, went: bool| {
        for (addressee, value) in elements {
            // Which family a port belongs to, and whose it is, the map of addresses tells.
            let MapValue::Address(address) = value else { continue };
            let from = went.then_some(*address);
            moved.insert(Moved { family: Family::of(*address), addressee: *addressee, from });
        }
    };
    let all = |map: &Map| map.elements.clone();
    for change in changes {
        match change {
            NftChange::CreateTable { table } | NftChange::ReplaceTable { table, .. } => {
                table.maps.values().for_each(|map| add(&mut all(map).iter(), false));
            }
            NftChange::AddMap { map, .. } | NftChange::ReplaceMap { map, .. } => add(&mut all(map).iter(), false),
            NftChange::AddMappings { elements, .. } => add(&mut elements.iter(), false),
            NftChange::DeleteMappings { elements, .. } => add(&mut elements.iter(), true),
            _ => {}
        }
    }
    moved
}

/// Addresses of this host, loopback addresses apart.
fn local_addresses() -> Result<BTreeSet<IpAddr>, Error> {
    let addresses = underlay::addresses(&mut Socket::open(Protocol::Route)?)?;
    Ok(addresses.into_iter().map(|it| it.address).collect())
}

/// `AF_INET` and `AF_INET6`.
fn number_of(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

/// Dumps that list all connections concerned, and perhaps others.
fn questions(family: Family, moved: &[&Moved]) -> Vec<Message> {
    let keys: BTreeSet<(TransportProtocol, u16)> =
        moved.iter().map(|it| (it.addressee.protocol, it.addressee.port)).collect();
    if keys.len() > FEW {
        return vec![Message::new(GET, number_of(family))];
    }
    let question = |(protocol, port): (TransportProtocol, u16)| {
        let transport = Attributes::default()
            .with(CTA_PROTO_NUM, &[protocol.number()])
            .with(CTA_PROTO_DST_PORT, &port.to_be_bytes());
        let flags = Attributes::default().with(CTA_FILTER_ORIG_FLAGS, &FILTER_PROTOCOL_AND_PORT.to_ne_bytes());
        Message::new(GET, number_of(family))
            .nest(CTA_TUPLE_ORIG, &Attributes::default().nest(CTA_TUPLE_PROTO, &transport))
            .nest(CTA_FILTER, &flags)
    };
    keys.into_iter().map(question).collect()
}

/// A connection, as far as it matters whom its packets are for.
#[derive(Debug)]
struct Connection {
    protocol: u8,
    /// Whom the client addresses.
    destination: IpAddr,
    port: u16,
    /// Who answers.
    answers: IpAddr,
    /// What names it to the kernel.
    tuple: Attributes,
    id: Option<Vec<u8>>,
    zone: Option<Vec<u8>>,
}

impl Connection {
    fn read(attributes: &Attributes) -> Option<Self> {
        let (tuple, reply) = (attributes.nested(CTA_TUPLE_ORIG)?, attributes.nested(CTA_TUPLE_REPLY)?);
        let transport = tuple.nested(CTA_TUPLE_PROTO)?;
        Some(Self {
            protocol: *transport.get(CTA_PROTO_NUM)?.first()?,
            destination: address(&tuple.nested(CTA_TUPLE_IP)?, [CTA_IP_V4_DST, CTA_IP_V6_DST])?,
            port: u16::from_be_bytes(transport.get(CTA_PROTO_DST_PORT)?.try_into().ok()?),
            answers: address(&reply.nested(CTA_TUPLE_IP)?, [CTA_IP_V4_SRC, CTA_IP_V6_SRC])?,
            id: attributes.get(CTA_ID).map(<[u8]>::to_vec),
            zone: attributes.get(CTA_ZONE).map(<[u8]>::to_vec),
            tuple,
        })
    }

    /// True if the packets of this connection go elsewhere than the mappings say after the change.
    fn contradicts(&self, moved: &Moved, local: &BTreeSet<IpAddr>) -> bool {
        let Addressee { address, protocol, port } = moved.addressee;
        let concerned = (self.protocol, self.port) == (protocol.number(), port)
            && address.is_none_or(|address| address == self.destination);
        let translated = self.answers != self.destination;
        concerned
            && match moved.from {
                // It leads to whom it does not belong to any more.
                Some(holder) => translated && self.answers == holder,
                // It began before the mapping was there. Only UDP has connections that nobody closes; TCP and SCTP go on
                // with the server they were made with.
                None => {
                    let ours = self.destination.is_loopback() || local.contains(&self.destination);
                    protocol == TransportProtocol::Udp && !translated && ours
                }
            }
    }

    fn delete(self, family: Family) -> Message {
        let mut message = Message::new(DELETE, number_of(family)).nest(CTA_TUPLE_ORIG, &self.tuple);
        for (kind, value) in [(CTA_ID, self.id), (CTA_ZONE, self.zone)] {
            if let Some(value) = value {
                message = message.with(kind, &value);
            }
        }
        message
    }
}

fn address(attributes: &Attributes, [v4, v6]: [u16; 2]) -> Option<IpAddr> {
    if let Some(bytes) = attributes.get(v4) {
        return Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?));
    }
    Some(IpAddr::from(<[u8; 16]>::try_from(attributes.get(v6)?).ok()?))
}

#[cfg(test)]
#[path = "conntrack_tests.rs"]
mod tests;
