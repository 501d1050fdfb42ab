//! Connections that a change of port mappings leaves behind.
//!
//! The kernel translates the packets of a connection as it did the first one, whatever the rules say by now. For UDP, a
//! connection is whatever goes between two ports without a long pause: a client that sends on and on would send to a pod that
//! is gone, or to another one that got its address; and one that began before its port was mapped would never reach the pod.
//! So entries that contradict the mappings are deleted, and the next packet is translated anew.
//!
//! The change of the mappings and the end of their connections are two steps, between which this process may be killed, and
//! the second may fail. So [`Connections`] remembers what it has not done yet; and since a new daemon remembers nothing, its
//! first look is at the whole table, and judges by the mappings that are in the kernel by then. Others translate to pods too,
//! kube-proxy for one, and what they translated is not touched: the whole look takes a connection for one of ours only if it
//! leads from an address of this host to one of its pods' addresses, and
//!
//! - its port is mapped, to another pod; or
//! - its port is not mapped, and there is no pod of that address any more.
//!
//! What a mapping left behind that is gone while its pod lives cannot be told from another's; but mappings live as long as
//! their pods.
//!
//! Messages of nfnetlink's subsystem for connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use husk_overlay::kernel::{Addressee, Desired, Map, MapValue, RouteTarget};
use husk_overlay::marks;
use husk_overlay::port_mapping::TransportProtocol;
use husk_overlay::prefix::{Family, Prefix};
use nix::errno::Errno;

use crate::error::Error;
use crate::netfilter::{Attributes, Message};
use crate::netlink::{Protocol, Request, Socket};
use crate::nft::{NftChange, NftState};
use crate::underlay;

/// `NFNL_SUBSYS_CTNETLINK << 8`, to which `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` are added.
pub(crate) const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;

pub(crate) const CTA_TUPLE_ORIG: u16 = 1;
pub(crate) const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

pub(crate) const CTA_TUPLE_IP: u16 = 1;
pub(crate) const CTA_TUPLE_PROTO: u16 = 2;

pub(crate) const CTA_IP_V4_SRC: u16 = 1;
pub(crate) const CTA_IP_V4_DST: u16 = 2;
pub(crate) const CTA_IP_V6_SRC: u16 = 3;
pub(crate) const CTA_IP_V6_DST: u16 = 4;

pub(crate) const CTA_PROTO_NUM: u16 = 1;
pub(crate) const CTA_PROTO_DST_PORT: u16 = 3;

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

/// The port mappings in the kernel, and the pods that there are.
#[derive(Debug, Clone, Default)]
pub struct Mappings {
    holders: BTreeMap<(Family, Addressee), IpAddr>,
    /// Where addresses of this node's pods lie.
    blocks: BTreeSet<Prefix>,
    /// Addresses of pods that live.
    pods: BTreeSet<IpAddr>,
}

impl Mappings {
    /// What the table holds; which pods there are, and whose addresses are pods', the plan tells.
    #[must_use]
    pub fn of(table: Option<&NftState>, desired: &Desired) -> Self {
        let elements = table.into_iter().flat_map(|table| table.maps.values()).flat_map(|map| &map.elements);
        let holders = elements.filter_map(|(addressee, value)| match value {
            MapValue::Address(address) => Some(((Family::of(*address), *addressee), *address)),
            MapValue::Port(_) => None,
        });
        let is_pod = |target: &RouteTarget| matches!(target, RouteTarget::Interface { interface, .. } if marks::is_pod_interface(interface.as_str()));
        let routes = desired.routes.iter().filter(|(_, route)| is_pod(&route.target));
        Self {
            holders: holders.collect(),
            blocks: desired.own_blocks.clone(),
            pods: routes.map(|(key, _)| key.destination.address()).collect(),
        }
    }

    /// Who has the port that a connection is addressed to. A mapping of one address goes before one of all.
    fn holder(&self, family: Family, connection: &Connection) -> Option<IpAddr> {
        let protocol = TransportProtocol::ALL.into_iter().find(|it| it.number() == connection.protocol)?;
        let of = |address| Addressee { address, protocol, port: connection.port };
        [Some(connection.destination), None].iter().find_map(|it| self.holders.get(&(family, of(*it)))).copied()
    }
}

/// Connections that may contradict the port mappings.
#[derive(Debug)]
pub struct Connections {
    /// Nothing is known of what was before this process.
    unknown: bool,
    moved: BTreeSet<Moved>,
}

impl Default for Connections {
    fn default() -> Self {
        Self { unknown: true, moved: BTreeSet::new() }
    }
}

impl Connections {
    /// True until a look at the whole table has succeeded.
    #[must_use]
    pub fn are_unknown(&self) -> bool {
        self.unknown
    }

    /// Takes note of changes that were made in the kernel.
    pub fn note(&mut self, changes: &[NftChange]) {
        // What is mapped as before must not lose its connections to a clean-up that comes late.
        for (family, addressee, holder) in elements(changes, Direction::Came) {
            self.moved.remove(&Moved { family, addressee, from: Some(holder) });
            self.moved.insert(Moved { family, addressee, from: None });
        }
        for (family, addressee, holder) in elements(changes, Direction::Went) {
            self.moved.insert(Moved { family, addressee, from: Some(holder) });
        }
    }

