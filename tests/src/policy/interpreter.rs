//! What a kernel does with a packet by a table, read from the documentation of nftables and the kernel's sources: no look at how
//! the table came about, and none at how it gets into a kernel.
//!
//! A table that a kernel would refuse, or that would not mean what it seems to, is an error: a rule that names what is not there,
//! elements that overlap or are of another type than their set, jumps in a circle or to a base chain.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use husk_overlay::kernel::policy::{
    PolicyAction, PolicyChain, PolicyClass, PolicyElement, PolicyField, PolicyKey, PolicyMatch, PolicyRule, PolicySet,
    PolicyTable, PolicyValue, PolicyValueKind, PolicyVerdict,
};
use husk_overlay::kernel::{CounterName, Hook};
use husk_overlay::prefix::Family;

use super::Flow;

/// Chains that may wait for others (`NFT_JUMP_STACK_SIZE`, include/net/netfilter/nf_tables.h).
const STACK: usize = 16;

/// An interface that a packet comes from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interface {
    /// Host end of a pod's veth pair.
    Pod,
    /// Tunnel of the overlay; its name, too, begins with `husk`.
    Tunnel,
    /// Any other.
    Other,
}

/// A packet on its way.
#[derive(Debug, Clone, Copy)]
pub struct Packet {
    /// Where it came from; none for one that this host sends.
    pub input: Option<Interface>,
    /// Where it goes; none before it is routed, and for one to this host.
    pub output: Option<Interface>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Its connection; none for a packet that connection tracking knows nothing of.
    pub connection: Option<Flow>,
}

/// What became of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// It goes on.
    pub passes: bool,
    /// Counters that counted it, in order.
    pub counted: Vec<CounterName>,
}

/// A table, checked.
#[derive(Debug, Clone)]
pub struct Interpreter<'t> {
    table: &'t PolicyTable,
    /// Base chains, the lowest priority first.
    bases: Vec<(i32, Hook, &'t PolicyChain)>,
}

/// What is looked up.
#[derive(Clone, Copy)]
enum Key {
    Address(IpAddr),
    Pair(IpAddr, IpAddr),
    Service { class: u32, protocol: u8, port: u16 },
}

impl<'t> Interpreter<'t> {
    /// Checks the table.
    ///
    /// # Errors
    /// When a kernel would refuse it.
    pub fn new(table: &'t PolicyTable) -> Result<Self> {
        let mut bases = Vec::new();
        for chain in table.chains.values() {
            bases.extend(chain.hook.map(|(hook, priority)| (priority, hook, chain.as_ref())));
        }
        bases.sort_by_key(|(priority, ..)| *priority);
        let it = Self { table, bases };
        for (name, set) in &table.sets {
            it.check_set(set).with_context(|| format!("set {name}"))?;
        }
        for (name, chain) in &table.chains {
            let what = || format!("chain {name}");
            chain.rules.iter().try_for_each(|rule| it.check_rule(rule)).with_context(what)?;
            it.check_depth(chain, 0).with_context(what)?;
        }
        Ok(it)
    }

    fn check_set(&self, set: &PolicySet) -> Result<()> {
        for (element, value) in &set.elements {
            let of_family = |family, all: [&IpAddr; 2]| all.into_iter().all(|it| Family::of(*it) == family);
            let right = match (set.key, element) {
                (PolicyKey::Address(family), PolicyElement::Address(it)) => of_family(family, [it, it]),
                (PolicyKey::AddressRange(family), PolicyElement::AddressRange(first, last)) => {
                    of_family(family, [first, last]) && first <= last
                }
                (PolicyKey::AddressPair(family), PolicyElement::AddressPair(one, other)) => {
                    of_family(family, [one, other])
                }
                (PolicyKey::ClassAndService, PolicyElement::ClassAndService { protocols, ports, .. }) => {
                    protocols.0 <= protocols.1 && ports.0 <= ports.1
                }
                _ => false,
            };
            ensure!(right, "{element} is no key of it");
            match (set.value, value) {
                (PolicyValueKind::None, PolicyValue::None) | (PolicyValueKind::Class, PolicyValue::Class(_)) => {}
                (PolicyValueKind::Verdict, PolicyValue::Verdict(verdict)) => self.check_verdict(verdict)?,
                _ => bail!("{element}{value} has a value of another type"),
            }
        }
        let elements: Vec<&PolicyElement> = set.elements.keys().collect();
        for (index, one) in elements.iter().enumerate() {
            if let Some(other) = elements[index + 1..].iter().find(|other| overlap(one, other)) {
                bail!("{one} and {other} overlap");
            }
        }
        Ok(())
    }

