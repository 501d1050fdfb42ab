//! The connection that a packet belongs to: who began it, who answers, and at which port.
//!
//! Connection tracking knows that as two tuples, of the first packet as it came and of the answers to it
//! (include/uapi/linux/netfilter/nfnetlink_conntrack.h). The kernel tells them with the packet where it was built to
//! (`CONFIG_NETFILTER_NETLINK_GLUE_CT`); else it is asked. It knows nothing of a connection whose first packet was dropped, and
//! that packet goes in the connection's own direction.

use std::net::IpAddr;

use husk_overlay::prefix::Family;
use nix::errno::Errno;

use super::packet::Packet;
use crate::conntrack::{
    CTA_IP_V4_DST, CTA_IP_V4_SRC, CTA_IP_V6_DST, CTA_IP_V6_SRC, CTA_PROTO_DST_PORT, CTA_PROTO_NUM, CTA_TUPLE_IP,
    CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_TUPLE_REPLY, GET, address, number_of,
};
use crate::error::Error;
use crate::netfilter::{Attributes, Message};
use crate::netlink::{Protocol, Request, Socket};

const CTA_PROTO_SRC_PORT: u16 = 2;

/// A connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// Who began it: source of its first packet, before any translation.
    pub originator: IpAddr,
    /// Who answers: destination of its first packet, after any translation.
    pub responder: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Port of who answers; 0 where the protocol has no ports.
    pub port: u16,
}

impl Connection {
    /// The connection that a packet would begin.
    pub(super) fn begun_by(packet: &Packet) -> Self {
        Self {
            originator: packet.source,
            responder: packet.destination,
            protocol: packet.protocol,
            port: packet.ports.map_or(0, |(_, destination)| destination),
        }
    }

    /// The connection of an entry of connection tracking.
    pub(super) fn read(entry: &Attributes) -> Option<Self> {
        let (first, answer) = (entry.nested(CTA_TUPLE_ORIG)?, entry.nested(CTA_TUPLE_REPLY)?);
        let transport = answer.nested(CTA_TUPLE_PROTO)?;
        let port = transport.get(CTA_PROTO_SRC_PORT).and_then(|bytes| bytes.try_into().ok());
        Some(Self {
            originator: address(&first.nested(CTA_TUPLE_IP)?, [CTA_IP_V4_SRC, CTA_IP_V6_SRC])?,
            responder: address(&answer.nested(CTA_TUPLE_IP)?, [CTA_IP_V4_SRC, CTA_IP_V6_SRC])?,
            protocol: *transport.get(CTA_PROTO_NUM)?.first()?,
            port: port.map_or(0, u16::from_be_bytes),
        })
    }
}

/// Asks connection tracking for the connections of packets.
#[derive(Debug)]
pub(super) struct Tracker {
    /// None once the kernel has said that it does not tell.
    socket: Option<Socket>,
}

impl Tracker {
    pub(super) fn open() -> Result<Self, Error> {
        Ok(Self { socket: Some(Socket::open(Protocol::Netfilter)?) })
    }

    /// The connection of a packet with ports; none if none is known. A translated one is known by the answers to its packets,
    /// unless both of its ends are translated.
    pub(super) fn find(&mut self, packet: &Packet) -> Option<Connection> {
        let (source, destination) = packet.ports?;
        let there = ((packet.source, source), (packet.destination, destination));
        let back = (there.1, there.0);
        [there, back].into_iter().find_map(|ends| self.ask(packet.protocol, ends))
    }

    fn ask(&mut self, protocol: u8, (source, destination): ((IpAddr, u16), (IpAddr, u16))) -> Option<Connection> {
        let family = Family::of(source.0);
        let kinds = match family {
            Family::Ipv4 => [CTA_IP_V4_SRC, CTA_IP_V4_DST],
            Family::Ipv6 => [CTA_IP_V6_SRC, CTA_IP_V6_DST],
        };
        let addresses = Attributes::default().with(kinds[0], &octets(source.0)).with(kinds[1], &octets(destination.0));
        let transport = Attributes::default()
            .with(CTA_PROTO_NUM, &[protocol])
            .with(CTA_PROTO_SRC_PORT, &source.1.to_be_bytes())
            .with(CTA_PROTO_DST_PORT, &destination.1.to_be_bytes());
        let tuple = Attributes::default().nest(CTA_TUPLE_IP, &addresses).nest(CTA_TUPLE_PROTO, &transport);
        let message = Message::new(GET, number_of(family)).nest(CTA_TUPLE_ORIG, &tuple);
        let request =
            Request { operation: "look for", object: "the connection of a packet".to_owned(), flags: 0, message };
        match self.socket.as_mut()?.get(request) {
            Ok(entry) => Connection::read(&entry.attributes),
            Err(error) if error.errno() == Some(Errno::ENOENT) => None,
            Err(error) => {
                tracing::warn!(%error, "denied packets are told by their own direction, not by that of their connection");
                self.socket = None;
                None
            }
        }
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
