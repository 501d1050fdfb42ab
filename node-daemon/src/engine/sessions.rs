//! A WireGuard peer that was just set up has no session, but the other side may think it has one.
//!
//! The other side then sends under keys that nobody here knows any more, and notices only when nothing has come back for
//! 15 seconds (`KEEPALIVE_TIMEOUT` + `REKEY_TIMEOUT`, WireGuard paper section 6.5). So the node sends a packet of its own
//! through the tunnel, which makes the device start a handshake, and the other side goes over to the new session.

use std::net::IpAddr;

use husk_dataplane::kernel::{Actual, Kernel, Table};
use husk_dataplane::reconcile::Outcome;
use husk_overlay::plan::Plan;

use super::{Engine, Node};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// After a pass that changed WireGuard devices: one packet to each peer without a session.
    pub(super) fn start_sessions(&mut self, plan: &Plan, outcome: &Outcome) {
        if !outcome.applied.contains_key(&Table::Wireguard) {
            return;
        }
        let mut actual = Actual::default();
        if let Err(error) = self.parts.kernel.read(Table::Wireguard, &plan.desired, &mut actual) {
            tracing::debug!(%error, "sessions with new peers start with their first packet");
            return;
        }
        let has_none = |key| {
            let mut devices = actual.wireguard.values();
            devices.any(|device| device.status.get(key).is_some_and(|status| status.last_handshake.is_none()))
        };
        let fresh = plan.peers.values().filter(|peer| peer.public_key.as_ref().is_some_and(has_none));
        let routers: Vec<IpAddr> = fresh.filter_map(|peer| peer.router.iter().next()).collect();
        self.parts.node.greet(&routers);
    }
}