    fn check_rule(&self, rule: &PolicyRule) -> Result<()> {
        if let Some(counter) = &rule.counter {
            ensure!(self.table.counters.contains(counter), "there is no counter {counter}");
        }
        for wanted in &rule.matches {
            if let PolicyMatch::In(field, set) | PolicyMatch::NotIn(field, set) = wanted {
                self.check_use(*field, set, None)?;
            }
        }
        match &rule.action {
            PolicyAction::Continue => Ok(()),
            PolicyAction::Verdict(verdict) => self.check_verdict(verdict),
            PolicyAction::Lookup(field, map) => self.check_use(*field, map, Some(PolicyValueKind::Verdict)),
            PolicyAction::Judge { class, services } => {
                if let PolicyClass::Of(field, map) = class {
                    self.check_use(*field, map, Some(PolicyValueKind::Class))?;
                }
                let services = self.set(services)?;
                ensure!(services.key == PolicyKey::ClassAndService, "services by other keys: {:?}", services.key);
                ensure!(services.value == PolicyValueKind::Verdict, "services without verdicts");
                Ok(())
            }
        }
    }

    /// A field is looked up in a set whose keys are of its type, and whose values are what is wanted of them.
    fn check_use(&self, field: PolicyField, name: &str, value: Option<PolicyValueKind>) -> Result<()> {
        let set = self.set(name)?;
        let fits = match field {
            PolicyField::OriginatorAndResponder(family) => set.key == PolicyKey::AddressPair(family),
            _ => [PolicyKey::Address(field.family()), PolicyKey::AddressRange(field.family())].contains(&set.key),
        };
        ensure!(fits, "{field:?} is no key of set {name}: {:?}", set.key);
        ensure!(value.is_none_or(|value| value == set.value), "set {name} has values of type {:?}", set.value);
        Ok(())
    }

    fn check_verdict(&self, verdict: &PolicyVerdict) -> Result<()> {
        if let PolicyVerdict::Jump(name) | PolicyVerdict::Goto(name) = verdict {
            ensure!(self.chain(name)?.hook.is_none(), "a jump to base chain {name}");
        }
        Ok(())
    }

