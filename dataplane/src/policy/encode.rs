//! Requests that make and unmake what the table consists of.

use husk_overlay::kernel::Hook;
use husk_overlay::kernel::policy::{PolicyChain, PolicyElement, PolicyKey, PolicyRule, PolicySet, PolicyValueKind};
use husk_overlay::marks;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use nix::errno::Errno;

use super::change::Elements;
use super::element::{self, Form};
use super::uapi::*;
use super::{ForeignObject, object, rule};
use crate::error::{Error, Refusal};
use crate::netfilter::{Attributes, Message};
use crate::netlink::Request;
use crate::nft::nfnetlink::{self, kind, name};

/// Octets of elements in a message. They are nested in an attribute, whose length has 16 bits.
const ELEMENTS_BYTES: usize = 60_000;

/// Octets before the attributes of a message: `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;

/// Octets of the header of an attribute.
const ATTRIBUTE: usize = 4;

/// A request of a transaction.
pub(super) struct Step {
    pub(super) request: Request<Message>,
    /// Elements that it is about, with the octets of the request at which they begin.
    pub(super) elements: Vec<(usize, PolicyElement)>,
}

impl Step {
    fn new(operation: &'static str, subject: String, flags: u16, message: Message) -> Self {
        Self { request: Request { operation, object: subject, flags, message }, elements: Vec::new() }
    }
}

/// The element at an octet of a request.
pub(super) fn element_at(elements: &[(usize, PolicyElement)], offset: usize) -> Option<PolicyElement> {
    let behind = elements.partition_point(|(begin, _)| *begin <= offset);
    behind.checked_sub(1).map(|index| elements[index].1)
}

fn message(number: u16) -> Message {
    // Tables, chains, rules, sets, elements and objects name their table in the same attribute.
    Message::new(kind(number), NFPROTO_INET).with(NFTA_TABLE_NAME, &name(marks::NFT_POLICY_TABLE))
}

fn of_table(what: &str, name: &str) -> String {
    format!("{what} {name} of {}", object())
}

/// Makes sure that there is a table, which stays as it is if there is one.
pub(super) fn any_table() -> Step {
    // Without flags, so that a dormant one stays so until it is deleted.
    Step::new("create", object(), NLM_F_CREATE, message(NFT_MSG_NEWTABLE))
}

/// Makes the table, which must not be there.
pub(super) fn new_table(owned: bool) -> Step {
    let message = message(NFT_MSG_NEWTABLE);
    let message = if owned { message.with(NFTA_TABLE_FLAGS, &OWNED.to_be_bytes()) } else { message };
    Step::new("create", object(), NLM_F_CREATE | NLM_F_EXCL, message)
}

/// Makes a table that its owner has left the socket's own.
pub(super) fn adopt_table() -> Step {
    let message = message(NFT_MSG_NEWTABLE).with(NFTA_TABLE_FLAGS, &OWNED.to_be_bytes());
    Step::new("adopt", object(), 0, message)
}

/// Makes a table of another name that belongs to the socket, and deletes it: whether the kernel can.
pub(super) fn probe_ownership() -> [Step; 2] {
    let message = |number| Message::new(kind(number), NFPROTO_INET).with(NFTA_TABLE_NAME, &name(PROBE));
    let made = message(NFT_MSG_NEWTABLE).with(NFTA_TABLE_FLAGS, &OWNED.to_be_bytes());
    [
        Step::new("create", PROBE.to_owned(), NLM_F_CREATE, made),
        Step::new("delete", PROBE.to_owned(), 0, message(NFT_MSG_DELTABLE)),
    ]
}

/// Name of a table that is there within one transaction only, and never in force.
const PROBE: &str = "husk-probe";

/// Flags of a table that belongs to this process and outlives it.
const OWNED: u32 = nfnetlink::OWNER | nfnetlink::PERSIST;

/// Deletes the table with all there is in it.
pub(super) fn delete_table() -> Step {
    Step::new("delete", object(), 0, message(NFT_MSG_DELTABLE))
}

pub(super) fn new_counter(counter: &str) -> Step {
    let data = Attributes::default();
    let message = message(NFT_MSG_NEWOBJ)
        .with(NFTA_OBJ_NAME, &name(counter))
        .with(NFTA_OBJ_TYPE, &NFT_OBJECT_COUNTER.to_be_bytes())
        .nest(NFTA_OBJ_DATA, &data);
    Step::new("create", of_table("counter", counter), NLM_F_CREATE, message)
}

