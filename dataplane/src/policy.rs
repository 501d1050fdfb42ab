//! The nftables table `inet husk-policy`, which enforces network policy.
//!
//! - Its sets grow with the cluster, so it is read and changed over netlink itself (nfnetlink's subsystem nftables), without
//!   `nft`, element by element: the cost of a change is that of what changes.
//! - Packets meet the rules before a change or those after it: one transaction switches from the old to the new, one before it
//!   brings what is new, and one after it takes away what is not needed any more. A refused transaction changes nothing.
//! - Every rule carries a comment `husk:<digest of what it consists of>`, and a chain is right when its comments are, in order;
//!   sets are right when their elements are. The table is ours alone: whatever else stands in it goes.
//! - From Linux 6.9 on a table can belong to a process and outlive it: nobody else changes it then, not even by flushing all
//!   rules. The daemon's does ([`Live::owning`]); the next daemon adopts what the one before it has left.
//! - The kernel numbers the generations of its rules, whosever they are. While the number is the one that was read before, or the
//!   next one after a change of our own, what is known of the table is true, and is not read again ([`Live`]).
//! - An incremental transaction that the kernel does not take, since the table is not as it was thought to be or for a quirk of
//!   its sets, is made once more as a replacement of the whole table.

mod change;
mod decode;
mod diff;
mod element;
mod encode;
mod live;
mod lookup;
mod read;
mod rule;
mod stages;
mod transaction;
mod uapi;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use husk_overlay::kernel::policy::{PolicyChain, PolicyKey, PolicyName, PolicySet, PolicyTable, PolicyValueKind};
use husk_overlay::kernel::{CounterName, Hook};
use husk_overlay::marks;

pub use change::PolicyChange;
pub use diff::{diff, without_removals};
pub use live::{Applied, Live};
pub use lookup::{Found, lookup};
pub use read::read;

use crate::error::Error;
use crate::nft::{CounterValue, nfnetlink};

/// What the kernel holds of the table, as far as it can be compared with a [`PolicyTable`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ActualPolicy {
    /// Flag `dormant` of the table: its rules are not in force.
    pub dormant: bool,
    /// It should belong to this process, and belongs to nobody: whoever flushes all rules takes it away.
    pub unowned: bool,
    /// Named counters.
    pub counters: BTreeSet<CounterName>,
    /// Named sets and maps.
    pub sets: BTreeMap<PolicyName, ActualSet>,
    /// Chains.
    pub chains: BTreeMap<PolicyName, ActualChain>,
    /// Objects of kinds that Husk never makes.
    pub foreign: BTreeSet<ForeignObject>,
}

/// A set or map in the kernel.
#[derive(Debug, Clone, PartialEq)]
pub enum ActualSet {
    /// It is of a form that Husk makes.
    Ours(Arc<PolicySet>),
    /// The same, but it has elements of forms that Husk never makes.
    Spoilt {
        /// What its keys are.
        key: PolicyKey,
        /// What its values are.
        value: PolicyValueKind,
    },
    /// Its type or its flags are none that Husk gives a set.
    Foreign,
}

/// A chain in the kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct ActualChain {
    /// What cannot be changed in place.
    pub hook: ActualHook,
    /// Comments of the rules in order; none for a rule without.
    pub rules: Vec<Option<String>>,
    known: Known,
}

/// Where packets meet a chain in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActualHook {
    /// Nowhere; other chains lead to it.
    None,
    /// There, at that priority; its policy is accept.
    Base(Hook, i32),
    /// Its hook, type, policy or flags are none that Husk gives a chain.
    Foreign,
}

/// The chain as it was when Husk wrote it into the kernel, where that is known. Says nothing that the comments do not say, but
/// spares their comparison.
#[derive(Debug, Clone, Default)]
struct Known(Option<Arc<PolicyChain>>);

impl PartialEq for Known {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// An object that stands in the table though Husk never makes one of its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ForeignObject {
    /// A stateful object of this type (`NFT_OBJECT_*`).
    Stateful(u32, String),
    /// A flow table.
    Flowtable(String),
}

impl ActualPolicy {
    /// The state of a kernel that holds exactly this table.
    #[must_use]
    pub fn of(table: &PolicyTable) -> Self {
        Self {
            dormant: false,
            unowned: false,
            counters: table.counters.clone(),
            sets: table.sets.iter().map(|(name, set)| (name.clone(), ActualSet::Ours(set.clone()))).collect(),
            chains: table.chains.iter().map(|(name, chain)| (name.clone(), ActualChain::of(chain))).collect(),
            foreign: BTreeSet::new(),
        }
    }
}

impl ActualChain {
    fn of(chain: &Arc<PolicyChain>) -> Self {
        Self {
            hook: ActualHook::of(chain),
            rules: chain.rules.iter().map(|it| Some(rule::comment(it))).collect(),
            known: Known(Some(chain.clone())),
        }
    }

    fn is_known_as(&self, chain: &Arc<PolicyChain>) -> bool {
        self.known.0.as_ref().is_some_and(|known| Arc::ptr_eq(known, chain))
    }
}

impl ActualHook {
    fn of(chain: &PolicyChain) -> Self {
        chain.hook.map_or(Self::None, |(hook, priority)| Self::Base(hook, priority))
    }
}

/// Values of the named counters in the calling thread's network namespace; empty when there is no table.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel has no nftables, and the errors of a broken netlink exchange.
pub fn read_counters() -> Result<BTreeMap<CounterName, CounterValue>, Error> {
    nfnetlink::counters(&mut nfnetlink::open()?, marks::NFT_POLICY_TABLE)
}

/// The table in words.
fn object() -> String {
    format!("nft table inet {}", marks::NFT_POLICY_TABLE)
}

#[cfg(test)]
mod tests;
