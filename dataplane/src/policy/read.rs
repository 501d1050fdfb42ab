//! Reads the table: a dump for each kind of object, and one for each set, all of one generation of rules.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use husk_overlay::kernel::policy::PolicyName;
use husk_overlay::marks;
use nix::errno::Errno;

use super::decode::{self, Gatherer};
use super::uapi::*;
use super::{ActualChain, ActualPolicy, ActualSet, ForeignObject, Known, object};
use crate::error::Error;
use crate::netfilter::{Attributes, Message, attributes};
use crate::netlink::{Request, Socket};
use crate::nft::nfnetlink::{self, kind, name};

/// How often reading is attempted while others change rules.
const ATTEMPTS: u32 = 8;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// What the kernel holds, and the generation of rules it belongs to.
pub(super) type Reading = (u32, Option<Arc<ActualPolicy>>);

/// Reads the table in the calling thread's network namespace; none when there is none.
///
/// # Errors
/// [`Error::Interrupted`] when rules change all the time, [`Error::Malformed`] when an answer is not understood,
/// [`Error::Unsupported`] when the kernel has no nftables; the errors of a broken netlink exchange.
pub fn read() -> Result<Option<Arc<ActualPolicy>>, Error> {
    Ok(list(&mut nfnetlink::open()?)?.1)
}

pub(super) fn list(socket: &mut Socket) -> Result<Reading, Error> {
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let generation = nfnetlink::generation(socket)?;
        let table = match once(socket) {
            // Something went between two of the questions.
            Err(error) if error.errno() == Some(Errno::ENOENT) => continue,
            other => other?,
        };
        if nfnetlink::generation(socket)? == generation {
            return Ok((generation, table.map(Arc::new)));
        }
    }
    Err(Error::Interrupted { operation: "read", object: object(), attempts: ATTEMPTS })
}

fn once(socket: &mut Socket) -> Result<Option<ActualPolicy>, Error> {
    let Some(table) = nfnetlink::find(socket, marks::NFT_POLICY_TABLE)? else { return Ok(None) };
    let mut state = ActualPolicy { dormant: table.dormant, ..ActualPolicy::default() };
    for chain in dump(socket, NFT_MSG_GETCHAIN, None)? {
        let Some(hook) = decode::chain_hook(&chain) else { continue };
        let chain = named(&chain, NFTA_CHAIN_NAME)?;
        state.chains.insert(chain, ActualChain { hook, rules: Vec::new(), known: Known::default() });
    }
    for rule in dump(socket, NFT_MSG_GETRULE, None)? {
        // The chain of a rule's own has none that could be compared.
        if let Some(chain) = state.chains.get_mut(&named(&rule, NFTA_RULE_CHAIN)?) {
            chain.rules.push(decode::rule_comment(&rule));
        }
    }
    for set in dump(socket, NFT_MSG_GETSET, None)? {
        let Some(form) = decode::set_form(&set) else { continue };
        let name = named(&set, NFTA_SET_NAME)?;
        let found = match form.kind() {
            Some((key, value)) => elements(socket, &name, Gatherer::new(key, value))?,
            None => ActualSet::Foreign,
        };
        state.sets.insert(name, found);
    }
    for it in dump(socket, NFT_MSG_GETOBJ, None)? {
        let name = named(&it, NFTA_OBJ_NAME)?.to_string();
        match it.number(NFTA_OBJ_TYPE) {
            Some(NFT_OBJECT_COUNTER) => state.counters.insert(name),
            other => state.foreign.insert(ForeignObject::Stateful(other.unwrap_or_default(), name)),
        };
    }
    let flowtables = match dump(socket, NFT_MSG_GETFLOWTABLE, None) {
        // Kernels before 4.16 do not know them.
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => Vec::new(),
        other => other?,
    };
    for it in flowtables {
        state.foreign.insert(ForeignObject::Flowtable(named(&it, NFTA_FLOWTABLE_NAME)?.to_string()));
    }
    Ok(Some(state))
}

fn elements(socket: &mut Socket, set: &PolicyName, mut gatherer: Gatherer) -> Result<ActualSet, Error> {
    for answer in dump(socket, NFT_MSG_GETSETELEM, Some(set))? {
        let list = answer.get(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        attributes(list).for_each(|(_, element)| gatherer.add(element));
    }
    Ok(gatherer.finish())
}

/// All objects of a kind in the table, or all elements of a set.
fn dump(socket: &mut Socket, number: u16, set: Option<&str>) -> Result<Vec<Attributes>, Error> {
    let table = name(marks::NFT_POLICY_TABLE);
    // All kinds of objects name their table in the same attribute.
    let mut message = Message::new(kind(number), NFPROTO_INET).with(NFTA_TABLE_NAME, &table);
    if let Some(set) = set {
        message = message.with(NFTA_SET_ELEM_LIST_SET, &name(set));
    }
    let answers = socket.dump(Request { operation: "read", object: object(), flags: 0, message })?;
    // Of chains the kernel sends those of all tables.
    let ours = |it: &Attributes| it.get(NFTA_TABLE_NAME) == Some(table.as_slice());
    Ok(answers.into_iter().map(|answer| answer.attributes).filter(ours).collect())
}

fn named(it: &Attributes, kind: u16) -> Result<PolicyName, Error> {
    it.text(kind).map(PolicyName::from).ok_or_else(|| nfnetlink::malformed("read", object(), "something has no name"))
}
