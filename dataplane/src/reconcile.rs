//! One pass: read, compare, change, table by table.
//!
//! The order makes before it breaks, and protects before it forwards:
//!
//! 1. the nftables tables, IPsec policies that block plaintext, then unreachable routes: from here on nothing leaks;
//! 2. devices, and kernel parameters, which turn forwarding on and may belong to a device; keys and peers, addresses,
//!    neighbours, forwarding entries, and at last the routes that use them;
//! 3. what is not desired goes, in the reverse order.
//!
//! What protects are the nftables tables, the policies that block, and the floor of unreachable routes. While one of them is
//! not as desired, because it could not be read or changed, forwarding is not turned on and no route is made to lead
//! anywhere: both wait for a later pass. What is there already stays, so that running pods do not suffer for it; and while
//! the floor is not there, no route is taken away either, alone or with its device, since the packets would find the default
//! route.
//!
//! Each table is read when its turn comes, after the changes to those before it, so that one pass converges also when a
//! device was made anew and took its addresses and routes with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use husk_overlay::kernel::{Desired, RouteTarget, XfrmAction};
use husk_overlay::name::InterfaceName;

use crate::error::Error;
use crate::kernel::{Actual, Change, Kernel, Table, diff_table};
use crate::sweep::Sweep;
use crate::wireguard::KeyRing;

/// What a pass came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Changes that were made, by table; tables without any are absent.
    pub applied: BTreeMap<Table, usize>,
    /// What went wrong.
    pub failures: Vec<Failure>,
    /// Why connections through port mappings that are gone may go on.
    pub lingering: Option<Error>,
    /// How long each table took: reading, comparing and changing it. Those that were not looked at are absent.
    pub took: BTreeMap<Table, Duration>,
}

/// Something that went wrong in a pass.
#[derive(Debug)]
pub struct Failure {
    /// Table.
    pub table: Table,
    /// The change that was refused; none when the table could not be read, and for changes that were withheld.
    pub change: Option<Change>,
    /// Why.
    pub error: Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.change {
            Some(change) => write!(f, "cannot {change}: {}", self.error),
            None => self.error.fmt(f),
        }
    }
}

impl Outcome {
    /// True if everything was read and every change succeeded: the kernel is as desired.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty() && self.lingering.is_none()
    }

    /// Number of changes that were made.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.applied.values().sum()
    }
}

/// Reads all tables, for `huskctl diff`. Tables that could not be read are marked so, with the reasons.
pub fn survey<K: Kernel + ?Sized>(kernel: &mut K, desired: &Desired) -> (Actual, Vec<Failure>) {
    let mut actual = Actual::default();
    let mut failures = Vec::new();
    // Links first: they give the other tables' interface numbers their names.
    for table in [Table::Links].into_iter().chain(Table::ALL.into_iter().filter(|table| *table != Table::Links)) {
        if let Err(error) = kernel.read(table, desired, &mut actual) {
            actual.unread.insert(table);
            failures.push(Failure { table, change: None, error });
        }
    }
    (actual, failures)
}

/// Makes the kernel as desired, as far as it lets us. A failure is recorded and stops nothing else.
pub fn reconcile<K: Kernel + ?Sized>(kernel: &mut K, desired: &Desired, keys: &KeyRing, sweep: Sweep) -> Outcome {
    let mut pass = Pass::new(kernel, desired, keys, sweep);
    pass.guard();
    pass.block();
    pass.devices_over_unreachable_routes();
    for table in Table::ALL.into_iter().filter(|table| !matches!(table, Table::Nft | Table::Policy | Table::Links)) {
        pass.table(table);
    }
    pass.remove();
    pass.outcome
}

/// Makes the table of network policy as desired, and nothing else: for changes of policy, which are urgent and frequent.
/// Neither keys nor the sweep have a part in it.
pub fn reconcile_policy<K: Kernel + ?Sized>(kernel: &mut K, desired: &Desired) -> Outcome {
    let keys = KeyRing::default();
    let mut pass = Pass::new(kernel, desired, &keys, Sweep::Withheld);
    pass.table(Table::Policy);
    pass.remove();
    pass.outcome
}

