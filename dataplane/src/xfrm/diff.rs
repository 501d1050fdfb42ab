//! What has to change.

use std::collections::BTreeMap;

use husk_overlay::kernel::{XfrmPolicy, XfrmPolicyKey, XfrmState, XfrmStateKey};

use super::model::{ActualXfrmPolicy, ActualXfrmState, XfrmPolicyChange, XfrmStateChange};
use crate::sweep::Sweep;

/// What has to change so that the associations are as desired. One that differs from what is desired goes and is not made
/// anew: its key has been in use. Nor is one that was there when the plan was made and has vanished since.
#[must_use]
pub fn diff_states(
    desired: &BTreeMap<XfrmStateKey, XfrmState>,
    actual: &BTreeMap<XfrmStateKey, ActualXfrmState>,
    sweep: Sweep,
) -> Vec<XfrmStateChange> {
    let missing = desired.iter().filter(|(key, state)| state.fresh && !actual.contains_key(key));
    let added = missing.map(|(key, state)| XfrmStateChange::Add { key: *key, state: Box::new(state.clone()) });
    let unwanted = actual.iter().filter(|(key, found)| {
        let wanted = desired.get(key).is_some_and(|state| found.parameters.as_ref() == Some(&state.parameters));
        sweep == Sweep::Allowed && !wanted
    });
    let removed = unwanted.map(|(key, _)| XfrmStateChange::Remove { key: *key });
    added.chain(removed).collect()
}

/// What has to change so that the policies are as desired.
#[must_use]
pub fn diff_policies(
    desired: &BTreeMap<XfrmPolicyKey, XfrmPolicy>,
    actual: &BTreeMap<XfrmPolicyKey, ActualXfrmPolicy>,
    sweep: Sweep,
) -> Vec<XfrmPolicyChange> {
    let set = desired.iter().filter_map(|(key, policy)| {
        let (key, wanted) = (*key, policy.clone());
        match actual.get(&key) {
            None => Some(XfrmPolicyChange::Add { key, policy: wanted }),
            Some(Some(found)) if found == policy => None,
            Some(_) => Some(XfrmPolicyChange::Replace { key, policy: wanted }),
        }
    });
    let unwanted = actual.keys().filter(|key| sweep == Sweep::Allowed && !desired.contains_key(key));
    set.chain(unwanted.map(|key| XfrmPolicyChange::Remove { key: *key })).collect()
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