    /// Follows every way that a packet may take.
    fn check_depth(&self, chain: &'t PolicyChain, depth: usize) -> Result<()> {
        ensure!(depth < STACK, "chains lead to chains without end");
        let mut next: BTreeSet<&str> = BTreeSet::new();
        let mut collect = |verdict: &'t PolicyVerdict| {
            if let PolicyVerdict::Jump(name) | PolicyVerdict::Goto(name) = verdict {
                next.insert(name);
            }
        };
        for rule in &chain.rules {
            match &rule.action {
                PolicyAction::Verdict(verdict) => collect(verdict),
                PolicyAction::Lookup(_, map) | PolicyAction::Judge { services: map, .. } => {
                    for value in self.set(map)?.elements.values() {
                        if let PolicyValue::Verdict(verdict) = value {
                            collect(verdict);
                        }
                    }
                }
                PolicyAction::Continue => {}
            }
        }
        next.into_iter().try_for_each(|name| self.check_depth(self.chain(name)?, depth + 1))
    }

    fn set(&self, name: &str) -> Result<&'t PolicySet> {
        self.table.sets.get(name).map(AsRef::as_ref).with_context(|| format!("there is no set {name}"))
    }

    fn chain(&self, name: &str) -> Result<&'t PolicyChain> {
        self.table.chains.get(name).map(AsRef::as_ref).with_context(|| format!("there is no chain {name}"))
    }

    /// Sends a packet through the base chains of a hook, the lowest priority first. What one accepts the next ones may drop.
    ///
    /// # Errors
    /// When the table is one that was not checked.
    pub fn evaluate(&self, hook: Hook, packet: &Packet) -> Result<Outcome> {
        let mut counted = Vec::new();
        for (.., base) in self.bases.iter().filter(|(_, at, _)| *at == hook) {
            if !self.passes(base, packet, &mut counted)? {
                return Ok(Outcome { passes: false, counted });
            }
        }
        Ok(Outcome { passes: true, counted })
    }

    fn passes(&self, base: &'t PolicyChain, packet: &Packet, counted: &mut Vec<CounterName>) -> Result<bool> {
        let mut waiting: Vec<std::slice::Iter<'t, PolicyRule>> = Vec::new();
        let mut rules = base.rules.iter();
        loop {
            let Some(rule) = rules.next() else {
                // The end of a chain is a return from it, and that of a base chain its policy.
                let Some(before) = waiting.pop() else { return Ok(true) };
                rules = before;
                continue;
            };
            match self.step(rule, packet, counted)? {
                None => {}
                Some(PolicyVerdict::Accept) => return Ok(true),
                Some(PolicyVerdict::Drop) => return Ok(false),
                Some(PolicyVerdict::Return) => rules = [].iter(),
                Some(PolicyVerdict::Goto(name)) => rules = self.chain(name)?.rules.iter(),
                Some(PolicyVerdict::Jump(name)) => {
                    waiting.push(std::mem::replace(&mut rules, self.chain(name)?.rules.iter()));
                }
            }
        }
    }

    /// The verdict that a rule has on a packet; none where the next rule goes on.
    fn step(
        &self,
        rule: &'t PolicyRule,
        packet: &Packet,
        counted: &mut Vec<CounterName>,
    ) -> Result<Option<&'t PolicyVerdict>> {
        for wanted in &rule.matches {
            if !self.matches(wanted, packet)? {
                return Ok(None);
            }
        }
        counted.extend(rule.counter.clone());
        let found = match &rule.action {
            PolicyAction::Continue => return Ok(None),
            PolicyAction::Verdict(verdict) => return Ok(Some(verdict)),
            PolicyAction::Lookup(field, map) => self.find(map, packet.field(*field))?,
            PolicyAction::Judge { class, services } => {
                let class = match class {
                    PolicyClass::Always(class) => Some(*class),
                    PolicyClass::Of(field, map) => match self.find(map, packet.field(*field))? {
                        Some(PolicyValue::Class(class)) => Some(*class),
                        _ => None,
                    },
                };
                let service = class.zip(packet.connection);
                let key = service.map(|(class, Flow { protocol, port, .. })| Key::Service { class, protocol, port });
                self.find(services, key)?
            }
        };
        Ok(match found {
            Some(PolicyValue::Verdict(verdict)) => Some(verdict),
            _ => None,
        })
    }

    fn matches(&self, wanted: &PolicyMatch, packet: &Packet) -> Result<bool> {
        Ok(match wanted {
            PolicyMatch::Family(family) => Family::of(packet.source) == *family,
            PolicyMatch::FromPod => packet.input == Some(Interface::Pod),
            PolicyMatch::ToPod => packet.output == Some(Interface::Pod),
            PolicyMatch::Stateless => packet.connection.is_none(),
            // Whether it is the first packet for a while is not known here.
            PolicyMatch::Below { .. } => true,
            PolicyMatch::In(field, set) => self.find(set, packet.field(*field))?.is_some(),
            PolicyMatch::NotIn(field, set) => {
                let field = packet.field(*field);
                field.is_some() && self.find(set, field)?.is_none()
            }
        })
    }

    fn find(&self, name: &str, key: Option<Key>) -> Result<Option<&'t PolicyValue>> {
        let Some(key) = key else { return Ok(None) };
        let mut elements = self.set(name)?.elements.iter();
        Ok(elements.find(|(element, _)| holds(element, key)).map(|(_, value)| value))
    }
}

impl Packet {
    /// A field; none of a packet that does not have it.
    fn field(&self, field: PolicyField) -> Option<Key> {
        let connection = self.connection;
        let key = match field {
            PolicyField::Source(_) => Key::Address(self.source),
            PolicyField::Destination(_) => Key::Address(self.destination),
            PolicyField::Originator(_) => Key::Address(connection?.from),
            PolicyField::Responder(_) => Key::Address(connection?.to),
            PolicyField::OriginatorAndResponder(_) => Key::Pair(connection?.from, connection?.to),
        };
        (Family::of(self.source) == field.family()).then_some(key)
    }
}

fn holds(element: &PolicyElement, key: Key) -> bool {
    match (element, key) {
        (PolicyElement::Address(it), Key::Address(address)) => *it == address,
        (PolicyElement::AddressRange(first, last), Key::Address(address)) => (first..=last).contains(&&address),
        (PolicyElement::AddressPair(one, other), Key::Pair(first, second)) => (*one, *other) == (first, second),
        (PolicyElement::ClassAndService { class: of, protocols, ports }, Key::Service { class, protocol, port }) => {
            *of == class && (protocols.0..=protocols.1).contains(&protocol) && (ports.0..=ports.1).contains(&port)
        }
        _ => false,
    }
}

fn overlap(one: &PolicyElement, other: &PolicyElement) -> bool {
    match (one, other) {
        (PolicyElement::AddressRange(first, last), PolicyElement::AddressRange(from, to)) => {
            first <= to && from <= last
        }
        (
            PolicyElement::ClassAndService { class, protocols, ports },
            PolicyElement::ClassAndService { class: of, protocols: others, ports: theirs },
        ) => {
            class == of
                && protocols.0 <= others.1
                && others.0 <= protocols.1
                && ports.0 <= theirs.1
                && theirs.0 <= ports.1
        }
        _ => one == other,
    }
}
