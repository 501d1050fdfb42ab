//! What the kernel answers, as what Husk would have made of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::kernel::Hook;
use husk_overlay::kernel::policy::{PolicyElement, PolicyKey, PolicySet, PolicyValue, PolicyValueKind, PolicyVerdict};
use husk_overlay::prefix::Family;

use super::element::{Form, last, previous};
use super::encode::hook_number;
use super::uapi::*;
use super::{ActualHook, ActualSet};
use crate::netfilter::{Attributes, attributes};

/// The form of a set; none for one without a name of its own, which goes with the rule it belongs to.
pub(super) fn set_form(set: &Attributes) -> Option<Form> {
    let flags = set.number(NFTA_SET_FLAGS).unwrap_or_default();
    if flags & NFT_SET_ANONYMOUS != 0 {
        return None;
    }
    let number = |kind| set.number(kind).unwrap_or_default();
    let data_type = (flags & NFT_SET_MAP != 0).then(|| number(NFTA_SET_DATA_TYPE));
    Some(Form { flags, key_type: number(NFTA_SET_KEY_TYPE), key_length: number(NFTA_SET_KEY_LEN), data_type })
}

/// Where packets meet a chain; none for one that goes with the rule it belongs to.
pub(super) fn chain_hook(chain: &Attributes) -> Option<ActualHook> {
    let flags = chain.number(NFTA_CHAIN_FLAGS).unwrap_or_default();
    if flags & NFT_CHAIN_BINDING != 0 {
        return None;
    }
    let Some(hook) = chain.nested(NFTA_CHAIN_HOOK) else {
        return Some(if flags == 0 { ActualHook::None } else { ActualHook::Foreign });
    };
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    let number = hook.number(NFTA_HOOK_HOOKNUM);
    let found = hooks.into_iter().find(|it| Some(hook_number(*it)) == number);
    let accepts = chain.number(NFTA_CHAIN_POLICY) == Some(NF_ACCEPT.cast_unsigned());
    let filters = chain.text(NFTA_CHAIN_TYPE) == Some("filter");
    Some(match (found, hook.number(NFTA_HOOK_PRIORITY)) {
        (Some(it), Some(priority)) if accepts && filters && flags & !NFT_CHAIN_BASE == 0 => {
            ActualHook::Base(it, priority.cast_signed())
        }
        _ => ActualHook::Foreign,
    })
}

/// The comment of a rule: a list of type, length and value of an octet each.
pub(super) fn rule_comment(rule: &Attributes) -> Option<String> {
    let mut rest = rule.get(NFTA_RULE_USERDATA)?;
    while let [kind, length, behind @ ..] = rest {
        let (value, behind) = behind.split_at_checked(usize::from(*length))?;
        if *kind == UDATA_RULE_COMMENT {
            return std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok().map(str::to_owned);
        }
        rest = behind;
    }
    None
}

/// The value of an element; none if it is not of the kind.
fn value(data: &[u8], kind: PolicyValueKind) -> Option<PolicyValue> {
    match kind {
        PolicyValueKind::None => None,
        PolicyValueKind::Class => {
            Some(PolicyValue::Class(u32::from_ne_bytes(within(data, NFTA_DATA_VALUE)?.try_into().ok()?)))
        }
        PolicyValueKind::Verdict => verdict(within(data, NFTA_DATA_VERDICT)?).map(PolicyValue::Verdict),
    }
}

fn within(list: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(list).find(|(it, _)| *it == kind).map(|(_, value)| value)
}

fn verdict(list: &[u8]) -> Option<PolicyVerdict> {
    let code = i32::from_be_bytes(within(list, NFTA_VERDICT_CODE)?.try_into().ok()?);
    let chain = match within(list, NFTA_VERDICT_CHAIN) {
        Some(name) => Some(std::str::from_utf8(name.strip_suffix(&[0]).unwrap_or(name)).ok()?),
        None => None,
    };
    match (code, chain) {
        (NF_ACCEPT, None) => Some(PolicyVerdict::Accept),
        (NF_DROP, None) => Some(PolicyVerdict::Drop),
        (NFT_RETURN, None) => Some(PolicyVerdict::Return),
        (NFT_JUMP, Some(chain)) => Some(PolicyVerdict::Jump(chain.into())),
        (NFT_GOTO, Some(chain)) => Some(PolicyVerdict::Goto(chain.into())),
        _ => None,
    }
}

/// One element as the kernel has it: for intervals of addresses a half.
pub(super) struct Half<'a> {
    key: &'a [u8],
    key_end: Option<&'a [u8]>,
    ends: bool,
    value: PolicyValue,
}

