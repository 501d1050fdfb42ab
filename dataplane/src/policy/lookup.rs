//! Asks the kernel for the one element of a set that a key is found in, as a packet would find it.

use std::net::IpAddr;

use husk_overlay::kernel::policy::{PolicyElement, PolicyKey, PolicyValue, PolicyValueKind};
use husk_overlay::marks;
use husk_overlay::prefix::Family;
use nix::errno::Errno;

use super::decode::{self, Half};
use super::element::{self, Form};
use super::object;
use super::uapi::*;
use crate::error::Error;
use crate::netfilter::{Attributes, Message, attributes};
use crate::netlink::{Request, Socket};
use crate::nft::nfnetlink::{self, kind, name};

/// An element, with its value.
pub type Found = (PolicyElement, PolicyValue);

/// The element of a set or map that holds a key: an address, two addresses, or a class with a protocol and a port. None if there
/// is none, or no such set; a key of another type than the set's is in none of its elements.
///
/// # Errors
/// [`Error::Malformed`] when an answer is not understood, [`Error::Unsupported`] when the kernel has no nftables, and the errors
/// of a broken netlink exchange.
pub fn lookup(set: &str, key: &PolicyElement) -> Result<Option<Found>, Error> {
    let mut socket = nfnetlink::open()?;
    let question = message(NFT_MSG_GETSET, set);
    let Some(answer) = ask(&mut socket, set, question)? else { return Ok(None) };
    let form = decode::set_form(&answer).and_then(Form::kind);
    let Some((kind, value)) = form else {
        return Err(nfnetlink::malformed("look into", of_set(set), "it is of a type that Husk does not use"));
    };
    if let (PolicyKey::AddressRange(family), PolicyElement::Address(address)) = (kind, *key) {
        return range(&mut socket, &Question { set, value, family }, address);
    }
    let Some((first, _)) = element::keys(kind, key) else { return Ok(None) };
    let mut question = Attributes::default().nest(NFTA_SET_ELEM_KEY, &element::of_value(&first));
    if kind == PolicyKey::ClassAndService {
        question = question.nest(NFTA_SET_ELEM_KEY_END, &element::of_value(&first));
    }
    let Some(answer) = element(&mut socket, set, &question)? else { return Ok(None) };
    let found = Half::read(&answer, value).and_then(|half| half.whole(kind));
    found.map(Some).ok_or_else(|| unknown(set))
}

struct Question<'a> {
    set: &'a str,
    value: PolicyValueKind,
    family: Family,
}

/// The kernel tells where the interval of an address begins. Asked where it ends, it says nothing at all if that is the end of
/// the family, and names a later one if another interval begins there (net/netfilter/nft_set_rbtree.c `__nft_rbtree_get`, seen
/// with 6.18). So the last address whose interval begins where this one does is searched for by halves.
fn range(socket: &mut Socket, question: &Question<'_>, address: IpAddr) -> Result<Option<Found>, Error> {
    let Some((first, value)) = begin(socket, question, address)? else { return Ok(None) };
    let (mut within, mut limit) = (element::number(address), element::number(element::last(question.family)));
    while within < limit {
        let middle = within + (limit - within).div_ceil(2);
        let probe = element::numbered(question.family, middle);
        let found = begin(socket, question, probe)?;
        match found.filter(|(begin, _)| *begin == first) {
            Some(_) => within = middle,
            None => limit = middle - 1,
        }
    }
    let last = element::numbered(question.family, within);
    Ok(Some((PolicyElement::AddressRange(first, last), value)))
}

/// Begin and value of the interval that an address belongs to.
fn begin(
    socket: &mut Socket,
    question: &Question<'_>,
    address: IpAddr,
) -> Result<Option<(IpAddr, PolicyValue)>, Error> {
    let Some(key) = element::bytes(question.family, address) else { return Ok(None) };
    let key = Attributes::default().nest(NFTA_SET_ELEM_KEY, &element::of_value(&key));
    let Some(found) = element(socket, question.set, &key)? else { return Ok(None) };
    let half = Half::read(&found, question.value).ok_or_else(|| unknown(question.set))?;
    let first = half.address(question.family).ok_or_else(|| unknown(question.set))?;
    Ok(Some((first, half.value())))
}

fn element(socket: &mut Socket, set: &str, element: &Attributes) -> Result<Option<Vec<u8>>, Error> {
    let list = Attributes::default().nest(NFTA_LIST_ELEM, element);
    let question = message(NFT_MSG_GETSETELEM, set).nest(NFTA_SET_ELEM_LIST_ELEMENTS, &list);
    let Some(answer) = ask(socket, set, question)? else { return Ok(None) };
    let list = answer.get(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    let first = attributes(list).next().map(|(_, element)| element.to_vec());
    first.map(Some).ok_or_else(|| unknown(set))
}

fn message(number: u16, set: &str) -> Message {
    // A set and its elements are named in the same attributes.
    Message::new(kind(number), NFPROTO_INET)
        .with(NFTA_SET_TABLE, &name(marks::NFT_POLICY_TABLE))
        .with(NFTA_SET_NAME, &name(set))
}

fn ask(socket: &mut Socket, set: &str, message: Message) -> Result<Option<Attributes>, Error> {
    match socket.get(Request { operation: "look into", object: of_set(set), flags: 0, message }) {
        Ok(answer) => Ok(Some(answer.attributes)),
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
        Err(error) => Err(nfnetlink::explained("look into", of_set(set), error)),
    }
}

fn of_set(set: &str) -> String {
    format!("set {set} of {}", object())
}

fn unknown(set: &str) -> Error {
    nfnetlink::malformed("look into", of_set(set), "an element is of a form that Husk does not use")
}
