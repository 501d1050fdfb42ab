//! Packets that the kernel tells of: rules with `log group N` hand them to whoever is bound to that group (NFLOG).
//!
//! Messages of nfnetlink's subsystem for it (include/uapi/linux/netfilter/nfnetlink_log.h, net/netfilter/nfnetlink_log.c). A
//! group has one listener at a time. The kernel numbers what it tells, so that every record that was lost for want of buffer
//! space is counted; what cannot be understood counts as lost too.

mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use netlink_packet_core::{NetlinkPayload, NetlinkSerializable};
use nix::errno::Errno;

pub use self::connection::Connection;
use self::connection::Tracker;
pub use self::packet::Packet;
use crate::error::Error;
use crate::netfilter::Attributes;
use crate::netlink::{Heard, Protocol, Request, Socket, frames};

/// `NFNL_SUBSYS_ULOG << 8`, to which `NFULNL_MSG_PACKET` and `NFULNL_MSG_CONFIG` are added.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;

/// `struct nfgenmsg`.
const HEADER: usize = 4;

const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_FLAGS: u16 = 6;

const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULNL_CFG_F_SEQ: u16 = 1;
const NFULNL_CFG_F_CONNTRACK: u16 = 4;

const NFULA_TIMESTAMP: u16 = 3;
const NFULA_IFINDEX_INDEV: u16 = 4;
const NFULA_IFINDEX_OUTDEV: u16 = 5;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
const NFULA_SEQ: u16 = 12;
const NFULA_CT: u16 = 18;

/// How long the kernel may collect packets before it tells of them, in hundredths of a second.
const COLLECT: u32 = 10;

/// A packet that a rule told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// When the packet came, since the Unix epoch; none where the kernel took no note of that.
    pub time: Option<Duration>,
    /// The text that the rule gave it.
    pub prefix: String,
    /// Index of the interface it came from, if it came from any.
    pub input: Option<u32>,
    /// Index of the interface it was to leave by, if any.
    pub output: Option<u32>,
    /// The packet.
    pub packet: Packet,
    /// The connection it belongs to, or would have begun.
    pub connection: Connection,
}

/// A listener to a group.
#[derive(Debug)]
pub struct Log {
    socket: Socket,
    /// Where the kernel does not tell of connections by itself.
    tracker: Option<Tracker>,
    /// What came, and was not taken yet.
    waiting: VecDeque<Logged>,
    /// The number of the next record; the kernel begins at 0 with every listener.
    expected: u32,
    lost: u64,
}

impl Log {
    /// Listens to a group in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel has no NFLOG, [`Error::Refused`] when another program listens already.
    pub fn open(group: u16) -> Result<Self, Error> {
        let mut socket = Socket::open(Protocol::Netfilter)?;
        let bind = Attributes::default().with(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND]);
        configure(&mut socket, group, bind).map_err(|error| explained(group, error))?;
        // All of a packet, unless the rule wants less; one octet pads the structure.
        let mode = [&u32::from(u16::MAX).to_be_bytes()[..], &[NFULNL_COPY_PACKET, 0]].concat();
        let form = Attributes::default().with(NFULA_CFG_MODE, &mode).with(NFULA_CFG_TIMEOUT, &COLLECT.to_be_bytes());
        configure(&mut socket, group, form)?;
        let tracker = if track(&mut socket, group)? { None } else { Some(Tracker::open()?) };
        Ok(Self { socket, tracker, waiting: VecDeque::new(), expected: 0, lost: 0 })
    }

    /// The next packet; none if there was none for as long as was waited, or if some were lost just now.
    ///
    /// # Errors
    /// [`Error::Socket`] when the socket is broken.
    pub fn next(&mut self, patience: Duration) -> Result<Option<Logged>, Error> {
        if let Some(logged) = self.waiting.pop_front() {
            return Ok(Some(logged));
        }
        match self.socket.listen(patience)? {
            // The next number tells how many there were.
            Heard::Overrun | Heard::Silence => {}
            Heard::Datagram(datagram) => {
                for record in records(datagram) {
                    let missed = record.number.map_or(0, |number| missed(&mut self.expected, number));
                    self.lost += u64::from(missed);
                    let Some((mut logged, tracked)) = record.logged else {
                        self.lost += 1;
                        continue;
                    };
                    if let (false, Some(tracker)) = (tracked, &mut self.tracker)
                        && let Some(connection) = tracker.find(&logged.packet)
                    {
                        logged.connection = connection;
                    }
                    self.waiting.push_back(logged);
                }
            }
        }
        Ok(self.waiting.pop_front())
    }

    /// Records that were lost since the log was opened.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// Has the kernel number what it tells, and tell of connections; false if it cannot do the latter.
