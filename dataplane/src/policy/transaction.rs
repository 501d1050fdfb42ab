//! Changes as one transaction.
//!
//! The kernel looks at the requests one after another and refuses to delete what is still referred to, also by what the same
//! transaction has not deleted yet, and to refer to what is not made yet. So rules go first, then elements, which may lead to
//! chains; then sets, chains and objects; then these are made, filled, and rules come last. Elements go before others come,
//! since an interval may grow over its neighbours.

use super::change::PolicyChange;
use super::encode::{self, Step};
use super::uapi::{NFT_OBJECT_COUNTER, SUBSYSTEM};
use super::{ForeignObject, object};
use crate::error::Error;
use crate::netlink::{Rejection, Socket};
use husk_overlay::kernel::policy::{PolicyChain, PolicySet, PolicyTable};

/// Makes all changes or none; returns how many octets were sent. A table that is made belongs to the socket if `owned`.
pub(super) fn send(socket: &mut Socket, changes: &[PolicyChange], owned: bool) -> Result<usize, Error> {
    let mut phases = Phases { owned, ..Phases::default() };
    for change in changes {
        phases.change(change)?;
    }
    send_steps(socket, phases.in_order())
}

/// Makes the steps or none of them.
pub(super) fn send_steps(socket: &mut Socket, steps: impl IntoIterator<Item = Step>) -> Result<usize, Error> {
    let mut elements = Vec::new();
    let mut requests = Vec::new();
    for step in steps {
        let Step { request, elements: within } = step;
        requests.push(request);
        elements.push(within);
    }
    socket.transaction(SUBSYSTEM, ("change", object()), requests).map_err(|Rejection { error, place }| {
        let element = place.and_then(|(index, offset)| encode::element_at(elements.get(index)?, offset));
        match (error, element) {
            (Error::Refused(mut refusal), Some(element)) => {
                refusal.object = format!("{} ({element})", refusal.object);
                Error::Refused(refusal)
            }
            (error, _) => error,
        }
    })
}

/// Requests by phase; within a phase in the order they came.
#[derive(Default)]
struct Phases {
    tables: Vec<Step>,
    flush_chains: Vec<Step>,
    delete_elements: Vec<Step>,
    delete_sets: Vec<Step>,
    delete_chains: Vec<Step>,
    delete_objects: Vec<Step>,
    objects: Vec<Step>,
    sets: Vec<Step>,
    chains: Vec<Step>,
    elements: Vec<Step>,
    rules: Vec<Step>,
    /// Sets made so far.
    count: u32,
    owned: bool,
}

impl Phases {
    fn in_order(self) -> impl Iterator<Item = Step> {
        let deleted =
            [self.flush_chains, self.delete_elements, self.delete_sets, self.delete_chains, self.delete_objects];
        let made = [self.objects, self.sets, self.chains, self.elements, self.rules];
        [self.tables].into_iter().chain(deleted).chain(made).flatten()
    }

    fn change(&mut self, change: &PolicyChange) -> Result<(), Error> {
        match change {
            PolicyChange::CreateTable { table } => {
                self.tables.push(encode::new_table(self.owned));
                self.table(table)?;
            }
            PolicyChange::ReplaceTable { table, .. } => {
                // It may be gone meanwhile: what is made first can be deleted in any case.
                let fresh = encode::new_table(self.owned);
                self.tables.extend([encode::any_table(), encode::delete_table(), fresh]);
                self.table(table)?;
            }
            PolicyChange::DeleteTable => self.tables.extend([encode::any_table(), encode::delete_table()]),
            PolicyChange::AddCounter { name } => self.objects.push(encode::new_counter(name)),
            PolicyChange::DeleteCounter { name } => {
                let counter = ForeignObject::Stateful(NFT_OBJECT_COUNTER, name.clone());
                self.delete_objects.push(encode::delete_object(&counter));
            }
            PolicyChange::AddSet { name, set } => self.set(name, set)?,
            PolicyChange::ReplaceSet { name, set } => {
                self.delete_set(name);
                self.set(name, set)?;
            }
            PolicyChange::RefillSet { name, set } => {
                self.delete_elements.push(encode::flush_set(name));
                self.elements.extend(encode::new_elements(name, set, &set.elements)?);
            }
            PolicyChange::AddElements { name, elements, set } => {
                self.elements.extend(encode::new_elements(name, set, elements)?);
            }
            PolicyChange::DeleteElements { name, elements, set } => {
                self.delete_elements.extend(encode::delete_elements(name, set, elements)?);
            }
            PolicyChange::DeleteSet { name } => self.delete_set(name),
            PolicyChange::AddChain { name, chain } => self.chain(name, chain),
            PolicyChange::ReplaceChain { name, chain, .. } => {
                self.delete_chain(name);
                self.chain(name, chain);
            }
            PolicyChange::RebuildChain { name, chain, .. } => {
                self.flush_chains.push(encode::flush_chain(name));
                self.rules(name, chain);
            }
            PolicyChange::DeleteChain { name } => self.delete_chain(name),
            PolicyChange::DeleteForeign { object } => self.delete_objects.push(encode::delete_object(object)),
        }
        Ok(())
    }

    fn table(&mut self, table: &PolicyTable) -> Result<(), Error> {
        self.objects.extend(table.counters.iter().map(|name| encode::new_counter(name)));
        for (name, set) in &table.sets {
            self.set(name, set)?;
        }
        for (name, chain) in &table.chains {
            self.chain(name, chain);
        }
        Ok(())
    }

    fn set(&mut self, name: &str, set: &PolicySet) -> Result<(), Error> {
        self.count += 1;
        self.sets.push(encode::new_set(name, set, self.count));
        self.elements.extend(encode::new_elements(name, set, &set.elements)?);
        Ok(())
    }

    /// Kernels before 6.5 do not let go of the chains that the elements of a map lead to when the map is deleted.
    fn delete_set(&mut self, name: &str) {
        self.delete_elements.push(encode::flush_set(name));
        self.delete_sets.push(encode::delete_set(name));
    }

    fn chain(&mut self, name: &str, chain: &PolicyChain) {
        self.chains.push(encode::new_chain(name, chain));
        self.rules(name, chain);
    }

    fn delete_chain(&mut self, name: &str) {
        self.flush_chains.push(encode::flush_chain(name));
        self.delete_chains.push(encode::delete_chain(name));
    }

    fn rules(&mut self, name: &str, chain: &PolicyChain) {
        let rules = chain.rules.iter().zip(1..);
        self.rules.extend(rules.map(|(rule, number)| encode::new_rule(name, number, rule)));
    }
}