    /// Deletes the connections that contradict the port mappings, in the calling thread's network namespace, and returns how
    /// many there were. With `mappings` it looks at the whole table, else only for what was noted. What it could not do is
    /// tried again the next time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel does not tell about connections though there are mappings, and the errors of a
    /// broken netlink exchange.
    pub fn settle(&mut self, mappings: Option<&Mappings>) -> Result<usize, Error> {
        if self.moved.is_empty() && mappings.is_none() {
            return Ok(0);
        }
        let count = match forget(&self.moved, mappings) {
            // Where nothing is mapped, nobody needs to know.
            Err(Error::Unsupported { .. })
                if self.moved.is_empty() && mappings.is_some_and(|it| it.holders.is_empty()) =>
            {
                0
            }
            other => other?,
        };
        self.moved.clear();
        self.unknown &= mappings.is_none();
        Ok(count)
    }
}

fn forget(moved: &BTreeSet<Moved>, mappings: Option<&Mappings>) -> Result<usize, Error> {
    let local = if mappings.is_some() || moved.iter().any(|it| it.from.is_none()) {
        local_addresses()?
    } else {
        BTreeSet::new()
    };
    let mut socket = Socket::open(Protocol::Netfilter).map_err(explained)?;
    let mut stale = Vec::new();
    for family in Family::ALL {
        let moved: Vec<&Moved> = moved.iter().filter(|it| it.family == family).collect();
        let questions = match mappings {
            Some(_) => vec![Message::new(GET, number_of(family))],
            None => questions(family, &moved),
        };
        for question in questions {
            let request = Request { operation: "list", object: object(), flags: 0, message: question };
            for answer in socket.dump_shared(request).map_err(explained)? {
                let Some(connection) = Connection::read(&answer.attributes) else { continue };
                if moved.iter().any(|it| connection.contradicts(it, &local))
                    || mappings.is_some_and(|mappings| connection.is_stale(family, mappings, &local))
                {
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Came,
    Went,
}

/// The mappings that came or went, with their holders. Those of a map that is made anew count as new: while it was missing,
/// connections have begun without it.
fn elements(changes: &[NftChange], direction: Direction) -> Vec<(Family, Addressee, IpAddr)> {
    let of = |change: &NftChange| -> Vec<(Addressee, MapValue)> {
        let all = |map: &Map| map.elements.clone();
        let elements: Vec<BTreeMap<Addressee, MapValue>> = match (change, direction) {
            (NftChange::CreateTable { table } | NftChange::ReplaceTable { table, .. }, Direction::Came) => {
                table.maps.values().map(all).collect()
            }
            (NftChange::AddMap { map, .. } | NftChange::ReplaceMap { map, .. }, Direction::Came) => vec![all(map)],
            (NftChange::AddMappings { elements, .. }, Direction::Came)
            | (NftChange::DeleteMappings { elements, .. }, Direction::Went) => vec![elements.clone()],
            _ => Vec::new(),
        };
        elements.into_iter().flatten().collect()
    };
    // Which family a port belongs to, and whose it is, the map of addresses tells.
    let holder = |(addressee, value): (Addressee, MapValue)| match value {
        MapValue::Address(address) => Some((Family::of(address), addressee, address)),
        MapValue::Port(_) => None,
    };
    changes.iter().flat_map(of).filter_map(holder).collect()
}

/// Addresses of this host, loopback addresses apart.
fn local_addresses() -> Result<BTreeSet<IpAddr>, Error> {
    let addresses = underlay::addresses(&mut Socket::open(Protocol::Route)?)?;
    Ok(addresses.into_iter().map(|it| it.address).collect())
}

/// `AF_INET` and `AF_INET6`.
pub(crate) fn number_of(family: Family) -> u8 {
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
        concerned
            && match moved.from {
                // It leads to whom it does not belong to any more.
                Some(holder) => self.is_translated() && self.answers == holder,
                None => self.began_without_mapping(local),
            }
    }

    /// True if the packets of this connection go elsewhere than the mappings say, and no mapping but Husk's can have sent them
    /// there.
    fn is_stale(&self, family: Family, mappings: &Mappings, local: &BTreeSet<IpAddr>) -> bool {
        let leads_to_pod = self.is_translated()
            && self.is_for_host(local)
            && mappings.blocks.iter().any(|block| block.contains(self.answers));
        match mappings.holder(family, self) {
            Some(holder) => leads_to_pod && self.answers != holder || self.began_without_mapping(local),
            None => leads_to_pod && !mappings.pods.contains(&self.answers),
        }
    }

    fn is_translated(&self) -> bool {
        self.answers != self.destination
    }

    fn is_for_host(&self, local: &BTreeSet<IpAddr>) -> bool {
        self.destination.is_loopback() || local.contains(&self.destination)
    }

    /// True if it began before its port was mapped. Only UDP has connections that nobody closes; TCP and SCTP go on with the
    /// server they were made with.
    fn began_without_mapping(&self, local: &BTreeSet<IpAddr>) -> bool {
        self.protocol == TransportProtocol::Udp.number() && !self.is_translated() && self.is_for_host(local)
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

pub(crate) fn address(attributes: &Attributes, [v4, v6]: [u16; 2]) -> Option<IpAddr> {
    if let Some(bytes) = attributes.get(v4) {
        return Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?));
    }
    Some(IpAddr::from(<[u8; 16]>::try_from(attributes.get(v6)?).ok()?))
}

#[cfg(test)]
#[path = "conntrack_tests.rs"]
mod tests;
