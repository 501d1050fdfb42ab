//! Connections as the kernel tracks them: which there are, and news of those that begin and end.
//!
//! Messages of nfnetlink's subsystem for connection tracking (include/uapi/linux/netfilter/nfnetlink_conntrack.h,
//! net/netfilter/nf_conntrack_netlink.c). The kernel tells of a connection when its first packet has passed all rules: one
//! whose packets are dropped never begins. It counts packets and bytes only while `net.netfilter.nf_conntrack_acct` is on.
//!
//! Where `net.netfilter.nf_conntrack_events` is 2, as Linux 5.19 and later have it by default, it tells only of connections
//! that begin while somebody listens: of those before it does not tell the end either. Where it is 0 it tells of none
//! (Documentation/networking/nf_conntrack-sysctl.rst), without any error for who listens.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use husk_overlay::port_mapping::TransportProtocol;
use husk_overlay::prefix::Family;
use nix::errno::Errno;

use crate::conntrack::{
    CTA_IP_V4_DST, CTA_IP_V4_SRC, CTA_IP_V6_DST, CTA_IP_V6_SRC, CTA_PROTO_DST_PORT, CTA_PROTO_NUM, CTA_TUPLE_IP,
    CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_TUPLE_REPLY, GET, address, number_of,
};
use crate::error::Error;
use crate::netfilter::{Attributes, Message};
use crate::netlink::{Heard, Protocol, Request, Socket, frames};
use crate::sysctl;

/// `NFNL_SUBSYS_CTNETLINK << 8`, to which `IPCTNL_MSG_CT_NEW` and `IPCTNL_MSG_CT_DELETE` are added.
const NEW: u16 = 1 << 8;
const DELETE: u16 = 1 << 8 | 2;

/// `NLM_F_CREATE`: the message is about a new entry, not about one that changed.
const CREATE: u16 = 0x400;

/// Multicast groups (include/uapi/linux/netfilter/nfnetlink.h `enum nfnetlink_groups`).
const NFNLGRP_CONNTRACK_NEW: u32 = 1;
const NFNLGRP_CONNTRACK_DESTROY: u32 = 3;

/// Whether connections are told of, in this network namespace.
const EVENTS: &str = "net/netfilter/nf_conntrack_events";

/// `struct nfgenmsg`.
const HEADER: usize = 4;

const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_TIMESTAMP: u16 = 20;

const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;
const CTA_PROTO_ICMPV6_TYPE: u16 = 8;
const CTA_PROTO_ICMPV6_CODE: u16 = 9;

const CTA_COUNTERS_PACKETS: u16 = 1;
const CTA_COUNTERS_BYTES: u16 = 2;

const CTA_TIMESTAMP_START: u16 = 1;

/// `AF_UNSPEC`: connections of all families.
const ANY_FAMILY: u8 = 0;

/// The addresses of a connection's packets in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// For whom.
    pub destination: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Source and destination port, where the protocol has ports.
    pub ports: Option<(u16, u16)>,
    /// Type and code of ICMP messages.
    pub icmp: Option<(u8, u8)>,
}

/// What went in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes, IP headers included.
    pub bytes: u64,
}

/// A connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracked {
    /// Packets of who began it, before any translation.
    pub original: Tuple,
    /// Answers, before any translation back: their source is who really answers.
    pub answer: Tuple,
    /// What the originator sent and what came back; none where the kernel does not count.
    pub counts: Option<(Count, Count)>,
    /// When it began, since the Unix epoch; none unless `net.netfilter.nf_conntrack_timestamp` is on.
    pub began: Option<Duration>,
}

/// What the kernel tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// A connection has begun.
    Began(Tracked),
    /// It is over: closed long enough, or silent for long.
    Ended(Tracked),
    /// This many messages were lost, because they came faster than they were read.
    Lost(u64),
}

/// Somebody who is told.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    waiting: VecDeque<News>,
    /// Losses that were told of.
    lost: u32,
}

impl Listener {
    /// Listens in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel does not tell about connections, or was told not to, and the errors of a broken
    /// netlink exchange.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(Protocol::Netfilter)?;
        // Whoever subscribes to a group of a subsystem that is not loaded has the kernel load it (net/netfilter/nfnetlink.c
        // `nfnetlink_bind`) but is not told whether that worked.
        probe(&mut socket)?;
        for group in [NFNLGRP_CONNTRACK_NEW, NFNLGRP_CONNTRACK_DESTROY] {
            socket.join(group)?;
        }
        // The parameter is there since the subsystem is; a user namespace may hide it, and then the kernel's default holds.
        if sysctl::read([EVENTS])?.get(EVENTS).is_some_and(|value| value == "0") {
            return Err(Error::Unsupported {
                operation: "listen to",
                object: "connections".to_owned(),
                reason: "net.netfilter.nf_conntrack_events is 0: the kernel is told not to tell of any".to_owned(),
                remedy: "sysctl -w net.netfilter.nf_conntrack_events=2 (1 before Linux 5.19), and the same in what sets it at boot (/etc/sysctl.d)",
            });
        }
        Ok(Self { socket, waiting: VecDeque::new(), lost: 0 })
    }

    /// The next news; none if there were none for as long as was waited.
    ///
    /// # Errors
    /// [`Error::Socket`] when the socket is broken.
    pub fn next(&mut self, patience: Duration) -> Result<Option<News>, Error> {
        if let Some(news) = self.waiting.pop_front() {
            return Ok(Some(news));
        }
        match self.socket.listen(patience)? {
            Heard::Overrun => {
                let dropped = self.socket.dropped()?;
                let lost = dropped.wrapping_sub(self.lost);
                self.lost = dropped;
                // A datagram larger than the buffer was lost without the kernel's knowing.
                return Ok(Some(News::Lost(u64::from(lost.max(1)))));
            }
            Heard::Silence => {}
            Heard::Datagram(datagram) => self.waiting.extend(news(datagram)),
        }
        Ok(self.waiting.pop_front())
    }
}

