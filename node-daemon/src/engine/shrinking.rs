//! An underlay that has become smaller: the others are told before the own node is touched.
//!
//! What they send in the meantime is larger than this node's link takes, and nobody tells them: the way from here to their
//! routes, over the cluster source, is the long one. Of what this node's own pods send meanwhile nothing is lost for good: its
//! kernel knows the link's new MTU already.
//!
//! A larger MTU is told at the end of a pass, as everything else is: only then can this node receive what comes.

use husk_dataplane::kernel::Kernel;
use husk_overlay::issue::Issue;
use husk_overlay::plan::Plan;
use husk_overlay::record::NodeRecord;

use super::{Engine, Node};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Publishes the record that is published, with the smaller MTU. That it cannot is said at the end of the pass, which tries
    /// again.
    pub(super) fn tell_of_shrinking(&mut self, plan: &Plan, issues: &[Issue]) {
        let own = self.snapshot.nodes.get(&self.parts.node_name);
        let Some((published, planned)) = own.zip(plan.record.as_ref()) else { return };
        // Somebody else's record under this name is not this node's to change.
        if planned.underlay_mtu >= published.underlay_mtu || planned.instance != published.instance {
            return;
        }
        let record = NodeRecord { underlay_mtu: planned.underlay_mtu, ..published.clone() };
        // A source that did not take it once keeps devices and pods waiting no second time.
        if self.untaken_mtu == Some(planned.underlay_mtu) || !self.may_publish(plan, issues) {
            return;
        }
        match self.parts.source.publish(&record) {
            Ok(()) => {
                tracing::info!(mtu = record.underlay_mtu, "told the others of a smaller underlay MTU");
                self.note_published(record);
                self.untaken_mtu = None;
            }
            Err(error) => {
                tracing::debug!(%error, "the others do not know of the smaller underlay MTU yet");
                self.untaken_mtu = Some(planned.underlay_mtu);
            }
        }
    }
}