struct Pass<'a, K: ?Sized> {
    kernel: &'a mut K,
    desired: &'a Desired,
    keys: &'a KeyRing,
    sweep: Sweep,
    actual: Actual,
    removals: Vec<Change>,
    /// Tables that were read ahead and are there as they were read: nothing that touches them was changed since.
    current: BTreeSet<Table>,
    /// Why the nftables table is not as desired, if it is not.
    unguarded: Option<String>,
    /// The same of the table of network policy.
    unpoliced: Option<String>,
    /// Why not all IPsec policies that block are there, if they are not.
    unblocked: Option<String>,
    /// Why the floor of unreachable routes is not as desired, if it is not.
    floorless: Option<String>,
    outcome: Outcome,
}

/// What may not be in place, in words.
const GUARD: &str = "the guard (nftables table inet husk)";
const POLICY: &str = "network policy (nftables table inet husk-policy)";
const BLOCK: &str = "the block of plaintext (IPsec policies)";
const FLOOR: &str = "the floor of unreachable routes";

impl<'a, K: Kernel + ?Sized> Pass<'a, K> {
    fn new(kernel: &'a mut K, desired: &'a Desired, keys: &'a KeyRing, sweep: Sweep) -> Self {
        Self {
            kernel,
            desired,
            keys,
            sweep,
            actual: Actual::default(),
            removals: Vec::new(),
            current: BTreeSet::new(),
            unguarded: None,
            unpoliced: None,
            unblocked: None,
            floorless: None,
            outcome: Outcome::default(),
        }
    }

    /// The nftables tables, and the connections that the first of them has translated. Without a table that is desired there is
    /// nothing that could be missing.
    fn guard(&mut self) {
        let before = self.outcome.failures.len();
        self.table(Table::Nft);
        if self.desired.nft.is_some() {
            self.unguarded = self.first_reason_since(before);
        }
        let mapped = self.outcome.failures.len() == before;
        let before = self.outcome.failures.len();
        self.table(Table::Policy);
        if self.desired.policy.is_some() {
            self.unpoliced = self.first_reason_since(before);
        }
        // After the mappings, so that no packet begins a connection of the old kind again.
        if mapped {
            self.outcome.lingering = self.kernel.settle_connections(self.desired, self.sweep).err();
        }
    }

    /// Works on a table, and adds to its time.
    fn timed<T>(&mut self, table: Table, work: impl FnOnce(&mut Self) -> T) -> T {
        let started = Instant::now();
        let result = work(self);
        *self.outcome.took.entry(table).or_default() += started.elapsed();
        result
    }

    /// Reads a table and makes what `chosen` says cannot wait for the rest of it.
    fn ahead(&mut self, table: Table, chosen: fn(&Change) -> bool) {
        self.timed(table, |pass| {
            if pass.read(table) {
                pass.current.insert(table);
                let mut changes = diff_table(table, pass.desired, &pass.actual, Sweep::Withheld);
                changes.retain(chosen);
                pass.apply(changes);
            }
        });
    }

    /// The policies that keep plaintext from leaving, before there is a device that could send any.
    fn block(&mut self) {
        if !self.desired.xfrm_policies.values().any(|policy| policy.action == XfrmAction::Block) {
            return;
        }
        let before = self.outcome.failures.len();
        self.ahead(Table::XfrmPolicies, Change::blocks);
        self.unblocked = self.first_reason_since(before);
    }

    fn first_reason_since(&self, before: usize) -> Option<String> {
        let mut failures = self.outcome.failures[before..].iter().map(|failure| &failure.error);
        failures.find(|error| !matches!(error, Error::WithTheOthers)).map(ToString::to_string)
    }

    /// Reads a table and makes what has to be made; removals are kept for later.
    fn table(&mut self, table: Table) {
        let known = self.current.contains(&table);
        self.timed(table, |pass| {
            if known || pass.read(table) {
                pass.change(table);
            }
        });
    }