pub(super) fn delete_object(object: &ForeignObject) -> Step {
    match object {
        ForeignObject::Stateful(kind, it) => {
            let message =
                message(NFT_MSG_DELOBJ).with(NFTA_OBJ_NAME, &name(it)).with(NFTA_OBJ_TYPE, &kind.to_be_bytes());
            Step::new("delete", of_table("object", it), 0, message)
        }
        ForeignObject::Flowtable(it) => {
            let message = message(NFT_MSG_DELFLOWTABLE).with(NFTA_FLOWTABLE_NAME, &name(it));
            Step::new("delete", of_table("flow table", it), 0, message)
        }
    }
}

/// Number of a hook in family `inet` (`enum nf_inet_hooks` in include/uapi/linux/netfilter.h).
pub(super) fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

/// Makes a chain without rules.
pub(super) fn new_chain(chain: &str, spec: &PolicyChain) -> Step {
    let mut message = message(NFT_MSG_NEWCHAIN).with(NFTA_CHAIN_NAME, &name(chain));
    if let Some((hook, priority)) = spec.hook {
        let hook = Attributes::default()
            .with(NFTA_HOOK_HOOKNUM, &hook_number(hook).to_be_bytes())
            .with(NFTA_HOOK_PRIORITY, &priority.to_be_bytes());
        message = message
            .nest(NFTA_CHAIN_HOOK, &hook)
            .with(NFTA_CHAIN_TYPE, &name("filter"))
            .with(NFTA_CHAIN_POLICY, &NF_ACCEPT.to_be_bytes());
    }
    Step::new("create", of_table("chain", chain), NLM_F_CREATE, message)
}

pub(super) fn delete_chain(chain: &str) -> Step {
    let message = message(NFT_MSG_DELCHAIN).with(NFTA_CHAIN_NAME, &name(chain));
    Step::new("delete", of_table("chain", chain), 0, message)
}

/// Deletes all rules of a chain.
pub(super) fn flush_chain(chain: &str) -> Step {
    let message = message(NFT_MSG_DELRULE).with(NFTA_RULE_CHAIN, &name(chain));
    Step::new("delete the rules of", of_table("chain", chain), 0, message)
}

/// Appends a rule to a chain; `number` counts from 1, for errors.
pub(super) fn new_rule(chain: &str, number: usize, it: &PolicyRule) -> Step {
    let comment = name(&rule::comment(it));
    let length = u8::try_from(comment.len()).unwrap_or(u8::MAX);
    let userdata = [&[UDATA_RULE_COMMENT, length], comment.as_slice()].concat();
    let message = message(NFT_MSG_NEWRULE)
        .with(NFTA_RULE_CHAIN, &name(chain))
        .nest(NFTA_RULE_EXPRESSIONS, &rule::expressions(it))
        .with(NFTA_RULE_USERDATA, &userdata);
    let subject = format!("{number} to {}", of_table("chain", chain));
    Step::new("add rule", subject, NLM_F_CREATE | NLM_F_APPEND, message)
}