fn track(socket: &mut Socket, group: u16) -> Result<bool, Error> {
    let flags = |flags: u16| Attributes::default().with(NFULA_CFG_FLAGS, &flags.to_be_bytes());
    let mut tried = configure(socket, group, flags(NFULNL_CFG_F_SEQ | NFULNL_CFG_F_CONNTRACK));
    if tried.as_ref().is_err_and(|error| error.errno() == Some(Errno::EAGAIN)) {
        // It has just loaded the module.
        tried = configure(socket, group, flags(NFULNL_CFG_F_SEQ | NFULNL_CFG_F_CONNTRACK));
    }
    match tried {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EINVAL)) => {
            configure(socket, group, flags(NFULNL_CFG_F_SEQ)).map(|()| false)
        }
        Err(error) => Err(error),
    }
}

/// How many are missing before this number.
fn missed(expected: &mut u32, number: u32) -> u32 {
    let missed = number.wrapping_sub(*expected);
    *expected = number.wrapping_add(1);
    // Numbers go up: one that seems to go far ahead goes back, and nothing is known.
    if missed > u32::MAX / 2 { 0 } else { missed }
}

/// A configuration of a group, whose number is the resource id of `struct nfgenmsg`.
struct Config {
    group: u16,
    attributes: Attributes,
}

impl NetlinkSerializable for Config {
    fn message_type(&self) -> u16 {
        CONFIG
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.bytes().len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let [high, low] = self.group.to_be_bytes();
        buffer[..HEADER].copy_from_slice(&[0, 0, high, low]);
        buffer[HEADER..].copy_from_slice(self.attributes.bytes());
    }
}

impl From<Config> for NetlinkPayload<Config> {
    fn from(config: Config) -> Self {
        Self::InnerMessage(config)
    }
}

fn configure(socket: &mut Socket, group: u16, attributes: Attributes) -> Result<(), Error> {
    let message = Config { group, attributes };
    socket.request(Request { operation: "listen to", object: format!("NFLOG group {group}"), flags: 0, message })
}

fn explained(group: u16, error: Error) -> Error {
    match error.errno() {
        Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Error::Unsupported {
            operation: "listen to",
            object: format!("NFLOG group {group}"),
            reason: "the kernel has no NFLOG".to_owned(),
            remedy: "load the module nfnetlink_log, or use a kernel built with it",
        },
        _ => error,
    }
}

/// A message about a packet.
struct Record {
    number: Option<u32>,
    /// The packet, and whether the kernel told its connection; none if it cannot be understood.
    logged: Option<(Logged, bool)>,
}

fn records(datagram: &[u8]) -> impl Iterator<Item = Record> {
    let packets = frames(datagram).map_while(Result::ok).filter(|frame| frame.kind == PACKET);
    packets.map(|frame| {
        let fields = Attributes::read(frame.payload.get(HEADER..).unwrap_or_default());
        Record { number: fields.number(NFULA_SEQ), logged: logged(&fields) }
    })
}

fn logged(fields: &Attributes) -> Option<(Logged, bool)> {
    let packet = Packet::read(fields.get(NFULA_PAYLOAD)?)?;
    let tracked = fields.nested(NFULA_CT).and_then(|entry| Connection::read(&entry));
    let logged = Logged {
        time: time(fields),
        prefix: fields.text(NFULA_PREFIX)?.to_owned(),
        input: fields.number(NFULA_IFINDEX_INDEV),
        output: fields.number(NFULA_IFINDEX_OUTDEV),
        connection: tracked.unwrap_or_else(|| Connection::begun_by(&packet)),
        packet,
    };
    Some((logged, tracked.is_some()))
}

/// Seconds and microseconds (`struct nfulnl_msg_packet_timestamp`).
fn time(fields: &Attributes) -> Option<Duration> {
    let (seconds, rest) = fields.get(NFULA_TIMESTAMP)?.split_first_chunk::<8>()?;
    let micros: [u8; 8] = rest.try_into().ok()?;
    Duration::from_secs(u64::from_be_bytes(*seconds)).checked_add(Duration::from_micros(u64::from_be_bytes(micros)))
}
