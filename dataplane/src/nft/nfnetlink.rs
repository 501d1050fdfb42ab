//! What is asked of the kernel itself, without `nft`: whether the table exists and is in force, which generation of rules is
//! in force, and the values of counters. nft's JSON leaves the flags of a table out, its error for a missing table ("No such
//! file or directory") may mean much else, and it takes a process where a message does.
//!
//! Requests of nfnetlink's subsystem nftables (include/uapi/linux/netfilter/nf_tables.h).

use std::collections::BTreeMap;

use husk_overlay::kernel::CounterName;
use nix::errno::Errno;

use super::CounterValue;
use crate::error::Error;
use crate::netfilter::{Attributes, Message};
use crate::netlink::{Protocol, Request, Socket};

/// `NFNL_SUBSYS_NFTABLES << 8`, to which the number of a message is added.
const SUBSYSTEM: u16 = 10 << 8;

const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETGEN: u16 = 16;
const NFT_MSG_GETOBJ: u16 = 19;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_TABLE_OWNER: u16 = 7;

/// `NFT_TABLE_F_DORMANT`: the rules of the table are not in force.
const DORMANT: u32 = 1;

/// `NFT_TABLE_F_OWNER`: only the socket that made it changes it, and `flush ruleset` of others passes it over.
pub(crate) const OWNER: u32 = 2;

/// `NFT_TABLE_F_PERSIST`, from Linux 6.9 on: it stays when its owner has gone, and anybody may adopt it then.
pub(crate) const PERSIST: u32 = 4;

const NFTA_GEN_ID: u16 = 1;

const NFTA_OBJ_TABLE: u16 = 1;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NFT_OBJECT_COUNTER: u32 = 1;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;

const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;

/// A table of family `inet`, as far as nft does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) dormant: bool,
    /// It outlives its owner, and has one.
    pub(crate) persists: bool,
    pub(crate) owned: bool,
    /// The socket it belongs to.
    pub(crate) owner: Option<u32>,
}

/// Looks for a table in the socket's network namespace.
pub(crate) fn find(socket: &mut Socket, table: &str) -> Result<Option<Table>, Error> {
    let question = Message::new(kind(NFT_MSG_GETTABLE), NFPROTO_INET).with(NFTA_TABLE_NAME, &name(table));
    match socket.get(request("look for", object(table), question)) {
        Ok(answer) => match answer.attributes.number(NFTA_TABLE_FLAGS) {
            Some(flags) => Ok(Some(Table {
                dormant: flags & DORMANT != 0,
                persists: flags & PERSIST != 0,
                owned: flags & OWNER != 0,
                owner: answer.attributes.number(NFTA_TABLE_OWNER),
            })),
            // Without flags it would be taken for one in force.
            None => Err(malformed("look for", object(table), "the table has no flags")),
        },
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
        Err(error) => Err(explained("look for", object(table), error)),
    }
}

/// The number of the generation of rules in the socket's network namespace: every transaction of anybody makes another.
pub(crate) fn generation(socket: &mut Socket) -> Result<u32, Error> {
    let (operation, object) = ("read", "the generation of the nftables rules".to_owned());
    let answer = socket.get(request(operation, object.clone(), Message::new(kind(NFT_MSG_GETGEN), NFPROTO_UNSPEC)));
    let answer = answer.map_err(|error| explained(operation, object.clone(), error))?;
    answer.attributes.number(NFTA_GEN_ID).ok_or_else(|| malformed(operation, object, "it has no number"))
}

/// Values of a table's counters; empty when there is no table.
pub(crate) fn counters(socket: &mut Socket, table: &str) -> Result<BTreeMap<CounterName, CounterValue>, Error> {
    let (operation, object) = ("read counters of", object(table));
    let question = Message::new(kind(NFT_MSG_GETOBJ), NFPROTO_INET)
        .with(NFTA_OBJ_TABLE, &name(table))
        .with(NFTA_OBJ_TYPE, &NFT_OBJECT_COUNTER.to_be_bytes());
    let answers = socket.dump(request(operation, object.clone(), question));
    let answers = answers.map_err(|error| explained(operation, object.clone(), error))?;
    let mut counters = BTreeMap::new();
    for Message { attributes: answer, .. } in answers {
        // A kernel that does not filter sends the objects of all tables.
        let ours = answer.get(NFTA_OBJ_TABLE) == Some(name(table).as_slice());
        if ours && answer.number(NFTA_OBJ_TYPE) == Some(NFT_OBJECT_COUNTER) {
            let (name, value) = counter(&answer)
                .ok_or_else(|| malformed(operation, object.clone(), "a counter lacks name or value"))?;
            counters.insert(name, value);
        }
    }
    Ok(counters)
}

fn object(table: &str) -> String {
    format!("nft table inet {table}")
}

/// A name as an attribute has it, with a final zero.
pub(crate) fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn request(operation: &'static str, object: String, message: Message) -> Request<Message> {
    Request { operation, object, flags: 0, message }
}

pub(crate) fn malformed(operation: &'static str, object: String, reason: &str) -> Error {
    Error::Malformed { operation, object, reason: reason.to_owned() }
}

/// What nfnetlink says to a subsystem it does not have means that there is no nftables.
pub(crate) fn explained(operation: &'static str, object: String, error: Error) -> Error {
    match error.errno() {
        Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT) => Error::Unsupported {
            operation,
            object,
            reason: "the kernel has no nftables".to_owned(),
            remedy: "load the module nf_tables, or use a kernel built with it",
        },
        _ => error,
    }
}

/// Opens a socket in the calling thread's network namespace.
pub(crate) fn open() -> Result<Socket, Error> {
    Socket::open(Protocol::Netfilter)
        .map_err(|error| explained("open a socket for", "the nftables rules".to_owned(), error))
}

/// The type of a message of this subsystem.
pub(crate) const fn kind(number: u16) -> u16 {
    SUBSYSTEM | number
}

fn counter(answer: &Attributes) -> Option<(CounterName, CounterValue)> {
    let name = answer.get(NFTA_OBJ_NAME)?;
    let name = std::str::from_utf8(name.strip_suffix(&[0]).unwrap_or(name)).ok()?.to_owned();
    let data = answer.nested(NFTA_OBJ_DATA)?;
    let number = |kind| data.get(kind)?.try_into().ok().map(u64::from_be_bytes);
    Some((name, CounterValue { packets: number(NFTA_COUNTER_PACKETS)?, bytes: number(NFTA_COUNTER_BYTES)? }))
}
