//! Offload of the VXLAN device: with whom it can be tried follows from the plan, what was found comes back with the facts.

use husk_dataplane::kernel::Kernel;
use husk_overlay::facts::Facts;
use husk_overlay::offload::candidates;
use husk_overlay::plan::Plan;

use super::{Engine, Node};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// After a pass: the device is as the plan has it, and the kernel has the routes.
    pub(super) fn test_offload(&mut self, facts: &Facts, plan: &Plan) {
        self.parts.node.test_offload(candidates(plan, facts));
    }
}