/// Makes a set without elements; `id` is a number that no other set of the transaction has.
pub(super) fn new_set(set: &str, spec: &PolicySet, id: u32) -> Step {
    let form = Form::of(spec.key, spec.value);
    let mut message = message(NFT_MSG_NEWSET)
        .with(NFTA_SET_NAME, &name(set))
        .with(NFTA_SET_FLAGS, &form.flags.to_be_bytes())
        .with(NFTA_SET_KEY_TYPE, &form.key_type.to_be_bytes())
        .with(NFTA_SET_KEY_LEN, &form.key_length.to_be_bytes())
        .with(NFTA_SET_ID, &id.to_be_bytes());
    let is_concatenation = matches!(spec.key, PolicyKey::AddressPair(_) | PolicyKey::ClassAndService);
    let byte_order = if is_concatenation { 0 } else { BYTEORDER_BIG_ENDIAN };
    let mut userdata = userdata(UDATA_SET_KEYBYTEORDER, byte_order);
    if let Some(data_type) = form.data_type {
        let (length, byte_order) = match spec.value {
            PolicyValueKind::Class => (4_u32, BYTEORDER_HOST_ENDIAN),
            // The kernel knows how long a verdict is.
            PolicyValueKind::None | PolicyValueKind::Verdict => (0, 0),
        };
        message =
            message.with(NFTA_SET_DATA_TYPE, &data_type.to_be_bytes()).with(NFTA_SET_DATA_LEN, &length.to_be_bytes());
        userdata.extend(self::userdata(UDATA_SET_DATABYTEORDER, byte_order));
        userdata.extend(self::userdata(UDATA_SET_DATA_INTERVAL, 0));
    }
    if spec.key == PolicyKey::ClassAndService {
        // A class, a protocol and a port. The length of a field is in octets (net/netfilter/nf_tables_api.c `nft_set_desc_concat_parse`).
        let fields = [4_u32, 1, 2].iter().fold(Attributes::default(), |fields, length| {
            fields.nest(NFTA_LIST_ELEM, &Attributes::default().with(NFTA_SET_FIELD_LEN, &length.to_be_bytes()))
        });
        message = message.nest(NFTA_SET_DESC, &Attributes::default().nest(NFTA_SET_DESC_CONCAT, &fields));
    }
    let message = message.with(NFTA_SET_USERDATA, &userdata);
    Step::new("create", of_table("set", set), NLM_F_CREATE | NLM_F_EXCL, message)
}

/// What `nft` notes beside a set: type, length, and a number in the byte order of the host.
fn userdata(kind: u8, number: u32) -> Vec<u8> {
    [[kind, 4].as_slice(), &number.to_ne_bytes()].concat()
}

pub(super) fn delete_set(set: &str) -> Step {
    Step::new("delete", of_table("set", set), 0, message(NFT_MSG_DELSET).with(NFTA_SET_NAME, &name(set)))
}

/// Deletes all elements of a set.
pub(super) fn flush_set(set: &str) -> Step {
    let message = message(NFT_MSG_DELSETELEM).with(NFTA_SET_ELEM_LIST_SET, &name(set));
    Step::new("delete the elements of", of_table("set", set), 0, message)
}

/// Adds elements to a set.
pub(super) fn new_elements(name: &str, set: &PolicySet, elements: &Elements) -> Result<Vec<Step>, Error> {
    List { operation: "add elements to", number: NFT_MSG_NEWSETELEM, name }.steps(set, elements)
}

/// Deletes elements from a set.
pub(super) fn delete_elements(name: &str, set: &PolicySet, elements: &Elements) -> Result<Vec<Step>, Error> {
    List { operation: "delete elements from", number: NFT_MSG_DELSETELEM, name }.steps(set, elements)
}

/// A list of elements, in as many messages as it takes.
struct List<'a> {
    operation: &'static str,
    number: u16,
    name: &'a str,
}

impl List<'_> {
    fn steps(&self, set: &PolicySet, elements: &Elements) -> Result<Vec<Step>, Error> {
        let begin = HEADERS + self.message().attributes.bytes().len() + ATTRIBUTE;
        let (mut steps, mut list, mut places) = (Vec::new(), Attributes::default(), Vec::new());
        for (element, value) in elements {
            let parts = element::encode(set, element, value).ok_or_else(|| self.unfit(element))?;
            places.push((begin + list.bytes().len(), *element));
            for part in parts {
                list = list.nest(NFTA_LIST_ELEM, &part);
            }
            if list.bytes().len() >= ELEMENTS_BYTES {
                steps.push(self.step(&std::mem::take(&mut list), std::mem::take(&mut places)));
            }
        }
        if !places.is_empty() {
            steps.push(self.step(&list, places));
        }
        Ok(steps)
    }

    fn message(&self) -> Message {
        message(self.number).with(NFTA_SET_ELEM_LIST_SET, &name(self.name))
    }

    fn step(&self, list: &Attributes, elements: Vec<(usize, PolicyElement)>) -> Step {
        let message = self.message().nest(NFTA_SET_ELEM_LIST_ELEMENTS, list);
        let flags = if self.number == NFT_MSG_NEWSETELEM { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
        Step { elements, ..Step::new(self.operation, of_table("set", self.name), flags, message) }
    }

    fn unfit(&self, element: &PolicyElement) -> Error {
        Error::Refused(Refusal {
            operation: self.operation,
            object: of_table("set", self.name),
            errno: Errno::EINVAL,
            explanation: Some(format!("{element} is no element of a set of this type")),
        })
    }
}
