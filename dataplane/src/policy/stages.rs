//! A change in up to three transactions, so that no packet under way meets half of it.
//!
//! The kernel switches chains and the elements of most sets to a new generation at one moment. Not so those of concatenations of
//! ranges, of which it makes a copy that takes the place of the old one a little later (net/netfilter/nf_tables_api.c
//! `nf_tables_commit`, net/netfilter/nft_set_pipapo.c `nft_pipapo_commit`): a packet in between finds a peer's new class, and
//! nothing of what the class may do. And a packet that was on its way through a chain when it was deleted looks into sets that
//! are gone. Both were dropped though allowed before and after. So what nothing refers to yet comes first, then what refers to
//! it, and what nothing refers to any more goes last. Policy changes at one moment, that of the transaction in the middle.

use std::collections::BTreeSet;

use husk_overlay::kernel::policy::{PolicyElement, PolicyKey, PolicyName};

use super::PolicyChange;

/// The changes of each transaction, in order; none is empty.
pub(super) fn stages(changes: &[PolicyChange]) -> Vec<Vec<PolicyChange>> {
    let entangled = entangled(changes);
    let mut stages = [Vec::new(), Vec::new(), Vec::new()];
    for change in changes {
        stages[stage(change, &entangled)].push(change.clone());
    }
    stages.into_iter().filter(|stage| !stage.is_empty()).collect()
}

fn stage(change: &PolicyChange, entangled: &BTreeSet<PolicyName>) -> usize {
    match change {
        PolicyChange::AddCounter { .. } | PolicyChange::AddSet { .. } => 0,
        PolicyChange::AddChain { chain, .. } if chain.hook.is_none() => 0,
        PolicyChange::AddElements { name, set, .. }
            if set.key == PolicyKey::ClassAndService && !entangled.contains(name) =>
        {
            0
        }
        PolicyChange::DeleteElements { name, set, .. }
            if set.key == PolicyKey::ClassAndService && !entangled.contains(name) =>
        {
            2
        }
        PolicyChange::DeleteCounter { .. } | PolicyChange::DeleteSet { .. } | PolicyChange::DeleteChain { .. } => 2,
        PolicyChange::CreateTable { .. }
        | PolicyChange::ReplaceTable { .. }
        | PolicyChange::DeleteTable
        | PolicyChange::ReplaceSet { .. }
        | PolicyChange::RefillSet { .. }
        | PolicyChange::AddElements { .. }
        | PolicyChange::DeleteElements { .. }
        | PolicyChange::AddChain { .. }
        | PolicyChange::ReplaceChain { .. }
        | PolicyChange::RebuildChain { .. }
        | PolicyChange::DeleteForeign { .. } => 1,
    }
}

/// Sets in which what is new may overlap what goes: classes whose services change, which only an outsider brings about, or two
/// classes that share their number.
fn entangled(changes: &[PolicyChange]) -> BTreeSet<PolicyName> {
    let classes = |removed: bool| {
        let elements = changes.iter().filter_map(move |change| match change {
            PolicyChange::AddElements { name, elements, .. } if !removed => Some((name, elements)),
            PolicyChange::DeleteElements { name, elements, .. } if removed => Some((name, elements)),
            _ => None,
        });
        let classes = elements.flat_map(|(name, elements)| {
            elements.keys().filter_map(move |element| match element {
                PolicyElement::ClassAndService { class, .. } => Some((name.clone(), *class)),
                _ => None,
            })
        });
        classes.collect::<BTreeSet<_>>()
    };
    classes(false).intersection(&classes(true)).map(|(name, _)| name.clone()).collect()
}