    /// Makes what a table that was read lacks; removals are kept for later.
    fn change(&mut self, table: Table) {
        let changes = diff_table(table, self.desired, &self.actual, self.sweep);
        let (removals, changes) = changes.into_iter().partition(Change::is_removal);
        self.removals.extend::<Vec<_>>(removals);
        self.apply(changes);
    }

    /// Links are read before the unreachable routes are made, for the names of interfaces, and changed after.
    fn devices_over_unreachable_routes(&mut self) {
        let links_known = self.timed(Table::Links, |pass| pass.read(Table::Links));
        let before = self.outcome.failures.len();
        self.ahead(Table::Routes, Change::makes_unreachable);
        if self.desired.routes.values().any(|route| route.target == RouteTarget::Unreachable) {
            self.floorless = self.first_reason_since(before);
        }
        if links_known {
            self.timed(Table::Links, |pass| pass.change(Table::Links));
        }
    }

    /// Removes what is not desired, tables in reverse.
    fn remove(&mut self) {
        let mut removals = std::mem::take(&mut self.removals);
        let doomed: BTreeSet<InterfaceName> = removals
            .iter()
            .filter_map(|change| match change {
                Change::Link(link) => Some(link.interface().clone()),
                _ => None,
            })
            .collect();
        // What a device carries goes with it.
        removals.retain(|change| !change.carrier().is_some_and(|interface| doomed.contains(interface)));
        removals.sort_by_key(|change| std::cmp::Reverse(change.table()));
        for group in removals.chunk_by(|one, next| one.table() == next.table()) {
            self.timed(group[0].table(), |pass| pass.apply(group.to_vec()));
        }
    }

    fn read(&mut self, table: Table) -> bool {
        match self.kernel.read(table, self.desired, &mut self.actual) {
            Ok(()) => true,
            Err(error) => {
                self.outcome.failures.push(Failure { table, change: None, error });
                false
            }
        }
    }

    /// Changes that may be made as things stand; the others are reported as withheld, those of a table together.
    fn permitted(&mut self, changes: Vec<Change>) -> Vec<Change> {
        let unsafe_without = |change: &Change| {
            let guard = self.unguarded.as_ref().map(|reason| (GUARD, reason)).filter(|_| change.opens());
            let block = self.unblocked.as_ref().map(|reason| (BLOCK, reason)).filter(|_| change.opens());
            let floor = self.floorless.as_ref().map(|reason| (FLOOR, reason));
            let policy = self.unpoliced.as_ref().map(|reason| (POLICY, reason)).filter(|_| change.opens());
            guard.or(policy).or(block).or_else(|| floor.filter(|_| change.opens() || change.uncovers()))
        };
        let Some((missing, reason)) = changes.iter().find_map(unsafe_without) else { return changes };
        let reason = reason.clone();
        let (withheld, permitted): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|change| unsafe_without(change).is_some());
        let (table, withheld) = (withheld[0].table(), summary(&withheld));
        let error = Error::Withheld { withheld, missing, reason };
        self.outcome.failures.push(Failure { table, change: None, error });
        permitted
    }

    fn apply(&mut self, changes: Vec<Change>) {
        let changes = self.permitted(changes);
        if changes.is_empty() {
            return;
        }
        let touches_routes =
            |change: &Change| matches!(change.table(), Table::Links | Table::Addresses | Table::Routes);
        if changes.iter().any(touches_routes) {
            self.current.remove(&Table::Routes);
        }
        if changes.iter().any(|change| change.table() == Table::XfrmPolicies) {
            self.current.remove(&Table::XfrmPolicies);
        }
        let results = self.kernel.apply(&changes, self.keys);
        for (change, result) in changes.into_iter().zip(results) {
            let table = change.table();
            match result {
                Ok(()) => *self.outcome.applied.entry(table).or_default() += 1,
                Err(error) => self.outcome.failures.push(Failure { table, change: Some(change), error }),
            }
        }
    }
}

/// The first of some changes in words, and how many more there are.
fn summary(changes: &[Change]) -> String {
    match changes {
        [] => "nothing is".to_owned(),
        [one] => format!("\"{one}\" is"),
        [first, rest @ ..] => format!("\"{first}\" and {} more changes are", rest.len()),
    }
}
