//! Associations and policies of the fake kernel.

use nix::errno::Errno;

use super::{FakeState, refused};
use crate::error::Error;
use crate::kernel::Change;
use crate::wireguard::KeyRing;
use crate::xfrm::{ActualXfrmState, XfrmPolicyChange, XfrmStateChange, association_key};

impl FakeState {
    pub(super) fn change_xfrm_state(
        &mut self,
        change: &Change,
        state_change: &XfrmStateChange,
        keys: &KeyRing,
    ) -> Result<(), Error> {
        match state_change {
            XfrmStateChange::Add { key, .. } if self.own.xfrm_states.contains_key(key) => {
                return Err(refused(change, Errno::EEXIST));
            }
            XfrmStateChange::Add { key, state } => {
                association_key(key, &state.association, keys)?;
                let found = ActualXfrmState {
                    parameters: Some(state.parameters.clone()),
                    source: state.parameters.source,
                    packets: 0,
                    bytes: 0,
                    undecryptable: 0,
                };
                self.installed_associations.push(*key);
                self.own.xfrm_states.insert(*key, found);
            }
            XfrmStateChange::Remove { key } => {
                self.own.xfrm_states.remove(key);
            }
        }
        Ok(())
    }

    pub(super) fn change_xfrm_policy(
        &mut self,
        change: &Change,
        policy_change: &XfrmPolicyChange,
    ) -> Result<(), Error> {
        match policy_change {
            XfrmPolicyChange::Add { key, .. } if self.own.xfrm_policies.contains_key(key) => {
                return Err(refused(change, Errno::EEXIST));
            }
            XfrmPolicyChange::Add { key, policy } | XfrmPolicyChange::Replace { key, policy } => {
                self.own.xfrm_policies.insert(*key, Some(policy.clone()));
            }
            XfrmPolicyChange::Remove { key } => {
                self.own.xfrm_policies.remove(key);
            }
        }
        Ok(())
    }
}