/// Connections that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// As many as there was room for.
    pub connections: Vec<Tracked>,
    /// Others of this kind.
    pub left_off: u64,
}

/// The connections of a kind that there are in the calling thread's network namespace, `most` of them at most. A host may have
/// millions: of those that are not asked for no more than one message of the kernel's is in memory. `wanted` may be asked about
/// one of them again, where the kernel has to be.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel does not tell about connections, and the errors of a broken netlink exchange.
pub fn list(most: usize, mut wanted: impl FnMut(&Tracked) -> bool) -> Result<Listed, Error> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let request = Request {
        operation: "list",
        object: "connections".to_owned(),
        flags: 0,
        message: Message::new(GET, ANY_FAMILY),
    };
    let read = |entry: Message| Tracked::read(&entry.attributes).filter(&mut wanted);
    let kept = socket.dump_some(request, most, read).map_err(explained)?;
    Ok(Listed { connections: kept.objects, left_off: kept.left_off })
}

/// Asks for a connection that there cannot be, from nowhere to nowhere: a kernel that knows of connections says that there is
/// none, any other that it does not understand.
fn probe(socket: &mut Socket) -> Result<(), Error> {
    let nowhere = Attributes::default().with(CTA_IP_V4_SRC, &[0; 4]).with(CTA_IP_V4_DST, &[0; 4]);
    let udp = Attributes::default()
        .with(CTA_PROTO_NUM, &[TransportProtocol::Udp.number()])
        .with(CTA_PROTO_SRC_PORT, &[0; 2])
        .with(CTA_PROTO_DST_PORT, &[0; 2]);
    let tuple = Attributes::default().nest(CTA_TUPLE_IP, &nowhere).nest(CTA_TUPLE_PROTO, &udp);
    let message = Message::new(GET, number_of(Family::Ipv4)).nest(CTA_TUPLE_ORIG, &tuple);
    let request = Request { operation: "listen to", object: "connections".to_owned(), flags: 0, message };
    match socket.get(request) {
        Err(error) if error.errno() != Some(Errno::ENOENT) => Err(explained(error)),
        _ => Ok(()),
    }
}

fn explained(error: Error) -> Error {
    match error.errno() {
        Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Error::Unsupported {
            operation: "listen to",
            object: "connections".to_owned(),
            reason: "the kernel does not tell about connections".to_owned(),
            remedy: "load the module nf_conntrack_netlink, or use a kernel built with it",
        },
        _ => error,
    }
}

fn news(datagram: &[u8]) -> impl Iterator<Item = News> {
    frames(datagram).map_while(Result::ok).filter_map(|frame| {
        let attributes = Attributes::read(frame.payload.get(HEADER..)?);
        match frame.kind {
            NEW if frame.flags & CREATE != 0 => Some(News::Began(Tracked::read(&attributes)?)),
            DELETE => Some(News::Ended(Tracked::read(&attributes)?)),
            _ => None,
        }
    })
}

impl Tracked {
    fn read(entry: &Attributes) -> Option<Self> {
        let count = |kind| Count::read(&entry.nested(kind)?);
        let began = entry.nested(CTA_TIMESTAMP).and_then(|times| number(&times, CTA_TIMESTAMP_START));
        Some(Self {
            original: Tuple::read(&entry.nested(CTA_TUPLE_ORIG)?)?,
            answer: Tuple::read(&entry.nested(CTA_TUPLE_REPLY)?)?,
            counts: count(CTA_COUNTERS_ORIG).zip(count(CTA_COUNTERS_REPLY)),
            began: began.filter(|began| *began > 0).map(Duration::from_nanos),
        })
    }
}

impl Tuple {
    fn read(tuple: &Attributes) -> Option<Self> {
        let (addresses, transport) = (tuple.nested(CTA_TUPLE_IP)?, tuple.nested(CTA_TUPLE_PROTO)?);
        let port = |kind| transport.get(kind)?.try_into().ok().map(u16::from_be_bytes);
        let octet = |kinds: [u16; 2]| kinds.into_iter().find_map(|kind| transport.get(kind)?.first().copied());
        Some(Self {
            source: address(&addresses, [CTA_IP_V4_SRC, CTA_IP_V6_SRC])?,
            destination: address(&addresses, [CTA_IP_V4_DST, CTA_IP_V6_DST])?,
            protocol: *transport.get(CTA_PROTO_NUM)?.first()?,
            ports: port(CTA_PROTO_SRC_PORT).zip(port(CTA_PROTO_DST_PORT)),
            icmp: octet([CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMPV6_TYPE])
                .zip(octet([CTA_PROTO_ICMP_CODE, CTA_PROTO_ICMPV6_CODE])),
        })
    }
}

impl Count {
    fn read(counters: &Attributes) -> Option<Self> {
        Some(Self { packets: number(counters, CTA_COUNTERS_PACKETS)?, bytes: number(counters, CTA_COUNTERS_BYTES)? })
    }
}

/// A 64-bit number in network byte order.
fn number(list: &Attributes, kind: u16) -> Option<u64> {
    list.get(kind)?.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
#[path = "connections_tests.rs"]
mod tests;