impl<'a> Half<'a> {
    /// None for an element of a form that Husk never makes.
    pub(super) fn read(element: &'a [u8], kind: PolicyValueKind) -> Option<Self> {
        let (mut key, mut key_end, mut flags, mut value) = (None, None, 0, PolicyValue::None);
        for (attribute, content) in attributes(element) {
            match attribute {
                NFTA_SET_ELEM_KEY => key = Some(within(content, NFTA_DATA_VALUE)?),
                NFTA_SET_ELEM_KEY_END => key_end = Some(within(content, NFTA_DATA_VALUE)?),
                NFTA_SET_ELEM_FLAGS => flags = u32::from_be_bytes(content.try_into().ok()?),
                NFTA_SET_ELEM_DATA => value = self::value(content, kind)?,
                // A comment, and what nft notes of its own.
                NFTA_SET_ELEM_USERDATA | NFTA_SET_ELEM_PAD => {}
                _ => return None,
            }
        }
        let ends = flags & NFT_SET_ELEM_INTERVAL_END != 0;
        let is_bare = value == PolicyValue::None;
        let fits = flags & !NFT_SET_ELEM_INTERVAL_END == 0 && is_bare == (kind == PolicyValueKind::None || ends);
        fits.then_some(Self { key: key?, key_end, ends, value })
    }

    pub(super) fn address(&self, family: Family) -> Option<IpAddr> {
        address(family, self.key)
    }

    pub(super) fn value(self) -> PolicyValue {
        self.value
    }

    /// The whole element, where it is one.
    pub(super) fn whole(self, key: PolicyKey) -> Option<(PolicyElement, PolicyValue)> {
        if self.ends || self.key_end.is_some() != (key == PolicyKey::ClassAndService) {
            return None;
        }
        let element = match key {
            PolicyKey::Address(family) => PolicyElement::Address(address(family, self.key)?),
            PolicyKey::AddressRange(_) => return None,
            PolicyKey::AddressPair(family) => {
                let (one, other) = self.key.split_at_checked(self.key.len() / 2)?;
                PolicyElement::AddressPair(address(family, one)?, address(family, other)?)
            }
            PolicyKey::ClassAndService => {
                let (first, last) = (class_and_service(self.key)?, class_and_service(self.key_end?)?);
                if first.0 != last.0 {
                    return None;
                }
                let (protocols, ports) = ((first.1, last.1), (first.2, last.2));
                PolicyElement::ClassAndService { class: first.0, protocols, ports }
            }
        };
        Some((element, self.value))
    }
}

fn address(family: Family, key: &[u8]) -> Option<IpAddr> {
    match family {
        Family::Ipv4 => Some(IpAddr::from(<[u8; 4]>::try_from(key).ok()?)),
        Family::Ipv6 => Some(IpAddr::from(<[u8; 16]>::try_from(key).ok()?)),
    }
}

fn class_and_service(key: &[u8]) -> Option<(u32, u8, u16)> {
    match *key {
        [a, b, c, d, protocol, 0, 0, 0, high, low, 0, 0] => {
            Some((u32::from_ne_bytes([a, b, c, d]), protocol, u16::from_be_bytes([high, low])))
        }
        _ => None,
    }
}

/// Gathers the elements of a set.
pub(super) struct Gatherer {
    key: PolicyKey,
    value: PolicyValueKind,
    elements: BTreeMap<PolicyElement, PolicyValue>,
    begins: Vec<(IpAddr, PolicyValue)>,
    ends: Vec<IpAddr>,
    spoilt: bool,
}

impl Gatherer {
    pub(super) fn new(key: PolicyKey, value: PolicyValueKind) -> Self {
        Self { key, value, elements: BTreeMap::new(), begins: Vec::new(), ends: Vec::new(), spoilt: false }
    }

    pub(super) fn add(&mut self, element: &[u8]) {
        self.spoilt |= self.take(element).is_none();
    }

    fn take(&mut self, element: &[u8]) -> Option<()> {
        let half = Half::read(element, self.value)?;
        match self.key {
            PolicyKey::AddressRange(family) if half.key_end.is_none() => {
                let address = half.address(family)?;
                if half.ends {
                    self.ends.push(address);
                } else {
                    self.begins.push((address, half.value));
                }
            }
            key => {
                let (element, value) = half.whole(key)?;
                self.elements.insert(element, value);
            }
        }
        Some(())
    }

    pub(super) fn finish(mut self) -> ActualSet {
        if let PolicyKey::AddressRange(family) = self.key {
            self.join(family);
        }
        let Self { key, value, elements, spoilt, .. } = self;
        if spoilt {
            return ActualSet::Spoilt { key, value };
        }
        ActualSet::Ours(PolicySet { key, value, elements }.into())
    }

    /// Finds to each begin of an interval its end. One that is missing means the last address of the family; nft puts an end
    /// before everything, where no interval begins.
    fn join(&mut self, family: Family) {
        self.begins.sort();
        self.ends.sort();
        let mut ends = std::mem::take(&mut self.ends).into_iter().filter(|end| previous(*end).is_some()).peekable();
        let mut begins = std::mem::take(&mut self.begins).into_iter().peekable();
        while let Some((first, value)) = begins.next() {
            while ends.next_if(|end| *end <= first).is_some() {
                self.spoilt = true;
            }
            let next = begins.peek().map(|(next, _)| *next);
            let last = match ends.next_if(|end| next.is_none_or(|next| *end <= next)) {
                Some(end) => previous(end),
                None if next.is_none() => Some(last(family)),
                None => None,
            };
            match last {
                Some(last) => {
                    self.elements.insert(PolicyElement::AddressRange(first, last), value);
                }
                None => self.spoilt = true,
            }
        }
        self.spoilt |= ends.next().is_some();
    }
}
